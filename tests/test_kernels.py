"""Every plain-torch twin of kernels/ against its formula, written here as a loop in float64.

Bounds. fp32: relative L2 error ≤ 2e-6 forward, 4e-6 backward (measured: 3e-7 and 8e-7). bf16: error at most twice
that of the same formula in plain torch bf16, and relative L2 ≤ 1.2e-2 whatever that one does (measured: 5e-3).
"""

import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kernels

FP32, FP32_GRAD, BF16 = 2e-6, 4e-6, 1.2e-2
pytestmark = pytest.mark.usefixtures("one_thread")
linear_nll_file = sys.modules["kernels.linear_nll"]  # the attribute kernels.linear_nll is the function
attention_file = sys.modules["kernels.attention"]


def rel(got: torch.Tensor, want: torch.Tensor, if_zero: float = 1.0) -> float:
    """Relative L2 error; where the truth is 0 everywhere, the error relative to `if_zero`."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape and got.isfinite().all()
    size = want.norm().item()
    return (got - want).norm().item() / (size if size > 1e-9 else if_zero)


def randn(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


# --- 1. attention --------------------------------------------------------------------------------------------


def loop_attention(q, k, v, lo=None, start=None, slopes=None):
    """The formula, one row and head at a time, in float64; which key is seen is decided key by key."""
    (B, H, T, D), K, S = q.shape, k.shape[1], k.shape[2]
    out = []
    for b, h in itertools.product(range(B), range(H)):
        first = [0 if lo is None else int(lo[b, i]) for i in range(T)]
        place = [(S - T if start is None else int(start[b])) + i for i in range(T)]
        seen = torch.tensor([[first[i] <= j <= place[i] for j in range(S)] for i in range(T)])
        far = torch.tensor([[float(place[i] - j) for j in range(S)] for i in range(T)], dtype=torch.float64)
        x, keys, values = q[b, h].double(), k[b, h * K // H].double(), v[b, h * K // H].double()
        scores = x @ keys.T / math.sqrt(D) - (0 if slopes is None else float(slopes[h])) * far
        top = scores.masked_fill(~seen, -1e300).amax(1, keepdim=True)
        e = torch.where(seen, scores - top, 0).exp() * seen
        out.append(e @ values / e.sum(1, keepdim=True).clamp(min=1e-300))
    return torch.stack(out).view(B, H, T, D)


def qkv(B, H, K, T, S, D, dtype=torch.float32, scale=1.0, seed=0):
    return (
        randn(B, H, T, D, seed=seed, scale=scale, dtype=dtype),
        randn(B, K, S, D, seed=seed + 1, dtype=dtype),
        randn(B, K, S, D, seed=seed + 2, dtype=dtype),
    )


def check_attention(q, k, v, **options):
    """Compare values and the three gradients with the loop; fp32 inputs."""
    mine = [t.detach().requires_grad_() for t in (q, k, v)]
    truth = [t.detach().double().requires_grad_() for t in (q, k, v)]
    y, want = kernels.attention(*mine, **options), loop_attention(*truth, **options)
    assert y.dtype == q.dtype and rel(y, want) < FP32
    g = randn(*y.shape, seed=9)
    y.backward(g)
    want.backward(g.double())
    for name, a, b in zip("qkv", mine, truth):  # a softmax over one key has zero gradient for q and k
        assert rel(a.grad, b.grad, if_zero=g.norm().item()) < FP32_GRAD, name


SIZES = [(n, n) for n in (1, 2, 15, 16, 17, 63, 64, 65, 129)]
SIZES += [(1, 2), (1, 64), (1, 129), (2, 17), (15, 16), (16, 63), (17, 65), (64, 65)]


@pytest.mark.parametrize("T, S", SIZES)
@pytest.mark.parametrize("H, K, D", [(2, 2, 64), (4, 2, 80), (4, 1, 64)])
def test_attention_equals_the_formula(T, S, H, K, D):
    check_attention(*qkv(1, H, K, T, S, D))


@pytest.mark.parametrize("T, S", [(17, 15), (5, 1)])
def test_more_queries_than_keys_leaves_the_first_ones_zero(T, S):
    q, k, v = qkv(2, 2, 1, T, S, 16)
    assert kernels.attention(q, k, v)[:, :, : T - S].abs().max() == 0
    check_attention(q, k, v)


def starts(*lengths):
    """lo of a row packed with documents of these lengths."""
    return torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])


def window(T, w):
    return (torch.arange(T) - w + 1).clamp(min=0)


LO = {
    "one document": torch.stack([starts(40), starts(40)]),
    "many documents": torch.stack([starts(7, 9, 16, 8), starts(16, 1, 23)]),
    "documents of length 1": torch.stack([starts(*[1] * 40), starts(1, 1, 38)]),
    "window of 1": torch.stack([window(40, 1)] * 2),
    "window of 5": torch.stack([window(40, 5), window(40, 16)]),
    "a row without keys": torch.stack([torch.full((40,), 40), starts(20, 20)]),
    "left padding": torch.stack([torch.full((40,), 11), torch.full((40,), 0)]),
}


@pytest.mark.parametrize("slopes", [None, [0.5, 0.25, 0.125, 0.84]], ids=["", "alibi"])
@pytest.mark.parametrize("kind", LO)
def test_lo_hides_earlier_keys(kind, slopes):
    q, k, v = qkv(2, 4, 2, 40, 40, 16)
    check_attention(q, k, v, lo=LO[kind], slopes=None if slopes is None else torch.tensor(slopes))


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25])], ids=["", "alibi"])
def test_a_query_without_keys_gives_zero_and_zero_gradient(slopes):
    q, k, v = (t.requires_grad_() for t in qkv(2, 2, 2, 8, 8, 16))
    lo = torch.stack([torch.full((8,), 8), torch.zeros(8, dtype=torch.long)])
    y = kernels.attention(q, k, v, lo=lo, slopes=slopes)
    assert (y[0] == 0).all() and (y[1] != 0).all()
    y.sum().backward()
    for t in (q, k, v):
        assert t.grad.isfinite().all() and (t.grad[0] == 0).all()


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("T", [1, 3, 17])
def test_start_places_each_row_among_its_keys(T, alibi):
    q, k, v = qkv(3, 4, 2, T, 40, 16)
    start = torch.tensor([0, 23, 40 - T])
    slopes = torch.tensor([0.5, 0.1, 0.9, 0.3]) if alibi else None
    check_attention(q, k, v, start=start, slopes=slopes)
    lo = (start[:, None] + torch.arange(T) - 6).clamp(min=0)
    check_attention(q, k, v, start=start, slopes=slopes, lo=lo)


@pytest.mark.parametrize("heads", [1, 3, 6, 8])
def test_alibi_penalises_distance(heads):
    slopes = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)])
    check_attention(*qkv(2, heads, heads, 33, 33, 16), slopes=slopes)
    check_attention(*qkv(2, heads, heads, 5, 33, 16), slopes=slopes)


def test_alibi_distances_stay_distinct_in_bf16():
    """With equal keys the weights are exp(−slope·distance) alone: v one-hot reads them off."""
    S, slope = 600, 0.02
    q, k = torch.zeros(1, 1, 1, S, dtype=torch.bfloat16), torch.zeros(1, 1, S, S, dtype=torch.bfloat16)
    v = torch.eye(S, dtype=torch.bfloat16)[None, None]
    y = kernels.attention(q, k, v, slopes=torch.tensor([slope])).double().flatten()
    want = torch.softmax(-slope * torch.arange(S - 1, -1, -1, dtype=torch.float64), 0)
    assert (
        (y - want).abs() / want
    ).max() < 2**-8  # the rounding of the output; bf16 distances would give 2^-2


def test_attention_reads_non_contiguous_inputs():
    B, T, H, D = 2, 19, 4, 16
    x = randn(B, T, H, 3, D)
    q, k, v = (t.transpose(1, 2) for t in x.unbind(3))  # as BLOOM's fused projection gives them
    assert not q.is_contiguous()
    lo = torch.stack([starts(9, 10), starts(19)])
    for options in ({}, {"lo": lo}, {"slopes": torch.full((H,), 0.3)}):
        plain = kernels.attention(q.contiguous(), k.contiguous(), v.contiguous(), **options)
        assert rel(kernels.attention(q, k, v, **options), plain) < FP32
        check_attention(q, k, v, **options)
    shared = k[:, :1].expand(B, H, T, D)  # stride 0 over heads
    check_attention(q, shared, shared, lo=lo)
    check_attention(q[..., ::2], k[..., ::2], v[..., ::2])


@pytest.mark.parametrize("options", ["plain", "lo", "start", "slopes", "all"])
def test_attention_gradcheck(options):
    q, k, v = (t.double().requires_grad_() for t in qkv(2, 2, 1, 4, 6, 2))
    given = {
        "lo": torch.tensor([[0, 0, 3, 3], [0, 1, 2, 6]]),
        "start": torch.tensor([0, 2]),
        "slopes": torch.tensor([0.5, 0.2]),
    }
    given = given if options == "all" else {n: t for n, t in given.items() if n == options}
    assert gradcheck(lambda *t: kernels.attention(*t, **given), (q, k, v))


@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_attention_survives_huge_scores(scale):
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 2, 17, 17, 64, scale=scale))
    for options in ({}, {"lo": torch.zeros(1, 17, dtype=torch.long)}, {"slopes": torch.tensor([0.5, 0.1])}):
        y = kernels.attention(q, k, v, **options)
        assert (y - loop_attention(q, k, v, **options)).abs().max() < scale * 1e-5
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v)))


def test_equal_keys_give_the_mean_of_the_visible_values():
    q, _, v = qkv(1, 1, 1, 9, 9, 8)
    y = kernels.attention(q, torch.ones_like(v), v)
    assert rel(y, v.double().cumsum(2) / torch.arange(1, 10)[:, None]) < FP32


def test_triton_is_refused_where_no_kernel_can_run(monkeypatch):
    monkeypatch.delenv("KERNELS", raising=False)
    for device, missing, why in [
        ("cpu", False, "the device is cpu"),
        ("cuda:0", True, "triton is not installed"),
    ]:
        if missing:
            monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=f"no Triton kernel can run here .{why}.; choose auto or sdpa"):
            kernels.use_attention("triton", device)


def test_attention_is_bitwise_reproducible():
    q, k, v = (t.requires_grad_() for t in qkv(2, 4, 2, 65, 65, 64))
    lo = torch.stack([starts(30, 35), starts(65)])
    runs = []
    for _ in range(2):
        y = kernels.attention(q, k, v, lo=lo)
        runs.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("kind", ["plain", "lo", "alibi", "lo+alibi", "start"])
def test_attention_in_bf16_is_as_good_as_plain_torch(kind):
    H, T, S = 4, 65, 65
    q, k, v = qkv(2, H, 2, T if kind != "start" else 9, S, 80, dtype=torch.bfloat16)
    options = {}
    if "lo" in kind:
        options["lo"] = torch.stack([starts(30, 35), starts(16, 16, 33)])
    if "alibi" in kind:
        options["slopes"] = torch.tensor([0.84, 0.5, 0.1, 0.02])
    if kind == "start":
        options["start"] = torch.tensor([7, 56])

    def plain(q, k, v):  # textbook attention in bf16, step by step
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        T = q.shape[2]
        p = options.get("start", torch.full((2,), S - T))[:, None] + torch.arange(T)  # (B, T)
        j = torch.arange(S)
        seen = (j <= p[..., None]) & (j >= options.get("lo", torch.zeros_like(p))[..., None])
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if "slopes" in options:
            far = (p[..., None] - j)[:, None].to(q.dtype)
            scores = scores - options["slopes"].to(q.dtype)[:, None, None] * far
        return scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1) @ v

    g = randn(*q.shape, seed=9)
    errors = []
    truth = [t.double().requires_grad_() for t in (q, k, v)]
    want = loop_attention(*truth, **options)
    want = [want, *torch.autograd.grad(want, truth, g.double())]
    for f in (lambda *t: kernels.attention(*t, **options), plain):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        y = f(*leaves)
        assert y.dtype == torch.bfloat16
        got = [y, *torch.autograd.grad(y, leaves, g.to(y.dtype))]
        errors.append([rel(a, b) for a, b in zip(got, want)])
    for name, ours, theirs in zip(("y", "dq", "dk", "dv"), *errors):
        assert ours < BF16 and ours <= 2 * theirs + 1e-6, (name, ours, theirs)


def pieces(monkeypatch, merge, block, keep):
    for name, value in (("MERGE", merge), ("BLOCK", block), ("KEEP", keep)):
        monkeypatch.setattr(attention_file, name, value)


def test_tokens_are_cut_between_documents_but_not_into_small_pieces(monkeypatch):
    first = torch.tensor([0, 0, 2, 2, 2, 5, 6, 6])  # documents of 2, 3, 1 and 2 tokens
    for merge, want in (
        (0, [(0, 2), (2, 5), (5, 6), (6, 8)]),
        (3, [(0, 2), (2, 5), (5, 8)]),
        (5, [(0, 5), (5, 8)]),
    ):
        monkeypatch.setattr(attention_file, "MERGE", merge)
        assert attention_file._spans(first) == want
    monkeypatch.setattr(attention_file, "MERGE", 0)
    assert attention_file._spans(torch.tensor([0, 0, 1, 2, 4])) == [(0, 4), (4, 5)]  # a window, then a cut


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("merge, block, keep", [(0, 7, 99), (12, 7, 10), (12, 40, 0), (99, 16, 50)])
@pytest.mark.parametrize("kind", ["many documents", "documents of length 1", "window of 5", "left padding"])
def test_training_works_document_by_document_however_it_is_cut(monkeypatch, kind, merge, block, keep, H, K):
    pieces(monkeypatch, merge, block, keep)
    lo = LO[kind].minimum(torch.arange(40))  # a query without keys goes another way
    check_attention(*qkv(2, H, K, 40, 40, 16), lo=lo)


def test_training_computes_nothing_between_documents():
    """Rows of 4 documents of 128: no tensor is larger than the scores of one, and none is (T, T)."""
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 2, 512, 512, 16))
    lo = starts(128, 128, 128, 128)[None]
    with Largest() as seen:
        kernels.attention(q, k, v, lo=lo).sum().backward()
    assert seen.elements == 2 * 128 * 128
    with torch.no_grad(), Largest() as seen:
        kernels.attention(q, k, v, lo=lo)
    assert seen.elements >= 512 * 512  # the observer does see masks


def test_attention_by_document_gradcheck(monkeypatch):
    pieces(monkeypatch, 2, 2, 3)
    q, k, v = (t.double().requires_grad_() for t in qkv(2, 2, 1, 7, 7, 2))
    lo = torch.stack([starts(2, 5), starts(1, 1, 3, 2)])
    assert gradcheck(lambda *t: kernels.attention(*t, lo=lo), (q, k, v))


def test_short_bf16_rows_equal_the_formula_with_and_without_documents():
    q, k, v = qkv(2, 4, 2, 300, 300, 64, dtype=torch.bfloat16)
    for lo in (None, torch.stack([starts(100, 200), starts(17, 283)])):
        truth = [t.double().requires_grad_() for t in (q, k, v)]
        mine = [t.clone().requires_grad_() for t in (q, k, v)]
        seen = torch.arange(300) <= torch.arange(300)[:, None]
        seen = (seen if lo is None else seen & (torch.arange(300) >= lo[..., None])[:, None]).expand(
            2, 1, 300, 300
        )
        want = F.scaled_dot_product_attention(*truth, attn_mask=seen, enable_gqa=True)
        y = kernels.attention(*mine, lo=lo)
        g = randn(*y.shape, seed=9, dtype=torch.bfloat16)
        y.backward(g)
        want.backward(g.double())
        assert rel(y, want) < BF16
        assert all(rel(a.grad, b.grad) < BF16 for a, b in zip(mine, truth))  # measured 4.6e-3


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("T", [1, 2, 8])
@pytest.mark.parametrize("lengths", [[0], [31], [0, 5, 31], [24, 24, 24]])
def test_attention_decode_equals_attention_at_the_same_positions(lengths, T, alibi):
    B, H, K, D, size = len(lengths), 4, 2, 16, 64
    k, v = randn(B, K, size, D, seed=1), randn(B, K, size, D, seed=2)
    q = randn(B, H, T, D)
    slopes = torch.tensor([0.5, 0.1, 0.9, 0.3]) if alibi else None
    for b, n in enumerate(lengths):  # what an earlier tenant of the row left there is never read
        k[b, :, n + T :] = 1e30
        v[b, :, n + T :] = -1e30
    y = kernels.attention_decode(q, k, v, torch.tensor(lengths), slopes)
    for b, n in enumerate(lengths):
        used = (q[b : b + 1], k[b : b + 1, :, : n + T], v[b : b + 1, :, : n + T])
        assert rel(y[b : b + 1], loop_attention(*used, slopes=slopes)) < FP32
        assert rel(y[b : b + 1], kernels.attention(*used, slopes=slopes)) < FP32


@pytest.mark.parametrize("size", [1, 300])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.1])], ids=["", "alibi"])
def test_attention_takes_fp16(slopes, size):
    """Folders of fp16 weights (phi-2, bloomz) load in fp16. Phi-2's q and k reach hundreds: q·k overflows fp16."""
    q, k, v = qkv(2, 2, 2, 17, 17, 80, dtype=torch.float16)
    if size > 1:
        q, k = (t.sign() * size for t in (q, k))
        k[:, :, 3] = q[:, :, 9]  # 80 · 300² = 7.2 million
    y = kernels.attention(q, k, v, slopes=slopes)
    assert y.dtype == torch.float16 and rel(y, loop_attention(q, k, v, slopes=slopes)) < 1.5e-3
    at = torch.tensor([3, 16])
    y = kernels.attention_decode(q[:, :, :1], k, v, at, slopes)
    assert rel(y, loop_attention(q[:, :, :1], k, v, start=at, slopes=slopes)) < 1.5e-3


