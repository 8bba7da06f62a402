"""Matching an image to the statistics of a denoiser's own images."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn

from dtta_fast import AdaptConfig, Adapter, Calibration, adapt, presets, zoo
from dtta_fast.core.calibrate import _logistic_slope, calibrate, class_signal, loss_trust
from dtta_fast.core.differences import BINS, PAIRS, RIVALS, Differences, pair_timesteps
from dtta_fast.core.guard import compare
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers.calibration import EDGE, MOST_TRUST, _distances_to_the_others, fingerprint
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NOISE, SIGNAL, NoiseProcess
from dtta_fast.kernels.philox import normal
from dtta_fast.session.checks import check_calibration
from dtta_fast.session.program import SURE
from dtta_fast.tasks import Classification


@pytest.fixture
def clean() -> torch.Tensor:
    """Smooth images of two colours: what most of the power of a photograph is like."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(16, 3, 8, 8, generator=generator)
    return F.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1) * 0.8 + 0.1


@pytest.fixture
def calibration(clean) -> Calibration:
    return Calibration.measure(nn.Linear(2, 2), clean)


def test_typical_statistics_are_those_of_a_direct_sum(clean, calibration):
    """Statistics by numpy's full transform in float64, ring by ring."""
    values = clean.double()
    deviation, mean = torch.std_mean(values, dim=(1, 2, 3), keepdim=True, correction=0)
    power = torch.fft.fft2((values - mean) / deviation, norm="forward").abs().square().mean(1)
    rows = torch.fft.fftfreq(32, 1 / 32)
    ring = torch.hypot(rows[:, None], rows[None, :]).round().long().clamp(max=16)
    expected = torch.stack([mean.flatten(), deviation.log().flatten(), *(power[:, ring == r].mean(1).log() for r in range(1, 17))], dim=1)
    torch.testing.assert_close(torch.tensor(calibration.typical).double(), expected.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(calibration.scatter).double(), expected.std(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 33)])
