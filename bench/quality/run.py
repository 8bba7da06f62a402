"""Measures the accuracy and cost of every method on a corrupted benchmark.

    python bench/quality/run.py digits|fashion|open_vocabulary [--images 500] [--seeds 3] [--only NAME ...] [--unseen | --ablations]
    python bench/quality/run.py cifar_resnet|cifar_convnext --root FOLDER [--denoiser FOLDER] [..]

All methods see the same corrupted and clean images; a seed sets a method's random draws. The results go to
bench/results/quality_BENCHMARK.json, with one record per method: the accuracy and every answer by corruption, the denoiser's forward and
backward passes, seconds per image, how many right answers turned wrong, and the expected calibration error. A method that is run again
replaces its record; with --keep, only the seeds that its record lacks are measured. With --workers, methods and seeds run beside each
other, in processes of one thread each; the seconds are then those of one core. bench/readme.py makes the tables and bench/quality/plot.py
the plots.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ablations import ABLATIONS
from methods import CIFAR as CIFAR_METHODS
from methods import METHODS, ZERO_SHOT, Method, Setting
from torch import Tensor, nn

from dtta_fast import zoo
from dtta_fast.data.corruptions import DIGITS_C, FASHION_C, UNSEEN, corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.data.fashion import load_fashion
from dtta_fast.denoisers import ClassUNet
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.calibration import fingerprint
from dtta_fast.metrics import bootstrap_interval, calibration_error
from dtta_fast.runtime import environment

RESULTS = Path(__file__).parents[1] / "results"
FASHION = Path(__file__).parents[1] / "zoo" / "fashion_weights"
CIFAR = Path(__file__).parents[1] / "zoo" / "cifar_weights" / "denoiser"
LOADERS = {"digits": (load_digits, DIGITS_C), "fashion": (load_fashion, FASHION_C), "open_vocabulary": (load_digits, DIGITS_C)}
TABLES = {"open_vocabulary": ZERO_SHOT, "cifar_resnet": CIFAR_METHODS, "cifar_convnext": CIFAR_METHODS}
BENCHMARKS = (*LOADERS, "cifar_resnet", "cifar_convnext")


class Subject(NamedTuple):
    """The models, clean training images, image streams by name, labels and severities of a benchmark."""

    model: nn.Module
    denoiser: Denoiser
    train: Tensor
    streams: dict[str, Tensor]
    labels: Tensor
    severities: dict[str, int]


def subject(args: argparse.Namespace) -> Subject:
    """Loads a benchmark's models and images."""
    if args.benchmark.startswith("cifar"):
        import natural

        model = natural.cifar_classifiers.load(args.benchmark.partition("_")[2])
        train = natural.cifar10.load(args.root, "train")[0][:1000].float() / 255
        return Subject(
            model,
            ClassUNet.from_pretrained(args.denoiser),
            train,
            *natural.streams(args.root, args.split, args.images),
            natural.severities(),
        )
    load, severities = LOADERS[args.benchmark]
    severities = UNSEEN if args.unseen else severities
    clean, labels = (part[: args.images] for part in load(args.split))
    streams = {**{name: corrupt(clean, name, severity) for name, severity in severities.items()}, "clean": clean}
    models = zoo.load(FASHION if args.benchmark == "fashion" else args.benchmark)
    return Subject(*models, load("train")[0][:1000], streams, labels, severities)


