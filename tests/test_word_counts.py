"""Proves that the words of a run are counted once or taken from a file, the same on all processes and after a resume,
and that a file which cannot be used is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from helpers import as_killed_at, losses_of, pair, same, words, write_shard
from processes import Processes

from hf_maskclip.errors import ConfigError
from training.config import TrainingConfig
from training.data import prepare as prepare_module
from training.data.prepare import word_counts_of_run
from training.data.words import FILE, count_words, read_given_counts
from training.train import program

FREQUENCY = {"text_mask": "frequency", "text_tokens": 5, "max_steps": 4, "checkpoint_every": 1}


def test_a_run_counts_its_captions_and_a_resumed_one_has_the_same_counts_to_the_bit(run, tmp_path, monkeypatch):
    _, expected, folder = run(**FREQUENCY)
    counts = json.loads((folder / FILE).read_text())
    assert counts["number"] == 20
    assert counts["a"] == 20
    assert counts == count_words(pair(number)["txt"].decode() for number in range(20))
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    as_killed_at(folder, 2)
    (folder / FILE).unlink()
    monkeypatch.setattr(prepare_module, "count_words", lambda captions: pytest.fail("words are counted again"))
    _, steps, _ = run(**FREQUENCY, resume="auto")
    assert same(steps) == same(expected)
    assert json.loads((folder / FILE).read_text()) == counts
    as_killed_at(folder, 3)
    (folder / "checkpoints" / "step-00000003" / FILE).unlink()
    with pytest.raises(ConfigError, match=f"resume: .*step-00000003 has no {FILE}"):
        run(**FREQUENCY, resume="auto")


def test_counts_by_hand_are_what_words_stay_by_and_are_kept(run, tmp_path):
    file = tmp_path / "words.json"
    file.write_text(json.dumps({"a": 0.5, "Number": 0.25, "red-ball": 0.1}))
    given = FREQUENCY | {"word_frequencies": str(file)}
    _, expected, folder = run(**given)
    _, counted, _ = run(**FREQUENCY, output_dir=str(tmp_path / "counted"))
    assert same(counted) != same(expected)
    assert json.loads((folder / FILE).read_text()) == {"a": 0.5, "number": 0.25, "-": 0.1, "ball": 0.1, "red": 0.1}
    again = run(**FREQUENCY | {"word_frequencies": str(folder / FILE)}, output_dir=str(tmp_path / "again"))[1]
    assert same(again) == same(expected)
    as_killed_at(folder, 2)
    file.write_text(json.dumps({"a": 1}))
    with pytest.raises(ConfigError, match=f"resume: word_frequencies='{file}' differs from .*step-00000002/{FILE}: give"):
        run(**given, resume="auto")
    with pytest.raises(ConfigError, match="other options than word_frequencies='' "):
        run(**FREQUENCY, resume="auto")
    file.unlink()  # the checkpoint has them
    assert same(run(**given, resume="auto")[1]) == same(expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be used (.*No such file"),
        ("{", "cannot be used (Expecting"),
        ("[1]", r"has no words: must be JSON such as {\"a\": 120"),
        ("{}", "has no words"),
        ('{" ": 3}', "has no words"),
        ('{"a": 0}', "the count of 'a' is 0: must be a number above 0"),
        ('{"a": -1}', "the count of 'a' is -1: must be"),
        ('{"a": NaN}', "the count of 'a' is nan: must be"),
        ('{"a": Infinity}', "the count of 'a' is inf: must be"),
        ('{"a": true}', "the count of 'a' is True: must be"),
        ('{"a": "3"}', "the count of 'a' is 3: must be"),
        ('{"words": {"a": 3}}', "the count of 'words' is {'a': 3}: must be"),
        ('{"a": 1, "dog": 2, "a": 3}', r"cannot be used \('a' comes more than once"),
    ],
)
def test_a_file_of_counts_that_cannot_be_used_is_one_line(content, message, tmp_path):
    file = tmp_path / "words.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message.replace("(.*", r"\(.*").replace("(Exp", r"\(Exp")) as error:
        read_given_counts(str(file))
    assert str(error.value).startswith(f"word_frequencies={str(file)!r}")
    assert "\n" not in str(error.value)


def test_counts_of_several_words_and_cases_are_added(tmp_path):
    (tmp_path / "words.json").write_text(
        '\ufeff{"Dog": 2, "dog": 3, "T-shirt": 5, "a dog": 0.5, "cafe\u0301": 1}', encoding="utf-8"
    )
    found = read_given_counts(str(tmp_path / "words.json"))
    assert found == {"dog": 5.5, "t": 5, "-": 5, "shirt": 5, "a": 0.5, "café": 1}


def counts_here(folder: Path) -> int:
    """What a process has that found other captions than the others."""
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    config = TrainingConfig(text_mask="frequency", text_tokens=5)
    counts = word_counts_of_run(config, None, [f"process {rank} " * (rank + 1)])
    (folder / f"{rank}.json").write_text(json.dumps(counts))
    accelerator.end_training()
    return 0


@pytest.mark.slow
def test_all_processes_have_the_counts_of_the_first(tmp_path):
    assert Processes(2, tmp_path / "printed", counts_here, tmp_path).wait() == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second == {"process": 1, "0": 1}


@pytest.mark.slow
def test_two_processes_with_two_workers_each_go_on_to_the_last_bit(options, data, tmp_path):
    write_shard(data / "train-4.tar", {f"4-{n}": pair(n, "a zebra and a quilted xylophone on grass") for n in range(8)})
    options |= FREQUENCY | {"num_workers": 2, "shuffle_buffer": 5}
    assert Processes(2, tmp_path / "printed", program, words(options)).wait() == [0, 0]
    expected, folder = losses_of(options["output_dir"]), Path(options["output_dir"])
    assert len(expected) == 4
    shutil.copytree(folder, tmp_path / "again")
    as_killed_at(tmp_path / "again", 2)
    options |= {"output_dir": tmp_path / "again", "resume": "auto"}
    processes = Processes(2, tmp_path / "printed-again", program, words(options))
    assert processes.wait() == [0, 0], processes.printed()[-3000:]
    assert same(losses_of(tmp_path / "again")) == same(expected)
    assert (tmp_path / "again" / FILE).read_text() == (folder / FILE).read_text()
