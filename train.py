"""THE training loop, and the pretraining command: predict the next token of packed text.

    loss = Σ nll over all trained tokens of the step / their number

`fit` knows nothing of text: what a stage trains on comes in as batches and a `loss(model, batch) -> (sum,
count, logs)`. A step adds up the gradients of its micro-batches and ranks and divides once by the number of
trained tokens, so 1 process x 8 rows, 4 micro-batches x 2 and 2 ranks x 4 agree.

    python train.py --preset demo --data out/shards --out out/run --tokens_per_step 4096 --epochs 3
    torchrun --nproc_per_node 8 train.py --preset phi2-chinese-0.2b --data out/zh,out/en --out out/run
    python train.py --resume --out out/run                                  # goes on exactly
    python train.py --init out/run --data out/shards --out out/run2         # takes weights, starts afresh
    python train.py --data out/zh:0.7,out/en:0.3 --out out/run3             # shares of the trained tokens
    python train.py --data out/zh,out/en --mixture mix.json --out out/run4  # {"zh": 0.7, "en": 0.3}, editable
    python train.py --data out/shards --out out/run5 --buckets 128,256,512  # rows of several lengths

A run is a folder: run.json (resolved settings), metrics.jsonl (one line a step), loss.png, step_N folders
(a model folder and the training state), latest. A step is saved whole or not at all; after kill -9,
--resume gives bit for bit what an uninterrupted run gives (on CPUs; kernels of a GPU may sum in changing
order). Ctrl-C and SIGTERM save before they stop (torchrun kills its processes 30 s after a SIGTERM; its
--shutdown-timeout gives a large model more time). torchrun --max-restarts goes on after the loss of a rank.

Loshchilov & Hutter 2019 (AdamW); Hu et al. 2024, MiniCPM (warmup-stable-decay); XuanYuan 2023 (a data mix
that follows the evaluations).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
import torch.nn as nn

import checkpoint
import common
import kernels
import lora
import plan as planning
import state
from data import (
    IGNORE,
    Batches,
    Documents,
    Mixture,
    RowStream,
    Shards,
    read_weights,
    shares,
    split_weights,
    validation_batches,
)
from generate import Sampling, generate
from model import (
    FROM_TOKENIZER,
    PRESETS,
    Model,
    ModelConfig,
    build,
    flops_per_token,
    init_weights,
    num_params,
)
from optim import OptimConfig, clip_and_scale, learning_rate, make_optimizer
from parallel import ParallelConfig, gradient_sync, parallelize, reshard, unwrap
from tokenizer import Tokenizer, load_tokenizer

# --- 1. settings -------------------------------------------------------------------------------------------


@dataclass
class FitConfig(OptimConfig, ParallelConfig):
    """What every stage that trains with `fit` can set."""

    out: str  # folder of the run
    resume: bool = False  # go on from the newest whole step of --out, with the settings it was started with
    force: bool = False  # --resume although data, shape or batch have changed
    init: str = ""  # a model folder or a run: take its weights and its shape, start afresh
    epochs: float = 1.0  # passes over the data, if neither --steps nor --tokens is given
    steps: int = 0  # optimizer steps
    tokens: float = 0  # positions of rows to go through, for example 2e7; the log counts trained tokens
    row_tokens: int = 0  # tokens of a training row; 0: the model's context
    dropout: float = 0.0  # after the embedding and on the residual branches
    seed: int = 1  # of weights, data order, dropout
    tokens_per_step: int = 16384  # tokens of one optimizer step, over all micro-batches and ranks
    micro_tokens: int = 8192  # tokens of one rank in one forward pass: at most so many, at least a row
    max_skipped: int = 10  # stop after so many steps in a row whose gradient was not finite
    eval_every: int = 250  # steps between evaluations; 0: only at the end
    save_every: int = 250  # steps between saved steps; the last one is always saved
    keep: int = 2  # saved steps to keep
    keep_best: bool = False  # save and keep the step of the lowest validation loss, too: OUT/best
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the model folder; the training state is fp32
    log_every: int = 10  # steps between lines on the screen; metrics.jsonl has every step
    device: str = "auto"  # auto, cpu, cuda
    attention: Literal["auto", "triton", "sdpa"] = "auto"  # triton: ours, 16 bits, on a GPU; sdpa: PyTorch's
    timeout: float = 1800  # seconds that a rank waits for the others before it gives up
    peak_tflops: float = 0.0  # of one device, for MFU (model FLOPs utilisation); 0: known, or measured

    def __post_init__(self):
        OptimConfig.__post_init__(self)
        ParallelConfig.__post_init__(self)
        for name in ("tokens_per_step", "micro_tokens", "log_every", "keep", "max_skipped"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        if not self.timeout > 0:
            raise ValueError(f"--timeout {self.timeout} must be greater than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout} must lie in [0, 1)")


@dataclass
class TrainConfig(FitConfig):
    data: str = ""  # packed folders, separated by commas; FOLDER:WEIGHT sets a folder's share of the tokens
    mixture: str = ""  # file of weights, {"zh": 0.7, "en": 0.3} by folder name, read again at each evaluation
    preset: str = "demo"  # a name of model.PRESETS, or a folder with a config.json
    vocab_size: int = 0  # rows of the embedding; 0: the preset's, or the tokenizer's rounded up to 64
    hidden_size: int = 0  # changes the preset; 0: as it is
    num_hidden_layers: int = 0  # changes the preset; 0: as it is
    max_position_embeddings: int = 0  # the context in tokens, changes the preset; 0: as it is
    train_only: str = ""  # these parameters alone: "embed_tokens,lm_head" after a vocabulary has grown
    z_loss: float = 0.0  # weight of the squared log of the softmax's denominator: keeps logits small (1e-4)
    buckets: str = ""  # several lengths of rows, "2048,4096,8192,16384": each step's rows have one of them
    sample: str = ""  # prompt of the sample at each evaluation; needed if the tokenizer has no <s>
    plan: bool = False  # only print what the run would take: memory, communication, disk, days
    gpus: int = 0  # with --plan: on so many GPUs; 0: one for each process that was started
    gpu: str = "H100"  # with --plan: A100, A800, H100, H800, H200, 4090, 3090 or L40S
    mfu: float = 0.4  # with --plan: the model FLOPs utilisation to reckon with
    simulate: bool = False  # with --plan: run the real step on tensors without memory, and count beside it


Settings = TypeVar("Settings", bound=FitConfig)  # of any stage

# --- 2. the loop -------------------------------------------------------------------------------------------

Loss = Callable[[nn.Module, dict], tuple[torch.Tensor, torch.Tensor, dict]]


def fit(
    model: nn.Module,
    batches,
    cfg: FitConfig,
    loss: Loss,
    evaluate: Callable[[nn.Module, Callable[[], None]], dict] | None = None,
    *,
    refresh: Callable[[], dict] | None = None,
    steps: int,
    process: common.Process,
    identity: dict,
    settings: dict | None = None,
    card: dict | None = None,
    tokenizer: Tokenizer | None = None,
    flops: Callable[[dict], tuple[float, float]] | None = None,
    first_loss: float = 0.0,
    unit: Literal["tokens", "pairs"] = "tokens",
) -> int:
    """Train a parallelized, initialised model for `steps` optimizer steps; return the process's exit code.

    batches     per step a list of this rank's micro-batches, with state() and load_state(), as data.Batches
    loss        (model, batch) -> (sum, count, logs): the summed loss with its graph, the number of trained
                tokens or pairs, and {name: (sum, count)} to log
    evaluate    (model, poll) -> {name: number or text}, called by all ranks every cfg.eval_every steps and at
                the end; it calls poll() now and then, which ends it if the run is asked to stop
    refresh     called by all ranks every cfg.eval_every steps, before that step is saved: what it changes in
                `batches` is saved with the step, so a resumed run has it too; returns what to log, or {}
    identity    JSON of what a resumed run must find unchanged (data, tokenizer, shape, batch)
    settings    JSON for run.json, written once it is sure that the run can start or go on
    card        what state.write_cards should say of the model; this adds tokens, speed and results
    flops       micro-batch -> operations per trained token, the model's and the hardware's: for MFU and HFU
    first_loss  what the first step should show (ln V for fresh weights), 0 if unknown
    unit        what `loss` counts, for the log

    Where adapters are attached (lora.py) a saved step is an adapter folder, without the base in its state.
    A step whose loss or gradient is not finite changes no parameter, on any rank; it is logged as skipped.
    ValueError: cfg.max_skipped such steps in a row, a full disk, a changed identity on --resume.
    """
    run = Path(cfg.out)
    peak = Peak(cfg.peak_tflops, process, unwrap(model).compute_dtype)
    writer = lora.write_adapter if lora.attached(unwrap(model)) else checkpoint.write_model
    optimizer = make_optimizer(model, cfg, dist.group.WORLD if process.world > 1 else None)
    params = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(cfg.seed * 1000 + process.rank)  # for dropout: every rank draws its own
    step = done = skipped = 0  # tokens or pairs trained so far; steps in a row that changed nothing
    evaluated, lowest = True, math.inf
    if cfg.resume and state.begun(run):
        extra = _resume(run, model, optimizer, batches, process, identity, cfg.force)
        lowest = checkpoint.gather(state.lowest_loss(run))[0]  # the same on all ranks
        step, done, skipped = (extra[name] for name in ("step", unit, "skipped"))
        evaluated = extra["evaluation"] is not None
    if process.first and settings:
        common.write_json(run / "run.json", settings)
    evaluated = evaluated or step < steps  # a finished run may have been stopped in its last evaluation
    log = RunLog(run, step, steps, cfg.log_every, process, unit)
    stop = common.StopSignal(process)
    saved = step

    def look() -> dict | None:
        """Evaluate and log; None if the run was asked to stop meanwhile."""
        try:
            values = evaluate(model.eval(), stop.poll)
            log.evaluation(step, values)
        except common.Stopped:
            values = None
        model.train()
        reshard(model)
        return values

    def save(evaluation: dict | None, row: dict) -> None:
        extra = {"step": step, unit: done, "skipped": skipped, "evaluation": evaluation}
        extra |= {"batches": batches.state(), "identity": identity}
        told = {**card, "steps": step, unit: done, **peak.card(row)} if card else None
        told = {**told, "evaluation": evaluation} if told and evaluation else told
        dtype = getattr(torch, cfg.save_dtype)
        state.save_step(run, step, model, optimizer, extra, process, tokenizer, dtype, told, writer)
        if process.first and not skipped:
            state.prune(run, cfg.keep, cfg.keep_best)

    model.train()
    while step < steps:
        clock = time.perf_counter()
        lr = learning_rate(step, steps, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        total = Sums(process)
        work = common.Lap(process.device)
        micro_batches = next(batches)
        for i, batch in enumerate(micro_batches):
            batch = {k: v.to(process.device, non_blocking=True) for k, v in batch.items()}
            last = i == len(micro_batches) - 1
            with gradient_sync(model, cfg, last):
                value, count, logs = loss(model, batch)
                if last:
                    work.end()  # from here on a rank may wait for others
                value.backward()
            total.add(loss=(value, count), **logs)
        total.add(stop=(float(bool(stop)), 1))  # through the sum, so that all ranks stop at the same step
        sums, every = total.over_ranks(work.seconds())
        loss_sum, count = sums["loss"]
        count = max(1.0, count)  # a step without a trained token: no 0 / 0

        norm = clip_and_scale(params, count, cfg.clip)
        finite = math.isfinite(loss_sum) and math.isfinite(norm)
        if finite:
            optimizer.step()
            done += int(sums["loss"][1])
        skipped = 0 if finite else skipped + 1
        optimizer.zero_grad()
        step += 1

        seconds = time.perf_counter() - clock
        row = {name: s / max(1.0, n) for name, (s, n) in sums.items() if name != "stop"}
        row |= {"lr": lr, "grad_norm": norm, unit: done, "seconds": seconds}
        row[f"{unit}_per_second"] = speed = count / seconds
        if flops:
            used = flops(batch)  # all micro-batches of a step are alike
            row["mfu"], row["hfu"] = (speed * n / peak.flops for n in used)
        row["memory_bytes"] = common.peak_memory(process.device)
        if process.world > 1:
            row |= slowest(every)
        if not finite:
            row = {k: v for k, v in row.items() if math.isfinite(v)} | {"skipped": skipped}
            what = f"loss {loss_sum / count:g}, gradient norm {norm:g}"
            log.say(f"step {step}/{steps} | {what}: nothing was updated")
        log.step(step, row)
        if skipped >= cfg.max_skipped:
            where = f"step {saved} is saved" if saved else "no step was saved yet"
            raise ValueError(
                f"{run}: in steps {step - skipped + 1} to {step} loss or gradient was not finite; nothing "
                f"was updated in them, {where}. Lower --lr or look at the data"
            )
        if step == 1 and finite and first_loss and abs(row["loss"] / first_loss - 1) > 0.1:
            log.say(
                f"warning: the first loss is {row['loss']:.3f}; fresh weights should give {first_loss:.3f}"
            )

        stopping = sums["stop"][0] > 0 and step < steps
        due = cfg.eval_every and step % cfg.eval_every == 0
        if due and refresh and (news := refresh()):
            log.evaluation(step, news)
        evaluation = None
        if evaluate and not stopping and (step == steps or due):
            evaluation = look()
            stopping = evaluation is None
        better = cfg.keep_best and evaluation is not None and evaluation.get("val_loss", math.inf) < lowest
        regular = cfg.save_every and step % cfg.save_every == 0
        # what comes after a step that was not finite may be as bad: a good step is not replaced by it
        if stopping or step == steps or ((regular or better) and not skipped):
            save(evaluation, row)
            saved, lowest = step, evaluation["val_loss"] if better else lowest
            stopping = stopping or (step < steps and stop.agreed())  # asked while it was saved
        if stopping:
            log.say(f"asked to stop: step {step} is saved; --resume --out {run} goes on")
            return stop.exit_code or 143  # no signal: another rank got it, or the launcher died
    if evaluate and not evaluated:
        evaluation = look()
        if evaluation is None:
            return stop.exit_code or 143
        save(evaluation, {})
    log.say(f"finished: {step} steps, {common.human(done)} {unit} in {run}")
    return 0


ORDER = {"data", "row_tokens", "seed", "mixture", "packing"}  # what the order of the data depends on


def changes(folder: Path, identity: dict, force: bool) -> dict[str, str]:
    """Say what differs between a saved step and the run that is to go on from it: {name: a line about it}.

    ValueError lists it, unless forced; another optimizer cannot be forced, as the step has not its state.
    """
    saved = state.read_manifest(folder)["extra"]["identity"]
    names = [k for k in saved | identity if saved.get(k) != identity.get(k)]
    lines = {k: f"  {k}: {saved.get(k)!r} when saved, {identity.get(k)!r} now" for k in names}
    if lines and (not force or "optimizer" in lines):
        remedy = "--init takes its weights" if "optimizer" in lines else "--force goes on all the same"
        what = f"{folder} cannot be resumed, because this changed ({remedy}):"
        raise ValueError("\n".join([what, *lines.values()]))
    return lines


def _resume(run: Path, model, optimizer, batches, process, identity: dict, force: bool) -> dict:
    """Restore the newest whole step, give its `extra`; ValueError if what it was trained on has changed."""
    folder = state.newest_step(run, process)
    extra = state.read_manifest(folder)["extra"]
    changed = changes(folder, identity, force)
    state.load_step(folder, model, optimizer, process)
    if process.first:
        state.set_aside(run, folder)
        print("\n".join([f"resuming from {folder}", *(f"forced:{line}" for line in changed.values())]))
    if not ORDER.intersection(changed):
        batches.load_state(extra["batches"])
    elif process.first:
        print("forced: the data begin anew")
    return extra


class Sums:
    """Adds up (sum, count) pairs by name on the device, and over all ranks at the end: one wait per step."""

    def __init__(self, process: common.Process):
        self.process, self.pairs = process, {}

    def add(self, /, **pairs) -> None:
        """Add {name: (sum, count)} of one micro-batch."""
        for name, (total, count) in pairs.items():
            new = torch.stack(
                [torch.as_tensor(v, device=self.process.device).detach().double() for v in (total, count)]
            )
            self.pairs[name] = self.pairs[name] + new if name in self.pairs else new

    def over_ranks(self, mine: float = 0.0) -> tuple[dict[str, tuple[float, float]], list[float]]:
        """Sum over all ranks, which must have added the same names; and list every rank's number `mine`."""
        every = torch.zeros(self.process.world, dtype=torch.double, device=self.process.device)
        every[self.process.rank] = mine
        table = torch.cat([torch.stack(list(self.pairs.values())).flatten(), every])
        if self.process.world > 1:
            dist.all_reduce(table)
        numbers, end = table.tolist(), 2 * len(self.pairs)
        sums = zip(numbers[0:end:2], numbers[1:end:2], strict=True)
        return dict(zip(self.pairs, sums, strict=True)), numbers[end:]


