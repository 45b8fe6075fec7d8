"""The training loop: steps, with reports, evaluations and checkpoints between them, and how it ends before its budget.

Shapes: B pairs of this process, N chunks of them, L patches.
"""

import json
import math
import sys
import time
from functools import partial
from typing import NoReturn

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_maskclip.data.mix import mix_in_words
from hf_maskclip.distributed import sum_counts
from hf_maskclip.errors import TrainingStopped
from training.data.batches import Batch, Stopped
from training.data.loader import start_workers
from training.model.optimization import learning_rates
from training.patch_selection import Chunk, kept_shares, patches_per_image, step_seed
from training.run import Run
from training.stopping import NumbersOnHost, StopRequest, leave_worker_deaths_to_the_loader, next_item
from training.summary import evaluate, report_evaluation, results_in_words
from training.tracking import MetricsLog, ProgressLines, SlowDataWarning, StepResult


class NonFiniteLossError(ArithmeticError):
    """The loss of a step is not a number. Nothing has changed in that step."""


def train(run: Run, log: MetricsLog, stop: StopRequest) -> bool:
    """The steps that are left of a run. False where a signal has ended it early.

    Raises:
        TrainingStopped: training cannot go on; what it had learnt is in a checkpoint.
    """
    config, state = run.config, run.data.state
    bar = progress_bar(run)
    slow_data = SlowDataWarning()
    lines = ProgressLines(run.timeline, is_on=bar.disable and run.accelerator.is_main_process)
    batches = start_workers(run.data.loader)
    leave_worker_deaths_to_the_loader()
    step_end = time.perf_counter()
    for _ in range(run.data.num_batches_used):
        state.use_again(expect_batch(next_item(batches), config.train_data))
    for step in range(run.steps_done + 1, run.num_steps + 1):
        batch = next_item(batches)
        data_seconds = time.perf_counter() - step_end
        if reason := stop.agreed(batch):
            bar.close()
            end_early(run, step - 1, reason, batch)
            return False
        rates = learning_rates(run.learner.schedule, config)
        try:
            result = training_step(run, batch, step)
        except NonFiniteLossError as error:
            stop_at_nonfinite_loss(run, step, str(error), batch.keys)
        state.use(batch)
        step_seconds = time.perf_counter() - step_end
        state.train_seconds += step_seconds
        slow_data.watch(data_seconds, step_seconds)

        if config.log_every and step % config.log_every == 0:
            write_step(run, log, step, result, rates, data_seconds, step_seconds)
        bar.set_postfix_str(f"step {step}, loss {result.loss:.3f}, {result.patches_in_words}", refresh=False)
        bar.update(run.samples_per_step)
        lines.step(step, run.samples_seen(step), result, rates["learning_rate"], data_seconds, step_seconds)
        save_and_evaluate(run, log, lines, step)
        step_end = time.perf_counter()
    bar.close()
    if run.accelerator.is_main_process:
        lines.warn_of_chance(run.samples_per_step, run.learner.loss.of_chance(run.samples_per_step))
    return True


def save_and_evaluate(run: Run, log: MetricsLog, lines: ProgressLines, step: int) -> None:
    """What is due after a step. The last state is saved, too, so that a longer budget can go on from it."""
    config, is_last = run.config, step == run.num_steps
    if config.checkpoint_every and (step % config.checkpoint_every == 0 or is_last):
        lines.say(f"step {step}: saved {run.save(step)}")
    if config.eval_every and step % config.eval_every == 0 and not is_last:
        results = evaluate(run, run.learner.result())
        report_evaluation(log, step, results)
        lines.say(f"step {step}: {results_in_words(results)}")


def training_step(run: Run, batch: Batch, step: int) -> StepResult:
    """Learn from a batch.

    Raises:
        NonFiniteLossError: the loss, on any process, is not a number.
    """
    learner, batch_size = run.learner, run.config.batch_size
    learner.train_mode()  # evaluations leave another
    chunk_size = run.config.chunk_size or batch_size
    select, options = partial(learner.patches.select_views, step=step), run.size_options(batch)
    num_patches = patches_per_image(batch, learner.model.config.vision_config.patch_size)
    chunks = [
        Chunk(batch, slice(start, start + chunk_size), run.to_model, partial(select, chunk=number), options)
        for number, start in enumerate(range(0, batch_size, chunk_size))
    ]
    # For dropout, which some text towers have: a step is the same wherever its run began.
    torch.manual_seed(step_seed(run.config.seed, step, run.accelerator.process_index))
    model = learner.parallel.wrapped_model
    if len(chunks) == 1:
        loss = learner.loss(model(**chunks[0].encode_inputs()))
        numbers = numbers_of(run, loss.detach(), chunks, num_patches)
        run.accelerator.backward(loss)
    else:
        loss = learner.loss.backward_in_chunks(model, [chunk.encode_inputs for chunk in chunks])
        numbers = numbers_of(run, loss, chunks, num_patches)
    mean_loss, logit_scale, *shares = numbers.read()
    if not math.isfinite(mean_loss):
        learner.parallel.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLossError(mean_loss)

    learner.update()
    learner.patches.schedule.after_step(step)
    sizes = [len(chunk) for chunk in chunks]
    kept = num_patches * sum(map(math.prod, zip(shares, sizes, strict=True))) / sum(sizes)
    phase = 1 + run.timeline.number_at(step)
    views = chunks[0].num_views * batch.num_crops
    return StepResult(mean_loss, kept, num_patches, views, batch.input_ids.shape[1], batch.image_size, phase, logit_scale)


