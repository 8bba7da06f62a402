"""Which models are supported, and what was checked of each.

    python bench/support.py [--count | --test | --run]

--count builds each family's network at the real sizes of a public model on the meta device, without weights, and counts
parameters, and the FLOPs of one pair's forward and backward to the condition. --test runs the tests named in CHECKS and
notes which of them passed. --run computes a pair at random bfloat16 weights on the CPU, of the models whose weights take at
most 12 GiB, each in a process of its own. All of them write bench/results/support.json, from which bench/readme.py makes the
table of docs/models.md. No real weights were ever loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import source_tree

source_tree.use()

from dtta_fast.denoisers.class_unet import ClassUNet  # noqa: E402
from dtta_fast.denoisers.dit_network import DiTNetwork  # noqa: E402
from dtta_fast.denoisers.edm_unet import EDMUNet  # noqa: E402
from dtta_fast.denoisers.noise_process import NoiseProcess  # noqa: E402
from dtta_fast.runtime import environment  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "support.json"
SD_BLOCKS: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280)}
MOST_BYTES = 12 * 2**30
XL_2: dict[str, Any] = {"patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16}
SD3: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}

# a check's tests, as words that their ids contain; all that match have to pass, and one has to match
PIPELINE = "tests/test_text_to_image.py"
CHECKS: dict[str, dict[str, tuple[str, str]]] = {
    "DiT": {
        "prediction": ("tests/test_dit.py", "agrees_with_diffusers or hub_s_layout"),
        "gradient": ("tests/test_adapt.py", "gradient"),
        "adapts": ("tests/test_adapt.py", "adapt"),
    },
    "SiT, REPA": {
        "prediction": ("tests/test_sit.py", "predicts_the_path_s_velocity"),
        "gradient": ("tests/test_adapt.py", "gradient"),
        "adapts": ("tests/test_sit.py", "folder_knows_its_process"),
    },
    "class-conditional UNet": {
        "prediction": ("tests/test_class_unet.py", "diffusers"),
        "gradient": ("tests/test_class_unet.py", "gradient"),
        "adapts": ("tests/test_class_unet.py", "adapt"),
    },
    "ADM": {
        "prediction": ("tests/test_adm.py", "predictions_are_adm_s"),
        "gradient": ("tests/test_adm.py", "gradient"),
        "adapts": ("tests/test_adm.py", "folder_adapts"),
    },
    "EDM": {
        "prediction": ("tests/test_edm.py", "predictions_are_edm_s or process_is_edm_s"),
        "gradient": ("tests/test_edm.py", "gradient"),
        "adapts": ("tests/test_edm.py", "folder_adapts"),
    },
    "Stable Diffusion 1, 2": {
        "prediction": ("tests/test_open_vocabulary.py", "predicts_as_the_library or pipeline_s_folder"),
        "gradient": ("tests/test_open_vocabulary.py", "gradients_of_the_condition"),
        "adapts": ("tests/test_open_vocabulary.py", "adapt_command"),
    },
    **{
        name: {
            "prediction": (PIPELINE, f"predictions_are_the_pipeline_s and {key}"),
            "gradient": (PIPELINE, f"gradients_of_the_condition and {key}"),
            "adapts": (PIPELINE, f"clip_adapts_with_every_family and {key}"),
        }
        for name, key in (
            ("SDXL", "SDXL"),
            ("Stable Diffusion 3, 3.5", "SD and not SDXL"),
            ("PixArt-α", "alpha"),
            ("PixArt-Σ", "sigma"),
            ("Sana", "Sana"),
        )
    },
}


def conditional(unet: nn.Module, side: int, **added: int) -> Callable[[], Tensor]:
    """Returns a forward of a text-to-image UNet for one pair under a condition that requires a gradient."""
    own: Any = unet
    shape = 1, 77, own.config.cross_attention_dim

    def forward() -> Tensor:
        states = torch.zeros(shape, requires_grad=True)
        given = {name: torch.zeros(1, width) for name, width in added.items()}
        found: Tensor = own(torch.zeros(1, 4, side, side), torch.zeros(1), states, added_cond_kwargs=given or None, return_dict=False)[0]
        return found

    return forward


def stable_diffusion() -> tuple[nn.Module, Callable[[], Tensor]]:
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **SD_BLOCKS)
    return unet, conditional(unet, 64)


def stable_diffusion_xl() -> tuple[nn.Module, Callable[[], Tensor]]:
    unet = UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=2048,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, use_linear_projection=True,
    )  # fmt: skip
    return unet, conditional(unet, 128, text_embeds=1280, time_ids=6)


def stable_diffusion_3(layers: int, heads: int, **config: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    network = SD3Transformer2DModel(num_layers=layers, num_attention_heads=heads, caption_projection_dim=64 * heads, **SD3, **config)

    def forward() -> Tensor:
        states = torch.zeros(1, 333, 4096, requires_grad=True)
        found: Tensor = network(torch.zeros(1, 16, 128, 128), states, torch.zeros(1, 2048), torch.zeros(1), return_dict=False)[0]
        return found

    return network, forward


def pixart(side: int, tokens: int, **config: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    network = PixArtTransformer2DModel(sample_size=side, caption_channels=4096, **config)

    def forward() -> Tensor:
        states = torch.zeros(1, tokens, 4096, requires_grad=True)
        sizes = {"resolution": torch.zeros(1, 2), "aspect_ratio": torch.zeros(1, 1)}
        found: Tensor = network(torch.zeros(1, 4, side, side), states, torch.zeros(1), sizes, return_dict=False)[0]
        return found

    return network, forward


def sana(**config: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    network = SanaTransformer2DModel(**config)

    def forward() -> Tensor:
        states = torch.zeros(1, 300, 2304, requires_grad=True)
        found: Tensor = network(torch.zeros(1, 32, 32, 32), states, torch.zeros(1), return_dict=False)[0]
        return found

    return network, forward


def transformer(side: int, **sizes: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    network = DiTNetwork(input_size=side, **XL_2, **sizes)
    return network, lambda: network(torch.zeros(1, 4, side, side), torch.zeros(1), torch.zeros(1, 1152, requires_grad=True))


def cifar_unet() -> tuple[nn.Module, Callable[[], Tensor]]:
    """google/ddpm-cifar10-32's config with classes, which is the size of many public ones."""
    unet = diffusers.UNet2DModel(
        sample_size=32, block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), attention_head_dim=None, class_embed_type="identity",
    )  # fmt: skip
    return unet, lambda: unet(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, 512, requires_grad=True), return_dict=False)[0]