def test_matched_images_come_to_the_edge_of_the_usual_range(clean, calibration, size):
    images = F.interpolate(clean, size=size, mode="bilinear") * 0.1 + 0.85  # low contrast, bright, another size
    matched = calibration.match(images)
    assert matched.shape == images.shape
    mean, deviation = matched.mean((1, 2, 3)), matched.std((1, 2, 3), correction=0).log()
    edges = [calibration.typical[0] + EDGE * calibration.scatter[0], calibration.typical[1] - EDGE * calibration.scatter[1]]
    torch.testing.assert_close(mean, torch.full((16,), edges[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(deviation, torch.full((16,), edges[1]), rtol=0, atol=1e-3)


def test_a_frequency_is_moved_to_the_nearer_edge_and_no_further(clean, calibration):
    """Frequencies of 4 to 10 cycles are raised threefold: matching lowers those in the middle to the upper edge, where neighbours agree."""
    spectrum = torch.fft.rfft2(clean.double())
    rows, columns = torch.fft.fftfreq(32, 1 / 32), torch.arange(17)
    radius = torch.hypot(rows[:, None], columns[None, :])
    ring, band = radius.round() == 7, (radius > 4) & (radius < 10)
    images = torch.fft.irfft2(torch.where(band, spectrum * 3, spectrum))

    def powers(images: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True, correction=0)
        return torch.fft.rfft2((images - mean) / deviation, norm="forward").abs().square().mean(1)[:, ring].mean(1).log()

    edge = calibration.typical[2 + 6] + EDGE * calibration.scatter[2 + 6]
    before, after = powers(images), powers(calibration.match(images.float()).double())
    assert bool((before > edge).all())
    torch.testing.assert_close(after, torch.full_like(after, edge), rtol=0, atol=0.3)  # normalising again moves all rings a little


def test_a_usual_image_is_returned_bit_for_bit(clean, calibration):
    wide = dataclasses.replace(calibration, scatter=tuple(5 * value for value in calibration.scatter))
    assert torch.equal(wide.match(clean), clean)
    half = clean.bfloat16()
    assert torch.equal(wide.match(half), half)
    mixed = torch.cat([clean[:2], clean[:1] * 0.05])
    moved = (wide.match(mixed) != mixed).flatten(1).any(1)
    assert moved.tolist() == [False, False, True]


def test_matching_takes_away_contrast_and_brightness_that_are_unusual(clean, calibration):
    faint, fainter = (calibration.match(clean * factor + 0.5) for factor in (0.1, 0.05))
    torch.testing.assert_close(faint, fainter, rtol=0, atol=2e-4)


def test_matching_gives_back_what_blur_took(clean, calibration):
    taps = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = (taps[:, None] * taps)[None, None].repeat(3, 1, 1, 1)
    blurred = F.conv2d(F.pad(clean, (2, 2, 2, 2), mode="circular"), kernel, groups=3)
    before, after = ((images - calibration.match(clean)).square().mean() for images in (blurred, calibration.match(blurred)))
    assert after < before / 2


def test_images_without_contrast_stay_finite(calibration):
    assert calibration.match(torch.full((2, 3, 32, 32), 0.3)).isfinite().all()


def test_an_image_s_match_is_its_own(clean, calibration):
    torch.testing.assert_close(calibration.match(clean)[3:4], calibration.match(clean[3:4]), rtol=0, atol=1e-6)


def test_files(tmp_path, calibration):
    denoiser = nn.Linear(2, 2)
    own = dataclasses.replace(calibration, fingerprint=Calibration.measure(denoiser, torch.rand(8, 3, 8, 8)).fingerprint)
    own.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json", denoiser) == own
    for other in (nn.Linear(2, 2), nn.Linear(3, 2)):
        with torch.no_grad():
            other.bias.copy_(-denoiser.bias)
        with pytest.raises(ValueError, match="belongs to another denoiser"):
            Calibration.load(tmp_path / "c.json", other)
    written = json.loads((tmp_path / "c.json").read_text())
    for damage in ({"scatter": []}, {"typical": [1.0]}, {"limit": "grey"}, {"typical": [float("nan")] * 5}, {"limit": 0.0}):
        (tmp_path / "c.json").write_text(json.dumps({**written, **damage}))
        with pytest.raises(ValueError, match="is not a calibration"):
            Calibration.load(tmp_path / "c.json", denoiser)


NAN, INFINITY = float("nan"), float("inf")
BAD = [  # a field, where in it, and what it is not
    *(("limit", None, value) for value in (-0.1, 1e300, NAN, INFINITY, "0.5", None, True, [0.5], 10**400)),
    *(("typical", 3, value) for value in (1e30, -1e30, NAN, INFINITY, "1", None, True)),
    *(("scatter", 3, value) for value in (0.0, -1.0, 1e-40, 1e30, NAN)),
    *(("signal", 3, value) for value in (1e300, -1e300, NAN, INFINITY)),
    *(("spread", 3, value) for value in (0.0, -1.0, 1e-300, 1e300, NAN)),
    *(
        (name, None, value)
        for name in ("typical", "scatter", "signal", "spread")
        for value in ("123", 5, {"a": 1}, [[1.0]] * 17, [1.0] * 2**17)
    ),
    *(("fingerprint", None, value) for value in (5, None, "x", "g" * 12, "a" * 300)),
]


@pytest.mark.parametrize(("field", "at", "value"), BAD, ids=lambda value: str(value)[:20])
def test_a_file_of_absurd_numbers_is_refused_by_its_field(tmp_path, field, at, value):
    _, denoiser = _digits()
    written = dataclasses.asdict(denoiser.calibration)
    written = {name: list(given) if isinstance(given, tuple) else given for name, given in written.items()}
    if at is None:
        written[field] = value
    else:
        written[field][at] = value
    (tmp_path / "c.json").write_text(json.dumps(written))
    where = field if at is None or not isinstance(value, list) else f"{field}[{at}]"
    with pytest.raises(ValueError, match=rf"c\.json is not a calibration: {re.escape(where)}.*; measure one by"):
        Calibration.load(tmp_path / "c.json", denoiser)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"typical": [0.1] * 3, "scatter": [0.1] * 3}, "typical has 3 values, and 4 are the least"),
        ({"scatter": [0.1] * 5}, "scatter has 5 values, and typical 18"),
        ({"spread": [0.1] * 5}, "spread has 5 values, and signal 20"),
        ({"limit": 0.0}, "limit is 0: it is the distance"),
        ({"signal": [0.1] * 1001, "spread": [0.1] * 1001}, "signal has 1001 values, and the denoiser 1000 timesteps"),
        ({"limit": ...}, "limit is missing"),
        ({"fingerprint": ...}, "fingerprint is missing"),
    ],
)
def test_a_file_whose_fields_do_not_fit_together(tmp_path, changes, message):
    _, denoiser = _digits()
    written = {**dataclasses.asdict(denoiser.calibration), **changes}
    (tmp_path / "c.json").write_text(json.dumps({name: value for name, value in written.items() if value is not ...}))
    with pytest.raises(ValueError, match=rf"c\.json is not a calibration: {message}"):
        Calibration.load(tmp_path / "c.json", denoiser)


