"""Every op of kernels/ beside what PyTorch has: time, TFLOP/s, GB/s, per cent of the roofline; and a tuner.

    python bench.py kernels                              # this machine: its GPU, or the CPU's twins
    python bench.py kernels --ops attention linear_nll --preset llama-2-7b --tokens 4096
    python bench.py kernels --tune table.json            # on a GPU: search block sizes, warps and stages
    KERNEL_TABLE=table.json torchrun train.py ...        # and use what was found

An op's roof is the time that its work would take at the speed of the machine: arithmetic at the peak of
matrix products or bytes at that of the memory, whichever takes longer (Williams et al. 2009, "Roofline"). The
peaks are those of the card's data sheet where it is known here, else a large product and a large copy,
measured in the same run. Bytes are those of inputs and outputs, each once; arithmetic is the least that is
needed: what a kernel computes again does not count.

All sides of an op take turns, between two runs the caches are overwritten, and each figure is a median.
`differs` is the largest relative difference (L2) of an output or a gradient from plain torch in the same
dtype.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

import common
import kernels as ours
from kernels import dispatch, tables
from model import PRESETS, ModelConfig

DATA_SHEETS = {  # part of the device's name: 16-bit FLOP/s (dense), bytes/s; the first that fits
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100 80GB PCIe": (312e12, 1.935e12),
    "A100": (312e12, 1.555e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A10": (125e12, 0.6e12),
    "RTX 4090": (165e12, 1.008e12),
    "MI300X": (1307e12, 5.3e12),
}
OPS = Literal["attention", "decode", "norm", "rope", "glu", "linear_nll", "quant"]


@dataclass
class KernelsBench:
    preset: str = ""  # whose widths; default: xverse-13b on a GPU, phi2-chinese-0.2b on a CPU
    ops: tuple[OPS, ...] = ("attention", "decode", "norm", "rope", "glu", "linear_nll", "quant")  # which
    tokens: int = 0  # of one row, and of the cache when decoding; default: 8192 on a GPU, 512 on a CPU
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of activations and weights
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one
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
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    name = config.preset or ("xverse-13b" if device == "cuda" else "phi2-chinese-0.2b")
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: expected one of {', '.join(PRESETS)}")
    if config.tune and device == "cpu" and not dispatch.interpreted():
        raise ValueError("--tune needs a GPU: on a CPU no kernel is launched")
    dtype, tokens = getattr(torch, config.dtype), config.tokens or (8192 if device == "cuda" else 512)
    torch.manual_seed(1)
    with torch.device(device):
        clock = Clock(device)
        machine = ceilings(clock, dtype)
        print(f"kernels: {name}, {tokens} tokens, {config.dtype}, {device_name(device)}; {machine.text}")
        print(
            f"{'':34s}{'time':>12s}{'TFLOP/s':>10s}{'GB/s':>8s}{'of roof':>9s}{'x plain':>9s}{'differs':>10s}"
        )
        for kind in config.ops:
            for op in MAKERS[kind](PRESETS[name], tokens, dtype):
                if config.tune:
                    tune(op, clock, config)
                else:
                    measure(op, clock, machine, config)


# --- 1. the clock and the machine ---------------------------------------------------------------------------


class Clock:
    """Time single calls, each with cold caches."""

    def __init__(self, device: str):
        self.device = device
        self.scratch = torch.empty(1 << 28, dtype=torch.uint8, device=device)  # more than a cache holds

    def __call__(self, call: Callable) -> float:
        """Run a function; return its seconds."""
        self.scratch.fill_(1)
        if self.device == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()  # while the GPU still overwrites its cache: the launch itself is not seen
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, call: Callable, rounds: int) -> float:
        """Run it once to warm up, then some rounds."""
        call()
        return statistics.median(self(call) for _ in range(rounds))


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
    size = 8192 if clock.device == "cuda" else 2048
    a = torch.randn(size, size, dtype=dtype)
    flops = 2 * size**3 / clock.median(lambda: a @ a, 5)
    source = torch.ones(1 << (30 if clock.device == "cuda" else 28), dtype=torch.uint8)
    target = torch.empty_like(source)
    moved = 2 * len(source) / clock.median(lambda: target.copy_(source), 5)
    text = f"a large product {flops / 1e12:.3g} TFLOP/s, a large copy {moved / 1e9:.0f} GB/s"
    name = device_name(clock.device)
    sheet = next((peaks for part, peaks in DATA_SHEETS.items() if part in name), None)
    if clock.device == "cpu" or not sheet or dtype == torch.float32:
        return Machine(flops, moved, text)
    return Machine(*sheet, f"{text} (data sheet: {sheet[0] / 1e12:.0f}, {sheet[1] / 1e9:.0f})")


def device_name(device: str) -> str:
    """Name the GPU, or the number of threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


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
            except (RuntimeError, NotImplementedError) as error:  # out of memory, say; the others go on
                failed[name] = str(error).strip().splitlines()[0][:80]
        differs = {name: difference(out, outputs.get("plain torch")) for name, out in outputs.items()}
        outputs.clear()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(config.rounds):
            for name, call in calls.items():
                seconds[name].append(clock(call))
        for name in functions:
            if name in failed:
                print(f"  {name:32s}  failed: {failed[name]}")
                continue
            spent = statistics.median(seconds[name])
            plain = seconds.get("plain torch")
            ratio = statistics.median(p / s for p, s in zip(plain, seconds[name])) if plain else float("nan")
            print(
                f"  {name:32s}{1e3 * spent:9.3f} ms{work.flops / spent / 1e12:10.3f}"
                f"{work.bytes / spent / 1e9:8.1f}{100 * machine.roof(work) / spent:7.1f} %{ratio:9.2f}"
                f"{differs[name]:10.1e}",
                flush=True,
            )


