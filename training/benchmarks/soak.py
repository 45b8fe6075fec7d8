"""Whether a run that is killed every few minutes is the one without kills: the same losses at every step, to the last bit.

    python training/benchmarks/soak.py --train_data 'shards/*.tar' --minutes 30

Trains twice with the same options: once without kills for about the given time, then with them. A kill is SIGKILL to all
processes of the run, SIGKILL to one of its training processes, or SIGTERM to all; after each the same command is given again.
Prints and writes, as JSON, how often what was done, where the two runs differ (they must not), and how the memory of a training
process grew. Options after `--` go to `training/train.py`.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import psutil
from measure import ROOT

from training.tracking import read_metrics

SAME = ("step", "loss", "learning_rate", "logit_scale", "kept_patches", "samples_seen", "skipped")
KILLS = {"SIGKILL to all": 0.7, "SIGKILL to one": 0.15, "SIGTERM to all": 0.15}


class TrainingRun:
    """A training on several CPU processes in a folder, which can be started, killed and started again."""

    def __init__(self, output_dir: Path, num_processes: int, options: list[str]):
        self.output_dir = output_dir
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
        training = [str(ROOT / "training" / "train.py"), "--output_dir", str(output_dir), "--resume", "auto"]
        self.command = [*launch, *training, *options]
        self.memory: list[float] = []  # in GB, of the first training process, second by second

    def start(self) -> None:
        self.log = (self.output_dir.parent / f"{self.output_dir.name}.log").open("a", encoding="utf-8")
        environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
        self.launcher = psutil.Popen(self.command, stdout=self.log, stderr=self.log, env=environment)

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where it still runs after that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                return self.launcher.wait(timeout=1)
            except psutil.TimeoutExpired:
                self._note_memory()
        return None

    def kill(self, kind: str) -> None:
        """Kill the run and wait until all of its processes are gone."""
        everything = [self.launcher, *self.launcher.children(recursive=True)]
        training = [process for process in self.launcher.children() if "train.py" in " ".join(process.cmdline())]
        number = signal.SIGTERM if kind == "SIGTERM to all" else signal.SIGKILL
        for process in training[:1] if kind == "SIGKILL to one" else everything:
            if process.is_running():
                process.send_signal(number)
        _, alive = psutil.wait_procs(everything, timeout=90)
        assert not alive, f"{kind}: {alive} still run after 90 s"

    def steps(self) -> list[dict]:
        metrics = self.output_dir / "metrics.jsonl"
        return [record for record in read_metrics(metrics) if "loss" in record] if metrics.exists() else []

    def _note_memory(self) -> None:
        try:
            training = self.launcher.children()
            if training:
                self.memory.append(training[0].memory_info().rss / 1e9)
        except psutil.NoSuchProcess:
            pass


def run_undisturbed(run: TrainingRun, seconds: float) -> None:
    run.start()
    code = run.wait(10 * seconds)
    assert code == 0, f"the run without kills ended with {code}, see {run.log.name}"


def run_with_kills(run: TrainingRun, kill_every: float, seed: int) -> dict[str, int]:
    """Run to the end, with kills in between; how often each kind was done."""
    rng, counts = random.Random(seed), dict.fromkeys(KILLS, 0)
    while True:
        run.start()
        code = run.wait(rng.uniform(0.75, 1.25) * kill_every)
        if code is not None:
            assert code == 0, f"the run with kills ended by itself with {code}, see {run.log.name}"
            return counts
        (kind,) = rng.choices(list(KILLS), list(KILLS.values()))
        run.kill(kind)
        counts[kind] += 1
        print(f"{kind} at step {len(run.steps())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data", required=True, help="as for training/train.py")
    parser.add_argument("--minutes", type=float, default=30, help="how long the run without kills takes, about")
    parser.add_argument("--kill_every", type=float, default=120, help="seconds between kills, in the mean")
    parser.add_argument("--num_processes", type=int, default=2)
    parser.add_argument("--seconds_per_step", type=float, default=0.5, help="an estimate, which turns minutes into steps")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/soak"), help="where both runs and soak.json go")
    parser.add_argument("--seed", type=int, default=0)
    arguments, more = parser.parse_known_args()
    more = [word for word in more if word != "--"]

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    num_steps = int(arguments.minutes * 60 / arguments.seconds_per_step)
    options = ["--train_data", arguments.train_data, "--max_steps", str(num_steps), "--checkpoint_every", "50"]
    options += ["--keep_checkpoints", "2", *more]
    whole, killed = (TrainingRun(arguments.output_dir / name, arguments.num_processes, options) for name in ("whole", "killed"))
    start = time.monotonic()
    run_undisturbed(whole, arguments.minutes * 60)
    middle = time.monotonic()
    counts = run_with_kills(killed, arguments.kill_every, arguments.seed)
    pairs = list(zip(whole.steps(), killed.steps(), strict=True))
    result = {
        "steps": len(pairs),
        "steps_that_differ": [a["step"] for a, b in pairs if any(a[key] != b[key] for key in SAME)],
        "last_losses": [record["loss"] for record in pairs[-1]],
        "skipped": [record["skipped"] for record in pairs[-1]],
        "kills": counts,
        "minutes": [round((middle - start) / 60, 1), round((time.monotonic() - middle) / 60, 1)],
        "gigabytes_after_a_minute_and_at_the_end": [
            round(whole.memory[min(60, len(whole.memory) // 2)], 3),
            round(whole.memory[-5], 3),
        ],
    }
    (arguments.output_dir / "soak.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    assert not result["steps_that_differ"], "the run with kills is another one"


if __name__ == "__main__":
    main()
