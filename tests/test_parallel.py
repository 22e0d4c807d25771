"""One set of numbers: every way to spread a model over processes computes what one process computes.

The worker at the end of this file runs under torchrun, 2 and 4 processes, many cases a launch; the tests read what
it found. The oracle is one process that takes the same split one part after the other and adds up.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import packed_corpus
from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import common
import generate
import model as M
import parallel as P
import state
import train

ROOT = Path(__file__).resolve().parent.parent
ONE = common.Process(0, 1, "cpu")
MODES = {
    "ddp": {},
    "ddp-again": {"activation_checkpointing": True},
    "zero2": {"shard": "zero2"},
    "zero2-again": {"shard": "zero2", "activation_checkpointing": True},
    "zero3": {"shard": "zero3"},
    "zero3-again": {"shard": "zero3", "activation_checkpointing": True},
    "zero3-offload": {"shard": "zero3", "offload": True},
    "hsdp": {"shard": "zero3", "replicas": 2},
    "hsdp-zero2": {"shard": "zero2", "replicas": 2, "activation_checkpointing": True},
}
# 37 tokens: ranks hold unequal parts. Widths are such that a rank has whole vectors of 16 numbers, as every real
# model has: fused AdamW treats the rest of a vector with other instructions, which round differently in the last bit
SHAPES = {
    "llama": M.ModelConfig("llama", 37, 64, 3, 4, 96, 32, num_key_value_heads=2),
    "llama-tied": M.ModelConfig("llama", 37, 64, 3, 4, 96, 32, tie_word_embeddings=True),
    "phi": M.ModelConfig("phi", 37, 64, 3, 4, 96, 32, partial_rotary_factor=0.5),
    "bloom": M.ModelConfig("bloom", 37, 64, 3, 4, 256, 32, tie_word_embeddings=True),
}


# --- what is computed ----------------------------------------------------------------------------------------


def batch(rows=8, width=24, masked=slice(0)):
    """Packed rows of unequal documents, of which unequal numbers of tokens are trained."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 37, (rows, width), generator=generator)
    targets = ids.roll(-1, 1).clone()
    for row in range(rows):
        targets[row, 2 * row + 5 :] = -100
    targets[masked] = -100
    doc_ids = torch.arange(width).div(7, rounding_mode="floor").expand(rows, width).contiguous()
    return {"ids": ids, "targets": targets, "doc_ids": doc_ids}


def part(whole: dict, rank: int, world: int, micro: int, micros: int) -> dict:
    """The rows of one micro-batch of one rank, as data.Batches deals them out."""
    return {k: v[rank::world].chunk(micros)[micro] for k, v in whole.items()}


def make(shape: str, process, cfg: P.ParallelConfig, what: str = "plain", dropout: float = 0.0):
    model = M.build(dataclasses.replace(SHAPES[shape], dropout=dropout), "meta")
    train.freeze(model, "embed_tokens" if what == "frozen" else "")
    model = P.parallelize(model, process, cfg)
    M.init_weights(P.unwrap(model), 3)
    return model


def backward(model, piece: dict) -> None:
    train.next_token_loss(model, piece)[0].backward()


@functools.cache
def reference(shape: str, what: str, dtype: str, world: int, micros: int, in_each: bool) -> dict:
    """The gradients of one process that goes through the parts in turn.

    in_each: sums over the ranks within each micro-batch (FSDP sends them then), else over a rank's first (DDP, and
    the copies of HSDP).
    """
    model = make(shape, ONE, P.ParallelConfig(dtype=dtype), what)
    whole = batch(masked=slice(0, None, world) if what == "masked rank" else slice(0))
    order = [(r, m) for r in range(world) for m in range(micros)]
    outer = (lambda r, m: m) if in_each else (lambda r, m: r)
    groups = {}
    for r, m in order:
        groups.setdefault(outer(r, m), []).append((r, m))
    total: dict = {}
    for group in groups.values():
        model.zero_grad()
        for r, m in group:
            backward(model, part(whole, r, world, m, micros))
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total[name] + p.grad if name in total else p.grad.clone()
    return total


