"""CLIP with Stable Diffusion: the wrapped models are the libraries', the condition is shared, class names are checked."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image
from transformers import CLIPModel

from dtta_fast import AdaptConfig, Adapter, presets, zoo
from dtta_fast.commands.cli import main
from dtta_fast.core.weights import select
from dtta_fast.data.corruptions import DIGITS_C, corrupt
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers import StableDiffusion, base
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.tasks import ZeroShot
from dtta_fast.tasks.zero_shot import PHOTO

ZOO = zoo.folder("open_vocabulary")
NAMES = ("three", "eight", "one")
SMALL = AdaptConfig(steps=2, pairs=4, guard=4, lr=1e-3)


@pytest.fixture(scope="module")
def models():
    return zoo.load("open_vocabulary")


@pytest.fixture(scope="module")
def processor():
    return zoo.load_processor("open_vocabulary")


@pytest.fixture
def task(processor) -> ZeroShot:
    return ZeroShot(NAMES, processor)


@pytest.fixture(scope="module")
def digits():
    images, _ = load_digits("validation")
    return images[:3]


def test_clip_answers_as_the_library_does(models, processor, task, digits):
    clip, denoiser = models
    classifier, _ = task.bind(clip, denoiser)
    inputs = task.normalise(classifier, task.crop(classifier, digits))
    logits = classifier(inputs)
    prompts = [PHOTO.format(name) for name in NAMES]
    theirs = processor(text=prompts, images=[to_pil_image(image) for image in digits], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = clip(**theirs).logits_per_image
    torch.testing.assert_close(logits.softmax(1), expected.softmax(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits.mean(1), torch.zeros(3), rtol=0, atol=1e-4)
    both, _ = ZeroShot(NAMES, processor, towers="both").bind(clip, denoiser)
    torch.testing.assert_close(both(inputs), logits, rtol=1e-4, atol=1e-3)
    bare, _ = ZeroShot(NAMES, processor, normalised=False).bind(clip, denoiser)
    lengths = clip.get_image_features(inputs).pooler_output.norm(dim=1, keepdim=True)
    torch.testing.assert_close(bare(inputs), logits * lengths, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("towers", ["image", "both"])
def test_towers_that_return_tuples(models, processor, digits, towers):
    task = ZeroShot(NAMES, processor, towers=towers)
    wanted = Adapter(*models, SMALL, task).adapt(digits[:2])
    clip = copy.deepcopy(models[0])
    for part in clip.modules():
        if hasattr(part, "config"):
            part.config.return_dict = False
    found = Adapter(clip, models[1], SMALL, task).adapt(digits[:2])
    torch.testing.assert_close(found.outputs, wanted.outputs)


def test_images_of_any_size_are_prepared_as_the_processor_does(models, processor, task):
    rows, columns, channels = torch.arange(50)[:, None, None], torch.arange(71)[:, None], torch.arange(3)
    shades = (120 + 100 * torch.sin(rows / 9 + channels) * torch.cos(columns / 7)).byte()  # without an edge for 8 bits to overshoot at
    photo, pixels = Image.fromarray(shades.numpy()), shades.permute(2, 0, 1)[None]
    classifier, _ = task.bind(*models)
    ours = task.normalise(classifier, task.crop(classifier, pixels.float() / 255))
    theirs = processor(images=photo, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1.5 / 127.5)  # theirs is rounded to 8 bits, once a direction


def test_templates_are_averaged_as_directions(models, processor):
    clip, denoiser = models
    templates = ("a photo of a {}.", "the number {}.")
    texts = ZeroShot(NAMES, processor, templates=templates).bind(clip, denoiser)[0].texts
    each = [ZeroShot(NAMES, processor, templates=(one,)).bind(clip, denoiser)[0].texts for one in templates]
    torch.testing.assert_close(texts, torch.nn.functional.normalize(each[0] + each[1], dim=1))


@pytest.mark.parametrize("quick_gelu", [False, True], ids=["LAION's", "OpenAI's and DFN's"])
def test_open_clip(models, digits, quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    configs = {"vision_cfg": open_clip.CLIPVisionCfg(**vision), "text_cfg": open_clip.CLIPTextCfg(**text)}
    clip = open_clip.CLIP(embed_dim=16, **configs, quick_gelu=quick_gelu).eval()
    open_clip.set_model_preprocess_cfg(clip, {"size": 32, "mean": (0.4,) * 3, "std": (0.3,) * 3})
    tokenizer = open_clip.SimpleTokenizer()
    task = ZeroShot(NAMES, tokenizer)
    classifier, _ = task.bind(clip, models[1])
    expected = clip(task.normalise(classifier, digits), tokenizer([PHOTO.format(name) for name in NAMES]))
    logits = expected[2] * expected[0] @ expected[1].T
    torch.testing.assert_close(classifier((digits - 0.4) / 0.3), logits - logits.mean(1, keepdim=True))
    before = copy.deepcopy(clip.state_dict())
    found = Adapter(clip, models[1], SMALL.replace(guard=0), task).adapt(digits)
    assert bool((found.outputs != found.outputs_before).any())
    assert all(torch.equal(value, before[name]) for name, value in clip.state_dict().items())
    lora = Adapter(clip, models[1], SMALL.replace(guard=0, parameters="lora", mode="online"), task)
    lora.adapt(digits)
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in lora.state_dict()["theta"]} == {"c_fc", "c_proj"}
    with pytest.raises(ValueError, match="match no linear layer"):  # attention would not look at an adapter of its output
        Adapter(clip, models[1], SMALL.replace(parameters="lora", lora_targets=("out_proj",)), task)
    assert list(select(classifier, "head")) == ["visual.proj"]
    with pytest.raises(ValueError, match="more tokens than the 77"):
        ZeroShot(["one", "seven " * 80], tokenizer).bind(clip, models[1])
    with pytest.raises(ValueError, match="the same to the tokenizer"):
        ZeroShot(["Cat", "cat"], tokenizer).bind(clip, models[1])
    with pytest.raises(TypeError, match="processor is a CLIPProcessor; a model of open_clip takes its tokenizer"):
        ZeroShot(NAMES, zoo.load_processor("open_vocabulary")).bind(clip, models[1])
    with pytest.raises(TypeError, match="processor is a SimpleTokenizer; a transformers model takes its CLIPProcessor"):
        task.bind(*models)
    with pytest.raises(ValueError, match="towers is 'both'"):
        ZeroShot(NAMES, tokenizer, towers="both").bind(clip, models[1])


def _drawn(denoiser: StableDiffusion, images: int, pairs: int):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(images * pairs, *denoiser.latent_shape, generator=generator)
    return x_t, torch.randint(0, 1000, (images * pairs,), generator=generator)


def test_unet_predicts_as_the_library_does_and_shares_the_condition(models):
    """Against diffusers' own processors on a condition repeated for every row, values and gradients."""
    denoiser = models[1].with_classes(NAMES)
    theirs = UNet2DConditionModel.from_pretrained(ZOO / "diffusion" / "unet", dtype=torch.float32)
    x_t, timesteps = _drawn(denoiser, 2, 5)
    leaves = [denoiser.class_embeddings({})[:2].clone().requires_grad_() for _ in range(2)]
    with FlopCounterMode(display=False) as ours_counted:
        ours = denoiser(x_t, timesteps, leaves[0])
    with FlopCounterMode(display=False) as theirs_counted:
        expected = theirs(x_t, timesteps, leaves[1].repeat_interleave(5, 0)).sample
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(found.square().sum(), leaf)[0] for found, leaf in ((ours, leaves[0]), (expected, leaves[1]))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    keys_and_values = sum(
        2 * part.weight.numel() * 77
        for block in theirs.modules()
        if getattr(block, "attn2", None) is not None
        for part in (block.attn2.to_k, block.attn2.to_v)
    )
    saved = theirs_counted.get_total_flops() - ours_counted.get_total_flops()
    assert saved == keys_and_values * (10 - 2)  # once an image, not once a pair