def slowest(seconds: list[float]) -> dict[str, float]:
    """Say how long the ranks worked before they had to wait for others, and which one worked longest.

    Under DDP that is up to the last backward pass. Under FSDP ranks wait for one another in every block, and
    it shows slow reading of data, and little else.
    """
    return {
        "rank_seconds_min": min(seconds),
        "rank_seconds_median": statistics.median_low(seconds),
        "rank_seconds_max": max(seconds),
        "slowest_rank": seconds.index(max(seconds)),
    }


class Peak:
    """The FLOP/s of all devices together that MFU is measured against, and where the figure comes from."""

    def __init__(self, tflops: float, process: common.Process, dtype: torch.dtype):
        self.source, device = "--peak_tflops", process.device
        each = tflops * 1e12
        if not each and process.device.startswith("cuda"):
            name = device = torch.cuda.get_device_name()
            each = 1e12 * next((g.tflops for key, g in planning.GPUS.items() if key in name), 0)
            self.source = f"{name}, the vendor's dense bf16"
        if not each:
            each, self.source = measured_flops(process.device, dtype), "a large matrix product, measured now"
        self.flops, self.devices = each * process.world, f"{process.world} x {device}"
        if process.first:
            print(f"compute: {dtype} on {process.world} x {process.device}; ", end="")
            print(f"MFU is against {each / 1e12:.2f} TFLOP/s each ({self.source})")

    def card(self, row: dict) -> dict:
        """Say for the run card how fast this step was, and on what."""
        keys = ("tokens_per_second", "pairs_per_second", "mfu", "hfu", "memory_bytes")
        speed = {k: row[k] for k in keys if k in row}
        return {**speed, "devices": self.devices, "peak_flops": self.flops, "torch": torch.__version__}


