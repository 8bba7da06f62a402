"""A package's flow on functions that are not compiled: for every kind of config it gives what an Adapter gives."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.embed import package as package_module
from dtta_fast.embed.exporting import _manifest, check_exportable
from dtta_fast.embed.functions import Functions
from dtta_fast.embed.package import Package
from dtta_fast.runtime import clock
from dtta_fast.tasks import Classification

SMALL = AdaptConfig(steps=2, pairs=4, lr=3e-3)


class Plain:
    """Stands in for a compiled function."""

    def __init__(self, call):
        self.call = call

    def run(self, inputs):
        return self.call(*inputs)


class Traced(Plain):
    """The graph that would be compiled: nothing of Python is left in it."""

    def __init__(self, function):
        example = [tensor.clone() for tensor in function.example]
        super().__init__(make_fx(function.call, tracing_mode="real", _allow_non_fake_inputs=True)(*example))


def made(adapter, images, kind):
    """A package of an adapter for batches like `images`, without a compiler."""
    ids = torch.arange(len(images))
    found = Functions(adapter.engine.program, adapter.crop(images), ids).by_name
    manifest = _manifest(adapter.engine, adapter.crop(images), found)
    return Package(manifest, {name: kind(function) if kind is Traced else kind(function.call) for name, function in found.items()})


def assert_same(found, expected, rtol=1e-5, atol=1e-5):
    for name in ("outputs", "outputs_before", "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=rtol, atol=atol, equal_nan=True)
    for name in ("predictions", "predictions_before", "accepted", "evaluations"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.steps_run == expected.steps_run


CONFIGS = {
    "plain": SMALL,
    "guard": SMALL.replace(guard=6, guard_threshold=0.5, optimizer="sgd", lr=0.5),  # a rate that changes answers
    "sgd": SMALL.replace(optimizer="sgd", lr=0.5, weight_decay=1e-2),
    "adamw": SMALL.replace(optimizer="adamw", weight_decay=1e-2),
    "norm layers": SMALL.replace(parameters="norm"),
    "denoiser adapts": SMALL.replace(denoiser_parameters="all"),
    "lora": SMALL.replace(denoiser_parameters="lora", lora_rank=2),
    "noise mixing": SMALL.replace(objective="noise_mix", top_k=3, drawn_classes=1),
    "antithetic, l1, few classes": SMALL.replace(antithetic=True, loss="l1", top_k=2),
    "chunks": SMALL.replace(chunk=1),
    "online": SMALL.replace(mode="online"),
    "online with a guard": SMALL.replace(mode="online", guard=4, optimizer="sgd", lr=0.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_flow_is_an_adapter_s(model, denoiser, images, name):
    """Two calls, so that an online state goes on, and an episodic one starts anew; then one after reset()."""
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    adapter = Adapter(model, denoiser, CONFIGS[name])
    package = made(adapter, images[:3], Plain)
    adapter.reset()
    for part, ids in ((images[:3], [5, 6, 7]), (images[1:4], [1, 2, 3])):
        assert_same(package.adapt(part, image_ids=torch.tensor(ids)), adapter.adapt(part, image_ids=torch.tensor(ids)))
    adapter.reset()
    package.reset()
    expected = adapter.adapt(images[:3])
    assert_same(package.adapt(images[:3]), expected)
    if "guard" in name:
        assert int(expected.evaluations.max()) > SMALL.steps * SMALL.pairs  # some answers were compared


def recorded(program, calls):
    """Notes the calls that run() makes, with what they find of answers and losses."""
    for name in ("step", "finish", "losses", "decide", "source_outputs"):
        whole = getattr(program, name)

        def call(*given, name=name, whole=whole):
            found = whole(*given)
            told = {"losses": lambda: [any(column) for column in given[-1]], "finish": lambda: found.fresh.tolist()}
            calls.append((name, told[name]() if name in told else None))
            return found

        setattr(program, name, call)


@pytest.mark.parametrize("name", ["plain", "guard", "online", "online with a guard"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_package_and_an_adapter_make_the_same_calls(model, denoiser, images, name, broken):
    """Also where an online state has become useless, and the images get the source model's answers."""
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    adapter, calls = Adapter(model, denoiser, CONFIGS[name]), ([], [])
    package = made(adapter, images, Plain)
    adapter.reset()
    recorded(adapter.engine.program, calls[0])
    recorded(package._program, calls[1])
    for part in (images, images.flip(3), images):
        assert_same(package.adapt(part), adapter.adapt(part))
        if broken and "online" in name:
            next(iter(adapter._state.theta.values())).fill_(torch.nan)
            leaves = pytree.tree_leaves(adapter._state)
            package._state = [own.clone() for own in leaves]
    assert calls[0] == calls[1]
    assert [call for call, _ in calls[0]].count("step") == 3 * SMALL.steps
    assert ("source_outputs" in dict(calls[0])) == (broken and "online" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["guard", "denoiser adapts", "noise mixing", "online"])
