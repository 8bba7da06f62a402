"""Small real models: a timm ConvNeXt, a module of one's own and DiTs, all random but far from zero."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

if importlib.util.find_spec("dtta_fast") is None:  # a source tree that was not installed
    spec = importlib.util.spec_from_file_location("source_tree", Path(__file__).parents[1] / "bench" / "source_tree.py")
    source_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(source_tree)
    source_tree.use()

from dtta_fast.core import guard
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.session.loop import Batch
from dtta_fast.session.program import ModuleProgram

CLASSES = 7
# The models here are so small that threads would mostly wait for each other. The processes that tests start take one thread, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def process() -> NoiseProcess:
    from diffusers import DDPMScheduler  # here, since the tests in gpu/ run without diffusers

    return NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear"))


def _random_network(learn_sigma: bool = False, channels: int = 3, **sizes: int) -> DiTNetwork:
    """adaLN-Zero starts as the identity, under which no condition has any effect: give every weight a value."""
    torch.manual_seed(0)
    sizes = {"input_size": 16, "patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": CLASSES, **sizes}
    network = DiTNetwork(in_channels=channels, learn_sigma=learn_sigma, **sizes)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture
def random_network() -> Callable[..., DiTNetwork]:
    return _random_network


@pytest.fixture
def denoiser(process: NoiseProcess) -> DiT:
    return DiT(_random_network(), process).double()


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    preprocessing = {"input_size": (3, 16, 16), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 1.0}
    small = timm.create_model(
        "convnext_atto",
        depths=(1, 1, 1, 1),
        dims=(8, 8, 16, 16),
        patch_size=1,
        num_classes=CLASSES,
        ls_init_value=1.0,
        pretrained_cfg_overlay=preprocessing,
    )
    nn.init.normal_(small.get_classifier().weight, std=0.5)
    return small.double()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _snapshot(*modules: nn.Module) -> list[Tensor | int]:
    kept: list[Tensor | int] = []
    for part in {part for module in modules for part in module.modules()}:
        kept += [id(p) for p in (*part._parameters.values(), *part._buffers.values())]  # the very same objects
    for module in modules:
        kept += [value.clone() for value in module.state_dict().values()]
        kept += [parameter.requires_grad for parameter in module.parameters()]
        kept += [parameter.grad is None for parameter in module.parameters()]
        kept += [part.training for part in module.modules()]
    return kept


@pytest.fixture
def untouched() -> Callable[..., AbstractContextManager[None]]:
    """`with untouched(model, denoiser):` asserts that the block leaves weights, buffers, gradients and flags as they were."""

    @contextmanager
    def check(*modules: nn.Module) -> Iterator[None]:
        before = _snapshot(*modules)
        yield
        after = _snapshot(*modules)
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(before, after, strict=True))

    return check


@pytest.fixture(scope="session")
def guarded():
    """Runs a guard on answers of one's own, as session.loop.run() does."""

    def guarded(
        program: ModuleProgram,
        before: Tensor,
        candidates: list[Tensor],
        x0: Tensor,
        ids: Tensor,
        at: Tensor,
        wanted: list[list[bool]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the accepted outputs [B, ...], whether each is the adapted one, and the evaluations [B] that the comparisons took.

        wanted: for each of the three answers, the images whose losses are computed; None is those that the guard has to compare.
        """
        after, matched = candidates
        batch = Batch(before, None, before, ids, x0, before=before, matched_outputs=matched)
        answers = guard.compare(program.problem, before, after, matched)
        compared = torch.cat([answers.fresh.any(0)[None], answers.fresh])
        losses = program.losses(SimpleNamespace(step=at), batch, answers, compared.tolist() if wanted is None else wanted)
        outputs, accepted = guard.decide(program.problem.config, answers, before, losses, program.problem.trust)
        return outputs, accepted, program.guard * compared.sum(0)

    return guarded
