"""The models that ship: they load, and adaptation by them helps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dtta_fast import adapt, presets, zoo
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import load_digits


def test_example_is_the_test_split():
    images, labels = zoo.example("digits")
    expected = load_digits("test")
    assert torch.equal(images, expected[0])
    assert torch.equal(labels, expected[1])


def test_models_load_ready_for_use():
    model, denoiser = zoo.load("digits")
    for module in (model, denoiser):
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert sum(p.numel() for p in denoiser.parameters()) <= 3_000_000
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 32, 32)  # a list in older timm


def test_denoiser_knows_the_classes():
    """Diffusion classifier (Li et al. 2023): the right class's embedding explains an image best, far above chance."""
    from dtta_fast.core.loss import pair_losses
    from dtta_fast.kernels import Pairs

    _, denoiser = zoo.load("digits")
    images, labels = load_digits("validation")
    images, labels = images[:40], labels[:40]
    drawn = Pairs(
        denoiser.encode(images),
        denoiser.process.table,
        torch.tensor([[500, 600, 700, 800]]).expand(40, 4),
        torch.arange(40),
        0,
        torch.tensor(0),
    )
    with torch.no_grad():
        losses = [pair_losses(denoiser, row.expand(40, -1), drawn, False).mean(1) for row in denoiser.class_embeddings({})]
    assert float((torch.stack(losses).argmin(0) == labels).float().mean()) > 0.85


def test_fast_helps_where_the_source_fails_and_spares_the_clean():
    model, denoiser = zoo.load("digits")
    images, labels = load_digits("validation")
    images, labels = images[:50], labels[:50]
    blurred = adapt(model, denoiser, corrupt(images, "defocus_blur", DIGITS_C["defocus_blur"]), config=presets.FAST)
    before, after = (float((p == labels).float().mean()) for p in (blurred.predictions_before, blurred.predictions))
    assert after > before + 0.1
    clean = adapt(model, denoiser, images, config=presets.FAST)
    assert int((clean.predictions != clean.predictions_before).sum()) <= 2


@pytest.mark.parametrize("name", ["x" * 300, "nowhere", "x\0y"])
def test_a_folder_that_is_none_is_refused(name):
    for find in (zoo.load, zoo.load_model, zoo.task, zoo.folder):
        with pytest.raises(ValueError, match=r"name is .*, which is not a folder; give one with"):
            find(Path(name))


@pytest.mark.parametrize("find", [zoo.load, zoo.load_model, zoo.task, zoo.example, zoo.folder])
def test_a_name_that_the_zoo_has_not_is_refused(find):
    with pytest.raises(ValueError, match="name is 'sketches'; the zoo has digits"):
        find("sketches")
