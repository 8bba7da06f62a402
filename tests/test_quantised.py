"""Frozen weights in int8 and NF4 by bitsandbytes: the gradient goes through them, and they are shared, never written to."""

from __future__ import annotations

import pytest
import torch
from diffusers import BitsAndBytesConfig as UnetConfig
from torch import nn
from transformers import BitsAndBytesConfig, CLIPModel

from dtta_fast import AdaptConfig, Adapter, zoo
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers import StableDiffusion
from dtta_fast.tasks import ZeroShot

bnb = pytest.importorskip("bitsandbytes")

ZOO = zoo.folder("open_vocabulary")
NAMES = ("three", "eight", "one")
SMALL = AdaptConfig(steps=2, pairs=4, guard=4, lr=5e-3, parameters="lora")


def _int8(layer: nn.Linear) -> tuple[nn.Module, torch.Tensor]:
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
    made.load_state_dict(layer.state_dict())
    made = made.to("cpu")
    return made, bnb.functional.int8_vectorwise_dequant(made.weight.data, made.weight.SCB)


def _nf4(layer: nn.Linear) -> tuple[nn.Module, torch.Tensor]:
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type="nf4", compute_dtype=torch.float32)
    made.load_state_dict(layer.state_dict())
    made = made.to("cpu")
    return made, bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)


@pytest.mark.parametrize(("quantise", "tolerance"), [(_int8, 0.05), (_nf4, 1e-3)])
def test_gradient_to_the_condition_goes_through_quantised_weights(quantise, tolerance):
    """Attention's products of the UNet quantised as diffusers' loader does on a GPU, against the same network with the weights that they
    stand for; int8 rounds activations too."""
    clip, denoiser = zoo.load("open_vocabulary")
    named = denoiser.with_classes(NAMES)
    generator = torch.Generator().manual_seed(0)
    x_t, timesteps = torch.randn(6, *denoiser.latent_shape, generator=generator), torch.randint(300, 900, (6,), generator=generator)

    def gradient() -> torch.Tensor:
        leaf = named.class_embeddings({})[:2].clone().requires_grad_()
        found: torch.Tensor = torch.autograd.grad(named(x_t, timesteps, leaf).square().mean(), leaf)[0]
        return found

    quantised = {}
    for name, module in denoiser.unet.named_modules():
        if isinstance(module, nn.Linear) and ".attn" in name:
            quantised[name], stood_for = quantise(module)
            module.weight.data.copy_(stood_for)
    expected = gradient()
    for name, module in quantised.items():
        denoiser.unet.set_submodule(name, module)
    weights = {name: p.detach().clone() for name, p in denoiser.unet.named_parameters()}
    assert any(p.dtype in (torch.int8, torch.uint8) for p in weights.values())
    assert float((gradient() - expected).norm() / expected.norm()) < tolerance
    images, _ = load_digits("validation")
    result = Adapter(clip, denoiser, SMALL, ZeroShot(NAMES, zoo.load_processor("open_vocabulary"))).adapt(images[:2])
    assert bool((result.outputs != result.outputs_before).any())
    assert bool(result.loss.isfinite().all())
    both = SMALL.replace(denoiser_parameters="lora", denoiser_lr=1e-4, guard=0)
    tuned = Adapter(clip, denoiser, both, ZeroShot(NAMES, zoo.load_processor("open_vocabulary"))).adapt(images[:1])
    assert bool(tuned.loss.isfinite().all())
    assert all(torch.equal(p, weights[name]) for name, p in denoiser.unet.named_parameters())


def test_a_clip_in_int8_by_transformers_adapts_through_lora():
    images, _ = load_digits("validation")
    clip = CLIPModel.from_pretrained(ZOO / "clip", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu").eval()
    _, denoiser = zoo.load("open_vocabulary")
    with pytest.warns(UserWarning, match="run one by one"):  # bitsandbytes' products have no batching rule
        result = Adapter(clip, denoiser, SMALL, ZeroShot(NAMES, zoo.load_processor("open_vocabulary"))).adapt(images[:2])
    assert bool((result.outputs != result.outputs_before).any())
    assert bool(result.outputs.isfinite().all())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
@pytest.mark.parametrize("wanted", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_a_device_that_diffusers_cannot_quantise_on_is_named(wanted):
    with pytest.raises(ValueError, match=r"unet cannot be read as a UNet2DConditionModel: .*GPU"):
        StableDiffusion.from_pretrained(ZOO / "diffusion", quantization_config=UnetConfig(**wanted))
