"""Let a model write: load a folder, sample token after token, stream text.

    probs = softmax(logits / temperature), cut to the top_k most likely tokens, then to the smallest set whose
    probability exceeds top_p;   next token ~ probs   (temperature 0: the most likely one, "greedy")

Small pieces: `logits_to_probs`, `sample`, and `decode`, the one loop behind everything: it fills the cache
with all prompts at once (rows of unequal length, padded on the right) and then adds one token a row and
step. Each row has its own random generator, so its text does not depend on what else is in the batch.

At load q, k, v and gate, up are fused into one matrix each, which saves calls; fused weights are never saved.
A single row on a CPU has a decoding step of its own (`OneRow`).

    python generate.py out/run --prompt "大家都知道，"
    python generate.py out/run --file prompts.txt --no_echo --temperature 0
    python generate.py out/sft --ask "林小雨住在哪里？"           # one question, through the chat template
    python generate.py out/sft --questions heldout.jsonl         # all of a file; how many answers are right
    python generate.py out/run                      # every line that you type is a prompt

Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p); Fan et al. 2018 (top-k).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import tyro

import chat
import common
import kernels
import lora
from checkpoint import model_folder
from model import MLP, Attention, KVCache, Linear, Model, ModelConfig, Norm, Positions
from tokenizer import Tokenizer, load_tokenizer

# --- 1. loading --------------------------------------------------------------------------------------------


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu", rows: int = 1
) -> tuple[Model, Tokenizer]:
    """Load a model folder, an adapter folder (with its base, merged) or a run's latest step, ready to write.

    dtype None: the folder's own, or fp32 where the machine has no fast bf16. rows: how many texts will be
    written at a time; any number works, but the weights' layout is chosen for one or for several.
    """
    folder = model_folder(folder)
    model = lora.load_model(folder, dtype, device)
    if dtype is None and common.best_dtype(device) == torch.float32:
        model.float()
    if model.config.head != "lm":
        raise ValueError(f"{folder}: a model without a language-model head cannot write")
    tokenizer = load_tokenizer(lora.tokenizer_folder(folder))
    if tokenizer.vocab_size > model.config.vocab_size:
        have, need = model.config.vocab_size, tokenizer.vocab_size
        raise ValueError(f"{folder}: the tokenizer has {need} tokens, the model only {have}")
    model.known_vocab = tokenizer.vocab_size
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_id
    return fuse(model, rows), tokenizer


class FusedAttention(Attention):
    """Attention whose q, k and v come from one matrix, qkv_proj: H·D rows of q, K·D of k, K·D of v."""

    def project(self, x: torch.Tensor, at: Positions):
        """Give q (B, H, T, D), k and v (B, K, T, D), turned to their positions."""
        B, T, _ = x.shape
        heads = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if at.cos is not None:
            qk = kernels.rope(qk, at.cos, at.sin)
        return *qk.split((self.heads, self.kv_heads), dim=1), v


class FusedMLP(nn.Module):
    """A gated MLP whose gate and up come from one matrix."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_up_proj = _stack(mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj
        self.act = mlp.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position: (B, T, C) -> (B, T, C)."""
        return self.down_proj(kernels.glu(*self.gate_up_proj(x).chunk(2, dim=-1), self.act))


def _stack(*layers: Linear) -> Linear:
    """Make one linear layer of several that read the same input."""
    outputs = sum(p.out_features for p in layers)
    stacked = Linear(layers[0].in_features, outputs, layers[0].bias is not None, "meta")
    stacked.weight = nn.Parameter(torch.cat([p.weight for p in layers]))
    if stacked.bias is not None:
        stacked.bias = nn.Parameter(torch.cat([p.bias for p in layers]))
    return stacked


@torch.no_grad()
def fuse(model: Model, rows: int = 1) -> Model:
    """Stack q, k, v and gate, up of every layer, in place, for inference.

    With rows 1 weights are stored by columns where that is faster (1.5 times with two threads on a CPU, see
    kernels/matvec.py); 2 to 16 rows at a time would then be slower.
    """
    for layer in model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        if isinstance(attn, FusedAttention):
            continue  # stacked before
        if attn.interleaved:  # BLOOM's rows are (H, 3, D)
            attn.qkv_proj = qkv = attn.query_key_value
            del attn.query_key_value
            for p in (qkv.weight, qkv.bias):
                p.copy_(p.unflatten(0, (attn.heads, 3, attn.head_dim)).transpose(0, 1).flatten(0, 2).clone())
        else:
            attn.qkv_proj = _stack(attn.q_proj, attn.k_proj, attn.v_proj)
            del attn.q_proj, attn.k_proj, attn.v_proj
        attn.__class__ = FusedAttention
        if mlp.gate_proj is not None:
            layer.mlp = FusedMLP(mlp)
    for module in model.modules():
        if isinstance(module, Linear):
            columns = rows == 1 and kernels.columns_are_faster(module.weight)
            module.weight.data = kernels.by_columns(module.weight) if columns else module.weight.contiguous()
    return model.requires_grad_(False).eval()


class OneRow:
    """A fused model on a CPU that continues one row by one token: Model.forward, written flat.

    At this size the arithmetic is a few vectors between matrices, and Python a third of the time: here are
    vectors instead of (1, 1, C), no modules, nothing computed twice, and kernels.matvec.
    """

    def __init__(self, model: Model):
        self.config = config = model.config
        self.table = model.embed_tokens.weight
        self.embed_norm = _row_norm(model.embed_norm) if config.switches.embed_norm else None
        self.layers = [
            (
                _row_norm(layer.input_layernorm),
                _row_product(layer.self_attn.qkv_proj),
                _row_product(layer.self_attn.o_proj),
                None if config.switches.parallel else _row_norm(layer.post_attention_layernorm),
                _row_mlp(layer.mlp),
            )
            for layer in model.layers
        ]
        self.norm, self.head = _row_norm(model.norm), _row_product(model.lm_head)
        self.rope, self.slopes = model.position_tables("cpu")

    @staticmethod
    def fits(model: Model) -> bool:
        """Tell whether this model can be run this way."""
        weight = model.embed_tokens.weight
        one_dtype = model.compute_dtype in (None, weight.dtype)
        return weight.is_cpu and one_dtype and isinstance(model.layers[0].self_attn, FusedAttention)

    def __call__(self, token: int, cache: KVCache) -> torch.Tensor:
        """Put a token after those of the cache's only row; return the logits (V,) of the next."""
        H, K, D = (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim)
        position = int(cache.lengths)
        x = self.table[token]  # (C,)
        if self.embed_norm:
            x = self.embed_norm(x)
        if self.rope is not None:
            cos, sin = kernels.rope_table(cache.lengths[None], self.rope)
        for i, (norm, qkv, out, mlp_norm, mlp) in enumerate(self.layers):
            n = norm(x)
            heads = qkv(n).view(1, H + 2 * K, 1, D)
            qk, v = heads[:, : H + K], heads[:, H + K :]
            if self.rope is not None:
                qk = kernels.rope(qk, cos, sin)
            keys, values = cache.k[i], cache.v[i]
            keys[:, :, position] = qk[:, H:, 0]
            values[:, :, position] = v[:, :, 0]
            y = kernels.attention_decode(qk[:, :H], keys, values, cache.lengths, self.slopes)
            x = out(y.view(-1), x)
            x = mlp(n if mlp_norm is None else mlp_norm(x), x)  # Phi: attention and MLP read the same norm
        cache.lengths = cache.lengths + 1
        return self.head(self.norm(x))


