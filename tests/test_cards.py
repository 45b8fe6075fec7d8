"""Proves that a model's card has the measured numbers of its run and no others, and names its data, model, mask and paper."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from hf_maskclip.cli import main
from hf_maskclip.data.scene_drawing import STYLES
from hf_maskclip.data.scene_sets import COMPOSITIONALITY_KINDS
from hf_maskclip.data.specs import hub_ids_of
from hf_maskclip.hub.card import card_of_recipe, check_card
from hf_maskclip.hub.repository import ModelRepository
from hf_maskclip.models.patch_mask_registry import patch_masks
from training.tracking import draw_curves

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "training" / "recipes").glob("*.yaml"))


def test_every_mask_of_others_has_a_paper():
    papers = {name: mask.citation for name, mask in patch_masks().items()}
    assert papers.pop("leverage") is None
    assert all(paper and paper.title and paper.authors for paper in papers.values())
    assert len({paper.key for paper in papers.values()}) == 7  # block and grid are of one


def test_the_numbers_of_a_card_are_those_of_the_run(finished_run):
    card = check_card(ModelRepository(finished_run, "org/name").card())
    front_matter = ModelCard(str(card)).data.to_dict()
    assert (front_matter["library_name"], front_matter["pipeline_tag"]) == ("transformers", "zero-shot-image-classification")
    assert {"clip", "hf_maskclip", "patch-mask-pgs"} <= set(front_matter["tags"])
    assert "base_model" not in front_matter
    (record,) = json.loads((finished_run / "eval.json").read_text())["results"].values()
    (result,) = front_matter["model-index"][0]["results"]
    measured = {metric["name"]: metric["value"] for metric in result["metrics"]}
    assert measured == {name: record[name] for name in ("top1", "top5", "mean_per_class")}
    assert [metric["type"] for metric in result["metrics"]] == ["accuracy", "accuracy", "recall"]  # the Hub's names
    assert result["task"]["type"] == "zero-shot-image-classification"
    assert f"| name | {100 * record['top1']:.1f} |" in card.text  # under the repository's name
    assert "colours: 14 pictures, 7 classes, chance is 14.3" in card.text
    assert record["model_hash"] in card.text
    assert "16 in 4 steps" in card.text
    assert "| seed | `0` |" in card.text
    assert "| warmup steps | a tenth of the steps |" in card.text
    assert "`pgs: min_mask_ratio 0.3, max_mask_ratio 0.5" in card.text
    assert "million parameters" in card.text
    assert "| hardware | 1 x " in card.text
    assert f"torch {torch.__version__.partition('+')[0]}" in card.text
    assert "2503.17080" in card.text
    assert "masks.png" in card.text


def test_each_result_has_a_place_of_its_own_in_the_model_index(finished_run):
    summary = json.loads((finished_run / "eval.json").read_text())
    (record,) = summary["results"].values()
    summary["results"] |= {f"zero_shot_{n}": record | {"column": f"colours {n}"} for n in range(3)}
    (finished_run / "eval_more.json").write_text(json.dumps(summary))
    front_matter = ModelCard(str(ModelRepository(finished_run, "org/name").card())).data.to_dict()
    assert [len(result["metrics"]) for result in front_matter["model-index"][0]["results"]] == [3] * 4


def test_the_example_that_a_run_left_is_what_its_card_shows(finished_run):
    without = ModelRepository(finished_run, "org/name")
    assert "picture.png" in without.card().text
    assert "widget" not in ModelCard(str(without.card())).data.to_dict()
    about = {"captions": ['a "red" ball', "a fish"], "scores": {"a fish": 0.75, 'a "red" ball': 0.25}}
    (finished_run / "example.json").write_text(json.dumps(about))
    Image.new("RGB", (8, 8)).save(finished_run / "example.png")
    repository = ModelRepository(finished_run, "org/name")
    card = check_card(repository.card())
    address = "https://huggingface.co/org/name/resolve/main/example.png"
    assert ModelCard(str(card)).data.to_dict()["widget"] == [{"src": address, "candidate_labels": 'a "red" ball, a fish'}]
    (labels,) = re.findall(r"^labels = (.*)$", card.text, flags=re.MULTILINE)
    assert json.loads(labels) == about["captions"]
    assert 'It says: 75% a fish; 25% a "red" ball.' in card.text
    assert {"example.png", "example.json"} <= set(repository.content())


HUB = {"train_data": "hf://datasets/org/pairs/train-{0..9}.tar", "model": "openai/clip-vit-base-patch16"}


def with_options(run_dir: Path, options: dict, hub: dict | None) -> dict:
    """The front matter of a run's card with other options, and what the run wrote of the Hub; None: as older runs, nothing."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text()) | options
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((run_dir / "eval.json").read_text())
    summary = {key: value for key, value in summary.items() if key != "hub"} | ({} if hub is None else {"hub": hub})
    (run_dir / "eval.json").write_text(json.dumps(summary))
    return ModelCard(str(ModelRepository(run_dir, "org/name").card())).data.to_dict()


