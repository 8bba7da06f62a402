"""Our DiT against diffusers', its three file formats, and damaged files."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from fnmatch import fnmatch

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from dtta_fast.denoisers.calibration import Calibration
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.noise_process import NoiseProcess


@pytest.fixture
def theirs() -> DiTTransformer2DModel:
    """A diffusers DiT with the original's frequencies and its one embedding for all blocks."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


@pytest.fixture
def pipeline(theirs, tmp_path):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    DiTPipeline(theirs, vae, DDIMScheduler(1000), id2label={0: "a"}).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def predictions(ours: DiT, model: DiTTransformer2DModel) -> tuple[torch.Tensor, torch.Tensor]:
    x_t, timesteps, labels = torch.randn(5, 4, 8, 8), torch.tensor([0, 1, 10, 500, 999]), torch.tensor([0, 3, 9, 5, 5])
    with torch.no_grad():
        return ours(x_t, timesteps, ours.class_embeddings({})[labels]), model(x_t, timesteps, labels).sample


def test_agrees_with_diffusers(theirs, pipeline):
    for folder in (pipeline, pipeline / "transformer"):
        torch.testing.assert_close(*predictions(DiT.from_pretrained(folder), theirs), rtol=1e-4, atol=1e-4)


def test_the_hub_s_layout_is_read(theirs, pipeline):
    """facebook/DiT-XL-2-256: pickled weights, and the class's name from before it had one of its own."""
    folder = pipeline / "transformer"
    torch.save(load_file(folder / "diffusion_pytorch_model.safetensors"), folder / "diffusion_pytorch_model.bin")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    older = {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "only_cross_attention": False, "use_linear_projection": False}
    (folder / "config.json").write_text(json.dumps(config | older))
    vae = pipeline / "vae" / "diffusion_pytorch_model"
    torch.save(load_file(vae.with_suffix(".safetensors")), vae.with_suffix(".bin"))
    vae.with_suffix(".safetensors").unlink()
    torch.testing.assert_close(*predictions(DiT.from_pretrained(pipeline), theirs), rtol=2e-3, atol=2e-3)


def test_diffusers_frequencies_are_not_the_original_s(theirs, pipeline):
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 1
    ours, other = predictions(DiT.from_pretrained(pipeline), theirs)
    assert float((ours - other).abs().max()) > 1e-3


def test_blocks_with_embeddings_of_their_own_are_refused(theirs, tmp_path):
    theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight.data.add_(1)
    theirs.save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match=r"transformer_blocks\.2.*differs from block 0's"):
        DiT.from_pretrained(tmp_path / "dit")


def test_diffusers_models_that_are_no_dit_are_refused(tmp_path):
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 10}
    for field, value in (("norm_elementwise_affine", True), ("activation_fn", "gelu"), ("attention_bias", False)):
        DiTTransformer2DModel(**sizes, **{field: value}).save_pretrained(tmp_path / field)
        with pytest.raises(ValueError, match=f"has {field} {value!r}"):
            DiT.from_pretrained(tmp_path / field)


def test_latents_are_the_posterior_mean_scaled(pipeline):
    denoiser = DiT.from_pretrained(pipeline)
    vae = AutoencoderKL.from_pretrained(pipeline / "vae").eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(denoiser.encode(images), expected)
    assert denoiser.encode(torch.rand(2, 3, 40, 40)).shape == (2, 4, 8, 8)
    assert not [name for name in denoiser.adaptable() if name.startswith("vae")]


