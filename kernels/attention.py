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

from kernels.dispatch import obstacle, on_triton, operator, outside_graphs

_choice = "auto"


def use_attention(name: str, device: str = "cuda") -> None:
    """Choose what attention runs on from now on: "auto", "triton" or "sdpa" (see attention).

    ValueError: triton, and kernels do not run on that device.
    """
    global _choice
    if name not in ("auto", "triton", "sdpa"):
        raise ValueError(f"attention {name}: expected auto, triton or sdpa")
    if name == "triton" and (why := obstacle(device)):
        raise ValueError(f"attention triton: no Triton kernel can run here ({why}); choose auto or sdpa")
    _choice = name


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

    Where tensors take kernels at all (see kernels/dispatch.py), `use_attention` decides which:
    auto     PyTorch's own (scaled_dot_product_attention) for plain causal attention: published figures of its
             kernels are above those of any in Triton; Triton's for all else, since a mask takes PyTorch's
             fast kernels away
    triton   Triton's always
    sdpa     the definition below always
    fp32 and heads of more than 128 numbers take the definition: the tensor cores would round fp32 to 10 bits.
    ValueError: triton was chosen for these.
    """
    if _takes_kernels(q, k, v, lo, start, slopes):
        return _attention_op(q, k, v, lo, start, slopes)[0]
    B, H, T, D = q.shape
    K, S = k.shape[1:3]
    trains = q.is_cpu and torch.is_grad_enabled() and start is None and slopes is None and T == S
    if trains and _faster_by_document(q, k, v, lo):
        tokens = (t.transpose(1, 2).reshape(B * T, -1, D) for t in (q, k, v))  # (B·T, H or K, D)
        return _by_document(*tokens, _first_keys(lo, B, T)).view(B, T, H, D).transpose(1, 2)
    if lo is None and start is None and slopes is None:
        if T == 1:  # the heads of a group are rows that see the same keys
            return F.scaled_dot_product_attention(q.reshape(B, K, -1, D), k, v).view(B, H, 1, D)
        if T == S:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
    key = torch.arange(S, device=q.device)
    offset = torch.tensor([S - T], device=q.device) if start is None else start
    position = offset[:, None] + torch.arange(T, device=q.device)  # (B or 1, T)
    visible = key <= position[..., None]  # (B or 1, T, S)
    if lo is not None:
        visible = visible & (key >= lo[..., None])
    visible = visible[:, None]  # (B or 1, 1, T, S)
    if slopes is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=H != K)
    # distances are counted in fp32: in bf16 only 624 of 2,048 positions would stay distinct for slope 0.84
    wide = torch.promote_types(q.dtype, torch.float32)
    distance = (position[..., None] - key)[:, None].to(wide)
    bias = (-slopes.to(wide)[:, None, None] * distance).masked_fill(~visible, float("-inf"))
    if not q.is_cpu or torch.is_grad_enabled():  # there a bias must have the dtype of q
        q, k, v, dtype = q.to(wide), k.to(wide), v.to(wide), q.dtype
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=H != K).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=H != K)


# --- training on a CPU --------------------------------------------------------------------------------------
# scaled_dot_product_attention computes what a mask hides, and backward uses no matrix units of bf16.
# On a core with AMX, forward and backward, documents of 40-400 tokens: bf16 rows of 512 2.3x, of 2,048 6x as
# fast; fp32 1.7x and 3.5x. Without documents: bf16 rows of 512 1.6x; longer ones, and fp32, about even.

MERGE = 128  # short documents are worked together, under a mask, while they have at most so many tokens
BLOCK = 256  # queries of a long document that are worked at once: above their diagonal little is computed
KEEP = 512  # up to this length of a document its probabilities are kept for the backward pass


@outside_graphs  # it looks at values
def _faster_by_document(q, k, v, lo) -> bool:
    if not any(t.requires_grad for t in (q, k, v)):
        return False
    if lo is None:
        return q.dtype == torch.bfloat16 and q.shape[2] <= KEEP
    # a query that sees no key would give 0 / 0
    return q.dtype != torch.float16 and bool((lo <= torch.arange(lo.shape[1])).all())


def _first_keys(lo, B: int, T: int) -> torch.Tensor:
    """Count the first keys through all rows: (B, T) within rows -> (B·T,), row b begins at b·T."""
    row = torch.arange(0, B * T, T)[:, None].expand(B, T)
    return (row if lo is None else row + lo.clamp(min=0)).flatten()


def _spans(first: torch.Tensor) -> list[tuple[int, int]]:
    """Cut the tokens where none looks back any more, but not into pieces shorter than MERGE.

    first (N,): the first key that each token sees. [0, 0, 2, 2, 2] -> [(0, 2), (2, 5)] for MERGE 0.
    """
    index = torch.arange(len(first))
    back = first.flip(0).cummin(0).values.flip(0)  # the first key that this token or a later one sees
    cuts = (back == index).nonzero().flatten().tolist()
    spans, begin = [], 0
    for end, after in zip(cuts[1:] + [len(first)], cuts[2:] + [len(first)] * 2):
        if after - begin > MERGE or end == len(first):
            spans.append((begin, end))
            begin = end
    return spans


@outside_graphs  # the shapes are those of the documents
def _by_document(q, k, v, first):
    return _ByDocument.apply(q, k, v, first)


class _ByDocument(torch.autograd.Function):
    """Attention among tokens (N, H, D), each of which sees the keys first[i] … i.

    Probabilities of short documents are kept, those of long ones are computed again. Scores are rounded to
    q's dtype before the softmax, as plain PyTorch does: in bf16 an error of 1e-2 where they spread by 9.
    """

    @staticmethod
    def forward(ctx, q, k, v, first):
        K, out, saved = k.shape[1], torch.empty_like(q), [first]
        ctx.spans = _spans(first)
        for begin, end in ctx.spans:
            key, value = _heads(k[begin:end], K), _heads(v[begin:end], K)  # (K, n, D)
            saved += [key, value]
            for i in range(begin, end, BLOCK):
                j = min(i + BLOCK, end)
                query = _heads(q[i:j], K)  # (K, G·m, D)
                p = _probabilities(query, key[:, : j - begin], first[i:j], begin)
                out[i:j] = _tokens(p @ value[:, : j - begin], j - i)
                saved += [query, p if end - begin <= KEEP else None]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        first, *saved = ctx.saved_tensors
        saved, K = iter(saved), saved[0].shape[0]
        dq, (dk, dv) = torch.empty_like(grad), (grad.new_empty(len(grad), K, grad.shape[2]) for _ in "kv")
        for begin, end in ctx.spans:
            key, value = next(saved), next(saved)
            wide = torch.promote_types(key.dtype, torch.float32)
            dkey, dvalue = (torch.zeros(key.shape, dtype=wide) for _ in "kv")  # sums over the blocks
            for i in range(begin, end, BLOCK):
                j = min(i + BLOCK, end)
                n, scale = j - begin, key.shape[2] ** -0.5
                query, p = next(saved), next(saved)
                if p is None:
                    p = _probabilities(query, key[:, :n], first[i:j], begin)
                g = _heads(grad[i:j], K)
                ds = torch._softmax_backward_data(g @ value[:, :n].mT, p, -1, p.dtype)  # p · (dp − Σ p·dp)
                dq[i:j] = _tokens(ds @ key[:, :n], j - i) * scale
                dkey[:, :n] += (ds.mT @ query) * scale
                dvalue[:, :n] += p.mT @ g
            dk[begin:end], dv[begin:end] = _tokens(dkey, end - begin), _tokens(dvalue, end - begin)
        return dq, dk, dv, None


def _heads(x: torch.Tensor, K: int) -> torch.Tensor:
    """Put the heads first, those that share a key-value head together: (n, H, D) -> (K, G·n, D)."""
    return x.transpose(0, 1).reshape(K, -1, x.shape[2])


def _tokens(x: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse: (K, G·n, D) -> (n, H, D)."""
    return x.reshape(-1, n, x.shape[2]).transpose(0, 1)


