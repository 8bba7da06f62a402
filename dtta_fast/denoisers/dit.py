"""DiT as a denoiser: soft class conditions, and loading of weights in the original, diffusers and our own formats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dtta_fast.denoisers.base import Denoiser, check_vae, image_size, to_latents, to_model_range
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.dit_reading import named_process, network_from_diffusers, network_from_original, read_vae, sized
from dtta_fast.denoisers.noise_process import NoiseProcess, check_process
from dtta_fast.denoisers.reading import (
    CALIBRATION,
    OF_VALUES,
    download,
    read_calibration,
    read_json,
    read_process,
)
from dtta_fast.denoisers.weights import load, read_safetensors, read_state, without_prefix
from dtta_fast.runtime.defaults import float32_on_cpu

WRAPPINGS = ("ema", "model", "state_dict")  # keys of a checkpoint that may hold the weights, the first that is there
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
        check_process(process)
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
        process: NoiseProcess | str = "DiT",
        vae: nn.Module | None = None,
    ) -> DiT:
        """Loads a checkpoint of the original DiT repository (`DiT-XL-2-256x256.pt`: 16 heads), of SiT's or of REPA's, of any size.

        All sizes except the number of heads are inferred from the weights. A .safetensors file is read as such, any other file with
        weights_only. Weights may be nested under "ema", "model" or "state_dict", the first that is there, and their names may begin with
        "module." or "_orig_mod.".

        Args:
            num_heads: number of attention heads, which cannot be inferred from the weights.
            null_class: whether the last row of the label table stands for "no class", as in training with classifier-free guidance. This
                cannot be inferred either: without such a row, every row is a class.
            vae: same as for DiT.
            process: a noise process, or the name of the repository's: DiT (1,000 linear betas from 1e-4 to 2e-2, predicting the noise),
                SiT or REPA (the linear path, predicting the velocity). The weights do not tell which it is. REPA's projectors are not
                needed and are left out.

        Raises:
            FileNotFoundError, ValueError: the file does not exist, or the weights are not a DiT's.
        """
        state, source = read_state(path_or_state_dict)
        # a training checkpoint has raw and EMA weights; sampling uses EMA
        weights = next((state[name] for name in WRAPPINGS if isinstance(state.get(name), Mapping)), state)
        process = process if isinstance(process, NoiseProcess) else named_process(process)
        network = network_from_original(without_prefix(weights), num_heads, null_class, source)
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
            own = read_vae(folder) if vae is None else vae
            denoiser = cls(network_from_diffusers(folder / "transformer"), read_process(folder), own)
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
            return cls(network_from_diffusers(folder), read_process(folder if (folder / "scheduler").is_dir() else folder.parent), vae)
        if config.pop("_class_name", None) != "DiT":
            raise ValueError(f"{folder / 'config.json'} names no DiT: _class_name has to be DiT or DiTTransformer2DModel")
        named = config.pop("process", None)
        try:
            process = read_process(folder) if named is None else named_process(named)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from error
        weights = read_safetensors(folder / "model.safetensors")
        try:
            network = sized(config, weights)
        except OF_VALUES as error:
            raise ValueError(f"{folder / 'config.json'} describes no DiT: {error}") from error
        load(network, weights, folder / "model.safetensors")
        return cls(network, process, read_vae(folder) if vae is None and (folder / "vae").is_dir() else vae)

    def save_pretrained(self, folder: str | Path, scheduler: Any = None) -> None:
        """Writes config.json, model.safetensors, the noise process, and, if the denoiser has them, vae/ and calibration.json.

        Args:
            scheduler: the diffusers scheduler used in training, or the name of its process as in from_original: DiT, SiT or REPA. None
                is the one from which the denoiser's process was read.

        Raises:
            ValueError: the scheduler describes another noise process than the denoiser's, or there is none. Nothing is written then.
        """
        if scheduler is None and isinstance(self.process.scheduler, str):
            scheduler = self.process.scheduler
        named = {"process": scheduler} if isinstance(scheduler, str) else {}
        if named and not self.process.equals(named_process(scheduler)):
            raise ValueError(f"scheduler is {scheduler!r}, and the denoiser's process is another one; give that of its training")
        if not named:
            scheduler = self.process.scheduler_to_save(scheduler)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"_class_name": "DiT", **self.network.sizes, **named}, indent=2) + "\n")
        save_file({name: value.contiguous() for name, value in self.network.state_dict().items()}, folder / "model.safetensors")
        if not named:
            scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
        if self.calibration is not None:
            self.calibration.save(folder / CALIBRATION)
