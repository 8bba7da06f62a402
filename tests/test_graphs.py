"""Recorded sessions on the CPU: a tape takes the place of a CUDA graph. Like one, it knows addresses, not values."""

from __future__ import annotations

import copy
import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.measure.counting import Counter
from dtta_fast.runtime import graphs
from dtta_fast.runtime.float32 import Switches
from dtta_fast.session import recorded

RESULTS = ("outputs", "outputs_before", "predictions", "predictions_before", "loss", "accepted", "evaluations")


class Tape(TorchDispatchMode):
    """Records operators with the very tensors that they get and return, and undoes what they wrote: a graph's capture runs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing: a value is read")
        kwargs = kwargs or {}
        for tensor in (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)):
            if (storage := tensor.untyped_storage()._cdata) not in self._made and tensor.data_ptr() not in self._before:
                self._before[tensor.data_ptr()] = tensor, tensor.clone()
        found = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor, _ in self._before.values()}
        self._made |= {storage for tensor in outputs if (storage := tensor.untyped_storage()._cdata) not in known}
        self.operators.append((func, args, kwargs, outputs))
        return found

    @torch.no_grad()
    def undo(self) -> None:
        for tensor, values in self._before.values():
            if not torch.equal(tensor, values):
                tensor.copy_(values)
        self._before.clear()

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.operators:
            again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
            for old, new in zip(outputs, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Counted:
    """A recorder that counts what it recorded and replayed."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, function: Callable[[], Any]) -> Callable[[], None]:
        tape = Tape()
        with tape:
            function()
        tape.undo()
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            with _disable_current_modes():
                tape.replay()

        return replay

    def fresh(self) -> None:
        """Has no memory of its own."""


class Again:
    """A recorder whose replays run the function again, or that raises errors."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self, function: Callable[[], Any]) -> Callable[[], None]:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return function

    def fresh(self) -> None:
        """Has no memory of its own."""


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Sessions that ask for graphs record on tapes."""
    made = Counted()
    monkeypatch.setattr(graphs, "there_are_on", lambda device: True)
    monkeypatch.setattr(recorded, "Graphs", functools.partial(graphs.Graphs, record=made))
    return made


FAST = presets.FAST.replace(timesteps="stratified", match="off", precheck="off", guard=6, guard_threshold=0.5, lr=5e-3)
CASES = {
    "FAST": (FAST, 1),
    "several images": (FAST, 3),
    "all weights": (FAST.replace(denoiser_parameters="all", optimizer="sgd", momentum=0.9), 2),
    "LoRA": (FAST.replace(parameters="norm", denoiser_parameters="lora"), 1),
    "half precision in chunks": (FAST.replace(precision="bf16", chunk=2, antithetic=True), 2),
    "without a guard": (FAST.replace(guard=0, guard_threshold=0.0), 1),
    "online": (FAST.replace(mode="online", optimizer="adamw", weight_decay=0.1), 2),
    "noise mixing": (FAST.replace(objective="noise_mix", top_k=3, drawn_classes=2, guard=4), 1),
    "logits": (FAST.replace(parameters="logits", lr=0.1), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_replays_give_what_plain_calls_give(case, tapes, model, denoiser):
    """Bit for bit, for images after the one that was recorded, and again after another batch size."""
    config, count = CASES[case]
    model, denoiser = model.float(), denoiser.float()
    generator = torch.Generator().manual_seed(3)
    plain, session = Adapter(model, denoiser, config), Adapter(model, denoiser, config.replace(compile="graphs"))
    kept = []
    for call, images in enumerate((count, count, count, 1, count)):
        given, ids = torch.rand(images, 3, 8, 8, generator=generator), torch.arange(images) + 10 * call
        expected, found = (one.adapt(given, image_ids=ids) for one in (plain, session))
        kept.append((found, expected))
        if call == 1:
            before = tapes.recordings
            assert tapes.replays > 0
        if call == 2 and config.guard == 0:
            assert tapes.recordings == before
    for found, expected in kept:  # no later call writes to a result
        for name in RESULTS:
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
    states = [one.state_dict() for one in (plain, session)]
    assert all(torch.equal(a, b) for a, b in zip(*(tree_leaves(state) for state in states), strict=True) if isinstance(a, Tensor))


def test_an_image_takes_twelve_replays_and_copies(tapes, model, denoiser):
    """A copy of the image, of its latent and id, of the source's answer out of its recording and into the next, and of what the guard
    compares; some small operators run as they are: preparing the image, resetting the weights, deciding."""
    session = Adapter(model.float(), denoiser.float(), FAST.replace(compile="graphs", guard_threshold=0.0))
    compared = 0
    session.adapt(torch.rand(1, 3, 8, 8))
    session.adapt(torch.rand(1, 3, 8, 8))
    for image in torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)):
        before = tapes.replays
        with Counter() as counter:
            result = session.adapt(image[None])
        replays = tapes.replays - before
        guarded = int(result.evaluations[0]) > FAST.steps * FAST.pairs
        compared += guarded
        calls = {name: count.calls for (_, name), count in counter.counts.items()}
        assert replays == 1 + FAST.steps + 1 + guarded
        assert replays + calls["aten::copy_"] + 1 <= 12  # the one is the answer's, by clone()
        assert sum(calls.values()) < 90
    assert compared


