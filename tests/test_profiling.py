"""What `dtta profile` counts, times and shows."""

from __future__ import annotations

import json
import re
import threading
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dtta_fast import AdaptConfig, Adapter, zoo
from dtta_fast.commands.cli import main
from dtta_fast.kernels import Pairs, add_noise
from dtta_fast.measure.bottleneck import Row, bottleneck
from dtta_fast.measure.counting import Count, Counter
from dtta_fast.measure.profiling import profile
from dtta_fast.measure.roofline import Peak, attained, measured_peak
from dtta_fast.report.profile import KERNELS, figure, make_profile_page
from dtta_fast.runtime import environment
from dtta_fast.runtime.phases import listening, phase

CPU = torch.device("cpu")
CONFIG = AdaptConfig(steps=2, pairs=4, lr=0.3, guard=3)
PEAK = Peak("float32", flops=1e12, bytes=1e11)
STEP = {"encode", "restore", "classifier", "noising", "denoiser forward", "loss", "denoiser backward", "optimizer", "guard", "other"}


def counted(work) -> dict[str, Count]:
    """By operator."""
    counter = Counter()
    with counter:
        work()
    return {operator: count for (_, operator), count in counter.counts.items()}


def test_a_product_counts_its_flops_and_bytes():
    a, b = torch.randn(5, 7), torch.randn(7, 11)
    assert counted(lambda: a @ b) == {"aten::mm": Count(1, 2 * 5 * 7 * 11, 4 * (5 * 7 + 7 * 11 + 5 * 11))}