def test_data_and_base_model_are_named_where_the_run_found_them_on_the_hub(finished_run):
    summary = json.loads((finished_run / "eval.json").read_text())
    assert summary["hub"] == {"model": None, "train_data": []}  # of a preset and files
    local = {"train_data": "shards/train", "model": "runs/base"}  # folders that are gone since
    found = with_options(finished_run, local, summary["hub"])
    assert not {"datasets", "base_model"} & found.keys()
    found = with_options(finished_run, HUB, {"model": HUB["model"], "train_data": ["org/pairs", "org/more"]})
    assert (found["datasets"], found["base_model"]) == (["org/pairs", "org/more"], HUB["model"])


def test_of_an_older_run_what_may_have_been_a_path_is_left_out(finished_run):
    found = with_options(finished_run, HUB, None)
    assert (found["datasets"], found["base_model"]) == (["org/pairs"], HUB["model"])
    (finished_run.parent / "shards").mkdir()
    (finished_run.parent / "runs").mkdir()
    found = with_options(finished_run, {"train_data": "shards/train", "model": "runs/base"}, None)
    assert not {"datasets", "base_model"} & found.keys()


# What a spec of data says of the Hub.
SPECS = {
    "org/pairs": ["org/pairs"],
    "org/pairs:english@validation": ["org/pairs"],
    "hf://datasets/org/pairs/a.tar::hf://datasets/org/more@main/b-{0..2}.tar": ["org/pairs", "org/more"],
    "shards/train-{0..3}.tar": [],
    "https://host/org/pairs.tar": [],
    "scenes": [],
}


@pytest.mark.parametrize("spec", SPECS)
def test_which_data_sets_of_the_hub_a_spec_names(spec):
    assert hub_ids_of([spec]) == SPECS[spec]


def test_the_card_of_a_mix_names_each_source(tmp_path):
    mix = "[{data: org/pairs, weight: 3, caption_key: alt}, {data: 'hf://datasets/org/more/*.tar'}]"
    (tmp_path / "mixed.yaml").write_text(f"model: vit-b-16\npatch_mask: pgs\ntrain_data: {mix}\n")
    card = card_of_recipe(tmp_path / "mixed.yaml")
    assert card.data.datasets == ["org/pairs", "org/more"]
    assert "data `org/pairs`, weight `3`, caption_key `alt`; data `hf://datasets/org/more/*.tar`" in str(card)


def test_a_folder_here_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "pairs").mkdir(parents=True)
    assert hub_ids_of(["org/pairs"]) == []


# Changes of a record that take it off this repository's card.
FOREIGN = {
    "is of other weights (0123456789abcdef, the export has": {"model_hash": "0123456789abcdef"},
    "was measured under the patch mask random": {"patch_mask": {"name": "random", "mask_ratio": 0.5}},
    "is a trial on the first 10 pictures": {"limit": 10},
}


@pytest.mark.parametrize("words", FOREIGN)
def test_results_that_are_not_this_models_are_refused(words, finished_run, capsys):
    summary = json.loads((finished_run / "eval.json").read_text())
    (record,) = summary["results"].values()
    (finished_run / "eval_other.json").write_text(json.dumps({"results": {"more": record | {"column": "x"} | FOREIGN[words]}}))
    assert main(["card", str(finished_run), "-o", str(finished_run / "card.md")]) == 2
    error = capsys.readouterr().err
    assert "eval_other.json: zero_shot x" in error
    assert words in error
    assert not (finished_run / "card.md").exists()


def test_half_precision_results_of_the_same_weights_stand_on_the_card(finished_run):
    export = finished_run / "export"
    command = ["evaluate", "--model", str(export), "--suite", "scenes", "--tasks", "compositionality_add_object"]
    assert main([*command, "--precision", "bfloat16", "--output", str(finished_run / "eval_half.json")]) == 0
    card = ModelRepository(finished_run, "org/name").card()
    assert "add object: " in card.text
    assert len(re.search(r"\(hash (.*?)\)", card.text)[1].split(", ")) == 2


def test_a_license_that_the_hub_does_not_know_is_refused(finished_run, capsys):
    for license in ("mit2", "Apache-2.0", "apache"):
        assert main(["push", str(finished_run), "org/name", "--dry_run", "--license", license]) == 2
        assert f"--license {license!r}: must be one of the Hub's identifiers, such as" in capsys.readouterr().err
    assert ModelRepository(finished_run, "org/name", "cc-by-nc-4.0").card().data.license == "cc-by-nc-4.0"