def test_the_extremes_that_are_taken_give_a_density(tmp_path):
    """What a file may hold at most still makes numbers of float64, and some timestep is drawn."""
    _, denoiser = _digits()
    for signal, spread in (([1e6, -1e6, 1.0], [1e-30, 1e6, 1.0]), ([1.0] * 1000, [1e-30] * 1000)):
        dataclasses.replace(denoiser.calibration, signal=tuple(signal), spread=tuple(spread)).save(tmp_path / "c.json")
        density = Calibration.load(tmp_path / "c.json", denoiser).density(1000)
        assert density.isfinite().all()
        assert density.sum().isfinite()
        assert density.sum() > 0


@pytest.mark.parametrize("kind", ["list", "words", "pipe", "missing", "large", "long"])
def test_a_file_that_is_none(tmp_path, kind):
    path = tmp_path / ("x" * 300 if kind == "long" else "c.json")
    if kind in ("list", "words"):
        path.write_text("[]" if kind == "list" else "no JSON")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "large":
        path.touch()
        os.truncate(path, 2**33)
    with pytest.raises(ValueError, match="is not a calibration"):
        Calibration.load(path, nn.Linear(2, 2))


@functools.cache
def _digits():
    return zoo.load("digits")


def test_the_fingerprint_tells_denoisers_apart(denoiser, random_network):
    """By the class table and by the noise process too; precision does not matter."""
    own = fingerprint(denoiser)
    assert fingerprint(copy.deepcopy(denoiser).half()) == own
    other_process = DiT(denoiser.network, NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")))
    other_classes = copy.deepcopy(denoiser)
    with torch.no_grad():
        other_classes.network.y_embedder.embedding_table.weight.neg_()
    assert len({own, fingerprint(other_process), fingerprint(other_classes)}) == 3


def test_the_limit_is_of_images_that_the_statistics_have_not_seen():
    """Of 16 images, 95 % of others are not usual by their own distances: those are drawn towards the mean of so few."""
    statistics = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).double()
    found = _distances_to_the_others(statistics)
    for i in range(12):
        others = torch.cat([statistics[:i], statistics[i + 1 :]])
        away = (statistics[i] - others.mean(0)) / others.std(0)
        assert float(found[i]) == pytest.approx(float(away.square().mean().sqrt()))


def test_a_gain_is_at_most_4(calibration):
    """What blur has taken altogether stays away: a wave of 8 cycles, a ten-thousandth of one of 2, stays under 16 ten-thousandths."""
    x = torch.arange(32) / 32 * 2 * torch.pi
    image = (0.5 + 0.2 * (2 * x).cos() + 0.2e-4 * (8 * x).cos()).expand(1, 3, 32, 32)
    found = torch.fft.rfft(calibration.match(image)[0, 0, 0].double(), norm="forward").abs()
    assert float(found[8] / found[2]) < 16.5e-4


def test_how_surely_timesteps_tell_classes_apart(denoiser, images):
    """Two parts of the process by a plain loop in float64: an image's own class is the best of all, its rival the next one."""
    x0, ids = denoiser.encode(images), torch.arange(len(images))
    measured = Differences(denoiser, "key", images, None)
    classes = measured.classes()
    found = measured.along_the_process(classes)
    table, width = denoiser.class_embeddings({}), 1000 // BINS

    def losses(i: int, k: int, timesteps: torch.Tensor, step: int) -> torch.Tensor:
        pairs = torch.arange(len(timesteps))
        noise = normal(x0[0].numel(), pairs, torch.tensor([i]), 0, torch.tensor(step), torch.float64)[0].view(len(pairs), *x0.shape[1:])
        signal_of, noise_of = (denoiser.process.table[timesteps, column].double().view(-1, 1, 1, 1) for column in (0, 1))
        with torch.no_grad():
            prediction = denoiser(signal_of * x0[i] + noise_of * noise, timesteps, table[k].expand(len(timesteps), -1))
        return (prediction[:, : x0.shape[1]] - noise).square().mean((1, 2, 3))

    middles = torch.arange(BINS) * width + width // 2
    first = torch.stack([torch.stack([losses(i, k, middles, 0) for k in range(len(table))]) for i in range(len(x0))])
    scores = (first / first.std(1, keepdim=True).mean(0)).mean(2)
    order = scores.argsort(1)[:, : 1 + RIVALS]
    assert torch.equal(classes, order)
    timesteps = pair_timesteps(denoiser, ids)
    for i in range(len(x0)):
        assert timesteps[i].unflatten(0, (BINS, PAIRS)).div(width, rounding_mode="floor").eq(torch.arange(BINS)[:, None]).all()
        own, rival = (losses(i, int(k), timesteps[i], 1) for k in order[i, :2])
        torch.testing.assert_close(found[i].flatten(), (rival - own).double(), rtol=1e-3, atol=1e-9)
    second = Differences(denoiser, "key", images, order[:, 1]).classes()
    assert torch.equal(second[:, :2], order[:, [1, 0]])  # an answer is taken at its word
    outputs = torch.randn(len(images), len(table), generator=torch.Generator().manual_seed(0))
    assert torch.equal(Differences(denoiser, "key", images, outputs).classes(), outputs.argsort(1, descending=True)[:, : 1 + RIVALS])


