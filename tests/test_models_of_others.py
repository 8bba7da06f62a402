"""Models that do what a forward should not: reach another object, write to their input, checkpoint, keep tensors, draw at random."""

from __future__ import annotations

import functools
import re
import warnings
import weakref

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.tasks import Classification

CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2)
REGISTRY: dict[str, nn.Module] = {}


class Net(nn.Module):
    """Normalisation by a BatchNorm, and an inner part, so that there are buffers and layers to patch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


def closure(net: nn.Module) -> nn.Module:
    forward = net.forward
    net.forward = lambda x: forward(x)
    return net


def partial(net: nn.Module) -> nn.Module:
    net.forward = functools.partial(lambda x, to: to(x), to=net.forward)
    return net


def closure_of_a_layer(net: nn.Module) -> nn.Module:
    def patched(x: torch.Tensor, _old=net.features.forward) -> torch.Tensor:
        return _old(x)

    net.features.forward = patched
    return net


def wrapped(net: nn.Module) -> nn.Module:
    @functools.wraps(net.forward)
    def patched(x: torch.Tensor) -> torch.Tensor:
        return patched.__wrapped__(x)

    net.forward = patched
    return net


def hook(net: nn.Module) -> nn.Module:
    net.features.register_forward_hook(lambda *_: net.features[2](net.features[1](net.features[0](_[1][0]))))
    return net


def compiled(net: nn.Module) -> nn.Module:
    net.forward = torch.compile(net.forward, backend="eager")
    return net


class ByReference(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.reference = net, weakref.ref(net)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reference()(x)


@pytest.fixture
def floats(denoiser, images):
    return denoiser.float(), images.float()


@pytest.fixture
def plain(floats):
    return adapt(Net(), *floats, config=CONFIG)


@pytest.mark.parametrize("patch", [closure, partial, closure_of_a_layer, wrapped, hook, compiled, ByReference])
def test_a_patched_forward_adapts_the_copy(floats, plain, untouched, patch):
    net = patch(Net()).train()
    with untouched(net):
        found = adapt(net, *floats, config=CONFIG)
    assert (plain.outputs - plain.outputs_before).abs().max() > 0.01
    torch.testing.assert_close(found.outputs, plain.outputs, rtol=1e-5, atol=1e-5)


def by_name(net: nn.Module) -> nn.Module:
    REGISTRY["net"] = net
    inner = net.forward
    REGISTRY["forward"] = inner
    net.forward = lambda x: REGISTRY["forward"](x)
    return net


def by_an_object(net: nn.Module) -> nn.Module:
    class Callable:
        def __init__(self, function):
            self.function = function

        def __call__(self, x):
            return self.function(x)

    forward = net.forward
    net.forward = Callable(lambda x: forward(x))
    return net


class ByRegistry(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        REGISTRY["net"] = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return REGISTRY["net"](x)


@pytest.mark.parametrize("patch", [by_name, by_an_object, ByRegistry])
def test_a_forward_that_reaches_the_original_is_refused(floats, untouched, patch):
    net = patch(Net()).train()
    with untouched(net), pytest.raises(TypeError, match=r"forward .* reaches the module that you gave and not its copy"):
        adapt(net, *floats, config=CONFIG)


class Hidden(nn.Module):
    """Reaches the original by a way that no search finds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.number = len(REGISTRY)
        REGISTRY[str(self.number)] = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import sys

        return vars(sys.modules[__name__])["REGISTRY"][str(self.number)](x)


def test_a_hidden_way_is_found_by_what_it_does(floats, untouched):
    net = Hidden(Net()).eval()
    with untouched(net), pytest.raises(ValueError, match="no gradient reaches the 'all' parameters"):
        adapt(net, *floats, config=CONFIG.replace(parameters="all"))
    net.train()
    with untouched(net), pytest.raises(RuntimeError, match=r"Hidden was written to during a call, in net.features.1.num_batches_tracked"):
        adapt(net, *floats, config=CONFIG.replace(method="diffusion_classifier", steps=1))


class Writing(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x.sub_(0.5).div_(0.5))


class Normalised(Writing):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net((x - 0.5) / 0.5)


@pytest.mark.parametrize(
    "config", [CONFIG, CONFIG.replace(mode="online"), CONFIG.replace(objective="noise_mix"), CONFIG.replace(parameters="head", guard=4)]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_forward_may_write_to_its_input(floats, config, batch):
    denoiser, images = floats
    images = images[:batch]
    kept = images.clone()
    found = adapt(Writing(Net()), denoiser, images, config=config)
    assert torch.equal(images, kept)
    expected = adapt(Normalised(Net()), denoiser, images, config=config)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-5, atol=1e-5)


