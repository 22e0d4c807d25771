"""The kernels of rope.py and glu.py against their twins; then these and the norms as torch's own tools see them."""

import os

import interp_shim
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import launch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint
from triton_cases import DTYPES, check, name, pairwise, randn, run, twins

import kernels

FP32, BF16 = torch.float32, torch.bfloat16


# --- rope ------------------------------------------------------------------------------------------------------


def table(T, R, rows=1, offset=0):
    """cos and sin of T positions from the offset on; each further row starts 1,000 later."""
    positions = torch.stack([torch.arange(T) + offset + 1000 * b for b in range(rows)])
    return kernels.rope_table(positions, 10000.0 ** -(torch.arange(0, R, 2) / R))


def heads(B, H, T, D, dtype, layout):
    """x (B, H, T, D) as a projection leaves it, or otherwise."""
    if layout == "projected":
        x = randn(B, T, H, D, dtype=dtype, grad=False).transpose(1, 2)
    elif layout == "one of three":  # BLOOM's and Phi's fused projections
        x = randn(B, T, H, 3, D, dtype=dtype, grad=False)[..., 1, :].transpose(1, 2)
    elif layout == "turned":  # neighbouring dimensions lie apart
        x = randn(B, D, H, T, dtype=dtype, grad=False).permute(0, 2, 3, 1)
    else:
        x = randn(B, H, T, D, dtype=dtype, grad=False)
    return x.detach().requires_grad_()


ROPES = pairwise(
    dims=[(16, 16), (80, 32), (16, 6), (128, 128)],
    H=[1, 2, 5],
    T=[1, 3],
    dtype=DTYPES,
    layout=["projected", "contiguous", "one of three", "turned"],
    rows=[1, 2],
    offset=[0, 8000],
    K=[0, 1, 3],
)


@pytest.mark.parametrize("case", ROPES, ids=map(name, ROPES))
def test_rope_equals_its_twin(case):
    (D, R), T = case["dims"], case["T"]
    q = heads(2, case["H"], T, D, case["dtype"], case["layout"])
    angles = table(T, R, case["rows"], case["offset"])
    if case["K"]:
        k = heads(2, case["K"], T, D, case["dtype"], "projected")
        check(kernels.rope_pair, (q, k, *angles), case["dtype"])
    else:
        check(kernels.rope, (q, *angles), case["dtype"])


def test_rope_back_undoes_rope():
    q, k, angles = heads(1, 2, 3, 20, FP32, "projected"), heads(1, 1, 3, 20, FP32, "projected"), table(3, 6)
    back = torch.ops.baizhi.rope(*kernels.rope_pair(q, k, *angles), *angles, True)
    assert all((b - x).abs().max() < 1e-6 for b, x in zip(back, (q, k)))


def test_rope_of_a_pair_is_one_launch_and_a_key_nobody_uses_has_no_gradient():
    q, k, angles = heads(1, 2, 3, 16, FP32, "projected"), heads(1, 1, 3, 16, FP32, "projected"), table(3, 6)
    before = interp_shim.launches
    turned = kernels.rope_pair(q, k, *angles)
    assert interp_shim.launches == before + 1
    turned[0].sum().backward()
    assert q.grad.abs().min() > 0 and not k.grad.any()


def test_rope_keeps_the_layout():
    x = heads(2, 3, 4, 16, BF16, "projected")
    assert kernels.rope(x, *table(4, 16)).stride() == x.stride()


def test_rope_of_nothing():
    check(kernels.rope, (heads(1, 2, 0, 16, FP32, "projected"), *table(0, 16)), FP32)


# --- glu -------------------------------------------------------------------------------------------------------


def swiglu(gate, up):
    return kernels.glu(gate, up, "silu")


def geglu(gate, up):
    return kernels.glu(gate, up, "gelu")


def geglu_tanh(gate, up):
    return kernels.glu(gate, up, "gelu_tanh")


GLUS = pairwise(
    glu=[swiglu, geglu, geglu_tanh],
    shape=[(3,), (2, 2), (0,)],
    F=[1, 64, 100, 130],
    dtype=DTYPES,
    scale=[1.0, 20.0],
    layout=["halves", "apart", "turned"],
)


