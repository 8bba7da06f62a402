"""Stage 9: measures Stable Diffusion 1.5 at 512 pixels with CLIP ViT-L/14 and LoRA, at their real sizes with random weights."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

from bench.gpu_stages.calls import measured
from bench.gpu_stages.recording import Record, Setting
from bench.gpu_stages.tracing import trace
from dtta_fast import AdaptConfig, Adapter, zoo

CONFIG = AdaptConfig(steps=3, pairs=4, parameters="lora", lr=1e-4, guard=14, precision="bf16")
CLASSES = ("a tabby cat", "a sports car", "a lighthouse", "a bowl of soup")
CALLS, SECONDS = 30, 8.0


def run(setting: Setting, record: Record) -> None:
    """Measures calls with one image, which the VAE encodes in every call, and then writes the trace of a call."""
    lacking = [name for name in ("diffusers", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if lacking:
        record.put("calls", "1 image", {"left out": f"{' and '.join(lacking)} not installed"})
        return
    made: list[Any] = []

    def call() -> dict[str, Any]:
        made.extend((session(setting), torch.rand(1, 3, *(2 * [64 if setting.tiny else 512]), device=setting.device)))
        return {"preset": "LoRA", **measured(*made, None, setting, CALLS, 0.1 if setting.tiny else SECONDS)}

    if record.measure("calls", "1 image", call) is not None:
        adapter, images = made
        path = setting.out / "trace_stable_diffusion.json.gz"
        record.measure("trace", "1 image", lambda: trace(lambda: adapter.adapt(images), path, setting.device), takes=15.0)


def session(setting: Setting) -> Adapter:
    """Makes a session with CLIP in float32 and the rest in bfloat16. A tiny session uses the zoo's CLIP and Stable Diffusion."""
    from dtta_fast.tasks import ZeroShot

    if setting.tiny:
        clip, denoiser = (part.to(setting.device) for part in zoo.load("open_vocabulary"))
        return Adapter(clip, denoiser, CONFIG.replace(steps=1, pairs=2, guard=4), zoo.task("open_vocabulary"))
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from bench.open_vocabulary.real_sizes import IDS, SIZES, VAE, clip_l14, random_weights
    from dtta_fast.denoisers import StableDiffusion
    from dtta_fast.denoisers.noise_process import NoiseProcess

    torch.manual_seed(0)
    chosen, device = SIZES["1.5"], setting.device
    tokenizer = CLIPTokenizer.from_pretrained(zoo.folder("open_vocabulary") / "clip")
    text = CLIPTextConfig(**chosen["text"], **IDS)
    unet = random_weights(lambda: UNet2DConditionModel(**chosen["unet"]), device).to(memory_format=torch.channels_last)
    vae, encoder = random_weights(lambda: AutoencoderKL(**VAE), device), random_weights(lambda: CLIPTextModel(text), device)
    process = NoiseProcess.from_scheduler(DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear"))
    denoiser = StableDiffusion(unet, process.to(device), vae, encoder, tokenizer).eval()
    clip = clip_l14(device).float()
    clip.logit_scale.data.fill_(math.log(100))  # the value in the real CLIP
    return Adapter(clip, denoiser, CONFIG, ZeroShot(CLASSES, (tokenizer, CLIPImageProcessor())))
