"""Where a run's batches come from on this process, and the evaluations of the run.

Shapes: B pairs of this process.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin

from hf_maskclip.dual_encoders import image_size_of
from hf_maskclip.errors import fail
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.evaluation.datasets.pairs import PairKeys
from hf_maskclip.evaluation.tasks import Evaluation
from hf_maskclip.phases import Timeline
from hf_maskclip.texts import context_length, family_of, text_arguments
from training.config import TrainingConfig
from training.data.batches import PairBatches, TextForm
from training.data.forms import FormByStep, pair_forms
from training.data.loader import build_loader, usable_workers
from training.data.mix import Mix
from training.data.pairs import PairSource
from training.data.position import LoaderState
from training.data.shuffling import shard_stream
from training.data.words import count_words, counts_of_checkpoint, read_given_counts


@dataclass
class RunData:
    """Where a run's batches come from, on this process.

    Attributes:
        num_batches_used: of the loader, before the checkpoint that the run goes on from.
        word_counts: that the text mask goes by; empty where it goes by none.
    """

    mix: Mix
    loader: DataLoader
    state: LoaderState
    num_batches_used: int
    evaluations: list[Evaluation]
    word_counts: dict[str, float]


def with_usable_workers(config: TrainingConfig, mix: Mix, accelerator: Accelerator) -> TrainingConfig:
    """The options with no more data workers than each source has shards for, which is said."""
    smallest = mix.with_fewest_shards
    num_shards = smallest.source.stream.num_shards
    num_readers = accelerator.num_processes if config.stream == "exact" else 1
    num_workers = usable_workers(num_shards, num_readers, config.num_workers)
    if num_workers < config.num_workers and accelerator.is_main_process:
        used = f"uses {num_workers}, for train_data={smallest.name!r} has {num_shards} shards"
        print(f"num_workers={config.num_workers}: {used}")
    return replace(config, num_workers=num_workers)


def epoch_openers(mix: Mix, config: TrainingConfig, accelerator: Accelerator) -> list[Callable[[int], IterableDataset]]:
    """Functions that give this process its part of each source in an epoch.

    Raises:
        ConfigError: too few shards.
    """
    open_epochs = [
        partial(
            shard_stream,
            mixed.source.stream,
            process=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=config.num_workers,
            seed=config.seed + number,  # so that a source which comes twice is not read in one order
            resampled=config.stream == "resampled",
            name=mixed.name,
        )
        for number, mixed in enumerate(mix.sources)
    ]
    for open_epoch in open_epochs:
        open_epoch(0)  # so that it raises now, not in a worker
    return open_epochs


def counts_words(config: TrainingConfig, checkpoint: Path | None) -> bool:
    """Whether the words of the captions are still to be counted."""
    return config.text_mask == "frequency" and not config.word_frequencies and checkpoint is None


def word_counts_of_run(config: TrainingConfig, checkpoint: Path | None, captions: Iterable[str]) -> dict[str, float]:
    """The word counts of a run, the same on all processes: the checkpoint's, those given by hand, or those of the captions.

    Empty where the text mask goes by none.

    Raises:
        ConfigError: there are none, or they are not those of the checkpoint.
    """
    if config.text_mask != "frequency":
        return {}
    if checkpoint:
        counts = counts_of_checkpoint(checkpoint, config.word_frequencies)
    elif config.word_frequencies:
        counts = read_given_counts(config.word_frequencies)
    elif not (counts := count_words(captions)):
        fail(
            f"text_mask='frequency': train_data={config.train_data!r}: its first captions have no words: give word_frequencies"
        )
    return broadcast_object_list([counts])[0]


def prepare_data(
    mix: Mix,
    open_epochs: Sequence[Callable[[int], IterableDataset]],
    config: TrainingConfig,
    checkpoint: Path | None,
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    word_counts: dict[str, float],
    timeline: Timeline,
) -> RunData:
    """The loader at its position, and the evaluations.

    Raises:
        ConfigError: evaluation data that cannot be used, or a checkpoint of another number of processes or workers.
    """
    image_size = image_size_of(model.config.vision_config, processor.image_processor)
    for mixed in mix.sources:
        mixed.source.decoder = replace(mixed.source.decoder, image_size=image_size)
    keys = PairKeys(config.image_key, config.caption_key)
    evaluations = find_evaluations(config.eval_data or mix.eval_data, Request(image_size=image_size, keys=keys))

    is_exact, may_begin_anew = config.stream == "exact", config.resume == "fresh_pass"
    state = LoaderState(accelerator, config.num_workers, is_exact, may_begin_anew)
    places, num_batches_used = state.load(checkpoint, len(mix.sources)) if checkpoint else ({}, 0)
    text_length = context_length(model.config, processor.tokenizer)
    pads = family_of(model.config).pads_texts
    sources = [
        PairSource(
            open_epoch,
            FormByStep(timeline, pair_forms(mixed.source, config, model, processor, word_counts, timeline)),
            round(mixed.share * config.shuffle_buffer) if mixed.source.needs_shuffling else 0,
            mixed.name,
            mixed.share,
        )
        for mixed, open_epoch in zip(mix.sources, open_epochs, strict=True)
    ]
    batches = PairBatches(
        sources,
        processor.tokenizer,
        config.batch_size,
        config.seed,
        config.max_skipped_share,
        places,
        TextForm(text_arguments(model.config, processor.tokenizer), text_length if pads else 0),
        first_step=timeline.steps_done + 1 - num_batches_used,
    )
    loader = build_loader(batches, config.num_workers, pins_memory=accelerator.device.type == "cuda")
    return RunData(mix, loader, state, num_batches_used, evaluations, word_counts)
