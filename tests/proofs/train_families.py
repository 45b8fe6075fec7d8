"""Trains a tiny random model of each family on real pairs by the real program: 30 steps, the second half twice.

    python tests/proofs/train_families.py 'DATA/train-{000000..000001}.tar' DATA/val-000000.tar

SigLIP and MetaCLIP 2 are trained in two processes. The loss has to fall. The run that goes on from step 15 has to be the same
to the last bit in losses, evaluation and export. The export has to load as the family's plain class. Exits with 1 otherwise.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from families import BY_TYPE, DUAL_ENCODERS, save_folder
from helpers import as_killed_at, losses_of, same, without_speed, words
from processes import Processes
from transformers import AutoModel

from hf_maskclip.data.sources import open_source
from training.train import program

OPTIONS = {"patch_mask": "pgs", "batch_size": 16, "max_steps": 30, "learning_rate": 3e-3, "warmup_steps": 3, "num_workers": 0}
OPTIONS |= {"mixed_precision": "no", "checkpoint_every": 15}
IN_TWO_PROCESSES = ("siglip", "metaclip_2")


def train(number: int, options: dict, folder: Path) -> None:
    processes = Processes(number, folder, program, words(options))
    codes = processes.wait(1200)
    assert set(codes) == {0}, processes.printed()[-3000:]


def prove(name: str, train_data: str, eval_data: str, folder: Path) -> str:
    """One line on what was seen. Raises AssertionError where something does not hold."""
    captions = list(open_source(train_data).captions(500))
    model = save_folder(name, folder / "model", captions)
    options = OPTIONS | {"model": str(model), "train_data": train_data, "eval_data": eval_data}
    number = 2 if name in IN_TWO_PROCESSES else 1
    whole, resumed = folder / "whole", folder / "resumed"
    train(number, options | {"output_dir": str(whole)}, folder / "printed")
    losses = [step["loss"] for step in losses_of(whole)]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < first - 0.1, losses

    shutil.copytree(whole, resumed)
    as_killed_at(resumed, 15)
    train(number, options | {"resume": "auto", "output_dir": str(resumed)}, folder / "printed-again")
    assert same(losses_of(resumed)) == same(losses_of(whole))
    results = [json.loads((run / "eval.json").read_text())["results"] for run in (whole, resumed)]
    assert results[0], "no evaluation"
    assert without_speed(results[0]) == without_speed(results[1])
    exports = [AutoModel.from_pretrained(run / "export") for run in (whole, resumed)]
    assert type(exports[0]).__name__ == f"{BY_TYPE[name].prefix}Model"
    pairs = zip(exports[0].state_dict().values(), exports[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    recall = next(iter(results[0].values()))["text_to_image_recall@10"]
    return f"{name}: {number} process(es), loss {first:.3f} -> {last:.3f}, recall@10 {recall:.3f}, resumed to the bit"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_data")
    parser.add_argument("eval_data")
    parser.add_argument("--families", nargs="+", choices=DUAL_ENCODERS, default=DUAL_ENCODERS)
    options = parser.parse_args()
    failed = 0
    for name in options.families:
        with tempfile.TemporaryDirectory() as folder:
            try:
                print(prove(name, options.train_data, options.eval_data, Path(folder)), flush=True)
            except AssertionError as error:
                failed += 1
                print(f"{name}: FAILED: {error}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
