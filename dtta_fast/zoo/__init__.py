"""Small trained models that ship with the package. Scripts in bench/zoo saved each one in its library's own format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dtta_fast.data.digits import DIGITS as DIGITS  # names for open_vocabulary's example
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT
from dtta_fast.runtime.defaults import float32_on_cpu
from dtta_fast.tasks import Classification, Depth, Segmentation, Task

NAMES = ("digits", "open_vocabulary", "segmentation", "depth")
OF_SCENES = ("segmentation", "depth")
EXAMPLES = 64  # generated scenes


@float32_on_cpu()
def load(name: str | Path) -> tuple[nn.Module, Denoiser]:
    """Loads a model and its denoiser by name, on the CPU and in eval mode. Use them with the task that task(name) returns.

    "digits" is a timm ConvNeXt with a pixel-space DiT. "open_vocabulary" is a transformers CLIPModel with a Stable Diffusion, for the
    digits. "segmentation" is a transformers SegFormer and "depth" a GLPN depth estimator, each with a UNet that takes its map, for
    generated scenes. A Path is a folder with a classifier and a denoiser, as written by bench/zoo.

    Raises:
        ValueError: the name is unknown.
    """
    model = load_model(name)
    if name == "open_vocabulary":
        from dtta_fast.denoisers.stable_diffusion import StableDiffusion

        return model, StableDiffusion.from_pretrained(folder(name) / "diffusion")
    if name in OF_SCENES:
        from dtta_fast.denoisers.concat_unet import ConcatUNet

        return model, ConcatUNet.from_pretrained(folder(name) / "denoiser")
    return model, DiT.from_pretrained(folder(name) / "denoiser").eval()


@float32_on_cpu()
def load_model(name: str | Path) -> nn.Module:
    """Loads only the model.

    Raises:
        ValueError: the name is unknown.
    """
    if name == "open_vocabulary":
        from dtta_fast.tasks.zero_shot import load_clip

        return load_clip(folder(name) / "clip")[0]
    if name in OF_SCENES:
        import transformers

        kind = {"segmentation": "AutoModelForSemanticSegmentation", "depth": "AutoModelForDepthEstimation"}[str(name)]
        loaded: nn.Module = getattr(transformers, kind).from_pretrained(folder(name) / "model", trust_remote_code=False).float().eval()
        return loaded
    import timm

    return timm.create_model(f"local-dir:{folder(name) / 'classifier'}", pretrained=True).eval()


def task(name: str | Path) -> Task:
    """Returns the task for the models of that name. For "open_vocabulary", its classes are the names of the digits.

    Raises:
        ValueError: the name is unknown.
    """
    folder(name)
    if name == "open_vocabulary":
        from dtta_fast.tasks.zero_shot import ZeroShot

        return ZeroShot(DIGITS, load_processor(name))
    if name in OF_SCENES:
        return (Segmentation if name == "segmentation" else Depth)(load_processor(str(name)))
    return Classification()


def load_processor(name: str) -> Any:
    """Loads the transformers processor of "open_vocabulary", "segmentation" or "depth".

    Raises:
        ValueError: name is anything else.
    """
    if name == "open_vocabulary":
        from transformers import CLIPProcessor

        return CLIPProcessor.from_pretrained(folder(name) / "clip")
    if name in OF_SCENES:
        from transformers import SegformerImageProcessor

        return SegformerImageProcessor.from_pretrained(folder(name) / "model")
    raise ValueError(f"name is {name!r}; of the zoo's models 'open_vocabulary', 'segmentation' and 'depth' have a processor")


def example(name: str) -> tuple[Tensor, Tensor]:
    """Returns images [N, 3, H, W] in [0, 1] and the ground truth of the test split (needs the extra `demo`).

    The ground truth is labels [N] for both names of the digits' models. For 64 generated scenes it is labels [N, H, W] ("segmentation")
    or depth [N, H, W] in metres ("depth").

    Raises:
        ValueError: the name is unknown. ImportError: a library of the extra `demo` is missing.
    """
    folder(name)
    if name in OF_SCENES:
        from dtta_fast.data.scenes import scenes

        found = scenes("test", EXAMPLES)
        return found.images, found.labels if name == "segmentation" else found.depth
    from dtta_fast.data.digits import load_digits

    return load_digits("test")


def folder(name: str | Path) -> Path:
    """Returns the folder with the files of that name; a Path is returned unchanged.

    Raises:
        ValueError: the name is unknown, or the folder does not exist. FileNotFoundError: this installation does not include the weights.
    """
    if isinstance(name, Path):
        if not os.path.isdir(name):
            raise ValueError(f"name is {str(name)!r}, which is not a folder; give one with a classifier and a denoiser, or a name")
        return name
    if name not in NAMES:
        raise ValueError(f"name is {name!r}; the zoo has {', '.join(NAMES)}")
    found = Path(__file__).parent / name
    if not found.is_dir():
        raise FileNotFoundError(
            f"this installation has no weights for {name!r} (a source distribution leaves them out): install a wheel, or from a clone"
        )
    return found
