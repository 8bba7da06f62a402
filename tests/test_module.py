"""AsModule in other people's evaluation loops: the same answers, numbers that count on, moves, saved states, and bad input."""

import copy
import math
import threading
import warnings

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image

from dtta_fast import Adapter, AsModule, adapt, presets, zoo
from dtta_fast.data.corruptions import corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.folder import read_records
from dtta_fast.runs.worker import open_data

SMALL = presets.FAST.replace(steps=1, guard=4, precheck="off")


@pytest.fixture(scope="module")
def images():
    return corrupt(load_digits("validation")[0][:12], "gaussian_blur", 5)


def robustbench_accuracy(model, x, y, batch_size=100, device=None):
    """The loop of robustbench.utils.clean_accuracy, as its documentation describes it: a model in [0, 1], batches in order, no_grad."""
    device = device or x.device
    right = 0.0
    with torch.no_grad():
        for i in range(math.ceil(len(x) / batch_size)):
            batch = x[i * batch_size : (i + 1) * batch_size].to(device)
            output = model(batch)
            right += (output.max(1)[1] == y[i * batch_size : (i + 1) * batch_size].to(device)).float().sum()
    return right.item() / len(x)


@pytest.mark.parametrize("protocol", ["episodic", "online"])
def test_the_loop_of_robustbench_gives_the_accuracy_of_a_run(protocol, tmp_path):
    clean, labels = load_digits("validation")
    one_of_each = [int((labels == k).nonzero()[0]) for k in range(10)]
    images = corrupt(clean[one_of_each], "gaussian_blur", 5)
    for i, (image, label) in enumerate(zip(images, range(10), strict=True)):
        folder = tmp_path / "images" / zoo.DIGITS[label]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{i}.png")
    config = SMALL if protocol == "episodic" else presets.ONLINE.replace(pairs=2)
    shown = tuple(sorted(path.name for path in (tmp_path / "images").iterdir()))
    run = RunConfig(data="folder", root=str(tmp_path / "images"), classes=zoo.DIGITS, batch=5, adapt=config, protocol=protocol)
    found = evaluate(run, tmp_path / "run")
    data, records = open_data(run), list(read_records(tmp_path / "run" / "records.jsonl"))
    assert [record["image_id"] for record in records] == list(range(len(images)))
    x = torch.stack([data.read(record["image_id"]) for record in records])
    y = torch.tensor([zoo.DIGITS.index(shown[record["label"]]) for record in records])
    module = AsModule(*zoo.load("digits"), config).eval()
    for _ in range(2):
        assert robustbench_accuracy(module, x, y, batch_size=5) == found["accuracy"]
        module.reset()  # as the harness of TENT does between corruptions


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_images_are_numbered_from_call_to_call(images, mode):
    models = zoo.load("digits")
    module, whole = AsModule(*models, SMALL), adapt(*models, images, config=SMALL).outputs
    for _ in range(2):
        with mode():
            outputs = torch.cat([module(part) for part in images.split(5)])
        assert not outputs.requires_grad
        torch.testing.assert_close(outputs, whole, rtol=1e-4, atol=1e-4)
        module.reset()
    again = torch.cat([Adapter(*models, SMALL)(part) for part in images.split(5)])  # its own numbers start at 0 in every call
    assert not torch.allclose(again, whole, rtol=1e-4, atol=1e-4)


def test_normalisation_outside_is_undone(images):
    models, mean, std = zoo.load("digits"), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    given = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    plain, undone = AsModule(*models, SMALL), AsModule(*models, SMALL, mean=mean, std=std)
    torch.testing.assert_close(undone(given), plain(images), rtol=1e-3, atol=1e-3)


