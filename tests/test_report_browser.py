"""The report in a browser: every control on a phone's and on a desk's screen, in light and in dark."""

from __future__ import annotations

import io
import json
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dtta_fast.report import make_page, read_runs
from dtta_fast.report.exchange import corruption_figures
from dtta_fast.runs.corruption_error import ALEXNET, SEVERITIES

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: chromium chromium-driver)"),
]

LABELS = [f"{kind} {when}" for kind in ("Mean corruption error (mCE)", "Relative mCE") for when in ("before", "after")]
SCREENS = {"phone": (375, 800), "desk": (1280, 900)}
write_run = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))["write_run"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):  # --no-sandbox: as root
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one run, of three with long names, one of them unfinished, and of depth maps."""
    folder = tmp_path_factory.mktemp("runs")

    def lengthen(record: dict[str, Any]) -> None:
        record["path"] = f"<script>alert(1)</script>/{'a_folder_with_a_long_name' * 6}/{record['image_id']}.JPEG"

    names = ("fast", "a_run_whose_name_is_longer_than_a_phone_is_wide_and_has_no_blank", "unfinished")
    write_run(folder / names[0], images=200, seed=1, failed=3)
    write_run(folder / names[1], images=200, seed=2, change=lengthen, steps=5, lr=1e-3)
    write_run(folder / names[2], images=90, seed=3, finished=False)
    write_run(folder / "depth", "depth")
    found = {}
    for page, runs in {"one": names[:1], "three": names, "depth": ("depth",)}.items():
        found[page] = folder / f"{page}.html"
        text = make_page(read_runs([folder / name for name in runs]), lambda run, i: Image.effect_noise((64, 64), 60 + i % 40))
        found[page].write_text(text, encoding="utf-8")
    return found


def open_page(browser: Any, path: Path, screen: str, scheme: str = "light") -> None:
    width, height = SCREENS[screen]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    browser.get(path.as_uri())


def check_page(browser: Any, screen: str, where: str) -> None:
    """Nothing on the console, and nothing to scroll sideways: a phone would widen its window to what overflows."""
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == [], where
    wide, inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner == SCREENS[screen][0], where


def all_of(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def click(browser: Any, element: Any) -> None:
    """Where it is, so that a control that something covers fails."""
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
    element.click()


@pytest.mark.parametrize("page", ["one", "three", "depth"])
@pytest.mark.parametrize("screen", SCREENS)
def test_every_control_works(browser, pages, page, screen):
    open_page(browser, pages[page], screen)
    check_page(browser, screen, "as it opens")
    summaries = all_of(browser, "details > summary")
    assert len(summaries) >= 8
    for summary in summaries:  # sections close and open, tables open and stay so
        opened = summary.find_element("xpath", "..")
        was = opened.get_attribute("open")
        click(browser, summary)
        assert opened.get_attribute("open") != was
        check_page(browser, screen, f"{summary.text} clicked")
        if was:
            click(browser, summary)
            assert opened.get_attribute("open") == was
    heads = all_of(browser, "table.sortable thead button")
    assert len(heads) >= 4
    for head in heads:
        sorted_by = head.find_element("xpath", "..")
        click(browser, head)
        first = sorted_by.get_attribute("aria-sort")
        click(browser, head)
        assert {first, sorted_by.get_attribute("aria-sort")} == {"ascending", "descending"}
        check_page(browser, screen, f"sorted by {head.text}")
    selects = all_of(browser, "#card-controls select")
    assert len(selects) == {"one": 2, "three": 3, "depth": 2}[page]
    for select in selects:
        for option in select.find_elements("css selector", "option"):
            click(browser, option)
            assert option.is_selected()
            check_page(browser, screen, f"cards by {option.text}")
    for box in all_of(browser, "input[type=checkbox]"):
        click(browser, box)
        check_page(browser, screen, "only differences")
        click(browser, box)
    for link in all_of(browser, "nav a"):
        click(browser, link)
        assert browser.execute_script("return document.querySelector(location.hash).open")
    fold = all_of(browser, "#fold")[0]
    for text, still_open in (("Open all", False), ("Close all", True)):
        click(browser, fold)
        assert fold.text == text
        assert all((part.get_attribute("open") is not None) == still_open for part in all_of(browser, "details.section"))
        check_page(browser, screen, text)


def test_tables_sort_by_value(browser, pages):
    open_page(browser, pages["one"], "desk")
    click(browser, all_of(browser, "#groups .table > summary")[0])
    name, _, gain = all_of(browser, "#groups table.sortable thead button")
    column = "return [...document.querySelectorAll('#groups table.sortable tbody tr')].map(row => row.cells[arguments[0]].innerText)"
    click(browser, name)
    assert browser.execute_script(column, 0) == ["clean", "fog2", "gaussian_noise5", "motion_blur3"]
    click(browser, gain)
    gains = [float(text.split()[0].replace("−", "-")) for text in browser.execute_script(column, 2)]
    assert gains == sorted(gains, reverse=True)
    assert len(set(gains)) > 1
    click(browser, gain)
    assert [float(text.split()[0].replace("−", "-")) for text in browser.execute_script(column, 2)] == gains[::-1]


def test_cards_are_filtered_and_ordered(browser, pages):
    open_page(browser, pages["three"], "desk")

    def shown(kind: str = "improved") -> list[Any]:
        return [card for card in all_of(browser, f".cards[data-kind={kind}] .card") if card.is_displayed()]

    assert len(shown()) == 36
    changes = [float(card.get_attribute("data-change")) for card in shown()]
    assert changes == sorted(changes, reverse=True)
    click(browser, all_of(browser, "#card-run option")[2])
    assert {card.get_attribute("data-run") for card in shown() + shown("harmed")} == {"1"}
    assert len(shown()) == 12
    assert all_of(browser, "h3 .count")[0].text == "12"
    option = all_of(browser, "#card-group option")[1]
    click(browser, option)
    assert {card.get_attribute("data-group") for card in shown()} == {option.text}
    click(browser, all_of(browser, "#card-group option")[0])
    click(browser, all_of(browser, "#card-order option[value=confidence]")[0])
    confidences = [float(card.get_attribute("data-confidence")) for card in shown()]
    assert confidences == sorted(confidences, reverse=True)


def test_only_differences_are_left(browser, pages):
    open_page(browser, pages["three"], "desk")

    def rows() -> list[str]:
        return [row.find_element("css selector", "th").text.split()[0] for row in all_of(browser, "#config tbody tr") if row.is_displayed()]

    everything = rows()
    click(browser, all_of(browser, "#config input")[0])
    assert rows() == ["adapt.steps", "adapt.lr", "adapt.seed"]
    assert len(everything) > 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_screenshot_shows_the_page(browser, pages, screen, scheme, tmp_path):
    open_page(browser, pages["three"], screen, scheme)
    path = tmp_path / f"{screen}-{scheme}.png"
    path.write_bytes(browser.get_screenshot_as_png())
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    assert image.size == SCREENS[screen]
    colours = image.getcolors(maxcolors=image.width * image.height)
    assert len(colours) > 50
    paper = max(colours)[1]
    assert max(colours)[0] < 0.97 * image.width * image.height
    assert (sum(paper) > 600) == (scheme == "light")
    for colour in ("#2b6cb0", "#c2621b") if scheme == "light" else ("#64a3e3", "#e8935a"):  # the runs' own
        assert tuple(int(part, 16) for part in re.findall("[0-9a-f]{2}", colour)) in {found for _, found in colours}


def test_plots_stay_within_the_page_and_their_text_keeps_its_size(browser, pages):
    for screen in SCREENS:
        open_page(browser, pages["three"], screen)
        boxes = browser.execute_script(
            "return [...document.querySelectorAll('.plot text')].map(t => t.getBoundingClientRect()).map(b => [b.left, b.right, b.height])"
        )
        assert len(boxes) > 200
        assert min(left for left, _, _ in boxes) >= 0
        assert max(right for _, right, _ in boxes) <= SCREENS[screen][0]
        assert min(height for _, _, height in boxes) > 10


def test_the_mean_corruption_error_is_shown(browser, tmp_path):
    groups = tuple(f"{name}{severity}" for name in ALEXNET for severity in SEVERITIES)
    for name, data, kinds in (("corrupted", "imagenet-c", groups), ("clean", "imagenet", ("imagenet",))):
        write_run(tmp_path / name, images=300, groups=kinds)
        for file in ("config.json", "summary.json"):
            told = json.loads((tmp_path / name / file).read_text())
            (told if file == "config.json" else told["config"])["data"] = {"name": data, "root": "/data"}
            (tmp_path / name / file).write_text(json.dumps(told))
    page = tmp_path / "report.html"
    page.write_text(make_page(read_runs([tmp_path / "corrupted", tmp_path / "clean"])), encoding="utf-8")
    open_page(browser, page, "desk")
    check_page(browser, "desk", "mCE")
    shown = {row.text.split("\n")[0]: row.text for row in all_of(browser, "tr") if "mCE" in row.text and row.is_displayed()}
    assert [next((text for head, text in shown.items() if head.startswith(label)), None) is not None for label in LABELS] == [True] * 4
    figures = corruption_figures(*(lambda runs: (runs[0], runs))(read_runs([tmp_path / "corrupted", tmp_path / "clean"])))
    assert any(f"{100 * figures[1].mean:,.1f}" in text for text in shown.values())