def test_a_task_s_functions_and_a_network_may_write_too(floats):
    from dtta_fast.denoisers.dit import DiT
    from dtta_fast.tasks import Classification

    denoiser, images = floats
    config = CONFIG.replace(objective="noise_mix", null_condition=True, denoiser_parameters="all", top_k=1)
    kept = images.clone()
    writing = Classification(crop=lambda x: x.mul_(0.5), normalise=lambda x: x.sub_(0.5))
    plain = Classification(crop=lambda x: x * 0.5, normalise=lambda x: x - 0.5)
    expected = adapt(Net(), denoiser, images, config=config, task=plain)
    inner = denoiser.network.forward
    denoiser.network.forward = lambda x, *others: inner(x.mul_(1.0).add_(1).sub_(1), *others)

    found = adapt(Net(), denoiser, images, config=config, task=writing)
    assert torch.equal(images, kept)
    assert isinstance(denoiser, DiT)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-4, atol=1e-4)


class Checkpointed(Net):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.features, x, use_reentrant=self.reentrant).mean((2, 3)))


class Whole(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=True)


@pytest.mark.parametrize("mode", ["episodic", "online"])
@pytest.mark.parametrize("batch", [1, 3])
def test_checkpointing_in_a_forward_is_refused(floats, batch, mode):
    denoiser, images = floats
    config = CONFIG.replace(mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap cannot take it either
        with pytest.raises(ValueError, match="runs again in the backward, by gradient checkpointing"):
            adapt(Checkpointed(), denoiser, images[:batch], config=config)
        with pytest.raises(ValueError, match="carry no gradient"):
            adapt(Whole(), denoiser, images[:batch], config=config)


def test_switches_of_libraries_are_off_in_the_copy(model, denoiser, images):
    expected = adapt(model, denoiser, images, config=CONFIG)
    model.set_grad_checkpointing(True)
    found = adapt(model, denoiser, images, config=CONFIG)
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-9, atol=1e-9)
    assert any(stage.grad_checkpointing for stage in model.stages)  # the caller's own is as it was


