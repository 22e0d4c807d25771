"""Let a model write: load a folder, sample token after token, stream text.

    probs = softmax(logits / temperature), cut to the top_k most likely tokens, then to the smallest set whose
    probability exceeds top_p;   next token ~ probs   (temperature 0: the most likely one, "greedy")

Small pieces: `apply_rules`, `logits_to_probs`, `sample`; `prefill` reads all prompts at once (rows of unequal
length, padded on the right; what they begin with alike only once), and `decode`, the loop behind everything
but beams, adds one token a row and step. Each row has its own random generator, so its text does not depend
on what else is in the batch, but for rounding.

At load a model is rearranged for speed (inference.py); a single row on a CPU has a decoding step of its own,
and --compile makes one graph of a step.

    python generate.py out/run --prompt "大家都知道，"
    python generate.py out/run --file prompts.txt --no_echo --temperature 0 --num_beams 4
    python generate.py out/run --score texts.txt                 # how likely the model holds each line
    python generate.py out/sft --ask "林小雨住在哪里？"           # one question, through the chat template
    python generate.py out/sft --questions heldout.jsonl         # all of a file; how many answers are right
    python generate.py out/sft                      # a conversation; of a base model: continue what is typed

Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p); Fan et al. 2018 (top-k);
Nguyen et al. 2024, "Turning Up the Heat" (min-p).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

import chat
import common
import kernels
import lora
from checkpoint import base_folder, model_folder, read_object
from inference import fuse, steps, weight_bytes
from model import KVCache, Model, ModelConfig
from tokenizer import Tokenizer, load_tokenizer

# --- 1. loading --------------------------------------------------------------------------------------------


def load(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    rows: int = 1,
    compiled: bool = False,
) -> tuple[Model, Tokenizer]:
    """Load a model folder, an adapter folder (with its base, merged) or a run's latest step, ready to write.

    dtype None: the folder's own, or fp32 where the machine has no fast bf16. rows: how many texts will be
    written at a time; any number works, but the weights' layout is chosen for one or for several. compiled:
    decoding steps are compiled when they are first used, for minutes (inference.CompiledSteps).
    """
    if compiled and device == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise ValueError("--compile needs a C++ compiler: install g++, or name one in the variable CXX")
    folder = model_folder(folder)
    model = lora.load_model(folder, dtype, device)
    if dtype is None and common.best_dtype(device) == torch.float32:
        model.float()
    if model.config.head != "lm":
        raise ValueError(f"{folder}: a model without a language-model head cannot write")
    tokenizer = load_tokenizer(lora.tokenizer_folder(folder))
    check_vocabulary(folder, tokenizer, model.config)
    model.known_vocab = tokenizer.vocab_size
    if (said := _generation_settings(folder).get("eos_token_id")) is not None:
        model.config.eos_token_id = said  # as in transformers it wins over config.json
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_id
    return fuse(model, rows, compiled), tokenizer


def check_vocabulary(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Refuse a tokenizer with more tokens than the model's table has rows (ValueError)."""
    have, need = config.vocab_size, tokenizer.vocab_size
    if need > have:
        raise ValueError(f"{folder}: the tokenizer has {need} tokens, the model only {have}")


