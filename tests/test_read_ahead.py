"""How much a run over a data set reads at once, and what becomes of images that no memory holds."""

from __future__ import annotations

import importlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from dtta_fast import presets
from dtta_fast.runs.config import RunConfig
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.folder import read_records
from dtta_fast.runs.streams import batches_of
from dtta_fast.runs.worker import fetch, open_data

evaluate_module = importlib.import_module("dtta_fast.runs.evaluate")
worker_module = importlib.import_module("dtta_fast.runs.worker")
RUN = RunConfig(
    corruptions=("contrast",), per_class=1, batch=2, adapt=presets.FAST.replace(steps=1, guard=0, guard_threshold=0.0, precheck="off")
)
PICTURE = torch.full((3, 8, 8), 100, dtype=torch.uint8)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 983040000000 bytes")]
)
def test_an_image_that_no_memory_holds_is_an_error_record(monkeypatch, tmp_path, error):
    plain = evaluate_module.Worker.crop
    third = batches_of(RUN, open_data(RUN))[1][0]
    image = open_data(RUN)[third]

    def crop(self, given):
        if torch.equal(given, image):
            raise error
        return plain(self, given)

    monkeypatch.setattr(evaluate_module.Worker, "crop", crop)
    evaluate(RUN, tmp_path / "run")
    found = {record["image_id"]: record.get("error") for record in read_records(tmp_path / "run" / "records.jsonl")}
    assert len(found) == 10
    assert [i for i, text in found.items() if text] == [third]
    assert "memory" in found[third].lower()


def test_other_errors_of_a_crop_end_a_run(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate_module.Worker, "crop", lambda *_: (_ for _ in ()).throw(RuntimeError("a mistake in a crop")))
    with pytest.raises(RuntimeError, match="a mistake in a crop"):
        evaluate(RUN, tmp_path / "run")


def test_a_batch_has_a_size_at_most(monkeypatch):
    monkeypatch.setattr(worker_module, "MOST_BATCH", 2 * PICTURE.nbytes)
    found = fetch([PICTURE] * 3, 0, range(3))
    assert sorted(found.images) == [0, 1]
    assert "more than 384 bytes: use a smaller batch" in found.failed[2]


def test_an_image_is_cropped_before_the_next_one_is_read():
    events: list[str] = []

    class Data:
        def __getitem__(self, i: int) -> torch.Tensor:
            events.append(f"read {i}")
            return PICTURE

    def crop(image: torch.Tensor) -> torch.Tensor:
        events.append("crop")
        return image[:, :4, :4].clone()

    found = fetch(Data(), 0, range(2), crop)
    assert events == ["read 0", "crop", "read 1", "crop"]
    assert all(image.shape == (3, 4, 4) for image in found.images.values())


@pytest.mark.parametrize("most", [1, 2**30])
def test_reading_ahead_ends_where_enough_waits(monkeypatch, most):
    """Of batches that wait to be adapted to, by their bytes; with room, as many as AHEAD says."""
    monkeypatch.setattr(evaluate_module, "MOST_AHEAD", most)
    begun, lock = [0], threading.Lock()

    class Data:
        groups = ("a",) * 40

        def __getitem__(self, i: int) -> torch.Tensor:
            with lock:
                begun[0] += 1
            return PICTURE

    class Worker:
        def __init__(self, *_: object) -> None:
            self.crop = lambda image: image.float()

        def stacked(self, batch):
            return torch.stack([*batch.images.values()])

        def adapt(self, batch, crops):
            time.sleep(0.02)  # long enough for what waits to be read
            return [], {}

    monkeypatch.setattr(evaluate_module, "Worker", Worker)
    run = SimpleNamespace(protocol="episodic", workers=3)
    folder = SimpleNamespace(batches=[(i,) for i in range(40)])
    ahead = [begun[0] - done for done, _ in enumerate(evaluate_module._records(run, Data(), range(40), folder), start=1)]
    assert begun[0] == 40
    # the first ones are asked for before any is read
    assert max(ahead[10:30]) <= (1 if most == 1 else evaluate_module.AHEAD * 3)
    assert most == 1 or max(ahead) > 1
