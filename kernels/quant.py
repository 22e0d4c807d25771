"""Matrices stored in 8 or 4 bits: the words of a file, and the products that a CPU computes from them.

    y[n] = Σ_k scale[n,g] · (q[n,k] − zero[n,g]) · x[k],   g = k // group

Files (GPTQ's layout) pack the values into int32 words, the first in the lowest bits: `pack`, `unpack`.

One row of text at a time is as fast as its weights are read, so `packed` stores them for a single pass over
the memory: with 8 bits as tables of which torch sums up rows (EmbeddingBag), with 4 bits as torch's own
int4 product wants them. For many rows a part of the matrix at a time is put together in the caches, and
multiplied. Activations keep their dtype, except that the 4-bit product of fp32 rounds them to bf16.

On a GPU: PackedGPU, and _quant_triton.py.

Measured with two threads, one row by 3072 x 576: bf16 0.24 ms (see matvec.py), 8 bits 0.16, 4 bits 0.10.

Frantar et al. 2022, "GPTQ" (groups); the FBGEMM and tinygemm kernels that torch carries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from kernels.dispatch import constant_in_graphs, on_triton, operator

# --- 1. the words of a file ---------------------------------------------------------------------------------


def pack(values: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Pack integers in [0, 2^bits) into int32 words along a dimension; it is a multiple of 32/bits long."""
    per = 32 // bits
    parts = values.to(torch.int32).unflatten(dim, (-1, per))
    words = torch.zeros_like(parts.select(dim + 1, 0))
    for i in range(per):
        words |= parts.select(dim + 1, i) << bits * i  # the last may reach the sign bit
    return words


