"""Proves that the demo shows what the masks and the model do: sliders move what they name, scores are those of Transformers'
pipeline and go with hidden patches, wrong input is one line, and all of it works in a real browser without a network."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import random_picture
from PIL import Image
from transformers import pipeline

from hf_maskclip import export_to_clip
from hf_maskclip.cli import main
from hf_maskclip.data.scenes import sample_scene
from hf_maskclip.models.patch_mask_registry import patch_masks
from hf_maskclip.models.patch_masking import keep_count

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
from hf_maskclip import demo  # noqa: E402

LABELS = ["a red ball", "two blue fish", "a small house"]
MASKS = [name for name in patch_masks() if name != "none"]


@pytest.fixture
def model(make_model):
    model = make_model().eval()
    model.vision_model.set_attn_implementation("eager")
    return model


@pytest.fixture
def example() -> Image.Image:
    return demo.draw_example("purple star on grass")


def kept(figure) -> dict[str, str]:
    """What stands below each panel that shows a mask, by the panel's title."""
    return {axis.get_title(): axis.get_xlabel() for axis in figure.axes if axis.get_xlabel()}


@pytest.mark.parametrize("name", demo.EXAMPLES)
def test_each_example_shows_what_its_first_label_says(name):
    number, labels = demo.EXAMPLES[name]
    shown = {(item.colour, item.shape) for item in sample_scene(number, split="test").objects}
    names = demo.parse_labels(labels)
    assert any(colour in names[0] and shape in names[0] for colour, shape in shown)
    assert len(names) == 4
    assert demo.draw_example(name).size == (160, 160)


def test_the_mask_ratio_is_of_all_masks_but_pgs(model, example):
    every, stages = zip(*(demo.draw_masks(model, example, ratio, 0.3, 0.3, 0.5, 0) for ratio in (0.25, 0.75)), strict=True)
    for figure, share in zip(every, ("75% kept", "25% kept"), strict=True):
        assert kept(figure) == dict.fromkeys(MASKS, share) | {"pgs": "70% kept"}
    assert len({kept(figure)["visible"] for figure in stages}) == 1


def test_pgs_goes_by_its_threshold_between_its_ratios(model, example):
    def share(*settings) -> str:
        every, stages = demo.draw_masks(model, example, 0.5, *settings, 0)
        assert kept(every)["pgs"] == kept(stages)["visible"]
        return kept(stages)["visible"]

    assert (share(0.2, 0.6, 1), share(0.2, 0.6, 0), share(0.4, 0.4, 0)) == ("80% kept", "40% kept", "60% kept")


def test_another_seed_is_another_draw(model, example):
    def shown(seed: int) -> torch.Tensor:
        return torch.tensor(demo.draw_masks(model, example, 0.5, 0.3, 0.5, 0.5, seed)[0].axes[2].images[0].get_array())

    assert not torch.equal(shown(0), shown(1))


def test_scores_of_whole_pictures_are_those_of_the_pipeline(model, processor, example, tmp_path):
    export_to_clip(model, tmp_path, processor)
    expected = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        example, candidate_labels=LABELS, hypothesis_template="a photo of {}"
    )
    expected = {score["label"]: score["score"] for score in expected}
    (scores,) = demo.score_labels(model, processor, example, LABELS, "a photo of {}", "pgs", [0])
    assert scores.tolist() == pytest.approx([expected[label] for label in LABELS], abs=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_scores_go_with_the_hidden_patches(mask, model, processor, example, monkeypatch):
    select, visible = model.vision_model.select_patches, []

    def select_patches(*arguments, **keywords):
        selection = select(*arguments, **keywords)
        visible.append(selection.visible(16).sum().item())
        return selection

    monkeypatch.setattr(model.vision_model, "select_patches", select_patches)
    scores = demo.score_labels(model, processor, example, LABELS, "{}", mask, [0, 0.25, 0.75])
    assert visible == [keep_count(16, 0.25)] * demo.NUM_DRAWS + [keep_count(16, 0.75)] * demo.NUM_DRAWS
    assert torch.allclose(scores.sum(dim=1), torch.ones(3))
    whole = demo.score_labels(model, processor, example, LABELS, "{}", "none", [0])[0]
    assert torch.equal(scores[0], whole)
    assert not torch.allclose(scores[2], whole, atol=1e-4)


def test_curves_are_the_scores():
    scores = torch.rand(len(demo.SHARES), 3)
    figure = demo.draw_scores(scores, LABELS)
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert [list(curves[label]) for label in LABELS] == scores.T.tolist()
    assert "chance" in curves


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": None}, "no picture: drop one in, or take an example"),
        ({"template": "a photo"}, "template 'a photo': must have {} for the label"),
    ],
)
def test_what_cannot_be_scored_is_one_line(wrong, message, model, processor):
    given = {"image": random_picture(0), "labels": LABELS, "template": "{}", "mask": "pgs"} | wrong
    with pytest.raises(ValueError, match=re.escape(message)):
        demo.score_labels(model, processor, **given)


