"""The language-model head and its loss in one operation that never holds all logits.

    logits = x Wᵀ + b;   lse = log Σ_v exp logits_v;   nll = lse − logits[target]

For V = 100,278 and 8,192 tokens fp32 logits would take 3.3 GB. Here rows are worked in chunks: the forward
pass keeps only lse, the backward pass computes each chunk's logits again and turns them into their
gradient,

    d logits = g_nll · (softmax − onehot) + g_lse · softmax,

and adds x's and W's shares. Cost 8·N·V·C instead of 6·N·V·C. W's gradient is summed over chunks in fp32.

The idea: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}  # logits of one chunk: near the cache; 0.5 GB in fp32
IGNORE = -100


def linear_nll(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each row's negative log-likelihood of its target.

    x (N, C), weight (V, C), bias (V,) or None, targets (N,) in 0 … V−1, or −100 for rows that are not
    trained. Returns (nll, lse), both (N,) in fp32 (float64 for float64 input); both 0 where targets is
    −100. The weight is used in x's dtype, whatever its own.
    """
    return _LinearNLL.apply(x, weight, bias, targets)


def _chunks(x: torch.Tensor, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS[x.device.type] // vocabulary)
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _logits(x, w, b):
    return F.linear(x, w, b).to(torch.promote_types(x.dtype, torch.float32))


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        kind = torch.promote_types(x.dtype, torch.float32)
        classes = targets.masked_fill(targets == IGNORE, 0)
        lse = torch.empty(len(x), dtype=kind, device=x.device)
        picked = torch.empty_like(lse)
        for part in _chunks(x, len(weight)):
            logits = _logits(x[part], w, b)
            picked[part] = logits.gather(-1, classes[part, None])[:, 0]
            lse[part] = logits.logsumexp(-1)
        ctx.save_for_backward(x, weight, bias, targets, lse)
        trained = targets != IGNORE
        return (lse - picked) * trained, lse * trained

    @staticmethod
    @once_differentiable
    def backward(ctx, g_nll, g_lse):
        x, weight, bias, targets, lse = ctx.saved_tensors
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        trained = targets != IGNORE
        g_nll, g_lse = g_nll * trained, g_lse * trained
        classes = targets.masked_fill(~trained, 0)
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        dx = torch.empty_like(x) if need_x else None
        dw = torch.zeros(weight.shape, dtype=lse.dtype, device=x.device) if need_w else None
        db = torch.zeros(len(weight), dtype=lse.dtype, device=x.device) if need_b else None
        for part in _chunks(x, len(weight)):
            d = _logits(x[part], w, b).sub_(lse[part, None]).exp_()  # softmax
            d.mul_((g_nll[part] + g_lse[part])[:, None])
            d.scatter_add_(-1, classes[part, None], -g_nll[part, None])
            if need_b:
                db += d.sum(0)
            d = d.to(x.dtype)
            if need_x:
                dx[part] = d @ w
            if need_w:
                dw += d.t() @ x[part]
        return (
            dx,
            dw.to(weight.dtype) if need_w else None,
            db.to(bias.dtype) if need_b else None,
            None,
        )
