"""Proves that the demo's page shows every kind of label and file, or says in a sentence why not and shows no old results; that
what it shows has names for those who cannot see it."""

import base64
import io
import logging
import re
import socket
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from helpers import random_picture
from matplotlib.colors import to_hex
from PIL import Image

from hf_maskclip import export_to_clip
from hf_maskclip.cli import main

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
from hf_maskclip.demo import examples, figures, page, scoring  # noqa: E402
from hf_maskclip.demo.labels import MAX_LABELS, parse_labels  # noqa: E402
from hf_maskclip.demo.pictures import open_picture  # noqa: E402
from hf_maskclip.visualization import Panel  # noqa: E402


class Text(HTMLParser):
    """What a browser would show of HTML, and the attributes of its elements."""

    def __init__(self, html: str):
        super().__init__()
        self.shown, self.elements = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.shown.append(data)


# ---- Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a cat, a dog", ["a cat", "a dog"]),
        ("a cat\na dog\r\n\n a  fox \n", ["a cat", "a dog", "a fox"]),
        ("a cat; a dog;", ["a cat", "a dog"]),
        ('"a star, purple", "a; b"\n"c\nd"', ["a star, purple", "a; b", "c d"]),
        ("“un chat, noir”, un chien", ["un chat, noir", "un chien"]),
        ('a 12" ruler, a "big" dog, "open', ['a 12" ruler', 'a "big" dog', '"open']),
        ("一只猫，一只狗、鱼；鸟", ["一只猫", "一只狗", "鱼", "鸟"]),
        ("قطة، كلب", ["قطة", "كلب"]),
        ("a cat, a dog, a cat", ["a cat", "a dog"]),
        ("_a, $x_1$, <b>, {{7}}", ["_a", "$x_1$", "<b>", "{{7}}"]),
    ],
)
def test_labels_are_separated_as_people_do(text, labels):
    assert parse_labels(text) == labels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Labels: there must be at least two, and there is none."),
        (" ,;\n", "Labels: there must be at least two, and there is none."),
        ("a red ball, a red ball", "Labels: there must be at least two, and there is only 'a red ball'."),
        ("\n".join(map(str, range(201))), f"Labels: there are 201, and at most {MAX_LABELS} can be scored here."),
    ],
)
def test_too_few_or_too_many_labels_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_labels(text)


ODD_LABELS = ["_hidden", "$x_1$", "$ unbalanced", "<b>bold</b><img src=x onerror=alert(1)>", "\"quoted\" & 'single'"]
ODD_LABELS += ["一只猫", "🦊 fox", "שלום", "{{7*7}} ${1+1}", "x" * 400]


def test_labels_of_every_kind_are_shown_as_text():
    scores = torch.rand(len(scoring.SHARES), len(ODD_LABELS), generator=torch.Generator().manual_seed(0))
    html = Text(figures.scores_html(scores, ODD_LABELS, "title", "caption"))
    assert set(ODD_LABELS) <= set(html.shown)
    tags = {tag for tag, _ in html.elements}
    assert {"table", "svg"} < tags
    assert tags.isdisjoint({"img", "script", "b"})
    directions = [attributes["dir"] for _, attributes in html.elements if "dir" in attributes]
    assert directions == ["auto"] * len(ODD_LABELS)


def test_of_sixty_labels_the_ten_that_lead_anywhere_are_shown_and_the_rest_is_added_up():
    labels = [f"label {number}" for number in range(60)]
    scores = torch.zeros(len(scoring.SHARES), 60)
    scores[:, :59] = torch.linspace(2, 1, 59).softmax(dim=0)
    scores[-1] = 0
    scores[-1, 59] = 1  # leads at the last share alone
    shown = figures.leading_labels(scores)
    assert shown == [*range(9), 59]
    html = Text(figures.scores_html(scores, labels, "title", "caption"))
    assert [text for text in html.shown if text.startswith("label ")] == [f"label {number}" for number in shown]
    rest = scores[0].sum() - scores[0, shown].sum()
    assert html.shown[html.shown.index("50 others, added up") + 1] == f"{rest:.0%}"


def test_curves_are_the_scores_in_the_colours_and_markers_of_the_table():
    scores = torch.rand(len(scoring.SHARES), 12, generator=torch.Generator().manual_seed(0))
    shown = figures.leading_labels(scores)
    (axis,) = figures.draw_scores(scores, shown).axes
    *curves, chance = axis.lines
    assert [list(curve.get_ydata()) for curve in curves] == scores[:, shown].T.tolist()
    assert set(chance.get_ydata()) == {1 / 12}
    html = figures.scores_html(scores, [f"label {number}" for number in range(12)], "title", "caption")
    colours = re.findall(r"--colour:(#\w+)", html)
    markers = re.findall(r'aria-hidden="true">(.)', html)
    assert colours == [to_hex(curve.get_color()) for curve in curves]
    assert markers == [figures.MARKERS[curve.get_marker()] for curve in curves]
    assert len(set(colours)) == len(set(markers)) == figures.MAX_SHOWN


def test_the_chart_takes_the_pages_text_colour_and_no_ground():
    html = figures.scores_html(torch.rand(len(scoring.SHARES), 2), ["a", "b"], "title", "caption")
    assert html.count("currentColor") > 20
    assert not re.search(r"#fff|#000|white|black|" + figures.INK, html)


