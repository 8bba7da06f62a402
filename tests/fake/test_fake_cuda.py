"""The engine on CUDA tensors without values: whatever stays on the CPU, or reads a value inside step or guard, raises.

A call reads values in three places, all outside of step and guard: its checks with the pre-check's answer, and the guard's mask
(dtta_fast/runtime/reads.py), and whether an online state is finite. The 8-bit Adam reads its step, which bitsandbytes takes as a number.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.core import lora, optimizers
from dtta_fast.core.guard import held_out_losses
from dtta_fast.core.step import State
from dtta_fast.denoisers import calibration as calibration_module
from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.denoisers.concat_unet import ConcatUNet
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.stable_diffusion import StableDiffusion
from dtta_fast.measure.counting import Counter
from dtta_fast.runtime import constants, demands
from dtta_fast.runtime import reads as reads_module
from dtta_fast.runtime.reads import Checks
from dtta_fast.session import loop as program_module
from dtta_fast.session.checks import Request
from dtta_fast.session.engine import Engine
from dtta_fast.session.loop import Batch, finite
from dtta_fast.tasks import Classification, Depth, Segmentation, ZeroShot
from dtta_fast.tasks.transforms import timm_transforms

_spec = importlib.util.spec_from_file_location("fake_cuda", Path(__file__).with_name("fake_cuda.py"))
assert _spec is not None
assert _spec.loader is not None
fakes = importlib.util.module_from_spec(_spec)
sys.modules["fake_cuda"] = fakes
_spec.loader.exec_module(fakes)


# Of each kind a model of the real class, as small as the class allows: in fake mode it is operators that take time, not elements.


@functools.cache
def _zoo_calibration(name: str) -> Calibration:
    calibration: Calibration = zoo.load(name)[1].calibration
    return calibration


def _calibrated(small: Any, name: str) -> Any:
    """The denoiser, with the calibration of the zoo's."""
    small.calibration = _zoo_calibration(name)
    return small


def _dit() -> DiT:
    return _calibrated(DiT(DiTNetwork(32, 4, 3, 32, 2, 2, num_classes=10), PROCESS), "digits")


def _convnext() -> nn.Module:
    own = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    return timm.create_model(
        "convnext_atto",
        depths=(1, 1, 1, 1),
        dims=(8, 8, 16, 16),
        patch_size=2,
        num_classes=10,
        ls_init_value=1.0,
        pretrained_cfg_overlay=own,
    ).eval()


def _classification() -> tuple[nn.Module, Any, Any]:
    return _convnext(), _dit(), Classification()


def _subset() -> tuple[nn.Module, Any, Any]:
    return _convnext(), _dit(), Classification(subset=[1, 3, 5, 7, 9, 0])


def _vit() -> tuple[nn.Module, Any, Any]:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10)
    return vit.eval(), _dit(), Classification()


def _zero_shot() -> tuple[nn.Module, Any, Any]:
    """CLIP and UNet of a layer each, with the zoo's tokenizer, text encoder and VAE."""
    whole = zoo.folder("open_vocabulary")
    config = transformers.CLIPConfig.from_pretrained(whole / "clip")
    config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = 1
    parts = diffusers.UNet2DConditionModel.load_config(whole / "diffusion" / "unet")
    blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"], "block_out_channels": [32]}
    unet = diffusers.UNet2DConditionModel.from_config({**parts, **blocks})
    denoiser = StableDiffusion(
        unet.eval(),
        PROCESS,
        diffusers.AutoencoderKL.from_pretrained(whole / "diffusion" / "vae"),
        transformers.CLIPTextModel.from_pretrained(whole / "diffusion" / "text_encoder"),
        transformers.CLIPTokenizer.from_pretrained(whole / "diffusion" / "tokenizer"),
    )
    task = ZeroShot(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"], zoo.load_processor("open_vocabulary"))
    return *task.bind(transformers.CLIPModel(config).eval(), _calibrated(denoiser, "open_vocabulary")), task


WIDTHS = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}


def _unet(channels: int) -> diffusers.UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 8, "sample_size": 32}
    return diffusers.UNet2DModel(in_channels=3 + channels, out_channels=3, **blocks, **sizes).eval()


def _segmentation() -> tuple[nn.Module, Any, Any]:
    config = transformers.SegformerConfig(**WIDTHS, decoder_hidden_size=16, num_labels=6)
    model, task = transformers.SegformerForSemanticSegmentation(config).eval(), Segmentation(zoo.load_processor("segmentation"))
    return *task.bind(model, _calibrated(ConcatUNet(_unet(6), PROCESS, classes=6), "segmentation")), task


