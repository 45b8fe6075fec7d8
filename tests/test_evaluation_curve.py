"""Proves that `--mask_ratio` evaluates whole pictures and a mask at each ratio into one file, and goes on where it stopped; its
table and plot have what the records say; what gives no curve is refused before anything is encoded."""

import json
from pathlib import Path

import pytest
import torch
from helpers import random_picture, without_speed
from processes import Processes
from transformers import AutoProcessor

from hf_maskclip import MaskCLIPModel, PatchMask, PatchSelection, register_patch_mask
from hf_maskclip.cli import main as cli
from hf_maskclip.evaluation import Encoder, ImageSet, command
from hf_maskclip.evaluation.curve import masks_of
from hf_maskclip.evaluation.datasets import scenes

NAME = "zero_shot_things"
RATIOS = ("0.25", "0.5", "0.75")
CURVE = ["--patch_mask", "random", "--mask_ratio", *RATIOS]


@pytest.fixture
def things(tmp_path) -> Path:
    """Thirteen pictures in seven classes, which no two processes share evenly."""
    for number in range(13):
        folder = tmp_path / "things" / "test" / f"thing {number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        random_picture(number).save(folder / f"{number}.png")
    return tmp_path / "things"


@pytest.fixture
def run(base, things, tmp_path):
    """`hf-maskclip evaluate` on the things; returns the exit code."""

    def run(*more: str, output: str = "speed.json") -> int:
        data = ["--data", str(things), "--task", "zero_shot_classification", "--batch_size", "4"]
        return cli(["evaluate", "--model", base, *data, "--output", str(tmp_path / output), *more])

    return run


