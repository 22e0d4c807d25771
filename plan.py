"""Memory, communication and time of a training run, before it starts.

Three questions: does it fit, how long will it take, and how many tokens does a model of this size want?

    weights, gradients, moments    16·N bytes (12 for matrices that Muon trains), cut over the ranks of a copy
    activations                    what autograd keeps for the backward pass, term by term in `block_bytes`
    the head and its loss          chunks of logits, never all; the head's gradient is whole for a moment
    peak                           the worst of a few named moments of a step (`moments`)
    FLOPs                          6 a token and parameter, plus attention; time = FLOPs / (MFU · peak)

`--simulate` runs two steps of the real model, loss, FSDP2 and optimizer (not the clipping) with tensors that
have shapes but no memory, as rank 0 of any number of ranks, and prints what it counted beside the formulas:
13B on 1,024 GPUs in a minute on one core. Formulas and simulation count tensors. What a GPU needs besides,
for CUDA's context, NCCL and fragmentation, is the tenth of its memory that is kept free here. Attention is
counted as a fused kernel that knows documents keeps it; plain PyTorch keeps a mask, T x T, or ALiBi's scores
besides. Times are calculations from a stated MFU, not measurements.

    python plan.py --preset xverse-13b --gpus 8 --gpu H100 --shard zero3 --activation_checkpointing
    python plan.py --preset xverse-13b --gpus 1024 --shard zero3 --replicas 128 --tokens 3.2e12 --mfu 0.4
    python plan.py --preset xuanyuan-6b --gpus 8 --shard zero2 --row_tokens 2048 --simulate

Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (20 tokens a parameter); Korthikanti
et al. 2022, "Reducing Activation Recomputation"; Rajbhandari et al. 2020, "ZeRO".
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import weakref
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

import checkpoint
import common
import kernels
from kernels.linear_nll import CHUNK_ELEMENTS
from model import FROM_TOKENIZER, PRESETS, ModelConfig, build, flops_per_token, num_params
from optim import Kind, OptimConfig, make_optimizer
from parallel import ParallelConfig, gradient_sync, make_mesh, parallelize

# --- 1. what is planned, and on what -----------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """The vendor's figures: dense bf16 TFLOP/s, memory in GiB, GB/s to its neighbours in one direction."""

    tflops: float
    memory: float
    link: float  # NVLink, or PCIe 4.0 x16


GPUS = {
    "A100": Gpu(312, 80, 300),
    "A800": Gpu(312, 80, 200),
    "H100": Gpu(989, 80, 450),
    "H800": Gpu(989, 80, 200),
    "H200": Gpu(989, 141, 450),
    "4090": Gpu(165, 24, 32),
    "3090": Gpu(71, 24, 32),
    "L40S": Gpu(362, 48, 32),
}
USABLE = 0.9  # of a GPU's memory; the rest is for CUDA's context, NCCL's buffers, fragmentation
NODE = 8  # GPUs that are joined by the fast link


@dataclass(kw_only=True)
class Job:
    """One optimizer step: `accumulation` micro-batches of micro_rows x row_tokens on every rank."""

    config: ModelConfig
    parallel: ParallelConfig
    world: int  # ranks, one a GPU
    micro_rows: int
    row_tokens: int
    accumulation: int = 1
    optimizer: Kind = "adamw"

    def __post_init__(self):
        p = self.parallel
        if self.world % p.replicas:
            raise ValueError(f"--replicas {p.replicas}: {self.world} GPUs are no multiple of it")

    @property
    def tokens(self) -> int:
        """Tokens of a step, of all ranks."""
        return self.world * self.accumulation * self.micro_rows * self.row_tokens

    @property
    def cut(self) -> int:
        """Ranks over which a copy of the model is cut; 1: each has all of it."""
        return 1 if self.parallel.shard == "none" else self.world // self.parallel.replicas

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 4 if self.parallel.dtype == "float32" else 2


def cut_step(tokens_per_step: int, row: int, world: int, micro_tokens: int) -> tuple[int, int]:
    """Give each rank's (rows of a micro-batch, micro-batches); ValueError if ranks cannot share evenly."""
    rows = tokens_per_step // row
    if rows < world or rows % world:
        fit = max(1, round(rows / world)) * world * row
        raise ValueError(
            f"--tokens_per_step {tokens_per_step} is {rows} rows of {row} tokens, which {world} ranks "
            f"cannot share evenly; take for example {fit}"
        )
    mine = rows // world
    micro = max(d for d in range(1, mine + 1) if mine % d == 0 and (d == 1 or d * row <= micro_tokens))
    return micro, mine // micro


