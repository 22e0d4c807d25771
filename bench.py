"""Speed and quality in figures: ours beside a peer, alternating in one run, medians and ratios.

A machine that others share is fast one minute and slow the next. So in `train`, `decode`, `tune` and the
encoding of `data` both sides take turns within one process, each figure and each ratio is a median over the
rounds, and the ceilings of the first two (a large matrix product, a large copy) are measured in the same run.
The others run one process after the other.

    python bench.py train      # optimizer steps beside transformers: same shape, weights, tokens, AdamW
    python bench.py train --preset phi2-chinese-0.2b    # 193.65M parameters; needs 10 GB
    python bench.py decode     # greedy decoding in 16, 8 and 4 bits beside transformers and llama.cpp
    python bench.py formats out/sft out/int8 out/int4 --text corpus.jsonl --exam out/demo/exam
    python bench.py world out/run --demo out/demo       # the demonstration model: form, novelty, facts
    python bench.py ngram out/demo                      # how many held-out questions a 5-gram model answers
    python bench.py bits out/run --shards out/shards    # bits per byte beside xz and a Kneser-Ney trigram
    python bench.py data out/demo/pretrain              # encoding beside `tokenizers`; packing and its memory
    python bench.py bpe out/demo/pretrain               # learning byte-level BPE beside `tokenizers`
    python bench.py clean corpus.jsonl                  # does a model learn more from the cleaned text?
    python bench.py dedup corpus.jsonl                  # a million documents: time, memory, near-copies found
    python bench.py optimizers corpus.jsonl             # AdamW beside Muon on equal tokens, three seeds each
    python bench.py tune       # sft.py, --lora and dpo.py beside trl and peft: speed and memory of a step
    python bench.py kernels    # every op beside plain torch, torch.compile, SDPA: see bench_kernels.py
    python bench.py plot out/run out/run2 --out plot.png    # loss, learning rate, speed of several runs

`train`, `decode`, `data` and `bpe` need transformers and tokenizers (pip install -r requirements-dev.txt),
`tune` trl, and for its second peer `decode` llama-cpp-python (requirements-bench.txt).

Kneser & Ney 1995; Chen & Goodman 1999, "An Empirical Study of Smoothing Techniques" (interpolated form).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import lzma
import math
import operator
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import chat
import common
import demo_corpus
import evaluate
import lora
from bench_kernels import alternate, kernels, ratio
from checkpoint import load_model, model_folder, read_config, save_model
from clean import SHINGLE, CleanConfig, clean_text, comparable, near_duplicates, signatures
from data import IGNORE, Batches, ChatRows, PairRows, RowStream, Shards, drawn
from dpo import DPOConfig, compute_reference, frozen_model, live_reference, pair_loss
from generate import Sampling, exact_matches, generate, load
from generate import decode as decode_tokens
from inference import CompiledSteps, fuse, weight_bytes
from model import PRESETS, Model, ModelConfig, build, flops_per_token, init_weights, num_params
from optim import OptimConfig, clip_and_scale, make_optimizer
from parallel import ParallelConfig, parallelize
from quantize import QuantizeConfig, perplexity, quantize_folder, text_rows
from sft import SftConfig, tuning_loss
from tokenizer import Tokenizer, load_tokenizer, split_pattern, texts_up_to
from train import Plan, measured_flops, next_token_loss, ready_model

# --- 1. speed beside transformers ---------------------------------------------------------------------------


def copy_rate(size: int = 1 << 28) -> float:
    """Measure the bytes per second that a large copy reads (it writes as many)."""
    a, b = (torch.ones(size, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        b.copy_(a)
        seconds.append(time.perf_counter() - start)
    return size / min(seconds)


def both(config: ModelConfig, dtype: torch.dtype):
    """Build one random model for us and for transformers, with the same weights."""
    from transformers import AutoModelForCausalLM

    ours = build(config)
    init_weights(ours, 1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(ours, Path(folder) / "model", dtype=dtype)
        theirs = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "model", dtype=dtype, attn_implementation="sdpa"
        )
    return ours.to(dtype), theirs


@dataclass
class TrainBench:
    preset: str = ""  # a name of model.PRESETS, instead of the next three
    layers: int = 8  # of a LLaMA shape
    width: int = 512  # of it, in heads of 64
    vocab: int = 6400  # tokens of its vocabulary
    length: int = 512  # tokens of a row
    rows: int = 4  # of a batch
    rounds: int = 9  # steps of each side
    compile: bool = True  # also measure ours compiled (needs a C++ compiler)
    memory: bool = True  # also measure each side's peak memory, in a process of its own
    side: str = ""  # measure this side alone, and print {"seconds", "memory", "loss"}


PEER = "transformers"
MASKED = "transformers, documents masked"  # each apart, as in our rows; the plain PEER has less to do
CHECKPOINTED, COMPILED, WHOLE = (f"ours, {what}" for what in ("checkpointed", "compiled", "whole logits"))


def train(config: TrainBench) -> None:
    """Time whole optimizer steps (forward, backward, AdamW) beside transformers under bf16 autocast.

    Ours are packed rows with document masks. The peer gets the same tokens and targets: as plain causal rows,
    which is cheaper and the side that ratios are against; and with a mask of (T, T) that does the same.
    """
    shape = ModelConfig(
        *("llama", config.vocab, config.width, config.layers, config.width // 64),
        *(config.width * 11 // 4, config.length),
        tie_word_embeddings=True,
    )
    if config.preset:
        if config.preset not in PRESETS or not PRESETS[config.preset].vocab_size:
            fixed = ", ".join(name for name, preset in PRESETS.items() if preset.vocab_size)
            raise ValueError(f"--preset {config.preset}: expected one of {fixed}")
        shape = PRESETS[config.preset]
    names = [PEER, MASKED, "ours", CHECKPOINTED, *([COMPILED] if config.compile else [])]
    if config.side and config.side not in (*names, WHOLE):
        raise ValueError(f"--side {config.side!r}: expected one of {', '.join(map(repr, (*names, WHOLE)))}")
    sides = training_sides(
        shape, packed_batch(config, shape.vocab_size), [config.side] if config.side else names
    )
    losses = {name: evaluate() for name, (evaluate, _) in sides.items()}  # of the first weights
    rounds = alternate(config.rounds, **{name: step for name, (_, step) in sides.items()})
    seconds = {name: statistics.median(s) for name, s in rounds.items()}
    if config.side:
        took = {"seconds": seconds[config.side], "memory": common.peak_memory("cpu")}
        print(json.dumps(took | {"loss": losses[config.side]}))
        return
    tokens = config.rows * config.length
    flops = flops_per_token(shape, config.length) * tokens
    ceiling = measured_flops("cpu", torch.bfloat16)
    what = config.preset or f"{config.layers} x {config.width}, V {config.vocab}"
    print(f"train: {what}, {num_params(shape):,} parameters", end=", ")
    print(f"B {config.rows}, T {config.length}, bf16; a matrix product reaches {ceiling / 1e12:.2f} TFLOP/s")
    for name, s in seconds.items():
        rate = f"{tokens / s:6.0f} tokens/s, {flops / s / 1e12:.3f} TFLOP/s ({flops / s / ceiling:.0%})"
        times = f"{ratio(rounds, name, PEER):.2f} x transformers"
        print(f"  {name:30} {s * 1e3:6.0f} ms a step, {rate}, {times}, first loss {losses[name]:.4f}")
    if config.memory:
        del sides
        print(
            f"peak memory, of it {16 * num_params(shape) / 1e9:.2f} GB weights, gradients and moments in fp32"
        )
        given = [f"--{name}={getattr(config, name)}" for name in ("preset", *SIZES)]
        for name in (PEER, "ours", CHECKPOINTED, WHOLE):
            took = watch("bench.py", "train", *given, "--rounds=1", f"--side={name}").output
            print(f"  {name:30} {json.loads(took.splitlines()[-1])['memory'] / 1e9:.2f} GB", flush=True)


SIZES = ("layers", "width", "vocab", "length", "rows")


def packed_batch(config: TrainBench, vocab: int) -> dict[str, torch.Tensor]:
    """Draw rows as data.py packs them: documents of 40 to 400 tokens, the last one of a row cut."""
    draw = torch.Generator().manual_seed(1)
    B, T = config.rows, config.length
    lengths = torch.randint(40, 401, (B, T), generator=draw)
    doc_ids = torch.stack([torch.arange(T).repeat_interleave(row)[:T] for row in lengths])
    ids = torch.randint(0, vocab, (B, T), generator=draw)
    targets = torch.full_like(ids, IGNORE)
    inside = doc_ids[:, 1:] == doc_ids[:, :-1]
    targets[:, :-1][inside] = ids[:, 1:][inside]
    return {"ids": ids, "targets": targets, "doc_ids": doc_ids}


Side = tuple[Callable[[], float], Callable[[], float]]


def training_sides(shape: ModelConfig, batch: dict, names: list[str]) -> dict[str, Side]:
    """Make for each name a function that gives the loss, and one that takes a step and gives its seconds.

    All of ours train one set of weights with one optimizer, and so do both of transformers.
    """
    ours, theirs = both(shape, torch.float32)
    count = (batch["targets"] != IGNORE).sum()
    visible = batch["doc_ids"][:, :, None] == batch["doc_ids"][:, None]
    visible = visible.tril()[:, None]  # (B, 1, T, T)

    def our_loss(model: Model) -> torch.Tensor:
        return next_token_loss(model, batch)[0] / count

    def their_loss(mask: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = theirs(
                batch["ids"], attention_mask=mask, labels=batch["ids"], shift_labels=batch["targets"]
            )
        return out.loss

    def side(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer) -> Side:
        def evaluate() -> float:
            with torch.no_grad():
                return loss().item()

        def step() -> float:
            start = time.perf_counter()
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - start

        return evaluate, step

    our_optimizer = make_optimizer(ours, OptimConfig(lr=1e-4))
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    theirs.train()
    sides = {}
    for name in names:
        if name in (PEER, MASKED):
            mask = visible if name == MASKED else None
            sides[name] = side(functools.partial(their_loss, mask), their_optimizer)
            continue
        options = ParallelConfig(
            activation_checkpointing=name == CHECKPOINTED, compile=name == COMPILED, dtype="bfloat16"
        )
        model = parallelize(build(shape, "meta"), common.Process(0, 1, "cpu"), options)
        for path, parameter in ours.named_parameters():
            module, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
        model.tie()
        model.train()
        if name == WHOLE:
            model.lm_head.forward = functools.partial(whole_logits, model.lm_head)
        sides[name] = side(functools.partial(our_loss, model), our_optimizer)
    return sides


def whole_logits(head: torch.nn.Linear, x: torch.Tensor, targets: torch.Tensor):
    """The head's loss in the usual way: all logits at once, in fp32 for the softmax."""
    bias = None if head.bias is None else head.bias.to(x.dtype)
    logits = F.linear(x, head.weight.to(x.dtype), bias).float()  # (B, T, V)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"), logits.logsumexp(-1)


