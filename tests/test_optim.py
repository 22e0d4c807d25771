"""Muon is torch.optim.Muon, with the same bits on every number of ranks; schedules and clipping are as published."""

import copy
import itertools
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from conftest import launch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

import common
from model import ModelConfig, build
from optim import Muon, OptimConfig, clip_and_scale, learning_rate, make_optimizer, newton_schulz

pytestmark = pytest.mark.usefixtures("one_thread")

MUON = OptimConfig(optimizer="muon", lr=0.02, weight_decay=0.1)


# --- schedule ------------------------------------------------------------------------------------------------


def rates(cfg, steps, at):
    return [learning_rate(step, steps, cfg) for step in at]


def test_xuanyuans_cosine_has_the_golden_values():
    cfg = OptimConfig(lr=5e-4, final_lr=1e-6 / 5e-4, warmup=50)  # lr 5e-4, min_lr 1e-6, warmup_steps 50
    # 0, 49, 50: a fiftieth, all, all; 525 is the middle of 50 … 1000; the end
    expected = [1e-5, 5e-4, 5e-4, (5e-4 + 1e-6) / 2, 1e-6]
    assert rates(cfg, 1001, [0, 49, 50, 525, 1000]) == pytest.approx(expected, rel=1e-12)
    quarter = 1e-6 + (5e-4 - 1e-6) * (1 + math.sqrt(0.5)) / 2  # cos(π / 4) = √½
    assert learning_rate(50 + 250, 1051, cfg) == pytest.approx(quarter, rel=1e-12)


def test_linear_schedule_has_the_golden_values():
    cfg = OptimConfig(lr=5e-4, final_lr=0.002, warmup=50, schedule="linear")
    expected = [1e-5, 5e-4, 5e-4, 0.75 * 5e-4 + 0.25e-6, (5e-4 + 1e-6) / 2, 1e-6]
    assert rates(cfg, 1051, [0, 49, 50, 300, 550, 1050]) == pytest.approx(expected, rel=1e-12)


def test_wsd_stays_at_the_top_and_falls_at_the_end():
    cfg = OptimConfig(lr=1.0, final_lr=0.0, warmup=10, schedule="wsd", decay=0.2)
    at = rates(cfg, 100, [0, 9, 10, 79, 80, 89, 99])
    assert at == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.95, 0.5, 0.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_every_learning_rate_lies_between_the_last_and_the_highest_whatever_the_number_of_steps(schedule):
    cfg = OptimConfig(lr=1.0, final_lr=0.1, warmup=100, schedule=schedule)
    for steps in (1, 2, 9, 10, 11, 30):
        all_ = rates(cfg, steps, range(steps))
        top = all_.index(max(all_))
        assert max(all_) == 1.0 and all_[top:] == sorted(all_[top:], reverse=True)
        assert steps == 1 or all_[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "bad, words",
    [
        ({"lr": -1}, "--lr -1 must not be negative"),
        ({"clip": math.nan}, "--clip nan must not be negative"),
        ({"beta2": 1.0}, r"--beta2 1.0 must lie in \[0, 1\)"),
        ({"muon_momentum": -0.1}, r"--muon_momentum -0.1 must lie in \[0, 1\)"),
        ({"schedule": "step"}, "--schedule step: expected one of cosine, wsd, linear"),
        ({"optimizer": "lion"}, "--optimizer lion: expected one of adamw, muon"),
    ],
)
def test_impossible_settings_are_refused_also_in_a_class_that_inherits(bad, words):
    @dataclass
    class More(OptimConfig):
        out: str
        seed: int = 1

        def __post_init__(self):
            super().__post_init__()
            if self.seed < 0:
                raise ValueError("seed")

    assert More("folder", 3, lr=0.5).seed == 3
    for cls, given in ((OptimConfig, ()), (More, ("folder",))):
        with pytest.raises(ValueError, match=words):
            cls(*given, **bad)


# --- gradients -----------------------------------------------------------------------------------------------


def with_grads(*values):
    params = [nn.Parameter(torch.zeros(len(v))) for v in values]
    for p, v in zip(params, values):
        p.grad = torch.tensor(v)
    return params


def test_clipping_has_the_golden_values():
    params = with_grads([30.0, 0.0], [0.0, -40.0])  # sums over 10 tokens: means 3 and -4, norm 5
    assert clip_and_scale(params, 10, clip=1.0) == pytest.approx(5.0)
    assert params[0].grad.tolist() == pytest.approx([0.6, 0.0])
    assert params[1].grad.tolist() == pytest.approx([0.0, -0.8])


