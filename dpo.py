"""Preference tuning: of two answers to a question, make the chosen one likelier than the rejected one (DPO).

    h   = (log π(chosen) − log π(rejected)) − (log ref(chosen) − log ref(rejected))
    dpo = −log σ(β·h)        conservative: −(1 − ε)·log σ(β·h) − ε·log σ(−β·h)        ipo = (h − 1/(2β))²

log π(answer) is summed over the answer's tokens, its end included, given the conversation before it. The
reference is the policy as it was when training began. Its log-probabilities are computed once and kept;
--reference live computes them in every step, with a frozen copy or, under --lora, with the adapters switched
off. β·(log π − log ref) is called an answer's reward: the optimum of DPO maximises the reward behind the
preferences minus β·KL(π‖ref), without a reward model. Template and loss mask are those of sft.py. Both
answers of a pair stand in one packed row, each a document of its own.

    python dpo.py --init out/sft --data pairs.jsonl --out out/dpo
    python dpo.py --init out/sft --data pairs.jsonl --out out/dpo --lora --lr 1e-4
    torchrun --nproc_per_node 8 dpo.py --init out/sft --data pairs.jsonl --out out/dpo --shard zero3
    python dpo.py --resume --out out/dpo
    python dpo.py tune --help                                  # all flags; the word tune may be left out
    python dpo.py make-rejected --init out/early --data chat.jsonl --out pairs.jsonl    # where no pairs exist

A pair whose conversations do not both fit the context is left out and counted: cut answers would be judged
by what is not there.

Rafailov et al. 2023, "Direct Preference Optimization"; Mitchell 2023, "A note on DPO with noisy preferences"
(ε); Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences" (IPO);
Park et al. 2024, "Disentangling Length from Quality in DPO"; Lambert et al. 2024, Tülu 3 (length-normalised).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import chat
import checkpoint
import common
import lora
import state
from data import IGNORE, Batches, PairRows, RowStream, validation_batches
from generate import Sampling, generate, load, question_ids
from model import Model, ModelConfig, build
from parallel import parallelize, reshard, unwrap
from sft import Evaluation, Feed, filled, split, split_names, start_from, template_rows
from tokenizer import Tokenizer, load_tokenizer
from train import (
    FitConfig,
    Plan,
    Sums,
    adapter_identity,
    begin,
    changes,
    fit,
    open_run,
    plan,
    ready_model,
    with_preset,
)

# --- 1. settings -------------------------------------------------------------------------------------------


@dataclass
class DPOConfig(FitConfig, lora.LoraConfig):
    out: str = ""  # folder of the run
    data: str = ""  # preference pairs: .json, .jsonl (.gz, .zst) or folders of them, commas between them
    preset: str = ""  # a published recipe, a name of dpo.PRESETS; typed flags win over it
    template: str = ""  # chat template; only where the folder of --init names none
    beta: float = 0.1  # weight of the KL penalty: the smaller, the further the policy may go (ipo: tau)
    # dpo: −log σ(β·h); ipo: (h − 1/2β)² of sums, as the paper's eq. 17 (TRL: of means, --length_normalised)
    loss: Literal["dpo", "ipo"] = "dpo"
    label_smoothing: float = 0.0  # share of the pairs whose label is taken to be wrong (conservative DPO)
    length_normalised: bool = False  # log-probabilities per token instead of per answer; beta is then 2 to 10
    reference: Literal["cached", "live"] = "cached"  # compute it once; live: in every step, by a second model
    # folder for what is computed once, so that runs with another beta or lr share it; default: OUT alone
    reference_cache: str = ""
    val: float | None = None  # pairs to hold out: a number, or below 1 a share; default: 5 %, at most 2,000
    test: str = ""  # questions whose answers are checked at each evaluation; default: held-out ones
    test_rows: int = 200  # at most so many of them
    sample: str = ""  # questions to answer at each evaluation, | between them; default: two held-out ones
    max_new_tokens: int = 128  # of such an answer
    lr: float = 5e-6  # highest learning rate: 5e-7 to 5e-6 for 7 to 70 B parameters; 0.2 B: 2e-5; LoRA: 10 x
    final_lr: float = 0.0  # where the schedule ends, as a share of lr
    weight_decay: float = 0.0  # of matrices; norms and biases have none
    row_tokens: int = 0  # tokens of a row, which holds whole pairs; 0: the model's context, or twice that
    keep_best: bool = True  # keep the step of the lowest validation loss, too; the file `best` names it

    def __post_init__(self):
        FitConfig.__post_init__(self)
        lora.LoraConfig.__post_init__(self)
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset}: expected one of {', '.join(PRESETS)}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"--beta {self.beta} must be greater than 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"--label_smoothing {self.label_smoothing} must lie in [0, 0.5)")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("--label_smoothing is a matter of --loss dpo; leave it out with ipo")
        for name in ("val", "test_rows"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        if self.reference_cache and self.reference == "live":
            raise ValueError("--reference_cache is a matter of --reference cached; leave it out with live")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens} must be at least 1")


PRESETS = {
    # 2 pairs x 16 micro-batches; a conversation has at most 656 tokens, here 256 are reckoned with
    "phi2-chinese-dpo": {"beta": 0.1, "lr": 2e-5, "epochs": 4.0, "tokens_per_step": 16384},
    # ChatLM-mini-Chinese's adapters; the learning rate is ours
    "chatlm-dpo-lora": {
        "lora": True,
        "lora_rank": 16,
        "lora_alpha": 16.0,
        "lora_dropout": 0.1,
        "beta": 0.1,
        "lr": 1e-4,
    },
}


# --- 2. the loss -------------------------------------------------------------------------------------------

# what the log shows, and what of it is normal
NORMAL = {
    "loss": "ln 2 = 0.693 at first (ipo: 1/(4β²)), then falling; val_loss that rises again: too many epochs",
    "accuracy": "share of pairs with h > 0, ties count half: about 0.5 at first, then 0.6 to 0.8 on people's "
    "choices, near 1 where rejected answers were sampled",
    "margin": "β·h: 0 at first, then growing to 0.5 … 5 (ipo: to 0.5); far more means that little but the "
    "pairs is left: raise --beta, lower --lr",
    "chosen_logp, rejected_logp": "sums over an answer's tokens, so −20 or −500 by its length: both mostly "
    "fall, the rejected faster; if the chosen fall as fast, lower --lr",
    "chosen_reward, rejected_reward": "β·(log π − log ref): 0 at first; the rejected one goes below 0, the "
    "chosen one stays near it",
    "kl": "mean of log ref − log π over all tokens of both answers, nats per token: what k1 estimates of "
    "KL(ref‖π) if the reference wrote the answers, else a sign of drift; 0 at first, then 0.05 … 0.5",
    "chosen_tokens, rejected_tokens": "lengths of answers: where the chosen are longer, length is learnt too",
    "val_accuracy_shorter": "accuracy where the chosen answer is not the longer one: far below val_accuracy "
    "means that length is what was learnt",
}


def answer_sums(values: torch.Tensor, doc_ids: torch.Tensor, pairs: int) -> torch.Tensor:
    """Add up values (B, T) over each answer -> (B, pairs, 2) fp64: chosen (doc_id 2n) and rejected (2n + 1).

    fp64, because the loss is a difference of sums: of 1,000 nats fp32 keeps four decimals.
    """
    sums = values.new_zeros(len(values), 1 + 2 * pairs, dtype=torch.float64)
    sums = sums.scatter_add(1, doc_ids + 1, values.double())  # the empty end of a row has doc_id −1
    return sums[:, 1:].unflatten(1, (pairs, 2))


def answer_logps(model: nn.Module, batch: dict) -> torch.Tensor:
    """Give log π(answer | conversation) of a batch of data.PairRows: (B, P, 2) fp64, chosen and rejected."""
    nll = model(batch["ids"], batch["targets"], doc_ids=batch["doc_ids"])
    return -answer_sums(nll, batch["doc_ids"], batch["pairs"].shape[1])


def preference_loss(
    h: torch.Tensor, kind: str = "dpo", beta: float = 0.1, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Give each pair's loss for h, any shape: how much more than the reference the policy prefers the chosen.

    dpo: Rafailov et al. 2023, eq. 7; label_smoothing: the share of labels taken to be wrong (Mitchell 2023,
    "conservative DPO"); ipo: Azar et al. 2023, eq. 17.

    At h = 0: ln 2 (dpo), 1/(4β²) (ipo). With β 0.1 and h 2: −ln σ(0.2) = 0.5981; with ε 0.1
    0.9·0.5981 + 0.1·0.7981 = 0.6181; ipo (2 − 5)² = 9.
    """
    if kind == "ipo":
        return (h - 1 / (2 * beta)).square()
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


