"""Segmentation and depth: one engine serves them, gradients reach the model through the map, and metrics are the libraries'."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDPMScheduler, UNet2DModel
from torch import nn
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
)

from dtta_fast import AdaptConfig, Adapter, adapt, calibrate, presets, zoo
from dtta_fast.core.guard import held_out_losses
from dtta_fast.core.step import gradients, initial_state
from dtta_fast.denoisers import ConcatUNet, ControlNet, StableDiffusion
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.tasks import Depth, Segmentation

CONFIG = AdaptConfig(steps=2, pairs=4, guard=4, lr=1e-3)
WIDTHS = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "strides": [2, 2, 2, 2]}


def _process() -> NoiseProcess:
    return NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear", prediction_type="sample"))


def _unet(channels: int) -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    return UNet2DModel(sample_size=16, in_channels=3 + channels, out_channels=3, **blocks, **sizes)


@pytest.fixture
def segmenter() -> nn.Module:
    torch.manual_seed(0)
    config = SegformerConfig(**WIDTHS, decoder_hidden_size=16, num_labels=4)
    return SegformerForSemanticSegmentation(config).eval()


@pytest.fixture
def of_classes() -> ConcatUNet:
    torch.manual_seed(1)
    return ConcatUNet(_unet(5), _process(), classes=4).eval()


@pytest.fixture
def of_depth() -> ConcatUNet:
    torch.manual_seed(2)
    return ConcatUNet(_unet(1), _process(), depth_range=(1.0, 12.0)).eval()


class DepthNet(nn.Module):
    """Metres from 1 to 11, at half the image's size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 1 + 10 * torch.sigmoid(self.layers(images))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def test_segmentation_adapts_each_image_on_its_own(segmenter, of_classes, images):
    before = copy.deepcopy(segmenter.state_dict())
    result = adapt(segmenter, of_classes, images, config=CONFIG.replace(guard=0), task=Segmentation())
    assert result.predictions.shape == (3, 32, 32)
    assert result.outputs.shape == (3, 4, 16, 16)
    assert bool((result.outputs != result.outputs_before).any())
    with torch.no_grad():
        logits = segmenter(images).logits
    torch.testing.assert_close(result.outputs_before, logits, rtol=1e-4, atol=1e-5)
    expected = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False).argmax(1)  # transformers' own post-processing
    assert float((result.predictions_before == expected).float().mean()) > 0.999
    alone = adapt(segmenter, of_classes, images[2:], config=CONFIG.replace(guard=0), task=Segmentation(), image_ids=torch.tensor([2]))
    torch.testing.assert_close(alone.outputs, result.outputs[2:], rtol=1e-3, atol=1e-4)
    chunked = adapt(segmenter, of_classes, images, config=CONFIG.replace(guard=0, chunk=1), task=Segmentation())
    torch.testing.assert_close(chunked.outputs, result.outputs, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


@pytest.mark.parametrize("task", ["segmentation", "depth"])
def test_gradient_reaches_the_model_through_the_map(task, segmenter, of_classes, of_depth, images):
    """The step's gradient against autograd through everything at once, in float64."""
    model, denoiser, kind = (segmenter, of_classes, Segmentation()) if task == "segmentation" else (DepthNet(), of_depth, Depth())
    model, denoiser, images = model.double(), denoiser.double(), images.double()
    config = AdaptConfig(steps=1, pairs=3, chunk=2, logit_scale=2.0 if task == "segmentation" else None)
    adapter = Adapter(model, denoiser, config, kind)
    engine = adapter.engine
    engine.program.plan(images, denoiser.encode(images), 3)
    theta, phi = engine.program.source()
    with torch.no_grad():
        outputs = engine.program.problem.model(images)
    generator = torch.Generator().manual_seed(5)
    timesteps = torch.randint(100, 900, (3, 3), generator=generator)
    noise = torch.randn(3, 3, 3, 16, 16, generator=generator, dtype=torch.float64)
    state, x0 = initial_state(engine.program.problem, theta, phi, outputs), denoiser.encode(images)
    loss, found, _ = gradients(engine.program.problem, engine.program.schedule, state, images, x0, torch.arange(3), timesteps, noise)
    table = denoiser.process.table.double()
    for i in range(3):
        model.zero_grad()
        if task == "segmentation":
            shares = (2.0 * F.normalize(model(images[i : i + 1]).logits, dim=1)).softmax(1)
            maps = torch.einsum("bkhw,ke->behw", shares, denoiser.embeddings.detach())
        else:
            maps = (2 * model(images[i : i + 1]).log() - torch.log(torch.tensor(12.0))) / torch.log(torch.tensor(12.0))
        maps = F.interpolate(maps, (16, 16), mode="bilinear", antialias=True)
        a, s = (table[timesteps[i], column, None, None, None] for column in (0, 1))
        x_t = a * x0[i] + s * noise[i]
        prediction = denoiser.unet(torch.cat([x_t, maps.expand(3, -1, -1, -1)], 1), timesteps[i]).sample
        expected = (prediction - x0[i]).square().mean()
        expected.backward()
        torch.testing.assert_close(loss[i], expected.detach(), rtol=1e-5, atol=1e-7)
        for (name, _), gradient in zip(theta.items(), found, strict=True):
            own = dict(engine.task.bind(model, denoiser)[0].named_parameters())[name].grad
            torch.testing.assert_close(gradient[i], own, rtol=1e-4, atol=1e-7)


def test_depth_adapts_online_and_in_bfloat16_and_with_the_denoiser(of_depth, images):
    model = DepthNet()
    for change in ({"mode": "online"}, {"precision": "bf16"}, {"denoiser_parameters": "all", "denoiser_lr": 1e-4}, {"parameters": "head"}):
        result = adapt(model, of_depth, images, config=CONFIG.replace(guard=0, **change), task=Depth())
        assert result.predictions.shape == (3, 32, 32)
        assert bool((result.predictions != result.predictions_before).any()), change
        assert bool(result.loss.isfinite().all())


def test_guard_takes_the_map_with_the_lower_loss(of_depth, images):
    """A guard that asks for no margin never leaves an image with a higher held-out loss than before."""
    task = Depth()
    adapter = Adapter(DepthNet(), of_depth, CONFIG.replace(lr=0.1, guard=8), task)
    result = adapter.adapt(images)
    x0, ids, after_two = of_depth.encode(images), torch.arange(3), torch.tensor(2)
    program = adapter.engine.program
    before, after = (
        held_out_losses(program.problem, program.schedule, task.decision(outputs, of_depth), x0, ids, after_two).mean(1)
        for outputs in (result.outputs_before, result.outputs)
    )
    assert bool((after < before)[result.accepted].all())
    assert bool(result.accepted.any())
    assert result.evaluations.tolist() == [2 * 4 + 2 * 8] * 3
    refused = ~result.accepted
    assert torch.equal(result.outputs[refused], result.outputs_before[refused])


def test_matching_serves_maps_too(of_depth, images):
    of_depth.calibration = calibrate(of_depth, torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(6)))
    assert of_depth.calibration.signal == ()
    result = adapt(DepthNet(), of_depth, images * 0.3 + 0.3, config=CONFIG.replace(match="both"), task=Depth())
    assert int(result.evaluations.max()) <= 2 * 4 + 3 * 4
    with pytest.warns(UserWarning, match="no calibration of its timesteps"):
        assert Adapter(DepthNet(), of_depth, CONFIG.replace(timesteps="calibrated"), Depth()).config.timesteps == "stratified"