@pytest.mark.parametrize("clip", [0.0, 6.0])
def test_gradients_that_need_no_clipping_are_divided_by_the_count_and_nothing_else(clip):
    params = with_grads([3.3, 0.1, 7.7], [-4.1])
    before = [p.grad.clone() for p in params]
    clip_and_scale(params, 3, clip)
    for p, grad in zip(params, before):
        assert torch.equal(p.grad, grad * (1 / 3))


def test_parameters_without_a_gradient_are_passed_over():
    frozen = nn.Parameter(torch.ones(2))
    assert clip_and_scale([frozen, *with_grads([4.0])], 2, 0.0) == 2.0
    assert clip_and_scale([frozen], 1, 1.0) == 0.0 and frozen.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    params = with_grads([1.0, bad], [2.0])
    assert not math.isfinite(clip_and_scale(params, 2, 1.0))
    assert params[0].grad[0] == 1.0 and params[1].grad[0] == 2.0


# --- which parameter goes where ------------------------------------------------------------------------------


def tiny(family="llama", **more):
    shape = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 128, "max_position_embeddings": 16}
    if family == "bloom":
        shape |= {"tie_word_embeddings": True}
    model = build(ModelConfig(family, **{**shape, **more}))
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    return model


def names(model, params):
    found = {p: name for name, p in model.named_parameters()}
    return sorted(found[p] for p in params)


def test_adamw_decays_matrices_and_embeddings_and_neither_norms_nor_biases():
    model = tiny("phi")
    optimizer = make_optimizer(model, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.7))
    assert type(optimizer) is torch.optim.AdamW
    decaying, rest = optimizer.param_groups
    assert decaying["weight_decay"] == 0.3 and rest["weight_decay"] == 0.0
    assert decaying["betas"] == rest["betas"] == (0.8, 0.7) and decaying["fused"]
    ending = ("_proj.weight", "fc1.weight", "fc2.weight", "embed_tokens.weight", "lm_head.weight")
    assert all(name.endswith(ending) for name in names(model, decaying["params"]))
    assert all(name.endswith(("bias", "norm.weight")) for name in names(model, rest["params"]))
    assert len(decaying["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "family, more, rest",
    [
        ("llama", {}, ["embed_tokens.weight", "lm_head.weight"]),
        ("llama", {"tie_word_embeddings": True}, ["embed_tokens.weight"]),
        ("phi", {}, ["embed_tokens.weight", "lm_head.weight"]),
        ("bloom", {}, ["embed_tokens.weight"]),
        ("llama", {"head": "score"}, ["embed_tokens.weight", "score.weight"]),
    ],
)
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(family, more, rest):
    model = tiny(family, **more)
    optimizer = make_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.3, muon_momentum=0.9))
    muon, decaying, others = optimizer.param_groups
    assert names(model, decaying["params"]) == rest
    assert all(p.dim() == 1 for p in others["params"])
    assert names(model, muon["params"]) == sorted(
        name for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2
    )
    assert (muon["muon"], muon["momentum"], muon["weight_decay"]) == (True, 0.9, 0.3)
    assert decaying["fused"] and others["fused"]  # state.py asks, to know where `step` lives
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {name: sorted(optimizer.state[p]) for name, p in model.named_parameters()}
    for name, keys in state.items():
        muons = name in names(model, muon["params"])
        assert keys == (["momentum_buffer"] if muons else ["exp_avg", "exp_avg_sq", "step"]), name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_names_with_the_prefixes_of_wrappers_sort_alike_and_frozen_parameters_are_left_out(kind):
    model = tiny()
    for name, p in model.named_parameters():
        p.requires_grad_("mlp" in name or "embed" in name)
    wrapped = nn.Module()
    wrapped.module = model  # as under DDP
    for m in (model, wrapped):
        groups = make_optimizer(m, OptimConfig(optimizer=kind)).param_groups
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p for g in groups for p in g["params"]} == set(trained)
        if kind == "muon":
            assert names(model, groups[1]["params"]) == ["embed_tokens.weight"]