Loss = Callable[[nn.Module, dict], tuple[torch.Tensor, torch.Tensor, dict]]  # as `fit` wants it
Reference = Callable[[nn.Module, dict], torch.Tensor]  # (policy, batch) -> as answer_logps


def pair_loss(
    model: nn.Module, batch: dict, cfg: DPOConfig, reference: Reference | None = None
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum the loss of all pairs of a batch; count the pairs; log what NORMAL explains. For `fit`.

    reference None: the batch brings the reference's log-probabilities.
    """
    pairs = batch["pairs"]
    real = pairs >= 0  # (B, P)
    ref = batch["reference"] if reference is None else reference(model, batch)  # (B, P, 2)
    logps = answer_logps(model, batch)
    lengths = answer_sums(batch["targets"] != IGNORE, batch["doc_ids"], pairs.shape[1])
    gain = logps - ref
    if cfg.length_normalised:
        gain = gain / lengths.clamp(min=1)
    chosen, rejected = gain.unbind(-1)
    h = chosen - rejected
    loss = preference_loss(h, cfg.loss, cfg.beta, cfg.label_smoothing)

    count = real.sum()
    right = (h.detach().sign() + 1) / 2
    values = {
        "accuracy": right,
        "margin": cfg.beta * h,
        "chosen_logp": logps[..., 0],
        "rejected_logp": logps[..., 1],
        "chosen_reward": cfg.beta * chosen,
        "rejected_reward": cfg.beta * rejected,
        "chosen_tokens": lengths[..., 0],
        "rejected_tokens": lengths[..., 1],
    }
    logs = {name: ((v.detach() * real).sum(), count) for name, v in values.items()}
    logs["kl"] = ((ref - logps.detach()).sum(), lengths.sum())  # 0 where there is no pair
    if not model.training:  # in one step there may be no such pair
        shorter = real & (lengths[..., 0] <= lengths[..., 1])
        logs["accuracy_shorter"] = ((right * shorter).sum(), shorter.sum())
    return (loss * real).sum(), count, logs


# --- 3. the reference --------------------------------------------------------------------------------------


def base_of(model: nn.Module):
    """Give the context in which a policy with adapters computes without them; nothing happens without any."""
    return lora.disabled(model) if lora.attached(unwrap(model)) else contextlib.nullcontext()


@torch.no_grad()
def live_reference(model: nn.Module, batch: dict, frozen: nn.Module | None = None) -> torch.Tensor:
    """Compute the reference's log-probabilities of a batch (B, P, 2): of `frozen`, or of the policy's base.

    Without dropout, and without a random number drawn.
    """
    if frozen is not None:
        logps = answer_logps(frozen, batch)
        reshard(frozen)
        return logps
    training = model.training
    with base_of(model):
        logps = answer_logps(model.eval(), batch)
    model.train(training)
    return logps


@torch.no_grad()
def compute_reference(model: nn.Module, pairs: PairRows, p: Plan, process: common.Process) -> np.ndarray:
    """Compute the log-probabilities of all pairs under the policy as it is: (pairs, 2) fp64, on every rank.

    The policy without its adapters, if it has any, and without dropout. All ranks share the work.
    """
    table = torch.zeros(len(pairs), 2, dtype=torch.float64, device=process.device)
    for batch in validation_batches(pairs, p.row_tokens, p.micro_rows, process.rank, process.world):
        batch = {name: value.to(process.device) for name, value in batch.items()}
        real = batch["pairs"] >= 0
        table[batch["pairs"][real]] = live_reference(model, batch)[real]
    reshard(model)
    if process.world > 1:
        dist.all_reduce(table)  # a pair is in one rank's rows; the others have 0
    return table.cpu().numpy()


def cached_reference(
    model: nn.Module, cfg: DPOConfig, parts: dict[str, PairRows], p: Plan, key: dict, process: common.Process
) -> None:
    """Give every part its `reference`, from OUT/reference.safetensors, or computed now and written there.

    key: JSON of all that the numbers depend on. If any of it differs from what is in the file, or the file is
    damaged, the numbers are computed again, and why is said. In the folder --reference_cache each key has a
    file of its own. Every rank calls this.
    """
    path = Path(cfg.out) / "reference.safetensors"
    if cfg.reference_cache:
        path = Path(cfg.reference_cache) / f"{state.fingerprint(key)[:16]}.safetensors"
    tables, problem = _read_reference(path, key)
    problem = next(filter(None, checkpoint.gather(problem)), "")
    if not problem:
        say(process, f"reference: log-probabilities read from {path}")
    else:
        if state.begun(Path(cfg.out)) and not lora.attached(unwrap(model)):
            lora.load_into(model, cfg.init)  # `fit` restores the policy afterwards
        start = time.perf_counter()
        tables = {
            name: torch.from_numpy(compute_reference(model, part, p, process)) for name, part in parts.items()
        }
        checkpoint.together(lambda: process.first and _write(path, tables, key), f"{path} was not written")
        count, seconds = sum(map(len, tables.values())), time.perf_counter() - start
        say(
            process, f"reference: {problem}: log-probabilities of {count:,} pairs computed in {seconds:.1f} s"
        )
    for name, part in parts.items():
        part.reference = tables[name].numpy()


def _read_reference(path: Path, key: dict) -> tuple[dict, str]:
    """Read the tables; or say why they cannot be used."""
    if not path.exists():
        return {}, "not computed yet"
    try:
        with checkpoint.open_tensors(path) as file:
            told = file.metadata() or {}
            tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        before = json.loads(told.get("key", "{}"))
    except ValueError as error:
        return {}, str(error)
    if told.get("sha256") != _digest(tables):
        return {}, f"{path} is damaged"
    changed = [name for name in before | key if before.get(name) != key.get(name)]
    return tables, f"{', '.join(changed)} changed" if changed else ""


def _write(path: Path, tables: dict[str, torch.Tensor], key: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another run may write the same file
    try:
        save_file(tables, tmp, {"key": json.dumps(key, sort_keys=True), "sha256": _digest(tables)})
        common.sync(tmp)
        tmp.rename(path)
    finally:
        tmp.unlink(missing_ok=True)


def _digest(tables: dict[str, torch.Tensor]) -> str:
    parts = (f"{name} {tuple(t.shape)} ".encode() + t.numpy().tobytes() for name, t in sorted(tables.items()))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def say(process: common.Process, text: str) -> None:
    """Print a line, once for all ranks."""
    if process.first:
        print(text, flush=True)


# --- 4. tuning ---------------------------------------------------------------------------------------------


class PairEvaluation(Evaluation):
    """What is looked at between steps: loss and figures of held-out pairs, and answers as in sft.py."""

    loss: Loss  # set once the reference is known

    def __init__(self, held: PairRows, feed: Feed, cfg: DPOConfig, *args):
        super().__init__(held, feed, cfg, *args)
        self.pairs, self.held = held, None

    def __call__(self, model: nn.Module, poll: Callable[[], None]) -> dict:
        """Evaluate, on all ranks."""
        found = {}
        if self.pairs:
            found = validate_pairs(model, self.pairs, self.feed.plan, self.process, self.loss, poll)
        return found | super().__call__(model, poll)


@torch.no_grad()
def validate_pairs(
    model: nn.Module,
    pairs: PairRows,
    p: Plan,
    process: common.Process,
    loss: Loss,
    poll: Callable[[], None],
) -> dict:
    """Measure the mean loss of all pairs and what `loss` logs: {"val_loss": …}; all ranks share the work."""
    total = Sums(process)
    for batch in validation_batches(pairs, p.row_tokens, p.micro_rows, process.rank, process.world):
        poll()
        value, count, logs = loss(model, {k: v.to(process.device) for k, v in batch.items()})
        total.add(loss=(value, count), **logs)
    sums, _ = total.over_ranks()
    return {f"val_{name}": value / count for name, (value, count) in sums.items() if count}


def read_pairs(cfg: DPOConfig, tokenizer: Tokenizer, config: ModelConfig) -> tuple[PairRows, PairRows, int]:
    """Read, split and encode the pairs; give those to train on, the held-out ones, and the tokens of a row.

    ValueError: a bad row (file:line), or no pair is left to train on.
    """
    if not cfg.data:
        raise ValueError("--data is missing: files of preference pairs, separated by commas")
    rows, held = split(chat.read_rows(split_names(cfg.data), "pairs"), cfg.val)
    context = config.max_position_embeddings
    encode = functools.partial(PairRows, tokenizer=tokenizer, context=context, longest=cfg.row_tokens)
    pairs, held = encode(rows), encode(held)
    if not pairs:
        dropped = ", ".join(f"{n} {why}" for why, n in pairs.dropped.items())
        raise ValueError(f"--data {cfg.data}: no pair is left to train on ({dropped})")
    longest = max(pairs.longest, held.longest)
    return pairs, held, cfg.row_tokens or (context if longest <= context else 2 * context)


def lines(pairs: PairRows, held: PairRows, width: int) -> list[str]:
    """Say what was read, what became of it, and whether the chosen answers are the longer ones."""
    long, equal = (pairs.dropped[why] + held.dropped[why] for why in ("too long", "equal"))
    (chosen, rejected), longer = pairs.counts.mean(0), (pairs.counts[:, 0] > pairs.counts[:, 1]).mean()
    return [
        f"pairs: {len(pairs) + len(held) + long + equal:,}; {long:,} dropped because a conversation exceeds "
        f"the context, or both a row of {width} tokens, {equal:,} because their answers are equal; "
        f"{len(held):,} held out",
        f"data: {len(pairs):,} pairs, {pairs.tokens:,} tokens, {pairs.counts.sum() / pairs.tokens:.1%} of "
        f"them trained; a chosen answer has {chosen:.1f}, a rejected {rejected:.1f}, and the chosen is "
        f"longer in {longer:.0%} of the pairs",
    ]


def tune(cfg: DPOConfig) -> None:
    """Tune a model on preference pairs."""
    if not cfg.resume:
        cfg = with_preset(cfg, PRESETS)
    if not cfg.out:
        raise ValueError("--out is missing: the folder of the run")
    cfg, process = begin(cfg)
    common.finish_process(prefer(cfg, process))


def prefer(cfg: DPOConfig, process: common.Process) -> int:
    """Do what the settings say with the ranks that have met; return the exit code."""
    check_template(cfg.init, cfg.template)
    tokenizer, config = start_from(cfg)
    cfg, warning = template_rows(cfg, tokenizer)
    if not cfg.resume:  # where --init is a run, a later step of it must not become the reference
        cfg = dataclasses.replace(cfg, init=str(checkpoint.model_folder(cfg.init)))
    pairs, held, width = read_pairs(cfg, tokenizer, config)
    stream = RowStream(pairs, width, cfg.seed)
    full = filled(stream)
    p = plan(cfg, width, pairs.tokens / full, process.world)
    batches = Batches(stream, p.rows_per_step, p.micro_rows, process.rank, process.world)
    adapters = adapter_identity(cfg, process) if cfg.lora else {}
    digest = lambda: checkpoint.folder_digest(cfg.init) if process.first else ""
    start = adapters["base"] if cfg.lora else checkpoint.together(digest)[0]
    objective = {k: getattr(cfg, k) for k in ("loss", "beta", "label_smoothing", "length_normalised")}
    identity = {"data": pairs.fingerprint, "template": tokenizer.template, "seed": cfg.seed, "init": start}
    identity |= {"model": dataclasses.asdict(config), "row_tokens": width, "rows_per_step": p.rows_per_step}
    identity |= {"optimizer": cfg.optimizer, "objective": objective, "reference": cfg.reference, **adapters}
    model = build(config, device="meta")
    if cfg.lora:
        lora.attach(model, cfg, tokenizer.vocab_size)
    each = p.rows_per_step * width * full * len(pairs) / pairs.tokens
    said = f"training: {p.steps:,} steps x {p.rows_per_step} rows x {width} tokens, {full:.1%} of them filled"
    said += f": about {each:.0f} pairs a step, {p.steps * each / len(pairs):.2f} epochs"
    feed = Feed(batches, pairs, p, identity, said)
    evaluate = PairEvaluation(held, feed, cfg, tokenizer, config, process)
    normal = (f"  {name}: {text}" for name, text in NORMAL.items())
    about = [*lines(pairs, held, width), said, *warning, *normal]
    checkpoint.together(lambda: refuse_changes(cfg, identity))
    settings, card = open_run(
        cfg,
        process,
        model,
        p,
        about,
        stage="preference tuning",
        data={cfg.data: pairs.fingerprint},
        tokenizer=tokenizer.digest,
        template=tokenizer.template,
        alignment=f"{cfg.loss}, beta {cfg.beta:g}, on {len(pairs):,} preference pairs",
    )
    model = ready_model(model, cfg, process, tokenizer.vocab_size)
    reference = None
    if cfg.reference == "live":
        frozen = None if cfg.lora else frozen_model(config, cfg, process)
        reference = functools.partial(live_reference, frozen=frozen)
    else:
        parts = {name: part for name, part in (("train", pairs), ("val", held)) if part}
        key = {"weights": start, "pairs": {name: part.fingerprint for name, part in parts.items()}}
        key |= {"template": tokenizer.template, "tokenizer": tokenizer.digest}
        key |= {"dtype": str(unwrap(model).compute_dtype), "device": process.device.split(":")[0]}
        key |= {"row_tokens": width, "micro_rows": p.micro_rows, "torch": torch.__version__}
        path = Path(cfg.out) / "run.json"
        if process.first and not path.exists():
            common.write_json(path, settings)  # whoever is stopped in what follows can --resume
        cached_reference(model, cfg, parts, p, key, process)
    evaluate.loss = functools.partial(pair_loss, cfg=cfg, reference=reference)
    return fit(
        model,
        batches,
        cfg,
        evaluate.loss,
        evaluate,
        steps=p.steps,
        process=process,
        identity=identity,
        settings=settings,
        card=card,
        tokenizer=tokenizer,
        first_loss=1 / (4 * cfg.beta**2) if cfg.loss == "ipo" else math.log(2),
        unit="pairs",
    )


def refuse_changes(cfg: DPOConfig, identity: dict) -> None:
    """Refuse to resume what has changed, as `fit` will, but before the reference is computed for it."""
    steps = reversed(state.saved_steps(Path(cfg.out)) if cfg.resume else [])
    folder = next((step for step in steps if not state.damage(step, tensors=False)), None)
    if folder:
        changes(folder, identity, cfg.force)


def check_template(folder: str, template: str) -> None:
    """Refuse another template than the folder's own: what is learnt there would never be met."""
    own = load_tokenizer(lora.tokenizer_folder(folder)).template if folder else None
    if template and own and template != own:
        raise ValueError(f"--template {template}: {folder} was tuned with {own}; leave the flag out")


def frozen_model(config: ModelConfig, cfg: DPOConfig, process: common.Process) -> nn.Module:
    """Make a second model of --init's weights that is never trained: the reference of --reference live."""
    model = parallelize(build(config, device="meta").requires_grad_(False), process, cfg)
    lora.load_into(model, cfg.init)
    return model.eval()


# --- 5. pairs where there are none -------------------------------------------------------------------------


@dataclass
class MakeRejectedConfig(Sampling):
    init: str = dataclasses.field(kw_only=True)  # an early SFT checkpoint: its answers are to be worse
    data: str = dataclasses.field(kw_only=True)  # conversations, as of sft.py; commas between files
    # .jsonl to write: {"messages", "chosen", "rejected"}; until it is whole, OUT.tmp has the pairs so far
    out: str = dataclasses.field(kw_only=True)
    # drop pairs that are more alike; 2 x shared pairs of neighbouring characters / those of both (Dice)
    max_similar: float = 0.9
    template: str = ""  # chat template; only where the folder of --init names none
    batch: int = 64  # replies that are sampled together
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = ""  # float32, bfloat16; default: the folder's

    def __post_init__(self):
        super().__post_init__()
        if self.stop or self.num_beams > 1:
            raise ValueError("--stop, --num_beams: a reply is sampled, and ends where its template says")
        if not 0 < self.max_similar <= 1:
            raise ValueError(f"--max_similar {self.max_similar} must lie in (0, 1]")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch} must be at least 1")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"--dtype {self.dtype}: expected float32 or bfloat16")