def _row_product(layer: Linear) -> Callable[..., torch.Tensor]:
    weight, bias = layer.weight, layer.bias

    def product(x, add=None):
        """Map (in,) to (out,), and add a vector."""
        if bias is not None:
            add = bias if add is None else add + bias
        return kernels.matvec(weight, x, add)

    return product


def _row_norm(norm: Norm) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if bias is None:
        return lambda x: kernels.rms_norm(x, weight, eps)
    return lambda x: kernels.layer_norm(x, weight, bias, eps)


def _row_mlp(mlp: MLP | FusedMLP) -> Callable[..., torch.Tensor]:
    up = _row_product(mlp.gate_up_proj if isinstance(mlp, FusedMLP) else mlp.up_proj)
    down, act, width = _row_product(mlp.down_proj), mlp.act, mlp.down_proj.in_features
    activation = kernels.ACTIVATIONS[act]

    def gated(x, add):
        h = up(x)
        return down(kernels.glu(h[:width], h[width:], act), add)

    return gated if isinstance(mlp, FusedMLP) else lambda x, add: down(activation(up(x)), add)


# --- 2. sampling -------------------------------------------------------------------------------------------


@dataclass
class Sampling:
    """How to choose tokens, and when to stop."""

    max_new_tokens: int = 256  # stop after so many
    temperature: float = 1.0  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens whose probability exceeds this
    seed: int = 0  # of the random numbers
    ignore_eos: bool = False  # go on after the end of a text

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature} must not be negative, nor inf or nan")
        if self.top_k < 0:
            raise ValueError(f"--top_k {self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p {self.top_p} must lie in (0, 1]")


