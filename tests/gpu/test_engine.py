"""Every way to adapt gives the same on the device and on the CPU. In float64 they have to agree in every decision."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.tasks import Classification

pytestmark = pytest.mark.gpu
# float32 holds these learning rates exactly: the GPU's optimizers take float32 rates, the CPU's float64
CONFIG = AdaptConfig(steps=3, pairs=6, lr=2**-7, denoiser_lr=2**-10, guard=3)
IDS = torch.tensor([10, 2**32 - 1, 7])
LORA = {"parameters": "lora", "lora_rank": 2, "lr": 0.125}

WAYS = {
    "adam": {},
    "sgd, decay, no guard": {"optimizer": "sgd", "lr": 0.5, "weight_decay": 0.01, "guard": 0},
    "adamw, decay, strict guard": {"optimizer": "adamw", "weight_decay": 0.1, "guard": 8, "guard_threshold": 1.0},
    "norm layers": {"parameters": "norm"},
    "head": {"parameters": "head"},
    "logits": {"parameters": "logits", "lr": 0.25},
    "lora": LORA,
    "denoiser adapts": {"denoiser_parameters": "all"},
    "both by lora": {**LORA, "denoiser_parameters": "lora"},
    "chunks": {"chunk": 4},
    "memory budget": {"memory_budget": 2 * 10**6},
    "l1, top classes, opposite noises": {"loss": "l1", "top_k": 3, "logit_scale": 5.0, "antithetic": True},
    "drawn classes, one noise": {"top_k": 2, "drawn_classes": 2, "share_noise": True, "common_draws": True},
    "uniform in a range": {"timesteps": "uniform", "timestep_range": (100, 700)},
    "noise mixing": {"objective": "noise_mix", "top_k": 3, "pairs": 2},
    "noise mixing, null condition": {
        "objective": "noise_mix",
        "top_k": 2,
        "drawn_classes": 1,
        "pairs": 2,
        "null_condition": True,
        "denoiser_parameters": "all",
    },
}
CONVOLUTIONS = ("adam", "norm layers", "memory budget")  # a ConvNeXt takes these, and a ViT the others


NUMBERS, DECISIONS = ("outputs_before", "outputs", "loss"), ("predictions", "predictions_before", "accepted", "evaluations")


def assert_same(found, expected) -> None:
    """The tolerance is far below any effect of an adaptation and far above float64's rounding. Decisions are equal."""
    for name in NUMBERS:
        own, other = (getattr(result, name).cpu() for result in (found, expected))
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    for name in DECISIONS:
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name).cpu()), name


def joined(results) -> SimpleNamespace:
    """Results of single images as one."""
    return SimpleNamespace(**{name: torch.cat([getattr(one, name) for one in results]) for name in (*NUMBERS, *DECISIONS)})


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_on_the_device_is_its_images_on_the_cpu(model, vit, denoiser, images, moved, device, way):
    config, images = CONFIG.replace(**WAYS[way]), images[:3]
    model = model if way in CONVOLUTIONS else vit
    reference = Adapter(model, denoiser, config.replace(chunk=2, memory_budget=None))
    expected = joined([reference.adapt(images[i : i + 1], image_ids=IDS[i : i + 1]) for i in range(3)])
    found = adapt(*moved(device, torch.float64, model, denoiser, images), config=config, image_ids=IDS.to(device))
    assert_same(found, expected)
    assert found.outputs.device.type == device
    assert float((expected.outputs - expected.outputs_before).abs().max()) > 1e-3  # it did adapt


def test_online_on_the_device_is_online_on_the_cpu(vit, denoiser, images, moved, device):
    """The second and third batch start from moved weights and a filled optimizer."""
    config = CONFIG.replace(mode="online", steps=2, denoiser_parameters="all")
    reference = Adapter(vit, denoiser, config.replace(chunk=2))
    *modules, there = moved(device, torch.float64, vit, denoiser, images)
    session = Adapter(*modules, config)
    for rows in (slice(0, 2), slice(1, 4), slice(2, 4)):
        ids = torch.arange(rows.start, rows.stop) + 100
        assert_same(session.adapt(there[rows], image_ids=ids.to(device)), reference.adapt(images[rows], image_ids=ids))
    states = [adapter.state_dict()["theta"] for adapter in (session, reference)]
    for name, weight in states[1].items():
        torch.testing.assert_close(states[0][name].cpu(), weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["diffusion_classifier", "posterior"])