# --- 2. norms ------------------------------------------------------------------------------------------------


def formula_rms(x, w, eps, r=None):
    h = x if r is None else x + r
    return w * h / (h.square().mean(-1, keepdim=True) + eps).sqrt(), h


def formula_layer(x, w, b, eps, r=None):
    h = x if r is None else x + r
    centred = h - h.mean(-1, keepdim=True)
    return w * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + b, h


NORM_SHAPES = [(1, 1), (3, 100), (5, 2560), (2, 3, 48), (263, 17)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norm_equals_the_formula_with_gradients(shape, norm, residual):
    C = shape[-1]
    inputs = [randn(*shape) + 0.5, randn(C, seed=1) + 1]
    inputs += [randn(C, seed=2)] if norm == "layer" else []
    inputs += [randn(*shape, seed=3)] if residual else []
    mine = [t.clone().requires_grad_() for t in inputs]
    truth = [t.double().requires_grad_() for t in inputs]
    op, formula = {"rms": (kernels.rms_norm, formula_rms), "layer": (kernels.layer_norm, formula_layer)}[norm]
    split = 3 if norm == "layer" else 2
    got = op(*mine[:split], 1e-5, *mine[split:])
    want = formula(*truth[:split], 1e-5, *truth[split:])
    assert isinstance(got, tuple) == residual
    got, want = (got, want) if residual else ([got], want[:1])
    loss = wanted = 0
    for i, (a, b) in enumerate(zip(got, want)):
        assert rel(a, b) < FP32
        g = randn(*shape, seed=5 + i)
        loss, wanted = loss + (a * g).sum(), wanted + (b * g.double()).sum()
    loss.backward()
    wanted.backward()
    for i, (a, b) in enumerate(zip(mine, truth)):
        if C > 1:  # with one column x cancels: the true gradient is 0 and 1/sqrt(eps) enlarges any rounding
            assert rel(a.grad, b.grad) < FP32_GRAD, i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_zero_constant_and_huge_rows_is_finite(dtype):
    x = torch.stack([torch.zeros(64), torch.full((64,), 7.0), randn(64) * 1e4, torch.full((64,), 1e4)]).to(
        dtype
    )
    w, b = torch.ones(64), torch.full((64,), 0.25)
    for op, formula in (
        (lambda t: kernels.rms_norm(t, w, 1e-5), formula_rms(x.double(), 1.0, 1e-5)[0]),
        (lambda t: kernels.layer_norm(t, w, b, 1e-5), formula_layer(x.double(), 1.0, 0.25, 1e-5)[0]),
    ):
        leaf = x.clone().requires_grad_()
        y = op(leaf)
        assert y.dtype == dtype and y.isfinite().all()
        # not the last row: LayerNorm subtracts equal numbers of 1e4/sqrt(eps) there
        assert rel(y[:3], formula[:3]) < (FP32 if dtype == torch.float32 else 4e-3)
        y.sum().backward()
        assert leaf.grad.isfinite().all()
    assert (kernels.rms_norm(x, w, 1e-5)[0] == 0).all() and (
        kernels.layer_norm(x, w, b, 1e-5)[0] == 0.25
    ).all()


def test_rms_norm_rounds_as_llama_does_bit_for_bit():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, w = randn(50, 640, dtype=torch.bfloat16, scale=3), (randn(640, seed=1) + 1).bfloat16()
    theirs = LlamaRMSNorm(640, eps=1e-6).bfloat16()
    with torch.no_grad():
        theirs.weight.copy_(w)
        want = theirs(x)
    got = kernels.rms_norm(x, w, 1e-6)
    assert got.dtype == torch.bfloat16 and torch.equal(got, want)
    assert torch.equal(kernels.rms_norm(x, w.float(), 1e-6), want)  # fp32 master of the same value
    other_order = ((x.float() * (x.float().square().mean(-1, True) + 1e-6).rsqrt()) * w.float()).bfloat16()
    assert not torch.equal(other_order, want)  # the order shows, so this test can fail


def test_norm_with_fp32_weights_keeps_the_stream_in_bf16():
    x, r = randn(4, 32, dtype=torch.bfloat16), randn(4, 32, seed=1, dtype=torch.bfloat16)
    w, b = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    for y, h in (kernels.rms_norm(x, w, 1e-5, r), kernels.layer_norm(x, w, b, 1e-5, r)):
        assert y.dtype == h.dtype == torch.bfloat16 and torch.equal(h, x + r)
        y.sum().backward()
    assert w.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 1e-2])