def logits_to_probs(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Turn one row of logits (V,) into the probabilities (V,) to sample from; temperature > 0."""
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        kth = logits.topk(sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probs.sort(descending=True)
        # a token stays if the likelier ones do not exceed top_p without it
        before = ordered.cumsum(-1) - ordered
        probs[index[before > sampling.top_p]] = 0
        probs /= probs.sum()
    return probs


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the next token from one row of logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.max(-1).indices)  # argmax takes 2.5 times as long on a CPU
    return int(torch.multinomial(logits_to_probs(logits, sampling), 1, generator=generator))


# --- 3. decoding -------------------------------------------------------------------------------------------


@torch.inference_mode()
def decode(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
) -> Iterator[list[int | None]]:
    """Yield one new token per row and step, None for a row that has ended; a row's last token may be EOS.

    prompts: B lists of ids, of any lengths ≥ 1. ValueError if a prompt exceeds a RoPE model's context; such a
    model stops where its context ends.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    assert len(samplings) == len(prompts)
    if not prompts:
        return
    if not all(prompts):
        raise ValueError("a prompt is empty, and this tokenizer has no beginning-of-text token to start from")
    table = model.embed_tokens.weight
    device = (
        table.device_mesh.device_type if hasattr(table, "device_mesh") else table.device
    )  # offloaded rows
    limit = model.config.max_position_embeddings if model.config.switches.rope else sys.maxsize
    longest = max(map(len, prompts))
    left = [min(s.max_new_tokens, limit - len(p)) for s, p in zip(samplings, prompts)]
    size = max(longest, min(limit, longest + max(s.max_new_tokens for s in samplings)))
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    cache = KVCache(model.config, len(prompts), size, dtype, device)
    generators = [torch.Generator().manual_seed(s.seed) for s in samplings]
    eos = model.config.eos_ids

    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = torch.tensor(prompt)
    num_new = torch.tensor([len(p) for p in prompts], device=device)
    logits = model(ids.to(device), cache=cache, num_new=num_new, last=True)  # (B, V)
    one_row = OneRow(model) if len(prompts) == 1 and OneRow.fits(model) else None
    while True:
        logits[:, model.known_vocab :] = float("-inf")  # rows of the table beyond the tokenizer have no text
        rows = logits.cpu()
        tokens: list[int | None] = []
        for b, s in enumerate(samplings):
            token = sample(rows[b], s, generators[b]) if left[b] > 0 else None
            left[b] -= 1
            if token in eos and not s.ignore_eos:
                left[b] = 0
            tokens.append(token)
        if all(t is None for t in tokens):
            return
        yield tokens
        if not any(n > 0 for n in left):
            return
        if one_row:
            logits = one_row(tokens[0], cache)[None]
            continue
        step = torch.tensor([[t or 0] for t in tokens], device=device)
        num_new = torch.tensor([int(n > 0) for n in left], device=device)
        cache.lengths = cache.lengths * num_new  # an ended row idles at 0, so it cannot run past the cache
        logits = model(step, cache=cache, num_new=num_new)[:, -1]


def generate(
    model: Model, prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling]
) -> list[list[int]]:
    """Continue every prompt (lists of ids); return the new tokens of each, without the EOS that ended it.

    One Sampling for all, or one per prompt, each with its own seed.
    """
    out: list[list[int]] = [[] for _ in prompts]
    for tokens in decode(model, prompts, sampling):
        for row, token in zip(out, tokens, strict=True):
            if token is not None:
                row.append(token)
    eos = model.config.eos_ids
    samplings = [sampling] * len(out) if isinstance(sampling, Sampling) else sampling
    return [r[:-1] if r and r[-1] in eos and not s.ignore_eos else r for r, s in zip(out, samplings)]


