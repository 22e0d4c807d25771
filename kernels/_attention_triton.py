"""Triton kernels of attention: no (T, S) matrix ever leaves the chip.

Forward (Dao 2023, "FlashAttention-2"). A program owns BM queries of a head and walks over blocks of BN keys.
Beside the sum Σ e^(s−m) v it keeps m, the largest score so far, and l = Σ e^(s−m); a new largest one shrinks
both. At the end out = sum / l; lse = m + log l is kept for backward. All in base 2: exp2 is one instruction.

Backward. e^(s−lse) gives the probabilities P back, block by block. With Δ = rowsum(out · dout)

    dP = dout Vᵀ,   dS = P · (dP − Δ),   dQ = dS K / √D,   dK = dSᵀ Q / √D,   dV = Pᵀ dout

One kernel owns queries and sums dQ over keys; a second one owns keys and sums dK and dV over queries and the
heads of a group. So scores are computed twice, but every sum has one owner and one order: no atomics, equal
bits every time.

Which keys? Query i sees lo[i] … p[i], so a block of queries needs keys from min lo to max p, and what lies
between max lo and min p needs no mask. Packed documents, windows and padding are skipped, not masked.

Decoding. Few queries, many keys: the G·T query rows that share a key-value head fill one tile, keys are cut
into chunks for many programs, and a second kernel adds the chunks up in order.

A head of 80 or 96 is worked as 64 + 16 or 64 + 32 columns (x0, x1): tl.dot takes powers of two, and 128 would
be 60 % or 33 % more work. Other sizes are padded with zeros. D1 = 0: there is no second part, x1 is not used.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.dispatch import side_by_side
from kernels.tables import launch

LOG2E = tl.constexpr(1.4426950408889634)  # e^x = 2^(x·LOG2E)
INF = tl.constexpr(float("inf"))

# --- 1. tiles -----------------------------------------------------------------------------------------------


@triton.jit
def _part(x, j, stride, size, FROM: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr, EDGE):
    """Load rows j … j+N and columns FROM … FROM+W of a matrix (size, D): (N, W).

    EDGE: some rows may lie behind the last; these repeat it (masks on rows cost registers). Columns ≥ D: 0.
    """
    row, column = tl.arange(0, N)[:, None], FROM + tl.arange(0, W)[None, :]  # (N, 1), (1, W)
    if EDGE:
        row = tl.minimum(row, size - j - 1).to(tl.int64)  # (N, 1)
    at = x + tl.cast(j, tl.int64) * stride + row * stride + column  # (N, W); only the first product is large
    if FROM + W > D:
        return tl.load(at, mask=column < D, other=0.0)
    return tl.load(at)


@triton.jit
def _load(x, j, stride, size, N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EDGE):
    """Load rows j … j+N in two parts: (N, D0), (N, D1)."""
    x0 = _part(x, j, stride, size, 0, D0, N, D, EDGE)  # (N, D0)
    x1 = x0
    if D1 > 0:
        x1 = _part(x, j, stride, size, D0, D1, N, D, EDGE)  # (N, D1)
    return x0, x1


@triton.jit
def _store(x, x0, x1, j, stride, size, N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Write what _load reads."""
    row = tl.arange(0, N)[:, None]  # (N, 1)
    at = x + tl.cast(j, tl.int64) * stride + row * stride  # (N, 1)
    column = tl.arange(0, D0)[None, :]  # (1, D0)
    tl.store(at + column, x0.to(x.dtype.element_ty), mask=(row < size - j) & (column < D))
    if D1 > 0:
        column = D0 + tl.arange(0, D1)[None, :]  # (1, D1)
        tl.store(at + column, x1.to(x.dtype.element_ty), mask=(row < size - j) & (column < D))