def _probabilities(query, key, first, begin: int) -> torch.Tensor:
    """Let the last m tokens of a piece see its n keys: (K, G·m, D), (K, n, D), (m,) -> (K, G·m, n)."""
    m, n = len(first), key.shape[1]
    place = torch.arange(begin, begin + n)
    hidden = (place > place[n - m :, None]) | (place < first[:, None])  # (m, n)
    bias = torch.zeros(m, n, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
    bias = bias.repeat(query.shape[1] // m, 1)  # (G·m, n)
    return torch.baddbmm(bias, query, key.mT, alpha=key.shape[2] ** -0.5).softmax(-1)


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
    if _takes_kernels(q, k_cache, v_cache, None, lengths, slopes):
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_cache, v_cache)):
            return attention(q, k_cache, v_cache, start=lengths, slopes=slopes)
        return _decode_op(q, k_cache, v_cache, lengths, slopes)
    if torch.compiler.is_compiling():  # one graph for every length, and no question to the device
        return attention(q, k_cache, v_cache, start=lengths, slopes=slopes)
    T = q.shape[2]
    used = int(lengths.max()) + T  # the rest of the cache holds nothing that anyone sees
    k, v = k_cache[:, :, :used], v_cache[:, :, :used]
    alone = q.shape[0] == 1 and T == 1  # sees all that is used
    return attention(q, k, v, start=None if alone else lengths, slopes=slopes)


