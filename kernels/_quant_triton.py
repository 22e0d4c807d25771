"""Triton kernels of the products with matrices of 8 or 4 bits.

Layout. A row's inputs are cut into blocks of 32 · F, where a word of 32 bits has F = 32/bits fields. A block
is 32 words; field t of word j holds input k = 32·t + j:

    4 bits, word j:   k = j | 32+j | 64+j | ... | 224+j      (the lowest bits first)

So a thread that loads four words in one piece (128 bits) needs four neighbours of x for each field, and field
t of a whole block belongs to one group, as groups are multiples of 32 inputs: one scale and one zero.

One row of x: memory is what limits, so little may be computed per weight. `word & mask << bits·t` isolates a
field without a shift: its value is q · 2^(bits·t). It becomes a float without a conversion, which is slow on
some cards: or-ed into the mantissa of 2²³ it reads 2²³ + q · 2^(bits·t), and subtracting
2²³ + zero · 2^(bits·t) leaves (q − zero) · 2^(bits·t); x comes multiplied by 2^−(bits·t). Every step of this
is exact. The upper fields' words are first moved down, once for all of them.

Several rows of x (M > 1): tensor cores multiply q − zero, exact in 16 bits, by x; each group's sum is then
scaled in fp32. W is the left factor, as tensor cores want 16 to 64 rows there, and x has few.

A matrix with few outputs does not fill a card with programs. Then its inputs are split, too, and a second
kernel adds up the parts in their order. No program adds to what another one wrote: the same bits every time.

Frantar et al. 2024, "MARLIN", explain why 4 bits are hard to make fast.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tables
from kernels.dispatch import processors, side_by_side

MAGIC = tl.constexpr(0x4B000000)  # 2²³ as a float; its last bit counts 1


@triton.constexpr_function
def _down(t, bits):
    """Give how far the words of field t are moved down, so that it lies in the mantissa's 23 bits."""
    return 0 if bits * (t + 1) <= 23 else 16


@triton.jit
def _add_field(part, words, zero, x_ptr, k, end, magic, t: tl.constexpr, BITS: tl.constexpr):
    """Add to part (N, J, 4): field t of words (N, J, 4), less zero (N, J), times x at k < end (J, 4)."""
    down: tl.constexpr = _down(t, BITS)
    at: tl.constexpr = BITS * t - down  # the field's lowest bit
    mask: tl.constexpr = ((1 << BITS) - 1) << at
    x = tl.load(x_ptr + k + 32 * t, k < end, 0.0).to(tl.float32) * (1.0 / (1 << at))  # (J, 4)
    f = (((words >> down) & mask) | magic).to(tl.float32, bitcast=True)  # (N, J, 4): 2²³ + q 2^at
    f -= (8388608.0 + zero * (1 << at))[:, :, None]  # (N, J, 4): (q − zero) 2^at
    return part + f * x[None, :, :]


