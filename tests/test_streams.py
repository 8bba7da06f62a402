"""The order of a run's images: each stream by its definition, subsets, resuming, and data that cannot fill a stream."""

import json
from collections import Counter
from itertools import pairwise

import pytest
import torch

from dtta_fast import presets
from dtta_fast.data.base import Images
from dtta_fast.runs.config import RunConfig, with_settings
from dtta_fast.runs.evaluate import evaluate
from dtta_fast.runs.folder import read_records
from dtta_fast.runs.streams import batches_of
from dtta_fast.runs.worker import open_data

ONLINE = presets.ONLINE.replace(pairs=1)
CLASSES, EACH = 8, 40


class Listed(Images):
    """A listing without pixels: `corruptions` at `severities`, with the same images under each."""

    def __init__(self, corruptions=("fog", "snow", "blur"), severities="12345", labels=True, classes=CLASSES):
        groups = [f"{name}{severity}" for name in corruptions for severity in severities] or ["all"]
        self.groups = [group for group in groups for _ in range(classes * EACH)]
        self.names = [f"{group[:-1]}/{group[-1]}/{i:04d}.png" for group in groups for i in range(classes * EACH)]
        self.labels = torch.arange(classes).repeat_interleave(EACH).repeat(len(groups)).numpy() if labels else None
        self.classes = ()

    def read(self, index):
        raise AssertionError("an order needs no pixels")


def order(stream, data=None, **changes):
    run = RunConfig(protocol="continual", stream=stream, batch=10, adapt=ONLINE.replace(seed=changes.pop("seed", 0)), **changes)
    batches = batches_of(run, data or Listed())
    assert max(len(batch) for batch in batches) <= 10
    assert all(list(batch) == sorted(batch) for batch in batches)  # as the records of a batch are
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize("stream", ["grouped", "gradual", "smooth", "correlated", "mixed"])
def test_every_image_occurs_once_and_the_seed_decides_the_order(stream):
    found = order(stream)
    assert sorted(found) == list(range(len(Listed().groups)))
    assert order(stream) == found
    assert (order(stream, seed=1) == found) == (stream == "grouped")


