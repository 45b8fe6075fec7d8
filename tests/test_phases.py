"""Proves that phases are what they say: each step is in the phase of its samples and gets that phase's pictures, mask and
captions; a run goes on exactly across their borders; and smaller pictures see what a smaller model would."""

import copy
import math
import pickle

import pytest
import torch
from helpers import as_killed_at, losses_of, same, words
from processes import Processes
from torch.nn import functional as F
from transformers import AutoModel, CLIPModel

from hf_maskclip.errors import ConfigError
from hf_maskclip.models.patch_mask_registry import BUILT_IN
from hf_maskclip.phases import Phase, Timeline, phases_of_schedule, read_phases
from training.config import TrainingConfig
from training.dry_run import dry_run
from training.model.small_pictures import resize_positions_smoothly
from training.train import program

# Small pictures with short captions, then a ramp, then whole pictures.
PHASES = [
    {"share": 0.4, "image_size": 32, "text_tokens": 5, "patch_mask": "none"},
    {"share": 0.3, "patch_mask": "random", "ramp": True, "text_tokens": 0},
    {"share": 0.2, "image_size": 48, "mask_ratio": 0.25, "text_tokens": 0},
    {"share": 0.1, "patch_mask": "none", "text_tokens": 0},
]
OPTIONS = {"phases": PHASES, "text_mask": "truncate", "max_steps": 10, "patch_mask": "random", "shuffle_buffer": 5}


# ---- Which step is in which phase ------------------------------------------------------------------------------------------


def literal_phase(shares: list[float], samples_before: int, samples: int) -> int:
    """The phase whose part of the run, from its first sample on, holds a step's first sample."""
    position, end = samples_before / samples, 0.0
    for number, share in enumerate(shares):
        end += share
        if position < end - 1e-9:
            return number
    return len(shares) - 1


@pytest.mark.parametrize("shares", [[1.0], [0.9, 0.1], [0.5, 0.25, 0.25], [0.1] * 10, [1 / 3] * 3])
@pytest.mark.parametrize("num_steps", [20, 30, 97])
@pytest.mark.parametrize("checkpoint", [(0, 0), (4, 128), (4, 512)])  # steps and samples: of half, and of twice the processes
def test_a_step_is_in_the_phase_of_its_first_sample(shares, num_steps, checkpoint):
    timeline = Timeline([Phase(share) for share in shares], num_steps, 64, *checkpoint)
    steps_done, samples_done = checkpoint
    total = samples_done + (num_steps - steps_done) * 64
    found = {}
    for step in range(steps_done + 1, num_steps + 1):
        before = samples_done + (step - 1 - steps_done) * 64
        number = literal_phase(shares, before, total)
        assert timeline.number_at(step) == number
        assert timeline.progress(step - 1) == pytest.approx(before / total)
        start = sum(shares[:number])
        assert timeline.progress_in_phase(step) == pytest.approx((before / total - start) / shares[number], abs=0.02)
        found.setdefault(number, []).append(step)
    for number, steps in found.items():
        assert [step for step in timeline.steps_of(number) if step > steps_done] == steps
    assert timeline.progress(num_steps) == 1


