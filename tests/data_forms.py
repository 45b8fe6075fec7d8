"""The forms of data that people have. Each function makes one of five pairs in a folder, and returns what names it."""

import json
import tarfile

import datasets
import pyarrow
import pyarrow.parquet
from helpers import pair, write_shard

COUNT = 5
CAPTIONS = [pair(number)["txt"].decode() for number in range(COUNT)]


def put_pictures(folder, numbers=range(COUNT), with_captions: bool = False, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}{suffix}").write_bytes(pair(number)["png"])
        if with_captions:
            (folder / f"{number}.txt").write_bytes(pair(number)["txt"])


def put_parquet(file, columns: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


def put_table(file, rows: list[dict], delimiter: str = ",") -> None:
    lines = [delimiter.join(rows[0]), *(delimiter.join(f'"{value}"' for value in row.values()) for row in rows)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows(path: str = "file_name", text: str = "text", start: str = "") -> list[dict]:
    return [{path: f"{start}{number}.png", text: caption} for number, caption in enumerate(CAPTIONS)]


# ---- The forms: each makes one in a folder, and returns what names it ------------------------------------------------------


def img2dataset_webdataset(folder):
    write_shard(folder / "00000.tar", {f"{n:09d}": pair(n) for n in range(3)})
    write_shard(folder / "00001.tar", {f"{n:09d}": pair(n) for n in range(3, COUNT)})
    for number in range(2):
        put_parquet(folder / f"0000{number}.parquet", {"url": ["https://x/a.jpg"], "caption": ["x"], "status": ["success"]})
        (folder / f"0000{number}_stats.json").write_text("{}")
    return folder


def img2dataset_files(folder):
    put_pictures(folder / "00000", with_captions=True)
    (folder / "00000" / "0.json").write_text("{}")
    put_parquet(folder / "00000.parquet", {"url": ["https://x/a.jpg"], "caption": ["x"]})
    (folder / "00000_stats.json").write_text("{}")
    return folder


def img2dataset_parquet(folder):
    put_parquet(folder / "00000.parquet", {"jpg": [pair(n)["png"] for n in range(COUNT)], "caption": CAPTIONS})
    (folder / "00000_stats.json").write_text("{}")
    return folder


def parquet_of_paths(folder):
    put_pictures(folder / "images")
    put_parquet(folder / "pairs.parquet", {"image": [f"images/{n}.png" for n in range(COUNT)], "text": CAPTIONS})
    return folder / "pairs.parquet"


def parquet_of_lists(folder):
    structs = [[{"bytes": pair(n)["png"], "path": "a.png"}] for n in range(COUNT)]
    put_parquet(folder / "data" / "train-00000.parquet", {"images": structs, "texts": [[c, None] for c in CAPTIONS]})
    put_parquet(folder / "data" / "test-00000.parquet", {"images": structs[:1], "texts": [["of the test"]]})
    return folder


def csv_beside_pictures(folder):
    put_pictures(folder / "img")
    put_table(folder / "train.csv", rows("filepath", "title", "img/"))
    return folder / "train.csv"


def tsv(folder):
    put_pictures(folder)
    put_table(folder / "train.tsv", rows("image", "caption"), "\t")
    return folder / "train.tsv"


def semicolons(folder):
    put_pictures(folder)
    put_table(folder / "train.CSV", rows("Path", "Caption"), ";")
    return folder / "train.CSV"


def bars(folder):
    """As Flickr30k's table: paths start from a folder that it does not name, and a space follows each bar."""
    put_pictures(folder / "pictures")
    lines = [f"{number}.png| {number}| {caption}" for number, caption in enumerate(CAPTIONS)]
    (folder / "results.csv").write_text("\n".join(["image_name| comment_number| comment", *lines]), encoding="utf-8")
    return folder


def paths_of_windows(folder):
    put_pictures(folder / "img" / "a")
    put_table(folder / "train.csv", rows("filepath", "title", "img\\a\\"))
    return folder / "train.csv"


def json_beside_pictures(folder):
    put_pictures(folder)
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.json").write_text(json.dumps({"caption": caption, "width": 32}), encoding="utf-8")
    return folder


def json_lines(folder):
    put_pictures(folder)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("image_path", "caption")))
    return folder / "train.jsonl"