@pytest.mark.parametrize("images", [torch.rand(4, 3, 8, 8), torch.rand(8, 8), torch.rand(8, 3, 8, 8) * 255, torch.full((8, 3, 8, 8), 0.5)])
def test_too_little_to_measure_on(images):
    with pytest.raises(ValueError, match=r"^images (has|is|have) "):
        Calibration.measure(nn.Linear(2, 2), images)


def test_fast_works_without_a_calibration_and_says_how(model, denoiser, images):
    """Nothing is matched, no image is left out, and the timesteps have log signal-to-noise ratios from -4 to 0."""
    with pytest.warns(UserWarning, match=r"no calibration for these.*timesteps='stratified', timestep_range=.*match='off', precheck='off'"):
        adapter = Adapter(model, denoiser, presets.FAST)
    config = adapter.config
    low, high = config.timestep_range
    ratio = (denoiser.process.table[:, SIGNAL].double().square() / denoiser.process.table[:, NOISE].double().square()).log()
    assert config == presets.FAST.replace(timesteps="stratified", timestep_range=(low, high), match="off", precheck="off")
    assert ratio[low] <= 0 < ratio[low - 1]
    assert ratio[high - 1] >= -4 > ratio[high]
    torch.testing.assert_close(adapter(images), adapt(model, denoiser, images, config=config).outputs)
    denoiser.calibration = Calibration.measure(denoiser, torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3)) ** 2)
    with pytest.warns(UserWarning, match="no calibration of its timesteps for these settings"):
        found = Adapter(model, denoiser, presets.FAST).config
    assert (found.match, found.precheck, found.timesteps) == ("both", "answer", "stratified")
    kept = Adapter(model, denoiser, presets.FAST.replace(timesteps="stratified", timestep_range=(1, 40))).config
    assert kept.timestep_range == (1, 40)


def test_updates_that_nothing_guards_are_warned_of_where_the_loss_is_not_trusted(model, denoiser, recwarn):
    found = Calibration.measure(denoiser, torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3)) ** 2)
    denoiser.calibration = dataclasses.replace(found, trust=0.15)
    own = {"timesteps": "stratified", "timestep_range": (1, 40)}
    for settings in (presets.FAST.replace(**own), presets.RANK.replace(**own), presets.PAPER):
        Adapter(model, denoiser, settings)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"trust 0\.15: its loss separates the classes poorly, and with guard 0 .* such as FAST"):
        Adapter(model, denoiser, presets.ONLINE.replace(**own))
    denoiser.calibration = dataclasses.replace(found, trust=0.4)
    recwarn.clear()
    Adapter(model, denoiser, presets.ONLINE.replace(**own))
    assert not recwarn.list


def test_what_is_kept_under_a_config_s_name_is_refused_without_its_calibration(model, denoiser):
    with pytest.raises(ValueError, match=r"no calibration for timesteps='calibrated', match='both', precheck='answer': measure one by"):
        check_calibration(denoiser, presets.FAST.replace(timestep_range=(0, 50)))
    check_calibration(denoiser, presets.PAPER)


