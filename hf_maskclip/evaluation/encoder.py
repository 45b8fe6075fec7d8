"""A dual encoder as evaluations see it: image and text features, computed once, shared over processes, and what they depend on.

Shapes: B pictures of a batch, N pictures, E projection size.
"""

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ..distributed import gather_pieces, is_mine, usable_cpus
from ..dual_encoders import image_size_of
from ..errors import fail
from ..models.masked_models import PatchMaskedDualEncoder
from ..models.patch_masking import whole_patch_grid
from ..models.towers import find_family, known_families
from ..texts import check_ends_of_texts, encode_texts, family_of, text_settings, warn_of_kept_capitals
from .pixels import Picture, inputs_of, load_picture, name_of, picture_hash

TEXTS_PER_BATCH = 256
PACKAGES = ("hf_maskclip", "transformers", "torch", "torchvision", "pillow")


@dataclass
class ImageSet:
    """Pictures, each with what is known of it (a label, captions, ...).

    Args:
        samples: (picture, target) pairs, the same ones in the same order each time and on every process. A picture may be its
            path; or a function that returns it, which is then called for the pictures of this process only, in a thread. The
            function returns None for a picture that cannot be decoded, which is left out.
        fingerprint: changes whenever the pictures or targets change; features are kept under it. `""`: they are not kept.
        check: looks at the targets before anything is encoded, and raises ConfigError for a wrong one.
    """

    samples: Iterable[tuple[Picture, Any]]
    fingerprint: str = ""
    check: Callable[[], None] = lambda: None


@dataclass
class ImageFeatures:
    """Unit-length features (N, E), float32 on the CPU, the N targets, how many pictures could not be decoded, and the N hashes
    of the pictures' pixels and N names."""

    features: torch.Tensor
    targets: list[Any]
    num_undecodable: int = 0
    hashes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


@dataclass
class Work:
    """The pictures that were read and encoded by all processes, the seconds that it took, and of each picture the share of its
    patches that was encoded, summed over the pictures."""

    pictures: int = 0
    seconds: float = 0.0
    kept_shares: float = 0.0


