"""LoRA as the weights that move: by peft, per image, and in the ecosystem's files."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from dtta_fast import AdaptConfig, Adapter, zoo
from dtta_fast.core import lora
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers import StableDiffusion
from dtta_fast.tasks import ZeroShot

LORA = AdaptConfig(steps=2, pairs=4, lr=5e-3, parameters="lora", lora_rank=4)
BOTH = LORA.replace(denoiser_parameters="lora", denoiser_lr=1e-3)
NAMES = ("three", "eight", "one")


@pytest.fixture(scope="module")
def digits():
    return load_digits("validation")[0][:4]


@pytest.fixture
def models():
    return zoo.load("open_vocabulary")


@pytest.fixture(scope="module")
def processor():
    return zoo.load_processor("open_vocabulary")


def _classifier(clip: nn.Module, denoiser: StableDiffusion, processor) -> nn.Module:
    return ZeroShot(NAMES, processor).bind(clip, denoiser)[0]


def test_new_adapters_change_nothing_and_learn(models, processor):
    clip, denoiser = models
    classifier = _classifier(clip, denoiser, processor)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = classifier(x)
    random = torch.get_rng_state()
    names = lora.attach(classifier, 4, None, "model", seed=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(names) == 2 * 2 * 4  # A and B of the query's and the value's projection in four layers
    assert torch.equal(classifier(x), before)
    weights = dict(classifier.named_parameters())
    for name in names:
        kind = float(weights[name].abs().sum())
        assert (kind == 0) == ("lora_B" in name)
    assert not any(p.requires_grad for p in weights.values())
    moving = {name: weights[name].detach().requires_grad_() for name in names}
    found = torch.func.functional_call(classifier, moving, (x,)).square().sum()
    gradients = torch.autograd.grad(found, [moving[name] for name in names if "lora_B" in name])
    assert all(float(g.abs().sum()) > 0 for g in gradients)


def test_images_have_adapters_of_their_own(models, processor, digits):
    """A batch by vmap gives each image what it gets alone, for CLIP's adapters and the UNet's."""
    for config in (LORA, BOTH):
        adapter = Adapter(*models, config, ZeroShot(NAMES, processor))
        together = adapter.adapt(digits)
        for i, image in enumerate(digits):
            alone = adapter.adapt(image[None], image_ids=torch.tensor([i]))
            torch.testing.assert_close(alone.outputs[0], together.outputs[i], rtol=1e-3, atol=1e-2)
        again = adapter.adapt(digits)
        assert torch.equal(again.outputs, together.outputs)  # reset to the snapshot, A and B
        assert bool((together.outputs != together.outputs_before).any(1).all())


def test_work_and_weights_are_the_adapters_alone(models, processor):
    adapter = Adapter(*models, BOTH.replace(mode="online"), ZeroShot(NAMES, processor))
    adapter.adapt(torch.rand(2, 3, 32, 32))
    state = adapter.state_dict()
    moving = [*state["theta"], *state["phi"]]
    assert moving
    assert all("lora_" in name for name in moving)
    assert {name.split(".")[0] for name in state["theta"]} == {"vision_model"}
    assert {name.split(".")[0] for name in state["phi"]} == {"unet"}


def test_saved_adapters_are_read_by_peft_and_diffusers(tmp_path, models, processor, digits):
    clip, denoiser = models
    adapter = Adapter(clip, denoiser, BOTH.replace(mode="online"), ZeroShot(NAMES, processor))
    for _ in range(3):
        adapter.adapt(digits)
    adapter.save_lora(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    task = ZeroShot(NAMES, processor)
    x = task.normalise(task.bind(clip, denoiser)[0], digits)
    expected = adapter.engine.program.forward(adapter._state, x)
    plain = _classifier(clip, denoiser, processor)(x)
    assert float((expected - plain).detach().abs().max()) > 1e-2
    torch.testing.assert_close(_classifier(PeftModel.from_pretrained(clip, tmp_path).eval(), denoiser, processor)(x), expected)

    pipeline = StableDiffusionPipeline.from_pretrained(
        zoo.folder("open_vocabulary") / "diffusion", safety_checker=None, dtype=torch.float32
    )
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    weights = dict(pipeline.unet.named_parameters())
    phi = adapter.state_dict()["phi"]
    for name, p in phi.items():
        of_theirs = [q for theirs, q in weights.items() if theirs.startswith(name.removeprefix("unet.").rsplit(".", 2)[0] + ".")]
        assert len(of_theirs) == 1
        assert torch.equal(of_theirs[0], p)
    layers = {module.scaling["default_0"] for module in pipeline.unet.modules() if hasattr(module, "lora_A")}
    assert layers == {1.0}


def test_adapters_that_a_model_brings_are_the_ones_that_move(tmp_path, models, processor, digits):
    """The caller's scale is kept, and goes into the saved weights."""
    clip, denoiser = models
    torch.manual_seed(0)
    own = get_peft_model(clip, LoraConfig(r=2, lora_alpha=6, target_modules=["fc1"], init_lora_weights=False)).eval()
    classifier = _classifier(own, denoiser, processor)
    adapter = Adapter(own, denoiser, LORA.replace(mode="online"), ZeroShot(NAMES, processor))
    adapter.adapt(digits)
    names = set(adapter.state_dict()["theta"])
    assert names == set(lora.weight_names(classifier))
    assert all(".fc1." in name for name in names)
    adapter.save_lora(tmp_path)
    sources = dict(classifier.named_parameters())
    moved, saved = adapter.state_dict()["theta"], load_file(tmp_path / "adapter_model.safetensors")
    for name, p in moved.items():
        assert not torch.equal(p, sources[name])
        kept = saved[f"base_model.model.{name.replace('.default.', '.')}"]
        torch.testing.assert_close(kept, p * (3 if "lora_B" in name else 1))


