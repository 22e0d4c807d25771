"""Rotary position embedding on a GPU, out of place, for any strides; the way back is the same kernel.

Bound by memory. Queries and keys come from a projection, so the heads of one token lie side by side: a
program takes one token and a few of its heads, and reads the token's angles once for all of them.

Shapes: B batch, H heads, T length, D head dim, R rotated dims, of which i and i + R/2 are one pair (a, b).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tables


@triton.jit
def _turn(
    x,  # (B, H, T, D), any strides
    cos,  # (B or 1, 1, T, R) fp32; a stride of 0 along the batch if it has only one
    sin,
    y,  # (B, H, T, D), any strides
    T,
    H,
    x_b,
    x_h,
    x_t,
    x_d,
    y_b,
    y_h,
    y_t,
    y_d,
    angle_b,
    angle_t,
    HALF: tl.constexpr,  # R/2
    REST: tl.constexpr,  # D - R
    BACK: tl.constexpr,  # turn the other way
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # HALF, rounded up to a power of two
    REST_WIDTH: tl.constexpr,  # the same of REST
):
    token = tl.program_id(0).to(tl.int64)
    b, t = token // T, token % T
    head = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)  # [HEADS]
    i = tl.arange(0, WIDTH)  # [WIDTH]
    mask = (head < H)[:, None] & (i < HALF)[None, :]  # [HEADS, WIDTH]

    # every angle stands twice in the tables: cos, cos and -sin, sin; the second half is enough
    angle = b * angle_b + t * angle_t + HALF + i  # [WIDTH]
    c = tl.load(cos + angle, mask=i < HALF, other=0.0)[None, :].to(tl.float32)  # [1, WIDTH]
    s = tl.load(sin + angle, mask=i < HALF, other=0.0)[None, :].to(tl.float32)  # [1, WIDTH]
    if BACK:
        s = -s

    x_at = x + b * x_b + t * x_t + head[:, None] * x_h  # [HEADS, 1]
    y_at = y + b * y_b + t * y_t + head[:, None] * y_h  # [HEADS, 1]
    low, high = i[None, :], i[None, :] + HALF  # [1, WIDTH]
    first = tl.load(x_at + low * x_d, mask=mask, other=0.0).to(tl.float32)  # [HEADS, WIDTH] a
    second = tl.load(x_at + high * x_d, mask=mask, other=0.0).to(tl.float32)  # [HEADS, WIDTH] b
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(y_at + low * y_d, (first * c - second * s).to(dtype), mask=mask)
    tl.store(y_at + high * y_d, (second * c + first * s).to(dtype), mask=mask)
    if REST > 0:
        j = tl.arange(0, REST_WIDTH)[None, :]  # [1, REST_WIDTH]
        kept = (head < H)[:, None] & (j < REST)  # [HEADS, REST_WIDTH]
        rest = tl.load(x_at + (j + 2 * HALF) * x_d, mask=kept, other=0.0)  # [HEADS, REST_WIDTH]
        tl.store(y_at + (j + 2 * HALF) * y_d, rest, mask=kept)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    """Turn the first R dimensions of x (B, H, T, D) by the angles of cos, sin (B or 1, 1, T, R), or back."""
    (B, H, T, D), R = x.shape, cos.shape[-1]
    cos, sin = cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)  # with the strides of x, if x is dense
    if not y.numel():
        return y
    made = dict(tables.launch("rope", D, x.dtype))
    HEADS = made["HEADS"] = min(made["HEADS"], triton.next_power_of_2(H))
    WIDTH = triton.next_power_of_2(max(1, R // 2))
    made["num_warps"] = min(
        made["num_warps"], max(1, HEADS * WIDTH // 256)
    )  # a thread loads 16 bytes, if it can
    _turn[(B * T, triton.cdiv(H, HEADS))](
        x,
        cos,
        sin,
        y,
        T,
        H,
        *x.stride(),
        *y.stride(),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(2),
        HALF=R // 2,
        REST=D - R,
        BACK=back,
        WIDTH=WIDTH,
        REST_WIDTH=triton.next_power_of_2(max(1, D - R)),
        **made,
    )
    return y