def test_gradients_of_the_condition_are_right(models):
    """In float64, against central differences along two directions."""
    denoiser = copy.deepcopy(models[1]).double().with_classes(NAMES)
    table = denoiser.class_embeddings({})
    torch.manual_seed(1)
    x, t = torch.randn(4, *denoiser.latent_shape, dtype=torch.float64), torch.tensor([5, 300, 600, 990])
    weights = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    probe = torch.randn(4, *denoiser.latent_shape, dtype=torch.float64)

    def value(p: torch.Tensor) -> torch.Tensor:
        return (denoiser(x, t, torch.einsum("bk,ktd->btd", p, table)) * probe).sum()

    gradient = torch.autograd.grad(value(weights), weights)[0]
    for direction in torch.randn(2, 2, 3, dtype=torch.float64):
        with torch.no_grad():
            numeric = (value(weights + 1e-6 * direction) - value(weights - 1e-6 * direction)) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-4, atol=1e-7)


def test_a_loaded_pipeline_serves_too(models):
    pipeline = StableDiffusionPipeline.from_pretrained(ZOO / "diffusion", safety_checker=None, torch_dtype=torch.float32)
    found = StableDiffusion.from_pipeline(pipeline).with_classes(NAMES)
    torch.testing.assert_close(found.class_embeddings({}), models[1].with_classes(NAMES).class_embeddings({}))
    with pytest.raises(ValueError, match=r"pipeline is a str; a StableDiffusion takes a StableDiffusionPipeline"):
        StableDiffusion.from_pipeline("pipeline")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_pipeline_s_folder_is_read_whole(tmp_path, models, prediction):
    """A folder that diffusers writes, with its own scheduler class and files of a variant."""
    pipeline = StableDiffusionPipeline.from_pretrained(ZOO / "diffusion", safety_checker=None, dtype=torch.float16)
    pipeline.scheduler = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=prediction)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    read = StableDiffusion.from_pretrained(tmp_path, variant="fp16")
    alone = StableDiffusion.from_pretrained(tmp_path)  # the only variant there is
    assert all(torch.equal(one, other) for one, other in zip(read.parameters(), alone.parameters(), strict=True))
    assert read.dtype == torch.float32
    assert torch.equal(read.process.table, NoiseProcess.from_scheduler(pipeline.scheduler).table)
    x_t, timesteps = _drawn(read, 1, 3)
    embeddings = [denoiser.with_classes(NAMES).class_embeddings({}) for denoiser in (read, models[1])]
    torch.testing.assert_close(*embeddings)
    torch.testing.assert_close(read(x_t, timesteps, embeddings[0][:1]), models[1](x_t, timesteps, embeddings[1][:1]))
    assert read.image_size == 32
    pixels = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(read.encode(pixels), models[1].encode(pixels))