def _depth() -> tuple[nn.Module, Any, Any]:
    config = transformers.GLPNConfig(**WIDTHS, decoder_hidden_size=8, max_depth=10)
    model, task = transformers.GLPNForDepthEstimation(config).eval(), Depth(zoo.load_processor("depth"))
    return *task.bind(model, _calibrated(ConcatUNet(_unet(1), PROCESS, depth_range=(0.5, 10.0)), "depth")), task


KINDS = {
    "classification": _classification,
    "subset": _subset,
    "vit": _vit,
    "zero_shot": _zero_shot,
    "segmentation": _segmentation,
    "depth": _depth,
}
PROCESS = NoiseProcess.from_scheduler(diffusers.DDPMScheduler(1000, beta_schedule="linear"))
DENSE = presets.DENSE.replace(steps=1)
MAPS = {"segmentation", "depth"}
PAPER = presets.PAPER.replace(pairs=8)
CLASSES = {"FAST": presets.FAST, "PAPER": PAPER, "ONLINE": presets.ONLINE, "DUSA": presets.DUSA}
CASES = [
    *[("classification", name, config) for name, config in CLASSES.items()],
    *[("classification", f"FAST {which}", presets.FAST.replace(parameters=which)) for which in ("norm", "head", "logits")],
    *[("classification", f"PAPER {how}", PAPER.replace(optimizer=how)) for how in ("adam", "adamw")],
    ("classification", "antithetic, shared noise", presets.FAST.replace(antithetic=True, share_noise=True, common_draws=True)),
    ("classification", "top 3", presets.FAST.replace(top_k=3)),
    ("classification", "diffusion classifier's draws", presets.FAST.replace(timesteps="uniform", loss="l1")),
    ("subset", "FAST", presets.FAST),
    ("subset", "DUSA", presets.DUSA),
    ("vit", "FAST", presets.FAST),
    ("vit", "FAST lora", presets.FAST.replace(parameters="lora")),
    ("vit", "FAST both by lora", presets.FAST.replace(parameters="lora", denoiser_parameters="lora")),
    ("vit", "PAPER lora", PAPER.replace(denoiser_parameters="frozen", parameters="lora")),
    ("zero_shot", "FAST", presets.FAST.replace(timesteps="stratified")),
    ("zero_shot", "FAST lora", presets.FAST.replace(timesteps="stratified", parameters="lora")),
    ("zero_shot", "PAPER lora", PAPER.replace(parameters="lora", denoiser_parameters="lora")),
    *[(kind, "DENSE", DENSE) for kind in sorted(MAPS)],
    *[(kind, "DENSE, denoiser too", DENSE.replace(denoiser_parameters="all", mode="online", precheck="off")) for kind in sorted(MAPS)],
]
TRACED = [case for case in CASES if case[1] in (*CLASSES, "FAST lora", "DENSE") and case[:2] != ("zero_shot", "FAST lora")]
FIRST = {
    *(f"classification-{name}" for name in CLASSES),
    "subset-FAST",
    "vit-FAST lora",
    "vit-FAST both by lora",
}  # the others are marked slow


def _named(cases: list[Any]) -> list[Any]:
    ids = [f"{kind}-{name}" for kind, name, _ in cases]
    return [pytest.param(*case, id=name, marks=() if name in FIRST else pytest.mark.slow) for case, name in zip(cases, ids, strict=True)]


def _engine(mode: Any, model: nn.Module, denoiser: Any, task: Any, config: AdaptConfig) -> Engine:
    """An engine; the density of the timesteps, which is made from numbers once a session, is made outside of the fake mode."""
    original = Engine._cumulative
    with pytest.MonkeyPatch.context() as patch:

        def cumulative(self: Engine, device: torch.device) -> Tensor | None:
            with unset_fake_temporarily():
                found = original(self, torch.device("cpu"))
            return None if found is None else fakes.to_cuda(mode, found)

        patch.setattr(Engine, "_cumulative", cumulative)
        return Engine(model, denoiser, task, config)


