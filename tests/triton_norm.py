"""The kernels of norm.py against their twins: see tests/triton_cases.py. Blocks have 64 columns here."""

import pytest
import torch
from triton_cases import DTYPES, check, name, pairwise, randn

import kernels

FP32, BF16 = torch.float32, torch.bfloat16


def rms_norm(x, residual, weight, bias):
    return kernels.rms_norm(x, weight, 1e-5, residual)


def layer_norm(x, residual, weight, bias):
    return kernels.layer_norm(x, weight, bias, 1e-5, residual)


def inputs(norm, shape, C, dtype, residual=False, wide=False, layout="plain", rows="normal"):
    """x, residual, weight, bias. wide: parameters in fp32 whatever x is. rows: the numbers of every second row."""
    base = randn(*shape, 2 * C, dtype=dtype, grad=False)
    base[..., ::2, :] = {
        "normal": base[..., ::2, :],
        "zero": 0,
        "large": 5000 * base[..., ::2, :],
        "constant": 3,
    }[rows]
    if layout == "columns of a wider matrix":
        x = base[..., C:]
    elif layout == "turned":  # neighbouring columns lie apart
        x = base[..., :C].transpose(-1, -2).contiguous().transpose(-1, -2)
    else:
        x = base[..., :C].contiguous()
    x = x.detach().requires_grad_()
    other = randn(*shape, C, seed=1, dtype=dtype) if residual else None
    kind = FP32 if wide else dtype
    bias = randn(C, seed=3, dtype=kind) if norm is layer_norm else None
    return x, other, randn(C, seed=2, dtype=kind), bias


CASES = pairwise(
    norm=[rms_norm, layer_norm],
    C=[9, 64, 65, 200],
    shape=[(1,), (5,), (2, 3)],
    dtype=DTYPES,
    residual=[False, True],
    wide=[False, True],
    layout=["plain", "columns of a wider matrix", "turned"],
    rows=["normal", "zero", "large", "constant"],
)


@pytest.mark.parametrize("case", CASES, ids=[name({**c, "norm": c["norm"].__name__}) for c in CASES])
def test_norms_equal_their_twins(case):
    check(case["norm"], inputs(**case), case["dtype"])


@pytest.mark.parametrize(
    "norm, C, dtype",
    [(rms_norm, 2560, FP32), (layer_norm, 2560, FP32), (layer_norm, 2560, BF16), (rms_norm, 8191, BF16)],
)
def test_wide_rows(norm, C, dtype):
    check(norm, inputs(norm, (1,), C, dtype, residual=norm is rms_norm), dtype, orders=(1,))


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_more_rows_than_programs(norm):
    check(norm, inputs(norm, (67,), 48, BF16, residual=True), BF16)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_no_rows(norm):
    check(norm, inputs(norm, (0,), 16, FP32, residual=True), FP32)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_one_column(norm):
    """y is the sign of x, or 0: hardly any gradient is left, and the twin's rounding is the measure."""
    check(norm, inputs(norm, (3,), 1, FP32), FP32, ceiling=False)


def test_only_some_gradients():
    x, residual, weight, _ = inputs(rms_norm, (3,), 32, FP32, residual=True)
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        for t, need in zip((x, residual, weight), needs):
            t.requires_grad_(need)
        check(rms_norm, (x, residual, weight, None), FP32)


def test_the_sum_alone_and_the_norm_alone():
    x, residual, weight, _ = inputs(rms_norm, (3,), 32, FP32, residual=True)
    check(lambda *a: rms_norm(*a)[0], (x, residual, weight, None), FP32)
    y, h = rms_norm(x, residual, weight, None)
    h.sum().backward()
    assert (x.grad == 1).all() and (residual.grad == 1).all() and not weight.grad.any()


def test_mixed_dtypes():
    """A residual stream in fp32 beside a bf16 layer: the sum is fp32, every gradient has its input's dtype."""
    x, _, weight, _ = inputs(rms_norm, (3,), 32, BF16)
    check(rms_norm, (x, randn(3, 32, seed=1), weight, None), BF16)


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("residual", [False, True])
def test_operators_tell_torch_the_truth(norm, residual):
    x, other, weight, bias = inputs(norm, (3,), 20, FP32, residual=residual)
    if residual:
        torch.library.opcheck(torch.ops.baizhi.add_norm.default, (x, other, weight, bias, 1e-5))
    else:
        torch.library.opcheck(torch.ops.baizhi.norm.default, (x, weight, bias, 1e-5))
    g, stats = randn(3, 20, seed=5, grad=False), randn(1 if bias is None else 2, 3, grad=False)
    args = g, g if residual else None, x.detach(), weight.detach(), stats
    torch.library.opcheck(torch.ops.baizhi.norm_backward.default, args)
