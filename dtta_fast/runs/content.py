"""Checks the content that a run has read: records belong to pixels, labels and groups, not only to paths."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dtta_fast.runtime.files import open_plain

Item = Tensor | tuple[Tensor, Tensor]
# files that a reader of models reads, and the folders of a pipeline's parts
OF_MODELS = re.compile(
    r"(model|pytorch_model|diffusion_pytorch_model|embeddings)\b.*|(config|preprocessor_config|calibration|scheduler_config)\.json"
)
PARTS_OF_MODELS = (
    *(f"text_encoder{number}" for number in ("", "_2", "_3")),
    *("unet", "transformer", "vae", "scheduler", "controlnet"),
)
WHOLE, PIECES = 2**26, 2**10  # bytes of a file that is hashed as a whole, and of how many pieces another one is
MOST_READ = 500  # images that a resumed run reads again; with more records, this many spread evenly over them


class Listing(Protocol):
    """The information that a data set has about its images without reading them: an Images, or a Maps, which has no labels."""

    names: Sequence[str]
    groups: Sequence[str]


def digest(item: Item) -> str:
    """Hashes the pixels of an image [3, H, W], or of an image and its map, to 16 hexadecimal digits.

    Float pixels are quantised to 8 bits first, since their last digits may depend on the processor.
    """
    found = hashlib.blake2b(digest_size=8)
    for part in (item,) if isinstance(item, Tensor) else item:
        if part.is_floating_point():
            part = (part.clamp(0, 1) * 255).round().byte() if part.ndim == 3 else part.half()
        found.update(f"{part.dtype} {tuple(part.shape)} ".encode())
        found.update(part.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def weights_of(run: Any) -> dict[str, str]:
    """Returns digests of a run's models, by the name of the setting; only of those that are files or folders here."""
    given = {name: str(getattr(run, name) or "").removeprefix("local-dir:") for name in ("model", "denoiser", "calibration")}
    return {name: digest_of_files(Path(place)) for name, place in given.items() if place not in ("", "zoo") and os.path.exists(place)}


def digest_of_files(place: Path) -> str:
    """Hashes a file, or the weights and settings of a model's folder and of its parts, to 16 hexadecimal digits.

    Of files above 64 MiB, parts spread from the first to the last byte are hashed. Files of other kinds, such as logs, do not count.
    """
    folders = [place, *(place / part for part in PARTS_OF_MODELS)] if place.is_dir() else []
    inside = sorted(path for folder in folders for path in folder.glob("*") if OF_MODELS.fullmatch(path.name) and path.is_file())
    found = hashlib.blake2b(digest_size=8)
    for path in inside or [place]:
        if path.is_dir():
            continue
        size = path.stat().st_size
        found.update(f"{path.relative_to(place)} {size} ".encode())
        with open_plain(path, 2**50) as file:
            if size <= WHOLE:
                found.update(file.read())
                continue
            step = WHOLE // PIECES
            for piece in range(PIECES):
                file.seek(piece * (size - step) // (PIECES - 1))
                found.update(file.read(step))
    return found.hexdigest()


def mismatch(record: Mapping[str, Any], data: Listing) -> str | None:
    """Describes how a record differs from the data set's current entry for its image; None if it does not."""
    i, labels = record["image_id"], getattr(data, "labels", None)
    label = None if labels is None else int(labels[i])
    for field, now in (("path", data.names[i]), ("group", data.groups[i]), ("label", label)):
        if record[field] != now:
            return f"{field} is {shortened(record[field])} for image {i}, and {shortened(now)} in the data set"
    return None


def shortened(value: object, most: int = 200) -> str:
    """Formats a value for an error message and truncates it if it is long."""
    text = repr(value[: most + 1] if isinstance(value, str | list) else value)
    return text if len(text) <= most else f"{text[:most]}..."


def read_again(records: Iterable[Mapping[str, Any]], data: Any, workers: int) -> None:
    """Compares the images of at most MOST_READ records with the digests taken when they were adapted to.

    Args:
        data: an Images or a Maps. workers: number of reading threads.

    Raises:
        ValueError: an image's pixels have changed or it cannot be read; the message names the image.
    """
    known = [record for record in records if record.get("digest")]
    some = known[:: -(-len(known) // MOST_READ)] if known else []

    def changed(record: Mapping[str, Any]) -> str | None:
        try:
            return None if digest(data[record["image_id"]]) == record["digest"] else "has other pixels"
        except (ValueError, OSError) as error:
            return f"cannot be read: {error}"

    with ThreadPoolExecutor(workers) as pool:
        for record, why in zip(some, pool.map(changed, some), strict=True):
            if why is not None:
                raise ValueError(
                    f"image {record['image_id']}, {shortened(record['path'])}, {why} now; when it was adapted to, it was another: "
                    "restore the data set, or name another folder"
                )
