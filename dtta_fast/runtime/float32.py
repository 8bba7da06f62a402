"""Float32 products on CUDA: in full precision, or in TF32 on the tensor cores. torch's switches for this belong to the process."""

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
    """The values of torch's switches. None stands for one that torch refuses to read, since old and new switches contradict each other."""

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
        """Sets what differs from them: a switch that is set no longer follows the switch above it."""
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
    # through the old switches, with which torch.compile's guards have to agree
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    matmul.fp32_precision = cudnn.conv.fp32_precision = wanted


class Float32Products:
    """Sets the switches while any thread is within, and puts them back when the last one leaves.

    Where threads ask for different products, full precision wins.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[int, bool] = {}  # TF32 or not, by thread
        self._before: Switches | None = None

    @contextmanager
    def within(self, device: torch.device, tf32: bool) -> Iterator[None]:
        """Products on this device are in TF32, or in full precision; on a CPU nothing changes."""
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
        """Takes this thread out. An interrupt may have come before the block could do so itself."""
        with self._lock:
            if self._asked.pop(threading.get_ident(), None) is None or self._before is None:
                return
            if self._asked:
                _set(all(self._asked.values()))
            else:
                self._before.restore()
                self._before = None


float32_products = Float32Products()
