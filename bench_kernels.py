"""Every op of kernels/ beside what PyTorch has: time, TFLOP/s, GB/s, per cent of the roofline; and a tuner.

    python bench.py kernels                              # this machine: its GPU, or the CPU's twins
    python bench.py kernels --ops attention linear_nll --preset llama-2-7b --tokens 4096
    python bench.py kernels --tune table.json            # on a GPU: search block sizes, warps and stages
    KERNEL_TABLE=table.json torchrun train.py ...        # and use what was found

An op's roof is the time that its work would take at the speed of the machine: arithmetic at the peak of
matrix products or bytes at that of the memory, whichever takes longer (Williams et al. 2009, "Roofline"). The
peaks are those of the card's data sheet where it is known here, else a large product and a large copy,
measured in the same run. Bytes are those of inputs and outputs, each once; arithmetic is the least that is
needed: what a kernel computes again does not count. Forward and backward counts both passes so.

All sides of an op take turns, between two runs the caches are overwritten, and each figure is a median.
`differs` is the largest relative difference (L2) of an output or a gradient from plain torch in the same
dtype; below 1e-2 is rounding in 16 bits. Plain torch is written anew here: it is not the twin of kernels/.
Attention of one document runs on our kernel here, while models leave it to PyTorch (`sdpa`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import operator
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

import common
import kernels as ours
from kernels import dispatch, tables
from model import PRESETS, ModelConfig

DATA_SHEETS = {  # 16-bit FLOP/s (dense) and bytes/s of cards, by their whole names
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "NVIDIA A100-SXM4-40GB": (312e12, 1.555e12),
    "NVIDIA A100 80GB PCIe": (312e12, 1.935e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA A10": (125e12, 0.6e12),
    "NVIDIA GeForce RTX 4090": (165e12, 1.008e12),
    "AMD Instinct MI300X": (1307e12, 5.3e12),
}
OPS = Literal["attention", "decode", "norm", "rope", "glu", "linear_nll", "quant"]


@dataclass
class KernelsBench:
    preset: str = ""  # whose widths; default: xverse-13b on a GPU, phi2-chinese-0.2b on a CPU
    ops: tuple[OPS, ...] = ("attention", "decode", "norm", "rope", "glu", "linear_nll", "quant")  # which
    tokens: int = 0  # of one row, and of the cache when decoding; default: 8192 on a GPU, 512 on a CPU
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of activations and weights
    device: str = "auto"  # auto, cpu, cuda
    rounds: int = 10  # runs of each side
    compile: bool = True  # with torch.compile of plain torch
    tune: str = ""  # write launches that are faster than the table's to this file, for KERNEL_TABLE


class Work(NamedTuple):
    """What an op cannot do without."""

    flops: float
    bytes: float


class Op(NamedTuple):
    """An op on given inputs, and functions that compute it from them: ours, plain torch, then others."""

    name: str
    inputs: tuple
    sides: dict[str, Callable]
    forward: Work
    both: Work | None = None  # forward and backward; None: nobody asks for its gradients


def kernels(config: KernelsBench) -> None:
    """Time every op of kernels/ beside plain torch, torch.compile and PyTorch's own kernels."""
    device = common.start_process(config.device).device
    gpu = device != "cpu"
    name = config.preset or ("xverse-13b" if gpu else "phi2-chinese-0.2b")
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    if config.rounds < 1:
        raise ValueError(f"--rounds {config.rounds} must be at least 1")
    if config.tune and (why := dispatch.obstacle(device)):
        raise ValueError(f"--tune: no Triton kernel can run here ({why})")
    dtype, tokens = getattr(torch, config.dtype), config.tokens or (8192 if gpu else 512)
    torch.manual_seed(1)
    made = (op for kind in config.ops for op in MAKERS[kind](PRESETS[name], tokens, dtype))
    clock = Clock(device)
    if config.tune:
        path = Path(config.tune)
        table = common.read_json(path) if path.exists() else {}
        with torch.device(device):
            ops = list(made)
        return tune(ops, clock, config.rounds, path, table)
    machine = ceilings(clock, dtype)
    print(f"kernels: {name}, {tokens} tokens, {config.dtype}, {device_name(device)}; {machine.text}")
    print(f"{'':34s}{'time':>12s}{'TFLOP/s':>10s}{'GB/s':>8s}{'of roof':>9s}{'x plain':>9s}{'differs':>10s}")
    while True:
        with torch.device(device):  # one op at a time: they are large
            op = next(made, None)
        if op is None:
            return None
        measure(op, clock, machine, config)


