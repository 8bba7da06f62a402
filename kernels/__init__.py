"""The engine's ops: noising, loss and condition mixing. See schema.py for their signatures."""

from dtta_fast.kernels.norm import gated_norm
from dtta_fast.kernels.pairs import Pairs
from dtta_fast.kernels.schema import add_noise, denoising_loss, denoising_loss_and_gradient, draw_timesteps, mix_condition

__all__ = ["Pairs", "add_noise", "denoising_loss", "denoising_loss_and_gradient", "draw_timesteps", "gated_norm", "mix_condition"]
