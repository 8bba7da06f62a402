"""Text-to-image pipelines: each denoiser predicts what its pipeline predicts, from folders laid out as on the hub."""

from __future__ import annotations

import functools
import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from dtta_fast import AdaptConfig, adapt, zoo
from dtta_fast.commands.cli import main
from dtta_fast.denoisers import PixArt, PixArtSigma, Sana, StableDiffusion3, StableDiffusionXL
from dtta_fast.runs.models import load_denoiser, load_text_to_image, takes_prompts
from dtta_fast.tasks import ZeroShot

TINY = runpy.run_path(str(Path(__file__).with_name("tiny_pipelines.py")))
PROMPTS = ("a photo of a cat.", "a photo of the ship.", "the dog")
FAMILIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "SDXL": (TINY["stable_diffusion_xl"], StableDiffusionXL),
    "SD 3": (TINY["stable_diffusion_3"], StableDiffusion3),
    "SD 3 without T5": (functools.partial(TINY["stable_diffusion_3"], False), StableDiffusion3),
    "PixArt alpha": (TINY["pixart"], PixArt),
    "PixArt alpha, 1024 px": (functools.partial(TINY["pixart"], additional=True), PixArt),
    "PixArt sigma": (functools.partial(TINY["pixart"], "PixArtSigmaPipeline"), PixArtSigma),
    "Sana": (TINY["sana"], Sana),
    "Sana 1.5, times scaled": (functools.partial(TINY["sana"], timestep_scale=0.001, qk_norm="rms_norm_across_heads"), Sana),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    make, kind = FAMILIES[request.param]
    pipeline, folder = make(), tmp_path_factory.mktemp("pipeline")
    pipeline.save_pretrained(folder)
    return pipeline, kind, folder


