"""Causal attention with grouped heads, documents, a cache and ALiBi, all through two integers:
where a row's queries begin, and each query's first key.

    out[b,h,i] = Σ_j softmax_j( q[b,h,i]·k[b,h//G,j] / √D − slopes[h]·(p − j) ) v[b,h//G,j]
    p = start[b] + i,   j runs over lo[b,i] … p,   G = H/K query heads share a key-value head

`start` says where the queries sit among the keys (a cache), `lo` is the first key that a query may see
(packed documents). A query that sees no key (lo > p) gives 0.

ALiBi: Press et al. 2021, "Train Short, Test Long". Grouped heads: Ainslie et al. 2023, "GQA".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally from every query to the keys of its own document.

    q (B, H, T, D); k, v (B, K, S, D) with H a multiple of K; lo (B, T) integer, default 0; start (B,)
    integer, default S − T; slopes (H,) for ALiBi. Returns (B, H, T, D) in q's dtype. Only this definition
    builds a (T, S) mask.
    """
    T, S = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    plain = lo is None and start is None and slopes is None and T in (1, S)
    dense_is_faster = q.is_cpu and q.dtype == torch.bfloat16 and T <= 512 and torch.is_grad_enabled()
    if plain and not dense_is_faster:
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=grouped)
    key = torch.arange(S, device=q.device)
    offset = torch.tensor([S - T], device=q.device) if start is None else start
    position = offset[:, None] + torch.arange(T, device=q.device)  # (B or 1, T)
    visible = key <= position[..., None]  # (B or 1, T, S)
    if lo is not None:
        visible = visible & (key >= lo[..., None])
    visible = visible[:, None]  # (B or 1, 1, T, S)
    if slopes is None:
        if dense_is_faster and (
            lo is None or bool(visible.any(-1).all())
        ):  # a query that sees no key: 0 / 0 there
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) if grouped else t for t in (k, v))
            return _DenseAttention.apply(q, k, v, visible)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
    # distances are counted in fp32: in bf16 only 624 of 2,048 positions would stay distinct for slope 0.84
    wide = torch.promote_types(q.dtype, torch.float32)
    distance = (position[..., None] - key)[:, None].to(wide)
    bias = (-slopes.to(wide)[:, None, None] * distance).masked_fill(~visible, float("-inf"))
    if not q.is_cpu or torch.is_grad_enabled():  # elsewhere the bias must have the dtype of q
        q, k, v, dtype = q.to(wide), k.to(wide), v.to(wide), q.dtype
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=grouped)


class _DenseAttention(torch.autograd.Function):
    """Short rows in training on a CPU: keep the (T, S) probabilities, the rest is matrix products.

    Measured on 2 cores with AMX, forward and backward, bf16: T 128 6x, T 256 2.7x, T 512 1-2x as fast as
    scaled_dot_product_attention, whose backward pass there does not use the matrix units. Scores are rounded
    to bf16 before the softmax, as plain bf16 PyTorch does: error 1e-2 where scores spread by 9, not 2e-3.
    """

    @staticmethod
    def forward(ctx, q, k, v, visible):
        hidden = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, float("-inf"))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
        p = scores.add_(hidden).softmax(-1)
        ctx.save_for_backward(q, k, v, p)
        return p @ v

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        dp = grad @ v.transpose(-1, -2)
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p · (dp − Σ p·dp)
        return (ds @ k) * scale, ds.transpose(-1, -2) @ (q * scale), p.transpose(-1, -2) @ grad, None


def attention_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from a few new tokens to a cache that already holds their keys and values.

    q (B, H, T, D) with T ≤ 8; k_cache, v_cache (B, K, S, D); lengths (B,): the tokens before the new ones, so
    that query i of row b sits at position lengths[b] + i. Returns (B, H, T, D).
    """
    T = q.shape[2]
    used = int(lengths.max()) + T  # the rest of the cache holds nothing that anyone sees
    k, v = k_cache[:, :, :used], v_cache[:, :, :used]
    if q.shape[0] == 1 and T == 1 and slopes is None:  # the heads of a group are rows that see the same keys
        return F.scaled_dot_product_attention(q.reshape(1, k.shape[1], -1, q.shape[3]), k, v).view(q.shape)
    return attention(q, k, v, start=lengths, slopes=slopes)
