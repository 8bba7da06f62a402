"""The report of evaluation runs: its figures against plain arithmetic, what it escapes, what it refuses."""

from __future__ import annotations

import base64
import io
import json
import runpy
import socket
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dtta_fast.commands.report import Pictures, Report
from dtta_fast.metrics import bootstrap_interval, calibration_error
from dtta_fast.report import make_page, read_runs
from dtta_fast.report.measures import number, reliability
from dtta_fast.report.svg import axis
from dtta_fast.runs.content import digest
from dtta_fast.runs.folder import digest_of

write_run = runpy.run_path(str(Path(__file__).with_name("report_runs.py")))["write_run"]
HOSTILE = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Elements with their attributes, the text of each plot's title and description, and the summary's cells by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.plots: dict[str, dict[str, str]] = {}
        self.cells: dict[str, list[list[str]]] = {}
        self.sections: list[str] = []
        self._open: list[str] = []
        self._plot = self._row = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag in ("meta", "link", "img", "input"):
            return
        if tag == "svg" and found.get("role") == "img":
            self._plot = (found["aria-labelledby"] or "").split()[0].removesuffix("-title")
            self.plots[self._plot] = {}
        if tag == "details" and found.get("class") == "section":
            self.sections.append(found["id"] or "")
        if tag == "tr" and self.sections:
            self._row = ""
        if tag == "td" and self.sections == ["summary"]:
            self.cells[self._row].append([])
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"{tag} is closed where it is not open"

    def handle_data(self, data: str) -> None:
        if not data.strip() or not self._open:
            return
        if self._open[-1] in ("title", "desc") and self._open[-2:-1] == ["svg"]:
            self.plots[self._plot][self._open[-1]] = data
        if self.sections == ["summary"]:
            if self._open[-1] == "th":
                self._row = data.strip()
                self.cells[self._row] = []
            elif "td" in self._open[-2:]:
                self.cells[self._row][-1].append(data.strip())

    def section(self, text: str, name: str) -> str:
        """The HTML of a section."""
        return text.partition(f'id="{name}" open')[2].partition('<details class="section"')[0]


def page_of(*folders: Path, **options: Any) -> tuple[str, Page]:
    text = make_page(read_runs(folders), **options)
    return text, Page(text)


def values(records: list[dict[str, Any]], suffix: str) -> torch.Tensor:
    return torch.tensor([float(record[f"prediction{suffix}"] == record["label"]) for record in records], dtype=torch.float64)


def test_summary_holds_what_the_records_add_up_to(tmp_path):
    first = write_run(tmp_path / "first", seed=1, failed=2)
    second = write_run(tmp_path / "second", seed=2, images=40)
    _, page = page_of(tmp_path / "first", tmp_path / "second")
    for column, records in enumerate(([r for r in first if "error" not in r], second)):
        before, after = values(records, "_before"), values(records, "")
        for name, mean, sign in (("Accuracy before", before, False), ("Accuracy after", after, False), ("Gain", after - before, True)):
            low, high = bootstrap_interval(mean)
            shown = [number(100 * value, 1, sign) for value in (float(mean.mean()), low, high)]
            assert page.cells[name][column] == [shown[0], f"{shown[1]} to {shown[2]}"]
        assert page.cells["Answers turned right"][column][0] == str(int(((after - before) > 0).sum()))
        assert page.cells["Answers turned wrong"][column][0] == str(int(((after - before) < 0).sum()))
        for when, suffix, right in (("before", "_before", before), ("after", "", after)):
            confidence = torch.tensor([record[f"confidence{suffix}"] for record in records], dtype=torch.float64)
            expected = number(100 * calibration_error(confidence, right))
            assert page.cells[f"Expected calibration error {when}"][column] == [expected]
        evaluations = sum(record["evaluations"] for record in records) / len(records)
        assert page.cells["Evaluations an image"][column] == [number(evaluations)]
        assert page.cells["Time an image"][column] == ["0.015"]
    assert page.cells["Images"] == [["60"], ["40"]]
    assert page.cells["Failed images"] == [["2"], ["0"]]


