"""Normalised image and text features, computed in evaluation mode and shared over processes.

Shapes: N samples, E projection size.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor


@contextmanager
def evaluation_mode(model: CLIPModel) -> Iterator[None]:
    """Switch a model to evaluation mode, without gradients, and back to the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def image_features(
    model: CLIPModel, processor: CLIPProcessor, samples: Iterable[tuple[Image.Image, Any]], batch_size: int = 64
) -> tuple[torch.Tensor, list[Any]]:
    """Unit-length features of pictures, and what came with each.

    Each process encodes its share, and all of them get the whole result, in order.

    Args:
        samples: (picture, anything) pairs; every process iterates over the same ones.
        batch_size: pictures a forward pass.

    Returns:
        float32 features (N, E) on the CPU, and the list of the N companions.
    """
    state = PartialState()
    mine = islice(samples, state.process_index, None, state.num_processes)
    features, companions = [], []
    with evaluation_mode(model):
        while batch := list(islice(mine, batch_size)):
            pictures, others = zip(*batch, strict=True)
            pixel_values = processor.image_processor(images=list(pictures), return_tensors="pt")["pixel_values"]
            encoded = model.get_image_features(pixel_values=pixel_values.to(model.device)).pooler_output
            features += F.normalize(encoded.float(), dim=-1).cpu()
            companions += others
    if state.num_processes > 1:
        # Process p holds samples p, p + P, p + 2 P, ...; sorting by index restores the order.
        indexed = enumerate(zip(features, companions, strict=True))
        shares = gather_object([(state.process_index + i * state.num_processes, *pair) for i, pair in indexed])
        _, features, companions = map(list, zip(*sorted(shares, key=lambda share: share[0]), strict=True))
    if not features:
        raise ValueError("no picture to evaluate on: the evaluation data is empty")
    return torch.stack(features), companions


def text_features(model: CLIPModel, processor: CLIPProcessor, texts: list[str], batch_size: int = 256) -> torch.Tensor:
    """Unit-length features (N, E) of texts, float32 on the CPU; texts over the context length are cut."""
    context_length = model.config.text_config.max_position_embeddings
    features = []
    with evaluation_mode(model):
        for first in range(0, len(texts), batch_size):
            tokens = processor.tokenizer(
                texts[first : first + batch_size],
                padding=True,
                truncation=True,
                max_length=context_length,
                return_tensors="pt",
            )
            encoded = model.get_text_features(input_ids=tokens["input_ids"].to(model.device)).pooler_output
            features.append(F.normalize(encoded.float(), dim=-1).cpu())
    return torch.cat(features)
