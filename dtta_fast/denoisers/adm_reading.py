"""Reader of ADM's class-conditional UNets (Dhariwal & Nichol 2021, arXiv 2105.05233) as diffusers' UNet2DModel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtta_fast.denoisers.reading import OF_VALUES
from dtta_fast.denoisers.weights import check_weights, load

LEAST = ("time_embed.0.weight", "label_emb.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")


class Heads(NamedTuple):
    """How attention splits its channels: into `number` heads, or into heads of `channels`, and queries, keys and values before the heads
    (new_order) or after them."""

    channels: int | None
    number: int | None
    new_order: bool

    @classmethod
    def of(cls, image_size: int, channels: int | None, number: int | None, new_order: bool | None) -> Heads:
        """Takes what is None from the published model for this image size: guided-diffusion's README lists their flags.

        Raises:
            ValueError: an argument of from_adm has another type, or both counts are given.
        """
        if type(image_size) is not int or image_size < 1:
            raise ValueError(f"image_size is {image_size!r}; give the side length in pixels")
        for name, value in (("num_head_channels", channels), ("num_heads", number)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; give a whole number of 1 or more, or None for the published model's")
        if channels is not None and number is not None:
            raise ValueError(f"num_head_channels is {channels} and num_heads is {number}; give one of them")
        if new_order is not None and type(new_order) is not bool:
            raise ValueError(f"use_new_attention_order is {new_order!r}; give True, False, or None for the published model's")
        if channels is None and number is None:
            channels, number = (None, 4) if image_size == 128 else (64, None)
        return cls(channels, number, image_size == 64 if new_order is None else new_order)

    def count(self, width: int) -> int:
        """Returns the number of heads of an attention of `width` channels.

        Raises:
            ValueError: they do not divide it.
        """
        divisor = self.channels or self.number or 1
        if width % divisor:
            named = f"num_head_channels {self.channels}" if self.channels else f"num_heads {self.number}"
            raise ValueError(f"{named} does not divide the {width} channels of an attention block")
        return width // divisor if self.channels else divisor


class _Recorder(dict[str, Tensor]):
    """A state dict that notes which of its weights were read."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__(state)
        self.read = set[str]()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)


class _Block(NamedTuple):
    """A block of ADM's and where it goes: the prefix there, the level here, and the number of its residual block.

    number: None for a block that changes the size alone.
    """

    prefix: str
    level: int
    number: int | None


def unet_from_adm(state: Mapping[str, Tensor], source: str, image_size: int, heads: Heads) -> Any:
    """Makes a UNet2DModel of a checkpoint of guided-diffusion. Its attention has heads of one width; see ClassUNet's num_heads.

    Raises:
        ValueError: the weights are not those of a class-conditional UNet of ADM that UNet2DModel can express.
    """
    from diffusers import UNet2DModel

    missing = [name for name in LEAST if name not in state]
    if missing:
        there = ", ".join(str(name)[:40] for name in list(state)[:3])
        raise ValueError(f"{source} is not a class-conditional ADM UNet: {', '.join(missing)} missing; it has {there or 'nothing'}")
    check_weights(state, source)
    state = _Recorder(state)
    try:
        down, up = list(_down(state)), list(_up(state))
        config = _config(state, down, up, image_size, heads)
        with torch.device("meta"):
            unet = UNet2DModel(**config)
        own = dict(_renamed(state, down, up, heads))
    except KeyError as error:
        raise ValueError(f"{source} is not a class-conditional ADM UNet: it lacks {error.args[0]}") from error
    except OF_VALUES as error:
        raise ValueError(f"{source} is not a class-conditional ADM UNet: {error}") from error
    unread = sorted(set(state) - state.read)
    if unread:
        raise ValueError(f"{source} has weights that an ADM UNet of its sizes does not have: {', '.join(unread[:5])}")
    load(unet, own, f"{source}, by the names of diffusers' UNet2DModel,")
    return unet


def _count(state: Mapping[str, Tensor], name: str) -> int:
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(f"{name}."))


