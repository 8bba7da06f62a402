"""The engine's ops: draws, noising, loss and condition mixing (schema.py), and the normalisation of a DiT's tokens (norm.py)."""

from dtta_fast.kernels.norm import gated_norm
from dtta_fast.kernels.pairs import Pairs
from dtta_fast.kernels.schema import add_noise, denoising_loss, denoising_loss_and_gradient, draw_timesteps, mix_condition

__all__ = ["Pairs", "add_noise", "denoising_loss", "denoising_loss_and_gradient", "draw_timesteps", "gated_norm", "mix_condition"]
