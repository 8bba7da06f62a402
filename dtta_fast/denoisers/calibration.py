"""Statistics of a denoiser's own images, measured without labels, and how to match an image to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.runtime.constants import kept, numbers
from dtta_fast.runtime.files import read_text

LEAST = 8  # minimum images to measure on: with fewer, single images dominate the mean power
MOST_GAIN = 4.0  # largest factor by which a frequency is raised or lowered: what blur has removed completely cannot be recovered
EDGE = 1.0  # the usual range of a statistic ends this many standard deviations from its mean; chosen on validation images (docs/log.md)
NO_POWER = 1e-10  # lower bound of a power in a statistic
SHARPNESS = 8  # exponent of the timestep density, chosen on the validation split of digits-C
USUAL = 0.95  # share of a denoiser's own images that are not outliers: this quantile of their distances is the limit
LEAST_SCATTER = 1e-3  # lower bound, for a statistic that is the same in all images
PIECE = 64  # coefficients summed at once; a table of whole rings would be mostly empty, since the outer ring has thousands
MOST_VALUES = 2**16  # maximum length of a list in a file
MOST_TRUST = 3.0  # with more, corrupted images are trusted too far: their losses are not as clear as those of clean ones
RANGES = {  # valid ranges of the values in a file
    "typical": (-50.0, 50.0),
    "scatter": (1e-4, 100.0),
    "limit": (0.0, 1e6),
    "trust": (0.0, MOST_TRUST),
    "signal": (-1e6, 1e6),
    "spread": (1e-30, 1e6),  # (signal / spread)^8 stays finite
}
FLAT = 1e-4  # standard deviation, for values in [0, 1], below which an image has no contrast to restore


@dataclass(frozen=True)
class Calibration:
    """Statistics of clean images from a denoiser's domain, and the fingerprint of the denoiser they belong to.

    A denoising loss compares a corrupted image with what the denoiser learned from clean ones, so it reacts first of all to the
    corruption: contrast, brightness, blur. Matching moves what is unusual to the edge of the usual range, and leaves the class.

    Attributes:
        fingerprint: the denoiser's fingerprint (see fingerprint()).
        typical, scatter: mean and standard deviation over images of an image's statistics: the mean of its values in [0, 1], the
            logarithm of their standard deviation, and the logarithms of its power at 1, 2 .. cycles per image side after normalisation to
            mean 0 and deviation 1. The last power is that of half the image's height in cycles and beyond.
        limit: the distance() below which 95 % of these images lie.
        signal, spread: mean and standard deviation, in equal parts of the noise process, of how much higher the loss is under a rival
            class than under an image's own class (see calibrate()); empty if not measured.
        trust: how much the log odds that an answer is right rise when its loss is one standard error lower than another's; at most
            MOST_TRUST, and 1 if not measured. 0 says that the loss tells nothing (see calibrate()).
    """

    fingerprint: str
    typical: tuple[float, ...]
    scatter: tuple[float, ...]
    limit: float
    signal: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    trust: float = 1.0

    @classmethod
    @torch.no_grad()
    def measure(cls, denoiser: nn.Module, images: Tensor) -> Calibration:
        """Measures the statistics of at least 8 clean images [N, C, H, W] in [0, 1], cropped to what the denoiser sees.

        Raises:
            ValueError: too few images, values outside [0, 1], or images without contrast.
        """
        if images.ndim != 4 or len(images) < LEAST or min(images.shape[-2:]) < 4:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; give [N, C, H, W] with N of {LEAST} or more, 4 pixels a side and more"
            )
        if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"images is {images.dtype} with values {float(images.min()):.3g} .. {float(images.max()):.3g}; "
                "give floating point in [0, 1], not normalised"
            )
        images = images.float()
        deviation = float(_standardised(images)[2].mean())
        if deviation < FLAT:
            raise ValueError(
                f"images have no contrast: their standard deviation is {deviation:.2g}, and {FLAT:g} is the least; "
                "give photographs, not blank images"
            )
        statistics = _statistics(images)
        scatter, typical = torch.std_mean(statistics, dim=0)
        return cls(
            fingerprint(denoiser),
            tuple(typical.tolist()),
            tuple(scatter.clamp(min=LEAST_SCATTER).tolist()),
            limit=float(_distances_to_the_others(statistics).quantile(USUAL)),
        )

    @torch.no_grad()
    def distance(self, images: Tensor) -> Tensor:
        """Returns the distance [B] of each image's [B, C, H, W] statistics from those of the denoiser's own images.

        The distance is the root mean square over the statistics, in standard deviations.
        """
        found = _statistics(images.float())
        known = min(found.shape[1], len(self.typical))
        known -= found.shape[1] != len(self.typical)  # of another size: the last holds all higher frequencies of the smaller one
        typical, scatter = (numbers(values[:known], images.device, torch.float32) for values in (self.typical, self.scatter))
        return ((found[:, :known] - typical) / scatter).square().mean(1).sqrt()

    @torch.no_grad()
    def match(self, images: Tensor) -> Tensor:
        """Moves each image's [B, C, H, W] unusual statistics towards the edge of their usual range: typical ± EDGE · scatter.

        The images may have any size. Each frequency gets one gain, shared by all of the image's channels; it is bounded by 1/4 and 4, so
        that a power far out of range stays outside. Phases, and so
        shapes and positions, are preserved. Values may leave [0, 1]. An image whose statistics are all usual is returned unchanged.
        """
        values = images.float()
        unit, mean, deviation = _standardised(values)
        spectrum = torch.fft.rfft2(unit, norm="forward")
        power = _power(spectrum, images.shape[-1])[:, 1:].clamp(min=NO_POWER).log()
        typical, scatter = (numbers(found, images.device, torch.float32) for found in (self.typical, self.scatter))
        usual = [_extended(found[2:], power.shape[1]) for found in (typical, scatter)]
        changes = _to_edge(power, *usual) - power
        gain = (changes / 2).exp().clamp(1 / MOST_GAIN, MOST_GAIN)
        rings = _rings(images.shape[-2], images.shape[-1], images.device)
        lower = rings.radius.long()
        bins = int(math.hypot(*(side // 2 for side in images.shape[-2:]))) + 2  # beyond the highest frequency
        gain = _extended(F.pad(gain, (1, 0), value=1.0), bins)
        share = rings.radius - lower
        gains = gain[:, lower] * (1 - share) + gain[:, lower + 1] * share
        unit, _, _ = _standardised(torch.fft.irfft2(spectrum * gains[:, None], s=images.shape[-2:], norm="forward"))
        contrast = deviation.clamp(min=FLAT).log()
        wanted = _to_edge(mean, typical[0], scatter[0]), _to_edge(contrast, typical[1], scatter[1])
        usual_already = (wanted[0] == mean) & (wanted[1] == contrast) & (changes == 0).all(1).view(-1, 1, 1, 1)
        return torch.where(usual_already, values, unit * wanted[1].exp() + wanted[0]).to(images.dtype)

    def density(self, rows: int) -> Tensor:
        """Returns the proposal density [rows] of timesteps, up to a constant, for a noise process with `rows` timesteps:
        (signal / spread)^8.

        The losses of the drawn timesteps are weighted equally: with importance weights (for the minimum-variance proposal, Neyman 1934,
        and others) adaptation gained less (docs/log.md).

        Raises:
            ValueError: signal and spread were not measured.
        """
        if not self.signal:
            raise ValueError("the denoiser's calibration has no signal of its timesteps; measure it by calibrate() or `dtta calibrate`")
        bins = torch.arange(rows, dtype=torch.int64, device="cpu") * len(self.signal) // rows
        signal, spread = (torch.tensor(values, dtype=torch.float64, device="cpu")[bins] for values in (self.signal, self.spread))
        return (signal.clamp(min=0) / spread) ** SHARPNESS

    def to_json(self) -> str:
        """Returns the text of a calibration.json file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes a calibration.json file; if that fails, an existing file is kept."""
        path = Path(path)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
        try:
            with draft.open("x") as file:
                file.write(self.to_json())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path, denoiser: nn.Module) -> Calibration:
        """Reads a file that save() wrote.

        Raises:
            ValueError: the file is missing or damaged, a value is outside RANGES, or the file belongs to another denoiser; the message
                names the file and the field.
        """
        try:
            found = json.loads(read_text(path))
            if not isinstance(found, dict):
                raise ValueError("it holds no JSON object")
            if "power" in found:  # typical had fewer statistics then
                raise ValueError("an older version wrote it")
            read = cls(**{field.name: _field(found, field) for field in dataclasses.fields(cls)})
            _check_lengths(read, denoiser)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a calibration: {error}; measure one by `dtta calibrate`") from error
        if read.fingerprint != fingerprint(denoiser):
            raise ValueError(f"{path} belongs to another denoiser (fingerprint {read.fingerprint}): measure this one by `dtta calibrate`")
        return read


def _field(found: dict[str, Any], field: dataclasses.Field[Any]) -> Any:
    """Reads a field's value from a file's contents and converts it to the type that Calibration stores.

    Raises:
        ValueError: the value is missing, has the wrong type, or is outside RANGES; the message names the field.
    """
    name = field.name
    if name not in found:
        if field.default is dataclasses.MISSING:
            raise ValueError(f"{name} is missing")
        return field.default
    value, low_high = found[name], RANGES.get(name)
    if low_high is None:
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{12}", value):
            raise ValueError(f"{name} is {str(value)[:40]!r}, not 12 hexadecimal digits")
        return value
    whole = field.type != "float"
    if whole and (not isinstance(value, list) or len(value) > MOST_VALUES):
        raise ValueError(f"{name} is {str(value)[:40]!r}, no list of up to {MOST_VALUES} numbers")
    low, high = low_high
    for i, number in enumerate(value if whole else [value]):
        if type(number) not in (int, float) or not low <= number <= high:
            raise ValueError(f"{f'{name}[{i}]' if whole else name} is {str(number)[:40]!r}, no number from {low:g} to {high:g}")
    return tuple(map(float, value)) if whole else float(value)


def _check_lengths(read: Calibration, denoiser: nn.Module) -> None:
    """Raises ValueError if the fields' lengths do not match, or `signal` has more parts than the denoiser has timesteps."""
    if len(read.typical) < 4:
        raise ValueError(f"typical has {len(read.typical)} values, and 4 are the least")
    for one, other in (("scatter", "typical"), ("spread", "signal")):
        if len(getattr(read, one)) != len(getattr(read, other)):
            raise ValueError(f"{one} has {len(getattr(read, one))} values, and {other} {len(getattr(read, other))}: they have one length")
    if not read.limit:
        raise ValueError("limit is 0: it is the distance that usual images are under")
    process: Any = getattr(denoiser, "process", None)
    if process is not None and len(read.signal) > len(process):
        raise ValueError(f"signal has {len(read.signal)} values, and the denoiser {len(process)} timesteps")