# --- 2. memory ---------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """Bytes of one rank at one moment."""

    parameters: float = 0  # fp32 masters
    optimizer: float = 0
    gradients: float = 0  # those kept for the optimizer, fp32
    gathered: float = 0  # whole weights: FSDP2's, or the bf16 casts of Linear that autograd keeps without it
    activations: float = 0
    loss: float = 0
    sending: float = 0  # whole gradients, before and while they are summed over ranks

    @property
    def total(self) -> float:
        """The sum."""
        return sum(dataclasses.astuple(self))


def groups(config: ModelConfig) -> dict[str, list[torch.Size]]:
    """Give the shapes of what parallel.py gathers together: a block, the embedding, the head with its norm.

    A tied table is used at both ends, so there all but the blocks is one group, "head".
    """
    found: dict = {"block": [], "embedding": [], "head": []}
    tied = config.tie_word_embeddings and config.head == "lm"
    for name, p in build(replace(config, num_hidden_layers=1), "meta").named_parameters():
        first = name.split(".")[0]
        own = {"layers": "block"} if tied else {"layers": "block", "embed_tokens": "embedding"}
        found[own.get(first, "head")].append(p.shape)
    return found


def elements(shapes: list[torch.Size], cut: int = 1, whole: bool = True) -> int:
    """Count the elements of tensors cut by rows over `cut` ranks, filled up so that all ranks hold alike."""
    rows = sum(-(-s[0] // cut) * math.prod(s[1:]) for s in shapes)
    return rows * cut if whole else rows


def block_bytes(config: ModelConfig, item: int) -> tuple[int, int]:
    """Give bytes a token that a block keeps for its backward pass, and that this pass adds at its worst.

    C width, F mlp width, H·D and K·D widths of queries and of keys. As on a GPU with the kernels of kernels/:
    attention keeps no scores, a norm its input, a gated unit both factors, RoPE nothing. What is listed is
    what autograd saves: the inputs of products, norms and activations.
    """
    s, C, F_ = config.switches, config.hidden_size, config.intermediate_size
    q, kv = (h * config.head_dim for h in (config.num_attention_heads, config.num_key_value_heads))
    norms = 1 if s.parallel else 2
    kept = norms * C * 2 * item  # x and the result
    kept += norms * (4 if s.rms_norm else 8)  # statistics, fp32
    kept += (q + kv + kv + q) * item  # q, k, v, and the output, which is o_proj's input
    kept += config.num_attention_heads * 4  # logsumexp of the scores, fp32
    kept += (3 if s.gated else 2) * F_ * item  # gate, up, product; or up, act(up)
    kept += norms * C if config.dropout else 0  # masks, a byte each
    # the MLP's backward pass: gradients of the product and of both factors, or of act(up) and up; down_proj's
    # input is gone by then; and the gradient of the block's output
    return kept, ((2 if s.gated else 1) * F_ + C) * item


def loss_bytes(config: ModelConfig, tokens: int, item: int) -> int:
    """Count what the head's backward pass (kernels.linear_nll on a GPU) holds beside the head.

    V vocabulary, C width, N tokens. The weight's cast and its fp32 gradient; x, and its gradient in fp32; a
    chunk of V: the gradient of its logits, and the larger of what it adds to the gradient of x and to that of
    the weight, before they are added. At the end x's gradient is cast.
    """
    V, C, N = config.vocab_size, config.hidden_size, tokens
    chunk = head_chunk(V, N)
    several = chunk < V
    cast = item * V * C if item == 2 else 0
    work = item * N * chunk + 4 * chunk * C + (8 * N * C if several else item * N * C)
    return cast + 4 * V * C + item * N * C + work


def head_chunk(V: int, N: int) -> int:
    """Give the words of V whose logits of N tokens are worked at once: equal parts of at most a chunk."""
    parts = math.ceil(V / max(1, CHUNK_ELEMENTS["cuda"] // N))
    return math.ceil(V / parts)


def shares(job: Job) -> Memory:
    """Give what a rank keeps: its parameters, their gradients, AdamW's two moments or Muon's one."""
    shapes, L = groups(job.config), job.config.num_hidden_layers
    own = {g: 4 * elements(s, job.cut, whole=False) for g, s in shapes.items()}
    kept = L * own["block"] + own["embedding"] + own["head"]
    matrices = 4 * L * elements([s for s in shapes["block"] if len(s) == 2], job.cut, whole=False)
    return Memory(kept, 2 * kept - (matrices if job.optimizer == "muon" else 0), kept)


def moments(job: Job) -> dict[str, Memory]:
    """Give the memory of one rank at those moments of a step where it may be highest."""
    c, p, a = job.config, job.parallel, job.item
    shapes, L, base = groups(c), c.num_hidden_layers, shares(job)
    block, embedding, head = (elements(shapes[g], job.cut) for g in ("block", "embedding", "head"))
    own = {g: 4 * elements(shapes[g], job.cut, whole=False) for g in shapes}
    tied = not embedding  # then the table is in `head`, and its two gradients meet at the end

    N = job.micro_rows * job.row_tokens
    x = N * c.hidden_size * a
    saved, extra = (N * n for n in block_bytes(c, a))
    tables = 8 * job.row_tokens * c.rotary_dim if c.switches.rope else 0  # cos and sin
    forward = L * (x if p.activation_checkpointing else saved) + x + tables  # what the forward pass left
    last = forward + extra + (saved - x if p.activation_checkpointing else 0)
    first = saved + extra + tables
    loss = loss_bytes(c, N, a) if c.head == "lm" else 0
    table = 4 * c.vocab_size * c.hidden_size  # the embedding's gradient is dense and whole
    held = table if tied else 0
    down = c.hidden_size * c.intermediate_size  # a block's first gradient

    everything = L * a * block + 4 * (embedding + head)
    again = job.accumulation > 1
    # gradients are there from the start of a later micro-batch on, and in DDP's buckets always
    full = base.gradients if again or (job.world > 1 and p.shard == "none") else 0
    done = base.gradients - own["embedding"] - tied * own["head"]  # before the embedding's turn

    if p.shard == "zero3":  # a block at a time; the next one is gathered ahead
        root = 4 * head if tied else 0
        ahead = a * block * (L > 1)
        weights = [4 * head + a * block, 2 * a * block + root, a * block + ahead + root]
        weights.append(root)
    elif p.shard == "zero2":  # all; after the last micro-batch a group goes when its gradients go
        weights = [everything, everything - (0 if tied else 4 * head)]
        weights += [a * block + 4 * (embedding or head), 4 * (embedding or head)]
        weights = [everything] * 4 if again else weights
    else:  # every Linear casts its weight to bf16, and autograd keeps the cast
        cast = 2 * block if a == 2 else 0
        casts = 0 if p.activation_checkpointing else L * cast
        weights = [casts, max(cast, casts), cast, 0]
    sent = 4 * block if p.shard != "none" else 0  # FSDP2 keeps a buffer until the next one is filled
    before = (0 if tied else 4 * head) if p.shard != "none" else 0 if full or tied else table
    whole = a * down + held + (4 * down if p.shard == "none" and a == 2 else 0)
    # the embedding's gradient: beside the block's that was sent last, or copied to be sent, and summed
    dense = sent + table * 3 if tied else max(sent + table, (2 * table + own["embedding"]) * (sent > 0))
    found = {  # name: kept gradients, weights, activations, loss, sending
        "the head's backward pass": (0, weights[0], forward, loss, 0),
        "the last block's backward pass": (own["head"] * (not tied), weights[1], last, 0, before + whole),
        "the first block's backward pass": (
            done - own["block"],
            weights[2],
            first,
            0,
            sent * (L > 1) + whole,
        ),
        "the embedding's backward pass": (done, weights[3], x, 0, dense),
        "the optimizer's step": (base.gradients, 0, 0, 0, 10 * down if job.optimizer == "muon" else 0),
    }
    if p.shard == "none":  # gradients are whole, and kept as they are
        found["the last block's backward pass"] = (0, weights[1], last, 0, before + whole)
    out = {}
    for name, (kept, gathered, activations, loss_, sending) in found.items():
        kept = max(kept, full)
        out[name] = Memory(base.parameters, base.optimizer, kept, gathered, activations, loss_, sending)
        if p.offload:  # into main memory
            out[name] = replace(out[name], parameters=0, optimizer=0, gradients=0)
    return out


# --- 3. communication, disk, FLOPs -------------------------------------------------------------------------


@dataclass
class Estimate:
    """What a job takes, by calculation: of one rank, in bytes; communication per optimizer step."""

    peak: float
    peak_at: str
    moments: dict[str, Memory]
    host: float  # main memory of a rank for what is offloaded
    gathered: float  # sizes of whole tensors, as the collectives are given them
    scattered: float
    reduced: float  # DDP: all gradients; HSDP: between the copies
    dealt: float  # Muon's exchange of rows
    state: float  # on disk, a saved step of all ranks: fp32 parameters and moments
    model: float  # on disk, a saved step's model folder in bf16
    flops: float  # of the mathematics, a step of all ranks: for MFU
    hardware_flops: float  # with what is computed twice: for HFU

    @property
    def memory(self) -> Memory:
        """Give the parts of the peak."""
        return self.moments[self.peak_at]


def estimate(job: Job) -> Estimate:
    """Calculate what a job takes: the formulas of this file, without running anything."""
    c, p, micros = job.config, job.parallel, job.accumulation
    shapes, L, a = groups(c), c.num_hidden_layers, job.item
    found = moments(job)
    worst = max(found, key=lambda name: found[name].total)
    blocks = L * elements(shapes["block"], job.cut)
    rest = elements(shapes["embedding"] + shapes["head"], job.cut)
    matrices = L * elements([s for s in shapes["block"] if len(s) == 2])
    n = L * elements(shapes["block"]) + elements(shapes["embedding"] + shapes["head"])
    muon = job.optimizer == "muon"
    gathered = scattered = reduced = 0.0
    if job.cut > 1:
        again = p.shard == "zero3"  # blocks are gathered for the backward pass, too
        gathered = (a * blocks * (1 + again) + 4 * rest) * (micros if again else 1)
        scattered = 4 * (blocks + rest) * micros  # FSDP2 sends the gradients of every micro-batch
    if p.shard == "none":
        reduced = 4 * n if job.world > 1 else 0
    elif p.replicas > 1:
        reduced = 4 * (blocks + rest) / job.cut
    return Estimate(
        peak=found[worst].total,
        peak_at=worst,
        moments=found,
        host=shares(job).total if p.offload else 0,
        gathered=gathered,
        scattered=scattered,
        reduced=reduced,
        dealt=4 * matrices / job.cut if muon and job.cut > 1 else 0,
        state=12 * n - (4 * matrices if muon else 0),
        model=2 * n,
        flops=flops_per_token(c, job.row_tokens) * job.tokens,
        hardware_flops=flops_per_token(c, job.row_tokens, p.activation_checkpointing) * job.tokens,
    )


def changes(job: Job, fits) -> tuple[str, Job] | None:
    """Find the least change that makes a job fit, as flags and the job; None if none of those tried does.

    fits: Job -> bool. In this order: one, two or all of activation checkpointing, zero3 and single rows,
    which cost speed; then all of them on more GPUs; then with offload, which costs most.
    """
    p = job.parallel
    cheap = []
    if not p.activation_checkpointing:
        cheap.append(("--activation_checkpointing", {"activation_checkpointing": True}, {}))
    if p.shard != "zero3" and job.world > 1:
        cheap.append(("--shard zero3", {"shard": "zero3"}, {}))
    if job.micro_rows > 1:
        rows = {"micro_rows": 1, "accumulation": job.accumulation * job.micro_rows}
        cheap.append((f"--micro_tokens {job.row_tokens}", {}, rows))

    def changed(parts, **more):
        inner = {k: v for _, settings, _ in parts for k, v in settings.items()} | more.pop("inner", {})
        outer = {k: v for _, _, settings in parts for k, v in settings.items()} | more
        return replace(job, parallel=replace(p, **inner), **outer)

    for n in range(1, len(cheap) + 1):
        for parts in itertools.combinations(cheap, n):
            if fits(new := changed(parts)):
                return " ".join(flag for flag, _, _ in parts), new
    flags = [flag for flag, _, _ in cheap]
    if p.shard != "zero3" and job.world == 1:  # on one GPU it was not among the cheap ones
        flags.append("--shard zero3")
    shard = {"inner": {"shard": "zero3"}}
    for factor in (2, 4, 8, 16, 32, 64, 128):
        if fits(new := changed(cheap, world=job.world * factor, **shard)):
            return " ".join([f"--gpus {new.world}", *flags]), new
    if not p.offload and fits(new := changed(cheap, inner={"shard": "zero3", "offload": True})):
        return " ".join([*flags, "--offload"]), new
    return None


# --- 4. simulation -----------------------------------------------------------------------------------------


@dataclass
class Simulated:
    """What a simulated step counted on rank 0, in bytes, as in Estimate."""

    peak: int
    gathered: int
    scattered: int
    reduced: int
    dealt: int


def simulate(job: Job) -> Simulated:
    """Run two steps of the real code with tensors that take no memory, and count the second one's.

    The model, parallelize, loss, backward pass and optimizer are those of training; the ranks beside rank 0
    exist in the fake process group's imagination. Ops that keep something else on a CPU than on a GPU are
    replaced: attention, which would keep scores, and the norms; the loss's chunks are a GPU's.
    DDP's reducer does not run on such tensors: without --shard this is one process whose gradients stay, as
    DDP's buckets do, and nothing is sent. The first step makes moments and fills caches.

    ValueError: offload, or a process that is in a process group already.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if job.parallel.offload:
        raise ValueError(
            "--offload cannot be simulated: there is one kind of memory here; leave out --simulate"
        )
    if dist.is_initialized():
        raise ValueError("a simulation makes a process group of its own; start it without torchrun")
    sharded = job.parallel.shard != "none"
    process = common.Process(0, job.world if sharded else 1, "cpu")
    parallel = replace(job.parallel, compile=False, dtype="float32" if job.item == 4 else "bfloat16")
    meter = Meter()
    if sharded:
        dist.init_process_group("fake", rank=0, world_size=job.world, store=FakeStore())
    try:
        mesh = make_mesh(process, parallel) if sharded else None
        outside = None if sharded else build(job.config, "meta")  # only DTensors move between fake devices
        with _as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=not sharded):
            model = parallelize(outside or build(job.config, "meta"), process, parallel, mesh)
            model.train()
            optimizer = make_optimizer(model, OptimConfig(optimizer=job.optimizer))
            ids = torch.zeros((job.micro_rows, job.row_tokens), dtype=torch.long)
            buckets = job.world > 1 and not sharded
            _step(model, optimizer, ids, job, buckets)
            for p in model.parameters():
                meter.add(p, p.grad, *optimizer.state[p].values())
            with meter:
                _step(model, optimizer, ids, job, buckets)
    finally:
        if sharded:
            dist.destroy_process_group()
    return Simulated(
        meter.peak, *(meter.sent[name] for name in ("gathered", "scattered", "reduced", "dealt"))
    )


def _step(model, optimizer, ids, job: Job, buckets: bool) -> None:
    for i in range(job.accumulation):
        with gradient_sync(model, job.parallel, last=i == job.accumulation - 1):
            model(ids, ids).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=not buckets)


class Meter(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the storages that are alive, and what the collectives are given."""

    KINDS = {
        "c10d._allgather_base_.default": "gathered",
        "c10d._reduce_scatter_base_.default": "scattered",
        "c10d.allreduce_.default": "reduced",
        "c10d.alltoall_base_.default": "dealt",
    }

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = torch.utils.weak.WeakIdKeyDictionary()  # storage -> [bytes]
        self.sent: collections.Counter = collections.Counter()

    def add(self, *tensors) -> None:
        """Count the storages of tensors that are not known yet; of a DTensor, what is here."""
        for x in tensors:
            if isinstance(x, torch.Tensor):
                self._resized((x.to_local() if hasattr(x, "to_local") else x).untyped_storage())

    def _resized(self, storage, known: bool = False) -> None:
        if storage not in self.sizes:
            self.sizes[storage] = size = [0]
            weakref.finalize(storage, self._set, size, 0)
        elif not known:
            return
        self._set(self.sizes[storage], storage.nbytes())

    def _set(self, size: list[int], n: int) -> None:
        self.live += n - size[0]
        size[0] = n
        self.peak = max(self.peak, self.live)

    def __enter__(self):
        self.resize_ = torch.UntypedStorage.resize_  # how FSDP2 frees a gathered weight; no op tells of it

        def resize_(storage, n):
            self.resize_(storage, n)
            self._resized(storage, known=True)

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize_
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run an op and look at its tensors."""
        out = func(*args, **(kwargs or {}))
        tensors = [
            x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)
        ]
        self.add(*(x for x in tensors if not hasattr(x, "to_local")))
        if kind := self.KINDS.get(str(func)):
            self.sent[kind] += max(x.nbytes for x in tensors[: 2 if kind != "dealt" else 1])
        return out


@contextlib.contextmanager
def _as_on_a_gpu():
    """Let models keep and take what they do with the kernels of kernels/; numbers have no meaning here."""
    mine = {
        "attention": _flash_attention,
        "rms_norm": lambda x, weight, eps, residual=None: _fused_norm(x, weight, None, residual),
        "layer_norm": lambda x, weight, bias, eps, residual=None: _fused_norm(x, weight, bias, residual),
        "glu": _FusedGLU.apply,
        "linear_nll": _HeadLoss.apply,
    }
    theirs = {name: getattr(kernels, name) for name in mine}
    try:
        for name, op in mine.items():
            setattr(kernels, name, op)
        yield
    finally:
        for name, op in theirs.items():
            setattr(kernels, name, op)


def _flash_attention(q, k, v, lo=None, start=None, slopes=None):
    """Keep q, k, v, the output and logsumexp, with documents and ALiBi too."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _fused_norm(x, weight, bias, residual):
    """Keep the input and a row's statistics: one of them, or with a bias two."""
    h = x if residual is None else x + residual
    y = _FusedNorm.apply(h, weight, bias)
    return y if residual is None else (y, h)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.two = bias is not None
        rows = h.new_empty(1 + ctx.two, *h.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(h, weight, rows)
        return torch.empty_like(h)

    @staticmethod
    def backward(ctx, grad):
        weight = ctx.saved_tensors[1]
        return torch.empty_like(grad), torch.empty_like(weight), torch.empty_like(weight) if ctx.two else None


class _FusedGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, act):
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), torch.empty_like(grad), None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, targets):
        ctx.save_for_backward(x, weight, bias)
        weight.to(x.dtype)
        return tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))

    @staticmethod
    def backward(ctx, *_):
        """Allocate what _linear_nll_triton.backward does."""
        x, weight, bias = ctx.saved_tensors
        (N, C), V = x.shape, len(weight)
        w = weight.to(x.dtype)  # noqa: F841  held
        size = head_chunk(V, N)
        d, dw, dx = x.new_empty(N, size), torch.empty_like(weight), None  # noqa: F841
        for a in range(0, V, size):
            share = x.new_empty(N, C, dtype=torch.float32 if size < V else x.dtype)
            dx = share if dx is None else dx.add_(share)
            del share
            x.new_empty(min(size, V - a), C, dtype=weight.dtype)  # what goes into dw
        return dx.to(x.dtype), dw, None if bias is None else torch.empty_like(bias), None


