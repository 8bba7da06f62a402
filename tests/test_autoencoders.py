"""What a denoiser makes of its autoencoder's latents, against the formulas of diffusers' pipelines."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny, DDPMScheduler, VQModel
from torch import Tensor, nn

from dtta_fast.denoisers.base import check_vae, image_size, to_latents
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess

TINY = runpy.run_path(str(Path(__file__).with_name("tiny_pipelines.py")))
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SIZES = {**BLOCKS, "block_out_channels": (8, 16), "norm_num_groups": 4}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def kl(**config) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**SIZES, **config).eval()


@torch.no_grad()
def test_shift_and_scale_are_those_of_the_pipelines(images):
    z = kl().encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(to_latents(kl(scaling_factor=0.5), images, 16), z * 0.5)
    sd3 = kl(scaling_factor=1.5305, shift_factor=0.0609)
    torch.testing.assert_close(to_latents(sd3, images, 16), (z - 0.0609) * 1.5305)  # StableDiffusion3Img2ImgPipeline
    mean, std = [0.1, -0.2, 0.3, -0.4], [1.0, 2.0, 0.5, 4.0]
    playground = kl(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    channels = [torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std)]
    torch.testing.assert_close(to_latents(playground, images, 16), (z - channels[0]) * 0.5 / channels[1])  # StableDiffusionXLImg2Img


@torch.no_grad()
def test_autoencoders_without_a_posterior(images):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)
    )
    vq = VQModel(**SIZES, scaling_factor=0.25)
    deep = TINY["deep_compression_autoencoder"](4, scaling_factor=0.41)
    for vae in (tiny.eval(), vq.eval(), deep):
        check_vae(vae)
        wanted = vae.encode(images * 2 - 1, return_dict=False)[0] * vae.config.scaling_factor
        torch.testing.assert_close(to_latents(vae, images, 16), wanted)
        assert image_size(vae, wanted.shape[-1]) == 16


def test_folders_say_which_autoencoder_they_hold(tmp_path):
    network = DiTNetwork(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    tiny = AutoencoderTiny(**sizes, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    scheduler = DDPMScheduler(10)
    DiT(network, NoiseProcess.from_scheduler(scheduler), tiny).save_pretrained(tmp_path, scheduler)
    assert isinstance(DiT.from_pretrained(tmp_path).vae, AutoencoderTiny)
    config = (tmp_path / "vae" / "config.json").read_text()
    (tmp_path / "vae" / "config.json").write_text(config.replace("AutoencoderTiny", "AutoencoderOobleck"))
    with pytest.raises(ValueError, match=r"names 'AutoencoderOobleck'; an autoencoder is one of AutoencoderDC, AutoencoderKL"):
        DiT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "vae",
    [
        nn.Identity(),
        AsymmetricAutoencoderKL(down_block_out_channels=(8,), up_block_out_channels=(8,), norm_num_groups=4),
    ],
    ids=["Identity", "AsymmetricAutoencoderKL"],
)
def test_others_are_refused_when_the_denoiser_is_made(vae):
    network = DiTNetwork(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(ValueError, match=rf"vae is a {type(vae).__name__}; give one of diffusers': AutoencoderDC, AutoencoderKL"):
        DiT(network, NoiseProcess.from_scheduler(DDPMScheduler(10)), vae)