@torch.no_grad()
def fingerprint(denoiser: nn.Module) -> str:
    """Hashes the denoiser's noise process, its parameters' names and shapes and the signs of their first values to 12 hexadecimal digits.

    Matrices other than embeddings are left out because quantisation packs them. Signs are used because rounding to half precision does
    not change them.
    """
    found = hashlib.sha256()
    process: Any = getattr(denoiser, "process", None)
    if process is not None:
        found.update(" ".join(f"{value:.4f}" for value in process.table.flatten()[::7].tolist()).encode())
    embeddings = {f"{name}.weight" for name, part in denoiser.named_modules() if isinstance(part, nn.Embedding)}
    for name, parameter in denoiser.named_parameters():
        if parameter.ndim != 2 or name in embeddings:
            signs = parameter.detach().flatten()[:64].cpu().signbit().int().tolist()
            found.update(f"{name} {tuple(parameter.shape)} {signs}".encode())
    return found.hexdigest()[:12]


def _standardised(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises each image [B, C, H, W] to mean 0 and deviation 1; also returns the original means and deviations [B, 1, 1, 1]."""
    deviation, mean = torch.std_mean(images, dim=(1, 2, 3), keepdim=True, correction=0)
    return (images - mean) / deviation.clamp(min=FLAT), mean, deviation


def _statistics(images: Tensor) -> Tensor:
    """Returns each image's [B, C, H, W] mean, log deviation and log power at 1, 2 .. cycles, [B, S], as Calibration.typical has them."""
    unit, mean, deviation = _standardised(images)
    power = _power(torch.fft.rfft2(unit, norm="forward"), images.shape[-1])[:, 1:]
    return torch.cat([mean.flatten(1), deviation.clamp(min=FLAT).log().flatten(1), power.clamp(min=NO_POWER).log()], dim=1)


def _distances_to_the_others(statistics: Tensor) -> Tensor:
    """Computes each image's distance() [N] from the statistics [N, S] of all other images: its own would pull the mean towards it."""
    count, values = len(statistics), statistics.double()
    away = values - values.mean(0)
    mean = -away / (count - 1)  # mean of the others, relative to the mean of all
    variance = (away.square().sum(0) - away.square() * count / (count - 1)) / (count - 2)
    scatter = variance.clamp(min=LEAST_SCATTER**2).sqrt()
    return ((away - mean) / scatter).square().mean(1).sqrt()


class _Rings(NamedTuple):
    """Groups rfft2's coefficients [H, W/2+1] into rings by their distance from frequency 0.

    radius: in cycles per image side. weight: [H, W/2+1], how many coefficients of the full transform each one represents. parts, sums:
    indices of the terms for the two levels of a sum over each ring, padded with the index past the last term (see _ring_sums).
    """

    radius: Tensor
    weight: Tensor
    parts: Tensor
    sums: Tensor


@kept
def _rings(height: int, width: int, device: torch.device) -> _Rings:
    rows = np.fft.fftfreq(height, 1 / height)
    radius = np.hypot(rows[:, None], np.arange(width // 2 + 1)[None, :])
    weight = np.full(radius.shape, 2.0)  # rfft2 leaves out one of each conjugate pair
    weight[:, 0] = 1.0
    if width % 2 == 0:
        weight[:, -1] = 1.0
    ring = np.rint(radius).astype(np.int64).clip(max=height // 2).ravel()
    members = [np.flatnonzero(ring == number) for number in range(height // 2 + 1)]
    pieces = [[own[first : first + PIECE] for first in range(0, len(own), PIECE)] for own in members]
    ends = np.cumsum([len(own) for own in pieces])
    sums = [np.arange(end - len(own), end) for own, end in zip(pieces, ends, strict=True)]
    parts = _padded([piece for own in pieces for piece in own], ring.size)
    shares = [torch.tensor(values, dtype=torch.float32, device=device) for values in (radius, weight)]
    orders = [torch.tensor(values, dtype=torch.int64, device=device) for values in (parts, _padded(sums, int(ends[-1])))]
    return _Rings(shares[0], shares[1], orders[0], orders[1])


def _padded(rows: list[np.ndarray[Any, np.dtype[np.int64]]], filler: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Stacks rows of numbers into one array [N, longest], padded with `filler`."""
    found = np.full((len(rows), max(map(len, rows))), filler, dtype=np.int64)
    for i, row in enumerate(rows):
        found[i, : len(row)] = row
    return found


def _ring_sums(values: Tensor, rings: _Rings) -> Tensor:
    """Sums values [B, coefficients] over each ring, [B, R].

    The summation order is always the same. index_add_ would use atomics on a GPU, whose order changes from run to run.
    """
    for numbers_of_addends in (rings.parts, rings.sums):
        values = F.pad(values, (0, 1))[:, numbers_of_addends].sum(-1)
    return values


def _power(spectrum: Tensor, width: int) -> Tensor:
    """Returns the mean power [B, R] of coefficients [B, C, H, W/2+1] by integer radius; the last entry is half the height and beyond."""
    rings = _rings(spectrum.shape[-2], width, spectrum.device)
    power = (spectrum.abs().square().mean(1) * rings.weight).flatten(1)
    return _ring_sums(power, rings) / _ring_sums(rings.weight.flatten()[None], rings)


def _to_edge(values: Tensor, typical: Tensor, scatter: Tensor) -> Tensor:
    """Clamps statistics to their usual range."""
    return torch.minimum(torch.maximum(values, typical - EDGE * scatter), typical + EDGE * scatter)


def _extended(power: Tensor, bins: int) -> Tensor:
    """Returns the first `bins` entries along the last dimension, repeating the last one if there are fewer."""
    return power[..., torch.arange(bins, dtype=torch.int64, device=power.device).clamp(max=power.shape[-1] - 1)]