@triton.jit
def _zeros(N: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    x0 = tl.zeros([N, D0], tl.float32)  # (N, D0)
    x1 = x0
    if D1 > 0:
        x1 = tl.zeros([N, D1], tl.float32)  # (N, D1)
    return x0, x1


@triton.jit
def _times(x0, x1, w, D1: tl.constexpr):
    """Multiply both parts by a number, or by one for each row (N, 1)."""
    x0 = x0 * w  # (N, D0)
    if D1 > 0:
        x1 = x1 * w  # (N, D1)
    return x0, x1


@triton.jit
def _products(a0, a1, b0, b1, D1: tl.constexpr):
    """Multiply all rows of a with all rows of b: (M, D), (N, D) -> (M, N) fp32."""
    s = tl.dot(a0, tl.trans(b0), input_precision="ieee")  # (M, N)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision="ieee")  # (M, N)
    return s


@triton.jit
def _add(sum0, sum1, w, x0, x1, D1: tl.constexpr):
    """Add w · x to the sums: (M, N), (N, D) -> (M, D) fp32."""
    w = w.to(x0.dtype)  # (M, N)
    sum0 = tl.dot(w, x0, sum0, input_precision="ieee")  # (M, D0)
    if D1 > 0:
        sum1 = tl.dot(w, x1, sum1, input_precision="ieee")  # (M, D1)
    return sum0, sum1


# --- 2. who sees whom ---------------------------------------------------------------------------------------


@triton.jit
def _queries(i0, b, lo, start, T, S, BM: tl.constexpr):
    """Give the last and the first key that queries i0 … i0+BM see: (BM,), (BM,); past T the last one's.

    The last key is the query's position, or the last one there is. ALiBi may count from either: they differ
    by the same for all scores of a query, which softmax does not see.
    """
    i = tl.minimum(i0 + tl.arange(0, BM), T - 1)  # (BM,)
    p = i + (S - T)  # (BM,)
    if start is not None:
        p = i + tl.load(start + b).to(tl.int32)  # (BM,)
    first = tl.zeros_like(p)  # (BM,)
    if lo is not None:
        first = tl.maximum(tl.load(lo + b * T + i).to(tl.int32), 0)  # (BM,)
    return tl.minimum(p, S - 1), first


@triton.jit
def _key_blocks(p, first, lo, BN: tl.constexpr):
    """Sort the key blocks of some queries: n0 … n1 need a mask, n1 … n2 all see whole, n2 … n3 need one."""
    n3 = tl.cdiv(tl.maximum(tl.max(p, 0) + 1, 0), BN)
    n0, n1 = n3 * 0, n3 * 0
    if lo is not None:
        n0 = tl.minimum(tl.min(first, 0) // BN, n3)
        n1 = tl.minimum(tl.cdiv(tl.max(first, 0), BN), n3)
    n2 = tl.maximum(tl.maximum(tl.min(p, 0) + 1, 0) // BN, n1)
    return n0, n1, n2, n3


@triton.jit
def _nth_masked(n, n1, n2):
    """Count n0 … n1−1, then n2 … n3−1: one loop serves the masked blocks at both ends."""
    return tl.where(n < n1, n, n + (n2 - n1))


@triton.jit
def _query_blocks(j, ahead, lo, T, BM: tl.constexpr, BN: tl.constexpr):
    """Sort the query blocks that see some of the keys j … j+BN: as _key_blocks does, from the other side."""
    begin = tl.maximum(j - ahead, 0)  # the first query at or behind the first of these keys
    end, whole = (
        T,
        T,
    )  # one behind the last query that sees any of them; the first one that does not see key j
    if lo is not None:
        end = begin * 0
        for i0 in range(begin, T, 1024):
            i = i0 + tl.arange(0, 1024)  # (1024,)
            first = tl.load(lo + i, mask=i < T, other=2**31 - 1).to(tl.int32)  # (1024,)
            end = tl.maximum(end, tl.max(tl.where(first < j + BN, i + 1, 0), 0))
            whole = tl.minimum(whole, tl.min(tl.where(first > j, i, T), 0))
    n3 = tl.cdiv(end, BM)
    n0 = tl.minimum(begin // BM, n3)
    n1 = tl.minimum(tl.cdiv(tl.maximum(j + BN - 1 - ahead, 0), BM), n3)
    n2 = tl.maximum(tl.minimum(whole // BM, n3), n1)
    return n0, n1, n2, n3


@triton.jit
def _scores(a0, a1, b0, b1, p, first, key, lo, slope, D1: tl.constexpr, MASK: tl.constexpr):
    """Give q·k with ALiBi, −∞ where hidden: (M, N).

    p, first and key (the last and the first visible key, and each key) broadcast to (M, N). They are counted
    from the block's first key: `key` is then known when the kernel is compiled, and costs no registers.
    """
    s = _products(a0, a1, b0, b1, D1)  # (M, N)
    if slope is not None:
        s += slope * (key - p).to(tl.float32)  # (M, N)
    if MASK:
        seen = key <= p  # (M, N)
        if lo is not None:
            seen = seen & (key >= first)  # (M, N)
        s = tl.where(seen, s, -INF)  # (M, N)
    return s


@triton.jit
def _slope(slopes, h, scale):
    """Load ALiBi's slope of head h, in units of q·k before they are scaled; None without ALiBi."""
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h).to(tl.float32) * (LOG2E / scale)
    return slope


# --- 3. forward ---------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    sum0, sum1, m, l, q0, q1, k, v, kt, vt, j, p, first, lo, slope, scale, S,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Let the queries see the keys j … j+BN: one step of the online softmax."""
    key = tl.arange(0, BN)[None, :]  # (1, BN)
    k0, k1 = _load(k, j, kt, S, BN, D, D0, D1, MASK)  # (BN, D)
    s = _scores(q0, q1, k0, k1, p[:, None] - j, first[:, None] - j, key, lo, slope, D1, MASK)  # (BM, BN)
    top = tl.maximum(m, tl.max(s, 1) * scale)  # (BM,)
    base = top  # (BM,)
    if MASK:  # a query that has seen no key yet: −∞ − −∞ would be NaN
        base = tl.where(top == -INF, 0.0, top)  # (BM,)
    e = tl.exp2(s * scale - base[:, None])  # (BM, BN): one multiply-add and one exp2 each
    shrink = tl.exp2(m - base)  # (BM,)
    l = l * shrink + tl.sum(e, 1)  # (BM,)
    v0, v1 = _load(v, j, vt, S, BN, D, D0, D1, MASK)  # (BN, D)
    sum0, sum1 = _times(sum0, sum1, shrink[:, None], D1)  # (BM, D)
    sum0, sum1 = _add(sum0, sum1, e, v0, v1, D1)  # (BM, D)
    return sum0, sum1, top, l


@triton.jit
def _forward(
    q, k, v, o, lse, lo, start, slopes, qb, qh, qt, kb, kh, kt, vb, vh, vt, T, S, H, G, scale: tl.float32,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Own the queries i0 … i0+BM of one head."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # late queries see most keys: they go first
    q += (b * qb + h * qh) * UNIT  # now one matrix (T, D)
    k += (b * kb + h // G * kh) * UNIT  # (S, D)
    v += (b * vb + h // G * vh) * UNIT  # (S, D)
    qt, kt, vt = qt * UNIT, kt * UNIT, vt * UNIT
    slope = _slope(slopes, h, scale)
    p, first = _queries(i0, b, lo, start, T, S, BM)  # (BM,), (BM,)
    q0, q1 = _load(q, i0, qt, T, BM, D, D0, D1, True)  # (BM, D)
    sum0, sum1 = _zeros(BM, D0, D1)  # (BM, D)
    m = tl.full([BM], -INF, tl.float32)  # (BM,)
    l = tl.zeros([BM], tl.float32)  # (BM,)
    n0, n1, n2, n3 = _key_blocks(p, first, lo, BN)
    for n in range(n1, n2):
        sum0, sum1, m, l = _attend(
            sum0, sum1, m, l, q0, q1, k, v, kt, vt, n * BN, p, first, lo, slope, scale, S,
            D, D0, D1, BN, False,
        )  # fmt: skip
    for n in range(n0, n3 - (n2 - n1)):
        j = _nth_masked(n, n1, n2) * BN
        sum0, sum1, m, l = _attend(
            sum0, sum1, m, l, q0, q1, k, v, kt, vt, j, p, first, lo, slope, scale, S,
            D, D0, D1, BN, True,
        )  # fmt: skip
    some, l = l > 0, tl.where(l > 0, l, 1.0)  # (BM,), (BM,): does the query see any key?
    sum0, sum1 = _times(sum0, sum1, 1.0 / l[:, None], D1)  # (BM, D)
    _store(o + (b * T * H + h) * D, sum0, sum1, i0, H * D, T, BM, D, D0, D1)
    i = i0 + tl.arange(0, BM)  # (BM,)
    # a query without keys gives 0, and +∞ here, so that backward's 2^(s − lse) is 0
    tl.store(lse + (b * H + h) * T + i, tl.where(some, m + tl.log2(l), INF), mask=i < T)


def forward(q, k, v, lo, start, slopes):
    """Launch the forward pass: out (B, H, T, D), laid out as (B, T, H, D), and lse (B, H, T) in base 2."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q, k, v = (side_by_side(x) for x in (q, k, v))
    o = q.new_empty(B, T, H, D)
    lse = q.new_empty(B, H, T, dtype=torch.float32)
    strides, unit = _strides(q, k, v)
    how = dict(launch("attention", D, q.dtype))
    _forward[triton.cdiv(T, how["BM"]), H, B](
        q, k, v, o, lse, *_places(lo, start, slopes, B, T), *strides, T, S, H, H // K, _scale(D),
        UNIT=unit, **_widths(D, how), **how,
    )  # fmt: skip
    return o.transpose(1, 2), lse


# --- 4. backward --------------------------------------------------------------------------------------------


@triton.jit
def _dq_step(
    dq0, dq1, q0, q1, do0, do1, lse, delta, k, v, kt, vt, j, p, first, lo, slope, scale, S,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add to dq what the keys j … j+BN give."""
    key = tl.arange(0, BN)[None, :]  # (1, BN)
    k0, k1 = _load(k, j, kt, S, BN, D, D0, D1, MASK)  # (BN, D)
    s = _scores(q0, q1, k0, k1, p[:, None] - j, first[:, None] - j, key, lo, slope, D1, MASK)  # (BM, BN)
    prob = tl.exp2(s * scale - lse[:, None])  # (BM, BN)
    v0, v1 = _load(v, j, vt, S, BN, D, D0, D1, MASK)  # (BN, D)
    ds = prob * (_products(do0, do1, v0, v1, D1) - delta[:, None])  # (BM, BN)
    return _add(dq0, dq1, ds, k0, k1, D1)


@triton.jit
def _backward_q(
    q, k, v, o, do, lse, delta, dq, lo, start, slopes,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, T, S, H, G, scale: tl.float32,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Own the queries i0 … i0+BM of one head: sum their dq over keys; write delta for the next kernel."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    q += (b * qb + h * qh) * UNIT  # (T, D)
    k += (b * kb + h // G * kh) * UNIT  # (S, D)
    v += (b * vb + h // G * vh) * UNIT  # (S, D)
    do += (b * db + h * dh) * UNIT  # (T, D)
    qt, kt, vt, dt = qt * UNIT, kt * UNIT, vt * UNIT, dt * UNIT
    own = (b * T * H + h) * D  # o and dq lie in memory as (B, T, H, D)
    row = (b * H + h) * T  # lse and delta as (B, H, T)
    i = i0 + tl.arange(0, BM)  # (BM,)
    slope = _slope(slopes, h, scale)
    p, first = _queries(i0, b, lo, start, T, S, BM)  # (BM,), (BM,)
    do0, do1 = _load(do, i0, dt, T, BM, D, D0, D1, True)  # (BM, D)
    o0, o1 = _load(o + own, i0, H * D, T, BM, D, D0, D1, True)  # (BM, D)
    d_i = tl.sum(o0.to(tl.float32) * do0.to(tl.float32), 1)  # (BM,)
    if D1 > 0:
        d_i += tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)  # (BM,)
    tl.store(delta + row + i, d_i, mask=i < T)
    lse_i = tl.load(lse + row + i, mask=i < T, other=INF)  # (BM,)
    q0, q1 = _load(q, i0, qt, T, BM, D, D0, D1, True)  # (BM, D)
    dq0, dq1 = _zeros(BM, D0, D1)  # (BM, D)
    n0, n1, n2, n3 = _key_blocks(p, first, lo, BN)
    for n in range(n1, n2):
        dq0, dq1 = _dq_step(
            dq0, dq1, q0, q1, do0, do1, lse_i, d_i, k, v, kt, vt, n * BN, p, first, lo, slope, scale, S,
            D, D0, D1, BN, False,
        )  # fmt: skip
    for n in range(n0, n3 - (n2 - n1)):
        j = _nth_masked(n, n1, n2) * BN
        dq0, dq1 = _dq_step(
            dq0, dq1, q0, q1, do0, do1, lse_i, d_i, k, v, kt, vt, j, p, first, lo, slope, scale, S,
            D, D0, D1, BN, True,
        )  # fmt: skip
    dq0, dq1 = _times(dq0, dq1, scale / LOG2E, D1)  # (BM, D)
    _store(dq + own, dq0, dq1, i0, H * D, T, BM, D, D0, D1)


@triton.jit
def _dkv_step(
    dk0, dk1, dv0, dv1, k0, k1, v0, v1, q, do, qt, dt, lse, delta, i0, j, ahead, lo, slope, scale, T, S,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what the queries i0 … i0+BM give; all transposed, so that nothing has to be turned."""
    q0, q1 = _load(q, i0, qt, T, BM, D, D0, D1, MASK)  # (BM, D)
    i, key = tl.arange(0, BM), tl.arange(0, BN)[:, None]  # (BM,), (BN, 1)
    p = (i + (i0 + ahead - j))[None, :]  # (1, BM) the last key that query i sees
    if slope is not None:  # forward counted distances from there, see _queries
        p = tl.minimum(p, S - 1 - j)  # (1, BM)
    first = p
    if MASK:
        lse_i = tl.load(lse + i0 + i, mask=i < T - i0, other=INF)  # (BM,) past the last query: probability 0
        d_i = tl.load(delta + i0 + i, mask=i < T - i0, other=0.0)  # (BM,)
        if lo is not None:
            first = (tl.load(lo + i0 + i, mask=i < T - i0, other=0).to(tl.int32) - j)[None, :]  # (1, BM)
    else:
        lse_i, d_i = tl.load(lse + i0 + i), tl.load(delta + i0 + i)  # (BM,), (BM,)
    s = _scores(k0, k1, q0, q1, p, first, key, lo, slope, D1, MASK)  # (BN, BM)
    prob = tl.exp2(s * scale - lse_i[None, :])  # (BN, BM)
    do0, do1 = _load(do, i0, dt, T, BM, D, D0, D1, MASK)  # (BM, D)
    dv0, dv1 = _add(dv0, dv1, prob, do0, do1, D1)  # (BN, D)
    ds = prob * (_products(v0, v1, do0, do1, D1) - d_i[None, :])  # (BN, BM)
    dk0, dk1 = _add(dk0, dk1, ds, q0, q1, D1)  # (BN, D)
    return dk0, dk1, dv0, dv1


@triton.jit
def _backward_kv(
    q, k, v, do, lse, delta, dk, dv, lo, start, slopes,
    qb, qh, qt, kb, kh, kt, vb, vh, vt, db, dh, dt, T, S, H, G, scale: tl.float32,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Own the keys j … j+BN of a key-value head: sum dk and dv over its heads and their queries, in order."""
    b, kv = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * BN  # early keys are seen by most queries: they go first
    q += b * qb * UNIT  # (H, T, D), as do
    do += b * db * UNIT
    qh, qt, kt, vt, dh, dt = qh * UNIT, qt * UNIT, kt * UNIT, vt * UNIT, dh * UNIT, dt * UNIT
    lse += b * H * T  # (H, T), as delta
    delta += b * H * T
    k0, k1 = _load(k + (b * kb + kv * kh) * UNIT, j, kt, S, BN, D, D0, D1, True)  # (BN, D)
    v0, v1 = _load(v + (b * vb + kv * vh) * UNIT, j, vt, S, BN, D, D0, D1, True)  # (BN, D)
    dk0, dk1 = _zeros(BN, D0, D1)  # (BN, D)
    dv0, dv1 = _zeros(BN, D0, D1)  # (BN, D)
    ahead = S - T  # the position of query 0
    if start is not None:
        ahead = tl.load(start + b).to(tl.int32)
    if lo is not None:
        lo += b * T
    n0, n1, n2, n3 = _query_blocks(j, ahead, lo, T, BM, BN)
    ends, whole = (n3 - n0) - (n2 - n1), n2 - n1  # blocks with and without mask
    # the heads of the group in one loop, not in a loop around these two, which would take many more registers
    for n in range(G * ends):
        h, i0 = kv * G + n // ends, _nth_masked(n0 + n % ends, n1, n2) * BM
        dk0, dk1, dv0, dv1 = _dkv_step(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q + h * qh, do + h * dh, qt, dt, lse + h * T, delta + h * T,
            i0, j, ahead, lo, _slope(slopes, h, scale), scale, T, S, D, D0, D1, BM, BN, True,
        )  # fmt: skip
    for n in range(G * whole):
        h, i0 = kv * G + n // whole, (n1 + n % whole) * BM
        dk0, dk1, dv0, dv1 = _dkv_step(
            dk0, dk1, dv0, dv1, k0, k1, v0, v1, q + h * qh, do + h * dh, qt, dt, lse + h * T, delta + h * T,
            i0, j, ahead, lo, _slope(slopes, h, scale), scale, T, S, D, D0, D1, BM, BN, False,
        )  # fmt: skip
    K = H // G
    own = (b * S * K + kv) * D  # dk and dv lie in memory as (B, S, K, D)
    dk0, dk1 = _times(dk0, dk1, scale / LOG2E, D1)  # (BN, D)
    _store(dk + own, dk0, dk1, j, K * D, S, BN, D, D0, D1)
    _store(dv + own, dv0, dv1, j, K * D, S, BN, D, D0, D1)


def backward(do, q, k, v, o, lse, lo, start, slopes):
    """Launch the backward pass; returns dq, dk, dv, laid out tokens first."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q, k, v, do = (side_by_side(x) for x in (q, k, v, do))
    o = o.transpose(1, 2).contiguous()  # as forward made it, so this copies nothing
    delta, dq = torch.empty_like(lse), q.new_empty(B, T, H, D)
    dk, dv = k.new_empty(B, S, K, D), v.new_empty(B, S, K, D)
    places, (strides, unit) = _places(lo, start, slopes, B, T), _strides(q, k, v, do)
    how = dict(launch("attention_dq", D, q.dtype))
    _backward_q[triton.cdiv(T, how["BM"]), H, B](
        q, k, v, o, do, lse, delta, dq, *places, *strides, T, S, H, H // K, _scale(D),
        UNIT=unit, **_widths(D, how), **how,
    )  # fmt: skip
    how = dict(launch("attention_dkv", D, q.dtype))
    _backward_kv[triton.cdiv(S, how["BN"]), K, B](
        q, k, v, do, lse, delta, dk, dv, *places, *strides, T, S, H, H // K, _scale(D),
        UNIT=unit, **_widths(D, how), **how,
    )  # fmt: skip
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# --- 5. decoding --------------------------------------------------------------------------------------------


@triton.jit
def _decode(
    q, k, v, part, lse, lengths, slopes, qb, qh, qt, kb, kh, kt, vb, vh, vt, T, S, H, G, scale: tl.float32,
    UNIT: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, R: tl.constexpr,
    BN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Own a chunk of the keys of a key-value head, for R of its G·T rows: row r is query r%T of head r//T."""
    tiles = tl.cdiv(G * T, R)
    b, kv = tl.program_id(2).to(tl.int64), (tl.program_id(1) // tiles).to(tl.int64)
    r = tl.program_id(1) % tiles * R + tl.arange(0, R)  # (R,)
    h = kv * G + r // T  # (R,)
    length = tl.load(lengths + b).to(tl.int32)
    used = tl.minimum(length + T, S)  # what lies beyond is never read
    at = q + (b * qb + h * qh + (r % T).to(tl.int64) * qt) * UNIT  # (R,)
    column = tl.arange(0, D0)  # (D0,)
    q0 = tl.load(at[:, None] + column, mask=(r < G * T)[:, None] & (column < D), other=0.0)  # (R, D0)
    q1 = q0
    if D1 > 0:
        column = D0 + tl.arange(0, D1)  # (D1,)
        q1 = tl.load(at[:, None] + column, mask=(r < G * T)[:, None] & (column < D), other=0.0)  # (R, D1)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + h, mask=r < G * T, other=0.0).to(tl.float32)[:, None] * (
            LOG2E / scale
        )  # (R, 1)
    k += (b * kb + kv * kh) * UNIT  # (S, D)
    v += (b * vb + kv * vh) * UNIT  # (S, D)
    kt, vt = kt * UNIT, vt * UNIT
    p = length + r % T  # (R,)
    sum0, sum1 = _zeros(R, D0, D1)  # (R, D)
    m = tl.full([R], -INF, tl.float32)  # (R,)
    l = tl.zeros([R], tl.float32)  # (R,)
    begin = tl.program_id(0) * CHUNK
    for j in range(begin, tl.minimum(begin + CHUNK, used), BN):
        sum0, sum1, m, l = _attend(
            sum0, sum1, m, l, q0, q1, k, v, kt, vt, j, p, p, None, slope, scale, used, D, D0, D1, BN, True
        )  # fmt: skip
    some, l = l > 0, tl.where(l > 0, l, 1.0)  # (R,), (R,)
    sum0, sum1 = _times(sum0, sum1, 1.0 / l[:, None], D1)  # (R, D)
    mine = (r < G * T) & (begin < used)  # (R,) an empty chunk writes nothing, and nobody reads it
    chunk = ((b * H + h) * T + r % T) * tl.num_programs(0) + tl.program_id(0)  # (R,) of (B, H, T, chunks)
    tl.store(lse + chunk, tl.where(some, m + tl.log2(l), -INF), mask=mine)
    column = tl.arange(0, D0)  # (D0,)
    tl.store((part + chunk * D)[:, None] + column, sum0, mask=mine[:, None] & (column < D))
    if D1 > 0:
        column = D0 + tl.arange(0, D1)  # (D1,)
        tl.store((part + chunk * D)[:, None] + column, sum1, mask=mine[:, None] & (column < D))


@triton.jit
def _combine(part, lse, o, lengths, T, S, H, N, D: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr):
    """Own one query of one head: add up its chunks, weighted by 2^lse, sixteen at a time and in order."""
    b, h, t = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
    used = tl.cdiv(tl.minimum(tl.load(lengths + b).to(tl.int32) + T, S), CHUNK)  # chunks that were written
    row = ((b * H + h) * T + t) * N
    column = tl.arange(0, W)  # (W,)
    total = tl.zeros([W], tl.float32)  # (W,)
    m = -INF
    l = 0.0
    for n0 in range(0, used, 16):
        n = n0 + tl.arange(0, 16)  # (16,)
        score = tl.load(lse + row + n, mask=n < used, other=-INF)  # (16,)
        x = tl.load(
            part + (row + n)[:, None] * D + column, mask=(n < used)[:, None] & (column < D), other=0.0
        )  # (16, W)
        top = tl.maximum(m, tl.max(score, 0))
        base = tl.where(top == -INF, 0.0, top)
        e, shrink = tl.exp2(score - base), tl.exp2(m - base)  # (16,), ()
        total = total * shrink + tl.sum(e[:, None] * x, 0)  # (W,)
        l = l * shrink + tl.sum(e, 0)
        m = top
    out = total / tl.where(l > 0, l, 1.0)  # (W,)
    tl.store(o + ((b * T + t) * H + h) * D + column, out.to(o.dtype.element_ty), mask=column < D)


def decode(q, k, v, lengths, slopes):
    """Launch decoding: q (B, H, T, D), T small, k and v (B, K, S, D), lengths (B,) read on the device."""
    (B, H, T, D), (K, S) = q.shape, k.shape[1:3]
    q, k, v = (side_by_side(x) for x in (q, k, v))
    lengths, G = lengths.contiguous(), H // K
    how = dict(launch("attention_decode", D, q.dtype))
    # at most 64 chunks; up to there a row's sums do not depend on the cache's size
    while how["CHUNK"] * 64 < S:
        how["CHUNK"] *= 2
    N, R = triton.cdiv(S, how["CHUNK"]), min(64, max(16, triton.next_power_of_2(G * T)))
    part = q.new_empty(B, H, T, N, D, dtype=torch.float32)
    lse = q.new_empty(B, H, T, N, dtype=torch.float32)
    o = q.new_empty(B, T, H, D)
    strides, unit = _strides(q, k, v)
    _decode[N, K * triton.cdiv(G * T, R), B](
        q, k, v, part, lse, lengths, slopes, *strides, T, S, H, G, _scale(D),
        UNIT=unit, **_widths(D, how), R=R, **how,
    )  # fmt: skip
    _combine[T, H, B](
        part, lse, o, lengths, T, S, H, N, D=D, W=triton.next_power_of_2(D), CHUNK=how["CHUNK"], num_warps=4
    )  # fmt: skip
    return o.transpose(1, 2)


# --- 6. what the launches share -----------------------------------------------------------------------------


def _strides(*tensors: torch.Tensor) -> tuple[list[int], int]:
    """Give all strides but the last, in units of the second result.

    Triton looks for multiples of 16 by itself. A head of 60 begins at a multiple of 4: a kernel that is told
    loads 4 numbers at once, and while it computes; another loads one by one, and waits.
    """
    strides = [n if size > 1 else 0 for x in tensors for n, size in zip(x.stride()[:3], x.shape)]
    unit = math.gcd(16, *strides) % 16 or 1
    return [n // unit for n in strides], unit


def _places(lo, start, slopes, B: int, T: int):
    """Give lo, start and slopes, where they are given, the strides that the kernels expect."""
    lo = None if lo is None else lo.expand(B, T).contiguous()
    start = None if start is None else start.expand(B).contiguous()
    return lo, start, None if slopes is None else slopes.contiguous()


def _scale(D: int) -> float:
    return LOG2E.value / D**0.5


def _widths(D: int, how: dict) -> dict[str, int]:
    """Cut a head into a power of two and a smaller one; "whole" in the launch pads instead. 80 -> 64 + 16."""
    whole = how.pop("whole", False)
    full = max(16, triton.next_power_of_2(D))
    rest = max(16, triton.next_power_of_2(D - 64)) if D > 64 else 64
    return {"D": D, "D0": full, "D1": 0} if whole or rest == 64 else {"D": D, "D0": 64, "D1": rest}