def numbers_of(run: Run, loss: torch.Tensor, chunks: list[Chunk], num_patches: int) -> NumbersOnHost:
    """The mean loss over processes, the logit scale, and the share of patches that each chunk shows: (2 + N,).

    They are on their way to the host, and come together, so that a step waits for the device once.
    """
    mean_loss = run.accelerator.reduce(loss, reduction="mean").float()
    logit_scale = run.learner.model.logit_scale.detach().exp().float()
    shares = kept_shares(chunks, num_patches, loss.device)
    return NumbersOnHost(torch.cat([mean_loss.reshape(1), logit_scale.reshape(1), shares]))


def write_step(
    run: Run,
    log: MetricsLog,
    step: int,
    result: StepResult,
    rates: dict[str, float],
    data_seconds: float,
    step_seconds: float,
) -> None:
    """The line of a step in `metrics.jsonl`."""
    of_sources = {"of_sources": sum_counts(run.data.state.of_sources)} if len(run.data.mix.sources) > 1 else {}
    log.write(
        step,
        loss=result.loss,
        **rates,
        logit_scale=result.logit_scale,
        phase=result.phase,
        image_size=result.image_size,
        kept_patches=result.kept_patches,
        views=result.views,
        text_tokens=result.text_tokens,
        samples_seen=run.samples_seen(step),
        samples_per_second=run.samples_per_step / step_seconds,
        data_seconds=data_seconds,
        step_seconds=step_seconds,
        skipped=sum_counts(run.data.state.skipped),
        **of_sources,
    )


def progress_bar(run: Run) -> tqdm:
    """In pairs; off where the output is no terminal."""
    total, initial = (run.samples_seen(step) for step in (run.num_steps, run.steps_done))
    shows = run.accelerator.is_main_process and sys.stderr.isatty()
    return tqdm(total=total, initial=initial, unit="pair", unit_scale=True, disable=not shows)


def expect_batch(item: Batch | Stopped, train_data: str | list) -> Batch:
    """Raises TrainingStopped where the data has given out."""
    if isinstance(item, Stopped):
        raise TrainingStopped(f"train_data={mix_in_words(train_data)!r}: {item.reason}")
    return item


def end_early(run: Run, last_step: int, reason: int, item: Batch | Stopped) -> None:
    """Save what was learnt up to a step, and say why the run ends.

    Raises:
        TrainingStopped: the data of a process gave out.
    """
    where = f"saved {run.save(last_step)}" if last_step else "nothing was learnt yet"
    if reason == StopRequest.DATA:
        causes = dict.fromkeys(gather_object([item.reason] if isinstance(item, Stopped) else []))
        raise TrainingStopped(f"train_data={mix_in_words(run.config.train_data)!r}: {'; '.join(causes)}; {where}")
    if run.accelerator.is_main_process:
        signal = StopRequest.TITLES[reason]
        print(f"{signal} after step {last_step}; {where}; the same command with --resume auto goes on from there")


def stop_at_nonfinite_loss(run: Run, step: int, loss: str, keys: list[str]) -> NoReturn:
    """Save the state before a step, and the keys of its batches, to look at.

    Raises:
        TrainingStopped: always.
    """
    keys_of_processes = gather_object([keys])
    file = run.output_dir / f"nonfinite_step_{step}.json"
    if run.accelerator.is_main_process:
        text = json.dumps({"step": step, "loss": loss, "keys": keys_of_processes}, indent=2)
        file.write_text(f"{text}\n", encoding="utf-8")
    where = f"the state before it is {run.save(step - 1)}" if step > 1 else "it is the first step"
    raise TrainingStopped(f"step {step}: the loss is {loss}; {where}, the keys of its batch are in {file}")
