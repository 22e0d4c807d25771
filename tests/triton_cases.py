"""What the files tests/triton_*.py share. They run kernels in Triton's interpreter, on the CPU, in a process of their
own (tests/test_triton.py starts it), because Triton reads TRITON_INTERPRET when it is imported.

    from triton_cases import check, pairwise, randn          # import this before any kernel runs
    @pytest.mark.parametrize("case", pairwise(n=[1, 100], dtype=[torch.float32, torch.bfloat16]), ids=name)
    check(kernels.rms_norm, (x, weight, 1e-5), x.dtype)      # x and weight require grad: so do forward and backward

    TRITON_INTERPRET=1 python -m pytest tests/triton_norm.py     one file, by hand
    ALL=1 ...                                                    every combination instead of every pair: minutes, for
                                                                 attention hours; Ctrl-C shows the errors so far
    SEED=7 ...                                                   other pairs, other random numbers

Acceptance. The truth is the twin in fp64. A kernel's largest error may be twice that of the twin in the kernel's own
dtype, and its relative L2 error must stay below a ceiling, so that a poor twin hides nothing. Two runs with the programs
in different orders must give the same bits. Memory that a kernel should have written and did not is NaN.
"""

import atexit
import contextlib
import itertools
import math
import os
import random

import interp_shim
import numpy as np
import torch

np.seterr(over="ignore")  # exp of a large number is infinite, as on a GPU
interp_shim.install()
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN: what is not written shows

SEED = int(os.environ.get("SEED", "0"))
CEILING = {torch.float32: (2e-6, 4e-6), torch.float16: (1.5e-3,) * 2, torch.bfloat16: (1.2e-2,) * 2}
DTYPES = list(CEILING)
# (name, dtype, pass) -> [tensors, worst relative L2 error, worst error / twin's error, ceiling of the former]
_worst: dict[tuple, list] = {}


def randn(*shape, seed: int = 0, scale: float = 1.0, dtype=torch.float32, grad: bool = True) -> torch.Tensor:
    """Normal random numbers, rounded to the dtype; they require grad unless told otherwise."""
    generator = torch.Generator().manual_seed(1000 * SEED + seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_(grad)


def pairwise(**options: list) -> list[dict]:
    """Choose few combinations such that every two values of two different options meet in one of them."""
    names, draw = list(options), random.Random(SEED)
    everything = [dict(zip(names, values)) for values in itertools.product(*options.values())]
    if os.environ.get("ALL") == "1":
        draw.shuffle(everything)  # so that a run that is interrupted has seen something of everything
    if os.environ.get("ALL") == "1" or len(names) == 1:
        return everything
    spots = {name: {id(v): i for i, v in enumerate(values)} for name, values in options.items()}

    def pairs(case):  # values may not be hashable: their places in the lists stand for them
        return set(itertools.combinations([(n, spots[n][id(case[n])]) for n in names], 2))

    missing, chosen = set().union(*map(pairs, everything)), []
    while missing:
        few = draw.sample(everything, min(len(everything), 300))
        best = max(few, key=lambda case: len(pairs(case) & missing))
        if pairs(best) & missing:
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def name(case: dict) -> str:
    """The id of a case: it is all one needs to run it again."""
    return " ".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in case.items())


@contextlib.contextmanager
def twins():
    """Let the functions of kernels/ run in plain torch."""
    before = os.environ.get("KERNELS", "auto")
    os.environ["KERNELS"] = "torch"
    try:
        yield
    finally:
        os.environ["KERNELS"] = before