# --- 1. the clock and the machine ---------------------------------------------------------------------------


class Clock:
    """Time single calls, each with cold caches."""

    def __init__(self, device: str):
        self.device = device
        size = 1 << (28 if device == "cpu" else 29)  # more than the caches hold: 256 MiB on an MI300X
        self.scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable) -> float:
        """Run a function; return its seconds."""
        self.scratch.fill_(1)
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1 << 23)  # cycles, about 5 ms: all is launched by then, and launching is not seen
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class Machine(NamedTuple):
    """Speeds that nothing on this machine exceeds: FLOP/s, bytes/s; and the two in words."""

    flops: float
    bytes: float
    text: str

    def roof(self, work: Work) -> float:
        """Give the seconds that the work takes at least."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def ceilings(clock: Clock, dtype: torch.dtype) -> Machine:
    """Measure a large product and a large copy, and look for the card's data sheet."""
    gpu = clock.device != "cpu"
    size = 8192 if gpu else 2048
    a = torch.randn(size, size, device=clock.device).to(dtype)
    source = torch.ones(1 << (30 if gpu else 28), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    flops = 2 * size**3 / min(clock(lambda: a @ a) for _ in range(6))
    moved = 2 * len(source) / min(clock(lambda: target.copy_(source)) for _ in range(6))
    text = f"a large product {flops / 1e12:.3g} TFLOP/s, a large copy {moved / 1e9:.0f} GB/s"
    sheet = DATA_SHEETS.get(device_name(clock.device))
    if not sheet or dtype == torch.float32:
        return Machine(flops, moved, text)
    return Machine(*sheet, f"{text} (data sheet: {sheet[0] / 1e12:.0f}, {sheet[1] / 1e9:.0f})")


def device_name(device: str) -> str:
    """Name the GPU, or the number of threads."""
    return (
        f"CPU, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    )


# --- 2. measuring an op -------------------------------------------------------------------------------------


def measure(op: Op, clock: Clock, machine: Machine, config: KernelsBench) -> None:
    """Print how fast every side of an op is, forward, and forward and backward."""
    functions = dict(op.sides)
    if config.compile:
        functions["torch.compile"] = torch.compile(op.sides["plain torch"], dynamic=False)
    for title, work, make in (
        ("forward", op.forward, forward_only),
        ("forward and backward", op.both, forward_backward),
    ):
        if work is None:
            continue
        print(f"{op.name}: {title}, roof {1e3 * machine.roof(work):.3f} ms")
        calls, outputs, failed = {}, {}, {}
        for name, function in functions.items():
            call = make(function, op.inputs)
            try:
                outputs[name] = call()
                calls[name] = call
            except failures() as error:  # out of memory, say; the others go on
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:90]
        differs = {name: difference(out, outputs.get("plain torch")) for name, out in outputs.items()}
        outputs.clear()
        seconds = alternate(config.rounds, **{n: functools.partial(clock, c) for n, c in calls.items()})
        for name in functions:
            if name in failed:
                print(f"  {name:32s}  failed: {failed[name]}")
                continue
            spent = statistics.median(seconds[name])
            times = ratio(seconds, name, "plain torch") if "plain torch" in calls else math.nan
            print(
                f"  {name:32s}{1e3 * spent:9.3f} ms{work.flops / spent / 1e12:10.3f}"
                f"{work.bytes / spent / 1e9:8.1f}{100 * machine.roof(work) / spent:7.1f} %{times:9.2f}"
                f"{differs[name]:10.1e}",
                flush=True,
            )


def alternate(rounds: int, **sides: Callable[[], float]) -> dict[str, list[float]]:
    """Let every side run once per round, in turn; return the seconds that each reports, round by round."""
    seconds = defaultdict(list)
    for side in sides.values():  # warm-up
        side()
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side())
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, peer: str) -> float:
    """How many times as fast as the peer a side is: the median over the rounds."""
    return statistics.median(map(operator.truediv, seconds[peer], seconds[name]))


