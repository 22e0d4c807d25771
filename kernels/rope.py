"""Rotary position embedding: turn pairs of coordinates of q and k by an angle that grows with the position.

    (a, b) → (a·cos θ − b·sin θ,  b·cos θ + a·sin θ),   θ = position · inv_freq[i]

Coordinate i is paired with i + R/2 (the "half split" of LLaMA-HF, GPT-NeoX and Phi) inside the first R
dimensions; the D − R others pass through (Phi rotates 32 of 80).

Angles are fp32: bf16 has only 897 distinct values between 0 and 8,191.  Su et al. 2021, "RoFormer".
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from kernels.dispatch import on_triton, operator


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of every angle, once per forward pass for all layers.

    positions (B, T) integer, inv_freq (R/2,) fp32. Returns two (B, 1, T, R) fp32 tensors, ready to multiply:
    every angle stands twice, for a and for b, and the sines of the first half are negative.
    """
    angles = (positions[..., None].to(inv_freq.dtype) * inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of queries or keys, or of both stacked along the heads.

    x (B, H, T, D); cos and sin (B or 1, 1, T, R) fp32, from rope_table. Returns (B, H, T, D) in x's dtype.
    """
    if on_triton(x, cos, sin):
        return _on_gpu(x, None, cos, sin, False)[0]
    if x.is_cpu and torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _Rope.apply(x, cos, sin)
    return _turn(x, cos, sin)


def rope_pair(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries (B, H, T, D) and keys (B, K, T, D) as `rope` does; on a GPU in one launch."""
    if on_triton(q, k, cos, sin):
        return _on_gpu(q, k, cos, sin, False)
    return rope(q, cos, sin), rope(k, cos, sin)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    R = cos.shape[-1]
    wide = torch.promote_types(x.dtype, cos.dtype)  # fp32, or fp64
    part = (x if x.shape[-1] == R else x[..., :R]).to(wide, copy=True)
    other = part.roll(R // 2, -1)  # (b, a) beside (a, b)
    turned = part.mul_(cos).addcmul_(other, sin).to(x.dtype)
    return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), -1)


class _Rope(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: autograd, step by step, takes twice as long.

    Heads are turned as projections leave them, in (B, T, H, D): what is contiguous in memory is fast.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)  # (B or 1, T, 1, R)
        ctx.save_for_backward(cos, sin)
        return _turn(x.transpose(1, 2), cos, sin).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad.transpose(1, 2), cos, -sin).transpose(1, 2), None, None


# --- on a GPU: the kernel of _rope_triton.py as an operator of torch ----------------------------------------


@operator("baizhi::rope")
def _on_gpu(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, back: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator cannot return None: without k the second result is empty."""
    from kernels._rope_triton import rope

    return rope(q, k, cos, sin, back)


@_on_gpu.register_fake
def _(q, k, cos, sin, back):
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _keep(ctx, inputs, output):
    _, k, cos, sin, ctx.back = inputs
    ctx.pair = k is not None
    ctx.save_for_backward(cos, sin)


def _pull(ctx, dq, dk):
    dq, dk = _on_gpu(dq, dk if ctx.pair else None, *ctx.saved_tensors, not ctx.back)
    return dq, dk if ctx.pair else None, None, None, None


_on_gpu.register_autograd(_pull, setup_context=_keep)