def forward_only(function: Callable, inputs: tuple) -> Callable[[], list[torch.Tensor]]:
    """Make a function that computes the outputs without gradients."""

    def call():
        with torch.no_grad():
            return tensors(function(*inputs))

    return call


def forward_backward(function: Callable, inputs: tuple) -> Callable[[], list[torch.Tensor]]:
    """Make a function that computes the outputs, and the gradients of the floating inputs for random ones."""
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


def difference(got: list, plain: list | None) -> float:
    """Give the largest relative L2 difference of two lists of tensors; nan: there is nothing to compare."""
    pairs = [(a.float(), b.float()) for a, b in zip(got, plain or [])]
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-30) for a, b in pairs), default=torch.tensor(torch.nan)
    ).item()


# --- 3. the ops ---------------------------------------------------------------------------------------------


def attention(shape: ModelConfig, T: int, dtype: torch.dtype) -> Iterator[Op]:
    """One causal row of T tokens, then the same row with eight documents in it."""
    H, K, D = shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    q, k, v = (wanted(1, T, heads, D, dtype=dtype).transpose(1, 2) for heads in (H, K, K))
    starts = torch.arange(T) // -(-T // 8) * -(-T // 8)  # (T,)
    cuts = torch.cat((starts.unique(), torch.tensor([T]))).int()
    longest = -(-T // 8)

    key = torch.arange(T)
    hidden = {False: key > key[:, None], True: (key > key[:, None]) | (key < starts[:, None])}  # (T, T)

    def triton(q, k, v, lo):
        ours.use_attention("triton")
        try:
            return ours.attention(q, k, v, lo)
        finally:
            ours.use_attention("auto")

    def plain(q, k, v, lo):
        scores = q.unflatten(1, (K, -1)) @ k[:, :, None].mT * D**-0.5  # (1, K, G, T, T)
        scores = scores.masked_fill(hidden[lo is not None], float("-inf"))
        return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)

    def sdpa(q, k, v, lo):
        if lo is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=H != K)
        return F.scaled_dot_product_attention(q, k, v, ~hidden[True], enable_gqa=H != K)

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
        sides = {"ours": triton, "plain torch": plain, "sdpa": sdpa}
        if lo is not None and q.is_cuda:
            sides["varlen_attn"] = varlen
        yield Op(name, (q, k, v, lo), sides, Work(flops, moved), Work(3.5 * flops, 3.5 * moved))


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
    x, residual = (wanted(N, C, dtype=dtype) for _ in range(2))
    w, b = wanted(C, dtype=dtype), wanted(C, dtype=dtype)
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
    """Queries and keys of one row of T tokens, stacked; for BLOOM, which has no RoPE, whole heads."""
    heads, D = shape.num_attention_heads + shape.num_key_value_heads, shape.head_dim
    R = shape.rotary_dim or D
    x = torch.randn(1, T, heads, D, dtype=dtype).transpose(1, 2).requires_grad_()
    frequencies = 1e4 ** (-torch.arange(0, R, 2) / R)  # (R/2,)
    table = ours.rope_table(torch.arange(T)[None], frequencies)

    def plain(x, cos, sin):
        part = x[..., :R].float()
        return torch.cat(((part * cos + part.roll(R // 2, -1) * sin).to(x.dtype), x[..., R:]), -1)

    once = x.numel() * x.element_size()
    sides = {"ours": ours.rope, "plain torch": plain}
    yield Op(f"rope, {R} of {D}", (x, *table), sides, Work(0, 2 * once), Work(0, 4 * once))


def glu(shape: ModelConfig, N: int, dtype: torch.dtype) -> Iterator[Op]:
    """SwiGLU."""
    gate, up = (wanted(N, shape.intermediate_size, dtype=dtype) for _ in range(2))
    once = gate.numel() * gate.element_size()
    sides = {"ours": ours.glu, "plain torch": lambda gate, up: F.silu(gate) * up}
    yield Op("glu (silu)", (gate, up), sides, Work(0, 3 * once), Work(0, 8 * once))


def linear_nll(shape: ModelConfig, N: int, dtype: torch.dtype) -> Iterator[Op]:
    """The head and its loss, summed over the tokens."""
    C, V = shape.hidden_size, shape.vocab_size or 4096
    x, w = wanted(N, C, dtype=dtype), wanted(V, C, dtype=dtype, scale=C**-0.5)
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
    """The MLP's first matrix in 8 and in 4 bits, for one row and for 16."""
    N, K = shape.intermediate_size, shape.hidden_size
    for bits, group in ((8, K), (4, 128 if K % 128 == 0 else 32)):
        q = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
        scales = torch.rand(N, K // group, dtype=torch.float16) * 2.0**-bits
        zeros = torch.full((N, K // group), 2 ** (bits - 1), dtype=torch.uint8)

        def whole(q=q, zeros=zeros, scales=scales, group=group):
            centred = q.to(dtype).view(N, -1, group) - zeros[..., None].to(dtype)
            return (centred * scales[..., None].to(dtype)).view(N, K)

        weight = whole()
        for M in (1, 16):
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


def wanted(*size: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
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

LIMITS = {"num_warps": (1, 16), "num_stages": (1, 5), "whole": (0, 1)}  # of the others: 2 to 2^16


def tune(op: Op, clock: Clock, config: KernelsBench) -> None:
    """Search launches for an op that are faster than the table's, and add them to the file.

    One number of one launch is changed at a time, halved or doubled (stages: one more or less), for as long
    as that gains 2 %. A launch that does not compile, does not fit or gives other results is passed over.
    """
    call = (forward_backward if op.both else forward_only)(op.sides["ours"], op.inputs)
    tables.forget()
    right = call()  # and notes what is launched
    best = clock.median(call, config.rounds)
    first = best
    for (kind, arch, key), start in list(tables.found.items()):
        current, tried = dict(start), {tuple(start.values())}
        while True:
            candidates = [c for c in neighbours(current) if tuple(c.values()) not in tried]
            times = {}
            for i, candidate in enumerate(candidates):
                tried.add(tuple(candidate.values()))
                tables.override(kind, arch, key, candidate)
                try:
                    if difference(call(), right) < 0.01:
                        times[i] = clock.median(call, config.rounds)
                except (RuntimeError, AssertionError, ValueError):
                    continue
            fastest = min(times, key=times.get, default=None)
            if fastest is None or times[fastest] > 0.98 * best:
                break
            current, best = candidates[fastest], times[fastest]
        tables.override(kind, arch, key, current)
        if current != start:
            add_launch(Path(config.tune), kind, arch, key, current)
            print(f"  {kind} {arch} {key}: {start} -> {current}", flush=True)
    print(f"{op.name}: {1e3 * first:.3f} -> {1e3 * best:.3f} ms", flush=True)


def neighbours(launch: dict[str, int]) -> list[dict[str, int]]:
    """Change one number of a launch in every way that is worth a try."""
    found = []
    for name, value in launch.items():
        low, high = LIMITS.get(name, (2, 1 << 16))
        steps = (value - 1, value + 1) if name in ("num_stages", "whole") else (value // 2, value * 2)
        found += [{**launch, name: new} for new in steps if low <= new <= high]
    return found


def add_launch(path: Path, op: str, arch: str, key: str, launch: dict[str, int]) -> None:
    """Add one launch to a file for KERNEL_TABLE; what else it says stays."""
    table = json.loads(path.read_text("utf-8")) if path.exists() else {}
    table.setdefault(op, {}).setdefault(arch, {})[key] = launch
    common.write_json(path, table)
