"""Proves that a run or a folder of each family is shared as what it is: its export is its own plain class, its card says what
holds of its class, scores and texts, in code that runs; and what the demo, drawn masks or remote code cannot do for a family is
refused in one line."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from families import BY_TYPE, make_config, make_plain, make_tokenizer, save_folder
from helpers import random_picture
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, pipeline

from hf_maskclip import add_patch_mask
from hf_maskclip.cli import main
from hf_maskclip.conversion.clip import export
from hf_maskclip.errors import ConfigError
from hf_maskclip.hub.repository import ModelRepository
from hf_maskclip.models.masked_models import PatchMaskedDualEncoder

MASK = {"name": "random", "mask_ratio": 0.5}
OTHERS = [name for name in BY_TYPE if name != "clip"]
DEMO = ("clip", "metaclip_2", "altclip", "chinese_clip")


@pytest.fixture
def save(tmp_path):
    """Saves the folder of a family with a mask in its configuration, as training leaves it."""

    def save(name: str, place: str = "model") -> Path:
        folder = save_folder(name, tmp_path / place)
        make_plain(name).save_pretrained(folder)
        # Loaded, for Transformers then sets the padding token's row of some families to zero.
        add_patch_mask(AutoModel.from_pretrained(folder), MASK).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def save_run(save, tmp_path):
    """Saves the folder of a run: its options, its export, and its result on two photos."""

    def save_run(name: str) -> Path:
        export = save(name, "run/export")
        for number, label in enumerate(("cat", "dog")):
            (tmp_path / "photos" / label).mkdir(parents=True)
            random_picture(number).save(tmp_path / "photos" / label / "1.png")
        results, data = tmp_path / "results.json", ["--data", str(tmp_path / "photos"), "--task", "zero_shot_classification"]
        assert main(["evaluate", "--model", str(export), *data, "--output", str(results)]) == 0
        summary = {"steps": 4, "samples_seen": 16, "train_seconds": 1.0, "hub": {"model": None, "train_data": []}}
        summary |= {"results": json.loads(results.read_text())["results"]}
        (export.parent / "eval.json").write_text(json.dumps(summary))
        (export.parent / "config.yaml").write_text(yaml.safe_dump({"model": "org/model", "seed": 0}))
        return export.parent

    return save_run


def one_line(capsys) -> str:
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("name", OTHERS)
def test_an_export_is_the_familys_own_plain_class_with_its_mask_and_processor(name, save, tmp_path, capsys):
    folder, output = save(name), tmp_path / "export"
    assert main(["export", str(folder), str(output)]) == 0
    assert f'AutoModel.from_pretrained("{output}")' in capsys.readouterr().out
    model, info = AutoModel.from_pretrained(output, output_loading_info=True)
    assert type(model) is getattr(transformers, f"{BY_TYPE[name].prefix}Model")
    assert not info["missing_keys"] | info["unexpected_keys"]
    weights, saved = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weight, saved[key]) for key, weight in weights.items())
    assert add_patch_mask(model).config.vision_config.patch_mask == MASK
    before, after = (AutoProcessor.from_pretrained(place) for place in (folder, output))
    assert type(after) is type(before)
    assert after.image_processor.to_dict() == before.image_processor.to_dict()
    kind = json.loads((output / "preprocessor_config.json").read_text())["image_processor_type"]  # of Transformers 4
    assert kind == type(before.image_processor).__name__

    assert main(["export", str(folder), str(tmp_path / "code"), "--remote_code"]) == 2
    assert f"--remote_code: {BY_TYPE[name].prefix}Model needs none" in one_line(capsys)
    assert not (tmp_path / "code").exists()


def test_a_tower_and_a_classifier_of_a_family_are_exported_too(save, tmp_path, capsys):
    folder = save("siglip")
    image_processor = AutoImageProcessor.from_pretrained(folder)
    config = make_config("siglip", make_tokenizer("siglip"))
    models = [transformers.SiglipVisionModel(config.vision_config), transformers.SiglipForImageClassification(config)]
    for model in models:
        place, output = tmp_path / type(model).__name__, tmp_path / f"{type(model).__name__} exported"
        model.save_pretrained(place)
        image_processor.save_pretrained(place)
        assert main(["export", str(place), str(output)]) == 0
        again = type(model).from_pretrained(output)
        assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in model.state_dict().items())


def test_what_has_other_weights_than_its_class_is_not_exported(save, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is of the test extra")
    folder = save("siglip")
    model = AutoModel.from_pretrained(folder)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    for wrong, message in ((adapted, "export of a PeftModel"), (model, "export of a SiglipModel with adapters, such as")):
        with pytest.raises(ConfigError, match=message):
            export(wrong, tmp_path / "out", AutoProcessor.from_pretrained(folder))
    assert not (tmp_path / "out").exists()


# Of each family: what its card calls it, and words that stand on it or do not.
SENTENCES = "from sentence_transformers import SentenceTransformer"
CARDS = {
    "clip": (
        "A CLIP of",
        [SENTENCES, "--to open_clip", "MaskCLIPModel.from_pretrained", "ONNX"],
        ["sigmoid", "add_patch_mask"],
    ),
    "metaclip_2": ("A `MetaClip2Model` of", [SENTENCES, "add_patch_mask(AutoModel", "ONNX"], ["sigmoid", "open_clip"]),
    "altclip": ("A `AltCLIPModel` of", [SENTENCES, "add_patch_mask(AutoModel", " 64 tokens"], ["sigmoid", "open_clip"]),
    "siglip": ("A `SiglipModel` of", ["sigmoid(20.1 x cosine - 4.0)", "padded to 64", "ONNX"], [SENTENCES, "open_clip"]),
    "siglip2": ("A `Siglip2Model` of", ["sigmoid(20.1 x cosine - 4.0)", "own aspect ratio"], [SENTENCES, "open_clip", "ONNX"]),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_says_what_holds_of_the_family_in_code_that_runs(name, save_run, tmp_path, monkeypatch, capsys):
    kind, there, absent = CARDS[name]
    run_dir = save_run(name)
    scale = math.exp(3) if BY_TYPE[name].loss == "sigmoid" else None
    if scale:  # of a trained model; the results are then of other weights
        model = AutoModel.from_pretrained(run_dir / "export")
        with torch.no_grad():
            model.logit_scale.fill_(3.0)
            model.logit_bias.fill_(-4.0)
        model.save_pretrained(run_dir / "export")
        assert main(["card", str(run_dir), "-o", str(tmp_path / "card.md")]) == 2
        assert "is of other weights" in one_line(capsys)
        summary = json.loads((run_dir / "eval.json").read_text())
        (run_dir / "eval.json").write_text(json.dumps(summary | {"results": {}}))
    assert main(["card", str(run_dir), "-o", str(tmp_path / "card.md")]) == 0, capsys.readouterr().err
    card = ModelCard.load(tmp_path / "card.md")
    assert kind in card.text
    assert [words for words in there if words not in card.text] == []
    assert [words for words in absent if words in card.text] == []
    assert {name, "hf_maskclip", "patch-mask-random"} <= set(card.data.tags)
    assert bool(scale) or "zero_shot" in str(card.data.to_dict()["model-index"])

    monkeypatch.chdir(tmp_path)
    random_picture(0).save("picture.png")
    names = {}
    for code in re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL):
        if SENTENCES not in code:  # test_neighbours.py runs that
            exec(code.replace("org/run", str(run_dir / "export")), names)
    assert type(names["model"]) is getattr(transformers, f"{BY_TYPE[name].prefix}Model")
    assert "'label': 'a cat'" in capsys.readouterr().out


def test_a_card_shows_no_pipeline_that_would_pad_texts_beyond_the_context(save_run, tmp_path, monkeypatch, capsys):
    run_dir = save_run("siglip")
    config = make_config("siglip", make_tokenizer("siglip"))
    config.text_config.max_position_embeddings = 16
    transformers.SiglipModel(config).save_pretrained(run_dir / "export")
    (run_dir / "eval.json").write_text(json.dumps(json.loads((run_dir / "eval.json").read_text()) | {"results": {}}))
    monkeypatch.chdir(tmp_path)
    random_picture(0).save("picture.png")
    classify = pipeline("zero-shot-image-classification", model=str(run_dir / "export"))
    with pytest.raises(Exception, match="(?i)sequence length|index out of range"):
        classify("picture.png", candidate_labels=["a cat"])
    card = ModelRepository(run_dir, "org/run").card()
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    assert "pipeline" not in code
    exec(code.replace("org/run", str(run_dir / "export")), {})
    assert "tensor([[" in capsys.readouterr().out


@pytest.mark.parametrize("name", BY_TYPE)
def test_a_push_has_the_familys_files_and_its_demo_only_where_that_shows_it(name, save_run, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
    run_dir = save_run(name)
    push = ["push", str(run_dir), "org/name", "--dry_run"]
    assert main(push) == 0
    printed = capsys.readouterr().out
    assert all(f"  {file}  " in printed for file in ("README.md", "model.safetensors", "processor_config.json", "eval.json"))
    assert main([*push, "--space"]) == (0 if name in DEMO else 2)
    if name not in DEMO:
        shown = "which the demo cannot show; it shows CLIP, MetaCLIP 2, AltCLIP, ChineseCLIP"
        assert f"is of {BY_TYPE[name].title}, {shown}" in one_line(capsys)


@pytest.mark.parametrize("name", BY_TYPE)
def test_the_demo_scores_as_the_pipeline_does_or_refuses_the_family(name, save, monkeypatch, capsys):
    pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
    from hf_maskclip.demo import scoring

    folder = save(name)
    if name not in DEMO:
        assert main(["demo", "--model", str(folder)]) == 2
        assert f"is of {BY_TYPE[name].title}, which the demo cannot show" in one_line(capsys)
        return
    model, processor = scoring.load_model(folder)
    assert isinstance(model, PatchMaskedDualEncoder)
    labels, picture = ["a red ball", "two fish", "a house"], random_picture(3, (40, 40))
    whole, half = scoring.score_labels(model, processor, picture, labels, "{}", "random", [0, 0.5])
    found = pipeline("zero-shot-image-classification", model=str(folder))(picture, labels, hypothesis_template="{}")
    expected = torch.tensor([{row["label"]: row["score"] for row in found}[label] for label in labels])
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-6)
    assert (half - whole).abs().max() > 1e-5


@pytest.mark.parametrize("name", BY_TYPE)
def test_masks_are_drawn_by_the_attention_of_any_tower_of_square_pictures(name, save, tmp_path, capsys):
    folder, picture = save(name), tmp_path / "picture.png"
    random_picture(1, (48, 48)).save(picture)
    command = ["masks", str(picture), "--mask", "attentive", "--model", str(folder), "-o", str(tmp_path / "masks.png")]
    assert main(command) == (2 if name == "siglip2" else 0)
    assert (tmp_path / "masks.png").is_file() == (name != "siglip2")
    if name == "siglip2":
        assert "is of SigLIP 2 NaFlex, which sees pictures in their own aspect ratios" in one_line(capsys)


def test_the_teacher_of_a_drawn_mask_sees_pixels_as_its_family_does(save, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "hf_maskclip.visualization.class_attention", lambda tower, pixels: seen.append(pixels) or torch.rand(1, 16)
    )
    random_picture(1, (32, 32)).save(tmp_path / "picture.png")
    for name in ("siglip", "clip"):
        folder = save(name, name)
        command = ["masks", str(tmp_path / "picture.png"), "--mask", "attentive", "--model", str(folder)]
        assert main([*command, "-o", str(tmp_path / "masks.png")]) == 0
        expected = AutoImageProcessor.from_pretrained(folder)(random_picture(1, (32, 32)), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(seen[-1], expected, rtol=0, atol=1e-5)
