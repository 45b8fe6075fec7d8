"""What the masks do, in numbers: what they keep, how they vary, and how they differ from the authors' released code.

    python training/benchmarks/mask_behaviour.py [--model runs/quickstart/export]

Part one draws scenes, whose generator knows which pixels belong to objects. It counts what each mask keeps of objects, of the
background and of edges, and how its choice varies from epoch to epoch. Part two shows, for each finding about the released code
of CLIP-PGS and cluster masking in docs/masks.md, what this package does on that point. Runs in two minutes, on the CPU.

Shapes: B images, L patches, N draws.
"""

import argparse
import math

import torch
from measure import ROOT  # noqa: F401 (puts the clone on the path)
from torchvision.transforms import v2
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from hf_maskclip import MaskCLIPModel, MaskCLIPVisionModel, PatchSelection, build_patch_mask
from hf_maskclip.data.scene_drawing import draw_scene
from hf_maskclip.data.scenes import sample_scene
from hf_maskclip.models.patch_edges import patch_edges
from hf_maskclip.models.patch_mask_registry import patch_masks
from hf_maskclip.models.patch_masking_attentive import class_attention
from training.model.presets import preset_config

PGS_05 = {"name": "pgs", "min_mask_ratio": 0.5, "max_mask_ratio": 0.5}
IMAGE_SIZE, PATCH_SIZE = 224, 16
EPOCHS, DRAWS = 6, 16  # of one picture; entropy needs more draws than a run has epochs


def select(spec, pixel_values, seed=0, patch_size=PATCH_SIZE, **scores) -> PatchSelection:
    return build_patch_mask(spec, patch_size=patch_size)(pixel_values, generator=torch.Generator().manual_seed(seed), **scores)