def make_rejected(config: MakeRejectedConfig) -> None:
    """Make pairs: a conversation's last reply is chosen, what an early checkpoint answers is rejected."""
    out = Path(config.out)
    tmp = out.with_name(out.name + ".tmp")
    for path in (out, tmp):
        if path.exists():
            raise ValueError(f"{path} exists; choose another --out, or rename or remove it")
    check_template(config.init, config.template)
    rows = chat.read_rows(split_names(config.data), "chat")
    device = common.start_process(config.device).device
    dtype = getattr(torch, config.dtype) if config.dtype else None
    model, tokenizer = load(config.init, dtype, device, rows=config.batch)
    tokenizer = tokenizer.with_template(config.template) if config.template else tokenizer
    model.config.eos_token_id = tokenizer.end_ids()  # no other token is the end of a reply
    prompts = encode_questions(model, tokenizer, rows)
    made, dropped = 0, Counter({"too long": len(rows) - len(prompts)})
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(tmp, "w", encoding="utf-8", buffering=1) as file:  # whole lines, as they come
        for i, reply in sample_replies(model, tokenizer, prompts, config):
            pair, why = make_pair(rows[i], reply, config.max_similar)
            if pair:
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                made += 1
            else:
                dropped[why] += 1
    why = ", ".join(f"{count:,} {name}" for name, count in dropped.items() if count)
    if not made:
        tmp.unlink()
        raise ValueError(f"{config.data}: no pair is left of {len(rows)} rows: {why}")
    common.sync(tmp)
    tmp.rename(out)
    print(f"{out}: {made:,} pairs of {len(rows):,} rows; dropped: {why or 'none'}")


