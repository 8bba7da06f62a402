"""Stable Diffusion as a denoiser: conditions are mixtures of the prompts' hidden states."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.prompts import PromptDenoiser, prompt_tokens
from dtta_fast.denoisers.reading import (
    autoencoder_kind,
    download_pipeline,
    read_calibration,
    read_component,
    read_json,
    read_model,
    read_process,
)
from dtta_fast.runtime.defaults import float32_on_cpu


class SharedCondition(AttnProcessor2_0):  # type: ignore[misc]
    """Cross-attention from N = B · P rows to B conditions, without P copies of the keys and values.

    A query's result does not depend on the other queries, so the P rows of an image are joined into one row that is P times as long.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **keywords: Any
    ) -> Tensor:
        if encoder_hidden_states is None or len(encoder_hidden_states) == len(hidden_states):
            alone: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, *args, **keywords)
            return alone
        joined = hidden_states.reshape(len(encoder_hidden_states), -1, hidden_states.shape[-1])  # [B, P * L, C]
        found: Tensor = super().__call__(attn, joined, encoder_hidden_states, *args, **keywords)
        return found.reshape(*hidden_states.shape[:2], -1)


def share_condition(network: Any, what: str) -> None:
    """Sets the cross-attention of a diffusers network to SharedCondition.

    Raises:
        ValueError: the network has a non-standard cross-attention processor.
    """
    processors = network.attn_processors
    for name, processor in processors.items():
        if "attn2" in name:
            if not isinstance(processor, (AttnProcessor, AttnProcessor2_0)):
                raise ValueError(f"{what}'s {name} is a {type(processor).__name__}; give one with diffusers' standard attention")
            processors[name] = SharedCondition()
    network.set_attn_processor(processors)


def prepare_unet(unet: Any) -> None:
    """Shares a UNet2DConditionModel's cross-attention among the rows of an image.

    Raises:
        ValueError: the UNet's attention is arranged in another way.
    """
    if unet.config.get("only_cross_attention") is True or unet.config.get("dual_cross_attention"):
        raise ValueError("unet has only_cross_attention or dual_cross_attention; supported are self- and cross-attention by turns")
    share_condition(unet, "unet")


def unet_regions(network: Any) -> list[nn.Module]:
    """Returns the parts of a UNet to compile separately."""
    return [part for part in network.modules() if isinstance(part, (BasicTransformerBlock, ResnetBlock2D))]


class StableDiffusion(PromptDenoiser):
    """A latent diffusion model conditioned on prompts (Stable Diffusion 1.x, 2.x). Its UNet is the network that can be adapted.

    The UNet's cross-attention is replaced so that it runs once per image over all of the image's pairs; the results are equal to those
    of diffusers. Conditions are the prompts' hidden states [K, tokens, d].

    Args:
        unet: a UNet2DConditionModel.
        process: its noise process.
        vae: a diffusers autoencoder (see check_vae).
        text_encoder, tokenizer: a CLIPTextModel and its CLIPTokenizer. They move with the module but are not part of its weights.

    Raises:
        ValueError: the UNet needs a condition other than prompts, or has non-standard attention.
    """

    def __init__(self, unet: Any, process: NoiseProcess, vae: Any, text_encoder: Any, tokenizer: Any) -> None:
        super().__init__(unet, process, vae, (text_encoder, tokenizer))
        config = self.unet.config
        for field in ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"):
            if config.get(field) is not None:
                raise ValueError(f"unet has {field} {config[field]!r}; supported are UNets conditioned on prompts alone")
        if text_encoder.config.hidden_size != config.cross_attention_dim:
            found = f"unet takes prompts of {config.cross_attention_dim} channels and text_encoder gives {text_encoder.config.hidden_size}"
            raise ValueError(f"{found}; give the text encoder that belongs to it")
        prepare_unet(self.unet)

    def regions(self) -> list[nn.Module]:
        return [part for network in self.networks().values() for part in unet_regions(network)]

    def _encoded(self, prompts: list[str]) -> Tensor:
        text_encoder, tokenizer = self.text()
        ids = prompt_tokens(tokenizer, prompts, text_encoder.config.max_position_embeddings, text_encoder)
        found: Tensor = text_encoder(ids.to(text_encoder.device)).last_hidden_state
        return found

    def _check_prompts(self, prompts: list[str]) -> None:
        text_encoder, tokenizer = self.text()
        prompt_tokens(tokenizer, prompts, text_encoder.config.max_position_embeddings, text_encoder)

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions [B, tokens, d], which are mixtures of the prompts' hidden states."""
        prediction: Tensor = self.unet(x_t, self.process.model_time[timesteps], condition.to(x_t.dtype), return_dict=False)[0]
        return prediction

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> StableDiffusion:
        """Wraps a loaded StableDiffusionPipeline, such as one read by from_single_file() or one with LoRA weights; it shares its modules.

        Raises:
            ValueError: the pipeline is of another kind, or its UNet is not supported.
        """
        if type(pipeline).__name__ != "StableDiffusionPipeline":
            raise ValueError(f"pipeline is a {type(pipeline).__name__}; a StableDiffusion takes a StableDiffusionPipeline")
        process = NoiseProcess.from_scheduler(pipeline.scheduler)
        return cls(pipeline.unet, process, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer).eval()

    @classmethod
    @float32_on_cpu()
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
        quantization_config: Any = None,
        calibration: bool = True,
    ) -> StableDiffusion:
        """Loads a pipeline's folder, or downloads a Hugging Face Hub model id: unet, vae, text_encoder, tokenizer and scheduler.

        Args:
            dtype: dtype of the weights.
            variant: variant of the weight files, such as "fp16". None reads the plain ones, or the only variant there is.
            quantization_config: a diffusers BitsAndBytesConfig for the UNet.
            calibration: False skips the folder's calibration.json.

        Raises:
            FileNotFoundError, ValueError: a part is missing or damaged, or quantisation is not supported here; the message names it.
        """
        folder = Path(path)
        if not os.path.isdir(folder):
            folder = download_pipeline(str(path), ["unet", "vae", "text_encoder"], variant)
        read_json(folder / "model_index.json")
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        kinds = {"unet": UNet2DConditionModel, "vae": None, "text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
        parts: dict[str, Any] = {}
        for name, kind in kinds.items():
            if not (folder / name).is_dir():
                raise FileNotFoundError(f"{folder / name} is missing; a Stable Diffusion folder has {', '.join(kinds)} and scheduler")
            if name == "tokenizer":
                parts[name] = read_component(folder / name, "CLIPTokenizer", None, dtype)
                continue
            kind = autoencoder_kind(folder / name) if name == "vae" else kind
            quantised = {"quantization_config": quantization_config} if name == "unet" and quantization_config is not None else {}
            parts[name] = read_model(kind, folder / name, variant=variant, use_safetensors=True, dtype=dtype, **quantised)
        if quantization_config is None:
            parts["unet"].to(memory_format=torch.channels_last)  # convolutions run in this format and need no weight conversion
        denoiser = cls(parts["unet"], read_process(folder), parts["vae"], parts["text_encoder"].eval(), parts["tokenizer"])
        if calibration:
            denoiser.calibration = read_calibration(folder, denoiser)
        return denoiser.eval()
