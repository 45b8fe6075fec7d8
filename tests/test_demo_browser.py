"""Proves that the demo works in a real browser: sliders, examples, files and labels, on a phone and in the dark, without a
network and without a traceback on the server."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from helpers import random_picture

from hf_maskclip import MaskCLIPModel, export_to_clip

pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'hf_maskclip[demo]'")
from hf_maskclip.demo import examples, scoring  # noqa: E402
from hf_maskclip.demo.labels import parse_labels  # noqa: E402


@pytest.fixture
def browser():
    """A headless Chromium."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no browser is installed: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed: pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(word)
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


@pytest.fixture
def address(make_model, processor, tmp_path):
    """The running command's."""
    export_to_clip(make_model(), tmp_path / "export", processor)
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


class Page:
    """The page in the browser, and what stands on it."""

    def __init__(self, browser, address: str):
        self.browser = browser
        browser.get(address)
        self.wait_for(lambda: self.find("#masks img"))

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def button(self, text: str):
        """The visible button of this text."""
        (found,) = [
            button
            for button in self.browser.find_elements("xpath", f"//button[contains(., {text!r})]")
            if button.is_displayed()
        ]
        return found

    def html(self, element: str) -> str:
        """The figure of an element, without what Gradio writes round it."""
        return self.find(f"#{element} figure").get_attribute("innerHTML")

    def run(self, script: str):
        return self.browser.execute_script(f"return {script}")

    def wait_for(self, condition):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.browser, 30, 0.1, ignored_exceptions=[Exception]).until(lambda _: condition())

    def fill(self, element: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.find(f"#{element} textarea, #{element} input")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)


@pytest.mark.slow
def test_sliders_and_files_change_the_masks(address, browser, tmp_path):
    from selenium.webdriver.common.keys import Keys

    page = Page(browser, address)
    masks, stages = page.html("masks"), page.html("stages")
    assert masks.count("<img") == 10
    page.find("input[type=range][aria-label*='Mask ratio']").send_keys(Keys.ARROW_RIGHT)
    page.wait_for(lambda: "88 of 196 patches" in page.find("#masks").text)
    assert page.html("stages") == stages  # PGS has sliders of its own
    page.find("input[type=range][aria-label*='similarity threshold']").send_keys(Keys.END)
    page.wait_for(lambda: page.html("stages") != stages)
    page.find("input[type=range][aria-label*='least mask ratio']").send_keys(Keys.END)
    page.wait_for(lambda: "PGS: least mask ratio is 0.95, above PGS: largest mask ratio" in page.find("#masks").text)
    assert page.find("#stages").text == ""
    page.find("input[type=range][aria-label*='least mask ratio']").send_keys(Keys.HOME)
    page.wait_for(lambda: page.html("masks").count("<img") == 10)

    page.find("button[aria-label='Remove Image'], button[aria-label='Clear']").click()
    page.wait_for(lambda: "There is no picture" in page.find("#masks").text)
    random_picture(0, (300, 300)).save(tmp_path / "whole.png")
    content = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(content[: len(content) // 2])
    page.wait_for(lambda: page.find(".hfm-inputs input[type=file]")).send_keys(str(tmp_path / "truncated.png"))
    page.wait_for(lambda: "This file cannot be read as a picture" in page.find("#masks").text)
    assert page.find("#stages").text == ""


@pytest.mark.slow
def test_labels_and_examples_change_the_scores(address, browser, tmp_path, processor):
    model = MaskCLIPModel.from_pretrained(tmp_path / "export").eval()
    first, second, *_ = (outcome.example for outcome in examples.try_examples(model, processor, "pgs"))

    def expected(example: examples.Example) -> set[str]:
        names, picture = parse_labels(example.labels), examples.draw_example(example)
        scores = scoring.score_labels(model, processor, picture, names, scoring.TEMPLATE, "pgs", [0, 0.5])
        return {f"{name} {whole:.0%} {half:.0%}" for name, whole, half in zip(names, *scores.tolist(), strict=True)}

    def shown() -> set[str]:
        rows = browser.find_elements("css selector", "#scores tbody tr")
        return {" ".join(row.text.split()[1:]) for row in rows}

    page = Page(browser, address)
    page.button("Zero-shot").click()
    page.wait_for(lambda: page.find("#scores").is_displayed())
    assert shown() == expected(first)
    page.button(second.name).click()
    page.wait_for(lambda: shown() == expected(second))
    assert page.find("#labels textarea").get_property("value") == second.labels

    page.fill("labels", '{{7*7}}; ${1+1}\n"a cat, black"')
    page.button("Score these labels").click()
    page.wait_for(lambda: "a cat, black" in page.find("#scores").text)
    assert {"{{7*7}}", "${1+1}"} < {" ".join(row.split()[:-2]) for row in shown()} | {row.split()[0] for row in shown()}
    page.fill("labels", "one label")
    page.button("Score these labels").click()
    page.wait_for(lambda: "Labels: there must be at least two, and there is only 'one label'" in page.find("#scores").text)
    assert page.find("#hidden").text == ""

    requested = page.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(requested) > 10
    assert [name for name in requested if not name.startswith((address, "data:"))] == []


UNNAMED = """[...document.querySelectorAll('button, a, input:not([type=file]), textarea')].filter(
    element => !(element.innerText.trim() || element.ariaLabel || element.title || element.labels?.length)
).map(element => element.outerHTML)"""


@pytest.mark.slow
def test_the_page_fits_every_screen_in_light_and_dark(address, browser):
    for width, height in ((390, 844), (1280, 900), (1920, 1080)):
        for scheme in ("light", "dark"):
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            page = Page(browser, address)
            assert page.run("innerWidth") == width
            assert page.run("document.documentElement.scrollWidth") <= width
            last = page.run("[...document.querySelectorAll('#masks img')].at(-1).getBoundingClientRect().toJSON()")
            assert last["width"] > 90
            assert last["bottom"] < height  # all masks are on the first screen
            text = page.run("getComputedStyle(document.querySelector('.hfm-title')).color")
            brightness = sum(map(int, re.findall(r"\d+", text)[:3])) / 3
            assert (brightness > 200) if scheme == "dark" else (brightness < 80)
            assert page.run(UNNAMED) == []
            assert page.run("[...document.images].filter(image => !image.hasAttribute('alt')).length") == 0
