"""The page to try it, clicked through in a browser."""

from __future__ import annotations

import io
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dtta_fast import zoo

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
APP = Path(__file__).parents[1] / "examples" / "gradio_app.py"
PATIENCE = 120  # seconds


def until(found: Any, what: str) -> Any:
    """Waits for a value that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.3)
    raise AssertionError(f"no {what} within {PATIENCE} s")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    server = subprocess.Popen([sys.executable, APP, "--port", str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    there = f"http://127.0.0.1:{port}/"

    def answers() -> bool:
        assert server.poll() is None, server.stdout.read() if server.stdout else ""
        try:
            return urllib.request.urlopen(there, timeout=5).status == 200
        except OSError:
            return False

    try:
        until(answers, "answer")
        yield there
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium chromium-driver)")
def test_a_click_shows_the_answers_before_and_after(address):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):  # --no-sandbox: as root
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(address)

        def one(selector: str) -> Any:
            found = browser.find_elements("css selector", selector)
            return found[0] if found else None

        def told() -> str:
            return str(one("#told textarea").get_attribute("value"))

        until(lambda: one("#adapt") and one("#told textarea"), "page")
        one("#adapt").click()
        first = until(told, "result")
        assert "evaluations" in first
        assert one("#before").text.split("\n")[1] in zoo.DIGITS
        assert one("#after").text.split("\n")[1] in zoo.DIGITS
        until(lambda: one("#picture img"), "picture")
        field = one("#names textarea") or one("#names input")
        field.send_keys("zero, one, two, three, four, five, six, seven, eight, nine")
        one("#adapt").click()
        until(lambda: told() != first, "second result")
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("L")
        assert len(picture.getcolors(2**16) or range(256)) > 16  # not a blank page
    finally:
        browser.quit()


def test_the_answers_are_those_of_a_session():
    app = runpy.run_path(str(APP))
    upload = Image.new("RGB", (90, 60), (200, 30, 40))
    picture, before, after, told = app["adapted"](upload, 3, "none", 1, "red, blue", "RANK")
    assert picture.size == (256, 256)
    assert set(before) == set(after) == {"red", "blue"}
    assert sum(after.values()) == pytest.approx(1, abs=1e-5)
    assert "evaluations" in told
    picture, before, after, told = app["adapted"](None, 7, "gaussian_blur", 5, "", "FAST")
    assert set(before) == set(zoo.DIGITS)
    with pytest.raises(Exception, match="twice"):
        app["adapted"](None, 3, "none", 1, "one, one", "FAST")


def test_what_the_guard_says():
    import torch

    app = runpy.run_path(str(APP))
    said = set()
    for before, after, accepted, evaluations in (
        (1, 1, False, 0),
        (1, 2, True, 60),
        (1, 1, True, 12),
        (1, 2, False, 60),
        (1, 1, False, 60),
        (1, 2, False, 12),
    ):
        result = type("Result", (), {})()
        result.predictions_before, result.predictions = torch.tensor([before]), torch.tensor([after])
        result.accepted, result.evaluations = torch.tensor([accepted]), torch.tensor([evaluations])
        said.add(app["guard"](result, app["presets"].FAST))
    assert len(said) == 6