def test_plots_state_their_figures(tmp_path):
    records = write_run(tmp_path / "run", seed=3)
    _, page = page_of(tmp_path / "run")
    plots = page.plots
    assert {"groups", "classes", "reliability-0", "cost", "cumulative", "loss", "phases"} <= set(plots)
    assert all(plot["title"] and plot["desc"] for plot in plots.values())
    part = [record for record in records if record["group"] == "fog2"]
    gain = values(part, "") - values(part, "_before")
    low, high = bootstrap_interval(gain)
    told = f"fog2: {number(100 * float(gain.mean()), 1, True)} ({number(100 * low, 1, True)} to {number(100 * high, 1, True)})"
    assert told in plots["groups"]["desc"]
    threes = [record for record in records if record["label"] == 3]
    gain = values(threes, "") - values(threes, "_before")
    assert f"three: {number(100 * float(gain.mean()), 1, True)}" in plots["classes"]["desc"]
    losses = torch.tensor([record["loss"][1] for record in records if record["loss"][1] is not None], dtype=torch.float64)
    quartiles = torch.quantile(losses, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    assert f"step 2 {float(losses.mean()):.4g} ({quartiles[0]:.4g} to {quartiles[1]:.4g})" in plots["loss"]["desc"]
    few = sum(record["evaluations"] == 12 for record in records)
    assert "90 % of the images took at most 36" in plots["cumulative"]["desc"]
    assert f"{12 if few > 0.25 * len(records) else 36}" in plots["cumulative"]["desc"].partition("25 %")[2].partition(",")[0]
    assert "adapt: 12.25" in plots["phases"]["desc"]


def test_reliability_bins_are_those_of_the_calibration_error():
    confidence = torch.tensor([0.0, 0.05, 0.34, 0.65, 0.99, 1.0], dtype=torch.float64)
    right = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    bins = reliability(confidence, right)
    assert [round(6 * b.share) for b in bins] == [2, 1, 1, 2]
    assert bins[0].accuracy == 0.5
    assert sum(b.share * abs(b.confidence - b.accuracy) for b in bins) == pytest.approx(calibration_error(confidence, right))


def test_cards_are_the_images_that_changed_most(tmp_path):
    def flat(record: dict[str, Any]) -> None:
        top = [[record["label"], 0.6], [(record["label"] + 1) % 7, 0.4]]
        best = {"prediction": record["label"], "confidence": 0.6, "top": top}
        record |= best | {f"{name}_before": value for name, value in best.items()}
        if record["image_id"] == 7:  # its class is in no list before: all of its probability is gained
            record |= {"label": 5, "prediction_before": 1, "top_before": [[1, 0.9]], "prediction": 5, "top": [[5, 0.97], [1, 0.03]]}
        if record["image_id"] == 9:
            record |= {"label": 2, "top_before": [[2, 0.8], [3, 0.2]], "prediction": 3, "top": [[3, 0.7], [2, 0.3]]}

    write_run(tmp_path / "run", change=flat)
    asked = []
    pictures = {7: Image.new("RGB", (400, 300), (200, 40, 30)), 9: Image.new("L", (20, 20), 128)}

    def read(run: Any, image_id: int) -> Image.Image:
        asked.append(image_id)
        return pictures[image_id]

    text, page = page_of(tmp_path / "run", read_image=read)
    cards = [found for tag, found in page.elements if tag == "article"]
    assert [round(float(card["data-change"] or 0), 6) for card in cards] == [0.97, -0.5]
    assert asked == [7, 9]
    assert "five (true class) 0 → 97 %; one 90 → 3 %" in page.plots["image-0-0"]["desc"]
    sources = [found["src"] or "" for tag, found in page.elements if tag == "img"]
    assert [source.partition(";")[0] for source in sources] == ["data:image/jpeg", "data:image/png"]
    sizes = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).size for source in sources]
    assert sizes == [(96, 72), (20, 20)]
    assert text.index("Most improved") < text.index("image-0-0-title") < text.index("Most harmed") < text.index("image-0-1-title")


