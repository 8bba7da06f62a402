"""Attention under vmap: the plain kernel's result and gradients, for whatever dimensions are batched."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtta_fast import AdaptConfig, Adapter
from dtta_fast.runtime.attention import vmappable_attention

IMAGES = 3
# shapes of queries, keys and values without the batched dimension, which are batched along which, the mask, and what else is asked for
CASES = [
    ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], (0, 0, 0, None), None, {}),
    ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], (1, None, 0, None), None, {}),
    ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], (None, 0, 0, None), None, {}),
    ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], (0, 0, 0, None), (5, 6), {}),
    ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], (0, 0, 0, None), (2, 1, 5, 6), {}),
    ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], (0, 0, 0, 0), (2, 1, 5, 6), {}),
    ([(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8)], (0, 0, 0, 1), (1, 6), {}),
    ([(4, 5, 8), (4, 5, 8), (4, 5, 8)], (0, 0, 0, None), None, {"is_causal": True}),
    ([(5, 8), (6, 8), (6, 8)], (0, 0, 0, None), None, {"scale": 0.3}),
    ([(2, 2, 4, 5, 8), (2, 2, 4, 6, 8), (2, 2, 4, 6, 8)], (0, 0, 2, None), None, {}),
    ([(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)], (0, 0, 0, None), None, {"enable_gqa": True}),
]


@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize(("shapes", "dims", "mask", "keywords"), CASES)
def test_it_is_the_plain_call_image_by_image(shapes, dims, mask, keywords, boolean):
    torch.manual_seed(0)

    def drawn(shape: tuple[int, ...], dim: int | None) -> Tensor:
        whole = list(shape)
        if dim is not None:
            whole.insert(dim, IMAGES)
        return torch.randn(whole, dtype=torch.float64)

    inputs = [drawn(shape, dim).requires_grad_() for shape, dim in zip(shapes, dims, strict=False)]
    given = None if mask is None else drawn(mask, dims[3])
    if given is not None and boolean:
        given = given > -1  # leaves something in every row

    def attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, m, **keywords)

    def of(tensor: Tensor | None, dim: int | None, image: int) -> Tensor | None:
        return tensor if tensor is None or dim is None else tensor.select(dim, image)

    with vmappable_attention():
        found = torch.vmap(attention, in_dims=dims)(*inputs, given)
    expected = torch.stack(
        [attention(*(of(tensor, dim, i) for tensor, dim in zip((*inputs, given), dims, strict=True))) for i in range(IMAGES)]
    )
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    for one, other in zip(torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(one, other)


class _OnlyForward(torch.autograd.Function):
    """Batches forward, and refuses a batch of gradients in its backward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        """Keeps nothing."""

    @staticmethod
    def vmap(info: object, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        return _OnlyForward.apply(x), in_dims[0]

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        if len(gradient) > 1:
            raise RuntimeError("no backward of a batch")
        return 2 * gradient


class _Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return _OnlyForward.apply(self.head(x.flatten(1)))


def test_images_run_one_by_one_where_vmap_has_no_backward(denoiser, images):
    """A forward that vmap can batch says nothing about the backward: the trial takes both."""
    torch.manual_seed(0)
    config = AdaptConfig(steps=2, pairs=4, lr=1e-2)
    model, denoiser, images = _Doubling(), denoiser.float(), images.float()
    session = Adapter(model, denoiser, config)
    with pytest.warns(UserWarning, match=r"one by one: vmap fails \(no backward of a batch\)"):
        together = session.adapt(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = session.adapt(images)
    assert torch.equal(together.outputs, again.outputs)
    alone = Adapter(model, denoiser, config).adapt(images[1:2], image_ids=torch.tensor([1]))
    torch.testing.assert_close(together.outputs[1:2], alone.outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (3, 2)])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_takes_maps_of_any_layout(size, affine):
    """A map of one pixel is contiguous with the strides of channels_last, so contiguous() alone does not settle its layout."""
    x = torch.randn(3, 2, *size, 8).movedim(-1, 2).requires_grad_()  # channels_last for each image
    weight = torch.randn(3, 8, requires_grad=True) if affine else None

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        with vmappable_attention():
            return F.group_norm(x, 4, weight=weight, bias=weight, eps=1e-3)

    leaves = [x] if weight is None else [x, weight]
    batched = torch.vmap(norm, in_dims=(0, None if weight is None else 0))(x, weight)
    alone = torch.stack([F.group_norm(x[i], 4, *([weight[i]] * 2 if affine else [None] * 2), 1e-3) for i in range(3)])
    torch.testing.assert_close(batched, alone)
    target = torch.randn_like(alone)
    for found, expected in zip(torch.autograd.grad(batched, leaves, target), torch.autograd.grad(alone, leaves, target), strict=True):
        torch.testing.assert_close(found, expected)
