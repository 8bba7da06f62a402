"""The DiT network (Peebles & Xie 2023, arXiv 2212.09748) with a soft class condition.

Parameter names match the original checkpoints, so their state dicts load unchanged.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtta_fast.kernels import gated_norm
from dtta_fast.runtime.compiling import is_tracing


def timestep_embedding(time: Tensor, dim: int = 256) -> Tensor:
    """Sinusoidal time embedding: [N] -> [N, dim], cosines first.

    Frequencies are 10000^(-i / (dim/2)), as in the original DiT; diffusers' port divides by (dim/2 - 1).
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def position_embedding(size: int, dim: int, device: torch.device) -> Tensor:
    """Fixed 2-D sinusoidal embedding of a size x size grid: [size², dim]; the half for the columns comes first, as in the original."""
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim / 4))
    angles = torch.arange(size, dtype=torch.float64, device=device)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [size, dim/2]
    columns = axis[None].expand(size, size, -1)
    rows = axis[:, None].expand(size, size, -1)
    return torch.cat([columns, rows], dim=2).reshape(size * size, dim).float()


def _gelu_tanh(x: Tensor) -> Tensor:
    """F.gelu(x, approximate="tanh"). Compiled CPU code uses a sigmoid instead, because the generated tanh takes twice as long."""
    if is_tracing() and x.device.type == "cpu":
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x))
    return F.gelu(x, approximate="tanh")


class _Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [N, tokens, D]
        # unbound before the heads are moved: the backward then joins the three gradients in qkv's own layout, with one copy instead of two
        q, k, v = (part.transpose(1, 2) for part in self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2))
        if x.device.type == "cpu" and x.dtype.itemsize == 2 and torch.is_grad_enabled():
            # in bfloat16, the backward of torch's fused CPU kernel runs at a tenth of the speed of matrix products
            attended = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(_gelu_tanh(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.attn = _Attention(hidden_size, num_heads)
        self.mlp = _Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, normed: Tensor, middle: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Maps tokens [N, T, D], as they are and normalised, to the same of the next block.

        middle, last: gate, shift and scale [N, 3·D] for the sums after attention and after the MLP; the latter's shift and scale are the
        next block's.
        """
        x, normed = gated_norm(x, self.attn(normed), middle)
        return gated_norm(x, self.mlp(normed), last)


class _FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, normed: Tensor) -> Tensor:
        output: Tensor = self.linear(normed)
        return output


class _TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequency_size: int = 256) -> None:
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, time: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(time, self.frequency_size).to(next(self.mlp.parameters()).dtype))


class _LabelEmbedder(nn.Module):
    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)


class _PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # otherwise every later sum and normalisation is strided


class DiTNetwork(nn.Module):
    """A class-conditional diffusion transformer whose class condition is an embedding vector, not an index.

    Args:
        input_size: height and width of x_t, in latent or pixel cells.
        patch_size: number of cells that a token covers along each side; must divide input_size.
        in_channels: channels of x_t.
        hidden_size, depth, num_heads, mlp_ratio: the transformer's sizes.
        num_classes: number of classes in the label table.
        null_class: whether the table has one more row at the end, for the unconditional case.
        learn_sigma: whether the output has 2·in_channels channels, with the learned variance in the second half.

    Raises:
        ValueError: the sizes are inconsistent.
    """

    pos_embed: Tensor
    joined_modulation: tuple[Tensor, Tensor] | None = None  # weight and bias of all adaLN_modulation layers in one, if they are stored so

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        named = ("input_size", input_size), ("patch_size", patch_size), ("in_channels", in_channels), ("hidden_size", hidden_size)
        for name, value in (*named, ("depth", depth), ("num_heads", num_heads), ("num_classes", num_classes)):
            if value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if input_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide input_size {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} has to be divisible by 4 and by num_heads {num_heads}")
        self.sizes = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "num_classes": num_classes,
            "null_class": null_class,
            "learn_sigma": learn_sigma,
        }
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = _PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = _TimestepEmbedder(hidden_size)
        self.y_embedder = _LabelEmbedder(num_classes + null_class, hidden_size)
        self.register_buffer(
            "pos_embed", position_embedding(input_size // patch_size, hidden_size, self.x_embedder.proj.weight.device)[None]
        )
        self.blocks = nn.ModuleList([_Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        for weight in (self.y_embedder.embedding_table.weight, *(p for p in self.t_embedder.parameters() if p.ndim == 2)):
            nn.init.normal_(weight, std=0.02)
        # adaLN-Zero: every block starts as the identity.
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, time: Tensor, label: Tensor, checkpointing: bool = False) -> Tensor:
        """Maps x [N, C, H, W], time [N] and label embedding [N, D] to [N, out_channels, H, W].

        With checkpointing, the blocks' activations are not stored but recomputed in the backward pass.
        """
        tokens = self.x_embedder(x) + self.pos_embed.to(x.dtype)
        first, *others = self._modulations(F.silu(self.t_embedder(time) + label.to(x.dtype)))
        tokens, normed = gated_norm(tokens, None, first)
        for block, middle, last in zip(self.blocks, others[::2], others[1::2], strict=True):
            given = (tokens, normed, middle, last)
            if checkpointing:  # no random numbers are drawn, and a CUDA graph could not save their generator's state
                tokens, normed = checkpoint(block, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens, normed = block(*given)
        tokens = self.final_layer(normed)
        side, p = self.input_size // self.patch_size, self.patch_size
        grid = tokens.reshape(-1, side, side, p, p, self.out_channels)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, self.input_size, self.input_size)

    def _modulations(self, activated: Tensor) -> list[Tensor]:
        """Returns the modulation of every normalisation for conditions [N, D] after their SiLU, which all blocks share.

        The first has shift and scale [N, 2·D], the others the gate of the sum before it too, [N, 3·D].
        """
        if self.joined_modulation is not None:
            rows = F.linear(activated, *self.joined_modulation)
        else:
            rows = torch.cat([part.adaLN_modulation[1](activated) for part in (*self.blocks, self.final_layer)], dim=1)
        width = activated.shape[1]
        return list(rows.split([2 * width, *[3 * width] * (2 * len(self.blocks))], dim=1))