class Run:
    """A model and a denoiser of a kind on fake CUDA, with an engine and a batch of images for it."""

    def __init__(self, mode: Any, kind: str, config: AdaptConfig, images: int, parts: tuple[Any, Any, Any]) -> None:
        model, denoiser, self.task = parts
        with unset_fake_temporarily():  # peft makes adapters from numbers
            if config.parameters == "lora":
                lora.attach(model, config.lora_rank, config.lora_targets, "model", 0)
            if config.denoiser_parameters == "lora":
                lora.attach(denoiser.network_to_adapt(), config.lora_rank, config.lora_targets, "denoiser", 0)
        with unset_fake_temporarily():  # timm's transforms are made once a model
            timm_transforms(model)
        calibration = denoiser.calibration
        self.model, self.denoiser = fakes.to_cuda(mode, model), fakes.to_cuda(mode, denoiser)
        self.denoiser.calibration = calibration
        self.engine = _engine(mode, self.model, self.denoiser, self.task, config)
        side = {"zero_shot": 32, "segmentation": 64, "depth": 64}.get(kind, 32)
        self.crop = torch.rand(images, 3, side, side, device="cuda")
        self.image_ids = torch.arange(images, device="cuda")

    def started(self) -> tuple[State, Batch]:
        """A state before its first step, and its batch."""
        self.engine.refresh()
        program = self.engine.program
        program.answered(program.views(self.crop, Request(self.crop, self.image_ids)), self.crop, Checks())
        return program.begin(self.crop, self.image_ids)


@pytest.mark.parametrize(("kind", "name", "config"), _named(CASES))
def test_encode_step_and_guard_stay_on_the_gpu(kind, name, config):
    made, images = KINDS[kind](), 2
    with fakes.fake_cuda() as mode:
        run = Run(mode, kind, config, images, made)
        program = run.engine.program
        assert program.problem.denoiser.dtype == torch.bfloat16
        state, batch = run.started()
        loss = program.step(state, batch, 0)
        assert (loss.device.type, loss.shape) == ("cuda", (images,))
        assert all(leaf.device.type == "cuda" for leaf in pytree.tree_leaves(state))
        answers = program.finish(state, batch)
        if config.guard:
            losses = program.losses(state, batch, answers, [[True] * images] * 3)
            assert all(found.device.type == "cuda" for found in (*program.decide(batch, answers, losses), *losses))
        assert all(found.device.type == "cuda" for found in (*program.decide(batch, answers, []), finite(state)))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "config"), _named(TRACED))
def test_a_traced_step_and_guard_stay_on_the_gpu(kind, name, config):
    made = KINDS[kind]()
    with fakes.fake_cuda() as mode:
        run = Run(mode, kind, config, 2, made)
        state, batch = run.started()
        leaves, structure = pytree.tree_flatten(state)
        program, x0, ids = run.engine.program, batch.x0, batch.image_ids

        def step(*given: Tensor) -> Tensor:
            return program.step(pytree.tree_unflatten(list(given), structure), batch, 0)

        graph = make_fx(step)(*leaves)
        assert any("denoising_loss" in str(node.target) for node in graph.graph.nodes)
        if config.guard:
            conditions = run.task.decision(batch.before, program.problem.denoiser)
            graph = make_fx(lambda x0: held_out_losses(program.problem, program.schedule, conditions, x0, ids, state.step))(x0)
            assert any("denoising_loss" in str(node.target) for node in graph.graph.nodes)


