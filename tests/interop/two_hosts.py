"""Proves that a run on two machines is the run of one machine with two processes, and outlives the loss of either machine.

    python tests/interop/two_hosts.py [--output result.json]

The machines are two network namespaces of this one, joined by a virtual cable. Each has a name, one core, and this disk.
So they share `output_dir`, as they have to. Needs Linux, root, and iproute2. `training/launch/multi-node.yaml` is used as it is
written. On the command line stand each machine's rank, the first one's address, and one process for each in place of eight
(`--num_processes 2`). They take the CPU, as no GPU is there.

Machine 1 is killed in the middle of the run, then machine 0: SIGKILL to all that runs on it. The other machine has to end by
itself. The same command, with `--resume auto`, goes on. All losses have to be those of one machine with two processes, to the
last digit. Prints what is done and, as JSON, what was seen. Exits with 1 where something differs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers import losses_of, pair, same, words, write_shard

from training.saving.checkpoint import latest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS, CHECKPOINT_EVERY, KILL_AFTER = 60, 10, {1: 15, 0: 35}  # machine -> the step after which it is killed
SECONDS = 300  # in which a run has to end, or to reach a step
OPTIONS = {"model": "tiny", "patch_mask": "pgs", "batch_size": 8, "max_steps": STEPS, "num_workers": 1, "mixed_precision": "no"}
OPTIONS |= {"checkpoint_every": CHECKPOINT_EVERY, "resume": "auto", "vocab_size": 1000, "shuffle_buffer": 16}
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
# Its own name, and a list of names that leads to addresses of the cable.
ENTER = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class Machine:
    """A network namespace with a name and an address. What is started in it can be killed as one."""

    def __init__(self, number: int, folder: Path):
        self.number, self.folder = number, folder
        self.name, self.address = f"maskclip{os.getpid()}-{number}", f"10.77.0.{number + 1}"
        self.core = sorted(os.sched_getaffinity(0))[number % len(os.sched_getaffinity(0))]
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "set", "lo", "up")

    def connect(self, cable: str) -> None:
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", cable)
        run("ip", "-n", self.name, "link", "set", cable, "up")

    def start(self, command: list[str], output: Path, cores: str = "") -> subprocess.Popen:
        into = ["ip", "netns", "exec", self.name, "unshare", "--uts", "--mount", "sh", "-c", ENTER, "sh"]
        into += [self.name, str(self.folder / "hosts"), "taskset", "-c", cores or str(self.core)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with output.open("a") as file:
            return subprocess.Popen([*into, *command], stdout=file, stderr=file, env=environment)

    def bytes_sent(self) -> int:
        """Over the cable, to the other machine."""
        (cable,) = json.loads(run("ip", "-n", self.name, "-s", "-j", "link", "show", f"cable{self.number}"))
        return cable["stats64"]["tx"]["bytes"]

    def kill(self) -> None:
        """SIGKILL to everything that runs on this machine, until nothing does."""
        while pids := run("ip", "netns", "pids", self.name).split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)

    def remove(self) -> None:
        self.kill()
        run("ip", "netns", "del", self.name)  # and its end of the cable


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def train_on_both(machines: list[Machine], options: dict) -> list[subprocess.Popen]:
    """Start the command of each machine, as the launch file says it."""
    program = [str(ROOT / "training" / "train.py"), *words(options)]
    launch = [*LAUNCH, str(ROOT / "training" / "launch" / "multi-node.yaml"), "--main_process_ip", machines[0].address]
    return [
        machine.start(
            [*launch, "--machine_rank", str(machine.number), "--num_processes", "2", *program],
            machine.folder / f"machine-{machine.number}.txt",
        )
        for machine in machines
    ]


def wait_for_end(launchers: list[subprocess.Popen]) -> list[int]:
    """The launchers' exit codes. Raises TimeoutExpired where one does not end."""
    deadline = time.monotonic() + SECONDS
    return [launcher.wait(max(0.1, deadline - time.monotonic())) for launcher in launchers]


def wait_for_step(launchers: list[subprocess.Popen], output_dir: Path, step: int) -> None:
    metrics, deadline = output_dir / "metrics.jsonl", time.monotonic() + SECONDS
    while not (metrics.exists() and metrics.read_text().count("\n") >= step):
        assert all(launcher.poll() is None for launcher in launchers), f"the run ended before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached in {SECONDS} s"
        time.sleep(0.005)


