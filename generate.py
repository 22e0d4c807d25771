"""Let a model write: load a folder, sample token after token, stream text.

    probs = softmax(logits / temperature), cut to the top_k most likely tokens, then to the smallest set whose
    probability exceeds top_p;   next token ~ probs   (temperature 0: the most likely one, "greedy")

Small pieces: `logits_to_probs`, `sample`, and `decode`, the one loop behind everything: it fills the cache
with all prompts at once (rows of unequal length, padded on the right) and then adds one token a row and
step. Each row has its own random generator, so its text does not depend on what else is in the batch.

At load q, k, v and gate, up are fused into one matrix each, which saves reading time and calls; fused weights
are never saved. A single row is multiplied by torch.mv, which reads bf16 weights 1.3-1.8 times as fast on a
CPU.

    python generate.py out/run --prompt "年轻人不应该再努力了，年轻人就应该享受生活，"
    python generate.py out/run --file prompts.txt --no_echo --temperature 0
    python generate.py out/run                      # every line that you type is a prompt

Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p); Fan et al. 2018 (top-k).
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import tyro

import common
import kernels
from checkpoint import load_model, model_folder
from model import Attention, Head, KVCache, Linear, Model
from tokenizer import Tokenizer, load_tokenizer

# --- 1. loading --------------------------------------------------------------------------------------------


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[Model, Tokenizer]:
    """Load a model folder or a run's latest step, ready to write.

    dtype None: the folder's own, or fp32 where the machine has no fast bf16.
    """
    folder = model_folder(folder)
    model = load_model(folder, dtype, device)
    if dtype is None and common.best_dtype(device) == torch.float32:
        model.float()
    if model.config.head != "lm":
        raise ValueError(f"{folder}: a model without a language-model head cannot write")
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        have, need = model.config.vocab_size, tokenizer.vocab_size
        raise ValueError(f"{folder}: the tokenizer has {need} tokens, the model only {have}")
    model.known_vocab = tokenizer.vocab_size
    if model.config.eos_token_id is None:
        model.config.eos_token_id = tokenizer.eos_id
    return fuse(model), tokenizer


class RowLinear(Linear):
    """A linear layer for inference that multiplies a single row by torch.mv."""

    @classmethod
    def of(cls, *layers: Linear) -> RowLinear:
        """Stack layers that read the same input into one."""
        weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
        fused = cls(weight.shape[1], weight.shape[0], bias=layers[0].bias is not None, device="meta")
        fused.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if fused.bias is not None:
            fused.bias = nn.Parameter(
                torch.cat([layer.bias for layer in layers]).detach(), requires_grad=False
            )
        return fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if x.numel() > x.shape[-1] or not x.is_cpu:
            return super().forward(x)
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        y = torch.mv(weight, x.reshape(-1))
        return (y if self.bias is None else y + self.bias.to(x.dtype)).view(*x.shape[:-1], -1)


class RowHead(Head, RowLinear):
    """The head for inference: still gives losses where targets are given."""


class FusedAttention(Attention):
    """Attention whose q, k and v come from one matrix."""

    def project(self, x: torch.Tensor):
        """Give q (B, T, H, D), k and v (B, T, K, D)."""
        B, T, _ = x.shape
        qkv = self.qkv_proj(x).view(B, T, -1, self.head_dim)
        return qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=2)


class FusedMLP(nn.Module):
    """A gated MLP whose gate and up come from one matrix."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_up_proj = RowLinear.of(mlp.gate_proj, mlp.up_proj)
        self.down_proj = RowLinear.of(mlp.down_proj)
        self.act = mlp.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position: (B, T, C) -> (B, T, C)."""
        return self.down_proj(kernels.glu(*self.gate_up_proj(x).chunk(2, dim=-1), self.act))


@torch.no_grad()
def fuse(model: Model) -> Model:
    """Stack q, k, v and gate, up of every layer, in place, for inference."""
    for layer in model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        if isinstance(attn.o_proj, RowLinear):
            return model  # fused already
        if not attn.fused:
            attn.qkv_proj = RowLinear.of(attn.q_proj, attn.k_proj, attn.v_proj)
            del attn.q_proj, attn.k_proj, attn.v_proj
            attn.__class__ = FusedAttention
        else:
            attn.query_key_value = RowLinear.of(attn.query_key_value)
        attn.o_proj = RowLinear.of(attn.o_proj)
        if mlp.gate_proj is not None:
            layer.mlp = FusedMLP(mlp)
        else:
            mlp.up_proj, mlp.down_proj = RowLinear.of(mlp.up_proj), RowLinear.of(mlp.down_proj)
    if model.config.head == "lm":
        model.lm_head = RowHead.of(model.lm_head)
        model.tie()
    return model.requires_grad_(False).eval()


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
        before = (
            ordered.cumsum(-1) - ordered
        )  # a token stays if the likelier ones do not exceed top_p without it
        probs[index[before > sampling.top_p]] = 0
        probs /= probs.sum()
    return probs


def sample(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose the next token from one row of logits (V,)."""
    if sampling.temperature == 0:
        return int(logits.argmax())
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
    device = model.embed_tokens.weight.device
    limit = model.config.max_position_embeddings if model.config.switches.rope else sys.maxsize
    longest = max(map(len, prompts))
    left = [min(s.max_new_tokens, limit - len(p)) for s, p in zip(samplings, prompts)]
    size = max(longest, min(limit, longest + max(s.max_new_tokens for s in samplings)))
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    cache = KVCache(model.config, len(prompts), size, dtype, device)
    generators = [torch.Generator().manual_seed(s.seed) for s in samplings]

    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, : len(prompt)] = torch.tensor(prompt)
    num_new = torch.tensor([len(p) for p in prompts], device=device)
    logits = model(ids.to(device), cache=cache, num_new=num_new, last=True)  # (B, V)
    while True:
        logits[:, model.known_vocab :] = float("-inf")  # rows of the table beyond the tokenizer have no text
        rows = logits.cpu()
        tokens: list[int | None] = []
        for b, s in enumerate(samplings):
            token = sample(rows[b], s, generators[b]) if left[b] > 0 else None
            left[b] -= 1
            if token == model.config.eos_token_id and not s.ignore_eos:
                left[b] = 0
            tokens.append(token)
        if all(t is None for t in tokens):
            return
        yield tokens
        if not any(n > 0 for n in left):
            return
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
    eos = model.config.eos_token_id
    samplings = [sampling] * len(out) if isinstance(sampling, Sampling) else sampling
    return [r[:-1] if r and r[-1] == eos and not s.ignore_eos else r for r, s in zip(out, samplings)]


