"""SigLIP as the classifier of an open vocabulary: the library's logits, and prompts given for each class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessor, SiglipModel

from dtta_fast import AdaptConfig, Adapter, adapt, zoo
from dtta_fast.tasks import ZeroShot
from dtta_fast.tasks.zero_shot import load_clip

CONFIG = AdaptConfig(steps=1, pairs=2, guard=2, lr=1e-3)
NAMES = ("three", "eight", "one")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", *NAMES, "a", "photo", "of", ".", "digit", "round", "straight", "curve", "written"]
    own = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def siglip() -> SiglipModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 16, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8})
    model = SiglipModel(config).eval()
    torch.nn.init.constant_(model.logit_scale, 1.5)
    torch.nn.init.constant_(model.logit_bias, -4.0)
    return model


@pytest.fixture(scope="module")
def processor(tokenizer):
    return tokenizer, SiglipImageProcessor(size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def denoiser():
    return zoo.load("open_vocabulary")[1]


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_logits_are_the_library_s_without_their_mean(siglip, processor, denoiser):
    prompts = [f"a photo of a {name}." for name in NAMES]
    ids = processor[0](prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    pixels = processor[1](images=images(), do_rescale=False, return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = siglip(input_ids=ids, pixel_values=pixels).logits_per_image
    for towers in ("image", "both"):
        found = adapt(siglip, denoiser, images(), config=CONFIG, task=ZeroShot(NAMES, processor, towers=towers))
        torch.testing.assert_close(found.outputs_before, theirs - theirs.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", ["all", "norm", "head", "lora"])
def test_every_set_of_parameters_adapts(siglip, processor, denoiser, parameters):
    config = CONFIG.replace(parameters=parameters, guard=0)
    found = adapt(siglip, denoiser, images(), config=config, task=ZeroShot(NAMES, processor))
    assert not torch.equal(found.outputs, found.outputs_before)


def test_prompts_of_each_class(siglip, processor, denoiser):
    """Of several numbers, averaged as directions for the classifier and as conditions for the denoiser."""
    own = {"three": ["a digit three.", "round curve three."], "eight": "eight", "one": ["straight one.", "one", "a digit one."]}
    task = ZeroShot(own, processor)
    assert task.classes == NAMES
    bound, conditioned = task.bind(siglip, denoiser)
    assert conditioned.class_embeddings({}).shape[0] == 3
    single = denoiser.with_classes(own["one"]).class_embeddings({})
    torch.testing.assert_close(conditioned.class_embeddings({})[2], single.mean(0))
    found = []
    for prompts in own.values():
        flat = [prompts] if isinstance(prompts, str) else prompts
        ids = processor[0](flat, padding="max_length", max_length=16, return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(F.normalize(F.normalize(siglip.get_text_features(ids).pooler_output, dim=-1).mean(0), dim=0))
    torch.testing.assert_close(bound.texts, torch.stack(found))


def test_classes_may_share_a_prompt(siglip, processor, denoiser):
    own = {"three": ["a digit", "three"], "one": ["a digit", "one"]}
    bound, conditioned = ZeroShot(own, processor).bind(siglip, denoiser)
    alone = [ZeroShot({"x": prompts, "y": "eight"}, processor).bind(siglip, denoiser) for prompts in own.values()]
    torch.testing.assert_close(bound.texts, torch.stack([each[0].texts[0] for each in alone]))
    found = torch.stack([each[1].class_embeddings({})[0] for each in alone])
    torch.testing.assert_close(conditioned.class_embeddings({}), found)


def test_several_templates_for_the_denoiser(siglip, processor, denoiser):
    task = ZeroShot(NAMES, processor, diffusion_template=["a {}", "{}"])
    conditioned = task.bind(siglip, denoiser)[1]
    each = [denoiser.with_classes([template.format(name) for name in NAMES]).class_embeddings({}) for template in ("a {}", "{}")]
    torch.testing.assert_close(conditioned.class_embeddings({}), torch.stack(each).mean(0))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"three": [], "one": "one"}, r"classes\['three'\] is \[\]; give a sequence of one string or more"),
        ({"three": ["a", "a"], "one": "one"}, r"classes\['three'\] has 'a' twice"),
        ({"three": "one", "one": "one"}, "classes has the same prompts for 'three' and 'one'; give each class its own"),
        ({}, r"classes is \[\]"),
    ],
)
def test_prompts_that_cannot_serve_are_named(siglip, processor, denoiser, classes, message):
    with pytest.raises(ValueError, match=message):
        Adapter(siglip, denoiser, CONFIG, ZeroShot(classes, processor))


def test_folders_load(siglip, processor, tmp_path):
    siglip.save_pretrained(tmp_path)
    for part in processor:
        part.save_pretrained(tmp_path)
    model, own = load_clip(tmp_path)
    assert type(model) is SiglipModel
    assert own is not None
    (tmp_path / "config.json").write_text('{"model_type": "siglip2"}')
    with pytest.raises(ValueError, match="model_type 'siglip2'; supported: clip, siglip"):
        load_clip(tmp_path)


def test_a_tower_without_its_head_is_reported(processor, denoiser):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 32, "max_position_embeddings": 16, "projection_size": 16}
    vision = {**sizes, "image_size": 32, "patch_size": 8, "vision_use_head": False}
    headless = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    with pytest.raises(ValueError, match="image tower has no head, as with vision_use_head=False"):
        adapt(headless, denoiser, images(), config=CONFIG, task=ZeroShot(NAMES, processor))
    with pytest.raises(ValueError, match=r"classes is .*give at least two names"):
        ZeroShot(["three"], processor)
