"""Which implementation of an op runs: its plain-torch twin, or its Triton kernel.

    KERNELS=auto    CUDA tensors take the kernels, all others the twins (the default; torch calls AMD's GPUs
                    cuda, too)
    KERNELS=torch   every tensor takes the twins

Under TRITON_INTERPRET=1 CPU tensors take the kernels, which Triton then runs in NumPy: for tests. float64
always takes the twins. Triton is imported when the first kernel is launched: without it, the twins run.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable

import torch


def constant_in_graphs(function: Callable) -> Callable:
    """Let torch.compile call a function while it traces, and keep the result: for numbers and indices only.

    torch.compiler.assume_constant_result does this too, but to import it takes two seconds. A cached function
    is not marked itself: the mark must be on a plain one.
    """

    @functools.wraps(function)
    def call(*args):
        return function(*args)

    call._dynamo_marked_constant = True
    return call


def outside_graphs(function: Callable) -> Callable:
    """torch.compiler.disable, asked for when the function first runs: to import it takes two seconds."""

    @functools.wraps(function)
    def call(*args):
        if not hasattr(function, "outside"):
            function.outside = torch.compiler.disable(function)
        return function.outside(*args)

    return call


def operator(name: str) -> Callable:
    """Make a function that launches kernels an operator of torch; they run on the GPU of its first tensor.

    Triton launches on the current GPU, whichever holds the tensors.
    """

    def define(function: Callable):
        @functools.wraps(function)
        def call(*args):
            with torch.cuda.device_of(args[0]):  # nothing happens where it is on no GPU
                return function(*args)

        return torch.library.custom_op(name, call, mutates_args=())

    return define


def on_triton(*tensors: torch.Tensor | None) -> bool:
    """Tell whether an op on these tensors runs as a Triton kernel; None and integers do not matter."""
    floats = [t for t in tensors if t is not None and t.is_floating_point()]
    if any(t.dtype == torch.float64 for t in floats):
        return False
    if floats[0].is_cuda:
        return _chosen()
    return floats[0].is_cpu and interpreted() and os.environ.get("KERNELS") != "torch"


def obstacle(device: str) -> str:
    """Say why tensors on a device ("cpu", "cuda:1") take no kernels; "" if they do."""
    if os.environ.get("KERNELS") == "torch":
        return "KERNELS=torch"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "" if device.startswith("cuda") or interpreted() else f"the device is {device}"


def interpreted() -> bool:
    """Tell whether Triton runs kernels on the CPU, in NumPy."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """Let a row's numbers lie side by side, as the kernels want them; other strides stay as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """(..., C) -> (N, C) with a row's numbers side by side; copies only what has no such view."""
    return side_by_side(x.reshape(-1, x.shape[-1]))


def processors(x: torch.Tensor) -> int:
    """Count the processors of the tensor's GPU: kernels that walk over rows start a few programs on each."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 2 if interpreted() else 108  # a meta tensor, in tests/aot.py: as many as an A100 has


@constant_in_graphs  # what it prints would end a graph
@functools.cache
def _chosen() -> bool:
    """Decide, and say so once, whether GPU tensors take the kernels."""
    mode = os.environ.get("KERNELS", "auto")
    if mode not in ("auto", "torch"):
        raise ValueError(f"KERNELS={mode}: expected auto or torch")
    why = obstacle("cuda")
    print(f"kernels: {f'plain torch ({why})' if why else 'triton'}", file=sys.stderr)
    return not why
