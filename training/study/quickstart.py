"""The quickstart's scores with several seeds, gathered from the folders of its runs.

for seed in 0 1 2; do python training/train.py --seed $seed --output_dir runs/quickstart-$seed; done
python -m training.study.quickstart runs/quickstart-0 runs/quickstart-1 runs/quickstart-2
python -m training.study.pages
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from training.study.report import cell, markdown_table, read_results, write_results
from training.study.run import ROOT

RESULTS = ROOT / "docs" / "study" / "quickstart.jsonl"
# Columns of the table, and the metrics that each is the mean of.
COLUMNS = {
    "shape (chance 5.3)": ("zero_shot_shape/top1",),
    "colour (9.1)": ("zero_shot_colour/top1",),
    "unseen pair (3.3)": ("zero_shot_pair/top1",),
    "R@10 (2.5)": ("retrieval_scenes/image_to_text_recall@10", "retrieval_scenes/text_to_image_recall@10"),
}


def result_of(run_dir: Path) -> dict[str, Any]:
    """What is kept of a run: its seed and budget, its machine, and the metrics of the columns."""
    summary = json.loads((run_dir / "eval.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    paths = [metric.split("/") for metrics in COLUMNS.values() for metric in metrics]
    about = {key: config[key] for key in ("seed", "batch_size", "mixed_precision")}
    about |= {key: summary[key] for key in ("steps", "samples_seen", "train_seconds", "hardware", "versions")}
    return about | {"metrics": {f"{name}/{metric}": summary["results"][name][metric] for name, metric in paths}}


def table(file: Path = RESULTS) -> str:
    """A row a seed, and their mean with its standard error, in percent."""
    results = sorted(read_results(file), key=lambda result: result["seed"])
    values = {
        column: [100 * sum(result["metrics"][m] for m in metrics) / len(metrics) for result in results]
        for column, metrics in COLUMNS.items()
    }
    rows = [
        [str(result["seed"]), *(f"{column[number]:.1f}" for column in values.values())] for number, result in enumerate(results)
    ]
    return markdown_table(["seed", *COLUMNS], [*rows, ["mean", *(cell(column, 1) for column in values.values())]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    write_results([result_of(run) for run in parser.parse_args().runs], RESULTS)


if __name__ == "__main__":
    main()