@pytest.mark.parametrize("text", ["", " , ", "a red ball", "a red ball, a red ball"])
def test_fewer_than_two_labels_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(f"labels {text!r}: must be at least two, separated by commas")):
        demo.parse_labels(text)


def test_without_the_quickstarts_model_the_command_says_how_to_make_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "runs/quickstart/export: no such folder; `accelerate launch training/train.py` makes it, or give --model" in error
    assert main(["demo", "--model", "absent/of/all"]) == 2
    assert "absent/of/all" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_a_port_in_use_is_one_line(model, processor, tmp_path, capsys):
    export_to_clip(model, tmp_path, processor)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        capsys.readouterr()
        assert main(["demo", "--model", str(tmp_path), "--port", str(port)]) == 2
    assert f"error: --host 127.0.0.1 --port {port}: cannot be used; is it in use already?\n" in capsys.readouterr().err


@pytest.fixture
def browser():
    """A headless Chromium."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no browser is installed: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,1400"):
        options.add_argument(word)
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


@pytest.fixture
def address(model, processor, tmp_path):
    """The running command's."""
    export_to_clip(model, tmp_path / "export", processor)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "hf_maskclip", "demo", "--model", str(tmp_path / "export"), "--port", port]
    with open(tmp_path / "log.txt", "w") as log:
        served = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert served.poll() is None, (tmp_path / "log.txt").read_text()
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", int(port))) == 0:
                    break
            time.sleep(0.1)
        yield address
        assert "Traceback" not in (tmp_path / "log.txt").read_text()
    finally:
        served.terminate()
        served.wait()


@pytest.mark.slow
def test_the_page_in_a_browser(address, browser, model, processor, example):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    def find(selector: str):
        return browser.find_element(By.CSS_SELECTOR, selector)

    def wait_for(condition):
        return WebDriverWait(browser, 20, poll_frequency=0.1, ignored_exceptions=[Exception]).until(lambda _: condition())

    browser.get(address)
    masks = wait_for(lambda: find("#masks img").get_attribute("src"))
    stages = wait_for(lambda: find("#stages img").get_attribute("src"))
    assert int(wait_for(lambda: find("#masks img").get_attribute("naturalWidth"))) > 1000

    find("input[type=range][aria-label*='Mask ratio']").send_keys(Keys.ARROW_RIGHT)
    moved = wait_for(lambda: (now := find("#masks img").get_attribute("src")) != masks and now)
    assert find("#stages img").get_attribute("src") == stages  # PGS has sliders of its own
    find("input[type=range][aria-label*='similarity threshold']").send_keys(Keys.END)
    wait_for(lambda: find("#masks img").get_attribute("src") != moved and find("#stages img").get_attribute("src") != stages)

    browser.find_element(By.XPATH, "//button[@role='tab'][contains(., 'Zero-shot')]").click()
    text = wait_for(lambda: find("#whole").text if "%" in find("#whole").text else "")
    shown = dict(re.findall(r"^(an? .+)\n(\d+)%$", text, flags=re.MULTILINE))
    names = demo.parse_labels(demo.EXAMPLES["purple star on grass"][1])
    whole, half = demo.score_labels(model, processor, example, names, demo.TEMPLATE, "pgs", [0, 0.5])
    assert {name: int(share) for name, share in shown.items()} == {
        name: pytest.approx(100 * score, abs=0.6) for name, score in zip(names, whole.tolist(), strict=True)
    }
    assert all(f"{score:.0%}" in find("#half").text for score in half.tolist())

    browser.find_element(By.XPATH, "//button[contains(., 'red arrow at sea')]").click()
    wait_for(lambda: "a pink key" in find("#whole").text)
    labels = find("#labels textarea, #labels input")
    labels.send_keys(Keys.CONTROL, "a")
    labels.send_keys("one label", Keys.ENTER)
    wait_for(lambda: "labels 'one label': must be at least two, separated by commas" in find("body").text)
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(requested) > 10
    assert [name for name in requested if not name.startswith((address, "data:"))] == []
