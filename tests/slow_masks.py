"""Literal transcriptions of the masks' definitions, for one image, with loops.

They share nothing with the package but the random numbers, the edge strength and the count of what stays.
"""

import math

import numpy as np
import torch

from hf_maskclip.models.patch_edges import patch_edges
from hf_maskclip.models.patch_masking import keep_count


def slow_similarity(image: torch.Tensor, i: int, j: int, patch: int = 8) -> float:
    columns = image.shape[2] // patch
    first, second = (
        image[:, y : y + patch, x : x + patch]
        for y, x in (divmod(k, columns) for k in (i, j))
        for y, x in [(y * patch, x * patch)]
    )
    colours = [p.mean(dim=(1, 2)) for p in (first, second)]
    deviations = [(p - c[:, None, None]).square().mean().sqrt() for p, c in zip((first, second), colours, strict=True)]
    if deviations[0] < 0.02 or deviations[1] < 0.02:
        same = max(deviations) < 0.02 and (colours[0] - colours[1]).abs().max() < 0.05
        return float(same)
    first, second = ((p - p.mean()) / (p.std() + 1e-6) for p in (first, second))
    return (first * second).sum().item() / (first.norm() * second.norm()).item()


def slow_block(draws: list[list[float]], noise: list[float], rows: int, columns: int, num_masked: int) -> list[bool]:
    """Visible patches of one image; `draws` are area, aspect, top and left of each rectangle, in [0, 1)."""
    masked: set[int] = set()
    for area, aspect, top, left in draws:
        area, aspect = 0.08 + area * (0.3 - 0.08), (0.3 ** (0.5 - aspect)) ** 2  # aspect: height over width, in [0.3, 1 / 0.3]
        height = min(rows, max(1, round(math.sqrt(area * aspect) * rows)))
        width = min(columns, max(1, round(math.sqrt(area / aspect) * columns)))
        y, x = int(top * (rows - height + 1)), int(left * (columns - width + 1))
        rectangle = {r * columns + c for r in range(y, y + height) for c in range(x, x + width)} - masked
        surplus = len(masked) + len(rectangle) - num_masked
        masked |= set(sorted(rectangle, key=lambda i: noise[i])[: len(rectangle) - max(0, surplus)])
        if surplus >= 0:
            break
    return [i not in masked for i in range(rows * columns)]


def slow_attentive(scores: list[float], rows: int, columns: int, merge: int, num_kept: int) -> list[bool]:
    """Visible patches of one image, the blocks of the highest mean score first, their patches by their own."""
    blocks: dict[tuple[int, int], list[int]] = {}
    for i in range(rows * columns):
        blocks.setdefault((i // columns // merge, i % columns // merge), []).append(i)
    kept: list[int] = []
    for block in sorted(blocks.values(), key=lambda block: -sum(scores[i] for i in block) / len(block)):
        kept += sorted(block, key=lambda i: -scores[i])[: num_kept - len(kept)]
    return [i in kept for i in range(rows * columns)]


def slow_leverage(image: torch.Tensor, noise: list[float], num_kept: int, patch: int = 8) -> tuple[list[bool], list[float]]:
    """Visible patches of one image, and l_i, with 2 x 2 cells and a ridge of 0.1, in float64 and by a matrix inverse."""
    half, columns = patch // 2, image.shape[2] // patch
    features = []
    for i in range(image.shape[1] * image.shape[2] // patch**2):
        top, left = (patch * place for place in divmod(i, columns))
        corners = [(top + y, left + x) for y in (0, half) for x in (0, half)]
        cells = [image[:, y : y + half, x : x + half].double().mean(dim=(1, 2)) for y, x in corners]
        features.append(torch.cat(cells).numpy())
    centred = [feature - sum(features) / len(features) for feature in features]
    covariance = sum(np.outer(feature, feature) for feature in centred) / len(features)
    ridge = 0.1 * np.trace(covariance) / len(covariance) + 1e-6
    inverse = np.linalg.inv(covariance + ridge * np.eye(len(covariance)))
    scores = [max(1e-6, feature @ inverse @ feature) for feature in centred]
    keys = [math.log(score) - math.log(-math.log(u)) for score, u in zip(scores, noise, strict=True)]
    kept = sorted(range(len(keys)), key=lambda i: -keys[i])[:num_kept]
    return [i in kept for i in range(len(keys))], scores


def slow_cluster(image: torch.Tensor, anchors: list[int], threshold: float) -> tuple[list[bool], list[float]]:
    """What is masked of one image at first, and c_i."""
    num_patches = image.shape[1] * image.shape[2] // 64
    closest = [max(slow_similarity(image, a, i) for a in anchors) for i in range(num_patches)]
    return [i in anchors or closest[i] > threshold for i in range(num_patches)], closest


def slow_sinkhorn(kernel: np.ndarray, iterations: int) -> np.ndarray:
    plan = kernel.copy()
    for _ in range(iterations):
        plan = plan / plan.sum(axis=1, keepdims=True)
        plan = plan / plan.sum(axis=0, keepdims=True)
    return plan


def slow_pgs(image, noise, *, min_ratio, max_ratio, transport=True, edges="sobel", temperature=0.0, uniform=()) -> list[bool]:
    """Visible patches of one image, by the definition's four steps; `noise` (L,) draws the candidates, `uniform` the edges."""
    num_patches = len(noise)
    strength = patch_edges(image[None], 8, edges)[0].tolist()
    is_edge = [e > sum(strength) / num_patches for e in strength]
    order = sorted(range(num_patches), key=lambda i: (is_edge[i], strength[i] if is_edge[i] else -noise[i]))
    candidates = order[: max(1, round(num_patches * 0.05))]
    similarity = np.array([[slow_similarity(image, i, j) for j in range(num_patches)] for i in range(num_patches)])
    weight = slow_sinkhorn(np.exp((similarity - 1) / 0.1), 5) if transport else similarity
    w = [round(max(weight[c, i] for c in candidates), 9) for i in range(num_patches)]
    similar = [max(similarity[c, i] for c in candidates) > 0.5 for i in range(num_patches)]
    gumbel = [-math.log(-math.log(u)) for u in uniform] or [0.0] * num_patches
    value = [strength[i] + temperature * gumbel[i] if is_edge[i] else -w[i] for i in range(num_patches)]
    order = sorted(range(num_patches), key=lambda i: (is_edge[i], value[i], -noise[i]))
    n = sum(s and not e for s, e in zip(similar, is_edge, strict=True))
    low, high = (num_patches - keep_count(num_patches, r) for r in (min_ratio, max_ratio))
    masked = set(order[: min(max(n, low), high)])
    return [i not in masked for i in range(num_patches)]
