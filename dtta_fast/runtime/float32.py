"""Float32 products on CUDA, in full precision or in TF32 on the tensor cores. torch's switches for this are process-wide."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

matmul: Any = torch.backends.cuda.matmul
cudnn: Any = torch.backends.cudnn
mkldnn: Any = torch.backends.mkldnn


class Switches(NamedTuple):
    """The values of torch's switches. None means that torch refuses to read a switch because old and new switches contradict each other."""

    products: str | None
    cuda: str
    cpu: str
    convolutions: bool | None
    conv: str
    rnn: str

    @classmethod
    def now(cls) -> Switches:
        try:
            products: str | None = torch.get_float32_matmul_precision()
        except RuntimeError:
            products = None
        try:
            convolutions: bool | None = cudnn.allow_tf32
        except RuntimeError:
            convolutions = None
        cpu = mkldnn.matmul.fp32_precision
        return cls(products, matmul.fp32_precision, cpu, convolutions, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)

    def restore(self) -> None:
        """Sets only the switches that differ, because a switch that was set explicitly no longer follows its parent switch."""
        # the old switches set the new ones too, so they come first
        now = Switches.now()
        if now.products != self.products:
            torch.set_float32_matmul_precision(self.products or "highest")
        if now.convolutions != self.convolutions:
            cudnn.allow_tf32 = self.conv == "tf32" if self.convolutions is None else self.convolutions
        for owner, wanted in ((matmul, self.cuda), (mkldnn.matmul, self.cpu), (cudnn.conv, self.conv), (cudnn.rnn, self.rnn)):
            if owner.fp32_precision != wanted:
                owner.fp32_precision = wanted


def _set(tf32: bool) -> None:
    now, wanted = Switches.now(), "tf32" if tf32 else "ieee"
    if now.products is not None and now.cuda == now.conv == wanted and now.convolutions == tf32:
        return
    # set through the old switches, which must agree with torch.compile's guards
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    matmul.fp32_precision = cudnn.conv.fp32_precision = wanted


class Float32Products:
    """Sets the switches while any thread is inside and restores them when the last one leaves.

    If threads request different precisions, full precision wins.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[int, bool] = {}  # whether each thread wants TF32
        self._before: Switches | None = None

    @contextmanager
    def within(self, device: torch.device, tf32: bool) -> Iterator[None]:
        """Computes float32 products on this device in TF32 or in full precision; has no effect on a CPU."""
        if device.type != "cuda":
            yield
            return
        with self._lock:
            self._before = self._before or Switches.now()
            self._asked[threading.get_ident()] = tf32
            _set(all(self._asked.values()))
        try:
            yield
        finally:
            self.leave()

    def leave(self) -> None:
        """Removes this thread. Also called separately, since an interrupt may keep the block from doing so itself."""
        with self._lock:
            if self._asked.pop(threading.get_ident(), None) is None or self._before is None:
                return
            if self._asked:
                _set(all(self._asked.values()))
            else:
                self._before.restore()
                self._before = None


float32_products = Float32Products()
