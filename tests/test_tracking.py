"""Proves that what a run reports is complete, comes from one process, goes on after a resumption, and is never public."""

import json
import math
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate import tracking as accelerate_tracking
from accelerate.utils import LoggerType, compare_versions
from helpers import losses_of
from processes import Processes

from hf_maskclip.errors import ConfigError
from hf_maskclip.phases import Phase, Timeline
from training import tracking
from training.config import TrainingConfig
from training.loop import progress_bar
from training.tracking import MetricsLog, ProgressLines, SlowDataWarning, StepResult, check_tracker, read_metrics, start_tracker
from training.train import main

NAMES = (
    "loss learning_rate logit_scale phase image_size kept_patches views text_tokens samples_seen samples_per_second "
    "data_seconds step_seconds skipped"
)


def test_each_step_has_all_names_and_evaluations_have_theirs(run, data):
    _, steps, folder = run(eval_data=f"{data}/val-0.tar")
    assert all(set(NAMES.split()) | {"step"} == record.keys() for record in steps)
    (evaluated,) = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" not in record]
    assert evaluated["step"] == 4
    assert evaluated["eval/retrieval_data/text_to_image_recall@1"] <= 1


def test_a_log_forgets_the_steps_that_come_again_and_half_a_line(tmp_path):
    log = MetricsLog(Accelerator(cpu=True), tmp_path)
    for step in range(1, 6):
        log.write(step, loss=float(step))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log.forget_after(3)
    log.write(4, loss=0.5)
    assert [(record["step"], record["loss"]) for record in read_metrics(tmp_path / "metrics.jsonl")] == [
        *((step, float(step)) for step in (1, 2, 3)),
        (4, 0.5),
    ]


def test_waiting_for_data_is_said_once(caplog):
    warning = SlowDataWarning()
    for _ in range(49):
        warning.watch(0.4, 1.0)
    warning.watch(0.2, 1.0)  # one quick step, and the count begins anew
    for _ in range(49):
        warning.watch(0.4, 1.0)
    assert not caplog.records
    for _ in range(200):
        warning.watch(0.4, 1.0)
    assert len(caplog.records) == 1
    assert "use more num_workers" in caplog.text


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_line(name, monkeypatch):
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=rf"report_to='{name}': .* not installed \(pip install {name}\)$"):
        check_tracker(name)
    check_tracker("none")


class FakeTracker(ModuleType):
    """Stands for trackio or wandb: takes notes of what it is called with."""

    def __init__(self, name: str):
        super().__init__(name)
        self.calls: list[tuple] = []
        self.config = SimpleNamespace(update=lambda values, **kwargs: self.calls.append(("config", values)))

    def init(self, **kwargs):
        self.calls.append(("init", kwargs))
        return self

    def log(self, values, step=None, **kwargs):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


def is_too_old(name: str) -> bool:
    return name == "trackio" and compare_versions("accelerate", "<", "1.14")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_each_step_once_under_the_name_of_the_folder(name, run, monkeypatch):
    if is_too_old(name):
        pytest.skip("trackio needs accelerate 1.14")
    fake = FakeTracker(name)
    monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [LoggerType(name)])
    for resume in ("none", "auto", "none"):
        _, _, folder = run(report_to=name, checkpoint_every=2, resume=resume)
        if resume == "none":
            (folder / "checkpoints" / "step-00000004").rename(folder / "gone")
    starts = [call[1] for call in fake.calls if call[0] == "init"]
    assert len(starts) == 3
    assert starts[0] == starts[1]
    identity = "name" if name == "trackio" else "id"
    ids = [start[identity] for start in starts]
    assert all(each.startswith("run-") for each in ids)
    assert ids[2] != ids[0]  # a new run under an old name
    assert starts[0]["project"] == "hf_maskclip"
    if name == "wandb":
        assert (starts[0]["name"], starts[0]["dir"]) == ("run", str(folder))
    assert starts[0]["resume"] == "allow"
    assert starts[0].get("private", False) == (name == "trackio")
    logged = [call[1] for call in fake.calls if call[0] == "log"]
    assert logged == [1, 2, 3, 4, 3, 4, 1, 2, 3, 4]
    assert set(NAMES.split()) - {"skipped"} <= fake.calls[-2][2].keys()
    assert fake.calls[-1] == ("finish",)


