"""A UNet that takes a map alongside the noisy image: the denoiser for dense tasks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dtta_fast.denoisers.diffusers_network import DiffusersDenoiser
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.reading import CALIBRATION, download, read_calibration, read_json, read_networks, read_process
from dtta_fast.denoisers.weights import check_weights
from dtta_fast.runtime.defaults import float32_on_cpu

KIND = "ConcatUNet"


class ConcatUNet(DiffusersDenoiser):
    """A diffusers UNet2DModel whose input is the noisy latent concatenated with the channels of a map.

    The map holds class embeddings (segmentation, with `classes`) or depth in one channel. Metric depth (`depth_range`) is the logarithm
    of metres, scaled to -1 at the nearest and 1 at the farthest. If neither argument is given, the map is relative depth, normalised to
    mean 0 and standard deviation 1 per image.

    Args:
        unet: a UNet2DModel; in_channels is the sum of the latent's and the map's channels.
        process: its noise process.
        vae: a diffusers autoencoder (see check_vae), or None.
        classes: number of class embeddings; each has as many channels as the map.
        depth_range: (nearest, farthest), in metres.

    Raises:
        ValueError: both classes and depth_range are given, the UNet has no channels for a map, or the depth range is empty.
    """

    takes_maps = True
    keep_in_float32 = ("embeddings",)  # conditions are mixtures of them, and their gradients accumulate over chunks

    def __init__(
        self,
        unet: Any,
        process: NoiseProcess,
        vae: Any = None,
        *,
        classes: int | None = None,
        depth_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(unet, process, vae)
        config = unet.config
        latent = 3 if vae is None else vae.config.latent_channels
        channels = config.in_channels - latent
        if config.out_channels not in (latent, 2 * latent) or channels < 1:
            found = f"unet has {config.in_channels} channels in and {config.out_channels} out"
            raise ValueError(f"{found}; on latents of {latent} it needs more than {latent} in, and {latent} or {2 * latent} out")
        if classes is not None and depth_range is not None:
            raise ValueError(f"classes is {classes} and depth_range {depth_range}; a map shows either")
        if classes is None and channels != 1:
            raise ValueError(f"unet has {channels} channels for the map; depth takes 1")
        if classes is not None and classes < 2:
            raise ValueError(f"classes is {classes}; give 2 or more")
        if depth_range is not None and not 0 < depth_range[0] < depth_range[1] < math.inf:
            raise ValueError(f"depth_range is {depth_range}; give (nearest, farthest) in metres with 0 < nearest < farthest")
        self.classes, self.depth_range, self._latent = classes, depth_range, latent
        self.embeddings = None if classes is None else nn.Parameter(torch.randn(classes, channels, dtype=torch.float32, device=unet.device))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        return self._latent, side, side

    def adaptable(self) -> list[str]:
        return [*super().adaptable(), *(() if self.embeddings is None else ("embeddings",))]

    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the class embeddings [K, E].

        Raises:
            ValueError: the denoiser takes depth maps.
        """
        if self.embeddings is None:
            raise ValueError("denoiser takes maps of depth and has no classes; give task=Depth()")
        return parameters.get("embeddings", self.embeddings.detach()).to(self.embeddings.dtype)

    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Not available: no null embedding was trained.

        Raises:
            ValueError: always.
        """
        raise ValueError("denoiser was trained with a map for every image: null_condition needs one that was trained without too")

    def depth_map(self, depth: Tensor) -> Tensor:
        """Converts depth [B, 1, h, w] to the map's values; differentiable. Metric depth is in metres.

        Raises:
            ValueError: the denoiser takes class maps.
        """
        if self.embeddings is not None:
            raise ValueError(f"denoiser takes maps of {self.classes} classes; give task=Segmentation()")
        if self.depth_range is None:
            deviation, mean = torch.std_mean(depth, dim=(1, 2, 3), keepdim=True, correction=0)
            return (depth - mean) / deviation.clamp(min=1e-6)
        near, far = map(math.log, self.depth_range)
        return (2 * depth.clamp(min=self.depth_range[0] / 4).log() - near - far) / (far - near)

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions that are maps [B, E, h, w] of the latent's size."""
        rows = condition.to(x_t.dtype).repeat_interleave(len(x_t) // len(condition), dim=0)
        prediction: Tensor = self.unet(torch.cat([x_t, rows], dim=1), self.process.model_time[timesteps], return_dict=False)[0]
        return prediction

    @classmethod
    @float32_on_cpu()
    def from_pretrained(cls, path: str | Path, *, calibration: bool = True) -> ConcatUNet:
        """Loads a folder written by save_pretrained(), or downloads the model with that id from the Hugging Face Hub.

        Args:
            calibration: False skips the folder's calibration.json.

        Raises:
            FileNotFoundError, ValueError: a part is missing or damaged; the message names it.
        """
        from safetensors.torch import load_file

        folder = Path(path)
        if not os.path.isdir(folder):
            folder = download(str(path), ["*.json", "*.safetensors"])
        config = read_json(folder / "config.json")
        if config.get("_class_name") != KIND:
            raise ValueError(f"{folder / 'config.json'} names {config.get('_class_name')!r}; a {KIND}'s folder names {KIND}")
        parts = read_networks(folder)
        span, classes = config.get("depth_range"), config.get("classes")
        if classes is not None and (type(classes) is not int or not 2 <= classes < 2**16):
            raise ValueError(f"{folder / 'config.json'} has classes {str(classes)[:40]}; give a whole number from 2 to 65535")
        try:
            denoiser = cls(
                parts["unet"],
                read_process(folder),
                parts.get("vae"),
                classes=classes,
                depth_range=None if span is None else (float(span[0]), float(span[1])),
            )
        except (TypeError, LookupError, ValueError, RuntimeError, OverflowError) as error:  # RuntimeError: sizes that do not fit in memory
            raise ValueError(f"{folder / 'config.json'} describes no {KIND}: {error}") from error
        if denoiser.embeddings is not None:
            file = folder / "embeddings.safetensors"
            try:
                state = load_file(file)
                check_weights(state, file)
                table = state["embeddings"].float()
            except (OSError, SafetensorError, KeyError) as error:
                raise ValueError(f"{file} cannot be read: {error}") from error
            if table.shape != denoiser.embeddings.shape:
                raise ValueError(f"{file} holds {tuple(table.shape)}; the model takes {tuple(denoiser.embeddings.shape)}")
            denoiser.embeddings.data = table
        if calibration:
            denoiser.calibration = read_calibration(folder, denoiser)
        return denoiser.eval()

    def save_pretrained(self, folder: str | Path, scheduler: Any = None) -> None:
        """Writes config.json, unet/, scheduler/, and, if the denoiser has them, vae/, the embeddings and calibration.json.

        Args:
            scheduler: the diffusers scheduler used in training; None is the one from which the denoiser's process was read.

        Raises:
            ValueError: the scheduler describes another noise process than the denoiser's, or there is none. Nothing is written then.
        """
        from safetensors.torch import save_file

        scheduler = self.process.scheduler_to_save(scheduler)
        folder = Path(folder)
        self.unet.save_pretrained(folder / "unet")
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        if self.embeddings is not None:
            save_file({"embeddings": self.embeddings.detach().contiguous()}, folder / "embeddings.safetensors")
        if self.calibration is not None:
            self.calibration.save(folder / CALIBRATION)
        found = {"_class_name": KIND, "classes": self.classes, "depth_range": self.depth_range}
        (folder / "config.json").write_text(json.dumps(found, indent=2) + "\n")
