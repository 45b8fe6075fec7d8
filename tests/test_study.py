"""Proves that a study trains each method once by the real program and goes on after an interruption, and that equal time means
what it says."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from hf_maskclip.errors import ConfigError
from training.config import load_config
from training.study import run as study_run
from training.study.report import read_results
from training.study.run import StudyRun, learning_curve, steps_ratio, typical_seconds
from training.study.study import locked, program, read_study, runs_of

PAIR = "zero_shot_pair/top1"


@pytest.fixture
def values(options, data) -> dict:
    """A study of two methods on the small data."""
    base = {key: value for key, value in options.items() if key != "output_dir"}
    base |= {"model": "tiny", "eval_data": f"{data}/val-0.tar", "eval_every": 2}
    return {
        "base": base,
        "methods": {"none": "none", "random 0.5": {"name": "random", "mask_ratio": 0.5}},
        "seeds": [0],
        "headline": "text R@1",
        "columns": {"text R@1": ["retrieval_data/image_to_text_recall@1"]},
    }


@pytest.fixture
def write(tmp_path):
    def write(values: dict):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture
def trainings(monkeypatch) -> list[str]:
    """Trainings only write what a real one leaves, which the first test shows. The list of their folders; a masked step takes
    half the time of another one."""
    folders = []

    def call(command, log, lock):
        config = load_config(command[1:])
        folder = Path(config.output_dir)
        folders.append(config.output_dir.partition("/runs/")[2])
        (folder / "export").mkdir(parents=True)
        record = {"step": config.max_steps, "eval/retrieval_data/image_to_text_recall@1": 0.5}
        seconds = 1.0 if config.patch_mask == {"name": "none"} else 0.5
        views = 1 if config.views == "one" else 2
        same = {"loss": 1.0, "step_seconds": seconds, "phase": 1, "kept_patches": 16.0, "views": views}
        steps = [{"step": step} | same for step in range(1, config.max_steps + 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*steps, record]))
        summary = {"steps": len(steps), "samples_seen": 4 * len(steps), "train_seconds": seconds * len(steps)}
        summary |= {"results": {"retrieval_data": {"image_to_text_recall@1": 0.5, "n": 6}}}
        (folder / "eval.json").write_text(json.dumps(summary))

    monkeypatch.setattr(study_run, "call", call)
    return folders


def test_a_method_can_be_more_than_a_mask(write, values, trainings, tmp_path, capsys):
    phases = [{"share": 0.5, "image_size": 32}, {"share": 0.5}]
    values["base"] |= {"unmasked_tuning_steps": 1}
    values["methods"] |= {"resize": {"patch_mask": "none", "phases": phases, "unmasked_tuning_steps": 0}}
    values["methods"] |= {"two views": {"patch_mask": "random", "views": "two"}}
    path, folder = write(values), tmp_path / "study"
    runs = {run.method: run for run in runs_of(read_study(path), folder)}
    assert runs["resize"].options()["phases"] == phases
    assert runs["random 0.5"].options()["patch_mask"] == {"name": "random", "mask_ratio": 0.5}
    assert runs["random 0.5"].options()["unmasked_tuning_steps"] == 1
    assert program([str(path), "--output_dir", str(folder)]) == 0
    results = {result["method"]: result for result in read_results(folder / "results")}
    assert results["resize"]["options"] == {"phases": phases, "unmasked_tuning_steps": 0}
    assert results["none"]["options"] == {}
    assert (results["none"]["kept_patches"], results["two views"]["kept_patches"]) == (16, 32)
    assert program([str(path), "--output_dir", str(folder)]) == 0
    values["methods"]["resize"]["phases"] = [{"share": 1, "image_size": 32}]
    assert program([str(write(values)), "--output_dir", str(folder)]) == 2
    assert "was made with other options than the study has" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scenes", "pairs"])
def test_the_studies_of_this_project_have_the_fields_own_controls(name, masks_of_ideas):
    study = read_study(Path(__file__).resolve().parents[1] / "training" / "study" / f"{name}.yaml")
    assert {"resize 48", "frequency 8", "pgs 0.5, frequency 8", "random 0.75, two views"} <= study.methods.keys()


@pytest.mark.slow
def test_a_study_is_run_by_the_real_program_and_only_once(write, values, tmp_path, capsys):
    path, output_dir = write(values | {"methods": {"none": "none"}}), tmp_path / "study"
    assert program([str(path), "--output_dir", str(output_dir)]) == 0
    (result,) = read_results(output_dir / "results")
    assert (result["method"], result["steps"], result["samples_seen"], result["budget"]) == ("none", 4, 16, "samples")
    assert [point["step"] for point in result["curve"]] == [2, 4]
    assert result["curve"][-1]["metrics"] == result["metrics"]
    assert 0 < result["curve"][0]["seconds"] < result["curve"][1]["seconds"]
    assert result["seconds_per_step"] > 0
    assert result["kept_patches"] == 64
    assert result["machine"]["cpus"]
    assert result["versions"]["torch"]
    report = (output_dir / "report.md").read_text()
    assert read_results(output_dir / "results.jsonl") == [result]
    assert "| none | 1 |" in report
    assert (output_dir / "accuracy_over_time.png").stat().st_size > 10_000

    files = sorted((output_dir / "results").rglob("*.json"))
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    capsys.readouterr()
    assert program([str(path), "--output_dir", str(output_dir)]) == 0
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before
    assert capsys.readouterr().out == f"1 of 1 runs are finished: {output_dir}/report.md\n"
    (output_dir / "report.md").unlink()
    assert program([str(path), "--output_dir", str(output_dir), "--report_only"]) == 0
    assert (output_dir / "report.md").read_text() == report
    assert capsys.readouterr().out == f"1 finished runs: {output_dir}/report.md\n"


def test_an_interrupted_study_goes_on_and_begins_that_run_anew(write, values, tmp_path, trainings, monkeypatch, capsys):
    arguments = [str(write(values | {"seeds": [0, 1]})), "--output_dir", str(tmp_path / "study")]
    complete = study_run.call

    def interrupted(command, log, lock):
        complete(command, log, lock)
        if len(trainings) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(study_run, "call", interrupted)
    assert program(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().out
    for source in ("results", "results.jsonl"):
        assert [result["method"] for result in read_results(tmp_path / "study" / source)] == ["none"]

    monkeypatch.setattr(study_run, "call", complete)
    assert program(arguments) == 0
    folders = ["samples/none/seed-0", *2 * ["samples/random-0.5/seed-0"], "samples/none/seed-1", "samples/random-0.5/seed-1"]
    folders += ["time/random-0.5/seed-0", "time/random-0.5/seed-1"]
    assert trainings == folders
    gathered = read_results(tmp_path / "study" / "results.jsonl")
    assert len(gathered) == 6
    assert gathered == read_results(tmp_path / "study" / "results")
    printed = capsys.readouterr().out
    assert "[2/6] random 0.5, seed 0, equal samples: 4 steps in 2 s" in printed
    assert "[5/6] random 0.5, seed 0, equal time: 8 steps in 4 s" in printed
    assert "50.0%; 1 runs, about" in printed
    assert {export.parent.name for export in (tmp_path / "study" / "runs").rglob("export")} == {"seed-0"}  # no other is kept


def test_a_run_that_fails_is_named_and_the_others_go_on(write, values, tmp_path, trainings, monkeypatch, capsys):
    complete = study_run.call

    def failing(command, log, lock):
        if any("samples/random-0.5" in word for word in command):
            raise subprocess.CalledProcessError(2, command)
        complete(command, log, lock)

    monkeypatch.setattr(study_run, "call", failing)
    assert program([str(write(values)), "--output_dir", str(tmp_path / "study")]) == 1
    printed = capsys.readouterr().out
    assert "random 0.5, seed 0, equal samples: training.train ended with 2, see" in printed
    assert "random 0.5, seed 0, equal time: left out" in printed
    assert "1 of 3 runs are finished" in printed


def test_equal_time_is_that_of_the_baseline_by_the_fastest_seed_of_each(write, values, tmp_path):
    values["base"] |= {"max_steps": 100, "eval_every": 20, "unmasked_tuning_steps": 10, "warmup_steps": 5}
    study = read_study(write(values | {"seeds": [0, 1]}))
    run = StudyRun(study, tmp_path, 1, "time", "random 0.5")
    for seed, method, seconds in [(0, "none", 9.0), (1, "none", 0.6), (0, "random 0.5", 0.25), (1, "random 0.5", 0.5)]:
        assert method == "random 0.5" or steps_ratio(run) is None
        path = StudyRun(study, tmp_path, seed, "samples", method).result
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"seconds_per_step": seconds}))
    assert steps_ratio(run) == pytest.approx(2.4)
    options = run.options(2.4)
    scaled = ("max_steps", "eval_every", "unmasked_tuning_steps", "warmup_steps")
    assert [options[name] for name in scaled] == [240, 48, 24, 12]
    assert options["batch_size"] == 4
    assert run.options()["max_steps"] == 100
    values["methods"]["random 0.5"] = {"patch_mask": "random", "unmasked_tuning_steps": 20}
    own = StudyRun(read_study(write(values)), tmp_path, 0, "time", "random 0.5").options(1.5)
    assert (own["max_steps"], own["unmasked_tuning_steps"]) == (150, 30)
    study = read_study(write(values | {"seeds": [0, 1], "baseline": "random 0.5"}))
    assert steps_ratio(StudyRun(study, tmp_path, 1, "time", "none")) == pytest.approx(0.25 / 0.6)
    assert [run.method for run in runs_of(study, tmp_path) if run.budget == "time"] == ["none", "none"]


def test_equal_tokens_are_as_many_patches_as_the_baseline_encodes(write, values, tmp_path):
    study = read_study(write(values | {"budgets": ["samples", "tokens"], "further_seeds": [5]}))
    runs = [run for run in runs_of(study, tmp_path) if run.budget != "samples"]
    assert [(run.budget, run.method, run.seed) for run in runs] == [("tokens", "random 0.5", seed) for seed in (0, 5)]
    results = [
        (0, "none", {}),  # of a study that did not count them yet
        (5, "none", {"kept_patches": 16.0}),
        (0, "random 0.5", {"kept_patches": 9.0}),
        (5, "random 0.5", {"kept_patches": 7.0}),
    ]
    for seed, method, result in results:
        assert steps_ratio(runs[0]) is None or (seed, method) == (5, "random 0.5")
        file = StudyRun(study, tmp_path, seed, "samples", method).result
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result))
    assert steps_ratio(runs[0]) == 2.0
    options = runs[0].options(2.0)
    assert (options["max_steps"], options["eval_every"]) == (8, 8)  # its end only: no curve is drawn of it


def test_some_methods_get_no_run_of_equal_time(write, values, tmp_path):
    values["methods"] |= {"pgs": "pgs"}
    study = read_study(write(values | {"samples_only": ["pgs"]}))
    runs = [(run.budget, run.method) for run in runs_of(study, tmp_path)]
    assert runs == [("samples", "none"), ("samples", "random 0.5"), ("samples", "pgs"), ("time", "random 0.5")]


def test_methods_without_a_run_of_equal_time_are_evaluated_at_their_end_only(write, values, tmp_path):
    study = read_study(write(values | {"samples_only": ["random 0.5"]}))
    evaluated = {run.method: run.options()["eval_every"] for run in runs_of(study, tmp_path)}
    assert (values["base"]["eval_every"], values["base"]["max_steps"]) == (2, 4)
    assert evaluated == {"none": 2, "random 0.5": 4}


def test_methods_with_all_budgets_get_further_seeds(write, values, tmp_path):
    values["methods"] |= {"pgs": "pgs"}
    study = read_study(write(values | {"samples_only": ["pgs"], "further_seeds": [5]}))
    further = [(run.budget, run.method) for run in runs_of(study, tmp_path) if run.seed == 5]
    assert further == [("samples", "none"), ("samples", "random 0.5"), ("time", "random 0.5")]
    assert len(runs_of(study, tmp_path)) == 4 + 3
    fewer = read_study(write(values | {"fewer_seeds": ["pgs"], "further_seeds": [5]}))
    own = [run for run in runs_of(fewer, tmp_path) if run.method == "pgs"]
    assert [(run.budget, run.seed, run.options()["eval_every"]) for run in own] == [("samples", 0, 4), ("time", 0, 4)]
    for seed, method, seconds in ((0, "none", 2.0), (5, "none", 1.0), (0, "random 0.5", 0.25)):
        file = StudyRun(study, tmp_path, seed, "samples", method).result
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"seconds_per_step": seconds}))
    assert steps_ratio(StudyRun(study, tmp_path, 0, "time", "random 0.5")) == 1.0 / 0.25


def test_the_seconds_of_steps_and_of_the_curve_are_typical_ones():
    seconds = [9.0, 1.0, 1.0, 1.0, 3.0, 3.0]  # the first was held up, the last two saw whole images
    phases = [1, 1, 1, 1, 2, 2]
    steps = enumerate(zip(seconds, phases, strict=True), start=1)
    records = [{"step": step, "loss": 1.0, "step_seconds": value, "phase": phase} for step, (value, phase) in steps]
    assert typical_seconds(records) == [1.0] * 4 + [3.0] * 2
    assert typical_seconds([record | {"phase": 1} for record in records]) == [1.0] * 6
    evaluations = [{"step": step, f"eval/{PAIR}": 0.25, "eval/zero_shot_pair/n": 400} for step in (3, 5)]
    points = learning_curve([*records[:3], evaluations[0], *records[3:], evaluations[1]], [1.0] * 4 + [3.0] * 2, batch_size=8)
    assert points[0] == {"step": 3, "seconds": 3.0, "samples_seen": 24, "metrics": {PAIR: 0.25}}
    assert points[1]["seconds"] == 7.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"base": None},
            "must have base, methods, seeds, columns, headline, "
            "and may have peers, rivals, budgets, fewer_seeds, samples_only, further_seeds, baseline",
        ),
        ({"seeds": 3}, "seeds 3: must be a list"),
        ({"methods": ["none"]}, "methods ['none']: must be a mapping"),
        ({"methods": {"pgs": "pgs"}}, "methods has no 'none'"),
        ({"baseline": "pgs"}, "methods has no 'pgs', with which the others are compared"),
        ({"methods": {"none": "none", "a/b": "pgs"}}, "method 'a/b': a name must have no slash"),
        ({"methods": {"none": "none", "x": "checkers"}}, "checkers"),
        ({"headline": "speed"}, "headline 'speed': must be one of the columns text R@1"),
        ({"fewer_seeds": ["pgs"]}, "fewer_seeds 'pgs': must be among the methods and peers"),
        ({"samples_only": ["pgs"]}, "samples_only 'pgs': must be among the methods and peers"),
        ({"budgets": ["time"]}, "budgets ['time']: must have samples, and may have tokens, time"),
        ({"budgets": ["samples", "half"]}, "budgets ['samples', 'half']: must have samples"),
        ({"rivals": ["pgs"]}, "rivals 'pgs': must be among the methods and peers"),
        ({"base": {"max_steps": 4, "seed": 3}}, "base has seed, which the study sets by itself"),
        ({"base": {"batch_size": 4}}, "base has no max_steps"),
        ({"base": {"max_steps": 4, "modle": "tiny"}}, "did you mean 'model'"),
    ],
)
def test_a_study_that_cannot_be_run_is_one_line(write, values, tmp_path, changed, message, capsys):
    changed = {key: value for key, value in (values | changed).items() if value is not None}
    assert program([str(write(changed)), "--output_dir", str(tmp_path / "study")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "study").exists()


def test_two_studies_do_not_work_in_one_folder_nor_one_with_other_options(write, values, tmp_path, trainings, capsys):
    arguments = ["--output_dir", str(tmp_path / "study")]
    with locked(tmp_path / "study"):
        assert program([str(write(values)), *arguments]) == 2
    assert "another study, or a run that it left behind, is at work there" in capsys.readouterr().err
    assert program([str(write(values | {"methods": {"none": "none"}})), *arguments]) == 0
    values["base"]["batch_size"] = 2
    assert program([str(write(values)), *arguments]) == 2
    assert "was made with other options than the study has" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        read_study(tmp_path / "absent.yaml")


def test_equal_times_are_not_made_of_the_seconds_of_two_machines(write, values, tmp_path, trainings, capsys):
    arguments = [str(write(values)), "--output_dir", str(tmp_path / "study")]
    assert program(arguments) == 0
    baseline, masked = sorted((tmp_path / "study").glob("results/samples/*/*.json"))
    (timed,) = (tmp_path / "study").glob("results/time/*/*.json")
    result = json.loads(baseline.read_text())
    assert result["machine"]["precision"] == "float32"  # of the options' mixed_precision
    elsewhere = {"machine": {"processor": "another one", "cpus": 1, "precision": "bf16"}}
    baseline.write_text(json.dumps(result | elsewhere))
    assert program(arguments) == 0  # nothing is left
    timed.unlink()
    capsys.readouterr()
    assert program(arguments) == 2
    assert "study: its equal samples would be of " in (error := capsys.readouterr().err)
    assert "another one, 1 CPUs" in error
    made_here = json.loads(masked.read_text())
    masked.unlink()  # what is left of equal samples would be of this machine
    assert program(arguments) == 2
    masked.write_text(json.dumps(made_here | elsewhere))
    assert program(arguments) == 0  # all seconds are of one, and the steps follow them here, too
    assert json.loads(timed.read_text())["steps"] == 8


def test_a_column_that_runs_do_not_have_stops_the_study_after_its_first_run(write, values, tmp_path, trainings, capsys):
    arguments = ["--output_dir", str(tmp_path / "study")]
    assert program([str(write(values | {"columns": values["columns"] | {"probe": ["linear_probe_x/top1"]}})), *arguments]) == 2
    assert "column 'probe': 'linear_probe_x/top1' is no metric of the runs" in capsys.readouterr().err
    assert program([str(write(values)), *arguments]) == 0
    assert len(trainings) == 3  # the first run is kept


def test_the_studies_that_are_kept_can_be_read(masks_of_ideas):
    folder = study_run.ROOT / "training" / "study"
    num_runs = {
        "scenes": 3 * (17 + 16 + 16) + 2 * (8 + 7 + 7),
        "pairs": 3 * (17 + 16 + 16) + 8 + 7 + 7,
        "pairs_float32": 3,
        "larger": 2 * (4 + 3),
        "peer": 4 * 3,
        "peer_sample": 4 * 3,
        "ablation": 3 * 5,
    }
    for name, number in num_runs.items():
        study = read_study(folder / f"{name}.yaml")
        assert len(runs_of(study, folder)) == number
