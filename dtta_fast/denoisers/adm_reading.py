"""Reader of ADM's class-conditional UNets (Dhariwal & Nichol 2021, arXiv 2105.05233) as diffusers' UNet2DModel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtta_fast.denoisers.reading import OF_VALUES
from dtta_fast.denoisers.weights import check_weights, load

LEAST = ("time_embed.0.weight", "label_emb.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight")


class Flags(NamedTuple):
    """Settings that cannot be inferred from ADM's weights.

    Attention has `number` heads, or heads of `channels`; queries, keys and values are split before the heads (new_order) or after them.
    multipliers: those of the levels' channels, where the flags are a published model's, else None.
    """

    channels: int | None
    number: int | None
    new_order: bool
    schedule: str
    multipliers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, image_size: int, channels: int | None, number: int | None, new_order: bool | None, schedule: str | None) -> Flags:
        """Checks from_adm's arguments, and takes what is None from the published model for this image size.

        Raises:
            ValueError: an argument has another type, both counts are given, or no model was published for this image size.
        """
        if type(image_size) is not int or image_size < 1:
            raise ValueError(f"image_size is {image_size!r}; give the side length in pixels")
        for name, value in (("num_head_channels", channels), ("num_heads", number)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} is {value!r}; give a whole number of 1 or more, or None for the published model's")
        if channels is not None and number is not None:
            raise ValueError(f"num_head_channels is {channels} and num_heads is {number}; give at most one of them")
        if new_order is not None and type(new_order) is not bool:
            raise ValueError(f"use_new_attention_order is {new_order!r}; give True, False, or None for the published model's")
        if schedule is not None and (not isinstance(schedule, str) or schedule not in SCHEDULES):
            raise ValueError(f"noise_schedule is {schedule!r}; allowed: {', '.join(SCHEDULES)}, or None for the published model's")
        counted = channels is not None or number is not None
        if counted and new_order is not None and schedule is not None:
            return cls(channels, number, new_order, schedule)
        if image_size not in PUBLISHED:
            sizes = ", ".join(map(str, PUBLISHED))
            raise ValueError(f"image_size is {image_size}; flags are known only for the models of {sizes} pixels: give {THREE}")
        own = PUBLISHED[image_size]
        return cls(
            channels if counted else own.channels,
            number if counted else own.number,
            own.new_order if new_order is None else new_order,
            schedule or own.schedule,
            own.multipliers,
        )

    def count(self, width: int) -> int:
        """Returns the number of heads of an attention of `width` channels."""
        return width // self.channels if self.channels else self.number or 1

    def check(self, attention: Sequence[int], channels: Sequence[int], image_size: int) -> None:
        """Compares the flags with a network: the channels of its attentions, and those of all levels.

        Raises:
            ValueError: they do not fit.
        """
        found = tuple(width / channels[0] for width in channels)
        if self.multipliers is not None and found != self.multipliers:
            own = "which is not the model published for this size"
            raise ValueError(
                f"image_size is {image_size}, and the levels have {', '.join(f'{factor:g}' for factor in found)} times the channels of the "
                f"first, {own}: give {THREE}, as in the training"
            )
        divisor = self.channels or self.number or 1
        if any(width % divisor for width in attention):
            named = f"num_head_channels is {self.channels}" if self.channels else f"num_heads is {self.number}"
            raise ValueError(f"{named}; give a divisor of the channels of attention: {', '.join(map(str, sorted({*attention})))}")
        if image_size % 2 ** (len(channels) - 1):
            raise ValueError(
                f"image_size is {image_size}; the network's {len(channels)} levels need a multiple of {2 ** (len(channels) - 1)}"
            )


THREE = "num_heads or num_head_channels, use_new_attention_order and noise_schedule"
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # by the names of guided-diffusion and of diffusers
PUBLISHED = {  # by image size, from guided-diffusion's README and script_util.py
    64: Flags(64, None, True, "cosine", (1, 2, 3, 4)),
    128: Flags(None, 4, False, "linear", (1, 1, 2, 3, 4)),
    256: Flags(64, None, False, "linear", (1, 1, 2, 2, 4, 4)),
}


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


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turns what damaged weights make fail into a ValueError that names their source."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{source} is not a class-conditional ADM UNet: it lacks {error.args[0]}") from error
    except OF_VALUES as error:
        raise ValueError(f"{source} is not a class-conditional ADM UNet: {error}") from error


def unet_from_adm(state: Mapping[str, Tensor], source: str, image_size: int, flags: Flags) -> Any:
    """Makes a UNet2DModel of a checkpoint of guided-diffusion. Its attention has heads of one width; see ClassUNet's num_heads.

    Raises:
        ValueError: the weights are not those of a class-conditional UNet of ADM that UNet2DModel can express, or the flags do not fit them.
    """
    from diffusers import UNet2DModel

    missing = [name for name in LEAST if name not in state]
    if missing:
        there = ", ".join(str(name)[:40] for name in list(state)[:3])
        raise ValueError(f"{source} is not a class-conditional ADM UNet: {', '.join(missing)} missing; it has {there or 'nothing'}")
    check_weights(state, source)
    state = _Recorder(state)
    with _explained(source):
        down, up = list(_down(state)), list(_up(state))
        config = _config(state, down, up)
    channels, time = config["block_out_channels"], state["time_embed.0.weight"].shape[1]
    if time != channels[0]:
        found = f"{source} has {channels[0]} channels at its first level and {time} in its embedding of time"
        raise ValueError(
            f"{found}, which diffusers' UNet2DModel cannot express; 512x512_diffusion.pt is such a model: give one for fewer pixels"
        )
    attends = [kind.startswith("Attn") for kind in config["down_block_types"]]
    attention = [width for width, own in zip(channels, attends, strict=True) if own] + [channels[-1]]
    flags.check(attention, channels, image_size)
    head = flags.channels or math.gcd(*attention)  # with a number of heads, ClassUNet sets it
    with _explained(source):
        with torch.device("meta"):
            unet = UNet2DModel(sample_size=image_size, attention_head_dim=head, **config)
        own = dict(_renamed(state, down, up, flags))
    unread = sorted(set(state) - state.read)
    if unread:
        raise ValueError(f"{source} has weights that an ADM UNet of its sizes does not have: {', '.join(unread[:5])}")
    load(unet, own, f"{source}, with its weights renamed for diffusers' UNet2DModel,")
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


def _config(state: Mapping[str, Tensor], down: list[_Block], up: list[_Block]) -> dict[str, Any]:
    """Returns the arguments of UNet2DModel that the weights tell."""
    each, _ = _levels(state)
    channels = [len(state[f"{block.prefix}.0.out_layers.3.weight"]) for block in down if block.number == 0]
    attends = [f"{block.prefix}.1.qkv.weight" in state for block in down if block.number == 0]
    attends_up = [f"{block.prefix}.1.qkv.weight" in state for block in up if block.number == 0]
    residual = any(_grows(state, k) for k in range(len(up)))
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if residual else ("DownBlock2D", "UpBlock2D")
    first = state["input_blocks.1.0.emb_layers.1.weight"]
    return {
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": len(state["out.2.weight"]),
        "block_out_channels": tuple(channels),
        "layers_per_block": each,
        "down_block_types": tuple("AttnDownBlock2D" if own else plain[0] for own in attends),
        "up_block_types": tuple("AttnUpBlock2D" if own else plain[1] for own in attends_up),
        "downsample_type": "resnet" if residual else "conv",
        "upsample_type": "resnet" if residual else "conv",
        "resnet_time_scale_shift": "scale_shift" if len(first) == 2 * channels[0] else "default",
        "num_class_embeds": len(state["label_emb.weight"]),
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
    }


def _renamed(state: Mapping[str, Tensor], down: list[_Block], up: list[_Block], flags: Flags) -> Iterator[tuple[str, Tensor]]:
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
        yield from _attention(state, f"{block.prefix}.1", f"{here}.attentions.{block.number}", flags)
    for index, number in ((0, 0), (2, 1)):
        yield from _residual(state, f"middle_block.{index}", f"mid_block.resnets.{number}")
    yield from _attention(state, "middle_block.1", "mid_block.attentions.0", flags)
    for block in up:
        here = f"up_blocks.{block.level}"
        yield from _residual(state, f"{block.prefix}.0", f"{here}.resnets.{block.number}")
        attends = f"{block.prefix}.1.qkv.weight" in state
        yield from _attention(state, f"{block.prefix}.1", f"{here}.attentions.{block.number}", flags)
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


def _attention(state: Mapping[str, Tensor], theirs: str, ours: str, flags: Flags) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of an attention block, if there is one: its queries, keys and values are one convolution.

    Their channels are ordered by head first, or in the new order by query, key and value first.
    """
    if f"{theirs}.qkv.weight" not in state:
        return
    yield from _moved(state, f"{theirs}.norm", f"{ours}.group_norm")
    for kind in ("weight", "bias"):
        joined = state[f"{theirs}.qkv.{kind}"].flatten(1) if kind == "weight" else state[f"{theirs}.qkv.{kind}"]
        channels = len(joined) // 3
        if flags.new_order:
            parts = joined.unflatten(0, (3, channels))
        else:
            parts = joined.unflatten(0, (flags.count(channels), 3, -1)).transpose(0, 1)
        for name, part in zip("qkv", parts, strict=True):
            yield f"{ours}.to_{name}.{kind}", part.reshape(channels, *joined.shape[1:]).contiguous()
        last = state[f"{theirs}.proj_out.{kind}"]
        yield f"{ours}.to_out.0.{kind}", last.flatten(1) if kind == "weight" else last
