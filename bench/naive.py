"""The naive engine: a fair baseline for ours, which follows the schedule of the reference recipe.

It runs in float32 and accumulates gradients over micro-batches of 15 pairs. Every micro-batch runs the classifier and reads the loss with
.item(). For every image, the whole state dict is loaded again and the optimizer is rebuilt. It is written from the paper's description
(arXiv 2311.16102) and from what its reference implementation is known to do.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.dit import DiT

MICRO_BATCH = 15
KNOWN = ("steps", "pairs", "chunk", "denoiser_parameters", "optimizer", "lr", "denoiser_lr", "momentum", "seed")


class Naive:
    """Adapts `model` in place, and the DiT too if config.denoiser_parameters is "all", one image at a time, with SGD or Adam."""

    def __init__(self, model: nn.Module, denoiser: DiT, config: AdaptConfig) -> None:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name not in KNOWN and value != field.default:
                raise ValueError(f"{field.name} is {value!r}; the naive engine knows {', '.join(KNOWN)} alone")
        if config.optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer is {config.optimizer!r}; the naive engine knows sgd and adam")
        self.model, self.denoiser, self.config = model.eval(), denoiser.eval(), config
        self.both = config.denoiser_parameters == "all"
        denoiser.requires_grad_(self.both)
        self.source = copy.deepcopy((model.state_dict(), denoiser.state_dict()))

    def adapt(self, inputs: Tensor, x0: Tensor, timesteps: Tensor, noise: Tensor) -> tuple[Tensor, list[float]]:
        """Adapts to one image; returns the logits [1, K] and the loss of each step.

        inputs [1, 3, H, W], x0 [1, C, h, w], timesteps [steps, P], noise [steps, P, C, h, w].
        """
        config, process = self.config, self.denoiser.process
        self.model.load_state_dict(self.source[0])
        self.denoiser.load_state_dict(self.source[1])
        groups = [{"params": list(self.model.parameters()), "lr": config.lr}]
        if self.both:
            groups.append({"params": list(self.denoiser.network.parameters()), "lr": config.denoiser_lr})
        optimizer = torch.optim.SGD(groups, momentum=config.momentum) if config.optimizer == "sgd" else torch.optim.Adam(groups)
        losses = []
        for t_step, noise_step in zip(timesteps, noise, strict=True):
            optimizer.zero_grad()
            total = 0.0
            for t, eps in zip(t_step.split(MICRO_BATCH), noise_step.split(MICRO_BATCH), strict=True):
                embedding = self.model(inputs).softmax(1) @ self.denoiser.network.y_embedder.embedding_table.weight[:-1]
                a, s = process.table[t, :2].view(-1, 2, 1, 1, 1).unbind(1)
                prediction = self.denoiser(a * x0 + s * eps, t, embedding.expand(len(t), -1))
                loss = F.mse_loss(prediction[:, : eps.shape[1]], eps) * len(t) / len(t_step)
                loss.backward()
                total += loss.item()
            optimizer.step()
            losses.append(total)
        with torch.no_grad():
            return self.model(inputs), losses
