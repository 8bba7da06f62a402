"""One step of TENT, EATA and MEMO as torch-ttt has them, against the rivals that the project is measured against."""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_ttt.engine.eata_engine import EataEngine
from torch_ttt.engine.memo_engine import MemoEngine
from torch_ttt.engine.tent_engine import TentEngine

spec = importlib.util.spec_from_file_location("baselines", Path(__file__).parents[1] / "bench" / "quality" / "baselines.py")
baselines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(baselines)
CLASSES = 5


@pytest.fixture
def model() -> nn.Module:
    """A network with batch norm, whose running statistics differ from those of the images."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).double()
    for part in made:
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -1, 1)
            nn.init.uniform_(part.weight, 0.5, 3)
    nn.init.normal_(made[-1].weight, std=3.0)
    return made.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(12, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(engine, images) -> list[torch.Tensor]:
    _, loss = engine.ttt_forward(images)
    loss.backward()
    return [p.grad for p in engine.model.parameters() if p.requires_grad]


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert max(float(g.abs().max()) for g in found) > 1e-4


def test_tent(model, images):
    expected = gradients(TentEngine(copy.deepcopy(model)), images)
    own = baselines.Tent(model, 1e-3)
    logits = own(images)
    close([p.grad for p in own.moving], expected)
    torch.testing.assert_close(logits, TentEngine(copy.deepcopy(model)).ttt_forward(images)[0].detach())


def test_eata_over_two_batches(model, images):
    """The second batch is filtered by the mean answer to the first, and drawn back to the source by the Fisher information."""
    fisher = [torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    own = baselines.Eata(model, 1e-2, fisher)
    theirs = EataEngine(copy.deepcopy(model), e_margin=own.MARGIN * math.log(CLASSES), d_margin=own.REDUNDANT, fisher_alpha=own.FORGETTING)
    names = [name for name, p in theirs.model.named_parameters() if p.requires_grad]
    moving = [p for p in theirs.model.parameters() if p.requires_grad]
    theirs.fishers = {name: (f, p.detach().clone()) for name, f, p in zip(names, fisher, moving, strict=True)}
    optimizer = torch.optim.Adam(moving, lr=1e-2)
    for batch in images.split(6):
        optimizer.zero_grad()
        expected = gradients(theirs, batch)
        optimizer.step()
        own(batch)
        close([p.grad for p in own.moving], expected)
    close([p.detach() for p in own.moving], [p.detach() for p in moving])


def test_memo(images):
    """The entropy of the mean answer to an image's views, with views that both draw alike."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(243), nn.Linear(243, CLASSES)).double().eval()
    shifts = iter(range(1, 100))
    theirs = MemoEngine(copy.deepcopy(model), augmentations=lambda image: image.roll(next(shifts), 3), n_augmentations=baselines.Memo.VIEWS)
    expected = gradients(theirs, images[:1])
    rolled = torch.cat([images[:1].roll(k, 3) for k in range(1, baselines.Memo.VIEWS + 1)])
    seen = []
    own = baselines.Memo(model, 1e-3, lambda views, generator: seen.append(len(views)) or rolled)
    own(images[:1])
    close([p.grad for p in own.moving], expected)
    assert seen == [baselines.Memo.VIEWS]
