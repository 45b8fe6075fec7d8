"""Images per second and core of the training data loader, beside those of others, on the same shards.

    python training/benchmarks/loader.py               # photographs of 640 x 480 pixels, cropped to 224
    python training/benchmarks/loader.py --shards 'cc12m/{00000..00009}.tar'

Without `--shards` it writes its own: JPEGs with the spectrum of photographs, and captions. The loaders read the tars, decode,
crop at random, resize with bicubic interpolation and tokenise. They take turns in one process on one core, without workers,
whose prefetching would go on in the others' turn; workers multiply what is measured here. Ours hands over bytes, which the
device normalises; open_clip's transform normalises at once. The first row is no loader: it decodes and resizes what is in
memory, as ours does, which bounds it.
"""

import os
import statistics
import sys
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path

import datasets
import torch
from measure import arguments, print_table, ratio, side_by_side
from photographs import write_shards
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor

from hf_maskclip.data.decoding import PairDecoder
from hf_maskclip.data.pictures import decode_image
from hf_maskclip.data.sources import open_files
from hf_maskclip.data.specs import expand_braces
from training.data.batches import PairBatches
from training.data.forms import CropTransform, PairForm
from training.data.loader import build_loader
from training.data.pairs import PairSource
from training.data.shuffling import shard_stream
from training.data.text_masking import TextMask
from training.model.tokenizer import train_tokenizer

IMAGE_SIZE, CROP_SCALE, CONTEXT_LENGTH = 224, 0.9, 77
PEER, BOUND = "webdataset + open_clip", "decoding + resizing"

parser = arguments("Images per second and core of the training data loader, beside those of others.")
parser.add_argument("--shards", help="tars of JPEGs and captions, as a brace pattern; empty: made for the occasion")
parser.add_argument("--samples", type=int, default=1024, help="images a measurement")
options = parser.parse_args()
if options.quick:
    options.samples, options.rounds = 512, 3


def our_loader(shards: str, tokenizer):
    one_reader = {"process": 0, "num_processes": 1, "num_workers": 0, "seed": 0}
    open_epoch = partial(shard_stream, open_files(shards), **one_reader)
    decoder = PairDecoder(image_size=IMAGE_SIZE, crop_scale=CROP_SCALE)
    transform = CropTransform(IMAGE_SIZE, CROP_SCALE, flip=0.0)
    form = PairForm(decoder, transform, TextMask("none", CONTEXT_LENGTH))
    return build_loader(
        PairBatches([PairSource(open_epoch, lambda step: form, 500)], tokenizer, options.batch_size, 0), num_workers=0
    )


def webdataset_loader(shards: str):
    import open_clip
    import webdataset

    transform = open_clip.image_transform(IMAGE_SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    dataset = webdataset.DataPipeline(
        webdataset.SimpleShardList(expand_braces(shards)),
        webdataset.tarfile_to_samples(),
        webdataset.shuffle(500),
        webdataset.decode("pilrgb"),
        webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
        webdataset.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
        webdataset.to_tuple("image", "text"),
        webdataset.batched(options.batch_size, partial=False),
    )
    return torch.utils.data.DataLoader(dataset.repeat(), batch_size=None)


def datasets_loader(shards: str):
    import open_clip

    transform = open_clip.image_transform(IMAGE_SIZE, is_train=True)
    tokenizer = open_clip.get_tokenizer("ViT-B-16")
    stream = datasets.load_dataset("webdataset", data_files=expand_braces(shards), split="train", streaming=True)
    stream = stream.shuffle(seed=0, buffer_size=500)

    def pair(row):
        return {"image": transform(row["jpg"]), "text": tokenizer(row["txt"])[0]}

    stream = stream.map(pair, remove_columns=stream.column_names).repeat(None)
    return torch.utils.data.DataLoader(stream, batch_size=options.batch_size)


def decode_and_resize(contents: list[bytes]) -> None:
    """What any loader has to do to pictures that are in memory."""
    for content in contents:
        pixels = pil_to_tensor(decode_image(content, IMAGE_SIZE, CROP_SCALE))  # (3, H, W)
        interpolate(pixels[None], (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True)


def consume(iterator) -> None:
    for _ in range(options.samples // options.batch_size):
        next(iterator)


torch.set_num_threads(1)
if sys.platform == "linux":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the thread that reads ahead counts, too
with tempfile.TemporaryDirectory() as folder:
    shards = options.shards or write_shards(Path(folder), count=8, samples=256)
    tokenizer = train_tokenizer(
        ["a photograph of thing number 1 in place 2"] * 20, vocab_size=1000, context_length=CONTEXT_LENGTH
    )
    loaders = {
        "hf_maskclip": iter(our_loader(shards, tokenizer)),
        PEER: iter(webdataset_loader(shards)),
        "🤗 Datasets + open_clip": iter(datasets_loader(shards)),
    }
    contents = [row["jpg"] for row in islice(open_files(shards), options.samples // options.batch_size * options.batch_size)]
    measured = {BOUND: lambda: decode_and_resize(contents)}
    measured |= {name: lambda it=iterator: consume(it) for name, iterator in loaders.items()}
    times = side_by_side(measured, options.rounds, "cpu")

rows = []
for name in measured:
    per_core = options.samples / statistics.median(times[name])
    faster, share = ("{:.2f} ({:.2f} to {:.2f})".format(*ratio(times[other], times[name])) for other in (PEER, BOUND))
    columns = {"images/s per core": f"{per_core:.0f}", f"times {PEER}": faster, f"times {BOUND}": share}
    rows.append({"loader": name} | columns)
print_table(f"one core, {options.samples} images a measurement, medians of {options.rounds}", rows, options.output)