def run(function, inputs: tuple, dtype=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Call a function; give its floating outputs, and the gradients of the inputs that require them.

    The outputs' gradients are random, the same in every run. With a dtype, all floating inputs are cast to it.
    """

    def leaf(t):
        if not isinstance(t, torch.Tensor):
            return t
        made = t.detach()  # a view stays one: strides are part of the case
        made = made.to(dtype) if dtype and t.is_floating_point() else made
        return made.requires_grad_(t.requires_grad)

    leaves = [leaf(t) for t in inputs]
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    out = function(*leaves)
    out = [t for t in (out if isinstance(out, tuple) else (out,)) if t.is_floating_point()]
    if not wanted:
        return out, []
    sources = [t for t in out if t.requires_grad]
    upstream = [
        randn(*t.shape, seed=99 + i, grad=False).bfloat16().to(t.dtype) for i, t in enumerate(sources)
    ]
    return [t.detach() for t in out], list(torch.autograd.grad(sources, wanted, upstream))


def check(kernel, inputs: tuple, dtype, twin=None, orders=(1, 2), zero=1.0, ceiling=True, floor=1e-6) -> None:
    """Compare a function of kernels/ with its twin, forward and backward; inputs that require grad get one.

    twin: another function of the same inputs, if it is not the same one under KERNELS=torch. dtype: whose bounds hold.
    zero: where the truth is 0 everywhere, an error counts relative to this. ceiling: False where the truth is a small
    difference of large numbers, so that the twin's error is the only measure. floor: an error that is allowed anyway,
    relative to the largest number.
    """
    label = getattr(kernel, "__name__", str(kernel))
    runs, before = [], interp_shim.launches
    for seed in orders:
        with interp_shim.order(seed):
            runs.append(run(kernel, inputs))
    assert interp_shim.launches > before or not runs[0][0][0].numel(), f"{label}: no kernel ran"
    for again in runs[1:]:
        for a, b in zip(sum(runs[0], []), sum(again, [])):
            assert torch.equal(a, b), f"{label}: other bits when programs run in another order"
    with twins():
        plain, truth = run(twin or kernel, inputs), run(twin or kernel, inputs, torch.float64)
    for back, (got, same, want) in enumerate(zip(runs[0], plain, truth)):
        assert len(got) == len(want)
        for i, (a, b, t) in enumerate(zip(got, same, want)):
            what = f"{label}, {'gradient' if back else 'output'} {i}"
            assert a.shape == b.shape and a.dtype == b.dtype, (
                f"{what}: {a.dtype} {a.shape}, twin {b.dtype} {b.shape}"
            )
            compare(a, b, t, dtype, bool(back), what, label, zero, ceiling, floor)


def compare(
    got, plain, truth, dtype, back: bool, what: str, label: str, zero=1.0, ceiling=True, floor=1e-6
) -> None:
    """Hold one tensor against the bounds; note its errors for the table. ceiling: as in check, or a number."""
    got, plain, truth = got.detach().double(), plain.detach().double(), truth.detach().double()
    assert got.isfinite().all() or not truth.isfinite().all(), f"{what}: not finite"
    if not truth.numel():
        return
    size, bound = truth.norm().item(), ceiling or math.inf
    if ceiling is True:
        bound = CEILING[dtype][back]
    nothing = size <= 1e-9 * math.sqrt(truth.numel())
    error = (got - truth).norm().item() / (zero * math.sqrt(truth.numel()) if nothing else size)
    largest, allowed = (got - truth).abs().max().item(), (plain - truth).abs().max().item()
    floor *= truth.abs().max().item()
    row = _worst.setdefault(
        (label, str(dtype).removeprefix("torch."), "backward" if back else "forward"), [0, 0.0, 0.0, bound]
    )
    row[0] += 1
    if ceiling:
        row[1], row[3] = max(row[1], error), bound
    if not nothing:
        row[2] = max(row[2], max(0.0, largest - floor) / max(allowed, 1e-300) if largest > floor else 0.0)
    assert error <= bound, f"{what}: relative error {error:.1e}, allowed {bound:.1e}"
    assert nothing or largest <= 2 * allowed + floor, (
        f"{what}: error {largest:.2e}, plain torch {allowed:.2e}"
    )


@atexit.register
def _report() -> None:
    """Print the worst errors after the tests."""
    if _worst:
        print(f"\n{'seed ' + str(SEED):24}{'tensors':>18}{'rel. error':>12}{'ceiling':>10}{'of twin’s':>11}")
    for (label, kind, back), (cases, error, ratio, ceiling) in sorted(_worst.items()):
        print(f"{label:18} {kind:9} {back:9}{cases:5}{error:12.1e}{ceiling:10.1e}{ratio:11.2f}")
