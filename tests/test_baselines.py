"""The methods that the project is measured against, each against a step worked by hand on a linear model."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from dtta_fast import zoo

spec = importlib.util.spec_from_file_location("baselines", Path(__file__).parents[1] / "bench" / "quality" / "baselines.py")
baselines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(baselines)


@pytest.fixture
def linear() -> nn.Module:
    """LayerNorm, then a linear classifier of 4 features and 3 classes, in float64: z = W (g * n(x) + b)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3, bias=False)).double()
    nn.init.normal_(model[1].weight, std=2.0)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return 4 * torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def probabilities(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(x).softmax(1).detach()


def entropy_gradient(linear: nn.Module, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of Σ weights · H: dH/dz_k = -p_k (log p_k + H); to the scale and the shift of the LayerNorm."""
    p = probabilities(linear, x)
    h = -(p * p.log()).sum(1)
    to_z = -p * (p.log() + h[:, None]) * weights[:, None]
    to_features = to_z @ linear[1].weight.detach()
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    return (to_features * normal).sum(0), to_features.sum(0)


class LogitNorm(nn.Module):
    """Images are logits [B, 3], and their shift is what moves: probabilities are what a test says they are."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images + self.bias


# sure of class 0, 1 and 2 (0.11 nats), less sure of class 2 (0.39), of none (1.09); 0.4 ln 3 is 0.44
P0, P1, P2, P2_WEAK, NONE = torch.tensor(
    [[0.98, 0.01, 0.01], [0.01, 0.98, 0.01], [0.01, 0.01, 0.98], [0.05, 0.05, 0.90], [0.4, 0.3, 0.3]], dtype=torch.float64
)


def images_of(*rows: torch.Tensor) -> torch.Tensor:
    return torch.stack(rows).log()


def to_logits(p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropies [B] of probabilities [B, K] and their gradient to the logits [B, K]."""
    h = -(p * p.log()).sum(1)
    return h, -p * (p.log() + h[:, None])


def adam(p: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
    """Adam's first step."""
    return p.detach() - lr * gradient / (gradient.abs() + 1e-8)


def moved(baseline) -> tuple[torch.Tensor, torch.Tensor]:
    return baseline.model[0].weight.detach(), baseline.model[0].bias.detach()


def test_tent(linear, x):
    tent = baselines.Tent(linear, 0.01)
    torch.testing.assert_close(tent(x), linear(x).detach())  # the answer is from before
    for found, p, g in zip(moved(tent), linear[0].parameters(), entropy_gradient(linear, x, torch.full((6,), 1 / 6)), strict=True):
        torch.testing.assert_close(found, adam(p, g, 0.01), rtol=1e-7, atol=1e-9)
    assert torch.equal(tent.model[1].weight, linear[1].weight)
    tent.reset()
    assert all(torch.equal(a, b) for a, b in zip(moved(tent), linear[0].parameters(), strict=True))


def test_eata(linear, x):
    fisher = [torch.full((4,), 0.3, dtype=torch.float64)] * 2
    eata = baselines.Eata(linear, 0.01, fisher)
    p = probabilities(linear, x)
    h, limit = -(p * p.log()).sum(1), 0.4 * math.log(3)
    used = h < limit
    assert 0 < int(used.sum()) < 6
    eata(x)
    weights = torch.where(used, (limit - h).exp(), torch.zeros_like(h)) / used.sum()
    for found, start, g in zip(moved(eata), linear[0].parameters(), entropy_gradient(linear, x, weights), strict=True):
        torch.testing.assert_close(found, adam(start, g, 0.01), rtol=1e-7, atol=1e-9)  # nothing to forget yet
    torch.testing.assert_close(eata.average, p[used].mean(0))
    before = moved(eata)
    near = x[used][:1]  # like the average: redundant
    eata.average = probabilities(eata.model, near)[0]
    eata(near)
    assert all(torch.equal(a, b) for a, b in zip(before, moved(eata), strict=True))


def test_eata_is_drawn_back(linear, x):
    fisher = [torch.full((4,), 0.3, dtype=torch.float64)] * 2
    eata = baselines.Eata(linear, 0.01, fisher)
    with torch.no_grad():
        eata.model[0].bias.add_(1.0)
    drift = eata.moving[1].detach() - eata.start[1]
    sure = eata.model(x).detach().softmax(1)
    h = -(sure * sure.log()).sum(1)
    used, limit = h < 0.4 * math.log(3), 0.4 * math.log(3)
    weights = torch.where(used, (limit - h).exp(), torch.zeros_like(h)) / used.sum()
    _, to_shift = entropy_gradient(eata.model, x, weights)
    eata(x)
    torch.testing.assert_close(eata.moving[1].grad, to_shift + 1.0 * 2 * 0.3 * drift, rtol=1e-7, atol=1e-9)


def test_eata_over_two_batches():
    eata = baselines.Eata(LogitNorm(), 0.0, [torch.ones(3, dtype=torch.float64)])  # nothing moves: gradients and memory are looked at
    eata(images_of(*[P0] * 6, *[P1] * 3, *[P2] * 2, NONE))
    mean = (6 * P0 + 3 * P1 + 2 * P2) / 11
    torch.testing.assert_close(eata.average, mean)
    # cosines with the mean: class 0 0.86, class 1 0.45, class 2 0.31 and 0.36; the limit is 0.4
    eata(images_of(P0, P1, P2, P2_WEAK, NONE))
    used = torch.stack([P2, P2_WEAK])
    torch.testing.assert_close(eata.average, 0.9 * mean + 0.1 * used.mean(0))
    h, gradient = to_logits(used)
    expected = ((0.4 * math.log(3) - h).exp()[:, None] * gradient).mean(0)
    torch.testing.assert_close(eata.moving[0].grad, expected)


def test_fisher_information(linear, x):
    p = probabilities(linear, x)
    to_z = p - torch.eye(3, dtype=torch.float64)[p.argmax(1)]
    expected = (to_z @ linear[1].weight.detach()).square().mean(0)  # of the shift
    torch.testing.assert_close(baselines.fisher_information(linear, x)[1], expected)


def test_sar(linear, x):
    sar = baselines.Sar(linear, 0.1)
    p = probabilities(linear, x)
    used = -(p * p.log()).sum(1) < 0.4 * math.log(3)
    first = entropy_gradient(linear, x[used], torch.full((int(used.sum()),), 1 / int(used.sum()), dtype=torch.float64))
    norm = torch.cat(first).norm()
    there = nn.Sequential(nn.LayerNorm(4), linear[1]).double()
    with torch.no_grad():
        for target, start, g in zip(there[0].parameters(), linear[0].parameters(), first, strict=True):
            target.copy_(start + 0.05 * g / norm)
    q = probabilities(there, x[used])
    kept = -(q * q.log()).sum(1) < 0.4 * math.log(3)
    sharp = entropy_gradient(there, x[used][kept], torch.full((int(kept.sum()),), 1 / int(kept.sum()), dtype=torch.float64))
    sar.COLLAPSED = 0.0
    sar(x)
    for found, start, g in zip(moved(sar), linear[0].parameters(), sharp, strict=True):
        torch.testing.assert_close(found, start.detach() - 0.1 * g, rtol=1e-7, atol=1e-9)
    sar.COLLAPSED = 10.0  # any entropy is a collapse
    sar(x)
    assert all(torch.equal(a, b) for a, b in zip(moved(sar), linear[0].parameters(), strict=True))


def sharp(images: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy, and its gradient to the shift, 0.05 up the gradient."""
    gradient = to_logits((images + bias).softmax(1))[1].mean(0)
    h, there = to_logits((images + bias + 0.05 * gradient / gradient.norm()).softmax(1))
    return h.mean(), there.mean(0)


def test_sar_over_two_batches():
    sar, first, second = baselines.Sar(LogitNorm(), 0.1), images_of(P0, P2_WEAK), images_of(P2_WEAK, P2_WEAK, P1)
    sar(torch.cat([first, images_of(NONE)]))
    loss, gradient = sharp(first, torch.zeros(3, dtype=torch.float64))
    bias = -0.1 * gradient
    torch.testing.assert_close(sar.model.bias.detach(), bias)
    assert sar.average == pytest.approx(float(loss))
    sar(second)
    loss_there, gradient_there = sharp(second, bias)
    torch.testing.assert_close(sar.model.bias.detach(), bias - 0.1 * (0.9 * gradient + gradient_there))
    assert sar.average == pytest.approx(0.9 * float(loss) + 0.1 * float(loss_there))


def test_sar_where_no_image_is_reliable():
    sar, images, seen = baselines.Sar(LogitNorm(), 0.1), images_of(NONE, NONE), []
    sar.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert torch.equal(sar(images), images)
    assert seen == [2]  # the model is not asked about an empty batch, which not every model takes
    assert torch.equal(sar.model.bias, torch.zeros(3, dtype=torch.float64))
    assert sar.average is None


def test_sar_collapses_at_a_share_of_the_number_of_classes():
    surer = torch.tensor([0.998, 0.001, 0.001], dtype=torch.float64)  # 0.016 nats; the limit is 0.2 ln 3 / ln 1000 = 0.032
    sar = baselines.Sar(LogitNorm(), 0.1)
    sar(images_of(P0))
    assert sar.average is not None
    assert bool(sar.model.bias.any())
    sar.reset()
    sar(images_of(surer))
    assert sar.average is None
    assert not bool(sar.model.bias.any())


def test_cotta(linear, x):
    calls = []

    def augment(images, generator):
        calls.append(1)
        return images.roll(1, 1)  # a shift or a scale would be lost in the LayerNorm

    cotta = baselines.Cotta(linear, 0.01, augment)
    cotta.RESTORE, cotta.SURE = 0.0, 2.0  # never sure
    target = cotta(x)
    assert len(calls) == 32
    torch.testing.assert_close(target, linear(x.roll(1, 1)).detach())
    to_z = (probabilities(linear, x) - target.softmax(1)) / 6
    normal = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    to_weight = to_z.T @ (normal * linear[0].weight + linear[0].bias).detach()
    student = adam(linear[1].weight, to_weight, 0.01)
    torch.testing.assert_close(cotta.model[1].weight.detach(), student, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(cotta.teacher[1].weight, 0.999 * linear[1].weight + 0.001 * student, rtol=1e-9, atol=1e-12)
    cotta.SURE = 0.0
    cotta(x)
    assert len(calls) == 32  # the teacher alone where the source is sure
    cotta.RESTORE = 1.0
    cotta(x)
    assert torch.equal(cotta.model[1].weight, linear[1].weight)


def test_cotta_asks_the_source_whether_it_is_sure(linear, x):
    calls = []

    def augment(images, generator):
        calls.append(1)
        return images.roll(1, 1)  # a shift or a scale would be lost in the LayerNorm

    cotta = baselines.Cotta(linear, 0.3, augment)
    cotta.RESTORE, cotta.SURE, cotta.TEACHER = 0.0, 2.0, 0.0  # the teacher is the student, far from the source
    cotta(x)
    source, teacher = (float(probabilities(model, x).amax(1).mean()) for model in (linear, cotta.teacher))
    assert abs(source - teacher) > 0.01
    cotta.SURE = (source + teacher) / 2
    cotta(x)
    assert len(calls) == (64 if source < teacher else 32)
    cotta.RESTORE = 1.0
    cotta(x)
    assert torch.equal(cotta.model[1].weight, linear[1].weight)
    assert not torch.equal(cotta.teacher[1].weight, linear[1].weight)


def noisy(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return images + torch.randn(images.shape, generator=generator, dtype=images.dtype)


def test_draws_start_again_with_a_reset_and_go_on_between_images(linear, x):
    cotta, memo = baselines.Cotta(linear, 0.01, noisy, seed=1), baselines.Memo(linear, 0.05, noisy, seed=1)
    cotta.SURE = 2.0
    for baseline in (cotta, memo):
        first, second = baseline(x), baseline(x)
        assert not torch.equal(first, second)
        baseline.reset()
        assert torch.equal(baseline(x), first)
        assert torch.equal(baseline(x), second)
    one, other = memo(x[:1].repeat(2, 1))
    assert not torch.equal(one, other)


def test_memo(linear, x):
    memo = baselines.Memo(linear, 0.05, lambda views, _: views + torch.linspace(0, 1, len(views), dtype=torch.float64)[:, None] * x[1])
    found = memo(x[:2])
    for i in range(2):
        views = x[i] + torch.linspace(0, 1, 32, dtype=torch.float64)[:, None] * x[1]
        p = probabilities(linear, views)
        mean = p.mean(0)
        to_p = -(mean.log() + 1) / 32
        to_z = p * (to_p - (p * to_p).sum(1, keepdim=True))
        normal = (views - views.mean(1, keepdim=True)) / (views.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        features = normal * linear[0].weight.detach() + linear[0].bias.detach()
        weight = linear[1].weight.detach() - 0.05 * to_z.T @ features
        scale = linear[0].weight.detach() - 0.05 * ((to_z @ linear[1].weight.detach()) * normal).sum(0)
        shift = linear[0].bias.detach() - 0.05 * (to_z @ linear[1].weight.detach()).sum(0)
        own = (x[i] - x[i].mean()) / (x[i].var(correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(found[i], weight @ (own * scale + shift), rtol=1e-7, atol=1e-9)


class Embedding(nn.Module):
    """A classifier as timm's, whose images are the embeddings [B, 4] of its linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3).double()

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return features if pre_logits else self.fc(features)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


@torch.no_grad()
class BatchNorm(nn.Module):
    """Batch norm with statistics of a training far from the test's, then a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4).double(), nn.Linear(4, 3).double()
        self.norm.running_mean.fill_(5.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(images))


def test_batch_norm_takes_the_statistics_of_the_batch(x):
    torch.manual_seed(0)
    model = BatchNorm().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = model.head((x - x.mean(0)) / (x.var(0, correction=0) + model.norm.eps).sqrt())
    fisher = baselines.fisher_information(model, x)
    methods = [
        baselines.BatchStatistics(model, 0.0),
        baselines.Tent(model, 0.1),
        baselines.Eata(model, 0.1, fisher),
        baselines.Sar(model, 0.1),
        baselines.Cotta(model, 0.1, lambda images, generator: images),
    ]
    for method in methods:
        torch.testing.assert_close(method(x), wanted)  # what they say before the batch's own update
        method.reset()
        torch.testing.assert_close(method(x), wanted)
    tent = methods[1]
    assert not torch.allclose(tent(x), tent(x))  # it learns
    assert not torch.allclose(model(x), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neo_is_the_plain_classifier_where_the_mean_is_the_origin(x):
    model = Embedding()
    neo, centred = baselines.Neo(model), torch.cat([x, -x])
    torch.testing.assert_close(neo(centred), model(centred))
    assert not torch.allclose(neo(x), model(x))


@torch.no_grad()
def test_neo_removes_a_shift_of_all_embeddings(x):
    model, shift = Embedding(), torch.tensor([3.0, -1.0, 0.5, 20.0], dtype=torch.float64)
    plain, shifted = baselines.Neo(model), baselines.Neo(model)
    for batch in x.split((4, 2)):
        torch.testing.assert_close(shifted(batch + shift), plain(batch))


@torch.no_grad()
def test_neo_starts_again_with_a_reset(x):
    neo = baselines.Neo(Embedding())
    first, second = neo(x), neo(x + 1)
    assert not torch.allclose(neo(x), first)
    neo.reset()
    assert torch.equal(neo(x), first)
    assert torch.equal(neo(x + 1), second)


def timms(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **({"img_size": 32} if name.startswith("vit") else {}))  # in training mode


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "digits"])
@torch.no_grad()
def test_neo_centres_the_logits_of_timms_models(name):
    """A linear layer's answer to centred embeddings is its answer to the plain ones, less their mean so far, plus the bias."""
    model = zoo.load_model("digits") if name == "digits" else timms(name)
    nn.init.normal_(model.get_classifier().weight)
    nn.init.normal_(model.get_classifier().bias)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)) + 1
    neo = baselines.Neo(model)
    found = [neo(batch) for batch in images.split((2, 6))]
    logits, bias = model.eval()(images), model.get_classifier().bias
    torch.testing.assert_close(found[0], logits[:2] - logits[:2].mean(0) + bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], logits[2:] - logits.mean(0) + bias, rtol=1e-4, atol=1e-4)
