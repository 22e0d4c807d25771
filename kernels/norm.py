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


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None):
    """Normalise the last dimension by its root mean square.

    x (..., C), weight (C,), residual like x. Returns y (..., C) in x's dtype, or (y, x + residual).
    """
    h = x if residual is None else x + residual
    # fp32 inside, rounded to h's dtype, and only then multiplied by the weight
    if h.dim() == 1 and h.is_cpu and not torch.is_grad_enabled():  # one token: the same in fewer calls
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        y = (wide / math.sqrt(torch.dot(wide, wide).item() / len(h) + eps)).to(h.dtype) * weight.to(h.dtype)
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
    h = x if residual is None else x + residual
    y = F.layer_norm(h, h.shape[-1:], weight.to(h.dtype), bias.to(h.dtype), eps)  # fp32 inside
    return y if residual is None else (y, h)
