"""Proves that the training program trains each family: its loss falls, a resumed run is the same run to the last bit, and the
export is the family's own plain class, with the weights of the last step."""

import json
import math
import shutil

import pytest
import torch
from families import DUAL_ENCODERS, make_plain, make_tokenizer, save_folder
from helpers import CAPTIONS, as_killed_at, encode_image, random_picture, same, without_speed, write_shard
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from hf_maskclip import ContrastiveLoss, PatchSelection, SigmoidLoss, add_patch_mask
from hf_maskclip.cli import main as cli
from hf_maskclip.errors import ConfigError
from training.data.batches import TextForm, pad_tokens
from training.model import presets
from training.model.loss import PairLoss, prepare_loss, without_added_bias

SIGMOID = {"siglip", "siglip2"}
NAMES = {"clip": "CLIPModel", "metaclip_2": "MetaClip2Model", "altclip": "AltCLIPModel", "chinese_clip": "ChineseCLIPModel"}
NAMES |= {"siglip": "SiglipModel", "siglip2": "Siglip2Model"}


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_a_family_is_trained_resumed_to_the_bit_and_exported(name, run, tmp_path, capsys):
    folder = save_folder(name, tmp_path / "model")
    options = {
        "model": str(folder),
        "patch_mask": "pgs",
        "max_steps": 4,
        "checkpoint_every": 2,
        "output_dir": str(tmp_path / "a"),
    }
    summary, steps, written = run(**options)
    assert summary["class"] == NAMES[name]
    assert all(math.isfinite(step["loss"]) for step in steps)
    most = 16 if name != "siglip2" else 15.5  # random pictures of 40 x 36 pixels have 12 to 16 patches
    assert all(1 <= step["kept_patches"] < most for step in steps)
    said = capsys.readouterr().err
    assert "UNEXPECTED" not in said

    exported = AutoModel.from_pretrained(written / "export")
    assert type(exported).__name__ == NAMES[name]
    assert exported.config.vision_config.to_dict()["patch_mask"]["name"] == "pgs"
    first = AutoModel.from_pretrained(folder).state_dict()
    changed = [key for key, weight in exported.state_dict().items() if not torch.equal(weight, first[key])]
    assert len(changed) > 40
    assert type(AutoProcessor.from_pretrained(written / "export")) is type(AutoProcessor.from_pretrained(folder))
    assert AutoTokenizer.from_pretrained(written / "export")("a ball")["input_ids"]

    shutil.copytree(written, tmp_path / "b")
    as_killed_at(tmp_path / "b", 2)
    _, again, _ = run(**options | {"output_dir": str(tmp_path / "b"), "resume": "auto"})
    assert same(again) == same(steps)
    after = AutoModel.from_pretrained(tmp_path / "b" / "export").state_dict()
    assert all(torch.equal(weight, after[key]) for key, weight in exported.state_dict().items())


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_a_family_trains_on_small_pictures_or_says_that_it_cannot(name, run, tmp_path):
    options = {"model": str(save_folder(name, tmp_path / "model")), "patch_mask": "random"}
    options |= {"phases": [{"share": 0.5, "image_size": 16}, {"share": 0.5}]}
    if name == "siglip2":
        with pytest.raises(ConfigError, match="image_size=16: must be 0 for SigLIP 2 NaFlex"):
            run(**options)
        return
    _, steps, folder = run(**options)
    assert [record["kept_patches"] for record in steps] == [2, 2, 8, 8]
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert type(AutoModel.from_pretrained(folder / "export")).__name__ == NAMES[name]


@pytest.fixture
def odd_folder(tmp_path):
    """A SigLIP whose pictures of 36 pixels leave a rest beside 4 patches of 8, as 384 pixels in patches of 14 do."""
    folder = save_folder("siglip", tmp_path / "model")
    for file, part, size in (
        ("config.json", "vision_config", {"image_size": 36}),
        ("processor_config.json", "image_processor", {"size": {"height": 36, "width": 36}}),
    ):
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | {part: values[part] | size}))
    return folder