def test_writes_of_the_caller_are_seen(tapes, model, denoiser):
    model, denoiser = model.float(), denoiser.float()
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    session = Adapter(model, denoiser, FAST.replace(compile="graphs"))
    first = session.adapt(images)
    with torch.no_grad():
        for parameter in (*model.parameters(), *denoiser.parameters()):
            parameter.mul_(1.25)
    again, expected = session.adapt(images), Adapter(model, denoiser, FAST).adapt(images)
    assert torch.equal(again.outputs, expected.outputs)
    assert not torch.equal(again.outputs, first.outputs)


def test_a_failed_call_leaves_an_online_state_alone(tapes, model, denoiser, monkeypatch):
    config = FAST.replace(mode="online", compile="graphs")
    session = Adapter(model.float(), denoiser.float(), config)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    session.adapt(images)
    session.adapt(images)
    kept = [leaf.clone() for leaf in tree_leaves(session.state_dict()) if isinstance(leaf, Tensor)]
    with monkeypatch.context() as patch:
        patch.setattr(recorded.RecordedProgram, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.adapt(images)
    after = [leaf for leaf in tree_leaves(session.state_dict()) if isinstance(leaf, Tensor)]
    assert all(map(torch.equal, kept, after))
    expected = Adapter(model.float(), denoiser.float(), config.replace(compile="off"))
    for _ in range(2):
        expected.adapt(images)
    assert torch.equal(session.adapt(images).outputs, expected.adapt(images).outputs)


class Reading(nn.Module):
    """A model that reads a value from the device."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if float(x.detach().mean()) > -1 else 1)


def test_what_cannot_be_recorded_runs_as_it_is_with_one_warning(tapes, model, denoiser):
    model = Reading(model.float())
    session = Adapter(model, denoiser.float(), FAST.replace(compile="graphs"))
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="recording one failed: operation not permitted .* Going on without graphs") as warned:
        found = [session.adapt(image[None]) for image in images]
    assert len(warned) == 1
    plain = Adapter(model, denoiser.float(), FAST)
    for one, image in zip(found, images, strict=True):
        assert torch.equal(one.outputs, plain.adapt(image[None]).outputs)


def _instead_of_a_timeout() -> RuntimeError:
    error = RuntimeError("capture failed")
    error.__context__ = TimeoutError("alarm")
    return error


@pytest.mark.parametrize(
    "error", [AssertionError(), TimeoutError("alarm"), _instead_of_a_timeout(), RuntimeError("CUDA out of memory")], ids=range(4)
)
def test_an_error_while_recording(error):
    """It turns recordings off, except for a timeout, which is the caller's, also where another error has taken its place."""
    session, number = graphs.Graphs(torch.device("cpu"), False, Again(error)), torch.ones(3)
    if not isinstance(error.__context__ or error, TimeoutError):
        with pytest.warns(UserWarning, match=f"recording one failed: {str(error) or 'AssertionError'} Going on without graphs"):
            assert torch.equal(session.run("twice", lambda: number * 2, number), number * 2)
        assert session.failed
        assert torch.equal(session.run("twice", lambda: number * 2, number), number * 2)
    else:
        with pytest.raises(type(error), match=str(error)):
            session.run("twice", lambda: number * 2, number)
        assert not session.failed


def test_a_failure_is_an_error_where_that_is_asked_for(monkeypatch):
    monkeypatch.setenv("DTTA_FAST_STRICT", "1")
    session, number = graphs.Graphs(torch.device("cpu"), False, Again(RuntimeError("no capture"))), torch.ones(3)
    with pytest.raises(RuntimeError, match="no capture"):
        session.run("twice", lambda: number * 2, number)


def test_compiled_code_is_not_watched_while_it_is_recorded(model, denoiser, monkeypatch):
    """torch runs no compiled code while operators are watched. The recorder here runs the function again in place of a replay."""
    again = Again()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(graphs, "there_are_on", lambda device: True)
    monkeypatch.setattr(recorded, "Graphs", functools.partial(graphs.Graphs, record=again))
    torch._dynamo.reset()
    session = Adapter(model.float(), denoiser.float(), FAST.replace(compile="regional+graphs"))
    plain = Adapter(model.float(), denoiser.float(), FAST)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(recording one failed|compilation failed)")
        for image in torch.rand(3, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0)):
            torch.testing.assert_close(session.adapt(image).outputs, plain.adapt(image).outputs, rtol=1e-4, atol=1e-5)
    assert again.calls
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_memory_that_lacks_for_one_recording_comes_from_the_others():
    lacking = torch.OutOfMemoryError("CUDA out of memory")
    recorder, numbers = Again(), [torch.full((3,), float(i)) for i in range(3)]
    session = graphs.Graphs(torch.device("cpu"), False, recorder)

    def twice(i: int) -> None:
        assert torch.equal(session.run("twice", lambda: numbers[i] * 2, numbers[i]), numbers[i] * 2)

    twice(0)
    recorder.errors = [lacking]
    twice(1)
    assert recorder.calls == 3
    twice(0)  # was given up
    assert recorder.calls == 4
    recorder.errors = [lacking, lacking]
    with pytest.warns(UserWarning, match="recording one failed: CUDA out of memory"):
        twice(2)
    assert session.failed


