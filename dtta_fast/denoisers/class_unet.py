"""A class-conditional diffusers UNet as a denoiser, with soft classes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.denoisers.base import image_size
from dtta_fast.denoisers.diffusers_network import DiffusersDenoiser
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.reading import CALIBRATION, download, read_calibration, read_json, read_networks, read_process
from dtta_fast.denoisers.weights import read_state
from dtta_fast.runtime.defaults import float32_on_cpu

KIND = "ClassUNet"
LABEL_TABLE = "unet.class_embedding.weight"


class _SoftEmbedding(nn.Embedding):
    """An embedding whose forward also takes rows that are looked up, or mixed, already."""

    def forward(self, input: Tensor) -> Tensor:
        return input if input.is_floating_point() else super().forward(input)


class ClassUNet(DiffusersDenoiser):
    """A diffusers UNet2DModel with `num_class_embeds`, or an EDMUNet: a UNet that takes a class embedding as well as a time embedding.

    Args:
        unet: the UNet. Its class embedding is replaced by one that also takes mixtures of its rows; the weights stay the same tensors.
        process: its noise process.
        vae: a diffusers autoencoder (see check_vae), or None for pixels.
        patch_size: the UNet sees each patch_size x patch_size square of x0 as the channels of one pixel (torch's pixel_unshuffle), so it
            has patch_size² times as many channels in and out. 1 for most models.
        null_class: whether the last row of the class table stands for "no class", as in training with classifier-free guidance.
        num_heads: attention heads at every level of a UNet2DModel. Its own config can only hold the channels of a head, the same at every
            level; None leaves the heads as they are.

    Raises:
        ValueError: the UNet has no table of classes, its channels do not fit, or num_heads does not divide them.
    """

    keep_in_float32 = (LABEL_TABLE,)  # conditions are mixtures of its rows, and their gradients accumulate over chunks

    def __init__(
        self,
        unet: Any,
        process: NoiseProcess,
        vae: Any = None,
        *,
        patch_size: int = 1,
        null_class: bool = False,
        num_heads: int | None = None,
    ) -> None:
        super().__init__(unet, process, vae)
        table = getattr(unet, "class_embedding", None)
        if not isinstance(table, nn.Embedding):
            raise ValueError(f"unet has the class embedding {type(table).__name__}; give a UNet2DModel with num_class_embeds")
        if len(table.weight) - null_class < 2:
            raise ValueError(
                f"unet has {len(table.weight)} class embeddings, and null_class is {null_class}; at least 2 classes are needed"
            )
        if type(patch_size) is not int or patch_size < 1:
            raise ValueError(f"patch_size is {patch_size!r}; give a whole number of 1 or more")
        side = unet.config.sample_size
        if isinstance(side, (tuple, list)) and len(set(side)) == 1:
            side = side[0]
        if type(side) is not int:
            raise ValueError(f"unet has sample_size {unet.config.sample_size}; give a UNet2DModel for square images, with a whole number")
        self._side = side * patch_size
        self._latent = 3 if vae is None else vae.config.latent_channels
        inner = self._latent * patch_size**2
        if unet.config.in_channels != inner or unet.config.out_channels not in (inner, 2 * inner):
            found = f"unet has {unet.config.in_channels} channels in and {unet.config.out_channels} out"
            raise ValueError(
                f"{found}; with patch_size {patch_size} and latents of {self._latent}, it needs {inner} in, and out as many or twice"
            )
        if num_heads is not None:
            _split_into_heads(unet, num_heads)  # last of what may be refused
        if not isinstance(table, _SoftEmbedding):
            unet.class_embedding = _SoftEmbedding(table.num_embeddings, table.embedding_dim, _weight=table.weight.detach())
            unet.class_embedding.weight = table.weight
        self.patch_size, self.null_class, self.num_heads = patch_size, null_class, _common_heads(unet)

    @property
    def image_size(self) -> int:
        return self._side if self.vae is None else image_size(self.vae, self._side)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._latent, self._side, self._side

    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns [K, D], or [B, K, D] if `parameters` holds one table per image; a row for "no class" is excluded."""
        own = self.unet.class_embedding.weight
        return parameters.get(LABEL_TABLE, own.detach()).to(own.dtype)[..., : own.shape[0] - self.null_class, :]

    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the last row of the table: [D], or [B, D] if `parameters` holds one table per image.

        Raises:
            ValueError: the model was trained without such a row.
        """
        if not self.null_class:
            raise ValueError("denoiser has no row for 'no class' (null_class=False): null_condition needs a model trained with one")
        own = self.unet.class_embedding.weight
        return parameters.get(LABEL_TABLE, own.detach()).to(own.dtype)[..., -1, :]

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions [B, D], which are mixtures of class embeddings."""
        rows = condition.repeat_interleave(len(x_t) // len(condition), dim=0)
        seen = F.pixel_unshuffle(x_t, self.patch_size)
        prediction: Tensor = self.unet(seen, self.process.model_time[timesteps], rows, return_dict=False)[0]
        return F.pixel_shuffle(prediction, self.patch_size)

    @classmethod
    @float32_on_cpu()
    def from_pretrained(
        cls, path: str | Path, *, patch_size: int | None = None, null_class: bool | None = None, calibration: bool = True
    ) -> ClassUNet:
        """Loads a folder with unet/, scheduler/ and, for a latent model, vae/, as save_pretrained() or a diffusers pipeline writes it.

        If path is not a folder, it is treated as a Hugging Face Hub model id.

        Args:
            patch_size, null_class: same as for ClassUNet; None means what the folder's config.json says, or 1 and False without one.
            calibration: False skips the folder's calibration.json.

        Raises:
            FileNotFoundError, ValueError: a part is missing or damaged; the message names it.
        """
        folder = Path(path)
        if not os.path.isdir(folder):
            folder = download(str(path), ["*.json", "*.safetensors"])
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {"_class_name": KIND}
        if config.get("_class_name") != KIND:
            raise ValueError(f"{folder / 'config.json'} names {config.get('_class_name')!r}; a {KIND}'s folder names {KIND}")
        told: dict[str, Any] = {"patch_size": config.get("patch_size", 1), "null_class": config.get("null_class", False)}
        if type(told["patch_size"]) is not int or not 1 <= told["patch_size"] < 64 or type(told["null_class"]) is not bool:
            raise ValueError(f"{folder / 'config.json'} has {str(told)[:80]}; give a patch_size below 64, and null_class true or false")
        told["num_heads"] = config.get("num_heads")
        given: dict[str, Any] = {
            name: value for name, value in (("patch_size", patch_size), ("null_class", null_class)) if value is not None
        }
        if (folder / "vqvae").is_dir():
            raise ValueError(f"{folder} has its autoencoder in vqvae/; rename that folder to vae/")
        parts = read_networks(folder, _unet_class(folder / "unet" / "config.json"))
        try:
            denoiser = cls(parts["unet"], read_process(folder), parts.get("vae"), **{**told, **given})
        except ValueError as error:
            raise ValueError(f"{folder} holds no {KIND}: {error}") from error
        if calibration:
            denoiser.calibration = read_calibration(folder, denoiser)
        return denoiser.eval()

    @classmethod
    @float32_on_cpu()
    def from_adm(
        cls,
        path_or_state_dict: str | Path | Mapping[str, Tensor],
        *,
        image_size: int,
        num_head_channels: int | None = None,
        num_heads: int | None = None,
        use_new_attention_order: bool | None = None,
        noise_schedule: str | None = None,
    ) -> ClassUNet:
        """Loads a class-conditional UNet of ADM (guided-diffusion): 64x64_diffusion.pt, 128x128_diffusion.pt, 256x256_diffusion.pt.

        The weights do not tell how attention splits into heads, or the schedule, and a wrong guess raises no error. The arguments have
        the names of guided-diffusion's flags. Left at None, they are those of the published model for this image_size; for a model of
        your own, give the flags of its training. All other sizes are inferred from the weights. A .safetensors file is read as such, any
        other file with weights_only. The model for 512 pixels is refused: UNet2DModel cannot express its narrower first level.

        Args:
            image_size: side length in pixels.
            num_head_channels, num_heads: channels of an attention head, or the number of heads, the same at every level; give at most one
                of them. Published: 4 heads for 128 pixels, 64 channels for 64 and 256.
            use_new_attention_order: whether queries, keys and values are split before the heads. Published: True for 64 pixels alone.
            noise_schedule: linear or cosine, with 1,000 steps; the model predicts the noise. Published: cosine for 64 pixels alone.

        Raises:
            FileNotFoundError, ValueError: the file does not exist, the weights are not those of such a UNet, or an argument does not fit.
            TypeError: path_or_state_dict is neither a path nor a state dict.
        """
        from diffusers import DDPMScheduler

        from dtta_fast.denoisers.adm_reading import SCHEDULES, Flags, unet_from_adm

        flags = Flags.of(image_size, num_head_channels, num_heads, use_new_attention_order, noise_schedule)
        unet = unet_from_adm(*read_state(path_or_state_dict), image_size, flags)
        scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=SCHEDULES[flags.schedule])
        return cls(unet, NoiseProcess.from_scheduler(scheduler), num_heads=flags.number).eval()

    @classmethod
    @float32_on_cpu()
    def from_edm(cls, path_or_state_dict: str | Path | Mapping[str, Tensor], *, sigma_data: float = 0.5) -> ClassUNet:
        """Loads a class-conditional UNet with EDM's preconditioning: edm-cifar10-32x32-cond-vp.pkl and edm-imagenet-64x64-cond-adm.pkl.

        These files are pickles of code and weights. Save the weights in EDM's own repository first, with
        `torch.save(network.state_dict(), "edm.pt")`. A .safetensors file is read as such, any other file with weights_only. The
        repository's baseline-* models have the same parameter names but other preconditionings, which cannot always be recognised: do not
        read them with this.

        Args:
            sigma_data: standard deviation of the data that the preconditioning assumes.

        Raises:
            FileNotFoundError, ValueError: the file does not exist, or the weights are not those of such a UNet.
            TypeError: path_or_state_dict is neither a path nor a state dict.
        """
        if type(sigma_data) not in (int, float) or not 0 < sigma_data < math.inf:
            raise ValueError(f"sigma_data is {sigma_data!r}; give a positive number, 0.5 for EDM's own")
        from diffusers import EDMEulerScheduler

        from dtta_fast.denoisers.edm_unet import unet_from_edm

        given = path_or_state_dict
        if isinstance(given, (str, os.PathLike)) and Path(given).suffix.lower() == ".pkl":
            remedy = 'in EDM\'s repository, unpickle the network and save its weights with torch.save(network.state_dict(), "edm.pt")'
            raise ValueError(f"{given} is a pickle, which would run its code: {remedy}")
        unet = unet_from_edm(*read_state(given))
        return cls(unet, NoiseProcess.from_scheduler(EDMEulerScheduler(sigma_data=sigma_data))).eval()

    def save_pretrained(self, folder: str | Path, scheduler: Any = None) -> None:
        """Writes config.json, unet/, scheduler/, and, if the denoiser has them, vae/ and calibration.json.

        Args:
            scheduler: the diffusers scheduler used in training; None is the one from which the denoiser's process was read.

        Raises:
            ValueError: the scheduler describes another noise process than the denoiser's, or there is none. Nothing is written then.
        """
        scheduler, folder = self.process.scheduler_to_save(scheduler), Path(folder)
        found = {"_class_name": KIND, "patch_size": self.patch_size, "null_class": self.null_class}
        found |= {} if self.num_heads is None else {"num_heads": self.num_heads}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(found, indent=2) + "\n")  # first: without it, a folder's defaults could be wrong
        self.unet.save_pretrained(folder / "unet")
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
        scheduler.save_pretrained(folder / "scheduler")
        if self.calibration is not None:
            self.calibration.save(folder / CALIBRATION)


