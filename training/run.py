"""What a run works with, and how it is put together: data, model, loader, optimizer, in that order.

Shapes: B pairs of this process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import IterableDataset
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize
from transformers import CLIPProcessor

from hf_maskclip import MaskCLIPConfig, MaskCLIPModel
from training.checkpoint import Progress, checkpoint_step, latest_checkpoint, save_checkpoint
from training.config import TrainingConfig
from training.cpus import use_share_of_cpus
from training.data import (
    PairBatches,
    PairDecoder,
    Position,
    build_loader,
    captions_of,
    first_pair,
    shard_stream,
    train_transform,
)
from training.errors import fail
from training.evaluation_data import evaluations_of_spec
from training.evaluation_sets import Evaluation
from training.evaluation_suites import scene_evaluations
from training.masking import PatchSelector
from training.model import CONTEXT_LENGTH, build_model, build_processor, check_names, load_tokenizer
from training.optimization import build_average, build_optimizer, build_schedule, clamp_logit_scale
from training.sharding import ShardedState, check_shardable, shard, take_over_sharding, whole_model
from training.sources import open_stream
from training.text_masking import TextMask
from training.tokenizer import train_tokenizer
from training.tracking import check_tracker
from training.zero import ZeroEngine, check_same_kind, take_over_deepspeed

TOKENIZER_CAPTIONS = 20_000  # captions that a tokenizer is trained on


@dataclass
class Run:
    """What a run works with, on this process."""

    config: TrainingConfig
    accelerator: Accelerator
    num_steps: int
    checkpoint: Path | None  # that the run goes on from
    steps_done: int  # before it
    stream: IterableDataset
    decoder: PairDecoder
    processor: CLIPProcessor
    evaluations: list[Evaluation]
    progress: Progress
    loader: DataLoader
    num_batches_used: int  # of the loader, before the checkpoint
    model: MaskCLIPModel
    is_sharded: bool  # over the processes
    trained_model: torch.nn.Module  # the same, in the wrapper that makes the gradients of all processes one
    average: AveragedModel | None
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    patches: PatchSelector

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def samples_per_step(self) -> int:
        return self.config.batch_size * self.accelerator.num_processes

    def result(self) -> MaskCLIPModel:
        """The model that is evaluated and exported. All processes have to call this."""
        if self.is_sharded:
            return whole_model(self.model)
        return self.average.module if self.average else self.model

    def to_model(self, pixels: torch.Tensor) -> torch.Tensor:
        """Bytes (B, C, H, W) as the model takes them, normalised on its device."""
        image_processor = self.processor.image_processor
        pixels = pixels.to(self.accelerator.device).float() / 255
        return normalize(pixels, image_processor.image_mean, image_processor.image_std)

    def update_weights(self) -> None:
        """Clip the gradients, change the weights by them, and forget them."""
        if isinstance(self.trained_model, ZeroEngine):
            self.trained_model.step()
        else:
            if self.config.max_grad_norm:
                self.accelerator.clip_grad_norm_(self.trained_model.parameters(), self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            clamp_logit_scale(self.model)
        self.schedule.step()
        if self.average:
            self.average.update_parameters(self.model)

    def save(self, step: int) -> Path:
        keep = self.config.keep_checkpoints
        model = self.result() if self.is_sharded else self.model
        return save_checkpoint(self.accelerator, model, self.processor, self.progress, self.output_dir, step, keep)


def prepare(config: TrainingConfig) -> Run:
    """Everything that a run needs, in order: data, model, loader, optimizer. Nothing is written yet.

    Raises:
        ConfigError: an option or the data it names cannot be used.
    """
    check_names(config.model, config.tokenizer)
    check_tracker(config.report_to)
    is_sharded, uses_deepspeed = take_over_sharding(), take_over_deepspeed()
    if is_sharded:
        check_shardable(config)
    accelerator = start_accelerator(config)
    num_steps, warmup_steps = config.schedule(accelerator.num_processes)
    checkpoint = latest_checkpoint(Path(config.output_dir)) if config.resume == "auto" else None
    if checkpoint:
        check_same_kind(checkpoint, uses_deepspeed)

    decoder = PairDecoder(config.image_key, config.caption_key)
    stream = open_stream(config.train_data, seed=config.seed)
    first_pair(stream, decoder, config.train_data)
    open_epoch = epoch_opener(stream, config, accelerator)

    captions = captions_of(stream, decoder, TOKENIZER_CAPTIONS)
    model, processor = load_model(config, checkpoint, captions)
    decoder.image_size = model.config.vision_config.image_size
    evaluations = find_evaluations(config.eval_data, decoder)

    progress = Progress(accelerator, config.num_workers, exact=config.stream == "exact")
    positions, num_batches_used = progress.load(checkpoint) if checkpoint else ({}, 0)
    loader = training_loader(open_epoch, config, decoder, processor, model.config, positions)

    average = build_average(model, config.ema_momentum)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.compile:
        for tower in (model.vision_model, model.text_model):
            tower.encoder.compile()  # in place: the keys of the weights stay
    trained_model, optimizer = distribute(model, config, accelerator, is_sharded, uses_deepspeed)
    patches = PatchSelector(model.vision_model, config, num_steps, accelerator)
    if average:
        accelerator.register_for_checkpointing(average.to(accelerator.device))
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    steps_done = checkpoint_step(checkpoint) if checkpoint else 0
    # Not prepared: Accelerate would step it once for every process.
    schedule = build_schedule(optimizer, config, num_steps, warmup_steps, steps_done)
    return Run(
        config=config,
        accelerator=accelerator,
        num_steps=num_steps,
        checkpoint=checkpoint,
        steps_done=steps_done,
        stream=stream,
        decoder=decoder,
        processor=processor,
        evaluations=evaluations,
        progress=progress,
        loader=loader,
        num_batches_used=num_batches_used,
        model=model,
        is_sharded=is_sharded,
        trained_model=trained_model,
        average=average,
        optimizer=optimizer,
        schedule=schedule,
        patches=patches,
    )


def distribute(
    model: MaskCLIPModel, config: TrainingConfig, accelerator: Accelerator, is_sharded: bool, uses_deepspeed: bool
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model in its wrapper on this process's device, and the optimizer of its weights."""
    if (uses_deepspeed or is_sharded) and accelerator.mixed_precision == "bf16":  # as Accelerate does where it wraps a model
        model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    if uses_deepspeed:
        optimizer = build_optimizer(model, config)
        return ZeroEngine(model, optimizer, accelerator, config), optimizer
    if is_sharded:
        trained_model, optimizer = shard(model, accelerator), build_optimizer(model, config)
        accelerator.register_for_checkpointing(ShardedState(model, optimizer))
        return trained_model, optimizer
    trained_model = accelerator.prepare(model)
    return trained_model, accelerator.prepare(build_optimizer(model, config))


