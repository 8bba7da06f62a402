"""ADM's checkpoints (guided-diffusion) as diffusers' UNet. The reference here is written from the paper and its released weights' names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from dtta_fast import AdaptConfig, adapt
from dtta_fast.denoisers import ClassUNet
from dtta_fast.runs.models import load_denoiser

WIDTH, CLASSES, HEAD, SIDE = 32, 10, 16, 16


def embedding(time: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
    angles = time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, resize: str = "") -> None:
        super().__init__()
        self.resize = resize
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * WIDTH, 2 * outer))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outer), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outer, outer, 3, padding=1))
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def resized(self, x: Tensor) -> Tensor:
        return {"": x, "down": F.avg_pool2d(x, 2), "up": F.interpolate(x, scale_factor=2)}[self.resize]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[1](self.in_layers[0](x))))
        scale, shift = self.emb_layers(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * (1 + scale) + shift
        return self.skip_connection(self.resized(x)) + self.out_layers[1:](h)


class Attention(nn.Module):
    def __init__(self, channels: int, new_order: bool) -> None:
        super().__init__()
        self.norm, self.new_order = nn.GroupNorm(32, channels), new_order
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        flat = x.flatten(2)
        joined, heads = self.qkv(self.norm(flat)), x.shape[1] // HEAD
        if self.new_order:
            q, k, v = joined.unflatten(1, (3, heads, HEAD)).unbind(1)
        else:
            q, k, v = joined.unflatten(1, (heads, 3, HEAD)).unbind(2)
        weights = (q.mT @ k / HEAD**0.5).softmax(-1)
        return x + self.proj_out((v @ weights.mT).flatten(1, 2)).view_as(x)


class Resize(nn.Module):
    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        setattr(self, "op" if kind == "down" else "conv", nn.Conv2d(channels, channels, 3, 2 if kind == "down" else 1, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.op(x) if self.kind == "down" else self.conv(F.interpolate(x, scale_factor=2))


class Adm(nn.Module):
    """multipliers: of the channels, by level. attends: by level. residual: whether residual blocks change the size."""

    def __init__(self, multipliers=(1, 2, 2), attends=(False, True, True), blocks=2, residual=True, new_order=False) -> None:
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, 4 * WIDTH))
        self.label_emb = nn.Embedding(CLASSES, 4 * WIDTH)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, WIDTH, 3, padding=1)])])
        channels, skips = WIDTH, [WIDTH]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                parts = [Residual(channels, multiplier * WIDTH)]
                channels = multiplier * WIDTH
                self.input_blocks.append(nn.ModuleList([*parts, *([Attention(channels, new_order)] if attends[level] else [])]))
                skips.append(channels)
            if level + 1 < len(multipliers):
                self.input_blocks.append(nn.ModuleList([Residual(channels, channels, "down") if residual else Resize(channels, "down")]))
                skips.append(channels)
        self.middle_block = nn.ModuleList([Residual(channels, channels), Attention(channels, new_order), Residual(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for number in range(blocks + 1):
                parts = [Residual(channels + skips.pop(), multiplier * WIDTH)]
                channels = multiplier * WIDTH
                parts += [Attention(channels, new_order)] if attends[level] else []
                if level and number == blocks:
                    parts.append(Residual(channels, channels, "up") if residual else Resize(channels, "up"))
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), nn.Conv2d(channels, 6, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        condition = self.time_embed(embedding(time, WIDTH)) + self.label_emb(labels)
        x, skips = self.input_blocks[0][0](x), []
        skips.append(x)
        for block in self.input_blocks[1:]:
            for part in block:
                x = part(x, condition)
            skips.append(x)
        for part in self.middle_block:
            x = part(x, condition)
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for part in block:
                x = part(x, condition)
        return self.out(x)


SHAPES = {
    "ImageNet's": {},
    "convolutions": {"residual": False},
    "the new order": {"new_order": True},
    "one block": {"blocks": 1, "multipliers": (1, 2), "attends": (False, True)},
    "three blocks": {"blocks": 3, "multipliers": (1, 1, 2, 2), "attends": (False, False, True, True)},
    "attention nowhere but in the middle": {"attends": (False, False, False)},
}


def made(**shape) -> Adm:
    torch.manual_seed(0)
    network = Adm(**shape).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return network


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_are_adm_s(shape, tmp_path):
    theirs = made(**SHAPES[shape])
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    new_order = SHAPES[shape].get("new_order", False)
    denoiser = ClassUNet.from_adm(tmp_path / "model.pt", image_size=SIDE, head_channels=HEAD, new_attention_order=new_order)
    x, t, labels = torch.randn(3, 3, SIDE, SIDE), torch.tensor([0, 500, 999]), torch.tensor([3, 0, 9])
    with torch.no_grad():
        found, expected = denoiser(x, t, denoiser.class_embeddings({})[labels]), theirs(x, t, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert found.shape[1] == 6


@pytest.mark.parametrize(("schedule", "betas"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_a_converted_folder_adapts(schedule, betas, tmp_path):
    denoiser = ClassUNet.from_adm(made().state_dict(), image_size=SIDE, head_channels=HEAD, schedule=schedule)
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=betas)
    torch.testing.assert_close(denoiser.process.table[:, 0], scheduler.alphas_cumprod.sqrt())
    denoiser.save_pretrained(tmp_path, scheduler)
    again = load_denoiser(str(tmp_path))
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES))
    images = torch.rand(2, 3, SIDE, SIDE)
    found = [adapt(model, each, images, config=AdaptConfig(steps=1, pairs=2, guard=2)) for each in (denoiser, again)]
    torch.testing.assert_close(found[0].outputs, found[1].outputs)


def test_what_cannot_be_read_is_named():
    state = made().state_dict()
    with pytest.raises(ValueError, match=r"is no class-conditional UNet of ADM's: label_emb.weight missing"):
        ClassUNet.from_adm({name: value for name, value in state.items() if name != "label_emb.weight"}, image_size=SIDE)
    with pytest.raises(ValueError, match=r"head_channels 48 does not divide the channels \[32, 64, 64\]"):
        ClassUNet.from_adm(state, image_size=SIDE, head_channels=48)
    with pytest.raises(ValueError, match="schedule is 'sigmoid'; allowed: linear, cosine"):
        ClassUNet.from_adm(state, image_size=SIDE, head_channels=HEAD, schedule="sigmoid")
    missing = {name: value for name, value in state.items() if not name.startswith("output_blocks.8.")}
    with pytest.raises(ValueError, match="input blocks and"):
        ClassUNet.from_adm(missing, image_size=SIDE, head_channels=HEAD)