def test_the_answer_before_is_to_the_image_as_it_is(model, denoiser, images):
    """match "both" adapts on the matched image, and where no step runs or the guard refuses, the answer is the source's own."""
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    denoiser.calibration = Calibration.measure(denoiser, torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3)) ** 2)
    config = AdaptConfig(steps=2, pairs=4, lr=1e-2)
    found = {match: adapt(model, denoiser, images, config=config.replace(match=match)) for match in ("off", "denoiser", "both")}
    for match in ("denoiser", "both"):
        torch.testing.assert_close(found[match].outputs_before, found["off"].outputs_before)
        assert not torch.allclose(found[match].loss, found["off"].loss, rtol=1e-3)
        assert not torch.allclose(found[match].outputs, found["off"].outputs, rtol=1e-3)  # without a guard the adapted answer stands
    on_matched = adapt(model, denoiser, denoiser.calibration.match(images).clamp(0, 1), config=config)
    torch.testing.assert_close(found["both"].loss, on_matched.loss, rtol=0.1, atol=0.05)  # but for the clamp
    one = adapt(model, denoiser, images[2:3], config=config.replace(match="both"), image_ids=torch.tensor([2]))
    torch.testing.assert_close(one.outputs, found["both"].outputs[2:3], rtol=1e-3, atol=1e-4)


def test_the_zoo_s_is_of_its_training_images():
    _, denoiser = zoo.load("digits")
    again = Calibration.measure(denoiser, load_digits("train")[0])
    assert again.fingerprint == denoiser.calibration.fingerprint
    torch.testing.assert_close(torch.tensor(again.typical), torch.tensor(denoiser.calibration.typical), rtol=1e-3, atol=1e-3)


def test_matching_takes_low_contrast_away_from_the_digits():
    """The denoiser tells the classes apart again: its classification by 8 pairs a class, before and after."""
    from dtta_fast.kernels import Pairs, add_noise, denoising_loss

    _, denoiser = zoo.load("digits")
    images, labels = (part[:24] for part in load_digits("validation"))
    faint = corrupt(images, "contrast", DIGITS_C["contrast"])
    right = []
    for seen in (faint, denoiser.calibration.match(faint)):
        timesteps = torch.arange(500, 740, 30).expand(24, -1).contiguous()
        draw = {"table": denoiser.process.table, "x0": denoiser.encode(seen), "timesteps": timesteps, "image_ids": torch.arange(24)}
        draw |= {"seed": 0, "step": torch.tensor(0), "pair0": 0, "noise": None}
        x_t, losses = add_noise(Pairs(**draw), torch.float32), []
        for row in denoiser.class_embeddings({}):
            with torch.no_grad():
                prediction = denoiser(x_t, timesteps.flatten(), row.expand(len(x_t), -1))
            losses.append(denoising_loss(prediction, Pairs(**draw)).mean(1))
        right.append(int((torch.stack(losses).argmin(0) == labels).sum()))
    assert right[1] >= right[0] + 4
    assert right[1] >= 20


def test_the_pre_check_leaves_alone_what_the_source_says_twice():
    model, denoiser = zoo.load("digits")
    images = load_digits("validation")[0][:16]
    images = torch.cat([corrupt(images, "gaussian_blur", 5)[:10], corrupt(images, "motion_blur", 3)[10:]])
    config = presets.FAST.replace(steps=1)
    whole = adapt(model, denoiser, images, config=config.replace(precheck="off"))
    found = adapt(model, denoiser, images, config=config)
    with torch.no_grad():
        logits = model(denoiser.calibration.match(images) * 2 - 1)
    matched = logits.argmax(1)
    asked = (matched != found.predictions_before) | (logits.softmax(1).amax(1) < SURE)
    assert bool((asked != (matched != found.predictions_before)).any())
    assert 0 < int(asked.sum()) < 16
    assert torch.equal(found.evaluations > 0, asked)
    assert torch.equal(found.loss.isnan()[:, 0], ~asked)
    torch.testing.assert_close(found.outputs[asked], whole.outputs[asked], rtol=1e-3, atol=1e-3)
    assert torch.equal(found.predictions[~asked], matched[~asked])
    assert torch.equal(found.predictions[~asked], found.predictions_before[~asked])
    assert not found.accepted[~asked].any()
    none = adapt(model, denoiser, images[~asked], config=config)
    assert none.steps_run == 0
    assert none.loss.shape == (int((~asked).sum()), 0)
    assert not none.evaluations.any()
    ranked = adapt(model, denoiser, images, config=presets.RANK)
    assert torch.equal(ranked.evaluations, 72 * asked)  # 24 pairs of three classes
    assert torch.equal(ranked.outputs[~asked], found.outputs[~asked])
    assert torch.equal(ranked.accepted, asked)
    timesteps = torch.randint(300, 800, (16, 1, 4))
    given = adapt(model, denoiser, images, config=config, timesteps=timesteps)
    same = adapt(model, denoiser, images, config=config.replace(precheck="off"), timesteps=timesteps)
    torch.testing.assert_close(given.loss[asked], same.loss[asked])
    for change in ({"match": "denoiser"}, {"mode": "online"}, {"method": "diffusion_classifier"}):
        with pytest.raises(ValueError, match=r"precheck is .answer. with"):
            config.replace(**change)