# --- Muon beside torch.optim.Muon ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 96), (37, 13), (1, 8), (8, 1)], ids=str)
def test_muon_has_the_bits_of_torchs(shape):
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(shape))
    theirs = nn.Parameter(ours.detach().clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    one = Muon([ours], [], **settings)
    other = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for group in (*one.param_groups, *other.param_groups):  # as `fit` does
            group["lr"] = 0.02 / (1 + step)
        one.step()
        other.step()
    assert torch.equal(ours, theirs)
    assert torch.equal(one.state[ours]["momentum_buffer"], other.state[theirs]["momentum_buffer"])


def test_the_rest_has_the_bits_of_torchs_adamw():
    torch.manual_seed(0)
    model = tiny("phi")
    other = copy.deepcopy(model)
    one = make_optimizer(model, OptimConfig(optimizer="muon", lr=0.01))
    two = make_optimizer(other, OptimConfig(lr=0.01))
    for _ in range(3):
        for p, q in zip(model.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        two.step()
    twins = dict(other.named_parameters())
    for name, p in model.named_parameters():
        muons = "momentum_buffer" in one.state[p]
        assert torch.equal(p, twins[name]) is not muons, name
        if not muons:
            for key, value in two.state[twins[name]].items():
                assert torch.equal(one.state[p][key], value), (name, key)


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (16, 512)], ids=str)
def test_newton_schulz_brings_singular_values_near_one_and_keeps_the_directions(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    made = newton_schulz(x.bfloat16()).float()
    s = torch.linalg.svdvals(made)
    assert made.shape == x.shape and s.min() > 0.65 and s.max() < 1.25
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inside = u.T @ made @ vh.T  # diagonal, if the directions are those of x
    assert (inside - inside.diag().diag()).abs().max() < 0.05


def test_a_zero_gradient_moves_nothing_but_the_decay():
    p = nn.Parameter(torch.ones(4, 6))
    p.grad = torch.zeros(4, 6)
    Muon([p], [], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(p, torch.full((4, 6), 1 - 0.5 * 0.1))


def test_the_size_of_muons_update_is_that_of_adamws():
    torch.manual_seed(0)
    for shape in [(64, 256), (256, 64), (16, 512)]:
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        Muon([p], [], lr=1.0).step()
        # min(n, m) singular values s spread over n·m entries, times 0.2·√max(n, m): 0.2·s; AdamW's: 0.2 to 0.4
        assert 0.2 * 0.65 < p.square().mean().sqrt() < 0.2 * 1.25


# --- several ranks -------------------------------------------------------------------------------------------

SHAPES = [(37, 16), (16, 37), (32, 32), (3, 16), (13, 7), (37, 16), (64, 24), (1, 9), (48, 16)]


class Net(nn.Module):
    """The names and kinds of parameters of a model, and shapes that ranks cannot share evenly.

    What AdamW gets comes in multiples of 16 elements a rank: the last, odd ones of a piece go through another
    loop of its kernel, which rounds otherwise.
    """

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=rows == 64) for rows, columns in SHAPES)
        self.norm = nn.LayerNorm(64)
        self.score = nn.Linear(16, 1, bias=False)
        for name, p in self.named_parameters():
            p.data.copy_(drawn(name, p.shape, -1))


def drawn(name, shape, step):
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(shape, generator=generator)


def laid(full, p):
    """Lay a tensor out over the ranks as a parameter is."""
    if not isinstance(p, DTensor):
        return full
    return distribute_tensor(full, p.device_mesh, p.placements, src_data_rank=None)


def train(net, optimizer, steps):
    for step in steps:
        for name, p in net.named_parameters():
            p.grad = laid(drawn(name, p.shape, step), p)
        clip_and_scale(net.parameters(), 3.0, 0.0)
        optimizer.step()


def everything(net, optimizer):
    out = {}
    for name, p in net.named_parameters():
        for key, value in {"parameter": p.detach(), **optimizer.state[p]}.items():
            out[f"{key}/{name}"] = value.full_tensor() if isinstance(value, DTensor) else value
    return {key: value.contiguous() for key, value in out.items()}


def differing(found, expected):
    assert found.keys() == expected.keys()
    return [key for key in found if not torch.equal(found[key], expected[key])]


def sharded(net, *mesh, only=None, **options):
    """Shard a net over a mesh of these sizes as parallel.py would; `only`: the first so many layers."""
    mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "rows")[-len(mesh) :])
    for layer in net.layers[:only]:
        fully_shard(layer, mesh=mesh, **options)
    return net if only else fully_shard(net, mesh=mesh, **options)