@pytest.mark.parametrize("patch_mask", ["none", "random", "pgs", "cluster", "attentive"])
def test_pictures_that_leave_a_rest_beside_their_patches_are_trained_on_with_every_mask(patch_mask, odd_folder, run):
    options = {"model": str(odd_folder), "patch_mask": patch_mask, "max_steps": 2}
    _, steps, folder = run(**options, pictures=True)
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert all((step["kept_patches"] == 16) == (patch_mask == "none") for step in steps)
    assert (folder / "masks.png").is_file()

    model = add_patch_mask(AutoModel.from_pretrained(folder / "export"), patch_mask).eval()
    images = torch.randn(3, 3, 36, 36, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = AutoModel.from_pretrained(folder / "export").eval().get_image_features(images).pooler_output
        assert torch.equal(model.get_image_features(images).pooler_output, plain)
        every = PatchSelection(torch.arange(16).expand(3, -1), torch.full((3,), 16))
        packed = model.get_image_features(images, patch_selection=every).pooler_output
    torch.testing.assert_close(packed, plain)


@pytest.mark.parametrize("name", DUAL_ENCODERS)
def test_a_runs_own_evaluation_is_that_of_its_export(name, run, tmp_path):
    photos = str(tmp_path / "photos")
    (tmp_path / "photos" / "test").mkdir(parents=True)
    (tmp_path / "photos" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "photos" / "classnames.txt").write_text("red fish\nblue fish")
    pictures = [encode_image(random_picture(number, (60, 37 + number))) for number in range(6)]
    samples = {f"s{n}": {"png": picture, "cls": str(n % 2).encode()} for n, picture in enumerate(pictures)}
    write_shard(tmp_path / "photos" / "test" / "0.tar", samples)
    folder = save_folder(name, tmp_path / "model")
    summary, _, written = run(model=str(folder), patch_mask="random", eval_data=photos, output_dir=str(tmp_path / "a"))
    data = ["--data", photos, "--task", "zero_shot_classification"]
    assert cli(["evaluate", "--model", str(written / "export"), *data, "--output", str(tmp_path / "eval.json")]) == 0
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert next(iter(results.values()))["n"] == 6
    assert without_speed(results) == without_speed(json.loads(json.dumps(summary["results"])))


@pytest.mark.parametrize("name, option, loss", [("siglip", "auto", SigmoidLoss), ("clip", "auto", ContrastiveLoss)])
def test_auto_is_the_loss_that_the_family_was_trained_with(name, option, loss):
    assert type(prepare_loss(option, make_plain(name), is_fresh=False).loss.loss) is loss


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_the_loss_of_chance_is_the_least_of_embeddings_that_are_all_the_same(name):
    loss = prepare_loss("auto", make_plain(name), is_fresh=False)
    embeds = torch.nn.functional.normalize(torch.ones(16, 8), dim=-1)
    biases = torch.linspace(-8, 0, 801).unbind() if name == "siglip" else [None]
    losses = [loss.loss(embeds, embeds, torch.tensor(1.0), *([bias] if name == "siglip" else [])).item() for bias in biases]
    assert min(losses) == pytest.approx(loss.of_chance(16), abs=1e-4)
    assert name == "clip" or max(losses) > 1.5 * min(losses)


def test_a_clip_with_the_sigmoid_loss_gets_a_bias_that_its_export_has_not(run, tmp_path):
    folder = save_folder("clip", tmp_path / "model")
    options = {"model": str(folder), "loss": "sigmoid", "checkpoint_every": 2, "max_steps": 4, "patch_mask": "pgs"}
    _, steps, written = run(**options, output_dir=str(tmp_path / "a"))
    assert "logit_bias" not in AutoModel.from_pretrained(written / "export").state_dict()
    shutil.copytree(written, tmp_path / "b")
    as_killed_at(tmp_path / "b", 2)
    _, again, _ = run(**options, output_dir=str(tmp_path / "b"), resume="auto")
    assert same(again) == same(steps)

    model = make_plain("clip")
    loss = prepare_loss("sigmoid", model, is_fresh=True)
    assert model.logit_bias.item() == -10
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert isinstance(loss, PairLoss)
    assert "logit_bias" not in without_added_bias(model).state_dict()
    assert "logit_bias" in without_added_bias(make_plain("siglip")).state_dict()


def test_a_siglip_with_the_contrastive_loss_leaves_its_bias_alone(run, tmp_path):
    folder = save_folder("siglip", tmp_path / "model")
    _, _, written = run(model=str(folder), loss="contrastive", patch_mask="random", output_dir=str(tmp_path / "a"))
    exported, first = AutoModel.from_pretrained(written / "export"), AutoModel.from_pretrained(folder)
    assert torch.equal(exported.logit_bias, first.logit_bias)
    assert not torch.equal(exported.logit_scale, first.logit_scale)


def test_siglip_reads_captions_of_its_whole_context_and_others_of_their_longest():
    for name, expected in {"siglip": (2, 64), "siglip2": (2, 64), "altclip": (2, 8), "metaclip_2": (2, 8)}.items():
        tokenizer = make_tokenizer(name)
        token_ids = [tokenizer(caption)["input_ids"] for caption in CAPTIONS[:2]]
        form = TextForm(("input_ids", "attention_mask"), 64 if name in SIGMOID else 0)
        padded = pad_tokens(tokenizer, token_ids, 64, form)
        assert padded["input_ids"].shape == expected
        assert padded["attention_mask"].sum(dim=1).tolist() == [len(ids) for ids in token_ids]


@pytest.mark.parametrize("name, reason", [("clipseg", "is a CLIPSeg"), ("vit", "is a 'vit', no image and text encoder")])
def test_what_cannot_be_trained_is_refused_by_name(name, reason, run, tmp_path):
    folder = save_folder("clipseg", tmp_path / "model")
    if name == "vit":
        (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match=reason):
        run(model=str(folder), patch_mask="pgs")


def test_chunks_have_the_losses_of_whole_batches_with_the_sigmoid_loss_too(run, tmp_path):
    options = {"model": str(save_folder("siglip", tmp_path / "model")), "patch_mask": "none"}
    _, whole, _ = run(**options, output_dir=str(tmp_path / "a"))
    _, chunked, _ = run(**options, chunk_size=2, output_dir=str(tmp_path / "b"))
    assert [step["loss"] for step in chunked] == pytest.approx([step["loss"] for step in whole], rel=1e-4)


def test_the_preset_of_siglip_begins_with_siglips_scale_and_bias(run, tmp_path, monkeypatch):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = (tower | {"image_size": 32, "patch_size": 16}, tower, 32)
    monkeypatch.setitem(presets.PRESETS, "siglip-s-16", small)
    _, steps, written = run(model="siglip-s-16", learning_rate=1e-9, output_dir=str(tmp_path / "a"))
    exported = AutoModel.from_pretrained(written / "export")
    assert type(exported).__name__ == "SiglipModel"
    assert exported.logit_scale.exp().item() == pytest.approx(10, rel=1e-4)
    assert exported.logit_bias.item() == pytest.approx(-10, rel=1e-4)
    assert type(AutoProcessor.from_pretrained(written / "export")).__name__ == "SiglipProcessor"
    assert steps[0]["loss"] == pytest.approx(10, abs=4)  # of each image's own caption