def test_pixel_model_without_an_autoencoder_says_so(pipeline):
    with pytest.raises(ValueError, match="works on 4; a latent model needs vae="):
        DiT.from_pretrained(pipeline / "transformer").encode(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("wrap", [False, True])
def test_original_checkpoint_sizes_come_from_the_weights(tmp_path, random_network, learn_sigma, wrap):
    network = random_network(learn_sigma, depth=3, num_heads=4)
    state = network.state_dict()
    training = {"model": {}, "ema": state, "opt": {}, "args": argparse.Namespace(model="DiT-S/4", epochs=3)}  # as the original saves it
    torch.save(training if wrap else state, tmp_path / "DiT.pt")
    for source in (tmp_path / "DiT.pt", str(tmp_path / "DiT.pt"), state):
        loaded = DiT.from_original(source, num_heads=4)
        assert loaded.network.sizes == network.sizes
        x, time, label = torch.randn(2, 3, 16, 16), torch.tensor([1.0, 900.0]), torch.randn(2, 32)
        torch.testing.assert_close(loaded.network(x, time, label), network(x, time, label))
    ddpm = NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"))
    assert torch.equal(loaded.process.table, ddpm.table)


@pytest.mark.parametrize("wrapping", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoints_of_other_trainers(tmp_path, random_network, wrapping, prefix):
    state = {prefix + name: value for name, value in random_network().state_dict().items()}
    torch.save(state if wrapping is None else {wrapping: state, "step": 3}, tmp_path / "x.pt")
    assert DiT.from_original(tmp_path / "x.pt", num_heads=2).network.sizes == random_network().sizes
    if wrapping is None:
        save_file(state, tmp_path / "x.safetensors")
        assert DiT.from_original(tmp_path / "x.safetensors", num_heads=2).network.sizes == random_network().sizes


def test_a_table_without_a_null_class(tmp_path, random_network):
    state = random_network().state_dict()
    rows = len(state["y_embedder.embedding_table.weight"])
    with_row, without = (DiT.from_original(state, num_heads=2, null_class=known) for known in (True, False))
    assert len(with_row.class_embeddings({})) == rows - 1
    assert torch.equal(without.class_embeddings({}), state["y_embedder.embedding_table.weight"])
    with pytest.raises(ValueError, match=r"null_class=False"):
        without.null_embedding({})
    without.save_pretrained(tmp_path, DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2))
    assert len(DiT.from_pretrained(tmp_path).class_embeddings({})) == rows


def test_a_file_is_not_looked_up_on_the_hub(tmp_path, random_network, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    save_file(random_network().state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors', a file; give the folder"):
        DiT.from_pretrained(tmp_path / "x.safetensors")


def test_original_initialisation_is_the_identity_of_the_paper():
    """adaLN-Zero: a fresh DiT predicts zero, whatever it is given."""
    from dtta_fast.denoisers.dit_network import DiTNetwork

    network = DiTNetwork(16, 4, 3, 32, 2, 2)
    assert not network(torch.randn(2, 3, 16, 16), torch.tensor([1.0, 2.0]), torch.randn(2, 32)).any()


def test_own_folder_round_trip(tmp_path, random_network):
    scheduler = DDPMScheduler(500, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    denoiser = DiT(random_network(), NoiseProcess.from_scheduler(scheduler))
    denoiser.save_pretrained(tmp_path / "own", scheduler)
    loaded = DiT.from_pretrained(tmp_path / "own")
    for name, value in denoiser.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])
    assert torch.equal(denoiser.process.table, loaded.process.table)


def test_no_pickle_is_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"x_embedder.proj.weight": Bomb()}, protocol=2))
    with pytest.raises(ValueError, match=r"bomb\.pt cannot be read"):
        DiT.from_original(tmp_path / "bomb.pt", num_heads=2)
    assert not (tmp_path / "ran").exists()


