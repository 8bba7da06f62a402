"""ADM's checkpoints (guided-diffusion) as diffusers' UNet. The reference here is written from the paper and its released weights' names."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from dtta_fast import AdaptConfig, adapt
from dtta_fast.denoisers import ClassUNet
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.runs.models import load_denoiser

WIDTH, CLASSES, HEAD, SIDE = 32, 10, 16, 16


def embedding(time: Tensor, width: int) -> Tensor:
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / (width // 2))
    angles = time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, resize: str = "", scale_shift: bool = True) -> None:
        super().__init__()
        self.resize, self.scale_shift = resize, scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * WIDTH, (1 + scale_shift) * outer))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outer), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outer, outer, 3, padding=1))
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def resized(self, x: Tensor) -> Tensor:
        return {"": x, "down": F.avg_pool2d(x, 2), "up": F.interpolate(x, scale_factor=2)}[self.resize]

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.in_layers[2](self.resized(self.in_layers[1](self.in_layers[0](x))))
        given = self.emb_layers(condition)[:, :, None, None]
        if self.scale_shift:
            scale, shift = given.chunk(2, dim=1)
            h = self.out_layers[0](h) * (1 + scale) + shift
        else:
            h = self.out_layers[0](h + given)
        return self.skip_connection(self.resized(x)) + self.out_layers[1:](h)


class Attention(nn.Module):
    def __init__(self, channels: int, new_order: bool, heads: int | None) -> None:
        super().__init__()
        self.norm, self.new_order, self.heads = nn.GroupNorm(32, channels), new_order, heads or channels // HEAD
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        flat = x.flatten(2)
        joined = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = joined.unflatten(1, (3, self.heads, -1)).unbind(1)
        else:
            q, k, v = joined.unflatten(1, (self.heads, 3, -1)).unbind(2)
        weights = (q.mT @ k / q.shape[2] ** 0.5).softmax(-1)
        return x + self.proj_out((v @ weights.mT).flatten(1, 2)).view_as(x)


class Resize(nn.Module):
    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        setattr(self, "op" if kind == "down" else "conv", nn.Conv2d(channels, channels, 3, 2 if kind == "down" else 1, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.op(x) if self.kind == "down" else self.conv(F.interpolate(x, scale_factor=2))


class Adm(nn.Module):
    """multipliers: of the channels, by level. attends: by level. residual: whether residual blocks change the size. heads: None for heads
    of HEAD channels."""

    def __init__(
        self, multipliers=(1, 2, 2), attends=(False, True, True), blocks=2, residual=True, new_order=False, heads=None, scale_shift=True
    ) -> None:
        super().__init__()

        def changed(inner: int, outer: int, resize: str = "") -> nn.Module:
            return Residual(inner, outer, resize, scale_shift) if residual or not resize else Resize(inner, resize)

        def attention(channels: int) -> nn.Module:
            return Attention(channels, new_order, heads)

        self.time_embed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, 4 * WIDTH))
        self.label_emb = nn.Embedding(CLASSES, 4 * WIDTH)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, WIDTH, 3, padding=1)])])
        channels, skips = WIDTH, [WIDTH]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                parts = [changed(channels, multiplier * WIDTH)]
                channels = multiplier * WIDTH
                self.input_blocks.append(nn.ModuleList([*parts, *([attention(channels)] if attends[level] else [])]))
                skips.append(channels)
            if level + 1 < len(multipliers):
                self.input_blocks.append(nn.ModuleList([changed(channels, channels, "down")]))
                skips.append(channels)
        self.middle_block = nn.ModuleList([changed(channels, channels), attention(channels), changed(channels, channels)])
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for number in range(blocks + 1):
                parts = [changed(channels + skips.pop(), multiplier * WIDTH)]
                channels = multiplier * WIDTH
                parts += [attention(channels)] if attends[level] else []
                if level and number == blocks:
                    parts.append(changed(channels, channels, "up"))
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


OWN = {"num_head_channels": HEAD, "use_new_attention_order": False, "noise_schedule": "linear"}  # flags of a training of one's own
SHAPES = {
    "ImageNet's": {},
    "convolutions": {"residual": False},
    "the new order": {"new_order": True},
    "one block": {"blocks": 1, "multipliers": (1, 2), "attends": (False, True)},
    "three blocks": {"blocks": 3, "multipliers": (1, 1, 2, 2), "attends": (False, False, True, True)},
    "attention nowhere but in the middle": {"attends": (False, False, False)},
    "four heads, as at 128 pixels": {"multipliers": (1, 2, 3), "heads": 4},
    "no scale and shift": {"scale_shift": False},
}


def made(**shape) -> Adm:
    torch.manual_seed(0)
    network = Adm(**shape).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return network


def read(shape: str, state=None) -> ClassUNet:
    """A network of one of the shapes, read with its flags."""
    heads = SHAPES[shape].get("heads")
    return ClassUNet.from_adm(
        made(**SHAPES[shape]).state_dict() if state is None else state,
        image_size=SIDE,
        num_heads=heads,
        num_head_channels=None if heads else HEAD,
        use_new_attention_order=SHAPES[shape].get("new_order", False),
        noise_schedule="linear",
    )


def compare(denoiser: ClassUNet, theirs: Adm) -> None:
    x, t, labels = torch.randn(3, 3, SIDE, SIDE), torch.tensor([0, 500, 999]), torch.tensor([3, 0, 9])
    with torch.no_grad():
        found, expected = denoiser(x, t, denoiser.class_embeddings({})[labels]), theirs(x, t, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert found.shape[1] == 6


@pytest.mark.parametrize("shape", SHAPES)
def test_predictions_are_adm_s(shape, tmp_path):
    theirs = made(**SHAPES[shape])
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    denoiser = read(shape, tmp_path / "model.pt")
    compare(denoiser, theirs)
    denoiser.save_pretrained(tmp_path / "folder")
    compare(ClassUNet.from_pretrained(tmp_path / "folder"), theirs)


def test_the_epsilon_of_the_norms_is_adm_s():
    theirs = made()
    with torch.no_grad():  # so small that a group's variance is near the epsilon
        for name, value in theirs.named_parameters():
            value.mul_(3e-3 if name == "input_blocks.0.0.weight" else 0 if name == "input_blocks.0.0.bias" else 1)
    compare(read("ImageNet's", theirs.state_dict()), theirs)


def test_the_gradient_reaches_soft_classes():
    denoiser = read("four heads, as at 128 pixels").double()
    table, logits = denoiser.class_embeddings({}), torch.randn(1, CLASSES, dtype=torch.float64, requires_grad=True)
    x, t = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64), torch.tensor([500])
    assert torch.autograd.gradcheck(lambda w: denoiser(x, t, w.softmax(1) @ table).square().mean(), logits)


PUBLISHED = {  # guided-diffusion's README: 64 pixels with use_new_attention_order and a cosine schedule, 128 pixels with num_heads 4
    64: ((1, 2, 3, 4), {"num_head_channels": 64, "use_new_attention_order": True, "noise_schedule": "cosine"}),
    128: ((1, 1, 2, 3, 4), {"num_heads": 4, "use_new_attention_order": False, "noise_schedule": "linear"}),
    256: ((1, 1, 2, 2, 4, 4), {"num_head_channels": 64, "use_new_attention_order": False, "noise_schedule": "linear"}),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_flags_are_those_of_the_published_model_of_this_size(size, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 64)
    multipliers, flags = PUBLISHED[size]
    attends = tuple(number >= len(multipliers) - 3 for number in range(len(multipliers)))
    state = made(multipliers=multipliers, attends=attends, blocks=1).state_dict()
    denoiser, told = ClassUNet.from_adm(state, image_size=size), ClassUNet.from_adm(state, image_size=size, **flags)
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([300])
    with torch.no_grad():
        found = [each(x, t, each.class_embeddings({})[:1]) for each in (denoiser, told)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    betas = "squaredcos_cap_v2" if flags["noise_schedule"] == "cosine" else "linear"
    expected = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=betas).alphas_cumprod.sqrt()
    torch.testing.assert_close(denoiser.process.table[:, 0], expected)
    for other in {*PUBLISHED} - {size}:
        with pytest.raises(ValueError, match=f"image_size is {other}, and the levels have 1, .* times the channels of the first"):
            ClassUNet.from_adm(state, image_size=other)
    with pytest.raises(ValueError, match="image_size is 32; flags are known only for the models of 64, 128, 256 pixels: give num_heads"):
        ClassUNet.from_adm(state, image_size=32)


def test_a_head_count_goes_with_the_unet():
    theirs = made(**SHAPES["four heads, as at 128 pixels"])
    denoiser = read("four heads, as at 128 pixels")
    again = ClassUNet(denoiser.unet, denoiser.process)
    assert again.num_heads == 4
    compare(again, theirs)
    assert read("ImageNet's").num_heads is None


def test_a_refused_head_count_leaves_the_unet_as_it_was():
    unet = UNet2DModel(sample_size=SIDE, num_class_embeds=CLASSES)
    before = str(unet)
    with pytest.raises(ValueError, match="num_heads is 5; give a divisor of the channels of unet's attention"):
        ClassUNet(unet, NoiseProcess.from_scheduler(DDPMScheduler()), num_heads=5)
    assert str(unet) == before


def test_a_converted_folder_adapts(tmp_path):
    denoiser = read("ImageNet's")
    denoiser.save_pretrained(tmp_path)
    again = load_denoiser(str(tmp_path))
    torch.testing.assert_close(again.process.table, denoiser.process.table)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES))
    images = torch.rand(2, 3, SIDE, SIDE)
    found = [adapt(model, each, images, config=AdaptConfig(steps=1, pairs=2)) for each in (denoiser, again)]
    torch.testing.assert_close(found[0].outputs, found[1].outputs)
    assert (found[0].outputs != found[0].outputs_before).any()


def test_a_folder_keeps_the_process_of_the_training(tmp_path):
    denoiser = ClassUNet.from_adm(
        made().state_dict(), image_size=SIDE, num_head_channels=HEAD, use_new_attention_order=False, noise_schedule="cosine"
    )
    with pytest.raises(ValueError, match="scheduler is a DDPMScheduler of another noise process than the denoiser's"):
        denoiser.save_pretrained(tmp_path / "folder", DDPMScheduler(1000))
    assert not (tmp_path / "folder").exists()
    denoiser.process = NoiseProcess(denoiser.process.table)
    with pytest.raises(ValueError, match="scheduler is None, and the noise process was not read from one"):
        denoiser.save_pretrained(tmp_path / "folder")
    denoiser.save_pretrained(tmp_path / "folder", DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"))
    assert ClassUNet.from_pretrained(tmp_path / "folder").process.equals(denoiser.process)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 0}, "image_size is 0; give the side length"),
        ({"image_size": "64"}, "image_size is '64'; give the side length"),
        ({"image_size": 18}, "image_size is 18; the network's 3 levels need a multiple of 4"),
        ({"num_head_channels": 0}, "num_head_channels is 0; give a whole number of 1 or more"),
        ({"num_head_channels": -1}, "num_head_channels is -1; give a whole number of 1 or more"),
        ({"num_head_channels": 48}, "^num_head_channels is 48; give a divisor of the channels of attention: 64$"),
        ({"num_heads": 5, "num_head_channels": None}, "^num_heads is 5; give a divisor of the channels of attention: 64$"),
        ({"num_heads": 4}, "num_head_channels is 16 and num_heads is 4; give at most one"),
        ({"use_new_attention_order": "False"}, "use_new_attention_order is 'False'; give True, False, or None"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule is 'sigmoid'; allowed: linear, cosine"),
        ({"noise_schedule": ""}, "noise_schedule is ''; allowed: linear, cosine"),
        ({"noise_schedule": ["linear"]}, r"noise_schedule is \['linear'\]; allowed: linear, cosine"),
    ],
)
def test_a_wrong_flag_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        ClassUNet.from_adm(made().state_dict(), **{"image_size": SIDE, **OWN, **flags})


def test_what_cannot_be_read_is_named():
    state = made().state_dict()

    def refused(found, message, error=ValueError):
        with pytest.raises(error, match=message):
            ClassUNet.from_adm(found, image_size=SIDE, **OWN)

    def but(*gone):
        return {name: value for name, value in state.items() if not name.startswith(gone)}

    refused(but("label_emb."), r"is not a class-conditional ADM UNet: label_emb.weight missing; it has time_embed.0.weight")
    refused({}, r"missing; it has nothing")
    refused(but("output_blocks.8."), "input blocks and")
    refused(but("output_blocks.2.1.qkv.bias"), "it lacks output_blocks.2.1.qkv.bias")
    refused(state | {"encoder.weight": torch.ones(2)}, r"has weights that an ADM UNet of its sizes does not have: encoder.weight")
    refused(state | {"out.0.weight": torch.ones(1).expand(32)}, "'out.0.weight' cannot be taken: .*its values share their memory")
    refused(
        state | {"input_blocks.1.0.out_layers.3.weight": torch.ones(3200, 1, 1, 1)},
        "3200 channels at its first level and 32 in its embedding of time",
    )
    refused(made(), r"is a Adm; give its weights, as network.state_dict\(\)", TypeError)
    refused(None, "path_or_state_dict is a NoneType; give a path or a state dict", TypeError)


def test_names_may_have_the_prefix_of_a_parallel_training():
    theirs = made()
    compare(read("ImageNet's", {f"module.{name}": value for name, value in theirs.state_dict().items()}), theirs)


def test_a_narrower_first_level_is_refused():
    """512x512_diffusion.pt has the multiplier 0.5 there: its embedding of time is twice as wide as the first level."""
    state = made().state_dict()
    for name, value in state.items():
        if value.shape[-1:] == (4 * WIDTH,) and ("emb" in name):
            state[name] = torch.zeros(*value.shape[:-1], 8 * WIDTH)
    state["time_embed.0.weight"] = torch.zeros(8 * WIDTH, 2 * WIDTH)
    with pytest.raises(ValueError, match=r"has 32 channels at its first level and 64 in its embedding of time.*512x512_diffusion.pt"):
        ClassUNet.from_adm(state, image_size=512, **OWN)
