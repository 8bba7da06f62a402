"""A folder laid out as ImageNet-C is, and models of 1000 classes: small, random, and enough to try `dtta evaluate` on.

    python examples/imagenet_c_tree.py FOLDER

Writes FOLDER/imagenet-c (2 corruptions x 2 severities x 3 classes x 2 images of noise), FOLDER/classifier (timm) and FOLDER/dit.
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from diffusers import DDPMScheduler
from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torchvision.transforms.functional import to_pil_image

from dtta_fast.denoisers import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess

CLASSES, SIDE = (0, 7, 999), 64


def main(folder: Path) -> None:
    torch.manual_seed(0)
    wnids = ImageNetInfo("imagenet-1k").label_names()
    for corruption in ("fog", "gaussian_noise"):
        for severity in ("3", "5"):
            for k in CLASSES:
                place = folder / "imagenet-c" / corruption / severity / wnids[k]
                place.mkdir(parents=True, exist_ok=True)
                for number in range(2):
                    to_pil_image(torch.rand(3, SIDE, SIDE)).save(place / f"ILSVRC2012_val_{number:08}.JPEG")
    shape = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 32), "ls_init_value": 1.0}
    model = timm.create_model(
        "convnext_atto", num_classes=1000, pretrained_cfg_overlay={"input_size": (3, SIDE, SIDE), "crop_pct": 1.0}, **shape
    )
    save_for_hf(model, folder / "classifier", model_args=shape, safe_serialization=True)
    scheduler = DDPMScheduler(1000, beta_schedule="linear")
    network = DiTNetwork(
        input_size=32, patch_size=4, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=1000, learn_sigma=False
    )
    DiT(network, NoiseProcess.from_scheduler(scheduler)).save_pretrained(folder / "dit", scheduler)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