def test_norm_uses_its_eps(eps):
    x, w, b = randn(3, 16, scale=1e-2), torch.ones(16), torch.zeros(16)
    assert rel(kernels.rms_norm(x, w, eps), formula_rms(x.double(), 1.0, eps)[0]) < FP32
    assert rel(kernels.layer_norm(x, w, b, eps), formula_layer(x.double(), 1.0, 0.0, eps)[0]) < FP32


# --- 3. rotary positions -------------------------------------------------------------------------------------


def frequencies(R, theta=10000.0):
    return 1.0 / theta ** (torch.arange(0, R, 2, dtype=torch.float32) / R)


def complex_rope(x, positions, freq):
    """Coordinate i and i + R/2 are one complex number, turned by exp(i·position·freq[i]) in float64."""
    n = len(freq)
    z = torch.complex(x[..., :n].double(), x[..., n : 2 * n].double())
    z = z * torch.polar(torch.ones(1, dtype=torch.float64), positions[:, None, :, None] * freq.double())
    return torch.cat([z.real, z.imag, x[..., 2 * n :].double()], -1)


@pytest.mark.parametrize("D, R", [(64, 64), (80, 32), (16, 6), (2, 2)])
@pytest.mark.parametrize("offset", [0, 1, 300])
def test_rope_turns_pairs_by_position_times_frequency(D, R, offset):
    q, k = randn(2, 4, 7, D), randn(2, 2, 7, D, seed=1)
    positions = torch.stack([torch.arange(7) + offset, torch.arange(7) * 3])
    freq = frequencies(R)
    table = kernels.rope_table(positions, freq)
    got = kernels.rope_pair(q, k, *table)
    for y, x in zip(got, (q, k)):
        assert y.dtype == x.dtype and rel(y, complex_rope(x, positions, freq)) < 5e-6  # fp32 angles of 300
        assert torch.equal(y[..., R:], x[..., R:])
        assert rel(y.norm(dim=-1), x.norm(dim=-1)) < FP32


