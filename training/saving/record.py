"""What a checkpoint records of its run, so that a run that goes on from it is the same run.

The record is `record.json` in the checkpoint's folder: the options, what tells the training data and the weights that the run
began with, and the pairs that were seen.
"""

import dataclasses
import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hf_maskclip.data.decoding import SkippedSample
from hf_maskclip.data.mix import mix_in_words
from hf_maskclip.data.source import Source
from hf_maskclip.errors import fail
from hf_maskclip.models.patch_mask_registry import resolve_patch_mask
from training.config import TrainingConfig, option_name
from training.data.mix import Mix
from training.data.position import step_of
from training.data.words import save_counts

FILE = "record.json"
# What may change where a run goes on: places, the budget and its schedule, reports, and how fast or safely a step is made.
FREE = frozenset(
    "output_dir train_data eval_data max_steps samples_seen learning_rate learning_rate_vision learning_rate_text "
    "warmup_steps unmasked_tuning_steps max_grad_norm interpolate_weights "
    "log_every eval_every checkpoint_every keep_checkpoints resume report_to num_workers max_skipped_share chunk_size compile "
    "gradient_checkpointing import dry_run debug".split()
)
PLACES = ("model", "tokenizer", "word_frequencies")  # of options that can name a folder or a file
LOOKED_AT = 16  # shards of which the first captions are read


def data_identity(mix: Mix) -> list[dict[str, Any]]:
    """What tells the sources of a run wherever they lie, with their shares and keys."""
    return [_source_identity(mixed.source) | {"share": mixed.share, "keys": list(mixed.keys)} for mixed in mix.sources]


def _source_identity(source: Source) -> dict[str, Any]:
    """What tells a source wherever it lies: how many shards, and the first captions of some of them, as a hash each.

    The hash is None where a shard cannot be read now, which says nothing of its captions.
    """
    number = source.stream.num_shards
    chosen = sorted({round(shard) for shard in np.linspace(0, number - 1, min(number, LOOKED_AT))})
    return {"shards": number, "captions": {str(shard): _hash_of_captions(source, shard) for shard in chosen}}


def _hash_of_captions(source: Source, shard: int) -> str | None:
    digest = hashlib.sha256()
    for row in islice(source.stream.shard(source.stream.num_shards, shard), 4):
        if "__error__" in row:
            return None
        try:
            captions = list(source.decoder.captions(row, np.random.default_rng(0)))
        except SkippedSample:
            continue
        digest.update(json.dumps(captions).encode())
    return digest.hexdigest()


def write_record(
    folder: Path,
    config: TrainingConfig,
    data: list[dict[str, Any]],
    samples_seen: int,
    first_weights: str,
    word_counts: dict[str, float],
) -> None:
    """Write what a checkpoint records of its run into its folder; where the text mask goes by words, their counts beside it."""
    record = {"options": config.as_options(), "data": data, "samples_seen": samples_seen, "first_weights": first_weights}
    (folder / FILE).write_text(json.dumps(record, indent=2), encoding="utf-8")
    if word_counts:
        save_counts(folder, word_counts)


def read_record(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / FILE
    if not file.is_file():
        fail(f"resume: {checkpoint} has no {FILE}: an older version saved it, from which this one cannot go on")
    return json.loads(file.read_text(encoding="utf-8"))


def check_options(checkpoint: Path, config: TrainingConfig) -> None:
    """Raise a ConfigError where the options make another run than the checkpoint's."""
    saved = read_record(checkpoint)["options"]
    given = json.loads(json.dumps(config.as_options()))
    defaults = {option_name(item): item.default for item in dataclasses.fields(TrainingConfig)}
    changed = [
        f"{key}={value!r} (there {saved.get(key, defaults[key])!r})"
        for key, value in given.items()
        if key not in FREE and not _is_equal(key, value, saved.get(key, defaults[key]))
    ]
    if changed:
        fail(
            f"resume: {checkpoint} is of a run with other options than {', '.join(changed)}: "
            "give the same, or another output_dir (--model takes the export of a run)"
        )


def _is_equal(key: str, value: Any, saved: Any) -> bool:
    if value == saved:
        return True
    if key == "patch_mask" and isinstance(saved, dict):  # of before the mask had all of its options
        return value == resolve_patch_mask(saved)
    are_places = key in PLACES and value and saved and Path(value).exists()
    return bool(are_places) and Path(value).resolve() == Path(saved).resolve()


def check_data(checkpoint: Path, config: TrainingConfig, data: list[dict[str, Any]]) -> None:
    """Raise a ConfigError where the training data is not the checkpoint's, wherever it lies now."""
    record = read_record(checkpoint)
    if not isinstance(record["data"], list):
        fail(f"resume: {checkpoint} is of an older version, whose rows have another order; give another output_dir")
    if difference := _difference(data, record["data"]):
        now, then = mix_in_words(config.train_data), mix_in_words(record["options"]["train_data"])
        fail(
            f"resume: train_data={now!r} is other data than {then!r}, which {checkpoint} "
            f"was trained on ({difference}): give the same, or another output_dir"
        )


def _difference(data: list[dict[str, Any]], saved: list[dict[str, Any]]) -> str:
    """How sources differ from those of a checkpoint; empty where they do not."""
    if len(data) != len(saved):
        return f"{len(data)} sources, there {len(saved)}"
    for number, (now, then) in enumerate(zip(data, saved, strict=True), start=1):
        of = f"source {number}: " if len(data) > 1 else ""
        hashes = [(then["captions"].get(shard), digest) for shard, digest in now["captions"].items()]
        if now["shards"] != then["shards"]:
            return f"{of}{now['shards']} shards, there {then['shards']}"
        if abs(now["share"] - then["share"]) > 1e-9:
            return f"{of}a share of {now['share']:.3g}, there {then['share']:.3g}"
        if now["keys"] != then["keys"]:
            return f"{of}the keys {' and '.join(map(repr, now['keys']))}, there {' and '.join(map(repr, then['keys']))}"
        if any(None not in pair and pair[0] != pair[1] for pair in hashes):
            return f"{of}its captions are others"
    return ""


def check_budget(checkpoint: Path, config: TrainingConfig, num_steps: int, samples_seen: int) -> None:
    """Raise a ConfigError where a budget ends before the checkpoint."""
    done = step_of(checkpoint)
    if num_steps < done or (config.samples_seen and config.samples_seen < samples_seen):
        budget = f"max_steps={config.max_steps}" if config.max_steps else f"samples_seen={config.samples_seen}"
        seen = f"{done} steps" if config.max_steps else f"{samples_seen} pairs in {done} steps"
        fail(f"{budget}: {checkpoint} has {seen} behind it already: give as many or more, or another output_dir")