def ranks(folder):
    """Run in each of several processes; what differs from one process is written down for the test to judge."""
    folder = Path(folder)
    process = common.start_process("cpu")
    W, rank, out = process.world, process.rank, {}
    expected = {n: load_file(folder / f"one-{n}.safetensors") for n in (3, 5)}
    offload = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    layouts = {
        "every rank whole, dealt": (lambda: Net(), dist.group.WORLD),
        "sharded": (lambda: sharded(Net(), W), dist.group.WORLD),
        "copies of shards": (lambda: sharded(Net(), 2, W // 2), None),
    }
    if W == 2:  # what does not depend on how many there are
        layouts |= {
            "every rank whole": (lambda: Net(), None),
            "some sharded, some whole": (lambda: sharded(Net(), W, only=4), dist.group.WORLD),
            "offloaded": (lambda: sharded(Net(), W, **offload), None),
        }
    for name, (make, group) in layouts.items():
        net = make()
        optimizer = make_optimizer(net, MUON, group)
        train(net, optimizer, range(3))
        wrong = differing(everything(net, optimizer), expected[3])

        # a loader puts weights and state into a new net before its first step
        again = make()
        resumed = make_optimizer(again, MUON, group)
        for p, q in zip(net.parameters(), again.parameters()):
            q.data.copy_(p.data)
            resumed.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
        train(again, resumed, range(3, 5))
        wrong += differing(everything(again, resumed), expected[5])

        # clipping: the norm of all, on all ranks; a number that is not finite on the last row of one tensor
        for key, p in again.named_parameters():
            p.grad = laid(drawn(key, p.shape, 9), p)
        norm = clip_and_scale(again.parameters(), 4.0, 0.5)
        after = clip_and_scale(again.parameters(), 1.0, 0.0)
        before = {key: p.grad.clone() for key, p in again.named_parameters()}
        bad = again.embed_tokens.weight
        bad.grad = laid(torch.full(bad.shape, math.nan), bad)
        refused = clip_and_scale(again.parameters(), 4.0, 0.5)
        touched = [k for k, p in again.named_parameters() if p is not bad and not same(p.grad, before[k])]
        out[name] = {"wrong": wrong, "norm": norm, "after": after, "nan": math.isnan(refused)}
        out[name] |= {"touched": touched, "dtensors": sum(isinstance(p, DTensor) for p in net.parameters())}
    (folder / f"out-{rank}.json").write_text(json.dumps(out))
    common.finish_process()


def same(a, b):
    return torch.equal(*(x.to_local() if isinstance(x, DTensor) else x for x in (a, b)))


@pytest.fixture(scope="module", params=[2, 4], ids=["two ranks", "four ranks"])
def said(request, tmp_path_factory):
    """Give what each rank found, {layout: {...}} per rank; one process, of one thread, has set the standard."""
    folder, threads = tmp_path_factory.mktemp("ranks"), torch.get_num_threads()
    torch.set_num_threads(1)
    net = Net()
    optimizer = make_optimizer(net, MUON)
    for steps in (range(3), range(3, 5)):
        train(net, optimizer, steps)
        save_file(everything(net, optimizer), folder / f"one-{steps.stop}.safetensors")
    torch.set_num_threads(threads)
    launch(ranks, folder, world=request.param)
    return [json.loads((folder / f"out-{rank}.json").read_text()) for rank in range(request.param)]


def test_every_layout_over_ranks_has_the_bits_of_one_process_also_after_a_resume(said):
    for found in said:
        assert {name: f["wrong"] for name, f in found.items()} == {name: [] for name in found}
    whole, some = 5 + len(SHAPES), 4
    expected = [0, whole, whole, 0, some, whole]
    assert [f["dtensors"] for f in said[0].values()] == expected[: len(said[0])]


def test_the_norm_is_that_of_all_rows_on_all_ranks(said):
    grads = [drawn(name, p.shape, 9).double() for name, p in Net().named_parameters()]
    norm = math.sqrt(sum(g.square().sum().item() for g in grads)) / 4
    for name, found in itertools.chain(*(s.items() for s in said)):
        assert found["norm"] == pytest.approx(norm, rel=1e-6), name
        assert found["after"] == pytest.approx(0.5, rel=1e-5), name
        assert found["norm"] == said[0][name]["norm"]


def test_not_a_number_on_some_rank_leaves_the_gradients_of_all_ranks_alone(said):
    for found in said:
        assert all(f["nan"] and f["touched"] == [] for f in found.values())


@pytest.fixture
def eight_ranks_in_name():
    """Join a group of 8 ranks of which only this one exists: collectives return, and bring nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    dist.destroy_process_group()


def flops(params, group=None):
    optimizer = Muon(params, [], 0.1, group=group)
    for p in params:
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("fake", [False, True], ids=["real tensors", "fake tensors"])
def test_eight_ranks_share_the_work_of_orthogonalising(fake, eight_ranks_in_name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    mesh, n, m = init_device_mesh("cpu", (8,)), 24, 40
    sharding = [Shard(0)]
    with FakeTensorMode() if fake else torch.enable_grad():
        plain = [nn.Parameter(torch.zeros(n, m)) for _ in range(16)]
        alone = flops(plain)
        assert alone == 16 * 5 * (4 * n * n * m + 2 * n**3)  # as the docstring says
        assert flops(plain, dist.group.WORLD) == alone / 8
        cut = [nn.Parameter(distribute_tensor(p.detach(), mesh, sharding)) for p in plain]
        assert flops(cut) == alone / 8


def test_a_matrix_cut_by_columns_is_refused(eight_ranks_in_name):
    mesh = init_device_mesh("cpu", (8,))
    p = nn.Parameter(distribute_tensor(torch.zeros(8, 8), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match="Muon needs matrices cut by rows"):
        Muon([p], [], 0.1)
