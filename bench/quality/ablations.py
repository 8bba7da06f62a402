"""The paper's two ablations on the recipe's own settings, at 20 pairs instead of 180.

The estimator: one random (t, ε) pair, many timesteps with one noise, each its own noise, the diffusion model adapting too. The
parameters: a classifier of random weights, free logits without and with the classifier, norm layers, last layer; the whole classifier and
the diffusion model too are rows of the estimator already.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from methods import SINGLE, Answer, Method, Run, Setting, bound, by_adapter, model_inputs
from torch import Tensor, nn

from dtta_fast import AdaptConfig, presets

BATCH = 50
RECIPE = presets.PAPER.replace(pairs=20, denoiser_parameters="frozen")
BOTH = RECIPE.replace(denoiser_parameters="all")
FREE = RECIPE.replace(parameters="logits", optimizer="adam", lr=0.3)  # logits take steps of logits' size


class Undecided(nn.Module):
    """Equal logits for every class, of a classifier's number: where free logits start that know nothing."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.pretrained_cfg = classifier.pretrained_cfg

    def forward(self, images: Tensor) -> Tensor:
        return 0 * self.classifier(images)


def with_model(config: AdaptConfig, change: Callable[[nn.Module], nn.Module]) -> Callable[[Setting], tuple[Run, Callable[[], None]]]:
    """by_adapter for a model made of the setting's."""
    return lambda setting: by_adapter(config)(setting._replace(model=change(setting.model)))


def random_weights(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return fresh


def free_and_classifier(setting: Setting) -> tuple[Run, Callable[[], None]]:
    """The mean of the probabilities of free logits that know nothing and of the classifier."""
    free, reset = with_model(FREE, Undecided)(setting)
    own = bound(setting)

    def run(images: Tensor, ids: Tensor) -> Answer:
        found = free(images, ids)
        with torch.no_grad():
            logits = own.model(model_inputs(own, images))
        return found._replace(logits=torch.logaddexp(found.logits.log_softmax(1), logits.log_softmax(1)))

    return run, reset


ABLATIONS: dict[str, Method] = {
    "one (t, noise) pair": Method(by_adapter(RECIPE.replace(pairs=1, common_draws=True)), BATCH, SINGLE, "estimator"),
    "20 timesteps, one noise": Method(by_adapter(RECIPE.replace(share_noise=True)), BATCH, SINGLE, "estimator"),
    "20 timesteps, each its noise (whole classifier)": Method(by_adapter(RECIPE), BATCH, SINGLE, "estimator"),
    "classifier and diffusion model": Method(by_adapter(BOTH), 4, SINGLE, "estimator"),
    "classifier of random weights": Method(with_model(RECIPE, random_weights), BATCH, SINGLE, "parameters"),
    "free logits": Method(with_model(FREE, Undecided), BATCH, SINGLE, "parameters"),
    "free logits and classifier, ensemble": Method(free_and_classifier, BATCH, SINGLE, "parameters"),
    "free logits from the classifier's": Method(by_adapter(FREE), BATCH, SINGLE, "parameters"),
    "norm layers": Method(by_adapter(RECIPE.replace(parameters="norm")), BATCH, SINGLE, "parameters"),
    "last layer": Method(by_adapter(RECIPE.replace(parameters="head")), BATCH, SINGLE, "parameters"),
}
