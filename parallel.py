"""From a model on the meta device to one that trains on this process, or on all of torchrun's together.

    build(config, device="meta") -> parallelize -> load_into | init_weights -> optimizer -> fit

The order matters: DDP (DistributedDataParallel) looks at the parameters when it wraps, so their memory must
be there; blocks are compiled before, so that parameters keep their names. Under DDP every process ("rank")
holds the whole model and works on its own rows of the batch. Gradients are summed over ranks, not averaged:
`fit` divides the sum by the number of trained tokens of all ranks, so 1 process x 8 rows, 4 micro-batches x 2
and 2 ranks x 4 give one result.

Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import contextlib

import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from checkpoint import materialize
from common import Process
from model import Model


def parallelize(model: Model, process: Process, compile: bool = False) -> nn.Module:
    """Allocate a meta model on this process's device and join the ranks; its values are still undefined.

    compile: let Inductor fuse each block (needs a C++ compiler on a CPU).
    """
    materialize(model, process.device)
    if compile:
        for layer in model.layers:
            layer.compile()  # per block: one compilation serves all layers, and parameters keep their names
    if process.world == 1:
        return model
    wrapped = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _sum_gradients)
    return wrapped


def _sum_gradients(_, bucket):  # no annotations: DDP checks them as types, and here they would be strings
    """Replace DDP's average by a sum; dividing by W and multiplying again would not be exact for every W."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def unwrap(model: nn.Module) -> Model:
    """Give the bare model inside a wrapper, for reading its config and for saving."""
    return getattr(model, "module", model)


def gradient_sync(model: nn.Module, last: bool):
    """Context for one micro-batch: gradients travel between ranks only in the `last` one of a step."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()
