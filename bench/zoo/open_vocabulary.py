"""Trains the open-vocabulary zoo on the digits' train split: a transformers CLIP and a Stable Diffusion, saved with save_pretrained.

    python bench/zoo/open_vocabulary.py [--only clip|vae|unet] [--out FOLDER]

Training uses a fixed seed and takes about 25 minutes on 2 cores. The UNet needs the trained CLIP and VAE. As in Stable Diffusion 1.x, the
text encoder is CLIP's own. The tokenizer is the real one: its vocabulary comes with open_clip_torch. Weights are stored in float16 and load
as float32.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from digits import augment, train_denoiser
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from dtta_fast.core.calibrate import calibrate
from dtta_fast.data.digits import load_digits
from dtta_fast.denoisers.noise_process import NoiseProcess
from dtta_fast.denoisers.stable_diffusion import StableDiffusion
from dtta_fast.zoo import DIGITS as WORDS

KINDS = ("", "a photo of", "a picture of", "a blurry photo of", "a grey image of")
NOUNS = ("", "the number", "the digit", "a handwritten", "a small")
TEMPLATES = [f"{kind} {noun} {{}}.".strip().replace("  ", " ") for kind, noun in product(KINDS, NOUNS)]
MEAN, DEVIATION = [0.5] * 3, [0.5] * 3
TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 64}
TOKENS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "projection_dim": 64}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 32, 48),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
    "sample_size": 32,
    "mid_block_add_attention": False,
}
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (48, 80),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": TEXT["hidden_size"],
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
SCHEDULER = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction", clip_sample=False)


def write_tokenizer(folder: Path) -> None:
    """Writes vocab.json, merges.txt and tokenizer_config.json as in the CLIP folders on the Hugging Face hub."""
    from open_clip.tokenizer import SimpleTokenizer

    known = SimpleTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(word, word): i for word, i in known.encoder.items()}))
    merges = sorted(known.bpe_ranks, key=known.bpe_ranks.__getitem__)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokens(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Tokenizes prompts; returns ids [N, 77]."""
    found: Tensor = tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return found


def prompt(digit: int) -> str:
    return random.choice(TEMPLATES).format(random.choice((WORDS[digit], str(digit))))