def adm() -> tuple[nn.Module, Callable[[], Tensor]]:
    unet = diffusers.UNet2DModel(
        sample_size=256, out_channels=6, block_out_channels=(256, 256, 512, 512, 1024, 1024), attention_head_dim=64,
        down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3, downsample_type="resnet", upsample_type="resnet",
        up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
    )  # fmt: skip
    return unet, lambda: unet(torch.zeros(1, 3, 256, 256), torch.zeros(1), torch.zeros(1, 1024, requires_grad=True), return_dict=False)[0]


def edm(side: int, classes: int, **sizes: Any) -> tuple[nn.Module, Callable[[], Tensor]]:
    unet = EDMUNet(sample_size=side, in_channels=3, out_channels=3, num_class_embeds=classes, **sizes)
    ClassUNet(unet, NoiseProcess.linear_flow(time_of_data=0))  # from here on, its class embedding takes mixtures
    width = unet.class_embedding.embedding_dim
    return unet, lambda: unet(torch.zeros(1, 3, side, side), torch.zeros(1), torch.zeros(1, width, requires_grad=True))[0]


EDM_CIFAR: dict[str, Any] = {
    "noise_channels": 128,
    "block_out_channels": (256,) * 3,
    "layers_per_block": 4,
    "attention": (False, True, False),
}
EDM_IMAGENET: dict[str, Any] = {
    "noise_channels": 192,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "attention": (False, True, True, True),
}

