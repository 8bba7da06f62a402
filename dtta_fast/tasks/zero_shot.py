"""Zero-shot classification: compares the image features of a CLIP or SigLIP with the text features of any list of class names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast.denoisers.base import Denoiser
from dtta_fast.denoisers.prompts import PromptDenoiser, check_different, check_names, prompt_tokens
from dtta_fast.denoisers.reading import download, read_json, read_model
from dtta_fast.runtime.encoding import as_in_evaluation
from dtta_fast.tasks.classification import Classification
from dtta_fast.tasks.transforms import Transform, open_clip_transforms, processor_transforms

PHOTO = "a photo of a {}."


class ZeroShot(Classification):
    """Classification with a transformers CLIPModel or SiglipModel, or a model of open_clip, and a text-to-image model as the denoiser.

    The classes are given as words. Logits are the model's: its logit scale times the cosine similarity of image and text features. Their
    mean over the classes is subtracted, which does not change the softmax (nor does SigLIP's bias), so that their norm (see
    AdaptConfig.logit_scale) depends only on the differences between classes.

    Args:
        classes: names, such as ["a tabby cat", "a sports car"]; or a dictionary from each name to its prompts, one or several, in
            place of the templates.
        processor: for a transformers model, its CLIPProcessor or SiglipProcessor, or a pair (tokenizer, image processor); for open_clip,
            the tokenizer: open_clip.get_tokenizer(name).
        templates: sentences with {} in place of the name. Text features are averaged over them (Radford et al. 2021, arXiv 2103.00020,
            section 3.1.4).
        diffusion_template: template for the prompts that condition the diffusion model, or several, whose conditions are averaged.
        towers: which CLIP towers form the model to adapt: "image", or "both" (transformers only). With "image", the text features and
            the logit scale are computed once, when a session is made; a later change of the text tower takes a new session.
        normalised: whether image features are normalised to length 1, as in CLIP's training; the reference implementation does not.

    Raises:
        ValueError: there are fewer than two classes, a name is empty or repeated, or a template has no {}.
    """

    def __init__(
        self,
        classes: Sequence[str] | Mapping[str, str | Sequence[str]],
        processor: Any,
        *,
        templates: Sequence[str] = (PHOTO,),
        diffusion_template: str | Sequence[str] = PHOTO,
        towers: str = "image",
        normalised: bool = True,
    ) -> None:
        super().__init__()
        check_names("classes", classes if isinstance(classes, str) else list(classes))
        names = list(classes)
        if len(names) < 2:
            raise ValueError(f"classes is {names}: with one class there is nothing to decide; give at least two names")
        check_names("templates", templates)
        own = [diffusion_template] if isinstance(diffusion_template, str) else list(diffusion_template)
        check_names("diffusion_template", own)
        for template in (*templates, *own):
            if (
                not isinstance(template, str)
                or "{}" not in template
                or "{" in template.replace("{}", "")
                or "}" in template.replace("{}", "")
            ):
                raise ValueError(f"template is {template!r}; it needs {{}} where the class's name goes, and no other braces")
        if towers not in ("image", "both"):
            raise ValueError(f"towers is {towers!r}; allowed: image, both")
        self.classes = tuple(names)
        self._processor, self._towers, self._normalised = processor, towers, normalised
        if isinstance(classes, Mapping):
            self._prompts = [[given] if isinstance(given, str) else list(given) for given in classes.values()]
            for name, prompts in zip(names, self._prompts, strict=True):
                check_names(f"classes[{name!r}]", prompts)
                other = names[self._prompts.index(prompts)]
                if other != name:
                    raise ValueError(f"classes has the same prompts for {other!r} and {name!r}; give each class its own")
            self._diffusion_prompts = self._prompts
        else:
            self._prompts = [[template.format(name) for template in templates] for name in names]
            self._diffusion_prompts = [[template.format(name) for template in own] for name in names]

    def bind(self, model: nn.Module, denoiser: Denoiser) -> tuple[nn.Module, Denoiser]:
        """Returns CLIP as a classifier of these classes, sharing the caller's modules, and the denoiser with one prompt per class.

        Raises:
            TypeError: the model or the denoiser is of an unsupported type. ValueError: a name has too many tokens for the models.
        """
        if not isinstance(denoiser, PromptDenoiser):
            found = type(denoiser).__name__
            raise TypeError(f"denoiser is a {found}, whose classes are fixed; ZeroShot takes one of prompts, such as a StableDiffusion")
        whole: Any = model
        clip: Any = whole.get_base_model() if hasattr(model, "get_base_model") else model  # unwraps peft, keeping the adapters
        if getattr(getattr(clip, "config", None), "model_type", None) in ("clip", "siglip"):
            classifier: Any = self._from_transformers(clip)
        elif hasattr(clip, "encode_text") and hasattr(clip, "visual"):
            classifier = self._from_open_clip(clip)
        else:
            found = type(model).__name__
            raise TypeError(f"model is a {found}; ZeroShot takes a transformers CLIPModel or SiglipModel, or a model of open_clip")
        classifier.training = bool(clip.training)  # train() would also change the caller's towers
        bound: nn.Module = classifier
        single = all(len(prompts) == 1 for prompts in self._diffusion_prompts)
        prompts: Any = [prompts[0] for prompts in self._diffusion_prompts] if single else self._diffusion_prompts
        return bound, denoiser.with_classes(prompts)

    def crop(self, model: nn.Module, images: Tensor) -> Tensor:
        """Resizes and crops images [B, 3, H, W] in [0, 1] to CLIP's size, still in [0, 1]."""
        bound: Any = model
        found: Tensor = bound.transforms[0](images)
        return found

    def normalise(self, model: nn.Module, crop: Tensor) -> Tensor:
        """Normalises a crop with CLIP's own mean and standard deviation."""
        bound: Any = model
        found: Tensor = bound.transforms[1](crop)
        return found

    @property
    def _different(self) -> list[str]:
        """All prompts, each once: two classes may share some."""
        return list(dict.fromkeys(prompt for prompts in self._prompts for prompt in prompts))

    @property
    def _places(self) -> list[int]:
        """The place in _different of every class's prompts, one class after the other."""
        place = {prompt: i for i, prompt in enumerate(self._different)}
        return [place[prompt] for prompts in self._prompts for prompt in prompts]

    @property
    def _counts(self) -> tuple[int, ...]:
        """The number of each class's prompts."""
        return tuple(len(prompts) for prompts in self._prompts)

    def _from_transformers(self, clip: Any) -> ZeroShotClassifier:
        own = self._processor
        pair = own if isinstance(own, tuple) else (getattr(own, "tokenizer", None), getattr(own, "image_processor", None))
        if len(pair) != 2 or not callable(pair[0]) or not hasattr(pair[1], "image_mean"):
            found = type(own).__name__
            raise TypeError(f"processor is a {found}; a transformers model takes its CLIPProcessor, or (tokenizer, image processor)")
        tokenizer, images = pair
        limit = clip.config.text_config.max_position_embeddings
        ids = prompt_tokens(tokenizer, self._different, limit, clip.text_model)[self._places].to(clip.device)
        both = self._towers == "both"
        # keep the model's own names, so that peft saves and loads the adapters as its own
        names = ["vision_model", "visual_projection", *(["text_model", "text_projection"] if both else [])]
        parts = {name: getattr(clip, name) for name in names if hasattr(clip, name)}  # SigLIP has no projections

        if "visual_projection" not in parts and not hasattr(clip.vision_model, "head"):
            raise ValueError("model's image tower has no head, as with vision_use_head=False in its config; load the model with it")

        def image_features(own: Any, pixels: Tensor) -> Tensor:
            pooled: Tensor = own.vision_model(pixels, return_dict=True).pooler_output
            return own.visual_projection(pooled) if hasattr(own, "visual_projection") else pooled

        def text_features(own: Any, ids: Tensor) -> Tensor:
            pooled: Tensor = own.text_model(ids, return_dict=True).pooler_output
            return own.text_projection(pooled) if hasattr(own, "text_projection") else pooled

        texts = ids
        if not both:
            with as_in_evaluation(clip):
                texts = _text_features(lambda part: text_features(clip, part), ids, self._counts)
        classifier = ZeroShotClassifier(parts, image_features, text_features, texts, self._counts, clip.logit_scale, self._normalised)
        head = "visual_projection" if "visual_projection" in parts else "vision_model.head"
        classifier.transforms, classifier.head = processor_transforms(images), head
        return classifier

    def _from_open_clip(self, clip: Any) -> ZeroShotClassifier:
        if self._towers == "both":
            raise ValueError("towers is 'both' with a model of open_clip; give a model of transformers, or towers 'image'")
        if isinstance(self._processor, tuple) or not callable(self._processor) or hasattr(self._processor, "image_processor"):
            found = type(self._processor).__name__
            raise TypeError(f"processor is a {found}; a model of open_clip takes its tokenizer, open_clip.get_tokenizer(name)")
        ids = open_clip_tokens(self._processor, self._different)[self._places].to(clip.logit_scale.device)
        with as_in_evaluation(clip):
            texts, counts = _text_features(clip.encode_text, ids, self._counts), self._counts

        def image_features(own: Any, pixels: Tensor) -> Tensor:
            found = own.visual(pixels)
            pooled: Tensor = found[0] if isinstance(found, tuple) else found  # CoCa's tower returns its tokens too
            return pooled

        classifier = ZeroShotClassifier({"visual": clip.visual}, image_features, None, texts, counts, clip.logit_scale, self._normalised)
        projection = "visual.head" if getattr(clip.visual, "proj", None) is None else "visual.proj"  # a timm tower's, or CLIP's own
        classifier.transforms, classifier.head = open_clip_transforms(clip), projection
        return classifier


