"""Images as people hold them: PIL images, arrays, paths, lists, and lists of different sizes."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from dtta_fast import Adapter, adapt, presets, zoo
from dtta_fast.tasks import Classification

CONFIG = presets.FAST.replace(steps=1, pairs=2, guard=4)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return Adapter(*zoo.load("digits"), CONFIG)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return (
        zoo.example("digits")[0][:3].to(torch.uint8)
        if zoo.example("digits")[0].dtype == torch.uint8
        else (zoo.example("digits")[0][:3] * 255).round().to(torch.uint8)
    )


def test_a_crop_that_writes_to_its_input_does_not_reach_the_caller_s_images():
    images = [torch.rand(3, 40, 40), torch.rand(3, 50, 50)]
    kept = [image.clone() for image in images]
    task = Classification(crop=lambda image: torch.nn.functional.interpolate(image.mul_(0.5), (32, 32)))
    adapt(*zoo.load("digits"), images, CONFIG, task)
    assert all(torch.equal(image, before) for image, before in zip(images, kept, strict=True))


def test_answers_of_a_training_free_method_have_one_dtype():
    model, denoiser = zoo.load("digits")
    session = Adapter(model.half(), denoiser, presets.RANK.replace(pairs=2))
    clean = zoo.example("digits")[0][:2]
    clean = clean.float() / 255 if clean.dtype == torch.uint8 else clean
    for images in (torch.full_like(clean, 0.5), clean, clean**4):
        assert session.adapt(images).outputs.dtype == torch.float32


def held(pixels: Tensor, kind: str, folder) -> object:
    """The same three images in another form."""
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    return {
        "PIL": pictures,
        "RGBA": [picture.convert("RGBA") for picture in pictures],
        "array": arrays,
        "float array": arrays.astype(np.float64) / 255,
        "arrays": list(arrays),
        "paths": [folder / f"{i}.png" for i in range(3)],
        "names": tuple(str(folder / f"{i}.png") for i in range(3)),
        "tensors": list(pixels),
        "mixed": [pixels[0], pictures[1], folder / "2.png"],
    }[kind]


@pytest.mark.parametrize("kind", ["PIL", "RGBA", "array", "float array", "arrays", "paths", "names", "tensors", "mixed"])
def test_every_form_gives_the_same_answer(adapter, pixels, kind, tmp_path):
    wanted = adapter.adapt(pixels, image_ids=torch.tensor([5, 6, 7]))
    found = adapter.adapt(held(pixels, kind, tmp_path), image_ids=[5, 6, 7])
    torch.testing.assert_close(found.outputs, wanted.outputs.to(found.outputs.dtype), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.predictions, wanted.predictions)


def test_one_image_needs_no_list(adapter, pixels):
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
    wanted = adapter.adapt(pixels[:1])
    torch.testing.assert_close(adapter.adapt(picture).outputs, wanted.outputs)
    torch.testing.assert_close(adapter.adapt(np.asarray(picture), image_ids=np.array([0])).outputs, wanted.outputs)
    torch.testing.assert_close(adapt(*zoo.load("digits"), picture, config=CONFIG).outputs, wanted.outputs)


def test_a_photo_is_turned_as_its_exif_says(adapter, pixels):
    upright = Image.fromarray(pixels[0].permute(1, 2, 0).contiguous().numpy())
    lying = upright.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to see it upright
    lying.getexif().update(exif)
    torch.testing.assert_close(adapter.adapt(lying).outputs, adapter.adapt(upright).outputs)


def test_different_sizes_are_cropped_one_by_one(pixels):
    larger = torch.nn.functional.interpolate(pixels[:1].float() / 255, (64, 80), mode="nearest")[0]
    adapter = Adapter(*zoo.load("digits"), CONFIG)
    crops = [adapter.crop(image[None].float())[0] for image in (pixels[1] / 255, larger)]
    wanted = adapter.adapt(torch.stack(crops), cropped=True)
    torch.testing.assert_close(adapter.adapt([pixels[1], larger]).outputs, wanted.outputs)
    without = Adapter(*zoo.load("digits"), CONFIG, Classification(crop=lambda images: images))
    with pytest.raises(ValueError, match=r"images have sizes 32x32, 64x80, and the model has no config"):
        without.adapt([pixels[1], larger])


def test_values_are_checked_before_a_crop_clamps_them(adapter, pixels):
    large = torch.nn.functional.interpolate(pixels[:1].float(), (64, 64))[0]
    with pytest.raises(ValueError, match=r"images has values from 0 to 2\d\d; give \[0, 1\]"):
        adapter.adapt([pixels[0].float(), large])
    with pytest.raises(ValueError, match=r"dtype torch.int32"):
        adapter.adapt([pixels[0].float() / 255, large.int()])


def test_ids_out_of_range_are_named(adapter, pixels):
    with pytest.raises(ValueError, match="image_ids lies in 1180591620717411303424"):
        adapter.adapt(pixels[:1], image_ids=[2**70])
    ids = [np.int64(4), np.int64(2)]
    wanted = adapter.adapt(pixels[:2], image_ids=torch.tensor([4, 2]))
    torch.testing.assert_close(adapter.adapt(pixels[:2], image_ids=ids).outputs, wanted.outputs)


def test_arrays_of_grey_values_are_taken(adapter, pixels):
    grey = pixels[0, 0].numpy()
    wanted = adapter.adapt(torch.from_numpy(grey).expand(1, 3, -1, -1))
    for image in (grey, [grey], Image.fromarray(grey)):
        torch.testing.assert_close(adapter.adapt(image).outputs, wanted.outputs)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ([], ValueError, "empty list"),
        (3, TypeError, "of type int; give a tensor"),
        ([object()], TypeError, "contains, an object of type object"),
        (np.zeros((1, 1, 4, 4, 3)), ValueError, r"shape \(1, 1, 4, 4, 3\)"),
        (np.zeros((3, 8, 8), dtype=np.uint8), ValueError, "channels last"),
        (np.zeros((8, 8, 3), dtype=np.int32), ValueError, "array of int32"),
        ([torch.zeros(1, 3, 8, 8)], ValueError, r"in a list, give \[3, H, W\]"),
        ("nothing.png", ValueError, "nothing.png cannot be read as an image"),
        (Image.new("F", (8, 8)), ValueError, "of no known range"),
    ],
)
def test_what_is_not_understood_is_named(adapter, images, error, message):
    with pytest.raises(error, match=message):
        adapter.adapt(images)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 400)])
def test_images_of_extreme_proportions_are_refused_before_they_are_resized(adapter, size):
    with pytest.raises(ValueError, match=rf"an image is {size[1]}x{size[0]} pixels; crop it, so that no side is more than 64 times"):
        adapter.adapt(torch.rand(1, 3, *size))


@pytest.mark.parametrize("config", [CONFIG.replace(precheck="off", steps=2), presets.RANK.replace(pairs=2, precheck="off")])
def test_progress_counts_every_step(pixels, config, capsys, monkeypatch):
    session = Adapter(*zoo.load("digits"), config)
    wanted = session.adapt(pixels)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the stream for a terminal
    assert capsys.readouterr().err == ""
    found = session.adapt(pixels, progress=True)
    assert torch.equal(found.outputs, wanted.outputs)
    written = capsys.readouterr()
    assert re.search(r"adapting.*100%", written.err)
    assert written.out == ""
    monkeypatch.delenv("FORCE_COLOR")
    session.adapt(pixels, progress=True)
    assert capsys.readouterr().err.strip() == ""


def test_compile_takes_true_and_false():
    assert (CONFIG.replace(compile=True).compile, CONFIG.replace(compile=False).compile) == ("auto", "off")
    assert Adapter(*zoo.load("digits"), CONFIG.replace(compile=True)).config.compile == "regional"


def test_a_timm_config_of_other_weights_is_told(adapter, pixels):
    denoiser = zoo.load("digits")[1]
    model = timm.create_model("resnet10t", num_classes=10)
    with pytest.warns(UserWarning, match=r"32x32 are enlarged to 176x176 .* belongs to weights of 1000 classes, and the model has 10"):
        adapt(model, denoiser, pixels[:1], config=CONFIG)
    model.pretrained_cfg |= {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, denoiser, pixels[:1], config=CONFIG)