def test_rope_by_negative_positions_is_the_inverse():
    q, k = randn(1, 2, 50, 80), randn(1, 1, 50, 80, seed=1)
    freq, positions = frequencies(32), torch.arange(4000, 4050)[None]
    for x in (q, k):
        there = kernels.rope(x, *kernels.rope_table(positions, freq))
        assert rel(kernels.rope(there, *kernels.rope_table(-positions, freq)), x) < FP32


def test_rope_scores_depend_on_the_distance_only():
    q, k = randn(1, 1, 1, 64), randn(1, 1, 1, 64, seed=1)
    freq, scores = frequencies(64), []
    for shift in (0, 5, 100):
        a = kernels.rope(q, *kernels.rope_table(torch.tensor([[17 + shift]]), freq))
        b = kernels.rope(k, *kernels.rope_table(torch.tensor([[3 + shift]]), freq))
        scores.append((a * b).sum())
    assert rel(torch.stack(scores), scores[0].expand(3)) < 1e-5


def test_rope_gradient_is_the_inverse_rotation():
    x = randn(1, 2, 5, 10).double().requires_grad_()
    table = kernels.rope_table(torch.arange(5)[None], frequencies(6).double())
    assert gradcheck(lambda x: kernels.rope(x, *table), (x,))


def test_rope_keeps_float64():
    x, positions = randn(1, 2, 5, 16).double(), torch.arange(5)[None]
    cos, sin = kernels.rope_table(positions, frequencies(16))
    exact = kernels.rope(x, cos.double(), sin.double())
    assert rel(kernels.rope(x, cos, sin), exact) < 1e-15