@dataclass
class DecodeBench:
    shape: Literal["135m", "phi2-chinese-0.2b"] = "135m"  # a LLaMA of 30 x 576, or Phi-2 of 16 x 768
    layers: int = 0  # of the shape; 0: as it is
    prompt: int = 32  # tokens
    new: int = 128  # tokens
    batch: int = 1  # texts that are written together
    threads: int = 0  # of each side; 0: as many as torch takes
    rounds: int = 5  # texts of each side
    compile: bool = False  # ours with a compiled step, too: the first round takes minutes


class Spent(NamedTuple):
    """Seconds until the first token, and from there to the last."""

    prefill: float
    decode: float


def decode(config: DecodeBench) -> None:
    """Time greedy decoding in 16, 8 and 4 bits beside transformers (bf16) and llama.cpp, on random weights.

    Where the rest has 8 or 4 bits, the head has 8. llama.cpp, if llama-cpp-python and gguf are there (see
    requirements-bench.txt), takes one text at a time.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    shape = PRESETS.get(config.shape) or ModelConfig(
        "llama", 49152, 576, 30, 9, 1536, 2048, 3, tie_word_embeddings=True
    )
    layers = config.layers or shape.num_hidden_layers
    length = max(shape.max_position_embeddings, config.prompt + config.new)  # speed does not care
    shape = replace(shape, num_hidden_layers=layers, max_position_embeddings=length)
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(0, shape.vocab_size, (config.batch, config.prompt), generator=rng)
    with tempfile.TemporaryDirectory() as scratch:
        sides, sizes = decoding_sides(shape, config, ids, Path(scratch))
        texts: dict[str, list[int]] = {}
        spent: dict[str, list[Spent]] = defaultdict(list)
        for round_ in range(config.rounds + 1):
            for name, side in sides.items():
                *seconds, texts[name] = side()
                if round_:  # the first warms up
                    spent[name].append(Spent(*seconds))
    print(
        f"decode: {config.shape}, {layers} layers, {config.batch} x {config.prompt} tokens, {config.new} new,"
        f" {torch.get_num_threads()} threads; a copy reads {copy_rate() / 1e9:.1f} GB/s"
    )
    print(f"{'':24s} prefill           decode            weights     x transformers  x ours bf16  agree")
    first_text = texts["ours bf16"]
    for name, found in spent.items():
        prefill, step = (statistics.median(getattr(s, part) for s in found) for part in Spent._fields)
        step /= config.new - 1
        per_second = config.batch / step

        def beside(other: str, part: str, found=found) -> float:
            return statistics.median(getattr(o, part) / getattr(s, part) for o, s in zip(spent[other], found))

        same = next((i for i, (x, y) in enumerate(zip(first_text, texts[name])) if x != y), config.new)
        print(
            f"  {name:22s} {ids.numel() / prefill:7.0f} tokens/s {per_second:7.1f} tokens/s "
            f"{sizes[name] / step / 1e9:5.1f} GB/s"
            f"   {beside('transformers', 'prefill'):5.2f}  {beside('transformers', 'decode'):5.2f}"
            f"   {beside('ours bf16', 'prefill'):5.2f}  {beside('ours bf16', 'decode'):5.2f}   {same:4d}"
        )


def decoding_sides(
    shape: ModelConfig, config: DecodeBench, ids: torch.Tensor, scratch: Path
) -> tuple[dict[str, Callable], dict[str, int]]:
    """Make what takes turns: functions that give prefill and decode seconds, text; bytes a step reads."""
    ours, theirs = both(shape, torch.bfloat16)
    save_model(ours, scratch / "whole", dtype=torch.bfloat16)
    models = {"ours bf16": fuse(ours, rows=config.batch)}
    for name, how in (
        ("ours int8", {"bits": 8}),
        ("ours int4 g64", {"bits": 4, "group_size": 64}),
        ("ours int4 g32", {"bits": 4, "group_size": 32}),
    ):
        with contextlib.redirect_stdout(io.StringIO()):
            folder = scratch / name.replace(" ", "-")
            quantize_folder(
                QuantizeConfig(str(scratch / "whole"), str(folder), head_bits=8, search=False, **how)
            )
        models[name] = fuse(load_model(folder), rows=config.batch)
    sampling = Sampling(config.new, temperature=0, ignore_eos=True)

    def our_text(model: Model, compiled: CompiledSteps | None = None):
        model.compiled_steps = compiled
        start, first, row = time.perf_counter(), 0.0, []
        for tokens in decode_tokens(model, ids.tolist(), sampling):
            first = first or time.perf_counter()
            row.append(tokens[0])
        return first - start, time.perf_counter() - first, row

    def their_text():
        more = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        start = time.perf_counter()
        theirs.generate(ids, max_new_tokens=1, min_new_tokens=1, **more)
        first = time.perf_counter()
        out = theirs.generate(ids, max_new_tokens=config.new, min_new_tokens=config.new, **more)
        prefill = first - start
        return prefill, time.perf_counter() - first - prefill, out[0, config.prompt :].tolist()

    sides: dict[str, Callable] = {"transformers": their_text}
    sides |= {name: functools.partial(our_text, model) for name, model in models.items()}
    if config.compile:
        compiled = {f"{name} compiled": (model, CompiledSteps(model)) for name, model in models.items()}
        sides |= {name: functools.partial(our_text, *pair) for name, pair in compiled.items()}
        models |= {name: model for name, (model, _) in compiled.items()}
    sizes = {name: weight_bytes(model) for name, model in models.items()}
    sizes["transformers"] = sizes["ours bf16"]
    if config.batch == 1 and importlib.util.find_spec("llama_cpp"):
        plain = load_model(scratch / "whole")
        for kind in ("F16", "Q8_0", "Q4_0"):
            path = scratch / f"{kind}.gguf"
            write_gguf(plain, kind, path)
            sides[f"llama.cpp {kind}"] = llama_cpp_text(path, ids[0].tolist(), config)
            sizes[f"llama.cpp {kind}"] = path.stat().st_size
    return sides, sizes


def write_gguf(model: Model, kind: str, path: Path) -> None:
    """Write a LLaMA or a Phi for llama.cpp: F16, or Q8_0, or Q4_0 with the embedding and the head in Q8_0."""
    import gguf

    shape, phi = model.config, model.config.family == "phi"
    writer = gguf.GGUFWriter(path, "phi2" if phi else "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_dimension_count(shape.rotary_dim)
    (writer.add_layer_norm_eps if phi else writer.add_layer_norm_rms_eps)(shape.norm_eps)
    writer.add_tokenizer_model("llama")  # a vocabulary of names that nobody reads
    writer.add_token_list([f"<{i}>" for i in range(shape.vocab_size)])
    writer.add_token_scores([0.0] * shape.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * shape.vocab_size)
    names = [
        ("embed_tokens", "token_embd"), ("^norm", "output_norm"), ("lm_head", "output"), ("layers", "blk"),
        ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"), ("mlp.", "ffn_"),
        ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("_proj", ""),
    ]  # fmt: skip
    for ours, p in model.named_parameters():
        if ours == "lm_head.weight" and shape.tie_word_embeddings:
            continue
        value, name = p.detach().float(), ours
        if not phi and re.search("[qk]_proj", ours):  # it turns neighbours, not halves
            value = value.unflatten(0, (-1, 2, shape.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        for old, new in names:
            name = re.sub(old, new, name)
        table = ours in ("embed_tokens.weight", "lm_head.weight")
        kept = "F32" if p.dim() == 1 else "Q8_0" if table and kind == "Q4_0" else kind
        data_type = getattr(gguf.GGMLQuantizationType, kept)
        writer.add_tensor(name, gguf.quants.quantize(value.numpy(), data_type), raw_dtype=data_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_text(path: Path, ids: list[int], config: DecodeBench) -> Callable:
    """Give a function that writes with llama.cpp: (prefill seconds, decode seconds, text)."""
    import llama_cpp

    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(
        str(path), n_ctx=config.prompt + config.new, n_batch=512, n_ubatch=512, n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip

    def step(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)  # must live as long as the batch
        batch = llama_cpp.llama_batch_get_one(array, len(tokens))
        if llama_cpp.llama_decode(llama.ctx, batch):
            raise RuntimeError("llama.cpp failed to decode")
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (llama.n_vocab(),)).argmax())

    def text():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llama.ctx), True)
        start = time.perf_counter()
        row = [step(ids)]
        first = time.perf_counter()
        while len(row) < config.new:
            row.append(step(row[-1:]))
        return first - start, time.perf_counter() - first, row

    return text


@dataclass
class FormatsBench:
    folders: tyro.conf.Positional[list[str]]  # of one model in several formats; the first is the measure
    text: str  # for the perplexity
    exam: str = ""  # in C-Eval's form, as for evaluate.py
    text_tokens: int = 20_000  # of the text at most
    prompt: int = 32  # tokens
    new: int = 64  # tokens that are timed
    rounds: int = 5  # of timing


def formats(config: FormatsBench) -> None:
    """Compare the formats of one model: size, perplexity, exam, and the speed of one text."""
    exam = [q for found in evaluate.read_exam(config.exam).values() for q in found] if config.exam else []
    sampling = Sampling(config.new, temperature=0, ignore_eos=True)
    sides, lines = {}, {}
    for folder in config.folders:
        size = sum(path.stat().st_size for path in model_folder(folder).glob("*.safetensors"))
        lines[folder] = f"{size / 1e6:9.2f} MB {perplexity(folder, config.text, config.text_tokens):12.3f}"
        model, tokenizer = load(folder)
        if exam:
            right, error = evaluate.accuracy(model, tokenizer, exam).micro()
            lines[folder] += f"   {right:6.1%} ± {error:.1%}"
        prompt = text_rows(config.text, tokenizer, config.prompt, config.prompt)

        def write(model=model, prompt=prompt[0]) -> float:
            start = time.perf_counter()
            generate(model, [prompt], sampling)
            return time.perf_counter() - start

        sides[folder] = write
    seconds = alternate(config.rounds, **sides)
    width = max(map(len, config.folders))
    print(f"{'':{width}}       size   perplexity" + "          exam" * bool(exam) + "   one text")
    for folder in config.folders:
        rate = config.new / statistics.median(seconds[folder])
        beside = ratio(seconds, folder, config.folders[0])
        print(f"{folder:{width}} {lines[folder]}   {rate:6.0f} tokens/s ({beside:.2f} x)")


# --- 2. the demonstration model -----------------------------------------------------------------------------


@dataclass
class WorldBench:
    folder: tyro.conf.Positional[str]  # a run or model folder trained on the demonstration text
    demo: str = "out/demo"  # what demo_corpus.py wrote
    sentences: int = 200  # to sample and parse
    facts: int = 300  # to complete
    temperature: float = 0.7  # of the sampled sentences
    seed: int = 1  # of the world, the sample and the choice of facts


def world(config: WorldBench) -> None:
    """Measure form, novelty and knowledge of a model trained on the demonstration text."""
    known = demo_corpus.build_world(config.seed)
    model, tokenizer = load(config.folder, rows=16)
    draw = random.Random(config.seed)

    text = "\n".join(common.documents([f"{config.demo}/pretrain"]))
    sentences, passages = [], []
    start = tokenizer.encode_prompt("")
    for batch in range(100):
        prompts = [start] * 16
        samplings = [
            Sampling(160, config.temperature, seed=config.seed + 1000 * batch + i) for i in range(16)
        ]
        for new in generate(model, prompts, samplings):
            sample = tokenizer.decode(new)
            sentences += demo_corpus.split_sentences(sample)[:-1]  # the last one may be cut
            passages += [sample[i : i + 64] for i in range(0, len(sample) - 63, 64)]
        if len(sentences) >= config.sentences and len(passages) >= config.sentences:
            break
    if not passages:
        raise ValueError(f"{config.folder}: the model wrote no text of 64 characters")
    sentences, passages = sentences[: config.sentences], passages[: config.sentences]
    readings = [demo_corpus.check(known, s) for s in sentences]
    form = sum(well_formed for well_formed, _ in readings)
    true = sum(right for _, right in readings)
    share = f"{form / len(sentences):.1%}"
    print(f"form: {form} of {len(sentences)} sampled sentences are well-formed ({share}), {true} also true")
    copied = sum(p in text for p in passages)
    share = f"{copied / len(passages):.1%}"
    print(f"novelty: {copied} of {len(passages)} sampled 64-character passages are copies ({share})")

    rows = common.raw_documents(Path(config.demo) / "facts.jsonl")
    facts = [common.parse_json_line(raw, f"facts.jsonl:{line}") for line, raw in rows]
    chosen = draw.sample(facts, min(config.facts, len(facts)))
    values = defaultdict(set)
    for fact in facts:
        values[fact["relation"]].add(fact["value"])
    right = 0
    for fact in chosen:
        known_values = sorted(values[fact["relation"]])
        right += complete(model, tokenizer, draw.choice(fact["cloze"]), known_values) == fact["value"]
    print(f"knowledge: {right} of {len(chosen)} facts completed ({right / len(chosen):.1%})")


@torch.inference_mode()
def complete(model: Model, tokenizer: Tokenizer, cloze: str, values: list[str]) -> str:
    """Choose greedily, token by token, with which of the values a model goes on behind the cloze.

    The tokens of cloze and value are those of the joint text: a piece may begin in one and end in the other
    (今年七十), and a model has never seen the cloze cut off by itself.
    """
    rows = {value: tokenizer.encode_prompt(cloze + value) for value in values}
    start = os.path.commonprefix(list(rows.values()))
    while len(rows) > 1:
        ends = [value for value, row in rows.items() if row == start]  # 二十 where 二十三 is possible too
        following = sorted({row[len(start)] for row in rows.values() if row != start})
        logits = model(torch.tensor([start]), last=True)[0]
        if ends and int(logits.argmax()) not in following:
            return ends[0]
        start = start + [max(following, key=lambda i: float(logits[i]))]
        rows = {value: row for value, row in rows.items() if row[: len(start)] == start}
    return next(iter(rows))


@dataclass
class NgramBench:
    demo: tyro.conf.Positional[str]  # what demo_corpus.py wrote
    order: int = 5  # the next character follows the order − 1 before it


def ngram(config: NgramBench) -> None:
    """Answer the demonstration's held-out questions by a character n-gram model: what mere copying reaches.

    It reads what our model reads, pretraining text and instruction rows, and writes the most frequent next
    character behind the longest context that it has seen (greedy back-off).
    """
    followers: dict[str, Counter] = defaultdict(Counter)
    dialogues = (r["messages"] for r in chat.read_rows([Path(config.demo) / "sft.jsonl"]))
    read = ("".join(m["content"] + "\n" for m in messages) for messages in dialogues)
    for text in itertools.chain(common.documents([f"{config.demo}/pretrain"]), read):
        for size in range(config.order):
            for i in range(size, len(text)):
                followers[text[i - size : i]][text[i]] += 1

    def reply(question: str) -> str:
        text = question + "\n"
        while len(text) < len(question) + 64:
            context = next(
                c for n in range(config.order - 1, -1, -1) if (c := text[len(text) - n :]) in followers
            )
            letter = followers[context].most_common(1)[0][0]
            if letter == "\n":
                break
            text += letter
        return text[len(question) + 1 :]

    rows = chat.read_rows([Path(config.demo) / "heldout.jsonl"], "questions")
    replies = [reply(row["messages"][0]["content"]) for row in rows]
    for kind, (right, asked) in sorted(exact_matches(rows, replies).items()):
        print(f"{kind} {right} of {asked} ({right / asked:.1%})")


# --- 3. compression -----------------------------------------------------------------------------------------


class KneserNey:
    """An interpolated Kneser-Ney character model of order 3 with a discount per order: n1 / (n1 + 2·n2)."""

    def __init__(self, texts: list[str]):
        grams = Counter(
            gram for t in texts for gram in zip("\x02\x02" + t + "\x03", "\x02" + t + "\x03", t + "\x03")
        )
        self.levels = []  # orders 3, 2, 1: counts, totals and distinct followers by context, discount
        for _ in range(3):
            totals, followers = Counter(), Counter()
            for gram, n in grams.items():
                totals[gram[:-1]] += n
                followers[gram[:-1]] += 1
            ones, twos = (sum(n == k for n in grams.values()) for k in (1, 2))
            discount = ones / (ones + 2 * twos) if ones else 0.5  # without singletons there is no estimate
            self.levels.append((grams, totals, followers, discount))
            grams = Counter(gram[1:] for gram in grams)  # how many distinct characters come before it
        self.floor = 1 / 0x110000  # a character never seen is one of all code points

    def probability(self, gram: tuple[str, str, str]) -> float:
        """P(third | first two characters)."""
        p = self.floor
        for order, (counts, totals, followers, discount) in zip((1, 2, 3), reversed(self.levels)):
            part = gram[3 - order :]
            total = totals[part[:-1]]
            if total:
                p = max(0.0, counts[part] - discount) / total + discount * followers[part[:-1]] / total * p
        return p

    def bits(self, text: str) -> float:
        """Bits to code a text and its end."""
        grams = zip("\x02\x02" + text + "\x03", "\x02" + text + "\x03", text + "\x03")
        return -sum(math.log2(self.probability(g)) for g in grams)


@torch.inference_mode()
def sliding_nats(model: Model, ids: list[int], width: int) -> float:
    """Sum the nll of a document's tokens after the first; windows of `width` tokens move on by half of that.

    So every token is coded once, and sees at least half a window of what stands before it.
    """
    total, coded = 0.0, 1
    for start in range(0, len(ids), width // 2):
        end = min(start + width + 1, len(ids))
        if end > coded:
            row = torch.tensor([ids[start:end]])
            total += float(model(row[:, :-1], row[:, 1:])[0, coded - start - 1 :].sum())
            coded = end
    return total


def bits_per_byte(folder: str | Path, texts: list[str], width: int, size: int) -> float:
    """Bits that a run or model folder takes to code texts, per each of `size` bytes.

    width: tokens that the model sees at a time; 0: its context.
    """
    folder = model_folder(folder)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    width = width or model.config.max_position_embeddings
    nats = sum(sliding_nats(model, tokenizer.encode_document(text), width) for text in texts)
    if not tokenizer.add_bos:  # nothing predicts a document's first token: it costs all its ln V nats
        nats += len(texts) * math.log(model.config.vocab_size)
    return nats / math.log(2) / size


@dataclass
class BitsBench:
    folder: tyro.conf.Positional[str]  # a run or model folder
    shards: str  # the packed folder that it was trained on
    row_tokens: int = 0  # tokens that the model sees at a time; 0: its context


def bits(config: BitsBench) -> None:
    """Compare bits per byte on the validation documents with xz -9e and a character trigram."""
    tokenizer = load_tokenizer(model_folder(config.folder))
    parts = {part: Shards([config.shards], part) for part in ("train", "val")}
    texts = {
        part: [tokenizer.decode(s.read(d, 0, 1 << 62).tolist()) for d in range(len(s))]
        for part, s in parts.items()
    }
    size = parts["val"].bytes
    assert size == sum(len(t.encode()) for t in texts["val"]), "decoding gave other text than was packed"
    packed = lzma.compress("".join(texts["val"]).encode(), preset=9 | lzma.PRESET_EXTREME)
    trigram = KneserNey(texts["train"])
    trigram_bits = sum(trigram.bits(t) for t in texts["val"])
    ours = bits_per_byte(config.folder, texts["val"], config.row_tokens, size)
    print(f"bits per byte on {len(texts['val'])} held-out documents, {size:,} bytes")
    print(f"  xz -9e             {8 * len(packed) / size:.3f}")
    print(f"  Kneser-Ney trigram {trigram_bits / size:.3f}")
    print(f"  ours               {ours:.3f}")


# --- 4. data ------------------------------------------------------------------------------------------------


@dataclass
class DataBench:
    corpus: tyro.conf.Positional[tuple[str, ...]]  # files of documents, or folders of them
    vocab_size: int = 8192  # of the vocabularies that are learnt here
    learn_chars: int = 5_000_000  # from so many characters
    encode_mb: float = 5.0  # megabytes of documents to encode
    pack_mb: float = 100.0  # megabytes of documents to pack: the corpus, again and again
    rounds: int = 5  # each side encodes all of it so often


# cut at line ends, then around words, marks, runs of Han, digits: as the first DeepSeek models did
STAGE_PATTERNS = [r"[\r\n]", r"\s?\p{Latin}+", r"\s?[\p{P}\p{S}]+", r"\p{Han}+", r"\p{N}"]


def data(config: DataBench) -> None:
    """Time encoding on one core beside `tokenizers`, and packing on all cores with the memory it takes."""
    with tempfile.TemporaryDirectory() as name:
        folder, documents = Path(name), list(texts_up_to(config.corpus, config.learn_chars))
        write_documents(folder / "learn.jsonl", documents)
        for kind in ("bpe", "bytebpe"):
            options = ("--kind", kind, "--vocab_size", config.vocab_size, "--out", folder / kind)
            watch("tokenizer.py", "train", folder / "learn.jsonl", *options)
        spec = common.read_json(folder / "bytebpe" / "tokenizer.json")
        split = spec["pre_tokenizer"]["pretokenizers"].pop(0)
        stages = [split | {"pattern": {"Regex": pattern}} for pattern in STAGE_PATTERNS]
        spec["pre_tokenizer"]["pretokenizers"][:0] = stages
        common.write_json(folder / "stages" / "tokenizer.json", spec)

        skip, size, documents = len(documents), 0, []  # others than those learnt from, if there are
        for text in itertools.islice(itertools.cycle(common.documents(config.corpus)), skip, None):
            documents.append(text)
            size += len(text.encode())
            if size >= config.encode_mb * 1e6:
                break
        print(f"encoding {len(documents):,} documents, {size / 1e6:.1f} MB, in MB/s of one core")
        for title, kind in (("SentencePiece", "bpe"), ("byte-level", "bytebpe"), ("in stages", "stages")):
            encoding(title, folder / kind, documents, size, config.rounds)

        every = (text for _ in itertools.count() for text in common.documents(config.corpus))
        write_documents(folder / "pack.jsonl", every, config.pack_mb * 1e6)
        size = (folder / "pack.jsonl").stat().st_size / 1e6
        print(f"packing {size:,.0f} MB with {os.cpu_count()} processes")
        for title, kind in (("SentencePiece", "bpe"), ("byte-level", "bytebpe")):
            options = ("--tokenizer", folder / kind, "--out", folder / f"packed-{kind}")
            took = watch("data.py", "pack", folder / "pack.jsonl", *options)
            print(
                f"  {title:14} {size / took.seconds:5.1f} MB/s, {took.memory / 1e6:.0f} MB of memory at most"
            )


@dataclass
class BpeBench:
    corpus: tyro.conf.Positional[tuple[str, ...]]  # files of documents, or folders of them
    chars: tuple[float, ...] = (1e7, 2.5e7)  # to learn from; more than the corpus has: see `lengthened`
    vocab_size: int = 32_000  # to learn
    peer: bool = True  # train `tokenizers` as well; its memory grows fast: 10 GB at 50 M characters


BPE_PEER = """
import json, sys
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
corpus, pattern, size, out = sys.argv[1:]
tokenizer = Tokenizer(models.BPE())
level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
alphabet, specials = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>", "<pad>"]
trainer = trainers.BpeTrainer(
    vocab_size=int(size),
    min_frequency=2,
    initial_alphabet=alphabet,
    special_tokens=specials,
    show_progress=False,
)
tokenizer.train_from_iterator((json.loads(line)["text"] for line in open(corpus)), trainer)
tokenizer.save(out)
"""


def bpe(config: BpeBench) -> None:
    """Learn byte-level BPE by us and by `tokenizers`: time, memory, characters per token on held-out text."""
    import tokenizers

    texts = list(common.documents(config.corpus))
    held_out, texts = texts[::50], [text for i, text in enumerate(texts) if i % 50]
    size = sum(map(len, held_out))
    print(f"corpus: {sum(map(len, texts)):,} characters and {size:,} held out")
    for chars in map(int, config.chars):
        with tempfile.TemporaryDirectory() as name:
            corpus, ours, theirs = (Path(name) / file for file in ("corpus.jsonl", "ours", "theirs.json"))
            write_documents(corpus, lengthened(texts, chars))
            options = ("--kind", "bytebpe", "--vocab_size", config.vocab_size, "--max_chars", 10**12)
            commands = {"ours": ("tokenizer.py", "train", corpus, *options, "--out", ours)}
            if config.peer:
                commands["tokenizers"] = ("-c", BPE_PEER, corpus, split_pattern(), config.vocab_size, theirs)
            for side, command in commands.items():
                took = watch(*command)
                path = theirs if side == "tokenizers" else ours / "tokenizer.json"
                encode = tokenizers.Tokenizer.from_file(str(path)).encode
                ids = sum(len(encode(text, add_special_tokens=False).ids) for text in held_out)
                said = re.findall(r"[\d,]+ distinct pre-tokens", took.output)
                print(
                    f"{chars:,} characters, {side:10}: {took.seconds:.0f} s, {took.cpu:.0f} CPU s, "
                    f"{took.memory / 1e9:.2f} GB, {size / ids:.4f} characters per token",
                    *said,
                    flush=True,
                )


def lengthened(texts: list[str], chars: int) -> Iterator[str]:
    """Yield texts of `chars` characters in all: the given ones, then clauses cut inside and joined anew.

    So words stay words, and whole clauses, the pre-tokens of Chinese, are ever new ones, as in real text.
    """
    for text in texts:
        yield text[:chars]
        chars -= len(text)
        if chars <= 0:
            return
    rng = random.Random(0)
    clauses = [c for text in texts for c in re.findall(r"[\u4e00-\u9fff]{4,}", text)]
    while chars > 0:
        pairs = (rng.sample(clauses, 2) for _ in range(40))
        halves = ((a[: rng.randrange(1, len(a))], b[rng.randrange(1, len(b)) :]) for a, b in pairs)
        text = "，".join(a + b for a, b in halves)[: chars - 1] + "。"
        yield text
        chars -= len(text)


@dataclass
class CleanBench:
    corpus: tyro.conf.Positional[tuple[str, ...]]  # files of documents, or folders of them
    tokens: float = 6e5  # to train each model on
    seeds: int = 3  # models of each kind
    vocab_size: int = 8192  # of the one tokenizer
    held_out: float = 0.03  # share of the documents that the models are scored on


def clean(config: CleanBench) -> None:
    """Train the demo model on raw and on cleaned documents; score both on held-out ones, raw and cleaned.

    The same tokenizer (learnt from the raw text), tokens and seeds. Held-out documents are repaired, but none
    is dropped. Bits are per byte of the raw text: compare models within one form, where both code the same.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, parts = Path(name), ([], [])
        for text in common.documents(config.corpus):
            parts[drawn(text.encode()) < config.held_out].append(text)
        write_documents(folder / "raw.jsonl", parts[0])
        watch("clean.py", folder / "raw.jsonl", "--out", folder / "cleaned")
        options = ("--vocab_size", config.vocab_size, "--out", folder / "tok")
        watch("tokenizer.py", "train", folder / "raw.jsonl", *options)
        sources = {"raw": folder / "raw.jsonl", "cleaned": folder / "cleaned"}
        for side, source in sources.items():
            options = ("--tokenizer", folder / "tok", "--val_ratio", 0, "--out", folder / f"packed-{side}")
            watch("data.py", "pack", source, *options)
            report = common.read_json(folder / f"packed-{side}" / "shards.json")["train"]
            print(f"{side}: {report['documents']:,} documents, {report['tokens']:,} tokens, ", end="")
            print(f"{config.tokens / report['tokens']:.2f} epochs")
        tests = {"raw": parts[1], "cleaned": list(map(clean_text, parts[1]))}
        size = sum(len(text.encode()) for text in parts[1])
        changed = sum(map(operator.ne, *tests.values()))
        print(
            f"held out: {len(parts[1]):,} documents, {size:,} bytes, {changed:,} of them changed by the rules"
        )
        scores = defaultdict(list)  # (side, form) -> bits per byte of each seed
        for seed in range(1, config.seeds + 1):
            for side in sources:
                run = folder / f"run-{side}-{seed}"
                schedule = "--lr 4e-3 --schedule wsd --decay 0.4 --warmup 50 --final_lr 0.02 --eval_every 0"
                shape = (
                    f"--preset demo --row_tokens 256 --tokens_per_step 4096 --tokens {config.tokens} --keep 1"
                )
                options = (*schedule.split(), *shape.split(), "--seed", seed, "--save_every", 0)
                watch("train.py", "--data", folder / f"packed-{side}", "--out", run, *options)
                for form, texts in tests.items():
                    scores[side, form].append(bits_per_byte(run, texts, 256, size))
                figures = ", ".join(f"{scores[side, form][-1]:.4f} on {form}" for form in tests)
                print(f"seed {seed}, trained on {side:7}: bits per byte {figures}", flush=True)
        for form in tests:
            gains = np.subtract(scores["raw", form], scores["cleaned", form])
            print(f"on {form}: cleaning saves {gains.mean():.4f} bits per byte, ", end="")
            print(f"standard deviation over the seeds {gains.std(ddof=min(1, len(gains) - 1)):.4f}")


