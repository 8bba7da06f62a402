"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) as the weights that move: by peft, in its folders and in diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dtta_fast.runtime.private import evaluating

# the query and value projections, by the names that libraries give them: transformers, diffusers, timm
USUAL = (("q_proj", "v_proj"), ("to_q", "to_k", "to_v", "to_out.0"), ("query", "value"), ("qkv",))


def layers(module: nn.Module) -> list[str]:
    """Names of the active adapters' weights that the module brings along."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = []
    for part in module.modules():
        if isinstance(getattr(part, "lora_A", None), nn.ModuleDict):  # one of peft's layers
            tuned: Any = part
            for adapter in tuned.active_adapters:
                found += [names[id(held[adapter].weight)] for held in (tuned.lora_A, tuned.lora_B) if adapter in held]
    return found


def targets(module: nn.Module, wanted: Sequence[str] | None, what: str) -> list[str]:
    """Names of the linear layers that get adapters: those whose names end in one of `wanted`, or None for the attention's usual ones.

    Raises:
        ValueError: there is none.
    """
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    for suffixes in USUAL if wanted is None else (wanted,):
        found = [name for name in linear if any(f".{name}".endswith(f".{suffix}") for suffix in suffixes)]
        if found:
            return found
    asked = "the usual names of attention's projections" if wanted is None else f"lora_targets {tuple(wanted)}"
    endings = sorted({name.rpartition(".")[2] for name in linear})
    raise ValueError(
        f"{asked} match no linear layer of {what}; its linear layers' names end in {', '.join(endings) or 'nothing: it has none'}"
    )


def check(module: nn.Module, wanted: Sequence[str] | None, what: str) -> None:
    """Raises ValueError where attach() would."""
    if not layers(module):
        targets(module, wanted, what)


def attach(module: nn.Module, rank: int, wanted: Sequence[str] | None, what: str, seed: int) -> list[str]:
    """Gives a private copy adapters in place, unless it has its own; names of their weights, A and B by turns.

    A is drawn from `seed`, B is 0, so that outputs stay what they are; their product counts once (alpha = rank).
    """
    if not layers(module):
        from peft import LoraConfig, inject_adapter_in_model

        chosen = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets(module, wanted, what))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(chosen, module)
        evaluating(module).requires_grad_(False)  # a private copy's weights are constants
    return layers(module)


def save(folder: Path, module: nn.Module, moved: Mapping[str, Tensor], unet: bool) -> None:
    """The adapters that moved in the module: of a UNet as diffusers' load_lora_weights() reads them, else as peft's from_pretrained()."""
    from peft import LoraConfig

    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, p in moved.items():
        where, kind, adapter = re.fullmatch(r"(.+)\.(lora_[AB])\.([^.]+)\.weight", name).groups()  # type: ignore[union-attr]
        layer: Any = module.get_submodule(where)
        # formats differ in where a scale stands: it goes into B
        factor = layer.scaling[adapter] if kind == "lora_B" else 1.0
        state[f"{where}.{kind}.weight"] = (p.detach() * factor).contiguous()
    if unet:
        save_file(state, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
        return
    names = [name.split(".lora_A.")[0] for name in state if ".lora_A." in name]
    rank = len(next(p for name, p in state.items() if ".lora_A." in name))
    LoraConfig(r=rank, lora_alpha=rank, target_modules=names).save_pretrained(str(folder))
    save_file({f"base_model.model.{name}": p for name, p in state.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
