"""Fixtures that the tests share: tiny models, tokenizers and data. No network, no downloads."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: where a machine is busy, threads wait for each other
if sys.platform == "linux" and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    # A core for each worker and the runs that it starts: these take as many threads as they see cores.
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import torch
from processes import without_pictures
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel, export_to_clip
from hf_maskclip.models import patch_mask_registry
from training.config import TrainingConfig
from training.model.tokenizer import train_tokenizer
from training.train import main

pytest.register_assert_rewrite("helpers", "caption_parser", "option_effects", "text_effects", "tuning_effects", "view_effects")
import helpers  # noqa: E402
from helpers import CAPTIONS, CONTEXT_LENGTH, IMAGE_SIZE, PATCH_SIZE, encode_image, pair, random_picture, write_shard  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="cpu; or cuda, where the tests of models, masks and losses then run, alone"
    )


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist takes files in the order in which they are collected
    if (device := config.getoption("--device")) not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--device {device}: must be cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch sees no GPU here")


def pytest_collection_modifyitems(config, items):
    """Files with the most slow tests come first, so that no worker is left alone with one at the end.

    On a GPU, what asks for no device would only be done again on the CPU.
    """
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
    if config.getoption("--device") != "cpu":
        others = [item for item in items if "device" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "device" in item.fixturenames]


@pytest.fixture
def masks_of_ideas():
    """Known even where another test has imported their modules before."""
    from training.study import idea_tokens, ideas

    for name, mask in (ideas.MASKS | idea_tokens.MASKS).items():
        patch_mask_registry.register_patch_mask(name, mask)


@pytest.fixture
def device(request) -> str:
    """Where a test is to run what it tests."""
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def built_in_masks_only(monkeypatch):
    """A mask that one test registers is unknown to the next."""
    monkeypatch.setattr(patch_mask_registry, "_registered", {})


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(CAPTIONS * 5, vocab_size=1000, context_length=CONTEXT_LENGTH)


@pytest.fixture(scope="session")
def config_parts(tokenizer):
    """Keyword arguments of a tiny `CLIPConfig`: a fresh dict at each call."""

    def make() -> dict:
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        tokens = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        text = tower | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT_LENGTH}
        vision = tower | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
        parts = {"text_config": text | {"projection_dim": 24}, "vision_config": vision | {"projection_dim": 24}}
        return parts | {"projection_dim": 24}

    return make


@pytest.fixture
def make_clip(config_parts):
    def make(seed: int = 0) -> CLIPModel:
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(**config_parts()))

    return make


@pytest.fixture
def make_model(config_parts):
    def make(patch_mask="pgs", seed: int = 0) -> MaskCLIPModel:
        parts = config_parts()
        parts["vision_config"]["patch_mask"] = patch_mask
        torch.manual_seed(seed)
        return MaskCLIPModel(MaskCLIPConfig(**parts))

    return make


@pytest.fixture
def base(make_model, processor, tmp_path) -> str:
    """The folder of a CLIP with a random mask, as a run leaves it."""
    export_to_clip(make_model("random"), tmp_path / "base", processor)
    return str(tmp_path / "base")


@pytest.fixture(scope="session")
def processor(tokenizer):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture
def inputs(tokenizer):
    """A batch of four pictures and captions, as the models take them."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"pixel_values": pixel_values, "input_ids": tokenizer(CAPTIONS, padding=True, return_tensors="pt")["input_ids"]}


@pytest.fixture
def shards(tmp_path):
    """Three shards of 20, 12 and 7 pairs, under keys 000 to 038."""
    numbers = iter(range(39))
    for index, count in enumerate((20, 12, 7)):
        samples = {f"{number:03d}": pair(number) for number in (next(numbers) for _ in range(count))}
        write_shard(tmp_path / f"train-{index:03d}.tar", samples)
    return tmp_path


@pytest.fixture
def data(tmp_path):
    """Four training shards and one validation shard, all of random pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        write_shard(folder / f"train-{index}.tar", {f"{index}-{n}": pair(5 * index + n) for n in range(5)})
    write_shard(folder / "val-0.tar", {f"v{n}": pair(100 + n) for n in range(6)})
    return folder


@pytest.fixture
def options(data, tmp_path) -> dict:
    """Those of a short run on the small data."""
    places = {"output_dir": str(tmp_path / "run"), "train_data": f"{data}/train-*.tar"}
    return places | {"batch_size": 4, "max_steps": 4, "num_workers": 0, "mixed_precision": "no", "vocab_size": 1000}


@pytest.fixture
def run(options, monkeypatch):
    """Run `main` on the small data and return its summary, its records of losses, and its folder."""

    def run(pictures: bool = False, **changed):
        helpers.reset_accelerate()
        config = TrainingConfig(**(options | changed))
        with monkeypatch.context() as patch:
            if not pictures:
                without_pictures(patch)
            summary = main(config)
        return summary, helpers.losses_of(config.output_dir), Path(config.output_dir)

    return run


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    helpers.reset_accelerate()


@pytest.fixture
def finished_run(run, tmp_path) -> Path:
    """A run of four steps, evaluated on a clip-benchmark folder."""
    folder = tmp_path / "colours"
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(f"colour {n}" for n in range(7)))
    samples = {f"s{n}": {"png": encode_image(random_picture(n)), "cls": str(n % 7).encode()} for n in range(14)}
    write_shard(folder / "test" / "0.tar", samples)
    return run(eval_data=str(folder))[2]
