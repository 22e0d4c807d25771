"""Attention's Triton kernels against the formula in fp64: who sees whom, how heads share keys, how tensors lie in memory.

The interpreter's blocks have 32 rows (kernels/tables.py), so lengths stand below, at and above these. fp16 and bf16 are
held against the formula step by step in the same dtype: scaled_dot_product_attention on a CPU works in fp32 inside.
"""

import sys
import types

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from triton_cases import DTYPES, check, name, pairwise, randn, run, twins

import kernels

file = sys.modules["kernels.attention"]  # the attribute kernels.attention is the function
each = lambda cases: pytest.mark.parametrize("case", cases, ids=name)


def documents(S: int, *ends: int) -> torch.Tensor:
    """The key where each key's document begins: documents(4, 1) -> [0, 1, 1, 1]."""
    begins = torch.zeros(S, dtype=torch.long)
    for end in ends:
        begins[end:] = end
    return begins


def places(kind: str, T: int, S: int) -> dict:
    """Options lo and start of two rows."""
    p = (torch.arange(T) + S - T).expand(2, T)
    begins = torch.stack([documents(S, S // 3, S // 3 + 1, 32, 40), documents(S, 16, 20)])
    start = torch.tensor([0, max(S - T, 0)])
    inside = (start[:, None] + torch.arange(T)).clamp(max=S - 1)
    return {
        "plain": {},
        "documents": {"lo": begins.gather(1, p.clamp(min=0))},
        "own key only": {"lo": p},
        "window": {"lo": (p - torch.tensor([[4], [20]])).clamp(min=0)},
        "padding": {"lo": torch.tensor([[S], [S // 3]]).expand(2, T)},  # the first row is nothing but padding
        "cache": {"start": start},
        "cache, window": {"start": start, "lo": (inside - 18).clamp(min=0).int()},
    }[kind]


def layout(kind: str, B: int, H: int, K: int, T: int, S: int, D: int, dtype, scale: float) -> tuple:
    """q, k, v with random numbers, in different places of memory."""
    make = lambda *shape, seed: randn(*shape, seed=seed, dtype=dtype, grad=False)
    if kind == "contiguous":
        q, k, v = make(B, H, T, D, seed=0), make(B, K, S, D, seed=1), make(B, K, S, D, seed=2)
    elif kind == "tokens first":
        q, k, v = make(B, T, H, D, seed=0), make(B, S, K, D, seed=1), make(B, S, K, D, seed=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    elif (
        kind == "cut out"
    ):  # of a fused projection and of a longer cache; the last numbers do not lie side by side
        q = make(B, T, H + 3, D, seed=0).transpose(1, 2)[:, 1 : H + 1]
        k, v = make(B, K, S + 9, 2, D, seed=1)[:, :, 4 : S + 4].unbind(3)
        k = k.mT.contiguous().mT
    elif kind == "expanded":
        q = make(B, 1, T, D, seed=0).expand(B, H, T, D)
        k, v = make(B, 1, S, D, seed=1).expand(B, K, S, D), make(1, K, S, D, seed=2).expand(B, K, S, D)
    return tuple(t.requires_grad_() for t in (q * scale if scale != 1 else q, k, v))


def slopes_of(H: int) -> torch.Tensor:
    return 2.0 ** -(8 * torch.arange(1, H + 1) / H)


def textbook(q, k, v, lo=None, start=None, slopes=None):
    """The formula, in the dtype of q."""
    (T, D), (G, S) = q.shape[2:], (q.shape[1] // k.shape[1], k.shape[2])
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    offset = torch.tensor([S - T]) if start is None else start
    p, j = (offset[:, None] + torch.arange(T))[:, None, :, None], torch.arange(S)  # (B or 1, 1, T, 1), (S,)
    seen = j <= p if lo is None else (j <= p) & (j >= lo[:, None, :, None])  # (B or 1, 1, T, S)
    scores = q @ k.mT * D**-0.5
    if slopes is not None:
        scores = scores - (slopes.double()[:, None, None] * (p - j)).to(q.dtype)
    scores = scores.masked_fill(~seen, torch.finfo(q.dtype).min)
    return scores.softmax(-1) * seen.any(-1, keepdim=True) @ v


# One rounding of the largest number, and in fp32 that of exponents up to 2⁶: lse is rounded at their size, while the
# formula subtracts the largest score first. Even so one of 400 combinations of ALL=1 fails: see `scale` below
FLOOR = {torch.float32: 2.0**-17, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

CASES = pairwise(
    size=[(1, 1), (1, 77), (2, 33), (17, 31), (32, 32), (33, 65), (40, 9), (65, 65)],
    place=["plain", "documents", "own key only", "window", "padding", "cache", "cache, window"],
    heads=[(1, 1), (2, 2), (3, 1), (4, 2)],
    D=[64, 80, 96, 128, 40, 60, 72],
    dtype=DTYPES,
    alibi=[False, True],
    layout=["contiguous", "tokens first", "cut out", "expanded"],
    scale=[1.0, 4.0],
)


@each(CASES)
def test_attention_equals_the_formula(case):
    (T, S), (H, K), dtype = case["size"], case["heads"], case["dtype"]
    # where one key takes all the weight, dq and dk are small differences of large numbers; FlashAttention takes one
    # of these from the rounded output, so in fp16 and bf16 little but rounding errors is left
    scale = case["scale"] if dtype == torch.float32 else 1.0
    options = places(case["place"], T, S)
    if case["alibi"]:
        options["slopes"] = slopes_of(H)
    B = 2 if case["place"] in ("padding", "cache", "cache, window") else 1
    options = {n: t if n == "slopes" else t[:B] for n, t in options.items()}
    inputs = layout(case["layout"], B, H, K, T, S, case["D"], dtype, scale)

    def attention(q, k, v):
        return kernels.attention(q, k, v, **options)

    orders = (1, 2) if case["alibi"] else (1,)
    twin = lambda q, k, v: textbook(q, k, v, **options)
    check(attention, inputs, dtype, twin, orders, ceiling=scale == 1, floor=FLOOR[dtype])


DECODING = pairwise(
    T=[1, 2, 8],
    lengths=[[0], [31, 0, 65], [64]],
    heads=[(1, 1), (4, 4), (6, 1), (8, 2), (10, 1)],  # 10 heads × 8 queries are two tiles of 64 rows
    D=[64, 80, 128, 60, 72, 8],
    dtype=DTYPES,
    alibi=[False, True],
    layout=["contiguous", "cut out"],
)


@each(DECODING)
def test_decoding_equals_the_formula(case):
    (H, K), T, S, lengths = case["heads"], case["T"], 73, torch.tensor(case["lengths"])
    slopes = slopes_of(H) if case["alibi"] else None
    inputs = layout(case["layout"], len(lengths), H, K, T, S, case["D"], case["dtype"], 1.0)
    q, k, v = (t.detach() for t in inputs)
    for b, n in enumerate(case["lengths"]):  # what lies beyond is not read, not even to be masked
        k[b, :, n + T :] = v[b, :, n + T :] = float("nan")

    def attention_decode(q, k, v):
        return kernels.attention_decode(q, k, v, lengths, slopes)

    def twin(q, k, v):
        return textbook(q, k.nan_to_num(), v.nan_to_num(), None, lengths, slopes)

    check(attention_decode, (q, k, v), case["dtype"], twin)


def test_decoding_does_not_depend_on_the_size_of_the_cache():
    q, k, v = layout("contiguous", 2, 4, 2, 1, 100, 64, torch.bfloat16, 1.0)
    lengths, runs = torch.tensor([40, 77]), []
    with torch.no_grad():
        for size in (80, 100):
            runs.append(kernels.attention_decode(q, k[:, :, :size], v[:, :, :size], lengths))
        alone = kernels.attention_decode(q[1:], k[1:], v[1:], lengths[1:])  # nor on the other rows
    assert torch.equal(*runs) and torch.equal(alone, runs[0][1:])


def near(got, want, bound=4e-6):
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= bound * b.double().norm()


def test_packed_documents_equal_separate_ones():
    q, k, v = layout("tokens first", 1, 2, 1, 90, 90, 64, torch.float32, 1.0)
    lo = documents(90, 20, 21, 64)[None]
    cuts = [(0, 20), (20, 21), (21, 64), (64, 90)]

    def separate(q, k, v):
        return torch.cat([kernels.attention(*(t[:, :, a:b] for t in (q, k, v))) for a, b in cuts], 2)

    packed = run(lambda q, k, v: kernels.attention(q, k, v, lo), (q, k, v))
    near(sum(packed, []), sum(run(separate, (q, k, v)), []))


def test_steps_with_a_cache_equal_the_full_pass():
    q, k, v = (t.detach() for t in layout("contiguous", 1, 4, 2, 50, 50, 80, torch.float32, 1.0))
    slopes = slopes_of(4)
    full = kernels.attention(q, k, v, slopes=slopes)
    for begin, end in [(0, 33), (33, 49), (30, 38), (49, 50)]:
        new, start = q[:, :, begin:end], torch.tensor([begin])
        near([kernels.attention(new, k, v, start=start, slopes=slopes)], [full[:, :, begin:end]])
        if end - begin <= 8:
            near([kernels.attention_decode(new, k, v, start, slopes)], [full[:, :, begin:end]])


def test_a_query_without_keys_gives_zero_and_zero_gradients():
    q, k, v = layout("contiguous", 1, 2, 2, 40, 40, 64, torch.float32, 1.0)
    lo = torch.arange(40)[None] + (
        torch.arange(40) % 3 == 0
    )  # every third query sees nothing, the others one key
    y = kernels.attention(q, k, v, lo)
    y.sum().backward()
    assert (y[0, :, ::3] == 0).all() and torch.equal(y[0, :, 1::3], v[0, :, 1::3])
    assert (q.grad[0, :, ::3] == 0).all() and (k.grad[0, :, ::3] == 0).all()
    assert (
        q.grad.abs().max() < 1e-5 and k.grad.abs().max() < 1e-5
    )  # one key: its weight is 1 whatever q and k are
    assert (v.grad[0, :, ::3] == 0).all() and (v.grad[0, :, 1::3] == 1).all()


def test_blocks_that_nobody_sees_are_not_read():
    """Whole blocks of NaN between documents: 0 · NaN would be NaN."""
    q, k, v = (t.detach() for t in layout("contiguous", 1, 2, 1, 128, 128, 64, torch.float32, 1.0))
    lo, start = documents(128, 64)[None], torch.tensor([0])
    for t in (q, k, v):
        t[:, :, :64] = float("nan")
    outputs = run(lambda *t: kernels.attention(*t, lo), tuple(t.requires_grad_() for t in (q, k, v)))
    assert all(t[:, :, 64:].isfinite().all() for t in sum(outputs, []))
    later = (
        t.detach().flip(2) for t in (k, v)
    )  # now the first 64 keys are good, and 40 queries sit among them
    assert kernels.attention(q[:, :, 88:].detach(), *later, start=start).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_scores_stay_finite(dtype):
    q, k, v = layout("contiguous", 1, 2, 1, 33, 33, 64, dtype, 1e3)
    y = kernels.attention(q, k, v, torch.zeros(1, 33, dtype=torch.long), slopes=slopes_of(2))
    y.sum().backward()
    assert all(t.isfinite().all() for t in (y, q.grad, k.grad, v.grad))


def test_equal_keys_give_the_mean_of_the_visible_values():
    q, _, v = layout("contiguous", 1, 1, 1, 40, 40, 16, torch.float32, 1.0)
    want = v.double().cumsum(2) / torch.arange(1, 41)[:, None]
    near([kernels.attention(q, torch.ones_like(v), v).detach()], [want.detach()], 1e-6)


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
def test_any_input_may_be_the_one_with_a_gradient(needed):
    inputs = layout("tokens first", 1, 2, 1, 20, 20, 64, torch.float32, 1.0)
    for t, n in zip(inputs, needed):
        t.requires_grad_(n)
    check(kernels.attention, inputs, torch.float32, orders=(1,))


def options_of(kind: str, T: int, S: int) -> tuple:
    found = places("cache, window", T, S) if kind == "all" else {}
    return found.get("lo"), found.get("start"), slopes_of(2) if kind == "all" else None


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_operators_are_well_behaved(kind):
    q, k, v = layout("tokens first", 2, 2, 1, 3, 5, 16, torch.float32, 1.0)
    more = options_of(kind, 3, 5)
    opcheck(torch.ops.baizhi.attention.default, (q, k, v, *more))
    q, k, v = (t.detach() for t in (q, k, v))
    o, lse = torch.ops.baizhi.attention(q, k, v, *more)
    opcheck(torch.ops.baizhi.attention_backward.default, (torch.ones_like(o), q, k, v, o, lse, *more))
    opcheck(torch.ops.baizhi.attention_decode.default, (q, k, v, torch.tensor([1, 2]), more[2]))


@pytest.mark.parametrize("kind", ["plain", "all"])
def test_compiled_and_checkpointed_it_gives_the_same_bits(kind):
    q, k, v = layout("tokens first", 2, 2, 1, 20, 33, 64, torch.bfloat16, 1.0)
    more = options_of(kind, 20, 33)

    def model(q, k, v):  # as model.py calls it
        y = kernels.attention(q * 1.5, k, v, *more)
        return y.transpose(1, 2).reshape(2, 20, -1) * 2

    torch.compiler.reset()
    plain = run(model, (q, k, v))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = lambda *t: checkpoint(model, *t, use_reentrant=False)
    for other in (compiled, again):
        assert all(torch.equal(a, b) for a, b in zip(sum(plain, []), sum(run(other, (q, k, v)), [])))
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), plain[0][0])


def test_decoding_can_be_compiled_for_any_length():
    q, k, v = (t.detach() for t in layout("contiguous", 2, 2, 1, 1, 40, 64, torch.bfloat16, 1.0))
    compiled = torch.compile(kernels.attention_decode, fullgraph=True, backend="aot_eager")
    for lengths in ([0, 17], [39, 1]):  # tensors: nothing asks for their values
        lengths = torch.tensor(lengths)
        assert torch.equal(compiled(q, k, v, lengths), kernels.attention_decode(q, k, v, lengths))


def test_use_attention_chooses(monkeypatch):
    q, k, v = layout("contiguous", 1, 1, 1, 4, 4, 16, torch.float32, 1.0)
    took = lambda: "baizhi" in str(kernels.attention(q, k, v).grad_fn)
    assert took()
    with twins():
        assert not took()
    with pytest.raises(ValueError, match="auto, triton or sdpa"):
        kernels.use_attention("flash")
    kernels.use_attention("sdpa")
    assert not took()
    kernels.use_attention("auto")
    assert took()

    # on a GPU that is not here
    monkeypatch.setattr(file, "on_triton", lambda *t: True)
    lo = torch.zeros(1, 4)
    none = (None, None, None)
    for choice, dtype, places, S, want in [
        ("auto", torch.bfloat16, none, 4, False),  # PyTorch's own kernels are better there
        ("auto", torch.bfloat16, (lo, None, None), 4, True),
        ("auto", torch.bfloat16, (None, None, lo), 4, True),
        ("auto", torch.bfloat16, none, 9, True),  # neither square nor one query: needs a mask
        ("triton", torch.bfloat16, none, 4, True),
        ("auto", torch.float32, (lo, None, None), 4, False),
        ("sdpa", torch.bfloat16, (lo, None, None), 4, False),
    ]:
        monkeypatch.setattr(file, "_choice", choice)
        far = [
            types.SimpleNamespace(is_cpu=False, dtype=dtype, shape=(1, 1, n, 16), device="cuda")
            for n in (4, S, S)
        ]
        assert file._takes_kernels(*far, *places) == want, (choice, dtype, places, S)
    monkeypatch.setattr(file, "_choice", "triton")
    far[0].dtype = torch.float32
    with pytest.raises(ValueError, match="not float32, heads of 16: choose auto or sdpa"):
        file._takes_kernels(*far, *none)