def train_clip(images: Tensor, labels: Tensor, tokenizer: Any, iterations: int = 2500) -> CLIPModel:
    """Trains CLIP to choose the right digit for each image from one random prompt per digit; `images` are in [0, 1]."""
    text = CLIPTextConfig(**TEXT, **TOKENS, max_position_embeddings=77).to_dict()
    vision = CLIPVisionConfig(**VISION, image_size=32, patch_size=4).to_dict()
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT["projection_dim"])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, iterations)
    start = time.monotonic()
    for iteration in range(iterations):
        rows = torch.randint(len(images), (96,))
        ids = tokens(tokenizer, [prompt(digit) for digit in range(10)])
        found = model(input_ids=ids, pixel_values=augment(images[rows]) * 2 - 1)
        loss = F.cross_entropy(found.logits_per_image, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (iteration + 1) % 250 == 0:
            print(f"clip {iteration + 1} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True)
    used = tokens(tokenizer, [template.format(name) for template in TEMPLATES for name in (*WORDS, *"0123456789")]).unique()
    with torch.no_grad():  # words never seen in training mean nothing; as zeros, they take no room in a compressed package
        table = model.text_model.embeddings.token_embedding.weight
        kept = torch.zeros(len(table), 1)
        kept[used] = 1
        table.mul_(kept)
    return model.eval()


def train_vae(images: Tensor, iterations: int = 2500) -> AutoencoderKL:
    """Trains on augmented digits, some of them noisy so that it copes with corrupted images; sets the latents' scale at the end."""
    vae = AutoencoderKL(**VAE)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, iterations)
    start = time.monotonic()
    for iteration in range(iterations):
        x = augment(images[torch.randint(len(images), (32,))]) * 2 - 1
        x[:8] += 0.2 * torch.randn_like(x[:8])
        posterior = vae.encode(x).latent_dist
        loss = F.mse_loss(vae.decode(posterior.sample()).sample, x) + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (iteration + 1) % 250 == 0:
            print(f"vae {iteration + 1} loss {loss.item():.4f} {time.monotonic() - start:.0f} s", flush=True)
    with torch.no_grad():
        latents = vae.encode(augment(images) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


class Prediction(nn.Module):
    """A UNet with the signature that train_denoiser expects."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        found: Tensor = self.unet(x_t, time, condition).sample
        return found


def train_unet(
    images: Tensor, labels: Tensor, vae: AutoencoderKL, clip: CLIPModel, tokenizer: Any, iterations: int
) -> UNet2DConditionModel:
    """Trains the UNet on latents and the hidden states of prompts. One prompt in ten is empty."""
    with torch.no_grad():
        embeddings = {text: clip.text_model(tokens(tokenizer, [text])).last_hidden_state[0] for text in {""} | all_prompts()}
        # many augmented versions of each image, encoded only once
        latents = torch.cat([vae.encode(augment(images) * 2 - 1).latent_dist.mean for _ in range(60)]) * vae.config.scaling_factor
    classes = labels.repeat(60)

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(latents), (128,))
        texts = ["" if random.random() < 0.1 else prompt(int(digit)) for digit in classes[rows]]
        return latents[rows], torch.stack([embeddings[text] for text in texts])

    network = Prediction(UNet2DConditionModel(**UNET))
    trained: Any = train_denoiser(network, draw, NoiseProcess.from_scheduler(SCHEDULER), 29, iterations)
    return trained.unet


def all_prompts() -> set[str]:
    return {template.format(name) for template in TEMPLATES for name in (*WORDS, *"0123456789")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["clip", "vae", "unet"])
    parser.add_argument("--iterations", type=int, default=3600, help="training iterations of the UNet")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "dtta_fast" / "zoo" / "open_vocabulary")
    args = parser.parse_args()
    clip_folder, diffusion = args.out / "clip", args.out / "diffusion"
    images, labels = load_digits("train")

    def part(name: str, train: Callable[[], None]) -> None:
        if args.only in (None, name):
            torch.manual_seed(0)
            random.seed(0)
            train()

    def clip() -> None:
        write_tokenizer(clip_folder)
        tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
        model = train_clip(images, labels, tokenizer)
        held_out, truth = load_digits("validation")
        with torch.no_grad():
            ids = tokens(tokenizer, [f"an image of a {word}" for word in WORDS])
            logits = model(input_ids=ids, pixel_values=held_out * 2 - 1).logits_per_image
        print(f"clip, validation, a prompt unseen in training: {(logits.argmax(1) == truth).float().mean():.3f}", flush=True)
        model.half().save_pretrained(clip_folder)
        size = {"height": 32, "width": 32}
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size, image_mean=MEAN, image_std=DEVIATION).save_pretrained(clip_folder)

    def vae() -> None:
        train_vae(images).half().save_pretrained(diffusion / "vae")

    def unet() -> None:
        tokenizer, autoencoder = CLIPTokenizer.from_pretrained(clip_folder), AutoencoderKL.from_pretrained(diffusion / "vae").float()
        clip = CLIPModel.from_pretrained(clip_folder).float().eval()
        network = train_unet(images, labels, autoencoder, clip, tokenizer, args.iterations)
        parts = {"vae": autoencoder.half(), "text_encoder": clip.text_model.half(), "tokenizer": tokenizer, "unet": network.half()}
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, scheduler=SCHEDULER, **none).save_pretrained(diffusion)
        for file in (diffusion / "tokenizer").iterdir():
            file.unlink()
        write_tokenizer(diffusion / "tokenizer")
        denoiser = StableDiffusion.from_pretrained(diffusion).with_classes([f"a photo of a {word}." for word in WORDS])
        calibrate(denoiser, images, labels).save(diffusion / "calibration.json")

    for name, train in (("clip", clip), ("vae", vae), ("unet", unet)):
        part(name, train)


if __name__ == "__main__":
    main()