def test_text_of_records_is_escaped(tmp_path):
    def hostile(record: dict[str, Any]) -> None:
        record["path"] = f"{HOSTILE}\" onload='x' \udcff/{record['image_id']}"
        record["group"] = f"{HOSTILE}{record['image_id'] % 2}"

    folder = tmp_path / "<b>run"
    write_run(folder, change=hostile, failed=3)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"classes": [HOSTILE] * 7, "environment": {HOSTILE: HOSTILE}, "seconds": {HOSTILE: 1.0}}
    summary["config"]["adapt"][HOSTILE] = {"x": HOSTILE}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(summary["config"]))
    Report(runs=(folder,), out=tmp_path / "page.html").run()
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)") > 40
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not any(name.startswith("on") for _, found in page.elements for name in found)
    assert not any(tag == "b" for tag, _ in page.elements)


def test_page_loads_nothing_and_fits_a_phone(tmp_path):
    write_run(tmp_path / "run")
    text, page = page_of(tmp_path / "run", read_image=lambda run, i: Image.new("RGB", (8, 8)))
    addresses = [found[name] or "" for _, found in page.elements for name in ("src", "href", "action", "data", "srcset") if name in found]
    assert len(addresses) > 20
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in text
    assert "@import" not in text
    metas = [found for tag, found in page.elements if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    policy = next(found["content"] or "" for found in metas if found.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "prefers-color-scheme: dark" in text
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    assert {address[1:] or "" for address in addresses if address[0] == "#"} <= set(ids)


def test_sections_come_in_order_and_config_differences_are_marked(tmp_path):
    write_run(tmp_path / "a", failed=1)
    write_run(tmp_path / "b", seed=4, steps=5)
    text, page = page_of(tmp_path / "a", tmp_path / "b")
    expected = ["summary", "groups", "classes", "reliability", "cost", "loss", "images", "phases", "failures", "config", "environment"]
    assert page.sections == expected
    config = page.section(text, "config")
    marked = [part.partition("<span")[0] for part in config.split('<tr class="differs"><th scope="row">')[1:]]
    assert marked == ["adapt.steps", "adapt.seed"]
    assert "is truncated" in page.section(text, "failures")
    assert "cumulative" not in page.plots
    assert [part.partition(":")[0] for part in page.plots["cost"]["desc"].split("; ")] == ["a", "b"]


def test_depth_counts_less_as_better(tmp_path):
    records = write_run(tmp_path / "depth", "depth")
    text, page = page_of(tmp_path / "depth")
    before, after = (torch.tensor([record[key]["abs_rel"] for record in records], dtype=torch.float64) for key in ("score_before", "score"))
    gain = before - after
    assert float(gain.mean()) > 0
    assert page.cells["Absolute relative error after"][0][0] == number(float(after.mean()), 4)
    assert page.cells["Gain of absolute relative error"][0][0] == number(float(gain.mean()), 4, True)
    assert page.cells["Images that became better"][0][0] == str(int((gain > 0).sum()))
    assert {"summary", "groups", "cost", "images"} <= set(page.sections)
    assert not {"reliability", "classes"} & set(page.sections)
    cards = [found for tag, found in page.elements if tag == "article"]
    assert float(cards[0]["data-change"] or 0) == pytest.approx(float(gain.max()))
    best = records[int(gain.argmax())]
    assert f"abs_rel {best['score_before']['abs_rel']:.3f} → {best['score']['abs_rel']:.3f}" in page.plots["image-0-0"]["desc"]
    assert "less is better" in text


def test_segmentation_counts_more_as_better(tmp_path):
    records = write_run(tmp_path / "maps", "segmentation")
    _, page = page_of(tmp_path / "maps")
    gain = torch.tensor([record["score"]["mean_iou"] - record["score_before"]["mean_iou"] for record in records], dtype=torch.float64)
    assert page.cells["Gain"][0][0] == number(100 * float(gain.mean()), 1, True)


def test_images_without_labels_show_changed_answers(tmp_path):
    records = write_run(tmp_path / "run", change=lambda record: record.update(label=None))
    text, page = page_of(tmp_path / "run")
    changed = sum(record["prediction"] != record["prediction_before"] for record in records)
    assert page.cells["Answers changed"][0][0] == str(changed)
    assert "Changed, most confident" in text
    assert not {"groups", "classes", "reliability"} & set(page.sections)


def test_a_run_that_goes_on_is_shown_so_far(tmp_path):
    write_run(tmp_path / "run", finished=False)
    with (tmp_path / "run" / "records.jsonl").open("a") as file:
        file.write('{"image_id": 60, "batch": 7, "pa')
    text, page = page_of(tmp_path / "run")
    assert "<strong>run is unfinished:</strong> 60 images so far." in text
    assert page.cells["Images"] == [["60", "so far"]]
    assert "class 3: " in page.plots["classes"]["desc"]
    write_run(tmp_path / "ended")
    assert "three: " in page_of(tmp_path / "run", tmp_path / "ended")[1].plots["classes"]["desc"]
    assert "phases" not in page.sections
    assert "adapt.steps" in page.section(text, "config")
    (tmp_path / "run" / "records.jsonl").write_text("")
    text, page = page_of(tmp_path / "run")
    assert page.cells["Images"] == [["0", "so far"]]


def test_a_run_of_failures_alone_is_shown(tmp_path):
    write_run(tmp_path / "run", images=5, failed=5)
    _, page = page_of(tmp_path / "run")
    assert page.cells["Failed images"] == [["5"]]
    assert "failures" in page.sections


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="runs are missing"):
        read_runs([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty' holds no records.jsonl"):
        read_runs([tmp_path / "empty"])
    write_run(tmp_path / "a")
    with pytest.raises(ValueError, match="twice"):
        read_runs([tmp_path / "a", tmp_path / "a"])
    write_run(tmp_path / "maps", "depth")
    with pytest.raises(ValueError, match=r"a is of classification, maps is of depth"):
        read_runs([tmp_path / "a", tmp_path / "maps"])
    with pytest.raises(ValueError, match="cannot be written"):
        Report(runs=(tmp_path / "a",), out=tmp_path / "no" / "page.html").run()
    (tmp_path / "a" / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json is damaged"):
        read_runs([tmp_path / "a"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("no JSON", "line 3, is not a record"),
        ('["image_id", "batch"]', "line 3, is not a record: Expected `object`, got `array`"),
        (
            '{"image_id": 2, "batch": 0, "path": "x", "group": "y", "label": 1}',
            "line 3, is not a record: Object missing required field `loss`",
        ),
    ],
)
def test_damaged_records_are_named(tmp_path, line, message):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], line + "\n", *lines[3:]]))
    with pytest.raises(ValueError, match=message) as raised:
        read_runs([tmp_path / "run"])
    assert str(path) in str(raised.value)