# --- 2. choosing a token -----------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How to choose tokens, and when to stop. The rules apply in the order of `sample` below."""

    max_new_tokens: int = 256  # stop after so many
    temperature: float = 1.0  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this
    min_p: float = 0.0  # drop tokens that are less likely than this share of the likeliest; 0: none
    repetition_penalty: float = 1.0  # above 1: what prompt or text hold already becomes less likely
    no_repeat_ngram_size: int = 0  # never write n tokens that stand there already in this order; 0: no rule
    stop: tuple[str, ...] = ()  # each of these ends a text, and is not part of it
    num_beams: int = 1  # keep so many of the likeliest texts at a time, and take the best (temperature 0)
    length_penalty: float = 1.0  # a beam scores log-probability / length^this: above 0 longer texts win
    early_stopping: bool = False  # end with num_beams ended texts, although one might become better
    seed: int = 0  # of the random numbers
    ignore_eos: bool = False  # go on after the end of a text

    def __post_init__(self):
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for name, good, must in (
            ("max_new_tokens", self.max_new_tokens >= 1, "be at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "not be negative, nor inf or nan"),
            ("top_k", self.top_k >= 0, "not be negative"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "lie in [0, 1]"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "be a number above 0"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "not be negative"),
            ("stop", all(self.stop), "hold no empty text"),
            ("num_beams", self.num_beams >= 1, "be at least 1"),
            ("length_penalty", math.isfinite(self.length_penalty), "be a finite number"),
        ):
            if not good:
                raise ValueError(f"--{name} {getattr(self, name)} must {must}")

    def check_beams(self) -> None:
        """Refuse what a beam search cannot do (ValueError)."""
        if self.num_beams > 1 and (self.temperature or self.stop):
            raise ValueError("--num_beams above 1 needs --temperature 0, and knows no --stop")

    @property
    def rules(self) -> bool:
        """Tell whether the logits depend on the text so far in another way than through the model."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


def apply_rules(logits: torch.Tensor, ids: Sequence[int], sampling: Sampling) -> torch.Tensor:
    """Change one row of logits (V,) by what the text so far, prompt included, holds: a new tensor.

    repetition_penalty p: positive logits of tokens that stand there are divided by p, negative ones
    multiplied (Keskar et al. 2019, "CTRL", section 4.1). no_repeat_ngram_size n: a token that would complete
    n tokens which stand there becomes impossible (Paulus et al. 2017, section 2.5).
    """
    p, n = sampling.repetition_penalty, sampling.no_repeat_ngram_size
    logits = logits.to(torch.float32, copy=True)
    if p != 1:
        seen = torch.tensor(ids, dtype=torch.long).unique()
        values = logits[seen]
        logits[seen] = torch.where(values < 0, values * p, values / p)
    if n > 0:
        ids = list(ids)
        last = ids[len(ids) - n + 1 :] if len(ids) >= n else None
        logits[[ids[i + n - 1] for i in range(len(ids) - n + 1) if ids[i : i + n - 1] == last]] = -math.inf
    return logits


def logits_to_probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Turn one row of logits (V,) into the probabilities (V,) to sample from; temperature > 0.

    top_k, top_p and min_p in this order, each on the probabilities that the one before has left.
    """
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        kth = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort()  # the least likely first; the last one always stays
        drop = ordered.softmax(-1).cumsum(-1)[:-1] <= 1 - sampling.top_p
        logits = logits.index_fill(0, index[:-1][drop], -math.inf)
    if sampling.min_p > 0:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < sampling.min_p * probs.max(), -math.inf)
    return logits.softmax(-1)


def sample(
    logits: torch.Tensor, sampling: Sampling, generator: torch.Generator, ids: Sequence[int] = ()
) -> int:
    """Choose the next token of a text `ids` from one row of logits (V,).

    The order is transformers': repetition penalty, no repeated n-gram, temperature, top_k, top_p, min_p.
    """
    if sampling.rules:
        logits = apply_rules(logits, ids, sampling)
    if sampling.temperature == 0:
        return int(logits.max(-1).indices)  # argmax takes 2.5 times as long on a CPU
    return int(torch.multinomial(logits_to_probs(logits, sampling), 1, generator=generator))


# --- 3. decoding -------------------------------------------------------------------------------------------


@dataclass
class Prefix:
    """What the cache holds of a text that prompts begin with, so that it is computed only once."""

    ids: list[int] = dataclasses.field(default_factory=list)  # the text
    cache: KVCache | None = None  # one row, which begins with it

    def known(self, prompts: Sequence[Sequence[int]]) -> int:
        """Count the first tokens of all prompts that need not be computed; a prompt's last one always is.

        0 where they are few beside the rest: with a cache that holds something attention needs a mask, which
        costs more than computing these few again.
        """
        most = min(len(p) for p in prompts) - 1
        same = min(_alike(self.ids[:most], prompt) for prompt in prompts)
        return same if 4 * same >= max(map(len, prompts)) - same else 0


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def room(model: Model, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> list[int]:
    """Count the new tokens that each prompt may get: no text of a RoPE model exceeds its context.

    ValueError: no prompt, a prompt that is empty.
    """
    if not all(prompts):
        raise ValueError("a prompt is empty, and this tokenizer has no beginning-of-text token to start from")
    return [
        min(s.max_new_tokens, model.config.limit - len(p)) for s, p in zip(samplings, prompts, strict=True)
    ]


def prefill(
    model: Model, prompts: Sequence[Sequence[int]], new: int, prefix: Prefix | None = None
) -> tuple[torch.Tensor, KVCache]:
    """Read all prompts at once: the logits (B, V) that follow, and the cache, with room for `new` tokens.

    prefix: what is known of the prompts' first tokens. Several prompts without one get it here, if they begin
    alike. ValueError if a prompt exceeds a RoPE model's context.
    """
    B, longest = len(prompts), max(map(len, prompts))
    table = model.embed_tokens.weight
    offloaded = hasattr(table, "device_mesh")  # FSDP2's rows may lie in main memory
    device = table.device_mesh.device_type if offloaded else table.device
    dtype = model.compute_dtype or table.dtype
    if prefix is None and B > 1:
        prefix = Prefix(list(prompts[0][: min(_alike(prompts[0], prompt) for prompt in prompts)]))
    known = prefix.known(prompts) if prefix else 0
    if known and prefix.cache is None:
        _, prefix.cache = prefill(model, [prefix.ids[:known]], 0)
    cache = KVCache(model.config, B, max(longest, min(model.config.limit, longest + new)), dtype, device)
    if known:
        cache.k[:, :, :, :known] = prefix.cache.k[:, :1, :, :known]
        cache.v[:, :, :, :known] = prefix.cache.v[:, :1, :, :known]
        cache.lengths += known
    ids = torch.zeros(B, longest - known, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt) - known] = torch.tensor(prompt[known:])
    num_new = torch.tensor([len(p) - known for p in prompts], device=device)
    return model(ids.to(device), cache=cache, num_new=num_new, last=True), cache


