"""What a run will take: formulas beside the simulation, published runs, hand calculations."""

import dataclasses
import json

import pytest
import torch
from conftest import ROOT, run_script

import plan
from model import PRESETS, flops_per_token, num_params
from parallel import ParallelConfig

XVERSE = PRESETS["xverse-13b"]


def job(preset="xverse-13b", *, row=2048, rows=1, world=8, micros=1, optimizer="adamw", layers=0, **parallel):
    config = PRESETS[preset]
    config = dataclasses.replace(config, num_hidden_layers=layers or config.num_hidden_layers)
    return plan.Job(
        config=config,
        parallel=ParallelConfig(**parallel),
        world=world,
        micro_rows=rows,
        row_tokens=row,
        accumulation=micros,
        optimizer=optimizer,
    )


# --- 1. the formulas and the real code -----------------------------------------------------------------------

AC = {"activation_checkpointing": True}
CASES = {  # every number of layers adds alike, so most cases have four; two have all 40
    "13b zero3 2k, 40 layers": {"shard": "zero3", **AC},
    "13b hsdp 1024 ranks, 40 layers": {"shard": "zero3", "world": 1024, "replicas": 128, **AC},
    "13b zero3 8k": {"shard": "zero3", "row": 8192, "layers": 4, **AC},
    "13b zero3 8k, all kept": {"shard": "zero3", "row": 8192, "layers": 4},
    "13b zero2": {"shard": "zero2", "layers": 4, **AC},
    "13b zero2, two micro-batches": {"shard": "zero2", "layers": 4, "micros": 2},
    "hsdp, two micro-batches, muon": {
        "preset": "llama-2-13b",
        "shard": "zero3",
        "layers": 12,
        "world": 1024,
        "replicas": 128,
        "micros": 2,
        "optimizer": "muon",
        **AC,
    },
    "phi": {"preset": "phi-2", "shard": "zero3", "layers": 6, "rows": 4},
    "phi, checkpointed": {"preset": "phi-2", "shard": "zero3", "layers": 6, "rows": 4, **AC},
    "phi ddp": {"preset": "phi-2", "layers": 4, "rows": 2},
    "bloom": {"preset": "bloomz-7b1", "shard": "zero3", "layers": 4, "rows": 8},
    "bloom, checkpointed": {"preset": "bloomz-7b1", "shard": "zero2", "layers": 4, "rows": 2, **AC},
    "grouped heads": {
        "preset": "xuanyuan-70b",
        "shard": "zero3",
        "layers": 3,
        "row": 4096,
        "world": 32,
        **AC,
    },
    "fp32": {"preset": "xuanyuan-6b", "shard": "zero3", "layers": 3, "dtype": "float32"},
}


