"""Proves that a model, a tokenizer and an image processor that do not fit each other are refused in one line, before a run has
written anything, and that those that fit are not."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_maskclip.errors import ConfigError


@pytest.fixture
def clip(make_clip, processor, tmp_path) -> Path:
    """The folder of a CLIP that training takes."""
    folder = tmp_path / "clip"
    make_clip().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def word_tokenizer(folder: Path, words: list[str], end_id: int, adds_end: bool = True, **special) -> str:
    """A tokenizer of whole words in the manner of RoBERTa's, with `</s>` at an id of choice."""
    tokens = ["<s>", "<pad>", *words, "<unk>"]
    tokens.insert(end_id if end_id >= 0 else len(tokens), "</s>")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds_end:
        pairs = [("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pairs)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"} | special
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    return str(folder)


WORDS = "a red ball on grass two blue fish small house green tree left of car number".split() + [str(n) for n in range(20)]


def change(file: Path, **values) -> None:
    content = json.loads(file.read_text())
    for name, value in values.items():
        *parts, last = name.split("__")
        place = content
        for part in parts:
            place = place[part]
        place[last] = value
    file.write_text(json.dumps(content))


def without_tokenizer(clip: Path) -> None:
    for file in clip.glob("tokenizer*"):
        file.unlink()
    for file in ("vocab.json", "merges.txt"):
        (clip / file).unlink(missing_ok=True)


def with_a_partial_tokenizer(clip: Path) -> None:
    """Its configuration alone, as an interrupted download leaves it; of that, too, Transformers makes one of two tokens."""
    configuration = json.loads((clip / "tokenizer_config.json").read_text())
    without_tokenizer(clip)
    (clip / "tokenizer_config.json").write_text(json.dumps(configuration))


def without_image_processor(clip: Path) -> None:
    for file in ("preprocessor_config.json", "processor_config.json"):
        (clip / file).unlink(missing_ok=True)


def with_processor_size(clip: Path, **values) -> None:
    file = clip / "preprocessor_config.json"
    prefix = ""
    if not file.exists():
        file, prefix = clip / "processor_config.json", "image_processor__"
    change(file, **{prefix + key: value for key, value in values.items()})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_tokenizer, "tokenizer='.*clip': the folder has no tokenizer files .*; name one by --tokenizer"),
        (with_a_partial_tokenizer, r"tokenizer='.*clip' \(2 tokens, end token 2 .*\) does not fit .*end token 5\d\d\)"),
        (
            lambda f: word_tokenizer(f, [f"w{n}" for n in range(2000)], -1),
            r"\(2004 tokens, end token 2003 '</s>'\) does not",
        ),
        (lambda f: word_tokenizer(f, WORDS, 2), r"\(\d+ tokens, end token 2 '</s>'\) .*vocabulary of \d+, end token \d+\)"),
        (without_image_processor, "model='.*clip': cannot be used .*"),
        (lambda f: with_processor_size(f, crop_size={"height": 64, "width": 64}), "gives 64 x 64 pixels, .* takes 32 x 32"),
        (
            lambda f: with_processor_size(f, do_center_crop=False, size={"shortest_edge": 32}),
            r"gives pictures of any shape \(.*shortest_edge.*\), its vision tower takes 32 x 32",
        ),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_one_line(spoil, message, clip, run, tmp_path):
    spoil(clip)
    with pytest.raises(ConfigError, match=message) as error:
        run(model=str(clip))
    assert "\n" not in str(error.value)
    assert "clip" in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("end_id", "words", "changed", "message"),
    [
        (2, WORDS, {}, "end token 2 '</s>'.*with the end token 2 Transformers pools at a caption's highest id, not at 2"),
        (3, ["other"], {}, r"of \d+ captions it tells 0 apart"),
        (3, ["number", "a"], {}, r"of \d+ captions it tells \d apart"),
        (3, WORDS, {"adds_end": False}, "does not end a caption with its end token 3 '</s>'"),
        (3, WORDS, {"eos_token": None}, "has no eos_token"),
        (3, WORDS, {"pad_token": None}, "has no pad_token"),
    ],
)
def test_a_tokenizer_that_no_text_tower_can_read_is_one_line(end_id, words, changed, message, run, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        run(tokenizer=word_tokenizer(tmp_path / "words", words, end_id, **changed))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("end_id", [3, 7, -1])
def test_a_tokenizer_of_another_kind_that_fits_trains(end_id, run, tmp_path):
    name = word_tokenizer(tmp_path / "words", WORDS, end_id)
    _, steps, folder = run(tokenizer=name, max_steps=1)
    assert len(steps) == 1
    text = json.loads((folder / "export" / "config.json").read_text())["text_config"]
    assert text["eos_token_id"] == AutoTokenizer.from_pretrained(name).eos_token_id != 2


def test_a_folder_that_fits_trains_and_so_does_its_legacy_end_token(clip, run):
    """OpenAI's own configurations say 2 and mean the highest id."""
    assert len(run(model=str(clip), max_steps=1)[1]) == 1
    change(clip / "config.json", text_config__eos_token_id=2)
    assert len(run(model=str(clip), max_steps=1)[1]) == 1


def test_pictures_of_another_number_of_channels_are_one_line(config_parts, processor, run, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    parts = config_parts()
    parts["vision_config"]["num_channels"] = 1
    CLIPModel(CLIPConfig(**parts)).save_pretrained(tmp_path / "grey")
    processor.save_pretrained(tmp_path / "grey")
    with pytest.raises(ConfigError, match="its vision tower takes 1 channels; training reads pictures of 3"):
        run(model=str(tmp_path / "grey"))


def test_the_folder_of_a_run_is_told_from_its_model(run, tmp_path):
    _, _, folder = run(max_steps=1, checkpoint_every=1)
    with pytest.raises(ConfigError, match="is the folder of a run; its model is .*run/export$"):
        run(model=str(folder), output_dir=str(tmp_path / "next"))
    shutil.rmtree(folder / "export")
    with pytest.raises(ConfigError, match="its model is .*run/checkpoints/step-00000001$"):
        run(model=str(folder), output_dir=str(tmp_path / "next"))
