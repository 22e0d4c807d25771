"""Make Triton's CPU interpreter exact, strict and faster. For tests; written for triton 3.7.

Triton's interpreter (TRITON_INTERPRET=1) runs a kernel in NumPy, one program after the other. What it gets wrong
without saying so, and what `install()` does about it:

  bfloat16    NumPy has none, so it is kept as uint16 bit patterns. Stock: casts from fp32 truncate, tl.dot multiplies
              the patterns, + and max act on them. Here: casts round to nearest even as GPUs do, tl.dot widens to fp32
              first, and any other arithmetic on bf16 is an error (our kernels widen to fp32 after each load).
  memory      Stock: a pointer is an address, and a read outside of every tensor gives whatever lies there. Here: every
              lane that its mask lets through must lie inside one of the tensors passed to the launch.
  order       A GPU runs programs in any order. Here: `order(seed)` shuffles them; what races comes out different.
  speed       Stock: the module triton.language is patched once per call of a device function (tl.sum is one). Here:
              once per launch. Saves about a quarter of the time.

It replaces private functions of triton.runtime.interpreter, so another version of Triton may need another shim.
"""

import contextlib
import random

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle

_ranges: list[tuple[int, int]] = []  # addresses [from, to) of the tensors of the running launch
_patched: set[int] = set()  # ids of the modules' globals that are patched in the running launch
_seed: int | None = None  # of the order of programs
launches = 0  # since the process began
_stock: dict[str, object] = {}  # the functions that we replaced


@contextlib.contextmanager
def order(seed: int | None):
    """Run the programs of every launch in an order that depends on the seed; None: from first to last."""
    global _seed
    before, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = before


def install() -> None:
    """Replace the interpreter's functions, once per process."""
    assert triton.knobs.runtime.interpret, (
        "set TRITON_INTERPRET=1 before triton is imported: see tests/test_triton.py"
    )
    if _stock:
        return
    ours = {
        InterpreterBuilder: {
            "cast_impl": _cast,
            "create_fp_to_fp": _round,
            "create_dot": _dot,
            "create_masked_load": _load,
            "create_masked_store": _store,
            "set_grid_dim": _set_grid_dim,
            "set_grid_idx": _set_grid_idx,
            **{name: _refuse_bf16(name) for name in ("binary_op", "unary_op", "create_fma", "create_fabs")},
            **{name: _refuse_bf16(name) for name in ("create_rsqrt", "create_erf", "ternary_op")},
            **dict.fromkeys(("create_atomic_rmw", "create_atomic_cas"), _refuse_atomic),
        },
        GridExecutor: {"_init_args_hst": _remember_tensors, "__call__": _launch},
        InterpretedFunction: {"__call__": _call_device_function},
        interpreter.ReduceScanOpInterface: {"apply": _reduce},
    }
    for owner, functions in ours.items():
        for name, function in functions.items():
            _stock[name if name != "__call__" else f"{owner.__name__}.call"] = getattr(owner, name)
            setattr(owner, name, function)


# --- bfloat16 ----------------------------------------------------------------------------------------------------


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) -> fp32: bf16 is the upper half of an fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 bit patterns, to the nearest, ties to even: add just under half of the last place, then cut."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    cut = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), cut)


def _is_bf16(value) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _cast(builder, value, to):
    """tensor.to(dtype), and the implicit casts of stores and of `other=`."""
    if to.scalar == tl.bfloat16 and not _is_bf16(value):
        return TensorHandle(narrow(value.data.astype(np.float32)), tl.bfloat16)
    if _is_bf16(value) and to.scalar != tl.bfloat16:
        value = TensorHandle(widen(value.data), tl.float32)
        if to.scalar == tl.float32:
            return value
    return _stock["cast_impl"](builder, value, to)


def _round(builder, value, to, mode):
    if _is_bf16(value) or to.scalar == tl.bfloat16:
        return _cast(builder, value, to)
    return _stock["create_fp_to_fp"](builder, value, to, mode)


def _dot(builder, a, b, *rest):
    """tl.dot: products of halves are exact in fp32, so widening changes nothing but the speed of fp16."""

    def fp32(x):
        if _is_bf16(x):
            return TensorHandle(widen(x.data), tl.float32)
        return TensorHandle(x.data.astype(np.float32), tl.float32) if x.dtype.scalar == tl.float16 else x

    return _stock["create_dot"](builder, fp32(a), fp32(b), *rest)


def _refuse_bf16(name):
    def operation(builder, *args):
        moves_bits = name == "ternary_op" and args[-1] is np.where  # tl.where: right as it is
        if not moves_bits and any(map(_is_bf16, args)):
            raise TypeError("arithmetic on bfloat16: widen it to fp32 with .to(tl.float32) first")
        return _stock[name](builder, *args)

    return operation


def _reduce(self, x):
    if not isinstance(x, tuple) and x.dtype == tl.bfloat16:
        raise TypeError("a reduction in bfloat16: widen it to fp32 with .to(tl.float32) first")
    return _stock["apply"](self, x)


def _refuse_atomic(builder, *args):
    raise TypeError("an atomic operation: the order of its sums differs from run to run")


# --- memory ------------------------------------------------------------------------------------------------------


def _remember_tensors(self, args, keywords):
    """Note where the launch's tensors lie: their views, not their storages, so that wrong strides show, too."""
    args, keywords = _stock["_init_args_hst"](self, args, keywords)
    _ranges.clear()
    for t in [*args, *keywords.values()]:
        t = t if hasattr(t, "data_ptr") else getattr(t, "base", t)  # a tensor descriptor has a base
        if hasattr(t, "data_ptr") and t.numel():
            last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride()))
            _ranges.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
    return args, keywords


def _check(pointers, mask, what: str) -> None:
    lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
    address = np.asarray(pointers.data, np.uint64)[lanes]
    if not address.size:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    low, high = int(address.min()), int(address.max()) + size
    if any(start <= low and high <= end for start, end in _ranges):
        return  # all lanes in one tensor: nearly always
    for a in map(int, address):
        if not any(start <= a and a + size <= end for start, end in _ranges):
            raise IndexError(f"a {what} outside of every tensor of the launch")


def _load(builder, pointers, mask, *rest):
    _check(pointers, mask, "load")
    return _stock["create_masked_load"](builder, pointers, mask, *rest)


def _store(builder, pointers, value, mask, *rest):
    _check(pointers, mask, "store")
    return _stock["create_masked_store"](builder, pointers, value, mask, *rest)


# --- the order of programs -----------------------------------------------------------------------------------------


def _set_grid_dim(builder, nx, ny, nz):
    builder.permutation = list(range(nx * ny * nz))
    if _seed is not None:
        random.Random(_seed).shuffle(builder.permutation)
    return _stock["set_grid_dim"](builder, nx, ny, nz)


def _set_grid_idx(builder, x, y, z):
    _, ny, nz = builder.grid_dim
    i = builder.permutation[(x * ny + y) * nz + z]
    return _stock["set_grid_idx"](builder, i // (ny * nz), i // nz % ny, i % nz)


# --- one patch of triton.language per launch -----------------------------------------------------------------------


def _launch(self, *args, **keywords):
    global launches
    launches += 1
    _patched.clear()
    _patched.add(id(self.fn.__globals__))
    return _stock["GridExecutor.call"](self, *args, **keywords)


def _call_device_function(self, *args, **keywords):
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **keywords)