@pytest.mark.parametrize(("ramp", "unmasked"), [(0.0, 0), (0.4, 0), (0.0, 3), (0.4, 3), (1.0, 0), (1.0, 4)])
def test_short_forms_are_phases(ramp, unmasked):
    timeline = Timeline(phases_of_schedule(ramp, unmasked / 10), 10, 8)
    whole = [timeline.phase_at(step).patch_mask == "none" for step in range(1, 11)]
    assert whole == [False] * (10 - unmasked) + [True] * unmasked
    grows = [timeline.phase_at(step).ramp for step in range(1, 11)]
    assert sum(grows) == min(round(10 * ramp), 10 - unmasked)
    assert grows == sorted(grows, reverse=True)


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        (3, "phases=3: must be a list such as"),
        ([], r"phases=\[\]: must be a list"),
        ([0.5], "must be a list such as"),
        ([{"image_size": 32}], r"phases\[0\]: share=None: must be a number above 0"),
        ([{"share": 0}], r"phases\[0\]: share=0: must be a number above 0"),
        ([{"share": True}], "share=True: must be a number"),
        ([{"share": 0.5}, {"share": 0.4}], "their shares add up to 0.9: must be 1"),
        ([{"share": 1, "size": 3}], r"phases\[0\]: unknown option 'size': must be one of share, image_size, patch_mask"),
        ([{"share": 1, "image_size": "112"}], "image_size='112': must be a whole number of pixels"),
        ([{"share": 1, "image_size": -16}], "image_size=-16: must be a whole number"),
        ([{"share": 1, "mask_ratio": 1}], "mask_ratio=1: must be a number at least 0 and below 1"),
        ([{"share": 1, "ramp": 1}], "ramp=1: must be true or false"),
        ([{"share": 1, "patch_mask": 5}], "patch_mask=5: must be a name, or a mapping"),
    ],
)
def test_phases_that_cannot_be_read_are_refused_by_name(phases, words):
    with pytest.raises(ConfigError, match=words) as error:
        read_phases(phases)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"phases": [{"share": 0.99}, {"share": 0.01}]}, r"phases\[1\]: its share 0.01 of 4 steps has no step"),
        ({"phases": [{"share": 1, "image_size": 36}]}, "image_size=36: must be a multiple of the patch size 8, at least 16"),
        ({"phases": [{"share": 1, "image_size": 72}]}, "image_size=72: .* at most the model's 64"),
        ({"image_size": 8}, "image_size=8: must be a multiple of the patch size 8, at least 16"),
        ({"phases": [{"share": 1, "patch_mask": "pg"}]}, r"phases\[0\]: patch_mask='pg': cannot be used .*did you mean 'pgs'"),
        ({"phases": [{"share": 1, "patch_mask": "none", "ramp": True}]}, "patch mask 'none' has no mask_ratio that could grow"),
        ({"phases": [{"share": 1, "patch_mask": "none", "mask_ratio": 0.5}]}, "'none' has no mask_ratio that could be set"),
        ({"phases": [{"share": 1}], "mask_schedule": 0.5}, "mask_schedule=0.5 and phases: it is short for phases"),
        ({"phases": [{"share": 1}], "unmasked_tuning_steps": 2}, "unmasked_tuning_steps=2 and phases"),
        ({"phases": [{"share": 1, "text_tokens": 8}]}, "text_mask='none' and text_tokens=8: .* go together"),
        ({"text_mask": "random", "phases": [{"share": 1}]}, "text_mask='random' and text_tokens=0"),
        ({"text_mask": "random", "phases": [{"share": 1, "text_tokens": 99}]}, "text_tokens=99: the context of .* has 77"),
    ],
)
def test_phases_that_a_run_cannot_have_are_refused_before_it(changed, words, run):
    with pytest.raises(ConfigError, match=words) as error:
        run(**changed)
    assert "\n" not in str(error.value)


# ---- What a run does with them ---------------------------------------------------------------------------------------------


def test_each_step_has_the_pictures_the_mask_and_the_captions_of_its_phase_and_says_so(run, capsys):
    _, steps, folder = run(**OPTIONS)
    assert "patch mask random over 64 patches, in 4 phases, pictures of 32 and 48 pixels; " in capsys.readouterr().err
    assert [record["phase"] for record in steps] == [1] * 4 + [2] * 3 + [3] * 2 + [4]
    assert [record["image_size"] for record in steps] == [32] * 4 + [64] * 3 + [48] * 2 + [64]
    ramp = [64 - round(64 * 0.5 * done / 3) for done in range(3)]
    assert [record["kept_patches"] for record in steps] == pytest.approx([16] * 4 + ramp + [27] * 2 + [64], abs=0.51)
    assert [record["text_tokens"] == 5 for record in steps] == [True] * 4 + [False] * 6
    exported = AutoModel.from_pretrained(folder / "export")
    assert exported.config.vision_config.image_size == 64
    assert exported.vision_model.embeddings.position_embedding.weight.shape == (65, 128)