@pytest.fixture
def results(tmp_path):
    return lambda output="speed.json": json.loads((tmp_path / output).read_text())["results"]


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often sets of pictures, and batches of texts, were encoded."""
    counts = {"_compute_image_features": 0, "_encode_text_batch": 0}

    def counted(name, method, *arguments):
        counts[name] += 1
        return method(*arguments)

    for name in counts:
        method = getattr(Encoder, name)
        monkeypatch.setattr(Encoder, name, lambda *arguments, name=name, method=method: counted(name, method, *arguments))
    return counts


MASKS = {
    "random": (["0.5", "0.25", "0.5"], {"0.25": 0.75, "0.5": 0.5}),  # in order, and once each
    "{name: pgs, min_mask_ratio: 0.3}": (["0.5"], {"0.5": 0.5}),
    "{name: cluster, min_mask_ratio: 0.1, max_mask_ratio: 0.9}": (["0.75"], {"0.75": 0.25}),
    "grid": (["0.75", "0"], {"0.75": 0.25}),  # 0 is whole pictures
    "block": (["0"], {}),
}


@pytest.mark.parametrize("mask", MASKS)
def test_a_curve_has_whole_pictures_and_each_ratio_under_names_of_their_own(mask, run, results, capsys, tmp_path):
    ratios, kept = MASKS[mask]
    assert run("--patch_mask", mask, "--mask_ratio", *ratios) == 0
    options = masks_of(mask, [0.5])["0.5"]
    expected = {NAME: (None, 1.0)}
    for ratio, share in kept.items():
        at_ratio = {key: float(ratio) if key.endswith("mask_ratio") else value for key, value in options.items()}
        expected[f"{NAME}@{options['name']}_{ratio}"] = (at_ratio, share)
    found = {name: (record["patch_mask"], record["speed"]["kept_share"]) for name, record in results().items()}
    assert found == expected
    assert list(found) == list(expected)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in table] == ["", "whole", *kept]
    assert (tmp_path / "speed.png").is_file() == bool(kept)


def test_each_record_is_that_of_the_mask_alone(run, results):
    assert run(*CURVE) == 0
    both = without_speed(results())
    for ratio in RATIOS:
        assert run("--patch_mask", f"{{name: random, mask_ratio: {ratio}}}", output=f"{ratio}.json") == 0
        assert without_speed(results(f"{ratio}.json"))[NAME] == both[f"{NAME}@random_{ratio}"]
    assert run(output="whole.json") == 0
    assert without_speed(results("whole.json"))[NAME] == both[NAME]


def test_features_are_kept_for_their_mask_alone_and_texts_for_all(base, calls, tmp_path):
    """In memory and on the disk."""
    images = ImageSet([(random_picture(n), n) for n in range(5)], "five pictures")
    masks = masks_of("random", [0.25, 0.75])

    def encoder(mask, **options) -> Encoder:
        model = MaskCLIPModel.from_pretrained(base, patch_mask=mask or "none")
        return Encoder(model, AutoProcessor.from_pretrained(base), apply_patch_mask=mask is not None, **options)

    alone = {label: encoder(mask).encode_images(images).features for label, mask in masks.items()}
    assert (alone["0.25"] - alone["0.75"]).norm(dim=1).min() > 1e-3
    for options in ({}, {"cache_dir": tmp_path / "kept"}):
        shared = encoder(masks["0.25"], **options)
        before = dict(calls)
        for label in ("whole", "0.25", "0.75", "0.25", "whole"):
            shared.apply_patch_mask = masks[label] is not None
            if masks[label]:
                shared.model.set_patch_mask(masks[label])
            torch.testing.assert_close(shared.encode_images(images).features, alone[label], rtol=0, atol=0)
            shared.encode_images(images)
            shared.encode_texts(["a ball", "a fish"])
        new = {name: calls[name] - before[name] for name in calls}
        assert new == {"_compute_image_features": 3 if options else 5, "_encode_text_batch": 1}


class WithoutRatioMask(PatchMask):
    def forward(self, pixel_values, patch_embeds=None, *, progress=0.0, generator=None):
        return PatchSelection(torch.zeros(len(pixel_values), 1, dtype=torch.long))


REFUSED = [
    (["--mask_ratio", "0.5"], "--mask_ratio 0.5: give the --patch_mask that removes"),
    (["--patch_mask", "none", "--mask_ratio", "0.5"], "--patch_mask none has no mask ratio; its options are none"),
    (["--patch_mask", "own", "--mask_ratio", "0.5", "0.25"], "--mask_ratio 0.5 0.25: --patch_mask own has no mask ratio"),
    (["--patch_mask", "own", "--mask_ratio", "0"], "--patch_mask own has no mask ratio"),
    (["--patch_mask", "checkers", "--mask_ratio", "0.5"], "checkers"),
    (["--patch_mask", "{name: pgs, min: 1}", "--mask_ratio", "0.5"], "has no option 'min'"),
    (["--patch_mask", "attentive", "--mask_ratio", "0.5"], "goes by a teacher's attention, which an evaluation has not"),
    *[
        (["--patch_mask", "pgs", "--mask_ratio", "0.5", ratio], f"--mask_ratio {ratio}: must be in [0, 1)")
        for ratio in ("1.0", "-0.1", "nan", "inf", "50.0")
    ],
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_gives_no_curve_is_one_line_before_anything_is_encoded(options, message, run, calls, capsys, tmp_path):
    register_patch_mask("own", WithoutRatioMask)
    assert run(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not any(calls.values())
    assert not list(tmp_path.glob("speed.*"))


def test_a_ratio_that_is_no_number_is_refused(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--patch_mask", "pgs", "--mask_ratio", "abc")
    assert stopped.value.code == 2
    assert "argument --mask_ratio: invalid float value: 'abc'" in capsys.readouterr().err


def test_a_curve_goes_on_from_whole_pictures_and_from_where_it_stopped(run, results, calls, monkeypatch, capsys, tmp_path):
    assert run() == 0
    whole = results()[NAME]
    encode = Encoder._compute_image_features
    with monkeypatch.context() as patch:

        def interrupted(self, samples):
            if self.patch_mask and self.patch_mask["mask_ratio"] == 0.5:
                raise KeyboardInterrupt
            return encode(self, samples)

        patch.setattr(Encoder, "_compute_image_features", interrupted)
        with pytest.raises(SystemExit):
            run(*CURVE)
    assert list(results()) == [NAME, f"{NAME}@random_0.25"]
    assert not (tmp_path / "speed.png").exists()

    before = dict(calls)
    assert run(*CURVE) == 0
    assert calls["_compute_image_features"] - before["_compute_image_features"] == 2
    assert results()[NAME] == whole  # with the time that it took then
    assert "Some results stood in the file" in (printed := capsys.readouterr().out)
    assert list(results()) == [NAME, *(f"{NAME}@random_{ratio}" for ratio in RATIOS)]

    before = dict(calls)
    assert run(*CURVE) == 0  # again, with its plot there
    assert calls == before
    assert table_lines(capsys) == [line for line in printed.splitlines() if line.startswith("|")]


def table_lines(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]


def test_one_file_may_have_two_masks_but_not_one_mask_with_two_options(run, results, calls, capsys):
    assert run("--patch_mask", "pgs", "--mask_ratio", "0.5") == 0
    assert run("--patch_mask", "grid", "--mask_ratio", "0.5") == 0
    assert list(results()) == [NAME, f"{NAME}@pgs_0.5", f"{NAME}@grid_0.5"]
    before, calls_before = results(), dict(calls)
    capsys.readouterr()
    assert run("--patch_mask", "{name: pgs, edges: none}", "--mask_ratio", "0.25") == 2
    error = capsys.readouterr().err
    assert "'edges': 'sobel'" in error
    assert "'edges': 'none'" in error
    assert "give another file" in error
    assert (results(), calls) == (before, calls_before)


def test_results_under_a_mask_are_not_taken_for_whole_pictures(run, calls, capsys):
    assert run("--patch_mask", "random") == 0
    before = dict(calls)
    assert run(*CURVE) == 2
    assert f"holds {NAME} with patch_mask {{'name': 'random', 'mask_ratio': 0.5}}, and None is asked" in capsys.readouterr().err
    assert run("--patch_mask", "{name: random, mask_ratio: 0.25}") == 2  # of two masks what differs
    assert "with patch_mask {'mask_ratio': 0.5}, and {'mask_ratio': 0.25} is asked" in capsys.readouterr().err
    assert calls == before


def test_a_picture_of_somebody_else_is_not_overwritten(run, calls, capsys, tmp_path):
    (tmp_path / "speed.png").write_bytes(b"mine")
    assert run(*CURVE) == 2
    assert "speed.png, where its plot goes, is there already; give another file" in capsys.readouterr().err
    assert run(*CURVE, output="other.png") == 2
    assert "its plot goes there; give a file such as" in capsys.readouterr().err
    assert (tmp_path / "speed.png").read_bytes() == b"mine"
    assert not any(calls.values())


def test_details_of_each_point_have_files_of_their_own(run, tmp_path):
    assert run(*CURVE, "--details", str(tmp_path / "details")) == 0
    names = [NAME, *(f"{NAME}@random_{ratio}" for ratio in RATIOS)]
    files = {f"{name}{end}" for name in names for end in (".jsonl", ".classes.jsonl")}
    assert {path.name for path in (tmp_path / "details").iterdir()} == files


def test_a_report_has_a_row_for_each_point(run, results, capsys, tmp_path):
    assert run("--patch_mask", "pgs", "--mask_ratio", "0.25", "0.5") == 0
    capsys.readouterr()
    assert cli(["report", str(tmp_path / "speed.json")]) == 0
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith(f"| {tmp_path.name}")]
    values = {name: f"{100 * record['top1']:.1f}" for name, record in results().items()}
    named = {"": NAME, ", under pgs at 0.25": f"{NAME}@pgs_0.25", ", under pgs at 0.5": f"{NAME}@pgs_0.5"}
    assert {method.strip(): value.strip() for method, value in rows} == {
        f"{tmp_path.name}{condition}": values[name] for condition, name in named.items()
    }


def test_a_trial_says_so_and_all_families_of_the_scenes_have_a_column(base, results, capsys, monkeypatch, tmp_path):
    for name in ("SCENES_PER_SET", "PROBE_SCENES", "COMPOSITIONALITY_SCENES"):
        monkeypatch.setattr(scenes, name, 8)
    arguments = ["--model", base, "--suite", "scenes", "--limit", "7", "--output", str(tmp_path / "speed.json")]
    assert cli(["evaluate", *arguments, "--patch_mask", "random", "--mask_ratio", "0.75"]) == 0
    assert {record["limit"] for record in results().values()} == {7}
    assert len(results()) == 2 * 19
    shape, colour = "zero_shot_shape", "zero_shot_colour"  # points take turns
    assert list(results())[:4] == [shape, f"{shape}@random_0.75", f"{colour}@random_0.75", colour]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_lines(capsys)]
    families = ["zero_shot", "retrieval", "linear_probe", "robustness", "compositionality"]
    assert table[0] == ["", "patches encoded", "images/s", "times whole", *families]
    tasks = {(family, task): (whole, at) for family, task, whole, at in table[6:]}
    assert len(tasks) == 20  # retrieval has two ways
    both = [100 * results()[f"zero_shot_colour{suffix}"]["top1"] for suffix in ("", "@random_0.75")]
    assert tasks["zero_shot", "colour"] == (f"{both[0]:.1f}", f"{both[1]:.1f} ({both[1] - both[0]:+.1f})")


def test_kept_features_have_no_speed_and_no_plot(run, capsys, tmp_path):
    kept = ["--feature_cache", str(tmp_path / "kept")]
    assert run(*CURVE, *kept) == 0
    assert run(*CURVE, *kept, output="again.json") == 0
    rows = [line.split("|")[2:5] for line in table_lines(capsys)[-4:]]
    assert {cell.strip() for row in rows for cell in row} == {"–"}
    assert (tmp_path / "speed.png").is_file()
    assert not (tmp_path / "again.png").exists()


def save_masked_features(folder: str, batch_size: int, output: str) -> int:
    """Of eleven pictures, on the main process: their features, and the mean share of patches that was encoded."""
    command.start_processes()
    model = MaskCLIPModel.from_pretrained(folder, patch_mask="pgs")
    encoder = Encoder(model, AutoProcessor.from_pretrained(folder), batch_size=batch_size, apply_patch_mask=True)
    found = encoder.encode_images(ImageSet([(random_picture(n), n) for n in range(11)]))
    if command.PartialState().is_main_process:
        torch.save((found.features, encoder.work.kept_shares / 11), output)
    return 0


@pytest.mark.slow
def test_masked_features_of_a_picture_are_the_same_alone_in_any_batch_and_on_two_processes(base, tmp_path):
    found = {}
    for count, batch_size in ((1, 1), (1, 4), (2, 1), (2, 3), (2, 4)):
        output = tmp_path / f"{count} {batch_size}"
        started = Processes(count, tmp_path / f"log {count} {batch_size}", save_masked_features, base, batch_size, str(output))
        assert started.wait() == [0] * count, started.printed()
        found[count, batch_size] = torch.load(output)
    alone, kept_share = found.pop((1, 1))
    whole = Encoder(MaskCLIPModel.from_pretrained(base), AutoProcessor.from_pretrained(base))
    pictures = ImageSet([(random_picture(n), n) for n in range(11)])
    assert (whole.encode_images(pictures).features - alone).norm(dim=1).min() > 1e-3
    assert 0.4 < kept_share < 0.8
    for key, (features, share) in found.items():
        torch.testing.assert_close(features, alone, rtol=1e-4, atol=1e-6, msg=str(key))
        assert share == pytest.approx(kept_share)


@pytest.mark.slow
def test_two_processes_write_the_curve_of_one(base, things, tmp_path):
    data = ["--data", str(things), "--task", "zero_shot_classification", "--batch_size", "4"]
    results = []
    for count in (1, 2):
        output = tmp_path / f"of {count}" / "speed.json"
        arguments = ["evaluate", "--model", base, *data, *CURVE, "--output", str(output)]
        started = Processes(count, tmp_path / f"printed {count}", cli, arguments)
        assert started.wait() == [0] * count, started.printed()
        assert started.printed().count("| whole") == 1
        assert output.with_suffix(".png").is_file()
        results.append(json.loads(output.read_text())["results"])
    assert without_speed(results[0]) == without_speed(results[1])
    assert [one["speed"]["kept_share"] for one in results[1].values()] == pytest.approx([1, 0.75, 0.5, 0.25])