def test_rope_equals_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = randn(2, 4, 9, 64), randn(2, 2, 9, 64, seed=1)
    positions = torch.stack([torch.arange(9), torch.arange(100, 109)])
    freq = frequencies(64)
    angles = torch.cat([positions[..., None].float() * freq] * 2, -1)
    want = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    for x, theirs in zip((q, k), want):
        assert rel(kernels.rope(x, *kernels.rope_table(positions, freq)), theirs) < FP32


def test_rope_table_tells_8192_positions_apart():
    """XuanYuan-70B's report: bf16 angles. arange(8192) holds only 897 distinct bf16 values."""
    positions = torch.arange(8192)
    assert len(positions.bfloat16().unique()) == 897
    freq = frequencies(128)
    cos, sin = kernels.rope_table(positions[None], freq)
    assert cos.dtype == sin.dtype == torch.float32
    for i in (0, 1, 31, 63):
        assert len(torch.stack([cos[0, 0, :, i], sin[0, 0, :, i + 64]], 1).unique(dim=0)) == 8192, i
    angles = positions[:, None].double() * freq.double()
    for part, sign in ((slice(None, 64), -1), (slice(64, None), 1)):  # every angle twice, ready to multiply
        assert (cos[0, 0, :, part] - angles.cos()).abs().max() < 5e-4
        assert (sin[0, 0, :, part] - sign * angles.sin()).abs().max() < 5e-4


def test_rope_keeps_bf16_and_rounds_once():
    q = randn(1, 2, 6, 16, dtype=torch.bfloat16)
    positions, freq = torch.arange(1000, 1006)[None], frequencies(6)
    a = kernels.rope(q, *kernels.rope_table(positions, freq))
    assert a.dtype == torch.bfloat16
    want = complex_rope(q, positions, freq)
    assert ((a.double() - want).abs() <= want.abs() * 2**-8 + 1e-3 * 2**-8).all()


def test_rope_reads_non_contiguous_heads():
    x = randn(2, 9, 3, 2, 16)
    q, k = (t.transpose(1, 2) for t in x.unbind(3))
    table = kernels.rope_table(torch.arange(9)[None], frequencies(16))
    for heads in (q, k):
        assert torch.equal(kernels.rope(heads, *table), kernels.rope(heads.contiguous(), *table))


# --- 4. gated unit -------------------------------------------------------------------------------------------

ACT = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("act", ACT)
def test_glu_equals_the_formula_from_minus_50_to_50(act):
    assert set(kernels.ACTIVATIONS) == set(ACT)
    gate, up = torch.linspace(-50, 50, 1001), randn(1001, scale=50)
    mine, truth = (
        [t.clone().requires_grad_() for t in (gate, up)],
        [t.double().requires_grad_() for t in (gate, up)],
    )
    y, want = kernels.glu(*mine, act), ACT[act](truth[0]) * truth[1]
    assert rel(y, want) < FP32
    y.sum().backward()
    want.sum().backward()
    for a, b in zip(mine, truth):
        assert rel(a.grad, b.grad) < FP32_GRAD
    low = kernels.glu(gate.bfloat16(), up.bfloat16(), act)
    assert low.dtype == torch.bfloat16 and rel(low, want) < BF16


def test_glu_defaults_to_swiglu():
    x, y = randn(3, 5), randn(3, 5, seed=1)
    assert torch.equal(kernels.glu(x, y), kernels.glu(x, y, "silu"))


