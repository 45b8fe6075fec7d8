"""Zero-shot classification: a picture gets the class whose prompts it is nearest to.

Shapes: N pictures, M classes, E projection size.
"""

from collections.abc import Iterable

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from .features import image_features, text_features


def class_features(model: CLIPModel, processor: CLIPProcessor, class_names: list[str], templates: list[str]) -> torch.Tensor:
    """The features (M, E) of classes: the normalised mean over the prompts, one for each template with the name for `{c}`."""
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"prompt template {template!r}: has no {{c}} for the class name")
    prompts = [template.replace("{c}", name) for name in class_names for template in templates]
    features = text_features(model, processor, prompts).view(len(class_names), len(templates), -1)  # (M, templates, E)
    return F.normalize(features.mean(dim=1), dim=-1)


def classification_scores(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy and the mean over classes of top-1, each in [0, 1].

    A class that ties with the true one counts as nearer, and so does a NaN score: a constant or NaN model scores 0.

    Args:
        scores: (N, M).
        labels: LongTensor (N,).
    """
    own = scores.gather(1, labels[:, None])  # (N, 1)
    rank = (~(scores < own)).sum(dim=1) - 1  # the true class itself is never below itself
    top1 = (rank < 1).float()
    per_class = [top1[labels == label].mean() for label in labels.unique()]
    return {
        "top1": top1.mean().item(),
        "top5": (rank < 5).float().mean().item(),
        "mean_per_class": torch.stack(per_class).mean().item(),
    }


def evaluate_zero_shot(
    model: CLIPModel,
    processor: CLIPProcessor,
    samples: Iterable[tuple[Image.Image, int]],
    class_names: list[str],
    templates: list[str],
) -> dict[str, float | int]:
    """Accuracy of pictures with labels against the class names under the prompt templates."""
    images, labels = image_features(model, processor, samples)
    if not 0 <= min(labels) <= max(labels) < len(class_names):
        raise ValueError(f"class index {max(labels)}: there are {len(class_names)} class names")
    scores = images @ class_features(model, processor, class_names, templates).t()  # (N, M)
    result = classification_scores(scores, torch.tensor(labels))
    return result | {"num_images": len(images), "num_classes": len(class_names)}
