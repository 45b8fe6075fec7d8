"""Pre-train or fine-tune a CLIP with masked patches.

accelerate launch training/train.py                                  # the quickstart, on scenes drawn on the fly
accelerate launch training/train.py --config FILE.yaml --key value   # any other run; --help lists the options
python training/train.py --config FILE.yaml --dry_run                # what that run would take, and one small step of it
"""

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # A script's own folder is first on the path. There, evaluate.py would hide the package `evaluate`.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from hf_maskclip.errors import ConfigError, TrainingStopped
from training.config import TrainingConfig, describe_options, load_config


def main(config: TrainingConfig) -> dict[str, Any]:
    """Run a training and return its evaluation, which is also in `eval.json`; `{}` where a signal ended it.

    Raises:
        ConfigError: an option or the data it names cannot be used; raised before training starts.
        TrainingStopped: training cannot go on; what it had learnt is in a checkpoint.
    """
    # Here, so that --help does not wait for PyTorch.
    from training.loop import train
    from training.run import prepare
    from training.stopping import StopRequest
    from training.summary import finish, start_reports

    run = prepare(config)
    try:
        log = start_reports(run)
        with StopRequest() as stop:
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
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(program(sys.argv[1:]))
