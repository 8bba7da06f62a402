"""Which precision a call runs in, and that it leaves torch's switches and the caller's weights alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from dtta_fast import AdaptConfig
from dtta_fast.runtime.float32 import Switches, float32_products
from dtta_fast.runtime.private import PrivateCopy
from dtta_fast.session import precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
SETTINGS: dict[str, Callable[[], None]] = {
    "torch's own": lambda: None,
    "new switch": lambda: setattr(matmul, "fp32_precision", "tf32"),
    "old switch": lambda: setattr(matmul, "allow_tf32", True),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new switch of convolutions": lambda: setattr(cudnn.conv, "fp32_precision", "ieee"),
    "old switch of convolutions": lambda: setattr(cudnn, "allow_tf32", False),
}


@pytest.fixture
def _switches():
    before = Switches.now()
    yield
    before.restore()


@pytest.mark.usefixtures("_switches")
@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("setting", list(SETTINGS))
def test_switches_are_put_back(setting, tf32):
    """Old and new ones, also where the caller has set them so that torch refuses to read the old ones."""
    SETTINGS[setting]()
    before = Switches.now()
    with float32_products.within(CUDA, tf32):
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
        assert (matmul.fp32_precision, cudnn.conv.fp32_precision) == (("tf32",) * 2 if tf32 else ("ieee",) * 2)
    assert Switches.now() == before

    def fails() -> None:
        with float32_products.within(CUDA, tf32):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert Switches.now() == before


@pytest.mark.usefixtures("_switches")
def test_full_precision_wins_while_threads_ask_for_both():
    before, entered, leave = Switches.now(), threading.Event(), threading.Event()

    def other() -> None:
        with float32_products.within(CUDA, tf32=False):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with float32_products.within(CUDA, tf32=True):
        assert matmul.allow_tf32
        thread.start()
        entered.wait()
        assert not matmul.allow_tf32
        leave.set()
        thread.join()
        assert matmul.allow_tf32
    assert Switches.now() == before


@pytest.mark.usefixtures("_switches")
def test_nothing_changes_on_a_cpu():
    before = Switches.now()
    with float32_products.within(CPU, tf32=True):
        assert Switches.now() == before


def test_auto_is_half_precision_on_a_gpu_for_float32_alone(monkeypatch):
    for here, half in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(precision, "has_bfloat16", lambda device, here=here: here)
        assert precision.denoiser_dtype("auto", torch.float32, CUDA) == half
        for own in (torch.float64, torch.bfloat16, torch.float16):
            assert precision.denoiser_dtype("auto", own, CUDA) == own
    assert precision.denoiser_dtype("auto", torch.float32, CPU) == torch.float32
    assert precision.denoiser_dtype("tf32", torch.bfloat16, CUDA) == torch.float32
    with pytest.raises(ValueError, match="precision is None; allowed: auto, fp32, tf32, bf16, fp16"):
        AdaptConfig(precision=None)  # type: ignore[arg-type]


def test_weights_are_cast_again_only_where_they_were_written(denoiser):
    """Seen by what stands in the copy: a value that a cast would overwrite stays there."""
    source = denoiser.float()
    name, other = "network.blocks.0.mlp.fc1.weight", "network.blocks.1.mlp.fc1.weight"
    weights = dict(source.named_parameters())
    copied = PrivateCopy(source, torch.bfloat16, [name, other])
    held = dict(copied.module.named_parameters())
    held[name].data.fill_(7.0)
    held[other].data.fill_(7.0)
    assert copied.refresh()
    assert bool((held[name] == 7).all())
    with torch.no_grad():
        weights[name].mul_(2)
    source.network.pos_embed.data.add_(1)  # a buffer is copied every time
    assert copied.refresh()
    assert torch.equal(held[name], weights[name].bfloat16())
    assert bool((held[other] == 7).all())
    assert torch.equal(copied.module.network.pos_embed, source.network.pos_embed)
    copied.recast()
    assert copied.refresh()
    assert torch.equal(held[other], weights[other].bfloat16())


def test_modulations_of_a_frozen_dit_are_one_product(denoiser, monkeypatch):
    """Stored one behind the other, they give the same prediction, and follow what the caller writes."""
    source = denoiser.float()
    joined, apart = (precision.private_denoiser(source, "bf16", CPU, frozen) for frozen in (True, False))
    x_t, timesteps = torch.randn(3, *source.latent_shape).bfloat16(), torch.tensor([1, 500, 900])
    conditions = source.class_embeddings({})[:3].detach()

    def predictions() -> list[torch.Tensor]:
        products: list[int] = []
        linear = torch.nn.functional.linear
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *weights: (products.append(1), linear(x, *weights))[1])
        found = []
        for copied in (joined, apart):
            with torch.no_grad():
                found.append(copied.module(x_t, timesteps, conditions))
            found.append(torch.tensor(len(products)))
            products.clear()
        monkeypatch.undo()
        return found

    together, few, one_by_one, many = predictions()
    assert many - few == len(source.network.blocks)
    torch.testing.assert_close(together, one_by_one, rtol=2**-7, atol=2**-7)
    with torch.no_grad():
        for block in source.network.blocks:
            block.adaLN_modulation[1].weight.normal_()
            block.adaLN_modulation[1].bias.add_(1)
    assert joined.refresh()
    assert apart.refresh()
    after, _, expected, _ = predictions()
    assert not torch.allclose(after, together, atol=0.1)
    torch.testing.assert_close(after, expected, rtol=2**-7, atol=2**-6)


def test_a_modulation_that_is_no_plain_layer_stays_by_itself(denoiser):
    class Halved(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) / 2

    assert denoiser.joinable()
    denoiser.network.blocks[1].adaLN_modulation[1] = Halved(*reversed(denoiser.network.blocks[1].adaLN_modulation[1].weight.shape))
    assert denoiser.joinable() == []
    assert not precision.private_denoiser(denoiser.double(), "bf16", CPU, True).joined