def pipelines_predictions(pipeline: Any, prompt: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What the pipeline's network is given and predicts while it makes an image: latents, time, prediction."""
    network, seen = getattr(pipeline, "transformer", None) or pipeline.unet, []

    def note(module: Any, args: Any, keywords: Any, output: Any) -> None:
        x = args[0] if args else keywords["hidden_states"]
        time = keywords["timestep"] if "timestep" in keywords else args[1]
        seen.append((x.clone(), time.reshape(-1)[:1].float(), output[0].clone()))

    handle = network.register_forward_hook(note, with_kwargs=True)
    extra = {"clean_caption": False, "use_resolution_binning": False} if type(pipeline).__name__.startswith(("PixArt", "Sana")) else {}
    side = network.config.sample_size * pipeline.vae_scale_factor
    with torch.no_grad():
        pipeline(prompt, guidance_scale=1.0, num_inference_steps=3, output_type="latent", height=side, width=side,
                 generator=torch.Generator().manual_seed(0), **extra)  # fmt: skip
    handle.remove()
    return seen


def test_predictions_are_the_pipeline_s(family):
    pipeline, kind, folder = family
    pipeline.set_progress_bar_config(disable=True)
    denoiser = kind.from_pretrained(folder).with_classes(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        seen = pipelines_predictions(pipeline, prompt)
        assert len(seen) >= 3
        for x, time, expected in seen:
            # a sampler's times lie between the training's
            denoiser.process.model_time[7] = time[0] / denoiser.network.config.get("timestep_scale", 1.0)
            with torch.no_grad():
                found = denoiser(x, torch.tensor([7]), denoiser.class_embeddings({})[number : number + 1])
            torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
            if issubclass(kind, PixArt):  # whose sampler's times are rows of the process
                assert time[0] in kind.from_pipeline(pipeline).process.model_time


def test_times_are_those_of_the_training(family):
    pipeline, kind, folder = family
    process = kind.from_pretrained(folder).process
    full = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    assert len(process) == 1000
    if kind is StableDiffusion3:
        torch.testing.assert_close(process.model_time, full.timesteps.flip(0))
        torch.testing.assert_close(process.table[:, 1], full.sigmas[:1000].flip(0))
    elif kind is Sana:
        full.set_timesteps(1000)
        assert process.model_time.tolist() == full.timesteps.flip(0).tolist()
        torch.testing.assert_close(process.table[:, 1], full.sigmas[:1000].flip(0))
    else:
        assert process.model_time.tolist() == list(range(1000))
        torch.testing.assert_close(process.table[:, 0], full.alphas_cumprod.sqrt().float())


def test_a_null_condition_is_the_pipeline_s(family):
    pipeline, kind, folder = family
    denoiser = kind.from_pretrained(folder).with_classes(PROMPTS)
    null = denoiser.null_embedding({})
    if kind is StableDiffusionXL:
        assert not null.any()  # force_zeros_for_empty_prompt
    else:
        assert null.any()
    other = kind.from_pretrained(folder).with_classes(PROMPTS, null_prompt=PROMPTS[0])
    if kind is Sana:  # the pipeline gives its instruction to conditional prompts alone
        _, _, states, mask = pipeline.encode_prompt("", negative_prompt=PROMPTS[0])
        found = other.unpacked(other.null_embedding({})[None])
        longest = found[0].shape[1]
        torch.testing.assert_close(found[0], (states * mask[..., None])[:, :longest])
        assert found[1].tolist() == mask[:, :longest].tolist()
        assert not mask[:, longest:].any()
    else:
        torch.testing.assert_close(other.null_embedding({}), other.class_embeddings({})[0])


def test_several_prompts_of_a_class_are_averaged(family):
    _, kind, folder = family
    denoiser = kind.from_pretrained(folder)
    single = denoiser.with_classes(PROMPTS).class_embeddings({})
    found = denoiser.with_classes([PROMPTS[:2], [PROMPTS[2]]]).class_embeddings({})
    torch.testing.assert_close(found, torch.stack([single[:2].mean(0), single[2]]))


def test_gradients_of_the_condition_are_right(family, monkeypatch):
    """In float64, against central differences along two directions."""
    _, kind, folder = family
    single, to = Tensor.float, Tensor.to  # Sana's attention and norms compute in float32, whatever they are given
    monkeypatch.setattr(Tensor, "float", lambda own: own if own.dtype == torch.float64 else single(own))
    monkeypatch.setattr(
        Tensor, "to", lambda own, *args, **named: own if (own.dtype, args) == (torch.float64, (torch.float32,)) else to(own, *args, **named)
    )
    denoiser = kind.from_pretrained(folder).with_classes(PROMPTS).double()
    table = denoiser.class_embeddings({}).double()
    torch.manual_seed(1)
    x, t = torch.randn(4, *denoiser.latent_shape, dtype=torch.float64), torch.tensor([5, 300, 600, 990])
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(denoiser(x, t, weights @ table).detach())

    def value(p: Tensor) -> Tensor:
        return (denoiser(x, t, p @ table) * probe).sum()

    gradient = torch.autograd.grad(value(weights), weights)[0]
    for direction in torch.randn(2, 2, 3, dtype=torch.float64):
        h = 1e-6
        with torch.no_grad():
            numeric = (value(weights + h * direction) - value(weights - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-7)


def test_rows_of_an_image_share_a_condition(family):
    _, kind, folder = family
    denoiser = kind.from_pretrained(folder).with_classes(PROMPTS)
    table = denoiser.class_embeddings({})
    torch.manual_seed(2)
    x, t = torch.randn(6, *denoiser.latent_shape), torch.arange(6) * 150
    with torch.no_grad():
        together = denoiser(x, t, table[:2])
        alone = torch.cat([denoiser(x[i : i + 1], t[i : i + 1], table[i // 3][None]) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("denoiser_parameters", ["frozen", "lora", "all"])
def test_clip_adapts_with_every_family(family, denoiser_parameters):
    _, _, folder = family
    assert takes_prompts(str(folder))
    denoiser = load_text_to_image(str(folder))
    clip, processor = zoo.load("open_vocabulary")[0], zoo.load_processor("open_vocabulary")
    task = ZeroShot(("three", "eight", "one"), processor)
    config = AdaptConfig(steps=1, pairs=2, lr=1e-3, guard=2, denoiser_parameters=denoiser_parameters, lora_rank=2)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = adapt(clip, denoiser, images, config=config, task=task)
    assert found.outputs.isfinite().all()
    assert found.loss.isfinite().all()
    alone = adapt(clip, denoiser, images[1:], config=config, task=task, image_ids=[1])
    torch.testing.assert_close(alone.loss[0], found.loss[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["SDXL", "SD 3", "PixArt sigma", "Sana"])
def test_the_commands_take_a_folder(name, tmp_path, capsys):
    FAMILIES[name][0]().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "data").mkdir()
    for i, image in enumerate(zoo.example("open_vocabulary")[0][:2]):
        to_pil_image(image).save(tmp_path / "data" / f"{i}.png")
    own = ["--denoiser", str(tmp_path / "pipeline"), "--preset", "PAPER", "--steps", "1", "--pairs", "2", "--denoiser-parameters", "frozen"]
    main(["adapt", str(tmp_path / "data" / "0.png"), "--classes", "three, eight, one", *own])
    assert "eight" in capsys.readouterr().out
    data = ["--data", "folder", "--root", str(tmp_path / "data"), "--task", "zero_shot", "--classes", "three", "eight", "one"]
    main(["evaluate", str(tmp_path / "run"), *data, *own])
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 2


def test_half_precision_and_checkpointing(family):
    _, kind, folder = family
    denoiser = kind.from_pretrained(folder).with_classes(PROMPTS)
    x, t = torch.randn(2, *denoiser.latent_shape), torch.tensor([100, 800])
    condition = denoiser.class_embeddings({})[:1].clone().requires_grad_()
    expected = denoiser(x, t, condition)
    wanted = torch.autograd.grad(expected.square().sum(), condition)[0]
    denoiser.checkpointing = True
    found = denoiser(x, t, condition)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), condition)[0], wanted, rtol=1e-4, atol=1e-5)
    denoiser.checkpointing = False
    half = kind.from_pretrained(folder, dtype=torch.bfloat16).with_classes(PROMPTS)
    assert half.class_embeddings({}).dtype == torch.float32
    with torch.no_grad():
        close = half(x.bfloat16(), t, half.class_embeddings({})[:1])
    assert float((close.float() - expected).square().mean().sqrt()) < 0.05 * float(expected.square().mean().sqrt())


def test_loaded_with_prompts_of_the_names(family):
    _, _, folder = family
    denoiser = load_denoiser(str(folder), ["cat", "dog"])
    assert len(denoiser.class_embeddings({})) == 2
    with pytest.raises(ValueError, match="takes prompts, and no classes are named"):
        load_denoiser(str(folder))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["cat", "cat"], "'cat' twice"),
        (["Cat", "cat"], "|".join(["'Cat' and 'cat' are the same to the tokenizer", "'cat' and 'cat' are the same to the tokenizer"])),
        (["a " * 400, "dog"], r"has \d+ tokens, and the text encoder takes \d+; give a shorter name"),
        ([["cat"], []], r"prompts\[1\] is \[\]; give a sequence of one string or more"),
        ([["cat"], ["cat"]], r"prompts has \['cat'\] for classes 0 and 1"),
        ([], "give a sequence of one string or more"),
    ],
)
def test_prompts_that_cannot_serve_are_named(family, prompts, message):
    _, kind, folder = family
    with pytest.raises(ValueError, match=message):
        kind.from_pretrained(folder).with_classes(prompts)


def test_a_loaded_pipeline_serves_too(family):
    pipeline, kind, folder = family
    wanted = kind.from_pretrained(folder).with_classes(PROMPTS).class_embeddings({})
    found = kind.from_pipeline(pipeline).with_classes(PROMPTS)
    torch.testing.assert_close(found.class_embeddings({}), wanted, rtol=1e-4, atol=1e-5)
    other = StableDiffusionXL if kind is not StableDiffusionXL else PixArt
    with pytest.raises(ValueError, match=rf"pipeline is a {type(pipeline).__name__}; a {other.__name__} takes a {other.pipeline}"):
        other.from_pipeline(pipeline)


def test_a_t5_that_was_not_downloaded_is_missed(tmp_path):
    TINY["stable_diffusion_3"]().save_pretrained(tmp_path)
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(tmp_path / part)
    with pytest.raises(FileNotFoundError, match="text_encoder_3 is missing"):
        StableDiffusion3.from_pretrained(tmp_path)


def test_padding_is_no_part_of_pixart_s_mixtures():
    """A token that only one of two prompts has: its state is that prompt's, whatever the encoder makes of the other's padding."""
    pipeline = TINY["pixart"]()
    denoiser = PixArt.from_pipeline(pipeline).with_classes(["the dog", "a photo of the ship."])
    table = denoiser.class_embeddings({})
    states, mask = denoiser.unpacked(table)
    short, long = mask.sum(1).long().tolist()
    assert short < long
    assert not states[0, short:].any()
    seen = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda _, args, given: seen.append((args[1], given)), with_kwargs=True)
    denoiser(torch.randn(1, *denoiser.latent_shape), torch.tensor([500]), table.mean(0, keepdim=True))
    handle.remove()
    mixed, bias = seen[0][0], seen[0][1]["encoder_attention_mask"]
    torch.testing.assert_close(mixed[0, short:long], states[1, short:long])
    torch.testing.assert_close(bias[0, 0, short:long], torch.full((long - short,), 0.5).log())


