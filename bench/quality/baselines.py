"""Test-time adaptation without a diffusion model, written from the papers: TENT, EATA, SAR, CoTTA, MEMO, NEO and batch statistics.

Each baseline wraps a copy of a classifier. It takes normalised images [B, 3, H, W], returns logits [B, K], and adapts as it goes. reset()
restores the source weights and the random generator. A batch is answered before the update on it, except by MEMO, which adapts to each
image and answers afterwards, and by NEO, whose mean includes the current batch. Settings are those of the papers, except for the learning
rates, which bench/quality chooses on validation images, and EATA's optimizer (Adam, as for TENT). Constants that depend on the number of
classes are those for ten classes, or are scaled to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Augment = Callable[[Tensor, torch.Generator], Tensor]  # takes images and a random generator


def entropy(logits: Tensor) -> Tensor:
    """Returns the entropy of softmax(logits [B, K]) in nats: [B]."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def norm_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the scales and shifts of the normalisation layers."""
    layers = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    return [p for layer in layers for p in layer.parameters(recurse=False)]


def use_batch_statistics(model: nn.Module) -> None:
    """Makes batch norm normalise by the statistics of the batch instead of the training's, as TENT, EATA, SAR and CoTTA do."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None


class Baseline:
    """A copy of the model. `optimizer` updates the parameters in `moving`, and `generator` makes all random draws."""

    batch_statistics = False  # whether batch norm uses the statistics of the batch

    def __init__(self, model: nn.Module, lr: float, seed: int = 0) -> None:
        self.source, self.lr, self.seed = model, lr, seed
        self.reset()

    def reset(self) -> None:
        """Restores the source weights, empties the memory, and restarts the random draws."""
        self.generator = torch.Generator().manual_seed(self.seed)
        self.restore()

    def restore(self) -> None:
        """Restores the source weights and empties the memory; the random draws continue."""
        self.model = copy.deepcopy(self.source).eval().requires_grad_(False)
        if self.batch_statistics:
            use_batch_statistics(self.model)
        self.moving = self.chosen()
        for p in self.moving:
            p.requires_grad_(True)
        self.optimizer = self.make_optimizer()

    def chosen(self) -> list[nn.Parameter]:
        return norm_parameters(self.model)

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.moving, lr=self.lr)

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def __call__(self, images: Tensor) -> Tensor:
        raise NotImplementedError


class Source(Baseline):
    """No adaptation."""

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model(images)


class BatchStatistics(Source):
    """Batch norm with the statistics of the batch, and no other change (Schneider et al., NeurIPS 2020, arXiv 2006.16971)."""

    batch_statistics = True


class Tent(Baseline):
    """Entropy minimisation of the normalisation layers (Wang et al., ICLR 2021, arXiv 2006.10726)."""

    batch_statistics = True

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        self.step(entropy(logits).mean())
        return logits.detach()


class Eata(Baseline):
    """Entropy minimisation of reliable and non-redundant samples, weighted, without forgetting (Niu et al., ICML 2022, arXiv 2204.02610).

    fisher: the diagonal Fisher information of the moving parameters, by fisher_information().
    """

    MARGIN = 0.4  # E0 = 0.4 ln K, the paper's for every benchmark
    batch_statistics = True
    REDUNDANT = 0.4  # ε, limit of the cosine: the authors' for CIFAR-10 (ImageNet 0.05)
    FORGETTING = 1.0  # β, fisher_alpha in the authors' code: theirs for CIFAR-10 (ImageNet 2000)
    MOMENTUM = 0.1  # the paper's weight of the new mean

    def __init__(self, model: nn.Module, lr: float, fisher: list[Tensor]) -> None:
        self.fisher = fisher
        super().__init__(model, lr)

    def restore(self) -> None:
        super().restore()
        self.start = [p.detach().clone() for p in self.moving]
        self.average: Tensor | None = None  # of the probabilities that it has learned from

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        uncertainty, limit = entropy(logits), self.MARGIN * math.log(logits.shape[1])
        used, probabilities = uncertainty.detach() < limit, logits.detach().softmax(1)
        if self.average is not None:
            used &= F.cosine_similarity(self.average[None], probabilities).abs() < self.REDUNDANT
        if used.any():
            mean = probabilities[used].mean(0)
            self.average = mean if self.average is None else (1 - self.MOMENTUM) * self.average + self.MOMENTUM * mean
            weights = (limit - uncertainty.detach()[used]).exp()
            drift = [(f * (p - start).square()).sum() for f, p, start in zip(self.fisher, self.moving, self.start, strict=True)]
            self.step((weights * uncertainty[used]).mean() + self.FORGETTING * torch.stack(drift).sum())
        return logits.detach()


def fisher_information(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns the mean squared gradient of the log-likelihood of the model's own answers, for the parameters of the norm layers."""
    model = copy.deepcopy(model).eval()
    moving = norm_parameters(model)
    total = [torch.zeros_like(p) for p in moving]
    for image in images:
        logits = model(image[None])
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), moving)
        torch._foreach_addcmul_(total, gradients, gradients)
    return [f / len(images) for f in total]