def measured_flops(device: str, dtype: torch.dtype, size: int = 1536) -> float:
    """Measure the FLOP/s of a matrix product (size, size) x (size, size), the best of 12."""
    # ones, not random numbers: drawing some would move the RNG, and a resumed run would differ
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class RunLog:
    """What a run tells: metrics.jsonl, lines on the screen, loss.png. Only rank 0 writes."""

    def __init__(self, run: Path, step: int, steps: int, every: int, process: common.Process, unit: str):
        self.path, self.steps, self.every, self.active = run / "metrics.jsonl", steps, every, process.first
        self.unit = unit
        self.begin, self.first = time.perf_counter(), step
        if self.active:
            old = common.read_metrics(self.path) if self.path.exists() else []
            kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in old if row["step"] <= step]
            common.atomic_text(self.path, "".join(kept))  # a resumed run goes on where its weights are

    def say(self, text: str) -> None:
        """Print a line, once for all ranks."""
        if self.active:
            print(text, flush=True)

    def _add(self, row: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def step(self, step: int, row: dict) -> None:
        """Log one optimizer step; print it every `every` steps, with the time left."""
        if not self.active:
            return
        self._add({"step": step, **row})
        if "skipped" not in row and (step % self.every == 0 or step in (1, self.steps)):
            left = (time.perf_counter() - self.begin) / (step - self.first) * (self.steps - step)
            speed = f"{common.human(row[f'{self.unit}_per_second'])} {self.unit}/s"
            mfu = f" | mfu {row['mfu']:.0%}" if "mfu" in row else ""
            self.say(
                f"step {step}/{self.steps} | loss {row['loss']:.4f} | lr {row['lr']:.2e} | grad "
                f"{row['grad_norm']:.2f} | {speed}{mfu} | {common.duration(left)} left"
            )
            if row.get("rank_seconds_max", 0) > 1.5 * row.get("rank_seconds_median", 0):
                slow, usual = row["rank_seconds_max"], row["rank_seconds_median"]
                what = f"{slow:.3f} s before it waited for others, the median is {usual:.3f} s"
                self.say(f"rank {row['slowest_rank']} is slow: {what}")

    def evaluation(self, step: int, values: dict) -> None:
        """Log and print what `evaluate` found, and draw loss.png."""
        if not self.active:
            return
        self._add({"step": step, **values})
        shown = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k}: {v}" for k, v in values.items())
        self.say(f"step {step}/{self.steps} | " + " | ".join(shown))
        if problem := common.plot_metrics(self.path, {"loss": "training", "val_loss": "validation"}):
            self.say(problem)


