"""Linear layers over weights stored in 8 or 4 bits; activations keep their dtype.

    int8: W[n,k] = scale[n] · q[n,k]                                        one scale per output row
    int4: W[n,k] = scales[n,g] · (nibble − 8) + zeros[n,g],  g = k // group  two nibbles a byte

Byte j of an int4 row holds column 2j in its low and column 2j+1 in its high nibble.

On disk (the layout of GPTQ folders) values are packed into int32 words, the first in the lowest bits: `pack`,
`unpack`.

Dettmers et al. 2022, "LLM.int8()"; Frantar et al. 2022, "GPTQ" (group-wise scales).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    parts = [(words >> bits * i) & (2**bits - 1) for i in range(32 // bits)]
    return torch.stack(parts, dim + 1).to(torch.uint8).flatten(dim, dim + 1)


def ones(bits: int) -> int:
    """Give the word with a 1 in each of its fields: by so much GPTQ's format v1 stores zeros too low."""
    return {4: 0x11111111, 8: 0x01010101}[bits]


def int8_linear(
    x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply x (..., K) by an int8 weight: q (N, K), scale (N,), bias (N,) → (..., N) in x's dtype."""
    y = F.linear(x, q.to(x.dtype)) * scale.to(x.dtype)  # int8 is exact in bf16: no weight is rounded
    return y if bias is None else y + bias.to(x.dtype)


def int4_dequantize(q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, group: int) -> torch.Tensor:
    """Unpack int4 weights: q (N, K/2) uint8, scales and zeros (N, K/group) → (N, K) in the scales' dtype."""
    nibbles = torch.stack((q & 15, q >> 4), dim=-1).flatten(1)  # (N, K)
    values = (nibbles.to(scales.dtype) - 8).unflatten(1, (-1, group))  # (N, K/group, group)
    return (values * scales[..., None] + zeros[..., None]).flatten(1)


def int4_linear(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply by an int4 weight: x (..., K) → (..., N) in x's dtype.

    q (N, K/2) uint8, scales and zeros (N, K/group), bias (N,). K is a multiple of group, group is even.
    """
    y = F.linear(x, int4_dequantize(q, scales, zeros, group).to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype)