def test_runs_of_one_name_are_told_apart(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "run")
    assert [run.name for run in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a/run", "b/run"]


def of_images(folder: Path, data: Path, count: int = 4, digests: bool = True) -> None:
    """A run on images that are there, whose config names another place."""
    data.mkdir(exist_ok=True)
    for i in range(count):
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(data / f"{i}.png")

    def change(record: dict[str, Any]) -> None:
        pixels = torch.zeros(3, 32, 32, dtype=torch.uint8)
        pixels[0] = 60 * record["image_id"]
        record.update(path=f"{record['image_id']}.png", group="folder", **({"digest": digest(pixels)} if digests else {}))
        record["label"] = None

    write_run(folder, images=count, change=change)


def test_command_reads_thumbnails_from_root_alone(tmp_path):
    data, page = tmp_path / "data", tmp_path / "page.html"
    of_images(tmp_path / "run", data)
    for kind in ("config.json", "summary.json"):  # what a run names is not read, even where it is there
        text = (tmp_path / "run" / kind).read_text()
        (tmp_path / "run" / kind).write_text(text.replace('"nowhere"', json.dumps(str(data))))
    Report(runs=(tmp_path / "run",), out=page).run()
    assert "data:image" not in page.read_text(encoding="utf-8")
    assert "No thumbnails of run: they are read from --root alone" in page.read_text(encoding="utf-8")
    Report(runs=(tmp_path / "run",), root=data, out=page).run()
    assert "data:image/png" in page.read_text(encoding="utf-8")
    (run,) = read_runs([tmp_path / "run"])
    assert Pictures(data)(run, 3).getpixel((5, 5)) == (180, 0, 0)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(data / "2.png")
    with pytest.raises(ValueError, match="image 2 has other pixels than the run read"):
        Pictures(data)(run, 2)
    (data / "0.png").rename(data / "9.png")
    assert "No thumbnails of run: the data set is not the one that the run was on" in make_page([run], Pictures(data))
    assert "No thumbnails of run: " in make_page([run], Pictures(tmp_path / "gone"))


@pytest.mark.parametrize("name", ["hf", "webdataset", "cifar10", "imagenet-c", "digits-c", "no-such"])
@pytest.mark.parametrize("root", ["someone/dataset", "https://example.org/x.tar", "/etc", None])
def test_a_report_asks_no_network(tmp_path, monkeypatch, name, root):
    """A config may name a data set of the hub or a private folder: nothing of it is fetched, opened or loaded."""

    def asked(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError(f"the report asked for {arguments}")

    write_run(tmp_path / "run", images=6)
    for kind in ("config.json", "summary.json"):
        found = json.loads((tmp_path / "run" / kind).read_text())
        described = found.get("config", found)
        described["data"] |= {"name": name, "root": root}
        described |= {"model": "someone/model", "denoiser": "someone/denoiser", "calibration": "/etc/passwd"}
        (tmp_path / "run" / kind).write_text(json.dumps(found))
    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", asked)
    if root is not None:
        monkeypatch.setattr("dtta_fast.commands.report.open_images", asked)
    Report(runs=(tmp_path / "run",), out=tmp_path / "page.html").run()
    assert "No thumbnails of run: " in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_data_set_of_the_hub_takes_a_folder(tmp_path, monkeypatch):
    write_run(tmp_path / "run", images=6)
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    found["data"] |= {"name": "hf", "root": "someone/dataset"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(found))
    (run,) = read_runs([tmp_path / "run"])
    with pytest.raises(ValueError, match="root is 'someone/dataset', which is not a folder here, and a report asks no hub"):
        Pictures(Path("someone/dataset"))(run, 0)


def test_reports_know_what_is_unfinished(tmp_path):
    folder = tmp_path / "run"
    write_run(folder, images=8)
    assert read_runs([folder])[0].unfinished == ""
    text, summary = (folder / "records.jsonl").read_text(), json.loads((folder / "summary.json").read_text())
    whole = {**summary, "records": digest_of(folder / "records.jsonl")}
    (folder / "summary.json").write_text(json.dumps(whole))
    assert read_runs([folder])[0].unfinished == ""
    (folder / "records.jsonl").write_text(text.replace('"accepted": true', '"accepted": false', 1))
    assert read_runs([folder])[0].unfinished == "records.jsonl is not what summary.json was made of"
    (folder / "records.jsonl").write_text("".join(text.splitlines(keepends=True)[:5]))
    (found,) = read_runs([folder])
    assert found.unfinished == "5 images so far; summary.json is of 8"
    assert (found.seconds, found.wall_seconds) == ({}, None)
    assert "<strong>run is unfinished:</strong> 5 images so far; summary.json is of 8." in make_page([found])
    (folder / "records.jsonl").write_text(text)
    (folder / "records-1.jsonl").write_text("")
    assert read_runs([folder])[0].unfinished == "8 images so far; summary.json is of 8"
    (folder / "records-1.jsonl").unlink()
    (folder / "records-old.jsonl").write_text("notes of mine")  # no file of a run
    assert read_runs([folder])[0].unfinished == ""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model": "other"}))
    assert read_runs([folder])[0].unfinished == "summary.json is of another config than config.json"


@pytest.mark.slow
def test_page_of_many_images_is_small_and_soon_there(tmp_path):
    groups = tuple(f"corruption_{k}" for k in range(19))
    write_run(tmp_path / "run", images=20_000, groups=groups)
    start = time.perf_counter()
    text, _ = page_of(tmp_path / "run", read_image=lambda run, i: Image.effect_noise((96, 96), 80))
    assert time.perf_counter() - start < 30  # 4 s on two idle cores
    assert len(text.encode()) < 3_000_000


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-7.3, 71.0), (0.1309, 0.1311), (0.0, 0.0), (5.0, 5.0), (-3e-5, 4e6)])
def test_axis_covers_its_range_in_few_round_steps(low, high):
    found = axis(low, high)
    assert 2 <= len(found.ticks) <= 7
    rounding = 1e-6 * (found.ticks[1] - found.ticks[0])
    assert found.low - rounding <= low <= high <= found.high + rounding
    assert (found.ticks[0], found.ticks[-1]) == (found.low, found.high)