def test_the_graphs_are_the_functions(model, denoiser, images, name):
    """What make_fx keeps holds for other images, ids and steps than it saw: nothing is baked in. By SGD, since Adam's first updates are
    gradients' signs, of which rounding decides some (Adam's graph: test_digits_under_a_preset), and in small steps: at a rate of 0.1 an
    answer moved by 7 and rounding alone by up to 4e-4, on one processor and not on another."""
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    adapter = Adapter(model, denoiser, CONFIGS[name].replace(optimizer="sgd", lr=0.001, denoiser_lr=0.001))
    package = made(adapter, images[:2], Traced)
    adapter.reset()
    for part, ids in ((images[2:4], [8, 3]), (images[:2], [1, 2**32 - 1])):
        keywords = {"image_ids": torch.tensor(ids)}
        expected = adapter.adapt(part, **keywords)
        assert_same(package.adapt(part, **keywords), expected, rtol=1e-4, atol=1e-4)
        # the guard may refuse a change
        assert name == "guard" or (expected.outputs - expected.outputs_before).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["FAST", "ONLINE"])
def test_digits_under_a_preset(preset):
    """Of the images some are left alone by FAST's pre-check, and some are adapted and guarded."""
    model, denoiser = zoo.load("digits")
    clean, _ = zoo.example("digits")
    kinds = list(DIGITS_C.items())
    images = torch.cat([corrupt(clean[i : i + 1], *kinds[i % len(kinds)], first_id=i) for i in (0, 9, 54, 55)])
    adapter = Adapter(model, denoiser, presets.get(preset))
    package = made(adapter, images, Traced)
    adapter.reset()
    found, expected = package.adapt(images), adapter.adapt(images)
    assert_same(found, expected, rtol=1e-3, atol=1e-3)
    if preset == "FAST":
        assert 0 < int((expected.evaluations > 0).sum()) < len(images)


@pytest.mark.slow
def test_segmentation_under_its_preset():
    model, denoiser = zoo.load("segmentation")
    images, _ = zoo.example("segmentation")
    adapter = Adapter(model, denoiser, presets.DENSE, zoo.task("segmentation"))
    blurred = corrupt(images[:2], "gaussian_blur", 3)
    package = made(adapter, blurred, Traced)
    found, expected = package.adapt(adapter.crop(blurred)), adapter.adapt(blurred)
    assert bool((expected.evaluations > 0).any())
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.predictions, expected.predictions)


class Slow(Plain):
    """Takes so many seconds, on a clock that nothing else moves."""

    def __init__(self, function, now, seconds):
        super().__init__(function.call)
        self.now, self.seconds = now, seconds

    def run(self, inputs):
        self.now[0] += self.seconds
        return super().run(inputs)