class Keeping(Net):
    """What feature extractors do: the last forward's tensors, in an attribute and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.last: torch.Tensor | None = None
        self.all: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.last is not None:
            x = x + 0 * self.last.mean()
        self.last = self.features(x)
        self.all.append(self.last)
        return self.head(self.last.mean((2, 3))) + 0 * self.all[0].mean()


def test_models_that_keep_tensors_run_image_by_image(floats, plain):
    with pytest.warns(UserWarning, match=r"run one by one: vmap fails \(Keeping.last keeps a tensor of the forward\)"):
        found = adapt(Keeping(), *floats, config=CONFIG)
    torch.testing.assert_close(found.outputs, plain.outputs, rtol=1e-5, atol=1e-5)


class Twice(nn.Module):
    """One layer under two names, as models with a shared embedding or `self.head = net.fc` have it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.head, self.layers = self.net.head, nn.ModuleList([self.net.features[0]] * 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_a_module_under_two_names_is_adapted_once_and_put_back(floats, mode):
    denoiser, images = floats
    config = CONFIG.replace(mode=mode, lr=0.1)
    session, expected = (Adapter(net, denoiser, config) for net in (Twice(), Net()))
    for batch in (images[:1], images[1:2], images):
        found, other = session.adapt(batch), expected.adapt(batch)
        torch.testing.assert_close(found.outputs_before, other.outputs_before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.outputs, other.outputs, rtol=1e-5, atol=1e-5)


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(48, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.head(self.second(torch.tanh(self.first(pooled))))


class TiedByHand(Tied):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.head(F.linear(torch.tanh(self.first(pooled)), self.first.weight))


def test_tied_weights_move_in_both_places(floats):
    found, expected = (adapt(kind(), *floats, config=CONFIG) for kind in (Tied, TiedByHand))
    assert (expected.outputs - expected.outputs_before).abs().max() > 0.01
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-5, atol=1e-5)


class Once(Net):
    def __deepcopy__(self, memo: dict) -> Once:
        return self


class HoldsOne(Net):
    def __init__(self) -> None:
        super().__init__()
        self.features[2] = Once()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features[2](x)


@pytest.mark.parametrize("kind", [Once, HoldsOne])
def test_a_module_that_copies_itself_as_itself_is_refused(floats, untouched, kind):
    net = kind().train()
    with untouched(net), pytest.raises(TypeError, match="Once cannot be copied"):
        adapt(net, *floats, config=CONFIG)


class Handing(nn.Module):
    """Hands attributes through, as wrappers do, and changes the answer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -self.inner(x)


def test_a_wrapper_around_a_compiled_model_stays(floats, plain):
    found = adapt(Handing(torch.compile(Net(), backend="eager")), *floats, config=CONFIG)
    torch.testing.assert_close(found.outputs_before, -plain.outputs_before, rtol=1e-5, atol=1e-5)


def test_statistics_of_the_batch_are_refused(floats):
    net = Net()
    net.features[1] = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match=r"features\.1 normalises by the statistics of the batch"):
        adapt(net, *floats, config=CONFIG)


def test_hooks_that_keep_what_they_see_get_real_tensors(floats, plain):
    seen: list[torch.Tensor] = []
    net = Net()
    net.features.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    with pytest.warns(UserWarning, match=r"run one by one: vmap fails \(a hook of Sequential keeps a tensor"):
        found = adapt(net, *floats, config=CONFIG)
    torch.testing.assert_close(found.outputs, plain.outputs, rtol=1e-5, atol=1e-5)
    assert len(seen) > 4
    assert all(tensor.isfinite().all() for tensor in seen)


class Listing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.weights = [self.head.weight, self.head.bias]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.features(x).mean((2, 3)), *self.weights)


def test_weights_that_are_read_from_a_list_are_told(floats):
    with pytest.warns(UserWarning, match="keeps weights in weights as well as in its parameters"):
        Adapter(Listing(), floats[0], CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Adapter(nn.LSTM(4, 4), floats[0], CONFIG)  # which makes its list anew for each forward


class OneRow(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[:1]


def test_a_row_for_each_image_is_asked_for(floats):
    with pytest.raises(ValueError, match="model returns 1 rows for 4 images"):
        adapt(OneRow(), *floats, config=CONFIG)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_modules_are_refused(floats):
    with pytest.raises(TypeError, match="holds a ScriptModule"):
        adapt(torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(768, 7))), *floats, config=CONFIG)


@pytest.mark.parametrize("wrapped", [False, True])
def test_parallel_modules_are_refused(floats, wrapped):
    parallel = nn.DataParallel(nn.Sequential(nn.Flatten(), nn.Linear(768, 7)))
    with pytest.raises(TypeError, match=r"DataParallel.*\.module"):
        adapt(nn.Sequential(parallel) if wrapped else parallel, *floats, config=CONFIG)


class Dropping(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x), 0.5)


def test_random_numbers_in_a_forward_are_told_once(floats):
    session = Adapter(Dropping(), floats[0], CONFIG)
    with pytest.warns(UserWarning, match="Dropping, draws random numbers in eval mode"):
        session.adapt(floats[1][:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.adapt(floats[1][:1])
        Adapter(Net(), floats[0], CONFIG).adapt(floats[1])


class LessTheMean(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean((0, 2, 3), keepdim=True))


class BatchNormed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, training=True)


class Together(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = super().forward(x)
        return found + found.sum(0, keepdim=True)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (LessTheMean(), "features.0, Conv2d"),
        (nn.Sequential(BatchNormed(), Net()), "0, BatchNormed"),
        (Together(), ""),
    ],
)
def test_answers_that_depend_on_the_batch_are_told_once(floats, count, model, layer):
    session = Adapter(model, floats[0], CONFIG)
    where = re.escape(f"beside it (first seen in {layer}): results" if layer else "beside it: results")
    with pytest.warns(UserWarning, match=f"a {type(model).__name__}, answers an image differently with other images {where}"):
        session.adapt(floats[1][:count])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.adapt(floats[1][:count])


@pytest.mark.parametrize("count", [1, 3])
def test_answers_that_change_from_run_to_run_are_told(floats, count):
    class Counting(Net):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.runs += 1
            return super().forward(x) * self.runs

    with pytest.warns(UserWarning, match="a Counting, gives two answers to the same image"):
        adapt(Counting(), *floats[:1], floats[1][:count], config=CONFIG)


class Rounding(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).round()


@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_a_step_without_a_gradient_is_told(floats, mode):
    session = Adapter(Rounding(), floats[0], CONFIG.replace(mode=mode))
    with pytest.warns(
        UserWarning, match=r"first step changed none of the 'all' parameters of the model, a Rounding: their gradient is zero"
    ):
        session.adapt(floats[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.adapt(floats[1])


def test_what_a_model_does_not_take_is_explained(denoiser):
    images = torch.rand(2, 3, 32, 32)
    grey = timm.create_model("resnet18", num_classes=7, in_chans=1)
    with pytest.raises(ValueError, match=r"first layer takes images of 1 channels, and images are RGB; average the channels"):
        adapt(grey, denoiser, images, config=CONFIG)
    small = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=32)
    with pytest.raises(ValueError, match=r"built for another size than 224x224, that of its crops .*Classification\(crop=...\)"):
        adapt(small, denoiser, images, config=CONFIG)
    found = adapt(small, denoiser, images, config=CONFIG, task=Classification(crop=lambda crop: crop))
    assert found.outputs.shape == (2, 7)
    with pytest.raises(ValueError, match=r"subset is \[3\]; give at least two"):
        Classification(subset=[3])
    with pytest.raises(ValueError, match=r"returns 1 logit for each image.*\[0, z\]"):
        adapt(nn.Sequential(nn.Flatten(), nn.Linear(3072, 1)), denoiser, images, config=CONFIG)

    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("a fault of its own")

    with pytest.raises(RuntimeError, match=r"^a fault of its own$"):
        adapt(Broken(3072, 7), denoiser, images, config=CONFIG)
