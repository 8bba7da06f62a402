"""Peak memory of one adaptation of DiT-S/2 + ResNet-18 in chunks of 15: python bench/step/memory.py PAIRS [bf16] prints MiB.

A process of its own, since the system keeps one peak a process. Printed: the peak, and what was resident before the adaptation.
"""

from __future__ import annotations

import resource
import sys

import timm
import torch
from diffusers import DDPMScheduler

from dtta_fast import AdaptConfig, Adapter
from dtta_fast.denoisers.dit import DiT
from dtta_fast.denoisers.dit_network import DiTNetwork
from dtta_fast.process import NoiseProcess

if __name__ == "__main__":
    pairs, precision = int(sys.argv[1]), "bf16" if "bf16" in sys.argv else None
    denoiser = DiT(DiTNetwork(32, 2, 4, 384, 12, 6), NoiseProcess.from_scheduler(DDPMScheduler(1000, beta_schedule="linear")))
    config = AdaptConfig(steps=1, pairs=pairs, chunk=15, precision=precision)
    adapter = Adapter(timm.create_model("resnet18"), denoiser, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    adapter.adapt(torch.rand(1, 3, 224, 224), latents=torch.randn(1, 4, 32, 32))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, before // 1024)