def gradient_error(shape: str, what: str, dtype: str, mode: str, process) -> float:
    """The largest relative error of a parameter's gradient on this rank, in two micro-batches."""
    cfg = P.ParallelConfig(dtype=dtype, **MODES[mode])
    model = make(shape, process, cfg, what)
    whole = batch(masked=slice(0, None, process.world) if what == "masked rank" else slice(0))
    for m in range(2):
        with P.gradient_sync(model, cfg, last=m == 1):
            backward(model, part(whole, process.rank, process.world, m, 2))
    expected = reference(
        shape, what, dtype, process.world, 2, in_each=cfg.shard != "none" and cfg.replicas == 1
    )
    worst = 0.0
    for name, p in P.unwrap(model).named_parameters():
        assert (p.grad is None) == (name not in expected), name
        if p.grad is not None:
            mine, a, b = M.own_rows(p.grad)
            worst = max(worst, float((mine - expected[name][a:b]).norm() / expected[name].norm()))
    return worst


class Fixed:
    """The same micro-batches in every step."""

    def __init__(self, micro_batches: list[dict]):
        self.micro_batches = micro_batches

    def __next__(self):
        return self.micro_batches

    def state(self):
        return {}


def fitted(folder: Path, process, parts: int = 0, steps: int = 20, loss=train.next_token_loss, **settings):
    """Train the untied LLaMA with `fit`; return the whole tensors of its parameters.

    parts: one process takes the parts of so many ranks one after the other.
    """
    cfg = train.FitConfig(
        str(folder),
        **{"lr": 3e-3, "clip": 1e9, "dtype": "float32", "save_every": 0, "peak_tflops": 1.0, **settings},
    )
    model = make("llama", process, cfg)
    mine = range(parts) if parts else [process.rank]
    batches = Fixed([part(batch(), rank, parts or process.world, 0, 1) for rank in mine])
    assert train.fit(model, batches, cfg, loss, steps=steps, process=process, identity={}) == 0
    return {n: whole(p) for n, p in P.unwrap(model).named_parameters()}


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()


FITS = {"adamw": {}, "muon": {"optimizer": "muon"}, "clipped": {"clip": 0.1, "dtype": "bfloat16"}}


def weight_error(one: dict, other: dict) -> float:
    return max(float((one[n] - other[n]).abs().max()) for n in one)


# --- runs on packed text -------------------------------------------------------------------------------------


def settings_of(shards: Path, out: Path, **more) -> train.TrainConfig:
    return train.TrainConfig(
        str(out), data=str(shards), preset="tiny", row_tokens=64, tokens_per_step=512, micro_tokens=64, steps=6,
        lr=3e-3, dtype="float32", save_every=3, eval_every=0, peak_tflops=1.0, log_every=100, **more,
    )  # fmt: skip


def go_on_from(source: Path, out: Path, process) -> None:
    """Make a run that was interrupted after step 3 of another one."""
    if process.first:
        out.mkdir()
        for name in ("run.json", "metrics.jsonl"):
            shutil.copy(source / name, out)
        shutil.copytree(source / "step_0000003", out / "step_0000003")
        (out / "latest").write_text("step_0000003\n")
    process.barrier()