def test_the_tier_sees_a_tensor_on_the_cpu_and_a_read():
    with fakes.fake_cuda():
        here = torch.rand(4, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            here + torch.rand(4)
        with pytest.raises(DataDependentOutputException):
            bool(here.sum() > 0)
        # as torch 2.11 calls it under vmap, where no tensor requires a gradient
        query = torch.rand(2, 4, 16, 8, device="cuda", requires_grad=True)
        found = torch.ops.aten._scaled_dot_product_efficient_attention(query, query, query, None, compute_log_sumexp=False)[0]
        with pytest.raises(AssertionError, match="logsumexp"):
            torch.autograd.grad(found.sum(), query)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_fused_optimizers_get_what_cuda_reads(optimizer):
    with fakes.fake_cuda():
        parameters = [torch.rand(3, 5, 4, device="cuda").mT, torch.rand(3, 7, device="cuda")]
        gradients = [torch.rand(3, 4, 5, device="cuda"), torch.rand(3, 7, device="cuda")]
        slots, step = optimizers.init_slots(optimizer, parameters), torch.zeros((), dtype=torch.int64, device="cuda")
        lr = optimizers.rate(1e-3, torch.device("cuda"))
        optimizers.update_(optimizer, parameters, gradients, slots, step, lr, 0.9, 0.01)
        assert optimizers.rate(1e200, torch.device("cuda")).dtype == torch.float32
        with pytest.raises(AssertionError, match=r"lr is torch\.float64"):
            optimizers.update_(optimizer, parameters, gradients, slots, step, lr.double(), 0.9, 0.01)
        with pytest.raises(AssertionError, match="strides"):
            demands.fused_optimizer(parameters, gradients, slots, [step.float()], lr)


def test_attention_is_asked_for_what_cuda_takes():
    with fakes.fake_cuda():
        query = torch.rand(2, 4, 16, 512, device="cuda")
        with pytest.raises(AssertionError, match="a head has 512"):
            demands.attention(query, query, query)
        with pytest.raises(AssertionError, match="contiguous"):
            demands.attention(query.mT, query, query)


@pytest.mark.parametrize("answers", [2, 3])
def test_a_guard_of_one_image_is_one_forward(answers, guarded):
    """Whatever the number of answers: 24 pairs of each run together where memory allows."""
    made = KINDS["classification"]()
    with fakes.fake_cuda() as mode:
        run = Run(mode, "classification", presets.FAST, 1, made)
        state, batch = run.started()
        outputs = run.engine.program.forward(state, batch.inputs)
        rows: list[int] = []
        run.engine.program.problem.denoiser.network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
        asked = [[True], [True], [answers == 3]]
        with Counter() as counter:
            guarded(run.engine.program, outputs, [outputs + 1, outputs + 2], batch.x0, batch.image_ids, state.step, asked)
        assert rows == [24 * answers]
        assert sum(count.calls for count in counter.counts.values()) > 100


def test_a_dit_block_is_eight_operators_and_back_nine():
    """Four products, attention, GELU and two normalisations; back, attention's three gradients are joined for their product too."""
    counts = []
    for depth in (2, 3):
        made = DiTNetwork(8, 2, 3, 32, depth, 2, num_classes=10).bfloat16().requires_grad_(False)
        joined = [torch.zeros(32 * (6 * depth + 2), *tail, dtype=torch.bfloat16) for tail in ((32,), ())]
        with fakes.fake_cuda() as mode:
            network: Any = fakes.to_cuda(mode, made)
            network.joined_modulation = [fakes.to_cuda(mode, tensor) for tensor in joined]
            x, time = torch.zeros(2, 3, 8, 8, device="cuda", dtype=torch.bfloat16), torch.zeros(2, device="cuda")
            label = torch.zeros(2, 32, device="cuda", requires_grad=True)
            with Counter() as forward:
                predicted = network(x, time, label)
            with Counter() as backward:
                torch.autograd.grad(predicted.sum(), label)
            with Counter() as without, torch.no_grad():
                network(x, time, label)
        calls = [{name: count.calls for (_, name), count in counter.counts.items()} for counter in (forward, backward, without)]
        counts.append([sum(count for name, count in of.items() if name != "prim::device") for of in calls])
    assert [after - before for before, after in zip(*counts, strict=True)] == [8, 9, 8]


class _Event:
    """A CUDA event without a GPU."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass


@pytest.mark.parametrize(
    ("preset", "images", "most"),
    [("FAST", 1, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("FAST", 4, 2), ("ONLINE", 3, 2), ("PAPER", 1, 1)))],
)
def test_a_call_waits_twice_at_most(preset, images, most, monkeypatch):
    """A whole warm call: every read goes through read(), and nothing is copied to the GPU so that the host waits for it."""
    config = {**presets.ALL, "PAPER": PAPER}[preset]
    made, reads = KINDS["classification"](), []
    timm_transforms(made[0])

    def true(shape: tuple[int, ...]) -> Any:
        return [true(shape[1:]) for _ in range(shape[0])] if shape else True

    def read(*masks: Tensor) -> list[Any]:
        reads.append(masks)
        return [true(tuple(mask.shape)) for mask in masks]

    with fakes.fake_cuda() as mode, monkeypatch.context() as patch:
        for module in (reads_module, program_module):
            patch.setattr(module, "read", read)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        patch.setattr(constants, "detect_fake_mode", lambda: None)  # constants stay on the device from call to call
        try:
            model, denoiser, task = made
            calibration = denoiser.calibration
            model, denoiser = fakes.to_cuda(mode, model), fakes.to_cuda(mode, denoiser)
            denoiser.calibration = calibration
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr("dtta_fast.session.adapter.Engine", lambda *parts: _engine(mode, *parts))
                session = Adapter(model, denoiser, config, task)
            batch = torch.rand(images, 3, 32, 32, device="cuda")
            session.adapt(batch)
            session.adapt(batch)
            reads.clear()
            mode.waits.clear()
            result = session.adapt(batch)
        finally:
            constants.numbers.forget()
            calibration_module._rings.forget()
    assert result.outputs.device.type == "cuda"
    assert len(reads) <= most
    assert not mode.waits