@torch.inference_mode()
def decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    ends: Callable[[int, int], bool] | None = None,
    prefix: Prefix | None = None,
) -> Iterator[list[int | None]]:
    """Yield one new token per row and step, None for a row that has ended; a row's last token may be EOS.

    prompts: B lists of ids, of any lengths ≥ 1. ends(row, token): whether the row ends with this token,
    besides EOS. prefix: first tokens that are known already; with one prompt it is left holding all that this
    text has become, so that the next prompt of a conversation costs only what is new of it.
    ValueError if a prompt exceeds a RoPE model's context; such a model stops where its context ends.
    """
    samplings = _each(sampling, prompts)
    if not prompts:
        return
    left = room(model, prompts, samplings)
    logits, cache = prefill(model, prompts, max(s.max_new_tokens for s in samplings), prefix)
    generators = [torch.Generator().manual_seed(s.seed) for s in samplings]
    texts, held = [list(p) for p in prompts], 0  # held: how much of the first text is in the cache
    eos, device = model.config.eos_ids, cache.lengths.device
    plain = all(s.temperature == 0 and not s.rules for s in samplings)
    step = steps(model, len(prompts))
    try:
        while True:
            held = len(texts[0])
            logits[:, model.known_vocab :] = -math.inf  # rows of the table beyond the tokenizer have no text
            chosen = logits.max(-1).indices.tolist() if plain else logits.cpu()
            tokens: list[int | None] = []
            for b, s in enumerate(samplings):
                token = None
                if left[b] > 0:
                    token = chosen[b] if plain else sample(chosen[b], s, generators[b], texts[b])
                    texts[b].append(token)
                    left[b] -= 1
                    if (token in eos and not s.ignore_eos) or (ends and ends(b, token)):
                        left[b] = 0
                tokens.append(token)
            if all(t is None for t in tokens):
                return
            yield tokens
            if not any(n > 0 for n in left):
                return
            ids = torch.tensor([t or 0 for t in tokens], device=device)
            num_new = torch.tensor([int(n > 0) for n in left], device=device)
            # an ended row idles at 0, so it cannot run past the cache
            cache.lengths = cache.lengths * num_new
            logits = step(ids, num_new, cache)
    finally:
        if prefix is not None and len(prompts) == 1:
            prefix.ids, prefix.cache = texts[0][:held], cache


def _each(sampling: Sampling | Sequence[Sampling], prompts: Sequence) -> list[Sampling]:
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    assert len(samplings) == len(prompts)
    return samplings


