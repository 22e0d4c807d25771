"""Instruction tuning: go on with the pretraining loss, on conversations, and only on what the assistant says.

    loss = Σ nll over the tokens of all replies, their ends included / their number

A chat template (chat.py) writes a conversation as text and special tokens; of them only the replies and what
ends each are targets. So the model learns to answer and to stop, and never to ask. Conversations are packed
into rows like documents, each sees only itself; --no_packing pads rows of like length instead: each has
the same gradient, fewer tokens fit a second.

    python sft.py --init out/run --data chat.jsonl --template plain --out out/sft --epochs 3 --lr 1e-3
    python sft.py --init out/sft --data more.json,domain/ --out out/sft2     # the folder knows its template
    python sft.py --init out/run --data chat.jsonl --template plain --show 3 # what is trained, in colour
    python sft.py --init out/sft/best --data more.json --out out/sft2        # the step of the lowest val_loss
    python sft.py --init out/run --data chat.jsonl --template plain --out out/adapter --lora --lr 5e-4
    python sft.py --init out/run --data chat.jsonl --template plain --out out/m --lm_mix 0.3 --lm_data out/zh
    torchrun --nproc_per_node 8 sft.py --preset yayi-sft --init yayi-7b --data chat.jsonl --out out/yayi
    python sft.py --resume --out out/sft                                     # goes on exactly

Replies and loss are looked at on held-out rows (--val) at each evaluation, and rows that say how to check an
answer ("check") are counted right or wrong (--test FILE, else the held-out ones). The saved folder knows the
template and where a reply ends: `python generate.py out/sft --ask "…"` needs no flags.

Wei et al. 2022, "Finetuned Language Models Are Zero-Shot Learners"; Ouyang et al. 2022, InstructGPT; Zhang &
Yang 2023, XuanYuan 2.0 (hybrid tuning: --lm_mix); Hu et al. 2021, LoRA (lora.py).
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn

import checkpoint
import common
import lora
import state
from chat import read_rows
from data import (
    IGNORE,
    Batches,
    ChatRows,
    Documents,
    Joined,
    Mixture,
    PaddedBatches,
    RowStream,
    Shards,
    hold_out,
)
from generate import Sampling, answer, checked, exact_matches, question_ids
from model import ModelConfig, build
from parallel import unwrap
from tokenizer import Tokenizer, highlight, load_tokenizer
from train import (
    FitConfig,
    Plan,
    adapter_identity,
    begin,
    count_steps,
    fit,
    next_token_loss,
    open_run,
    plan,
    ready_model,
    validate,
    with_preset,
)

# --- 1. settings -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class SftConfig(FitConfig, lora.LoraConfig):
    out: str = ""  # folder of the run
    data: str = ""  # conversations: .json, .jsonl (.gz, .zst) or folders of them, commas between them
    preset: str = ""  # a published recipe, a name of sft.PRESETS; typed flags win over it
    template: str = ""  # chat template, a name of chat.TEMPLATES; empty: the one that --init names
    too_long: Literal["drop", "cut"] = "drop"  # what does not fit a row: leave out, or cut at whole turns
    packing: bool = True  # several conversations a row; else one, padded, those of like length together
    lm_mix: float = 0.0  # share of all tokens that is plain text of --lm_data, trained whole (hybrid tuning)
    lm_data: str = ""  # folders written by data.py pack with the same tokenizer, commas between them
    val: float | None = None  # hold out: a number, or below 1 a share, 0 none; default: 5 %, at most 2,000
    test: str = ""  # questions whose answers are checked at each evaluation; default: held-out ones
    test_rows: int = 200  # at most so many of them
    sample: str = ""  # questions to answer at each evaluation, | between them; default: two held-out ones
    max_new_tokens: int = 128  # of such an answer
    show: int = 0  # only print so many conversations in colour, by what is trained
    lr: float = 2e-5  # highest learning rate: 1e-5 to 5e-5 for billions of parameters; small ones, LoRA: 5e-4
    final_lr: float = 0.0  # where the schedule ends, as a share of lr
    weight_decay: float = 0.0  # of matrices; norms and biases have none
    epochs: float = 2.0  # passes over the data, if neither --steps nor --tokens is given
    keep_best: bool = True  # save and keep the step of the lowest validation loss, too: OUT/best

    def __post_init__(self):
        FitConfig.__post_init__(self)
        lora.LoraConfig.__post_init__(self)
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"--preset {self.preset}: expected one of {', '.join(PRESETS)}")
        if not 0 <= self.lm_mix < 1:
            raise ValueError(f"--lm_mix {self.lm_mix} must lie in [0, 1): a share of the tokens")
        for name in ("val", "test_rows", "show"):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"--{name} {getattr(self, name)} must not be negative")
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens} must be at least 1")


# What the five systems have published of their tuning. They count rows a step, we count tokens: where the
# length of rows is not published, 512 tokens are taken. XiangXin has published no tuning.
PRESETS = {
    # XVERSE, by LLaMA-Factory: 4 rows x 4 micro-batches x 8 GPUs of 1,024 tokens (its default; not published)
    "xverse-sft": {
        "template": "xverse", "tokens_per_step": 131072, "epochs": 2.0, "lr": 2e-5, "schedule": "cosine",
        "final_lr": 0.0, "clip": 0.5, "beta2": 0.999, "eval_every": 200, "save_every": 200, "log_every": 10,
        "keep_best": True, "shard": "zero2",
    },
    # XuanYuan, llm-code's defaults; not published: the share of hybrid tuning (0.3 here), epochs, rows a step
    "xuanyuan-sft": {
        "template": "xuanyuan-6b", "lm_mix": 0.3, "lr": 5e-5, "schedule": "linear", "final_lr": 0.0,
        "warmup": 0, "weight_decay": 0.01, "clip": 1.0, "beta2": 0.999, "seed": 1234, "shard": "zero2",
    },
    # Phi2-Chinese: 8 rows x 8 micro-batches of at most 320 tokens, of like length; schedule: not published
    "phi2-chinese-sft": {
        "template": "phi2-chinese", "row_tokens": 320, "tokens_per_step": 20480, "packing": False,
        "epochs": 3.0, "lr": 5e-5, "val": 4096.0,
    },
    # YaYi: 8 rows x 8 GPUs, their length is not published; WarmupLR: the rate stays where the warmup ends
    "yayi-sft": {
        "template": "yayi", "tokens_per_step": 32768, "packing": False, "epochs": 2.0, "lr": 5e-6,
        "schedule": "wsd", "final_lr": 1.0, "warmup": 100, "beta2": 0.999, "val": 400.0, "seed": 515,
        "eval_every": 100, "save_every": 100, "keep": 10, "log_every": 1, "activation_checkpointing": True,
        "shard": "zero2",
    },
}  # fmt: skip
_multi = {"template": "yayi-multi", "schedule": "cosine", "final_lr": 0.0}
_lora = {"lora": True, "lora_rank": 16, "lora_alpha": 32.0, "lora_dropout": 0.0, "lr": 5e-4, "shard": "none"}
_lora |= {"lora_target": "query_key_value", "tokens_per_step": 4096}  # one GPU; its LLaMA: q_proj,v_proj
_lora |= {"lora_new_rows": "template"}  # theirs stayed as they were made: the model could not say <|End|>
PRESETS["yayi-multi-sft"] = PRESETS["yayi-sft"] | _multi | {"lr": 5e-7}
PRESETS["yayi-lora"] = PRESETS["yayi-sft"] | _lora
PRESETS["yayi-multi-lora"] = PRESETS["yayi-sft"] | _lora | _multi


# --- 2. what is trained ------------------------------------------------------------------------------------


def start_folder(cfg: FitConfig) -> Path:
    """Find the folder that says tokenizer and shape: --init; on --resume the run's newest undamaged step.

    A step of adapters holds nothing of their base, so with --lora it is always --init.
    """
    if not cfg.init:
        raise ValueError("--init is missing: the model folder or the run to start from")
    own = state.saved_steps(Path(cfg.out)) if cfg.resume else []
    if not cfg.lora:
        for step in reversed(own):
            if not state.damage(step, tensors=False):
                return step
    elif own and not Path(cfg.init).exists():
        raise ValueError(
            f"{cfg.init}: the base of these adapters is not there; put it back, or say where by --init"
        )
    return checkpoint.model_folder(cfg.init)


def start_from(cfg: FitConfig) -> tuple[Tokenizer, ModelConfig]:
    """Read what a run starts from: a tokenizer for the template, and a shape that ends where replies end.

    ValueError: no template is named, neither there nor by --template; it has no language-model head.
    """
    folder = start_folder(cfg)
    tokenizer, config = load_tokenizer(lora.tokenizer_folder(folder)), checkpoint.read_config(folder)
    if config.head != "lm":
        raise ValueError(f"{folder}: tuning needs a language-model head, not {config.head!r}")
    if cfg.template:
        tokenizer = tokenizer.with_template(cfg.template)
    elif tokenizer.template is None:
        raise ValueError(
            f"{folder} names no chat template. Give one, and keep to it: --template plain for a base model "
            "of ours, or the one that this model was tuned with"
        )
    ends = sorted({*config.eos_ids, *tokenizer.end_ids()} - {None})
    eos = ends if len(ends) > 1 else ends[0]
    return tokenizer, dataclasses.replace(config, eos_token_id=eos, dropout=cfg.dropout)


def row_width(cfg: SftConfig, config: ModelConfig) -> int:
    """Give the tokens of a row: --row_tokens or the model's context."""
    context = config.max_position_embeddings
    if cfg.row_tokens > context and config.switches.rope:
        raise ValueError(f"--row_tokens {cfg.row_tokens} exceeds the model's context of {context}")
    return cfg.row_tokens or context