# --- 3. what every stage does around the loop --------------------------------------------------------------


def begin(cfg: Settings) -> tuple[Settings, common.Process]:
    """Meet the other ranks; give the settings in force (the saved ones, if a run goes on) and our place.

    ValueError: --out holds another run; --resume, and there is none; --lora_… without --lora; --attention
    triton without a GPU.
    """
    run = Path(cfg.out)
    if cfg.resume:
        cfg = saved_settings(cfg)
    if isinstance(cfg, lora.LoraConfig):
        cfg.check_used(common.typed_flags(cfg))
    process = common.start_process(cfg.device, cfg.timeout)
    if not cfg.resume and started_again(run):
        cfg = saved_settings(cfg, {})  # its flags are in them, and --init names a step by now
    elif not cfg.resume and run.exists() and any(p.name != "lock" for p in run.iterdir()):
        raise ValueError(f"{run} exists and is not empty; --resume goes on with it, or choose another --out")
    kernels.use_attention(cfg.attention, process.device)
    process.barrier()  # all have looked at the folder before one writes into it
    return cfg, process


def with_preset(cfg: Settings, presets: dict[str, dict]) -> Settings:
    """Put the settings of --preset in force, but for those that were typed."""
    typed, recipe = common.typed_flags(cfg), presets[cfg.preset] if cfg.preset else {}
    return dataclasses.replace(cfg, **{name: v for name, v in recipe.items() if name not in typed})


def saved_settings(cfg: Settings, typed: dict | None = None) -> Settings:
    """Take the settings from run.json, but for `typed`; None: what is typed beside --resume."""
    typed = common.typed_flags(cfg) if typed is None else typed
    path = Path(cfg.out) / "run.json"
    if not path.exists():
        raise ValueError(f"{path}: no such file, so there is no run to resume in {cfg.out}")
    known = {f.name for f in dataclasses.fields(cfg)}
    saved = {k: v for k, v in common.read_json(path)["config"].items() if k in known}  # of another version
    for either in (("steps", "tokens", "epochs"), ("row_tokens", "buckets")):
        if typed.keys() & set(either):  # one replaces the others
            saved |= {name: getattr(type(cfg), name) for name in either if name in known}
    saved["force"] = False  # for one time only
    return type(cfg)(**{**saved, **typed, "out": cfg.out, "resume": True})


