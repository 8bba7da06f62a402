"""Calls within calls, and processes that are forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from dtta_fast import AdaptConfig, Adapter

CONFIG = AdaptConfig(steps=2, pairs=4, lr=1e-2)


@pytest.fixture
def session(model, denoiser):
    return Adapter(model.float(), denoiser.float(), CONFIG.replace(mode="online"))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no timers")
def test_a_call_from_a_signal_handler_is_refused(session, images):
    """Whatever it asks for; the call that it interrupts ends as if nothing had been."""
    images, asked = images.float(), []
    expected = Adapter(session.engine.model, session.engine.denoiser, session.config).adapt(images)

    def within(*_: object) -> None:
        for call in (
            lambda: session.adapt(images),
            lambda: session.warmup(images),
            session.reset,
            lambda: session.load_state_dict({"weights": 1}),
        ):
            with pytest.raises(RuntimeError, match="in a call of this thread already"):
                call()
            asked.append(True)

    def interrupt(*_: object) -> None:
        if not asked:
            signal.raise_signal(signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, within)
    handle = session.engine.program.problem.denoiser.network.register_forward_pre_hook(interrupt)
    try:
        found = session.adapt(images)
    finally:
        signal.signal(signal.SIGALRM, before)
        handle.remove()
    assert len(asked) == 4
    assert torch.equal(found.outputs, expected.outputs)
    session.reset()
    assert torch.equal(session.adapt(images).outputs, expected.outputs)


FORKED = """
import faulthandler, os, sys, threading
import torch
from torch import nn
from dtta_fast import AdaptConfig, Adapter, zoo

torch.set_num_threads(1)  # torch's own threads do not outlive a fork
model, denoiser = zoo.load("digits")
images = zoo.example("digits")[0][:1]
config = AdaptConfig(steps=1, pairs=2, lr=1e-3, mode="online")
expected = Adapter(model, denoiser, config).adapt(images).outputs
session = Adapter(model, denoiser, config)
inside, go_on = threading.Event(), threading.Event()

def stop(*_):
    inside.set()
    go_on.wait(60)

session.engine.program.problem.model.register_forward_pre_hook(stop)
thread = threading.Thread(target=session.adapt, args=(images,))
thread.start()
assert inside.wait(60)
child = os.fork()
go_on.set()
if child == 0:
    faulthandler.dump_traceback_later(60, exit=True)  # a child that hangs
    os._exit(0 if torch.equal(session.adapt(images).outputs, expected) else 2)
thread.join()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_child_that_is_forked_during_a_call_can_go_on():
    """In a process of its own: torch refuses a backward in children of one that has computed gradients on a GPU."""
    run = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr
