"""EDM's class-conditional UNets, against values that EDM's own code gave (training/networks.py of NVlabs/edm, commit 0a2ff34)."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, EDMEulerScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

from dtta_fast import AdaptConfig, adapt
from dtta_fast.denoisers import ClassUNet
from dtta_fast.denoisers.edm_unet import EDMUNet
from dtta_fast.runs.models import load_denoiser

CLASSES, SIDE = 7, 16
SHAPES = {
    "DDPM++": {"noise_channels": 16, "block_out_channels": (32, 64), "layers_per_block": 2, "attention": (False, True), "adm": False},
    "ADM": {"noise_channels": 32, "block_out_channels": (32, 128), "layers_per_block": 1, "attention": (False, True), "adm": True},
}
# of the prediction for waves((1, 3, 16, 16), 3) at time -0.2 under class 4: its mean, its root mean square, and three of its values
THEIRS = {
    "DDPM++": [0.2963192, 0.4591627, -0.0770326, 0.0250341, 0.0179372],
    "ADM": [-1.0404025, 1.2432388, -0.7125532, -0.5889299, -0.4087804],
}


def waves(shape: tuple[int, ...], phase: float) -> Tensor:
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).view(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of a name in EDM's state dict; the same rule filled EDM's own network."""
    return waves(shape, sum(map(ord, name))) * 0.15 + float("norm" in name and name.endswith("weight"))


def edm_state(kind: str) -> dict[str, Tensor]:
    """A state dict with EDM's names, with the preconditioning's prefix and the weights that an image as it is does not use."""
    unet = EDMUNet(sample_size=SIDE, in_channels=3, out_channels=3, num_class_embeds=CLASSES, **SHAPES[kind])
    shapes = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    classes, width = shapes.pop("class_embedding.weight")
    shapes["map_label.weight"], shapes["map_augment.weight"] = (width, classes), (SHAPES[kind]["noise_channels"], 9)
    if kind == "DDPM++":
        shapes["map_label.bias"] = (width,)
        for part, theirs in (("out_norm", "aux_norm"), ("out_conv", "aux_conv")):
            for end in ("weight", "bias"):
                shapes[f"dec.{SIDE}x{SIDE}_{theirs}.{end}"] = shapes.pop(f"{part}.{end}")
    state = {f"model.{name}": weight(f"model.{name}", shape) for name, shape in shapes.items()}
    return state | {f"model.enc.{SIDE // 2}x{SIDE // 2}_down.conv0.resample_filter": torch.full((1, 1, 2, 2), 0.25)}


@pytest.fixture(params=SHAPES)
def kind(request) -> str:
    return request.param


