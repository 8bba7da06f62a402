"""The common base of denoisers whose classes are prompts."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from dtta_fast.denoisers.diffusers_network import DiffusersDenoiser
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.runtime.encoding import as_in_evaluation

AT_ONCE = 64  # prompts that a text encoder takes at once
NO_CLASSES = "denoiser has no classes: give task=ZeroShot([...], processor), or denoiser.with_classes([...])"


class PromptDenoiser(DiffusersDenoiser):
    """A latent diffusion model conditioned on prompts. Its classes are set by with_classes() or by the task (see ZeroShot)."""

    keep_in_float32 = ("prompts", "no_prompt")  # conditions are mixtures of them, and their gradients accumulate over chunks
    prompts: Tensor | None
    no_prompt: Tensor | None

    def __init__(self, network: Any, process: NoiseProcess, vae: Any, text: tuple[Any, ...]) -> None:
        """text: what encodes prompts, for the subclass; modules among it move with this one and are not part of its weights."""
        super().__init__(network, process, vae)
        self._text: tuple[Any, ...] | None = text  # a tuple, so not a submodule that precision and copies affect
        self.register_buffer("prompts", None, persistent=False)
        self.register_buffer("no_prompt", None, persistent=False)
        config = self.network.config
        if config.get("time_cond_proj_dim") is not None or config.get("guidance_embeds"):
            raise ValueError(
                f"{self.part} takes a guidance scale as input: it was distilled from guided samples, and has no denoising loss of its own; "
                "give the model that it was distilled from"
            )
        if not isinstance(config.sample_size, int):
            raise ValueError(f"{self.part} has sample_size {config.sample_size!r}; supported are square latents, one whole number")
        if config.in_channels != vae.config.latent_channels:
            found = f"{self.part} takes {config.in_channels} channels and vae gives {vae.config.latent_channels}"
            raise ValueError(f"{found}: not a text-to-image model (inpainting and depth models have more), or the VAE of another one")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Self:
        super()._apply(fn, *args, **kwargs)
        for part in self._text or ():
            if isinstance(part, torch.nn.Module):
                part._apply(fn, *args, **kwargs)
        return self

    def text(self) -> tuple[Any, ...]:
        """Returns what encodes prompts.

        Raises:
            ValueError: the classes of this denoiser are already set.
        """
        if self._text is None:
            raise ValueError("prompts were set already by with_classes(); call it on the denoiser that from_pretrained() gave")
        return self._text

    @abstractmethod
    def _encoded(self, prompts: list[str]) -> Tensor:
        """Encodes at most AT_ONCE prompts to conditions [K, ...]."""

    @abstractmethod
    def _check_prompts(self, prompts: list[str]) -> None:
        """Raises ValueError if a prompt is over a text encoder's token limit, or two have the same tokens."""

    def with_classes(self, prompts: Sequence[str | Sequence[str]], null_prompt: str = "") -> Self:
        """Returns a denoiser that shares these weights and has one class per prompt, in order; the original is unchanged.

        Args:
            prompts: a prompt for each class, or several, whose conditions are averaged.
            null_prompt: the prompt of the unconditional condition, such as a negative one.

        Raises:
            ValueError: there are no prompts, a prompt is empty, repeated or over the text encoder's token limit, or the classes are
                already set.
        """
        self.text()
        each = [prompts] if isinstance(prompts, str) else list(prompts)
        groups = [[own] if isinstance(own, str) else list(own) for own in each]
        several = any(not isinstance(own, str) for own in each)
        if several:
            for k, group in enumerate(groups):
                check_names(f"prompts[{k}]", group)
                if group in groups[:k]:
                    raise ValueError(f"prompts has {group!r} for classes {groups.index(group)} and {k}; give each class its own")
        else:
            check_names("prompts", prompts if isinstance(prompts, str) else each)  # type: ignore[arg-type]
        flat = list(dict.fromkeys(prompt for group in groups for prompt in group))
        self._check_prompts([*flat, *([] if null_prompt in flat else [null_prompt])])
        with as_in_evaluation(*(part for part in self.text() if isinstance(part, torch.nn.Module))):
            encoded = torch.cat([self._encoded(flat[first : first + AT_ONCE]) for first in range(0, len(flat), AT_ONCE)])
            nothing = self._null(null_prompt)
        table, nothing = (found.to(self.network.device, torch.promote_types(self.dtype, torch.float32)) for found in (encoded, nothing))
        if several:
            table = torch.stack([table[[flat.index(prompt) for prompt in group]].mean(0) for group in groups])
        view = copy.copy(self)
        view._buffers = {**self._buffers, "prompts": table, "no_prompt": nothing}
        view._text = None
        return view

    def _null(self, prompt: str) -> Tensor:
        """Encodes the unconditional prompt to a condition [...]."""
        return self._encoded([prompt])[0]

    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the prompts' conditions [K, ...].

        Raises:
            ValueError: no classes are set.
        """
        if self.prompts is None:
            raise ValueError(NO_CLASSES)
        return self.prompts

    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Returns the condition [...] of the unconditional prompt.

        Raises:
            ValueError: no classes are set.
        """
        if self.no_prompt is None:
            raise ValueError(NO_CLASSES)
        return self.no_prompt


def prompt_tokens(tokenizer: Any, prompts: Sequence[str], limit: int, encoder: Any = None) -> Tensor:
    """Returns a transformers tokenizer's token ids [N, limit], padded on the right, as in the training of all text encoders here.

    Args:
        limit: the most tokens of a prompt. encoder: the text encoder that gets the ids.

    Raises:
        ValueError: a prompt has more tokens than `limit`, including the start and end tokens, two prompts have the same tokens, or the
            encoder does not know a token.
    """
    for prompt, ids in zip(prompts, tokenizer(list(prompts)).input_ids, strict=True):
        if len(ids) > limit:
            raise ValueError(f"prompt {prompt!r} has {len(ids)} tokens, and the text encoder takes {limit}; give a shorter name")
    given = {"padding": "max_length", "max_length": limit, "padding_side": "right", "return_tensors": "pt"}
    found: Tensor = tokenizer(list(prompts), **given).input_ids
    check_different(prompts, found)
    known = None if encoder is None else encoder.get_input_embeddings().num_embeddings
    if known is not None and int(found.max()) >= known:
        raise ValueError(
            f"the tokenizer gives token {int(found.max())}, and the text encoder knows {known}: tokens were added to it; call "
            "resize_token_embeddings() on the text encoder and train them, or take the tokenizer that belongs to it"
        )
    return found


def check_different(prompts: Sequence[str], ids: Tensor) -> None:
    """Raises ValueError if two prompts have the same token ids [N, limit]."""
    first: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(ids.tolist()):
        other = first.setdefault(tuple(row), i)
        if other != i:
            raise ValueError(
                f"prompts {prompts[other]!r} and {prompts[i]!r} are the same to the tokenizer; give names that differ, and a whole "
                "tokenizer"
            )


def check_names(argument: str, names: Sequence[str]) -> None:
    """Raises ValueError unless `names` is a non-empty sequence of distinct, non-empty strings."""
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{argument} is {names!r}; give a sequence of one string or more")
    seen: set[str] = set()
    for i, name in enumerate(name.strip() for name in names):
        if not name or name in seen:
            raise ValueError(
                f"{argument} has {names[i]!r} {'twice, again ' if name else ''}at {i}; give different names, none of them empty"
            )
        seen.add(name)