def encode_questions(model: Model, tokenizer: Tokenizer, rows: list[dict]) -> dict[int, list[int]]:
    """Encode every row up to its last reply, by row; left out where the context has no room for a reply.

    ValueError, with the row's place: what the template cannot write.
    """
    limit = model.config.limit
    endless = dataclasses.replace(model.config, max_position_embeddings=sys.maxsize)  # refuses no length
    prompts = {i: question_ids(row, tokenizer, endless) for i, row in enumerate(rows)}
    return {i: ids for i, ids in prompts.items() if len(ids) < limit}


def sample_replies(
    model: Model, tokenizer: Tokenizer, prompts: dict[int, list[int]], config: MakeRejectedConfig
) -> Iterator[tuple[int, str | None]]:
    """Sample a reply to every prompt, that of row i with seed + i, short prompts first: (row, reply).

    None: the reply did not come to its end in --max_new_tokens, or in the context.
    """
    limit = model.config.limit
    order = sorted(prompts, key=lambda i: len(prompts[i]))
    common_settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(Sampling)}
    with common.progress(len(order), "sample", " replies") as bar:
        for at in range(0, len(order), config.batch):
            part = order[at : at + config.batch]
            samplings = [Sampling(**{**common_settings, "seed": config.seed + i}) for i in part]
            for i, new in zip(part, generate(model, [prompts[i] for i in part], samplings), strict=True):
                # the end would be one token more, which `generate` has taken off
                ended = len(new) < min(config.max_new_tokens, limit - len(prompts[i]))
                yield i, reply_text(tokenizer, new) if ended else None
            bar.update(len(part))


