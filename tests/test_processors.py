"""Image processors of transformers: geometry once, and everything that they do to pixel values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    DPTImageProcessor,
    EfficientNetImageProcessor,
    MobileViTImageProcessor,
    SegformerImageProcessor,
    ViTImageProcessor,
)

from dtta_fast import AdaptConfig, Adapter, zoo
from dtta_fast.runs import models
from dtta_fast.tasks import Classification, Depth, Segmentation
from dtta_fast.tasks.transforms import processed_size, processor_transforms

SIZE = {"size": {"height": 32, "width": 32}}
ZOOMING = {"size": {"shortest_edge": 68}, "crop_size": {"height": 64, "width": 64}}


@pytest.mark.parametrize(
    "processor",
    [
        MobileViTImageProcessor(**ZOOMING),
        EfficientNetImageProcessor(**SIZE),
        EfficientNetImageProcessor(**SIZE, rescale_factor=1 / 127.5, rescale_offset=True, include_top=False),
        EfficientNetImageProcessor(**SIZE, do_normalize=False, include_top=False),
        SegformerImageProcessor(**SIZE),
        ViTImageProcessor(**SIZE, do_rescale=False),
        ViTImageProcessor(**SIZE, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]),
        ViTImageProcessor(**SIZE, do_normalize=False),
        CLIPImageProcessor(),
        DPTImageProcessor(size={"height": 48, "width": 48}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_the_model_gets_what_the_processor_would_give_it(processor):
    rows = torch.linspace(0, 200, 96)
    image = torch.stack([rows[:, None] + 0 * rows, 0 * rows[:, None] + rows, 40 + 0.5 * rows[:, None] + 0 * rows]).round().to(torch.uint8)
    wanted = processor(images=image, return_tensors="pt")["pixel_values"]
    crop, normalise = processor_transforms(processor)
    found = normalise(crop(image[None] / 255))
    levels = float(wanted.max() - wanted.min()) / 200  # about one level of an 8-bit image, which the processor rounds to
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * levels)
    assert processed_size(processor) == tuple(wanted.shape[-2:])


def test_the_crop_is_in_rgb_and_the_model_gets_bgr():
    crop, normalise = processor_transforms(MobileViTImageProcessor(**ZOOMING))
    red = torch.zeros(1, 3, 70, 80)
    red[:, 0] = 1
    assert crop(red)[0, :, 32, 32].tolist() == [1, 0, 0]
    assert normalise(crop(red))[0, :, 32, 32].tolist() == [0, 0, 1]


def test_a_processor_that_is_not_linear_is_refused():
    def squared(images: Tensor, **_: object) -> dict[str, Tensor]:
        return {"pixel_values": (images[None].float() / 255) ** 2}

    with pytest.raises(ValueError, match="not linear; give crop= and normalise="):
        processor_transforms(squared)


def _zooming(images: Tensor) -> Tensor:
    """Keeps the middle half."""
    height, width = images.shape[-2:]
    return images[..., height // 4 : -height // 4, width // 4 : -width // 4]


def test_a_crop_is_cropped_once():
    seen: list[Tensor] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 10)

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return self.head(images.mean((2, 3)))

    _, denoiser = zoo.load("digits")
    adapter = Adapter(Model(), denoiser, AdaptConfig(steps=1, pairs=1, guard=0), Classification(crop=_zooming))
    images = torch.rand(2, 3, 64, 64)
    once = adapter.crop(images)
    assert once.shape[-1] == 32
    whole = adapter.adapt(images)
    first = seen[0]
    seen.clear()
    again = adapter.adapt(once, cropped=True)
    assert torch.equal(seen[0], first)
    torch.testing.assert_close(again.outputs, whole.outputs)
    seen.clear()
    adapter.adapt(once)
    assert seen[0].shape[-1] == 16  # uncropped images are cropped, whatever their size


def test_maps_and_images_have_the_size_that_the_processor_makes(monkeypatch):
    monkeypatch.setattr(models, "_processor", lambda task, model: MobileViTImageProcessor(**ZOOMING))
    assert models.image_size("segmentation", "any") == 64
    monkeypatch.setattr(models, "_processor", lambda task, model: SimpleNamespace())
    with pytest.raises(ValueError, match="image processor cannot be used"):
        models.image_size("segmentation", "any")
    monkeypatch.setattr(models, "_processor", lambda task, model: ViTImageProcessor(size={"height": 32, "width": 48}))
    with pytest.raises(ValueError, match="32x48"):
        models.image_size("depth", "any")


def test_a_processor_without_a_size_is_refused():
    with pytest.raises(ValueError, match="different sizes; it needs do_resize and a size"):
        processed_size(SegformerImageProcessor(do_resize=False))


def test_a_processor_that_fails_is_named():
    with pytest.raises(ValueError, match=r"processor, a DPTImageProcessor\w*, fails on an image of one colour \(.*complete its settings"):
        Depth(DPTImageProcessor(size=None))


def test_a_segmenter_with_bgr_input_is_fed_once_and_in_order():
    task = Segmentation(MobileViTImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}))
    photo = torch.rand(1, 3, 64, 64)
    once = task.crop(nn.Identity(), photo)
    assert torch.equal(once, task.crop(nn.Identity(), once))
    torch.testing.assert_close(task.normalise(nn.Identity(), once), photo.flip(1))
