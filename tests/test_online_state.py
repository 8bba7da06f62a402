"""The state of an online session: taken by names into the engine's own memory, or refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from dtta_fast import AdaptConfig, Adapter

CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2, mode="online")


@pytest.fixture
def floats(model, denoiser, images):
    return model.float(), denoiser.float(), images.float()


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers in another layout."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.T.contiguous().T if tensor.ndim == 2 else tensor


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
def test_order_and_layout_of_a_state_change_nothing(floats, optimizer, denoiser_parameters):
    """An update walks weights and optimizer memory side by side: another order would read past their ends."""
    model, denoiser, images = floats
    config = CONFIG.replace(optimizer=optimizer, denoiser_parameters=denoiser_parameters)
    session = Adapter(model, denoiser, config)
    session.adapt(images)
    state = session.state_dict()
    expected = session.adapt(images)
    others = {
        "reversed": {**state, "theta": dict(reversed(state["theta"].items())), "phi": dict(reversed(state["phi"].items()))},
        "sorted": {**state, "theta": dict(sorted(state["theta"].items())), "phi": dict(sorted(state["phi"].items()))},
        "turned": {**state, "theta": {name: turned(p) for name, p in state["theta"].items()}},
        "turned memory": {**state, "theta_slots": [[turned(p) for p in part] for part in state["theta_slots"]]},
    }
    for kind, other in others.items():
        again = Adapter(model, denoiser, config)
        again.load_state_dict(other)
        assert torch.equal(again.adapt(images).outputs, expected.outputs), kind


def test_a_session_and_its_caller_share_no_memory(floats):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG)
    session.adapt(images)
    state = session.state_dict()
    kept = copy.deepcopy(state)
    session.load_state_dict(state)
    expected = session.adapt(images)
    for weight in [*state["theta"].values(), *session.state_dict()["theta"].values()]:
        weight.fill_(0.5)
    session.load_state_dict(kept)
    assert torch.equal(session.adapt(images).outputs, expected.outputs)


def changes(state: dict) -> dict[str, dict]:
    name, weight = next(iter(state["theta"].items()))
    theta, slots = state["theta"], state["theta_slots"]
    weights = {
        "double": weight.double(),
        "half": weight.half(),
        "whole": weight.long(),
        "complex": weight.to(torch.complex64),
        "sparse": weight.to_sparse(),
        "meta": weight.to("meta"),
        "array": np.asarray(weight),
        "none": None,
        "larger": torch.cat([weight, weight]),
    }
    return {
        **{f"a weight: {kind}": {**state, "theta": {**theta, name: value}} for kind, value in weights.items()},
        **{f"step: {step}": {**state, "step": step} for step in (3, None, torch.tensor(-8), torch.tensor(2**40), torch.tensor(1.0))},
        "step: vector": {**state, "step": torch.tensor([1])},
        "step: bool": {**state, "step": torch.tensor(True)},
        "one weight fewer": {**state, "theta": {key: value for key, value in theta.items() if key != name}},
        "one more": {**state, "theta": {**theta, "more": weight}},
        "theta: none": {**state, "theta": None},
        "theta: list": {**state, "theta": list(theta.values())},
        "slots: none": {**state, "theta_slots": None},
        "slots: one fewer": {**state, "theta_slots": slots[:1]},
        "slots: shorter": {**state, "theta_slots": [part[:-1] for part in slots]},
        "slots: other order": {**state, "theta_slots": [part[::-1] for part in slots]},
        "a field fewer": {key: value for key, value in state.items() if key != "step"},
        "list": list(state.values()),
        "none": None,
        "text": "state",
    }


def test_what_is_no_state_is_refused_and_changes_nothing(floats):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG)
    session.adapt(images)
    state = session.state_dict()
    cases = changes(state)
    assert len(cases) > 20
    for damaged in cases.values():
        with pytest.raises(ValueError, match="state"):
            session.load_state_dict(damaged)
    for name, weight in session.state_dict()["theta"].items():
        assert torch.equal(weight, state["theta"][name])