def test_predictions_are_edm_s(kind):
    denoiser = ClassUNet.from_edm(edm_state(kind)).double()
    with torch.no_grad():
        table = denoiser.class_embeddings({})
        found = denoiser.unet(waves((1, 3, SIDE, SIDE), 3), torch.tensor([-0.2]).double(), table[4:5])[0].flatten()
    found = torch.stack([found.mean(), found.square().mean().sqrt(), found[0], found[300], found[767]])
    torch.testing.assert_close(found, torch.tensor(THEIRS[kind], dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_the_process_is_edm_s_preconditioning():
    """Karras et al. 2022, table 1: the denoised image is c_skip · x + c_out · F(c_in · x, ln(σ) / 4)."""
    process = ClassUNet.from_edm(edm_state("ADM"), sigma_data=0.7).process
    signal, noise, target_signal, target_noise, weights = process.table.double().T
    sigma = noise / signal
    torch.testing.assert_close(process.model_time.double(), sigma.log() / 4, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(signal, (sigma**2 + 0.7**2).rsqrt(), rtol=1e-5, atol=0)
    skip, out = 0.7**2 / (sigma**2 + 0.7**2), 0.7 * sigma / (sigma**2 + 0.7**2).sqrt()
    # with x = x0 + σ·ε, the target F makes the denoised image x0
    torch.testing.assert_close(skip + out * target_signal, torch.ones_like(sigma), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(skip * sigma + out * target_noise, torch.zeros_like(sigma), rtol=1e-4, atol=1e-4)
    assert (weights == 1).all()


def test_the_gradient_reaches_soft_classes(kind):
    denoiser = ClassUNet.from_edm(edm_state(kind)).double()
    table, logits = denoiser.class_embeddings({}), torch.randn(1, CLASSES, dtype=torch.float64, requires_grad=True)
    x, t = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64), torch.tensor([500])
    assert torch.autograd.gradcheck(lambda w: denoiser(x, t, w.softmax(1) @ table).square().mean(), logits)


def test_checkpointing_changes_no_gradient(kind):
    denoiser = ClassUNet.from_edm(edm_state(kind)).double()
    x, t, found = torch.randn(2, 3, SIDE, SIDE, dtype=torch.float64), torch.tensor([100, 900]), []
    runs = []
    block = denoiser.unet.dec[f"{SIDE // 2}x{SIDE // 2}_in0"]
    block.register_forward_pre_hook(lambda *given: runs.append(denoiser.checkpointing))
    for denoiser.checkpointing in (False, True):
        condition = denoiser.class_embeddings({})[2:3].clone().requires_grad_()
        found += torch.autograd.grad(denoiser(x, t, condition).square().mean(), condition)
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=0)
    assert runs == [False, True, True]  # with checkpointing, the backward runs a block again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_converted_folder_adapts(kind, precision, tmp_path):
    state = {name: value.float().contiguous() for name, value in edm_state(kind).items()}
    save_file(state, tmp_path / "edm.safetensors")
    torch.save(state, tmp_path / "edm.pt")
    denoiser, other = (ClassUNet.from_edm(tmp_path / f"edm.{end}") for end in ("safetensors", "pt"))
    denoiser.save_pretrained(tmp_path / "folder")
    again = load_denoiser(str(tmp_path / "folder"))
    torch.testing.assert_close(again.process.table, denoiser.process.table)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES))
    images, config = torch.rand(2, 3, SIDE, SIDE), AdaptConfig(steps=1, pairs=2, precision=precision)
    found = [adapt(model, each, images, config=config) for each in (denoiser, other, again)]
    for result in found[1:]:
        torch.testing.assert_close(result.outputs, found[0].outputs)
    assert (found[0].outputs != found[0].outputs_before).any()


def test_a_folder_keeps_the_preconditioning(tmp_path):
    denoiser = ClassUNet.from_edm(edm_state("ADM"), sigma_data=0.7)
    for other in (EDMEulerScheduler(), DDPMScheduler()):
        with pytest.raises(ValueError, match=f"scheduler is a {type(other).__name__} of another noise process than the denoiser's"):
            denoiser.save_pretrained(tmp_path / "folder", other)
    denoiser.save_pretrained(tmp_path / "folder", EDMEulerScheduler(sigma_data=0.7))
    assert ClassUNet.from_pretrained(tmp_path / "folder").process.equals(denoiser.process)


def test_attention_can_run_in_a_fused_kernel(kind, monkeypatch):
    """Queries, keys and values whose last dimension is strided would run in the slow one."""
    strides, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given: strides.extend(x.stride(-1) for x in given) or attend(*given))
    denoiser = ClassUNet.from_edm(edm_state(kind))
    denoiser(torch.zeros(1, 3, SIDE, SIDE), torch.tensor([500]), denoiser.class_embeddings({})[:1])
    assert set(strides) == {1}


def test_weights_of_half_precision_keep_the_classes_digits():
    state = {name: value.half() for name, value in edm_state("DDPM++").items()}
    table = state["model.map_label.weight"].double().T * CLASSES**0.5 + state["model.map_label.bias"].double()
    torch.testing.assert_close(ClassUNet.from_edm(state).class_embeddings({}).double(), table, rtol=1e-6, atol=1e-7)