# --- 5. the report and the command -------------------------------------------------------------------------


def fits(job: Job, gpu: str) -> bool:
    """Say whether the peak stays below what a GPU of this kind can be filled with."""
    return max(m.total for m in moments(job).values()) <= USABLE * GPUS[gpu].memory * 2**30


def communication_seconds(job: Job, e: Estimate, gpu: str, network: float) -> float:
    """Calculate a step's time in collectives at the full rate of the links: a lower bound.

    A ring moves (n−1)/n of a gathered or scattered tensor through each rank, twice that of a reduced one.
    Beyond a node the rate is `network`, GB/s a GPU and direction.
    """
    link = GPUS[gpu].link
    inside = link if job.cut <= NODE else min(link, network)
    copies = job.world // job.cut
    across = link if job.world <= NODE else min(link, network)
    ring = (job.cut - 1) / job.cut * (e.gathered + e.scattered + e.dealt) / inside
    return (ring + 2 * (copies - 1) / copies * e.reduced / across) / 1e9


def report(
    job: Job,
    gpu: str = "",
    tokens: float = 0,
    mfu: float = 0.4,
    keep: int = 2,
    network: float = 50,
    simulated: Simulated | None = None,
) -> str:
    """Write an estimate in words, at most 35 lines.

    gpu: a name of GPUS; "": unknown, so nothing is said of fitting and of time. tokens: of the whole run.
    keep: saved steps that stay. network: GB/s a GPU and direction between nodes.
    """
    c, p, e = job.config, job.parallel, estimate(job)
    n, human = num_params(c), common.human
    how = {"none": "whole on each rank (DDP)", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[p.shard]
    how += f" over {job.cut} ranks" * (job.cut > 1) + f" x {p.replicas} copies (HSDP)" * (p.replicas > 1)
    again = ", activation checkpointing" if p.activation_checkpointing else ""
    dtype = "fp32" if job.item == 4 else "bf16"
    lines = [
        f"model    {c.family}, {c.num_hidden_layers} layers x {c.hidden_size}, {n:,} parameters",
        f"ranks    {job.world} x {gpu or 'device'}: {how}{again}, {dtype}, {job.optimizer}",
        f"step     {job.world} ranks x {job.accumulation} micro-batches x {job.micro_rows} rows x "
        f"{job.row_tokens} tokens = {human(job.tokens)} tokens",
        f"memory of a rank in GB (1e9 bytes), at its peak: {e.peak_at}",
    ]
    words = {
        "parameters": "parameters, fp32",
        "optimizer": "optimizer state",
        "gradients": "gradients kept, fp32",
        "gathered": f"weights gathered or cast to {dtype}",
        "activations": "activations",
        "loss": "loss, in chunks",
        "sending": "gradients whole, being sent",
    }
    lines += [f"  {words[k]:34}{v / 1e9:9.2f}" for k, v in dataclasses.asdict(e.memory).items()]
    lines += [f"  {'peak':34}{e.peak / 1e9:9.2f}" + _beside(simulated and simulated.peak)]
    if p.offload:
        lines += [f"  {'main memory, offloaded':34}{e.host / 1e9:9.2f}"]
    if gpu:
        size = GPUS[gpu].memory
        usable = USABLE * size * 2**30
        word = "fits" if e.peak <= usable else "DOES NOT FIT"
        lines += [f"  {f'usable: {USABLE:.0%} of {size:g} GiB':34}{usable / 1e9:9.2f}   {word}"]
        if e.peak > usable:
            least = changes(job, lambda other: fits(other, gpu))
            with_it = (
                f"{least[0]}: {estimate(least[1]).peak / 1e9:.1f} GB" if least else "nothing that was tried"
            )
            lines += [f"  what would fit: {with_it}"]
    if e.gathered or e.reduced:
        lines += ["communication of a rank and optimizer step in GB"]
    for name, text in (
        ("gathered", "weights gathered"),
        ("scattered", "gradients reduce-scattered"),
        ("reduced", "gradients all-reduced"),
        ("dealt", "Muon's exchange of rows, about"),
    ):
        if getattr(e, name):
            beside = _beside(simulated and getattr(simulated, name))
            lines += [f"  {text:34}{getattr(e, name) / 1e9:9.2f}{beside}"]
    step = e.state + e.model
    lines += [
        f"disk     a saved step {e.state / 1e9:.1f} GB state + {e.model / 1e9:.1f} GB model; "
        f"--keep {keep} needs room for {keep + 1}: {(keep + 1) * step / 1e9:,.0f} GB",
        f"FLOPs    {human(e.flops / job.tokens)} a token, {e.flops:.3g} a step; "
        f"the hardware does {e.hardware_flops / e.flops:.2f}x",
    ]
    if gpu:
        peak = GPUS[gpu].tflops * 1e12
        seconds = e.flops / (mfu * peak * job.world)
        speed, wire = job.tokens / seconds, communication_seconds(job, e, gpu, network)
        hide = "they can hide behind it" if wire < seconds else "THEY CANNOT HIDE BEHIND IT"
        lines += [
            f"time     calculated for a stated MFU of {mfu:.1%} of {GPUS[gpu].tflops:g} TFLOP/s "
            f"(HFU {mfu * e.hardware_flops / e.flops:.1%})",
            f"  {speed:,.0f} tokens/s, {speed / job.world:,.0f} a GPU; a step takes {seconds:.2f} s",
        ]
        if wire:
            lines += [
                f"  collectives at the links' full rate: {wire:.2f} s, {wire / seconds:.0%} of it; {hide}"
            ]
        if tokens:
            days = tokens / speed / 86400
            lines += [f"  {human(tokens)} tokens, {math.ceil(tokens / job.tokens):,} steps: {days:,.1f} days"]
    rule = f"20 tokens a parameter (Hoffmann et al. 2022) are {human(20 * n)}"
    lines += [
        f"data     {f'{human(tokens)} tokens are {tokens / n:.1f} a parameter; ' if tokens else ''}{rule}"
    ]
    return "\n".join(lines)


def _beside(simulated: float | None) -> str:
    return "" if simulated is None else f"   simulated {simulated / 1e9:9.2f}"


@dataclass(kw_only=True)
class PlanConfig(ParallelConfig):
    """What is planned."""

    preset: str = "xverse-13b"  # a name of model.PRESETS, or a folder with a config.json
    vocab_size: int = 0  # rows of the embedding; 0: the preset's
    gpus: int = 8  # ranks, one a GPU
    gpu: str = "H100"  # A100, A800, H100, H800, H200, 4090, 3090 or L40S
    network: float = 50  # GB/s a GPU and direction between nodes of 8; 50: 400 Gbit/s
    row_tokens: int = 0  # tokens of a training row; 0: the model's context
    tokens_per_step: int = 4_194_304  # tokens of one optimizer step, over all micro-batches and ranks
    micro_tokens: int = 8192  # tokens of one rank in one forward pass: at most so many, at least a row
    tokens: float = 0  # of the whole run, for the days: 3.2e12
    optimizer: Kind = "adamw"  # muon: for the matrices of the blocks, AdamW for the rest
    mfu: float = 0.4  # model FLOPs utilisation to reckon with: 0.3 to 0.5 is usual
    keep: int = 2  # saved steps to keep
    simulate: bool = False  # run two steps with tensors that take no memory, and print what was counted

    def __post_init__(self):
        super().__post_init__()
        if self.gpu not in GPUS:
            raise ValueError(f"--gpu {self.gpu}: expected one of {', '.join(GPUS)}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu {self.mfu} must lie above 0 and at most at 1")
        for name in ("gpus", "tokens_per_step", "micro_tokens", "keep", "network"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must be positive")


def main(cfg: PlanConfig, config: ModelConfig | None = None) -> None:
    """Print what a training run would take. config: the shape, if it is not --preset's."""
    if config is None and cfg.preset in PRESETS:
        config = PRESETS[cfg.preset]
    config = config or checkpoint.read_config(checkpoint.model_folder(cfg.preset))
    vocabulary = cfg.vocab_size or config.vocab_size
    if vocabulary == FROM_TOKENIZER:
        raise ValueError(f"--preset {cfg.preset} takes its tokenizer's vocabulary; set --vocab_size")
    config = replace(config, vocab_size=vocabulary)
    row = cfg.row_tokens or config.max_position_embeddings
    if row > config.max_position_embeddings and config.switches.rope:
        raise ValueError(
            f"--row_tokens {row} exceeds the model's context of {config.max_position_embeddings}"
        )
    rows, micros = cut_step(cfg.tokens_per_step, row, cfg.gpus, cfg.micro_tokens)
    parallel = ParallelConfig(**{f.name: getattr(cfg, f.name) for f in dataclasses.fields(ParallelConfig)})
    job = Job(config=config, parallel=parallel, world=cfg.gpus, micro_rows=rows, row_tokens=row,
              accumulation=micros, optimizer=cfg.optimizer)  # fmt: skip
    simulated = None
    if cfg.simulate:  # a second micro-batch adds what the first leaves; more of them only repeat it
        short = replace(job, accumulation=min(2, micros))
        simulated = simulate(short)
        scale = _per_step(job, short)
        for name, times in scale.items():
            setattr(simulated, name, int(getattr(simulated, name) * times))
    print(report(job, cfg.gpu, cfg.tokens, cfg.mfu, cfg.keep, cfg.network, simulated))


def _per_step(job: Job, short: Job) -> dict[str, float]:
    more = job.accumulation / short.accumulation
    return {"gathered": more if job.parallel.shard == "zero3" else 1, "scattered": more}


if __name__ == "__main__":
    common.run(main, doc=__doc__)
