"""What a run works with, and how it is put together: data, model, loader, optimizer, in that order.

Shapes: B pairs of this process.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, compare_versions, set_seed
from torch.optim.lr_scheduler import LambdaLR
from torchvision.transforms.v2.functional import normalize
from transformers import PreTrainedModel, ProcessorMixin

from hf_maskclip.averaging import MovingAverage
from hf_maskclip.distributed import use_share_of_cpus
from hf_maskclip.errors import as_config_error
from hf_maskclip.phases import Phase, Timeline
from training.config import TrainingConfig
from training.data.batches import Batch
from training.data.mix import Mix
from training.data.naflex import normalize_grids
from training.data.position import step_of
from training.data.prepare import RunData, counts_words, epoch_openers, prepare_data, with_usable_workers, word_counts_of_run
from training.model.compilation import compile_encoders
from training.model.fit import check_tokenizer, check_tokens
from training.model.loss import PairLoss, prepare_loss
from training.model.optimization import build_average, build_schedule
from training.model.precision import fastest_precision
from training.model.presets import (
    CONTEXT_LENGTH,
    PRESETS,
    SIGLIP_CONTEXT_LENGTH,
    SIGLIPS,
    build_model,
    build_processor,
    check_names,
    load_tokenizer,
)
from training.model.small_pictures import resize_positions_smoothly
from training.model.tokenizer import train_tokenizer
from training.model.tuning import Tuning, check_tuning, prepare_tuning
from training.parallel.choose import check_checkpoint, requested_parallel
from training.parallel.interface import Parallel
from training.patch_selection import PatchSelector
from training.saving.checkpoint import check_all_see, latest_checkpoint, save_checkpoint
from training.saving.folder import FolderLock, check_output_dir
from training.saving.record import (
    check_budget,
    check_data,
    check_options,
    data_identity,
    read_record,
    write_record,
)
from training.stopping import PATIENCE_WITH_PROCESSES
from training.tracking import check_tracker

TOKENIZER_CAPTIONS = 20_000  # samples whose captions a tokenizer is trained on, and words are counted in
CAPTIONS_COMPARED = 1_000


@dataclass
class Learner:
    """The model of a run and what changes it, on this process."""

    model: PreTrainedModel
    processor: ProcessorMixin
    parallel: Parallel
    average: MovingAverage | None
    schedule: LambdaLR
    patches: PatchSelector
    loss: PairLoss
    tuning: Tuning

    @property
    def tuned(self) -> PreTrainedModel:
        """The model that the result is made of."""
        return self.average.module if self.average else self.model

    def result(self) -> PreTrainedModel:
        """The model that is evaluated and exported. All processes have to call this."""
        return self.tuning.result(self.parallel.whole_model(self.tuned))

    def train_mode(self) -> None:
        """Let all modules be in training mode but those that are frozen."""
        self.parallel.wrapped_model.train()
        for module in self.tuning.frozen:
            module.eval()

    def update(self) -> None:
        """Change the weights by their gradients, and what follows from them."""
        self.parallel.step()
        self.schedule.step()
        if self.average:
            self.average.update_parameters(self.model)


@dataclass
class Run:
    """What a run works with, on this process.

    Attributes:
        timeline: the phases of the run, and its steps in pairs of all processes.
        checkpoint: that the run goes on from, or None.
        data_identity: what tells the training data, wherever it lies.
        lock: of the run's folder, on the main process, from its first file on.
    """

    config: TrainingConfig
    accelerator: Accelerator
    timeline: Timeline
    checkpoint: Path | None
    data_identity: list[dict[str, Any]]
    data: RunData
    learner: Learner
    lock: FolderLock | None = None

    @property
    def num_steps(self) -> int:
        return self.timeline.num_steps

    @property
    def steps_done(self) -> int:
        """The steps before the checkpoint."""
        return self.timeline.steps_done

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def samples_per_step(self) -> int:
        return self.timeline.samples_per_step

    def samples_seen(self, step: int) -> int:
        """The pairs of all processes that the run has seen after a step, its checkpoint's included."""
        return self.timeline.samples_seen(step)

    @property
    def eval_data(self) -> str:
        return self.config.eval_data or self.data.mix.eval_data

    def to_model(self, batch: Batch, rows: slice) -> dict[str, torch.Tensor]:
        """The pictures of some rows of a batch as the vision tower takes them, normalised on its device."""
        device, processor = self.accelerator.device, self.learner.processor.image_processor
        # Bytes are sent, and nothing waits until they are there.
        pixels = batch.pixel_values[rows].to(device, non_blocking=True)
        numbers = (processor.image_mean, processor.image_std)
        if batch.spatial_shapes is not None:
            return normalize_grids(pixels, batch.spatial_shapes[rows].to(device, non_blocking=True), *numbers)
        mean, std = (torch.tensor(values).to(device, non_blocking=True) for values in numbers)  # (3,)
        return {"pixel_values": normalize(pixels.contiguous().float() / 255, mean, std)}

    def size_options(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments for pictures that are smaller than its own."""
        if batch.image_size is None or batch.image_size == self.learner.model.config.vision_config.image_size:
            return {}
        return {"interpolate_pos_encoding": True}

    def save(self, step: int) -> Path:
        """Write a checkpoint after a step. All processes have to call this."""
        learner, keep = self.learner, self.config.keep_checkpoints
        model = learner.tuning.merged(learner.parallel.whole_model(learner.model))
        about = {"samples_seen": self.samples_seen(step), "first_weights": learner.tuning.first_hash}
        about |= {"word_counts": self.data.word_counts}
        record = partial(write_record, config=self.config, data=self.data_identity, **about)
        return save_checkpoint(self.accelerator, model, learner.processor, self.data.state, self.output_dir, step, keep, record)


def prepare(config: TrainingConfig, parallel: type[Parallel] | None = None, phases: Sequence[Phase] = ()) -> Run:
    """Everything that a run needs, in order: data, model, loader, optimizer. Nothing is written yet.

    Args:
        parallel: how the model is trained; by default as the launch file asks.
        phases: in place of those of the options.

    Raises:
        ConfigError: an option or the data it names cannot be used.
    """
    if int(os.environ.get("RANK", 0)) == 0:  # before the processes know of each other
        check_output_dir(Path(config.output_dir))
    checkpoint = latest_checkpoint(Path(config.output_dir)) if config.resume != "none" else None
    if checkpoint:
        check_options(checkpoint, config)
    else:
        check_names(config.model, config.tokenizer)
    check_tracker(config.report_to)
    check_tuning(config)
    parallel = parallel or requested_parallel()
    accelerator = start_accelerator(config)
    check_all_see(checkpoint, Path(config.output_dir))
    samples_before = read_record(checkpoint)["samples_seen"] if checkpoint else 0
    steps_done, processes = step_of(checkpoint), accelerator.num_processes
    num_steps, warmup_steps = config.schedule(processes, steps_done, samples_before)
    if checkpoint:
        check_checkpoint(checkpoint, parallel)
        check_budget(checkpoint, config, num_steps, samples_before)

    timeline = config.timeline(processes, num_steps, steps_done, samples_before, phases)
    mix = Mix.open(config)
    mix.check(to_the_end=config.max_skipped_share == 1)
    identity = data_identity(mix)
    if checkpoint:
        check_data(checkpoint, config, identity)
    config = with_usable_workers(config, mix, accelerator)
    open_epochs = epoch_openers(mix, config, accelerator)
    model, processor, captions = load_model(config, checkpoint, mix, accelerator)
    word_counts = word_counts_of_run(config, checkpoint, captions)
    data = prepare_data(mix, open_epochs, config, checkpoint, accelerator, model, processor, word_counts, timeline)
    tuning = prepare_tuning(model, config, checkpoint)
    learner = prepare_learner(model, processor, tuning, config, accelerator, parallel, checkpoint, timeline, warmup_steps)
    return Run(config, accelerator, timeline, checkpoint, identity, data, learner)


def start_accelerator(config: TrainingConfig) -> Accelerator:
    """Raises ConfigError for a precision that the device does not have."""
    with as_config_error("mixed_precision", config.mixed_precision):
        accelerator = Accelerator(
            # Else several processes without a GPU would not find each other, and train each for itself.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.output_dir,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE_WITH_PROCESSES)],
        )
    if accelerator.device.type == "cpu":
        use_share_of_cpus()
        if config.mixed_precision == "bf16" and fastest_precision() == "no":
            accelerator.print(
                "mixed_precision='bf16': this CPU is not known to multiply it in hardware; steps can take many times as long "
                "as with 'no'"
            )
    set_seed(config.seed)
    return accelerator


def say_equal_captions(spec: str, captions: list[str]) -> None:
    """Print the share of captions that come more than once, where it is large: the loss takes equal ones for different."""
    counts = Counter(captions)
    share = sum(count for count in counts.values() if count > 1) / max(1, counts.total())
    if share > 0.05:
        print(
            f"train_data={spec!r}: {share:.0%} of the first {counts.total()} captions are there more than once; "
            "in a batch the loss takes equal ones for different"
        )


def load_model(
    config: TrainingConfig, checkpoint: Path | None, mix: Mix, accelerator: Accelerator
) -> tuple[PreTrainedModel, ProcessorMixin, list[str]]:
    """The model and its processor, of the checkpoint or as the options say; a missing tokenizer is trained on the captions.

    The first captions are read here, once for all that looks at them, and returned, too.

    Raises:
        ConfigError: model, tokenizer and image processor do not fit each other.
    """
    name = str(checkpoint) if checkpoint else config.model
    tokenizer = load_tokenizer("" if checkpoint else config.tokenizer, name)
    looks_at_many = tokenizer is None or counts_words(config, checkpoint)
    captions_of = mix.captions(TOKENIZER_CAPTIONS if looks_at_many else CAPTIONS_COMPARED)
    if accelerator.is_main_process:
        for source_name, its_captions in captions_of.items():
            say_equal_captions(source_name, its_captions[:CAPTIONS_COMPARED])
    captions = [caption for its_captions in captions_of.values() for caption in its_captions]
    if tokenizer is None:
        length = SIGLIP_CONTEXT_LENGTH if name in SIGLIPS else CONTEXT_LENGTH
        tokenizer = train_tokenizer(captions, config.vocab_size, length)
    if name in PRESETS and name not in SIGLIPS:  # before a model is made for it
        check_tokens(tokenizer, config.tokenizer or name)
    model = build_model(name, config.patch_mask, tokenizer)
    check_tokenizer(tokenizer, config.tokenizer or name, model.config, name, captions)
    return model, build_processor(name, model, tokenizer), captions


def prepare_learner(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    tuning: Tuning,
    config: TrainingConfig,
    accelerator: Accelerator,
    parallel: type[Parallel],
    checkpoint: Path | None,
    timeline: Timeline,
    warmup_steps: int,
) -> Learner:
    """The model in its wrapper, its optimizer and schedule, as the checkpoint has them if there is one."""
    loss = prepare_loss(config.loss, model, is_fresh=checkpoint is None and config.model in PRESETS)
    average = build_average(model, config.ema_momentum)
    if config.gradient_checkpointing:
        is_new = compare_versions("transformers", ">=", "5.23")
        enable = model.activation_checkpointing_enable if is_new else model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        # Only the other kind needs inputs that ask for a gradient; a frozen tower would have to compute them.
        model.disable_input_require_grads()
    if config.compile:
        compile_encoders(model)
    if any(phase.image_size for phase in timeline.phases):
        resize_positions_smoothly(model)
    wrapped = parallel(model, accelerator, config)
    patches = PatchSelector(model.vision_model, config, timeline, accelerator)
    if average:
        accelerator.register_for_checkpointing(average.to(accelerator.device))
    if tuning.adapters:
        tuning.adapters.keep_in_checkpoints(model, accelerator)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    # Not prepared: Accelerate would step it once for every process.
    schedule = build_schedule(wrapped.optimizer, config, timeline, warmup_steps)
    return Learner(model, processor, wrapped, average, schedule, patches, loss, tuning)
