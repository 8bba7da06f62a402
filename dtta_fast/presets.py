"""Preset configurations."""

from __future__ import annotations

from dtta_fast.config import AdaptConfig

# The paper's single-sample recipe: 5 updates on 180 fresh pairs each, uniform timesteps, adapting both classifier and DiT.
PAPER = AdaptConfig(
    steps=5,
    pairs=180,
    timesteps="uniform",
    denoiser_parameters="all",
    optimizer="sgd",
    lr=5e-3,
    denoiser_lr=5e-3,
    momentum=0.9,
)

# Chosen on the validation splits of digits-C and Fashion-C (bench/quality/choose.py, docs/log.md). Works best with a calibration.
FAST = AdaptConfig(
    steps=3,
    pairs=4,
    timesteps="calibrated",
    logit_scale=6.0,
    match="both",
    precheck="answer",
    optimizer="adam",
    lr=5e-4,
    guard=24,
    guard_threshold=3.0,
)

# Trains nothing: ranks the three likeliest classes by the classifier's probabilities and the denoising losses together. Chosen like FAST.
RANK = AdaptConfig(
    method="posterior",
    steps=1,
    pairs=24,
    top_k=3,
    timesteps="calibrated",
    match="both",
    precheck="answer",
)

# For streams: one set of weights, one update per batch, no guard. DUSA's objective with a frozen denoiser, so that no pass goes backward
# through it. Chosen on the validation splits of digits-C, Fashion-C and CIFAR-10; works best with a calibration of the denoiser.
ONLINE = AdaptConfig(
    objective="noise_mix",
    steps=1,
    pairs=1,
    timesteps="calibrated",
    top_k=4,
    drawn_classes=2,
    logit_scale=1.0,
    match="both",
    optimizer="adam",
    lr=1e-5,
    mode="online",
)

# For maps: segmentation and depth. Chosen on the validation split of the generated scenes (bench/quality/dense.py, docs/log.md).
DENSE = AdaptConfig(
    steps=3,
    pairs=4,
    timesteps="stratified",
    timestep_range=(200, 500),
    match="both",
    precheck="statistics",
    optimizer="adam",
    lr=3e-5,
    guard=9,
    guard_threshold=4.0,
)

# Noise mixing over the top 4 classes and 2 sampled ones at a single timestep, adapting model and denoiser (DUSA, NeurIPS 2024). The
# timestep, scale and learning rates are for the digits zoo, chosen like FAST; the paper uses t = 100 and 1e-5 for a DiT-XL/2.
DUSA = AdaptConfig(
    objective="noise_mix",
    steps=1,
    pairs=1,
    timestep_range=(650, 651),
    top_k=4,
    drawn_classes=2,
    logit_scale=1.0,
    denoiser_parameters="all",
    optimizer="adam",
    lr=1e-4,
    denoiser_lr=1e-5,
    mode="online",
)

ALL = {"PAPER": PAPER, "FAST": FAST, "RANK": RANK, "ONLINE": ONLINE, "DENSE": DENSE, "DUSA": DUSA}


def get(name: str) -> AdaptConfig:
    """Returns the preset with that name (case-insensitive).

    Raises:
        ValueError: there is no such preset.
    """
    if str(name).upper() not in ALL:
        raise ValueError(f"preset is {name!r}; choose one of {', '.join(ALL)}")
    return ALL[name.upper()]