class Sar(Baseline):
    """Sharpness-aware minimisation of the entropy of reliable samples, restarted when it collapses (Niu et al., ICLR 2023, arXiv
    2302.12400)."""

    MARGIN = 0.4  # E0 = 0.4 ln K, EATA's
    batch_statistics = True
    RADIUS = 0.05  # ρ, the paper's
    COLLAPSED = 0.2 / math.log(1000)  # the paper's 0.2 nats are for ImageNet's 1000 classes: as a share of ln K
    MOMENTUM = 0.1  # the paper's weight of the new loss, 0.9 being the old's

    def restore(self) -> None:
        super().restore()
        self.average: float | None = None

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.moving, lr=self.lr, momentum=0.9)

    def __call__(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        uncertainty, limit = entropy(logits), self.MARGIN * math.log(logits.shape[1])
        used = uncertainty.detach() < limit
        if not used.any():
            return logits.detach()
        gradients = torch.autograd.grad(uncertainty[used].mean(), self.moving)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        ascent = [g * (self.RADIUS / (norm + 1e-12)) for g in gradients]
        with torch.no_grad():
            torch._foreach_add_(self.moving, ascent)
        there = entropy(self.model(images))[used]  # of the whole batch, whose statistics batch norm takes
        kept = there.detach() < limit
        loss = there[kept].mean() if kept.any() else None
        gradients = torch.autograd.grad(loss, self.moving) if loss is not None else ()
        with torch.no_grad():
            torch._foreach_sub_(self.moving, ascent)
        if loss is not None:
            for p, gradient in zip(self.moving, gradients, strict=True):
                p.grad = gradient
            self.optimizer.step()
            value = float(loss.detach())
            self.average = value if self.average is None else (1 - self.MOMENTUM) * self.average + self.MOMENTUM * value
            if self.average < self.COLLAPSED * math.log(logits.shape[1]):
                self.restore()
        return logits.detach()


class Cotta(Baseline):
    """A student that learns from its moving average, which sees augmented images if the source is unsure; some weights are restored at
    random (Wang et al., CVPR 2022, arXiv 2203.13591). All parameters move."""

    batch_statistics = True
    TEACHER, RESTORE, SURE, VIEWS = 0.999, 0.01, 0.92, 32  # the authors' for CIFAR-10-C

    def __init__(self, model: nn.Module, lr: float, augment: Augment, seed: int = 0) -> None:
        self.augment = augment
        super().__init__(model, lr, seed)

    def chosen(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def restore(self) -> None:
        super().restore()
        self.teacher, self.anchor = (copy.deepcopy(self.model).requires_grad_(False) for _ in range(2))

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(images)
            if float(self.anchor(images).softmax(1).amax(1).mean()) < self.SURE:
                target = torch.stack([self.teacher(self.augment(images, self.generator)) for _ in range(self.VIEWS)]).mean(0)
        self.step(-(target.softmax(1) * self.model(images).log_softmax(1)).sum(1).mean())
        with torch.no_grad():
            torch._foreach_lerp_(list(self.teacher.parameters()), self.moving, 1 - self.TEACHER)
            for p, start in zip(self.moving, self.source.parameters(), strict=True):
                back = torch.rand(p.shape, generator=self.generator) < self.RESTORE
                p.copy_(torch.where(back, start, p))
        return target


class Memo(Baseline):
    """One step on the entropy of the mean prediction over augmentations of each image (Zhang et al., NeurIPS 2022, arXiv 2110.09506).

    All parameters move. Every image starts from the source weights.
    """

    VIEWS = 32  # the authors' for CIFAR-10

    def __init__(self, model: nn.Module, lr: float, augment: Augment, seed: int = 0) -> None:
        self.augment = augment
        super().__init__(model, lr, seed)

    def chosen(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def make_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.moving, lr=self.lr)

    def __call__(self, images: Tensor) -> Tensor:
        answers = []
        for image in images:
            self.restore()
            mean = self.model(self.augment(image.expand(self.VIEWS, *image.shape), self.generator)).softmax(1).mean(0)
            self.step(-(mean * mean.clamp(min=1e-12).log()).sum())
            with torch.no_grad():
                answers.append(self.model(image[None]))
        return torch.cat(answers)


class Neo(Baseline):
    """Re-centring of the embeddings at the origin, without a gradient (NEO, ICLR 2026, arXiv 2510.05635).

    Keeps the mean of the embeddings of all images since the reset, and subtracts it from a batch's embeddings before the classifier
    layer. An embedding is what enters that layer. The mean includes the batch itself, every image counts the same, and neither the
    source's mean nor a learning rate is used: the authors' NEO layer (github.com/awesomealex1/NEO, neo_layers.py) does the same, and
    their NEO_Continual, a moving average for streams that change, is another method. Since the layer is linear, this subtracts the
    stream's mean from the logits and adds the layer's bias.

    The model is one of timm with a single linear classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, lr=0.0)

    def restore(self) -> None:
        self.model = copy.deepcopy(self.source).eval()
        self.total, self.count = torch.zeros(()), 0  # sum and number of the embeddings

    def __call__(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            embeddings = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
            self.total, self.count = self.total + embeddings.sum(0), self.count + len(embeddings)
            return self.model.get_classifier()(embeddings - self.total / self.count)