@pytest.mark.slow
def test_ways_to_run_agree(models, task, digits):
    """Chunks, batches, checkpoints and compiled regions give what the plain step gives."""
    results = {}
    for name, config, batches in (
        ("plain", SMALL, [digits]),
        ("chunks", SMALL.replace(chunk=1), [digits]),
        ("one by one", SMALL, [image[None] for image in digits]),
        ("compiled", SMALL.replace(compile="regional"), [digits]),
    ):
        adapter, first = Adapter(*models, config.replace(guard=0), task), 0
        found = []
        for batch in batches:
            found.append(adapter.adapt(batch, image_ids=torch.arange(first, first + len(batch))))
            first += len(batch)
        results[name] = torch.cat([one.loss for one in found]), torch.cat([one.outputs for one in found])
    for name, (loss, outputs) in results.items():
        torch.testing.assert_close(loss, results["plain"][0], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(outputs, results["plain"][1], rtol=2e-2, atol=5e-2, msg=lambda text, name=name: f"{name}: {text}")


def test_checkpointing_changes_nothing_but_memory(models):
    denoiser = models[1].with_classes(NAMES)
    x_t, timesteps = _drawn(denoiser, 1, 2)
    found = []
    for checkpointing in (False, True):
        denoiser.checkpointing = checkpointing
        leaf = denoiser.class_embeddings({})[:1].clone().requires_grad_()
        found.append(torch.autograd.grad(denoiser(x_t, timesteps, leaf).square().sum(), leaf)[0])
    denoiser.checkpointing = False
    torch.testing.assert_close(*found)


def test_models_are_left_as_they_were(models, task, digits):
    before = [copy.deepcopy(module.state_dict()) for module in models]
    for changes in ({"parameters": "lora", "denoiser_parameters": "lora"}, {"precision": "bf16"}, {"objective": "noise_mix", "top_k": 2}):
        Adapter(*models, SMALL.replace(**changes), task).adapt(digits)
    for module, state in zip(models, before, strict=True):
        assert set(module.state_dict()) == set(state)
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert models[1].prompts is None


def test_it_helps_where_clip_fails_and_spares_the_clean(models, processor):
    images, labels = (part[:40] for part in load_digits("validation"))
    adapter = Adapter(*models, presets.FAST.replace(parameters="lora", lr=5e-3, guard=14), ZeroShot(zoo.DIGITS, processor))
    blurred = adapter.adapt(corrupt(images, "defocus_blur", DIGITS_C["defocus_blur"]))
    before, after = (float((p == labels).float().mean()) for p in (blurred.predictions_before, blurred.predictions))
    assert after >= before + 0.1
    clean = adapter.adapt(images)
    assert int((clean.predictions != clean.predictions_before).sum()) <= 2


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "classes is"),
        ("one", "classes is 'one'"),
        (["one", " "], "at 1"),
        (["one", "two", "one "], "'one ' twice, again at 2"),
        (["one", 2], "classes is"),
    ],
)
def test_bad_names(processor, classes, message):
    with pytest.raises(ValueError, match=message):
        ZeroShot(classes, processor)