def test_images_that_do_not_look_normalised_are_pointed_out(images):
    module = AsModule(*zoo.load("digits"), SMALL, mean=(0.1,) * 3, std=(0.5,) * 3)
    with pytest.warns(UserWarning, match=r"images has no value below 0, .* leave mean and std out"):
        module(images[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(images[:2])  # said once
        module.reset()
        module((images[:2] - 0.1) / 0.5)


def test_modes_change_no_answer_and_reach_the_model(images):
    model, denoiser = zoo.load("digits")
    model = nn.Sequential(nn.Dropout(0.5), model)
    model.pretrained_cfg = model[1].pretrained_cfg
    module = AsModule(model, denoiser, SMALL)
    outputs = module.train()(images)
    assert model.training
    module.reset()
    assert torch.equal(module.eval()(images), outputs)
    assert not model.training


def test_a_move_keeps_the_state_and_the_count(images):
    models, config = zoo.load("digits"), presets.ONLINE.replace(pairs=2)
    moved, kept = AsModule(*models, config), AsModule(*zoo.load("digits"), config)
    for module in (moved, kept):
        module(images[:5])
    assert moved.to("cpu").adapter.config == config
    assert torch.equal(moved(images[5:]), kept(images[5:]))
    double = moved.double()
    double.reset()
    assert double(images[:2].double()).dtype == torch.float64
    assert next(models[0].parameters()).dtype == torch.float64  # a submodule moves with its module


@pytest.mark.parametrize("config", [SMALL, presets.ONLINE.replace(pairs=2)])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(config, images, tmp_path):
    module, other = (AsModule(*zoo.load("digits"), config) for _ in range(2))
    module(images[:5])
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    expected = module(images[5:])
    assert torch.equal(other(images[5:]), expected)
    twin = copy.deepcopy(other)
    other.reset()
    assert twin._next == len(images)
    assert other._next == 0
    assert twin.model is not other.model


def test_bad_input_changes_nothing(images):
    module = AsModule(*zoo.load("digits"), SMALL)
    module(images[:2])
    for given, message in ((images[0], r"give a tensor \[B, 3, H, W\]"), ([0.5], "images is a list"), (images * 2, "images")):
        with pytest.raises((TypeError, ValueError), match=message):
            module(given)
    assert module._next == 2
    with pytest.raises(ValueError, match="or give AsModule the mean and std that your loader normalises with"):
        module(images * 2 - 1)
    other = AsModule(*zoo.load("digits"), SMALL.replace(lr=1e-2))
    with pytest.raises(ValueError, match=r"another config.*lr="):
        other.load_state_dict(module.state_dict())
    module._next = 2**32 - 1
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        module(images[:2])
    state = module.state_dict()
    state["_extra_state"] = {"next": -1}
    with pytest.raises(ValueError, match="no extra state of an AsModule"):
        module.load_state_dict(state)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,) * 3, None, "give both, or neither"),
        ((0.5,) * 2, (1.0,) * 2, "one finite number for each"),
        ("abc", (1.0,) * 3, "one number for each channel"),
        ((0.5,) * 3, (1.0, 0.0, 1.0), "one positive number"),
        ((math.nan,) * 3, (1.0,) * 3, "one finite number"),
        ((123.0, 116.0, 103.0), (0.5,) * 3, r"of images in \[0, 1\], such as 0.485"),
        ((0.5,) * 3, (58.0, 57.0, 57.0), r"of images in \[0, 1\], such as 0.229"),
    ],
)
def test_a_normalisation_that_cannot_be_undone_is_refused(mean, std, message):
    with pytest.raises(ValueError, match=message):
        AsModule(*zoo.load("digits"), SMALL, mean=mean, std=std)


def test_bad_pixels_are_refused_with_a_normalisation_too(images):
    models, mean, std = zoo.load("digits"), (0.5,) * 3, (0.25,) * 3
    module = AsModule(*models, SMALL, mean=mean, std=std)
    given = (images[:2] - 0.5) / 0.25
    for bad, message in (
        (given * 5, "give \\[0, 1\\]"),
        (given / 0, "NaN|infinity|give"),
        ((given * 50).to(torch.uint8), "floating point"),
    ):
        with pytest.raises(ValueError, match=message):
            module(bad)
    assert module._next == 0
    module(given + 1e-3)  # rounding


def test_a_state_that_cannot_be_taken_over_is_not_lost(images, monkeypatch):
    module = AsModule(*zoo.load("digits"), presets.ONLINE.replace(pairs=2))
    module(images[:4])
    weights = module.get_extra_state()["online"]["theta"]
    module.double().float()
    monkeypatch.setattr(Adapter, "load_state_dict", lambda self, state: (_ for _ in ()).throw(ValueError("another model")))
    for _ in range(2):  # no call goes on from the model's own weights
        with pytest.raises(ValueError, match="another model"):
            module(images[4:])
    monkeypatch.undo()
    assert module._next == 4
    module(images[4:])
    kept = AsModule(*zoo.load("digits"), presets.ONLINE.replace(pairs=2))
    kept(images[:4])
    kept(images[4:])
    assert all(torch.equal(kept.adapter.state_dict()["theta"][name], value) for name, value in module.adapter.state_dict()["theta"].items())
    assert weights.keys() == module.adapter.state_dict()["theta"].keys()


def test_a_state_is_converted_with_its_module(images):
    module = AsModule(*zoo.load("digits"), presets.ONLINE.replace(pairs=2))
    module(images[:4])
    double = module.double()
    assert double(images[:2].double()).dtype == torch.float64
    assert double._next == 6


def test_adapted_weights_stay_in_float32_beside_a_module_in_half_precision(images):
    module = AsModule(*zoo.load("digits"), presets.ONLINE.replace(pairs=2))
    module(images[:4])
    weights = module.adapter.state_dict()["theta"]
    module.bfloat16()
    assert all(torch.equal(module.adapter.state_dict()["theta"][name], value) for name, value in weights.items())
    module(images[4:])
    assert module._next == 12


def test_a_move_that_changes_nothing_keeps_the_session(images):
    module = AsModule(*zoo.load("digits"), SMALL)
    adapter = module.adapter
    assert module.to("cpu").float().adapter is adapter
    assert module.double().adapter is not adapter


def test_threads_take_turns_and_share_no_numbers(images):
    module, seen = AsModule(*zoo.load("digits"), SMALL), []
    adapt_ = module.adapter.adapt
    module.adapter.adapt = lambda given, image_ids: seen.append(tuple(image_ids)) or adapt_(given, image_ids=image_ids)
    threads = [threading.Thread(target=module, args=(images[:2],)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == [(0, 1), (2, 3), (4, 5)]