def test_the_pre_check_by_statistics_leaves_alone_what_is_usual():
    model, denoiser = zoo.load("digits")
    clean = load_digits("validation")[0][:40]
    calibration = denoiser.calibration
    usual = [float((calibration.distance(images) <= calibration.limit).float().mean()) for images in (clean, corrupt(clean, "contrast", 3))]
    assert usual[0] > 0.85
    assert usual[1] < 0.1
    far = calibration.distance(clean)
    torch.testing.assert_close(calibration.distance(clean[3:5]), far[3:5])  # an image's own
    images = torch.cat([clean[far <= calibration.limit][:3], corrupt(clean[:3], "gaussian_blur", 5)])
    found = adapt(model, denoiser, images, config=presets.FAST.replace(steps=1, guard=4, precheck="statistics"))
    assert torch.equal(found.loss.isnan()[:, 0], torch.tensor([True] * 3 + [False] * 3))
    with torch.no_grad():
        torch.testing.assert_close(found.outputs[:3], model(calibration.match(images[:3]) * 2 - 1))
    assert not found.evaluations[:3].any()
    assert bool((found.evaluations[3:] > 0).all())


def test_the_pre_check_selects_images_whether_code_is_compiled_or_not():
    """Compiled code runs whole batches; what it computes for the other images is not part of the result."""
    model, denoiser = zoo.load("digits")
    images = corrupt(load_digits("validation")[0][:12], "gaussian_blur", 5)
    session = Adapter(model, denoiser, presets.FAST.replace(steps=1))
    plain = session.adapt(images)
    asked = plain.evaluations > 0
    assert asked.any()
    assert not asked.all()
    rows: list[int] = []
    session.engine.program.problem.denoiser.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    session.engine.program.compiles = True  # of which only this rule counts here
    found = session.adapt(images)
    assert rows[0] == len(images) * session.config.pairs
    assert torch.equal(found.evaluations > 0, asked)
    assert torch.equal(found.outputs[~asked], plain.outputs[~asked])
    torch.testing.assert_close(found.outputs, plain.outputs, rtol=1e-3, atol=1e-3)


def _tiny_dit(seed: int) -> DiT:
    torch.manual_seed(seed)
    network = DiTNetwork(
        input_size=32, in_channels=3, patch_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=10, learn_sigma=False
    )
    process = NoiseProcess.from_scheduler(DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="sample"))
    return DiT(network, process)


def _random_weights() -> DiT:
    denoiser, generator = _tiny_dit(0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in denoiser.parameters():  # adaLN's zeros too, without which every class gives the same loss
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.1 if weight.ndim < 2 else 0.7 / weight[0].numel() ** 0.5))
    return denoiser.eval()


def _trained_for_seconds() -> DiT:
    """Knows what digits look like, and hardly anything about their classes."""
    denoiser = _tiny_dit(0)
    images, labels = load_digits("train")
    optimizer = torch.optim.Adam(denoiser.parameters(), 2e-3)
    for _ in range(150):
        rows, timesteps = torch.randint(len(images), (32,)), torch.randint(1000, (32,))
        x0 = denoiser.encode(images[rows])
        signal, noise = (denoiser.process.table[timesteps][:, column, None, None, None] for column in (SIGNAL, NOISE))
        predicted = denoiser(signal * x0 + noise * torch.randn_like(x0), timesteps, denoiser.class_embeddings({})[labels[rows]])
        optimizer.zero_grad()
        F.mse_loss(predicted, x0).backward()
        optimizer.step()
    return denoiser.eval()


