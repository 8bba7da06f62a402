"""What happens to modules, memory and other users of torch between the calls of a session."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.core import lora as lora_module
from dtta_fast.core.guard import held_out_losses
from dtta_fast.core.loss import pair_losses
from dtta_fast.core.problem import Schedule
from dtta_fast.kernels import Pairs
from dtta_fast.runtime.failures import out_of_memory

CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2)


@pytest.fixture
def floats(model, denoiser, images):
    return model.float(), denoiser.float(), images.float()


class InPlace(nn.Module):
    """Writes to its input and to a buffer, as some models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros(1))
        self.pretrained_cfg = inner.pretrained_cfg

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(0.5)
        self.seen.add_(1)
        return self.inner(x) + self.seen.to(x.dtype) * torch.arange(7, device=x.device)


def test_measuring_memory_touches_neither_the_batch_nor_buffers(model, denoiser, images, monkeypatch):
    session = Adapter(InPlace(model), denoiser, CONFIG.replace(memory_budget=2**32))
    given = torch.stack([image * 2 - 1 for image in images])
    forward = type(denoiser).forward
    monkeypatch.setattr(type(denoiser), "forward", lambda self, x_t, *others: forward(self, x_t.mul_(0.5), *others))
    first, second = (session.adapt(images, latents=given) for _ in range(2))
    assert torch.equal(first.outputs, second.outputs)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(given, torch.stack([image * 2 - 1 for image in images]))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_denoiser_that_was_trained_by_a_fused_optimizer_is_cast_anew(floats, kind):
    """torch does not count the writes of fused optimizers."""
    model, denoiser, images = floats
    config = CONFIG.replace(precision="bf16")
    session = Adapter(model, denoiser, config)
    first = session.adapt(images)
    optimizer = kind(denoiser.parameters(), lr=1e-2, fused=True)
    for parameter in denoiser.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = session.adapt(images)
    assert not torch.equal(found.loss, first.loss)
    assert torch.equal(found.loss, Adapter(model, denoiser, config).adapt(images).loss)


def test_a_warm_up_of_a_guard_that_does_not_fit_into_a_forward(floats):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG.replace(guard=96))
    session.engine.program.problem = dataclasses.replace(session.engine.program.problem, row_counts="few")
    session.warmup(images)
    assert session.engine.program.schedule.guard_rows < 96
    assert session.adapt(images).steps_run == 2


def test_storage_is_as_small_as_the_images_that_fit(floats):
    """Where memory runs out, what was made for the whole batch is given up."""
    model, denoiser, images = floats

    def full(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("injected")

    denoiser.network.blocks[0].register_forward_pre_hook(full)
    session = Adapter(model, denoiser, CONFIG.replace(guard=0))
    session.adapt(images)
    kept = [len(p) for state in session.engine.program._storage.values() for p in state.theta.values()]
    assert kept
    assert max(kept) <= 2


@pytest.mark.parametrize("rows", [[24], [8, 8, 8], [16, 16], [7, 7, 7, 7], [24, 8], [40]])
@pytest.mark.parametrize("shared", [True, False])
def test_losses_do_not_depend_on_the_forwards(floats, rows, shared):
    _, denoiser, images = floats
    x0, ids = denoiser.encode(images), torch.arange(4)
    drawn = Pairs(x0, denoiser.process.table, torch.arange(24).view(4, 6) * 40, ids, 3, torch.tensor(1))
    conditions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    expected = pair_losses(denoiser, conditions, drawn, l1=False)
    found = pair_losses(denoiser, conditions, drawn, l1=False, forwards=rows, shared=shared)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_condition_is_not_repeated_for_the_rows_of_whole_images(floats):
    _, denoiser, images = floats
    session = Adapter(*floats[:2], CONFIG.replace(guard=6))
    problem = dataclasses.replace(session.engine.program.problem, row_counts="few")
    given: list[tuple[int, int]] = []
    problem.denoiser.register_forward_pre_hook(lambda _, inputs: given.append((len(inputs[0]), len(inputs[2]))))
    held_out_losses(problem, Schedule(guard_rows=12), torch.randn(4, 32), denoiser.encode(images), torch.arange(4), torch.tensor(0))
    assert given == [(12, 2), (12, 2)]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Triton Error [CUDA]: out of memory",
        "[enforce fail at alloc_cpu.cpp:125] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Error code 12",
        "std::bad_alloc",
    ],
)
def test_memory_that_runs_out_is_known_by_all_its_names(text):
    assert out_of_memory(RuntimeError(text))
    assert not out_of_memory(ValueError(text))
    assert not out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_bad_values_in_a_call_leave_what_a_session_knows_of_its_speed(floats):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG)
    session.warmup(images)
    expected = session.engine.paces.of(4, None).step.expected
    assert expected > 0
    latents = denoiser.encode(images)
    with pytest.raises(ValueError, match="latents"):
        session.adapt(images, latents=latents * torch.nan)
    assert session.engine.paces.of(4, None).step.expected == expected