def open_clip_tokens(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Returns an open_clip tokenizer's token ids [N, limit]. The tokenizer itself silently truncates prompts that are too long.

    Raises:
        ValueError: a prompt has more tokens than the limit, including the start and end tokens, or two prompts have the same tokens.
    """
    found: Tensor = tokenizer(prompts)
    encode = getattr(tokenizer, "encode", None) or tokenizer.tokenizer.encode  # open_clip's own, or its wrapped transformers tokenizer
    for prompt in prompts:
        if len(encode(prompt)) > found.shape[1] - 2:
            raise ValueError(
                f"prompt {prompt!r} has more tokens than the {found.shape[1]} that the text encoder takes; give a shorter name"
            )
    check_different(prompts, found)
    return found


def load_clip(path: str | Path) -> tuple[nn.Module, Any]:
    """Loads a transformers CLIPModel or SiglipModel in float32, and its processor, from a folder or the Hugging Face Hub.

    Raises:
        FileNotFoundError: the model does not exist, or a part is missing. ValueError: a part is damaged, or the model is of another kind.
    """
    from transformers import AutoProcessor, CLIPModel, CLIPProcessor, SiglipModel

    folder = Path(path)
    if not folder.is_dir():
        folder = download(str(path), ["*.json", "*.txt", "*.model", "*.safetensors"])
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} is missing; give the folder that save_pretrained() of a CLIP or SigLIP wrote")
    kind = read_json(folder / "config.json").get("model_type")
    kinds: dict[Any, tuple[Any, Any]] = {"clip": (CLIPModel, CLIPProcessor), "siglip": (SiglipModel, AutoProcessor)}
    if kind not in kinds:
        raise ValueError(f"{folder / 'config.json'} has model_type {str(kind)[:40]!r}; supported: {', '.join(kinds)}")
    model, processor = kinds[kind]
    clip = read_model(model, folder, dtype=torch.float32)
    try:
        return clip.eval(), processor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the Rust tokenizers raise a plain Exception
        raise ValueError(f"{folder} has no processor of a {model.__name__} that can be read: {error}") from error


class ZeroShotClassifier(nn.Module):
    """Maps normalised images [B, 3, H, W] to logits [B, K] with mean 0. Its submodules are `parts` of a CLIP under their own names.

    Attributes:
        transforms: the model's own geometry and normalisation.
        head: name of its last layer, a module or a parameter.
    """

    transforms: tuple[Transform, Transform]
    head: str

    def __init__(
        self,
        parts: dict[str, nn.Module],
        image_features: Callable[[Any, Tensor], Tensor],
        text_features: Callable[[Any, Tensor], Tensor] | None,
        texts: Tensor,
        counts: tuple[int, ...],
        logit_scale: Tensor,
        normalised: bool,
    ) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self._image_features, self._text_features = image_features, text_features
        self.register_buffer("texts", texts, persistent=False)  # token ids if the text tower adapts, else features [K, d]
        self.register_buffer("scale", logit_scale.detach().exp(), persistent=False)
        self._counts, self._normalised = counts, normalised

    def get_classifier(self) -> Any:
        """Returns the last layer, like the method of timm models; parameters.select calls it."""
        return attrgetter(self.head)(self)

    def forward(self, images: Tensor) -> Tensor:
        features = self._image_features(self, images)
        if self._normalised:
            features = F.normalize(features, dim=-1)
        texts: Any = self.texts
        if not texts.is_floating_point():
            texts = _ensembles(self._text_features(self, texts), self._counts)  # type: ignore[misc]
        scale: Any = self.scale
        logits = scale * features @ texts.to(features.dtype).mT
        return logits - logits.mean(dim=-1, keepdim=True)


def _text_features(encode: Callable[[Tensor], Tensor], ids: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Computes text features [K, d] from the token ids [N, tokens] of all classes' prompts, one class after the other."""
    return _ensembles(torch.cat([encode(part) for part in ids.split(64)]), counts)


def _ensembles(features: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Computes each class's mean direction [K, d] over its prompts' features [N, d]."""
    unit = F.normalize(features, dim=-1)
    if len(set(counts)) == 1:
        means = unit.unflatten(0, (len(counts), -1)).mean(1)
    else:
        means = torch.stack([part.mean(0) for part in unit.split(list(counts))])
    return F.normalize(means, dim=-1)
