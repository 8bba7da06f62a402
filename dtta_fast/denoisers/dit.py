"""DiT as a denoiser: soft class conditions, and loading of weights in the original, diffusers and our own formats."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dtta_fast.denoisers.base import Denoiser, check_vae, image_size, to_latents, to_model_range
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.reading import (
    CALIBRATION,
    OF_VALUES,
    autoencoder_kind,
    check_weights,
    download,
    read_calibration,
    read_json,
    read_model,
    read_process,
)
from dtta_fast.runtime.archives import LOCAL, check_archive
from dtta_fast.runtime.defaults import float32_on_cpu

WRAPPINGS = ("ema", "model", "state_dict")  # keys of a checkpoint that may hold the weights, the first that is there
PREFIXES = ("module.", "_orig_mod.")
LABEL_TABLE = "network.y_embedder.embedding_table.weight"


class DiT(Denoiser):
    """A class-conditional diffusion transformer in pixel space or in the latent space of an autoencoder.

    Args:
        network: the transformer.
        process: its noise process, with as many timesteps as in training.
        vae: a diffusers autoencoder for latent models (see check_vae); None for pixel models. It is never adapted.
    """

    can_checkpoint = True
    keep_in_float32 = (LABEL_TABLE,)  # conditions are mixtures of its rows, and their gradients accumulate over chunks

    def __init__(self, network: DiTNetwork, process: NoiseProcess, vae: nn.Module | None = None) -> None:
        super().__init__()
        check_vae(vae)
        self.network = network
        self.process = process
        self.vae: Any = vae

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> DiT:
        moved: DiT = super()._apply(fn, *args, **kwargs)
        self.process = self.process.to(self.network.pos_embed.device)  # the table follows the device, not the dtype
        return moved

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encodes images [B, 3, H, W] in [0, 1] to x0: pixels in [-1, 1], or the posterior mean times the scaling factor.

        Raises:
            ValueError: the images' channel count differs from a pixel model's.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        if self.vae is None:
            if images.shape[1] != self.network.in_channels:
                channels = f"images have {images.shape[1]} channels and the denoiser works on {self.network.in_channels}"
                raise ValueError(f"{channels}; a latent model needs vae= when it is loaded, or latents= at the call")
            return to_model_range(images, self.network.input_size).to(dtype)
        return to_latents(self.vae, images, self.image_size).to(dtype)

    @property
    def image_size(self) -> int:
        """The side length, in pixels, of the images that the denoiser works on."""
        return self.network.input_size if self.vae is None else image_size(self.vae, self.network.input_size)

    def network_to_adapt(self) -> nn.Module:
        return self.network

    def joinable(self) -> list[list[str]]:
        """The modulations of all blocks and of the final layer: each is a product with the same condition."""
        parts = [*(f"network.blocks.{i}" for i in range(len(self.network.blocks))), "network.final_layer"]
        names, known = [f"{part}.adaLN_modulation.1" for part in parts], dict(self.named_modules())
        layers = [known.get(name) for name in names]
        if any(
            type(layer) is not nn.Linear or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks for layer in layers
        ):
            return []  # adapters, quantised layers and patched ones compute something else
        return [[f"{name}.{kind}" for name in names] for kind in ("weight", "bias")]

    def use_joined(self, tensors: list[Tensor]) -> None:
        weight, bias = tensors
        self.network.joined_modulation = weight, bias

    def regions(self) -> list[nn.Module]:
        return list(self.network.blocks)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.network.in_channels, self.network.input_size, self.network.input_size

    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns [K, D], or [B, K, D] if `parameters` holds one table per image; the null class is excluded."""
        own = self.network.y_embedder.embedding_table.weight
        return parameters.get(LABEL_TABLE, own.detach()).to(own.dtype)[..., : self.network.num_classes, :]

    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the last row of the label table: [D], or [B, D] if `parameters` holds one table per image.

        Raises:
            ValueError: the model was trained without such a row.
        """
        if not self.network.sizes["null_class"]:
            raise ValueError("denoiser has no row for 'no class' (null_class=False): null_condition needs a model trained with one")
        own = self.network.y_embedder.embedding_table.weight
        return parameters.get(LABEL_TABLE, own.detach()).to(own.dtype)[..., self.network.num_classes, :]

    def adaptable(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if name.startswith("network.")]

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions [B, D], which are mixtures of class embeddings."""
        rows = condition.repeat_interleave(len(x_t) // len(condition), dim=0)
        return self.network(x_t, self.process.model_time[timesteps], rows, self.checkpointing)

    @classmethod
    @float32_on_cpu()
    def from_original(
        cls,
        path_or_state_dict: str | Path | Mapping[str, Tensor],
        *,
        num_heads: int,
        null_class: bool = True,
        process: NoiseProcess | None = None,
        vae: nn.Module | None = None,
    ) -> DiT:
        """Loads a checkpoint of the original DiT repository (`DiT-XL-2-256x256.pt`: 16 heads) of any size.

        All sizes except the number of heads are inferred from the weights. A .safetensors file is read as such, any other file with
        weights_only. Weights may be nested under "ema", "model" or "state_dict", the first that is there, and their names may begin with
        "module." or "_orig_mod.".

        Args:
            num_heads: number of attention heads, which cannot be inferred from the weights.
            null_class: whether the last row of the label table stands for "no class", as in training with classifier-free guidance. This
                cannot be inferred either: without such a row, every row is a class.
            vae: same as for DiT.
            process: None uses the original's: 1,000 linear betas from 1e-4 to 2e-2, predicting the noise.

        Raises:
            FileNotFoundError, ValueError: the file does not exist, or the weights are not a DiT's.
        """
        given = path_or_state_dict
        state: Mapping[str, Any] = given if isinstance(given, Mapping) else _read_file(Path(given))
        source = "path_or_state_dict" if isinstance(given, Mapping) else str(given)
        # a training checkpoint has raw and EMA weights; sampling uses EMA
        weights = next((state[name] for name in WRAPPINGS if isinstance(state.get(name), Mapping)), state)
        network = _network_from_original(_without_prefix(weights), num_heads, null_class, source)
        if process is None:
            from diffusers import DDPMScheduler

            process = NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2, beta_schedule="linear"))
        return cls(network, process, vae)

    @classmethod
    @float32_on_cpu()
    def from_pretrained(cls, path: str | Path, *, vae: nn.Module | None = None, calibration: bool = True) -> DiT:
        """Loads a folder: one in our own format (`save_pretrained`), a diffusers DiTTransformer2DModel, or a DiT pipeline.

        If path is not a folder, it is treated as a Hugging Face Hub model id.

        Args:
            vae: overrides the pipeline's own.
            calibration: False skips the folder's calibration.json.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged; the message names it.
        """
        folder = Path(path)
        if not os.path.isdir(folder):
            folder = download(str(path), ["*.json", "*.safetensors"])
        if (folder / "model_index.json").is_file():
            own = _read_vae(folder) if vae is None else vae
            denoiser = cls(_network_from_diffusers(folder / "transformer"), read_process(folder), own)
        else:
            denoiser = cls._from_one_model(folder, vae)
        if calibration:
            denoiser.calibration = read_calibration(folder, denoiser)
        return denoiser

    @classmethod
    def _from_one_model(cls, folder: Path, vae: nn.Module | None) -> DiT:
        """Loads a folder in our own format, or a diffusers DiTTransformer2DModel."""
        config = read_json(folder / "config.json")
        if config.get("_class_name") == "DiTTransformer2DModel":
            return cls(_network_from_diffusers(folder), read_process(folder if (folder / "scheduler").is_dir() else folder.parent), vae)
        if config.pop("_class_name", None) != "DiT":
            raise ValueError(f"{folder / 'config.json'} names no DiT: _class_name has to be DiT or DiTTransformer2DModel")
        weights = _read_safetensors(folder / "model.safetensors")
        try:
            network = _sized(config, weights)
        except OF_VALUES as error:
            raise ValueError(f"{folder / 'config.json'} describes no DiT: {error}") from error
        _load(network, weights, folder / "model.safetensors")
        return cls(network, read_process(folder), _read_vae(folder) if vae is None and (folder / "vae").is_dir() else vae)

    def save_pretrained(self, folder: str | Path, scheduler: Any) -> None:
        """Writes config.json, model.safetensors, scheduler/scheduler_config.json (of the diffusers scheduler used in training), and, if the
        denoiser has them, vae/ and calibration.json."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": "DiT", **self.network.sizes}, indent=2) + "\n")
        save_file({name: value.contiguous() for name, value in self.network.state_dict().items()}, folder / "model.safetensors")
        scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
        if self.calibration is not None:
            self.calibration.save(folder / CALIBRATION)


def _read_vae(folder: Path) -> nn.Module:
    vae: nn.Module = read_model(autoencoder_kind(folder / "vae"), folder / "vae").eval()
    return vae


def _sized(sizes: Mapping[str, Any], state: Mapping[str, Tensor]) -> DiTNetwork:
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
        raise ValueError(f"its sizes take {needed:.0f} weights and more, and there are {there}")
    return DiTNetwork(**sizes)


def _without_prefix(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Strips what DistributedDataParallel and torch.compile put before every name."""
    while prefix := next((p for p in PREFIXES if state and all(isinstance(name, str) and name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _network_from_original(state: Mapping[str, Tensor], num_heads: int, null_class: bool, source: str) -> DiTNetwork:
    labels, final = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} is no DiT checkpoint: ema holds a {type(state).__name__}, not a state dict")
    wanted = ("x_embedder.proj.weight", "pos_embed", labels, "blocks.0.mlp.fc1.weight", final)
    missing = [name for name in wanted if name not in state]
    if missing:
        there = ", ".join(map(str, list(state)[:3]))
        raise ValueError(f"{source} is no DiT checkpoint: {', '.join(missing)} missing; it has {there or 'nothing'}")
    check_weights(state, source)
    try:
        network = _sized(_original_sizes(state, num_heads, null_class), state)
    except OF_VALUES as error:
        raise ValueError(f"{source} is no DiT checkpoint: {error}") from error
    _load(network, state, source)
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


def _network_from_diffusers(folder: Path) -> DiTNetwork:
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
    _load(network, own, folder)
    return network


def _load(network: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    try:
        network.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit the network: {error}") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    check_weights(state, path)
    return state


def _read_file(path: Path) -> Mapping[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch_file(path)


def _read_torch_file(path: Path) -> Mapping[str, Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == LOCAL  # torch uses the same check
        if zipped:
            check_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training checkpoints store their arguments: plain data
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch may raise pickle, zip or runtime errors here
        raise ValueError(f"{path} cannot be read as a checkpoint of tensors: {error}") from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict")
    return state
