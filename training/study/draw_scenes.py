"""Write training scenes as parquet files, so that runs that share them do not each spend time on drawing.

    python -m training.study.draw_scenes --output_dir runs/scenes --samples 32768

Pictures are the first of the training split of `--train_data scenes`, at the size of the presets tiny-96 and small, as JPEGs of
quality 95 with one caption each.
"""

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from datasets.utils.logging import disable_progress_bar

from hf_maskclip.data.scene_drawing import draw_scene
from hf_maskclip.data.scenes import caption_scene, sample_scene

FEATURES = Features({"image": Image(), "caption": Value("string")})


def drawn_pairs(start: int, stop: int, image_size: int) -> Iterator[dict[str, object]]:
    """Rows of `FEATURES` for the scenes of these indices."""
    for index in range(start, stop):
        scene = sample_scene(index)
        content = io.BytesIO()
        draw_scene(scene, image_size)[0].save(content, "JPEG", quality=95)
        yield {"image": {"bytes": content.getvalue()}, "caption": caption_scene(scene, np.random.default_rng(index))}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets scenes-00000.parquet and so on")
    parser.add_argument("--samples", type=int, default=32768)
    parser.add_argument("--samples_per_file", type=int, default=4096)
    parser.add_argument("--image_size", type=int, default=96, help="side in pixels")
    options = parser.parse_args(arguments)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    disable_progress_bar()
    for number, start in enumerate(range(0, options.samples, options.samples_per_file)):
        stop = min(start + options.samples_per_file, options.samples)
        rows = list(drawn_pairs(start, stop, options.image_size))
        Dataset.from_list(rows, features=FEATURES).to_parquet(options.output_dir / f"scenes-{number:05d}.parquet")
    print(f"{options.samples} scenes: {options.output_dir}")


if __name__ == "__main__":
    main(sys.argv[1:])
