"""The engine's ops: noising, loss and condition mixing. See schema.py for their signatures."""

from dtta_fast.kernels.schema import add_noise, denoising_loss, mix_condition

__all__ = ["add_noise", "denoising_loss", "mix_condition"]
