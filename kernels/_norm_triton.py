"""RMSNorm and LayerNorm on a GPU, fused with the residual addition before them.

Both are bound by memory: a row is read once, kept in registers, and written once. One program per row; a row
wider than one block is read again, once per pass, from the cache.

Backward (Xu et al. 2019, "Understanding and Improving Layer Normalization"), x̂ = (h − mean)·r, w the weight:

    dh = r · (g·w − mean(g·w) − x̂·mean(g·w·x̂)),   dw = Σ_rows g·x̂,   db = Σ_rows g    (RMS: no mean, no b)

dw and db are sums over all rows. Atomics would sum in another order each time, so a fixed number of programs
walks over the rows: program p takes rows p, p + P, p + 2P, … and keeps its own sums in fp32; torch adds
them up.

Shapes: N rows, C width, P programs of the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tables
from kernels.dispatch import as_matrix, processors


@triton.jit
def _load(start, cols, C):
    """Load columns [C_] of the row that begins at `start`, as fp32; zeros beyond C."""
    return tl.load(start + cols, mask=cols < C, other=0.0).to(tl.float32)


@triton.jit
def _added(x_row, residual_row, cols, C, dtype: tl.constexpr, ADD: tl.constexpr):
    """h [BLOCK] = x (+ residual), rounded as h is stored, in fp32."""
    h = _load(x_row, cols, C)  # [BLOCK]
    if ADD:
        h = (h + _load(residual_row, cols, C)).to(dtype).to(tl.float32)  # [BLOCK]
    return h


@triton.jit
def _scaled(h, mean, r, weight, bias, cols, C, dtype: tl.constexpr, LAYER: tl.constexpr):
    """y [BLOCK] from h [BLOCK]. Weights are rounded to h's dtype first: FSDP gathers them in it."""
    w = _load(weight, cols, C).to(dtype).to(tl.float32)  # [BLOCK]
    if LAYER:
        b = _load(bias, cols, C).to(dtype).to(tl.float32)  # [BLOCK]
        return ((h - mean) * r * w + b).to(dtype)
    normed = (h * r).to(dtype)  # [BLOCK] rounded before the weight, as LLaMA's published code does
    return (normed.to(tl.float32) * w).to(dtype)