@pytest.mark.parametrize("patch_mask", BUILT_IN)
def test_every_mask_trains_on_small_pictures_and_all_positions_learn(patch_mask, run, tmp_path):
    """At half size, where without antialiasing the outermost positions would get no gradient."""
    weights = []
    for steps in (1, 3):
        options = {"image_size": 32, "patch_mask": patch_mask, "max_steps": steps, "warmup_steps": 0}
        _, records, folder = run(**options, output_dir=str(tmp_path / str(steps)))
        assert all(record["image_size"] == 32 for record in records)
        assert all(record["kept_patches"] <= 16 for record in records)
        weights.append(AutoModel.from_pretrained(folder / "export").vision_model.embeddings.position_embedding.weight)
    moved = (weights[0] - weights[1]).abs().amax(dim=1)  # (1 + L,)
    assert moved.min() > 0


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_that_goes_on_across_a_border_is_the_uninterrupted_one(num_workers, run, tmp_path):
    options = OPTIONS | {"num_workers": num_workers}
    _, expected, whole = run(**options, output_dir=str(tmp_path / "whole"))
    assert len({record["phase"] for record in expected}) == 4
    _, _, folder = run(**options, checkpoint_every=1)
    for step in (9, 5, 4, 3):  # at borders, before them and behind them
        as_killed_at(folder, step)
        _, steps, _ = run(**options, checkpoint_every=1, resume="auto")
        assert same(steps) == same(expected)
    weights, whole_weights = (AutoModel.from_pretrained(f / "export").state_dict() for f in (folder, whole))
    assert all(torch.equal(value, whole_weights[key]) for key, value in weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_processes_go_on_across_a_border_as_if_nothing_had_been(num_workers, options, tmp_path):
    options |= OPTIONS | {"num_workers": num_workers}
    whole = options | {"output_dir": tmp_path / "whole"}
    assert set(Processes(2, tmp_path / "printed", program, words(whole)).wait()) == {0}
    expected = losses_of(whole["output_dir"])
    assert [record["phase"] for record in expected] == [1] * 4 + [2] * 3 + [3] * 2 + [4]
    options |= {"resume": "auto", "checkpoint_every": 1}
    for number, step in enumerate((None, 5, 4, 3)):
        if step:
            as_killed_at(tmp_path / "run", step)
        processes = Processes(2, tmp_path / f"printed-{number}", program, words(options))
        assert set(processes.wait()) == {0}, processes.printed()[-3000:]
        assert same(losses_of(options["output_dir"])) == same(expected)
    weights, whole_weights = (AutoModel.from_pretrained(tmp_path / name / "export").state_dict() for name in ("run", "whole"))
    assert all(torch.equal(value, whole_weights[key]) for key, value in weights.items())


@pytest.mark.slow
def test_phases_go_on_by_samples_on_another_number_of_processes(options, tmp_path):
    """Half of the samples are seen by two processes in fewer steps."""
    options |= {"samples_seen": 64, "max_steps": 0, "checkpoint_every": 1, "stream": "resampled", "resume": "auto"}
    options |= {"warmup_steps": 0}
    options |= {"phases": [{"share": 0.75, "image_size": 32}, {"share": 0.25}]}
    first = Processes(2, tmp_path / "two", program, words(options | {"samples_seen": 64}))
    assert set(first.wait()) == {0}, first.printed()[-3000:]
    as_killed_at(tmp_path / "run", 4)  # 32 samples in 4 steps of 8
    second = Processes(1, tmp_path / "one", program, words(options))
    assert set(second.wait()) == {0}, second.printed()[-3000:]
    steps = losses_of(options["output_dir"])
    assert [record["samples_seen"] for record in steps] == [8, 16, 24, 32, *range(36, 65, 4)]
    assert [record["image_size"] for record in steps] == [32] * 8 + [64] * 4  # up to 48 of 64 samples
    # The rate of a step is by the samples before it.
    before = [0, *(record["samples_seen"] for record in steps[:-1])]
    rates = [1e-3 * (1 + math.cos(math.pi * seen / 64)) / 2 for seen in before]
    assert [record["learning_rate"] for record in steps] == pytest.approx(rates)


def test_a_dry_run_prints_each_phase_with_its_tokens_and_flops(options, capsys):
    numbers = dry_run(TrainingConfig(**(options | OPTIONS | {"unmasked_tuning_steps": 0})))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("phase ")]
    assert [line.split(": ")[0].split()[1:] for line in lines] == [
        ["1", "steps", "1", "to", "4"],
        ["2", "steps", "5", "to", "7"],
        ["3", "steps", "8", "to", "9"],
        ["4", "step", "10"],
    ]
    assert "32 pixels, 16 of 16 patches visible, 5 text tokens" in lines[0]
    assert "64 pixels, 48 of 64 patches visible half-way" in lines[1]
    assert "48 pixels, 27 of 36 patches visible" in lines[2]
    assert "64 pixels, 64 of 64 patches visible" in lines[3]
    flops = [float(line.split(" TFLOP")[0].split()[-1]) for line in lines]
    assert flops[0] < flops[2] < flops[1] < flops[3]
    total = sum(count * value for count, value in zip((4, 3, 2, 1), flops, strict=True))
    assert numbers["flops"] == pytest.approx(1e12 * total, rel=0.02)


