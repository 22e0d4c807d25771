"""One matrix times one vector: all that a decoder does to write one token of one text on a CPU.

    y = W x (+ add),   W (out, in)

Every weight is read once, so the memory's speed is the limit. torch.mv reaches about half of it in bf16. A
sum of table rows with weights, which is what EmbeddingBag computes, is the same product for a W that is
stored by columns, and its x86 kernel streams: y = Σ_j x_j W[:, j].

Measured with two threads on 16-bit W of 576 x 576 to 49,152 x 576, more than the caches hold: F.linear 6-10
GB/s, torch.mv 7-12, EmbeddingBag 13-20, the sum of all elements 14-20. Elsewhere (Zen 5, bf16): with two
threads 17-30, 10-16 and 29-44 GB/s; with one 12-17, 7-10 and 23-33.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from kernels.dispatch import constant_in_graphs


def columns_are_faster(weight: torch.Tensor) -> bool:
    """Tell whether `matvec` is faster for this weight if it is stored by columns (see `by_columns`)."""
    if not weight.is_cpu or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return False
    return weight.dtype in (torch.bfloat16, torch.float16)


def by_columns(weight: torch.Tensor) -> torch.Tensor:
    """Store a matrix (out, in) by columns: the same values and shape, strides (1, out)."""
    return weight.t().contiguous().t()


def matvec(weight: torch.Tensor, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply weight (out, in), stored either way, by x (in,); return (out,) in x's dtype. No gradients.

    By columns each thread rounds its part of the sum to x's dtype, so another number of threads may differ in
    the last bit.
    """
    columns = weight.t()
    if not columns.is_contiguous() or weight.dtype not in (torch.bfloat16, torch.float16):
        if weight.dtype == torch.float16:  # torch.mv takes twice as long
            return F.linear(x, weight) if add is None else F.linear(x, weight, add)
        return torch.mv(weight, x) if add is None else torch.addmv(add, weight, x)
    index, starts = _bags(len(x))
    # bag t adds up x[j] · columns[j] over its part of j; the flags: unscaled, mode 0 (sum), dense
    parts = torch.embedding_bag(columns, index, starts, False, 0, False, x)[0]  # (threads, out)
    y = parts[0] + parts[1] if len(parts) == 2 else parts.sum(0)  # of parts rounded to x's dtype
    return y if add is None else y + add


@constant_in_graphs
def _bags(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the indices 0 … length − 1 and where each thread's part of them starts."""
    return _equal_bags(length, torch.get_num_threads())


@functools.cache
def _equal_bags(length: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.inference_mode(False):  # kept for calls of every kind
        starts = torch.arange(count, dtype=torch.int32) * length // count
        return torch.arange(length, dtype=torch.int32), starts