def failures() -> tuple[type[Exception], ...]:
    """List the errors with which a launch fails: it does not compile, or takes what the GPU has not."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def forward_only(function: Callable, inputs: tuple) -> Callable[[], list[torch.Tensor]]:
    """Make a function that computes the outputs without gradients."""

    def call():
        with torch.no_grad():
            return tensors(function(*inputs))

    return call


def forward_backward(function: Callable, inputs: tuple) -> Callable[[], list[torch.Tensor]]:
    """Make a function that computes the outputs, and the gradients of the inputs that ask for them."""
    leaves = [t.detach().requires_grad_(t.requires_grad) if torch.is_tensor(t) else t for t in inputs]
    sources = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
    upstream: list[torch.Tensor] = []

    def call():
        out = tensors(function(*leaves))
        if not upstream:
            generator = torch.Generator(out[0].device).manual_seed(2)
            upstream.extend(
                torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in out
            )
        return [t.detach() for t in out] + list(torch.autograd.grad(out, sources, upstream))

    return call


def tensors(out) -> list[torch.Tensor]:
    """List what a function returned: a tensor or a tuple of tensors."""
    return list(out) if isinstance(out, tuple) else [out]


def difference(got: list[torch.Tensor], plain: list[torch.Tensor] | None) -> float:
    """Give the largest relative L2 difference of two lists of tensors; nan: one has a nan, plain is None."""
    if plain is None:
        return math.nan
    found = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(got, plain, strict=True)]
    return torch.stack(found).max().item()  # Python's max would lose a nan


# --- 3. the ops ---------------------------------------------------------------------------------------------


def attention(shape: ModelConfig, T: int, dtype: torch.dtype) -> Iterator[Op]:
    """One causal row of T tokens, then the same row with eight documents in it."""
    H, K, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    q, k, v = (leaf(1, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K, K))
    starts = torch.arange(T) // -(-T // 8) * -(-T // 8)  # (T,)
    cuts = torch.cat((starts.unique(), torch.tensor([T]))).int()
    longest = -(-T // 8)

    key = torch.arange(T)
    visible = {False: key <= key[:, None], True: (key <= key[:, None]) & (key >= starts[:, None])}  # (T, T)
    kernel = not dispatch.obstacle(str(q.device)) and q.dtype != torch.float32 and D <= 128

    def mine(q, k, v, lo):
        ours.use_attention("triton" if kernel else "auto")
        try:
            return ours.attention(q, k, v, lo)
        finally:
            ours.use_attention("auto")

    def plain(q, k, v, lo):
        scores = q.unflatten(1, (K, -1)) @ k[:, :, None].mT * D**-0.5  # (1, K, G, T, T)
        scores = scores.masked_fill(~visible[lo is not None], float("-inf"))
        return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)

    def sdpa(q, k, v, lo):
        if lo is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        return F.scaled_dot_product_attention(q, k, v, visible[True], enable_gqa=H != K)

    def varlen(q, k, v, lo):
        from torch.nn.attention.varlen import varlen_attn

        rows = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, H or K, D)
        out = varlen_attn(*rows, cuts, cuts, longest, longest, window_size=(-1, 0), enable_gqa=H != K)
        return out.transpose(0, 1)[None]

    element = q.element_size()
    for name, lo, pairs in (
        ("attention, one document", None, T * (T + 1) / 2),
        ("attention, eight documents", starts[None], float((torch.arange(T) - starts + 1).sum())),
    ):
        flops, moved = 4 * H * D * pairs, 2 * T * (H + K) * D * element
        sides = {"ours": mine, "plain torch": plain, "sdpa": sdpa}
        if lo is not None and q.is_cuda:
            sides["varlen_attn"] = varlen
        yield Op(name, (q, k, v, lo), sides, Work(flops, moved), Work(3.5 * flops, 3 * moved))


def decode(shape: ModelConfig, S: int, dtype: torch.dtype) -> Iterator[Op]:
    """One new token for each of eight rows, whose caches are full."""
    B, H, K, D = 8, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    q, (k, v) = torch.randn(B, H, 1, D, dtype=dtype), torch.randn(2, B, K, S, D, dtype=dtype)

    def plain(q, k, v, lengths):
        scores = q.view(B, K, -1, D) @ k.mT * D**-0.5  # (B, K, G, S)
        hidden = torch.arange(S, device=q.device) > lengths.view(B, 1, 1, 1)
        return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).view(B, H, 1, D)

    def sdpa(q, k, v, lengths):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=H != K)

    sides = {"ours": ours.attention_decode, "plain torch": plain, "sdpa": sdpa}
    work = Work(4 * B * H * S * D, 2 * B * (K * S + H) * D * q.element_size())
    yield Op("attention, decoding 8 rows", (q, k, v, torch.full((B,), S - 1)), sides, work)


def norm(shape: ModelConfig, N: int, dtype: torch.dtype) -> Iterator[Op]:
    """RMSNorm of a sum, as a LLaMA's block has it, and LayerNorm."""
    C, eps = shape.hidden_size, shape.norm_eps
    x, residual = (leaf(N, C, dtype=dtype) for _ in range(2))
    w, b = leaf(C, dtype=dtype), leaf(C, dtype=dtype)
    once = N * C * x.element_size()

    def rms(x, w, residual):
        return ours.rms_norm(x, w, eps, residual)

    def plain_rms(x, w, residual):
        h = x + residual
        return F.rms_norm(h, (C,), eps=eps) * w, h

    def layer(x, w, b):
        return ours.layer_norm(x, w, b, eps)

    def plain_layer(x, w, b):
        return F.layer_norm(x, (C,), w, b, eps)

    sides = {"ours": rms, "plain torch": plain_rms}
    yield Op("rms_norm of x + residual", (x, w, residual), sides, Work(0, 4 * once), Work(0, 8 * once))
    sides = {"ours": layer, "plain torch": plain_layer}
    yield Op("layer_norm", (x, w, b), sides, Work(0, 2 * once), Work(0, 5 * once))


