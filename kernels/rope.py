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

    positions (B, T) integer, inv_freq (R/2,) fp32. Returns two (B, T, R/2) fp32 tensors.
    """
    angles = positions[..., None].to(inv_freq.dtype) * inv_freq
    return angles.cos(), angles.sin()


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first R dimensions of q and k.

    q (B, H, T, D), k (B, K, T, D), cos and sin (B, T, R/2) fp32. Returns q and k rotated, in their dtypes.
    """
    R = 2 * cos.shape[-1]
    cos = torch.cat((cos, cos), -1)[:, None]  # (B, 1, T, R): the same for every head
    sin = torch.cat((-sin, sin), -1)[:, None]

    def rotate(x):
        part = x[..., :R]
        swapped = part.roll(R // 2, -1).to(sin.dtype)  # (b, a) beside (a, b)
        turned = torch.addcmul(part * cos, swapped, sin).to(x.dtype)  # in fp32
        return turned if x.shape[-1] == R else torch.cat((turned, x[..., R:]), -1)

    return rotate(q), rotate(k)
