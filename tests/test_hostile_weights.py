"""Checkpoints of tensors that are no weights: refused by name, before a network is made for them."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from dtta_fast.denoisers.concat_unet import ConcatUNet
from dtta_fast.denoisers.controlnet import ControlNet
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.stable_diffusion import StableDiffusion
from dtta_fast.denoisers.weights import check_weights

NAME = "blocks.1.mlp.fc1.weight"


def quantised(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def nested(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([x, x[:1]])


def csr(x: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x.to_sparse_csr()


KINDS = {
    "sparse": (lambda x: x.to_sparse(), "it is sparse"),
    "sparse, csr": (csr, "it is sparse"),
    "quantised": (quantised, "it is of torch.qint8"),
    "nested": (nested, "it is nested"),
    "complex": (lambda x: x.to(torch.complex64), "it is of torch.complex64; save float32, float16, bfloat16, float64"),
    "whole": (lambda x: x.to(torch.int64), "it is of torch.int64"),
    "bool": (lambda x: x > 0, "it is of torch.bool"),
    "8 bits": (lambda x: x.to(torch.float8_e4m3fn), "it is of torch.float8_e4m3fn"),
    "meta": (lambda x: x.to("meta"), "and no values, on the device meta"),
    "empty": (lambda x: x[:0], "and is empty"),
    "expanded": (lambda x: torch.zeros(1).expand(10**6, 10**6), "its values share their memory"),
    "expanded in a larger storage": (lambda x: torch.zeros(10**4)[:1].expand(100), "its values share their memory"),
    "overlapping": (lambda x: torch.zeros(100).as_strided((90, 90), (1, 0)), "its values share their memory"),
    "a number": (lambda x: 5, "it is a int, and no plain tensor"),
    "none": (lambda x: None, "it is a NoneType"),
    "a list": (lambda x: [x], "it is a list"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_other_tensors(tmp_path, random_network, kind):
    change, message = KINDS[kind]
    state = dict(random_network().state_dict())
    state[NAME] = change(state[NAME])
    path = tmp_path / "dit.pt"
    sources = [(state, "path_or_state_dict")]
    if kind not in ("meta", "nested"):  # which torch.load leaves to the kinds that it knows
        torch.save({"ema": state}, path)
        sources.append((path, str(path)))
    for source, name in sources:
        with pytest.raises(ValueError, match=message) as raised:
            DiT.from_original(source, num_heads=2)
        assert name in str(raised.value)
        assert NAME in str(raised.value)


@pytest.mark.parametrize("kind", ["complex", "whole", "8 bits", "empty"])
def test_a_folder_of_other_tensors(tmp_path, random_network, kind):
    change, message = KINDS[kind]
    DiT(random_network(), NoiseProcess.from_scheduler(DDPMScheduler(10))).save_pretrained(tmp_path, DDPMScheduler(10))
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({**state, NAME: change(state[NAME])}, file)
    with pytest.raises(ValueError, match=rf"model\.safetensors is not a checkpoint of plain weights: '{NAME}'.*{message}"):
        DiT.from_pretrained(tmp_path)


def test_a_network_is_no_larger_than_its_weights(random_network):
    """Each alone is as large as its storage: a thousand views of one are not."""
    state = dict(random_network().state_dict())
    one = torch.zeros(10**5)
    for i in range(100):
        state[f"blocks.{i}.x"] = one.view(10, -1)
    with pytest.raises(ValueError, match=r"its tensors take \d+ bytes, and share \d+"):
        DiT.from_original(state, num_heads=2)
    with pytest.raises(ValueError, match="its name is a int"):
        check_weights({5: one}, "a.pt")
    check_weights({"a": one[:50], "b": one[50:], "c": torch.nn.Parameter(torch.zeros(2, 3).T), "d": torch.tensor(1.0)}, "a.pt")


def test_checkpoints_in_half_precision_are_taken(random_network):
    network = random_network()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = DiT.from_original({name: value.to(dtype) for name, value in network.state_dict().items()}, num_heads=2)
        assert {value.dtype for value in found.state_dict().values()} == {torch.float32}
        assert torch.equal(found.network.blocks[0].mlp.fc1.weight, network.blocks[0].mlp.fc1.weight.to(dtype).float())


def test_embeddings_of_another_dtype(tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=7, out_channels=3, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    whole = ConcatUNet(unet, NoiseProcess.from_scheduler(DDPMScheduler(10)), classes=3)
    whole.save_pretrained(tmp_path, DDPMScheduler(10))
    assert torch.equal(ConcatUNet.from_pretrained(tmp_path).embeddings, whole.embeddings)
    save_file({"embeddings": whole.embeddings.detach().to(torch.complex64)}, tmp_path / "embeddings.safetensors")
    with pytest.raises(ValueError, match=r"embeddings\.safetensors is not a checkpoint of plain weights: 'embeddings'.*complex64"):
        ConcatUNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["x" * 300, "someone/" + "x" * 5000, "x\0y", "a/b/c/d"])
def test_an_id_that_no_file_and_no_model_can_have(name):
    for kind in (DiT, ConcatUNet, StableDiffusion):
        with pytest.raises(ValueError, match=r"^path is .*: there is no such folder, and it cannot be a hub id"):
            kind.from_pretrained(name)
    with pytest.raises((FileNotFoundError, ValueError), match=r"is missing|cannot be read"):
        DiT.from_original(name, num_heads=2)


def test_a_controlnet_s_id(monkeypatch):
    monkeypatch.setattr(StableDiffusion, "from_pretrained", lambda *given, **named: None)
    with pytest.raises(ValueError, match=r"^controlnet is 'xxx.*it cannot be a hub id"):
        ControlNet.from_pretrained("any", "x" * 300)


def test_configs_of_any_size(tmp_path, random_network):
    DiT(random_network(), NoiseProcess.from_scheduler(DDPMScheduler(10))).save_pretrained(tmp_path, DDPMScheduler(10))
    kept = (tmp_path / "config.json").read_text()
    with (tmp_path / "config.json").open("w") as file:
        file.write(json.dumps({**json.loads(kept), "note": " " * 2**24}))
    with pytest.raises(ValueError, match=r"config\.json is not a JSON file: it has \d+ bytes, and 16777216 is the most"):
        DiT.from_pretrained(tmp_path)
