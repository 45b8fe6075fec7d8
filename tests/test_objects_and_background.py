"""Proves that the masks that look at pictures keep the objects of a scene rather than its background."""

from pathlib import Path

import numpy as np
import torch
from helpers import photo_like

from hf_maskclip import build_patch_mask
from hf_maskclip.data.scene_drawing import draw_scene
from hf_maskclip.data.scenes import sample_scene

PGS_05 = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}


def normalised_scene(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values (3, 224, 224) of a scene, and which of its 196 patches are mostly object."""
    picture, mask = draw_scene(sample_scene(index, split="test"), 224)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    is_object = torch.from_numpy(mask).view(14, 16, 14, 16).float().mean(dim=(1, 3)).flatten() > 0.5
    return (pixels - 0.45) / 0.27, is_object


def test_pgs_keeps_the_objects_of_scenes():
    images, is_object = map(torch.stack, zip(*map(normalised_scene, range(40)), strict=True))
    assert 0.05 < is_object.float().mean() < 0.3
    kept = {}
    for name, spec in {"random": "random", "pgs 0.5": PGS_05, "cluster": "cluster"}.items():
        mask = build_patch_mask(spec, patch_size=16)
        visible = mask(images, generator=torch.Generator().manual_seed(0)).visible(196)
        kept[name] = visible[is_object].float().mean().item()
    assert 0.45 < kept["random"] < 0.55
    assert kept["pgs 0.5"] > 0.85
    assert kept["cluster"] > 0.75


def test_what_pgs_drops_around_a_textured_object_on_a_plain_background_is_background():
    texture = photo_like(20, 224, 224)
    texture += 0.3 * torch.randn(texture.shape, generator=torch.Generator().manual_seed(0))
    y, x = torch.meshgrid(torch.arange(224), torch.arange(224), indexing="ij")
    disc = torch.hypot(y - 111.5, x - 111.5) < 67
    images = torch.where(disc, texture, 1.9)
    is_object = torch.nn.functional.avg_pool2d(disc[None, None].float(), 16).flatten() > 0
    dropped = ~build_patch_mask(PGS_05, patch_size=16)(images, generator=torch.Generator().manual_seed(0)).visible(196)
    assert is_object.float().mean() > 0.35
    assert dropped.float().mean() == 0.5
    assert dropped[:, ~is_object].sum() / dropped.sum() >= 0.95


def test_how_choices_vary_is_counted_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "training" / "benchmarks"))
    from mask_behaviour import variety

    # Three epochs of one picture of four patches: the first always, the second twice, the third once, the fourth never.
    draws = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)[:, None]
    # Overlaps of 2/2 and 1/3; two of three have the entropy of one third, 0.918 bits.
    assert variety(draws) == ["75.0%", "66.7%", "50.0%", "0.46"]
