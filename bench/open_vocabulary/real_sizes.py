"""Stable Diffusion 1.5 and 2.1 with CLIP ViT-L/14 at their real sizes, random bfloat16 weights: a step on the CPU, and memory by count.

    python bench/open_vocabulary/real_sizes.py [--only 1.5|2.1] [--pairs 4]

Each pipeline is written by save_pretrained, read by StableDiffusion.from_pretrained, and runs one adaptation step of one image, at 512x512
(2.1: 768x768), in chunks of one pair. Writes bench/results/real_sizes.json: bytes and FLOPs a pair, the process's peak memory, and what
180 pairs would take by the engine's own accounting, with and without checkpointing, the UNet in bfloat16, int8 and NF4.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from dtta_fast import AdaptConfig, Adapter, zoo
from dtta_fast.denoisers import StableDiffusion
from dtta_fast.runtime import environment
from dtta_fast.session import memory
from dtta_fast.tasks import ZeroShot

RESULTS = Path(__file__).parents[1] / "results" / "real_sizes.json"
CARD = 24 * 2**30
BLOCKS = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": BLOCKS,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
# configs of the hub's files; 2.1's text encoder is OpenCLIP's ViT-H/14 without its last layer
SIZES: dict[str, dict[str, Any]] = {
    "1.5": {
        "unet": {**UNET, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "prediction": "epsilon",
    },
    "2.1": {
        "unet": {
            **UNET,
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16, "hidden_act": "gelu"},
        "prediction": "v_prediction",
    },
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
IDS = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}


def random_weights(make: Any, device: torch.device | str = "cpu") -> Any:
    """A module of bfloat16 noise: small enough that nothing overflows."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            module = make()
    finally:
        torch.set_default_dtype(torch.float32)
    filled = make_real(module, device)
    return filled.eval()


def make_real(module: nn.Module, device: torch.device | str) -> nn.Module:
    module = module.to_empty(device=device)
    for name, p in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("position_ids"):
            p.data.copy_(torch.arange(p.shape[-1], device=device).expand_as(p))
        elif p.is_floating_point():
            p.data.fill_(1.0) if "norm" in name and name.endswith("weight") else p.data.normal_(std=0.02)
    return module


def write(size: str, folder: Path) -> None:
    chosen = SIZES[size]
    text = CLIPTextConfig(**chosen["text"], **IDS)
    parts = {
        "unet": random_weights(lambda: UNet2DConditionModel(**chosen["unet"])),
        "vae": random_weights(lambda: AutoencoderKL(**VAE)),
        "text_encoder": random_weights(lambda: CLIPTextModel(text)),
        "tokenizer": CLIPTokenizer.from_pretrained(zoo.folder("open_vocabulary") / "clip"),
        "scheduler": DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type=chosen["prediction"]),
    }
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **none).save_pretrained(folder)


def clip_l14(device: torch.device | str = "cpu") -> nn.Module:
    text = CLIPTextConfig(**SIZES["1.5"]["text"], **IDS, projection_dim=768).to_dict()
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
    both = CLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**vision, projection_dim=768).to_dict(), projection_dim=768)
    clip: nn.Module = random_weights(lambda: CLIPModel(both), device)
    return clip


def weight_bytes(unet: nn.Module) -> dict[str, int]:
    """Counts the bytes of the UNet's weights as they are, and with its linear layers in int8 (a scale a row) and NF4 (a scale of 64)."""
    linear = sum(m.weight.numel() for m in unet.modules() if isinstance(m, nn.Linear))
    rows = sum(m.out_features for m in unet.modules() if isinstance(m, nn.Linear))
    everything = sum(p.numel() for p in unet.parameters())
    return {
        "bf16": 2 * everything,
        "int8": 2 * (everything - linear) + linear + 4 * rows,
        "nf4": 2 * (everything - linear) + linear // 2 + linear // 64 * 4,
    }


def measure(size: str, folder: Path, pairs: int) -> dict[str, Any]:
    start = time.perf_counter()
    denoiser = StableDiffusion.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter() - start
    processor = (CLIPTokenizer.from_pretrained(zoo.folder("open_vocabulary") / "clip"), CLIPImageProcessor())
    task = ZeroShot(["a cat", "a dog", "a car"], processor)
    clip = clip_l14()
    config = AdaptConfig(steps=1, pairs=pairs, chunk=1, parameters="lora", lr=1e-4)
    adapter = Adapter(clip, denoiser, config, task)
    start = time.perf_counter()
    result = adapter.adapt(torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0)))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before the counts, which keep a row's activations whole
    named = denoiser.with_classes([f"a photo of {name}." for name in task.classes])
    x0, condition = torch.randn(1, *denoiser.latent_shape), named.class_embeddings({})[:1]
    timesteps = torch.zeros(1, dtype=torch.int64)
    leaf = condition.clone().requires_grad_()
    frozen = named.requires_grad_(False)
    with FlopCounterMode(display=False) as counted:
        frozen(x0.bfloat16(), timesteps, leaf).float().square().mean().backward()
    row = {str(checkpointing): memory.row_bytes(frozen, x0, condition, [], checkpointing) for checkpointing in (False, True)}
    rest = sum(p.nbytes for module in (clip, denoiser.vae) for p in module.parameters())
    fits = {
        f"{weights}, {'checkpointed' if checkpointing == 'True' else 'plain'}": {
            "weights": held + rest,
            "activations of 180 pairs at once": 180 * one,
            "pairs at once on a 24 GiB card": max(0, (CARD - held - rest) // one),
            "180 pairs in chunks": held + rest + one * min(180, max(1, (CARD * 4 // 5 - held - rest) // one)),
        }
        for weights, held in weight_bytes(denoiser.unet).items()
        for checkpointing, one in row.items()
    }
    return {
        "loading": loaded,
        "step": seconds,
        "pairs": pairs,
        "loss": result.loss.flatten().tolist(),
        "flops a pair": counted.get_total_flops(),
        "bytes a pair": row,
        "peak bytes of the process": peak,
        "parameters of the unet": sum(p.numel() for p in denoiser.unet.parameters()),
        "by count": fits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES)
    parser.add_argument("--pairs", type=int, default=4)
    args = parser.parse_args()
    records = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for size in [args.only] if args.only else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write(size, Path(folder))
            records[size] = {**measure(size, Path(folder), args.pairs), "environment": environment.describe()}
        RESULTS.write_text(json.dumps(records, indent=1) + "\n")
        print(size, {key: value for key, value in records[size].items() if key not in ("environment", "by count")}, flush=True)


if __name__ == "__main__":
    main()