def test_other_kernels_for_float32_products_are_recorded_anew(monkeypatch):
    recorder, number = Counted(), torch.ones(3)
    session = graphs.Graphs(torch.device("cpu"), False, recorder)
    for precision, recordings in (("highest", 1), ("high", 2), ("highest", 2)):
        monkeypatch.setattr(Switches, "now", classmethod(lambda cls, precision=precision: precision))
        session.begin()
        session.run("twice", lambda: number * 2, number)
        assert recorder.recordings == recordings


def test_places_that_overflow_are_dropped_between_calls(monkeypatch):
    monkeypatch.setattr(graphs, "PLACES", 2)
    session, number = graphs.Graphs(torch.device("cpu"), False, Counted()), torch.arange(3.0)
    for _ in range(2):
        for _ in range(3):
            number += 1
            found = session.run("some", lambda number=number: [number * k for k in range(2, 6)], number)
            assert [torch.equal(one, number * k) for one, k in zip(found, range(2, 6), strict=True)] == [True] * 4
        session.begin()
        assert not session._places


def test_a_dropped_session_is_freed_at_once(tapes, model, denoiser):
    session = Adapter(model.float(), denoiser.float(), FAST.replace(compile="graphs"))
    for images in torch.rand(2, 1, 3, 8, 8):
        session.adapt(images)
    private = weakref.ref(session.engine.program.problem.model)
    gc.collect()
    gc.disable()
    try:
        del session
        assert private() is None
    finally:
        gc.enable()


def test_a_copied_session_records_its_own(tapes, model, denoiser):
    session = Adapter(model.float(), denoiser.float(), FAST.replace(compile="graphs"))
    images = torch.rand(3, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    session.adapt(images[0])
    other = copy.deepcopy(session)
    before = tapes.recordings
    for one in images:
        assert torch.equal(other.adapt(one).outputs, session.adapt(one).outputs)
    assert tapes.recordings > before


def test_a_failure_is_remembered_when_modules_are_copied_anew(tapes, model, denoiser):
    model = Reading(model.float())
    session = Adapter(model, denoiser.float(), FAST.replace(compile="graphs"))
    with pytest.warns(UserWarning, match="recording one failed"):
        session.adapt(torch.rand(1, 3, 8, 8))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*recording one failed")
        for _ in range(2):
            model.inner.stem[0].weight = nn.Parameter(model.inner.stem[0].weight.detach().clone())
            session.adapt(torch.rand(1, 3, 8, 8))
    assert session.engine.program.compile == "off"


@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_after_a_warm_up_nothing_is_recorded(mode, tapes, model, denoiser):
    config = FAST.replace(match="both", mode=mode, compile="graphs", guard_threshold=0.0)
    denoiser = denoiser.float()
    denoiser.calibration = zoo.load("digits")[1].calibration
    session = Adapter(model.float(), denoiser, config)
    session.warmup(torch.rand(3, 3, 16, 16))
    before, asked = tapes.recordings, set()
    for images in torch.rand(8, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) ** 3:
        asked.add(int(session.adapt(images).evaluations.sum()))
    session.reset()
    session.adapt(images)
    assert tapes.recordings == before
    assert len(asked) > 1


def test_a_batch_adapts_the_images_that_the_pre_check_selects(tapes, model, denoiser):
    denoiser = denoiser.float()
    denoiser.calibration = zoo.load("digits")[1].calibration
    config = FAST.replace(match="both", precheck="answer", guard=0, guard_threshold=0.0)
    with torch.no_grad():
        model.get_classifier().weight.mul_(4)  # so that it is sure of some answers
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) ** 3
    plain, session = (Adapter(model.float(), denoiser, config.replace(compile=kind)) for kind in ("off", "graphs"))
    for _ in range(2):
        expected, found = plain.adapt(images), session.adapt(images)
        assert torch.equal(found.outputs, expected.outputs)
        assert torch.equal(found.evaluations, expected.evaluations)
    assert 0 < int((expected.evaluations > 0).sum()) < 6


