"""The CIFAR-10 reader and the training of its diffusion model, on a few random images."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from dtta_fast.denoisers import ClassUNet
from dtta_fast.denoisers.noise_process import NoiseProcess

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture(scope="module")
def cifar() -> Any:
    spec = importlib.util.spec_from_file_location("cifar_training", BENCH / "zoo" / "cifar.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def part(path: Path, count: int, seed: int) -> list[np.ndarray]:
    """Writes JPEG files as one array; returns the images."""
    random, files, images = np.random.default_rng(seed), [], []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(np.kron(random.integers(0, 255, (4, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))).save(file, "JPEG")
        files.append(np.frombuffer(file.getvalue(), np.uint8))
        images.append(np.array(Image.open(file)))
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=np.concatenate(files), offsets=offsets, labels=np.arange(count, dtype=np.uint8) % 10)
    return images


def test_parts_are_read_in_order_and_split(cifar, tmp_path, monkeypatch):
    images = [image for i in range(3) for image in part(tmp_path / f"train{i}.npz", 20, i)]
    part(tmp_path / "test.npz", 5, 9)
    monkeypatch.setattr(cifar.cifar10, "TRAINING", 50)
    for split, count in (("train", 50), ("validation", 10), ("test", 5)):
        found, labels = cifar.cifar10.load(tmp_path, split)
        assert found.shape == (count, 3, 32, 32)
        assert found.dtype == torch.uint8
        assert len(labels) == count
    assert np.array_equal(cifar.cifar10.load(tmp_path, "validation")[0][0].permute(1, 2, 0).numpy(), images[50])
    with pytest.raises(FileNotFoundError, match="holds neither cifar-10-batches-py nor train"):
        cifar.cifar10.load(tmp_path / "nowhere", "train")


@pytest.mark.slow
def test_torchvision_s_folder_is_read(cifar, tmp_path, monkeypatch):
    import torchvision.datasets

    class Few:
        def __init__(self, root: str, train: bool, download: bool) -> None:
            assert not download
            self.data, self.targets = np.arange(3 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(3, 32, 32, 3), [3, 1, 2]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Few)
    (tmp_path / "cifar-10-batches-py").mkdir()
    images, labels = cifar.cifar10.load(tmp_path, "test")
    assert labels.tolist() == [3, 1, 2]
    assert torch.equal(images[1, 2], torch.from_numpy(Few("", False, False).data[1, :, :, 2]))


def test_the_process_is_the_schedulers(cifar):
    theirs = NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"))
    torch.testing.assert_close(cifar.process().table, theirs.table, rtol=1e-4, atol=1e-5)
    assert torch.equal(cifar.process().model_time, theirs.model_time)


def test_draws_change_contrast_and_brightness(cifar):
    """Of a chequered image, a draw without noise is one of two values, in the range that JITTER allows."""
    images = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    images[..., ::2] = 140
    x_t = cifar.drawn(images, torch.zeros(1, dtype=torch.long), torch.tensor([[1.0, 0, 0, 0, 1]]).expand(1000, 5), 64, 0).x_t
    low, high = x_t.amin((1, 2, 3)), x_t.amax((1, 2, 3))
    contrast, brightness = (high - low) / (40 / 127.5), (high + low) / 2 - (120 / 127.5 - 1)
    assert 0.7 <= contrast.min() < 0.8 < 1.2 < contrast.max() <= 1.3
    assert -0.3 <= brightness.min() < -0.2 < 0.2 < brightness.max() <= 0.3


def test_draws_are_of_the_iteration_and_targets_of_the_process(cifar, monkeypatch):
    monkeypatch.setattr(cifar, "JITTER", 0.0)
    images, labels = torch.randint(0, 255, (7, 3, 32, 32), dtype=torch.uint8), torch.arange(7)
    table = cifar.process().table
    one, again, other = (cifar.drawn(images, labels, table, 64, seed) for seed in (5, 5, 6))
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], other[0])
    x_t, timesteps, classes, rivals, target = one
    a, s = (table[timesteps][:, column, None, None, None] for column in (0, 1))
    x0 = a * x_t - s * target  # of v
    whole = (images.float() / 127.5 - 1).flatten(1)
    for i in range(64):
        near = [(x0[i].flatten() - view.flatten()).abs().max() < 1e-2 for row in whole for view in (row, row.view(3, 32, 32).flip(2))]
        assert any(near)
        assert classes[i] == 10 or near.index(True) // 2 == classes[i]
        assert near.index(True) // 2 != rivals[i]
    assert set(rivals.tolist()) == set(range(10))
    assert set(classes.tolist()) <= {*range(7), 10}
    assert 10 in classes


def test_the_second_part_pushes_wrong_classes_up(cifar, monkeypatch):
    monkeypatch.setattr(cifar, "JITTER", 0.0)
    images, labels = torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.arange(20) % 10
    images += (25 * labels)[:, None, None, None].byte()  # a class is a grey
    training = cifar.Training(cifar.TINY, torch.device("cpu"), 0)
    draw = cifar.drawn(images, labels, training.process.table, 32, 3)
    labelled = draw.classes < cifar.CLASSES

    def margin() -> float:
        with torch.no_grad():
            own, rival = (training.pair_losses(draw, classes) for classes in (draw.classes, draw.rivals))
        return float((rival - own)[labelled].mean())

    before = margin()
    for _ in range(20):
        _, right = training.step(images, labels, 32, cifar.CONTRAST_FROM)
        assert 0 <= float(right) <= 1
    assert margin() > before + 1e-3
    assert float(training.step(images, labels, 16, 0.0)[1]) == 0


@pytest.mark.slow
def test_a_training_goes_on_where_it_stopped_and_becomes_a_denoiser(cifar, tmp_path, monkeypatch, capsys):
    root, out, to = tmp_path / "root", tmp_path / "out", tmp_path / "denoiser"
    root.mkdir()
    part(root / "train0.npz", 60, 0)
    monkeypatch.setattr(cifar.cifar10, "TRAINING", 30)
    common = ["cifar.py", "train", "--root", str(root), "--out", str(out), "--tiny", "--total", "1"]
    reached = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", [*common, "--minutes", "0.05"])
        cifar.main()
        reached.append(json.loads((out / "training.json").read_text()))
    assert 0 < reached[0]["iteration"] < reached[1]["iteration"]
    assert reached[1]["seconds"] > reached[0]["seconds"] + 2
    weights = cifar.load_file(out / "weights0.safetensors")
    assert all(value.dtype == torch.bfloat16 and bool(value.isfinite().all()) for value in weights.values())
    monkeypatch.setattr(sys, "argv", [*common, "--minutes", "0.05", "--seed", "1"])
    with pytest.raises(ValueError, match="with seed 0; choose another --out"):
        cifar.main()
    monkeypatch.setattr(
        sys, "argv", ["cifar.py", "finish", "--root", str(root), "--out", str(out), "--to", str(to), "--images", "16", "--pairs", "2"]
    )
    cifar.main()
    assert "diffusion classifier, validation: " in capsys.readouterr().out
    denoiser = ClassUNet.from_pretrained(to)
    assert denoiser.calibration is not None
    assert json.loads((to / "training.json").read_text())["images"] == 16
    for name, value in denoiser.unet.state_dict().items():
        torch.testing.assert_close(value.float(), weights[name].float(), rtol=0, atol=0)
    after = ["--out", str(tmp_path / "more"), "--start", str(to)]
    monkeypatch.setattr(sys, "argv", [*common, "--minutes", "0.05", *after])
    cifar.main()
    more = json.loads((tmp_path / "more" / "training.json").read_text())
    assert more["before"]["iteration"] == reached[1]["iteration"]
    assert more["contrast_from"] == 0.0
    with pytest.raises(SystemExit, match="holds a checkpoint, from which the training goes on; leave --start out"):
        cifar.main()