def test_new_adapters_leave_every_generator_alone(floats, monkeypatch):
    model, denoiser, images = floats
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(11)
    seeded.clear()
    before = torch.get_rng_state()
    config = CONFIG.replace(denoiser_parameters="lora", lora_targets=("qkv",), seed=5)
    first = adapt(model, denoiser, images, config=config)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
    torch.manual_seed(12)
    again = adapt(model, denoiser, images, config=config)
    assert torch.equal(first.outputs, again.outputs)
    assert lora_module.weight_names(Adapter(model, denoiser, config).engine.program.problem.denoiser)


def test_a_session_follows_its_modules_to_another_device(floats):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG)
    session.adapt(images)
    for module in (model, denoiser):
        module.to("meta")
    denoiser.process = denoiser.process.to("meta")
    session.engine.refresh()
    assert session.engine.device.type == "meta"
    assert session.engine.program.problem.lr.device.type == "meta"


def test_a_session_that_a_signal_broke_off_in_mid_swap_is_made_anew(floats, monkeypatch):
    """A handler may raise at any line, also while adapted weights are in place of the source's."""
    from torch.nn.utils._named_member_accessor import NamedMemberAccessor

    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG)
    expected = session.adapt(images[:1])
    whole, calls = NamedMemberAccessor.swap_tensors_dict, [0]

    def swap(self, *arguments, **keywords):
        found = whole(self, *arguments, **keywords)
        calls[0] += 1
        if calls[0] == 7:
            raise TimeoutError
        return found

    monkeypatch.setattr(NamedMemberAccessor, "swap_tensors_dict", swap)
    with pytest.raises(TimeoutError):
        session.adapt(images[:1])
    monkeypatch.undo()
    found = session.adapt(images[:1])
    assert torch.equal(found.outputs_before, expected.outputs_before)
    assert torch.equal(found.outputs, expected.outputs)


def test_a_timeout_in_the_trial_of_vmap_is_the_caller_s(floats, monkeypatch):
    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG)
    monkeypatch.setattr(torch, "vmap", lambda *_, **__: (_ for _ in ()).throw(TimeoutError))
    with pytest.raises(TimeoutError):
        session.adapt(images)
    monkeypatch.undo()
    assert torch.equal(session.adapt(images).outputs, adapt(model, denoiser, images, config=CONFIG).outputs)
    assert not session.engine.program.problem.loop


def test_weights_of_another_shape_or_layout_in_the_same_memory_are_seen(floats):
    _, denoiser, images = floats
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 7))
    session = Adapter(model, denoiser, CONFIG)
    session.adapt(images)
    model[2].weight.data = model[2].weight.data.t()
    assert torch.equal(session.adapt(images).outputs, adapt(model, denoiser, images, config=CONFIG).outputs)
    model[3].weight.data, model[3].bias.data = model[3].weight.data[:5], model[3].bias.data[:5]
    with pytest.raises(ValueError, match="model has 5 classes"):
        session.adapt(images)


@pytest.mark.parametrize("parameters", ["all", "head"])
def test_what_was_made_under_inference_mode_works_outside(images, parameters):
    from diffusers import DDPMScheduler

    from dtta_fast.denoisers.dit import DiT
    from dtta_fast.denoisers.dit_network import DiTNetwork
    from dtta_fast.denoisers.noise_process import NoiseProcess

    def made():
        torch.manual_seed(0)
        network = DiTNetwork(16, 4, 3, 32, 2, 2, num_classes=7, learn_sigma=False)
        model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 7))
        return model, DiT(network, NoiseProcess.from_scheduler(DDPMScheduler(100)))

    config, images = CONFIG.replace(parameters=parameters), images.float()
    with torch.inference_mode():
        model, denoiser = made()
        session = Adapter(model, denoiser, config)
    found = session.adapt(images)
    torch.testing.assert_close(found.outputs, adapt(*made(), images, config=config).outputs)
    assert torch.equal(session.adapt(images).outputs, found.outputs)


def test_cached_parametrizations_are_refused(floats):
    with torch.nn.utils.parametrize.cached(), pytest.raises(RuntimeError, match=r"parametrize\.cached"):
        adapt(*floats, config=CONFIG)


def test_a_copy_waits_for_the_call_of_another_thread(floats):
    import copy
    import threading

    model, denoiser, images = floats
    session = Adapter(model, denoiser, CONFIG)
    expected = session.adapt(images)
    inside = threading.Event()
    session.engine.program.problem.model.register_forward_pre_hook(lambda *_: inside.set())
    thread = threading.Thread(target=session.adapt, args=(images,))
    thread.start()
    assert inside.wait(60)
    other = copy.deepcopy(session)
    thread.join()
    assert torch.equal(other.adapt(images).outputs, expected.outputs)


@pytest.mark.parametrize("sizes", [(64, 64, 16, 16), (37, 50, 16, 12), (8, 8, 16, 16), (16, 32, 16, 16)])
def test_maps_are_resized_as_interpolation_does(sizes):
    from types import SimpleNamespace

    from dtta_fast.denoisers.base import at_latent_size

    height, width, *latent = sizes
    maps = torch.rand(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    found = at_latent_size(maps, SimpleNamespace(latent_shape=(4, *latent)))
    expected = torch.nn.functional.interpolate(maps, tuple(latent), mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand_like(found)
    gradients = [torch.autograd.grad((resized * weights).sum(), maps, retain_graph=True)[0] for resized in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)