@triton.jit(do_not_specialize=["steps", "N"])
def _vector_kernel(
    x_ptr,  # (K,)
    q_ptr,  # (N, W) int32
    scales_ptr,  # (G, N)
    zeros_ptr,  # (G, N) uint8
    y_ptr,  # (splits, N): fp32 parts of the sums, or the result
    K,
    N,
    W,
    steps,  # of BLOCK_W words in a split
    BITS: tl.constexpr,
    GROUP: tl.constexpr,  # inputs: 32, 64, 128 or 256, and not more than a block has
    EVEN_K: tl.constexpr,  # K is whole blocks
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    F: tl.constexpr = 32 // BITS  # fields of a word
    PER: tl.constexpr = 32 * F // GROUP  # groups of a block
    first = tl.program_id(0).to(tl.int64) * BLOCK_N  # of this program's rows
    split = tl.program_id(1).to(tl.int64)
    # The grid has no third axis, but the compiler does not know: so this constant stays in a register, and
    # `word & mask | magic` is one instruction, which has room for one constant only.
    magic = MAGIC + tl.program_id(2)
    word = split * steps * BLOCK_W  # of a row: where this split begins
    # bases are 64 bits wide, what differs between lanes is 32
    n = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - first).to(
        tl.int32
    )  # (BLOCK_N,): beyond the end the last row
    four = tl.arange(0, BLOCK_W // 4)  # (BLOCK_W/4,): which four words
    j = four[:, None] * 4 + tl.arange(0, 4)[None, :]  # (BLOCK_W/4, 4)
    k = (four // 8)[:, None] * (32 * F) + (four % 8)[:, None] * 4 + tl.arange(0, 4)[None, :]  # of field 0
    group = (four // 8 * PER)[None, :] * N + n[:, None]  # (BLOCK_N, BLOCK_W/4): of the block's first group
    q_at = (
        q_ptr + first * W + word + (n.to(tl.int64)[:, None, None] * W + j[None, :, :])
    )  # (BLOCK_N, BLOCK_W/4, 4)
    scales_ptr += first + word // 32 * PER * N
    zeros_ptr += first + word // 32 * PER * N
    total = tl.zeros((BLOCK_N, BLOCK_W // 4), tl.float32)
    for _ in range(steps):
        words = tl.load(q_at, (j < W - word)[None, :, :], 0)  # (BLOCK_N, BLOCK_W/4, 4)
        here = (four * 4 < W - word)[None, :]  # (1, BLOCK_W/4)
        for g in tl.static_range(PER):
            zero = tl.load(zeros_ptr + g * N + group, here, 0).to(tl.float32)  # (BLOCK_N, BLOCK_W/4)
            scale = tl.load(scales_ptr + g * N + group, here, 0.0).to(tl.float32)  # (BLOCK_N, BLOCK_W/4)
            part = tl.zeros((BLOCK_N, BLOCK_W // 4, 4), tl.float32)
            for i in tl.static_range(GROUP // 32):
                end = (W - word) * F if EVEN_K else K - word * F - (g * GROUP + 32 * i)
                part = _add_field(
                    part, words, zero, x_ptr + word * F, k, end, magic, g * (GROUP // 32) + i, BITS
                )
            total += tl.sum(part, 2) * scale
        q_at += BLOCK_W
        word += BLOCK_W
        scales_ptr += BLOCK_W // 32 * PER * N
        zeros_ptr += BLOCK_W // 32 * PER * N
    y = tl.sum(total, 1)  # (BLOCK_N,)
    n = tl.arange(0, BLOCK_N)
    tl.store(y_ptr + split * N + first + n, y.to(y_ptr.dtype.element_ty), n < N - first)


@triton.jit(do_not_specialize=["steps", "N", "M"])
def _matrix_kernel(
    x_ptr,  # (M, K)
    q_ptr,  # (N, W) int32
    scales_ptr,  # (G, N)
    zeros_ptr,  # (G, N) uint8
    y_ptr,  # (splits, M, N): fp32 parts of the sums, or the result
    x_row,
    M,
    K,
    N,
    W,
    steps,  # blocks of a split
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    F: tl.constexpr = 32 // BITS
    PER: tl.constexpr = 32 * F // GROUP
    row = tl.program_id(0).to(tl.int64) * BLOCK_N
    split = tl.program_id(1).to(tl.int64)
    n = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1)  # (BLOCK_N,)
    m = tl.arange(0, BLOCK_M)  # (BLOCK_M,)
    j = tl.arange(0, 32)  # (32,)
    first = split * steps
    last = tl.minimum(first + steps, W // 32)
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for block in range(first, last):
        words = tl.load(q_ptr + n[:, None] * W + (block * 32 + j)[None, :])  # (BLOCK_N, 32)
        for g in tl.static_range(PER):
            at = (block * PER + g) * N + n  # (BLOCK_N,)
            zero = tl.load(zeros_ptr + at).to(tl.float32)  # (BLOCK_N,)
            scale = tl.load(scales_ptr + at).to(tl.float32)  # (BLOCK_N,)
            part = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for i in tl.static_range(GROUP // 32):
                k = block * (32 * F) + g * GROUP + 32 * i + j  # (32,)
                inside = m[:, None] < M
                if not EVEN_K:
                    inside = inside & (k[None, :] < K)
                x = tl.load(
                    x_ptr + m[:, None].to(tl.int64) * x_row + k[None, :], inside, 0.0
                )  # (BLOCK_M, 32)
                q = (words >> BITS * (g * (GROUP // 32) + i)) & ((1 << BITS) - 1)  # (BLOCK_N, 32)
                f = (q | MAGIC).to(tl.float32, bitcast=True)  # (BLOCK_N, 32): 2²³ + q
                w = (f - (8388608.0 + zero)[:, None]).to(x.dtype)  # (BLOCK_N, 32): q − zero, exact
                part = tl.dot(w, x.T, part, input_precision=PRECISION)
            total += part * scale[:, None]
    n = row + tl.arange(0, BLOCK_N)
    y_at = y_ptr + (split * M + m[None, :]) * N + n[:, None]  # (BLOCK_N, BLOCK_M)
    tl.store(y_at, total.to(y_ptr.dtype.element_ty), (n[:, None] < N) & (m[None, :] < M))


@triton.jit
def _combine_kernel(parts_ptr, y_ptr, size, splits, BLOCK: tl.constexpr):
    """Add up the parts (splits, size) in their order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(parts_ptr + i, i < size, 0.0)
        parts_ptr += size
    tl.store(y_ptr + i, total.to(y_ptr.dtype.element_ty), i < size)


@triton.jit
def _whole_kernel(
    q_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,  # (N, K)
    K,
    N,
    W,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    F: tl.constexpr = 32 // BITS
    row = tl.program_id(0).to(tl.int64) * BLOCK_N
    block = tl.program_id(1).to(tl.int64)
    n = row + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    j = tl.arange(0, 32)  # (32,)
    words = tl.load(q_ptr + n[:, None] * W + (block * 32 + j)[None, :], n[:, None] < N, 0)  # (BLOCK_N, 32)
    for t in tl.static_range(F):
        at = (block * (32 * F // GROUP) + t * 32 // GROUP) * N + n  # (BLOCK_N,)
        zero = tl.load(zeros_ptr + at, n < N, 0).to(tl.float32)  # (BLOCK_N,)
        scale = tl.load(scales_ptr + at, n < N, 0.0).to(tl.float32)  # (BLOCK_N,)
        q = (words >> BITS * t) & ((1 << BITS) - 1)  # (BLOCK_N, 32)
        w = (q.to(tl.float32) - zero[:, None]) * scale[:, None]  # (BLOCK_N, 32)
        k = block * (32 * F) + 32 * t + j  # (32,)
        tl.store(
            y_ptr + n[:, None] * K + k[None, :],
            w.to(y_ptr.dtype.element_ty),
            (n[:, None] < N) & (k[None, :] < K),
        )


# --- launchers ----------------------------------------------------------------------------------------------


def product(x, q, scales, zeros, bits: int, group: int) -> torch.Tensor:
    """Launch y = x Wᵀ for a few rows: x (M, K), q (N, W), scales and zeros (G, N) -> (M, N) in x's dtype."""
    x = side_by_side(x)
    (M, K), (N, W) = x.shape, q.shape
    if M == 1:
        how = tables.launch("quant_vector", group, x.dtype)
        length = how["BLOCK_W"]
    else:
        how = tables.launch("quant_matrix", group, x.dtype)
        length = 32
    programs, how = how["PROGRAMS"] * processors(x), {k: v for k, v in how.items() if k != "PROGRAMS"}
    blocks_n, all_steps = triton.cdiv(N, how["BLOCK_N"]), triton.cdiv(W, length)
    steps = triton.cdiv(all_steps, min(all_steps, triton.cdiv(programs, blocks_n)))
    splits, even = triton.cdiv(all_steps, steps), K % (1024 // bits) == 0
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    parts = y if splits == 1 else torch.empty(splits, M, N, dtype=torch.float32, device=x.device)
    if M == 1:
        _vector_kernel[blocks_n, splits](x, q, scales, zeros, parts, K, N, W, steps, bits, group, even, **how)
    else:
        _matrix_kernel[blocks_n, splits](
            x,
            q,
            scales,
            zeros,
            parts,
            x.stride(0),
            M,
            K,
            N,
            W,
            steps,
            bits,
            group,
            even,
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            BLOCK_M=max(16, triton.next_power_of_2(M)),
            **how,
        )
    if splits > 1:
        how = tables.launch("quant_combine", N, x.dtype)
        _combine_kernel[(triton.cdiv(M * N, how["BLOCK"]),)](parts, y, M * N, splits, **how)
    return y


def whole(q, scales, zeros, K: int, bits: int, group: int, dtype: torch.dtype) -> torch.Tensor:
    """Launch the putting together of the matrix (N, K)."""
    N, W = q.shape
    how = tables.launch("quant_whole", group, dtype)
    y = torch.empty(N, K, dtype=dtype, device=q.device)
    _whole_kernel[triton.cdiv(N, how["BLOCK_N"]), W // 32](q, scales, zeros, y, K, N, W, bits, group, **how)
    return y