def template_rows(cfg: FitConfig, tokenizer: Tokenizer) -> tuple[FitConfig, list[str]]:
    """Put the chat template's special tokens in the place of `template` in --lora_new_rows, as ids.

    With it comes a warning, as lines, if adapters are trained and the rows of these tokens are not.
    """
    if not cfg.lora:
        return cfg, []
    template = tokenizer.chat_template()
    ids = {tokenizer.template_id(token, template): token for token in template.specials}
    if cfg.lora_new_rows == "template":
        rows = "".join(f"{i}," for i in sorted(ids))  # with a comma even one is an id, not a number of rows
        cfg = dataclasses.replace(cfg, lora_new_rows=rows)
    trained = lora.new_ids(cfg.lora_new_rows, tokenizer.vocab_size)
    left = ", ".join(token for i, token in ids.items() if i not in trained)
    warning = f"warning: the rows of {left} stay as they are in --init. If these tokens are new there, the "
    warning += "model will never learn to write them: --lora_new_rows template trains them"
    return cfg, [warning] if left else []


def split(rows: list[dict], val: float | None) -> tuple[list[dict], list[dict]]:
    """Split rows into (train, held) by --val, as data.hold_out; None: a 20th of them, at most 2,000."""
    try:
        return hold_out(rows, min(len(rows) // 20, 2000) if val is None else val)
    except ValueError as error:
        raise ValueError(f"--val: {error}; 0 holds out none") from None


@dataclass
class Conversations:
    """What there is to train on, and what is held out of it."""

    train: ChatRows
    held: ChatRows | None

    @classmethod
    def read(cls, cfg: SftConfig, tokenizer: Tokenizer, width: int) -> Conversations:
        """Read, split and encode the rows of --data; ValueError names file:line."""
        if not cfg.data:
            raise ValueError("--data is missing: files of conversations, separated by commas")
        rows, held = split(read_rows(split_names(cfg.data)), cfg.val)
        encode = functools.partial(ChatRows, tokenizer=tokenizer, context=width, too_long=cfg.too_long)
        return cls(encode(rows, keep_rows=False), encode(held) if held else None)

    def lines(self, width: int) -> list[str]:
        """Say what was read and what became of it."""
        t, held = self.train, self.held
        parts = [p for p in (t, held) if p is not None]
        dropped, cut, silent = (sum(getattr(p, k) for p in parts) for k in ("dropped", "cut", "untrained"))
        share = t.mask.sum() / t.tokens
        total = sum(map(len, parts)) + dropped + silent
        return [
            f"conversations: {total:,}; dropped {dropped:,} of more than {width} tokens, {silent:,} without "
            f"reply; {cut:,} cut at whole turns; {len(held or []):,} held out",
            f"data: {len(t):,} conversations, {t.tokens:,} tokens, {share:.1%} of them trained",
        ]


def split_names(text: str) -> list[str]:
    """Split "a.jsonl, b/" at its commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


class Hybrid(Joined):
    """Conversations and plain text side by side; batches say which of them a row holds, in `part` (B,)."""

    def complete(self, batch: dict, rows: list) -> dict:
        parts = [bisect.bisect_right(self.first, row[0][0]) - 1 if row else 0 for row in rows]
        return batch | {"part": torch.tensor(parts)}


@dataclass
class Feed:
    """What `fit` is fed with."""

    batches: Batches | PaddedBatches
    documents: Documents
    plan: Plan
    same: dict  # what a resumed run must find unchanged
    said: str  # a line about it

    @property
    def epochs(self) -> dict[str, float]:
        """How many passes over the data the batches so far amount to."""
        stream = self.batches.stream if isinstance(self.batches, Batches) else self.batches
        return stream.epochs()


def packed_stream(cfg: SftConfig, chats: ChatRows, width: int) -> RowStream | Mixture:
    """Make the stream of packed rows: conversations, or with --lm_mix plain text among them."""
    if bool(cfg.lm_mix) != bool(cfg.lm_data):
        raise ValueError(
            "--lm_mix (a share of the tokens) and --lm_data (packed folders) go together; --lm_mix 0: no text"
        )
    if not cfg.lm_mix:
        return RowStream(chats, width, cfg.seed)
    both = Hybrid({"chat": chats, "lm": Shards(split_names(cfg.lm_data), "train")})
    return Mixture(both, width, cfg.seed, {"chat": 1 - cfg.lm_mix, "lm": cfg.lm_mix})


def filled(stream: RowStream | Mixture, rows: int = 300) -> float:
    """Measure which share of a row's positions is filled, over the next rows, without taking them."""
    before = stream.state()
    tokens = sum(count for _ in range(rows) for _, _, count in next(stream))
    stream.load_state(before)
    return tokens / (rows * stream.row)


def packed(cfg: SftConfig, chats: ChatRows, width: int, process: common.Process) -> Feed:
    """Feed rows that hold several conversations each."""
    stream = packed_stream(cfg, chats, width)
    full = filled(stream)
    p = plan(cfg, width, chats.tokens / (1 - cfg.lm_mix) / full, process.world)
    batches = Batches(stream, p.rows_per_step, p.micro_rows, process.rank, process.world)
    same = {"row_tokens": width, "rows_per_step": p.rows_per_step, "packing": True}
    same["mixture"] = stream.weights if cfg.lm_mix else None
    passes = p.tokens * full * (1 - cfg.lm_mix) / chats.tokens
    said = f"training: {p.steps:,} steps x {p.rows_per_step} rows x {width} tokens, {full:.1%} of them filled"
    return Feed(batches, stream.shards, p, same, f"{said} = {passes:.2f} epochs")


def padded(cfg: SftConfig, chats: ChatRows, process: common.Process) -> Feed:
    """Feed rows of one conversation each, those of like length together."""
    if cfg.lm_mix:
        raise ValueError("--lm_mix needs packing; leave out --no_packing, or --lm_mix")
    batches = PaddedBatches(
        chats, cfg.tokens_per_step, cfg.micro_tokens, cfg.seed, process.rank, process.world
    )
    steps = count_steps(cfg, cfg.tokens / cfg.tokens_per_step if cfg.tokens else batches.steps(cfg.epochs))
    rows = (max(1, n // chats.longest) for n in (cfg.tokens_per_step, batches.room))
    same = {"packing": {"tokens_per_step": cfg.tokens_per_step, "micro_tokens": cfg.micro_tokens}}
    said = f"training: {steps:,} steps of at most {cfg.tokens_per_step:,} tokens, padding included"
    return Feed(batches, chats, Plan(chats.longest, *rows, steps), same, said)


def tuning_loss(model: nn.Module, batch: dict, parts: Sequence[str] = ()) -> tuple:
    """Sum the nll of all trained tokens; log their share of all positions, and where text is mixed in whose.

    tokens_per_second / trained_share: the positions that are computed in a second.
    """
    value, count, logs = next_token_loss(model, batch)
    logs["trained_share"] = (count, batch["ids"].numel())
    trained = (batch["targets"] != IGNORE).sum(1)  # (B,)
    for n, name in enumerate(parts):
        logs[f"tokens/{name}"] = (trained[batch["part"] == n].sum(), 0)  # over 0: a sum is logged, no mean
    return value, count, logs


# --- 3. looking --------------------------------------------------------------------------------------------


class Evaluation:
    """What tuning looks at between steps: held-out loss, how many answers are right, and some answers."""

    def __init__(
        self,
        held: ChatRows | None,
        feed: Feed,
        cfg: SftConfig,
        tokenizer: Tokenizer,
        config: ModelConfig,
        process: common.Process,
    ):
        self.held, self.feed, self.cfg, self.tokenizer, self.process = held, feed, cfg, tokenizer, process
        rows = held.rows if held else []
        tests = read_rows(split_names(cfg.test), "questions") if cfg.test else rows
        tests = [row for row in tests if checked(row)]
        if cfg.test and not tests:
            raise ValueError(f'--test {cfg.test}: no row has a "check", what a right answer must hold')
        n = min(len(tests), cfg.test_rows)
        self.tests = [tests[i * len(tests) // n] for i in range(n)]  # from all of the file
        asked = [text.strip() for text in cfg.sample.split("|") if text.strip()]
        samples = [{"messages": [{"role": "user", "content": text}], "where": "--sample"} for text in asked]
        self.samples = samples or rows[:2]
        for row in self.tests + self.samples:
            question_ids(row, tokenizer, config)  # refuses what cannot be asked

    def __call__(self, model: nn.Module, poll: Callable[[], None]) -> dict:
        """Evaluate, on all ranks."""
        out = {}
        if self.held:
            width = max(self.feed.plan.row_tokens, self.held.longest)
            rows = max(1, self.cfg.micro_tokens // width)
            out, _ = validate(model, self.held, width, rows, self.process, poll)
            out["perplexity"] = math.exp(min(out["val_loss"], 700))
        out |= self.feed.epochs
        sampling = Sampling(max_new_tokens=self.cfg.max_new_tokens, temperature=0)
        reply = functools.partial(answer, unwrap(model), self.tokenizer, sampling=sampling)
        with torch.compiler.set_stance("force_eager"):  # each length of the cache would compile anew
            if self.tests:
                out |= self.right_answers(reply, poll)
            if self.samples:
                pairs = zip(map(last_question, self.samples), reply(self.samples), strict=True)
                out["sample"] = " | ".join(" ".join(f"{asked} -> {said}".split()) for asked, said in pairs)
        return out

    def right_answers(self, reply: Callable, poll: Callable[[], None], batch: int = 64) -> dict:
        """Answer all test questions; give the share of right answers, in all and by kind."""
        # every token of a sharded model is computed by all ranks together; else each answers its share
        ranks = self.process.world if self.cfg.shard == "none" else 1
        counts: dict[str, tuple[int, int]] = {}
        for at in range(0, len(self.tests), ranks * batch):
            poll()
            mine = self.tests[at + self.process.rank % ranks : at + ranks * batch : ranks]
            for found in checkpoint.gather(exact_matches(mine, reply(mine)))[:ranks]:
                for kind, (right, asked) in found.items():
                    before = counts.get(kind, (0, 0))
                    counts[kind] = before[0] + right, before[1] + asked
        right, asked = (sum(column) for column in zip(*counts.values(), strict=True))
        each = {f"exact_match/{kind}": a / b for kind, (a, b) in sorted(counts.items()) if len(counts) > 1}
        return {"exact_match": right / asked, **each}


def last_question(row: dict) -> str:
    """Give what the user of a conversation said last."""
    return [m["content"] for m in row["messages"] if m["role"] == "user"][-1]


def show(cfg: SftConfig) -> None:
    """Print conversations in colour by what is trained, and how full packed rows are."""
    tokenizer, config = start_from(cfg)
    width = row_width(cfg, config)
    chats = Conversations.read(cfg, tokenizer, width)
    for i in range(min(cfg.show, len(chats.train))):
        ids, mask = (part(i, 0, width).tolist() for part in (chats.train.read, chats.train.trained))
        print(f"--- {chats.train.rows[i]['where']}: {len(ids)} tokens, {sum(mask)} trained")
        print(highlight(tokenizer, ids, mask))
    for line in chats.lines(width):
        print(line)
    if cfg.packing:
        full = filled(packed_stream(cfg, chats.train, width))
        print(f"packing: {full:.1%} of the positions of rows of {width} tokens are filled")


# --- 4. tuning ---------------------------------------------------------------------------------------------


def main(cfg: SftConfig) -> None:
    """Tune a model on conversations."""
    if not cfg.resume:
        cfg = with_preset(cfg, PRESETS)
    if cfg.show:
        show(cfg)
        return
    if not cfg.out:
        raise ValueError("--out is missing: the folder of the run")
    cfg, process = begin(cfg)
    common.finish_process(tune(cfg, process))


def tune(cfg: SftConfig, process: common.Process) -> int:
    """Do what the settings say with the ranks that have met; return the exit code."""
    tokenizer, config = start_from(cfg)
    if cfg.lora and not cfg.resume:  # where --init is a run, a later step of it is another base
        cfg = dataclasses.replace(cfg, init=str(checkpoint.model_folder(cfg.init)))
    cfg, warning = template_rows(cfg, tokenizer)
    width = row_width(cfg, config)
    chats = Conversations.read(cfg, tokenizer, width)
    feed = packed(cfg, chats.train, width, process) if cfg.packing else padded(cfg, chats.train, process)
    evaluate = Evaluation(chats.held, feed, cfg, tokenizer, config, process)
    model = build(config, device="meta")
    if cfg.lora:
        lora.attach(model, cfg, tokenizer.vocab_size)
    settings, card = open_run(
        cfg,
        process,
        model,
        feed.plan,
        [*chats.lines(width), feed.said, *warning],
        stage="instruction tuning",
        data={f"{cfg.data}{f' and {cfg.lm_data}' if cfg.lm_mix else ''}": feed.documents.fingerprint},
        tokenizer=tokenizer.digest,
        template=tokenizer.template,
        alignment=f"instruction tuning on {len(chats.train):,} conversations; no preferences, no safety",
    )
    identity = {"data": feed.documents.fingerprint, "template": tokenizer.template, "seed": cfg.seed}
    identity |= {"model": dataclasses.asdict(config), "optimizer": cfg.optimizer, **feed.same}
    if cfg.lora:
        identity |= adapter_identity(cfg, process)
    model = ready_model(model, cfg, process, tokenizer.vocab_size)
    return fit(
        model,
        feed.batches,
        cfg,
        functools.partial(tuning_loss, parts=tuple(feed.documents.sources) if cfg.lm_mix else ()),
        evaluate,
        steps=feed.plan.steps,
        process=process,
        identity=identity,
        settings=settings,
        card=card,
        tokenizer=tokenizer,
    )


if __name__ == "__main__":
    common.run(main, doc=__doc__)