def test_names_may_have_the_prefix_of_a_parallel_training():
    state = edm_state("ADM")
    found = ClassUNet.from_edm({f"module.{name}": value for name, value in state.items()})
    torch.testing.assert_close(found.class_embeddings({}), state["model.map_label.weight"].T.float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"map_label.weight": None, "map_label.bias": None}, r"is an EDM UNet without classes \(map_label.weight is missing\)"),
        ({"map_label.bias": None}, "is not an EDM UNet: it lacks map_label.bias"),
        ({"map_noise.freqs": torch.ones(8)}, r"is an NCSN\+\+ \(trained as 've'\), which is not read; give a DDPM\+\+ or an ADM"),
        ({"enc.16x16_aux_skip.weight": torch.ones(8)}, r"is an NCSN\+\+"),
        ({"dec.16x16_aux_conv.weight": None}, r"its last layer is missing: ADM's out_conv, or DDPM\+\+'s dec.16x16_aux_conv"),
        ({"dec.16x16_aux_conv.weight": torch.ones(6, 32, 3, 3)}, "has 3 channels in and 6 out, as with iDDPM's preconditioning"),
        ({"enc.16x16_conv.weight": None}, "is not an EDM UNet: it lacks enc.16x16_conv.weight"),
        ({"dec.8x8_in1.conv0.weight": None}, r"does not fit the network: .*\n.*Missing key"),
        (
            {"enc.8x8_down.conv0.resample_filter": torch.zeros(1, 1, 2, 2)[:, :, :, :1]},
            r"resample_filter is .*; supported",
        ),
        ({"map_layer0.weight": None, "map_layer1.weight": None}, "map_layer0.weight, map_layer1.weight missing; it has"),
        ({"map_layer0.bias": torch.ones(1).expand(64)}, "'model.map_layer0.bias' cannot be taken: .*its values share their memory"),
        ({"map_layer0.weight": torch.ones(1, 200_000)}, "does not fit the network"),
    ],
)
def test_what_cannot_be_read_is_named(change, message):
    state = edm_state("DDPM++")
    for name, value in change.items():
        state.pop(f"model.{name}", None)
        state |= {} if value is None else {f"model.{name}": value}
    with pytest.raises(ValueError, match=message):
        ClassUNet.from_edm(state)


def test_other_arguments_that_do_not_fit_are_named(tmp_path):
    state = edm_state("DDPM++")
    with pytest.raises(ValueError, match=r"has iDDPM's preconditioning \(its buffer u\), which is not read"):
        ClassUNet.from_edm(state | {"u": torch.ones(1001)})
    with pytest.raises(ValueError, match=r"map_layer0.weight, map_layer1.weight missing; it has nothing"):
        ClassUNet.from_edm({})
    for wrong in (0.0, True, "0.5"):
        with pytest.raises(ValueError, match=f"sigma_data is {wrong!r}; give a positive number"):
            ClassUNet.from_edm(state, sigma_data=wrong)
    for name in ("edm.pkl", "EDM.PKL"):
        with pytest.raises(ValueError, match=r"is a pickle, which would run its code: .* torch.save\(network.state_dict\(\)"):
            ClassUNet.from_edm(name)
    (tmp_path / "edm.pt").write_bytes(pickle.dumps({"ema": torch.nn.Identity()}))
    with pytest.raises(ValueError, match=r"as a checkpoint of tensors: .* load it in the repository") as found:
        ClassUNet.from_edm(tmp_path / "edm.pt")
    assert "weights_only=False" not in str(found.value)
    with pytest.raises(TypeError, match=r"path_or_state_dict is a EDMUNet; give its weights, as network.state_dict\(\)"):
        ClassUNet.from_edm(ClassUNet.from_edm(state).unet)


def test_lora_names_its_argument():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES))
    config = AdaptConfig(steps=1, pairs=1, denoiser_parameters="lora", denoiser_lr=1e-4)
    with pytest.raises(ValueError, match=r"Give lora_targets the ones to adapt, such as \('affine',\)"):
        adapt(model, ClassUNet.from_edm(edm_state("ADM")), torch.rand(1, 3, SIDE, SIDE), config=config)
