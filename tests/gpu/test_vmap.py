"""Images with weights of their own run at once by vmap. Every kind of attention gives each image the gradient that it has alone."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast import AdaptConfig, Adapter
from dtta_fast.core.step import gradients

pytestmark = pytest.mark.gpu
CONFIG = AdaptConfig(steps=1, pairs=3, precision="fp32")
TOKENS, WIDTH = 16, 24


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns TF32 off, which torch allows in convolutions: two ways to run one would differ by a thousandth."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Tower(nn.Module):
    """The vision tower of a transformers CLIP."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 7}
        config = CLIPVisionConfig(**sizes, image_size=16, patch_size=4, initializer_factor=3.0, attn_implementation=attention)
        self.clip = CLIPVisionModelWithProjection(config)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.clip(images).image_embeds
        return found


class Attending(nn.Module):
    """Patches, one attention over them, a head."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 7)
        self.register_buffer("mask", mask)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).mT
        return self.head(self.attend(tokens).mean(1))

    def attend(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError


class Multihead(Attending):
    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__(mask)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def attend(self, tokens: Tensor) -> Tensor:
        return self.attention(tokens, tokens, tokens, attn_mask=self.mask, need_weights=False)[0]


class Plain(Attending):
    """F.scaled_dot_product_attention, with or without a mask."""

    def __init__(self, mask: Tensor | None = None, causal: bool = False) -> None:
        super().__init__(mask)
        self.qkv, self.causal = nn.Linear(WIDTH, 3 * WIDTH), causal

    def attend(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, is_causal=self.causal).transpose(1, 2).flatten(2)


class Layer(Attending):
    """A whole encoder layer, which has an inference kernel of its own."""

    def __init__(self) -> None:
        super().__init__(None)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)

    def attend(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens)


def left_out() -> Tensor:
    """A causal mask: True where a token may look."""
    return torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()


def added() -> Tensor:
    return torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIP": lambda: Tower("sdpa"),
    "CLIP, attention written out": lambda: Tower("eager"),
    "attention": Plain,
    "attention, causal": lambda: Plain(causal=True),
    "attention, masked": lambda: Plain(left_out()),
    "attention, added to": lambda: Plain(added()),
    "MultiheadAttention": Multihead,
    "MultiheadAttention, masked": lambda: Multihead(~left_out()),
    "MultiheadAttention, added to": lambda: Multihead(added()),
    "TransformerEncoderLayer": Layer,
}


def assert_batched(model: nn.Module, denoiser: nn.Module, images: Tensor) -> None:
    """Asserts that vmap gives the outputs and gradients of images run one by one, without a warning that it failed."""
    session, count = Adapter(model, denoiser, CONFIG), len(images)
    engine = session.engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = session.adapt(images)
    assert not engine.program.problem.loop
    program = engine.program
    state, batch = program.begin(session.crop(images), torch.arange(count, device=images.device))
    torch.testing.assert_close(batch.before, result.outputs_before, rtol=1e-4, atol=1e-5)
    given = (program.schedule, state, batch.inputs, batch.x0, batch.image_ids)
    found, expected = (gradients(dataclasses.replace(program.problem, loop=loop), *given) for loop in (False, True))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    largest = max(float(gradient.norm()) for gradient in expected[1])
    assert largest > 0
    for name, own, other in zip(state.theta, found[1], expected[1], strict=True):
        for i in range(count):  # a key's bias cancels in the softmax, so its gradient is rounding alone
            assert float((own[i] - other[i]).norm()) < 1e-4 * float(other[i].norm()) + 1e-5 * largest, (name, i)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_attention(small_denoiser, images, moved, device, kind, count):
    torch.manual_seed(2)
    assert_batched(*moved(device, torch.float32, MODELS[kind]().eval(), small_denoiser, images[:count]))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("architecture", ["vit", "model"])
def test_timm_models(request, small_denoiser, images, moved, device, architecture, count):
    model = request.getfixturevalue(architecture)
    assert_batched(*moved(device, torch.float32, model, small_denoiser, images[:count]))


def test_a_classifier_in_bfloat16(vit, small_denoiser, images, moved, device):
    """Half precision takes the fused attention kernels. The tolerance is that of a bfloat16 model in test_precision.py."""
    model, denoiser, there = *moved(device, torch.bfloat16, vit), *moved(device, torch.float32, small_denoiser, images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = Adapter(model, denoiser, CONFIG.replace(optimizer="sgd", lr=0.02)).adapt(there)
    for i in range(4):
        alone = Adapter(model, denoiser, CONFIG.replace(optimizer="sgd", lr=0.02)).adapt(
            there[i : i + 1], image_ids=torch.tensor([i], device=device)
        )
        change = (whole.outputs[i] - whole.outputs_before[i]).float()
        assert change.norm() > 1e-2
        assert (change - (alone.outputs[0] - alone.outputs_before[0]).float()).norm() < 0.06 * change.norm()
