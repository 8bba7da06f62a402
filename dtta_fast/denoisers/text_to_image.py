"""Text-to-image pipelines of diffusers whose condition has several parts: SDXL, Stable Diffusion 3, PixArt, and Sana."""

from __future__ import annotations

import inspect
import math
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
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
    read_scheduler,
)
from dtta_fast.denoisers.stable_diffusion import prepare_unet, unet_regions
from dtta_fast.runtime.defaults import float32_on_cpu

MASKED = -10_000.0  # bias of a token that attention leaves out, as in diffusers


class PipelineDenoiser(PromptDenoiser):
    """A denoiser whose prompts are encoded by its pipeline.

    A condition has several tensors, such as a sequence of hidden states and a pooled vector. Classes are mixed by mixing all of them
    with the same weights, so a condition is stored as one row that holds them one after the other.

    Attributes:
        pipeline, components: the name of the pipeline in diffusers, and its components' names and classes, networks and tokenizers;
            those of `optional` are not there if model_index.json names no class for them. Those of `overflowing` may overflow in
            float16, and are loaded in bfloat16 instead.

    Args:
        pipeline: a diffusers pipeline of this kind with all of its components.

    Raises:
        ValueError: the pipeline is of another kind, or its network or scheduler is not supported.
    """

    pipeline: ClassVar[str]
    components: ClassVar[dict[str, str]]
    optional: ClassVar[tuple[str, ...]] = ()
    overflowing: ClassVar[tuple[str, ...]] = ()
    tokens: ClassVar[dict[str, int]]  # the most tokens of a prompt, by tokenizer
    layout: tuple[tuple[int, ...], ...] = ()

    def __init__(self, pipeline: Any) -> None:
        if type(pipeline).__name__ != self.pipeline:
            raise ValueError(f"pipeline is a {type(pipeline).__name__}; a {type(self).__name__} takes a {self.pipeline}")
        parts = pipeline.components
        scheduler = type(parts["scheduler"]).__name__
        if scheduler.startswith(("LCM", "TCD", "SCM")):
            raise ValueError(f"the pipeline has an {scheduler}, that of a distilled model; give the model that it was distilled from")
        for name, part in parts.items():
            other = name.replace("tokenizer", "text_encoder")
            if name.startswith("tokenizer") and (part is None) != (parts.get(other) is None):
                raise ValueError(f"the pipeline has only one of {name} and {other}; give both, or neither where it can do without")
        encoders = [part for name, part in parts.items() if name.startswith("text_encoder") and part is not None]
        super().__init__(parts[self.part], NoiseProcess.from_scheduler(parts["scheduler"]), parts["vae"], (*encoders, pipeline))

    @classmethod
    def from_pipeline(cls, pipeline: Any) -> Self:
        """Wraps a loaded diffusers pipeline, such as one read by from_single_file() or one with LoRA weights; it shares its modules."""
        return cls(pipeline).eval()

    @classmethod
    @float32_on_cpu()
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, variant: str | None = None, calibration: bool = True
    ) -> Self:
        """Loads a pipeline's folder, or downloads a Hugging Face Hub model id.

        Args:
            dtype: dtype of the weights.
            variant: variant of the weight files, such as "fp16". None reads the plain ones, or the only variant there is.
            calibration: False skips the folder's calibration.json.

        Raises:
            FileNotFoundError, ValueError: a part is missing or damaged; the message names it.
        """
        folder = Path(path)
        if not os.path.isdir(folder):
            folder = download_pipeline(str(path), [name for name in (*cls.components, "vae") if "token" not in name], variant)
        told = read_json(folder / "model_index.json")
        parts: dict[str, Any] = {"scheduler": read_scheduler(folder)}
        dtypes = dict.fromkeys(cls.overflowing, torch.bfloat16) if dtype == torch.float16 else {}
        own = dtypes.get("vae", dtype)
        parts["vae"] = read_model(autoencoder_kind(folder / "vae"), folder / "vae", variant=variant, use_safetensors=True, dtype=own)
        for name, kind in cls.components.items():
            absent = name in cls.optional and not any(told.get(name) or ())
            parts[name] = None if absent else read_component(folder / name, kind, variant, dtypes.get(name, dtype))
        settings = {name: told[name] for name in ("force_zeros_for_empty_prompt",) if isinstance(told.get(name), bool)}
        denoiser = cls(getattr(diffusers, cls.pipeline)(**parts, **settings))
        if calibration:
            denoiser.calibration = read_calibration(folder, denoiser)
        return denoiser.eval()

    def _check_prompts(self, prompts: list[str]) -> None:
        own = self.text()[-1].components
        for name, limit in self.tokens.items():
            if own.get(name) is not None:
                prompt_tokens(own[name], prompts, limit, own[name.replace("tokenizer", "text_encoder")])

    def _encoded(self, prompts: list[str]) -> Tensor:
        pipeline = self.text()[-1]
        tokenizers = [pipeline.components[name] for name in self.tokens if pipeline.components.get(name) is not None]
        sides = [tokenizer.padding_side for tokenizer in tokenizers]
        try:
            for tokenizer in tokenizers:  # the pipelines pad on the tokenizer's own side
                tokenizer.padding_side = "right"
            parts = self._parts_of(pipeline, prompts)
        finally:
            for tokenizer, side in zip(tokenizers, sides, strict=True):
                tokenizer.padding_side = side
        self.layout = tuple(tuple(part.shape[1:]) for part in parts)
        return self._packed(parts)

    def _packed(self, parts: list[Tensor]) -> Tensor:
        """Stores the parts [K, ...] of conditions as rows [K, N]."""
        dtype = torch.promote_types(self.dtype, torch.float32)  # masks and hidden states of several encoders in one row
        return torch.cat([part.flatten(1).to(dtype) for part in parts], dim=1)

    def unpacked(self, condition: Tensor) -> list[Tensor]:
        """Splits conditions [B, N] into their parts, [B, ...] each."""
        sizes = [math.prod(shape) for shape in self.layout]
        return [part.unflatten(1, shape) for part, shape in zip(condition.split(sizes, dim=1), self.layout, strict=True)]

    @abstractmethod
    def _parts_of(self, pipeline: Any, prompts: list[str]) -> list[Tensor]:
        """Encodes prompts to the parts of their conditions, [K, ...] each."""

    def regions(self) -> list[nn.Module]:
        found: list[nn.Module] = list(self.network.transformer_blocks)
        return found

    def _device(self) -> torch.device:
        device: torch.device = self.text()[0].device
        return device