def _levels(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Returns the number of residual blocks per level, and that of levels.

    There are levels · (blocks + 1) input blocks, counting the first convolution, and as many output blocks. The last output block of a
    level, except of the one with the largest images, also doubles the size.
    """
    inputs, outputs = _count(state, "input_blocks"), _count(state, "output_blocks")
    each = next((k + 1 for k in range(outputs) if _grows(state, k) or _enlarges(state, k)), outputs)
    if inputs % each or inputs != outputs:
        raise ValueError(f"it has {inputs} input blocks and {outputs} output blocks")
    return each - 1, inputs // each


def _grows(state: Mapping[str, Tensor], k: int) -> bool:
    """Returns whether output block k ends in a residual block that doubles the size: it has two of them."""
    return sum(f"output_blocks.{k}.{j}.in_layers.0.weight" in state for j in range(3)) == 2


def _enlarges(state: Mapping[str, Tensor], k: int) -> bool:
    """Returns whether output block k ends in a convolution that doubles the size."""
    return any(f"output_blocks.{k}.{j}.conv.weight" in state for j in (1, 2))


def _down(state: Mapping[str, Tensor]) -> Iterator[_Block]:
    each, _ = _levels(state)
    for index in range(1, _count(state, "input_blocks")):
        level, number = divmod(index - 1, each + 1)
        yield _Block(f"input_blocks.{index}", level, number if number < each else None)


def _up(state: Mapping[str, Tensor]) -> Iterator[_Block]:
    each, _ = _levels(state)
    for index in range(_count(state, "output_blocks")):
        yield _Block(f"output_blocks.{index}", *divmod(index, each + 1))


def _config(state: Mapping[str, Tensor], down: list[_Block], up: list[_Block], image_size: int, heads: Heads) -> dict[str, Any]:
    each, _ = _levels(state)
    channels = [len(state[f"{block.prefix}.0.out_layers.3.weight"]) for block in down if block.number == 0]
    attends = [f"{block.prefix}.1.qkv.weight" in state for block in down if block.number == 0]
    attends_up = [f"{block.prefix}.1.qkv.weight" in state for block in up if block.number == 0]
    residual = any(_grows(state, k) for k in range(len(up)))
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    first = state["input_blocks.1.0.emb_layers.1.weight"]
    attention = [found for found, own in zip(channels, attends, strict=True) if own] + channels[-1:]
    time = state["time_embed.0.weight"].shape[1]
    if time != channels[0]:
        cannot = "which diffusers' UNet2DModel cannot express (512x512_diffusion.pt is such a model)"
        raise ValueError(f"its first level has {channels[0]} channels and its embedding of time {time}, {cannot}")
    if image_size % 2 ** (len(channels) - 1):
        raise ValueError(f"image_size {image_size} cannot be halved {len(channels) - 1} times, as its {len(channels)} levels do")
    return {
        "sample_size": image_size,
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(state["out.2.weight"]),
        "block_out_channels": tuple(channels),
        "layers_per_block": each,
        "down_block_types": tuple("AttnDownBlock2D" if own else plain[0] for own in attends),
        "up_block_types": tuple("AttnUpBlock2D" if own else plain[1] for own in attends_up),
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "resnet_time_scale_shift": "scale_shift" if len(first) == 2 * channels[0] else "default",
        "attention_head_dim": heads.channels or math.gcd(*attention),  # with a number of heads, ClassUNet sets it
        "num_class_embeds": len(state["label_emb.weight"]),
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
    }


def _renamed(state: Mapping[str, Tensor], down: list[_Block], up: list[_Block], heads: Heads) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in (
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ):
        yield from _moved(state, theirs, ours)
    yield "class_embedding.weight", state["label_emb.weight"]
    for block in down:
        here = f"down_blocks.{block.level}"
        if block.number is None:
            yield from _resized(state, f"{block.prefix}.0", f"{here}.downsamplers.0", "op")
            continue
        yield from _residual(state, f"{block.prefix}.0", f"{here}.resnets.{block.number}")
        yield from _attention(state, f"{block.prefix}.1", f"{here}.attentions.{block.number}", heads)
    for index, number in ((0, 0), (2, 1)):
        yield from _residual(state, f"middle_block.{index}", f"mid_block.resnets.{number}")
    yield from _attention(state, "middle_block.1", "mid_block.attentions.0", heads)
    for block in up:
        here = f"up_blocks.{block.level}"
        yield from _residual(state, f"{block.prefix}.0", f"{here}.resnets.{block.number}")
        attends = f"{block.prefix}.1.qkv.weight" in state
        yield from _attention(state, f"{block.prefix}.1", f"{here}.attentions.{block.number}", heads)
        yield from _resized(state, f"{block.prefix}.{1 + attends}", f"{here}.upsamplers.0", "conv")


def _moved(state: Mapping[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("weight", "bias"):
        if f"{theirs}.{kind}" in state:
            yield f"{ours}.{kind}", state[f"{theirs}.{kind}"]


def _residual(state: Mapping[str, Tensor], theirs: str, ours: str) -> Iterator[tuple[str, Tensor]]:
    for part, name in (
        ("in_layers.0", "norm1"),
        ("in_layers.2", "conv1"),
        ("emb_layers.1", "time_emb_proj"),
        ("out_layers.0", "norm2"),
        ("out_layers.3", "conv2"),
        ("skip_connection", "conv_shortcut"),
    ):
        yield from _moved(state, f"{theirs}.{part}", f"{ours}.{name}")


def _resized(state: Mapping[str, Tensor], theirs: str, ours: str, convolution: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of a change of size, which is a residual block or a convolution."""
    if f"{theirs}.in_layers.0.weight" in state:
        yield from _residual(state, theirs, ours)
    else:
        yield from _moved(state, f"{theirs}.{convolution}", f"{ours}.conv")


def _attention(state: Mapping[str, Tensor], theirs: str, ours: str, heads: Heads) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of an attention block, if there is one: its queries, keys and values are one convolution.

    Their channels are ordered by head first, or in the new order by query, key and value first.
    """
    if f"{theirs}.qkv.weight" not in state:
        return
    yield from _moved(state, f"{theirs}.norm", f"{ours}.group_norm")
    for kind in ("weight", "bias"):
        joined = state[f"{theirs}.qkv.{kind}"].flatten(1) if kind == "weight" else state[f"{theirs}.qkv.{kind}"]
        channels = len(joined) // 3
        own_order = joined.unflatten(0, (heads.count(channels), 3, -1)).transpose(0, 1)
        parts = joined.unflatten(0, (3, channels)) if heads.new_order else own_order
        for name, part in zip("qkv", parts, strict=True):
            yield f"{ours}.to_{name}.{kind}", part.reshape(channels, *joined.shape[1:]).contiguous()
        last = state[f"{theirs}.proj_out.{kind}"]
        yield f"{ours}.to_out.0.{kind}", last.flatten(1) if kind == "weight" else last