def scenes(count: int, image_size: int, patch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values (B, 3, H, W), and which patches are mostly object, a BoolTensor (B, L)."""
    to_tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    drawn = [draw_scene(sample_scene(index, split="test"), image_size) for index in range(count)]
    pixel_values = v2.functional.normalize(
        torch.stack([to_tensor(image) for image, _ in drawn]), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    )
    objects = torch.stack([torch.from_numpy(mask) for _, mask in drawn])[:, None].float()  # (B, 1, H, W)
    return pixel_values, torch.nn.functional.avg_pool2d(objects, patch_size).flatten(1) > 0.5


def edge_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The patches with more edges than the mean patch of their picture, as CLIP-PGS protects them, a BoolTensor (B, L)."""
    strength = patch_edges(pixel_values, patch_size)  # (B, L)
    return strength > strength.mean(dim=1, keepdim=True)


def variety(draws: torch.Tensor) -> list[str]:
    """How a mask's choices (N, B, L) vary: patches seen in six epochs, overlap of two, pictures that stay the same, entropy.

    The overlap is the intersection over the union. The entropy is that of a patch's being visible, in bits, the mean over
    patches. It is at most 1, and 1 where each patch is visible in every second epoch by chance.
    """
    first, second = draws[:-1], draws[1:]
    overlap = ((first & second).sum(dim=2) / (first | second).sum(dim=2)).mean()
    same = (first == second).all(dim=2).float().mean()
    chance = draws.float().mean(dim=0)  # (B, L)
    entropy = -(torch.xlogy(chance, chance) + torch.xlogy(1 - chance, 1 - chance)).mean() / math.log(2)
    return [f"{draws[:EPOCHS].any(dim=0).float().mean():.1%}", f"{overlap:.1%}", f"{same:.1%}", f"{abs(entropy):.2f}"]


def what_masks_keep(model: str | None, count: int) -> None:
    """Print what each mask leaves visible of objects, background and edges, and how its choice varies."""
    image_size, patch_size, teacher = IMAGE_SIZE, PATCH_SIZE, None
    if model:
        teacher = MaskCLIPVisionModel.from_pretrained(model, attn_implementation="eager").eval()
        image_size, patch_size = teacher.config.image_size, teacher.config.patch_size
    pixel_values, is_object = scenes(count, image_size, patch_size)
    masks = {name: name for name, mask in patch_masks().items() if not mask.needs_patch_scores or teacher}
    masks |= {"pgs 0.5": PGS_05, "pgs 0.5, no edges": PGS_05 | {"edges": "none"}}
    masks["pgs 0.5, edge_temperature 1"] = PGS_05 | {"edge_temperature": 1.0}
    parts = {"edges only": {"transport": False}, "transport only": {"edges": "none"}}
    parts["neither"] = parts["edges only"] | parts["transport only"]
    masks |= {f"pgs, {name}": {"name": "pgs"} | part for name, part in parts.items()}
    print(f"{count} scenes of {image_size} pixels, patches of {patch_size}: {is_object.float().mean():.1%} of them are object")
    is_edge = edge_patches(pixel_values, patch_size)
    kept, varied = ("visible", "of objects", "of background", "of edges"), ("seen in 6", "overlap", "same", "entropy")
    print(f"| {' | '.join(('mask', *kept, *varied))} |\n|{'---|' * (1 + len(kept) + len(varied))}")
    for name, spec in masks.items():
        scores = {"patch_scores": class_attention(teacher, pixel_values)} if build_patch_mask(spec).needs_patch_scores else {}
        chosen = [select(spec, pixel_values, seed, patch_size, **scores) for seed in range(DRAWS)]
        draws = torch.stack([selection.visible(is_object.shape[1]) for selection in chosen])  # (N, B, L)
        visible = draws[0]
        shares = [visible.float().mean()] + [visible[part].float().mean() for part in (is_object, ~is_object, is_edge)]
        print(f"| {name} | " + " | ".join([f"{share:.1%}" for share in shares] + variety(draws)) + " |", flush=True)


def plain_background(count: int) -> None:
    """Print how much of what PGS 0.5 drops is background, for a disc with the texture of scenes before a plain colour."""
    pixel_values, _ = scenes(count, IMAGE_SIZE, PATCH_SIZE)
    y, x = torch.meshgrid(torch.arange(IMAGE_SIZE), torch.arange(IMAGE_SIZE), indexing="ij")
    disc = torch.hypot(y - IMAGE_SIZE / 2, x - IMAGE_SIZE / 2) < 0.3 * IMAGE_SIZE
    texture = pixel_values + 0.3 * torch.randn(pixel_values.shape, generator=torch.Generator().manual_seed(0))
    images = torch.where(disc, texture, 1.9)
    is_object = torch.nn.functional.avg_pool2d(disc[None, None].float(), PATCH_SIZE).flatten() > 0  # (L,)
    dropped = ~select(PGS_05, images).visible(len(is_object))  # (B, L)
    print(f"\nA textured disc on a plain background: {dropped[:, ~is_object].sum() / dropped.sum():.1%} of what pgs 0.5 drops")
    print(f"is background, which is {1 - is_object.float().mean():.1%} of the image")


def released_code_findings(count: int) -> None:
    """Print this package's behaviour on each point where the released code differs from the papers."""
    pixel_values, _ = scenes(count, IMAGE_SIZE, PATCH_SIZE)
    num_patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    pgs = build_patch_mask("pgs", patch_size=PATCH_SIZE)

    stages = pgs.stages(pixel_values, generator=torch.Generator().manual_seed(0))
    visible = select("pgs", pixel_values).visible(num_patches)
    on_edge = stages.is_edge.gather(1, stages.candidates).float().mean()
    kept = visible[stages.is_edge].float().mean()
    print(f"\nCandidates of pgs that are edge patches: {on_edge:.1%}; edge patches that pgs keeps: {kept:.1%}")

    other = select("pgs", pixel_values, seed=1).visible(num_patches)
    print(f"Images whose pgs mask is the same at two epochs: {(visible == other).all(dim=1).float().mean():.1%}")

    noise = torch.randn(1000, 3, IMAGE_SIZE // 2, IMAGE_SIZE // 2, generator=torch.Generator().manual_seed(0))
    rows = select({"name": "cluster", "similarity_threshold": 0.9}, noise).visible(num_patches // 4).view(1000, 7, 7)
    dropped = 1 - rows.float().mean(dim=(0, 2))
    print(f"Surplus patches that cluster drops, by row from top to bottom: {', '.join(f'{share:.1%}' for share in dropped)}")

    plain = pixel_values[:50].clone()
    plain[..., : IMAGE_SIZE // 2] = 1.9  # the left half is one plain colour
    columns = select("cluster", plain).visible(num_patches).view(-1, 14, 14).float().mean(dim=(0, 1))
    print(
        f"Plain background that cluster drops: {1 - columns[:7].mean():.1%}; of the textured half: {1 - columns[7:].mean():.1%}"
    )

    torch.manual_seed(0)
    model = MaskCLIPModel(preset_config("tiny", "pgs")).vision_model.eval()
    size, patch = model.config.image_size, model.config.patch_size
    images, _ = scenes(8, size, patch)
    selection = select("pgs", images, patch_size=patch)
    dropped = ~selection.visible((size // patch) ** 2).view(-1, size // patch, size // patch)
    dropped = dropped.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]  # (B, 1, H, W)
    with torch.no_grad():
        before, after = (
            model(x, patch_selection=selection).pooler_output
            for x in (images, torch.where(dropped, torch.randn_like(images), images))
        )
    print(f"Largest change of the output when all dropped pixels change: {(after - before).abs().max():.1e}")
    print(f"Patches encoded per image at pgs 0.3: {selection.lengths.tolist()} of {(size // patch) ** 2}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub id of a CLIP trained on scenes: the teacher of the attentive mask")
    parser.add_argument("--count", type=int, default=300, help="scenes")
    options = parser.parse_args()
    what_masks_keep(options.model, options.count)
    plain_background(options.count)
    released_code_findings(options.count)
