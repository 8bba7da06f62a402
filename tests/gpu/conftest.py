"""The GPU tier compares the engine on the GPU with the engine on the CPU. Without a GPU the same tests run on the CPU alone.

It needs torch, timm, transformers, peft and pytest, and Triton on a GPU. Tests of other libraries' models skip where those are missing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from dtta_fast import AdaptResult
from dtta_fast.denoisers.base import Denoiser, to_model_range
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.tasks import Depth, Segmentation, Task

# the most valuable files come first, in case time runs out; files that are not named here come last
ORDER = ("kernels", "engine", "precision", "presets", "waits", "vmap", "optimizers", "failures", "memory", "graphs", "compile")


def _rank(item: pytest.Item) -> int:
    name = item.path.stem.removeprefix("test_")
    return ORDER.index(name) if name in ORDER else len(ORDER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [i for i, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    ours = sorted((items[i] for i in here), key=_rank)
    for i, item in zip(here, ours, strict=True):
        items[i] = item


@pytest.fixture
def device() -> str:
    """The device under test: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu(device: str) -> None:
    """Skips a test that only a GPU can run."""
    if device != "cuda":
        pytest.skip("needs a CUDA device")


@pytest.fixture
def process() -> NoiseProcess:
    """DDPM's linear schedule for a denoiser that predicts the noise. It is made here because diffusers may be missing."""
    alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    a, s = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return NoiseProcess(torch.stack([a, s, torch.zeros_like(a), torch.ones_like(a), torch.ones_like(a)], dim=1))


@pytest.fixture
def vit() -> nn.Module:
    """A timm ViT in float64."""
    torch.manual_seed(1)
    small = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=7,
        pretrained_cfg_overlay={"input_size": (3, 16, 16), "crop_pct": 1.0},
    )
    nn.init.normal_(small.get_classifier().weight, std=0.5)
    return small.double().eval()


@pytest.fixture
def mlp() -> nn.Module:
    """A classifier with few operators, which runs and compiles quickly."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 7)).eval()


@pytest.fixture
def small_denoiser(random_network: Callable[..., Any], process: NoiseProcess) -> DiT:
    """A float32 DiT of one block, which runs and compiles quickly."""
    return DiT(random_network(depth=1), process).eval()


WIDTHS = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}  # of the SegFormer and the GLPN


class MapNet(Denoiser):
    """A denoiser of maps that needs no diffusers: convolutions of the noisy image beside the map, scaled and shifted by the time."""

    takes_maps = True
    keep_in_float32 = ("embeddings",)

    side = 32  # pixels

    def __init__(self, process: NoiseProcess, channels: int, classes: int | None) -> None:
        super().__init__()
        self.process = process
        self.embeddings = None if classes is None else nn.Parameter(torch.randn(classes, channels))
        self.first = nn.Conv2d(3 + channels, 16, 3, 2, 1)
        self.time = nn.Linear(2, 32)
        self.last = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.SiLU(), nn.Conv2d(16, 12, 3, 1, 1))

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> MapNet:
        moved: MapNet = super()._apply(fn, *args, **kwargs)
        self.process = self.process.to(self.first.weight.device)
        return moved

    def encode(self, images: Tensor) -> Tensor:
        return to_model_range(images, self.side).to(torch.promote_types(self.dtype, torch.float32))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters.get("embeddings", self.embeddings.detach())

    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def depth_map(self, depth: Tensor) -> Tensor:
        return depth.log()

    def adaptable(self) -> list[str]:
        return [name for name, _ in self.named_parameters()]

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        rows = condition.to(x_t.dtype).repeat_interleave(len(x_t) // len(condition), dim=0)
        angle = self.process.model_time[timesteps] / len(self.process)
        scale, shift = self.time(torch.stack([angle.cos(), angle.sin()], dim=1).to(x_t.dtype))[..., None, None].chunk(2, dim=1)
        features = self.first(torch.cat([x_t, rows], dim=1)) * (1 + scale) + shift
        return nn.functional.pixel_shuffle(self.last(features), 2)


@pytest.fixture
def segmentation(process: NoiseProcess) -> tuple[nn.Module, Denoiser, Task]:
    """A transformers SegFormer of 4 classes."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(3)
    config = SegformerConfig(**WIDTHS, strides=[2, 2, 2, 2], decoder_hidden_size=16, num_labels=4, initializer_range=0.3)
    return SegformerForSemanticSegmentation(config).eval(), MapNet(process, 5, 4).eval(), Segmentation()


class Metres(nn.Module):
    """A transformers GLPN, whose depth starts at 0, kept away from it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GLPNConfig, GLPNForDepthEstimation

        self.net = GLPNForDepthEstimation(GLPNConfig(**WIDTHS, decoder_hidden_size=8, max_depth=10, initializer_range=0.3))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).predicted_depth + 1


@pytest.fixture
def depth(process: NoiseProcess) -> tuple[nn.Module, Denoiser, Task]:
    torch.manual_seed(3)
    return Metres().eval(), MapNet(process, 1, None).eval(), Depth()


@pytest.fixture
def moved() -> Callable[..., list[Any]]:
    """Deep copies of modules and tensors on a device, in a dtype."""

    def move(device: str, dtype: torch.dtype, *parts: Any) -> list[Any]:
        return [copy.deepcopy(part).to(device, dtype) for part in parts]

    return move


def _change(result: AdaptResult) -> Tensor:
    return (result.outputs.double() - result.outputs_before.double()).cpu()


@pytest.fixture
def difference() -> Callable[[AdaptResult, AdaptResult], float]:
    """How far one adaptation's effect on the outputs is from another's, as a share of that effect."""

    def measure(found: AdaptResult, expected: AdaptResult) -> float:
        wanted = _change(expected)
        assert wanted.norm() > 1e-2  # it did adapt
        return float((_change(found) - wanted).norm() / wanted.norm())

    return measure