def count_trackers(options: dict) -> int:
    """Train on this process and say on its output how often a tracker was started."""
    fake = FakeTracker("trackio")
    sys.modules["trackio"] = fake
    accelerate_tracking._available_trackers = [LoggerType("trackio")]
    main(TrainingConfig(**options))
    print(json.dumps({"rank": os.environ["RANK"], "starts": sum(call[0] == "init" for call in fake.calls)}))
    return 0


@pytest.mark.slow
def test_of_two_processes_one_reports(options, tmp_path):
    two = Processes(2, tmp_path, count_trackers, options | {"report_to": "trackio", "max_steps": 2})
    assert two.wait() == [0, 0], two.printed()[-2000:]
    starts = [json.loads(line) for line in two.printed().splitlines() if line.startswith('{"rank"')]
    assert sorted((each["rank"], each["starts"]) for each in starts) == [("0", 1), ("1", 0)]
    assert len(losses_of(options["output_dir"])) == 2


def test_no_tracker_is_started_unless_asked_for():
    calls = []
    start_tracker(SimpleNamespace(init_trackers=calls.append), TrainingConfig())
    assert not calls
    assert TrainingConfig().report_to == "none"


def test_the_progress_bar_counts_pairs_and_is_off_where_nobody_looks(monkeypatch, capsys):
    main_process = SimpleNamespace(is_main_process=True)
    run = SimpleNamespace(num_steps=10, steps_done=4, samples_seen=lambda step: 64 * step, accelerator=main_process)
    bar = progress_bar(run)
    assert bar.disable
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress_bar(run)
    assert (bar.total, bar.n, bar.unit, bar.disable) == (640, 256, "pair", False)
    run.accelerator.is_main_process = False
    assert progress_bar(run).disable


def test_a_log_that_is_no_terminal_has_a_line_every_half_minute(capsys, monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
    monkeypatch.setattr(tracking, "time", clock)
    lines = ProgressLines(Timeline([Phase(1.0)], num_steps=1000), is_on=True)
    for step in range(1, 101):
        lines.step(
            step,
            8 * step,
            StepResult(2.0, 44.8, 64, 1, 16, 64, 1, 14.3),
            learning_rate=1e-3,
            data_seconds=0.5,
            step_seconds=2.0,
        )
        clock.now += 2.0
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "step 1 of 1000, 8 pairs, loss 2.0000, 45 of 64 patches, 16 text tokens, learning rate 0.001"
    rest = "loss 2.0000, 45 of 64 patches, 16 text tokens, learning rate 0.001, 4.0 pairs/s, 25% of the time waiting for data"
    left = ["0:32:48", "0:32:18", "0:31:48", "0:31:18", "0:30:48", "0:30:18"]
    assert printed[1:] == [
        f"step {step} of 1000, {8 * step} pairs, {rest}, {time} left"
        for step, time in zip(range(16, 92, 15), left, strict=True)
    ]


def test_a_run_says_its_first_step_its_checkpoints_and_its_evaluations(run, data, capsys):
    _, _, folder = run(checkpoint_every=2, eval_every=2, eval_data=f"{data}/val-0.tar")
    printed = capsys.readouterr().err
    what = "tiny, 1.5 million parameters, patch mask pgs over 64 patches; "
    assert f"{what}{data}/train-*.tar, 4 shards; steps 1 to 4 of 4 pairs; 1 process with 0 data workers each, on " in printed
    assert "step 1 of 4, 4 pairs, loss " in printed
    assert f"step 2: saved {folder}/checkpoints/step-00000002\n" in printed
    assert "step 2: retrieval_data: image_to_text_recall@1 " in printed


@pytest.mark.parametrize(("losses", "is_said"), [([math.log(16)] * 20, True), ([3.0] * 20 + [1.0] * 10, False), ([], False)])
def test_a_loss_that_ends_at_chance_is_said(losses, is_said, caplog):
    lines = ProgressLines(Timeline([Phase(1.0)], num_steps=40), is_on=False)
    for step, loss in enumerate(losses, start=1):
        lines.step(step, 16 * step, StepResult(loss, 64, 64, 1, 16, 64, 1, 14.3), 0.1, 0.0, 1.0)
    lines.warn_of_chance(16, math.log(16))
    assert ("which is chance for 16 pairs (2.7726)" in caplog.text) == is_said
