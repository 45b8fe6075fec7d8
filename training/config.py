"""The options of a training run: one dataclass, read from YAML (`--config`) and from the command line (`--key value`).

Nothing heavy is imported here, so that --help answers at once.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hf_maskclip.data.mix import MixPart, read_mix
from hf_maskclip.errors import fail
from hf_maskclip.options import built_in_masks, import_module_of_user
from hf_maskclip.phases import Phase, Timeline, phases_of_schedule, read_phases
from training.data.text_masking import TextMaskName, check_text_mask
from training.launch.arguments import read_options
from training.model.precision import fastest_precision

# Two to five minutes for the tiny model on two CPU cores.
QUICKSTART_STEPS = 600


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be: from `low` to `high`, or strictly between where a bound is open."""

    low: float = 0
    high: float = math.inf
    is_low_open: bool = False
    is_high_open: bool = False

    def __contains__(self, value: float) -> bool:
        is_above = value > self.low if self.is_low_open else value >= self.low
        is_below = value < self.high if self.is_high_open or math.isinf(self.high) else value <= self.high
        return is_above and is_below

    def __str__(self) -> str:
        low = f"above {self.low}" if self.is_low_open else f"at least {self.low}"
        high = f"below {self.high}" if self.is_high_open else f"at most {self.high}"
        return low if math.isinf(self.high) else f"{low} and {high}"


NOT_NEGATIVE, SHARE, ABOVE_0 = Range(), Range(0, 1), Range(0, 1, is_low_open=True)


def option(default: Any, help: str, range: Range = NOT_NEGATIVE) -> Any:
    """A field with its default, what `--help` says of it, and, where it is a number, which it may be."""
    return field(default=default, metadata={"help": help, "range": range})


