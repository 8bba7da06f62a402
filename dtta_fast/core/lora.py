"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) as trainable weights: created by peft, saved in the formats of peft and diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dtta_fast.runtime.private import evaluating

# the attention projections under their names in transformers, diffusers and timm; and the MLPs of open_clip and of timm's EVA and BEiT,
# whose attention reads its weights without calling a layer
USUAL = (
    ("q_proj", "v_proj"),
    ("to_q", "to_k", "to_v", "to_out.0"),
    ("query", "value"),
    ("qkv",),
    ("c_fc", "c_proj"),
    ("fc1", "fc1_g", "fc1_x", "fc2"),
)


def weight_names(module: nn.Module) -> list[str]:
    """Names of the weights of the active adapters that the module already has."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = []
    for part in module.modules():
        if isinstance(getattr(part, "lora_A", None), nn.ModuleDict):  # one of peft's layers
            tuned: Any = part
            for adapter in tuned.active_adapters:
                found += [names[id(held[adapter].weight)] for held in (tuned.lora_A, tuned.lora_B) if adapter in held]
    return found


def targets(module: nn.Module, wanted: Sequence[str] | None, what: str) -> list[str]:
    """Names of the linear layers that get adapters: those whose names end in one of `wanted`; None selects the usual attention layers.

    Raises:
        ValueError: no layer matches.
    """
    # these read the weight of a layer directly and would bypass an adapter: nn.MultiheadAttention, and timm's attention with q_bias
    inside = {id(part.out_proj) for part in module.modules() if isinstance(part, nn.MultiheadAttention)}
    inside |= {id(part.qkv) for part in module.modules() if isinstance(getattr(part, "q_bias", None), Tensor) and hasattr(part, "qkv")}
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear) and id(part) not in inside]
    for suffixes in USUAL if wanted is None else (wanted,):
        found = [name for name in linear if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)]
        if found:
            return found
    asked = "the usual names of attention's projections" if wanted is None else f"lora_targets {tuple(wanted)}"
    endings = sorted({name.rpartition(".")[2] for name in linear})
    raise ValueError(
        f"{asked} match no linear layer of {what}; its linear layers' names end in {', '.join(endings) or 'nothing: it has none'}"
        + (f". Give lora_targets the ones to adapt, such as ({endings[0]!r},)" if endings else "")
    )


def check(module: nn.Module, wanted: Sequence[str] | None, what: str) -> None:
    """Raises ValueError if attach() would."""
    if not weight_names(module):
        targets(module, wanted, what)


def attach(module: nn.Module, rank: int, wanted: Sequence[str] | None, what: str, seed: int) -> list[str]:
    """Adds adapters to a private copy in place, unless it already has some, and returns their weight names, alternating A and B.

    A is drawn from `seed` and B is 0, so the outputs do not change at first; the scale of their product is 1 (alpha = rank).
    """
    if not weight_names(module):
        from peft import LoraConfig, inject_adapter_in_model

        chosen = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets(module, wanted, what))
        before = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed() would seed every GPU's generator too
            inject_adapter_in_model(chosen, module)
        finally:
            torch.set_rng_state(before)
        evaluating(module).requires_grad_(False)  # a private copy's weights are constants
    return weight_names(module)


def save(folder: Path, module: nn.Module, moved: Mapping[str, Tensor], unet: bool) -> None:
    """Saves the adapted LoRA weights of the module: a UNet's for diffusers' load_lora_weights(), others for peft's from_pretrained().

    Raises:
        ValueError: the format cannot represent these adapters; nothing was written.
    """
    from peft import LoraConfig

    state: dict[str, Tensor] = {}
    for name, p in moved.items():
        where, kind, adapter = re.fullmatch(r"(.+)\.(lora_[AB])\.([^.]+)\.weight", name).groups()  # type: ignore[union-attr]
        layer: Any = module.get_submodule(where)
        key = f"{where.removeprefix(getattr(module, 'inner_prefix', ''))}.{kind}.weight"  # the names of a model in our wrapper
        if key in state:
            raise ValueError(
                f"{where} has several active adapters ({', '.join(layer.active_adapters)}), and a folder holds one: activate one"
            )
        if adapter in layer.lora_magnitude_vector or getattr(layer.lora_B[adapter], "bias", None) is not None:
            raise ValueError(
                f"{where}'s adapter {adapter!r} has a magnitude (DoRA) or a bias beside A and B, which would be lost: use plain LoRA"
            )
        # formats store the scale in different places, so fold it into B
        factor = layer.scaling[adapter] if kind == "lora_B" else 1.0
        state[key] = (p.detach() * factor).contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    if unet:
        save_file(state, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
        return
    ranks = {name.removesuffix(".lora_A.weight"): len(p) for name, p in state.items() if ".lora_A." in name}
    first = next(iter(ranks.values()))
    others = {name: rank for name, rank in ranks.items() if rank != first}
    config = LoraConfig(r=first, lora_alpha=first, target_modules=list(ranks), rank_pattern=others, alpha_pattern=others)
    config.save_pretrained(str(folder))
    save_file({f"base_model.model.{name}": p for name, p in state.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