class Beams:
    """The beam search of one prompt: the K likeliest texts so far, and the K best of those that have ended.

    A text scores log p(text | prompt) / length^length_penalty, its EOS counted. Each step all K·V ways to go
    on are ranked; of the first K those that end are kept, of the rest the K likeliest go on. It is over when
    no running text can beat the worst one kept, as far as its score at its present length tells; with
    early_stopping, when K are kept. (As in transformers; Wu et al. 2016, section 7.)
    """

    def __init__(self, prompt: Sequence[int], sampling: Sampling, most: int, eos: Sequence[int]):
        K = sampling.num_beams
        self.prompt, self.sampling, self.most, self.eos = list(prompt), sampling, most, eos
        self.texts: list[list[int]] = [[] for _ in range(K)]  # the new tokens
        self.scores = torch.tensor([0.0] + [-1e9] * (K - 1))  # at first all are alike: only one counts
        self.done: list[tuple[float, list[int]]] = []  # the best first
        self.over = most < 1

    def advance(self, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Take the logits (K, V) after every running text; tell which texts go on, and by which tokens."""
        s, (K, V) = self.sampling, logits.shape
        logp = logits.float().log_softmax(-1)
        if s.rules:
            logp = torch.stack([apply_rules(p, self.prompt + t, s) for p, t in zip(logp, self.texts)])
        ways = (logp + self.scores[:, None]).flatten()
        ranked = ways.topk(min(max(2, 1 + len(self.eos)) * K, len(ways)))  # K of them go on, whatever ends
        length = len(self.texts[0]) + 1
        values, parents, tokens = ranked.values, (ranked.indices // V).tolist(), (ranked.indices % V).tolist()
        ended = [length == self.most or (t in self.eos and not s.ignore_eos) for t in tokens]
        if not (s.early_stopping and len(self.done) == K):
            for i in range(K):
                if ended[i]:
                    score = float(values[i]) / length**s.length_penalty
                    self.done.append((score, self.texts[parents[i]] + [tokens[i]]))
            self.done = sorted(self.done, key=lambda pair: -pair[0])[:K]
        running = (values - 1e9 * torch.tensor(ended)).topk(K)
        parents = [parents[i] for i in running.indices]
        tokens = [tokens[i] for i in running.indices]
        self.scores = running.values
        self.texts = [self.texts[p] + [t] for p, t in zip(parents, tokens)]
        full = len(self.done) == K
        hopeless = full and float(self.scores[0]) / length**s.length_penalty <= self.done[-1][0]
        self.over = all(ended) or hopeless or (full and s.early_stopping)
        return parents, tokens

    def best(self) -> list[int]:
        """Give the new tokens of the best text, EOS included."""
        return self.done[0][1] if self.done else []


@torch.inference_mode()
def beam_search(
    model: Model, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]
) -> list[list[int]]:
    """Continue every prompt by the best of its beams; all have the same num_beams. Errors: as decode."""
    K = samplings[0].num_beams
    for s in samplings:
        s.check_beams()
        if s.num_beams != K:
            raise ValueError(f"num_beams must be the same for all prompts, not {K} and {s.num_beams}")
    left = room(model, prompts, samplings)
    logits, cache = prefill(model, prompts, max(s.max_new_tokens for s in samplings))
    device = cache.lengths.device
    searches = [Beams(p, s, n, model.config.eos_ids) for p, s, n in zip(prompts, samplings, left)]
    rows = torch.arange(len(prompts), device=device).repeat_interleave(K)
    cache.take(rows)
    logits = logits[rows]  # (B·K, V)
    step = steps(model, len(rows))
    while True:
        logits[:, model.known_vocab :] = -math.inf
        rows, tokens = list(range(len(logits))), [0] * len(logits)
        for b, search in enumerate(searches):
            if not search.over:
                parents, tokens[b * K : b * K + K] = search.advance(logits[b * K : b * K + K].cpu())
                rows[b * K : b * K + K] = [b * K + p for p in parents]
        if all(search.over for search in searches):
            return [search.best() for search in searches]
        if rows != list(range(len(rows))):
            cache.take(torch.tensor(rows, device=device))
        goes = torch.tensor([int(not search.over) for search in searches], device=device).repeat_interleave(K)
        cache.lengths = cache.lengths * goes  # the rows of a search that is over idle at 0
        logits = step(torch.tensor(tokens, device=device), goes, cache)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    tokenizer: Tokenizer | None = None,
    prefix: Prefix | None = None,
    lead: str = "",
) -> list[list[int]]:
    """Continue every prompt (lists of ids); return the new tokens of each, without the EOS that ended it.

    One Sampling for all, or one per prompt, each with its own seed. Where a Sampling has stop texts, the
    tokenizer finds them behind the `lead` (see Writer), and the tokens that spell one are returned, too:
    `complete` gives what precedes it. ValueError: as decode; beams that differ, sample, or have stop texts.
    """
    samplings = _each(sampling, prompts)
    if any(s.num_beams > 1 for s in samplings):
        out = beam_search(model, prompts, samplings) if prompts else []
    else:
        ends = _stopper(tokenizer, samplings, lead)
        out = [[] for _ in prompts]
        for tokens in decode(model, prompts, samplings, ends, prefix):
            for row, token in zip(out, tokens, strict=True):
                if token is not None:
                    row.append(token)
    eos = model.config.eos_ids
    return [r[:-1] if r and r[-1] in eos and not s.ignore_eos else r for r, s in zip(out, samplings)]


def _stopper(
    tokenizer: Tokenizer | None, samplings: list[Sampling], lead: str
) -> Callable[[int, int], bool] | None:
    """Find stop texts in what the rows write."""
    if not any(s.stop for s in samplings):
        return None
    if tokenizer is None:
        raise ValueError("stop texts are found with the tokenizer; give it")
    writers = [Writer(tokenizer, s.stop, lead) for s in samplings]

    def ends(row: int, token: int) -> bool:
        writers[row].push(token)
        return writers[row].ended

    return ends


class Writer:
    """The text of one row as far as it is certain: without its lead, and only up to the first stop text.

    What may be the beginning of a stop text, and of a character, is held back, so that one is found wherever
    its tokens begin and end. A stop text that is a special token's name means that token. lead: what a chat
    template writes before a reply (a line break, a space).
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), lead: str = ""):
        self.decoder, self.stop, self.lead = tokenizer.stream(at_start=False), stop, lead
        self.stop_ids = {tokenizer.special_id[text] for text in stop if text in tokenizer.special_id}
        self.held, self.ended = "", False

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain, often one piece, sometimes ""."""
        if token in self.stop_ids and not self.ended:
            text = self.flush()
            self.ended = True
            return text
        return self._add(self.decoder.push(token))

    def flush(self) -> str:
        """Return what was held back, when no token follows."""
        text = self._add(self.decoder.flush()) + self.held
        self.held = ""
        return text

    def _add(self, text: str) -> str:
        if self.ended:
            return ""
        text, self.held = self.held + text, ""
        if self.lead:
            if len(text) < len(self.lead) and self.lead.startswith(text):
                self.held = text
                return ""
            text, self.lead = text.removeprefix(self.lead), ""
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.ended = True
            return text[: min(found)]
        sizes = [n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])]
        keep = len(text) - max(sizes, default=0)
        self.held = text[keep:]
        return text[:keep]


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    prefix: Prefix | None = None,
    lead: str = "",
) -> list[str]:
    """Continue every prompt as `generate`, but return texts: behind the lead, up to the first stop text."""
    samplings, texts = _each(sampling, prompts), []
    for new, s in zip(generate(model, prompts, samplings, tokenizer, prefix, lead), samplings):
        writer = Writer(tokenizer, s.stop, lead)
        texts.append("".join(writer.push(token) for token in new) + writer.flush())
    return texts


def stream(
    model: Model,
    tokenizer: Tokenizer,
    prompt: list[int],
    sampling: Sampling,
    prefix: Prefix | None = None,
    lead: str = "",
) -> Iterator[str]:
    """Yield the continuation of one prompt as text, whole characters as soon as they are complete.

    The text of beams cannot be streamed: it comes at once, when it is done, and leaves nothing in the prefix.
    """
    if sampling.num_beams > 1:
        yield complete(model, tokenizer, [prompt], sampling, lead=lead)[0]
        return
    writer = Writer(tokenizer, sampling.stop, lead)
    for (token,) in decode(model, [prompt], sampling, prefix=prefix):
        if token is not None and (token not in model.config.eos_ids or sampling.ignore_eos):
            yield writer.push(token)
        if writer.ended:
            return
    yield writer.flush()


@torch.inference_mode()
def score(model: Model, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Give the negative log-likelihood, in nats, of each token after a row's first: (len(row) − 1,) fp32."""
    device, longest = model.embed_tokens.weight.device, max(map(len, rows), default=0)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    targets = torch.full((len(rows), longest), -100)
    for b, row in enumerate(rows):  # what stands behind a row's end is seen by none of its tokens
        ids[b, : len(row)] = torch.tensor(row, dtype=torch.long)
        targets[b, : max(0, len(row) - 1)] = ids[b, 1 : len(row)]
    nll = model(ids[:, :-1].to(device), targets[:, :-1].to(device))
    return [nll[b, : max(0, len(row) - 1)] for b, row in enumerate(rows)]


