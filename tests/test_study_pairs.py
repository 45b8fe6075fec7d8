"""Proves that the study's real pairs are made of public packages alone: nothing that is held out is trained on, runs give equal
bytes, a package that is absent or another one is an error of one line, and the project reads what is written."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import encode_image, random_picture
from made_up_packages import ANIMALS, PLACES, drawings_and_pictures, emoji_files, tar_bytes, write_deb
from PIL import Image

from hf_maskclip.data.sources import open_source
from hf_maskclip.errors import ConfigError
from hf_maskclip.evaluation import Encoder
from hf_maskclip.evaluation.datasets.find import Request, find_evaluations
from hf_maskclip.evaluation.datasets.pairs import PairKeys
from hf_maskclip.evaluation.runner import run_evaluations
from training.study import pair_clip_art, pair_files
from training.study.pair_clip_art import Drawing, is_held_out, keywords_of, title_of
from training.study.pair_emoji import Emoji, groups_of_variants, retrieval_samples
from training.study.pair_files import Package, read_package
from training.study.pairs import main, make_pairs


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> dict[str, Package]:
    """Packages that a tool copies into its working directory, as apt-get and npm do."""
    folder = tmp_path_factory.mktemp("registry")
    drawings, pictures = drawings_and_pictures()
    write_deb(folder / "drawings.deb", drawings)
    write_deb(folder / "pictures.deb", pictures)
    for style in ("google", "twitter"):
        (folder / f"{style}.tgz").write_bytes(tar_bytes(emoji_files(style), "w:gz"))
    copy = "import shutil, sys; shutil.copy(sys.argv[1], '.')"
    return {
        file.stem: Package((sys.executable, "-c", copy, str(file)), file.name, hashlib.sha256(file.read_bytes()).hexdigest())
        for file in sorted(folder.iterdir())
    }


@pytest.fixture(scope="module")
def made(packages, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "clipart").mkdir()
    (folder / "clipart" / "train-000007.tar").write_text("of a former run")
    summary = make_pairs(folder, packages)
    assert "\n" not in summary
    assert str(folder) in summary
    return folder


def samples_of(folder: Path, pattern: str) -> list[dict[str, bytes]]:
    """Samples as their files by suffix."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob(pattern)):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, suffix = member.name.split(".")
                samples.setdefault(f"{shard}/{key}", {})[suffix] = tar.extractfile(member).read()
    assert samples
    return list(samples.values())


def about(samples: list[dict[str, bytes]]) -> list[dict]:
    return [json.loads(sample["json"]) for sample in samples]


# ---- Packages --------------------------------------------------------------------------------------------------------------


def test_a_package_is_read_without_the_tool_that_fetched_it(tmp_path):
    write_deb(tmp_path / "a.deb", {"./usr/a.svg": b"one", "./usr/b.txt": b"two"})
    (tmp_path / "a.tgz").write_bytes(tar_bytes({"package/a.svg": b"three"}, "w:gz"))
    assert list(read_package(tmp_path / "a.deb", r"usr/(.+)\.svg")) == [("a", b"one")]
    assert list(read_package(tmp_path / "a.deb", r"(.*link.*)")) == []
    assert list(read_package(tmp_path / "a.tgz", r"package/(.+)\.svg")) == [("a", b"three")]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("no-such-tool", "download", "a"), "no-such-tool: is not installed, and no-such-tool download a needs it"),
        ((sys.executable, "-c", "raise SystemExit('E: no\\nnetwork')"), "failed (E: no network)"),
        ((sys.executable, "-c", "pass"), "gave no a_*.deb"),
    ],
)
def test_a_package_that_cannot_be_had_is_one_line_that_says_what_to_do(tmp_path, command, said):
    with pytest.raises(ConfigError) as error:
        Package(command, "a_*.deb", "0").fetch(tmp_path)
    assert said in str(error.value)
    assert str(error.value).endswith(f"put a_*.deb into {tmp_path} by hand")
    assert "\n" not in str(error.value)


def test_a_file_that_is_there_needs_no_tool_but_its_checksum(tmp_path):
    (tmp_path / "a_1.deb").write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()
    assert Package(("no-such-tool",), "a_*.deb", right).fetch(tmp_path) == tmp_path / "a_1.deb"
    with pytest.raises(ConfigError, match=f"a_1.deb: has the SHA256 {right}, not {'0' * 64}; remove the file") as error:
        Package(("no-such-tool",), "a_*.deb", "0" * 64).fetch(tmp_path)
    assert "\n" not in str(error.value)


