"""Calls within calls, and processes that are forked."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time

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
    handle = session.engine.problem.denoiser.network.register_forward_pre_hook(interrupt)
    try:
        found = session.adapt(images)
    finally:
        signal.signal(signal.SIGALRM, before)
        handle.remove()
    assert len(asked) == 4
    assert torch.equal(found.outputs, expected.outputs)
    session.reset()
    assert torch.equal(session.adapt(images).outputs, expected.outputs)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_child_that_is_forked_during_a_call_can_go_on(session, images):
    """torch's own threads do not outlive a fork, so the child has to run with one of them."""
    images, inside, go_on = images.float(), threading.Event(), threading.Event()
    fresh = Adapter(session.engine.model, session.engine.denoiser, session.config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = fresh.adapt(images).outputs

        def stop(*_: object) -> None:
            inside.set()
            go_on.wait(60)

        handle = session.engine.problem.model.register_forward_pre_hook(stop)
        thread = threading.Thread(target=session.adapt, args=(images,))
        thread.start()
        assert inside.wait(60)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                faulthandler.dump_traceback_later(45, exit=True)
                go_on.set()
                code = 0 if torch.equal(session.adapt(images).outputs, expected) else 2
            finally:
                os._exit(code)
        go_on.set()
        thread.join()
        handle.remove()
        status, end = 0, time.monotonic() + 60
        done = 0
        while not done and time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.05)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert done, "the child hangs"
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        torch.set_num_threads(threads)
