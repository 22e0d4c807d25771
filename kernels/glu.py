"""Gated linear unit: one half of the MLP decides how much of the other half passes.

    y = act(gate) · up,   act = silu (SwiGLU: LLaMA, XVERSE, XuanYuan) or gelu (GeGLU)

Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def glu(gate: torch.Tensor, up: torch.Tensor, act: str = "silu") -> torch.Tensor:
    """Multiply `up` by the activated `gate`; both (..., F), the result too, in their dtype."""
    return ACTIVATIONS[act](gate) * up
