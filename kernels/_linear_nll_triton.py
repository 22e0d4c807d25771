"""Triton kernels of linear_nll: the matrix product x Wᵀ with a loss where its result would be stored.

Forward: one program per tile of logits (BLOCK_N rows of text x BLOCK_V words). It computes its tile in fp32
in registers, and stores per row only the tile's maximum m and its sum of exp(z − m), and the target's logit
if that lies in the tile; a second, small kernel combines the tiles in their order (Milakov and Gimelshein
2018, "Online normalizer calculation for softmax"). So 8 bytes for BLOCK_V logits reach the memory.

Backward: the vocabulary is cut into chunks of Vc words. A kernel computes a chunk's logits again, and stores
their gradient d (N, Vc) in x's dtype; two products of cuBLAS make dx += d W_chunk and dW_chunk = dᵀ x of it.
Chunks of words, not of rows: a word's gradient is then complete after one product, and needs no fp32 sum
beside it; x's, which is smaller, has one. The programs of Wijmans et al. 2024 ("Cut Your Losses") add to dx
and dW of other programs under locks; here each result has one writer: the same bits every time.

Tiles whose rows are all ignored (prompts, padding) end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels import tables
from kernels.dispatch import side_by_side

IGNORE = tl.constexpr(-100)


# --- 1. a tile of logits ------------------------------------------------------------------------------------


@triton.jit
def _place(targets_ptr, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """Give this program's tile, its rows n (BLOCK_N,), its words v (BLOCK_V,) and the rows' targets.

    GROUP row blocks share each part of W while it is in the L2 cache.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks_n, blocks_v = tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V)
    first = pid // (GROUP * blocks_v) * GROUP  # of this group's row blocks
    size = min(blocks_n - first, GROUP)  # the last group may be smaller
    within = pid % (GROUP * blocks_v)
    block_n, block_v = first + within % size, within // size
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)  # (BLOCK_V,)
    return block_n, block_v, n, v, tl.load(targets_ptr + n, n < N, IGNORE)


