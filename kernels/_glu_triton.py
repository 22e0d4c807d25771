"""The gated unit on a GPU: y = act(gate) · up, and its gradients; backward computes act again.

Bound by memory: every number is read once and written once. Forward keeps nothing but its inputs. Rows may be
halves of one wider matrix: a program takes one block of columns of one row.

    silu       g·σ(g)                          silu' = σ + g·σ·(1 − σ)
    gelu       g·Φ(g), Φ(g) = (1 + erf(g/√2))/2   gelu' = Φ + g·exp(−g²/2)/√(2π)
    gelu_tanh  g·(1 + tanh u)/2 = g·σ(2u), u = √(2/π)·(g + 0.044715·g³), since tanh u = 2·σ(2u) − 1

Shapes: N rows, F mlp width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tables
from kernels.dispatch import as_matrix


@triton.jit
def _gate(g, ACT: tl.constexpr):
    """act(g) and its derivative, elementwise in fp32; what is not used is not computed."""
    if ACT == "gelu":
        share = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)  # Φ(g)
        slope = share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACT == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))  # σ(2u)
        slope = share + g * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    else:
        share = tl.sigmoid(g)
        slope = share + g * share * (1.0 - share)
    return g * share, slope


@triton.jit
def _forward(gate, up, y, F, gate_stride, up_stride, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < F
    g = tl.load(gate + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    u = tl.load(up + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    a, _ = _gate(g, ACT)  # [BLOCK]
    tl.store(y + row * F + cols, (a * u).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    dy,  # (N, F)
    gate,  # (N, F)
    up,  # (N, F)
    dgate,  # (N, F)
    dup,  # (N, F)
    F,
    dy_stride,
    gate_stride,
    up_stride,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = cols < F
    d = tl.load(dy + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    g = tl.load(gate + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    u = tl.load(up + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    a, slope = _gate(g, ACT)  # [BLOCK]
    tl.store(dgate + row * F + cols, (d * u * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * F + cols, (d * a).to(dup.dtype.element_ty), mask=mask)


def _launch(N: int, F: int, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid, and the launch of the table with a block no wider than the row."""
    made = dict(tables.launch("glu", F, dtype))
    made["BLOCK"] = min(made["BLOCK"], triton.next_power_of_2(F))
    return (N, triton.cdiv(F, made["BLOCK"])), made


def glu_forward(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """act(gate) · up, all (..., F)."""
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    gate, up = as_matrix(gate), as_matrix(up)
    if y.numel():
        grid, made = _launch(*gate.shape, y.dtype)
        _forward[grid](gate, up, y, gate.shape[1], gate.stride(0), up.stride(0), ACT=act, **made)
    return y


def glu_backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, act: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up (..., F)."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    dy, gate, up = as_matrix(dy), as_matrix(gate), as_matrix(up)
    strides = dy.stride(0), gate.stride(0), up.stride(0)
    if dy.numel():
        grid, made = _launch(*gate.shape, dy.dtype)
        _backward[grid](dy, gate, up, dgate, dup, gate.shape[1], *strides, ACT=act, **made)
    return dgate, dup