def measure(method: Method, setting: Setting, streams: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
    """Returns, for each stream, its accuracy, which answers are right (a string of 1 and 0), the cost per image and calibration error."""
    run, reset = method.make(setting)
    rows = {}
    for name, images in streams.items():
        if method.protocol != "continual":
            reset()
        ids, start = torch.arange(len(images)), time.perf_counter()
        answers = [run(images[part], ids[part]) for part in ids.split(method.batch)]
        seconds = time.perf_counter() - start
        logits = torch.cat([answer.logits for answer in answers])
        right = logits.argmax(1) == labels
        rows[name] = {
            "accuracy": float(right.float().mean()),
            "right": "".join(str(int(r)) for r in right),
            "forwards": sum(answer.forwards for answer in answers) / len(images),
            "backwards": sum(answer.backwards for answer in answers) / len(images),
            "seconds": seconds / len(images),
            "calibration_error": calibration_error(logits.double().softmax(1).amax(1), right),
        }
    return rows


def measured(args: argparse.Namespace, tasks: list[tuple[str, int]]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Measures methods under seeds, and yields (method, seed, rows) in the order in which they finish."""
    if args.workers == 1:
        own = subject(args)
        for name, seed in tasks:
            yield name, seed, one(args, name, seed, own)
        return
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = {pool.submit(one, args, name, seed): (name, seed) for name, seed in tasks}
        for future in as_completed(waiting):
            yield *waiting[future], future.result()


def one(args: argparse.Namespace, name: str, seed: int, own: Subject | None = None) -> dict[str, Any]:
    """Measures one method under one seed; see measure()."""
    own = own or subject(args)
    return measure(table(args)[name], Setting(own.model, own.denoiser, own.train, seed), own.streams, own.labels)


def table(args: argparse.Namespace) -> dict[str, Method]:
    """Returns the methods of a benchmark."""
    return ABLATIONS if args.ablations else TABLES.get(args.benchmark, METHODS)


def kept(record: dict[str, Any] | None, setup: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a record's seeds, or none if it was measured in another setup: images, denoiser or settings differ."""
    setup = json.loads(json.dumps(setup))  # lists in place of tuples, as in a record
    return list(record["runs"]) if record is not None and all(record.get(name) == value for name, value in setup.items()) else []


def bits(rows: dict[str, Any], names: list[str]) -> Tensor:
    """Returns which answers are right, as 0 or 1: [corruptions, images]."""
    return torch.tensor([[float(r) for r in rows[name]["right"]] for name in names])


def summary(runs: list[dict[str, Any]], source: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Averages over corruptions and seeds; adds 95 % intervals over images, and the share of right answers that turned wrong."""
    before, after = bits(source, names), torch.stack([bits(rows, names) for rows in runs])
    mean = {
        key: sum(rows[name][key] for rows in runs for name in names) / (len(runs) * len(names))
        for key in ("forwards", "backwards", "seconds")
    }
    return {
        "accuracy": float(after.mean()),
        "interval": bootstrap_interval(after.mean((0, 1))),
        "gain": float((after - before).mean()),
        "gain_interval": bootstrap_interval((after - before).mean((0, 1))),
        "of_seeds": [float(one.mean()) for one in after],
        "negative_flips": float(((before == 1) & (after == 0)).float().mean()),
        "worst": min(((float((after[:, i] - before[i]).mean()), name) for i, name in enumerate(names)), default=None),
        "calibration_error": sum(rows[name]["calibration_error"] for rows in runs for name in names) / (len(runs) * len(names)),
        **mean,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the seeds on record, if the method's settings have not changed")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", nargs="*")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--unseen", action="store_true", help="corruptions on which no setting was chosen")
    kind.add_argument("--ablations", action="store_true", help="the paper's ablations instead of the methods")
    parser.add_argument("--split", choices=["validation", "test"], default="test", help="validation to choose, test for the table")
    parser.add_argument("--root", type=Path, help="the folder with CIFAR-10")
    parser.add_argument("--denoiser", type=Path, default=CIFAR, help="the diffusion model of CIFAR-10")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.ablations and args.benchmark == "open_vocabulary":
        parser.error("--ablations needs a classifier and a DiT; give digits or fashion")
    methods = table(args)
    unknown = sorted(set(args.only or ()) - set(methods))
    if unknown:
        parser.error(f"--only names {', '.join(unknown)}; there are {', '.join(methods)}")
    if args.benchmark.startswith("cifar") and (args.root is None or args.unseen):
        parser.error("CIFAR-10 has no --unseen corruptions, and needs --root: the folder that holds it")
    model, denoiser, train, streams, labels, severities = subject(args)
    suffix = "_unseen" if args.unseen else "_ablations" if args.ablations else ""
    path = args.out or RESULTS / f"quality_{args.benchmark}{suffix}.json"
    records = json.loads(path.read_text()) if path.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS, check=False).stdout.strip()
    trust = None if denoiser.calibration is None else denoiser.calibration.trust
    setup = {"images": len(labels), "severities": severities, "split": args.split, "denoiser": f"{fingerprint(denoiser)} {trust}"}
    source = measure((ZERO_SHOT if methods is ZERO_SHOT else METHODS)["source"], Setting(model, denoiser, train, 0), streams, labels)
    setups = {name: setup | {"settings": methods[name].settings} for name in args.only or methods}
    runs = {name: dict(enumerate(kept(records.get(name), own) if args.keep else [])) for name, own in setups.items()}
    tasks = [(name, seed) for name, done in runs.items() for seed in range(max(args.seeds, 1)) if seed not in done]
    for name, seed, rows in measured(args, tasks):
        runs[name][seed] = rows
        done = [runs[name][k] for k in range(len(runs[name])) if k in runs[name]]
        if len(done) < (len(runs[name]) if args.keep else args.seeds):
            continue  # a record holds the first seeds, without gaps
        records[name] = {
            "family": methods[name].family,
            "protocol": methods[name].protocol,
            **setups[name],
            "corrupted": summary(done, source, list(severities)),
            "clean": summary(done, source, ["clean"]),
            "runs": done,
            "workers": args.workers,
            "commit": commit,
            "environment": environment.describe(),
        }
        path.write_text(json.dumps(records) + "\n")
        found, whole = records[name]["corrupted"], records[name]["clean"]
        low, high = found["gain_interval"]
        print(
            f"{name:34} {found['accuracy']:6.1%} gain {found['gain']:+6.1%} ({low:+.1%} .. {high:+.1%})  clean {whole['accuracy']:6.1%}  "
            f"worst {found['worst'][0]:+.1%} {found['worst'][1]}  flips {found['negative_flips']:.1%}  "
            f"error {found['calibration_error']:.3f}  "
            f"{found['forwards']:.1f} + {found['backwards']:.1f} passes, {found['seconds']:.3f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
