"""Rotary position embedding on a GPU, out of place, for any strides; the way back is the same kernel.

Bound by memory. Queries and keys come from a projection, so the heads of one token lie side by side: a
program takes one token and a few of its heads, of q or of k, and reads the token's angles once for all of
them.

Shapes: B batch, H heads (of k: K), T length, D head dim, R rotated dims, of which i and i + R/2 are one pair
(a, b).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tables


@triton.jit
def _turn_heads(
    x,  # (H, D), the heads of one token, strides x_h and x_d
    y,
    H,
    x_h,
    x_d,
    y_h,
    y_d,
    block,  # which HEADS of them
    c,  # [1, WIDTH] the cosines
    s,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    REST_WIDTH: tl.constexpr,
):
    head = block.to(tl.int64) * HEADS + tl.arange(0, HEADS)  # [HEADS]
    i = tl.arange(0, WIDTH)[None, :]  # [1, WIDTH]
    mask = (head < H)[:, None] & (i < HALF)  # [HEADS, WIDTH]
    x_at, y_at = x + head[:, None] * x_h, y + head[:, None] * y_h  # [HEADS, 1]
    first = tl.load(x_at + i * x_d, mask=mask, other=0.0).to(tl.float32)  # [HEADS, WIDTH] a
    second = tl.load(x_at + (i + HALF) * x_d, mask=mask, other=0.0).to(tl.float32)  # [HEADS, WIDTH] b
    dtype: tl.constexpr = y.dtype.element_ty
    tl.store(y_at + i * y_d, (first * c - second * s).to(dtype), mask=mask)
    tl.store(y_at + (i + HALF) * y_d, (second * c + first * s).to(dtype), mask=mask)
    if REST > 0:
        j = tl.arange(0, REST_WIDTH)[None, :]  # [1, REST_WIDTH]
        kept = (head < H)[:, None] & (j < REST)  # [HEADS, REST_WIDTH]
        rest = tl.load(x_at + (j + 2 * HALF) * x_d, mask=kept, other=0.0)  # [HEADS, REST_WIDTH]
        tl.store(y_at + (j + 2 * HALF) * y_d, rest, mask=kept)


@triton.jit
def _turn(
    q,  # (B, H, T, D), any strides
    k,  # (B, K, T, D), any strides; None: there is only q
    cos,  # (B or 1, 1, T, R) fp32; a stride of 0 along the batch if it has only one
    sin,
    q_out,
    k_out,
    T,
    H,
    K,
    q_b,
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_t,
    k_d,
    qo_b,
    qo_h,
    qo_t,
    qo_d,
    ko_b,
    ko_h,
    ko_t,
    ko_d,
    angle_b,
    angle_t,
    HALF: tl.constexpr,  # R/2
    REST: tl.constexpr,  # D - R
    BACK: tl.constexpr,  # turn the other way
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,  # HALF, rounded up to a power of two
    REST_WIDTH: tl.constexpr,  # the same of REST
):
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, t = token // T, token % T
    # every angle stands twice in the tables: cos, cos and -sin, sin; the second half's sines have no sign
    i = tl.arange(0, WIDTH)  # [WIDTH]
    angle = b * angle_b + t * angle_t + HALF + i  # [WIDTH]
    c = tl.load(cos + angle, mask=i < HALF, other=0.0)[None, :].to(tl.float32)  # [1, WIDTH]
    s = tl.load(sin + angle, mask=i < HALF, other=0.0)[None, :].to(tl.float32)  # [1, WIDTH]
    if BACK:
        s = -s
    blocks = tl.cdiv(H, HEADS)
    if block < blocks:
        _turn_heads(
            q + b * q_b + t * q_t, q_out + b * qo_b + t * qo_t,
            H, q_h, q_d, qo_h, qo_d, block, c, s, HALF, REST, HEADS, WIDTH, REST_WIDTH,
        )  # fmt: skip
    if k is not None:
        block -= blocks
        if block >= 0:
            _turn_heads(
                k + b * k_b + t * k_t, k_out + b * ko_b + t * ko_t,
                K, k_h, k_d, ko_h, ko_d, block, c, s, HALF, REST, HEADS, WIDTH, REST_WIDTH,
            )  # fmt: skip


def rope(q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, back: bool):
    """Turn the first R dimensions of q (B, H, T, D) and k (B, K, T, D) by the angles of cos and sin, or back.

    cos and sin (B or 1, 1, T, R). Returns the two; the second is empty if k is None.
    """
    (B, H, T, D), R = q.shape, cos.shape[-1]
    cos, sin = cos.contiguous(), sin.contiguous()
    K = 0 if k is None else k.shape[1]
    q_out = torch.empty_like(q)  # with the strides of q, if q is dense
    k_out = q.new_empty(0) if k is None else torch.empty_like(k)
    if not q_out.numel():
        return q_out, k_out
    made = dict(tables.launch("rope", D, q.dtype))
    HEADS = made["HEADS"] = min(made["HEADS"], triton.next_power_of_2(max(H, K)))
    WIDTH = triton.next_power_of_2(max(1, R // 2))
    # 32 lanes of 8 numbers, 16 bytes each: more warps would load less at once
    made["num_warps"] = min(made["num_warps"], max(1, HEADS * WIDTH // 256))
    none = (0, 0, 0, 0)
    _turn[(B * T, triton.cdiv(H, HEADS) + triton.cdiv(K, HEADS))](
        q,
        k,
        cos,
        sin,
        q_out,
        None if k is None else k_out,
        T,
        H,
        K,
        *q.stride(),
        *(none if k is None else k.stride()),
        *q_out.stride(),
        *(none if k is None else k_out.stride()),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(2),
        HALF=R // 2,
        REST=D - R,
        BACK=back,
        WIDTH=WIDTH,
        REST_WIDTH=triton.next_power_of_2(max(1, D - R)),
        **made,
    )
    return q_out, k_out