def test_no_column_is_padding_alone():
    denoiser = PixArt.from_pipeline(TINY["pixart"]()).with_classes(["the dog", "a photo of the ship."])
    mask = denoiser.unpacked(torch.cat([denoiser.class_embeddings({}), denoiser.null_embedding({})[None]]))[1]
    assert mask.any(0).all()
    assert mask.shape[1] < 120


def test_parts_that_overflow_in_float16_are_read_in_bfloat16(tmp_path):
    TINY["sana"]().save_pretrained(tmp_path)
    denoiser = Sana.from_pretrained(tmp_path, dtype=torch.float16)
    assert (denoiser.transformer.dtype, denoiser.vae.dtype, denoiser.text()[0].dtype) == (torch.float16, torch.bfloat16, torch.bfloat16)


def test_a_half_precision_autoencoder_that_overflows_runs_in_full():
    pipeline = TINY["stable_diffusion_xl"]()
    pipeline.vae.register_to_config(force_upcast=True)
    images = torch.rand(1, 3, 16, 16)
    expected = StableDiffusionXL.from_pipeline(pipeline).encode(images)
    pipeline.vae.half()
    torch.testing.assert_close(StableDiffusionXL.from_pipeline(pipeline).encode(images), expected, rtol=2e-2, atol=2e-2)
    assert pipeline.vae.dtype == torch.float16