def stream(model: Model, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling) -> Iterator[str]:
    """Yield the continuation of one prompt as text, whole characters as soon as they are complete."""
    decoder = tokenizer.stream(at_start=False)
    for (token,) in decode(model, [prompt], sampling):
        if token is not None and (token != model.config.eos_token_id or sampling.ignore_eos):
            yield decoder.push(token)
    yield decoder.flush()


@torch.inference_mode()
def score(model: Model, ids: Sequence[int]) -> torch.Tensor:
    """Give the negative log-likelihood of each token after the first: (len(ids) − 1,) fp32, in nats."""
    row = torch.tensor([list(ids)], device=model.embed_tokens.weight.device)
    return model(row[:, :-1], row[:, 1:])[0]


# --- 4. command line ---------------------------------------------------------------------------------------


@dataclass
class GenerateConfig(Sampling):
    folder: tyro.conf.Positional[str] = dataclasses.field(kw_only=True)  # a model folder or a run
    prompt: str = ""  # text to continue
    file: str = ""  # a text file with one prompt per line
    echo: bool = True  # print the prompt before its continuation
    batch: int = 8  # prompts of a file that are worked on together
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = ""  # float32, bfloat16; default: the folder's


def main(config: GenerateConfig) -> None:
    """Continue a prompt, the prompts of a file, or what is typed."""
    if config.prompt and config.file:
        raise ValueError("--prompt and --file exclude each other")
    if config.batch < 1:
        raise ValueError(f"--batch {config.batch} must be at least 1")
    device = common.start_process(config.device).device
    dtype = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, config.dtype)
    if isinstance(dtype, str):
        raise ValueError(f"--dtype {dtype}: expected float32 or bfloat16")
    model, tokenizer = load(config.folder, dtype, device)
    if config.file:
        _complete_file(model, tokenizer, config)
    elif config.prompt:
        _complete(model, tokenizer, config.prompt, config)
    else:
        print("every line is a prompt; an empty line or Ctrl-D ends", file=sys.stderr)
        while line := _read_line():
            _complete(model, tokenizer, line, config)


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _complete(model: Model, tokenizer: Tokenizer, prompt: str, config: GenerateConfig) -> None:
    if config.echo:
        print(prompt, end="", flush=True)
    ids = tokenizer.encode_prompt(prompt)
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
    prompts = [line.rstrip("\r") for line in lines if line.strip()]
    for i in range(0, len(prompts), config.batch):
        part = prompts[i : i + config.batch]
        for prompt, new in zip(part, generate(model, [tokenizer.encode_prompt(p) for p in part], config)):
            print((prompt if config.echo else "") + tokenizer.decode(new, at_start=False), flush=True)


if __name__ == "__main__":
    common.run(main, doc=__doc__)
