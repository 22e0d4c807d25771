"""Rotary position embedding: turn pairs of coordinates of q and k by an angle that grows with the position.

    (a, b) → (a·cos θ − b·sin θ,  b·cos θ + a·sin θ),   θ = position · inv_freq[i]

Coordinate i is paired with i + R/2 (the "half split" of LLaMA-HF, GPT-NeoX and Phi) inside the first R
dimensions; the D − R others pass through (Phi rotates 32 of 80).

Angles are fp32: bf16 has only 897 distinct values between 0 and 8,191.  Su et al. 2021, "RoFormer".
"""

from __future__ import annotations

import torch


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cos and sin of every angle, once per forward pass for all layers.

    positions (B, T) integer, inv_freq (R/2,) fp32. Returns two (B, 1, T, R) fp32 tensors, ready to multiply:
    every angle stands twice, for a and for b, and the sines of the first half are negative.
    """
    angles = (positions[..., None].to(inv_freq.dtype) * inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of queries or keys, or of both stacked along the heads.

    x (B, H, T, D); cos and sin (B or 1, 1, T, R) fp32, from rope_table. Returns (B, H, T, D) in x's dtype.
    """
    R = cos.shape[-1]
    wide = torch.promote_types(x.dtype, cos.dtype)  # fp32, or fp64
    part = (x if x.shape[-1] == R else x[..., :R]).to(wide)
    turned = torch.addcmul(part * cos, part.roll(R // 2, -1), sin).to(x.dtype)  # roll: (b, a) beside (a, b)
    return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), -1)
