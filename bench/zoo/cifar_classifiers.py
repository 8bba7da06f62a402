"""Trains two small classifiers of different kinds on CIFAR-10's training images: a ResNet with batch norm and a ConvNeXt.

    python bench/zoo/cifar_classifiers.py --root FOLDER [--only resnet|convnext] [--epochs N] [--out FOLDER]

Both are timm's. The ConvNeXt also learns from the ResNet's answers to the same views, so train the ResNet first. Training is seeded. With
AVX-512 and bfloat16, the ResNet takes half an hour on 2 cores, and the ConvNeXt 40 minutes on one. Weights are stored in half precision;
load() reads them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.convnext import ConvNeXt
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import source_tree

source_tree.use()

from bench import cifar10  # noqa: E402

Name = Literal["resnet", "convnext"]
NAMES: tuple[Name, ...] = ("resnet", "convnext")
WEIGHTS = Path(__file__).parent / "cifar_weights"
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of the training images' channels
EPOCHS = {"resnet": 40, "convnext": 45}
BATCH, PAD = 128, 4
TEMPERATURE = 2.0  # of the teacher's answers


def network(name: Name) -> nn.Module:
    """Returns an untrained network for 32 x 32 images of 10 classes, with timm's description of its input."""
    model: nn.Module
    if name == "resnet":
        model = ResNet(BasicBlock, (3, 2, 1, 1), num_classes=10, channels=(48, 96, 192, 256), stem_width=48)
        model.conv1, model.maxpool = nn.Conv2d(3, model.conv1.out_channels, 3, 2, 1, bias=False), nn.Identity()  # for small images
    else:
        model = ConvNeXt(num_classes=10, depths=(2, 2, 3, 1), dims=(64, 128, 192, 256), patch_size=2, kernel_sizes=3, ls_init_value=1.0)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": MEAN, "std": DEVIATION, "crop_pct": 1.0, "interpolation": "bilinear"}
    return model


def load(name: Name, folder: Path = WEIGHTS) -> nn.Module:
    """Returns a trained classifier in eval mode."""
    model = network(name)
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in load_file(folder / f"{name}.safetensors").items()}
    )
    return model.eval()


def normalised(images: Tensor) -> Tensor:
    """Converts images [N, 3, H, W], uint8, to a network's input."""
    mean, deviation = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images [N, 3, 32, 32] and moves each by up to 4 pixels either way; zeros come in at the edges."""
    count, size = len(images), images.shape[-1]
    down, right = torch.randint(2 * PAD + 1, (2, count, 1), generator=generator)
    rows, columns = (torch.arange(size) + shift for shift in (down, right))
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    found = F.pad(images, (PAD,) * 4)[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return found.movedim(-1, 1).contiguous(memory_format=torch.channels_last)


def train(name: Name, images: Tensor, labels: Tensor, epochs: int, teacher: nn.Module | None = None, seed: int = 0) -> nn.Module:
    """Trains a classifier on images [N, 3, 32, 32], uint8; the learning rate rises over a fifth of the time and falls to 0.

    teacher: a trained classifier whose answers count as much as the labels (Hinton et al. 2015, arXiv 1503.02531).
    """
    torch.manual_seed(seed)
    model = network(name).to(memory_format=torch.channels_last).train()
    if name == "resnet":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.15, momentum=0.9, weight_decay=5e-4, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    iterations = len(images) // BATCH
    peak = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, epochs * iterations, pct_start=0.2, cycle_momentum=False)
    forward, taught = torch.compile(model), None if teacher is None else torch.compile(teacher.to(memory_format=torch.channels_last))
    generator, inputs, started = torch.Generator().manual_seed(seed), normalised(images), time.monotonic()
    for epoch in range(epochs):
        total = torch.zeros(())
        for rows in torch.randperm(len(images), generator=generator)[: iterations * BATCH].split(BATCH):
            views = varied(inputs[rows], generator)
            with torch.autocast("cpu", torch.bfloat16):
                logits = forward(views)
            loss = F.cross_entropy(logits.float(), labels[rows])
            if taught is not None:
                loss = (loss + distillation(logits.float(), taught, views)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(f"{name} epoch {epoch} loss {total.item() / iterations:.3f} {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def distillation(logits: Tensor, teacher: Callable[[Tensor], Tensor], views: Tensor) -> Tensor:
    """Returns the divergence of the answers, logits [B, K], from the teacher's answers to the same views [B, 3, H, W]."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = teacher(views)
    found, wanted = (answers.float().div(TEMPERATURE).log_softmax(1) for answers in (logits, wanted))
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean") * TEMPERATURE**2


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of images [N, 3, H, W], uint8, that the model classifies correctly."""
    found = [model(normalised(part)).argmax(1) for part in images.split(500)]
    return float((torch.cat(found) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    images, labels = cifar10.load(args.root, "train")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else NAMES:
        teacher = load("resnet", args.out) if name == "convnext" else None
        model = train(name, images, labels, args.epochs or EPOCHS[name], teacher)
        half = {key: (value.half() if value.is_floating_point() else value).contiguous() for key, value in model.state_dict().items()}
        save_file(half, args.out / f"{name}.safetensors")
        validation = cifar10.load(args.root, "validation")
        print(f"{name}, validation: {accuracy(load(name, args.out), *validation):.4f}", flush=True)


if __name__ == "__main__":
    main()