@dataclass
class DedupBench:
    corpus: tyro.conf.Positional[tuple[str, ...]]  # files of documents, or folders of them
    documents: int = 1_000_000  # of about 100 characters to clean
    pairs: int = 1000  # of near-copies for each kind of edit


def dedup(config: DedupBench) -> None:
    """Clean and de-duplicate short documents: time, memory, and which near-copies are found.

    The documents are sentences of the corpus in new order; a sixth are copies with 2 % of the characters
    edited, a fortieth whole copies. True similarity is the Jaccard index of all 5-character shingles.
    """
    rng, texts = random.Random(0), common.documents(config.corpus)
    sentences = list(
        dict.fromkeys(s for text in texts for s in re.findall("[^。！？\n]{4,60}[。！？]", text))
    )
    find_copies(rng, sentences, config.pairs)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "in.jsonl"
        write_documents(source, itertools.islice(short_documents(rng, sentences), config.documents))
        took = watch("clean.py", source, "--min_han", 0, "--out", Path(name) / "out")
        bars = re.findall(r"([\w-]+): 100%[^\n\r]*\[([\d:]+)<", took.output)
        print(
            f"{config.documents:,} documents, {source.stat().st_size / 1e6:,.0f} MB: {took.seconds:.0f} s, ",
            end="",
        )
        print(f"{took.memory / 1e9:.2f} GB;", *(f"{name} {clock}" for name, clock in bars))
        print(f"  {took.output.strip().splitlines()[-1]}")


