"""The first batch after going on early and late in an epoch: seconds, and what is read for it.

    python training/benchmarks/resume.py

20,000 pairs of small pictures in 20 tar files, from a disk and from a web server on this machine. A reader goes on at 5 % and
at 95 % of the epoch, turn by turn.
"""

import io
import statistics
import tarfile
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from measure import arguments, print_table, side_by_side
from PIL import Image

from hf_maskclip.data.decoding import PairDecoder
from hf_maskclip.data.sources import open_files
from training.data.batches import PairBatches
from training.data.forms import PairForm, train_transform
from training.data.pairs import PairSource
from training.data.shuffling import shard_stream
from training.data.text_masking import TextMask
from training.data.windows import Place, Windows
from training.model.tokenizer import train_tokenizer

SHARDS, SAMPLES = 20, 1000
IMAGE_SIZE, CONTEXT_LENGTH = 64, 77
WINDOW = 2000  # the default of --shuffle_buffer
PLACES = {"5 %": 0.05, "95 %": 0.95}

parser = arguments("The first batch after going on early and late in an epoch.")
options = parser.parse_args()


def write_shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for number in range(SAMPLES):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(256, size=(IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)).save(buffer, "JPEG")
                caption = f"thing number {number} of {shard}".encode()
                for extension, content in (("jpg", buffer.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{shard:02d}-{number:04d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


class Handler(SimpleHTTPRequestHandler):
    """Serves the shards, and counts the bytes that it sends."""

    sent = 0

    def copyfile(self, source, outputfile) -> None:
        while piece := source.read(65_536):
            try:
                outputfile.write(piece)
            except ConnectionError:
                return  # the reader has what it wanted
            Handler.sent += len(piece)

    def log_message(self, *arguments: Any) -> None:
        pass


def first_batch(open_epoch, tokenizer, place: Place) -> None:
    form = PairForm(PairDecoder(image_size=IMAGE_SIZE), train_transform(IMAGE_SIZE, 0.9, 0.5), TextMask("none", CONTEXT_LENGTH))
    source = PairSource(open_epoch, lambda step: form, WINDOW)
    batches = PairBatches([source], tokenizer, options.batch_size, 0, places={0: (place,)})
    next(iter(batches))


rows = []
with tempfile.TemporaryDirectory() as folder:
    write_shards(Path(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tokenizer = train_tokenizer(["thing number 1 of 2"] * 20, vocab_size=1000, context_length=CONTEXT_LENGTH)
    for where, spec in {"disk": folder, "web": f"http://127.0.0.1:{server.server_port}"}.items():
        open_epoch = partial(
            shard_stream, open_files(f"{spec}/{{00..19}}.tar"), process=0, num_processes=1, num_workers=0, seed=0
        )
        passed = [place for _, place in Windows(open_epoch, WINDOW, [0, 0, 0]).epoch_from(Place())]
        places = {name: passed[round(share * len(passed)) - 1] for name, share in PLACES.items()}
        steps = {name: partial(first_batch, open_epoch, tokenizer, place) for name, place in places.items()}
        times = side_by_side(steps, options.rounds, "cpu")
        for name, step in steps.items():
            seconds, first = (statistics.median(times[key]) for key in (name, "5 %"))
            Handler.sent = 0
            step()
            sent = f"{Handler.sent / 1e6:.1f}" if where == "web" else ""
            numbers = {"first batch, s": f"{seconds:.2f}", "times 5 %": f"{seconds / first:.2f}", "MB sent": sent}
            rows.append({"from": where, "goes on at": name} | numbers)
    server.shutdown()
title = f"{SHARDS * SAMPLES} samples in {SHARDS} shards, windows of {WINDOW}, batches of {options.batch_size}"
print_table(title, rows, options.output)
