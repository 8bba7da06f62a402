"""Named settings."""

from __future__ import annotations

from dtta_fast.config import AdaptConfig

# The paper's single-sample recipe: 5 updates on 180 fresh pairs each, uniform timesteps, classifier and DiT both adapting.
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

# Chosen on the validation split of digits-C by bench/choose_fast.py.
FAST = AdaptConfig(
    steps=5,
    pairs=4,
    timesteps="stratified",
    timestep_range=(450, 800),
    logit_scale=6.0,
    optimizer="adam",
    lr=5e-4,
    guard=16,
    guard_threshold=2.0,
)

ALL = {"PAPER": PAPER, "FAST": FAST}


def get(name: str) -> AdaptConfig:
    """The preset of that name, in any case.

    Raises:
        ValueError: there is none.
    """
    if str(name).upper() not in ALL:
        raise ValueError(f"preset is {name!r}; there are {', '.join(ALL)}")
    return ALL[name.upper()]