def short_documents(rng: random.Random, sentences: list[str]) -> Iterator[str]:
    """Yield documents of a few sentences without end, and copies of some."""
    while True:
        yield (text := "".join(few_sentences(rng, sentences)))
        if rng.random() < 0.2:
            yield edit(rng, text, 0.02)
        if rng.random() < 0.03:
            yield text


def few_sentences(rng: random.Random, sentences: list[str]) -> list[str]:
    """Draw sentences of 90 characters or a little more."""
    few = []
    while sum(map(len, few)) < 90:
        few.append(rng.choice(sentences))
    return few


def edit(rng: random.Random, text: str, rate: float) -> str:
    """Delete, replace or insert a share of the characters."""
    new = lambda: chr(rng.randint(0x4E00, 0x9FA5))
    return "".join(c if rng.random() >= rate else rng.choice(["", new(), c + new()]) for c in text)


def find_copies(rng: random.Random, sentences: list[str], count: int) -> None:
    """Print the share of near-copies found by kind of edit; recall and precision by true similarity."""
    shuffled = lambda part: rng.sample(part, len(part))
    kinds = {"characters in disorder": lambda few: "".join(shuffled("".join(few)))}
    kinds |= {"last sentence first": lambda few: "".join([few[-1], *few[:-1]])}
    kinds |= {"a sentence deleted": lambda few: "".join(few[:-1])}
    for percent in range(1, 16):
        kinds[f"{percent} % edited"] = lambda few, rate=percent / 100: edit(rng, "".join(few), rate)
    drawn = [(kind, few_sentences(rng, sentences)) for kind in kinds for _ in range(count)]
    pairs = [["".join(few), kinds[kind](few)] for kind, few in drawn]
    texts = [comparable(text) for pair in pairs for text in pair]
    alive = np.arange(len(texts))
    labels = near_duplicates(signatures(texts), alive, 0 * alive, CleanConfig.threshold)
    found = labels[::2] == labels[1::2]
    sets = [{t[i : i + SHINGLE] for i in range(len(t) - SHINGLE + 1)} for t in texts]
    true = np.array([len(a & b) / len(a | b) for a, b in zip(sets[::2], sets[1::2])])
    for i, kind in enumerate(kinds):
        part = slice(i * count, (i + 1) * count)
        print(f"  {kind}: {found[part].mean():.1%} found, mean similarity {true[part].mean():.2f}")
    positive, negative = true >= 0.75, (true >= 0.3) & (true <= 0.55)
    right, wrong = found[positive].sum(), found[negative].sum()
    print(f"similarity over 0.75: {right} of {positive.sum()} found (recall {right / positive.sum():.4f})")
    print(f"0.3 to 0.55: {wrong} of {negative.sum()} found (precision {right / (right + wrong):.4f})")