@pytest.mark.parametrize("make", [_random_weights, _trained_for_seconds])
def test_a_denoiser_that_knows_no_classes_does_no_harm(make):
    """FAST gives the answers of matching alone, though this denoiser's loss favours some classes on every image."""
    model, denoiser = zoo.load("digits")[0], make()
    clean, labels = load_digits("train")
    with torch.no_grad():
        answers = model(clean[:32] * 2 - 1)
    denoiser.calibration = calibrate(denoiser, clean[:32], answers)
    blind = dataclasses.replace(denoiser.calibration, trust=1.0)
    images, labels = (part[:50] for part in load_digits("validation"))
    changed = 0
    for name in ("gaussian_blur", "contrast"):
        seen = corrupt(images, name, DIGITS_C[name])
        with torch.no_grad():
            matched = (model(denoiser.calibration.match(seen) * 2 - 1).argmax(1) == labels).sum()
        found = adapt(model, denoiser, seen, config=presets.FAST)
        assert int((found.predictions == labels).sum()) >= int(matched)
        believing = copy.copy(denoiser)
        believing.calibration = blind
        changed += int((adapt(model, believing, seen, config=presets.FAST).predictions != found.predictions).sum())
    assert changed > 3  # what it would do if its loss were taken at its word
    assert denoiser.calibration.trust < 0.3


def test_a_denoiser_without_any_class_signal_leaves_the_matched_answers(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    found = Calibration.measure(denoiser, torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(3)) ** 2)
    rows = len(denoiser.process)
    denoiser.calibration = dataclasses.replace(found, signal=(-0.1,) * rows, spread=(1.0,) * rows, trust=0.0)
    with torch.no_grad():
        matched = model(Classification().normalise(model, found.match(images)))
    for preset in (presets.FAST, presets.RANK.replace(top_k=2)):
        with pytest.warns(UserWarning, match="no calibration of its timesteps"):
            result = adapt(model, denoiser, images, config=preset)
        assert result.evaluations.sum() == 0
        assert torch.equal(result.predictions, matched.argmax(1))


def test_trust_is_the_slope_of_a_logistic_regression():
    z = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    for slope in (0.2, 0.6, 1.5):
        right = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) < torch.sigmoid(slope * z)
        lower = torch.where(right, z, -z)  # how much lower the loss of the right answer is
        found = _logistic_slope(lower)
        grid = torch.linspace(0, MOST_TRUST, 6001, dtype=torch.float64)
        assert found == pytest.approx(float(grid[F.logsigmoid(grid[:, None] * lower).sum(1).argmax()]), abs=1e-3)
        assert found == pytest.approx(slope, abs=0.1 if slope < 1 else 0.3)
    assert _logistic_slope(torch.zeros(8)) == 0  # a loss that ignores the class
    assert _logistic_slope(-z.abs()) == 0
    assert _logistic_slope(z.abs()) == MOST_TRUST


@pytest.mark.parametrize(
    "answers",
    [
        torch.zeros(15, dtype=torch.int64),
        torch.zeros(16),
        torch.full((16,), 10),
        torch.full((16,), -1),
        torch.zeros(16, 9),
        torch.zeros(16, 10, dtype=torch.int64),
        torch.full((16, 10), torch.nan),
    ],
)
def test_answers_that_are_none_are_refused(answers):
    _, denoiser = zoo.load("digits")
    with pytest.raises(ValueError, match="or one class index for each of the 16 images, from 0 to 9"):
        calibrate(denoiser, load_digits("train")[0][:16], answers)


def test_trust_is_measured_on_images_from_all_over_a_sorted_folder():
    """Sorted by class, the first images would be those of one class, which a denoiser of random weights may favour on every image."""
    images, labels = load_digits("train")
    order = torch.cat([(labels == 8).nonzero()[:64, 0], (labels != 8).nonzero()[:160, 0]])
    assert calibrate(_random_weights(), images[order], labels[order].int()).trust == 0


def test_a_denoiser_that_ignores_its_condition_is_not_trusted(tmp_path):
    images, labels = (part[:8] for part in load_digits("train"))
    denoiser = _tiny_dit(0).eval()  # adaLN starts at zero
    found = calibrate(denoiser, images, labels)
    assert found.trust == 0
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json", denoiser) == found


def test_a_file_of_an_older_version_is_refused(tmp_path):
    _, denoiser = _digits()
    (tmp_path / "c.json").write_text(json.dumps({**dataclasses.asdict(denoiser.calibration), "power": [0.1] * 17}))
    with pytest.raises(ValueError, match="an older version wrote it; measure one by"):
        Calibration.load(tmp_path / "c.json", denoiser)


