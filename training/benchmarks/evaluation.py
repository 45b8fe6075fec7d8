"""Zero-shot classification of a folder, beside clip_benchmark with the same weights, in images per second.

    python training/benchmarks/evaluation.py --model runs/quickstart/export --data DATA/wds_emoji_categories

The time is that of the whole task: reading, decoding and encoding of all pictures, encoding of all prompts, scores. It is
measured in float32, and in bfloat16: ours with bfloat16 weights, clip_benchmark with its default, autocast. Each has the
batches that it makes by default (clip_benchmark: 64). clip_benchmark is
left out where it is not installed (it needs numpy < 2.4, so an environment of its own).
"""

import io
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial

import torch
from measure import arguments, print_table, ratio, side_by_side
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPProcessor

from hf_maskclip import MaskCLIPModel
from hf_maskclip.conversion.open_clip import export_to_open_clip
from hf_maskclip.evaluation import Encoder
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.evaluation.runner import run_evaluations

parser = arguments("Zero-shot classification of a folder, beside clip_benchmark with the same weights.", model="")
parser.add_argument("--data", required=True, help="classification folder in clip-benchmark's layout")
parser.add_argument("--num_workers", type=int, default=1, help="clip_benchmark's data workers, no more than there are shards")
options = parser.parse_args()
if not options.model:
    parser.error("--model: the folder of a CLIP, such as an export")
if options.quick:
    options.rounds = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ours(precision: str) -> int:
    """Returns the number of pictures."""
    encoder = Encoder(models[precision], processor)
    evaluations = find_evaluations(options.data, Request("zero_shot_classification"))
    ((_, record),) = run_evaluations(encoder, evaluations)
    return record["n"]


def theirs(precision: str) -> None:
    name = "wds/" + os.path.basename(options.data.rstrip("/")).removeprefix("wds_")
    dataset = build_dataset(name, root=options.data, transform=transform, split="test", task="zeroshot_classification")
    batches = dataset.batched(options.batch_size)
    batches.classes = dataset.classes
    images = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=options.num_workers)
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        zeroshot_classification.evaluate(
            peer, images, tokenizer, dataset.classes, dataset.templates, options.device, amp=precision == "bfloat16"
        )


processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model))
models = {
    precision: MaskCLIPModel.from_pretrained(options.model, dtype=dtype).to(options.device)
    for precision, dtype in DTYPES.items()
}
tasks: dict[str, Callable[[], object]] = {f"hf_maskclip, {precision}": partial(ours, precision) for precision in DTYPES}
try:
    import open_clip
    from clip_benchmark.datasets.builder import build_dataset
    from clip_benchmark.metrics import zeroshot_classification

    with tempfile.TemporaryDirectory() as folder:
        export_to_open_clip(models["float32"], folder, processor)
        peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", device=options.device)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    peer.eval()
    tasks |= {f"clip_benchmark, {precision}": partial(theirs, precision) for precision in DTYPES}
except ImportError as error:
    print(f"clip_benchmark is left out ({error})")

num_pictures = ours("float32")
times = side_by_side(tasks, options.rounds, options.device)
rows = []
for task, seconds_of_task in times.items():
    peer_times = times.get(f"clip_benchmark, {task.split(', ')[1]}")
    faster = "{:.2f} ({:.2f} to {:.2f})".format(*ratio(peer_times, seconds_of_task)) if peer_times else ""
    speed = f"{num_pictures / statistics.median(seconds_of_task):.0f}"
    rows.append({"evaluation": task, "images/s": speed, "times clip_benchmark's speed": faster})
print_table(f"{num_pictures} pictures, medians of {options.rounds}", rows, options.output)