def reply_text(tokenizer: Tokenizer, new: list[int]) -> str | None:
    """Give the content of a reply without its end; None if it has special tokens, which no text can say."""
    if not tokenizer.special_ids.isdisjoint(new):
        return None
    return tokenizer.chat_template().content(tokenizer.decode(new, at_start=False)).strip()


def make_pair(row: dict, reply: str | None, max_similar: float) -> tuple[dict | None, str]:
    """Make a pair of a conversation and a sampled reply; or None and why it would teach nothing.

    Neither answer keeps white space at its ends: it would tell the two apart.
    """
    *messages, last = row["messages"]
    chosen = last["content"].strip()
    if reply is None:
        return None, "unfinished"
    if not reply or not chosen:
        return None, "empty"
    if reply == chosen:
        return None, "equal"
    if similarity(reply, chosen) > max_similar:
        return None, f"more than {max_similar:g} alike"
    rest = {name: value for name, value in row.items() if name != "where"}
    return {**rest, "messages": messages, "chosen": chosen, "rejected": reply}, ""


def similarity(a: str, b: str) -> float:
    """Dice's coefficient of pairs of neighbouring characters: 2 x those shared / those of both, 0 to 1.

    similarity("小明有三只猫", "小明有两只猫") -> 0.6: three of five pairs are the same.
    """
    if a == b:
        return 1.0
    left, right = (Counter(zip(text, text[1:], strict=False)) for text in (a, b))
    return 2 * (left & right).total() / max(1, left.total() + right.total())


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("-") and sys.argv[1] not in ("-h", "--help"):
        sys.argv.insert(1, "tune")  # the command that needs no name
    common.run(tune, make_rejected, doc=__doc__)