def test_pipelines_with_a_distilled_model_s_scheduler_are_refused():
    pipeline = TINY["pixart"]()
    pipeline.scheduler = LCMScheduler()
    with pytest.raises(ValueError, match="LCMScheduler, that of a distilled model"):
        PixArt.from_pipeline(pipeline)


@pytest.mark.parametrize("part", ["text_encoder", "tokenizer", "vae", "scheduler", "network"])
def test_a_missing_part_is_named(family, part, tmp_path):
    _, kind, folder = family
    shutil.copytree(folder, tmp_path / "copy")
    name = kind.part if part == "network" else part
    shutil.rmtree(tmp_path / "copy" / name)
    if kind is StableDiffusionXL and part in ("text_encoder", "tokenizer"):
        with pytest.raises(FileNotFoundError, match=rf"copy.{name}.* is missing"):
            kind.from_pretrained(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy" / ({"text_encoder", "tokenizer"} - {name}).pop())
        told = json.loads((tmp_path / "copy" / "model_index.json").read_text())
        (tmp_path / "copy" / "model_index.json").write_text(json.dumps(told | {"text_encoder": [None, None], "tokenizer": [None, None]}))
        with pytest.raises(ValueError, match="refiner, which takes aesthetic scores; give the base model"):
            kind.from_pretrained(tmp_path / "copy")
    else:
        with pytest.raises(FileNotFoundError, match=rf"copy.{name}.* is missing"):
            kind.from_pretrained(tmp_path / "copy")


def test_pipelines_of_other_kinds_are_named(tmp_path):
    for name in ("FluxPipeline", "SanaSprintPipeline", "KandinskyV22Pipeline"):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "text_encoder": ["transformers", "T5EncoderModel"]}))
        with pytest.raises(ValueError, match=rf"a {name}, which dtta_fast cannot condition .* pipelines of StableDiffusionXL, Stable"):
            load_denoiser(str(tmp_path), ["cat", "dog"])


def test_distilled_models_are_refused():
    pipeline = TINY["stable_diffusion_xl"](time_cond_proj_dim=16)
    with pytest.raises(ValueError, match=r"distilled from guided samples.*give the model that it was distilled from"):
        StableDiffusionXL.from_pipeline(pipeline)
