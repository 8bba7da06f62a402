"""How a step runs: precision, compilation, memory, deadlines, and what happens where one of them fails."""

from __future__ import annotations

import json
import resource
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from dtta_fast import AdaptConfig, Adapter, adapt
from dtta_fast.runtime import clock, compiling
from dtta_fast.session import adapter as adapter_module
from dtta_fast.session import planning

CONFIG = AdaptConfig(steps=3, pairs=6, lr=1e-2, guard=3)


@pytest.fixture
def floats(model, denoiser, images):
    return model.float(), denoiser.float(), images.float()


def change(result) -> torch.Tensor:
    return result.outputs.float() - result.outputs_before.float()


def relative(found, expected) -> float:
    return float((change(found) - change(expected)).norm() / change(expected).norm())


# What may differ from the plain engine, as a share of the adaptation's effect on the logits: float32's rounding over three steps;
# of one step in half precision, whose gradient has 8 or 11 bits. More steps would measure how chaotic a random model is.
PLAIN = [
    ({"chunk": 1}, 1e-3),
    ({"chunk": 4}, 1e-3),
    ({"memory_budget": 2 * 10**6}, 1e-3),
    ({"precision": "fp32"}, 0.0),
    ({"precision": "bf16"}, 0.05),
    ({"precision": "fp16"}, 0.01),
]
COMPILED = [  # with a frozen denoiser, the next test compares
    ({"compile": "regional"}, 1e-3, "all"),
    ({"compile": "step"}, 1e-3, "all"),
    ({"precision": "bf16", "compile": "regional"}, 0.05, "all"),
]
LADDER = [
    *((*rung, denoiser_parameters) for rung in PLAIN for denoiser_parameters in ("frozen", "all")),
    *(pytest.param(*rung, marks=pytest.mark.slow) for rung in COMPILED),
]


@pytest.mark.parametrize(("rung", "tolerance", "denoiser_parameters"), LADDER)
def test_every_way_to_run_gives_the_same(floats, rung, tolerance, denoiser_parameters):
    steps = 1 if "precision" in rung else 3
    config = CONFIG.replace(steps=steps, denoiser_parameters=denoiser_parameters, guard=0, optimizer="sgd", lr=0.02, denoiser_lr=0.02)
    plain = adapt(*floats, config=config)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(compilation failed|one by one)")
        found = adapt(*floats, config=config.replace(**rung))
    assert change(plain).norm() > 1e-2
    assert relative(found, plain) <= tolerance


@pytest.mark.slow
@pytest.mark.parametrize("how", ["regional", "step"])
def test_warm_sessions_do_not_compile_again_and_give_the_same(floats, how):
    model, denoiser, images = floats
    torch._dynamo.reset()
    config = CONFIG.replace(optimizer="sgd", lr=0.02)
    adapter, plain = Adapter(model, denoiser, config.replace(compile=how)), Adapter(model, denoiser, config)
    adapter.warmup(images)
    counters.clear()
    asked = set()
    for first in range(0, 40, 4):
        ids = torch.arange(first, first + 4)
        result, expected = (each.adapt(images, image_ids=ids) for each in (adapter, plain))
        assert relative(result, expected) <= 1e-3
        assert torch.equal(result.accepted, expected.accepted)
        asked.add(int((result.evaluations > CONFIG.steps * CONFIG.pairs).sum()))
    assert len(asked) > 1  # the guard met different numbers of changed answers
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["graph_break"]


def test_a_process_may_hold_many_compiled_sessions():
    double = compiling.compiled(lambda x: 2 * x)
    with compiling.tracing():
        for size in range(2, 12):  # torch's own limit is 8
            assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))


@pytest.mark.slow
def test_no_memory_is_left_behind_by_200_images(floats):
    model, denoiser, images = floats
    adapter = Adapter(model, denoiser, CONFIG)

    def run(batches: int) -> int:
        for _ in range(batches):
            adapter.adapt(images)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # resident, not the process's highest ever

    settled = run(25)
    assert run(50) - settled < 4 * 2**20