def write_documents(path: Path, texts: Iterable[str], size: float = math.inf) -> None:
    """Write texts as .jsonl until the file has `size` bytes."""
    with open(path, "wb") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
            if file.tell() >= size:
                break


class Watched(NamedTuple):
    """What a script took: seconds, CPU seconds of all cores, peak anonymous memory in bytes; its output."""

    seconds: float
    cpu: float
    memory: int
    output: str


def watch(*arguments) -> Watched:
    """Run Python with these arguments, in the folder of our scripts, to its end.

    The memory of all its processes is looked at five times a second; shared pages count once. Linux only.
    """
    start, before, peak = time.perf_counter(), os.times(), 0
    with tempfile.TemporaryFile("w+") as file:
        command = [sys.executable, *map(str, arguments)]
        process = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=file, stderr=file)
        while process.poll() is None:
            peak = max(peak, sum(map(anonymous_bytes, family(process.pid))))
            time.sleep(0.2)
        seconds, after = time.perf_counter() - start, os.times()
        file.seek(0)
        output = file.read()
    if process.returncode:
        raise ValueError(f"{arguments[0]} failed: {output[-2000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Watched(seconds, cpu, peak, output)


def family(pid: int) -> list[int]:
    """List a process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return []
    return [pid, *(p for child in children for p in family(int(child)))]


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process; what it shares with others counts in parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))


def encoding(title: str, folder: Path, documents: list[str], size: int, rounds: int) -> None:
    """Encode documents with our tokenizer and with `tokenizers`; print both speeds, and whether ids agree."""
    import tokenizers

    def peer() -> Callable:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return lambda text: tokenizer.encode(text, add_special_tokens=False).ids

    sides = {"tokenizers": peer, "ours": lambda: load_tokenizer(folder).encode}

    def timed(load: Callable) -> float:
        encode = load()  # anew: neither side remembers pieces of the round before
        start = time.process_time()
        for text in documents:
            encode(text)
        return time.process_time() - start

    one, other = (load() for load in sides.values())
    differ = sum(one(text) != other(text) for text in documents)
    seconds = alternate(rounds, **{name: functools.partial(timed, load) for name, load in sides.items()})
    theirs, ours = (size / 1e6 / statistics.median(seconds[name]) for name in ("tokenizers", "ours"))
    ids = f"other ids in {differ} documents" if differ else "the same ids"
    times = ratio(seconds, "ours", "tokenizers")
    print(f"  {title:14} ours {ours:.2f}, tokenizers {theirs:.2f}: {times:.2f} x ({ids})")


# --- 5. curves ----------------------------------------------------------------------------------------------


@dataclass
class PlotBench:
    runs: tyro.conf.Positional[tuple[str, ...]]  # folders that train.py or another stage wrote
    out: str = "plot.png"  # picture to write


def plot(config: PlotBench) -> None:
    """Draw the metrics of several runs into one picture."""
    figure = draw_runs(config.runs)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    Path(config.out).write_bytes(picture.getvalue())
    print(f"{config.out}: {', '.join(config.runs)}")


def draw_runs(runs: Sequence[str]):
    """Draw four panels: loss over tokens, loss over time, learning rate, speed and gradient norm.

    Returns a matplotlib Figure. Training is a thin line, validation a marked one. A panel stays without a run
    whose log has not its figures. ValueError: no run, no metrics, no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is not installed (pip install matplotlib)") from None
    figure = Figure(figsize=(12, 8), layout="constrained")
    (by_tokens, by_time), (rate, speed) = figure.subplots(2, 2)
    norm = speed.twinx()
    names = [Path(run).resolve().name for run in runs]
    for i, run in enumerate(runs):
        steps = run_metrics(run)
        at = {row["step"]: row for row in steps if "val_loss" not in row}
        look = {"color": f"C{i}", "label": names[i] if names.count(names[i]) == 1 else str(run)}
        trained = [row for row in steps if "loss" in row]
        checked = [row for row in steps if "val_loss" in row]
        for axes, where in ((by_tokens, "tokens"), (by_time, "minutes")):
            axes.plot([row[where] for row in trained], [row["loss"] for row in trained], lw=0.7, **look)
            points = [(at[row["step"]][where], row["val_loss"]) for row in checked if row["step"] in at]
            if points:
                axes.plot(*zip(*points), marker="o", ms=4, lw=1.5, color=look["color"])
        for axes, key, line in (
            (rate, "lr", "-"),
            (speed, "tokens_per_second", "-"),
            (norm, "grad_norm", ":"),
        ):
            points = [(row["tokens"], row[key]) for row in trained if key in row]
            if points:
                axes.plot(*zip(*points), line, lw=0.7, **look)
    titles = ("loss (thin: training, dots: validation)", "loss", "learning rate", "speed")
    ys = ("nats per token", "nats per token", "", "tokens per second")
    for axes, title, y in zip(figure.axes, titles, ys):
        axes.set(title=title, xlabel="minutes" if axes is by_time else "trained tokens", ylabel=y)
        axes.grid(alpha=0.3)
        axes.legend()
    norm.set(ylabel="gradient norm (dotted)", yscale="log")
    return figure


def run_metrics(run: str | Path) -> list[dict]:
    """Read a run's metrics.jsonl; each step's row gets `minutes`, the time of all steps up to it."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is not a run: it has no metrics.jsonl. Give the --out of a training")
    rows, seconds = common.read_metrics(path), 0.0
    for row in rows:
        if "seconds" in row:
            seconds += row["seconds"]
            row["minutes"] = seconds / 60
    if not any("loss" in row and "minutes" in row for row in rows):
        raise ValueError(f"{path} holds no step with a loss; train for at least one step")
    return rows


# --- 6. optimizers ------------------------------------------------------------------------------------------


@dataclass
class OptimizersBench:
    corpus: tyro.conf.Positional[tuple[str, ...]]  # files of documents, or folders of them
    tokens: float = 5e5  # to train each model on
    seeds: int = 3  # models of each optimizer, at its best learning rate
    lr: float = 4e-3  # middle of the scan; half and twice of it are tried, too, and further where that helps
    vocab_size: int = 6144  # of the one tokenizer
    preset: str = "demo"  # a name of model.PRESETS
    out: str = "out/optimizers"  # folder for the runs, and for runs.png of the best


def optimizers(config: OptimizersBench) -> None:
    """Train with AdamW and with Muon on equal tokens: validation losses, and when Muon is where AdamW ends.

    For each optimizer the learning rate is scanned by factors of two on seed 1, as far as the loss falls; the
    other seeds train at the best. Two runs go on at a time, with a thread each. The crossing is read off
    Muon's own curve, whose learning rate has not fallen there: a shorter Muon run would need fewer tokens.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    with common.atomic_folder(config.out) as folder, ThreadPoolExecutor(2) as pool:
        watch("clean.py", *(Path(path).resolve() for path in config.corpus), "--out", folder / "clean")
        learn = ("--vocab_size", config.vocab_size, "--out", folder / "tok")
        watch("tokenizer.py", "train", folder / "clean", *learn)
        options = ("--tokenizer", folder / "tok", "--val_ratio", 0.005, "--out", folder / "packed")
        watch("data.py", "pack", folder / "clean", *options)
        report = common.read_json(folder / "packed" / "shards.json")
        print(f"{report['train']['tokens']:,} tokens to train on, {report['val']['tokens']:,} to validate")

        def run(kind: str, lr: float, seed: int) -> np.ndarray:
            """Train one model; return its curve, (evaluations, 2): tokens, validation loss."""
            out = folder / f"{kind}-{lr:g}-{seed}"
            every = max(1, round(config.tokens / 2048 / 10))
            shape = (
                f"--preset {config.preset} --row_tokens 256 --tokens_per_step 2048 --tokens {config.tokens}"
            )
            schedule = f"--optimizer {kind} --lr {lr} --warmup 50 --final_lr 0.02 --seed {seed}"
            saving = f"--eval_every {every} --save_every 0 --keep 1"
            options = f"{shape} {schedule} {saving}".split()
            watch("train.py", "--data", folder / "packed", "--out", out, *options)
            rows = common.read_metrics(out / "metrics.jsonl")
            tokens = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
            curve = np.array([(tokens[r["step"]], r["val_loss"]) for r in rows if "val_loss" in r])
            speed = statistics.median(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
            print(f"{kind}, lr {lr:g}, seed {seed}: {curve[-1, 1]:.4f} ({speed:,.0f} tokens/s)", flush=True)
            return curve

        curves, best_of = {}, {}  # optimizer -> a curve per seed; its best run's folder

        def compare(kind: str) -> None:
            scan = {lr: run(kind, lr, 1) for lr in (config.lr / 2, config.lr, config.lr * 2)}
            last = lambda lr: scan[lr][-1, 1]
            while (best := min(scan, key=last)) in (min(scan), max(scan)):
                further = best / 2 if best == min(scan) else best * 2
                scan[further] = run(kind, further, 1)
            best_of[kind] = folder / f"{kind}-{best:g}-1"
            curves[kind] = [scan[best], *(run(kind, best, seed) for seed in range(2, config.seeds + 1))]

        list(pool.map(compare, ("adamw", "muon")))
        draw_runs(list(best_of.values())).savefig(folder / "runs.png", dpi=110)
        for kind, some in curves.items():
            ends = [curve[-1, 1] for curve in some]
            spread = statistics.stdev(ends) if len(ends) > 1 else 0.0
            print(f"{kind}: validation loss {statistics.mean(ends):.4f} ± {spread:.4f} (standard deviation)")
        shares = []
        for adamw, muon in zip(curves["adamw"], curves["muon"], strict=True):
            falling = np.minimum.accumulate(muon[:, 1])[::-1]  # np.interp wants rising x
            if falling[0] <= adamw[-1, 1]:
                shares.append(np.interp(adamw[-1, 1], falling, muon[::-1, 0]) / adamw[-1, 0])
        print(f"Muon reaches AdamW's last loss in {len(shares)} of {len(curves['muon'])} seeds", end="")
        each = ", ".join(f"{share:.0%}" for share in shares)
        print(f", after {each} of its tokens" if shares else "")


# --- 7. tuning beside trl -----------------------------------------------------------------------------------


@dataclass
class TuneBench:
    task: Literal["all", "full", "lora", "dpo"] = "all"  # what sft.py, sft.py --lora and dpo.py do
    # activations kept, or recomputed (trl's default, --activation_checkpointing here); DPO's reference live
    how: Literal["all", "kept", "recomputed", "live"] = "all"
    init: str = ""  # a model folder for both sides, instead of random weights of the next four
    layers: int = 8  # of a LLaMA shape
    width: int = 512  # of it, in heads of 64
    vocab: int = 32768  # tokens of its vocabulary
    length: int = 512  # tokens of a conversation: rows are full on both sides
    rows: int = 8  # conversations of a step; with dpo half as many pairs
    rounds: int = 5  # steps of each side
    threads: int = 0  # that compute; 0: as many as PyTorch takes
    memory: bool = True  # also measure each side's peak memory, in a process of its own
    side: Literal["", "trl", "ours"] = ""  # measure this side's memory alone, and print it as JSON

    def __post_init__(self):
        if self.rows < 2 or self.rows % 2 or self.length < 8 or self.rounds < 1:
            raise ValueError("--rows must be even, --length at least 8 and --rounds at least 1")
        if self.side and (self.task == "all" or self.how == "all"):
            raise ValueError("--side measures one --task and one --how")
        if self.how == "live" and self.task != "dpo":
            raise ValueError("--how live is a matter of --task dpo")


RATE = 1e-5  # the learning rate of both sides; betas 0.9 and 0.95, no weight decay, clipping at 1
END = "</s>"  # what a reply ends with; token 2


def tune(config: TuneBench) -> None:
    """Time whole steps of instruction tuning, LoRA and DPO beside trl's trainers; measure each side's memory.

    Both sides train the same weights with the same AdamW on the same rows, in bf16 (fp32 masters under
    autocast there; with LoRA a bf16 base and fp32 adapters), and take steps in turn: trl's trainer runs, and
    after each of its steps we take one. Its clock stands still while it makes a batch, ours does not. No
    figure is given unless tokens, targets, first loss and first gradient norm are the same: ValueError.

    Memory: the peak of anonymous memory over three steps, in a process of its own; of it what the process had
    before there was a model, and weights, gradients and moments, which are computed; the rest is compared.

    The ratios are a CPU's: there trl's head makes tiles of 4,096 x 32,768 logits in fp32 and multiplies in
    fp32 on the way back; on a GPU it has a Triton kernel. Rows are full, so packing would gain it nothing.
    """
    try:
        trl = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("trl is not installed (pip install -r requirements-bench.txt)") from None
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}  # trl would report its use; its bars
    if config.threads:
        torch.set_num_threads(config.threads)
    with tempfile.TemporaryDirectory() as name:
        if not config.init:
            shape = ("llama", config.vocab, config.width, config.layers, config.width // 64)
            shape += (config.width * 11 // 4, config.length)
            model = build(ModelConfig(*shape, tie_word_embeddings=True))
            init_weights(model, 1)
            save_model(model, Path(name) / "model")
            del model
        config = replace(config, init=str(model_folder(config.init or f"{name}/model")))
        if config.side:
            print(json.dumps(tuning_memory(config, name)))
            return
        shape = read_config(config.init)
        size = f"{shape.num_hidden_layers} x {shape.hidden_size}, V {shape.vocab_size}"
        print(f"tune: {size}, {config.rows} x {config.length} tokens a step, bf16", end=", ")
        print(f"threads {torch.get_num_threads()}; trl {trl}")
        for task in ("full", "lora", "dpo") if config.task == "all" else (config.task,):
            hows = ("kept", "recomputed", "live")[: 3 if task == "dpo" else 2]
            for how in hows if config.how == "all" else (config.how,):
                compare_tuning(replace(config, task=task, how=how), name)


def compare_tuning(config: TuneBench, scratch: str) -> None:
    """Print speed and memory of both sides for one task."""
    first, seconds = take_turns(config, scratch)
    print(f"{config.task}, {config.how}:")
    flags = [f"--{k}={v}" for k, v in vars(config).items() if k not in ("memory", "side")]
    over = {}
    for name, values in seconds.items():
        s, shown = statistics.median(values), first[name]
        print(f"  {name:4} loss {shown['loss']:.4f}, gradient {shown['grad_norm']:.4f}", end="; ")
        print(f"{s * 1e3:.0f} ms a step, {config.rows * config.length / s:.0f} tokens/s", end=", ")
        print(f"{ratio(seconds, name, 'trl'):.2f} x trl", flush=True)
        if config.memory:
            output = watch("bench.py", "tune", *flags, f"--side={name}").output
            took = json.loads(output.strip().splitlines()[-1])
            over[name] = took["peak"] - took["idle"] - took["held"]
            gb = {k: f"{v / 1e9:.3f} GB" for k, v in took.items()}
            print(f"       peak {gb['peak']} - idle {gb['idle']} - weights, gradients, moments", end=" ")
            print(f"{gb['held']} = {over[name] / 1e9:.3f} GB: {over[name] / over['trl']:.2f} x trl")


def take_turns(config: TuneBench, scratch: str) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Give for "trl" and "ours" what the first step showed, and each step's seconds without two to warm up.

    ValueError: they do not compute the same.
    """
    ours, turns = OurTuning(config, scratch), []
    after = lambda seconds: turns.append((seconds, ours.step()))
    trainer = their_trainer(config, scratch, config.rounds + 2, after)
    mine = dict(ours.model.named_parameters())
    for name, p in trainer.model.named_parameters():
        if ".lora_" in name:
            p.data.copy_(mine[name.removeprefix("base_model.model.model.").replace(".default.", ".")].data)
    theirs, (batch,) = next(iter(trainer.get_train_dataloader())), next(ours.batches)
    trained = theirs.get("completion_mask", theirs.get("labels")) > 0
    targets = torch.where(trained, theirs["input_ids"], IGNORE).roll(-1, 1)
    targets[:, -1] = IGNORE
    both = (theirs["input_ids"], targets), (batch["ids"], batch["targets"])
    rows = [sorted(torch.cat([x.reshape(-1, config.length) for x in side], 1).tolist()) for side in both]
    if rows[0] != rows[1]:
        raise ValueError(f"{config.task}: the sides were not given the same tokens and targets")
    trainer.train()
    first = {"trl": trainer.state.log_history[0], "ours": ours.first}
    bounds = {"loss": 0.002, "grad_norm": 0.01}
    if config.task == "dpo":  # bf16 leaves tenths of a nat of a log-probability open: much of a difference
        bounds = {"loss": 0.03, "grad_norm": 0.03, "logps/chosen": 0.001}
    for name, bound in bounds.items():
        pair = [first[side].get(name, 0.0) for side in first]
        if not math.isclose(*pair, rel_tol=bound):
            raise ValueError(f"{config.task}: first {name} is {pair[0]} for trl, {pair[1]} for ours")
    return first, dict(zip(first, map(list, zip(*turns[2:]))))


class Numbers:
    """A tokenizer of texts that are numbers of tokens: "17 4 </s>" is [17, 4, 2]."""

    digest = "numbers"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode_chat(
        self, messages: list[dict], open_reply: bool = False, template: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Give a conversation's tokens, and 1 for those of replies; there is no template."""
        words = [(word, m["role"]) for m in messages for word in m["content"].split()]
        ids = [2 if word == END else int(word) for word, _ in words]
        return ids, [int(role == "assistant") for _, role in words]


def numbered_rows(config: TuneBench, vocab: int) -> list[dict]:
    """Draw {"prompt", "completion"}, for dpo {"prompt", "chosen", "rejected"}: answers end at --length."""
    draw = random.Random(1)
    asked = config.length // 4
    text = lambda count: " ".join(str(draw.randrange(3, vocab)) for _ in range(count))
    answers = ("chosen", "rejected") if config.task == "dpo" else ("completion",)
    return [
        {"prompt": text(asked) + " "} | {name: f"{text(config.length - asked - 1)} {END}" for name in answers}
        for _ in range(config.rows // len(answers))
    ]


class OurTuning:
    """What sft.py and dpo.py do between reading and saving: model, batches, loss, optimizer."""

    def __init__(self, config: TuneBench, scratch: str):
        options = {"init": config.init, "out": scratch, "dtype": "bfloat16", "lr": RATE}
        options |= {"lora": config.task == "lora", "lora_target": "all-linear"}
        options |= {"activation_checkpointing": config.how == "recomputed"}
        cfg = self.cfg = (DPOConfig if config.task == "dpo" else SftConfig)(**options)
        shape, process = read_config(config.init), common.Process(0, 1, "cpu")
        rows, numbers = numbered_rows(config, shape.vocab_size), Numbers(shape.vocab_size)
        for row in rows:
            texts = {"user": row["prompt"], "assistant": row.get("completion")}
            row["messages"] = [{"role": role, "content": text} for role, text in texts.items() if text]
        kind, width = (PairRows, 2) if config.task == "dpo" else (ChatRows, 1)
        documents, width = kind(rows, numbers, config.length), width * config.length
        self.batches = Batches(RowStream(documents, width, cfg.seed), len(rows), len(rows))
        self.idle = own_anonymous_bytes()
        model = build(shape, "meta")
        if cfg.lora:
            lora.attach(model, cfg)
        self.model = ready_model(model, cfg, process, shape.vocab_size).train()
        self.loss, self.ref_model, self.first = tuning_loss, None, {}
        if config.task == "dpo":
            reference = None
            if config.how == "live":
                self.ref_model = frozen_model(shape, cfg, process)
                reference = functools.partial(live_reference, frozen=self.ref_model)
            else:
                p = Plan(width, len(rows), len(rows), 1)
                documents.reference = compute_reference(self.model, documents, p, process)
            self.loss = functools.partial(pair_loss, cfg=cfg, reference=reference)
        self.optimizer = make_optimizer(self.model, cfg)

    def step(self) -> float:
        """Take a step as train.fit does; give its seconds. `first`: what the first one showed."""
        start = time.perf_counter()
        (batch,) = next(self.batches)
        value, count, logs = self.loss(self.model, batch)
        value.backward()
        norm = clip_and_scale(self.model.parameters(), float(count), self.cfg.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        if not self.first:
            chosen, pairs = logs.get("chosen_logp", (0.0, 1))
            values = {"loss": value.detach() / count, "grad_norm": norm, "logps/chosen": chosen / pairs}
            self.first = {name: float(v) for name, v in values.items()}
        return seconds


def their_trainer(config: TuneBench, scratch: str, steps: int, after: Callable[[float], object]):
    """Make trl's trainer for a task, as its users do; `after` is called after each step with its seconds."""
    import datasets
    import peft
    import tokenizers
    import transformers
    import trl

    warnings.simplefilter("ignore", FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    vocab = read_config(config.init).vocab_size
    words = {"<pad>": 0, "<unk>": 1, END: 2} | {str(i): i for i in range(3, vocab)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token=END
    )
    rows = numbered_rows(config, vocab)
    pairs = config.task == "dpo"
    kind, settings = (trl.DPOTrainer, trl.DPOConfig) if pairs else (trl.SFTTrainer, trl.SFTConfig)
    idle = own_anonymous_bytes()
    # a frozen base needs no fp32 masters: in bf16 nothing is cast at use. What trains is fp32 on both sides
    dtype = torch.bfloat16 if config.task == "lora" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        config.init, dtype=dtype, attn_implementation="sdpa"
    )
    options = {"output_dir": scratch, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    options |= {"disable_tqdm": True, "logging_first_step": True, "dataloader_pin_memory": False}
    options |= {"per_device_train_batch_size": len(rows), "max_steps": steps, "max_length": config.length}
    options |= {"bf16": True, "gradient_checkpointing": config.how == "recomputed", "max_grad_norm": 1.0}
    options |= {"optim": "adamw_torch_fused", "learning_rate": RATE, "lr_scheduler_type": "constant"}
    options |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.0}
    options |= {"precompute_ref_log_probs": config.how != "live"} if pairs else {}
    given = {"processing_class": tokenizer, "train_dataset": datasets.Dataset.from_list(rows)}
    if config.task == "lora":
        adapters = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        given["peft_config"] = peft.LoraConfig(**adapters)
    trainer = kind(model, args=settings(**options), **given)
    trainer.idle = idle

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            after(time.perf_counter() - self.start)

    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Turns())
    return trainer


def tuning_memory(config: TuneBench, scratch: str, steps: int = 3) -> dict[str, int]:
    """Measure this process in bytes: at the peak of some steps, before there was a model; weights etc."""
    side = OurTuning(config, scratch) if config.side == "ours" else None
    side = side or their_trainer(config, scratch, steps, lambda seconds: None)
    peak, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], own_anonymous_bytes())

    threading.Thread(target=look, daemon=True).start()
    if config.side == "ours":
        for _ in range(steps):
            side.step()
    else:
        side.train()
    done.set()
    models = [side.model, getattr(side, "ref_model", None)]
    held = sum(p.nbytes for model in models if model is not None for p in model.parameters())
    held += sum(12 * p.numel() for p in side.model.parameters() if p.requires_grad)  # fp32
    return {"peak": peak[0], "idle": side.idle, "held": held}


def own_anonymous_bytes() -> int:
    """Anonymous memory of this process; cheaper than anonymous_bytes."""
    return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


if __name__ == "__main__":
    common.run(
        train,
        decode,
        formats,
        world,
        ngram,
        bits,
        data,
        bpe,
        clean,
        dedup,
        plot,
        optimizers,
        tune,
        kernels,
        doc=__doc__,
    )
