"""The page in a real browser, with the built-in model: what a visitor does, what goes wrong, on a desk and on a phone.

Needs chromium and chromedriver (Debian: `apt-get install chromium chromium-driver`); without them it is skipped, unless
CLEAR_BROWSER=required. CLEAR_SCREENSHOTS=FOLDER keeps the pictures that it takes.
"""

import base64
import gc
import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from clear_adapters.ui import build_demo, launch
from clear_adapters.ui.samples import gallery

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # Gradio's server leaves sockets and event loops to the collector, whose warnings come at any moment.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

FLAGS = (
    *(
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--hide-scrollbars", "--window-size=1280,1000"),
)
PATIENCE = 90
WATCH = """
window.seen = [];
new MutationObserver(() => {
  const text = id => document.getElementById(id)?.innerText ?? '';
  const now = ['base', 'before', 'restoration', 'after', 'status', 'run-status'].map(id => [id, text(id).trim()]);
  for (const [id, value] of now) if (!window.seen.some(s => s[0] === id && s[1] === value)) window.seen.push([id, value]);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def _binary(*names):
    return next((found for n in names if (found := shutil.which(n))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("files")))
        demo = build_demo(allow_other_models=True, device="cpu")
        _, address, _ = launch(demo, prevent_thread_lock=True, quiet=True, inbrowser=False)
        yield address
        demo.close()
    gc.collect()  # what is left is told here, and not in another module's test


@pytest.fixture(scope="module")
def driver():
    chromium, chromedriver = _binary("chromium", "chromium-browser", "google-chrome"), _binary("chromedriver")
    if chromium is None or chromedriver is None:
        message = "no chromium and chromedriver: apt-get install chromium chromium-driver"
        if os.environ.get("CLEAR_BROWSER") == "required":
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.page_load_strategy = "eager"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield made
    made.quit()


class Visitor:
    """What a visitor sees and does."""

    def __init__(self, driver, address):
        self.driver = driver
        self.address = address

    def open(self, theme="light"):
        self.driver.get(f"{self.address}?__theme={theme}")
        self.wait("#gallery button img")
        self.wait("#ask")
        self.driver.execute_script(WATCH)
        self.driver.get_log("browser")  # what was logged before is another visit's

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, selector, text="", absent=False):
        """The first visible element of a selector that holds a text, once it is there (or None once it is not)."""

        def look(_):
            script = """return [...document.querySelectorAll(arguments[0])].find(
                e => e.getClientRects().length && e.innerText.includes(arguments[1])) ?? null"""
            found = self.driver.execute_script(script, selector, text)
            return found is None if absent else found

        told = f"{selector} {'still there' if absent else 'not there'}: {text!r}"
        return WebDriverWait(self.driver, PATIENCE, 0.05).until(look, told)

    def click(self, selector, text=""):
        element = self.wait(selector, text)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, selector, text):
        field = self.wait(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE, text)

    def text(self, selector):
        return self.wait(selector).text

    def seen(self, part):
        """All texts that a part of the page has shown since it was opened, in order."""
        return [text for name, text in self.driver.execute_script("return window.seen") if name == part]

    def forget(self):
        self.driver.execute_script("window.seen.length = 0")

    def resize(self, width, height, phone=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def shoot(self, name, selector=None):
        """A picture of the whole page, or of its part down to the end of an element."""
        script = """const e = arguments[0] ? document.querySelector(arguments[0]) : document.documentElement;
            const r = e.getBoundingClientRect();
            return [innerWidth, Math.ceil(arguments[0] ? r.bottom + scrollY + 12 : document.documentElement.scrollHeight)]"""
        width, height = self.driver.execute_script(script, selector)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        taken = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
        )
        image = Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")
        assert image.width == width
        assert len(image.resize((64, 64)).getcolors(4096)) > 50  # something is drawn
        folder = os.environ.get("CLEAR_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            image.thumbnail((900, 10_000), Image.Resampling.LANCZOS)
            image.save(Path(folder) / f"{name}.jpg", quality=70, optimize=True)


@pytest.fixture
def visitor(driver, page):
    made = Visitor(driver, page)
    yield made
    assert [t.text for t in made.all(".toast-body")] == []  # nothing is told where nobody looks for it


def test_a_visitor_sees_both_answers_and_the_restored_picture(visitor):
    visitor.resize(1280, 1000)
    visitor.open()
    examples = visitor.all("#gallery button")
    assert len(examples) == len(gallery())
    assert examples[0].get_attribute("aria-pressed") == "true"
    visitor.shoot("demo-start")

    helps = next(e for e in gallery() if e.outcome == "helps")
    visitor.click(f"#gallery button[data-index='{helps.index}']")
    visitor.wait(
        "#verdict h3", "CLEAR restored the picture first, and was right where the plain model was wrong."
    )
    assert "✗ wrong" in visitor.text("#base .answer.wrong")
    assert "✓ right" in visitor.text("#after .answer.right")
    assert "Restore it first" in visitor.text("#before")
    assert visitor.wait("#restoration img").get_attribute("alt") == "The restored picture"
    assert "The truth" in visitor.text("#verdict")
    # It came bit by bit, in both directions: text, and the picture while it was denoised.
    assert len(visitor.seen("before")) > 3
    assert len(visitor.seen("after")) > 3
    shown = [" ".join(t.lower().split()) for t in visitor.seen("restoration")]
    assert any("step 1 of 2" in t for t in shown), shown
    visitor.shoot("demo-desktop", "#verdict")

    slider = visitor.driver.find_element(By.CSS_SELECTOR, "#verdict input[type=range]")
    before = visitor.driver.execute_script(
        "return document.querySelector('.stage').style.getPropertyValue('--cut')"
    )
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    after = visitor.driver.execute_script(
        "return document.querySelector('.stage').style.getPropertyValue('--cut')"
    )
    assert (before, after) == ("", "52%")
    visitor.click("#verdict .compare label", "clean | restored")
    assert visitor.wait("#verdict .cap.clean-restored.left").text == "clean"

    visitor.click("#transcript button", "Transcript")
    link = visitor.wait("#save a.save").get_attribute("href")
    told = json.loads(base64.b64decode(link.partition("base64,")[2]))
    assert told["picture"]["sample"] == helps.index
    assert told["right"] == {"as_it_is": False, "clear": True}
    assert told["clear"]["restored"] is True


def test_another_severity_another_question_and_a_stop(visitor):
    visitor.resize(1280, 1000)
    visitor.open()
    first = visitor.text("#preview figure:last-child figcaption")
    assert first.endswith("high")
    visitor.click("#level label", "low")
    visitor.wait("#preview figcaption", ", low")
    assert visitor.wait("#intensity input[type=number]").get_attribute("value") == "0.23"
    visitor.wait("#intensity input[type=range]").send_keys(Keys.ARROW_RIGHT)
    visitor.wait("#preview figcaption", ", 0.24")
    WebDriverWait(visitor.driver, PATIENCE, 0.05).until(lambda _: not visitor.all("#level input:checked"))
    visitor.write("#question textarea", "How many stars are there? {{value}} <b>${1+1}</b>")
    visitor.forget()
    visitor.click("#ask")
    visitor.wait("#verdict h3", "CLEAR")
    assert "not known here" in visitor.text("#verdict")
    assert not visitor.all("#base .mark, #after .mark")

    visitor.click("#suggested button", "")
    visitor.click("#restore label", "always")
    visitor.click("#ask")
    visitor.wait("#verdict p.truth", "The truth")
    assert "your choice" in visitor.text("#before")

    visitor.click("#restore label", "model decides")
    visitor.write("#question textarea", "What is to be seen behind all of the shapes?")
    visitor.forget()
    visitor.click("#ask")
    visitor.wait("#before .moment")
    visitor.click("#stop")
    visitor.wait("#status", "Stopped.")
    assert not visitor.all("#verdict section")
    visitor.write("#question textarea", "")
    visitor.click("#ask")
    visitor.wait("#status [role=alert]", "Write a question first")
    visitor.write("#question textarea", "What is behind the shapes?")
    visitor.click("#ask")
    visitor.wait("#verdict h3", "CLEAR")
    assert not [t for t in visitor.seen("status") if "went wrong" in t]


def test_two_examples_in_a_row_leave_the_second_answered(visitor):
    visitor.resize(1280, 1000)
    for gap in (0.05, 0.3, 1.5):
        visitor.open()
        first, second = (e.index for e in gallery()[3:5])
        visitor.click(f"#gallery button[data-index='{first}']")
        time.sleep(gap)
        visitor.click(f"#gallery button[data-index='{second}']")
        visitor.wait(f"#gallery button[data-index='{second}'][aria-pressed=true]")
        visitor.wait("#verdict h3", "CLEAR")
        visitor.click("#transcript button", "Transcript")
        link = visitor.wait("#save a.save").get_attribute("href")
        assert json.loads(base64.b64decode(link.partition("base64,")[2]))["picture"]["sample"] == second


def test_a_field_that_is_left_as_it_is_ends_nothing(visitor):
    visitor.resize(1280, 1000)
    visitor.open()
    visitor.click("#advanced button", "Advanced")
    seed = visitor.wait("#damage-seed input").get_attribute("value")
    visitor.write("#question textarea", "What is to be seen on the left of everything?")
    visitor.forget()
    visitor.click("#ask")
    visitor.wait("#before .moment")
    visitor.click("#damage-seed input")
    visitor.click("#seed input")
    visitor.wait("#verdict h3", "CLEAR")
    visitor.write("#question textarea", "What is to be seen on the right of everything?")
    visitor.click("#ask")
    visitor.wait("#verdict section", absent=True)
    visitor.write("#damage-seed input", "")
    visitor.click("#seed input")
    visitor.wait("#trouble [role=alert]", "The seed")
    visitor.wait("#verdict h3", "CLEAR")
    assert "Stopped." not in visitor.seen("status")
    visitor.write("#question textarea", "What is to be seen at the top of everything?")
    visitor.click("#ask")
    visitor.wait("#verdict section", absent=True)
    visitor.write("#damage-seed input", f"{int(seed) + 1}")
    visitor.click("#seed input")
    visitor.wait("#status", "Stopped.")
    visitor.wait("#trouble [role=alert]", absent=True)
    assert not visitor.all("#before .moment")


def test_broken_files_are_told_and_a_picture_of_ones_own_is_taken(visitor, tmp_path):
    visitor.resize(1280, 1000)
    visitor.open()
    visitor.click("#own button", "Use a picture of your own")
    broken = tmp_path / "broken.png"
    broken.write_text("this is a text")
    visitor.wait("#upload")
    visitor.driver.find_element(By.CSS_SELECTOR, "#upload input[type=file]").send_keys(str(broken))
    visitor.wait("#trouble [role=alert]", "no picture that can be read")
    own = tmp_path / "own.jpg"
    Image.effect_mandelbrot((640, 480), (-2, -1.5, 1, 1.5), 90).convert("RGB").save(own)
    WebDriverWait(visitor.driver, PATIENCE).until(lambda d: visitor.all("#upload input[type=file]"))
    visitor.driver.find_element(By.CSS_SELECTOR, "#upload input[type=file]").send_keys(str(own))
    visitor.wait("#preview .caution", "means nothing")
    visitor.wait("#trouble [role=alert]", absent=True)
    assert visitor.wait("#preview figure:last-child img").get_property("naturalWidth") == 512
    visitor.shoot("demo-own")
    visitor.click("#ask")
    visitor.wait("#verdict h3", "CLEAR")
    visitor.click("#advanced button", "Advanced")
    visitor.write("#adapter input", "builtin:clear-bagel")
    visitor.driver.switch_to.active_element.send_keys(Keys.TAB)
    visitor.click("#ask")
    visitor.wait("#status [role=alert]", "Did you mean")


def test_results_and_a_run_that_is_cancelled(visitor):
    visitor.resize(1280, 1000)
    visitor.open()
    visitor.click("button[role=tab]", "Results")
    assert visitor.wait("#figure img").get_property("naturalWidth") > 500
    visitor.click("#tables button", "tables")
    visitor.wait("#tables table", "CLEAR: SFT + bridge + GRPO")
    visitor.shoot("demo-results")
    visitor.click("#run")
    visitor.wait("#run-status progress")
    WebDriverWait(visitor.driver, PATIENCE, 0.05).until(
        lambda _: any("4 of 24" in t for t in visitor.seen("run-status"))
    )
    visitor.click("#run-cancel")
    visitor.wait("#run-status", "Cancelled.")


def test_on_a_phone_in_the_dark_nothing_sticks_out_and_everything_has_a_name(visitor):
    visitor.resize(390, 844, phone=True)
    visitor.open("dark")
    helps = next(e for e in gallery() if e.outcome == "helps")
    visitor.click(f"#gallery button[data-index='{helps.index}']")
    visitor.wait("#verdict h3", "CLEAR restored")
    width = visitor.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert width == [390, 390]
    visitor.shoot("demo-phone-dark")
    visitor.click("#own button", "Use a picture of your own")
    visitor.click("#advanced button", "Advanced")
    visitor.wait("#adapter input")
    named = visitor.all("#tab-try :is(button, input, textarea, select), #tabs button[role=tab], #tab-try img")
    without = [
        e.get_attribute("outerHTML")[:200] for e in named if e.is_displayed() and not e.accessible_name
    ]
    assert len(named) > 40
    assert without == []
    alien = [
        a
        for a in visitor.driver.execute_script(
            "return performance.getEntriesByType('resource').map(r => r.name)"
        )
        if not a.startswith((visitor.address, "data:", "blob:"))
    ]
    assert alien == []
    errors = [e["message"] for e in visitor.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []
