"""What options choose from, known before anything heavy is imported, so that --help answers at once."""

from pathlib import Path

TASKS = ("zero_shot_classification", "retrieval", "linear_probe", "compositionality")
SUITES = ("scenes", "paper")
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
QUICKSTART_MODEL = "runs/quickstart/export"
SOLVERS = ("gradient_descent", "logistic_regression")


def built_in_masks() -> list[str]:
    """The names of this package's patch masks: each has a file `models/patch_masking_<name>.py`."""
    prefix = "patch_masking_"
    return sorted(path.stem.removeprefix(prefix) for path in Path(__file__).with_name("models").glob(f"{prefix}*.py"))