# --- Triton -------------------------------------------------------------------------------------------------


def _takes_kernels(q, k, v, lo, start, slopes) -> bool:
    D = q.shape[-1]
    if _choice == "sdpa" or not on_triton(q, k, v):
        return False
    if q.is_cpu and D <= 128:  # Triton's interpreter: tests, which want fp32, too
        return True
    if q.dtype == torch.float32 or D > 128:
        if _choice == "triton":
            what = f"{q.dtype}, heads of {D}".removeprefix("torch.")
            raise ValueError(
                f"attention triton takes 16 bits and heads of up to 128, not {what}: choose auto or sdpa"
            )
        return False
    plain = lo is None and start is None and slopes is None and q.shape[2] in (1, k.shape[2])
    return _choice == "triton" or not plain


def _like(x: torch.Tensor) -> torch.Tensor:
    """Give an empty tensor (B, H, T, D) that lies in memory as (B, T, H, D), as projections like it."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


@operator("baizhi::attention")
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lo: torch.Tensor | None,
    start: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and, in fp32, the logarithm (base 2) of every query's sum of exponentials."""
    from kernels._attention_triton import forward

    return forward(q, k, v, lo, start, slopes)


@_attention_op.register_fake
def _(q, k, v, lo, start, slopes):
    return _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@operator("baizhi::attention_backward")
def _attention_backward_op(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor | None,
    start: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from kernels._attention_triton import backward

    return backward(grad, q, k, v, o, lse, lo, start, slopes)


@_attention_backward_op.register_fake
def _(grad, q, k, v, o, lse, lo, start, slopes):
    return _like(q), _like(k), _like(v)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    return *_attention_backward_op(grad, *ctx.saved_tensors), None, None, None


_attention_op.register_autograd(_backward, setup_context=_save)


@operator("baizhi::attention_decode")
def _decode_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, slopes: torch.Tensor | None
) -> torch.Tensor:
    from kernels._attention_triton import decode

    return decode(q, k, v, lengths, slopes)


@_decode_op.register_fake
def _(q, k, v, lengths, slopes):
    return _like(q)