# --- 4. questions and answers -------------------------------------------------------------------------------


def stop_at_reply_end(model: Model, tokenizer: Tokenizer, template: str | None = None) -> None:
    """Let what ends a reply under the chat template end a text, besides what ends one already."""
    model.config.eos_token_id = sorted({*model.config.eos_ids, *tokenizer.end_ids(template)})


def question_ids(
    row: dict, tokenizer: Tokenizer, config: ModelConfig, template: str | None = None
) -> list[int]:
    """Encode a row of chat.read_rows up to where the last reply begins; a reply that is there is left out.

    template None: the tokenizer's own. ValueError, with the row's place: what the template cannot write; no
    room for a reply in a RoPE model's context.
    """
    where, context = row.get("where", "a question"), config.max_position_embeddings
    messages = row["messages"]
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    try:
        ids, _ = tokenizer.encode_chat(messages, open_reply=True, template=template)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if config.switches.rope and len(ids) >= context:
        raise ValueError(f"{where}: {len(ids)} tokens leave no room in the model's context of {context}")
    return ids


def answer(
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[dict],
    sampling: Sampling,
    batch: int = 64,
    template: str | None = None,
) -> list[str]:
    """Answer the last question of every row of chat.read_rows, `batch` rows of like length at a time.

    ValueError as question_ids.
    """
    written = tokenizer.chat_template(template)
    prompts = [question_ids(row, tokenizer, model.config, template) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    replies = [""] * len(rows)
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        for i, text in zip(
            part, complete(model, tokenizer, [prompts[i] for i in part], sampling, lead=written.lead)
        ):
            replies[i] = written.content(text).strip()
    return replies


NUMERAL = "0-9零一二三四五六七八九十百千万亿两"


def exact_match(reply: str, check: str) -> bool:
    """Tell whether a reply holds the checked answer as a whole, full and half width (１２, 12) alike.

    12 is not in 112, 12.5 or -12, nor 十二 in 二十二. That the reply says nothing else is not asked.
    """
    reply, check = (unicodedata.normalize("NFKC", text).strip() for text in (reply, check))
    before = rf"(?<![{NUMERAL}])(?<![0-9][.,])(?<!-)" if re.match(f"[{NUMERAL}]", check) else ""
    after = rf"(?![{NUMERAL}])(?![.,][0-9])" if re.search(f"[{NUMERAL}]$", check) else ""
    return re.search(f"{before}{re.escape(check)}{after}", reply) is not None


def checked(row: dict) -> str:
    """Give what a right answer to a row must hold: its "check", a text or a number; "" if it says none."""
    check = row.get("check")
    return str(check).strip() if isinstance(check, str | int | float) and check is not True else ""


def exact_matches(rows: Sequence[dict], replies: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Count right answers by the rows' "kind": {kind: (right, asked)}; rows without "check" are left out."""
    counts: dict[str, tuple[int, int]] = {}
    for row, reply in zip(rows, replies, strict=True):
        if check := checked(row):
            kind = str(row.get("kind", "all"))
            right, asked = counts.get(kind, (0, 0))
            counts[kind] = right + exact_match(reply, check), asked + 1
    return counts


# --- 5. conversations ---------------------------------------------------------------------------------------


def fit_history(
    messages: list[dict], tokenizer: Tokenizer, most: int, template: str | None = None
) -> list[dict]:
    """Shorten a conversation that ends with a user's turn to at most `most` tokens, its open reply included.

    The oldest turns go first, each whole (what a user said and all that followed), the system message never;
    if the newest turn is too long by itself, its end is cut off. ValueError: not even an empty one fits.
    """

    def length(part: list[dict]) -> int:
        return len(tokenizer.encode_chat(part, open_reply=True, template=template)[0])

    system = messages[:1] if messages[0]["role"] == "system" else []
    turns: list[list[dict]] = []
    for message in messages[len(system) :]:
        if message["role"] == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    while len(turns) > 1 and length(system + sum(turns, [])) > most:
        turns.pop(0)
    kept = system + sum(turns, [])
    if length(kept) <= most:
        return kept
    *before, newest = kept
    low, high = 0, len(newest["content"])  # so many characters fit, so many do not
    while high - low > 1:
        middle = (low + high) // 2
        fits = length([*before, newest | {"content": newest["content"][:middle]}]) <= most
        low, high = (middle, high) if fits else (low, middle)
    if not low:
        raise ValueError(f"the system message leaves no room for a question in {most} tokens")
    return [*before, newest | {"content": newest["content"][:low]}]


class Chat:
    """A conversation with a model: its history, and the cache of what has been read and said.

    Of each prompt only what is new is computed, as long as no turn had to be dropped: the history is
    shortened (`fit_history`) where it would leave the reply less than max_new_tokens, or half of the context
    if that is less; `note` says so. Each reply has a seed of its own, one more than the last.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, sampling: Sampling, template: str | None = None):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.template, self.lead = template, tokenizer.chat_template(template).lead
        context = model.config.max_position_embeddings
        self.most = max(context - sampling.max_new_tokens, context // 2)
        self.messages: list[dict] = []
        self.note = ""  # what the last reply did not see, or why it was not kept
        self.prefix = Prefix()
        stop_at_reply_end(model, tokenizer, template)

    def reset(self, system: str | None = None) -> None:
        """Forget what was said, but not the system message, unless another one (or "") is given."""
        if system is None:
            self.messages = [m for m in self.messages if m["role"] == "system"]
        else:
            self.messages = [{"role": "system", "content": system}] if system else []

    def reply(self, text: str) -> Iterator[str]:
        """Yield the reply to a user's message piece by piece; what was yielded joins the history.

        An empty reply leaves the history as it was. ValueError: what the template cannot write; no room.
        """
        before, asked = self.messages, [*self.messages, {"role": "user", "content": text}]
        kept = fit_history(asked, self.tokenizer, self.most, self.template)
        ids, _ = self.tokenizer.encode_chat(kept, open_reply=True, template=self.template)
        cut, gone = len(text) - len(kept[-1]["content"]), len(asked) - len(kept)
        notes = [f"the {gone} oldest messages were forgotten"] * (gone > 0)
        notes += [f"the last {cut} characters of the question were not read"] * (cut > 0)
        said = ""
        try:
            for piece in stream(self.model, self.tokenizer, ids, self.sampling, self.prefix, self.lead):
                said += piece
                yield piece
        finally:  # a reply that was interrupted was said as far as it went
            said = said.strip()
            self.messages = [*kept, {"role": "assistant", "content": said}] if said else before
            self.note = "; ".join(notes if said else [*notes, "no reply, so the question is forgotten"])
            self.sampling = dataclasses.replace(self.sampling, seed=self.sampling.seed + 1)


# --- 6. command line ---------------------------------------------------------------------------------------


@dataclass
class GenerateConfig(Sampling):
    folder: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)  # a model folder or a run
    prompt: str = ""  # text to continue
    file: str = ""  # a text file with one prompt per line
    ask: str = ""  # a question, put through the chat template
    questions: str = ""  # .jsonl or .json of rows to answer, in any form of chat.py; counts what is right
    score: str = ""  # a text file: how likely the model holds each of its lines
    system: str = ""  # what a conversation begins with, for --ask and for chatting
    template: str = ""  # chat template, a name of chat.TEMPLATES; default: the folder's
    out: str = ""  # with --questions: file for the rows with their replies
    echo: bool = True  # print the prompt before its continuation
    batch: int = 8  # texts of a file that are worked on together
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = ""  # float32, bfloat16; default: the folder's
    attention: Literal["auto", "triton", "sdpa"] = "auto"  # triton: ours, 16 bits, on a GPU; sdpa: PyTorch's
    compile: bool = False  # compile the decoding step: a wait of up to minutes, for faster tokens after it


def folder_sampling(folder: str | Path) -> dict:
    """Read the settings of Sampling from a folder's generation_config.json, under transformers' names.

    Those of an adapter's base count, too. "do_sample": false means temperature 0, and so do beams without
    "do_sample": true. Values are not checked.
    """
    folder = model_folder(folder)
    said = _generation_settings(base_folder(folder)) | _generation_settings(folder)
    names = {f.name for f in dataclasses.fields(Sampling)} - {"stop", "seed", "ignore_eos"}
    found = {name: said[name] for name in names if said.get(name) is not None}
    beams = found.get("num_beams", 1) != 1
    if said.get("do_sample") is False or (beams and not said.get("do_sample")):
        found["temperature"] = 0.0
    if found.get("early_stopping") == "never":  # searches longer than False, for nothing else
        found["early_stopping"] = False
    return found


def _generation_settings(folder: Path) -> dict:
    path = folder / "generation_config.json"
    return read_object(path) if path.is_file() else {}


def with_folder(config: GenerateConfig) -> GenerateConfig:
    """Put what the folder's generation_config.json says in force, but for the flags that were typed.

    ValueError names the file. Beams that sample, which are not here, are no beams.
    """
    typed = common.typed_flags(config)
    said = {name: value for name, value in folder_sampling(config.folder).items() if name not in typed}
    if "num_beams" in said and (said.get("temperature", config.temperature) or config.stop):
        print(
            "beams that sample, or stop at a text, are not here: the folder's are left out", file=sys.stderr
        )
        del said["num_beams"]
    for name, value in said.items():
        kind = type(getattr(config, name))
        if type(value) is not kind and not (kind is float and type(value) is int):
            path = model_folder(config.folder) / "generation_config.json"
            raise ValueError(f"{path}: {name} is {value!r}, not a {kind.__name__}; type --{name}")
    if said:
        told = ", ".join(f"{name} {value}" for name, value in sorted(said.items()))
        print(f"as the folder's generation_config.json says: {told}", file=sys.stderr)
    try:
        return dataclasses.replace(config, **said)
    except ValueError as error:
        raise ValueError(f"{config.folder}/generation_config.json: {error}") from None


def main(config: GenerateConfig) -> None:
    """Continue a prompt or those of a file, answer a question or those of a file, or chat in the terminal."""
    works = {
        "prompt": _complete,
        "file": _complete_file,
        "ask": _ask,
        "questions": _answer_file,
        "score": _score,
    }
    given = [name for name in works if getattr(config, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} exclude each other")
    if config.batch < 1:
        raise ValueError(f"--batch {config.batch} must be at least 1")
    device = common.start_process(config.device).device
    kernels.use_attention(config.attention, device)
    dtype = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, config.dtype)
    if isinstance(dtype, str):
        raise ValueError(f"--dtype {dtype}: expected float32 or bfloat16")
    if not config.score:
        config = with_folder(config)
        config.check_beams()
    many = given and given[0] in ("file", "questions", "score")
    rows = (config.batch if many else 1) * config.num_beams
    model, tokenizer = load(config.folder, dtype, device, rows, config.compile)
    if given:
        works[given[0]](model, tokenizer, config)
    elif config.template or tokenizer.template:
        _chat(model, tokenizer, config)
    else:
        _continue(model, tokenizer, config)


HELP = "/reset forgets what was said, /system TEXT begins anew under a system message, /exit or Ctrl-D ends"


def _chat(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Talk until /exit or the end of the input; Ctrl-C cuts a reply short."""
    talk = Chat(model, tokenizer, config, config.template or None)
    talk.reset(config.system)
    print(HELP, file=sys.stderr)
    while (line := _read_line()) is not None:
        command, *rest = line.split(maxsplit=1) or [""]
        if command == "/exit":
            return
        if command in ("/reset", "/system"):
            talk.reset("".join(rest).strip() if command == "/system" else None)
            print("a new conversation", file=sys.stderr)
        elif command:
            try:
                for piece in talk.reply(line):
                    print(piece, end="", flush=True)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                continue
            except KeyboardInterrupt:
                print(" [stopped]", end="", file=sys.stderr)
            print(flush=True)
            if talk.note:
                print(talk.note, file=sys.stderr)


def _continue(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Continue what is typed, line after line; Ctrl-C cuts a text short."""
    print("every line is a prompt; an empty line or Ctrl-D ends", file=sys.stderr)
    while line := _read_line():
        try:
            _complete(model, tokenizer, dataclasses.replace(config, prompt=line))
        except ValueError as error:  # a line that is too long does not end the session
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(" [stopped]", file=sys.stderr)


def _read_line() -> str | None:
    """Read a line that is typed; None at the end of the input, and at Ctrl-C."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() a history, and Backspace over whole characters
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _complete(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    if config.echo:
        print(config.prompt, end="", flush=True)
    ids = tokenizer.encode_prompt(config.prompt)
    start, prefix = time.perf_counter(), Prefix()
    for text in stream(model, tokenizer, ids, config, prefix):
        print(text, end="", flush=True)
    seconds = time.perf_counter() - start
    print()
    if sys.stderr.isatty() and prefix.cache is not None:
        count = len(prefix.ids) + 1 - len(ids)  # the last token was not read
        rate = count / seconds
        rate = f"{rate:.1f} tokens/s, {rate * weight_bytes(model) / 1e9:.1f} GB/s of weights"
        print(f"[{count} tokens with the prompt's time, {rate}]", file=sys.stderr)


def _read_lines(name: str, tokenizer: Tokenizer, model: Model) -> list[tuple[str, list[int]]]:
    """Read the lines of a text file that are not empty, each with its ids."""
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 too
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    found, context = [], model.config.limit
    for n, line in enumerate((line.rstrip("\r") for line in lines), 1):
        ids = tokenizer.encode_prompt(line) if line.strip() else []
        if len(ids) > context:  # before anything is written
            raise ValueError(f"{path}:{n}: {len(ids)} tokens exceed the model's context of {context}")
        found += [(line, ids)] if ids else []
    return found


def _complete_file(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    prompts = _read_lines(config.file, tokenizer, model)
    for i in range(0, len(prompts), config.batch):
        part = prompts[i : i + config.batch]
        for (prompt, _), text in zip(part, complete(model, tokenizer, [ids for _, ids in part], config)):
            print((prompt if config.echo else "") + text, flush=True)


def _score(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Print a line's tokens, their mean negative log-likelihood and its exponential, the perplexity."""
    texts, total, count = _read_lines(config.score, tokenizer, model), 0.0, 0
    print("tokens   nll/token   perplexity   text")
    for i in range(0, len(texts), config.batch):
        part = texts[i : i + config.batch]
        for (text, _), nll in zip(part, score(model, [ids for _, ids in part])):
            mean = float(nll.mean()) if len(nll) else math.nan  # the first token has nothing before it
            print(f"{len(nll):6d} {mean:11.4f} {math.exp(mean):12.4f}   {text[:60]}")
            total, count = total + float(nll.sum()), count + len(nll)
    if count:
        print(f"{count:6d} {total / count:11.4f} {math.exp(total / count):12.4f}   all")


def _ask(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    template = config.template or None
    stop_at_reply_end(model, tokenizer, template)
    system = [{"role": "system", "content": config.system}] if config.system else []
    row = {"messages": [*system, {"role": "user", "content": config.ask}], "where": "--ask"}
    ids = question_ids(row, tokenizer, model.config, template)
    for piece in stream(model, tokenizer, ids, config, lead=tokenizer.chat_template(template).lead):
        print(piece, end="", flush=True)
    print()


def _answer_file(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    if config.out and Path(config.out).exists():
        raise ValueError(f"{config.out} exists; choose another --out or remove it")
    rows = chat.read_rows([config.questions], "questions")
    stop_at_reply_end(model, tokenizer, config.template or None)
    replies = answer(model, tokenizer, rows, config, config.batch, config.template or None)
    if config.out:
        kept = ({name: value for name, value in row.items() if name != "where"} for row in rows)
        lines = (json.dumps(row | {"reply": reply}, ensure_ascii=False) for row, reply in zip(kept, replies))
        common.atomic_text(config.out, "".join(line + "\n" for line in lines))
    counts = exact_matches(rows, replies)
    for row, reply in list(zip(rows, replies))[: 3 if counts else None]:
        print(f"{row['messages'][0]['content'].splitlines()[0][:60]} -> {reply}")
    said = (
        f"{kind} {right} of {asked} ({right / asked:.1%})" for kind, (right, asked) in sorted(counts.items())
    )
    told = [
        m[-1]["content"].strip() for m in (row["messages"] for row in rows) if m[-1]["role"] == "assistant"
    ]
    if counts and len(told) == len(rows):
        same = sum(reply == reference for reply, reference in zip(replies, told, strict=True))
        print(f"word for word as the file answers: {same} of {len(rows)}")
    if counts:
        print(f"right: {', '.join(said)}")


if __name__ == "__main__":
    common.run(main, doc=__doc__)
