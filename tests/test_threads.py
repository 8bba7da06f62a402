"""Several threads in one process: on one session, on several, and beside other code."""

from __future__ import annotations

import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.data.corruptions import DIGITS_C, corrupt

THREADS = 8


def resident_mebibytes():
    """Of this process, now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) / 1024


def settings():
    """torch's process-wide and thread-wide state that a host may depend on."""
    cuda = torch.backends.cuda
    return {
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "attention": (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()),
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random": torch.random.get_rng_state().tolist(),
        "matmul": torch.get_float32_matmul_precision(),
    }


@pytest.fixture(scope="module")
def digits():
    """Corrupted digits, some of which FAST leaves alone, some of which it adapts to."""
    clean, _ = zoo.example("digits")
    kinds = list(DIGITS_C.items())
    return torch.cat([corrupt(clean[i : i + 1], *kinds[i % len(kinds)], first_id=i) for i in (0, 3, 9, 12, 54, 55)])


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[0, 2, 4, 1, 5], [[0], [2], [4, 5], [1], [5]]], ids=["one shape", "shapes"])
def test_eight_threads_on_one_adapter_each_get_their_serial_result(digits, parts):
    """To the bit, whatever shapes the calls before had. Memory does not grow with the calls."""
    adapter = Adapter(*zoo.load("digits"), presets.FAST)
    ids = [torch.tensor(part).reshape(-1) for part in parts]
    serial = [adapter.adapt(digits[own], image_ids=own) for own in ids]
    wrong = []

    def work(first, rounds):
        for i in range(first, first + rounds):
            k = i % len(ids)
            found, expected = adapter.adapt(digits[ids[k]], image_ids=ids[k]), serial[k]
            if not torch.equal(found.outputs, expected.outputs) or not torch.equal(found.evaluations, expected.evaluations):
                wrong.append((i, found, expected))

    def all_threads(rounds):
        threads = [threading.Thread(target=work, args=(first, rounds)) for first in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        gc.collect()
        return resident_mebibytes()

    before = all_threads(rounds=5)
    after = all_threads(rounds=10)
    assert not wrong
    assert after - before < 200  # malloc gives each thread an arena; a state that a call left behind would be 12 MB, 80 times


def test_sessions_of_several_threads_do_not_meet(denoiser, images):
    """Attention is switched while images have weights of their own: whichever thread leaves last, torch's switches are as they were."""
    preprocessing = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        num_classes=7,
        pretrained_cfg_overlay=preprocessing,
    ).eval()
    denoiser, images = denoiser.float(), images.float()
    config = AdaptConfig(steps=2, pairs=2, lr=1e-3)
    expected = Adapter(vit, denoiser, config).adapt(images).outputs
    sessions = [Adapter(module, denoiser, config) for module in (vit, _Attention(), vit, _Attention())]
    own = [session.adapt(images).outputs for session in sessions]
    before = settings()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: sessions[i % 4].adapt(images).outputs, range(16)))
    assert settings() == before
    assert torch.equal(own[0], expected)
    for i, outputs in enumerate(found):
        torch.testing.assert_close(outputs, own[i % 4], rtol=1e-5, atol=1e-6)


class _Attention(nn.Module):
    """By torch's own module, which has an inference kernel without a derivative."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 7)
        self.eval()

    def forward(self, x):
        return self.head(self.layer(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.parametrize("mode", ["episodic", "online"])
def test_a_call_leaves_the_process_as_it_was(model, denoiser, images, mode):
    adapter = Adapter(model, denoiser, AdaptConfig(steps=1, pairs=2, guard=2, mode=mode))
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            before = settings()
            adapter.warmup(images)
            adapter.adapt(images, deadline_ms=1000)
            with pytest.raises(ValueError, match="images has shape"):
                adapter.adapt(images[0])
            assert settings() == before
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_copy_of_an_adapter_works_beside_it(model, denoiser, images):
    adapter = Adapter(model, denoiser, AdaptConfig(steps=1, pairs=2))
    assert torch.equal(copy.deepcopy(adapter).adapt(images).outputs, adapter.adapt(images).outputs)


def test_an_online_state_sees_every_batch_of_every_thread(model, denoiser, images):
    adapter = Adapter(model, denoiser, AdaptConfig(steps=1, pairs=2, mode="online"))
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda i: adapter.adapt(images[i % 4 : i % 4 + 1]), range(40)))
    assert int(adapter.state_dict()["step"]) == 40


def test_reset_and_state_dict_beside_calls(model, denoiser, images):
    """A state that was handed out does not change when others adapt on."""
    adapter = Adapter(model, denoiser, AdaptConfig(steps=1, pairs=2, mode="online"))
    adapter.adapt(images)
    state = adapter.state_dict()
    kept = {name: p.clone() for name, p in state["theta"].items()}
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(adapter.adapt, images) for _ in range(8)] + [pool.submit(adapter.reset) for _ in range(4)]
        for job in jobs:
            job.result()
    assert all(torch.equal(state["theta"][name], p) for name, p in kept.items())