def test_missing_and_damaged_files_are_named(tmp_path, random_network):
    scheduler = DDPMScheduler(10)
    DiT(random_network(), NoiseProcess.from_scheduler(scheduler)).save_pretrained(tmp_path / "own", scheduler)

    files = {"config": "config.json", "weights": "model.safetensors", "scheduler": "scheduler/scheduler_config.json"}

    def damaged(**change: bytes | None) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "own", tmp_path / "copy")
        for name, content in change.items():
            path = tmp_path / "copy" / files[name]
            path.unlink() if content is None else path.write_bytes(content)
        return str(tmp_path / "copy")

    weights = (tmp_path / "own" / "model.safetensors").read_bytes()
    config = (tmp_path / "own" / "config.json").read_bytes()
    for change, error, message in [
        ({"config": None}, FileNotFoundError, r"config\.json is missing"),
        ({"config": b"{"}, ValueError, r"config\.json is not a JSON file"),
        ({"config": b"[]"}, ValueError, "no JSON object"),
        ({"config": b'{"_class_name": "UNet"}'}, ValueError, "names no DiT"),
        ({"weights": None}, FileNotFoundError, r"model\.safetensors is missing"),
        ({"weights": weights[:-100]}, ValueError, r"model\.safetensors is damaged"),
        ({"weights": b""}, ValueError, r"model\.safetensors is damaged"),
        ({"config": b'{"_class_name": "DiT", "width": 3}'}, ValueError, r"config\.json describes no DiT.*width"),
        ({"config": config.replace(b'"num_heads": 2', b'"num_heads": 0')}, ValueError, r"config\.json describes no DiT"),
        ({"scheduler": b'{"_class_name": "DDPMScheduler", "beta_schedule": "junk"}'}, ValueError, "describes no noise process"),
        ({"scheduler": None}, FileNotFoundError, r"scheduler_config\.json is missing"),
        ({"scheduler": b'{"_class_name": "os"}'}, ValueError, "is not a scheduler of diffusers"),
    ]:
        with pytest.raises(error, match=message):
            DiT.from_pretrained(damaged(**change))
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt is missing"):
        DiT.from_original(tmp_path / "nothing.pt", num_heads=2)
    with pytest.raises(ValueError, match=r"is not a DiT checkpoint: x_embedder\.proj\.weight"):
        DiT.from_original({"weight": torch.zeros(1)}, num_heads=2)
    state = random_network().state_dict()
    del state["blocks.1.attn.qkv.bias"]
    with pytest.raises(ValueError, match=r"(?s)does not fit.*blocks\.1\.attn\.qkv\.bias"):
        DiT.from_original(state, num_heads=2)


def test_table_follows_the_module_but_stays_float32(process, random_network):
    denoiser = DiT(random_network(), process).to(torch.bfloat16)
    assert denoiser.process.table.dtype == torch.float32
    assert denoiser.encode(torch.rand(1, 3, 20, 20)).dtype == torch.float32  # x0 is not an activation: noise is added to it in float32


def test_a_pipeline_s_calibration_is_read_unless_it_is_to_be_measured_anew(pipeline):
    denoiser = DiT.from_pretrained(pipeline)
    found = Calibration.measure(denoiser, torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    found.save(pipeline / "calibration.json")
    assert DiT.from_pretrained(pipeline).calibration == found
    (pipeline / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match=r"calibration.json"):
        DiT.from_pretrained(pipeline)
    assert DiT.from_pretrained(pipeline, calibration=False).calibration is None


def test_a_latent_model_keeps_its_vae(pipeline, tmp_path):
    denoiser = DiT.from_pretrained(pipeline)
    denoiser.save_pretrained(tmp_path / "own", DDIMScheduler(1000))
    again = DiT.from_pretrained(tmp_path / "own")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.encode(images), denoiser.encode(images))


def test_a_hub_model_without_safetensors_is_fetched_by_its_bin_files(pipeline, tmp_path, monkeypatch):
    for part in ("transformer", "vae"):
        file = pipeline / part / "diffusion_pytorch_model.safetensors"
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()

    def snapshot(model_id: str, allow_patterns: list[str], ignore_patterns: list[str] | None) -> str:
        kept = [path for path in pipeline.rglob("*") if any(fnmatch(path.name, pattern) for pattern in allow_patterns)]
        for path in kept:
            (tmp_path / "cache" / path.relative_to(pipeline)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "cache" / path.relative_to(pipeline))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(DiT.from_pretrained("someone/model").encode(images), DiT.from_pretrained(pipeline).encode(images))
