"""The class-conditional UNets of EDM (Karras et al. 2022, arXiv 2206.00364), and the reader of their weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dtta_fast.denoisers.reading import OF_VALUES
from dtta_fast.denoisers.weights import check_weights, load

HEAD_CHANNELS = 64  # of ADM's attention; DDPM++ has one head
PREFIX = "model."  # of EDM's preconditioning around its network


class _Block(nn.Module):
    """A residual block, which may change the size and end in attention.

    Args:
        inner, outer: channels in and out. width: channels of the embedding. resize: "", "down" or "up", by a factor of 2.
        attends: whether it ends in attention. adm: whether it is one of ADM's: the embedding scales and shifts, attention has heads of
            HEAD_CHANNELS channels, and sums are not divided by √2.
    """

    def __init__(self, inner: int, outer: int, width: int, resize: str = "", *, attends: bool = False, adm: bool = True) -> None:
        super().__init__()
        self.resize, self.adm = resize, adm
        self.gain = 1.0 if adm else math.sqrt(0.5)
        self.heads = (outer // HEAD_CHANNELS if adm else 1) if attends else 0
        self.norm0 = _norm(inner, adm)
        self.conv0 = nn.Conv2d(inner, outer, 3, padding=1)
        self.affine = nn.Linear(width, 2 * outer if adm else outer)
        self.norm1 = _norm(outer, adm)
        self.conv1 = nn.Conv2d(outer, outer, 3, padding=1)
        projects = inner != outer or (bool(resize) and not adm)
        self.skip = nn.Conv2d(inner, outer, 1) if projects else nn.Identity()
        if attends:
            self.norm2 = _norm(outer, adm)
            self.qkv = nn.Conv2d(outer, 3 * outer, 1)
            self.proj = nn.Conv2d(outer, outer, 1)

    def resized(self, x: Tensor) -> Tensor:
        """Halves the size by the mean of 2 x 2 pixels, or doubles it by repeating them."""
        if not self.resize:
            return x
        return F.avg_pool2d(x, 2) if self.resize == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        inner = self.conv0(self.resized(F.silu(self.norm0(x))))
        given = self.affine(embedding)[:, :, None, None]
        if self.adm:
            scale, shift = given.chunk(2, dim=1)
            inner = torch.addcmul(shift, self.norm1(inner), 1 + scale)
        else:
            inner = self.norm1(inner + given)
        x = (self.skip(self.resized(x)) + self.conv1(F.silu(inner))) * self.gain
        return (x + self.proj(self.attended(x))) * self.gain if self.heads else x

    def attended(self, x: Tensor) -> Tensor:
        """Computes self-attention over the pixels of x [N, C, h, w], before the output projection.

        The channels of qkv are ordered by head, then channel of the head, then q, k, v.
        """
        joined: Tensor = self.qkv(self.norm2(x))
        joined = joined.flatten(2).unflatten(1, (self.heads, -1, 3))
        q, k, v = joined.permute(3, 0, 1, 4, 2).contiguous()  # flash attention needs a contiguous last dimension
        return F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape)


def _norm(channels: int, adm: bool) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-5 if adm else 1e-6)


class EDMUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """EDM's UNet with classes, of the architecture DDPM++ or ADM.

    Args:
        sample_size: side length in pixels. in_channels, out_channels: channels of the noisy image and of the prediction.
        noise_channels: channels of the noise level's embedding; the embedding that all blocks get has four times as many.
        block_out_channels: channels at each level, from the largest images to the smallest.
        layers_per_block: residual blocks of a level on the way down; there is one more on the way up.
        attention: whether each level has attention.
        num_class_embeds: number of classes, which are the rows of class_embedding.
        adm: ADM's architecture, as for ImageNet at 64 pixels; False is DDPM++'s, as for CIFAR-10.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int,
        in_channels: int,
        out_channels: int,
        noise_channels: int,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        attention: Sequence[bool],
        num_class_embeds: int,
        adm: bool,
    ) -> None:
        super().__init__()
        width = 4 * noise_channels
        self.map_layer0, self.map_layer1 = nn.Linear(noise_channels, width), nn.Linear(width, width)
        sides = [sample_size >> level for level in range(len(block_out_channels))]
        channels = block_out_channels[0] if adm else noise_channels
        skips = [channels]
        self.enc = nn.ModuleDict({f"{sides[0]}x{sides[0]}_conv": nn.Conv2d(in_channels, channels, 3, padding=1)})
        for level, side in enumerate(sides):
            if level:
                self.enc[f"{side}x{side}_down"] = _Block(channels, channels, width, "down", adm=adm)
                skips.append(channels)
            for number in range(layers_per_block):
                outer = block_out_channels[level]
                self.enc[f"{side}x{side}_block{number}"] = _Block(channels, outer, width, attends=attention[level], adm=adm)
                skips.append(channels := outer)
        last = f"{sides[-1]}x{sides[-1]}"
        self.dec = nn.ModuleDict({f"{last}_in0": _Block(channels, channels, width, attends=True, adm=adm)})
        self.dec[f"{last}_in1"] = _Block(channels, channels, width, adm=adm)
        for level, side in reversed(list(enumerate(sides))):
            if side != sides[-1]:
                self.dec[f"{side}x{side}_up"] = _Block(channels, channels, width, "up", adm=adm)
            for number in range(layers_per_block + 1):
                outer, attends = block_out_channels[level], attention[level] and (adm or number == layers_per_block)
                self.dec[f"{side}x{side}_block{number}"] = _Block(channels + skips.pop(), outer, width, attends=attends, adm=adm)
                channels = outer
        self.out_norm, self.out_conv = _norm(channels, adm), nn.Conv2d(channels, out_channels, 3, padding=1)
        # not first: the first parameter tells diffusers the dtype of the activations, and mixed precision keeps this one in float32
        self.class_embedding = nn.Embedding(num_class_embeds, width if adm else noise_channels)
        self.gradient_checkpointing = False

    def embedding(self, time: Tensor, classes: Tensor) -> Tensor:
        """Embeds times [N] and rows [N, D] of the class table: [N, 4 · noise_channels].

        DDPM++ adds the class to the sines and cosines of the time, ADM to what two layers make of those.
        """
        half, adm = self.map_layer0.in_features // 2, self.config.adm
        exponents = torch.arange(half, dtype=torch.float32, device=time.device) / (half if adm else half - 1)
        angles = time.float()[:, None] * 10_000.0**-exponents
        waves = (angles.cos(), angles.sin()) if adm else (angles.sin(), angles.cos())
        found = torch.cat(waves, dim=1).to(self.map_layer0.weight.dtype)
        if adm:
            return F.silu(self.map_layer1(F.silu(self.map_layer0(found))) + classes)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(found + classes))))

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Predicts from samples [N, C, h, w] at times [N] under classes [N].

        Inside a ClassUNet, class_labels may also be mixtures [N, D] of the table's rows. Always returns a tuple, as diffusers' networks do
        with return_dict=False.

        Raises:
            ValueError: return_dict is True.
        """
        if return_dict:
            raise ValueError("return_dict is True; an EDMUNet returns a tuple: give return_dict=False")
        embedding = self.embedding(timestep, self.class_embedding(class_labels).to(sample.dtype))
        blocks, skips = iter(self.enc.values()), list[Tensor]()
        skips.append(x := next(blocks)(sample))
        for block in blocks:
            skips.append(x := self._run(block, x, embedding))
        for name, block in self.dec.items():
            x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
            x = self._run(block, x, embedding)
        return (self.out_conv(F.silu(self.out_norm(x))),)

    def _run(self, block: nn.Module, *given: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            found: Tensor = self._gradient_checkpointing_func(block, *given)
            return found
        return block(*given)


def unet_from_edm(state: Mapping[str, Tensor], source: str) -> EDMUNet:
    """Makes an EDMUNet of the state dict of an EDM network, with its preconditioning or without.

    Raises:
        ValueError: the weights are not those of a class-conditional DDPM++ or ADM UNet with EDM's preconditioning.
    """
    check_weights(state, source)
    if "u" in state:
        raise ValueError(f"{source} has iDDPM's preconditioning (its buffer u), which is not read; give a network with EDM's (edm-*)")
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    if any("_aux_residual" in name or "_aux_skip" in name or name == "map_noise.freqs" for name in state):
        raise ValueError(f"{source} is an NCSN++ (trained as 've'), which is not read; give a DDPM++ or an ADM with EDM's preconditioning")
    missing = [name for name in ("map_layer0.weight", "map_layer1.weight") if name not in state]
    if missing or not any(name.startswith("enc.") for name in state):
        there = ", ".join([*state][:3]) or "nothing"
        raise ValueError(f"{source} is not an EDM UNet: {', '.join(missing) or 'enc.* is'} missing; it has {there}")
    if "map_label.weight" not in state:
        raise ValueError(f"{source} is an EDM UNet without classes (map_label.weight is missing); give a class-conditional one")
    try:
        with torch.device("meta"):
            unet = EDMUNet(**_config(state))
        own = dict(_renamed(state, unet))
    except KeyError as error:
        raise ValueError(f"{source} is not an EDM UNet: it lacks {error.args[0]}") from error
    except OF_VALUES as error:
        raise ValueError(f"{source} is not an EDM UNet: {error}") from error
    if unet.config.in_channels != unet.config.out_channels:
        found = f"{unet.config.in_channels} channels in and {unet.config.out_channels} out"
        raise ValueError(f"{source} has {found}, as with iDDPM's preconditioning, which is not read; give a network with EDM's (edm-*)")
    load(unet, own, source)
    return unet


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    sides = sorted({int(name.split(".")[1].partition("x")[0]) for name in state if name.startswith("enc.")}, reverse=True)
    first = f"{sides[0]}x{sides[0]}"
    adm, ddpmpp = (f"{name}.weight" in state for name in ("out_conv", f"dec.{first}_aux_conv"))
    if not (adm or ddpmpp):
        raise ValueError(f"its last layer is missing: ADM's out_conv, or DDPM++'s dec.{first}_aux_conv")
    last = "out_conv" if adm else f"dec.{first}_aux_conv"
    return {
        "sample_size": sides[0],
        "in_channels": state[f"enc.{first}_conv.weight"].shape[1],
        "out_channels": len(state[f"{last}.weight"]),
        "noise_channels": state["map_layer0.weight"].shape[1],
        "block_out_channels": [len(state[f"enc.{side}x{side}_block0.conv1.weight"]) for side in sides],
        "layers_per_block": sum(f"enc.{first}_block{number}.conv1.weight" in state for number in range(len(state))),
        "attention": [f"enc.{side}x{side}_block0.qkv.weight" in state for side in sides],
        "num_class_embeds": state["map_label.weight"].shape[1],
        "adm": adm,
    }


def _renamed(state: Mapping[str, Tensor], unet: EDMUNet) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights by our names. Augmentation labels are 0 for unaugmented images, so their weights are left out.

    Raises:
        ValueError: sizes are changed by another filter than the mean of 2 x 2 pixels.
    """
    table = state["map_label.weight"].T.float()
    if not unet.config.adm:  # DDPM++ multiplies its one-hot labels by √classes, and has a bias
        table = table * math.sqrt(len(table)) + state["map_label.bias"]
    yield "class_embedding.weight", table.contiguous()
    first = f"dec.{unet.config.sample_size}x{unet.config.sample_size}"
    for name, value in state.items():
        if name.endswith("resample_filter"):
            if value.shape[-2:] != (2, 2) or (value.double() - 0.25).abs().max() > 1e-3:
                raise ValueError(f"{name} is {value.flatten().tolist()[:4]}; supported: the mean of 2 x 2 pixels")
        elif not name.startswith(("map_label.", "map_augment.")):
            yield name.replace(f"{first}_aux_norm", "out_norm").replace(f"{first}_aux_conv", "out_conv"), value