@pytest.mark.parametrize("num_evaluations", [0, 1, 2])
def test_the_curves_have_accuracies_where_these_are_curves(num_evaluations, tmp_path):
    records = [{"step": step, "loss": 1.0, "learning_rate": 0.1} for step in (1, 2)]
    for record in records[:num_evaluations]:
        record["eval/zero_shot_x/top1"] = 0.5
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    titles = [axis.get_title() for axis in draw_curves(tmp_path / "metrics.jsonl").axes]
    assert titles == ["loss", "learning rate", *(["zero-shot accuracy"] if num_evaluations > 1 else [])]


def test_a_run_without_an_evaluation_has_a_card_that_says_so(run):
    card = check_card(ModelRepository(run(patch_mask="random")[2], "org/name").card())
    assert "None: the run was not evaluated." in card.text
    assert "2212.00794" in card.text
    assert "model-index" not in ModelCard(str(card)).data.to_dict()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_card_of_each_recipe_is_there_and_has_no_result(recipe):
    card = check_card(card_of_recipe(recipe))
    assert (ROOT / "model_cards" / f"{recipe.stem}.md").read_text() == f"{card}\n"
    assert "Not yet trained" in card.text
    assert "model-index" not in card.data.to_dict()
    assert not re.search(r"\d %|\d\.\d \|", card.text)
    assert "from_pretrained" not in card.text  # there is nothing to load


def results_of(card: ModelCard) -> dict[str, float]:
    return {f"{result.task_name}/{result.metric_name}": result.metric_value for result in card.data.eval_results}


def table_of(header: str) -> dict[str, str]:
    """A table of two columns on the pages: its cells by what stands before them."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [rows for page in pages for rows in re.findall(rf"^{re.escape(header)}\n.*\n((?:\|.*\n)+)", page.read_text(), re.M)]
    assert found
    return dict(row.strip("|").split("|") for rows in found for row in rows.splitlines())


def test_what_the_quickstart_prints_in_the_readme_are_the_numbers_of_its_card():
    results = results_of(ModelCard.load(ROOT / "model_cards" / "clip-pgs-tiny.md"))
    lines = []
    for kind in ("shape", "colour", "pair"):
        top1, mean = (results[f"zero_shot_{kind}/{metric}"] for metric in ("top1", "mean_per_class"))
        lines.append(f"zero_shot_{kind}: top1 {top1:.1%}, mean_per_class {mean:.1%}")
    recalls = {name: results[f"retrieval_scenes/{name}"] for name in ("image_to_text_recall@10", "text_to_image_recall@10")}
    lines.append("retrieval_scenes: " + ", ".join(f"{name} {value:.1%}" for name, value in recalls.items()))
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (printed,) = [block for block in blocks if "zero_shot_shape" in block]
    assert [line for line in lines if line not in printed.splitlines()] == []


def test_the_table_of_the_quickstarts_model_has_the_numbers_of_its_card():
    results = results_of(ModelCard.load(ROOT / "model_cards" / "clip-pgs-tiny.md"))
    percent = {name: f"{100 * value:.1f}" for name, value in results.items()}
    expected = {"zero-shot": [f"{kind} {percent[f'zero_shot_{kind}/top1']}" for kind in ("shape", "colour", "pair")]}
    expected["linear probe"] = [f"{kind} {percent[f'linear_probe_{kind}/top1']}" for kind in ("shape", "colour")]
    expected["robustness"] = [f"{style} {percent[f'robustness_{style}/top1']}" for style in STYLES]
    kinds = COMPOSITIONALITY_KINDS
    expected["compositionality"] = [
        f"{kind.replace('_', ' ')} {percent[f'compositionality_{kind}/accuracy']}" for kind in kinds
    ]
    expected["retrieval"] = [
        f"{found} {'/'.join(percent[f'retrieval_scenes/{way}_recall@{k}'] for k in (1, 5, 10))}"
        for found, way in (("text", "image_to_text"), ("image", "text_to_image"))
    ]
    table = table_of("| family | the quickstart's model, % |")
    assert len(table) == len(expected)
    for family, parts in expected.items():
        (cell,) = [cell for name, cell in table.items() if name.strip().startswith(family)]
        numbers = [part.strip() for part in re.sub(r"\(.*?\)", "", cell).split(",")]
        assert numbers == parts


def test_the_quickstarts_card_has_its_pictures():
    card = check_card(ModelCard.load(ROOT / "model_cards" / "clip-pgs-tiny.md"))
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", card.text)
    assert pictures
    assert all((ROOT / "model_cards" / name).is_file() for name in pictures)