# --- 5. the head and its loss --------------------------------------------------------------------------------


@pytest.fixture(params=[1, 5 * 101, 1 << 21], ids=["1 row a chunk", "5 rows a chunk", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setitem(linear_nll_file.CHUNK_ELEMENTS, "cpu", request.param)
    monkeypatch.setitem(linear_nll_file.BLOCK_ELEMENTS, "cpu", max(1, request.param // 3))


def head_inputs(N=37, V=101, C=48, bias=True, ignore="some", dtype=torch.float32, scale=1.0):
    x, w = randn(N, C, dtype=dtype), randn(V, C, seed=1, scale=0.2 * scale, dtype=dtype)
    b = randn(V, seed=2, dtype=dtype) if bias else None
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    targets[0], targets[-1] = 0, V - 1
    if ignore == "some":
        targets[torch.arange(N) % 3 == 1] = -100
    elif ignore == "all":
        targets[:] = -100
    return x, w, b, targets


def reference_nll(x, w, b, targets):
    logits = x @ w.T if b is None else x @ w.T + b
    nll = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return nll, torch.logsumexp(logits, -1) * (targets != -100)


@pytest.mark.parametrize("ignore", ["none", "some", "all"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N, V, C", [(37, 101, 48), (1, 2, 1), (64, 129, 7)])
def test_linear_nll_equals_cross_entropy_with_gradients(N, V, C, bias, ignore, chunk):
    x, w, b, targets = head_inputs(N, V, C, bias, ignore)
    mine = [t.clone().requires_grad_() for t in (x, w, b) if t is not None]
    truth = [t.double().requires_grad_() for t in (x, w, b) if t is not None]
    nll, lse = kernels.linear_nll(mine[0], mine[1], mine[2] if bias else None, targets)
    want, want_lse = reference_nll(truth[0], truth[1], truth[2] if bias else None, targets)
    assert nll.dtype == lse.dtype == torch.float32 and nll.shape == lse.shape == (N,)
    assert rel(nll, want) < FP32 and rel(lse, want_lse) < FP32
    assert (nll[targets == -100] == 0).all() and (lse[targets == -100] == 0).all()
    g, z = randn(N, seed=5), randn(N, seed=6)
    ((nll * g).sum() + (z * lse.square()).sum()).backward()
    ((want * g.double()).sum() + (z.double() * want_lse.square()).sum()).backward()
    for name, a, t in zip("xwb", mine, truth):
        assert rel(a.grad, t.grad) < FP32_GRAD, name
    assert (mine[0].grad[targets == -100] == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_linear_nll_gradcheck(bias, chunk):
    x, w, b, targets = head_inputs(6, 9, 4, bias, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    assert gradcheck(lambda x, w, b=None: kernels.linear_nll(x, w, b, targets), leaves)


def test_linear_nll_gradient_of_lse_alone_is_the_softmax():
    x, w, b, targets = head_inputs(ignore="none")
    x.requires_grad_()
    kernels.linear_nll(x, w, b, targets)[1].sum().backward()
    assert rel(x.grad, torch.softmax(F.linear(x, w, b).detach().double(), -1) @ w.double()) < FP32_GRAD


def test_linear_nll_survives_logits_of_80(chunk):
    x, w, _, targets = head_inputs(bias=False)
    w = w * (80 / F.linear(x, w).abs().max())
    assert F.linear(x, w).abs().max() > 79
    leaf = x.clone().requires_grad_()
    nll, lse = kernels.linear_nll(leaf, w, None, targets)
    want, want_lse = reference_nll(x.double(), w.double(), None, targets)
    assert (nll - want).abs().max() < 5e-5 and (lse - want_lse).abs().max() < 5e-5  # ulp of 80: 8e-6
    nll.sum().backward()
    assert leaf.grad.isfinite().all()


def test_linear_nll_does_not_depend_on_the_chunks(monkeypatch):
    x, w, b, targets = head_inputs(64, 101, 48)
    results = []
    for elements, block in ((1, 1), (101, 101), (7 * 101, 3 * 101), (64 * 101, 1), (1 << 30, 1 << 30)):
        monkeypatch.setitem(linear_nll_file.CHUNK_ELEMENTS, "cpu", elements)
        monkeypatch.setitem(linear_nll_file.BLOCK_ELEMENTS, "cpu", block)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        nll, lse = kernels.linear_nll(*leaves, targets)
        (nll.sum() + 1e-2 * lse.square().sum()).backward()
        results.append([nll, lse, *(t.grad for t in leaves)])
    for other in results[1:]:
        assert all(rel(a, b) < FP32 for a, b in zip(other, results[0]))


def test_linear_nll_gives_fp32_masters_their_gradient_in_fp32(monkeypatch):
    """bf16 activations, fp32 weight, 64 chunks: the sum over chunks must not be rounded to bf16 each time."""
    monkeypatch.setitem(linear_nll_file.CHUNK_ELEMENTS, "cpu", 16 * 101)
    x, w, b, targets = head_inputs(1024, 101, 48, ignore="none")
    x = (x.abs() * 0.5).bfloat16()
    x, w, b = x.requires_grad_(), w.requires_grad_(), b.requires_grad_()
    nll, lse = kernels.linear_nll(x, w, b, targets)
    assert nll.dtype == lse.dtype == torch.float32
    nll.sum().backward()
    assert w.grad.dtype == b.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    truth = [t.detach().double().requires_grad_() for t in (x, w.bfloat16(), b.bfloat16())]
    want = reference_nll(*truth, targets)[0]
    want.sum().backward()
    assert rel(nll, want) < 3e-3
    for name, a, t in zip("xwb", (x, w, b), truth):
        assert rel(a.grad, t.grad) < 4e-3, name  # measured 2.2e-3; summed in bf16 it fails


def test_linear_nll_adds_a_tied_weights_gradient_to_the_embeddings():
    w = randn(50, 16).requires_grad_()
    ids, targets = torch.tensor([1, 2, 3]), torch.tensor([2, 3, -100])
    got = torch.autograd.grad(kernels.linear_nll(F.embedding(ids, w), w, None, targets)[0].sum(), w)[0]
    d = w.detach().double().requires_grad_()
    want = torch.autograd.grad(reference_nll(F.embedding(ids, d), d, None, targets)[0].sum(), d)[0]
    assert rel(got, want) < FP32_GRAD


def test_linear_nll_of_no_rows_is_empty():
    x, w, b, _ = head_inputs()
    nll, lse = kernels.linear_nll(x[:0], w, b, torch.empty(0, dtype=torch.long))
    assert nll.shape == lse.shape == (0,)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned, forward or backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


def test_linear_nll_never_holds_all_logits(monkeypatch):
    N, V, C = 512, 4096, 16
    monkeypatch.setitem(linear_nll_file.CHUNK_ELEMENTS, "cpu", N * V // 8)
    x, w, b, targets = head_inputs(N, V, C)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    with Largest() as seen:
        kernels.linear_nll(*leaves, targets)[0].sum().backward()
    assert all(t.grad is not None for t in leaves)
    assert V * C <= seen.elements <= N * V // 8
    with Largest() as seen:
        F.cross_entropy(F.linear(*leaves), targets).backward()
    assert seen.elements == N * V  # the observer does see logits


# --- 6. own backward passes ----------------------------------------------------------------------------------


def trained(B=2, T=9, C=16):
    """Every operation with a backward pass of its own, its inputs (fp32), and the plain formula."""
    lo = torch.stack([starts(4, 5), starts(9)])
    table = kernels.rope_table(torch.arange(T)[None], frequencies(C // 2))
    mask = (torch.arange(T) <= torch.arange(T)[:, None]) & (torch.arange(T) >= lo[..., None])
    targets = torch.arange(B * T) % 7
    w, b, x = randn(C, seed=1) + 1, randn(C, seed=2), randn(B, T, C)

    def plain_rope(x):
        a, c = x[..., : C // 4], x[..., C // 4 : C // 2]
        cos, sin = table[0][..., : C // 4], table[1][..., C // 4 :]
        return torch.cat([a * cos - c * sin, c * cos + a * sin, x[..., C // 2 :]], -1)

    return {
        "rms_norm": (
            lambda x, w: kernels.rms_norm(x, w, 1e-5),
            (x, w),
            lambda x, w: formula_rms(x, w, 1e-5)[0],
        ),
        "layer_norm": (
            lambda x, w, b: kernels.layer_norm(x, w, b, 1e-5),
            (x, w, b),
            lambda x, w, b: formula_layer(x, w, b, 1e-5)[0],
        ),
        "rope": (lambda x: kernels.rope(x, *table), (randn(B, 2, T, C),), plain_rope),
        "attention": (
            lambda q, k, v: kernels.attention(q, k, v, lo=lo),
            qkv(B, 4, 2, T, T, 8),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True),
        ),
        "linear_nll": (
            lambda x, w, b: kernels.linear_nll(x, w, b, targets)[0],
            (randn(B * T, C), randn(7, C, seed=1), randn(7, seed=2)),
            lambda x, w, b: reference_nll(x, w, b, targets)[0],
        ),
    }


OWN = ["rms_norm", "layer_norm", "rope", "attention", "linear_nll"]


@pytest.mark.parametrize("name", OWN)
def test_own_backward_passes_serve_every_choice_of_what_needs_a_gradient(name):
    op, inputs, formula = trained()[name]
    for needed in itertools.product([False, True], repeat=len(inputs)):
        mine = [t.clone().requires_grad_(n) for t, n in zip(inputs, needed)]
        truth = [t.double().requires_grad_(n) for t, n in zip(inputs, needed)]
        y, want = op(*mine), formula(*truth)
        assert y.requires_grad == any(needed) and rel(y, want) < FP32
        if any(needed):
            g = randn(*y.shape, seed=7)
            y.backward(g)
            want.backward(g.double())
        for a, b, n in zip(mine, truth, needed):
            assert (a.grad is not None) == n and (not n or rel(a.grad, b.grad) < FP32_GRAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OWN)
def test_own_backward_passes_give_the_same_bits_without_gradients_and_when_checkpointed(name, dtype):
    op, inputs, _ = trained()[name]
    inputs = [t.to(dtype) for t in inputs]

    def run(f):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = f(*leaves)
        y.backward(randn(*y.shape, seed=7, dtype=y.dtype))
        return [y, *(t.grad for t in leaves)]

    plain, again = run(op), run(lambda *t: checkpoint(op, *t, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    if name != "attention":  # which takes another way, and rounds elsewhere
        assert torch.equal(op(*inputs), plain[0])


@pytest.mark.parametrize("name", OWN)
def test_own_backward_passes_can_be_compiled(name):
    op, inputs, _ = trained()[name]
    torch.compiler.reset()
    compiled = torch.compile(op, backend="aot_eager")  # traces as Inductor does, and needs no C++ compiler
    results = []
    for f in (op, compiled):
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = f(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, randn(*y.shape, seed=7))])
    assert all(rel(a, b) < FP32_GRAD for a, b in zip(*results))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "rope"])
def test_own_backward_passes_gradcheck(name):
    op, inputs, _ = trained(1, 9, 4)[name]
    if name == "rope":  # fp32 angles: see test_rope_gradient_is_the_inverse_rotation for float64 ones
        table = kernels.rope_table(torch.arange(9)[None], frequencies(2).double())
        op = lambda x: kernels.rope(x, *table)
    assert gradcheck(op, [t.double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_norm_sums_the_gradients_of_many_bf16_rows_in_fp32_and_rounds_once(norm):
    """PyTorch's layer_norm sums them in bf16 if the weight is: 5 % off after 2,048 rows."""
    op, (_, *weights), formula = trained(C=64)[norm]
    x, g = randn(2048, 64, dtype=torch.bfloat16), randn(2048, 64, seed=3, dtype=torch.bfloat16)
    mine = [t.clone().requires_grad_() for t in (x, *weights)]
    truth = [t.double().requires_grad_() for t in (x, *weights)]
    op(*mine).backward(g)
    formula(*truth).backward(g.double())
    for a, b in zip(mine[1:], truth[1:]):
        # one rounding to bf16 at the end, as FSDP2's gathered weights have it
        assert a.grad.dtype == torch.float32 and rel(a.grad, b.grad) < 3e-3
    assert rel(mine[0].grad, truth[0].grad) < 4e-3
    low = x.clone().requires_grad_()
    bad = [t.bfloat16().requires_grad_() for t in (*weights, torch.zeros(64))][:2]
    F.layer_norm(low, (64,), *bad).backward(g)
    xhat = formula_layer(x.double(), 1.0, 0.0, 1e-5)[0]
    assert rel(bad[0].grad, (xhat * g.double()).sum(0)) > 1e-2  # so this test can fail


# --- 7. eight and four bits ----------------------------------------------------------------------------------


def quantised(N, K, G, bits, sym, seed=0):
    """Random values, zeros and scales, and the matrix in fp64, weight by weight as the formula says."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(2**bits, (N, K), generator=generator).byte()
    zeros = (
        torch.full((N, G), 2 ** (bits - 1)) if sym else torch.randint(2**bits, (N, G), generator=generator)
    )
    scales = (torch.rand(N, G, generator=generator) * 0.1 + 0.01).bfloat16().half()  # exact in both
    W = torch.empty(N, K, dtype=torch.float64)
    for n, k in itertools.product(range(N), range(K)):
        g = k * G // K
        W[n, k] = float(scales[n, g]) * (int(q[n, k]) - int(zeros[n, g]))
    return (q, zeros.byte(), scales), W


PRODUCT_BOUNDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: 2e-3}


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    "bits, N, K, group",
    [(8, 200, 96, 96), (8, 33, 128, 64), (4, 70, 128, 32), (4, 16, 192, 192), (4, 64, 256, 128)],
)
@pytest.mark.parametrize("dtype", PRODUCT_BOUNDS)
def test_packed_products_equal_the_definition(bits, N, K, group, sym, dtype):
    parts, W = quantised(N, K, K // group, bits, sym)
    for rows in (1, 8):
        matrix = kernels.packed(*parts, bits, dtype, rows)
        assert rel(matrix.weight(dtype), W) < PRODUCT_BOUNDS[dtype]
        for M in (1, 2, 3, 7, 9, 17, 40):  # few rows at a time, and many
            x = randn(M, K, seed=M, dtype=dtype)
            y = matrix(x)
            bound = BF16 if bits == 4 else PRODUCT_BOUNDS[dtype]  # 4 bits: fp32 activations are rounded
            assert y.dtype == dtype and y.shape == (M, N) and rel(y, x.double() @ W.T) < bound
        assert matrix(randn(2, 3, K, dtype=dtype)).shape == (2, 3, N)
        assert matrix(randn(K, dtype=dtype)).shape == (N,)


def test_parts_of_a_large_matrix_fit_together(monkeypatch):
    """PART decides how much is put together at a time, and nothing else."""
    for bits in (8, 4):
        parts, W = quantised(150, 64, 2 if bits == 4 else 1, bits, True)
        for size in (1, 64 * 70, 2**20):
            monkeypatch.setattr(kernels.quant, "PART", size)
            for rows in (1, 8):
                matrix = kernels.packed(*parts, bits, torch.float32, rows)
                assert rel(matrix.weight(torch.float32), W) < FP32
                x = randn(20, 64)
                assert rel(matrix(x), x.double() @ W.T) < FP32


def test_packed_matrices_take_little_more_than_their_bits():
    for bits, G, most in ((8, 1, 1.1), (4, 8, 0.6)):
        parts, _ = quantised(384, 512, G, bits, True)
        for rows in (1, 8):
            assert kernels.packed(*parts, bits, torch.bfloat16, rows).nbytes < most * 384 * 512


# --- 8. one row ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 3), (64, 48), (1, 7), (300, 577), (33, 1)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matvec_is_the_product_however_the_weight_is_stored(dtype, shape, threads):
    W, x, add = (
        randn(*shape, dtype=dtype),
        randn(shape[1], seed=1, dtype=dtype),
        randn(shape[0], seed=2, dtype=dtype),
    )
    columns = kernels.by_columns(W)
    assert torch.equal(columns, W) and columns.t().is_contiguous()
    want = W.double() @ x.double()
    bound = {torch.float32: FP32, torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
    torch.set_num_threads(threads)
    with torch.inference_mode():
        for weight in (W, columns):
            y = kernels.matvec(weight, x)
            assert (
                y.dtype == dtype and (y - want).norm() <= bound * (W.double().abs() @ x.double().abs()).norm()
            )
            y = kernels.matvec(weight, x, add)
            scale = (W.double().abs() @ x.double().abs() + add.double().abs()).norm()
            assert y.dtype == dtype and (y - want - add).norm() <= bound * scale
    torch.set_num_threads(1)


def test_matvec_serves_autograd_users_after_inference():
    """The index tensors are kept between calls: made under inference_mode they would break a later backward."""
    W, x = kernels.by_columns(randn(6, 577, dtype=torch.bfloat16)), randn(577, dtype=torch.bfloat16)
    with torch.inference_mode():
        first = kernels.matvec(W, x)
    assert torch.equal(kernels.matvec(W.requires_grad_(), x), first)


def test_rms_norm_of_one_vector_is_that_of_a_row():
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, FP32), (torch.bfloat16, 4e-3)):
        x, w = randn(48, dtype=dtype, scale=3), randn(48, seed=1, dtype=dtype)
        with torch.no_grad():
            alone, rows = kernels.rms_norm(x, w, 1e-5), kernels.rms_norm(x[None], w, 1e-5)[0]
        assert alone.dtype == dtype and rel(alone, rows) < bound