def run_with_kills(machines: list[Machine], options: dict) -> list[dict]:
    """Train on both machines to the end, with a kill of each on the way; what was seen at each."""
    output_dir, seen = Path(options["output_dir"]), []
    for number, step in KILL_AFTER.items():
        launchers = train_on_both(machines, options)
        wait_for_step(launchers, output_dir, step)
        machines[number].kill()
        start = time.monotonic()
        codes = wait_for_end(launchers)
        reached, checkpoint = len(losses_of(output_dir)), latest_checkpoint(output_dir)
        assert reached < STEPS, "the kill came too late"
        survivor = {"exit_code_of_the_other": codes[1 - number], "which_ended_after_s": round(time.monotonic() - start, 1)}
        survivor |= {"goes_on_from": checkpoint.name if checkpoint else ""}
        seen.append({"killed_machine": number, "after_step": reached} | survivor)
        print(f"machine {number} killed after step {reached}: {survivor}", flush=True)
    codes = wait_for_end(train_on_both(machines, options))
    assert codes == [0, 0], f"after the kills the machines ended with {codes}"
    return seen


def prove(machines: list[Machine], folder: Path) -> dict:
    """What was seen. Raises AssertionError where something does not hold."""
    for index in range(4):
        write_shard(folder / f"train-{index}.tar", {f"{index}-{n}": pair(12 * index + n) for n in range(12)})
    options = OPTIONS | {"train_data": f"{folder}/train-*.tar"}
    whole, undisturbed, killed = (options | {"output_dir": str(folder / name)} for name in ("one", "two", "killed"))

    file = str(ROOT / "training" / "launch" / "cpu-2-processes.yaml")
    one = [*LAUNCH, file, str(ROOT / "training" / "train.py"), *words(whole)]
    cores = ",".join(str(machine.core) for machine in machines)
    codes = wait_for_end([machines[0].start(one, folder / "one-machine.txt", cores)])
    assert codes == [0], f"one machine ended with {codes}"
    expected = same(losses_of(whole["output_dir"]))
    assert len(expected) == STEPS
    print(f"one machine, two processes: {STEPS} steps, loss {expected[0][1]} -> {expected[-1][1]}", flush=True)

    codes = wait_for_end(train_on_both(machines, undisturbed))
    assert codes == [0, 0], f"two machines ended with {codes}"
    sent = [machine.bytes_sent() for machine in machines]
    weights = (Path(undisturbed["output_dir"]) / "export" / "model.safetensors").stat().st_size
    assert min(sent) > STEPS * weights / 2, "gradients have not gone over the cable"
    print(f"two machines, undisturbed: ended with 0, sent {sent} bytes to each other", flush=True)
    kills = run_with_kills(machines, killed)
    results = {"steps": STEPS, "first_and_last_loss": [expected[0][1], expected[-1][1]], "bytes_sent_a_machine": sent}
    results["kills"] = kills
    for name, its_options in (("two_machines", undisturbed), ("two_machines_with_kills", killed)):
        found = same(losses_of(its_options["output_dir"]))
        assert len(found) == STEPS
        results[f"steps_that_differ_on_{name}"] = [a[0] for a, b in zip(expected, found, strict=True) if a != b]
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        print("error: network namespaces need Linux, root, and ip (iproute2)", file=sys.stderr)
        return 2
    machines: list[Machine] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            for number in range(2):
                machines.append(Machine(number, folder))
            a, b = machines
            run("ip", "link", "add", "cable0", "netns", a.name, "type", "veth", "peer", "name", "cable1", "netns", b.name)
            for machine in machines:
                machine.connect(f"cable{machine.number}")
            hosts = ["127.0.0.1 localhost", *(f"{machine.address} {machine.name}" for machine in machines)]
            (folder / "hosts").write_text("\n".join(hosts) + "\n")
            results = prove(machines, folder)
        except (AssertionError, subprocess.SubprocessError) as error:
            for output in sorted(folder.glob("*.txt")):
                print(f"--- {output.name}\n{output.read_text()[-3000:]}", file=sys.stderr)
            print(f"error: {error}", file=sys.stderr)
            return 1
        finally:
            for machine in machines:
                machine.remove()
    print(json.dumps(results, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return int(any(value for key, value in results.items() if key.startswith("steps_that_differ")))


if __name__ == "__main__":
    sys.exit(main())
