"""gated_norm computes what lies between the products of a DiT block: one kernel on a GPU, plain operators on a CPU and in compiled code.

The op is registered without torch.library.custom_op, whose calls take 12 microseconds longer: a DiT-XL/2 makes 57 of them each way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtta_fast.kernels import backends, reference

_LIBRARY = torch.library.Library("dtta_fast", "FRAGMENT")
_LIBRARY.define("gated_norm(Tensor x, Tensor? branch, Tensor modulation, float eps, bool statistics) -> (Tensor, Tensor, Tensor, Tensor)")
_LIBRARY.define(
    "gated_norm_backward(Tensor? to_total, Tensor to_normed, Tensor total, Tensor? branch, Tensor modulation, Tensor mean, Tensor rstd, "
    "bool with_x) -> (Tensor, Tensor, Tensor)"
)


def _forward(x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float, statistics: bool) -> tuple[Tensor, ...]:
    from dtta_fast.kernels.triton import launchers

    total, *others = launchers.gated_norm(x, branch, modulation, eps, statistics)
    return (x.new_empty(0) if branch is None else total, *(x.new_empty(0) if found is None else found for found in others))


def _fake_forward(x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float, statistics: bool) -> tuple[Tensor, ...]:
    means = [x.new_empty(x.shape[:2] if statistics else 0, dtype=torch.float32) for _ in range(2)]
    return x.new_empty(0 if branch is None else x.shape), x.new_empty(x.shape), *means


def _backward(*given: Any) -> tuple[Tensor, ...]:
    from dtta_fast.kernels.triton import launchers

    return tuple(given[1].new_empty(0) if found is None else found for found in launchers.gated_norm_backward(*given))


def _fake_backward(
    to_total: Tensor | None,
    to_normed: Tensor,
    total: Tensor,
    branch: Tensor | None,
    modulation: Tensor,
    mean: Tensor,
    rstd: Tensor,
    with_x: bool,
) -> tuple[Tensor, ...]:
    to_x, to_branch = total.new_empty(total.shape if with_x else 0), total.new_empty(0 if branch is None else total.shape)
    return to_x, to_branch, modulation.new_empty(modulation.shape)


for _name, _run, _fake in (("gated_norm", _forward, _fake_forward), ("gated_norm_backward", _backward, _fake_backward)):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dtta_fast::{_name}", _fake, lib=_LIBRARY)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, normed, mean, rstd = torch.ops.dtta_fast.gated_norm(x, branch, modulation, eps, True)
        ctx.save_for_backward(x if branch is None else total, branch, modulation, mean, rstd)
        ctx.set_materialize_grads(False)
        if branch is None:
            total = x.view_as(x)
            if not ctx.needs_input_grad[0]:
                ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_total: Tensor | None, to_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, branch, modulation, mean, rstd = ctx.saved_tensors
        if to_normed is None:  # only the sum was used
            to_normed = torch.zeros_like(total)
        given = [None if slope is None else slope.contiguous() for slope in (to_total, to_normed)]
        wanted = ctx.needs_input_grad[0]
        found = torch.ops.dtta_fast.gated_norm_backward(*given, total, branch, modulation, mean, rstd, wanted)
        return found[0] if wanted else None, None if branch is None else found[1], found[2], None


class _Unbatched(torch.autograd.Function):
    """Runs the B calls that vmap has batched as one call with B · N rows.

    The tensors are unwrapped first, so autograd records the plain call, and backward() below is never called.
    """

    @staticmethod
    def forward(x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return gated_norm(x, branch, modulation, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Saves nothing."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("gated_norm was differentiated inside torch.vmap")

    @staticmethod
    def vmap(info: Any, in_dims: Any, *given: Any) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
        *tensors, eps = given
        rows = [
            None if tensor is None else (tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0))
            for tensor, dim in zip(tensors, in_dims, strict=False)
        ]
        flat: list[Any] = [None if tensor is None else tensor.flatten(0, 1) for tensor in rows]
        found = gated_norm(flat[0], flat[1], flat[2], eps)
        return tuple(tensor.unflatten(0, (info.batch_size, -1)) for tensor in found), (0, 0)


def _check(x: Tensor, branch: Tensor | None, modulation: Tensor) -> None:
    if x.ndim != 3 or x.numel() == 0 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}; give a non-empty, floating-point [N, T, D]")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch has shape {tuple(branch.shape)}; give that of x, {tuple(x.shape)}")
    expected = (x.shape[0], (2 if branch is None else 3) * x.shape[2])
    if modulation.shape != expected:
        raise ValueError(f"modulation has shape {tuple(modulation.shape)}; give {expected}")
    for name, value in (("branch", branch), ("modulation", modulation)):
        if value is not None and (value.device != x.device or not value.is_floating_point()):
            raise ValueError(f"{name} is {value.dtype} on {value.device}; give a floating-point one on that of x, {x.device}")


def gated_norm(x: Tensor, branch: Tensor | None, modulation: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Adds a block's branch to the tokens and normalises the sum: total = x + gate · branch and LN(total) · (1 + scale) + shift.

    Args:
        x: tokens [N, T, D].
        branch: what the branch computed, [N, T, D]; None adds nothing.
        modulation: gate, shift and scale, [N, 3·D]; without a branch shift and scale, [N, 2·D].
        eps: what LN, which has no weights of its own, adds to the variance.

    Tensors of several types are computed by plain operators, which promote them.

    Returns:
        total and the normalised tokens, both [N, T, D]. Differentiable once on a GPU, with respect to all three tensors.

    Raises:
        ValueError: a shape or a device does not fit, or a tensor is not floating-point.
    """
    _check(x, branch, modulation)
    given = (x, modulation) if branch is None else (x, branch, modulation)
    traced = torch.compiler.is_compiling()  # the compiler fuses plain operators, and knows nothing of a kernel's insides
    if traced or x.device.type == "cpu" or any(tensor.dtype != x.dtype for tensor in given):  # several types: under torch.autocast
        return reference.gated_norm(x, branch, modulation, eps)
    if any(torch._C._functorch.is_batchedtensor(tensor) for tensor in given):
        unwrapped: tuple[Tensor, Tensor] = _Unbatched.apply(x, branch, modulation, eps)
        return unwrapped
    if backends.choose(x.dtype, *given) is reference:
        return reference.gated_norm(x, branch, modulation, eps)
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    if modulation.stride(1) != 1:
        modulation = modulation.contiguous()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        found: tuple[Tensor, Tensor] = _GatedNorm.apply(x, branch, modulation, eps)
        return found
    total, normed, *_ = torch.ops.dtta_fast.gated_norm(x, branch, modulation, eps, False)
    return (x if branch is None else total), normed