def unpack(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Undo `pack`: int32 words -> uint8 values, 32/bits times as many along the dimension."""
    parts = [(words >> bits * i & (2**bits - 1)).to(torch.uint8) for i in range(32 // bits)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)


def ones(bits: int) -> int:
    """Give the word with a 1 in each of its fields: by so much GPTQ's format v1 stores zeros too low."""
    return {4: 0x11111111, 8: 0x01010101}[bits]


# --- 2. products --------------------------------------------------------------------------------------------


def packed(
    q: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
    rows: int = 1,
) -> Packed | None:
    """Rearrange a matrix for products with about `rows` rows of a dtype; None: this device has no product.

    q (N, K) uint8; zeros (N, G) uint8 and scales (N, G), one for each K/G inputs.
    """
    if dtype != torch.float64 and on_triton(scales):
        works = PackedGPU.works(q.shape[1], scales.shape[1])
        return PackedGPU(q, zeros, scales, bits) if works else None
    if not q.is_cpu:
        return None
    if bits == 4:
        return Packed4(q, zeros, scales, dtype) if Packed4.works(q.shape[1] // scales.shape[1]) else None
    if rows > 1 and scales.shape[1] == 1 and (zeros == 128).all():
        return Rows8(q, scales)
    return Packed8(q, zeros, scales)


class Packed:
    """A matrix (N, K) in a form for products; a subclass says how it is stored."""

    N: int
    K: int
    few = 1  # up to so many rows are multiplied without putting the matrix together

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (..., K); return (..., N) in x's dtype. No gradients."""
        rows = x.reshape(-1, self.K)
        if len(rows) <= self.few:
            y = self.product(rows)
        else:
            y = x.new_empty(len(rows), self.N)
            for a, part, scale in self.parts(x.dtype):
                y[:, a : a + part.shape[1]] = (rows @ part) * scale
        return y.view(*x.shape[:-1], self.N)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Put the matrix (N, K) together."""
        whole = torch.empty(self.N, self.K, dtype=dtype)
        for a, part, scale in self.parts(dtype):
            whole[a : a + part.shape[1]] = (part * scale).t()
        return whole

    @property
    def nbytes(self) -> int:
        """Bytes that one product of a row reads."""
        return sum(t.numel() * t.itemsize for t in vars(self).values() if isinstance(t, torch.Tensor))


PART = 2**20  # weights that are put together at a time: with their sources they fit the cache of a core
Part = tuple[
    int, torch.Tensor, torch.Tensor | int
]  # some outputs: the first, weights (K, n), times this (n,)


class Packed8(Packed):
    """8 bits: a table for each block of outputs, whose row k holds the block's weights of input k.

    The product is a sum of table rows with the inputs as weights, as EmbeddingBag computes it; that of
    FBGEMM for tables of bytes streams through them. It reads a row's factor and offset from the row's last 8
    bytes: always 1 and −128, for here scales belong to outputs and groups: a bag for every block and group.
    """

    few = 3

    def __init__(self, q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor):
        (self.N, self.K), self.G = q.shape, scales.shape[1]
        self.C, self.width = _blocks(self.N)
        more = self.C * self.width - self.N
        tail = torch.tensor([1.0, -128.0]).view(torch.uint8)
        self.table = torch.empty(self.C * self.K, self.width + len(tail), dtype=torch.uint8)
        self.table[:, self.width :] = tail
        body = self.table.view(self.C, self.K, -1)[..., : self.width]
        for c in range(self.C):
            part = q[c * self.width : (c + 1) * self.width]
            body[c, :, : len(part)] = part.t()
            body[c, :, len(part) :] = 128
        grid = torch.nn.functional.pad(scales.float(), (0, 0, 0, more))  # (C · width, G) fp32
        self.scales = grid.view(self.C, self.width, self.G).transpose(1, 2).contiguous()
        offset = torch.nn.functional.pad(128 - zeros.float(), (0, 0, 0, more))
        self.offset = None  # what zeros other than 128 add: (G, N)
        if offset[: self.N].any():
            self.offset = (offset * grid)[: self.N].t().contiguous()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply a few rows x (M, K)."""
        M, (C, G, width) = len(x), self.scales.shape
        index, starts = _bags(C, M, self.K, G)
        weights = x.expand(C, M, self.K).float().reshape(-1)
        sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.table, index, starts, False, 0, False, weights, None, False
        )  # (C · M · G, width) fp32
        if M == G == 1:
            y = (sums * self.scales[:, 0]).view(1, -1)[:, : self.N]
        else:
            y = (sums.view(C, M, G, width) * self.scales[:, None]).sum(2)
            y = y.transpose(0, 1).reshape(M, C * width)[:, : self.N]
        if self.offset is not None:
            y = y + x.float().view(M, G, -1).sum(-1) @ self.offset
        return y.to(x.dtype)

    def parts(self, dtype: torch.dtype) -> Iterator[Part]:
        """Yield the matrix part by part."""
        step = max(1, PART // (self.K * self.width))
        for c in range(0, self.C, step):
            block = self.table.view(self.C, self.K, -1)[c : c + step, :, : self.width]
            block = block.transpose(0, 1)  # (K, c, width)
            part = (block ^ 128).view(torch.int8).to(dtype).flatten(1)  # q − 128 is exact in every dtype
            a, n = c * self.width, part.shape[1]
            scale = self.scales[c : c + step].transpose(0, 1).reshape(self.G, n)
            if self.G > 1 or self.offset is not None:
                part.view(self.G, -1, n).mul_(scale[:, None].to(dtype))
            if self.offset is not None:
                shift = self.offset[:, None, a : a + n].to(dtype)
                part.view(self.G, -1, n)[..., : shift.shape[-1]] += shift
            times = scale[0, : self.N - a] if self.G == 1 and self.offset is None else 1
            yield a, part[:, : self.N - a], times


class Rows8(Packed):
    """8 bits, one scale a row, zeros of 128: the rows as they are, for several rows of text at a time."""

    few = 8

    def __init__(self, q: torch.Tensor, scales: torch.Tensor):
        self.N, self.K = q.shape
        self.q = (q ^ 128).view(torch.int8)  # q − 128
        self.scales = scales[:, 0].float()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply a few rows x (M, K)."""
        return torch.ops.aten._weight_int8pack_mm(x, self.q, self.scales.to(x.dtype))

    def parts(self, dtype: torch.dtype) -> Iterator[Part]:
        """Yield the matrix part by part."""
        step = max(1, PART // self.K)
        for a in range(0, self.N, step):
            yield a, self.q[a : a + step].to(dtype).t(), self.scales[a : a + step]


class Packed4(Packed):
    """4 bits: torch's `_weight_int4pack_mm_for_cpu`, for activations of 16 bits.

    Its blocks have 64 outputs (32 with AVX2 alone); byte i of a column holds the outputs i and i + half. Each
    value is (q − 8) · scale + zero, with both in the dtype of the activations.
    """

    few = 16

    def __init__(self, q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype):
        self.N, self.K = q.shape
        self.dtype = torch.bfloat16 if dtype == torch.float32 else dtype
        group = self.K // scales.shape[1]
        self.group = math.gcd(group, 256)  # it takes 32, 64, 128 and 256
        self.half = _half()
        size = 2 * self.half
        rows = -(-self.N // size) * size  # padded to whole blocks
        self.table = torch.empty(rows, self.K // 2, dtype=torch.uint8)
        step = max(size, PART // self.K // size * size)
        for a in range(0, rows, step):
            part = q[a : a + step].to(torch.int32)
            part = torch.nn.functional.pad(part, (0, 0, 0, min(step, rows - a) - len(part)), value=8)
            self.table[a : a + step] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1)
        pairs = torch.zeros(self.K // group, rows, 2)
        pairs[:, : self.N, 0] = scales.t()
        pairs[:, : self.N, 1] = (8 - zeros.float()).t() * scales.float().t()
        self.scales_and_zeros = pairs.to(self.dtype).repeat_interleave(group // self.group, 0)
        self.shift = None  # 8 − zero, where a zero is not 8: (G, rows)
        if (zeros != 8).any():
            self.shift = torch.nn.functional.pad(8 - zeros.t().to(torch.int8), (0, rows - self.N))

    @staticmethod
    def works(group: int) -> bool:
        """Tell whether this machine's product takes the group and is stored in a known way."""
        return group % 32 == 0 and _half() > 0

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply a few rows x (M, K)."""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(self.dtype), self.table, self.group, self.scales_and_zeros
        )
        return y[:, : self.N].to(x.dtype)

    def parts(self, dtype: torch.dtype) -> Iterator[Part]:
        """Yield the matrix part by part."""
        half, size = self.half, 2 * self.half
        blocks = self.table.view(-1, self.K, half)
        step = max(1, PART // (self.K * size))
        for c in range(0, len(blocks), step):
            block = blocks[c : c + step].transpose(0, 1)  # (K, c, half)
            part = torch.empty(self.K, block.shape[1], 2, half, dtype=dtype)
            part[:, :, 0] = (block & 15).view(torch.int8) - 8
            part[:, :, 1] = (block >> 4).view(torch.int8) - 8
            a, n = c * size, block.shape[1] * size
            if self.shift is not None:
                shift = self.shift[:, a : a + n].to(dtype)
                part.view(len(shift), -1, n).add_(shift[:, None])
            part = part.view(self.K // self.group, self.group, n)
            part *= self.scales_and_zeros[:, a : a + n, 0].to(dtype).contiguous()[:, None]
            yield a, part.view(self.K, n)[:, : self.N - a], 1


class PackedGPU(Packed):
    """8 or 4 bits on a GPU: words in the order of _quant_triton.py, for activations of every dtype.

    The inputs are padded to whole blocks (128 with 8 bits, 256 with 4), with scales of 0.
    """

    few = 64  # more rows keep the tensor cores busy: then putting the matrix together once pays

    def __init__(self, q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, bits: int):
        (self.N, self.K), G = q.shape, scales.shape[1]
        self.bits, block = bits, 1024 // bits
        group = self.K // G if G > 1 else block
        self.group = math.gcd(group, block)  # a block holds whole groups: wider ones are repeated
        blocks = -(-self.K // block)
        q = torch.nn.functional.pad(q, (0, blocks * block - self.K)).view(self.N, blocks, -1, 32)
        words = torch.zeros(self.N, blocks, 32, dtype=torch.int32, device=q.device)
        for t in range(32 // bits):  # not of all fields at once: they would take four times the matrix
            words |= q[:, :, t].to(torch.int32) << bits * t
        self.words = words.view(self.N, -1)  # (N, W) int32
        self.scales, self.zeros = (self._by_block(t, G, blocks * block) for t in (scales, zeros))  # (G', N)

    @staticmethod
    def works(K: int, groups: int) -> bool:
        """Tell whether every 32 inputs share a scale; a single scale always works."""
        return groups == 1 or (K // groups) % 32 == 0

    def _by_block(self, t: torch.Tensor, G: int, size: int) -> torch.Tensor:
        """Repeat what belongs to a group (N, G) for each self.group inputs of it: (size / self.group, N)."""
        times = -(-self.K // G) // self.group if G > 1 else size // self.group
        t = t.t().repeat_interleave(times, 0)
        return torch.nn.functional.pad(t, (0, 0, 0, size // self.group - len(t))).contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x (..., K); return (..., N) in x's dtype. No gradients."""
        rows = x.reshape(-1, self.K)
        few = 16 if x.dtype == torch.float32 else self.few  # tensor cores do not multiply fp32
        y = self.product(rows) if len(rows) <= few else rows @ self.weight(x.dtype).t()
        return y.view(*x.shape[:-1], self.N)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply a few rows x (M, K)."""
        return _product(x, self.words, self.scales, self.zeros, self.bits, self.group)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Put the matrix (N, K) together."""
        return _whole(self.words, self.scales, self.zeros, self.K, self.bits, self.group, dtype)


@operator("baizhi::quant_product")
def _product(
    x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    from kernels import _quant_triton

    if not len(x):
        return x.new_empty(0, len(words))
    return _quant_triton.product(x, words, scales, zeros, bits, group)


@_product.register_fake
def _(x, words, scales, zeros, bits, group):
    return x.new_empty(len(x), len(words))


@operator("baizhi::quant_whole")
def _whole(
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    K: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    from kernels import _quant_triton

    return _quant_triton.whole(words, scales, zeros, K, bits, group, dtype)


@_whole.register_fake
def _(words, scales, zeros, K, bits, group, dtype):
    return words.new_empty(len(words), K, dtype=dtype)


def _blocks(N: int) -> tuple[int, int]:
    """Cut N outputs into equal blocks of about 192, as many for each thread: (blocks, width)."""
    blocks, threads = -(-N // 192), torch.get_num_threads()
    even = -(-blocks // threads) * threads
    if N // even >= 64:
        blocks = even
    return blocks, -(-N // blocks // 16) * 16


@constant_in_graphs
@functools.lru_cache(32)
def _bags(C: int, M: int, K: int, G: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the table rows of the bags (C, M, G), K/G in each, and where each bag starts."""
    with torch.inference_mode(False):  # kept for calls of every kind
        index = torch.arange(C * K, dtype=torch.int32).view(C, 1, K).expand(C, M, K).flatten()
        return index, torch.arange(C * M * G, dtype=torch.int32) * (K // G)


@functools.cache
def _half() -> int:
    """Find how torch stores int4 blocks on this machine: outputs in the low nibbles of one; 0: unknown."""
    q = (torch.arange(64 * 64, dtype=torch.int32) * 7 // 3 % 16).view(64, 64)
    table = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    for half in (32, 16):
        block = table.view(-1, 64, half)  # (blocks, K, half)
        if torch.equal(torch.stack((block & 15, block >> 4), 1).transpose(2, 3).reshape(64, 64), q.byte()):
            return half
    return 0
