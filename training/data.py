"""Batches of image-text pairs from a stream: decoded, cropped, tokenised in worker processes; bad samples skipped and counted.

Shapes: B pairs, S caption tokens.
"""

import io
import json
import math
import os
import signal
import sys
import threading
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerBase

from training.errors import ConfigError, TrainingStopped
from training.scenes import caption_scene, draw_scene
from training.skipping import SkipMonitor, SkippedSample

IMAGE_KEYS = ("image", "jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "text", "caption", "json.caption")
# Above this many pixels a picture is not decoded: a small file can unfold to gigabytes.
MAX_IMAGE_PIXELS = 89_478_485
# So many samples without one usable pair mean wrong keys, not bad luck.
PATIENCE = 1000


@dataclass
class PairDecoder:
    """Turns a row of a stream into a picture and its caption.

    Args:
        image_key, caption_key: the field to read, or several separated by commas, of which the first that a sample has is read;
            `""` tries the known ones. `a.b` reads b in the JSON of field a.
        image_size: the side in pixels at which scenes are drawn.
        crop_scale: that of [`train_transform`], in training: a JPEG is then decoded at a half, a quarter or an eighth of its
            size where no crop needs more. 0: always whole.
    """

    image_key: str = ""
    caption_key: str = ""
    image_size: int = 224
    crop_scale: float = 0.0

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> tuple[Image.Image, str]:
        """The picture in RGB and one caption (drawn by `rng` where there are several). Raises SkippedSample with the cause."""
        if "__error__" in row:
            raise SkippedSample(row["__error__"])
        if "scene" in row:
            picture, _ = draw_scene(row["scene"], self.image_size)
            return picture, caption_scene(row["scene"], rng)
        captions = self.captions(row)  # before the picture, for it is cheap
        caption = captions[rng.integers(len(captions))]
        return self.picture(row), caption

    def picture(self, row: dict[str, Any]) -> Image.Image:
        value = _first_field(row, self.image_key.split(",") if self.image_key else IMAGE_KEYS)
        if isinstance(value, dict):  # an undecoded 🤗 Datasets image
            value = value["bytes"] if value.get("bytes") is not None else _read_file(value.get("path"))
        if value is None:
            raise SkippedSample("image_missing")
        return decode_image(value, self.image_size, self.crop_scale)

    def captions(self, row: dict[str, Any]) -> list[str]:
        value = _first_field(row, self.caption_key.split(",") if self.caption_key else CAPTION_KEYS)
        if value is None:
            raise SkippedSample("caption_missing")
        texts = value if isinstance(value, (list, tuple)) else [value]
        captions = [caption for caption in map(_decode_text, texts) if caption]
        if not captions:
            raise SkippedSample("caption_empty")
        return captions


def decode_image(content: bytes, image_size: int = 0, crop_scale: float = 0.0) -> Image.Image:
    """Decode a picture to RGB, upright by its EXIF tag. Raises SkippedSample for what is no picture or far too large.

    Args:
        image_size, crop_scale: as in [`PairDecoder`].
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow warns of is either handled here or harmless
            picture = Image.open(io.BytesIO(content))
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise SkippedSample("image_too_large")
            if crop_scale:
                picture.draft(None, draft_size(*picture.size, image_size, crop_scale))  # formats other than JPEG ignore it
            ImageOps.exif_transpose(picture, in_place=True)
            return picture if picture.mode == "RGB" else picture.convert("RGB")
    except (Image.DecompressionBombError, MemoryError):
        raise SkippedSample("image_too_large") from None
    except (OSError, ValueError, SyntaxError, EOFError):  # Pillow's decoders raise all of these on damaged files
        raise SkippedSample("image_undecodable") from None


def draft_size(width: int, height: int, image_size: int, crop_scale: float) -> tuple[int, int]:
    """The smallest size at which a JPEG can be decoded such that no crop of [`train_transform`] has to be enlarged.

    A crop has at least `crop_scale` of the area, at an aspect of at most 4 / 3, so its shorter side is at least
    sqrt(crop_scale * area * 3 / 4); of a long picture it can be the picture's shorter side.
    """
    for scale in (8, 4, 2):
        small = width // scale, height // scale
        if min(small) >= image_size and crop_scale * math.prod(small) * 3 / 4 >= image_size**2:
            return small
    return width, height


def _first_field(row: dict[str, Any], keys: Iterable[str]) -> Any:
    for key in keys:
        field, _, inner = key.partition(".")
        value = row.get(key)
        if value is None and inner and row.get(field) is not None:
            value = _json_field(row[field], inner)
        if value is not None:
            return value
    return None


def _json_field(value: bytes | str | dict[str, Any], key: str) -> Any:
    try:
        content = value if isinstance(value, dict) else json.loads(value)
    except ValueError:
        raise SkippedSample("json_undecodable") from None
    return content.get(key) if isinstance(content, dict) else None


def _decode_text(value: Any) -> str:
    try:
        return (value.decode("utf-8-sig") if isinstance(value, bytes) else str(value)).strip()
    except UnicodeDecodeError:
        raise SkippedSample("caption_not_utf8") from None


def _read_file(path: str | None) -> bytes | None:
    if path is None:
        return None
    with datasets.download.streaming_download_manager.xopen(path, "rb") as file:
        return file.read()


def train_transform(image_size: int, crop_scale: float, flip: float) -> Callable[[Image.Image], torch.Tensor]:
    """Random resized crop and flip, to a uint8 tensor (3, image_size, image_size)."""
    crop = v2.RandomResizedCrop(image_size, scale=(crop_scale, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip(flip), v2.PILToTensor()])


def sample_key(row: dict[str, Any]) -> str:
    """The key of a row; for rows of Hub data sets, which may have none, a checksum of their content."""
    return str(row["__key__"]) if row.get("__key__") else f"{zlib.crc32(repr(row).encode()):08x}"


def pad_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: list[list[int]], max_length: int) -> torch.LongTensor:
    """Token ids (B, S), S the longest caption rounded up to a multiple of 8, at most `max_length`.

    That is exact: the text tower is causal and pools at the end token, so it never reads what follows.
    """
    length = min(max_length, -(-max(map(len, token_ids)) // 8) * 8)
    return tokenizer.pad({"input_ids": token_ids}, padding="max_length", max_length=length, return_tensors="pt")["input_ids"]


Position = tuple[int, int]  # an epoch, and how many of its rows a worker has read


class PairBatches(torch.utils.data.IterableDataset):
    """Endless training batches of the shards that fall to this process and worker.

    A batch is `{"pixel_values": uint8 (B, 3, H, W), "input_ids": (B, S), "keys": list, "skipped": Counter, "worker": int,
    "start": Position, "end": Position}`; `skipped` counts, by cause, the samples passed over since this worker's last batch;
    the positions say where this worker was before and after the batch. An epoch is one pass over all samples. Where no more
    batch can come, the last one is `{"stopped": reason}`.

    Args:
        open_epoch: the stream of an epoch, by its number. (`IterableDataset.set_epoch` will not do: it sets the epoch of all
            workers of a process, which need not be in the same one.)
        text_mask: also cuts captions that are longer than the context.
        max_skipped_share: of a worker's last 1,000 samples, how many may give no pair.
        positions: where each worker begins, by its number; those left out begin at the beginning. What lies before is read
            again, which keeps the shuffle buffer's contents exact, but not decoded.
    """

    def __init__(
        self, open_epoch, decoder, transform, tokenizer, text_mask, batch_size, seed, max_skipped_share=0.5, positions=None
    ):
        self.open_epoch, self.decoder, self.transform = open_epoch, decoder, transform
        self.tokenizer, self.text_mask = tokenizer, text_mask
        self.batch_size, self.seed, self.max_skipped_share = batch_size, seed, max_skipped_share
        self.positions: dict[int, Position] = positions or {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        start = self.positions.get(worker, (0, 0))
        pairs: list[tuple[torch.Tensor, list[int], str]] = []
        skipped: Counter[str] = Counter()
        try:
            for sample, position in self.samples(start):
                if isinstance(sample, SkippedSample):
                    skipped[str(sample)] += 1
                    continue
                pairs.append(sample)
                if len(pairs) == self.batch_size:
                    yield self._collate(pairs, skipped) | {"worker": worker, "start": start, "end": position}
                    pairs, skipped, start = [], Counter(), position
        except TrainingStopped as stopped:  # raised here, it would reach the training process as a traceback
            yield {"stopped": str(stopped)}

    def samples(self, start: Position) -> Iterator[tuple[tuple[torch.Tensor, list[int], str] | SkippedSample, Position]]:
        """Pixels, token ids and key of each sample, epoch after epoch, or the SkippedSample in place of one that gives no pair;
        and the position after it.

        Raises:
            TrainingStopped: too many samples give no pair.
        """
        monitor = SkipMonitor(self.max_skipped_share)
        epoch, first_row = start
        while True:
            num_rows = first_row
            for num_rows, row in enumerate(islice(self.open_epoch(epoch), first_row, None), start=first_row + 1):
                try:
                    sample = self._decode(row, epoch)
                    monitor.count_used()
                except SkippedSample as skipped:
                    sample = skipped
                    monitor.count_skipped(str(skipped), sample_key(row), str(row.get("__url__", "the stream")))
                yield sample, (epoch, num_rows)
            if num_rows == 0:
                monitor.count_skipped("epoch_empty", "", "the stream")
            epoch, first_row = epoch + 1, 0

    def _decode(self, row: dict[str, Any], epoch: int) -> tuple[torch.Tensor, list[int], str]:
        key = sample_key(row)
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(key.encode())])
        picture, caption = self.decoder(row, rng)
        token_ids = self.text_mask(self.tokenizer(caption, verbose=False)["input_ids"], rng)
        # The transforms draw from PyTorch's global generator; seeded by the sample they do not depend on order or worker.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            return self.transform(picture), token_ids, key

    def _collate(self, pairs: list[tuple[torch.Tensor, list[int], str]], skipped: Counter[str]) -> dict[str, Any]:
        pixels, token_ids, keys = zip(*pairs, strict=True)
        input_ids = pad_tokens(self.tokenizer, list(token_ids), self.text_mask.num_tokens)
        return {"pixel_values": torch.stack(pixels), "input_ids": input_ids, "keys": list(keys), "skipped": skipped}


def shard_stream(
    stream: datasets.IterableDataset,
    epoch: int = 0,
    *,
    process: int,
    num_processes: int,
    num_workers: int,
    seed: int,
    buffer_size: int,
    resampled: bool = False,
) -> datasets.IterableDataset:
    """Shuffle a stream by shard and by a buffer, as fits an epoch, and give this process its shards; the DataLoader splits them
    over workers.

    Each shard goes to one process, so that none reads what another uses, and every sample is seen once an epoch. Where shards
    do not divide, some processes have one more; the order, and so the split, differs from epoch to epoch.

    Args:
        resampled: give each process all shards instead, in an order of its own.

    Raises:
        ConfigError: fewer shards than processes x workers, or than workers where resampled.
    """
    order = [seed, epoch, process] if resampled else [seed, epoch]  # the same on all processes that share the shards
    num_processes = 1 if resampled else num_processes
    workers, shards = max(1, num_workers), stream.num_shards
    if shards < num_processes * workers:
        raise ConfigError(
            f"train_data has {shards} shards for {num_processes} processes x {workers} workers: "
            f"use --num_workers {shards // num_processes} or split the data into at least {num_processes * workers} shards"
            if shards >= num_processes
            else f"train_data has {shards} shards for {num_processes} processes: split the data into more shards"
        )
    stream = stream.shuffle(seed=int(np.random.default_rng(order).integers(2**31)), buffer_size=max(1, buffer_size))
    return stream if resampled else split_dataset_by_node(stream, rank=process, world_size=num_processes, strategy="shards")


def first_pair(stream: datasets.IterableDataset, decoder: PairDecoder, source: str) -> None:
    """Read up to the first usable pair, so that wrong keys are found before anything expensive starts.

    Raises:
        ConfigError: none in the first samples; the message has the causes and the fields that the last sample has.
    """
    causes: Counter[str] = Counter()
    fields: list[str] = []
    for row in stream.take(PATIENCE):
        try:
            decoder(row, np.random.default_rng(0))
            return
        except SkippedSample as skipped:
            causes[str(skipped)] += 1
            fields = [key for key in row if not key.startswith("__")] or fields
    found = ", ".join(f"{cause} {count}" for cause, count in causes.items()) or "it is empty"
    raise ConfigError(
        f"{source!r}: no usable image-text pair in the first {sum(causes.values())} samples ({found}); "
        f"the samples have the fields {', '.join(fields) or 'none'}: name them by --image_key and --caption_key"
    )


def sample_images(stream: datasets.IterableDataset, decoder: PairDecoder, count: int) -> list[Image.Image]:
    """The first `count` pictures of a stream that can be decoded."""
    images: list[Image.Image] = []
    for row in stream:
        try:
            images.append(decoder(row, np.random.default_rng(0))[0])
        except SkippedSample:
            continue
        if len(images) == count:
            break
    return images


def captions_of(stream: datasets.IterableDataset, decoder: PairDecoder, limit: int) -> Iterator[str]:
    """The captions of the first `limit` samples, pictures untouched."""
    rng = np.random.default_rng(0)
    for row in stream.take(limit):
        if "scene" in row:
            yield caption_scene(row["scene"], rng)
        elif "__error__" not in row:
            try:
                yield from decoder.captions(row)
            except SkippedSample:
                continue


def build_loader(batches: PairBatches, num_workers: int) -> DataLoader:
    """The loader of ready batches. It is not for `accelerator.prepare`, which would split the stream a second time."""
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        # The default collate function would rebuild each batch, and so double the counts of a Counter.
        collate_fn=_unchanged,
        worker_init_fn=_obey_only_the_training_process,
    )


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


def start_workers(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The batches of a loader, from workers that a SIGTERM to all processes of a job does not end: training needs them until it
    has saved."""
    if sys.platform != "linux":
        return iter(loader)
    # Some libraries start threads in a forked process at once, which have to inherit the mask.
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _obey_only_the_training_process(worker: int) -> None:
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_the_training_process_says_so, daemon=True).start()


def _exit_when_the_training_process_says_so() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
