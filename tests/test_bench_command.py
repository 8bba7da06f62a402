"""`dtta bench` and the measuring behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dtta_fast import AdaptConfig, Adapter, adapt, presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.commands.subjects import EVERY_IMAGE, load_subject
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.measure import benchmark

CPU = torch.device("cpu")
DIGITS = zoo.folder("digits")
OWN = ("--model", f"local-dir:{DIGITS / 'classifier'}", "--denoiser", str(DIGITS / "denoiser"))


# --- the measures


def test_percentiles_are_those_counted_by_hand():
    found = benchmark.percentiles([float(value) for value in range(101, 0, -1)])
    assert found == {"p50": 51.0, "p95": 96.0, "p99": 100.0, "p99_over_p50": pytest.approx(100 / 51)}
    assert benchmark.percentiles([1.0, 2.0])["p95"] == pytest.approx(1.95)


@pytest.mark.slow
def test_latency_keeps_every_call_beside_the_evaluations_and_the_accuracy_of_the_same_images():
    subject = load_subject(None, None, None, 22, CPU)
    config = EVERY_IMAGE.replace(pairs=2, guard=4, guard_threshold=0.0)
    found = benchmark.latency(Adapter(subject.model, subject.denoiser, config), subject.images, 22, subject.labels)
    direct = adapt(subject.model, subject.denoiser, subject.images, config=config)
    assert found["evaluations"] == direct.evaluations.tolist()
    assert len(set(found["evaluations"])) > 1  # the guard has more to compare on some
    assert found["evaluations_per_image"] == pytest.approx(direct.evaluations.double().mean().item())
    for when, predictions in (("before", direct.predictions_before), ("after", direct.predictions)):
        assert found["accuracy"][when] == pytest.approx((predictions == subject.labels).double().mean().item())
    assert len(found["seconds"]) == found["calls"] == 22
    usual = found["same_work"]["evaluations"]
    same = [taken for taken, count in zip(found["seconds"], found["evaluations"], strict=True) if count == usual]
    assert found["same_work"] == {"evaluations": usual, "calls": len(same), **benchmark.percentiles(same)}
    assert set(found["warmup"]) == {"cold", "warm"}


def test_images_are_taken_again_where_they_are_fewer_than_the_calls(model, denoiser, images):
    config = AdaptConfig(steps=1, pairs=1)
    labels = model(images).argmax(1)
    found = benchmark.latency(Adapter(model, denoiser, config), images, 20, labels)
    ids = torch.arange(20)
    direct = adapt(model, denoiser, images[ids % 4], config=config, image_ids=ids)
    assert found["accuracy"]["after"] == pytest.approx((direct.predictions == labels[ids % 4]).double().mean().item())
    assert benchmark.latency(Adapter(model, denoiser, config), images, 20)["accuracy"] is None


def test_an_online_adapter_is_measured_from_its_start(model, denoiser, images):
    config = AdaptConfig(steps=1, pairs=1, mode="online", lr=0.05)
    adapter = Adapter(model, denoiser, config)
    adapter.adapt(images)
    labels = model(images).argmax(1)
    found = benchmark.latency(adapter, images, 20, labels)
    fresh, right = Adapter(model, denoiser, config), 0
    for i in range(20):
        result = fresh.adapt(images[i % 4 : i % 4 + 1], image_ids=torch.tensor([i]))
        right += int(result.predictions[0] == labels[i % 4])
    assert found["accuracy"]["after"] == pytest.approx(right / 20)


def test_throughput_is_images_by_the_median_round(model, denoiser, images):
    config = AdaptConfig(steps=2, pairs=3)
    found = benchmark.throughput(Adapter(model, denoiser, config), images, 3)
    assert (found["batch"], found["evaluations"], len(found["seconds"])) == (4, 4 * 6, 3)
    assert found["images_per_second"] == pytest.approx(4 / sorted(found["seconds"])[1])


class Linears(Denoiser):
    """Pixels [3, 4, 4] and a condition [6] through 7 hidden values."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process
        self.table = nn.Parameter(torch.randn(5, 6))
        self.pixels, self.condition, self.out = nn.Linear(48, 7, bias=False), nn.Linear(6, 7, bias=False), nn.Linear(7, 48, bias=False)

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return 3, 4, 4

    def class_embeddings(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters.get("table", self.table.detach())

    def null_embedding(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return self.class_embeddings(parameters)[0]

    def adaptable(self) -> list[str]:
        return ["pixels.weight"]

    def forward(self, x_t: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        rows = condition.repeat_interleave(len(x_t) // len(condition), dim=0)
        return self.out((self.pixels(x_t.flatten(1)) + self.condition(rows)).sin()).view_as(x_t)


@pytest.mark.parametrize("compile", ["off", "regional"])
@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_those_counted_by_hand(process, batch, compile):
    model, denoiser = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), Linears(process)
    steps, pairs = 2, 3
    classifier = 2 * 48 * 5  # forwards: before, in each step and after; and a gradient to the weights in each step
    forward, to_condition = 2 * (48 * 7 + 6 * 7 + 7 * 48), 2 * (48 * 7 + 7 * 6)  # the weights are frozen, the pixels have no gradient
    expected = (2 + 2 * steps) * classifier + steps * pairs * (forward + to_condition)
    config = AdaptConfig(steps=steps, pairs=pairs, compile=compile)
    assert benchmark.flops(model, denoiser, config, torch.rand(batch, 3, 4, 4)) == batch * expected


# --- a process of its own


@pytest.mark.slow
def test_first_image_is_adapted_in_a_process_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit('a file of the working folder was imported')\n")
    (tmp_path / "classifier").symlink_to(DIGITS / "classifier")
    monkeypatch.chdir(tmp_path)
    subject = load_subject(None, None, None, 3, CPU)
    config = EVERY_IMAGE.replace(seed=3, timestep_range=(100, 900))
    found = benchmark.first_image("local-dir:classifier", str(DIGITS / "denoiser"), subject.images, config)
    assert found["predictions"] == adapt(subject.model, subject.denoiser, subject.images, config=config).predictions.tolist()
    parts = [found[name] for name in ("imports", "loading", "adaptation")]
    assert min(parts) > 0
    assert found["total"] == pytest.approx(sum(parts))
    resident = found["memory"]["resident"]
    assert 2**24 < resident["before"] <= resident["peak"]


@pytest.mark.slow
def test_a_process_that_fails_is_told_by_its_last_line(images):
    with pytest.raises(ChildProcessError, match=r"status 1: .*local-dir:nowhere.*there is no folder"):
        benchmark.first_image("local-dir:nowhere", str(DIGITS / "denoiser"), images, EVERY_IMAGE)


# --- what it runs on


def test_the_zoo_comes_with_corrupted_digits_and_their_labels():
    subject = load_subject(None, None, None, 12, CPU)
    clean, labels = zoo.example("digits")
    assert torch.equal(subject.labels, labels[:12])
    for i in (0, 3, 11):
        name, severity = list(DIGITS_C.items())[i % len(DIGITS_C)]
        assert torch.equal(subject.images[i], corrupt(clean[: i + 1], name, severity)[i])


def test_models_of_ones_own_get_random_images_of_their_size_or_a_folder_of_images(tmp_path):
    model, denoiser = OWN[1], OWN[3]
    subject = load_subject(model, denoiser, None, 5, CPU)
    assert subject.images.shape == (5, 3, 32, 32)
    assert subject.labels is None
    assert isinstance(subject.denoiser, DiT)
    for name, value in (("a.png", 50), ("b.png", 200)):
        Image.new("RGB", (40, 50), (value, value, value)).save(tmp_path / name)
    subject = load_subject(model, denoiser, tmp_path, 3, CPU)
    assert (subject.images[:, 0, 0, 0] * 255).round().tolist() == [50, 200, 50]
    assert not subject.model.training
    assert not subject.denoiser.training


# --- the command


@pytest.mark.slow
def test_bench_prints_tables_and_writes_every_sample(tmp_path, capsys):
    path = tmp_path / "bench.json"
    main(["bench", "--calls", "20", "--batches", "2", "1", "--steps", "1", "--json", str(path), "--device", "cpu"])
    printed, found = capsys.readouterr(), json.loads(path.read_text())
    assert not printed.err  # no progress where no terminal is
    assert (found["benchmark"], found["subject"], found["preset"]) == ("bench", "digits zoo", "FAST")
    config = AdaptConfig(**found["config"])
    assert config == presets.FAST.replace(precheck="off", steps=1)
    one = found["latency"]
    assert len(one["seconds"]) == len(one["evaluations"]) == one["calls"] == 20
    assert min(one["evaluations"]) >= config.pairs  # every image is adapted
    subject = load_subject(None, None, None, 20, CPU)
    direct = adapt(subject.model, subject.denoiser, subject.images, config=config)
    assert one["accuracy"]["after"] == pytest.approx((direct.predictions == subject.labels).double().mean().item())
    assert [row["batch"] for row in found["throughput"]] == [2, 1]
    for row in found["throughput"]:
        assert row["evaluations"] == int(direct.evaluations[: row["batch"]].sum())
        assert len(row["seconds"]) == 3
        assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / found["peak"]["flops"])
        assert row["memory"]["resident"]["peak"] >= row["memory"]["resident"]["before"] > 0
        assert f"{row['images_per_second']:.1f}" in printed.out
    assert found["peak"]["dtype"] == "float32"
    assert set(found["cold_start"]) == {"empty", "kept"}
    assert found["environment"]["torch"] == torch.__version__.partition("+")[0]
    assert found["date"].endswith("+00:00")
    assert (len(found["load_average"]), found["threads"]) == (3, torch.get_num_threads())
    assert f"Accuracy {100 * one['accuracy']['before']:.1f} -> {100 * one['accuracy']['after']:.1f} %" in printed.out
    assert f"{1e3 * one['p50']:.1f}" in printed.out


@pytest.mark.slow
def test_bench_of_ones_own_models_says_that_accuracy_is_not_known(tmp_path, capsys):
    path = tmp_path / "bench.json"
    settings = ("--calls", "20", "--batches", "1", "--preset", "PAPER", "--pairs", "2", "--steps", "1", "--precision", "bf16")
    main(["bench", *OWN, *settings, "--json", str(path), "--device", "cpu"])
    found = json.loads(path.read_text())
    assert found["latency"]["accuracy"] is None
    assert found["latency"]["evaluations"] == [2] * 20
    assert (found["peak"]["dtype"], found["config"]["denoiser_parameters"]) == ("bfloat16", "all")
    assert "accuracy is not known" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calls", "19"], "calls is 19; give 20 or more"),
        (["--batches", "1", "0"], "batches is 1, 0; give different whole numbers of at least 1"),
        (["--batches", "4", "4"], "batches is 4, 4"),
        (["--batches"], "batches is empty"),
        (["--device", "cuda:99"], "device is 'cuda:99', which is not available"),
        (["--device", "toaster"], "device is 'toaster', which is not available"),
        (["--json", "nowhere/at/all.json"], "give a file in a folder that exists"),
        (["--preset", "SLOW"], "preset is 'SLOW'"),
        (["--steps", "0"], "steps is 0"),
        (["--model", "resnet18"], "model is 'resnet18', and the denoiser is the digits zoo's"),
        (["--denoiser", "folder"], "denoiser is 'folder', and the model is the digits zoo's"),
        (["--model", "local-dir:nowhere", *OWN[2:]], "there is no folder 'nowhere'"),
        (["--model", f"local-dir:{DIGITS / 'denoiser'}", *OWN[2:]], "which timm cannot load"),
        (["--model", "no_such_model", *OWN[2:]], "model is 'no_such_model', which timm cannot load"),
        ([*OWN[:2], "--denoiser", str(DIGITS)], "config.json is missing"),
        ([*OWN, "--images", "nowhere"], "images is 'nowhere', which is not a folder"),
        (["--timestep-range", "0", "5000"], "timestep_range is (0, 5000)"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_anything_is_measured(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_help_says_what_the_default_is(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert "--precheck" in shown
    assert "every image is adapted" in " ".join(shown.replace("│", " ").split())
