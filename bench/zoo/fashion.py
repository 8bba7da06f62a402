"""Trains the Fashion-MNIST zoo, a timm ConvNeXt and a pixel DiT, on the train split only.

    python bench/zoo/fashion.py [--only classifier|denoiser] [--data FOLDER] [--out FOLDER]

Training uses a fixed seed and takes about 25 minutes on 2 cores. Models, augmentation and training loops are those of bench/zoo/digits.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from digits import CLASSIFIER, DENOISER, dit_batches, train_classifier, train_denoiser
from timm.models import save_for_hf

from dtta_fast.core.calibrate import calibrate
from dtta_fast.data.fashion import load_fashion
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.denoisers.noise_process import NoiseProcess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["classifier", "denoiser"])
    parser.add_argument("--iterations", type=int, default=7000)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "fashion_weights")
    args = parser.parse_args()
    images, labels = load_fashion("train", args.data)
    if args.only != "denoiser":
        torch.manual_seed(0)
        model = train_classifier(images, labels, 3000)
        held_out, truth = load_fashion("validation", args.data)
        with torch.no_grad():
            print(f"classifier, validation: {(model(held_out * 2 - 1).argmax(1) == truth).float().mean():.3f}", flush=True)
        save_for_hf(model.half(), args.out / "classifier", model_args=CLASSIFIER, safe_serialization=True)
    if args.only != "classifier":
        torch.manual_seed(0)
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="sample")
        network = DiTNetwork(**DENOISER)
        draw = dit_batches(network, images, labels)
        network = train_denoiser(network, draw, NoiseProcess.from_scheduler(scheduler), 29, args.iterations)
        denoiser = DiT(network.half(), NoiseProcess.from_scheduler(scheduler))
        denoiser.calibration = calibrate(denoiser.float(), images[:1000], labels[:1000])
        denoiser.half().save_pretrained(args.out / "denoiser", scheduler)


if __name__ == "__main__":
    main()
