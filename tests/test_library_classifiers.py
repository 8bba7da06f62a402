"""Classifiers of transformers and torchvision: preprocessing and logits are the libraries', in Python and by the command line."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
import torchvision
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from dtta_fast import AdaptConfig, Adapter, adapt, presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.runs.models import class_names, load_classifier
from dtta_fast.tasks import Classification
from dtta_fast.tasks.image_classifier import ImageClassifier

CONFIG = AdaptConfig(steps=1, pairs=2, guard=2, lr=1e-3)
NAMES = {str(k): f"digit {k}" for k in range(10)}


def vit() -> tuple[PreTrainedModel, ViTImageProcessor]:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
                       num_labels=10, id2label=NAMES)  # fmt: skip
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    return ViTForImageClassification(config), processor


def convnext() -> tuple[PreTrainedModel, ConvNextImageProcessor]:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=10, id2label=NAMES)
    return ConvNextForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)


def resnet() -> tuple[PreTrainedModel, ConvNextImageProcessor]:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10, id2label=NAMES)
    return ResNetForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.875)


@pytest.fixture(scope="module", params=[vit, convnext, resnet])
def pair(request):
    torch.manual_seed(0)
    model, processor = request.param()
    return model.eval(), processor


def test_names_with_numbers_as_text_keep_the_order_of_the_outputs():
    """Of twelve classes, "10" stands before "2" in the order of text."""
    own = vit()[0]
    own.config.id2label = {str(k): f"class {k}" for k in range(12)}
    assert ImageClassifier(own).pretrained_cfg["label_names"] == [f"class {k}" for k in range(12)]


@pytest.fixture(scope="module")
def denoiser():
    return zoo.load("digits")[1]


def pictures(count: int = 3, height: int = 41, width: int = 50) -> Tensor:
    return (torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 255).round().to(torch.uint8)


def test_logits_are_the_library_s(pair, denoiser):
    model, processor = pair
    images = pictures()
    with torch.no_grad():
        expected = model(**processor(images=[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt"))
    found = adapt(model, denoiser, images, config=CONFIG, task=Classification(processor))
    torch.testing.assert_close(found.outputs_before, expected.logits, rtol=2e-2, atol=2e-2)  # PIL rounds to 8 bits after resizing
    ready = processor(images=images, return_tensors="pt", do_rescale=True)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(found.outputs_before, model(ready).logits, rtol=1e-2, atol=1e-2)


def test_every_set_of_parameters_adapts(pair, denoiser):
    model, processor = pair
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameters in ("all", "norm", "head", "lora"):
        if parameters == "lora" and not isinstance(model, ViTForImageClassification):
            continue
        older = any(name.endswith(".query") for name, _ in model.named_modules())  # transformers 5.6 has other names
        targets = (("query", "value") if older else ("q_proj", "v_proj")) if parameters == "lora" else None
        config = CONFIG.replace(parameters=parameters, lora_targets=targets, guard=0)
        found = adapt(model, denoiser, pictures(), config=config, task=Classification(processor))
        assert not torch.equal(found.outputs, found.outputs_before)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_adapters_are_saved_under_the_library_s_names(tmp_path, denoiser):
    torch.manual_seed(0)
    model, processor = vit()
    targets = ("query", "value") if any(name.endswith(".query") for name, _ in model.named_modules()) else ("q_proj", "v_proj")
    config = CONFIG.replace(parameters="lora", lora_targets=targets, mode="online")
    session = Adapter(model.eval(), denoiser, config, Classification(processor))
    session.adapt(pictures())
    session.save_lora(tmp_path)
    tuned = PeftModel.from_pretrained(model, tmp_path)
    ready = processor(images=pictures(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(tuned(ready).logits, session.adapt(pictures()).outputs_before, rtol=1e-2, atol=1e-2)


def test_a_config_of_tuples_serves_or_is_named(pair, denoiser):
    """Some of the library's models fail by themselves under this config."""
    model, processor = pair
    expected = adapt(model, denoiser, pictures(), config=CONFIG, task=Classification(processor))
    model.config.return_dict = False
    try:
        try:
            model(torch.zeros(1, 3, 32, 32))
        except AttributeError:
            with pytest.raises(ValueError, match=r"set return_dict = True in the config"):
                adapt(model, denoiser, pictures(), config=CONFIG, task=Classification(processor))
        else:
            found = adapt(model, denoiser, pictures(), config=CONFIG, task=Classification(processor))
            torch.testing.assert_close(found.outputs, expected.outputs)
    finally:
        model.config.return_dict = True


def test_preprocessing_is_asked_for(pair, denoiser):
    model, _ = pair
    with pytest.raises(ValueError, match=r"transformers' \w+ForImageClassification, which does not hold its preprocessing; give"):
        Adapter(model, denoiser, CONFIG)
    task = Classification(crop=lambda crop: crop[..., :32, :32], normalise=lambda crop: crop * 2 - 1)
    found = adapt(model, denoiser, pictures(), config=CONFIG, task=task)
    with torch.no_grad():
        expected = model(pictures()[..., :32, :32].float() / 255 * 2 - 1).logits
    torch.testing.assert_close(found.outputs_before, expected)


def test_a_model_of_another_task_is_told_its_task(denoiser):
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    segmenter = SegformerForSemanticSegmentation(SegformerConfig(**sizes)).eval()
    for model, task in ((segmenter, "Segmentation"), (zoo.load_model("depth"), "Depth"), (zoo.load_model("open_vocabulary"), "ZeroShot")):
        kind = type(model).__name__
        with pytest.raises(ValueError, match=rf"transformers' {kind}, which does not hold its preprocessing; give task={task}\("):
            Adapter(model, denoiser, CONFIG)


def test_torchvision_s_models_without_a_task_warn(denoiser):
    model = torchvision.models.resnet18(num_classes=10).eval()
    with pytest.warns(UserWarning, match=r"torchvision's ResNet, which does not hold its preprocessing"):
        Adapter(model, denoiser, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Adapter(model, denoiser, CONFIG, Classification(normalise=lambda crop: crop))


def test_folders_load_by_the_command_line(pair, tmp_path, capsys):
    model, processor = pair
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    loaded = load_classifier(str(tmp_path / "model"))
    assert class_names(loaded, 10) == list(NAMES.values())
    Image.fromarray(np.asarray(pictures(1)[0].permute(1, 2, 0))).save(tmp_path / "a.png")
    own = ["--model", str(tmp_path / "model"), "--denoiser", str(zoo.folder("digits") / "denoiser")]
    main(["adapt", str(tmp_path / "a.png"), *own, "--json", str(tmp_path / "found.json"), "--guard", "2", "--steps", "1"])
    assert "digit 3" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())["images"][0]["before"]
    expected = adapt(model, zoo.load("digits")[1], tmp_path / "a.png", config=presets.FAST, task=Classification(processor))
    torch.testing.assert_close(torch.tensor(list(found.values())), expected.outputs_before[0].softmax(0), rtol=1e-4, atol=1e-5)
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="whose image processor cannot be read"):
        load_classifier(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["resnet18", "vit_b_32"])
def test_torchvision_s_own_transforms(name, denoiser):
    weights = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    weights.crop_size, weights.resize_size = ([64], [72]) if name == "resnet18" else ([224], [224])
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=10).eval()
    images = pictures(2, 90, 100)
    found = adapt(model, denoiser, images, config=CONFIG.replace(parameters="head"), task=Classification(weights))
    with torch.no_grad():
        expected = model(weights(images))
    torch.testing.assert_close(found.outputs_before, expected, rtol=2e-2, atol=2e-2)  # the preset resizes in 8 bits