def coco(folder):
    put_pictures(folder)
    images = [{"id": 10 + number, "file_name": f"{number}.png"} for number in range(COUNT)]
    annotations = [{"image_id": 10 + number, "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json"


def kaggle(folder):
    put_pictures(folder / "Images")
    put_table(folder / "captions.txt", rows("image", "caption"))
    return folder


def folder_with_metadata(folder):
    put_pictures(folder / "sub")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(start="sub/")))
    return folder


def folder_with_splits(folder):
    put_pictures(folder / "train")
    put_table(folder / "train" / "metadata.csv", rows())
    put_pictures(folder / "test", range(2))
    put_table(folder / "test" / "metadata.csv", rows(text="text")[:2])
    return folder


def folder_with_metadata_parquet(folder):
    put_pictures(folder)
    put_parquet(folder / "metadata.parquet", {"file_name": [f"{n}.png" for n in range(COUNT)], "text": CAPTIONS})
    return folder


def linked_folders(folder):
    put_pictures(folder / "elsewhere", range(2, COUNT), with_captions=True)
    put_pictures(folder / "photos", range(2), with_captions=True)
    (folder / "photos" / "more").symlink_to(folder / "elsewhere")
    (folder / "photos" / "loop").symlink_to(folder / "photos")
    return folder / "photos"


def other_endings(folder):
    for number, suffix in enumerate((".JPG", ".bmp", ".tif", ".jfif", ".gif")):
        put_pictures(folder, [number], suffix=suffix)
        (folder / f"{number}.{'TXT' if number == 0 else 'txt'}").write_bytes(pair(number)["txt"])
    return folder


def other_endings_in_a_tar(folder):
    endings = ("BMP", "tif", "jp2", "gif", "avif")
    samples = {str(n): {ending: pair(n)["png"], "txt": pair(n)["txt"]} for n, ending in enumerate(endings)}
    write_shard(folder / "a.TAR", samples)
    return folder / "a.TAR"


def nested_tars(folder):
    for number in range(COUNT):
        (folder / str(number % 2)).mkdir(exist_ok=True)
        write_shard(folder / str(number % 2) / f"{number}.tar", {str(number): pair(number)})
    return folder


def a_glob_through_folders(folder):
    return f"{nested_tars(folder)}/**/*.tar"


def several_paths(folder):
    for number in range(COUNT):
        write_shard(folder / f"{number}.tar", {str(number): pair(number)})
    return "::".join(str(folder / f"{number}.tar") for number in range(COUNT))


def an_odd_name(folder):
    put_pictures(folder / "photos [2024] {a,b} *", with_captions=True)
    return folder / "photos [2024] {a,b} *"


def saved_to_disk(folder):
    table = {"image": [{"bytes": pair(n)["png"], "path": None} for n in range(COUNT)], "text": CAPTIONS}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    data = datasets.Dataset.from_dict(table, features=features)
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


def tar_bz2(folder):
    write_shard(folder / "a.tar", {str(n): pair(n) for n in range(COUNT)})
    with tarfile.open(folder / "a.tar") as source, tarfile.open(folder / "b.tar.bz2", "w:bz2") as packed:
        for member in source:
            packed.addfile(member, source.extractfile(member))
    return folder / "b.tar.bz2"


FORMS = (
    *(
        img2dataset_webdataset,
        img2dataset_files,
        img2dataset_parquet,
        parquet_of_paths,
        parquet_of_lists,
        csv_beside_pictures,
        tsv,
    ),
    *(semicolons, json_lines, coco, kaggle, folder_with_metadata, folder_with_splits, folder_with_metadata_parquet),
    *(linked_folders, other_endings, other_endings_in_a_tar, nested_tars, a_glob_through_folders, several_paths, an_odd_name),
    *(saved_to_disk, tar_bz2, bars, paths_of_windows, json_beside_pictures),
)