def rope(shape: ModelConfig, T: int, dtype: torch.dtype) -> Iterator[Op]:
    """Queries and keys of one row of T tokens; for BLOOM, which has no RoPE, whole heads."""
    H, K, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    R = shape.rotary_dim or D
    q, k = (leaf(1, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K))
    frequencies = 1e4 ** (-torch.arange(0, R, 2) / R)  # (R/2,)
    table = ours.rope_table(torch.arange(T)[None], frequencies)

    def turned(x, cos, sin):
        part = x[..., :R].float()
        return torch.cat(((part * cos + part.roll(R // 2, -1) * sin).to(x.dtype), x[..., R:]), -1)

    def plain(q, k, cos, sin):
        return turned(q, cos, sin), turned(k, cos, sin)

    once = T * (H + K) * D * q.element_size() * 2 + 4 * T * R  # every angle once
    sides = {"ours": ours.rope_pair, "plain torch": plain}
    yield Op(f"rope, {R} of {D}", (q, k, *table), sides, Work(0, once), Work(0, 2 * once))


def glu(shape: ModelConfig, N: int, dtype: torch.dtype) -> Iterator[Op]:
    """SwiGLU."""
    gate, up = (leaf(N, shape.intermediate_size, dtype=dtype) for _ in range(2))
    once = gate.numel() * gate.element_size()
    sides = {"ours": ours.glu, "plain torch": lambda gate, up: F.silu(gate) * up}
    yield Op("glu (silu)", (gate, up), sides, Work(0, 3 * once), Work(0, 8 * once))


def linear_nll(shape: ModelConfig, N: int, dtype: torch.dtype) -> Iterator[Op]:
    """The head and its loss, summed over the tokens."""
    C, V = shape.hidden_size, shape.vocab_size or 4096
    x, w = leaf(N, C, dtype=dtype), leaf(V, C, dtype=dtype, scale=C**-0.5)
    targets = torch.randint(0, V, (N,))

    def mine(x, w, targets):
        return ours.linear_nll(x, w, None, targets)[0].sum()

    def plain(x, w, targets):
        return F.cross_entropy(F.linear(x, w).float(), targets, reduction="sum")

    def chunked(x, w, targets):
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, w, targets, reduction="sum", options=options)

    product, moved = 2 * N * V * C, (N + V) * C * x.element_size()
    sides = {"ours": mine, "plain torch": plain, "F.linear_cross_entropy": chunked}
    yield Op("linear_nll", (x, w, targets), sides, Work(product, moved), Work(3 * product, 3 * moved))


def quant(shape: ModelConfig, _: int, dtype: torch.dtype) -> Iterator[Op]:
    """The MLP's first matrix in 8 and in 4 bits, for 1, 16 and 64 rows."""
    N, K = shape.intermediate_size, shape.hidden_size
    for bits, group in ((8, K), (4, 128 if K % 128 == 0 else 32)):
        q = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
        scales = torch.rand(N, K // group, dtype=torch.float16) * 2.0**-bits
        zeros = torch.full((N, K // group), 2 ** (bits - 1), dtype=torch.uint8)

        def whole(q=q, zeros=zeros, scales=scales, group=group):
            centred = q.to(dtype).view(N, -1, group) - zeros[..., None].to(dtype)
            return (centred * scales[..., None].to(dtype)).view(N, K)

        weight = whole()
        for M in (1, 16, 64):
            matrix = ours.packed(q, zeros, scales, bits, dtype, M)
            if matrix is None:
                print(f"product, {bits} bits: this machine has none")
                continue
            sides = {
                "ours": matrix,
                "plain torch": lambda x, whole=whole: x @ whole().t(),
                "16-bit F.linear": lambda x, weight=weight: F.linear(x, weight),
            }
            x = torch.randn(M, K, dtype=dtype)
            moved = N * K * bits / 8 + scales.numel() * (2 + bits / 8) + M * (N + K) * x.element_size()
            group_name = "" if group == K else f", groups of {group}"
            yield Op(
                f"product, {bits} bits{group_name}, {M} x {K} x {N}", (x,), sides, Work(2 * M * N * K, moved)
            )


def leaf(*size: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Random numbers whose gradient is asked for."""
    return (torch.randn(size) * scale).to(dtype).requires_grad_()


MAKERS: dict[str, Callable[[ModelConfig, int, torch.dtype], Iterator[Op]]] = {
    "attention": attention,
    "decode": decode,
    "norm": norm,
    "rope": rope,
    "glu": glu,
    "linear_nll": linear_nll,
    "quant": quant,
}

# --- 4. the tuner -------------------------------------------------------------------------------------------

LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5), "whole": (0, 1), "PROGRAMS": (1, 64)}
LEAST = {"BM": 16, "BN": 16, "BLOCK_N": 2, "BLOCK_V": 16, "BLOCK_C": 16, "BLOCK_W": 32, "CHUNK": 64}
GAIN = 1.02  # by how much a launch has to be faster


class Trial(NamedTuple):
    """A call whose launches are tuned, and what it gave with the launches of the table."""

    name: str
    call: Callable[[], list[torch.Tensor]]
    right: list[torch.Tensor]


def tune(ops: Sequence[Op], clock: Clock, rounds: int, path: Path, table: dict) -> None:
    """Search launches that are faster than the table's, and add them to a file.

    One number of one launch is changed at a time, halved or doubled (stages: one more or less), for as long
    as that gains 2 % of the time of the ops that use it, measured in turns, twice. A launch that does not
    compile, does not fit or gives other results is passed over.
    """
    users: dict[tuple[str, str, str], list[Trial]] = defaultdict(list)
    starts = {}
    for op in ops:
        call = (forward_backward if op.both else forward_only)(op.sides["ours"], op.inputs)
        tables.forget()
        trial = Trial(op.name, call, call())
        for key, launch in tables.asked.items():
            users[key].append(trial)
            starts[key] = launch
    for key, trials in users.items():
        start = best = starts[key]
        tried = [start]
        while True:
            gains = []
            for launch in neighbours(best):
                if launch not in tried:
                    tried.append(launch)
                    gains.append((gain(key, trials, best, launch, clock, rounds), launch))
            first, launch = max(gains, key=lambda g: g[0], default=(0.0, best))
            if first < GAIN or gain(key, trials, best, launch, clock, 2 * rounds) < GAIN:
                break
            best = launch
        total = 1.0 if best == start else gain(key, trials, start, best, clock, 2 * rounds)
        if total < GAIN:
            best = start
        tables.override(*key, best)
        names = ", ".join(trial.name for trial in trials)
        print(f"{' '.join(key)}: {start} -> {best}, {total:.2f} x ({names})", flush=True)
        if best != start:
            op, arch, what = key
            table.setdefault(op, {}).setdefault(arch, {})[what] = best
            common.write_json(path, table)


def gain(key: tuple, trials: Sequence[Trial], old: dict, new: dict, clock: Clock, rounds: int) -> float:
    """How many times as fast a launch makes the calls that use it as another does; 0: it cannot be used."""

    def with_launch(launch: dict, call: Callable) -> Callable:
        def run():
            tables.override(*key, launch)
            return call()

        return run

    ratios = []
    for trial in trials:
        before, after = with_launch(old, trial.call), with_launch(new, trial.call)
        try:
            if not difference(after(), trial.right) < 0.01:  # a nan is no small difference
                return 0.0
        except failures() + (AssertionError, ValueError):
            return 0.0
        sides = {"old": functools.partial(clock, before), "new": functools.partial(clock, after)}
        ratios.append(ratio(alternate(rounds, **sides), "new", "old"))
    return statistics.geometric_mean(ratios)


def neighbours(launch: dict[str, int]) -> list[dict[str, int]]:
    """Change one number of a launch in every way that is worth a try."""
    found = []
    for name, value in launch.items():
        low, high = LIMITS.get(name, (LEAST.get(name, 1), 1 << 16))
        steps = (value - 1, value + 1) if name in ("num_stages", "whole") else (value // 2, value * 2)
        found += [{**launch, name: new} for new in steps if low <= new <= high]
    return found
