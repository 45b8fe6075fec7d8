"""Proves that the forms of data that people have are read: every pair once, whatever lies beside; that what gives no pair is
counted; and that what is not taken is one line that leads on."""

import io
import json
import re
import tarfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from data_forms import (
    CAPTIONS,
    COUNT,
    FORMS,
    folder_with_splits,
    parquet_of_lists,
    put_parquet,
    put_pictures,
    put_table,
    rows,
    saved_to_disk,
)
from helpers import pair, random_picture, write_shard

from hf_maskclip.data.decoding import PairDecoder
from hf_maskclip.data.pictures import SkippedSample
from hf_maskclip.data.source import Source
from hf_maskclip.data.sources import open_files, open_source
from hf_maskclip.data.specs import HubDataSet, patterns_of
from hf_maskclip.errors import ConfigError
from training.data.batches import PairBatches
from training.data.forms import PairForm, train_transform
from training.data.pairs import PairSource
from training.data.shuffling import shard_stream
from training.data.text_masking import TextMask

ROOT = Path(__file__).resolve().parents[1]


def read(spec, split: str = "train") -> tuple[list[str], Counter]:
    """The captions of all pairs of a source, sorted, and the causes of what gives none."""
    decoder, captions, causes = PairDecoder(), [], Counter()
    for row in open_files(str(spec), split):
        try:
            _, caption = decoder(row, np.random.default_rng(0))
            captions.append(caption)
        except SkippedSample as skipped:
            causes[str(skipped)] += 1
    return sorted(captions), causes


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_each_pair_of_each_form_is_read_once(form, tmp_path):
    spec = form(tmp_path)
    assert read(spec) == (sorted(CAPTIONS), Counter())
    Source(str(spec), open_files(str(spec)), PairDecoder()).check()


@pytest.mark.parametrize("form", [folder_with_splits, parquet_of_lists, saved_to_disk], ids=lambda form: form.__name__)
def test_the_split_that_is_asked_for_is_read(form, tmp_path):
    captions, _ = read(form(tmp_path), "test")
    assert 0 < len(captions) < COUNT


CODE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("code", CODE, ids=lambda code: re.search(r'data = "(.*)"', code)[1])
def test_training_sees_each_pair_of_the_forms_of_the_documentation_once_an_epoch(code, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    for number in range(8):
        random_picture(number).convert("RGB").save(f"made/{number}.jpg")
    names: dict = {}
    exec(compile(code, "data.md", "exec"), names)
    source = open_source(names["data"])
    source.check()
    split = {"process": 0, "num_processes": 1, "num_workers": 0, "seed": 0}
    form = PairForm(source.decoder, train_transform(32, 0.9, 0.5), TextMask("none", 16))
    batches = PairBatches([PairSource(partial(shard_stream, source.stream, **split), lambda step: form)], tokenizer, 2, 0)
    first = list(islice(batches, 8))  # two epochs
    assert [(batch.ends[0].epoch, batch.ends[0].used) for batch in first] == [
        (epoch, number) for epoch in (0, 1) for number in (2, 4, 6, 8)
    ]
    for epoch in (first[:4], first[4:]):
        assert len({key for batch in epoch for key in batch.keys}) == 8
    assert {key for batch in first[:4] for key in batch.keys} == {key for batch in first[4:] for key in batch.keys}


def test_large_tables_and_saved_sets_have_shards_to_split(tmp_path):
    rows_of_table = [{"file_name": "a.png", "text": f"a {number}"} for number in range(1000)]
    put_table(tmp_path / "pairs.csv", rows_of_table)
    stream = open_files(str(tmp_path / "pairs.csv"))
    assert stream.num_shards == 4
    assert [row["text"] for row in stream] == [row["text"] for row in rows_of_table]
    assert len({row["__key__"] for row in stream}) == 1000


# ---- What gives no pair is counted -----------------------------------------------------------------------------------------


def test_files_that_are_not_there_are_counted(tmp_path):
    put_pictures(tmp_path, range(3))
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    assert read(tmp_path) == (sorted(CAPTIONS[:3]), Counter(file_unreadable=2))


def test_pictures_of_forms_that_pillow_does_not_open_are_counted(tmp_path):
    put_pictures(tmp_path, range(3), with_captions=True)
    for name in ("a.heic", "b.HEIF", "c.jxl", "d.svg"):
        (tmp_path / name).write_bytes(b"not for Pillow")
        (tmp_path / name).with_suffix(".txt").write_text("a ball")
    assert read(tmp_path) == (sorted(CAPTIONS[:3]), Counter(image_undecodable=4))


def test_a_line_that_is_no_json_costs_itself(tmp_path):
    put_pictures(tmp_path)
    lines = [json.dumps(row) for row in rows()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:2], '{"half', "[1]", *lines[2:]]))
    assert read(tmp_path / "a.jsonl") == (sorted(CAPTIONS), Counter(json_undecodable=2))