@pytest.fixture(scope="module")
def simulations():
    """Simulate all cases in one child process: each has a process group of its own there."""
    code = "import json, test_plan as t, plan, dataclasses as d\n"
    code += "print(json.dumps({n: d.asdict(plan.simulate(t.job(**c))) for n, c in t.CASES.items()}))"
    done = run_script("-c", code, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS=1, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_peak_memory_is_within_5_percent_of_the_simulated_step(name, simulations):
    assert plan.estimate(job(**CASES[name])).peak == pytest.approx(simulations[name]["peak"], rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_communicated_bytes_are_those_of_the_simulated_step(name, simulations):
    e, seen = plan.estimate(job(**CASES[name])), simulations[name]
    assert (e.gathered, e.scattered) == (seen["gathered"], seen["scattered"])
    if CASES[name].get("shard"):  # DDP's all-reduce cannot be simulated
        assert e.reduced == seen["reduced"]


def test_the_simulation_leaves_the_kernels_as_they_were():
    import kernels
    from kernels.linear_nll import CHUNK_ELEMENTS

    before = kernels.attention, kernels.rms_norm, kernels.layer_norm, dict(CHUNK_ELEMENTS)
    tiny = dataclasses.replace(PRESETS["tiny"], vocab_size=64)
    plan.simulate(dataclasses.replace(job(row=32, world=1), config=tiny))
    assert before == (kernels.attention, kernels.rms_norm, kernels.layer_norm, dict(CHUNK_ELEMENTS))
    assert not torch.distributed.is_initialized()


def test_what_a_forward_pass_keeps_is_what_autograd_saves(one_thread):
    """The activations of one block, counted by autograd's own hooks on real tensors."""
    from model import build, init_weights

    for preset in ("xverse-13b", "phi-2", "bloomz-7b1"):
        small = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 32}
        small |= {"num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 256}
        config = dataclasses.replace(PRESETS[preset], **small)
        model = build(config)
        init_weights(model, 1)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def save(t, seen=seen, weights=weights):
            if t.untyped_storage().data_ptr() not in weights:
                seen[t.untyped_storage().data_ptr()] = t  # held, so that no address comes twice
            return t

        T = 600
        x = torch.randn(1, T, 64, requires_grad=True)
        at = model.positions(1, T, "cpu")
        tables = {t.untyped_storage().data_ptr() for t in (at.cos, at.sin) if t is not None}
        with plan._as_on_a_gpu(), torch.autograd.graph.saved_tensors_hooks(save, lambda t: t):
            model.layers[0](x, at)
        kept = sum(t.untyped_storage().nbytes() for p, t in seen.items() if p not in tables)
        assert plan.block_bytes(config, 4)[0] * T == pytest.approx(kept, rel=0.02), preset


# --- 2. hand calculations ------------------------------------------------------------------------------------


def test_parameters_gradients_and_moments_are_16_bytes_a_parameter_over_the_ranks():
    whole, n = plan.shares(job()), num_params(XVERSE)
    assert (whole.parameters, whole.gradients, whole.optimizer) == (4 * n, 4 * n, 8 * n)
    # 8 ranks: 100,278 rows of embedding and head are filled up to 100,280
    cut = plan.shares(job(shard="zero3"))
    assert cut.total == 16 * (n + 2 * 2 * 5120) / 8
    # Muon: one moment for the 40 x (4·5120² + 3·5120·13824) weights of the blocks
    muon = plan.shares(job(optimizer="muon"))
    assert whole.optimizer - muon.optimizer == 4 * 40 * (4 * 5120**2 + 3 * 5120 * 13824)


def test_offload_leaves_no_shares_on_the_gpu():
    e = plan.estimate(job(shard="zero3", offload=True, **AC))
    assert e.memory.parameters == e.memory.optimizer == e.memory.gradients == 0
    assert e.host == plan.shares(job(shard="zero3")).total


def test_disk_is_12_bytes_a_parameter_of_state_and_2_of_model():
    e = plan.estimate(job(shard="zero3"))
    assert (e.state, e.model) == (12 * 13_715_031_040, 2 * 13_715_031_040)
    assert "576 GB" in plan.report(job(shard="zero3"), keep=2)  # 3 x 192.01


def test_ddp_sends_each_gradient_once_a_step_and_zero3_gathers_blocks_twice_a_micro_batch():
    assert plan.estimate(job(micros=4)).reduced == 4 * num_params(XVERSE)
    one, four = (plan.estimate(job(shard="zero3", micros=m)) for m in (1, 4))
    assert (four.gathered, four.scattered) == (4 * one.gathered, 4 * one.scattered)
    once = plan.estimate(job(shard="zero2", micros=4)).gathered
    assert one.gathered - once == 2 * 40 * plan.elements(plan.groups(XVERSE)["block"], 8)


def test_a_step_is_cut_into_rows_that_the_ranks_share():
    assert plan.cut_step(4_194_304, 2048, 8, 8192) == (4, 64)
    with pytest.raises(ValueError, match="take for example 16384"):
        plan.cut_step(10_000, 2048, 8, 8192)


# --- 3. published runs ---------------------------------------------------------------------------------------


def days(config, row, tokens, gpus, tflops, mfu):
    return flops_per_token(config, row) * tokens / (gpus * tflops * 1e12 * mfu) / 86400


def test_xiangxin_3b_has_its_parameters_and_epochs_but_not_its_14_days():
    config = PRESETS["xiangxin-3b"]
    n = num_params(config)
    assert n == 2_779_683_840  # "27.8 亿"
    assert 50e9 / n == pytest.approx(18, abs=0.1) and 20 * n == pytest.approx(
        55.6e9, rel=1e-3
    )  # 20:1, nearly
    epochs, bytes_a_token, bytes_a_record = 150e9 / 50e9, 120e9 / 50e9, 120e9 / 100e6
    assert (epochs, bytes_a_token, bytes_a_record) == (3, 2.4, 1200)
    speed = 150e9 / (14 * 86400 * 8)
    assert speed == pytest.approx(15_501, abs=1)  # tokens/s a GPU, as stated
    assert days(config, 2048, 150e9, 8, 312, 1.0) == pytest.approx(11.76, rel=0.01)  # 14 days: 84 % MFU
    assert [days(config, 2048, 150e9, 8, 312, m) for m in (0.4, 0.5, 0.585)] == pytest.approx(
        [29.4, 23.5, 20.1], rel=0.01
    )


def test_xverse_13b_at_its_stated_mfu():
    speed = 0.585 * 312e12 / flops_per_token(XVERSE, 8192)
    assert speed == pytest.approx(2044, rel=0.001)
    assert days(XVERSE, 8192, 1.4e12, 1000, 312, 0.585) == pytest.approx(7.9, abs=0.05)


def test_xuanyuan_70b_reports_hardware_flops():
    config = PRESETS["xuanyuan-70b"]
    model = 340 * flops_per_token(config, 8192) / 1e12
    assert model == pytest.approx(151, rel=0.01) and model / 312 == pytest.approx(0.485, abs=0.002)
    assert 340 * 8 * num_params(config) / 1e12 == pytest.approx(190, rel=0.02)  # "190": 8 N, no attention
    assert 340 * flops_per_token(config, 8192, True) / 1e12 == pytest.approx(202, rel=0.01)  # with attention
    assert num_params(PRESETS["xuanyuan-6b"]) == 6_394_580_992


# --- 4. what to change, and the command ----------------------------------------------------------------------


def test_a_job_that_does_not_fit_is_given_the_least_change_that_does():
    big = job(row=8192, shard="zero3")  # all activations of 8,192 tokens
    assert not plan.fits(big, "H100")
    flags, new = plan.changes(big, lambda j: plan.fits(j, "H100"))
    assert flags == "--activation_checkpointing" and new.parallel.activation_checkpointing
    assert plan.fits(new, "H100")
    flags, new = plan.changes(job(row=8192, **AC), lambda j: plan.fits(j, "H100"))
    assert flags == "--shard zero3" and plan.fits(new, "H100")
    flags, new = plan.changes(job(row=2048, rows=64, shard="zero3", **AC), lambda j: plan.fits(j, "H100"))
    assert flags == "--micro_tokens 2048" and new.micro_rows == 1 and new.accumulation == 64
    flags, new = plan.changes(job(world=1, **AC), lambda j: plan.fits(j, "H100"))
    assert flags == "--gpus 4 --shard zero3" and plan.fits(new, "H100")
    assert not plan.fits(dataclasses.replace(new, world=2), "H100")
    assert plan.changes(big, lambda j: j.parallel.offload)[0].endswith("--offload")
    assert plan.changes(big, lambda j: False) is None


def test_the_command_prints_a_short_report(tmp_path):
    done = run_script(
        "plan.py", "--preset", "xverse-13b", "--gpus", 8, "--gpu", "H100", "--shard", "zero3", "--row_tokens", 2048,
        "--tokens_per_step", 4194304, "--tokens", "3.2e12", "--activation_checkpointing", "--mfu", 0.4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 35 and max(map(len, lines)) <= 110
    for word in ("13,715,031,040", "fits", "233.3 a parameter", "274.3B", "956.4 days", "164.6 GB state"):
        assert word in done.stdout, word
    # 3.2e12 tokens x 81.73e9 FLOPs / (8 x 989e12 x 0.4) / 86,400 s
    seconds = 3.2e12 * 81.73e9 / (8 * 989e12 * 0.4)
    assert seconds / 86400 == pytest.approx(956.4, rel=1e-3)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"gpu": "H900"}, "expected one of"),
        ({"replicas": 3, "shard": "zero3"}, "no multiple"),
        ({"row_tokens": 9000}, "context of 8192"),
        ({"preset": "demo"}, "--vocab_size"),
        ({"preset": "nosuch"}, "nosuch"),
        ({"shard": "zero3", "offload": True, "simulate": True}, "cannot be simulated"),
    ],
)
def test_what_cannot_be_planned_is_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        plan.main(plan.PlanConfig(**settings))


def test_the_simulated_head_takes_what_the_launcher_takes(monkeypatch):
    """The launcher of the head's backward pass on tensors without memory; kernels are not launched."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    import kernels
    from kernels import _linear_nll_triton, tables

    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    monkeypatch.setattr(tables, "_arch", lambda: "sm_80")
    N, C, V, elements = 512, 64, 5000, 512 * 1280
    monkeypatch.setitem(plan.CHUNK_ELEMENTS, "cuda", elements)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = torch.empty(N, C, dtype=dtype, device="meta"), torch.empty(V, C, device="meta")
        rows, goals = torch.empty(N, device="meta"), torch.empty(N, dtype=torch.int64, device="meta")
        with plan.Meter() as real:
            w = weight.to(dtype)
            _linear_nll_triton.backward(
                rows, rows, x, w, None, goals, rows, True, torch.float32, False, elements
            )
            del w
        with plan._as_on_a_gpu(), plan.Meter() as simulated:
            nll, _ = kernels.linear_nll(x.requires_grad_(), weight.requires_grad_(), None, goals)
            nll.sum().backward()
        assert simulated.peak == pytest.approx(real.peak, rel=0.02), dtype