def test_adapters_of_several_ranks_are_saved_as_they_are(tmp_path, models, processor, digits):
    clip, denoiser = models
    torch.manual_seed(0)
    of_images = r".*vision_model.*\.fc[12]"
    wanted = LoraConfig(r=2, lora_alpha=2, target_modules=of_images, rank_pattern={"fc2": 5}, init_lora_weights=False)
    own = get_peft_model(copy.deepcopy(clip), wanted).eval()
    task = ZeroShot(NAMES, processor)
    adapter = Adapter(own, denoiser, LORA.replace(mode="online"), task)
    adapter.adapt(digits)
    adapter.save_lora(tmp_path)
    x = task.normalise(task.bind(own, denoiser)[0], digits)
    read = PeftModel.from_pretrained(clip, tmp_path).eval()
    torch.testing.assert_close(_classifier(read, denoiser, processor)(x), adapter.engine.program.forward(adapter._state, x))


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [({}, True, "several active adapters"), ({"use_dora": True}, False, "magnitude"), ({"lora_bias": True}, False, "or a bias")],
)
def test_adapters_that_the_formats_would_cut_are_not_saved(tmp_path, models, processor, digits, changes, more, message):
    clip, denoiser = models
    own = get_peft_model(clip, LoraConfig(r=2, target_modules=["fc1"], **changes)).eval()
    if more:
        own.add_adapter("second", LoraConfig(r=2, target_modules=["fc1"]))
        own.base_model.set_adapter(["default", "second"])
    adapter = Adapter(own, denoiser, LORA.replace(mode="online"), ZeroShot(NAMES, processor))
    adapter.adapt(digits)
    with pytest.raises(ValueError, match=message):
        adapter.save_lora(tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_targets_by_name(models, processor, digits):
    adapter = Adapter(*models, LORA.replace(mode="online", lora_targets=("fc2", "visual_projection")), ZeroShot(NAMES, processor))
    adapter.adapt(digits)
    layers = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapter.state_dict()["theta"]}
    assert layers == {"fc2", "visual_projection"}


def test_bad_input(models, processor, digits):
    task = ZeroShot(NAMES, processor)
    with pytest.raises(ValueError, match=r"lora_targets \('nothing',\) match no linear layer of model; .* fc1"):
        Adapter(*models, LORA.replace(lora_targets=("nothing",)), task)
    with pytest.raises(ValueError, match="match no linear layer of denoiser"):
        Adapter(*models, BOTH.replace(lora_targets=("q_proj",)), task)
    for field, value in (("lora_rank", 0), ("lora_targets", ()), ("lora_targets", "q_proj"), ("lora_targets", ("",))):
        with pytest.raises(ValueError, match=f"{field} is"):
            LORA.replace(**{field: value})
    adapter = Adapter(*models, LORA, task)
    adapter.adapt(digits)
    with pytest.raises(ValueError, match="there are no adapters to save"):
        adapter.save_lora("never")


def test_a_clip_s_towers_keep_their_mode(models):
    clip, denoiser = copy.deepcopy(models[0]).train(), models[1]
    clip.vision_model.eval()
    Adapter(clip, denoiser, LORA.replace(match="off", precheck="off"), ZeroShot(NAMES, zoo.load_processor("open_vocabulary")))
    assert clip.training
    assert not clip.vision_model.training


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_a_layer_whose_weight_is_read_directly_gets_no_adapter(name):
    """timm's EVA and BEiT add the biases of q and v themselves, so their qkv layer is never called."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10)
    found = lora.targets(model, None, "model")
    assert found
    assert {name.rpartition(".")[2] for name in found} <= {"fc1", "fc1_g", "fc1_x", "fc2"}
    with pytest.raises(ValueError, match="match no linear layer"):
        lora.targets(model, ["qkv"], "model")


def test_an_eva_tower_of_open_clip_adapts():
    open_clip = pytest.importorskip("open_clip")
    from open_clip.model import CustomTextCLIP

    torch.manual_seed(0)
    vision = {
        "timm_model_name": "eva02_tiny_patch14_224",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
        "image_size": 224,
    }
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    clip = CustomTextCLIP(embed_dim=64, vision_cfg=vision, text_cfg=text).eval()
    denoiser, images = zoo.load("open_vocabulary")[1], zoo.example("digits")[0][:2]
    config = AdaptConfig(steps=1, pairs=2, parameters="lora", lr=5e-3)
    result = Adapter(clip, denoiser, config, ZeroShot(zoo.DIGITS, open_clip.SimpleTokenizer())).adapt(images)
    assert float((result.outputs - result.outputs_before).abs().max()) > 1e-3