def test_the_program_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_files.shutil, "which", lambda tool: None)
    with pytest.raises(SystemExit, match="^error: apt-get: is not installed, .* needs it; .* by hand$"):
        main(["--output_dir", str(tmp_path / "pairs")])
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="^error: output_dir=.*file.*: cannot be used"):
        main(["--output_dir", str(tmp_path / "file")])


# ---- Clip art --------------------------------------------------------------------------------------------------------------


def test_no_held_out_drawing_is_trained_on(made):
    train, val = samples_of(made, "clipart/train-*.tar"), samples_of(made, "clipart/val-*.tar")
    assert len(val) > 5
    for key in ("jpg", "txt"):
        held_out = {sample[key] for sample in val}
        assert len(held_out) == len(val)
        assert not held_out & {sample[key] for sample in train}
    titles, held_out = ({each["title"].removesuffix(" black and white") for each in about(of)} for of in (train, val))
    assert not titles & held_out
    assert len(val) == len({each["title"] for each in about(val)}) > len(held_out)  # the copies of some are there, too


def test_unusable_drawings_are_left_out_and_a_title_has_at_most_ten(made):
    both = about(samples_of(made, "clipart/*.tar"))
    sources = [each["source"] for each in both]
    expected = {f"{animal} {place}{end}" for animal in ANIMALS for place in PLACES for end in ("", " black and white")}
    assert {each["title"] for each in both} - {"equal"} == expected | {"zebra"}
    assert sum(source.startswith("people/") for source in sources) == 10
    assert sources.count("animals/ant_attic.png") + sources.count("left/equal.png") == 1  # they are one picture
    assert {source for source in sources if source.startswith("left/")} <= {"left/equal.png"}
    assert {each["title"] for each in both if each["category"] == "people"} == {"zebra"}


def test_pictures_lie_over_white_and_are_made_smaller_only():
    large = Image.new("RGBA", (400, 200), (0, 0, 0, 0))
    large.paste((255, 0, 0, 255), (0, 0, 200, 200))
    with Image.open(io.BytesIO(pair_clip_art.as_jpeg(encode_image(large)))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (160, 80))
        assert min(picture.getpixel((150, 40))) > 250
    small = pair_clip_art.as_jpeg(encode_image(random_picture(0, (30, 20))))
    assert Image.open(io.BytesIO(small)).size == (30, 20)


@pytest.mark.parametrize(
    ("source", "title", "is_collection", "expected"),
    [
        ("food/pie_01", "Apple_pie 2", False, "apple pie"),
        ("food/pie_bw", "Pie (B and W)", False, "pie black and white"),
        ("food/pear_01", "Clipart by Ann Example - pear", False, "pear"),
        ("food/hot_dog_ann_exam_01", "Various", True, "hot dog"),
        ("food/HotDog3", "", False, "hot dog"),
        ("flags/africa/kenya", "kenya", False, "kenya flag"),
        ("flags/africa/kenya", "Flag of Kenya", False, "flag of kenya"),
        ("food/12_ann_01", "7", False, ""),
    ],
)
def test_a_title_is_words(source, title, is_collection, expected):
    assert title_of(source, Drawing(title, (), "ann example", True), is_collection) == expected


def test_keywords_are_at_most_two_and_add_something_to_the_title():
    keywords = (
        "hash",
        "",
        "flags",
        "example",
        "united_nations_member",
        "africa",
        "north east coast line",
        "0x9a",
        "east",
        "sea",
    )
    found = keywords_of("a", Drawing("", keywords, "ann example", True), "kenya flag")
    assert len(found) == 2
    assert set(found) < {"africa", "east", "sea"}


def test_variants_of_a_title_are_on_one_side():
    titles = [f"{animal} {place}" for animal in ANIMALS for place in PLACES]
    assert 2 < sum(map(is_held_out, titles)) < 25
    for title in titles:
        first, second = title.split()
        assert {is_held_out(f"{second} of the red {first}"), is_held_out(f"{title} black and white")} == {is_held_out(title)}


# ---- Emoji -----------------------------------------------------------------------------------------------------------------


def test_no_held_out_emoji_is_trained_on_in_any_style(made):
    train = samples_of(made, "emoji/train-*.tar")
    held_out = set((made / "emoji" / "heldout_codepoints.txt").read_text().split())
    trained = {each["codepoints"] for each in about(train)}
    assert len(held_out) == 2 + 2 + 6
    assert not held_out & trained
    assert len(train) == 2 * len(trained) == 2 * (52 - len(held_out))  # no skin tone
    assert {each["style"] for each in about(train)} == {"google", "twitter"}
    tests = samples_of(made, "emoji/wds_emoji_retrieval/test/0.tar")
    known = {caption for each in about(train) for caption in each["captions"]}
    captions = [caption for sample in tests for caption in sample["txt"].decode().split("\n")]
    assert len(tests) == len(held_out)
    assert len(captions) == len(set(captions)) >= 3 * len(tests)
    assert not known & set(captions)
    assert not {sample["png"] for sample in tests} & {sample["png"] for sample in train}


