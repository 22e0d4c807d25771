"""The language-model head and its loss in one operation that never holds all logits.

    logits = x Wᵀ + b;   lse = log Σ_v exp logits_v;   nll = lse − logits[target]

For V = 100,278 and 8,192 tokens fp32 logits would take 3.3 GB. Here rows are worked in chunks: the forward
pass keeps only lse, the backward pass computes each chunk's logits again and turns them into their
gradient,

    d logits = g_nll · (softmax − onehot) + g_lse · softmax,

and adds x's and W's shares. Cost 8·N·V·C instead of 6·N·V·C. W's gradient is summed over chunks in fp32.

On a GPU the forward pass makes no logits at all, and the backward pass works in chunks of the vocabulary: see
_linear_nll_triton.py.

The idea: Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.dispatch import on_triton, operator

CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # logits of one matrix product: 33 MB, 0.3 GB in bf16
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 27}  # of these in fp32 at a time: in the cache, all
PAIRS = 1 << 24  # the GPU's forward pass: maxima and sums of tiles, 0.13 GB; 8,192 rows take a fifth
IGNORE = -100


def linear_nll(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each row's negative log-likelihood of its target.

    x (N, C), weight (V, C), bias (V,) or None, targets (N,) in 0 … V−1, or −100 for rows that are not
    trained. Returns (nll, lse), both (N,) in fp32 (float64 for float64 input); both 0 where targets is
    −100. The weight is used in x's dtype, whatever its own.
    """
    if on_triton(x, weight, bias):
        return _operator(x, weight, bias, targets)
    return _LinearNLL.apply(x, weight, bias, targets)


# --- 1. plain torch -----------------------------------------------------------------------------------------


def _parts(length: int, elements: int, vocabulary: int) -> list[slice]:
    size = max(1, elements // vocabulary)
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _blocks(x, w, b):
    """Yield chunks of rows, their logits in x's dtype, and the blocks of rows within them."""
    device, vocabulary = x.device.type, len(w)
    for part in _parts(len(x), CHUNK_ELEMENTS[device], vocabulary):
        logits = F.linear(x[part], w, b)
        yield part, logits, _parts(len(logits), BLOCK_ELEMENTS[device], vocabulary)


class _LinearNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        kind = torch.promote_types(x.dtype, torch.float32)
        classes = targets.masked_fill(targets == IGNORE, 0)
        lse = torch.empty(len(x), dtype=kind, device=x.device)
        picked = torch.empty_like(lse)
        for part, logits, blocks in _blocks(x, w, b):
            for rows in blocks:
                z = logits[rows].to(kind)
                lse[part][rows] = z.logsumexp(-1)
                picked[part][rows] = z.gather(-1, classes[part][rows, None])[:, 0]
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
        for part, d, blocks in _blocks(x, w, b):
            for rows in blocks:  # logits become their gradient
                z = d[rows].to(lse.dtype).sub_(lse[part][rows, None]).exp_()  # softmax
                z.mul_((g_nll + g_lse)[part][rows, None])
                z.scatter_add_(-1, classes[part][rows, None], -g_nll[part][rows, None])
                if need_b:
                    db += z.sum(0)
                d[rows] = z
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


# --- 2. the operators of the Triton kernels -----------------------------------------------------------------


def _cast(x, weight, bias):
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


@operator("baizhi::linear_nll")
def _operator(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels import _linear_nll_triton

    if not len(x):
        return tuple(torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2))
    return _linear_nll_triton.forward(x, *_cast(x, weight, bias), targets, PAIRS)


@_operator.register_fake
def _(x, weight, bias, targets):
    return tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))


@operator("baizhi::linear_nll_backward")
def _backward_operator(
    g_nll: torch.Tensor,
    g_lse: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    need_x: bool,
    need_w: bool,
    need_b: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give three gradients; an operator cannot return None, so one that nobody needs is empty."""
    from kernels import _linear_nll_triton

    none = x.new_empty(0), weight.new_empty(0), x.new_empty(0) if bias is None else bias.new_empty(0)
    if not len(x):
        full = torch.empty_like(x), torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    else:
        full = _linear_nll_triton.backward(
            g_nll,
            g_lse,
            x,
            *_cast(x, weight, bias),
            targets,
            lse,
            need_x,
            weight.dtype if need_w else None,
            need_b,
            CHUNK_ELEMENTS["cuda"],
        )
    dx, dw, db = (f if need else n for f, n, need in zip(full, none, (need_x, need_w, need_b)))
    return dx, dw, db.to(bias.dtype) if need_b else db


@_backward_operator.register_fake
def _(g_nll, g_lse, x, weight, bias, targets, lse, need_x, need_w, need_b):
    like = (x, need_x), (weight, need_w), (bias, need_b)
    return tuple(
        torch.empty(t.shape, dtype=t.dtype, device=x.device) if need else (x if t is None else t).new_empty(0)
        for t, need in like
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx, g_nll, g_lse):
    x, weight, bias, targets, lse = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = _backward_operator(g_nll, g_lse, x, weight, bias, targets, lse, *needs)
    return *(g if need else None for g, need in zip(grads, needs)), None


_operator.register_autograd(_backward, setup_context=_setup)