@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
def test_a_budget_bounds_rows_and_images(floats, denoiser_parameters):
    model, denoiser, images = floats
    rows: list[int] = []
    denoiser.network.blocks[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    config = CONFIG.replace(denoiser_parameters=denoiser_parameters, guard=0)
    plain = adapt(model, denoiser, images, config=config)
    most = []
    for budget in (10**7, 2 * 10**6):
        rows.clear()
        found = adapt(model, denoiser, images, config=config.replace(memory_budget=budget))
        most.append(max(rows))
        torch.testing.assert_close(found.outputs, plain.outputs, rtol=1e-3, atol=1e-3)
    if denoiser_parameters == "frozen":  # under vmap a module sees one image's rows
        assert most[1] < most[0]
    with pytest.raises(ValueError, match=r"memory_budget is 1000 bytes; one \(timestep, noise\) pair of one image takes about \d+"):
        adapt(model, denoiser, images, config=config.replace(memory_budget=1000))


def test_activations_are_made_again_where_one_pair_does_not_fit(floats):
    from dtta_fast.session.engine import Engine
    from dtta_fast.tasks import Classification

    model, denoiser, images = floats
    config = CONFIG.replace(guard=0, steps=1)
    engine = Engine(model, denoiser, Classification(), config)
    x0 = engine.program.problem.denoiser.encode(images)
    row, checkpointed = engine.program.needs.of_row(images, x0)
    assert checkpointed is not None
    assert checkpointed < row
    calls: list[int] = []
    denoiser.network.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    budget = engine.program.needs.of_image(images) + (row + checkpointed) // 2
    plain = adapt(model, denoiser, images, config=config.replace(chunk=1), image_ids=torch.arange(4))
    once, calls[:] = len(calls), []
    found = adapt(model, denoiser, images, config=config.replace(memory_budget=budget))
    assert len(calls) > 4 * once  # one image at a time, and every block twice
    torch.testing.assert_close(found.outputs, plain.outputs, rtol=1e-4, atol=1e-4)


def test_a_deadline_stops_after_the_last_step_that_fits(floats, monkeypatch):
    """On a clock that only the denoiser moves: 50 ms a forward, one forward a step."""
    model, denoiser, images = floats
    now = [0.0]
    for module in (adapter_module, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    denoiser.network.register_forward_pre_hook(lambda *_: now.__setitem__(0, now[0] + 0.05))
    config = CONFIG.replace(steps=10, guard=0)
    adapter = Adapter(model, denoiser, config)
    assert adapter.warmup(images) == pytest.approx({"cold": 0.5, "warm": 0.5})
    result = adapter.adapt(images, deadline_ms=420)
    assert result.steps_run == 8
    assert result.seconds["adapt"] == pytest.approx(0.4)
    assert result.loss.shape == (4, result.steps_run)
    assert result.evaluations.tolist() == [6 * result.steps_run] * 4
    fewer = adapt(model, denoiser, images, config=config.replace(steps=result.steps_run))
    assert torch.equal(result.outputs, fewer.outputs)
    none = adapter.adapt(images, deadline_ms=1e-3)
    assert none.steps_run == 0
    assert none.loss.shape == (4, 0)
    assert torch.equal(none.outputs, none.outputs_before)
    for wrong in (0, -1, float("nan"), True, "soon"):
        with pytest.raises(ValueError, match="deadline_ms is"):
            adapter.adapt(images, deadline_ms=wrong)
    tight = Adapter(model, denoiser, config.replace(memory_budget=2 * 10**6, denoiser_parameters="all"))
    with pytest.raises(ValueError, match="images holds 4, and memory_budget has room for"):
        tight.adapt(images, deadline_ms=1000)


class Branching(nn.Module):
    """Reads a value in its forward: vmap cannot batch that, and torch.compile cannot make one graph of it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.head(x.flatten(1))
        return z if float(z.detach().sum()) > -1e9 else -z


def test_models_that_vmap_cannot_batch_run_one_by_one(denoiser, images):
    torch.manual_seed(0)
    model, denoiser, images = Branching(), denoiser.float(), images.float()
    adapter = Adapter(model, denoiser, CONFIG.replace(guard=0))
    with pytest.warns(UserWarning, match="run one by one: vmap fails") as caught:
        first = adapter.adapt(images)
    assert [told.filename for told in caught] == [__file__]  # it points to the line that called
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        adapter.adapt(images)
    each = [adapt(model, denoiser, images[i : i + 1], config=CONFIG.replace(guard=0), image_ids=torch.tensor([i])) for i in range(4)]
    torch.testing.assert_close(first.outputs, torch.cat([r.outputs for r in each]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["regional", "step"])
def test_a_failed_compilation_goes_on_in_eager_mode(denoiser, images, monkeypatch, how):
    torch.manual_seed(0)
    model, denoiser, images = Branching(), denoiser.float(), images[:1].float()
    plain = adapt(model, denoiser, images, config=CONFIG)
    adapter = Adapter(model, denoiser, CONFIG.replace(compile=how))
    with pytest.warns(UserWarning, match=f"compile is '{how}', and the compilation failed"):
        found = adapter.adapt(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        adapter.adapt(images)
    assert torch.equal(found.outputs, plain.outputs)
    monkeypatch.setenv("DTTA_FAST_STRICT", "1")
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        Adapter(model, denoiser, CONFIG.replace(compile=how)).adapt(images)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_what_the_caller_writes_between_calls_is_seen(floats, precision):
    """At once where torch counts the write. Weights held in another precision take over writes through .data after reset()."""
    model, denoiser, images = floats
    config = CONFIG.replace(precision=precision, parameters="head")
    adapter = Adapter(model, denoiser, config)
    adapter.adapt(images)
    with torch.no_grad():
        for p in (*model.parameters(), *denoiser.parameters()):
            p.mul_(1.1)  # in place
        denoiser.network.pos_embed.data.mul_(1.1)  # a buffer, copied in every call
    assert torch.equal(adapter.adapt(images).outputs, adapt(model, denoiser, images, config=config).outputs)
    denoiser.network.blocks[0].mlp.fc1.weight.data.mul_(1.1)
    if precision != "auto":
        adapter.reset()
    assert torch.equal(adapter.adapt(images).outputs, adapt(model, denoiser, images, config=config).outputs)
    head = model.get_classifier()
    head.weight = nn.Parameter(head.weight.detach() * 0.5)  # another tensor
    assert torch.equal(adapter.adapt(images).outputs, adapt(model, denoiser, images, config=config).outputs)


def test_half_precision_holds_frozen_weights_and_leaves_the_caller_s(floats, untouched):
    model, denoiser, images = floats
    adapter = Adapter(model, denoiser, CONFIG.replace(precision="bf16", parameters="head"))
    with untouched(model, denoiser):
        adapter.adapt(images)
    problem = adapter.engine.program.problem
    kinds = {name: p.dtype for name, p in problem.denoiser.named_parameters()}
    assert kinds.pop("network.y_embedder.embedding_table.weight") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert {p.dtype for p in problem.model.parameters()} == {torch.float32}


def test_models_that_cannot_be_copied_are_named(denoiser):
    class Singular(Branching):
        def __deepcopy__(self, memo: dict) -> None:
            raise NotImplementedError("one of a kind")

    with pytest.raises(TypeError, match="Singular cannot be copied"):
        Adapter(Singular(), denoiser, CONFIG)


def test_adam_of_8_bits(denoiser, images, monkeypatch):
    """Close to 32 bits; an image's own update whatever stands beside it, and again from call to call; a clear error without the library."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Flatten(), nn.LazyLinear(64), nn.GELU(), nn.Linear(64, 7))
    floats, config = (model, denoiser.float(), images.float()), CONFIG.replace(guard=0, optimizer="adam8bit")
    model(floats[2])
    session = Adapter(*floats[:2], config)
    found, again = session.adapt(floats[2]), session.adapt(floats[2])
    assert torch.equal(found.outputs, again.outputs)
    assert 0 < relative(found, adapt(*floats, config=config.replace(optimizer="adamw"))) < 0.05
    for i in range(len(images)):
        alone = session.adapt(floats[2][i : i + 1], image_ids=torch.tensor([i]))
        torch.testing.assert_close(alone.outputs, found.outputs[i : i + 1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="compile 'step'"):
        config.replace(compile="step")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install"):
        Adapter(*floats[:2], config)


def test_warmup_takes_what_adapt_takes(floats):
    """Also a batch that a budget divides into groups."""
    session = Adapter(*floats[:2], CONFIG.replace(denoiser_parameters="all", memory_budget=2 * 10**6))
    assert set(session.warmup(floats[2])) == {"cold", "warm"}


def test_a_parameter_may_be_called_logits(floats):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.logits = floats[0], nn.Parameter(torch.zeros(7))

        def forward(self, x):
            return self.body(x) + self.logits

    found = adapt(Named(), *floats[1:], config=CONFIG.replace(lr=0.0, guard=0))
    torch.testing.assert_close(found.outputs, found.outputs_before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("denoiser_parameters", ["frozen", "all"])
def test_a_budget_holds(floats, denoiser_parameters, tmp_path):
    """What torch allocates beside the modules, at its highest, from the first call on."""
    model, denoiser, images = floats
    peaks = []
    for budget in (4 * 10**6, 10**7):
        config = CONFIG.replace(memory_budget=budget, denoiser_parameters=denoiser_parameters, pairs=40)
        session = Adapter(model, denoiser, config)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            session.adapt(images)
        profile.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        moments = sorted((event["ts"], event["args"]["Total Allocated"]) for event in events if event.get("name") == "[memory]")
        peaks.append(max(total for _, total in moments) - moments[0][1])
        print(budget, peaks[-1])
        assert peaks[-1] <= budget
    assert peaks[0] < peaks[1]  # room is used


WITH_ADAPTERS = CONFIG.replace(denoiser_parameters="lora", lora_targets=("qkv", "fc1"), guard=0, optimizer="sgd", lr=0.02, denoiser_lr=0.02)


@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 2},
        {"objective": "noise_mix", "top_k": 2, "drawn_classes": 1},
        {"objective": "noise_mix", "top_k": 2, "null_condition": True, "loss": "l1"},
    ],
    ids=["embedding", "noise mixing", "null condition"],
)
def test_adapters_of_a_batch_run_together_as_they_would_image_by_image(model, denoiser, images, change):
    session = Adapter(model, denoiser, WITH_ADAPTERS.replace(**change, parameters="norm"))
    expected = [session.adapt(images[i : i + 1], image_ids=torch.tensor([i])) for i in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = session.adapt(images[:3])
    assert not session.engine.program.problem.denoiser_loop
    for i, one in enumerate(expected):
        torch.testing.assert_close(found.outputs[i : i + 1], one.outputs)
        torch.testing.assert_close(found.loss[i : i + 1], one.loss)
    assert (found.outputs - found.outputs_before).abs().max() > 1e-3


def test_adapters_run_image_by_image_where_vmap_fails(model, denoiser, images):
    class Reading(type(denoiser)):
        def forward(self, x_t, timesteps, condition):
            return super().forward(x_t, timesteps, condition) * (1 if float(x_t.detach().mean()) > -100 else 2)

    expected = Adapter(model, denoiser, WITH_ADAPTERS).adapt(images[:3])
    denoiser.__class__ = Reading
    session = Adapter(model, denoiser, WITH_ADAPTERS)
    with pytest.warns(UserWarning, match="run one by one: vmap fails") as warned:
        found = [session.adapt(images[:3]) for _ in range(2)][1]
    assert len(warned) == 1
    assert session.engine.program.problem.denoiser_loop
    assert not session.engine.program.problem.loop
    torch.testing.assert_close(found.outputs, expected.outputs)


@pytest.mark.parametrize("denoiser_parameters", ["all", "lora"])
@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_activations_that_are_made_again_see_the_adapted_weights(floats, monkeypatch, denoiser_parameters, mode):
    """The backward of a checkpointed denoiser runs parts of its forward again, under the weights that the forward had."""
    model, denoiser, images = floats
    own = {"denoiser_parameters": denoiser_parameters, "lora_targets": ("qkv",) if denoiser_parameters == "lora" else None}
    config = CONFIG.replace(**own, mode=mode, guard=0, optimizer="sgd", lr=0.02, denoiser_lr=0.02, memory_budget=10**9)
    plain = adapt(model, denoiser, images, config=config)
    whole = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *arguments: whole(*arguments)._replace(checkpoint=True))
    session = Adapter(model, denoiser, config)
    found = session.adapt(images)
    assert session.engine.program.problem.denoiser.checkpointing
    assert relative(found, plain) < 1e-3