def _attentions(unet: nn.Module) -> list[Any]:
    from diffusers.models.attention_processor import Attention

    return [part for part in unet.modules() if isinstance(part, Attention)]


def _common_heads(unet: nn.Module) -> int | None:
    """Returns the number of heads of a UNet2DModel's attentions, if it is not what the UNet's own config says."""
    own = _attentions(unet)
    width = getattr(unet, "config", {}).get("attention_head_dim")
    usual = all(part.heads == (part.inner_dim // width if width else 1) for part in own)
    return None if usual else own[0].heads


def _split_into_heads(unet: nn.Module, num_heads: int) -> None:
    """Gives every attention of a UNet2DModel this number of heads.

    Raises:
        ValueError: it does not divide their channels.
    """
    own = _attentions(unet)
    widths = sorted({part.inner_dim for part in own})
    if type(num_heads) is not int or num_heads < 1 or not own or any(width % num_heads for width in widths):
        raise ValueError(f"num_heads is {num_heads!r}; give a divisor of the channels of unet's attention: {widths or 'it has none'}")
    for part in own:
        part.heads = part.sliceable_head_dim = num_heads
        part.scale = (part.inner_dim // num_heads) ** -0.5


def _unet_class(config: Path) -> Any:
    """Returns EDMUNet if a UNet's config.json names it, and None otherwise."""
    if not config.is_file() or read_json(config).get("_class_name") != "EDMUNet":
        return None
    from dtta_fast.denoisers.edm_unet import EDMUNet

    return EDMUNet
