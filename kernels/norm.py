"""RMSNorm and LayerNorm, with an optional residual addition before them.

    h = x (+ residual);   rms: y = w · h / √(mean(h²) + ε);   layer: y = w · (h − mean h) / √(var h + ε) + b

Statistics are taken in fp32; RMSNorm rounds to the input's dtype before it multiplies by the weight, as
LLaMA's published code does (the order matters in bf16).

Zhang & Sennrich 2019, "Root Mean Square Layer Normalization"; Ba et al. 2016, "Layer Normalization".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.dispatch import on_triton, operator


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None):
    """Normalise the last dimension by its root mean square.

    x (..., C), weight (C,), residual like x. Returns y (..., C) in x's dtype, or (y, x + residual).
    """
    if on_triton(x, weight, residual):
        return _on_gpu(x, residual, weight, None, eps)
    h = x if residual is None else x + residual
    # fp32 inside, rounded to h's dtype, and only then multiplied by the weight
    eager = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if eager and h.dim() == 1 and h.is_cpu:  # one token: the same in fewer calls
        size = torch.linalg.vector_norm(h, dtype=torch.promote_types(h.dtype, torch.float32)).item()
        y = h / math.sqrt(size * size / len(h) + eps) * weight.to(h.dtype)
    elif _trains_eagerly(h, weight):
        y = _RMSNorm.apply(h, weight, eps)
    else:
        y = F.rms_norm(h, h.shape[-1:], eps=eps) * weight.to(h.dtype)
    return y if residual is None else (y, h)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
):
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift.

    x (..., C), weight and bias (C,), residual like x. Returns y (..., C) in x's dtype, or (y, x + residual).
    """
    if on_triton(x, weight, bias, residual):
        return _on_gpu(x, residual, weight, bias, eps)
    h = x if residual is None else x + residual
    if _trains_eagerly(h, weight, bias):
        y = _LayerNorm.apply(h, weight, bias, eps)
    else:
        y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps)  # fp32 inside
    return y if residual is None else (y, h)


# --- training on a CPU --------------------------------------------------------------------------------------
# Forward these are the functions above, bit for bit. PyTorch takes 3x as long for the backward pass of
# rms_norm (bf16, 2,048 x 512), and sums the gradients of layer_norm's bf16 weights in bf16: 5 % off there.
# A weight's gradient is rounded once to the dtype of h, as FSDP2 does that gathers weights in that dtype:
# so one process and many get the same bits.


def _trains_eagerly(*tensors: torch.Tensor) -> bool:
    eager = tensors[0].is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return eager and any(t.requires_grad for t in tensors)


class _RMSNorm(torch.autograd.Function):
    """y = w · x̂, x̂ = h·r, r = 1/√(mean(h²) + ε):   dw = Σ g·x̂,   dh = r·(g·w − x̂·mean(g·w·x̂))."""

    @staticmethod
    def forward(ctx, h, weight, eps):
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        r = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(h, weight, r)
        return (wide * r).to(h.dtype) * weight.to(h.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        h, weight, r = ctx.saved_tensors
        normed, g = (h * r).flatten(0, -2), g.to(r.dtype).flatten(0, -2)  # (N, C)
        product, w = g * normed, weight.to(h.dtype).to(r.dtype)
        mean = torch.mv(product, w)[:, None] / h.shape[-1]
        dh = (g * w).addcmul_(normed, mean, value=-1).mul_(r.view(-1, 1))
        return dh.to(h.dtype).view_as(h), product.sum(0).to(h.dtype).to(weight.dtype), None


class _LayerNorm(torch.autograd.Function):
    """PyTorch's own; only dw = Σ g·x̂ and db = Σ g are summed here, in fp32."""

    @staticmethod
    def forward(ctx, h, weight, bias, eps):
        wide = torch.promote_types(h.dtype, torch.float32)  # bf16 parameters would round mean and r to bf16
        w, b = (t.to(h.dtype).to(wide) for t in (weight, bias))
        y, mean, r = torch.native_layer_norm(h, h.shape[-1:], w, b, eps)
        ctx.save_for_backward(h, weight, bias, mean, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        h, weight, bias, mean, r = ctx.saved_tensors
        w = weight.to(h.dtype).to(r.dtype)
        only_h = (True, False, False)
        dh = torch.ops.aten.native_layer_norm_backward(g, h, h.shape[-1:], mean, r, w, None, only_h)[0]
        g = g.to(r.dtype).flatten(0, -2)  # (N, C)
        dw = ((h - mean) * r).flatten(0, -2).mul_(g).sum(0)
        return dh, dw.to(h.dtype).to(weight.dtype), g.sum(0).to(h.dtype).to(bias.dtype), None


# --- on a GPU -----------------------------------------------------------------------------------------------
# The kernels of _norm_triton.py as operators of torch: autograd, torch.compile, checkpointing and FSDP see
# one opaque call each for forward and backward. A bias makes it LayerNorm.


def _on_gpu(x, residual, weight, bias, eps):
    if residual is None:
        return _norm(x, weight, bias, eps)[0]
    return _add_norm(x, residual, weight, bias, eps)[:2]


@operator("baizhi::norm")
def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels._norm_triton import norm_forward

    y, _, stats = norm_forward(x, None, weight, bias, eps)
    return y, stats


@operator("baizhi::add_norm")
def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from kernels._norm_triton import norm_forward

    return norm_forward(x, residual, weight, bias, eps)


@operator("baizhi::norm_backward")
def _norm_backward(
    g: torch.Tensor, g_sum: torch.Tensor | None, h: torch.Tensor, weight: torch.Tensor, stats: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels._norm_triton import norm_backward

    return norm_backward(g, g_sum, h, weight, stats)


@_norm.register_fake
def _(x, weight, bias, eps):
    N = math.prod(x.shape[:-1])
    stats = x.new_empty((1 if bias is None else 2, N), dtype=torch.float32)
    return x.new_empty(x.shape), stats


@_add_norm.register_fake
def _(x, residual, weight, bias, eps):
    h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    stats = x.new_empty((1 if bias is None else 2, math.prod(x.shape[:-1])), dtype=torch.float32)
    return torch.empty_like(h), h, stats


@_norm_backward.register_fake
def _(g, g_sum, h, weight, stats):
    return h.new_empty(h.shape), h.new_empty((stats.shape[0], h.shape[-1]))


def _keep(ctx, inputs, output):
    *added, weight, bias, _ = inputs  # x, and the residual if there is one
    *y_and_h, stats = output
    ctx.save_for_backward(y_and_h[1] if len(added) == 2 else added[0], weight, stats)
    ctx.dtypes = [t.dtype for t in added], None if bias is None else bias.dtype
    ctx.mark_non_differentiable(stats)


def _pull(ctx, g, *rest):
    h, weight, stats = ctx.saved_tensors
    dtypes, bias = ctx.dtypes
    g_sum = rest[0] if len(dtypes) == 2 else None
    dh, dw = _norm_backward(g, g_sum, h, weight, stats)
    dbias = None if bias is None else dw[1].to(bias)
    return *(dh.to(dtype) for dtype in dtypes), dw[0].to(weight.dtype), dbias, None


_norm.register_autograd(_pull, setup_context=_keep)
_add_norm.register_autograd(_pull, setup_context=_keep)
