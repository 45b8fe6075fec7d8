"""Pre-train or fine-tune a CLIP with masked patches.

python training/train.py                                  # the quickstart, on scenes drawn on the fly
python training/train.py --config FILE.yaml --key value   # any other run, on one process; --help lists the options
python training/train.py --config FILE.yaml --dry_run     # what that run would take, and one small step of it
accelerate launch --config_file training/launch/ddp.yaml training/train.py --config FILE.yaml   # on several processes
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder is first on the path. There, evaluate.py would hide the package `evaluate`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hf_maskclip.errors import ConfigError, TrainingStopped
from training.config import TrainingConfig, describe_options, load_config

ALIKE_SECONDS = 10  # in which a launcher ends all processes after the first has failed


def main(config: TrainingConfig) -> dict[str, Any]:
    """Run a training and return its evaluation, which is also in `eval.json`; `{}` where a signal ended it.

    Raises:
        ConfigError: an option or the data it names cannot be used; raised before training starts.
        TrainingStopped: training cannot go on; what it had learnt is in a checkpoint.
    """
    # Here, so that --help does not wait for PyTorch.
    from training.loop import train
    from training.run import prepare
    from training.stopping import StopRequest, lost_processes_in_words
    from training.summary import evaluate_before, finish, start_reports

    stop = StopRequest()
    with lost_processes_in_words():
        run = prepare(config)
        try:
            log = start_reports(run)
            evaluate_before(run, log)
            with stop:
                is_complete = train(run, log, stop)
            results = finish(run, log) if is_complete else {}
            run.accelerator.end_training()
        finally:
            if run.lock:
                run.lock.release()
    return results


def program(arguments: list[str]) -> int:
    """The command line; returns the exit code: 0, 2 after one line that says what cannot be used or why training
    stopped, or 130 where Ctrl-C ended it at once."""
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nOptions, with their defaults:\n{describe_options()}")
        return 0
    try:
        config = load_config(arguments)
        if config.dry_run:
            from training.dry_run import dry_run

            dry_run(config)
        else:
            main(config)
    except (ConfigError, TrainingStopped) as error:
        if any(word.startswith("--debug") for word in arguments):
            raise
        say_error(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def say_error(line: str) -> None:
    """Print why this process ends. The others of a run mostly end for the same reason, and one of them is to say it.

    So all but the first wait. Where the first has failed, too, its launcher ends them before they speak.
    """
    if int(os.environ.get("RANK", 0)):
        time.sleep(ALIKE_SECONDS)
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