def test_memory_of_recordings_is_given_up_first(tapes, model, denoiser, monkeypatch):
    """A call that runs out of memory is made again without the recordings, on as many rows."""
    session = Adapter(model.float(), denoiser.float(), FAST.replace(compile="graphs"))
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = session.adapt(images)
    chunk, step, failures = session.engine.program.schedule.chunk, recorded.RecordedProgram.step, []

    def failing(*given: Any) -> Tensor:
        if not failures:
            failures.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*given)

    monkeypatch.setattr(recorded.RecordedProgram, "step", failing)
    before = tapes.recordings
    assert torch.equal(session.adapt(images).outputs, expected.outputs)
    assert tapes.recordings > before
    assert session.engine.program.schedule.chunk == chunk


def test_given_pairs_run_as_they_are(tapes, model, denoiser):
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sessions = [Adapter(model.float(), denoiser.float(), FAST.replace(compile=kind)) for kind in ("off", "graphs")]
    for seed in range(3):
        timesteps = torch.randint(0, 1000, (1, FAST.steps, 5), generator=torch.Generator().manual_seed(seed))
        expected, found = (session.adapt(images, timesteps=timesteps) for session in sessions)
        assert torch.equal(found.outputs, expected.outputs)
        assert torch.equal(found.loss, expected.loss)


def test_a_recording_keeps_what_it_reads_and_not_what_it_makes():
    held, given = torch.ones(4), torch.zeros(4)
    with graphs._Inputs() as inputs:
        made = (held + given).view(2, 2)
        made.mul_(2)
        given.add_(made.flatten())
    storages = {tensor.untyped_storage()._cdata for tensor in inputs.tensors.values()}
    assert storages == {held.untyped_storage()._cdata, given.untyped_storage()._cdata}


def test_the_oldest_recordings_are_dropped():
    recorder = Counted()
    session = graphs.Graphs(torch.device("cpu"), False, recorder)
    numbers = [torch.full((3,), float(i)) for i in range(graphs.RECORDINGS + 1)]

    def twice(i: int) -> None:
        assert torch.equal(session.run("twice", lambda: numbers[i] * 2, numbers[i]), numbers[i] * 2)

    for i in range(graphs.RECORDINGS):
        twice(i)
    twice(0)  # now the one used last
    twice(graphs.RECORDINGS)
    assert (recorder.recordings, recorder.replays) == (len(numbers), 1)
    twice(0)
    assert (recorder.recordings, recorder.replays) == (len(numbers), 2)
    twice(1)
    assert (recorder.recordings, recorder.replays) == (len(numbers) + 1, 2)
    assert session.forget()
    assert not session.forget()


def test_without_a_gpu_it_runs_as_it_is(model, denoiser):
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="CUDA graphs, and the model is on cpu"):
        session = Adapter(model.float(), denoiser.float(), FAST.replace(compile="graphs"))
    assert torch.equal(session.adapt(images).outputs, Adapter(model.float(), denoiser.float(), FAST).adapt(images).outputs)


def test_bitsandbytes_cannot_be_recorded():
    for kind in ("graphs", "regional+graphs"):
        with pytest.raises(ValueError, match=r"optimizer is 'adam8bit' with compile '.*graphs'"):
            AdaptConfig(optimizer="adam8bit", compile=kind)
