"""From a model on the meta device to one that trains on this process, or on all of torchrun's together.

    build(config, device="meta") -> parallelize -> load_into | init_weights -> optimizer -> fit

Every rank (process) works on its own rows of the batch; gradients are summed over ranks, not averaged: `fit`
divides once by the number of trained tokens of all ranks, so 1 process x 8 rows, 4 micro-batches x 2 and
2 ranks x 4 give one result. What a rank keeps of N parameters (fp32 weight, gradient, two moments) that are
cut over W ranks, in bytes:

    --shard none     16·N: everything (DDP); gradients are all-reduced
    --shard zero2    16·N/W, and all weights from forward to backward: blocks in bf16, the rest in fp32
    --shard zero3    16·N/W, and the head and two blocks at a time; blocks are gathered twice a micro-batch
    --shard zero3 --replicas 128    on 1,024 GPUs: HSDP, 128 copies of a model cut over 8 neighbours each

    torchrun --nproc_per_node 8 train.py --preset xverse-13b --shard zero3 --activation_checkpointing …

The order matters: activation checkpointing wraps a block's forward, the wrapped forward is compiled, and
DDP or FSDP2 hook the module around it. Nothing is allocated before it is cut, so that no rank ever holds a
large model. Precision is the same in every mode: blocks are gathered in the dtype that they compute in, while
embedding and head travel in fp32, because their gradients add up many tokens.

Li et al. 2020 (DDP); Rajbhandari et al. 2020, "ZeRO"; Zhao et al. 2023, "PyTorch FSDP"; Chen et al. 2016,
"Training Deep Nets with Sublinear Memory Cost" (activation checkpointing).
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from checkpoint import materialize
from common import Process, best_dtype
from model import Model


@dataclass(kw_only=True)
class ParallelConfig:
    """How a model is spread over processes, and what is computed twice instead of kept."""

    shard: Literal["none", "zero2", "zero3"] = "none"  # cut weights, gradients, moments over ranks (FSDP2)
    replicas: int = 1  # HSDP: copies of the sharded model; each is cut over ranks / replicas neighbours
    offload: bool = False  # keep cut weights, gradients, moments in main memory; the CPU updates: slow
    activation_checkpointing: bool = False  # keep a block's input only, compute the rest of it again
    compile: bool = False  # let Inductor fuse each block (on a CPU it needs a C++ compiler)
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # to compute in; auto: bf16 where it is fast

    def __post_init__(self):
        if self.replicas < 1:
            raise ValueError(f"--replicas {self.replicas} must be at least 1")
        if self.shard == "none" and (self.offload or self.replicas > 1):
            raise ValueError("--offload and --replicas need --shard zero2 or zero3")


def make_mesh(process: Process, cfg: ParallelConfig) -> DeviceMesh:
    """Arrange all ranks as (ranks,), or as (copies, ranks of a copy): neighbours share a copy.

    ValueError: the ranks cannot be divided so, or there is no process group.
    """
    if not dist.is_initialized():
        raise ValueError(f"--shard {cfg.shard}: start it with torchrun, for one process too")
    if process.world % cfg.replicas:
        raise ValueError(f"--replicas {cfg.replicas}: {process.world} ranks are no multiple of it")
    kind = process.device.split(":")[0]
    if cfg.replicas == 1:
        return init_device_mesh(kind, (process.world,), mesh_dim_names=("shard",))
    shape = (cfg.replicas, process.world // cfg.replicas)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(
    model: Model, process: Process, cfg: ParallelConfig, mesh: DeviceMesh | None = None
) -> nn.Module:
    """Allocate a meta model on this process's device and join the ranks; its values are still undefined.

    Sets model.compute_dtype. A base with adapters, or a model without a trained parameter, is kept in that
    dtype: it is only computed with, so nothing comes out differently, and it takes half of fp32's memory.
    A single process without a process group has nothing to shard with, and does not. mesh: of `make_mesh`,
    if it must be made elsewhere (a simulation).
    """
    model.compute_dtype = best_dtype(process.device) if cfg.dtype == "auto" else getattr(torch, cfg.dtype)
    trains = any(p.requires_grad for p in model.parameters())
    if getattr(model, "adapters", None) or not trains:
        for p in model.parameters():
            if not p.requires_grad and p.dtype == torch.float32:  # not what is quantised
                p.data = p.data.to(model.compute_dtype)
    for layer in model.layers:
        if cfg.activation_checkpointing:
            layer.forward = _checkpointed(layer.forward)
        if cfg.compile:
            layer.compile()  # per block: one compilation serves all layers, and parameters keep their names
    alone = process.world == 1 and not dist.is_initialized()
    if cfg.shard != "none" and (cfg.offload or not alone):
        _shard(model, mesh or make_mesh(process, cfg), cfg, pin=process.device != "cpu")
        materialize(model, "cpu" if cfg.offload else process.device)
        return model
    materialize(model, process.device)
    if process.world == 1 or not trains:  # DDP would refuse a model without gradients
        return model
    wrapped = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _sum_gradients)
    # DDP sorts its buckets anew after its first step, and a sum over three or more ranks depends on where in
    # a bucket a number stands. Two backward passes over one token settle them before a run begins or goes on.
    token = torch.zeros(1, 1, dtype=torch.long, device=process.device)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            wrapped(token).sum().backward()
    wrapped.zero_grad()
    return wrapped


def _checkpointed(forward):
    def forward_again(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)  # dropout draws the same numbers again

    return forward_again


def _shard(model: Model, mesh: DeviceMesh, cfg: ParallelConfig, pin: bool) -> None:
    """Cut every parameter along dimension 0: a group for each block, one for the embedding, one for the head.

    A group is what is gathered together, before its forward and (zero3) its backward pass.
    """
    # not at the top: it takes a second
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    common: dict = {"mesh": mesh}
    if cfg.offload:
        common["offload_policy"] = CPUOffloadPolicy(pin_memory=pin)
    zero3 = cfg.shard == "zero3"
    # inputs are not cast: the positions' cos and sin, which a block is given, must stay fp32
    narrow = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mp_policy=narrow, reshard_after_forward=zero3, **common)
    if not model.config.tie_word_embeddings or model.config.head != "lm":
        fully_shard(model.embed_tokens, mp_policy=wide, reshard_after_forward=zero3, **common)
        model.embed_tokens.set_unshard_in_backward(False)  # its gradient does not depend on the table
        head = [m for name, m in model.named_children() if name in ("lm_head", "score")]
        # its backward pass follows at once, so it stays
        fully_shard([model.norm, *head], mp_policy=wide, reshard_after_forward=False, **common)
    # the rest; a tied table, which both ends of the model use
    fully_shard(model, mp_policy=wide, reshard_after_forward=False, **common)
    # FSDP2 warns of outputs that are views, which writing in place would break; nothing here does that
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for module in _groups(model):
        module.set_gradient_divide_factor(1.0)  # sums; this alone asks for PREMUL_SUM, not in gloo
        module.set_force_sum_reduction_for_comms(True)


def _groups(model: nn.Module) -> list:
    """List the modules that fully_shard has made FSDPModules."""
    return [module for module in model.modules() if hasattr(module, "set_gradient_divide_factor")]


def _sum_gradients(_, bucket):  # no annotations: DDP checks them as types, and here they would be strings
    """Replace DDP's average by a sum; dividing by W and multiplying again would not be exact for every W."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def unwrap(model: nn.Module) -> Model:
    """Give the bare model inside a wrapper, for reading its config and for saving."""
    return getattr(model, "module", model)


def gradient_sync(model: nn.Module, cfg: ParallelConfig, last: bool):
    """Context for one micro-batch, `last` of its step or not.

    DDP sends gradients in the last one only. FSDP2 sends them in each: a rank has room for its part of them
    only; copies of the model sum these parts in the last. zero2 keeps the weights gathered between
    micro-batches.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if hasattr(model, "set_requires_all_reduce"):  # the root of FSDP2's modules
        model.set_requires_all_reduce(last)
        if cfg.shard == "zero2":
            model.set_reshard_after_backward(last)
    return contextlib.nullcontext()


def reshard(model: nn.Module) -> None:
    """Let go of gathered weights. After a forward pass without a backward pass some stay gathered (FSDP2)."""
    for module in _groups(model):
        module.reshard()