def test_a_table_in_another_encoding_costs_the_rows_that_it_hits(tmp_path):
    put_pictures(tmp_path)
    text = "file_name,text\n0.png,a caf\u00e9\n1.png,a ball\n"
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    assert read(tmp_path / "a.csv") == (["a ball"], Counter(caption_not_utf8=1))
    (tmp_path / "b.csv").write_bytes(text.encode("utf-16"))
    assert read(tmp_path / "b.csv") == (["a ball", "a caf\u00e9"], Counter())


# ---- What is not taken -----------------------------------------------------------------------------------------------------


def only_addresses(folder):
    put_parquet(folder / "laion.parquet", {"URL": ["https://x/a.jpg"], "TEXT": ["a ball"]})
    return folder


def a_zip(folder):
    (folder / "photos.zip").write_bytes(b"PK")
    return folder


def two_kinds(folder):
    write_shard(folder / "a.tar", {"0": pair(0)})
    put_parquet(folder / "b.parquet", {"image": [pair(0)["png"]], "text": ["a ball"]})
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (only_addresses, "the parquet files hold no pictures .columns URL, TEXT.: img2dataset downloads"),
        (a_zip, "photos.zip has to be unpacked"),
        (two_kinds, "mixes parquet files and tar files; give one kind of data"),
        (lambda folder: folder / "a.rar", "there is no"),
        (lambda folder: "nothing://bucket/a.tar", "cannot be read|Protocol not known"),
    ],
)
def test_what_is_not_taken_is_one_line_that_leads_on(make, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as error:
        open_source(str(make(tmp_path))).check()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("a.png", "png"), ("b.png", "png"), ("a.txt", "txt"), ("b.txt", "txt")], "side by side .tar --sort=name."),
        ([], "there are no samples in it"),
        ([("a.cls", "cls")], "the samples have the fields cls: name them by --image_key and --caption_key"),
        ([("a.url", "url")], "the pictures are addresses: download them first"),
        ([("a.png", "png")], "a picture's caption is a text file of its name beside it, or a row of a table"),
    ],
)
def test_a_tar_without_pairs_says_what_to_do(files, message, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, field in files:
            content = pair(0).get(field, b"x")
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    with pytest.raises(ConfigError, match=message):
        open_source(str(tmp_path / "a.tar")).check()


def test_shards_that_cannot_be_read_at_all_end_the_check_at_once(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.tar").write_text("<html>not found</html>")
    with pytest.raises(ConfigError, match=r"first 5 samples \(shard_unreadable 5\); no shard can be read") as error:
        open_source(str(tmp_path)).check()
    assert "image_key" not in str(error.value)


# ---- Names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "patterns"),
    [
        ("a.tar::b.tar", ["a.tar", "b.tar"]),
        ("{a,b}.tar::c.tar", ["a.tar", "b.tar", "c.tar"]),
        ("zip://x.jpg::https://host/b.zip", ["zip://x.jpg::https://host/b.zip"]),
        ("s3://b/0.tar::s3://b/1.tar", ["s3://b/0.tar", "s3://b/1.tar"]),
        ("https://host/0.tar?token=a", ["https://host/0.tar?token=a"]),
    ],
)
def test_several_paths_are_written_in_one(spec, patterns):
    assert patterns_of(spec) == patterns


def test_a_home_directory_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_shard(tmp_path / "a.tar", {"0": pair(0)})
    assert read("~/a.tar")[0] == [CAPTIONS[0]]


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:en", ("org/name", "en", None)),
        ("org/name@test", ("org/name", None, "test")),
        ("org/name:en@test[:10%]", ("org/name", "en", "test[:10%]")),
    ],
)
def test_a_hub_data_set_is_named_with_configuration_and_split(name, parsed):
    assert HubDataSet.parse(name) == parsed
