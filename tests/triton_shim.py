"""The shim itself: does the interpreter round, watch memory and shuffle programs as tests/interp_shim.py says?"""

import interp_shim
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton_cases import randn


@triton.jit
def _copy(x, y, N, BLOCK: tl.constexpr, GUARD: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < N if GUARD else i >= 0
    tl.store(y + i, tl.load(x + i, mask=mask, other=0.0).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _product(x, w, y, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    tl.store(y + square, tl.dot(tl.load(x + square), tl.load(w + square)).to(y.dtype.element_ty))


@triton.jit
def _add_bf16(x, y):
    tl.store(y, tl.load(x) + tl.load(x))


@triton.jit
def _count(y):
    tl.store(y, tl.load(y) * 2 + tl.program_id(0))


def test_a_cast_to_bf16_rounds_as_torch_does():
    x = torch.cat([randn(5000, scale=s, grad=False) for s in (1, 1e-30, 1e30)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3.4e38, 1.00390625, 1.01171875])])
    y = torch.empty(len(x), dtype=torch.bfloat16)
    _copy[(triton.cdiv(len(x), 64),)](x, y, len(x), 64, True)
    assert torch.equal(y.nan_to_num(7), x.bfloat16().nan_to_num(7))
    back = torch.empty(len(x))
    _copy[(triton.cdiv(len(x), 64),)](y, back, len(x), 64, True)
    assert torch.equal(back.nan_to_num(7), y.float().nan_to_num(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_sums_in_fp32(dtype):
    x, w = (randn(16, 16, seed=i, dtype=dtype, grad=False) for i in range(2))
    y = torch.empty(16, 16, dtype=dtype)
    _product[(1,)](x, w, y, 16)
    want = x.double() @ w.double()
    assert (y.double() - want).norm() <= torch.finfo(dtype).eps * want.norm()


def test_arithmetic_on_bf16_is_refused():
    x = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match="widen"):
        _add_bf16[(1,)](x, x.clone())


def test_a_missing_mask_is_found():
    base = torch.arange(256.0)
    x, y = base[:100], torch.zeros(128)  # the storage of x goes on, the view does not
    _copy[(2,)](x, y, 100, 64, True)
    assert torch.equal(y[:100], x)
    with pytest.raises(InterpreterError, match="load outside"):
        _copy[(2,)](x, y, 100, 64, False)
    with pytest.raises(InterpreterError, match="store outside"):
        _copy[(2,)](base, y[:100], 100, 64, False)


def test_a_race_shows_in_another_order():
    results = set()
    for seed in (None, 1, 2):
        y = torch.zeros(1, dtype=torch.int64)
        with interp_shim.order(seed):
            _count[(6,)](y)
        results.add(y.item())
    assert len(results) > 1


def test_memory_that_no_kernel_wrote_is_nan():
    assert torch.empty(8).isnan().all()
