"""What several subcommands do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.dit import DiT

Settings = Annotated[AdaptConfig, tyro.conf.arg(name="")]  # each a flag of its own


def check_path(path: Path | None) -> None:
    """Raises ValueError where a result cannot be written to: before the work, not after it."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise ValueError(f"the result cannot be written to {str(path)!r}: give a file in a folder that exists")


def option(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag, wherever it stands."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2]
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def names_of(classes: str) -> list[str]:
    """Of a list separated by commas."""
    return [name.strip() for name in classes.split(",")]


def quiet() -> None:
    """No bars of the libraries' own: what a command prints is for scripts too."""
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    quiet_diffusers()
    quiet_transformers()


def checked_device(name: str) -> torch.device:
    """Raises ValueError where there is no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a torch built without CUDA
        raise ValueError(f"device is {name!r}, which is not here: {str(error).splitlines()[0]}") from error
    return device


def load_denoiser(path: str, stable_diffusion: bool, dtype: torch.dtype = torch.float32) -> Any:
    """A DiT or a Stable Diffusion, from a folder or the hub."""
    if stable_diffusion:
        from dtta_fast.denoisers.stable_diffusion import StableDiffusion

        return StableDiffusion.from_pretrained(path, dtype=dtype)
    return DiT.from_pretrained(path).to(dtype)