@triton.jit
def _forward(
    x,  # (N, C), rows x_stride apart
    residual,  # (N, C) or None
    weight,  # (C,)
    bias,  # (C,) or None
    y,  # (N, C)
    h,  # (N, C) = x + residual, or None
    stats,  # (1 or 2, N) fp32: r of every row; for LayerNorm its mean, too
    eps: tl.float32,
    N,
    C,
    x_stride,
    residual_stride,
    LAYER: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,  # a row fits into one block
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row·stride may pass 2³¹
    x_row, y_row = x + row * x_stride, y + row * C
    residual_row = residual + row * residual_stride if ADD else x_row
    h_row = h + row * C if ADD else x_row
    dtype: tl.constexpr = y.dtype.element_ty
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    mean = 0.0
    if WHOLE:
        v = _added(x_row, residual_row, cols, C, dtype, ADD)  # [BLOCK]
        if ADD:
            tl.store(h_row + cols, v.to(dtype), mask=cols < C)
        if LAYER:
            mean = tl.sum(v, 0) / C
        far = tl.where(cols < C, v - mean, 0.0)  # [BLOCK]
        r = tl.rsqrt(tl.sum(far * far, 0) / C + eps)
        tl.store(y_row + cols, _scaled(v, mean, r, weight, bias, cols, C, dtype, LAYER), mask=cols < C)
    else:
        # x + residual is added again in each pass: h, which other threads wrote, would need a barrier
        total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
        for first in range(0, C, BLOCK):  # pass 1: h, and its mean
            at = first + cols  # [BLOCK]
            v = _added(x_row, residual_row, at, C, dtype, ADD)  # [BLOCK]
            if ADD:
                tl.store(h_row + at, v.to(dtype), mask=at < C)
            total += v
        if LAYER:
            mean = tl.sum(total, 0) / C
        total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
        for first in range(0, C, BLOCK):  # pass 2: mean square distance to the mean
            at = first + cols  # [BLOCK]
            far = tl.where(at < C, _added(x_row, residual_row, at, C, dtype, ADD) - mean, 0.0)  # [BLOCK]
            total += far * far
        r = tl.rsqrt(tl.sum(total, 0) / C + eps)
        for first in range(0, C, BLOCK):  # pass 3: y
            at = first + cols  # [BLOCK]
            v = _added(x_row, residual_row, at, C, dtype, ADD)  # [BLOCK]
            tl.store(y_row + at, _scaled(v, mean, r, weight, bias, at, C, dtype, LAYER), mask=at < C)
    tl.store(stats + row, r)
    if LAYER:
        tl.store(stats + N + row, mean)


@triton.jit
def _stats(stats, row, N, LAYER: tl.constexpr):
    """(1/√(variance + ε), mean) of a row; without mean for RMSNorm."""
    mean = 0.0
    if LAYER:
        mean = tl.load(stats + N + row)
    return tl.load(stats + row), mean


@triton.jit
def _backward(
    g,  # (N, C) gradient of y, rows g_stride apart
    g_sum,  # (N, C) gradient that reaches h = x + residual past the norm, or None
    h,  # (N, C), rows h_stride apart
    weight,  # (C,)
    stats,  # (1 or 2, N) fp32
    dh,  # (N, C)
    partial,  # (P, 1 or 2, C) fp32: every program's sums for dw, and for db
    N,
    C,
    g_stride,
    g_sum_stride,
    h_stride,
    LAYER: tl.constexpr,
    ADD: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p, P = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = dh.dtype.element_ty
    cols = tl.arange(0, BLOCK)  # [BLOCK]
    dw = partial + p.to(tl.int64) * C * (2 if LAYER else 1)
    if WHOLE:
        w = _load(weight, cols, C).to(dtype).to(tl.float32)  # [BLOCK]
        dw_sum = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
        db_sum = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
        for i in range(p, N, P):
            row = tl.cast(i, tl.int64)
            r, mean = _stats(stats, row, N, LAYER)
            gy = _load(g + row * g_stride, cols, C)  # [BLOCK]
            normed = (_load(h + row * h_stride, cols, C) - mean) * r  # [BLOCK]; beyond C it meets gy = 0
            dw_sum += gy * normed
            db_sum += gy
            gw = gy * w  # [BLOCK]
            out = gw - normed * (tl.sum(gw * normed, 0) / C)  # [BLOCK]
            if LAYER:
                out -= tl.sum(gw, 0) / C
            out *= r
            if ADD:
                out += _load(g_sum + row * g_sum_stride, cols, C)
            tl.store(dh + row * C + cols, out.to(dtype), mask=cols < C)
        tl.store(dw + cols, dw_sum, mask=cols < C)
        if LAYER:
            tl.store(dw + C + cols, db_sum, mask=cols < C)
    else:
        for first in range(0, C, BLOCK):  # dw and db, one block of columns after the other
            at = first + cols  # [BLOCK]
            dw_sum = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
            db_sum = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
            for i in range(p, N, P):
                row = tl.cast(i, tl.int64)
                r, mean = _stats(stats, row, N, LAYER)
                gy = _load(g + row * g_stride, at, C)  # [BLOCK]
                dw_sum += gy * ((_load(h + row * h_stride, at, C) - mean) * r)
                db_sum += gy
            tl.store(dw + at, dw_sum, mask=at < C)
            if LAYER:
                tl.store(dw + C + at, db_sum, mask=at < C)
        for i in range(p, N, P):  # dh, one row after the other
            row = tl.cast(i, tl.int64)
            r, mean = _stats(stats, row, N, LAYER)
            gw_sum = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
            product = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
            for first in range(0, C, BLOCK):  # pass 1: the two means
                at = first + cols  # [BLOCK]
                w = _load(weight, at, C).to(dtype).to(tl.float32)  # [BLOCK]
                gw = _load(g + row * g_stride, at, C) * w  # [BLOCK]
                gw_sum += gw
                product += gw * ((_load(h + row * h_stride, at, C) - mean) * r)
            gw_mean = tl.sum(gw_sum, 0) / C if LAYER else 0.0
            product_mean = tl.sum(product, 0) / C
            for first in range(0, C, BLOCK):  # pass 2: dh
                at = first + cols  # [BLOCK]
                w = _load(weight, at, C).to(dtype).to(tl.float32)  # [BLOCK]
                gw = _load(g + row * g_stride, at, C) * w  # [BLOCK]
                normed = (_load(h + row * h_stride, at, C) - mean) * r  # [BLOCK]
                out = r * (gw - gw_mean - normed * product_mean)  # [BLOCK]
                if ADD:
                    out += _load(g_sum + row * g_sum_stride, at, C)
                tl.store(dh + row * C + at, out.to(dtype), mask=at < C)


def _blocks(op: str, C: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """The launch of the table; a row that is narrower than its block has a smaller one, and fewer warps."""
    made = dict(tables.launch(op, C, dtype))
    BLOCK = made["BLOCK"] = min(made["BLOCK"], triton.next_power_of_2(C))
    made["num_warps"] = min(made["num_warps"], max(1, BLOCK // 512))  # 16 columns for each thread, at least
    return {**made, "WHOLE": C <= BLOCK}


def norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Normalise the rows of x (..., C) + residual; with a bias it is LayerNorm, without RMSNorm.

    Returns y, h = x + residual (or None) and the statistics (1 or 2, N) that the backward pass needs.
    """
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    h = None if residual is None else torch.empty_like(y)
    flat, other = as_matrix(x), None if residual is None else as_matrix(residual)
    N, C = flat.shape
    stats = torch.empty(1 if bias is None else 2, N, dtype=torch.float32, device=x.device)
    if N:
        _forward[(N,)](
            flat,
            other,
            weight,
            bias,
            y,
            h,
            stats,
            eps,
            N,
            C,
            flat.stride(0),
            0 if other is None else other.stride(0),
            LAYER=bias is not None,
            ADD=residual is not None,
            **_blocks("norm_forward", C, dtype),
        )
    return y, h, stats


def norm_backward(
    g: torch.Tensor,
    g_sum: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the gradients of h (..., C), and of weight (and bias): (1 or 2, C), in h's dtype."""
    flat, rows = as_matrix(g), as_matrix(h)
    other = None if g_sum is None else as_matrix(g_sum)
    (N, C), parameters = rows.shape, len(stats)
    P = min(N, 2 * processors(h))  # two programs share a processor: one computes while the other loads
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    partial = torch.empty(P, parameters, C, dtype=torch.float32, device=h.device)
    if N:
        _backward[(P,)](
            flat,
            other,
            rows,
            weight,
            stats,
            dh,
            partial,
            N,
            C,
            flat.stride(0),
            0 if other is None else other.stride(0),
            rows.stride(0),
            LAYER=parameters == 2,
            ADD=g_sum is not None,
            **_blocks("norm_backward", C, h.dtype),
        )
    return dh, partial.sum(0).to(h.dtype)  # rounded once to h's dtype, as the twin does
