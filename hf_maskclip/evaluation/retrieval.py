"""Zero-shot retrieval: each picture looks for its captions among all captions, and each caption for its pictures.

Shapes: Q queries, T targets, R positive pairs, E projection size.
"""

from functools import partial
from typing import Any

import torch

from .details import of_search
from .encoder import Encoder, ImageSet
from .metrics import RecallAtK, gather_chunks, rank_of_nearest

QUERIES_PER_CHUNK = 1024  # the full matrix of scores would grow with Q x T


def evaluate_retrieval(encoder: Encoder, images: ImageSet, *, details: bool = False) -> dict[str, Any]:
    """Recall at 1, 5 and 10, both ways, of pictures whose targets are lists of captions, at least one each.

    A query has found if any of what belongs to it is among the nearest. Captions that are equal are one text, and belong to
    all of their pictures. Pictures that are equal are one picture, with the captions of all its rows: data may have a row for
    each caption. `num_rows` in the result is how many rows there were. Standard errors take queries for independent.

    Args:
        details: with what each query found, under `details`, the captions behind the pictures.
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
    names, captions = [found.names[row] for row in number_of] if details else [], list(index_of)
    result: dict[str, Any] = {"standard_errors": {}}
    predictions = []
    ways = {
        "image_to_text": (pictures, texts, positives, names, captions),
        "text_to_image": (texts, pictures, positives.flip(1), captions, names),
    }
    for way, (queries, targets, right, query_names, target_names) in ways.items():
        ranks, nearest, num_wrong = search(queries, targets, right)
        recalls = RecallAtK().compute(ranks=ranks, num_wrong=num_wrong)
        errors = recalls.pop("standard_errors")
        result |= {f"{way}_{name}": value for name, value in recalls.items()}
        result["standard_errors"] |= {f"{way}_{name}": value for name, value in errors.items()}
        predictions += of_search(way, query_names, target_names, ranks, nearest) if details else []
    result |= {"n": len(pictures), "num_rows": len(found.features), "num_texts": len(texts)}
    result |= {"num_undecodable": found.num_undecodable}
    return result | ({"details": {"predictions": predictions}} if details else {})


def search(
    queries: torch.Tensor, targets: torch.Tensor, positives: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each query how many wrong targets are as near as the nearest right one, or nearer; the nearest target, a wrong one
    where there is a tie; and how many targets are wrong: LongTensors (Q,).

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
        is_candidate = positive == (rank < 1)[:, None]  # (q, T)
        nearest = scores.masked_fill(~is_candidate, -torch.inf).argmax(dim=1)
        return {"ranks": rank, "nearest": nearest, "num_wrong": (~positive).sum(dim=1)}

    found = gather_chunks([partial(ranks, q) for q in range(0, len(queries), QUERIES_PER_CHUNK)])
    return found["ranks"], found["nearest"], found["num_wrong"]


def recall_at_k(queries: torch.Tensor, targets: torch.Tensor, positives: torch.Tensor) -> dict[str, Any]:
    """[`RecallAtK`] of queries among targets, of which [`search`] says more."""
    ranks, _, num_wrong = search(queries, targets, positives)
    return RecallAtK().compute(ranks=ranks, num_wrong=num_wrong)
