"""The ops on a GPU: the functions of reference.py for contiguous float32, bfloat16 and float16 tensors."""

from dtta_fast.kernels.triton.mix import mix_condition, mix_condition_backward
from dtta_fast.kernels.triton.noise import add_noise, denoising_loss
from dtta_fast.kernels.triton.norm import gated_norm, gated_norm_backward
from dtta_fast.kernels.triton.timesteps import draw_timesteps

__all__ = ["add_noise", "denoising_loss", "draw_timesteps", "gated_norm", "gated_norm_backward", "mix_condition", "mix_condition_backward"]