def test_bad_models_and_prompts(models, processor, task, denoiser, digits):
    with pytest.raises(ValueError, match="tokens, and the text encoder takes 77"):
        Adapter(*models, SMALL, ZeroShot(["one", "seven " * 80], processor))
    with pytest.raises(TypeError, match="whose classes are fixed"):
        Adapter(models[0], denoiser, SMALL, task)
    with pytest.raises(TypeError, match="model is a Linear"):
        Adapter(torch.nn.Linear(3, 3), models[1], SMALL, task)
    with pytest.raises(ValueError, match="denoiser has no classes"):
        Adapter(zoo.load("digits")[0], models[1], SMALL).adapt(digits)
    with pytest.raises(ValueError, match="set already"):
        models[1].with_classes(NAMES).with_classes(NAMES)
    for keywords, message in (
        ({"templates": ("no place",)}, "where the class's name goes"),
        ({"templates": ("{} {x}",)}, "no other braces"),
        ({"towers": "left"}, "allowed: image, both"),
    ):
        with pytest.raises(ValueError, match=message):
            ZeroShot(NAMES, processor, **keywords)


def test_one_task_serves_several_models(models, processor, task, digits):
    """Binding it again leaves the first model's preprocessing alone."""
    classifier, _ = task.bind(*models)
    expected = task.normalise(classifier, task.crop(classifier, digits))
    smaller = copy.deepcopy(processor.image_processor)
    smaller.size, smaller.crop_size, smaller.image_mean = {"shortest_edge": 16}, {"height": 16, "width": 16}, [0.1, 0.1, 0.1]
    other = ZeroShot(NAMES, (processor.tokenizer, smaller)).bind(*models)[0]
    assert torch.equal(task.normalise(classifier, task.crop(classifier, digits)), expected)
    assert task.crop(other, digits).shape[-1] == 16


def test_unets_that_cannot_serve_are_named(models):
    """Other kinds of diffusion model: each is refused by what is wrong with it, before any work."""
    config = dict(models[1].unet.config) | {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 4}
    config |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    text = models[1].text()
    for change, message in (
        ({"in_channels": 9}, "unet takes 9 channels and vae gives"),
        ({"num_class_embeds": 10}, "num_class_embeds 10"),
        ({"cross_attention_dim": 24}, "unet takes prompts of 24 channels"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"sample_size": (8, 16)}, r"sample_size \(8, 16\)"),
    ):
        unet = UNet2DConditionModel.from_config(config | change)
        with pytest.raises(ValueError, match=message):
            StableDiffusion(unet, models[1].process, models[1].vae, *text)


def test_images_are_encoded_a_few_at_a_time(models, monkeypatch):
    images = torch.rand(5, 3, 32, 32)
    whole = models[1].encode(images)
    monkeypatch.setattr(base, "ENCODED_PIXELS", 2 * 32**2)
    sizes = []
    handle = models[1].vae.encoder.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    torch.testing.assert_close(models[1].encode(images), whole)
    handle.remove()
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_calibration_fits_in_half_precision_too(dtype):
    assert StableDiffusion.from_pretrained(ZOO / "diffusion", dtype=dtype).calibration is not None


