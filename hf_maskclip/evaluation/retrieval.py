"""Zero-shot retrieval: each picture looks for its captions among all captions, and each caption for its pictures.

Shapes: Q queries, T targets, R positive pairs, E projection size.
"""

from functools import partial
from typing import Any

import torch

from .encoder import Encoder, ImageSet
from .metrics import RecallAtK, compute_over_processes, rank_of_nearest

QUERIES_PER_CHUNK = 1024  # the full matrix of scores would grow with Q x T


def evaluate_retrieval(encoder: Encoder, images: ImageSet) -> dict[str, Any]:
    """Recall at 1, 5 and 10, both ways, of pictures whose targets are lists of captions, at least one each.

    A query has found if any of what belongs to it is among the nearest. Captions that are equal are one text, and belong to
    all of their pictures. Pictures that are equal are one picture, with the captions of all its rows: data may have a row for
    each caption. `num_rows` in the result is how many rows there were.
    """
    found = encoder.encode_images(images)
    row_of: dict[Any, int] = {}  # from a picture to its first row
    keys: list[Any] = found.hashes or list(range(len(found.targets)))
    picture_of = [row_of.setdefault(key, row) for row, key in enumerate(keys)]
    number_of = {row: number for number, row in enumerate(row_of.values())}
    pictures = found.features[list(number_of)]
    index_of: dict[str, int] = {}
    positives = torch.tensor(
        [
            (number_of[row], index_of.setdefault(text, len(index_of)))
            for row, captions in zip(picture_of, found.targets, strict=True)
            for text in captions
        ]
    )
    texts = encoder.encode_texts(list(index_of))
    image_to_text = recall_at_k(pictures, texts, positives)
    text_to_image = recall_at_k(texts, pictures, positives.flip(1))
    return (
        {f"image_to_text_{name}": value for name, value in image_to_text.items()}
        | {f"text_to_image_{name}": value for name, value in text_to_image.items()}
        | {"n": len(pictures), "num_rows": len(found.features), "num_texts": len(texts)}
        | {"num_undecodable": found.num_undecodable}
    )


def recall_at_k(queries: torch.Tensor, targets: torch.Tensor, positives: torch.Tensor) -> dict[str, float]:
    """[`RecallAtK`] of queries among targets.

    Args:
        queries: (Q, E), unit length.
        targets: (T, E), unit length.
        positives: LongTensor (R, 2) of (query, target) pairs that belong together; every query has at least one.
    """
    by_query = positives[positives[:, 0].argsort()]

    def ranks(first: int) -> dict[str, torch.Tensor]:
        scores = queries[first : first + QUERIES_PER_CHUNK] @ targets.t()  # (q, T)
        in_chunk = by_query[(by_query[:, 0] >= first) & (by_query[:, 0] < first + len(scores))]
        positive = torch.zeros_like(scores, dtype=torch.bool)
        positive[in_chunk[:, 0] - first, in_chunk[:, 1]] = True
        rank = rank_of_nearest(scores, positive)
        return {"ranks": rank, "num_wrong": (~positive).sum(dim=1)}

    return compute_over_processes(RecallAtK(), [partial(ranks, q) for q in range(0, len(queries), QUERIES_PER_CHUNK)])