def started_again(run: Path) -> bool:
    """Tell whether torchrun has lost a rank of this very run and started all of them anew.

    Then run.json names a launcher that is the parent of some rank; all ranks agree on the answer.
    """
    path = run / "run.json"
    ours = common.launcher() and path.exists() and common.read_json(path).get("launcher") == common.launcher()
    return any(checkpoint.gather(bool(ours)))


@dataclass
class Plan:
    """What follows from the settings: how a step is cut, and how many steps there are.

    Where rows have several lengths, these are the longest rows; shorter ones make the same tokens.
    """

    row_tokens: int
    rows_per_step: int
    micro_rows: int
    steps: int

    @property
    def tokens(self) -> int:
        """Positions of all rows of all steps."""
        return self.steps * self.rows_per_step * self.row_tokens


def plan(cfg: FitConfig, row: int, epoch: float, world: int) -> Plan:
    """Derive rows, micro-batches and steps; ValueError where the settings cannot be met.

    row: tokens of a row; epoch: tokens of the rows that one pass over the data fills.
    """
    micro, micros = planning.cut_step(cfg.tokens_per_step, row, world, cfg.micro_tokens)
    rows = micro * micros * world
    return Plan(row, rows, micro, count_steps(cfg, (cfg.tokens or cfg.epochs * epoch) / (rows * row)))


def count_steps(cfg: FitConfig, wanted: float) -> int:
    """Give --steps, or else the number that --tokens or --epochs make, rounded, at least one."""
    if cfg.steps and cfg.tokens:
        raise ValueError("--steps and --tokens exclude each other")
    if min(cfg.steps, cfg.tokens, cfg.epochs, cfg.row_tokens) < 0:
        raise ValueError("--steps, --tokens, --epochs and --row_tokens must not be negative")
    return cfg.steps or max(1, round(wanted))


def open_run(
    cfg: FitConfig, process: common.Process, model: Model, p: Plan, about: list[str], **card
) -> tuple[dict, dict]:
    """Take the run's folder and say what is about to happen; give `fit` what it calls settings and card.

    Every rank calls this when all settings are known to be sound, and before anything is allocated.

    model   on the meta device, with what is frozen and the adapters that it will have
    about   lines to print about the stage's data
    card    what the run's card says of this stage: stage, data {name: fingerprint}, tokenizer (digest), …
    """
    run = Path(cfg.out)
    if cfg.resume and process.first:
        before = common.read_json(run / "run.json")["plan"]["steps"]
        if before != p.steps:
            print(f"{p.steps} steps instead of {before}: the learning rate follows the new end")
    state.lock(run, process)  # from here on the settings are sound, and the folder is ours
    if process.first:
        describe(model, cfg, p, about, process)
    shape = dataclasses.asdict(model.config)
    settings = {"command": sys.argv, "plan": dataclasses.asdict(p), "ranks": process.world}
    settings |= {"config": dataclasses.asdict(cfg), "model": shape, "launcher": common.launcher()}
    card = {"name": run.name, "init": cfg.init, "model": shape, "parameters": num_params(model.config)} | card
    card |= {"optimizer": cfg.optimizer, "code": state.code_version() if process.first else ""}
    card["schedule"] = {name: getattr(cfg, name) for name in ("schedule", "lr", "final_lr", "warmup")}
    return settings, card


def adapter_identity(cfg: FitConfig, process: common.Process) -> dict:
    """Say what a resumed LoRA run must find unchanged besides: the adapters' settings, and the frozen base.

    The first rank reads the base, whose digest all get; it is read from --init again when the run goes on.
    """
    digest = lambda: checkpoint.folder_digest(cfg.init) if process.first else ""
    settings = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(lora.LoraConfig)}
    return {"lora": settings, "base": checkpoint.together(digest)[0]}


def describe(model: Model, cfg: FitConfig, p: Plan, about: list[str], process: common.Process) -> None:
    """Print what is about to happen, before anything does."""
    config = model.config
    n = num_params(config)
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    job = planning.Job(
        config=config, parallel=cfg, world=process.world, micro_rows=p.micro_rows, row_tokens=p.row_tokens,
        optimizer=cfg.optimizer,
    )  # fmt: skip
    shares, adapters = planning.shares(job), lora.attached(model)
    updated = trained / n * (shares.gradients + shares.optimizer)
    held = shares.parameters
    if adapters:  # beside a base in the dtype that it computes in
        held *= job.item / 4 + trained / n
    memory = (held + updated) / 1e9
    moments = shares.optimizer / max(1, shares.parameters) * 4  # bytes a parameter
    dtype = getattr(torch, cfg.save_dtype)
    disk = state.disk_need(config, trained, cfg.keep, dtype, moments, cfg.keep_best, adapters)
    print(
        f"model: {config.family}, {config.num_hidden_layers} layers x {config.hidden_size}, {n:,} parameters"
    )
    for line in about:
        print(line)
    if adapters:
        print(f"adapters: {trained:,} parameters beside them are trained")
    elif trained < n:
        print(f"only {trained:,} of them are trained: fewer FLOPs than those stated")
    print(f"memory: {memory:.2f} GB a rank for weights, gradients and moments, before activations")
    print(f"disk: {disk / 1e9:.2f} GB for the saved steps that are kept and the one being written", end="; ")
    free = shutil.disk_usage(cfg.out).free
    print(
        f"{free / 1e9:.1f} GB are free" if free > disk else f"ONLY {free / 1e9:.1f} GB ARE FREE: lower --keep"
    )


