"""Gated linear unit: one half of the MLP decides how much of the other half passes.

    y = act(gate) · up,   act = silu (SwiGLU: LLaMA, XVERSE, XuanYuan) or gelu (GeGLU)

Shazeer 2020, "GLU Variants Improve Transformer".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.dispatch import on_triton, operator

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def glu(gate: torch.Tensor, up: torch.Tensor, act: str = "silu") -> torch.Tensor:
    """Multiply `up` by the activated `gate`; both (..., F), the result too, in their dtype."""
    if on_triton(gate, up):
        return _glu(gate, up, act)
    return ACTIVATIONS[act](gate) * up


# --- on a GPU: the kernels of _glu_triton.py as operators of torch ------------------------------------------


@operator("baizhi::glu")
def _glu(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    from kernels._glu_triton import glu_forward

    return glu_forward(gate, up, act)


@operator("baizhi::glu_backward")
def _glu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels._glu_triton import glu_backward

    return glu_backward(dy, gate, up, act)


@_glu.register_fake
def _(gate, up, act):
    return gate.new_empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype))


@_glu_backward.register_fake
def _(dy, gate, up, act):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _keep(ctx, inputs, output):
    gate, up, ctx.act = inputs
    ctx.save_for_backward(gate, up)


def _pull(ctx, dy):
    return *_glu_backward(dy, *ctx.saved_tensors, ctx.act), None


_glu.register_autograd(_pull, setup_context=_keep)