class StableDiffusionXL(PipelineDenoiser):
    """Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952).

    Its original and target size are those of the images that it works on, and the crop begins at (0, 0), as in the pipeline.
    """

    pipeline = "StableDiffusionXLPipeline"
    components = {  # noqa: RUF012
        "unet": "UNet2DConditionModel",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
    }
    optional = ("text_encoder", "tokenizer")  # the refiner has the second only
    tokens = {"tokenizer": 77, "tokenizer_2": 77}  # noqa: RUF012

    def __init__(self, pipeline: Any) -> None:
        if any(getattr(pipeline, name, None) is None for name in self.optional):
            raise ValueError("the pipeline has one text encoder, as SDXL's refiner, which takes aesthetic scores; give the base model")
        super().__init__(pipeline)
        prepare_unet(self.unet)
        side = self.image_size
        self.register_buffer(
            "time_ids", torch.tensor([side, side, 0, 0, side, side], dtype=torch.float32, device=self.network.device), persistent=False
        )
        self._zeros = bool(pipeline.config.force_zeros_for_empty_prompt)

    def regions(self) -> list[nn.Module]:
        return unet_regions(self.unet)

    def _parts_of(self, pipeline: Any, prompts: list[str]) -> list[Tensor]:
        states, _, pooled, _ = pipeline.encode_prompt(prompts, device=self._device(), do_classifier_free_guidance=False)
        return [states, pooled]

    def _null(self, prompt: str) -> Tensor:
        found = super()._null(prompt)
        return torch.zeros_like(found) if self._zeros and not prompt else found

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions [B, N]: the prompts' hidden states and their pooled vectors."""
        states, pooled = self.unpacked(condition.to(x_t.dtype))
        ids: Any = self.time_ids
        added = {
            "text_embeds": pooled.repeat_interleave(len(x_t) // len(pooled), dim=0),
            "time_ids": ids.to(x_t.dtype).expand(len(x_t), -1),
        }
        prediction: Tensor = self.unet(x_t, self.process.model_time[timesteps], states, added_cond_kwargs=added, return_dict=False)[0]
        return prediction


class StableDiffusion3(PipelineDenoiser):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a transformer of images and prompts together, rectified flow.

    Without the T5 encoder, its part of the hidden states is zero, as in the pipeline.
    """

    part = "transformer"
    transformer: Any
    pipeline = "StableDiffusion3Pipeline"
    components = {  # noqa: RUF012
        "transformer": "SD3Transformer2DModel",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "tokenizer_3": "T5Tokenizer",
    }
    optional = ("text_encoder_3", "tokenizer_3")
    tokens = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 256}  # noqa: RUF012

    def _parts_of(self, pipeline: Any, prompts: list[str]) -> list[Tensor]:
        states, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device=self._device(), do_classifier_free_guidance=False)
        return [states, pooled]

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions [B, N]: the prompts' hidden states and their pooled vectors."""
        rows = condition.to(x_t.dtype).repeat_interleave(len(x_t) // len(condition), dim=0)
        states, pooled = self.unpacked(rows)
        prediction: Tensor = self.transformer(x_t, states, pooled, self.process.model_time[timesteps], return_dict=False)[0]
        return prediction


class MaskedDenoiser(PipelineDenoiser):
    """A denoiser whose condition holds a prompt's hidden states [L, D] and its mask of tokens [L].

    In a mixture, the state of a token is the mean over the prompts that have it, and its attention is biased by the logarithm of their
    weight. A prompt alone attends as in the pipeline.
    """

    part = "transformer"
    transformer: Any

    def with_classes(self, prompts: Sequence[str | Sequence[str]], null_prompt: str = "") -> Self:
        view = super().with_classes(prompts, null_prompt)
        states, mask = view.unpacked(torch.cat([view.class_embeddings({}), view.null_embedding({})[None]]))
        longest = int(mask.any(0).nonzero().max()) + 1  # what comes after is padding of all prompts
        parts = [states[:, :longest], mask[:, :longest]]
        view.layout = tuple(tuple(part.shape[1:]) for part in parts)
        rows = torch.cat([part.flatten(1) for part in parts], dim=1)
        view.prompts, view.no_prompt = rows[:-1], rows[-1]
        return view

    def _check_prompts(self, prompts: list[str]) -> None:
        super()._check_prompts(self.text()[-1]._text_preprocessing(prompts))

    def _masked(self, states: Tensor, mask: Tensor) -> list[Tensor]:
        """Returns hidden states [K, L, D] without those of padding, which are not part of a mixture, and the mask [K, L]."""
        mask = mask.to(states.dtype)
        return [states * mask[..., None], mask]

    def _attended(self, condition: Tensor, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns the hidden states [rows, L, D] and the attention bias [rows, 1, L] of conditions [B, N]."""
        states, mask = self.unpacked(condition.repeat_interleave(rows // len(condition), dim=0))
        states = states / torch.where(mask > 0, mask, 1.0)[..., None]  # the mean over the prompts that have this token
        bias = torch.where(mask > 0, mask.clamp(min=1e-30).log(), MASKED)[:, None]
        return states.to(dtype), bias.to(dtype)


class PixArt(MaskedDenoiser):
    """PixArt-α (Chen et al. 2023, arXiv 2310.00426)."""

    pipeline = "PixArtAlphaPipeline"
    components = {  # noqa: RUF012
        "transformer": "PixArtTransformer2DModel",
        "text_encoder": "T5EncoderModel",
        "tokenizer": "T5Tokenizer",
    }
    tokens = {"tokenizer": 120}  # noqa: RUF012

    def _parts_of(self, pipeline: Any, prompts: list[str]) -> list[Tensor]:
        limit = self.tokens["tokenizer"]
        states, mask, _, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self._device(), max_sequence_length=limit
        )
        return self._masked(states, mask)

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions [B, N]: the prompts' hidden states and their masks."""
        states, bias = self._attended(condition, len(x_t), x_t.dtype)
        added: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            side = float(self.image_size)
            added = {"resolution": x_t.new_full((len(x_t), 2), side), "aspect_ratio": x_t.new_ones(len(x_t), 1)}
        prediction: Tensor = self.transformer(
            x_t,
            states,
            self.process.model_time[timesteps],
            added_cond_kwargs=added,
            encoder_attention_mask=bias,
            return_dict=False,
        )[0]
        return prediction


class PixArtSigma(PixArt):
    """PixArt-Σ (Chen et al. 2024, arXiv 2403.04692): PixArt with prompts of up to 300 tokens."""

    pipeline = "PixArtSigmaPipeline"
    tokens = {"tokenizer": 300}  # noqa: RUF012


class Sana(MaskedDenoiser):
    """Sana and Sana 1.5 (Xie et al. 2024, arXiv 2410.10629): linear attention on the latents of a deep-compression autoencoder.

    Prompts follow the pipeline's own instruction to its language model; the unconditional prompt has none, as in the pipeline.
    """

    pipeline = "SanaPipeline"
    components = {  # noqa: RUF012
        "transformer": "SanaTransformer2DModel",
        "text_encoder": "Gemma2Model",
        "tokenizer": "GemmaTokenizer",
    }
    overflowing = ("text_encoder", "vae")
    tokens = {"tokenizer": 298}  # noqa: RUF012  # of 300, two can fall to the end of the instruction

    def _parts_of(self, pipeline: Any, prompts: list[str]) -> list[Tensor]:
        instruction = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        return self._instructed(pipeline, prompts, instruction)

    def _instructed(self, pipeline: Any, prompts: list[str], instruction: list[str] | None) -> list[Tensor]:
        """Encodes prompts behind an instruction to the language model."""
        states, mask, _, _ = pipeline.encode_prompt(prompts, False, device=self._device(), complex_human_instruction=instruction)
        return self._masked(states, mask)

    def _null(self, prompt: str) -> Tensor:
        return self._packed(self._instructed(self.text()[-1], [prompt], None))[0]

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Predicts under conditions [B, N]: the prompts' hidden states and their masks."""
        states, bias = self._attended(condition, len(x_t), x_t.dtype)
        time = self.process.model_time[timesteps] * self.transformer.config.timestep_scale
        prediction: Tensor = self.transformer(x_t, states, time, encoder_attention_mask=bias, return_dict=False)[0]
        return prediction