def ready_model(model: Model, cfg: FitConfig, process: common.Process, known_vocab: int) -> nn.Module:
    """Spread a meta model over the ranks and give it the weights of --init, or fresh ones.

    The weights of a run that goes on are restored by `fit`; of a LoRA run that is the adapters alone, so the
    base is read again. known_vocab: tokens that have a text, so that sampling never picks another.
    """
    if model.config.quantization and not lora.attached(model):
        raise ValueError(
            f"--init {cfg.init}: quantised weights are not trained; add --lora or take what they were made of"
        )
    if model.config.quantization and cfg.shard != "none":
        raise ValueError(f"--shard {cfg.shard}: a quantised base is not cut over ranks; leave it out")
    model = parallelize(model, process, cfg)
    bare = unwrap(model)
    bare.known_vocab = known_vocab
    begun, adapters = state.begun(Path(cfg.out)), lora.attached(bare)
    if cfg.init and (adapters or not begun):
        lora.load_into(model, cfg.init)
    elif not begun:
        init_weights(bare, cfg.seed)
    if adapters and not begun:
        lora.init_adapter(model, cfg.seed)
    return model


# --- 4. pretraining ----------------------------------------------------------------------------------------


def next_token_loss(
    model: nn.Module, batch: dict, z_loss: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum the nll of all trained tokens of a batch; log how long its rows are.

    z_loss: add so much of log²Z, Z the softmax's denominator, which holds Z near 1; the loss with it is what
    falls, the log's "nll" is without. (Chowdhery et al. 2022, PaLM, section 5.)
    """
    ids, targets, doc_ids = batch["ids"], batch["targets"], batch.get("doc_ids")
    count, logs = (targets != IGNORE).sum(), {"row_tokens": (ids.shape[1], 1)}
    if not z_loss:
        return model(ids, targets, doc_ids=doc_ids).sum(), count, logs
    nll, lse = model(ids, targets, doc_ids=doc_ids, lse=True)
    return nll.sum() + z_loss * lse.square().sum(), count, {**logs, "nll": (nll.sum(), count)}


@torch.no_grad()
def validate(
    model: nn.Module,
    shards: Documents,
    width: int,
    rows: int,
    process: common.Process,
    poll: Callable[[], None] = lambda: None,
) -> tuple[dict, float]:
    """Measure the mean loss of all validation tokens, and that of each source if there are several.

    shards: packed folders or conversations (data.ChatRows); width: tokens of a row; rows: of a batch; poll:
    called before every batch. All ranks share the rows. Returns what to log, and the sum of all nll in nats.
    """
    total = Sums(process)
    for name, source in shards.sources.items():
        total.add(**{name: (0.0, 0)})
        if not source.documents:
            continue
        for batch in validation_batches(shards, width, rows, process.rank, process.world, source.documents):
            poll()
            value, count, _ = next_token_loss(model, {k: v.to(process.device) for k, v in batch.items()})
            total.add(**{name: (value, count)})
    sums, _ = total.over_ranks()
    each = {f"val_loss/{name}": s / n for name, (s, n) in sums.items() if n and len(sums) > 1}
    nats, count = (sum(column) for column in zip(*sums.values(), strict=True))
    return {"val_loss": nats / count, **each}, nats


class Evaluation:
    """What pretraining looks at between steps: validation loss, bits per byte, epochs, and a sample."""

    def __init__(
        self,
        shards: Shards,
        tokenizer: Tokenizer,
        cfg: TrainConfig,
        stream: RowStream | Mixture,
        process: common.Process,
    ):
        self.shards, self.tokenizer, self.process, self.stream = shards, tokenizer, process, stream
        self.width = width = stream.row
        self.rows = max(1, cfg.micro_tokens // width)
        self.prompt = tokenizer.encode_prompt(cfg.sample)
        if len(self.prompt) >= width:
            raise ValueError(f"--sample is {len(self.prompt)} tokens long; a row has {width}")

    def __call__(self, model: nn.Module, poll: Callable[[], None]) -> dict:
        """Evaluate and write a sample, on all ranks; without validation documents no validation loss."""
        out = {}
        if len(self.shards):
            out, nats = validate(model, self.shards, self.width, self.rows, self.process, poll)
            if not self.tokenizer.add_bos:
                # nothing predicts a document's first token, so a decoder would need all its ln V nats
                nats += len(self.shards) * math.log(unwrap(model).config.vocab_size)
            out["val_bits_per_byte"] = nats / math.log(2) / self.shards.bytes
        out |= self.stream.epochs()
        if self.prompt:  # every rank writes the same one: a sharded model needs all of them
            sampling = Sampling(max_new_tokens=64, temperature=0.8, top_k=40)
            with torch.compiler.set_stance("force_eager"):  # each length of the cache would compile anew
                new = generate(unwrap(model), [self.prompt], sampling)[0]
            out["sample"] = self.tokenizer.decode(self.prompt + new)
        return out


def starting_weights(cfg: TrainConfig, shards: Shards, typed: list[float] | None) -> dict | None:
    """Give {source: share} from --data or --mixture; None: every document once an epoch."""
    if cfg.mixture and typed:
        raise ValueError("--mixture and weights in --data exclude each other; leave out one")
    if cfg.mixture and state.saved_steps(Path(cfg.out)):  # the saved step has those in force
        return shares(dict.fromkeys(shards.sources, 1), "--mixture")
    if cfg.mixture:
        return read_weights(cfg.mixture, shards.sources)
    return shares(dict(zip(shards.sources, typed, strict=True)), "--data") if typed else None


def reread(path: str, mixture: Mixture, process: common.Process) -> dict:
    """Put the weights of --mixture in force from the next row on; return what to log if they changed.

    Rank 0 reads, so that all ranks agree. A file that is bad now is announced, and the old weights stay.
    """
    weights, problem = mixture.weights, ""
    if process.first:
        try:
            weights = read_weights(path, mixture.weights)
        except (ValueError, OSError, RecursionError) as error:
            problem = str(error)
    if process.world > 1:
        table = torch.tensor(list(weights.values()), dtype=torch.float64, device=process.device)
        dist.broadcast(table, 0)
        weights = dict(zip(weights, table.tolist(), strict=True))
    if problem:
        return {"mixture_problem": f"{problem}; the old weights stay in force"}
    if weights == mixture.weights:
        return {}
    mixture.set_weights(weights)
    return {f"weight/{name}": weight for name, weight in weights.items()}


def model_config(cfg: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Resolve --init, --preset and what changes them into the shape to train, with the tokenizer's ids."""
    if cfg.resume:  # the run knows its shape; the folders that it came from may be gone
        return ModelConfig(
            **{**common.read_json(Path(cfg.out) / "run.json")["model"], "dropout": cfg.dropout}
        )
    if cfg.init:
        folder = checkpoint.model_folder(cfg.init)
        config = checkpoint.read_config(folder)
        held = any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
        if held and load_tokenizer(folder).digest != tokenizer.digest:
            raise ValueError(
                f"{folder} has another tokenizer than the data was packed with; pack with {folder}, or give "
                "it rows for an extended tokenizer: checkpoint.py resize"
            )
    elif cfg.preset in PRESETS:
        config = PRESETS[cfg.preset]
    elif (Path(cfg.preset) / "config.json").exists():
        config = checkpoint.read_config(cfg.preset)
    else:
        raise ValueError(
            f"--preset {cfg.preset}: neither a folder with a config.json nor one of {', '.join(PRESETS)}"
        )
    if config.head != "lm":
        raise ValueError(
            f"{cfg.init or cfg.preset}: pretraining needs a language-model head, not {config.head!r}"
        )
    change: dict = {"dropout": cfg.dropout}
    change |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    shape = ("hidden_size", "num_hidden_layers", "max_position_embeddings", "vocab_size")
    if cfg.init and any(getattr(cfg, name) for name in shape):
        flags = ", ".join(f"--{name}" for name in shape)
        raise ValueError(f"--init takes the shape of its folder; leave out {flags}")
    for name in ("num_hidden_layers", "max_position_embeddings"):
        if getattr(cfg, name):
            change[name] = getattr(cfg, name)
    if cfg.hidden_size:  # the size of a head and the MLP's ratio stay
        if cfg.hidden_size % config.head_dim:
            raise ValueError(
                f"--hidden_size {cfg.hidden_size} is not a multiple of the head size {config.head_dim}"
            )
        heads = cfg.hidden_size // config.head_dim
        grouped = config.num_attention_heads // config.num_key_value_heads
        change |= {"hidden_size": cfg.hidden_size, "num_attention_heads": heads}
        change["num_key_value_heads"] = max(1, heads // grouped)
        change["intermediate_size"] = (
            round(config.intermediate_size * cfg.hidden_size / config.hidden_size / 32) * 32
        )
    vocab = cfg.vocab_size or config.vocab_size
    if vocab == FROM_TOKENIZER:
        vocab = -(-tokenizer.vocab_size // 64) * 64
    if vocab < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab}; set --vocab_size"
        )
    return dataclasses.replace(config, vocab_size=vocab, **change)


def freeze(model: nn.Module, train_only: str) -> None:
    """Let those parameters alone train whose name holds one of the words; no words: all.

    A tied head is the embedding under a second name. ValueError for a word that is in no name.
    """
    words = [word.strip() for word in train_only.split(",") if word.strip()]
    if train_only and not words:
        raise ValueError(f"--train_only {train_only}: names no parameter")
    named = list(model.named_parameters(remove_duplicate=False))
    for word in words:
        if not any(word in name for name, _ in named):
            some = ", ".join(name for name, _ in named[:12])
            raise ValueError(f"--train_only {word}: in no parameter's name; there are {some}, …")
    chosen = {p for name, p in named if any(word in name for word in words)}
    for _, p in named:
        p.requires_grad_(not words or p in chosen)


def row_lengths(cfg: TrainConfig, config: ModelConfig) -> list[int]:
    """Give the lengths of rows, the shortest first: --buckets, --row_tokens or the model's context."""
    context = config.max_position_embeddings
    if cfg.buckets and cfg.row_tokens:
        raise ValueError("--buckets and --row_tokens exclude each other; leave out one")
    if not cfg.buckets:
        flag, lengths = f"--row_tokens {cfg.row_tokens}", [cfg.row_tokens or context]
    else:
        flag = f"--buckets {cfg.buckets}"
        try:
            lengths = [int(word) for word in cfg.buckets.split(",")]
        except ValueError:
            raise ValueError(f"{flag}: expected lengths of rows, as in 2048,4096,8192,16384") from None
        if lengths[0] < 1 or any(b <= a for a, b in zip(lengths, lengths[1:], strict=False)):
            raise ValueError(f"{flag}: every length must be greater than the one before it, the first than 0")
        if odd := [n for n in lengths if lengths[-1] % n]:  # all steps have the same tokens, in whole rows
            raise ValueError(f"{flag}: {odd[0]} does not divide {lengths[-1]}; take parts of the longest")
    if lengths[-1] > context and config.switches.rope:
        raise ValueError(f"{flag} exceeds the model's context of {context}")
    return lengths


def outline(
    cfg: TrainConfig,
    config: ModelConfig,
    p: Plan,
    lengths: list[int],
    shards: Shards,
    world: int,
    weights: dict | None,
) -> list[str]:
    """Say in lines what is trained on, in how many steps, and at what expense."""
    n, flops = num_params(config), flops_per_token(config, p.row_tokens)
    accumulation = p.rows_per_step // (p.micro_rows * world)
    each = shards.bytes / max(1, shards.tokens)
    cut = f"{p.steps:,} steps x {p.rows_per_step} rows x {p.row_tokens} tokens"
    amount = f"{common.human(p.tokens)} tokens, {p.tokens / n:.1f} per parameter"
    lines = [
        f"data: {len(shards):,} documents, {shards.tokens:,} tokens, {each:.2f} bytes per token",
        f"training: {cut} = {amount}, {p.tokens / shards.tokens:.2f} epochs",
    ]
    if weights:
        passes = {name: w * p.tokens / max(1, shards.sources[name].tokens) for name, w in weights.items()}
        said = (f"{name} {w:.1%} ({passes[name]:.2f} epochs)" for name, w in weights.items())
        lines.append(f"mixture: {', '.join(said)}")
    cuts = (f"{p.micro_rows * p.row_tokens // n} rows{f' x {n}' if lengths[1:] else ''}" for n in lengths)
    lines.append(f"a step: {world} ranks x {accumulation} micro-batches x {' or '.join(cuts)}")
    matrices = common.human(flops_per_token(config, 0) / 6)
    most = "at most " if lengths[1:] else ""  # in the longest rows
    return [
        *lines,
        f"FLOPs: 6 x {matrices} parameters in products + 6 x layers x width x row = {most}"
        f"{common.human(flops)} per token, {flops * p.tokens:.3g} in all",
    ]


def operations(config: ModelConfig, recompute: bool) -> Callable[[dict], tuple[float, float]]:
    """Make the `flops` of `fit`: operations to train a token of a batch, the model's and the hardware's."""

    @functools.cache  # to count parameters is to build the model on the meta device: not in every step
    def of_rows(length: int) -> tuple[float, float]:
        return flops_per_token(config, length), flops_per_token(config, length, recompute)

    return lambda batch: of_rows(batch["ids"].shape[1])


def show_plan(cfg: TrainConfig) -> None:
    """Print what the run would take; without --data by the preset's vocabulary and --tokens."""
    if os.environ.get("RANK", "0") != "0":
        return
    fields = {f.name for f in dataclasses.fields(planning.PlanConfig)}
    wanted = {name: value for name, value in dataclasses.asdict(cfg).items() if name in fields}
    wanted["gpus"] = cfg.gpus or int(os.environ.get("WORLD_SIZE", 1))
    wanted["tokens"] = cfg.tokens or cfg.steps * cfg.tokens_per_step
    config = None
    changed = cfg.hidden_size or cfg.num_hidden_layers or cfg.max_position_embeddings
    if not cfg.data and (cfg.init or changed or cfg.buckets):
        raise ValueError("--plan without --data takes a --preset as it is; give --data for the other flags")
    if cfg.data:
        folders, _ = split_weights(cfg.data)
        config = model_config(cfg, load_tokenizer(folders[0]))
        wanted["row_tokens"] = row_lengths(cfg, config)[-1]
        wanted["tokens"] = wanted["tokens"] or cfg.epochs * Shards(folders, "train").tokens
    planning.main(planning.PlanConfig(**wanted), config)


def main(cfg: TrainConfig) -> None:
    """Pretrain a model on packed text."""
    if cfg.plan:
        show_plan(cfg)
        return
    cfg, process = begin(cfg)
    common.finish_process(pretrain(cfg, process))


def pretrain(cfg: TrainConfig, process: common.Process) -> int:
    """Do what the settings say with the ranks that have met; return the exit code."""
    if not cfg.data:
        raise ValueError("--data is missing: folders written by data.py pack, separated by commas")
    folders, typed = split_weights(cfg.data)
    tokenizer = load_tokenizer(folders[0])
    config = model_config(cfg, tokenizer)
    shards, lengths = Shards(folders, "train"), row_lengths(cfg, config)
    p = plan(cfg, lengths[-1], shards.tokens, process.world)
    weights = starting_weights(cfg, shards, typed)
    if weights:
        stream = Mixture(shards, lengths, cfg.seed, weights)
    else:
        stream = RowStream(shards, lengths, cfg.seed)
    evaluate = Evaluation(Shards(folders, "val"), tokenizer, cfg, stream, process)
    model = build(config, device="meta")
    freeze(model, cfg.train_only)
    about = outline(cfg, config, p, lengths, shards, process.world, None if cfg.resume else weights)
    data = {cfg.data: shards.fingerprint}
    told = {"stage": "pretraining", "data": data, "tokenizer": tokenizer.digest}
    settings, card = open_run(cfg, process, model, p, about, **told)

    model = ready_model(model, cfg, process, tokenizer.vocab_size)
    refresh = (lambda: reread(cfg.mixture, stream, process)) if cfg.mixture else None
    if refresh and not state.begun(Path(cfg.out)):
        refresh()  # every rank has read the file by itself; now all take what rank 0 read
    batches = Batches(stream, p.rows_per_step, p.micro_rows, process.rank, process.world)
    code = fit(
        model,
        batches,
        cfg,
        functools.partial(next_token_loss, z_loss=cfg.z_loss),
        evaluate,
        refresh=refresh,
        steps=p.steps,
        process=process,
        identity={
            "data": shards.fingerprint,
            "model": dataclasses.asdict(config),
            "row_tokens": lengths if lengths[1:] else lengths[0],
            "rows_per_step": p.rows_per_step,
            "seed": cfg.seed,
            "optimizer": cfg.optimizer,
            **({"train_only": cfg.train_only} if cfg.train_only else {}),
            "mixture": list(weights) if cfg.mixture else weights,  # a file's weights may change
        },
        settings=settings,
        card=card,
        tokenizer=tokenizer,
        # with --train_only some products have no gradient: no MFU rather than a wrong one
        flops=None if cfg.train_only else operations(config, cfg.activation_checkpointing),
        first_loss=0.0 if cfg.init else math.log(config.vocab_size),
    )
    left = ", ".join(f"{len(rows)} of {n} tokens" for n, rows in batches.ready.items() if rows)
    if process.first and left:
        print(f"rows that wait, each length for a whole step, and were not trained: {left}")
    return code


if __name__ == "__main__":
    common.run(main, doc=__doc__)