def test_gradual_rises_and_falls():
    data = Listed()
    shown = [data.groups[i] for i in order("gradual")]
    stages = [group for k, group in enumerate(shown) if k == 0 or group != shown[k - 1]]
    assert stages == [f"{name}{s}" for name in ("fog", "snow", "blur") for s in "123454321"]
    counts = Counter(shown[: CLASSES * EACH * 5])
    assert set(counts.values()) == {CLASSES * EACH}
    assert shown[: CLASSES * EACH // 2] == ["fog1"] * (CLASSES * EACH // 2)  # the other half comes on the way down


def test_smooth_fades_from_stage_to_stage():
    data = Listed(corruptions=("fog", "snow"), severities="12")
    shown = [data.groups[i] for i in order("smooth", data)]
    means = {group: sum(k for k, name in enumerate(shown) if name == group) / len(shown) for group in ("fog2", "snow2")}
    assert means["fog2"] < means["snow2"]
    assert shown[:20].count("fog1") > 15
    crossing = [name for name in shown if name in ("fog1", "fog2")]
    changes = sum(one != other for one, other in pairwise(crossing))
    assert changes > 50  # a gradual stream would change twice


def test_correlated_shows_few_classes_at_a_time():
    data = Listed(severities="5")
    windows = [order("correlated", data)[k : k + 40] for k in range(0, 960, 40)]
    shares = [Counter(int(data.labels[i]) for i in window).most_common(1)[0][1] / 40 for window in windows]
    mixed = [order("mixed", data)[k : k + 40] for k in range(0, 960, 40)]
    even = [Counter(int(data.labels[i]) for i in window).most_common(1)[0][1] / 40 for window in mixed]
    assert sum(shares) > 1.8 * sum(even)
    assert [data.groups[i] for i in order("correlated", data)] == data.groups  # corruption after corruption


def test_correlated_slots_follow_the_dirichlet_distribution():
    """A class's share of a slot has variance (1 - 1/K) / K / (K δ + 1) for a symmetric Dirichlet distribution of concentration δ."""
    from dtta_fast.runs import streams

    shares = []
    for seed in range(200):
        generator = streams.random.Random(seed)
        weights = [generator.gammavariate(streams.CONCENTRATION, 1.0) for _ in range(CLASSES)]
        shares += [weight / sum(weights) for weight in weights]
    variance = float(torch.tensor(shares).var())
    expected = (1 - 1 / CLASSES) / CLASSES / (CLASSES * streams.CONCENTRATION + 1)
    assert variance == pytest.approx(expected, rel=0.15)


def test_mixed_leaves_no_order():
    data = Listed()
    first = Counter(data.groups[i] for i in order("mixed")[:1500])
    assert len(first) == 15
    assert max(first.values()) < 150


@pytest.mark.parametrize(
    ("stream", "data", "message"),
    [
        ("gradual", Listed(severities="5"), "at least two severities of each corruption, and fog has severity 5 alone: name more"),
        ("smooth", Listed(corruptions=()), "this data set has 'all'"),
        ("correlated", Listed(labels=False), "this data set has none"),
        ("correlated", Listed(classes=1), "images of one class only"),
    ],
)
def test_data_that_cannot_fill_a_stream_is_refused(stream, data, message):
    with pytest.raises(ValueError, match=message):
        order(stream, data)


@pytest.mark.parametrize(("protocol", "why"), [("episodic", "do not depend on each other"), ("online", "starts anew at every corruption")])
def test_a_stream_needs_a_state_that_goes_on(protocol, why):
    config = presets.FAST if protocol == "episodic" else ONLINE
    with pytest.raises(ValueError, match=f"stream is 'mixed' with protocol '{protocol}'.*{why}.*continual"):
        RunConfig(protocol=protocol, stream="mixed", adapt=config)
    with pytest.raises(ValueError, match="stream is 'sorted'"):
        RunConfig(protocol="continual", stream="sorted", adapt=ONLINE)


def test_a_subset_names_the_images_of_every_corruption(tmp_path):
    listed = tmp_path / "ids.txt"
    listed.write_text("0003.png\n\n0300.png\n")
    data = Listed()
    found = order("grouped", data, subset=str(listed))
    assert [data.names[i] for i in found] == [f"{g[:-1]}/{g[-1]}/{n}.png" for g in dict.fromkeys(data.groups) for n in ("0003", "0300")]
    assert len(order("grouped", data, subset=str(listed), per_class=1)) == len(found)  # they are of different classes
    assert order("grouped", data, subset=str(listed), per_class=5) == found
    listed.write_text("0003.png\n9999.png\n")
    with pytest.raises(ValueError, match=r"fog1 lacks 1 of its 2 images, such as '9999.png'.*look like '0000.png'"):
        order("grouped", data, subset=str(listed))
    listed.write_text("\n")
    with pytest.raises(ValueError, match="names no image"):
        order("grouped", data, subset=str(listed))
    with pytest.raises(ValueError, match="there is no such file"):
        order("grouped", data, subset=str(tmp_path / "none.txt"))


def test_a_mixed_run_ends_is_described_and_goes_on_where_it_was_stopped(tmp_path):
    run = RunConfig(corruptions=("contrast", "fog"), per_class=1, batch=4, protocol="continual", stream="mixed", adapt=ONLINE)
    whole = evaluate(run, tmp_path / "whole")
    assert whole["config"]["stream"] == "mixed"
    records = list(read_records(tmp_path / "whole" / "records.jsonl"))
    assert [record["image_id"] for record in records] == [i for batch in batches_of(run, open_data(run)) for i in sorted(batch)]
    assert len({record["group"] for record in records[:4]}) == 2
    assert set(whole["groups"]) == {"contrast3", "fog2"}

    class Stopped(Exception):
        pass

    def stop(some):
        seen.append(some)
        if len(seen) == 3:
            raise Stopped

    seen = []
    with pytest.raises(Stopped):
        evaluate(run, tmp_path / "part", advance=stop)
    evaluate(run, tmp_path / "part")
    again = list(read_records(tmp_path / "part" / "records.jsonl"))
    for one, other in zip(again, records, strict=True):
        assert {key: value for key, value in one.items() if key != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


def test_a_config_without_a_stream_is_that_of_an_older_version():
    described = RunConfig().described()
    assert "stream" not in described
    assert "subset" not in described["data"]
    mixed = RunConfig(protocol="continual", stream="mixed", subset="ids.txt", adapt=ONLINE)
    assert RunConfig.from_description(mixed.described()) == mixed
    assert with_settings(RunConfig(), json.loads(json.dumps(mixed.described()))) == mixed