@dataclass
class TrainingConfig:
    """Every option has a default; together they run the quickstart on the embedded data set."""

    output_dir: str = option("runs/quickstart", "folder of the run; an earlier run in it is moved aside, not overwritten")

    # Model
    model: str = option(
        "tiny",
        "tiny, tiny-96, small, vit-s-16, vit-b-32, vit-b-16, siglip-tiny, siglip-s-16 or siglip-b-16 from random weights; or a "
        "folder or Hub id of a CLIP, MetaCLIP 2, AltCLIP, ChineseCLIP, SigLIP or SigLIP 2",
    )
    tokenizer: str = option("", "folder or Hub id; empty: the model's own, or one trained on the captions for a preset")
    vocab_size: int = option(8192, "most tokens of a tokenizer that is trained on the captions", Range(1000))
    patch_mask: str | dict = option(
        "", f"{', '.join(built_in_masks())}, or {{name: pgs, ...}}; empty: the model's own, pgs for a preset"
    )
    views: Literal["one", "two", "complementary", "crops"] = option(
        "one",
        "of a picture at a step: two masks, complementary ones (the second keeps what the first drops), or two crops, "
        "each with its mask; the caption is encoded once",
    )
    image_size: int = option(
        0, "side of the pictures in training, in pixels, at most the model's, which evaluation and export keep; 0: the model's"
    )
    phases: str | list = option(
        "",
        "what changes during the run, a list such as [{share: 0.9, image_size: 112}, {share: 0.1}]; share is of the samples; a "
        "phase may have its image_size, patch_mask, mask_ratio, text_tokens, and ramp: true (ratios that grow from 0)",
    )
    mask_schedule: float = option(
        0.0, "share of training over which the mask ratios grow linearly from 0; 0 is constant; short for phases", SHARE
    )
    text_mask: TextMaskName = option(
        "none",
        "which tokens of a caption stay: truncate (the first), random, block (a run), frequency (rarer words first, CLIPF); "
        "none is off",
    )
    text_tokens: int = option(0, "tokens that text_mask leaves a caption, with start and end token; 0 is the context length")
    word_frequencies: str = option(
        "", "JSON of {word: count} for text_mask frequency; empty: the words of the first 20,000 samples' captions are counted"
    )
    word_threshold: float = option(
        0.0,
        "share of all words above which frequency discards a word at times; 0: CC12M's 1e-6, or where it is more the share of "
        "the rarest word that was counted",
        SHARE,
    )

    # What of a folder or Hub id is trained
    freeze: Literal["none", "vision", "text"] = option(
        "none", "tower that stays as it is, with its projection; vision sees whole pictures then, unless patch_mask is given"
    )
    lora_rank: int = option(0, "train adapters of this rank alone (LoRA), on attention and MLP of what is not frozen; 0 is off")
    interpolate_weights: float = option(1.0, "share of tuned weights in the result, the rest is the first; 1 is off", ABOVE_0)

    # Data
    train_data: str | list = option(
        "scenes",
        "tar or parquet files (braces, globs), a folder, a Hub id, or scenes (drawn on the fly); several by weight as "
        "a.tar:3,b.tar:1, or as a list such as [{data: a.tar, weight: 3, caption_key: alt}, {data: b.tar}]",
    )
    eval_data: str = option(
        "", "held-out data in the same forms, or clip-benchmark folders; empty: scenes for scenes, else off"
    )
    image_key: str = option("", "field of the picture, such as jpg (jpg,png: the first that is there); empty: the known ones")
    caption_key: str = option(
        "", "field of the caption, such as txt or json.captions (of a list, one is drawn); empty: the known ones"
    )
    crop_scale: float = option(0.9, "least share of a picture's area in the random resized crop; 1 is off", ABOVE_0)
    flip: float = option(
        0.5, "probability of a horizontal flip (never for scenes, whose captions say left and right); 0 is off", SHARE
    )
    shuffle_buffer: int = option(
        2000, "samples that a worker shuffles at a time, and holds twice, undecoded; 0 is off (shards are still shuffled)"
    )
    stream: Literal["exact", "resampled"] = option(
        "exact",
        "exact: every sample once an epoch, exact resume; resampled: each process reads all shards in its own order",
    )
    max_skipped_share: float = option(
        0.5,
        "share of a worker's last 1,000 samples that may be unusable before the run stops; 1: go on while there is any",
        SHARE,
    )
    num_workers: int = option(2, "data loading processes per training process; 0 loads in the training process")

    # Budget: max_steps or samples_seen
    max_steps: int = option(0, "optimizer steps; 0: derived from samples_seen")
    samples_seen: int = option(
        0, "image-text pairs over all processes; 0: derived from max_steps (both 0: the quickstart's budget)"
    )
    batch_size: int = option(64, "pairs per process and step", Range(2))
    chunk_size: int = option(
        0, "pairs encoded at a time: less memory for a third more time, the loss is of the whole batch; 0: all at once"
    )

    # Optimisation
    loss: Literal["auto", "contrastive", "sigmoid"] = option(
        "auto", "contrastive (CLIP's), sigmoid (SigLIP's, with a bias); auto is what the model's family was trained with"
    )
    learning_rate: float = option(1e-3, "peak of the cosine schedule")
    learning_rate_vision: float = option(0.0, "that of the vision tower with its projection; 0: learning_rate")
    learning_rate_text: float = option(0.0, "that of the text tower with its projection; 0: learning_rate")
    warmup_steps: int = option(-1, "steps of linear warm-up; -1: a tenth of the run; 0 is off", Range(-1))
    weight_decay: float = option(0.2, "AdamW's, for matrices only; 0 is off")
    max_grad_norm: float = option(1.0, "gradient clipping by norm; 0 is off")
    ema_momentum: float = option(
        0.0,
        "momentum of a moving average of the weights, which is then evaluated and exported, such as 0.999; 0 is off",
        Range(0, 1, is_high_open=True),
    )
    unmasked_tuning_steps: int = option(0, "last steps that see whole images; 0 is off; short for phases")
    mixed_precision: Literal["auto", "bf16", "no"] = option(
        "auto", "bf16 autocast over float32 weights, or no; auto is bf16 where the hardware multiplies it"
    )
    compile: bool = option(False, "torch.compile of both encoders: faster steps after a start of a minute or two")
    gradient_checkpointing: bool = option(False, "compute activations again in the backward pass: less memory, slower steps")
    seed: int = option(0, "of weights, data order and patch masks", Range(0, 2**32 - 1))

    # Reports; 0 is off for each *_every
    log_every: int = option(1, "steps between lines of metrics.jsonl")
    eval_every: int = option(0, "steps between evaluations; one at the end in any case")
    checkpoint_every: int = option(0, "steps between checkpoints")
    keep_checkpoints: int = option(0, "how many of the last checkpoints stay; 0: all")
    resume: Literal["none", "auto", "fresh_pass"] = option(
        "none",
        "auto: go on from the last checkpoint in output_dir, if there is one; fresh_pass: also with another number of "
        "processes or workers, which then begin a new pass over the data",
    )
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = option("none", "tracker besides metrics.jsonl")

    # The program
    import_: str = option("", "modules to import first, separated by commas, which make known patch masks of your own")
    dry_run: bool = option(False, "say what the run would take, and take one small step; nothing is written")
    debug: bool = option(False, "show the traceback of an error that is otherwise one line")

    def __post_init__(self):
        for module in filter(None, self.import_.split(",")):
            import_module_of_user(module.strip())
        for item in dataclasses.fields(self):
            value, allowed = getattr(self, item.name), item.metadata["range"]
            if item.type in (int, float) and value not in allowed:
                fail(f"{option_name(item)}={value}: must be {allowed}")
        self._check_phases()
        self.train_data = _mix_as_given(read_mix(self.train_data))
        if self.max_steps and self.samples_seen:
            fail(f"max_steps={self.max_steps} and samples_seen={self.samples_seen}: give one of the two budgets")
        if not self.max_steps and not self.samples_seen:
            self.max_steps = QUICKSTART_STEPS
        if self.patch_mask or self.freeze == "vision":  # the features of a part of a picture are seldom meant
            self.patch_mask = _resolved(self.patch_mask or "none")
        if self.mixed_precision == "auto":  # settled here, so that the run's record says which it was
            self.mixed_precision = fastest_precision()

    def as_options(self) -> dict[str, Any]:
        """The options by the names that `--config` and the command line have for them."""
        return {option_name(item): getattr(self, item.name) for item in dataclasses.fields(self)}

    def schedule(self, num_processes: int, steps_done: int = 0, samples_before: int = 0) -> tuple[int, int]:
        """The optimizer steps of the run on that many processes, and how many of them warm up.

        Args:
            steps_done, samples_before: of the checkpoint that the run goes on from, which other processes may have made.
        """
        samples_left = max(0, self.samples_seen - samples_before)
        steps = self.max_steps or steps_done + -(-samples_left // (self.batch_size * num_processes))
        warmup = steps // 10 if self.warmup_steps == -1 else self.warmup_steps
        for name, value in (("warmup_steps", warmup), ("unmasked_tuning_steps", self.unmasked_tuning_steps)):
            if value > steps:
                fail(f"{name}={value}: the run has only {steps} steps")
        return steps, warmup

    def timeline(
        self,
        num_processes: int,
        num_steps: int,
        steps_done: int = 0,
        samples_before: int = 0,
        phases: Sequence[Phase] = (),
    ) -> Timeline:
        """The phases of the run on that many processes.

        Args:
            num_steps: that `schedule` gives, for the same `steps_done` and `samples_before`.
            phases: in place of those of the options.
        """
        per_step = self.batch_size * num_processes
        defaults = {"image_size": self.image_size, "text_tokens": self.text_tokens}
        if not phases and self.phases:
            phases = read_phases(self.phases, **defaults)
        elif not phases:
            samples = samples_before + (num_steps - steps_done) * per_step
            unmasked = self.unmasked_tuning_steps * per_step / samples if samples else 0.0
            phases = phases_of_schedule(self.mask_schedule, unmasked, **defaults)
        return Timeline(phases, num_steps, per_step, steps_done, samples_before)

    def _check_phases(self) -> None:
        """Raise a ConfigError for phases that cannot be read, or that contradict other options."""
        phases = read_phases(self.phases, text_tokens=self.text_tokens) if self.phases else []
        for name in ("mask_schedule", "unmasked_tuning_steps"):
            if phases and (value := getattr(self, name)):
                fail(f"{name}={value} and phases: it is short for phases; give one of the two")
        text_tokens = [phase.text_tokens for phase in phases] or [self.text_tokens]
        check_text_mask(self.text_mask, text_tokens, self.word_frequencies, self.word_threshold)


def _mix_as_given(parts: list[MixPart]) -> str | list[dict[str, Any]]:
    """One source by its name; several, and one with keys of its own, as mappings, in whatever form they were given."""
    if parts == [MixPart(parts[0].data)]:
        return parts[0].data
    return [{name: value for name, value in part._asdict().items() if value} for part in parts]


def option_name(item: dataclasses.Field) -> str:
    """`import_` is called `import`, which Python keeps for itself."""
    return item.name.rstrip("_")


def _resolved(patch_mask: str | dict) -> dict[str, Any]:
    from hf_maskclip.models.patch_mask_registry import resolve_patch_mask  # which imports PyTorch

    try:
        return resolve_patch_mask(patch_mask)
    except ValueError as error:
        fail(str(error))


def load_config(arguments: list[str] | None = None) -> TrainingConfig:
    """Read `--config FILE` and `--key value` pairs, those of the command line winning.

    Raises:
        ConfigError: unknown key, missing value, wrong type, or options that contradict each other.
    """
    known = {option_name(item): item for item in dataclasses.fields(TrainingConfig)}
    values = read_options(sys.argv[1:] if arguments is None else arguments, known)
    return TrainingConfig(**{known[key].name: value for key, value in values.items()})


def describe_options() -> str:
    """One line an option: name, default, help."""
    lines = ["  --config FILE  YAML file with any of the options below"]
    lines += [f"  --{option_name(f)} {f.default!r}  {_help_of(f)}" for f in dataclasses.fields(TrainingConfig)]
    return "\n".join(lines)


def _help_of(item: dataclasses.Field) -> str:
    allowed = item.metadata["range"]
    return item.metadata["help"] + (f" ({allowed})" if allowed != NOT_NEGATIVE else "")
