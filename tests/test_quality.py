"""What the quality benchmark computes from answers."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from dtta_fast import Adapter, presets, zoo
from dtta_fast.data.digits import load_digits
from dtta_fast.metrics import calibration_error

QUALITY = Path(__file__).parents[1] / "bench" / "quality"
DUSA = presets.DUSA.replace(lr=1e-3)  # so that two batches differ


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY))
    return importlib.import_module("run")


@pytest.fixture
def methods(run):
    return importlib.import_module("methods")


@pytest.fixture(scope="module")
def digits():
    """Classifier, denoiser, eight images."""
    return *zoo.load("digits"), load_digits("validation")[0][:8] * 0.6


def test_seeds_of_other_settings_are_not_kept(run, methods):
    slow, fast = (methods.Method(methods.by_adapter(DUSA.replace(lr=lr)), 10, "online", "DUSA") for lr in (1e-5, 1e-4))
    record = json.loads(json.dumps({"images": 8, "settings": slow.settings, "runs": [{"clean": {}}]}))
    assert run.kept(record, {"images": 8, "settings": slow.settings}) == record["runs"]
    assert run.kept(record, {"images": 8, "settings": fast.settings}) == []
    assert run.kept(record, {"images": 9, "settings": slow.settings}) == []
    rates = {name: table["TENT"].settings["lr"] for name, table in (("digits", methods.METHODS), ("CIFAR", methods.CIFAR))}
    assert rates == {"digits": 3e-3, "CIFAR": 3e-3}
    assert methods.CIFAR["DUSA"].settings["lr"] == methods.CIFAR["DUSA, matched"].settings["lr"] != presets.DUSA.lr


def test_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence = torch.tensor([0.9] * 10 + [0.6] * 10)
    right = torch.tensor([1] * 7 + [0] * 3 + [1] * 6 + [0] * 4)
    assert calibration_error(confidence, right) == pytest.approx(0.1)  # ten at 0.9 right 7 times, ten at 0.6 right 6 times


def test_summary_of_answers(run):
    def rows(first: str, second: str) -> dict:
        costs = {"forwards": 4.0, "backwards": 2.0, "seconds": 0.5, "calibration_error": 0.1}
        return {"fog": {"right": first, **costs}, "snow": {"right": second, **costs}}

    source, runs = rows("1100", "1000"), [rows("1110", "1001"), rows("0110", "1011")]
    found = run.summary(runs, source, ["fog", "snow"])
    assert found["accuracy"] == pytest.approx(10 / 16)
    assert found["gain"] == pytest.approx(10 / 16 - 3 / 8)
    assert found["negative_flips"] == pytest.approx(1 / 16)
    assert found["worst"] == (pytest.approx(0.125), "fog")
    assert found["of_seeds"] == pytest.approx([5 / 8, 5 / 8])
    low, high = found["gain_interval"]
    assert low <= found["gain"] <= high
    assert found["forwards"] == 4.0


def test_what_a_method_has_learnt_goes_on_as_its_protocol_says(run):
    streams, labels = {name: torch.rand(6, 3, 4, 4) for name in ("fog", "clean")}, torch.zeros(6, dtype=torch.int64)
    seen: list[str] = []

    def make(setting):
        def answer(images, ids):
            seen.append(f"{len(images)} from {int(ids[0])}")
            return run_answer(torch.tensor([[1.0, 0.0]]).repeat(len(images), 1), 2 * len(images), 0)

        return answer, lambda: seen.append("reset")

    run_answer = importlib.import_module("methods").Answer
    method = run.Method(make, 4, "online", "x")
    rows = run.measure(method, None, streams, labels)
    assert seen == ["reset", "4 from 0", "2 from 4"] * 2
    assert rows["fog"]["right"] == "111111"
    assert rows["fog"]["forwards"] == 2
    seen.clear()
    run.measure(run.Method(make, 4, "continual", "x"), None, streams, labels)
    assert "reset" not in seen


@pytest.mark.parametrize("match", ["off", "both"])
def test_dusa_answers_before_it_learns_from_a_batch(methods, digits, match):
    model, denoiser, images = digits
    config, ids = DUSA.replace(match=match), torch.arange(8)
    run, _ = methods.by_adapter(config, answer_first=True)(methods.Setting(model, denoiser, images, 0))
    found = [run(images[part], ids[part]).logits for part in ids.split(4)]
    adapter = Adapter(model, denoiser, config)
    still = Adapter(model, denoiser, config.replace(lr=0.0, denoiser_lr=0.0))  # answers after an update that moves nothing
    torch.testing.assert_close(found[0], still.adapt(images[:4]).outputs)
    adapter.adapt(images[:4])
    still.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(found[1], still.adapt(images[4:], image_ids=ids[4:]).outputs, rtol=1e-4, atol=1e-4)
    after = adapter.adapt(images[4:], image_ids=ids[4:]).outputs
    assert float((found[1] - after).abs().max()) > 1e-2


def test_passes_of_noise_mixing_over_all_classes(methods, digits):
    model, denoiser, images = digits
    run, _ = methods.by_adapter(DUSA.replace(top_k=None, drawn_classes=0))(methods.Setting(model, denoiser, images, 0))
    answer = run(images[:2], torch.arange(2))
    assert (answer.forwards, answer.backwards) == (20, 20)


def test_baselines_look_at_the_crop_and_at_the_matched_image(methods, digits):
    model, denoiser, images = digits
    setting, ids = methods.Setting(model, denoiser, images, 0), torch.arange(8)
    larger = torch.nn.functional.interpolate(images, size=40)
    plain, matched = (methods.by_baseline(methods.source, matched=m)(setting)[0] for m in (False, True))
    crop = Adapter(model, denoiser).crop(larger)
    with torch.no_grad():
        torch.testing.assert_close(plain(larger, ids).logits, model(crop * 2 - 1))
        torch.testing.assert_close(matched(larger, ids).logits, model(denoiser.calibration.match(crop) * 2 - 1))


def test_ablations_of_an_open_vocabulary_are_refused(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "open_vocabulary", "--ablations"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--ablations" in capsys.readouterr().err.splitlines()[-1]


def test_seeds_on_record_are_kept_in_the_same_setup_alone(run):
    setup = {"images": 4, "severities": {"fog": 3}, "split": "test", "denoiser": "a 0.5"}
    record = {**setup, "runs": [{"fog": {"right": "1100"}}], "commit": "c"}
    assert run.kept(record, setup) == record["runs"]
    for name, other in (("images", 5), ("severities", {"fog": 2}), ("split", "validation"), ("denoiser", "a 0.4")):
        assert run.kept(record, {**setup, name: other}) == []
    assert run.kept({"runs": record["runs"], "images": 4, "severities": {"fog": 3}}, setup) == []  # an older file
    assert run.kept(None, setup) == []


def test_fast_is_compared_on_the_images_and_seeds_that_both_have(monkeypatch):
    monkeypatch.syspath_prepend(str(QUALITY.parent))
    readme = importlib.import_module("readme")

    def record(images: int, *seeds: str) -> dict:
        return {"images": images, "severities": {"fog": 3}, "runs": [{"fog": {"right": right}} for right in seeds]}

    fast, other = record(4, "1100", "0000"), record(2, "01")
    assert readme.advantage(fast, other) == "+50.0 (+0.0 .. +100.0)"  # of the first seed's first two images one is gained
    assert readme.advantage(fast, record(4, "1100", "1000")) == "-12.5 (-37.5 .. +0.0)"


@pytest.fixture
def plot(monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.syspath_prepend(str(QUALITY))
    return importlib.import_module("plot")


def plotted(images: int, accuracy: float, gain: float, passes: float) -> dict:
    figures = {"accuracy": accuracy, "gain": gain, "gain_interval": [gain - 0.02, gain + 0.02], "forwards": passes, "backwards": 0.0}
    return {"images": images, "corrupted": figures}


def test_a_method_on_fewer_images_stands_at_the_source_plus_its_gain(plot, tmp_path):
    records = {"FAST": plotted(500, 0.80, 0.10, 20), "PAPER": plotted(25, 0.95, 0.05, 1800), "NEO": plotted(500, 0.71, 0.01, 0)}
    assert [point.name for point in plot.points(records)] == ["FAST", "PAPER", "NEO"]
    assert [point.accuracy for point in plot.points(records)] == pytest.approx([80, 75, 71])  # the source, which was not run alone, is 70
    for draw in (plot.summary, plot.whole):  # most methods are missing
        draw(records, "CIFAR-10-C", tmp_path / f"{draw.__name__}.svg")
        assert (tmp_path / f"{draw.__name__}.svg").stat().st_size > 1000


def test_names_at_near_points_do_not_cover_each_other(plot):
    names = [f"method {k}" for k in range(6)]
    found = [plot.Point(name, 20.0 + k % 3, 10.0, 80 - k / 10, 79 - k / 10, 81 - k / 10) for k, name in enumerate(names)]
    figure, axis = plot.plt.subplots(figsize=(8, 5))
    plot.draw(axis, found, 70.0, names, ["black"] * 6)
    boxes = [plot.Text.get_window_extent(text) for text in axis.texts]  # without the lines that lead to the names; the source's too
    plot.plt.close(figure)
    assert len(boxes) == 7
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_the_relighting_experiment_s_normals_and_shading(monkeypatch):
    """A plane n · p = c has the normal n everywhere, towards the camera, and a flat surface's light is one number an image."""
    monkeypatch.syspath_prepend(str(QUALITY))
    relight = importlib.import_module("relight")
    normal = torch.nn.functional.normalize(torch.tensor([0.3, 0.5, -1.0], dtype=torch.float64), dim=0)
    along = ((torch.arange(32, dtype=torch.float64) + 0.5) / 16 - 1) * math.tan(relight.HALF_ANGLE)  # through the pixels' centres
    rays = torch.stack([along.expand(32, 32), -along[:, None].expand(32, 32), torch.ones(32, 32, dtype=torch.float64)], dim=-1)
    depth = -3.0 / (rays @ normal)
    found = relight.normals(depth[None])[0].movedim(0, -1)
    assert (depth > 0).all()
    torch.testing.assert_close(found, normal.expand(32, 32, 3), rtol=1e-9, atol=1e-9)
    flat, images = torch.full((4, 16, 16), 2.0), torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    lit = relight.relit(images, flat, torch.Generator().manual_seed(1))
    less = relight.relit(images / 2, flat, torch.Generator().manual_seed(1))
    share = (lit - less) / (images / 2)  # of a flat surface: its light, one number an image
    assert 0 < share.min() <= share.max() < 1
    torch.testing.assert_close(share, share[:, :1, :1, :1].expand_as(share), rtol=1e-2, atol=1e-2)
    facing = relight.normals(flat)[0, :, 8, 8]
    torch.testing.assert_close(facing, torch.tensor([0.0, 0.0, -1.0]))  # towards the camera
    dark = relight.relit(torch.zeros(64, 3, 8, 8), torch.full((64, 8, 8), 2.0), torch.Generator().manual_seed(2))
    assert dark.amax() > 0.1  # a highlight needs no colour of the surface