@triton.jit
def _logits(
    x_ptr,
    w_ptr,
    b_ptr,
    n,
    v,
    N,
    V,
    C,
    x_row,
    w_row,
    BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the logits of rows n (BLOCK_N,) and words v (BLOCK_V,) in fp32; −inf beyond the vocabulary."""
    c = tl.arange(0, BLOCK_C)  # (BLOCK_C,)
    # rows and words beyond the end repeat the last one: loads without masks are wider; results are masked
    x_at = x_ptr + tl.minimum(n, N - 1)[:, None] * x_row + c[None, :]  # (BLOCK_N, BLOCK_C)
    w_at = w_ptr + tl.minimum(v, V - 1)[:, None] * w_row + c[None, :]  # (BLOCK_V, BLOCK_C)
    z = tl.zeros((n.shape[0], v.shape[0]), tl.float32)  # (BLOCK_N, BLOCK_V)
    for start in range(0, C, BLOCK_C):
        if EVEN_C:
            x = tl.load(x_at)  # (BLOCK_N, BLOCK_C)
            w = tl.load(w_at)  # (BLOCK_V, BLOCK_C)
        else:
            inside = c[None, :] < C - start  # (1, BLOCK_C)
            x = tl.load(x_at, inside, 0.0)
            w = tl.load(w_at, inside, 0.0)
        z = tl.dot(x, w.T, z, input_precision=PRECISION)
        x_at += BLOCK_C
        w_at += BLOCK_C
    if b_ptr is not None:
        z += tl.load(b_ptr + v, v < V, 0.0).to(tl.float32)[None, :]
    return z + tl.where(v < V, 0.0, -float("inf"))[None, :]


# --- 2. the kernels -----------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "V"])
def _forward_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    targets_ptr,
    max_ptr,  # (blocks_v, N) fp32: each tile's maximum
    sum_ptr,  # (blocks_v, N) fp32: and its sum of exp(z − maximum)
    goal_ptr,  # (N,) fp32: the targets' logits
    N,
    V,
    C,
    x_row,
    w_row,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_n, block_v, n, v, target = _place(targets_ptr, N, V, BLOCK_N, BLOCK_V, GROUP)
    if tl.max(target, 0) == IGNORE:
        return
    z = _logits(x_ptr, w_ptr, b_ptr, n, v, N, V, C, x_row, w_row, BLOCK_C, EVEN_C, PRECISION)

    m = tl.max(z, 1)  # (BLOCK_N,)
    s = tl.sum(tl.exp(z - tl.where(m == -float("inf"), 0.0, m)[:, None]), 1)  # (BLOCK_N,)
    j = (target - block_v * BLOCK_V).to(tl.int32)  # (BLOCK_N,): where the target is in the tile
    goal = tl.sum(
        tl.where(tl.arange(0, BLOCK_V)[None, :] == j[:, None], z, 0.0), 1
    )  # (BLOCK_N,): one or none
    here = (j >= 0) & (j < BLOCK_V) & (target != IGNORE)
    tl.store(max_ptr + block_v * N + n, m, n < N)
    tl.store(sum_ptr + block_v * N + n, s, n < N)
    tl.store(goal_ptr + n, goal, here)  # rows beyond N are ignored ones: they have no target here


@triton.jit(do_not_specialize=["N", "blocks_v"])
def _combine_kernel(
    max_ptr,
    sum_ptr,
    goal_ptr,
    targets_ptr,
    nll_ptr,
    lse_ptr,
    N,
    blocks_v,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    trained = tl.load(targets_ptr + n, n < N, IGNORE) != IGNORE  # (BLOCK_N,)
    m = tl.full((BLOCK_N,), -float("inf"), tl.float32)  # (BLOCK_N,): of the tiles so far
    s = tl.zeros((BLOCK_N,), tl.float32)  # (BLOCK_N,)
    for start in range(0, blocks_v, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)  # (BLOCK_T,)
        at = t[:, None].to(tl.int64) * N + n[None, :]  # (BLOCK_T, BLOCK_N)
        mask = (t[:, None] < blocks_v) & trained[None, :]
        tile_m = tl.load(max_ptr + at, mask, -float("inf"))  # (BLOCK_T, BLOCK_N)
        tile_s = tl.load(sum_ptr + at, mask, 0.0)  # (BLOCK_T, BLOCK_N)
        new = tl.maximum(m, tl.max(tile_m, 0))  # (BLOCK_N,)
        base = tl.where(new == -float("inf"), 0.0, new)  # −inf − (−inf) is NaN
        s = s * tl.exp(m - base) + tl.sum(tile_s * tl.exp(tile_m - base[None, :]), 0)
        m = new
    lse = m + tl.log(tl.where(trained, s, 1.0))  # (BLOCK_N,)
    goal = tl.load(goal_ptr + n, trained, 0.0)  # (BLOCK_N,)
    tl.store(lse_ptr + n, tl.where(trained, lse, 0.0), n < N)
    tl.store(nll_ptr + n, tl.where(trained, lse - goal, 0.0), n < N)


@triton.jit(do_not_specialize=["N", "V", "first"])
def _gradient_kernel(
    x_ptr,
    w_ptr,  # (V, C): the chunk's words, of which the first is the word `first` of the vocabulary
    b_ptr,
    targets_ptr,
    lse_ptr,
    g_nll_ptr,
    g_lse_ptr,
    d_ptr,  # (N, whole blocks) in x's dtype: the gradient of the chunk's logits
    db_ptr,  # (blocks_n, V) fp32: its sums over each block of rows, or None
    first,
    N,
    V,
    C,
    x_row,
    w_row,
    d_row,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_n, block_v, n, v, target = _place(targets_ptr, N, V, BLOCK_N, BLOCK_V, GROUP)
    # d has room for whole blocks of words: with a mask of words the stores were 16 bits wide
    i, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)  # within the tile: 32 bits, so half the registers
    d_ptr += block_n * BLOCK_N * d_row + block_v * BLOCK_V
    if tl.max(target, 0) == IGNORE:
        d_at = d_ptr + (i[:, None] * d_row + j[None, :])  # (BLOCK_N, BLOCK_V)
        tl.store(d_at, tl.zeros((BLOCK_N, BLOCK_V), d_ptr.dtype.element_ty), n[:, None] < N)
        if db_ptr is not None:
            tl.store(db_ptr + block_n * V + v, tl.zeros((BLOCK_V,), tl.float32), v < V)
        return
    z = _logits(x_ptr, w_ptr, b_ptr, n, v, N, V, C, x_row, w_row, BLOCK_C, EVEN_C, PRECISION)

    trained = target != IGNORE  # (BLOCK_N,): false beyond N, too
    lse = tl.load(lse_ptr + n, trained, float("inf"))  # (BLOCK_N,): the softmax of other rows is 0
    g_nll = tl.load(g_nll_ptr + n, trained, 0.0)  # (BLOCK_N,)
    g_lse = tl.load(g_lse_ptr + n, trained, 0.0)  # (BLOCK_N,)
    d = tl.exp(z - lse[:, None]) * (g_nll + g_lse)[:, None]  # (BLOCK_N, BLOCK_V)
    goal = (target - first - block_v * BLOCK_V).to(tl.int32)  # (BLOCK_N,): where the target is in the tile
    d -= tl.where(j[None, :] == goal[:, None], g_nll[:, None], 0.0)
    d_at = d_ptr + (i[:, None] * d_row + j[None, :])  # (BLOCK_N, BLOCK_V)
    tl.store(d_at, d.to(d_ptr.dtype.element_ty), n[:, None] < N)  # 0 beyond the vocabulary
    if db_ptr is not None:
        tl.store(db_ptr + block_n * V + v, tl.sum(d, 0), v < V)


# --- 3. launchers -------------------------------------------------------------------------------------------


def _tiles(op: str, x: torch.Tensor, C: int) -> dict:
    """Choose block sizes; fp32 is multiplied as fp32: TF32 would keep 10 bits of each factor."""
    blocks = tables.launch(op, C, x.dtype)
    even = C % blocks["BLOCK_C"] == 0
    return {**blocks, "EVEN_C": even, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}


def forward(x, w, b, targets, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the forward pass: x (N, C), w (V, C) and b (V,) or None in one dtype -> nll, lse, (N,) fp32.

    At most about `pairs` pairs of a maximum and a sum are held at a time.
    """
    x, w = side_by_side(x), side_by_side(w)
    targets = targets.contiguous()
    (N, C), V = x.shape, len(w)
    how = _tiles("linear_nll", x, C)
    blocks_v = triton.cdiv(V, how["BLOCK_V"])
    rows = max(1, pairs // blocks_v // how["BLOCK_N"]) * how["BLOCK_N"]
    nll, lse, goal = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(3))
    maxima, sums = (
        torch.empty(blocks_v * min(N, rows), dtype=torch.float32, device=x.device) for _ in range(2)
    )
    combine = tables.launch("linear_nll_combine", C, x.dtype)
    for a in range(0, N, rows):
        part = slice(a, min(a + rows, N))
        n = part.stop - a
        grid = (triton.cdiv(n, how["BLOCK_N"]) * blocks_v,)
        _forward_kernel[grid](
            x[part], w, b, targets[part], maxima, sums, goal[part], n, V, C, x.stride(0), w.stride(0), **how
        )
        grid = (triton.cdiv(n, combine["BLOCK_N"]),)
        _combine_kernel[grid](
            maxima, sums, goal[part], targets[part], nll[part], lse[part], n, blocks_v, **combine
        )
    return nll, lse


def backward(
    g_nll, g_lse, x, w, b, targets, lse, need_x: bool, w_dtype, need_b: bool, elements: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Launch the backward pass: gradients of x, of w in w_dtype (None: no need) and of b in fp32.

    At most about `elements` elements of the logits' gradient are held at a time.
    """
    x, w = side_by_side(x), side_by_side(w)
    targets, lse, g_nll, g_lse = (t.contiguous() for t in (targets, lse, g_nll, g_lse))
    (N, C), V = x.shape, len(w)
    how = _tiles("linear_nll_backward", x, C)
    blocks_n = triton.cdiv(N, how["BLOCK_N"])
    chunks = triton.cdiv(V, max(how["BLOCK_V"], elements // max(1, N)))
    size = triton.cdiv(triton.cdiv(V, chunks), how["BLOCK_V"]) * how["BLOCK_V"]  # of each chunk but the last
    d = torch.empty(N, size, dtype=x.dtype, device=x.device)
    dx = dw = db = sums = None
    if w_dtype is not None:
        dw = torch.empty(V, C, dtype=w_dtype, device=x.device)
    if need_b:
        db = torch.empty(V, dtype=torch.float32, device=x.device)
    for a in range(0, V, size):
        part = slice(a, min(a + size, V))
        n, wc = part.stop - a, w[part]
        if need_b:
            sums = torch.empty(blocks_n, n, dtype=torch.float32, device=x.device)
        grid = (blocks_n * triton.cdiv(n, how["BLOCK_V"]),)
        _gradient_kernel[grid](
            x,
            wc,
            None if b is None else b[part],
            targets,
            lse,
            g_nll,
            g_lse,
            d,
            sums,
            a,
            N,
            n,
            C,
            x.stride(0),
            w.stride(0),
            size,
            **how,
        )
        dc = d[:, :n]  # (N, Vc)
        if need_x and n == V:
            dx = dc @ wc
        elif need_x:
            share = _product(dc, wc, torch.float32)  # (N, C) fp32: rounded once, after the last chunk
            dx = share if dx is None else dx.add_(share)
            del share  # else the next one is made beside it
        if dw is not None:
            dw[part] = _product(dc.t(), x, w_dtype)
        if need_b:
            db[part] = sums.sum(0)
    return None if dx is None else dx.to(x.dtype), dw, db


def _product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply; in fp32, if that is asked for, cuBLAS stores its sums as they are."""
    if dtype != torch.float32 or a.dtype == torch.float32:
        return a @ b
    if a.is_cpu:  # the interpreter's tensors: the product with out_dtype exists on GPUs alone
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)
