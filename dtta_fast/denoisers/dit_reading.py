"""Readers of DiT weights: the original repository's checkpoints, those of SiT and REPA, diffusers' folders, and our own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.reading import OF_VALUES, autoencoder_kind, read_model
from dtta_fast.denoisers.weights import check_weights, load

FLOWS: dict[str, Literal[0, 1]] = {"SiT": 1, "REPA": 0}  # the time of an image without noise


def named_process(name: str) -> NoiseProcess:
    """Returns the noise process of the repositories DiT, SiT or REPA.

    Raises:
        ValueError: the name is none of these.
    """
    if name == "DiT":
        from diffusers import DDPMScheduler

        return NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear"))
    if not isinstance(name, str) or name not in FLOWS:
        raise ValueError(f"process is {name!r}; allowed: DiT, {', '.join(FLOWS)}, or a NoiseProcess")
    process = NoiseProcess.linear_flow(time_of_data=FLOWS[name])
    process.scheduler = name
    return process


def read_vae(folder: Path) -> nn.Module:
    vae: nn.Module = read_model(autoencoder_kind(folder / "vae"), folder / "vae").eval()
    return vae


def sized(sizes: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiTNetwork:
    """Builds a network with these sizes, but only if the weights are about as large: a config could otherwise request any amount of memory.

    Raises:
        ValueError: the weights are too few, or a size is not valid. TypeError: a size is unknown or missing.
    """
    for name, value in sizes.items():
        if not isinstance(value, (int, float)) or not 0 <= value < 2**24:
            raise ValueError(f"{name} is {str(value)[:40]!r}, no size")
    side = sizes["input_size"] / sizes["patch_size"] if {"input_size", "patch_size"} <= set(sizes) else 0
    depth, width, rows = (sizes.get(name, 0) for name in ("depth", "hidden_size", "num_classes"))
    wide = max(1.0, float(sizes.get("mlp_ratio", 4.0)))
    patch = sizes.get("patch_size", 0) ** 2 * sizes.get("in_channels", 0)
    needed = width * (side * side + rows + patch + depth * width * (10 + 2 * wide))
    there = sum(value.numel() for value in state.values())
    if depth > len(state) or needed > 4 * there + 2**20:
        raise ValueError(f"its sizes take {needed:.0f} weights or more, and there are {there}")
    return DiTNetwork(**sizes)


def network_from_original(state: Mapping[str, Tensor], num_heads: int, null_class: bool, source: str) -> DiTNetwork:
    labels, final = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} is not a DiT checkpoint: ema holds a {type(state).__name__}, not a state dict")
    wanted = ("x_embedder.proj.weight", "pos_embed", labels, "blocks.0.mlp.fc1.weight", final)
    missing = [name for name in wanted if name not in state]
    if missing:
        there = ", ".join(map(str, list(state)[:3]))
        raise ValueError(f"{source} is not a DiT checkpoint: {', '.join(missing)} missing; it has {there or 'nothing'}")
    if any(".attn.q_norm." in name for name in state):
        raise ValueError(f"{source} normalises queries and keys (qk_norm), which this network does not; give a checkpoint without")
    state = {name: value for name, value in state.items() if not name.startswith("projectors.")}
    check_weights(state, source)
    try:
        network = sized(_original_sizes(state, num_heads, null_class), state)
    except OF_VALUES as error:
        raise ValueError(f"{source} is not a DiT checkpoint: {error}") from error
    load(network, state, source)
    return network


def _original_sizes(state: Mapping[str, Tensor], num_heads: int, null_class: bool) -> dict[str, Any]:
    labels, final = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    outputs = len(state[final]) // patch_size**2
    return {
        "input_size": round(state["pos_embed"].shape[1] ** 0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": num_heads,
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / hidden_size,
        "num_classes": len(state[labels]) - null_class,
        "null_class": null_class,
        "learn_sigma": outputs == 2 * in_channels,
    }


def network_from_diffusers(folder: Path) -> DiTNetwork:
    from diffusers import DiTTransformer2DModel

    try:
        model, loading = DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    except (OSError, SafetensorError, *OF_VALUES) as error:
        raise ValueError(f"{folder} cannot be read as a diffusers DiTTransformer2DModel: {error}") from error
    lacking = [str(key) for key in (*loading["missing_keys"], *loading["mismatched_keys"])]
    if lacking:
        raise ValueError(f"{folder} lacks weights of its model: {', '.join(lacking)}")
    config, state = model.config, model.state_dict()
    expected = {"norm_elementwise_affine": False, "activation_fn": "gelu-approximate", "attention_bias": True}
    for field, value in expected.items():
        if config[field] != value:
            raise ValueError(f"{folder} has {field} {config[field]!r}; a DiT has {value!r}")
    network = DiTNetwork(
        input_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        depth=config.num_layers,
        num_heads=config.num_attention_heads,
        num_classes=config.num_embeds_ada_norm,
        learn_sigma=model.out_channels == 2 * config.in_channels,
    )
    own: dict[str, Tensor] = {"pos_embed": network.pos_embed}
    embedding = "norm1.emb."
    for block in range(config.num_layers):
        prefix = f"transformer_blocks.{block}."
        for name in [n for n in state if n.startswith(prefix + embedding)]:
            if not torch.equal(state[name], state[name.replace(prefix, "transformer_blocks.0.", 1)]):
                raise ValueError(f"{folder}: {name} differs from block 0's; a DiT has one time and label embedding for all blocks")
    for kind in ("weight", "bias"):
        own |= {
            f"x_embedder.proj.{kind}": state[f"pos_embed.proj.{kind}"],
            f"t_embedder.mlp.0.{kind}": state[f"transformer_blocks.0.{embedding}timestep_embedder.linear_1.{kind}"],
            f"t_embedder.mlp.2.{kind}": state[f"transformer_blocks.0.{embedding}timestep_embedder.linear_2.{kind}"],
            f"final_layer.adaLN_modulation.1.{kind}": state[f"proj_out_1.{kind}"],
            f"final_layer.linear.{kind}": state[f"proj_out_2.{kind}"],
        }
        for block in range(config.num_layers):
            ours, theirs = f"blocks.{block}.", f"transformer_blocks.{block}."
            own[f"{ours}attn.qkv.{kind}"] = torch.cat([state[f"{theirs}attn1.to_{part}.{kind}"] for part in "qkv"])
            own |= {
                f"{ours}attn.proj.{kind}": state[f"{theirs}attn1.to_out.0.{kind}"],
                f"{ours}mlp.fc1.{kind}": state[f"{theirs}ff.net.0.proj.{kind}"],
                f"{ours}mlp.fc2.{kind}": state[f"{theirs}ff.net.2.{kind}"],
                f"{ours}adaLN_modulation.1.{kind}": state[f"{theirs}norm1.linear.{kind}"],
            }
    own["y_embedder.embedding_table.weight"] = state[f"transformer_blocks.0.{embedding}class_embedder.embedding_table.weight"]
    load(network, own, folder)
    return network