# family, public model, pixels, how to build it: configs of the hub's files and of the papers
REAL: tuple[tuple[str, str, int, Callable[[], tuple[nn.Module, Callable[[], Tensor]]]], ...] = (
    ("DiT", "DiT-XL/2", 256, lambda: transformer(32)),
    ("SiT, REPA", "SiT-XL/2", 256, lambda: transformer(32)),
    ("class-conditional UNet", "ddpm-cifar10-32's sizes", 32, cifar_unet),
    ("ADM", "256x256_diffusion.pt", 256, adm),
    ("EDM", "edm-cifar10-32x32-cond-vp", 32, lambda: edm(32, 10, adm=False, **EDM_CIFAR)),
    ("EDM", "edm-imagenet-64x64-cond-adm", 64, lambda: edm(64, 1000, adm=True, **EDM_IMAGENET)),
    ("Stable Diffusion 1, 2", "Stable Diffusion 1.5", 512, stable_diffusion),
    ("SDXL", "SDXL base 1.0", 1024, stable_diffusion_xl),
    ("Stable Diffusion 3, 3.5", "SD 3 medium", 1024, lambda: stable_diffusion_3(24, 24, pos_embed_max_size=192)),
    (
        "Stable Diffusion 3, 3.5",
        "SD 3.5 medium",
        1024,
        lambda: stable_diffusion_3(24, 24, pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
    ),
    ("Stable Diffusion 3, 3.5", "SD 3.5 large", 1024, lambda: stable_diffusion_3(38, 38, pos_embed_max_size=192, qk_norm="rms_norm")),
    ("PixArt-α", "PixArt-XL-2-512x512", 512, lambda: pixart(64, 120)),
    ("PixArt-α", "PixArt-XL-2-1024-MS", 1024, lambda: pixart(128, 120)),
    ("PixArt-Σ", "PixArt-Sigma-XL-2-1024-MS", 1024, lambda: pixart(128, 300, use_additional_conditions=False, interpolation_scale=2)),
    ("Sana", "Sana_1600M_1024px", 1024, sana),
)


def counted(family: str, name: str, pixels: int, make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]) -> dict[str, Any]:
    """Counts a network's parameters and a pair's FLOPs."""
    with torch.device("meta"):
        network, forward = make()
        network.eval().requires_grad_(False)
        with FlopCounterMode(display=False) as once:
            prediction = forward()
        with FlopCounterMode(display=False) as back:
            prediction.sum().backward()
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{name:28} {parameters / 1e6:8.1f} M, {(once.get_total_flops() + back.get_total_flops()) / 1e9:10.1f} GFLOP a pair", flush=True)
    return {
        "family": family,
        "model": name,
        "pixels": pixels,
        "parameters": parameters,
        "forward_flops": once.get_total_flops(),
        "backward_flops": back.get_total_flops(),
    }


def computed(number: int) -> dict[str, Any]:
    """Computes one pair of REAL[number] at random weights; returns its seconds and the process's peak memory."""
    family, name, _, make = REAL[number]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        network, forward = make()
    network = network.to_empty(device="cpu").eval().requires_grad_(False)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.normal_(std=0.02)
    started = time.perf_counter()
    forward().sum().backward()
    seconds = time.perf_counter() - started
    return {"family": family, "model": name, "seconds": seconds, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def in_processes(sizes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Computes a pair of every model that is small enough, each in a process of its own."""
    found = []
    for number, size in enumerate(sizes):
        if 2 * size["parameters"] <= MOST_BYTES:
            run = subprocess.run([sys.executable, __file__, "--one", str(number)], check=False, capture_output=True, text=True)
            if run.returncode:  # such as killed for its memory
                print(f"{size['model']}: status {run.returncode} {run.stderr[-200:]}", flush=True)
                continue
            found.append(json.loads(run.stdout.splitlines()[-1]))
            print(found[-1], flush=True)
    return found


def tested(file: str, words: str) -> dict[str, int]:
    """Runs some of a file's tests; returns how many passed and failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", file, "-k", words, f"--junitxml={report}"]
        subprocess.run(command, check=False, capture_output=True)
        cases = ElementTree.parse(report).getroot().findall(".//testcase") if report.exists() else []
    wrong = sum(case.find("failure") is not None or case.find("error") is not None or case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - wrong, "failed": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--count", action="store_true")
    kind.add_argument("--test", action="store_true")
    kind.add_argument("--run", action="store_true")
    kind.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(computed(args.one)))
        return
    every = not (args.count or args.test or args.run)
    records: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if args.count or every:
        records["sizes"] = [counted(*each) for each in REAL]
    if args.run or every:
        records["computed"] = in_processes(records["sizes"])
    if args.test or every:
        records["checks"] = {}
        for family, checks in CHECKS.items():
            records["checks"][family] = {name: tested(*which) for name, which in checks.items()}
            print(family, records["checks"][family], flush=True)
    records["environment"] = environment.describe()
    RESULTS.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
