"""An adapter as a torch module, for evaluation code that expects a classifier."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dtta_fast import presets
from dtta_fast.config import AdaptConfig
from dtta_fast.denoisers.base import Denoiser
from dtta_fast.runtime.constants import numbers
from dtta_fast.runtime.turns import Turns
from dtta_fast.session.adapter import Adapter
from dtta_fast.tasks.base import Task

MOST_IDS = 2**32  # image ids are 32 bits wide
ROUNDING = 1e-2  # of images that were normalised in half precision, say


class AsModule(nn.Module):
    """A model that adapts to every batch it is called on, as an nn.Module for other people's evaluation code.

    forward() takes images [B, 3, H, W] in [0, 1] and returns the adapted outputs [B, ...], also under torch.no_grad() and
    torch.inference_mode(). The outputs carry no gradient. Images are numbered from call to call, so no two of them share random draws, and
    a harness that walks over a data set in order, with images of the model's size, gets what `dtta evaluate` gets. reset() starts over, at
    image 0 and with the model's own weights. Calls from several threads take turns.

    The module holds the model and the denoiser. to() and its relatives move both of them, as they do for any submodule. train() and eval()
    are passed on to both, and change no answer: adaptation always runs in eval mode. state_dict() holds the weights of both, the number of
    the next image and, for an online config, the adapted state.

    Args:
        model, denoiser, config, task: same as for Adapter.
        mean, std: what the harness normalises its images with, one number per channel. forward() undoes it, and warns if its first images
            do not look normalised. By default the images are taken as they are.

    Raises:
        TypeError, ValueError: same as for Adapter; or mean or std is not one number from 0 to 1 per channel, or a std is 0.
    """

    def __init__(
        self,
        model: nn.Module,
        denoiser: Denoiser,
        config: AdaptConfig = presets.FAST,
        task: Task | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self._config, self._task = config, task
        self._mean, self._std = _per_channel("mean", mean), _per_channel("std", std)
        if (mean is None) != (std is None):
            raise ValueError(f"mean is {mean} and std is {std}; give both, or neither")
        if not all(0 < value <= 1 for value in self._std):
            raise ValueError(f"std is {std}; give one positive number for each channel, of images in [0, 1], such as 0.229")
        if not all(0 <= value <= 1 for value in self._mean):
            raise ValueError(f"mean is {mean}; give one number for each channel, of images in [0, 1], such as 0.485")
        self._adapter: Adapter | None = Adapter(model, denoiser, config, task)  # None after a move
        self._online: dict[str, Any] = {}  # the state to continue from when an adapter is made again
        self._next, self._turns = 0, Turns()
        self.model, self.denoiser = model, denoiser

    @property
    def adapter(self) -> Adapter:
        """The adapter that answers. A move of the module makes a new one, which continues from the same state."""
        if self._adapter is None:
            made = Adapter(self.model, self.denoiser, self._config, self._task)
            made.load_state_dict(self._online)
            self._adapter = made
        return self._adapter

    def forward(self, images: Tensor) -> Tensor:
        """Adapts to images [B, 3, H, W] and returns the outputs [B, ...].

        Raises:
            TypeError, ValueError: same as for Adapter.adapt(); nothing has changed then. ValueError: 2^32 images have been seen.
        """
        if not isinstance(images, Tensor) or images.ndim != 4:
            found = tuple(images.shape) if isinstance(images, Tensor) else f"a {type(images).__name__}"
            raise ValueError(f"images is {found}; give a tensor [B, 3, H, W]")
        with self._turns.several(), torch.inference_mode(False):  # tensors of inference mode cannot take part in a backward pass
            ids = range(self._next, self._next + len(images))
            if ids.stop > MOST_IDS:
                raise ValueError(f"{self._next} images have been seen, and {MOST_IDS} have an id of their own; call reset()")
            if ids.start == 0 and any(self._mean) and len(images) and float(images.amin()) >= 0:
                remedy = "if your harness gives images in [0, 1], leave mean and std out"
                warnings.warn(f"images has no value below 0, and is taken as normalised with mean {self._mean}: {remedy}", stacklevel=4)
            try:
                outputs = self.adapter.adapt(self._restored(images), image_ids=ids).outputs
            except ValueError as error:
                if self._mean or "not normalised" not in str(error):
                    raise
                raise ValueError(f"{error}; or give AsModule the mean and std that your loader normalises with") from error
            self._next = ids.stop
        return outputs

    def _restored(self, images: Tensor) -> Tensor:
        """Undoes the harness's normalisation of images [B, C, H, W]; rounding may leave [0, 1] by a hair, which is cut off."""
        if not self._mean:
            return images.clone() if images.is_inference() else images
        if not images.is_floating_point():
            raise ValueError(f"images has dtype {images.dtype}; with mean and std, give floating point as the harness normalises it")
        mean, std = (numbers(values, images.device, torch.float32)[:, None, None] for values in (self._mean, self._std))
        found = images * std + mean
        bounded = found.clamp(0, 1)
        return torch.where((found - bounded).abs() < ROUNDING, bounded, found)  # what is farther out is refused by the adapter

    def reset(self) -> None:
        """Returns to the model's own weights, and to image 0."""
        self._online, self._next = {}, 0
        if self._adapter is not None:
            self._adapter.reset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AsModule:
        """Moves or converts the module. If that changes a tensor, the next call makes an adapter of what it became."""
        before = self._tensors()
        super()._apply(fn, recurse)
        if self._tensors() == before:
            return self
        if self._adapter is not None:
            self._online, self._adapter = self._adapter.state_dict(), None

        def moved(part: Tensor) -> Tensor:
            found = fn(part)
            exact = torch.promote_types(found.dtype, torch.float32)  # adapted weights are at least that
            return found if found.dtype == exact else part.to(found.device, exact)

        self._online = pytree.tree_map_only(Tensor, lambda part: moved(part) if part.is_floating_point() else part, self._online)
        return self

    def _tensors(self) -> list[tuple[int, torch.dtype, torch.device]]:
        """Returns what tells whether the weights and buffers were replaced."""
        return [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in (*self.parameters(), *self.buffers())]

    def get_extra_state(self) -> dict[str, Any]:
        """Returns the number of the next image and the online state, for state_dict()."""
        online = self._online if self._adapter is None else self._adapter.state_dict()
        return {"next": self._next, "config": repr(self._config), "online": online}

    def set_extra_state(self, state: Any) -> None:
        """Continues from what get_extra_state() returned.

        Raises:
            ValueError: the state is of another config or model.
        """
        number = state.get("next") if isinstance(state, dict) else None
        if not isinstance(number, int) or not 0 <= number <= MOST_IDS or "online" not in state:
            raise ValueError("state_dict has no extra state of an AsModule; give one that state_dict() of an AsModule returned")
        if state.get("config") != repr(self._config):
            raise ValueError(f"state_dict is of another config, {state.get('config')}; make this AsModule with that one")
        self.adapter.load_state_dict(state["online"])
        self._next = number


def _per_channel(name: str, values: Sequence[float] | None) -> tuple[float, ...]:
    """Returns one number per channel; () for None.

    Raises:
        ValueError: values are not finite numbers, one per channel.
    """
    if values is None:
        return ()
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is {values!r}; give one number for each channel") from error
    if len(found) != 3 or not all(math.isfinite(value) for value in found):
        raise ValueError(f"{name} is {values!r}; give one finite number for each of 3 channels")
    return found