def test_folders_that_lack_a_part(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    whole = tmp_path / "whole"
    shutil.copytree(ZOO / "diffusion", whole)
    for part in ("vae", "scheduler", "tokenizer", "unet"):
        shutil.rmtree(whole / part)
        with pytest.raises(FileNotFoundError, match=part):
            StableDiffusion.from_pretrained(whole)
        shutil.copytree(ZOO / "diffusion" / part, whole / part)
    (whole / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="unet cannot be read"):
        StableDiffusion.from_pretrained(whole)
    with pytest.raises(FileNotFoundError, match="nobody/nothing"):
        StableDiffusion.from_pretrained("nobody/nothing-at-all")


@pytest.mark.slow
def test_adapt_command(tmp_path, capsys):
    images, labels = load_digits("validation")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, images, strict=False):
        to_pil_image(image).save(path)
    arguments = ["adapt", *map(str, paths), "--classes", ", ".join(zoo.DIGITS)]
    main([*arguments, "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["images"]
    for row, path, label in zip(rows, paths, labels, strict=False):
        assert str(path) in "".join(printed.split())  # a table breaks it at any character
        assert sum(row["after"].values()) == pytest.approx(1, abs=1e-5)
        assert max(row["after"], key=row["after"].__getitem__) == zoo.DIGITS[int(label)]
    own = ["--lr", "1e-4", "--preset=PAPER", "--pairs", "8", "--calibration", str(ZOO / "diffusion" / "calibration.json")]
    main([*arguments, *own, "--dtype", "bfloat16", "--json", str(tmp_path / "found.json")])
    config = json.loads((tmp_path / "found.json").read_text())["config"]
    assert (config["lr"], config["pairs"], config["optimizer"]) == (1e-4, 8, presets.PAPER.optimizer)
    for change, message in (
        (["--classes", "one, one"], "twice, again at 1"),
        (["--model", str(tmp_path)], "config.json is missing; give the folder"),
        (["--denoiser", str(tmp_path)], "model_index.json is missing"),
        (["--json", str(tmp_path)], "the result cannot be written"),
        (["--device", "nowhere"], "device is 'nowhere'"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--calibration", str(tmp_path / "0.png")], "is not a calibration"),
        (["--preset", "SLOW"], "preset is 'SLOW'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, *change])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_adapt_command_names_a_file_that_is_no_image(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["adapt", str(tmp_path / "none.png"), "--classes", "one, two"])
    assert stop.value.code == 2
    assert "none.png does not exist" in capsys.readouterr().err


def test_clip_loads_from_its_hub_layout():
    assert isinstance(zoo.load_model("open_vocabulary"), CLIPModel)
    files = {path.relative_to(ZOO).as_posix() for path in Path(ZOO).rglob("*") if path.is_file()}
    for part in ("unet", "vae", "text_encoder"):
        assert f"diffusion/{part}/config.json" in files
    assert {"diffusion/model_index.json", "diffusion/tokenizer/vocab.json", "diffusion/tokenizer/merges.txt", "clip/merges.txt"} <= files
    assert sum(path.stat().st_size for path in Path(ZOO).rglob("*") if path.is_file()) < 15_000_000


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_weight_that_is_missing_is_named_and_not_drawn(part, tmp_path):
    folder = tmp_path / "diffusion"
    shutil.copytree(ZOO / "diffusion", folder)
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{part} lacks weights of a .*{name.rpartition('.')[2]}"):
        StableDiffusion.from_pretrained(folder)


def test_a_tokenizer_without_its_words_is_refused(tmp_path):
    folder = tmp_path / "diffusion"
    shutil.copytree(ZOO / "diffusion", folder)
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"the same to the tokenizer|cannot be read as a CLIPTokenizer"):
        StableDiffusion.from_pretrained(folder).with_classes(NAMES)


def test_names_that_differ_in_case_alone_are_refused(models, processor):
    with pytest.raises(ValueError, match="the same to the tokenizer"):
        ZeroShot(("Cat", "cat"), processor).bind(*models)