def test_a_dry_run_knows_the_phases_that_short_forms_stand_for(options, capsys):
    short = {"mask_schedule": 0.5, "unmasked_tuning_steps": 20, "max_steps": 100, "patch_mask": "random"}
    dry_run(TrainingConfig(**(options | short)))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("phase ")]
    steps = [line.split(": ")[0].split(maxsplit=2)[2] for line in lines]
    assert steps == ["steps 1 to 50", "steps 51 to 80", "steps 81 to 100"]


# ---- What a model sees of smaller pictures ---------------------------------------------------------------------------------


def model_of_small_pictures(model: CLIPModel, size: int) -> CLIPModel:
    """The definition, literally: a model for pictures of that size, with the position of each patch resized from the table."""
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = size
    small = CLIPModel(config)
    weights = {key: value for key, value in model.state_dict().items() if "position" not in key or "text" in key}
    table, side = model.vision_model.embeddings.position_embedding.weight.detach(), size // config.vision_config.patch_size
    grid = table[1:].T.reshape(1, -1, 4, 4)
    resized = F.interpolate(grid, (side, side), mode="bicubic", antialias=True, align_corners=False)
    positions = torch.cat([table[:1], resized[0].flatten(1).T])
    small.load_state_dict(weights | {"vision_model.embeddings.position_embedding.weight": positions}, strict=False)
    return small.eval()


@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_small_pictures_are_seen_as_by_a_smaller_model(ratio, make_model, inputs):
    model = make_model({"name": "random", "mask_ratio": ratio}).eval()
    resize_positions_smoothly(model)
    images = inputs["pixel_values"][:, :, :16, :16]
    plain = model_of_small_pictures(model, 16)
    selection = model.select_patches(images)
    assert selection.indices.shape[1] == (4 if ratio == 0 else 2)
    with torch.no_grad():
        found = model.get_image_features(images, patch_selection=selection, interpolate_pos_encoding=True).pooler_output
        embeds = plain.vision_model.embeddings(images)  # (B, 1 + L, D)
        chosen = torch.stack([row[[0, *(1 + kept).tolist()]] for row, kept in zip(embeds, selection.indices, strict=True)])
        states = plain.vision_model.encoder(inputs_embeds=plain.vision_model.pre_layrnorm(chosen)).last_hidden_state
        expected = plain.visual_projection(plain.vision_model.post_layernorm(states[:, 0]))
    torch.testing.assert_close(found, expected)


def test_whole_pictures_see_the_table_itself_and_copies_stay_what_they_are(make_model, inputs):
    model = make_model("none").eval()
    with torch.no_grad():
        before = model.get_image_features(inputs["pixel_values"]).pooler_output
        resize_positions_smoothly(model)
        for same_model in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            found = same_model.get_image_features(inputs["pixel_values"], interpolate_pos_encoding=True).pooler_output
            assert torch.equal(found, before)
    assert type(model.vision_model.embeddings).__name__ == "CLIPVisionEmbeddings"
