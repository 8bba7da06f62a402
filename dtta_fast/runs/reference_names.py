"""Translates the dotted config names of the reference implementation (github.com/mihirp1998/Diffusion-TTA) into ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GROUPS = ("input", "model", "tta", "wandb")
DATA_SETS = {
    "ImageNetDataset": "imagenet",
    "ImageNetCDataset": "imagenet-c",
    "ImageNetRDataset": "imagenet-r",
    "ImageNetStyleDataset": "imagenet-stylized",
    "ImageNetADataset": "imagenet-a",
    "ImageNetv2Dataset": "imagenet-v2",
    "ObjectNetDataset": "objectnet",
    "Food101Dataset": "food101",
    "Flowers102Dataset": "flowers102",
    "FGVCAircraftDataset": "aircraft",
    "OxfordIIITPetDataset": "pets",
    "CIFAR10Dataset": "cifar10",
    "CIFAR100Dataset": "cifar100",
}
# timm weights of the same architectures; not all of them equal torchvision's
MODELS = {
    "resnet18": "resnet18.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "vit_b_32": "vit_base_patch32_224.augreg_in21k_ft_in1k",
    "convnext_tiny": "convnext_tiny.fb_in1k",
    "convnext_large": "convnext_large.fb_in1k",
}
STABLE_DIFFUSIONS = {"1-4": "CompVis/stable-diffusion-v1-4", "2-1": "stabilityai/stable-diffusion-2-1-base"}
RENAMED = {
    "tta.loss": "loss",
    "tta.use_same_noise_among_timesteps": "share_noise",
    "tta.gradient_descent.train_steps": "steps",
    "tta.gradient_descent.weight_decay": "weight_decay",
    "tta.gradient_descent.optimizer_momentum": "momentum",
    "input.root_path": "root",
}
# these follow from the model's own config, or have no counterpart here
WITHOUT_EFFECT = (
    "use_cuda",
    "log_freq",
    "model.freeze_class_embeds",
    "model.freeze_vae",
    "model.use_flash",
    "model.override_total_steps",
    "tta.model",
    "input.image_height",
    "input.image_width",
    "input.disc_img_crop",
    "input.disc_img_resize",
    "input.sd_img_res",
    "input.use_objectnet",
    "input.mean",
    "input.std",
    "wandb.mode",
    "wandb.project",
)


def is_reference(name: str) -> bool:
    return bool(re.fullmatch(rf"({'|'.join(GROUPS)})(\.\w+)+", name))


def translated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces the reference's names in flat settings and keeps all other names.

    The reference's batches consist of pairs: one update uses accum_iter batches of batch_size pairs.

    Raises:
        ValueError: a name under input, model, tta or wandb does not exist in the reference, or its value has no equivalent here.
    """
    found: dict[str, Any] = {}
    theirs = {name: value for name, value in settings.items() if is_reference(name)}
    if theirs:
        theirs |= {name: settings[name] for name in ("use_cuda", "log_freq", "gpu") if name in settings}
    for name, value in settings.items():
        if name not in theirs and not (name == "seed" and value is None):  # the reference's seed may be null
            found[name] = value
    per_forward, forwards = theirs.pop("input.batch_size", None), theirs.pop("tta.gradient_descent.accum_iter", None)
    if per_forward is not None or forwards is not None:
        for name, given in (("input.batch_size", per_forward), ("tta.gradient_descent.accum_iter", forwards)):
            if given is not None and (not isinstance(given, int) or isinstance(given, bool)):
                raise ValueError(f"{name} is {given!r}; give a whole number")
        found["pairs"], found["chunk"] = (per_forward or 1) * (forwards or 1), per_forward or "auto"
    for name, value in theirs.items():
        if name not in WITHOUT_EFFECT:
            found |= _one(name, value)
    return found


def _one(name: str, value: Any) -> dict[str, Any]:
    if name in RENAMED:
        return {RENAMED[name]: value}
    if isinstance(value, (list, dict, set)):
        raise ValueError(f"{name} is {value!r}; give a single value")
    tables = {
        "input.dataset_name": ("data", DATA_SETS),
        "model.class_arch": ("model", MODELS),
        "model.sd_version": ("denoiser", STABLE_DIFFUSIONS),
    }
    if name in tables:
        ours, table = tables[name]
        if name == "input.dataset_name" and value not in table:
            raise ValueError(f"{name} is {value!r}; there are {', '.join(table)}")
        return {ours: table.get(value, value)}
    numbers = value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0
    rules: dict[str, Any] = {
        "gpu": {"device": f"cuda:{value}"} if numbers >= 0 else {},
        "input.subsample": {"per_class": value if numbers > 0 else None},
        "tta.adapt_topk": {"top_k": value if numbers > 0 else None},
        "tta.online": {"protocol": "online" if value else "episodic"},
        "tta.rand_timestep_equal_int": {"timesteps": "stratified"} if value else {},
        "tta.random_timestep_per_iteration": {"common_draws": not value},
        "tta.gradient_descent.base_learning_rate": {"lr": value, "denoiser_lr": value},
        "tta.gradient_descent.optimizer": {"optimizer": "sgd" if value == "sgd" else "adamw"},
        "model.adapt_only_classifier": {"denoiser_parameters": "frozen" if value else "all"},
        "model.use_dit": {"denoiser": "facebook/DiT-XL-2-256"} if value else {},
    }
    if name not in rules:
        known = sorted({*rules, *RENAMED, *tables, *WITHOUT_EFFECT, "input.batch_size", "tta.gradient_descent.accum_iter"})
        raise ValueError(f"{name} is not a name of the reference's config; there are {', '.join(known)}")
    chosen: dict[str, Any] = rules[name]
    return chosen