@pytest.mark.parametrize(
    ("deadline", "steps", "evaluations"), [(25, 0, 0), (85, 0, 0), (105, 0, 0), (115, 1, 16), (125, 2, 20), (900, 2, 20)]
)
def test_deadlines_are_kept(model, denoiser, images, monkeypatch, deadline, steps, evaluations):
    """A step takes 10 ms, a forward before and after 20 ms each, the guard 20 ms an answer; where it would come too late, the answer from
    before stands. Without a step there is nothing to compare."""
    now = [0.0]
    for module in (package_module, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    adapter = Adapter(model.float(), denoiser.float(), CONFIGS["guard"].replace(steps=2, lr=3.0))
    images = images.float()[:1]
    found = Functions(adapter.engine.program, adapter.crop(images), torch.arange(1)).by_name
    seconds = {"state": 0.0, "start": 0.02, "step": 0.01, "finish": 0.02, "losses": 0.02, "decide": 0.0}
    # whatever the weights, the answer after is another than the one before
    slow = {name: Slow(function, now, seconds[name]) for name, function in found.items()}
    finish = slow["finish"].call
    slow["finish"].call = lambda *inputs: [*finish(*inputs)[:3], torch.tensor([[True], [False]])]
    package = Package(_manifest(adapter.engine, adapter.crop(images), found), slow)
    package.warmup(images)  # knows a step of 10 ms, an end of 20, a guard of 60: of all three answers
    began = now[0]
    result = package.adapt(images, deadline_ms=deadline)
    assert (result.steps_run, int(result.evaluations)) == (steps, evaluations)
    assert now[0] - began <= max(deadline, 40) / 1000 + 1e-9  # two forwards are the least


def test_a_call_that_fails_leaves_no_trace(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    package = made(Adapter(model, denoiser, CONFIGS["online"]), images, Plain)
    package.adapt(images)
    before, finish = [tensor.clone() for tensor in package._state], package._program.functions["finish"]

    def fails(inputs):
        raise RuntimeError("no memory")

    package._program.functions["finish"] = SimpleNamespace(run=fails)
    for call in (package.adapt, package.warmup):
        with pytest.raises(RuntimeError, match="no memory"):
            call(images)
        assert all(torch.equal(a, b) for a, b in zip(package._state, before, strict=True))
    package._program.functions["finish"] = finish
    assert package.adapt(images).steps_run == SMALL.steps


def test_a_state_goes_on_elsewhere(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    with torch.inference_mode():  # a package may be loaded under it, and used without
        first, other, episodic = (made(Adapter(model, denoiser, CONFIGS[name]), images, Plain) for name in ("online", "online", "plain"))
    first.adapt(images)
    state = first.state_dict()
    expected = first.adapt(images).outputs
    other.load_state_dict(state)
    torch.testing.assert_close(other.adapt(images).outputs, expected, rtol=1e-5, atol=1e-5)
    other.load_state_dict(state)  # which later calls have not written to
    torch.testing.assert_close(other.adapt(images).outputs, expected, rtol=1e-5, atol=1e-5)
    for wrong in ({}, {**state, "weights": "0"}, {**state, "state": state["state"][:-1]}):
        with pytest.raises(ValueError, match="state "):
            other.load_state_dict(wrong)
    with pytest.raises(ValueError, match="this one is episodic"):
        episodic.load_state_dict(state)


def test_a_call_under_inference_mode_leaves_a_state_for_any_mode(model, denoiser, images):
    """Compiled steps need no autograd, and write in place to the state that an earlier call has left."""
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    package = made(Adapter(model, denoiser, CONFIGS["online"]), images, Plain)

    def step(inputs):
        inputs[0].mul_(0.999)
        return [torch.ones(len(images))]

    package._program.functions["step"] = SimpleNamespace(run=step)
    start = package._state[0].clone()
    with torch.inference_mode():
        package.adapt(images)
    package.adapt(images)
    torch.testing.assert_close(package._state[0], start * 0.999 ** (2 * SMALL.steps))


def test_other_tasks_are_told_apart(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    own = made(Adapter(model, denoiser, SMALL), images, Plain).manifest
    assert own.differences(Adapter(model, denoiser, SMALL.replace(compile="off", chunk=2)).engine) == []
    for task in (Classification(subset=[5, 0, 3]), Classification(normalise=lambda crop: crop / 2)):
        (said,) = own.differences(Adapter(model, denoiser, SMALL, task).engine)
        assert said.startswith("its task is Classification ")


def test_a_deadline_that_has_passed_gives_the_answer_before(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    adapter = Adapter(model, denoiser, SMALL)
    package = made(adapter, images, Plain)
    package.warmup(images)
    found = package.adapt(images, deadline_ms=1e-6)
    assert found.steps_run == 0
    assert not found.evaluations.any()
    torch.testing.assert_close(found.outputs, found.outputs_before)
    assert package.adapt(images, deadline_ms=1e9).steps_run == SMALL.steps


def test_warmup_leaves_an_online_state_as_it_was(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    package = made(Adapter(model, denoiser, CONFIGS["online"]), images, Plain)
    first = package.adapt(images)
    package.reset()
    package.warmup(images)
    torch.testing.assert_close(package.adapt(images).outputs, first.outputs, rtol=1e-5, atol=1e-5)


def test_a_batch_that_diverges_leaves_no_trace(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    package = made(Adapter(model, denoiser, SMALL.replace(mode="online", optimizer="sgd", lr=1e38)), images, Plain)
    before = [tensor.clone() for tensor in package._state]
    package.adapt(images)
    assert all(torch.equal(a, b) for a, b in zip(package._state, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "posterior"}, "method is 'posterior', which cannot be exported"),
        ({"parameters": "logits"}, "parameters is 'logits', which cannot be exported"),
        ({"optimizer": "adam8bit"}, "optimizer is 'adam8bit', which cannot be exported"),
    ],
)
def test_configs_that_no_package_holds(changes, message):
    with pytest.raises(ValueError, match=message):
        check_exportable(AdaptConfig(**changes))


@pytest.mark.slow
def test_classes_that_cannot_occur(model, denoiser, images):
    model, denoiser, images = model.float(), denoiser.float(), images.float()
    adapter = Adapter(model, denoiser, SMALL, Classification(subset=[5, 0, 3]))
    found = made(adapter, images, Traced).adapt(images)
    assert_same(found, adapter.adapt(images), rtol=1e-4, atol=1e-4)
    assert set(found.predictions.tolist()) <= {5, 0, 3}