def test_variants_of_an_emoji_are_on_one_side(made):
    held_out = set((made / "emoji" / "heldout_codepoints.txt").read_text().split())
    jobs = {code.split("-")[-1] for code in held_out if "200d" in code}
    assert len(jobs) == 2
    assert all(f"{person}-200d-{job}" in held_out for job in jobs for person in ("1f468", "1f469", "1f9d1"))


def emoji_of(name: str, code: str, picture: int, category: str = "Objects", short: str = "") -> Emoji:
    about = {"name": name, "unified": code, "short_names": [short or name], "category": category, "subcategory": "tool"}
    return Emoji(about, {"google": random_picture(picture)})


@pytest.mark.parametrize(
    ("others", "sizes"),
    [
        ([("UNLIKE", "1F475", 1)], [1, 1]),
        ([("OLDER WOMAN", "1F475", 1)], [2]),
        ([("GRANNY", "1F469-200D-1F474", 1)], [2]),
        ([("UNLIKE", "1F475", 0)], [2]),
        ([("UNLIKE", "1F475", 1), ("UNLIKE MAN", "1F476", 0)], [3]),
        ([("UNLIKE", "1F475", 1), ("OTHER", "1F476", 1)], [1, 2]),
    ],
    ids=["alone", "name", "code points", "picture", "by another", "of others"],
)
def test_variants_share_a_name_code_points_or_a_picture(others, sizes):
    groups = groups_of_variants([emoji_of("OLDER MAN", "1F474", 0), *(emoji_of(*other) for other in others)])
    assert sorted(map(len, groups)) == sizes


def test_a_caption_of_retrieval_is_neither_known_nor_anothers():
    same = [emoji_of("KEY", "1", 0, short="old_key"), emoji_of("KEY", "2", 1, short="spanner")]
    first, *others = [sample["txt"].decode().split("\n") for sample in retrieval_samples(same, {"key emoji"})]
    assert first == ["old key emoji", "key emoji, tool", "old key emoji from the objects group", "an emoji of key"]
    assert others == []  # two captions are too few


def test_codes_are_no_names():
    assert emoji_of("Russia Flag", "1", 0, "Flags", "ru").names() == ["russia flag"]
    assert emoji_of("SQUARED 7533", "1", 0, short="u7533").names() == ["squared 7533"]
    assert emoji_of("KEY", "1", 0, short="old_key").names() == ["key", "old key"]


def test_classes_are_subcategories_in_plain_words(made):
    folder = made / "emoji" / "wds_emoji_categories"
    assert (folder / "classnames.txt").read_text().splitlines() == ["bird", "person with a job", "sweet dessert"]
    tests = samples_of(folder, "test/0.tar")
    assert [sum(sample["cls"] == str(label).encode() for sample in tests) for label in range(3)] == [4, 12, 4]


# ---- Both ------------------------------------------------------------------------------------------------------------------


def test_the_same_packages_give_the_same_bytes(made, packages, tmp_path):
    make_pairs(tmp_path, packages)
    contents = [
        {file.relative_to(top): file.read_bytes() for file in top.rglob("*") if file.is_file()} for top in (made, tmp_path)
    ]
    assert len(contents[0]) > 12
    assert contents[0] == contents[1]


def test_the_project_reads_what_is_written(made, make_model, processor):
    source = open_source(f"{made}/{{clipart,emoji}}/train-*.tar", caption_key="json.captions,txt")
    source.check()
    assert len(list(source.stream)) == len(samples_of(made, "*/train-*.tar"))
    spec = f"{made}/{{clipart/val-000000.tar,emoji/wds_emoji_retrieval,emoji/wds_emoji_categories}}"
    evaluations = find_evaluations(spec, Request(keys=PairKeys(caption_key="json.captions,txt")))
    results = dict(run_evaluations(Encoder(make_model(), processor, batch_size=16), evaluations))
    names = {"retrieval_clipart", "retrieval_emoji_retrieval", "zero_shot_emoji_categories"}
    assert set(results) == names
    assert results["zero_shot_emoji_categories"]["num_classes"] == 3