def find_evaluations(eval_data: str, decoder: PairDecoder) -> list[Evaluation]:
    if eval_data == "scenes":
        return scene_evaluations(decoder.image_size)
    return evaluations_of_spec(eval_data, decoder) if eval_data else []


def start_accelerator(config: TrainingConfig) -> Accelerator:
    accelerator = Accelerator(
        # Else several processes without a GPU would not find each other, and train each for itself.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
    )
    if accelerator.device.type == "cpu":
        use_share_of_cpus()
    set_seed(config.seed)
    return accelerator


def epoch_opener(stream: IterableDataset, config: TrainingConfig, accelerator: Accelerator) -> Callable[[int], IterableDataset]:
    """A function that gives this process its part of the stream in an epoch.

    Raises:
        ConfigError: too few shards.
    """
    open_epoch = partial(
        shard_stream,
        stream,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=config.num_workers,
        seed=config.seed,
        buffer_size=0 if config.train_data == "scenes" else config.shuffle_buffer,  # scenes are independent of each other
        resampled=config.stream == "resampled",
    )
    open_epoch(0)  # so that it raises now, not in a worker
    return open_epoch


def load_model(config: TrainingConfig, checkpoint: Path | None, captions: Iterator[str]) -> tuple[MaskCLIPModel, CLIPProcessor]:
    """The model and its processor, of the checkpoint or as the options say; a missing tokenizer is trained on the captions."""
    source = str(checkpoint) if checkpoint else config.model
    tokenizer = load_tokenizer("" if checkpoint else config.tokenizer, source)
    if tokenizer is None:
        tokenizer = train_tokenizer(captions, config.vocab_size, CONTEXT_LENGTH)
    model = build_model(source, config.patch_mask, tokenizer)
    return model, build_processor(source, model, tokenizer)


def training_loader(
    open_epoch: Callable[[int], IterableDataset],
    config: TrainingConfig,
    decoder: PairDecoder,
    processor: CLIPProcessor,
    model_config: MaskCLIPConfig,
    positions: dict[int, Position],
) -> DataLoader:
    context_length = model_config.text_config.max_position_embeddings
    if config.text_tokens > context_length:
        fail(f"text_tokens={config.text_tokens}: the context of model={config.model!r} has {context_length}")
    flip = 0.0 if config.train_data == "scenes" else config.flip
    batches = PairBatches(
        open_epoch,
        replace(decoder, crop_scale=config.crop_scale),
        train_transform(decoder.image_size, config.crop_scale, flip),
        processor.tokenizer,
        TextMask(config.text_mask, config.text_tokens or context_length),
        config.batch_size,
        config.seed,
        config.max_skipped_share,
        positions,
    )
    return build_loader(batches, config.num_workers)