def test_a_batched_product_of_vmap_is_counted():
    weights, x = torch.randn(6, 5, 7), torch.randn(6, 7)
    assert counted(lambda: torch.vmap(lambda w, x: w @ x)(weights, x))["aten::bmm"].flops == 6 * 2 * 5 * 7


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_and_its_backward_count_by_groups(groups):
    x, weight = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(8, 4 // groups, 3, 3, requires_grad=True)
    found = counted(lambda: F.conv2d(x, weight, padding=1, groups=groups).sum().backward())
    forward = 2 * (2 * 8 * 8 * 8) * (4 // groups * 9)
    assert found["aten::convolution"].flops == forward
    assert found["aten::convolution_backward"].flops == 2 * forward


def test_attention_and_its_backward_are_counted():
    q, k, v = (torch.randn(2, 3, 10, 4, requires_grad=True) for _ in range(3))
    found = counted(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    product = 2 * 2 * 3 * 10 * 10 * 4
    assert sum(count.flops for count in found.values()) == 2 * product + 5 * product  # the backward makes the scores again


def test_a_small_network_is_counted_phase_by_phase():
    network, x = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)), torch.randn(5, 6)
    counter = Counter()
    with counter, listening(counter):
        with phase("denoiser forward"):
            y = network(x)
            with phase("loss"):  # within another one: that one's
                y = y.sum()
        with phase("denoiser backward"):
            torch.autograd.grad(y, list(network.parameters()))
    flops: dict[str, int] = {}
    for (name, _), count in counter.counts.items():
        flops[name] = flops.get(name, 0) + count.flops
    first, second = 2 * 5 * 6 * 16, 2 * 5 * 16 * 3
    assert flops == {"denoiser forward": first + second, "denoiser backward": first + 2 * second}  # x takes no gradient


@pytest.mark.parametrize(
    ("work", "moved"),
    [
        (lambda x: x.view(4, 6).mT.expand(3, 6, 4)[0], 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x + 1, 2 * 96),
        (lambda x: x.add_(x), 3 * 96),
        (lambda x: x.zero_(), 96),
        (lambda x: x.copy_(torch.ones(1).expand(24)), 96 + 4 + 4),  # a copied element, which is written first
        (lambda x: torch.ones(1).expand(24).sum(), 4 + 4 + 4),
        (lambda x: F.embedding(torch.tensor([1, 2]), x.view(6, 4)), 2 * 8 + 2 * 2 * 16),
        (lambda x: x.view(6, 4).index_copy_(0, torch.tensor([5]), torch.empty(1, 4)), 8 + 2 * 16),
        (lambda x: torch._foreach_add_([x], [x]), 3 * 96),
    ],
)
def test_bytes_are_those_that_an_operator_touches(work, moved):
    x = torch.zeros(24)
    assert sum(count.bytes for count in counted(lambda: work(x)).values()) == moved


def test_our_own_ops_count_bytes_and_no_flops(process):
    x0, timesteps, ids, step = torch.randn(2, 3, 4, 4), torch.zeros(2, 5, dtype=torch.int64), torch.arange(2), torch.tensor(0)
    found = counted(lambda: add_noise(Pairs(x0, process.table, timesteps, ids, 0, step)))
    image = 4 * 3 * 4 * 4
    assert found["dtta_fast::add_noise"] == Count(1, 0, 2 * image + process.table.nbytes + 8 * (10 + 2 + 1) + 10 * image)


def test_marks_are_nothing_without_a_listener_and_in_other_threads():
    counter, seen = Counter(), []
    assert isinstance(phase("loss"), nullcontext)
    with listening(counter):
        other = threading.Thread(target=lambda: seen.append(isinstance(phase("loss"), nullcontext)))
        other.start()
        other.join()
        with phase("loss"):
            assert counter.current == "loss"
        assert counter.current == "other"
        with pytest.raises(KeyError), phase("loss"):
            raise KeyError
        assert counter.current == "other"
    assert seen == [True]
    assert isinstance(phase("loss"), nullcontext)


def test_marks_do_not_break_a_graph():
    def step(x):
        with phase("loss"):
            return x * 2

    found = torch.compile(step, fullgraph=True, backend="eager")(torch.ones(3))
    assert found.tolist() == [2, 2, 2]


class Linear(nn.Module):
    """A classifier whose work is known."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 16 * 16, 7)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.flatten(1))


def test_phases_add_up_and_hold_the_known_work(denoiser, images, tmp_path):
    adapter = Adapter(Linear(), denoiser.float(), CONFIG)
    plain = adapter.adapt(images.float())
    path = tmp_path / "trace.json"
    found = profile(adapter, images.float(), trace=path)

    phases = {row.name: row for row in found.phases}
    assert set(phases) == STEP
    assert sum(row.seconds for row in found.phases) == pytest.approx(found.seconds)
    assert sum(row.share for row in found.phases) == pytest.approx(1)
    assert all(row.seconds >= 0 for row in found.phases)
    assert sum(row.seconds for row in found.kernels) == pytest.approx(found.profiled_seconds)
    assert found.seconds == min(found.runs)
    assert (found.images, found.adapted, found.evaluations) == (4, 4, int(plain.evaluations.sum()))

    # forward before, forward and backward (to the weight alone) in each step, forward after
    weight, passes = 3 * 16 * 16 * 7, 1 + 2 * CONFIG.steps + 1
    assert phases["classifier"].flops == len(images) * passes * 2 * weight
    # Adam reads parameters, gradients and two moments and writes all but the gradients
    least = CONFIG.steps * len(images) * 7 * 4 * (weight + 7)
    assert least <= phases["optimizer"].bytes <= least + 100 * CONFIG.steps
    # to the condition: the weights are frozen, so an activation's gradient takes a product where an activation took one; only the
    # attention's backward takes five for two
    assert phases["denoiser forward"].flops > 0
    assert 0.8 < phases["denoiser backward"].flops / phases["denoiser forward"].flops < 1.6
    assert phases["guard"].flops > 0
    assert {phases[name].flops for name in ("encode", "restore", "noising", "loss", "optimizer", "other")} == {0}
    assert sum(row.flops for row in found.phases) == sum(row.flops for row in found.kernels)
    assert sum(row.bytes for row in found.phases) == sum(row.bytes for row in found.kernels)

    assert found.memory.peak == max(held for _, held in found.memory.points) > 0
    assert found.memory.peak_phase in STEP
    events = json.loads(path.read_text())["traceEvents"]
    traced = {event["name"].removeprefix("phase: ") for event in events if str(event.get("name")).startswith("phase: ")}
    assert traced == STEP - {"other"}
    assert {span.phase for span in found.memory.spans} == traced

    again = adapter.adapt(images.float())
    assert torch.equal(again.outputs, plain.outputs)
    assert torch.equal(again.loss, plain.loss)

    page = make_profile_page(found, "<b>mine</b>")
    assert "<b>" not in page
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#|data:)|@import|url\(|<script", page)
    assert page.count('<svg class="plot"') == 2
    for row in (*found.phases, *found.kernels[:KERNELS]):
        assert row.name in page
        assert figure(1e3 * row.seconds) in page
    assert found.bottleneck in page.replace("&#39;", "'")


def test_an_online_state_is_where_it_was(model, denoiser, images):
    adapter = Adapter(model.float(), denoiser.float(), CONFIG.replace(mode="online", guard=0))
    expected = [adapter.adapt(images.float()).outputs for _ in range(2)]
    adapter.reset()
    assert torch.equal(adapter.adapt(images.float()).outputs, expected[0])
    found = profile(adapter, images.float())
    assert torch.equal(adapter.adapt(images.float()).outputs, expected[1])
    assert found.config["mode"] == "online"


def row(name="denoiser backward", calls=10, flops=0, moved=0) -> Row:
    return Row.of(name, 0.5, 1.0, Count(calls, flops, moved), PEAK)


@pytest.mark.parametrize(
    ("longest", "says"),
    [
        (row(flops=int(0.25e12), moved=int(0.1e11)), "Denoiser backward takes 50 % of the time at 50 % of the float32 peak and 20 % of"),
        (row(flops=int(0.25e12), moved=int(0.1e11)), "bound by computation; fewer pairs or steps (pairs is 4, steps 2) would shorten it"),
        (row("optimizer", moved=int(0.4e11)), "bound by memory bandwidth; fewer weights that move"),
        (row("guard", moved=int(0.4e11)), "bound by memory bandwidth; fewer pairs in the guard (guard is 3)"),
        (
            row(calls=5000, flops=int(0.05e12)),
            "overhead of many small operators (5,000, 100 µs each on average, of which the peaks would take 10);",
        ),
        (row(calls=10, flops=int(0.05e12)), "bound by none of them; its 10 operators are not small"),
    ],
)
def test_the_sentence_says_what_the_figures_show(longest, says):
    others = [Row.of(name, 0.1, 1.0, Count(), PEAK) for name in ("encode", "other")]
    assert says in bottleneck([others[0], longest, others[1]], CONFIG.replace(precision="fp32"), PEAK, CPU)


def test_the_roofline_is_the_nearer_peak():
    assert attained(2.0, flops=1e12, bytes=1e10, peak=PEAK) == pytest.approx(0.5)
    assert attained(2.0, flops=1e11, bytes=1e11, peak=PEAK) == pytest.approx(0.5)
    assert attained(0.0, flops=1, bytes=1, peak=PEAK) == 0
    found = measured_peak(CPU, torch.bfloat16, seconds=0.1)
    assert found.dtype == "bfloat16"
    assert found.flops > 0
    assert found.bytes > 0


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1e-9, "<0.001"), (0.01234, "0.012"), (1.234, "1.23"), (45.67, "45.7"), (4567.8, "4,568")]
)
def test_figures_have_three_digits(value, text):
    assert figure(value) == text


@pytest.mark.slow
def test_the_command_prints_tables_and_writes_its_result(tmp_path, capsys):
    paths = [tmp_path / name for name in ("profile.json", "profile.html", "trace.json")]
    arguments = ["--images", "2", "--steps", "1", "--json", str(paths[0]), "--html", str(paths[1]), "--trace", str(paths[2])]
    main(["profile", *arguments])
    printed = capsys.readouterr()
    result = json.loads(paths[0].read_text())
    assert (result["benchmark"], result["preset"], result["images"], result["shape"]) == ("profile", "FAST", 2, [2, 3, 32, 32])
    assert (result["config"]["steps"], result["config"]["precheck"], result["adapted"]) == (1, "off", 2)
    assert {"torch", "python"} <= set(result["environment"])
    assert set(result["warmup"]) == {"cold", "warm"}
    assert result["device"] == environment.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))  # as of dtta bench
    assert {row["name"] for row in result["phases"]} == STEP
    for name in (*STEP, result["bottleneck"], *(f"wrote {path}" for path in paths)):
        assert name in printed.out
    assert not printed.err
    assert all(path.stat().st_size for path in paths)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "0"], "images is 0; give 1 or more"),
        (["--preset", "SLOW"], "preset is 'SLOW'"),
        (["--device", "moon"], "device is 'moon'"),
        (["--model", "resnet18"], "give your own --denoiser too"),
        (["--model", "no_such_model", "--denoiser", str(zoo.folder("digits") / "denoiser")], "model is 'no_such_model'"),
        (["--trace", "nowhere/at/all.json"], "give a file in a folder that exists"),
        (["--html", "."], "give a file in a folder that exists"),
        (["--json", "nowhere/at/all.json"], "give a file in a folder that exists"),
        (["--steps", "0"], "steps is 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["profile", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
