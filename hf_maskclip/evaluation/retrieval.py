"""Zero-shot retrieval: each picture looks for its captions among all captions, and each caption for its pictures.

Shapes: Q queries, T targets, R positive pairs, E projection size.
"""

from collections.abc import Iterable

import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from .features import image_features, text_features

RECALL_RANKS = (1, 5, 10)


def recall_at_k(
    queries: torch.Tensor, targets: torch.Tensor, positives: torch.Tensor, ks: tuple[int, ...] = RECALL_RANKS
) -> dict[int, float]:
    """The share of queries that have any of their positives among the k nearest targets.

    A target that ties with the best positive counts as nearer, and so does a NaN score: a model whose features are constant
    or NaN scores 0.

    Args:
        queries: (Q, E), unit length.
        targets: (T, E), unit length.
        positives: LongTensor (R, 2) of (query, target) pairs that belong together; every query has at least one.
        ks: the ranks.

    Returns:
        recall in [0, 1] by k.
    """
    ranks = []
    by_query = positives[positives[:, 0].argsort()]
    for first in range(0, len(queries), 1024):  # the full matrix of scores would grow with Q x T
        scores = queries[first : first + 1024] @ targets.t()  # (q, T)
        in_chunk = by_query[(by_query[:, 0] >= first) & (by_query[:, 0] < first + len(scores))]
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[in_chunk[:, 0] - first, in_chunk[:, 1]] = True
        best = scores.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)  # (q, 1)
        ranks.append((~(scores < best) & ~positive).sum(dim=1))
    rank = torch.cat(ranks)
    return {k: (rank < k).float().mean().item() for k in ks}


def evaluate_retrieval(
    model: CLIPModel, processor: CLIPProcessor, pairs: Iterable[tuple[Image.Image, list[str]]]
) -> dict[str, float | int]:
    """Recall at 1, 5 and 10, both ways. Captions that are equal are one text, and belong to all of their pictures.

    Args:
        pairs: pictures with their captions, at least one each.
    """
    images, captions = image_features(model, processor, pairs)
    index_of: dict[str, int] = {}
    positives = [(i, index_of.setdefault(text, len(index_of))) for i, texts in enumerate(captions) for text in texts]
    texts = text_features(model, processor, list(index_of))
    pairs_index = torch.tensor(positives)
    image_to_text = recall_at_k(images, texts, pairs_index)
    text_to_image = recall_at_k(texts, images, pairs_index.flip(1))
    result: dict[str, float | int] = {f"image_to_text_recall@{k}": value for k, value in image_to_text.items()}
    result |= {f"text_to_image_recall@{k}": value for k, value in text_to_image.items()}
    return result | {"num_images": len(images), "num_texts": len(texts)}
