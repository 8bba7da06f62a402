"""A class-conditional UNet as a denoiser, against diffusers' own UNet2DModel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from dtta_fast import AdaptConfig, Adapter
from dtta_fast.denoisers import ClassUNet
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.runs.models import load_denoiser

SCHEDULER = DDPMScheduler(20)


def unet(channels: int = 3, **changes) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "block_out_channels": (8, 16)}
    sizes = {"sample_size": 8, "in_channels": channels, "out_channels": channels, "norm_num_groups": 4, "num_class_embeds": 5}
    return UNet2DModel(layers_per_block=1, attention_head_dim=8, **blocks, **{**sizes, **changes}).eval()


def denoiser(network: UNet2DModel, **keywords) -> ClassUNet:
    return ClassUNet(network, NoiseProcess.from_scheduler(SCHEDULER), **keywords).eval()


@pytest.fixture
def pairs() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 3, 7, 11, 15, 19])


def test_hard_classes_give_the_prediction_of_diffusers(pairs):
    network = unet().double()
    x_t, timesteps = pairs
    classes = torch.tensor([4, 0, 2])
    with torch.no_grad():
        wanted = network(x_t, timesteps, classes.repeat_interleave(2)).sample
        ours = denoiser(network)
        found = ours(x_t, timesteps, ours.class_embeddings({})[classes])
        still = network(x_t, timesteps, classes.repeat_interleave(2)).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(still, wanted, rtol=0, atol=0)  # the user's own calls with class numbers still work


def test_the_gradient_reaches_soft_classes(pairs):
    ours = denoiser(unet().double())
    x_t, timesteps = (part[:2] for part in pairs)
    table, weights = ours.class_embeddings({}), torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: ours(x_t, timesteps, w.softmax(1) @ table).square().mean(), weights)


def test_a_scheduler_in_place_of_the_process_is_named():
    with pytest.raises(TypeError, match=r"process is a DDPMScheduler; give NoiseProcess.from_scheduler\(scheduler\)"):
        ClassUNet(unet(), SCHEDULER)


def test_patches_are_channels_of_one_pixel(pairs):
    network = unet(12, out_channels=24).double()
    ours = denoiser(network, patch_size=2)
    assert (ours.image_size, ours.latent_shape) == (16, (3, 16, 16))
    x_t, timesteps = torch.randn(2, 3, 16, 16, dtype=torch.float64), pairs[1][:2]
    squares = x_t.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).reshape(2, 12, 8, 8)
    with torch.no_grad():
        found = ours(x_t, timesteps, ours.class_embeddings({})[[1, 2]])
        inner = network(squares, timesteps, torch.tensor([1, 2])).sample
    # the prediction is the first half of the channels and the learned variance the second, as for every denoiser
    halves = [F.pixel_shuffle(half, 2) for half in inner.chunk(2, dim=1)]
    torch.testing.assert_close(found, torch.cat(halves, dim=1))


def test_the_last_row_is_no_class_only_if_it_is_said(pairs):
    network = unet()
    table = network.class_embedding.weight
    without, with_row = denoiser(network), denoiser(network, null_class=True)
    assert len(without.class_embeddings({})) == 5
    assert torch.equal(with_row.class_embeddings({}), table[:4])
    assert torch.equal(with_row.null_embedding({}), table[4])
    per_image = torch.randn(2, 5, 32)
    assert torch.equal(with_row.null_embedding({"unet.class_embedding.weight": per_image}), per_image[:, 4])
    with pytest.raises(ValueError, match="null_class=False"):
        without.null_embedding({})


def test_folders_of_our_own_and_of_diffusers_are_read(tmp_path, pairs):
    network = unet()
    x_t, timesteps = pairs[0].float(), pairs[1]
    own = denoiser(network, null_class=True)
    own.save_pretrained(tmp_path / "own", SCHEDULER)
    DDPMPipeline(unet(), SCHEDULER).save_pretrained(tmp_path / "pipeline")
    with torch.no_grad():
        wanted = own(x_t, timesteps, own.class_embeddings({})[:3])
        for folder, rows in (("own", 4), ("pipeline", 5)):
            for read in (ClassUNet.from_pretrained(tmp_path / folder), load_denoiser(str(tmp_path / folder))):
                assert isinstance(read, ClassUNet)
                table = read.class_embeddings({})
                assert len(table) == rows
                torch.testing.assert_close(read(x_t, timesteps, table[:3]), wanted)
    assert ClassUNet.from_pretrained(tmp_path / "pipeline", null_class=True).null_class


@pytest.mark.parametrize("parameters", ["frozen", "all"])
def test_a_classifier_is_adapted(parameters):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    config = AdaptConfig(steps=2, pairs=3, lr=0.1, guard=0, denoiser_parameters=parameters, denoiser_lr=1e-4)
    network, images = unet(), torch.rand(2, 3, 8, 8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    ours = denoiser(network)
    found = Adapter(model, ours, config).adapt(images, image_ids=torch.tensor([0, 1]))
    assert found.loss.shape == (2, 2)
    assert bool((found.outputs != found.outputs_before).any(1).all())
    alone = Adapter(model, ours, config).adapt(images[1:], image_ids=torch.tensor([1]))
    torch.testing.assert_close(alone.outputs, found.outputs[1:], rtol=1e-4, atol=1e-5)  # also if the denoiser adapts to each image
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("change", "keywords", "message"),
    [
        ({"num_class_embeds": None}, {}, "give a UNet2DModel with num_class_embeds"),
        ({"class_embed_type": "timestep"}, {}, "TimestepEmbedding"),
        ({"num_class_embeds": 2}, {"null_class": True}, "at least 2 classes"),
        ({"in_channels": 4}, {}, "with patch_size 1 and latents of 3, it needs 3 in"),
        ({}, {"patch_size": 2}, "needs 12 in"),
        ({"sample_size": None}, {}, "sample_size None; give a UNet2DModel for square images"),
        ({"sample_size": (8, 16)}, {}, "for square images"),
        ({}, {"patch_size": 0}, "patch_size is 0"),
    ],
)
def test_unets_that_do_not_fit_are_refused(change, keywords, message):
    with pytest.raises(ValueError, match=message):
        denoiser(unet(**change), **keywords)


def test_a_square_size_may_be_a_pair():
    assert denoiser(unet(sample_size=(8, 8))).latent_shape == (3, 8, 8)


def test_damaged_folders_are_named(tmp_path):
    denoiser(unet()).save_pretrained(tmp_path, SCHEDULER)
    for text, message in (
        ('{"_class_name": "DiT"}', "names 'DiT'"),
        ('{"_class_name": "ClassUNet", "patch_size": "2"}', "give a patch_size"),
        ('{"_class_name": "ClassUNet", "patch_size": 2}', "needs 12 in"),
        ("[", "is not a JSON file"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ClassUNet.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"scheduler_config\.json is missing"):
        ClassUNet.from_pretrained(tmp_path)