def test_answers_that_are_not_finite_are_never_compared(model, denoiser):
    problem = Adapter(model, denoiser, AdaptConfig(guard=4)).engine.program.problem
    outputs = torch.eye(7, dtype=torch.float64)[:3]
    before, after = outputs.roll(1, 0), outputs.roll(2, 0)
    before[0], after[1] = torch.nan, torch.nan
    answers = compare(problem, before, after, outputs)
    assert answers.fresh.tolist() == [[True, False, True], [False, True, True]]
    assert answers.standing.isfinite().all()


def test_the_density_comes_from_margins_whose_variances_are_known():
    """Margins of one image differ by noise, and images from each other: the spread is that of a mean of 16 pairs of one image."""
    generator = torch.Generator().manual_seed(0)
    between, within = torch.linspace(0.5, 1.5, BINS, dtype=torch.float64), torch.linspace(3, 1, BINS, dtype=torch.float64)
    images = between * torch.randn(4000, BINS, generator=generator, dtype=torch.float64)
    margins = (1 + images)[:, :, None] + within[:, None] * torch.randn(4000, BINS, PAIRS, generator=generator, dtype=torch.float64)
    signal, spread = class_signal(margins)
    expected = (between**2 + within**2 / 16).sqrt()
    torch.testing.assert_close(spread, expected, rtol=0.1, atol=0)
    ratio = 1 / expected
    smoothed = F.pad(ratio[None], (1, 1), mode="replicate")[0].unfold(0, 3, 1) @ torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(signal / spread, smoothed, rtol=0.1, atol=0)


def test_trust_grows_with_how_often_the_own_class_wins():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 3, 24, generator=generator, dtype=torch.float64)
    always, often = torch.ones(20), torch.where(torch.arange(20) % 4 > 0, 1.0, -1.0)
    assert loss_trust(noise + always[:, None, None]) == MOST_TRUST
    assert 0 < loss_trust(noise + often[:, None, None]) < 0.5
    assert loss_trust(-noise.abs()) == 0


class Counting(DiT):
    """Counts the rows that the denoiser is evaluated on."""

    rows = 0

    def forward(self, x, timesteps, conditions):
        Counting.rows += len(x)
        if Counting.rows > Counting.most:
            raise KeyboardInterrupt
        return super().forward(x, timesteps, conditions)

    most = 10**9


def test_outputs_of_a_classifier_make_it_cheap_and_an_interrupted_call_goes_on(tmp_path, monkeypatch):
    model, denoiser = zoo.load("digits")[0], _random_weights()
    clean = load_digits("train")[0]
    with torch.no_grad():
        outputs = model(clean * 2 - 1)
    monkeypatch.setattr(denoiser, "__class__", Counting)
    monkeypatch.setattr(Counting, "rows", 0)
    expected = calibrate(denoiser, clean, outputs)
    whole = Counting.rows
    assert whole == 32 * 80 + 20 * 5 * 24 <= 5000
    path = tmp_path / "c.part"
    monkeypatch.setattr(Counting, "rows", 0)
    monkeypatch.setattr(Counting, "most", whole // 2)
    with pytest.raises(KeyboardInterrupt):
        calibrate(denoiser, clean, outputs, partial=path)
    monkeypatch.setattr(Counting, "most", 10**9)
    monkeypatch.setattr(Counting, "rows", 0)
    with path.open("a") as file:
        file.write('{"of": "half a li')  # killed while it wrote
    assert calibrate(denoiser, clean, outputs, partial=path) == expected
    assert Counting.rows <= whole - whole // 2 + 4 * 80
    for text in ("{}\n", "[1]\n", "no JSON\n", '{"of": [], "values": [1]}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a file of an interrupted calibration"):
            calibrate(denoiser, clean, outputs, partial=path)
        assert path.read_text() == text


def test_what_was_measured_of_other_classes_is_not_taken(tmp_path):
    """The prompts of a text-to-image model are not in its fingerprint."""
    denoiser, images = zoo.load("open_vocabulary")[1], load_digits("train")[0][:8]
    path = tmp_path / "c.part"
    found = [
        calibrate(denoiser.with_classes([f"a photo of the number {name}." for name in names]), images, partial=path) for names in NAMES
    ]
    fresh = calibrate(denoiser.with_classes([f"a photo of the number {name}." for name in NAMES[1]]), images)
    assert found[1] == fresh != found[0]


NAMES = (("one", "two"), ("seven", "nine"))