@pytest.mark.parametrize("case", GLUS, ids=[name({**c, "glu": c["glu"].__name__}) for c in GLUS])
def test_glu_equals_its_twin(case):
    F, dtype = case["F"], case["dtype"]
    gate, up = randn(*case["shape"], 2 * F, scale=case["scale"], dtype=dtype, grad=False).chunk(2, -1)
    if case["layout"] == "apart":
        gate, up = gate.contiguous(), up.contiguous()
    elif case["layout"] == "turned":
        gate = gate.transpose(0, -1).contiguous().transpose(0, -1)
    check(case["glu"], (gate.detach().requires_grad_(), up.detach().requires_grad_()), dtype)


@pytest.mark.parametrize("glu", [swiglu, geglu, geglu_tanh])
@pytest.mark.parametrize("dtype", DTYPES)
def test_glu_far_out(glu, dtype):
    """The gate is open, or shut: exactly, as in plain torch, and no gradient is NaN."""
    gate = torch.tensor([-1e4, -100.0, -50.0, 0.0, 50.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    up = torch.full_like(gate, 0.5).requires_grad_()
    check(glu, (gate, up), dtype)


# --- as operators of torch -----------------------------------------------------------------------------------------


class Layer(nn.Module):
    """All of it: (B, T, 16) -> (B, T, 16)."""

    def __init__(self):
        super().__init__()
        self.qk, self.mlp, self.out = nn.Linear(16, 16), nn.Linear(16, 48), nn.Linear(24, 16)
        self.norm, self.after, self.bias = (nn.Parameter(randn(16, seed=s, grad=False)) for s in (7, 8, 9))

    def forward(self, x, cos, sin):
        q = self.qk(kernels.rms_norm(x, self.norm, 1e-5))
        q = kernels.rope(q.unflatten(-1, (2, 8)).transpose(1, 2), cos, sin).transpose(1, 2).flatten(2)
        y, h = kernels.layer_norm(q, self.after, self.bias, 1e-5, x)
        gate, up = self.mlp(y).chunk(2, -1)
        return h + self.out(kernels.glu(gate, up))


def layer():
    torch.manual_seed(0)
    return Layer()


def gradients(model, call):
    """The output and all gradients of one step."""
    x = randn(2, 3, 16)
    y = call(x, *table(3, 4))
    y.square().sum().backward()
    got = [y.detach(), x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return got


def equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b), (a - b).abs().max()


def test_operators_tell_torch_the_truth():
    x, angles = heads(1, 2, 3, 16, FP32, "projected"), table(3, 6)
    torch.library.opcheck(torch.ops.baizhi.rope.default, (x, None, *angles, False))
    torch.library.opcheck(torch.ops.baizhi.rope.default, (x, x[:, :1], *angles, True))
    gate, up = randn(3, 20), randn(3, 20, seed=1)
    torch.library.opcheck(torch.ops.baizhi.glu.default, (gate, up, "gelu"))
    dy = randn(3, 20, seed=2, grad=False)
    torch.library.opcheck(torch.ops.baizhi.glu_backward.default, (dy, gate.detach(), up.detach(), "silu"))


def test_a_layer_equals_its_twin():
    model = layer()
    x, angles = randn(2, 3, 16), table(3, 4)
    got = run(model, (x, *angles))
    with twins():
        want = run(model, (x, *angles))
    for a, b in zip(sum(got, []), sum(want, [])):
        assert (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    model, graphs = layer(), []

    def backend(graph, examples):
        graphs.append(graph.code)
        return aot_eager(graph, examples)

    want = gradients(model, model)
    equal(gradients(model, torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)), want)
    assert len(graphs) == 1 and graphs[0].count("ops.baizhi.") == 4


def test_checkpointed():
    model = layer()
    want = gradients(model, model)
    equal(gradients(model, lambda *a: checkpoint(model, *a, use_reentrant=False)), want)


def sharded():
    """Runs in two processes: a sharded layer gives the gradients of a whole one."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    want = gradients(whole := layer(), whole)
    model = fully_shard(layer(), reshard_after_forward=True)
    y, dx, *got = gradients(model, model)
    equal([y, dx], want[:2])
    for a, b in zip(got, want[2:], strict=True):  # both ranks have the same batch: their mean is it
        assert torch.allclose(a.full_tensor(), b, rtol=1e-6, atol=1e-6)
    dist.destroy_process_group()


def test_sharded_over_two_processes():
    assert os.environ["KERNELS"] != "torch"
    launch(sharded, world=2)