def digest(run: Path) -> str:
    """SHA-256 over every rank's file of step 6: parameters, moments, RNG."""
    files = sorted((run / "step_0000006" / "state").glob("rank-*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


STOPS = {  # where SIGTERM comes: the function that is about to be called, and its how-manieth call
    "in a step": (train, "next_token_loss", 9),  # 4 micro-batches a step: the third
    "in saving": (checkpoint, "write_model", 1),  # step 3
    "in evaluating": (train, "validate", 1),  # after step 6, before it is saved
}


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in common.read_metrics(run / "metrics.jsonl") if "loss" in row]


def resumed(shards: Path, out: Path, process, **more) -> list[str]:
    """The digests of a run, and of one that was resumed in its middle."""
    train.pretrain(settings_of(shards, out / "whole", **more), process)
    go_on_from(out / "whole", out / "cut", process)
    cfg = train.saved_settings(train.TrainConfig(str(out / "cut"), resume=True))
    train.pretrain(cfg, process)
    process.barrier()
    return [digest(out / "whole"), digest(out / "cut")]


# --- the tests -----------------------------------------------------------------------------------------------


def launch(ranks: int, folder: Path, *words: str) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*command, __file__, str(folder), *words],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((folder / f"found-{'-'.join([str(ranks), *words])}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("parallel")
    packed_corpus(made, 300, (1, 9), 300)
    for world in (2, 4):
        for name, more in FITS.items():
            if modes_of(world, name):
                expected = fitted(made / f"one-{world}-{name}", ONE, parts=world, **more)
                save_file(expected, made / f"one-{world}-{name}.safetensors")
    return made


@pytest.fixture(scope="module")
def two(folder):
    return launch(2, folder, "all")


@pytest.fixture(scope="module")
def four(folder, two):
    return launch(4, folder, "all")


def modes_of(world: int, name: str) -> list[str]:
    """The modes in which something is tried: all where it is cheap."""
    few = {"muon": ("ddp", "zero2", "zero3", "hsdp"), "clipped": ("ddp", "zero3", "hsdp")}
    few["resumed"] = ("ddp", "zero2", "zero3-again", "zero3-offload", "hsdp", "zero3-muon")
    if world == 4:
        few |= {"adamw": ("ddp", "zero2", "zero3-again", "hsdp", "hsdp-zero2"), "muon": ()}
        few |= {"clipped": ("ddp", "zero3"), "resumed": ("ddp", "zero3-again", "hsdp-zero2")}
    return [m for m in few.get(name, MODES) if world == 4 or m != "hsdp-zero2"]


def cases(world: int):
    narrow = [(s, "plain", "bfloat16", m) for s in SHAPES for m in ("ddp", "zero2-again", "zero3", "hsdp")]
    plain = [(s, "plain", "float32", m) for s in SHAPES for m in modes_of(world, "gradients")]
    odd = [(s, w, "float32", m) for s in ("llama", "llama-tied") for w in ("frozen", "masked rank")
           for m in ("ddp", "zero2", "zero3-again", "hsdp")]  # fmt: skip
    return narrow + plain + odd


@pytest.mark.parametrize("case", cases(2), ids="-".join)
def test_two_ranks_give_the_gradients_of_one_process_bit_for_bit(two, case):
    assert two["gradients"]["-".join(case)] == 0


@pytest.mark.parametrize("case", cases(4), ids="-".join)
def test_four_ranks_give_the_gradients_of_one_process(four, case):
    """Four numbers can be added in several orders, so the last bits differ in fp32; bf16 parts add up exactly."""
    assert four["gradients"]["-".join(case)] < 1e-6


@pytest.mark.parametrize("mode, optimizer", [(m, o) for o in ("adamw", "muon") for m in modes_of(2, o)])
def test_twenty_steps_of_two_ranks_give_the_weights_of_one_process_bit_for_bit(two, mode, optimizer):
    assert two["weights"][f"{mode}-{optimizer}"] == 0


@pytest.mark.parametrize("mode", modes_of(4, "adamw"))
def test_twenty_steps_of_four_ranks_give_the_weights_of_one_process(four, mode):
    assert four["weights"][f"{mode}-adamw"] < 1e-5


@pytest.mark.parametrize("mode", modes_of(2, "clipped"))
def test_two_ranks_have_the_bits_of_one_process_in_bf16_with_active_clipping(two, mode):
    assert two["weights"][f"{mode}-clipped"] == 0


@pytest.mark.parametrize("mode", modes_of(4, "clipped"))
def test_four_ranks_in_bf16_with_active_clipping_stay_within_the_measured_bound(four, mode):
    assert four["weights"][f"{mode}-clipped"] < 2e-5


@pytest.mark.parametrize("ranks, mode", [(w, m) for w in (2, 4) for m in modes_of(w, "resumed")])
def test_resuming_is_exact_in_every_mode_with_dropout(two, four, ranks, mode):
    whole_run, cut = {2: two, 4: four}[ranks]["resumed"][mode]
    assert whole_run == cut


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(two, four, ranks, mode):
    found = {2: two, 4: four}[ranks]["not finite"][mode]
    assert found["unchanged"] and found["moments unchanged"] and found["later steps change it"]
    assert [row.get("skipped") for row in found["log"]] == [None, 1, None, None]
    assert "grad_norm" not in found["log"][1]  # what is not finite is no JSON
    assert found["three in a row"] == "steps 2 to 4"


@pytest.mark.parametrize("where, step", [("in a step", 3), ("in saving", 3), ("in evaluating", 6)])
def test_sigterm_to_one_worker_saves_on_all_and_the_run_goes_on_exactly(two, where, step):
    found = two["stopped"][where]
    assert found["code"] == 143 and found["saved"] == f"step_{step:07d}"
    assert found["again"] == 0 and found["digest"] == two["whole"]
    assert found["evaluation"]["val_loss"] > 0  # also if it was the last one that was interrupted


def test_the_slow_rank_is_named(two):
    assert two["slow"]["slowest_rank"] == 1
    assert two["slow"]["rank_seconds_max"] >= 0.25
    assert "rank 1 is slow" in two["slow"]["printed"]


def test_a_sharded_model_writes_what_one_process_writes(two):
    assert two["written"]["zero3"] == two["written"]["one"]


def test_one_process_goes_on_where_two_ranks_stopped(two, folder):
    out = folder / "by-one"
    go_on_from(folder / "by-2", out, ONE)
    cfg = train.saved_settings(train.TrainConfig(str(out), resume=True))
    assert train.pretrain(cfg, ONE) == 0
    assert losses(out) == pytest.approx(losses(folder / "by-2"), rel=1e-6)
    assert position(out) == position(folder / "by-2")


@pytest.mark.parametrize("ranks, source", [(4, "by-2"), (2, "by-4")])
def test_another_number_of_ranks_goes_on_in_the_same_order_with_the_same_loss(
    two, four, folder, ranks, source
):
    if ranks == 2:
        launch(2, folder, "from-by-4")
    out = folder / f"{source}-by-{ranks}"
    assert losses(out) == pytest.approx(losses(folder / source), rel=1e-6)
    assert position(out) == position(folder / source)


def position(run: Path) -> dict:
    return state.read_manifest(run / "step_0000006")["extra"]["batches"]


def test_a_rank_too_many_for_the_copies_is_refused():
    with pytest.raises(ValueError, match="start it with torchrun"):
        P.make_mesh(ONE, P.ParallelConfig(shard="zero3"))
    with pytest.raises(ValueError, match="need --shard"):
        P.ParallelConfig(offload=True)
    with pytest.raises(ValueError, match="at least 1"):
        P.ParallelConfig(shard="zero3", replicas=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_activation_checkpointing_gives_the_same_bits_also_with_dropout(shape):
    grads = []
    for again in (False, True):
        model = make(
            shape, ONE, P.ParallelConfig(dtype="float32", activation_checkpointing=again), dropout=0.2
        ).train()
        torch.manual_seed(5)
        backward(model, batch())
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# --- the worker ----------------------------------------------------------------------------------------------


def not_finite(folder: Path, process, mode: str) -> dict:
    """Poison the loss of the last rank in the second of three steps, then in all from the second on."""
    seen, calls = {}, [0]

    def poisoned(model, piece, until=2):
        calls[0] += 1
        value, count, logs = train.next_token_loss(model, piece)
        seen[calls[0]] = {n: M.own_rows(p.detach())[0].clone() for n, p in P.unwrap(model).named_parameters()}
        bad = process.rank == process.world - 1 and 2 <= calls[0] <= until
        return value * (float("nan") if bad else 1.0), count, logs

    found = {}
    fitted(folder / f"nan-{mode}", process, steps=4, loss=poisoned, **MODES[mode])
    same = lambda a, b: all(torch.equal(a[n], b[n]) for n in a)
    found["later steps change it"] = not same(seen[3], seen[4])
    found["unchanged"] = same(seen[2], seen[3])
    found["log"] = common.read_metrics(folder / f"nan-{mode}" / "metrics.jsonl") if process.first else []
    # the moments: one more step after a skipped one is that of a run in which it never was
    calls[0] = 10  # no poison
    plain = fitted(folder / f"plain-{mode}", process, steps=2, loss=poisoned, schedule="wsd", warmup=0, decay=0.0,
                   final_lr=1.0, **MODES[mode])  # fmt: skip
    calls[0] = 0
    skipped = fitted(folder / f"skip-{mode}", process, steps=3, loss=poisoned, schedule="wsd", warmup=0, decay=0.0,
                     final_lr=1.0, **MODES[mode])  # fmt: skip
    found["moments unchanged"] = same(plain, skipped)
    calls[0] = 0
    try:
        fitted(folder / f"stop-{mode}", process, steps=9, max_skipped=3, **MODES[mode],
               loss=lambda model, piece: poisoned(model, piece, until=9))  # fmt: skip
    except ValueError as error:
        found["three in a row"] = str(error).partition("in ")[2].partition(" loss")[0]
    return found


@contextlib.contextmanager
def before(module, name: str, act):
    """Let something happen before each call of a function."""
    original = getattr(module, name)

    def wrapper(*args, **kwargs):
        act()
        return original(*args, **kwargs)

    setattr(module, name, wrapper)
    yield
    setattr(module, name, original)


def stopped(shards: Path, out: Path, process, module, name: str, at: int) -> dict:
    """Send SIGTERM to rank 1 alone when it calls a function for the `at`-th time; then go on."""
    calls = iter(range(1, 10**9))

    def act():
        if process.rank == 1 and next(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)

    cfg = settings_of(shards, out, dropout=0.1, shard="zero3")
    with before(module, name, act):
        code = train.pretrain(cfg, process)
    saved = state.saved_steps(out)[-1].name
    process.barrier()
    again = train.pretrain(train.saved_settings(train.TrainConfig(str(out), resume=True)), process)
    process.barrier()
    evaluation = state.read_manifest(out / "step_0000006")["extra"]["evaluation"]
    return {"code": code, "saved": saved, "again": again, "digest": digest(out), "evaluation": evaluation}


def slow(folder: Path, process) -> dict:
    """Let rank 1 sleep before its forward pass."""

    def sleepy(model, piece):
        time.sleep(0.25 * process.rank)
        return train.next_token_loss(model, piece)

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fitted(folder / "slow", process, steps=2, loss=sleepy, log_every=1)
    row = common.read_metrics(folder / "slow" / "metrics.jsonl")[-1] if process.first else {}
    return {**row, "printed": printed.getvalue()}


def written(process) -> dict:
    out = {}
    for name, cfg in (("one", P.ParallelConfig()), ("zero3", P.ParallelConfig(shard="zero3"))):
        model = make("llama", process if name != "one" else ONE, cfg)
        P.unwrap(model).compute_dtype = torch.float32
        with torch.no_grad():
            out[name] = generate.generate(model.eval(), [[1, 2, 3], [4]], generate.Sampling(8, 1.0, seed=1))
    return out


def work(folder: Path, process, word: str) -> dict:
    shards, world = folder / "shards", process.world
    if word != "all":
        out = folder / f"by-{word[-1]}-by-{world}"
        go_on_from(folder / f"by-{word[-1]}", out, process)
        train.pretrain(train.saved_settings(train.TrainConfig(str(out), resume=True)), process)
        return {}
    found: dict = {"gradients": {}, "weights": {}, "resumed": {}, "not finite": {}, "stopped": {}}
    for case in cases(world):
        found["gradients"]["-".join(case)] = gradient_error(*case, process)
    for name, more in FITS.items():
        for mode in modes_of(world, name):
            expected = load_file(folder / f"one-{world}-{name}.safetensors")
            got = fitted(folder / f"fit-{world}-{mode}-{name}", process, **more, **MODES[mode])
            found["weights"][f"{mode}-{name}"] = weight_error(expected, got)
    for mode in modes_of(world, "resumed"):
        more = MODES[mode.removesuffix("-muon")] | ({"optimizer": "muon"} if mode.endswith("muon") else {})
        found["resumed"][mode] = resumed(shards, folder / f"{mode}-{world}", process, dropout=0.1, **more)
    for mode in ("ddp", "zero3"):
        found["not finite"][mode] = not_finite(folder / f"bad-{world}", process, mode)
    if world == 2:
        found["slow"] = slow(folder, process)
        train.pretrain(settings_of(shards, folder / "whole", dropout=0.1, shard="zero3"), process)
        process.barrier()
        found["whole"] = digest(folder / "whole")
        for where, (module, name, at) in STOPS.items():
            found["stopped"][where] = stopped(shards, folder / f"stop-{where}", process, module, name, at)
        found["written"] = written(process)
    train.pretrain(settings_of(shards, folder / f"by-{world}", shard="zero3"), process)
    if world == 4:
        out = folder / "by-2-by-4"
        go_on_from(folder / "by-2", out, process)
        train.pretrain(train.saved_settings(train.TrainConfig(str(out), resume=True)), process)
    return found


def main() -> None:
    folder, *words = sys.argv[1:]
    torch.set_num_threads(1)
    train.Sampling = lambda **k: generate.Sampling(**{**k, "max_new_tokens": 4})  # long samples take long
    process = common.start_process("cpu", timeout=120)
    found = work(Path(folder), process, words[0])
    every = [None] * process.world  # the worst of all ranks counts
    torch.distributed.all_gather_object(every, found)
    for kind in ("gradients", "weights"):
        for case in found.get(kind, {}):
            found[kind][case] = max(each[kind][case] for each in every)
    for mode in found.get("not finite", {}):
        for key in ("unchanged", "moments unchanged", "later steps change it"):
            found["not finite"][mode][key] = all(each["not finite"][mode][key] for each in every)
    if process.first:
        (Path(folder) / f"found-{'-'.join([str(process.world), *words])}.json").write_text(json.dumps(found))
    common.finish_process(0)


if __name__ == "__main__":
    main()
