"""How the guard's decision depends on its pairs and on the denoiser's precision, on the validation split of digits-C.

    python bench/quality/guard_pairs.py [--images 60]

FAST adapts the images. Wherever it has a changed answer to compare, the losses of 96 pairs under each answer are recorded: on the
calibrated and on uniform timesteps, by the denoiser in float32, and by one whose linear layers compute as in bfloat16 or fp8 (emulated:
weights and activations are rounded, sums are in float32). Decisions on fewer pairs then take every n-th of them. Writes
bench/results/guard_pairs.json, and the losses themselves to guard_pairs.npz beside it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast import Adapter, presets, zoo
from dtta_fast.core import guard
from dtta_fast.core.guard import Answers
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.runtime import environment
from dtta_fast.session.program import ModuleProgram

RESULTS = Path(__file__).parents[1] / "results"
PAIRS = 96
FEWER = (4, 6, 8, 12, 16, 24, 32, 48, 96)
SHIFTS = 8  # different subsets of as many pairs
LARGEST = 448.0  # of float8_e4m3fn
CONFIG = presets.FAST.replace(guard=PAIRS)


def bf16(x: Tensor, dim: int | None) -> Tensor:
    return x.bfloat16().float()


def fp8_by_tensor(x: Tensor, dim: int | None) -> Tensor:
    """Rounds to fp8 with one scale for the whole tensor."""
    scale = x.abs().amax().clamp_min(1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def fp8_by_row(x: Tensor, dim: int | None) -> Tensor:
    """Rounds to fp8 with a scale for each row: a token of the activations, an output of the weights."""
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


class Rounded(nn.Module):
    """A linear layer that rounds its weight and its input, and whose output is bfloat16."""

    def __init__(self, layer: nn.Linear, rounding: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.rounding = rounding(layer.weight.detach(), 1), layer.bias.detach(), rounding

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rounding(x, None), self.weight, self.bias).bfloat16().float()


def rounded(denoiser: Any, rounding: Any) -> Any:
    """Copies a DiT, with the four products of its blocks rounded, and in all forms but bfloat16 the others as in bfloat16."""
    made = copy.deepcopy(denoiser)
    for block in made.network.blocks:
        for part, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            setattr(part, name, Rounded(getattr(part, name), rounding))
        block.adaLN_modulation[1] = Rounded(block.adaLN_modulation[1], bf16)
    return made


class Recorder:
    """Takes the place of ModuleProgram.losses: records the losses of every form, and lets the guard decide by the first."""

    def __init__(self, forms: dict[str, dict[str, Any]]) -> None:
        self.forms, self.stream = forms, ""
        self.rows: dict[str, list[Tensor]] = {name: [] for name in forms}
        self.about: list[dict[str, Any]] = []

    def __call__(self, program: ModuleProgram, state: Any, batch: Any, answers: Answers, wanted: list[list[bool]]) -> list[Tensor]:
        found = {}
        for name, change in self.forms.items():
            problem = dataclasses.replace(program.problem, **change)
            given = (answers.conditions, batch.x0, batch.image_ids, state.step, wanted)
            found[name] = guard.selected_losses(problem, program.schedule, *given)
        predictions = [program.predictions(outputs, batch) for outputs in (answers.standing, answers.after, batch.before)]
        for image, asked in enumerate(zip(*wanted, strict=True)):
            if not any(asked):
                continue
            for name, losses in found.items():
                self.rows[name].append(torch.stack([one[image] for one in losses]))
            answered = [int(one[image]) for one in predictions]
            self.about.append({"stream": self.stream, "id": int(batch.image_ids[image]), "asked": list(asked), "answers": answered})
        return next(iter(found.values()))


def decided(losses: Tensor, asked: Tensor, threshold: float) -> Tensor:
    """Returns the guard's choice [N], 0 for the standing answer, from losses [N, 3, P] and which answers were asked for, [N, 3]."""
    change = losses[:, 1:] - losses[:, :1]
    score = change.mean(2) + threshold * change.std(2) / losses.shape[2] ** 0.5
    score = torch.where(asked[:, 1:], score, torch.inf).clamp(max=1e30)
    best, which = score.min(1)
    return torch.where(best < 0, which + 1, 0)


def table(rows: dict[str, Tensor], about: list[dict[str, Any]], labels: Tensor) -> list[dict[str, Any]]:
    """Decisions by form and number of pairs: how many differ from those of 96 in float32, and how many answers are right."""
    asked = torch.tensor([one["asked"] for one in about])
    answers = torch.tensor([one["answers"] for one in about])
    truth = torch.stack([labels[one["id"]] for one in about])
    threshold, found = CONFIG.guard_threshold, []
    reference = decided(rows["calibrated, float32"], asked, threshold)
    for name, losses in rows.items():
        own = decided(losses, asked, threshold)
        for pairs in FEWER:
            every = PAIRS // pairs
            each = []
            for shift in range(min(every, SHIFTS)):
                choice = decided(losses[:, :, (shift * max(1, every // SHIFTS)) :: every][:, :, :pairs], asked, threshold)
                right = answers.gather(1, choice[:, None])[:, 0] == truth
                standing = (answers[:, 0] == truth) & ~right
                each.append(
                    [*((choice != other).float().mean() for other in (reference, own)), right.float().mean(), standing.float().mean()]
                )
            values = torch.tensor(each).mean(0).tolist()
            heads = ("differs from 96 pairs in float32", "differs from 96 pairs of its own", "right", "turned wrong")
            found.append({"form": name, "pairs": pairs, **dict(zip(heads, values, strict=True))})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    args = parser.parse_args()
    clean, labels = (part[: args.images] for part in load_digits("validation"))
    model, denoiser = zoo.load("digits")
    forms: dict[str, dict[str, Any]] = {
        "calibrated, float32": {},
        "uniform, float32": {"config": CONFIG.replace(timesteps="stratified"), "cumulative": None},
    }
    for name, rounding in (("bfloat16", bf16), ("fp8, a scale per tensor", fp8_by_tensor), ("fp8, a scale per row", fp8_by_row)):
        forms[f"calibrated, {name}"] = {"denoiser": rounded(denoiser.eval(), rounding)}
    recorder, adapter = Recorder(forms), Adapter(model, denoiser, CONFIG)
    ModuleProgram.losses = lambda *given: recorder(*given)  # type: ignore[method-assign]
    for name, images in {"clean": clean, **{kind: corrupt(clean, kind, severity) for kind, severity in DIGITS_C.items()}}.items():
        recorder.stream = name
        adapter.adapt(images)
        print(name, len(recorder.about), flush=True)
    rows = {name: torch.stack(losses) for name, losses in recorder.rows.items()}
    found = {
        "images": args.images * (1 + len(DIGITS_C)),
        "compared": len(recorder.about),
        "threshold": CONFIG.guard_threshold,
        "rows": table(rows, recorder.about, labels),
        "about": recorder.about,
        "versions": environment.describe(),
    }
    (RESULTS / "guard_pairs.json").write_text(json.dumps(found) + "\n")
    np.savez_compressed(RESULTS / "guard_pairs.npz", **{name: losses.numpy() for name, losses in rows.items()})
    for row in found["rows"]:
        print(" ".join(f"{value:.3f}" if isinstance(value, float) else f"{value!s:34}" for value in row.values()))


if __name__ == "__main__":
    main()