# ---- Pictures -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sent(tmp_path, monkeypatch):
    """Writes a file as a visitor's, and gives what the page says of it."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))

    def send(content: bytes) -> dict:
        path = tmp_path / "gradio" / "abc" / "picture.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return {"path": str(path), "url": "http://127.0.0.1", "orig_name": "picture.png"}

    return send


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


SEE_THROUGH = np.full((8, 8, 4), (255, 0, 0, 0), np.uint8)
RAMP = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)


@pytest.mark.parametrize(
    ("content", "corners"),
    [
        (png(Image.fromarray(SEE_THROUGH)), [(255, 255, 255), (255, 255, 255)]),
        (png(Image.fromarray(RAMP)), [(0, 0, 0), (255, 255, 255)]),
        (png(Image.new("P", (8, 8))), [(0, 0, 0), (0, 0, 0)]),
    ],
    ids=["transparent", "16 bits", "palette"],
)
def test_files_become_the_pictures_that_training_sees(content, corners, sent):
    picture = open_picture(sent(content))
    assert [picture.getpixel(corner) for corner in ((0, 0), (7, 7))] == corners


UNREADABLE = "This file cannot be read as a picture: it must be a whole PNG, JPEG, WebP, GIF, BMP or TIFF."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "There is no picture: drop one in, or take an example."),
        (b"", UNREADABLE),
        (b"hello", UNREADABLE),
        (png(random_picture(0, (80, 80)))[:4000], UNREADABLE),
        (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "SVG is not among them."),
        (png(Image.new("1", (20_000, 5_000))), "The picture is too large: at most 89 million pixels can be read."),
    ],
    ids=["none", "empty", "text", "truncated", "svg", "huge"],
)
def test_what_is_no_picture_is_a_sentence_in_place_of_all_results(content, message, sent, make_model):
    show = page.with_message(lambda picture: page.masks_results(make_model().eval(), picture, 0.5, 0.3, 0.5, 0.5, 0))
    first, second = show(None if content is None else sent(content))
    assert message in "".join(Text(first).shown)
    assert Text(first).elements == [("p", {"class": "hfm-message", "role": "alert"})]
    assert second == ""


@pytest.mark.parametrize("place", ["secret.png", "gradio/../secret.png"])
def test_no_other_file_of_the_server_is_shown(place, sent, tmp_path):
    content = png(random_picture(0))
    (tmp_path / "secret.png").write_bytes(content)
    assert open_picture(sent(content)).size == open_picture(str(tmp_path / "secret.png")).size
    with pytest.raises(ValueError, match="This file was not sent to this page."):
        open_picture({"path": f"{tmp_path}/{place}"})


def test_a_crash_leaves_no_old_results_and_is_in_the_log(caplog):
    with caplog.at_level(logging.ERROR):
        assert page.with_message(lambda: 1 / 0)() == (figures.message_html(page.CRASHED), "")
    assert "ZeroDivisionError" in caplog.text


def test_panels_say_what_they_show():
    visible = torch.tensor([[True, False], [False, False]])
    pixels = torch.zeros(3, 16, 16)
    panels = [Panel("image", pixels), Panel("random", pixels, visible), Panel("candidates", pixels, None, ((8, 0),), 8)]
    html = Text(figures.panels_html(panels, "title <", "caption", wide=4, widest=4))
    images = [attributes for tag, attributes in html.elements if tag == "img"]
    assert [image["alt"] for image in images] == [
        "the picture, its centre cut to a square",
        "what is left of the picture by random: 1 of 4 patches",
        "the picture with red frames round the candidate patches",
    ]
    assert {"title <", "caption", "1 of 4 patches"} <= set(html.shown)
    drawn = Image.open(io.BytesIO(base64.b64decode(images[2]["src"].partition(",")[2])))
    assert drawn.getpixel((8, 0))[0] > 150 > drawn.getpixel((2, 8))[0]


# ---- The page -------------------------------------------------------------------------------------------------------------


def test_the_tabs_wait_in_queues_of_their_own_and_open_with_results(make_model, processor, tmp_path):
    export_to_clip(make_model().eval(), tmp_path, processor)
    demo = page.build_demo(tmp_path)
    queues = {
        (function.concurrency_id, function.concurrency_limit) for function in demo.fns.values() if function.name != "cleared"
    }
    assert queues == {("masks", 2), ("zero-shot", 2)}
    assert not any(function.preprocess for function in demo.fns.values())
    values = {block.elem_id: block.value for block in demo.blocks.values() if block.elem_id and "value" in vars(block)}
    assert values["masks"].count("<img") == 10
    assert values["stages"].count("<img") == 7
    assert "<svg" in values["scores"]
    assert "https://arxiv.org/abs/2503.17080" in values["masks"]
    assert "CLIP" in values["hidden"]


def test_long_labels_are_named(make_model, processor, tmp_path):
    examples.draw_example(examples.EXAMPLES[0]).save(tmp_path / "picture.png")
    labels = "a red ball, " + "very " * 40 + "long"
    scores, _ = page.score_results(make_model().eval(), processor, str(tmp_path / "picture.png"), labels, "{}", "pgs")
    assert "Too long, so that the model reads their beginning alone: 1 of the labels." in scores


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999"])
def test_a_port_that_no_machine_has_is_one_line(port, capsys):
    assert main(["demo", "--port", port]) == 2
    assert capsys.readouterr().err == f"error: --port {port}: must be from 1 to 65535\n"


def test_without_the_quickstarts_model_the_command_says_how_to_make_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "runs/quickstart/export: no such folder; `python training/train.py` makes it, or give --model" in error
    assert main(["demo", "--model", "absent/of/all"]) == 2
    assert "absent/of/all" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line(make_model, processor, tmp_path, capsys):
    export_to_clip(make_model(), tmp_path, processor)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        capsys.readouterr()
        assert main(["demo", "--model", str(tmp_path), "--port", str(port)]) == 2
    assert f"error: --host 127.0.0.1 --port {port}: cannot be used; is it in use already?\n" in capsys.readouterr().err