def test_methods_without_steps(vit, denoiser, images, moved, device, method):
    config = CONFIG.replace(method=method, steps=2, guard=0, guard_threshold=1.0, top_k=4)
    expected = adapt(vit, denoiser, images, config=config.replace(chunk=2))
    found = adapt(*moved(device, torch.float64, vit, denoiser, images), config=config)
    assert_same(found, expected)
    assert len(set(expected.evaluations.tolist())) > 1  # different numbers of classes fell out


def test_given_draws_and_latents(vit, denoiser, images, moved, device):
    generator = torch.Generator().manual_seed(5)
    given = {
        "timesteps": torch.randint(1000, (4, 3, 5), generator=generator),
        "noise": torch.randn(4, 3, 5, 3, 16, 16, generator=generator, dtype=torch.float64),
        "latents": 2 * images.flip(0) - 1,
    }
    expected = adapt(vit, denoiser, images, config=CONFIG, **given)
    found = adapt(*moved(device, torch.float64, vit, denoiser, images), config=CONFIG, **{k: v.to(device) for k, v in given.items()})
    assert_same(found, expected)
    assert not torch.equal(expected.outputs, adapt(vit, denoiser, images, config=CONFIG).outputs)


def test_a_subset_of_the_classes_and_images_of_another_size(vit, denoiser, moved, device):
    photos = torch.rand(2, 3, 40, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    task = Classification(subset=[5, 1, 3])
    expected = adapt(vit, denoiser, photos, config=CONFIG, task=task)
    found = adapt(*moved(device, torch.float64, vit, denoiser, photos), config=CONFIG, task=task)
    assert_same(found, expected)
    assert set(found.predictions.tolist()) <= {5, 1, 3}


def test_a_session_takes_batches_of_any_size(vit, denoiser, images, moved, device):
    """The storage of a large batch serves a smaller one, and an image's result is its own."""
    *modules, there = moved(device, torch.float64, vit, denoiser, images)
    session = Adapter(*modules, CONFIG)
    ids = torch.arange(4, device=device)
    whole = session.adapt(there, image_ids=ids)
    for rows in ([2, 0], [3], [1, 1, 0], [3, 2, 1, 0]):
        part = session.adapt(there[rows], image_ids=ids[rows])
        torch.testing.assert_close(part.outputs, whole.outputs[rows], rtol=1e-8, atol=1e-8)
        assert torch.equal(part.accepted, whole.accepted[rows])
        assert torch.equal(part.evaluations, whole.evaluations[rows])


@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
def test_full_float32(model, denoiser, images, moved, device, difference, denoiser_parameters):
    """Here the kernels draw the noise and compute the loss and the mixture. Three steps round to a thousandth of their effect at most, as
    they do among the CPU's own ways to run."""
    config = AdaptConfig(steps=3, pairs=6, optimizer="sgd", lr=0.02, denoiser_lr=0.02, precision="fp32")
    config = config.replace(denoiser_parameters=denoiser_parameters)
    expected = adapt(*moved("cpu", torch.float32, model, denoiser, images), config=config.replace(chunk=2))
    found = adapt(*moved(device, torch.float32, model, denoiser, images), config=config)
    assert difference(found, expected) < 1e-3
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.outputs_before.cpu(), expected.outputs_before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "auto"])
@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_the_same_call_gives_the_same_bits(model, denoiser, images, moved, device, monkeypatch, precision, mode):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)  # some of cuDNN's convolutions add up in any order
    config = CONFIG.replace(precision=precision, mode=mode, denoiser_parameters="all")
    *modules, there = moved(device, torch.float32, model, denoiser, images)
    session = Adapter(*modules, config)
    first = session.adapt(there)
    session.reset()
    again, fresh = session.adapt(there), adapt(*modules, there, config=config)
    for other in (again, fresh):
        assert torch.equal(other.outputs, first.outputs)
        assert torch.equal(other.loss, first.loss)
        assert torch.equal(other.evaluations, first.evaluations)


def test_the_caller_s_modules_and_random_numbers_are_untouched(model, denoiser, images, moved, device, untouched):
    *modules, there = moved(device, torch.float32, model.train(), denoiser, images)
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device == "cuda" else None
    with untouched(*modules), warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(*modules, there, config=CONFIG.replace(denoiser_parameters="all", parameters="all"))
    assert torch.equal(torch.get_rng_state(), state[0])
    if device == "cuda":
        assert torch.equal(torch.cuda.get_rng_state(), state[1])