def stream(model: Model, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of one prompt as text, whole characters as soon as they are complete."""
    decoder = tokenizer.stream(at_start=False)
    for (token,) in decode(model, [prompt], sampling):
        if token is not None and (token not in model.config.eos_ids or sampling.ignore_eos):
            yield decoder.push(token)
    yield decoder.flush()


@torch.inference_mode()
def score(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """Give the negative log-likelihood of each token after the first: (len(ids) − 1,) fp32, in nats."""
    row = torch.tensor([list(ids)], device=model.embed_tokens.weight.device)
    return model(row[:, :-1], row[:, 1:])[0]


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
        for i, new in zip(part, generate(model, [prompts[i] for i in part], sampling)):
            replies[i] = written.content(tokenizer.decode(new, at_start=False)).strip()
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


# --- 5. command line ---------------------------------------------------------------------------------------


@dataclass
class GenerateConfig(Sampling):
    folder: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)  # a model folder or a run
    prompt: str = ""  # text to continue
    file: str = ""  # a text file with one prompt per line
    ask: str = ""  # a question, put through the chat template
    questions: str = ""  # .jsonl or .json of rows to answer, in any form of chat.py; counts what is right
    template: str = ""  # chat template, a name of chat.TEMPLATES; default: the folder's
    out: str = ""  # with --questions: file for the rows with their replies
    echo: bool = True  # print the prompt before its continuation
    batch: int = 8  # prompts of a file that are worked on together
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = ""  # float32, bfloat16; default: the folder's


def main(config: GenerateConfig) -> None:
    """Continue a prompt, the prompts of a file, or what is typed; answer a question, or those of a file."""
    given = [name for name in ("prompt", "file", "ask", "questions") if getattr(config, name)]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} exclude each other")
    if config.batch < 1:
        raise ValueError(f"--batch {config.batch} must be at least 1")
    device = common.start_process(config.device).device
    dtype = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, config.dtype)
    if isinstance(dtype, str):
        raise ValueError(f"--dtype {dtype}: expected float32 or bfloat16")
    many = config.file or config.questions
    model, tokenizer = load(config.folder, dtype, device, rows=config.batch if many else 1)
    if config.ask or config.questions:
        stop_at_reply_end(model, tokenizer, config.template or None)
    if config.questions:
        _answer_file(model, tokenizer, config)
    elif config.ask:
        _answer_one(model, tokenizer, config)
    elif config.file:
        _complete_file(model, tokenizer, config)
    elif config.prompt:
        _complete(model, tokenizer, config.prompt, config)
    else:
        print("every line is a prompt; an empty line or Ctrl-D ends", file=sys.stderr)
        while line := _read_line():
            try:
                _complete(model, tokenizer, line, config)
            except ValueError as error:  # a line that is too long does not end the session
                print(f"error: {error}", file=sys.stderr)


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _complete(model: Model, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> None:
    if config.echo:
        print(prompt, end="", flush=True)
    _write(model, tokenizer, tokenizer.encode_prompt(prompt), config)


def _write(model: Model, tokenizer: Tokenizer, ids: list[int], config: GenerateConfig) -> None:
    start, count = time.perf_counter(), -1  # the last text is what the stream held back, not a token
    for text in stream(model, tokenizer, ids, config):
        count += 1
        print(text, end="", flush=True)
    seconds = time.perf_counter() - start
    print()
    if sys.stderr.isatty():
        size = sum(p.numel() * p.itemsize for p in model.parameters())
        rate = f"{count / seconds:.1f} tokens/s, {count * size / seconds / 1e9:.1f} GB/s of weights"
        print(f"[{count} tokens with the prompt's time, {rate}]", file=sys.stderr)


def _complete_file(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    path = Path(config.file)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 too
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte {error.object[error.start]:#04x})") from None
    prompts = [(n, line.rstrip("\r")) for n, line in enumerate(lines, 1) if line.strip()]
    encoded = [tokenizer.encode_prompt(prompt) for _, prompt in prompts]
    context = model.config.max_position_embeddings
    for (n, _), ids in zip(prompts, encoded):  # before anything is written
        if model.config.switches.rope and len(ids) > context:
            raise ValueError(f"{path}:{n}: {len(ids)} tokens exceed the model's context of {context}")
    for i in range(0, len(prompts), config.batch):
        part = slice(i, i + config.batch)
        for (_, prompt), new in zip(prompts[part], generate(model, encoded[part], config)):
            print((prompt if config.echo else "") + tokenizer.decode(new, at_start=False), flush=True)


def _answer_one(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    """Stream the reply to --ask, without what the template writes before it (a line break, a space)."""
    row = {"messages": [{"role": "user", "content": config.ask}], "where": "--ask"}
    ids, begun = question_ids(row, tokenizer, model.config, config.template or None), False
    lead = tokenizer.chat_template(config.template or None).lead
    held = ""
    for text in stream(model, tokenizer, ids, config):
        held += text
        if not begun and lead.startswith(held) and held != lead:
            continue  # it may still become the lead
        print(held if begun else held.removeprefix(lead), end="", flush=True)
        held, begun = "", True
    print()


def _answer_file(model: Model, tokenizer: Tokenizer, config: GenerateConfig) -> None:
    if config.out and Path(config.out).exists():
        raise ValueError(f"{config.out} exists; choose another --out or remove it")
    rows = chat.read_rows([config.questions], "questions")
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