@dataclass
class Encoder:
    """Encodes pictures and texts by a model in evaluation mode, in the model's own precision.

    What is encoded is kept: pictures with a fingerprint under the mask of the moment, which may change, and texts.

    Args:
        model: a dual encoder of any family in `FAMILIES`; where `apply_patch_mask` is set a [`MaskCLIPModel`], or one that
            [`add_patch_mask`] has given a mask.
        processor: its processor, with open_clip's centre crop ([`inputs_of`]). Transformers' own is one pixel off where an odd
            number of pixels is cut. Texts are padded as the family's are.
        batch_size: pictures a forward pass, by default 16 on a CPU, whose cache more would leave, and else 128. Batches are the
            same ones on any number of processes.
        apply_patch_mask: encode visible patches only; a picture always gets the same ones.
        cache_dir: folder in which image features stay, under a hash of pictures, weights, image processor, precision and mask.
        show_progress: a progress bar, in pictures, on the main process.
        limit: encode the first pictures of each set only, as a trial. Records say so.

    Example:

        encoder = Encoder(CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder))
        images = ImageSet([(picture, label) for picture, label in samples])
        evaluate_zero_shot(encoder, images, class_names=["cat", "dog"], templates=["a photo of a {c}"])["top1"]
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    batch_size: int | None = None
    apply_patch_mask: bool = False
    cache_dir: Path | None = None
    show_progress: bool = False
    limit: int | None = None
    work: Work = field(default_factory=Work, init=False, repr=False)
    # Of each fingerprint the mask and the features under it: one mask's, so that a curve of masks takes no more memory.
    _known: dict[str, tuple[dict[str, Any] | None, ImageFeatures]] = field(default_factory=dict, init=False, repr=False)
    _known_texts: dict[tuple[str, ...], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        self.batch_size = self.batch_size or (16 if self.model.device.type == "cpu" else 128)
        check_is_dual_encoder(self.model)
        check_ends_of_texts(self.model.config, self.processor.tokenizer)
        warn_of_kept_capitals(self.processor.tokenizer)
        if self.apply_patch_mask:
            check_has_mask(self.model)

    @cached_property
    def model_hash(self) -> str:
        """Of the weights: 16 hexadecimal digits."""
        return hash_of_weights(self.model.state_dict())

    @property
    def image_size(self) -> int:
        """As [`image_size_of`]."""
        return image_size_of(self.model.config.vision_config, self.processor.image_processor)

    @property
    def patch_mask(self) -> dict[str, Any] | None:
        """The mask that pictures are encoded under, with all its options; None: they are encoded whole."""
        vision_config: Any = self.model.config.vision_config
        return dict(vision_config.patch_mask) if self.apply_patch_mask else None

    def describe(self) -> dict[str, Any]:
        """What results depend on besides the data, for the record."""
        image_processor = self.processor.image_processor
        settings = image_processor.to_dict()
        return {
            "model_hash": self.model_hash,
            "model_family": family_of(self.model.config).title,
            "precision": str(self.model.dtype).removeprefix("torch."),
            "batch_size": self.batch_size,
            "image_backend": image_processor.backend,
            "resize": settings.get("size") if image_processor.do_resize else None,
            "max_num_patches": settings.get("max_num_patches"),  # of NaFlex, which keeps aspect ratios
            "crop": settings["crop_size"] if image_processor.do_center_crop else None,
            "crop_rounding": "half to even" if image_processor.do_center_crop else None,
            "patch_mask": self.patch_mask,
            "texts": text_settings(self.model.config, self.processor.tokenizer),
            "limit": self.limit,
            "versions": {name: version(name) for name in PACKAGES},
        }

    def encode_images(self, images: ImageSet) -> ImageFeatures:
        """Features of all pictures, in order, on every process; each process encodes its share of the batches.

        Raises:
            ConfigError: there is no picture.
        """
        mask, known = self._known.get(images.fingerprint, (None, None))
        if known and mask == self.patch_mask:
            return known
        file = self._cache_file(images)
        if file and file.is_file():
            found = _load_features(file)
        else:
            samples = islice(images.samples, self.limit)  # scenes are drawn here, which is no part of the time
            found = self._compute_image_features(samples)
            if file and PartialState().is_main_process:
                _save_features(found, file)
        if images.fingerprint:
            self._known[images.fingerprint] = (self.patch_mask, found)
        return found

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit-length features of texts, float32 (N, E) on the CPU; texts over the context length are cut."""
        if (key := tuple(texts)) not in self._known_texts:
            batches = enumerate(_batches(texts, TEXTS_PER_BATCH))
            with _evaluation_mode(self.model):
                shares = [(number, self._encode_text_batch(batch)) for number, batch in batches if is_mine(number)]
            self._known_texts[key] = torch.cat([features for _, features in gather_pieces(shares)])
        return self._known_texts[key]

    def _compute_image_features(self, samples: Iterable[tuple[Picture, Any]]) -> ImageFeatures:
        state, start = PartialState(), time.perf_counter()
        assert self.batch_size is not None  # since __post_init__
        batches = (batch for batch in enumerate(_batches(samples, self.batch_size)) if is_mine(batch[0]))
        shares: list[tuple[Any, ...]] = []
        bar = tqdm(unit="picture", disable=not (self.show_progress and state.is_main_process))
        with _evaluation_mode(self.model), bar:
            for number, inputs, targets, num_undecodable, hashes, names in _in_threads(self._load_batch, batches):
                features, kept = self._encode_pictures(inputs) if targets else (torch.empty(0), 0.0)
                shares.append((number, features, targets, num_undecodable, hashes, names, kept))
                bar.update((len(targets) + num_undecodable) * state.num_processes)
        shares = gather_pieces(shares)
        targets, hashes, names = ([item for share in shares for item in share[part]] for part in (2, 4, 5))
        num_undecodable = sum(share[3] for share in shares)
        before, seconds, kept = self.work, time.perf_counter() - start, sum(share[6] for share in shares)
        self.work = Work(before.pictures + len(targets), before.seconds + seconds, before.kept_shares + kept)
        if num_undecodable > len(targets):
            fail(
                f"{num_undecodable} of {num_undecodable + len(targets)} pictures of the evaluation data cannot be read: "
                "a result on less than half of them would say little"
            )
        if not targets:
            fail("no picture to evaluate on: the evaluation data is empty")
        features = torch.cat([share[1] for share in shares if share[2]])
        return ImageFeatures(features, targets, num_undecodable, hashes, names)

    def _load_batch(
        self, batch: tuple[int, list[tuple[Picture, Any]]]
    ) -> tuple[int, dict[str, torch.Tensor], list[Any], int, list[str], list[str]]:
        """The number of a batch, and of its readable pictures what the model takes, targets, hashes and names."""
        number, samples = batch
        assert self.batch_size is not None  # since __post_init__
        first = number * self.batch_size
        numbered = enumerate(samples, first)
        loaded = [(load_picture(picture), target, name_of(picture) or str(n)) for n, (picture, target) in numbered]
        usable = [(picture, target, name) for picture, target, name in loaded if picture is not None]
        pictures = [picture for picture, _, _ in usable]
        inputs = inputs_of(self.processor.image_processor, pictures) if usable else {}
        hashes = [picture_hash(picture) for picture in pictures]
        targets, names = [target for _, target, _ in usable], [name for _, _, name in usable]
        return number, inputs, targets, len(loaded) - len(usable), hashes, names

    def _encode_pictures(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Images, as [`inputs_of`] gives them, to features (B, E), and the sum over them of the share of patches encoded."""
        model: Any = self.model  # each family has its methods, their common base class has not
        device, dtype = model.device, model.dtype
        inputs = {name: values.to(device, dtype if values.is_floating_point() else None) for name, values in inputs.items()}
        masking = {"apply_patch_mask": True} if self.apply_patch_mask else {}
        encoded = model.get_image_features(**inputs, **masking)
        features = F.normalize(encoded.pooler_output.float(), dim=-1).cpu()
        if not self.apply_patch_mask:
            return features, float(len(features))
        return features, (encoded.patch_selection.valid().sum(dim=1) / self._num_patches(inputs)).sum().item()

    def _num_patches(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | int:
        """The patches of images: of each (B,) where they have grids of their own, else of all alike."""
        if "spatial_shapes" in inputs:
            return inputs["spatial_shapes"].prod(dim=1)
        vision_config: Any = self.model.config.vision_config
        return math.prod(whole_patch_grid(inputs["pixel_values"], vision_config.patch_size))

    def _encode_text_batch(self, texts: list[str]) -> torch.Tensor:
        model: Any = self.model
        tokens = encode_texts(model.config, self.processor.tokenizer, texts)
        encoded = model.get_text_features(**{name: values.to(model.device) for name, values in tokens.items()})
        return F.normalize(encoded.pooler_output.float(), dim=-1).cpu()

    def _cache_file(self, images: ImageSet) -> Path | None:
        if self.cache_dir is None or not images.fingerprint:
            return None
        key = self.describe() | {"images": images.fingerprint, "processor": self.processor.image_processor.to_dict()}
        if self.apply_patch_mask:
            key["draws"] = "by picture"  # features of before this rule had the patches of their batch
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
        return Path(self.cache_dir) / f"{digest}.safetensors"


def check_is_dual_encoder(model: PreTrainedModel) -> None:
    """Raise a ConfigError for a model of no known family, or one without texts, such as a classifier."""
    family, classes = find_family(type(model.config).model_type), [base.__name__ for base in type(model).__mro__]
    # What is no model of Transformers wraps one, as PEFT does.
    if family is None or (isinstance(model, PreTrainedModel) and f"{family.prefix}Model" not in classes):
        fail(f"a {classes[0]} is no image and text encoder of a known family; known are {known_families()}")


def check_has_mask(model: PreTrainedModel) -> None:
    """Raise a ConfigError for a model that cannot leave out patches, or that has no mask to choose them."""
    name = type(model).__name__
    if not isinstance(model, PatchMaskedDualEncoder):
        fail(f"apply_patch_mask: a {name} has no patch mask; load it as a MaskCLIPModel, or add_patch_mask gives it one")
    if model.patch_mask.needs_patch_scores:
        vision_config: Any = model.config.vision_config
        mask = vision_config.patch_mask["name"]
        fail(f"apply_patch_mask: the patch mask {mask!r} goes by a teacher's attention, which an evaluation has not")
    if model.patch_mask.keeps_all:
        fail(f"apply_patch_mask: the patch mask of this {name} keeps every patch; give it one by set_patch_mask")


def hash_of_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that tell weights apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch a model to evaluation mode, without gradients, and back to the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` in threads, a few items ahead: Pillow decodes and resizes without the interpreter's lock."""
    num_threads = min(4, usable_cpus())
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * num_threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _save_features(found: ImageFeatures, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    about = {"targets": json.dumps(found.targets), "num_undecodable": str(found.num_undecodable)}
    about |= {"hashes": json.dumps(found.hashes), "names": json.dumps(found.names)}
    save_file({"features": found.features}, unfinished, metadata=about)
    unfinished.replace(file)


def _load_features(file: Path) -> ImageFeatures:
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
        targets, hashes, names = (json.loads(about[name]) for name in ("targets", "hashes", "names"))
        return ImageFeatures(stored.get_tensor("features"), targets, int(about["num_undecodable"]), hashes, names)
