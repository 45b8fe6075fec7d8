"""The checks of the options of captions, rows of the table in test_options.py."""

import json

import torch
from option_effects import Effects


def text_mask(on: Effects):
    kept = {name: on.batch(text_mask=name, text_tokens=4).input_ids for name in ("truncate", "random", "frequency")}
    whole = on.batch().input_ids
    assert torch.equal(kept["truncate"][:, :3], whole[:, :3])
    assert not torch.equal(kept["truncate"], kept["random"])
    assert not torch.equal(kept["truncate"], kept["frequency"])
    assert not torch.equal(kept["random"], kept["frequency"])


def text_tokens(on: Effects):
    assert on.batch(text_mask="truncate", text_tokens=5).input_ids.shape == (4, 5)
    assert on.batch().input_ids.shape == (4, 16)


def word_frequencies(on: Effects):
    (on.tmp_path / "words.json").write_text(json.dumps({"Grass": 3, "a": 1}))
    frequency = {"text_mask": "frequency", "text_tokens": 4}
    counted, given = (on.prepared(**frequency, word_frequencies=file).data for file in ("", str(on.tmp_path / "words.json")))
    assert counted.word_counts["number"] == 20
    assert given.word_counts == {"grass": 3, "a": 1}
    assert given.loader.dataset.sources[0].form_at(1).text_mask.discard == {"grass": 1 - 3**-0.5, "a": 0.0}


def word_threshold(on: Effects):
    frequency = {"text_mask": "frequency", "text_tokens": 4}
    runs = [on.prepared(**frequency, word_threshold=threshold) for threshold in (0.0, 1.0)]
    by_rule, given = (run.data.loader.dataset.sources[0].form_at(1).text_mask.discard for run in runs)
    assert max(by_rule.values()) > 0.5
    assert set(given.values()) == {0.0}
