"""`dtta doctor` and examine(): what they find agrees with what was made, and the advice follows from it."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

from dtta_fast import adapt, presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.measure.suitability import Suitability, examine
from dtta_fast.tasks import Classification

FOUND = Suitability(
    images=50,
    sizes={"32x32": 50},
    classes=10,
    parameters=1,
    denoiser_parameters=1,
    crop=(32, 32),
    mean=(),
    std=(),
    calibrated=True,
    trust=1.0,
    unusual=0.5,
    selected=0.5,
    by_matching=0.2,
    by_adaptation=0.1,
    agreement=0.8,
    error=0.05,
    evaluations=40.0,
    seconds=0.1,
)


@pytest.fixture(scope="module")
def images():
    return corrupt(load_digits("validation")[0][:24], "gaussian_blur", 5)


class Renumbered(nn.Module):
    """Gives its classes in another order than the denoiser's."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.pretrained_cfg = model, model.pretrained_cfg

    def forward(self, x):
        return self.inner(x).roll(3, 1)


def test_what_it_finds_is_what_adapt_gives(images):
    model, denoiser = zoo.load("digits")
    found = examine(model, denoiser, images, presets.FAST)
    result, calibration = adapt(model, denoiser, images), denoiser.calibration
    changed = result.predictions != result.predictions_before
    with torch.no_grad():
        matched = model(Classification().normalise(model, calibration.match(images))).argmax(1)
    by_matching = result.predictions == matched
    assert found.by_matching == pytest.approx(float((changed & by_matching).float().mean()))
    assert found.by_adaptation == pytest.approx(float((changed & ~by_matching).float().mean()))
    assert found.selected == pytest.approx(float((result.evaluations > 0).float().mean()))
    assert found.evaluations == pytest.approx(float(result.evaluations.float().mean()))
    assert found.unusual == pytest.approx(float((calibration.distance(images) > calibration.limit).float().mean()))
    assert (found.mean, found.std, found.crop, found.classes) == ((0.5,) * 3, (0.5,) * 3, (32, 32), 10)
    assert found.agreement - 2 * found.error > 0.5
    assert found.seconds > 0
    assert "of the answers change" in found.advice()[-1]


def test_changes_that_matching_makes_alone_are_not_adaptation_s(images):
    """Where the adapted weights repeat the answer to the matched image, `accepted` is true."""
    model, denoiser = zoo.load("digits")
    faint = images * 0.2 + 0.6
    result, found = adapt(model, denoiser, faint), examine(model, denoiser, faint, presets.FAST)
    with torch.no_grad():
        matched = model(Classification().normalise(model, denoiser.calibration.match(faint))).argmax(1)
    repeats = (result.predictions != result.predictions_before) & result.accepted & (result.predictions == matched)
    assert repeats.any()
    assert found.by_matching >= float(repeats.float().mean())


def test_another_numbering_of_the_classes_shows(images):
    model, denoiser = zoo.load("digits")
    clean = load_digits("validation")[0][:32]
    right, wrong = (examine(one, denoiser, clean, presets.FAST) for one in (model, Renumbered(model)))
    assert right.agreement > 0.9
    assert wrong.agreement < 0.75
    assert any("class k of the model" in line for line in wrong.advice())
    assert not any("class k of the model" in line for line in right.advice())


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"agreement": 0.3}, "contradicts the classifier"),
        ({"agreement": 0.55}, "does not clearly prefer"),
        ({"calibrated": False, "unusual": None}, "there is no calibration"),
        ({"trust": 0.1}, "trust is 0.10"),
        ({"trust": 0.15}, "trust is 0.15: the guard will hardly accept an adapted answer, and ONLINE and DUSA have no guard"),
        ({"unusual": 0.06}, "there is little to gain"),
        ({"by_matching": 0.0, "by_adaptation": 0.0}, "no answer changes"),
        ({"by_matching": 0.3, "by_adaptation": 0.0}, "come from matching"),
        ({"unusual": 0.95}, "or they show other things"),
        ({"images": 6}, "6 images say little"),
        ({}, "30% of the answers change"),
    ],
)
def test_the_advice_follows_from_the_findings(changes, text):
    assert text in " ".join(dataclasses.replace(FOUND, **changes).advice())


def test_images_of_several_sizes_and_no_calibration():
    model, denoiser = zoo.load("digits")
    denoiser.calibration = None
    images = [torch.randint(256, (3, height, 40), dtype=torch.uint8) for height in (32, 50, 50)]
    found = examine(model, denoiser, images, presets.FAST)
    assert found.sizes == {"40x50": 2, "40x32": 1}
    assert not found.calibrated
    assert found.selected == 1
    with pytest.raises(ValueError, match="images is empty"):
        examine(model, denoiser, [], presets.FAST)


@pytest.mark.parametrize("classes", [None, ", ".join(zoo.DIGITS)])
def test_the_command(images, tmp_path, capsys, classes):
    for i, image in enumerate(images[:6]):
        to_pil_image(image).save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    named = [] if classes is None else ["--classes", classes]
    main(["doctor", str(tmp_path), "--most", "6", "--json", str(tmp_path / "found.json"), *named])
    (printed, said), found = capsys.readouterr(), json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 5
    assert "left out:" in said
    assert "5.png" in said
    assert all(f"- {line}" in printed for line in found["advice"])
    assert ("the zoo's CLIPModel of zero, one, two" if classes else "the zoo's ConvNeXt of 0, 1, 2") in printed
    for arguments, message in (
        (["--most", "0"], "most is 0"),
        (["--preset", "ONLINE"], "adapts to a stream"),
        (["--model", "nowhere/at-all"], "and the denoiser is the digits zoo's"),
    ):
        with pytest.raises(SystemExit):
            main(["doctor", str(tmp_path / "0.png"), *arguments])
        assert message in capsys.readouterr().err


def test_the_caller_s_model_stays_as_it_was(images):
    _, denoiser = zoo.load("digits")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    ).train()
    model.pretrained_cfg = zoo.load("digits")[0].pretrained_cfg
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [examine(model, denoiser, images[:4], presets.FAST) for _ in range(2)]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found[0].agreement == found[1].agreement
