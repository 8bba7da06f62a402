"""Every bad argument is named, and nothing has changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dtta_fast import AdaptConfig, Adapter, adapt, presets, zoo
from dtta_fast.tasks import Classification

CONFIG = AdaptConfig(steps=2, pairs=2)


class Tupled(nn.Linear):
    """Returns what some detectors and language models return."""

    def __init__(self) -> None:
        super().__init__(768, 7)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:  # type: ignore[override]
        return (super().forward(x.flatten(1)),)


class Squeezed(nn.Linear):
    """Loses the images' dimension when there is one image."""

    def __init__(self) -> None:
        super().__init__(768, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(1)).squeeze()


ARGUMENTS = {
    "three dimensions": ({"images": torch.rand(3, 16, 16)}, ValueError, "images has shape"),
    "empty batch": ({"images": torch.rand(0, 3, 16, 16)}, ValueError, "images has shape"),
    "an array": ({"images": [1]}, TypeError, "images is, or contains, an object of type int"),
    "integers": ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.int32)}, ValueError, "images has dtype"),
    "NaN": ({"images": torch.full((2, 3, 16, 16), float("nan"))}, ValueError, "images holds NaN"),
    "normalised": ({"images": torch.randn(2, 3, 16, 16)}, ValueError, "not normalised"),
    "another device": ({"images": torch.rand(2, 3, 16, 16, device="meta")}, ValueError, "images is on meta and the model on cpu"),
    "ids' shape": ({"image_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "image_ids is"),
    "ids' dtype": ({"image_ids": torch.zeros(2)}, ValueError, "image_ids is"),
    "negative ids": ({"image_ids": torch.tensor([0, -1])}, ValueError, "image_ids lies"),
    "one channel": ({"images": torch.rand(2, 1, 16, 16)}, ValueError, "images has shape"),
    "ids as a list of floats": ({"image_ids": [0.5, 1.0]}, TypeError, "image_ids holds float; give whole numbers"),
    "noise as an array": ({"noise": np.zeros(3)}, TypeError, "noise is a ndarray"),
    "timesteps elsewhere": ({"timesteps": torch.zeros(2, 2, 2, dtype=torch.int64, device="meta")}, ValueError, "timesteps is on meta"),
    "latents' size": ({"latents": torch.zeros(2, 3, 8, 8)}, ValueError, "latents has shape"),
    "latents' batch": ({"latents": torch.zeros(3, 3, 16, 16)}, ValueError, "latents has shape"),
    "latents with NaN": ({"latents": torch.full((2, 3, 16, 16), float("inf"))}, ValueError, "latents"),
    "timesteps' shape": ({"timesteps": torch.zeros(2, 3, 2, dtype=torch.int64)}, ValueError, "timesteps is"),
    "timesteps' dtype": ({"timesteps": torch.zeros(2, 2, 2)}, ValueError, "timesteps is"),
    "timesteps' range": ({"timesteps": torch.full((2, 2, 2), 1000)}, ValueError, "timesteps lies in 1000"),
    "noise's shape": ({"noise": torch.zeros(2, 2, 2, 3, 16, 15)}, ValueError, "noise is"),
    "noise with NaN": ({"noise": torch.full((2, 2, 2, 3, 16, 16), float("nan"))}, ValueError, "noise holds NaN"),
    "config": ({"config": "FAST"}, TypeError, "config is a str"),
    "range beyond the process": ({"config": CONFIG.replace(timestep_range=(0, 1001))}, ValueError, "timestep_range is"),
    "denoiser": ({"denoiser": nn.Linear(1, 1)}, TypeError, "denoiser is a Linear"),
    "model": ({"model": lambda x: x}, TypeError, "model is a function"),
    "no norm layer": ({"model": nn.Linear(16, 7), "config": CONFIG.replace(parameters="norm")}, ValueError, "has none of that kind"),
    "other classes": ({"model": nn.Sequential(nn.Flatten(), nn.Linear(768, 5))}, ValueError, "model has 5 classes"),
    "a tuple of outputs": ({"model": Tupled()}, ValueError, "model returns a tuple"),
    "task": ({"task": "classification"}, TypeError, "task is 'classification'"),
    "no dimension of images": ({"model": Squeezed()}, ValueError, r"model returns shape \(2, 7\) for 2 images and \(7,\) for 1; keep"),
    "no logits": ({"model": nn.Conv2d(3, 7, 1)}, ValueError, "model returns shape"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_arguments(model, denoiser, untouched, case, mode):
    change, error, message = ARGUMENTS[case]
    given = {"model": model.float(), "denoiser": denoiser.float(), "images": torch.rand(2, 3, 16, 16), "config": CONFIG, **change}
    if isinstance(given["config"], AdaptConfig):
        given["config"] = given["config"].replace(mode=mode)
    with untouched(model, denoiser), pytest.raises(error, match=message):
        adapt(given.pop("model"), given.pop("denoiser"), given.pop("images"), **given)


def test_an_online_adapter_keeps_its_state(model, denoiser):
    adapter = Adapter(model.float(), denoiser.float(), CONFIG.replace(mode="online"))
    adapter.adapt(torch.rand(2, 3, 16, 16))
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="NaN"):
        adapter.adapt(torch.full((2, 3, 16, 16), float("nan")))
    after = adapter.state_dict()
    leaves = [torch.utils._pytree.tree_leaves(state) for state in (before, after)]
    assert len(leaves[0]) > 10
    assert all(torch.equal(*pair) for pair in zip(*leaves, strict=True))


FIELDS = {
    "steps": [0, -1, 2.5, True, "5"],
    "pairs": [0, None],
    "chunk": [0, "many"],
    "loss": ["huber"],
    "timesteps": ["random"],
    "timestep_range": [(5,), (5, 5), (7, 3), (-1, 3), (0.5, 3)],
    "top_k": [0, 1.5],
    "logit_scale": [0, -1.0, float("nan")],
    "parameters": ["lora "],
    "denoiser_parameters": ["some"],
    "optimizer": ["lion"],
    "lr": [-1.0, float("inf"), "fast"],
    "denoiser_lr": [-1.0],
    "momentum": [-0.1, 1.5],
    "weight_decay": [float("nan")],
    "mode": ["batch"],
    "guard": [-1, 1.0],
    "guard_threshold": [-1.0],
    "seed": [-1, 2**63],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_config_fields(field, value):
    with pytest.raises(ValueError, match=rf"{field} is .*; allowed: "):
        AdaptConfig(**{field: value})


def test_unknown_names():
    with pytest.raises(ValueError, match="AdaptConfig has no field 'speed'"):
        presets.FAST.replace(speed=1)
    with pytest.raises(TypeError, match="speed"):
        AdaptConfig(speed=1)
    with pytest.raises(ValueError, match="preset is 'SLOW'; choose one of PAPER, FAST"):
        presets.get("SLOW")
    with pytest.raises(ValueError, match="name is 'letters'; the zoo has digits"):
        zoo.load("letters")
    with pytest.raises(ValueError, match="a standard error takes 2 pairs"):
        AdaptConfig(guard=1, guard_threshold=1.0)
    with pytest.raises(ValueError, match="free logits belong to one image"):
        AdaptConfig(mode="online", parameters="logits")


def test_a_model_without_gradient_is_named(model, denoiser, images):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = model

        @torch.no_grad()
        def forward(self, x):
            return self.own(x)

    with pytest.raises(ValueError, match=r"model is a Detached whose outputs carry no gradient to its .all. parameters; take"):
        adapt(Detached(), denoiser, images, config=AdaptConfig(steps=1, pairs=2))


def test_a_task_s_class_is_no_task(model, denoiser):
    with pytest.raises(TypeError, match=r"task is <class .*Classification'>; give a Task"):
        Adapter(model, denoiser, AdaptConfig(steps=1, pairs=2), Classification)


def test_weights_that_no_gradient_reaches_are_named(denoiser, images):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.count = nn.Parameter(torch.zeros(7, dtype=torch.int64), requires_grad=False)

        def forward(self, x):
            return x.new_zeros(len(x), 7) + self.count

    with pytest.raises(ValueError, match=r"model parameter count has dtype torch\.int64, which no gradient reaches"):
        adapt(Counting(), denoiser, images, config=AdaptConfig(steps=1, pairs=2))