def test_relative_depth_is_blind_to_scale_and_shift():
    denoiser = ConcatUNet(_unet(1), _process())
    maps = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(denoiser.depth_map(maps), denoiser.depth_map(3 * maps + 5), rtol=1e-4, atol=1e-4)


def test_metric_depth_is_the_logarithm_between_nearest_and_farthest(of_depth):
    found = of_depth.depth_map(torch.tensor([1.0, 12.0, 12.0**0.5]).view(3, 1, 1, 1))
    torch.testing.assert_close(found.flatten(), torch.tensor([-1.0, 1.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["of_classes", "of_depth"])
def test_concat_unet_saves_and_loads(kind, request, tmp_path):
    denoiser = request.getfixturevalue(kind)
    denoiser.calibration = calibrate(denoiser, torch.rand(8, 3, 16, 16))
    denoiser.save_pretrained(tmp_path, DDPMScheduler(1000, beta_schedule="linear", prediction_type="sample"))
    again = ConcatUNet.from_pretrained(tmp_path)
    assert (again.classes, again.depth_range) == (denoiser.classes, denoiser.depth_range)
    for name, value in denoiser.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert torch.equal(again.process.table, denoiser.process.table)
    assert again.calibration == denoiser.calibration
    (tmp_path / "unet" / "config.json").unlink()
    with pytest.raises(ValueError, match="unet cannot be read as a UNet2DModel"):
        ConcatUNet.from_pretrained(tmp_path)


def test_concat_unet_refuses_what_does_not_fit():
    cases = [
        ({"unet": _unet(0), "classes": 4}, "unet has 3 channels in"),
        ({"unet": _unet(2), "depth_range": (1.0, 2.0)}, "2 channels for the map; depth takes 1"),
        ({"unet": _unet(1), "depth_range": (2.0, 2.0)}, "0 < nearest < farthest"),
        ({"unet": _unet(1), "depth_range": (0.0, 2.0)}, "0 < nearest < farthest"),
        ({"unet": _unet(1), "classes": 4, "depth_range": (1.0, 2.0)}, "a map shows either"),
        ({"unet": _unet(2), "classes": 1}, "classes is 1"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ConcatUNet(arguments.pop("unet"), _process(), **arguments)


def test_wrong_models_and_configs_are_refused(segmenter, of_classes, of_depth, images):
    class Nan(DepthNet):
        def forward(self, images):
            return super().forward(images) * torch.nan

    cases = [
        (segmenter, of_depth, Segmentation(), {}, "maps of depth and has no classes"),
        (segmenter, of_classes, Depth(), {}, "a depth model returns"),
        (DepthNet(), of_classes, Depth(), {}, "maps of 4 classes"),
        (DepthNet(), of_classes, Segmentation(), {}, "embeddings for 4 classes"),
        (Nan(), of_depth, Depth(), {}, "NaN or infinity"),
        (segmenter, of_classes, Segmentation(), {"objective": "noise_mix"}, "denoiser takes maps"),
        (segmenter, of_classes, Segmentation(), {"top_k": 2}, "top_k is 2"),
        (segmenter, of_classes, Segmentation(), {"method": "posterior", "guard": 0}, "method is 'posterior'"),
        (DepthNet(), of_depth, Depth(), {"logit_scale": 2.0}, "logit_scale is 2.0"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), of_classes, Segmentation(), {}, "floating-point map"),
    ]
    for model, denoiser, task, change, message in cases:
        with pytest.raises(ValueError, match=message):
            adapt(model.eval(), denoiser, images, config=CONFIG.replace(**change), task=task)


def test_libraries_models_run(of_classes, of_depth, images):
    """segmentation_models_pytorch, torchvision and transformers' DPT: outputs of three kinds."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    torch.manual_seed(0)
    config = CONFIG.replace(guard=0, steps=1, lr=1e-4)
    unet = smp.Unet("resnet18", encoder_weights=None, classes=4).eval()
    assert adapt(unet, of_classes, images, config=config, task=Segmentation()).outputs.shape == (3, 4, 32, 32)
    lraspp = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4).eval()
    assert adapt(lraspp, of_classes, images, config=config, task=Segmentation()).outputs.shape == (3, 4, 32, 32)
    dense_depth = nn.Sequential(smp.Unet("densenet169", encoder_weights=None), nn.Softplus()).eval()
    assert adapt(dense_depth, of_depth, images[:1], config=config, task=Depth()).predictions.shape == (1, 32, 32)
    backbone = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    dpt = DPTForDepthEstimation(
        DPTConfig(**backbone, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8)
    ).eval()
    relative = ConcatUNet(_unet(1), _process()).eval()
    assert adapt(dpt, relative, images, config=config, task=Depth()).predictions.shape == (3, 32, 32)


def test_processor_prepares_images_as_the_library_does(segmenter, of_classes):
    processor = SegformerImageProcessor(size={"height": 24, "width": 40}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    images = torch.linspace(0, 1, 3 * 50 * 60).view(1, 3, 50, 60)
    task = Segmentation(processor)
    ours = task.normalise(segmenter, task.crop(segmenter, images))
    torch.testing.assert_close(ours, processor(images=images, do_rescale=False, return_tensors="pt").pixel_values, rtol=1e-4, atol=1e-3)
    result = adapt(segmenter, of_classes, images, config=CONFIG, task=task)
    assert result.predictions.shape == (1, 24, 40)


@pytest.fixture(scope="module")
def controlled() -> tuple[StableDiffusion, ControlNetModel]:
    denoiser = zoo.load("open_vocabulary")[1]
    torch.manual_seed(0)
    control = ControlNetModel.from_unet(denoiser.unet, conditioning_embedding_out_channels=(8, 16, 32)).eval()
    for part in control.modules():  # its zero convolutions would hide it
        if isinstance(part, nn.Conv2d) and not part.weight.any():
            nn.init.normal_(part.weight, std=0.02)
    return denoiser, control


def test_controlnet_predicts_as_the_libraries_do(controlled):
    plain, control = controlled
    text = plain.text()
    denoiser = (
        ControlNet(copy.deepcopy(plain.unet), plain.process, plain.vae, *text, copy.deepcopy(control)).eval().with_classes(["a", "b"])
    )
    x_t = torch.randn(6, *denoiser.latent_shape, generator=torch.Generator().manual_seed(1))
    timesteps, prompts = torch.tensor([5, 400, 900, 7, 300, 800]), denoiser.class_embeddings({})
    found = denoiser(x_t, timesteps, prompts)
    rows, zeros = prompts.repeat_interleave(3, 0), torch.zeros(6, 3, denoiser.image_size, denoiser.image_size)
    down, middle = control(x_t, timesteps, rows, zeros, return_dict=False)
    expected = plain.unet(x_t, timesteps, rows, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert bool((found - plain.with_classes(["a", "b"])(x_t, timesteps, prompts)).abs().max() > 1e-3)


def test_noise_mixing_at_every_pixel_adapts_a_segmenter_by_a_controlnet(controlled, segmenter, images, tmp_path):
    _, control = controlled
    control.save_pretrained(tmp_path)
    named = ControlNet.from_pretrained(zoo.folder("open_vocabulary") / "diffusion", tmp_path).with_classes(["sky", "road", "tree", "car"])
    config = AdaptConfig(objective="noise_mix", steps=1, pairs=2, top_k=3, lr=1e-3, timestep_range=(100, 101))
    result = adapt(segmenter, named, images, config=config, task=Segmentation())
    assert result.evaluations.tolist() == [2 * 3] * 3
    assert bool((result.outputs != result.outputs_before).any())
    both = adapt(segmenter, named, images[:1], config=config.replace(denoiser_parameters="all", denoiser_lr=1e-5), task=Segmentation())
    assert bool(both.loss.isfinite().all())
    for change, message in (
        ({"objective": "embedding_mix"}, "denoiser takes prompts"),
        ({"guard": 4}, "guard is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            adapt(segmenter, named, images, config=config.replace(**change), task=Segmentation())
    with pytest.raises(ValueError, match="cannot be read as a ControlNetModel"):
        ControlNet.from_pretrained(zoo.folder("open_vocabulary") / "diffusion", tmp_path / "..")


def test_presets_hold_for_maps(of_classes):
    assert presets.get("dense") is presets.DENSE
    assert presets.DENSE.steps * presets.DENSE.pairs + 3 * presets.DENSE.guard <= 40
