"""Speed and quality in figures: ours beside a peer, alternating in one run, medians and ratios.

A machine that others share is fast one minute and slow the next. So both sides take turns within one process,
each figure is a median, and the ceilings (a large matrix product, a large copy) are measured in the same run.

    python bench.py train      # optimizer steps beside transformers: same shape, weights, tokens, AdamW
    python bench.py decode     # greedy decoding, batch 1, beside transformers.generate
    python bench.py world out/run --demo out/demo       # the demonstration model: form, novelty, facts
    python bench.py bits out/run --shards out/shards    # bits per byte beside xz and a Kneser-Ney trigram

`train` and `decode` need transformers (pip install -r requirements-dev.txt).

Kneser & Ney 1995; Chen & Goodman 1999, "An Empirical Study of Smoothing Techniques" (interpolated form).
"""

from __future__ import annotations

import lzma
import math
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import common
import demo_corpus
from checkpoint import load_model, model_folder, save_model
from data import Shards
from generate import Sampling, fuse, generate, load
from model import Model, ModelConfig, build, flops_per_token, init_weights, num_params
from parallel import parallelize
from tokenizer import load_tokenizer
from train import FitConfig, make_optimizer, measured_flops, next_token_loss

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


def alternate(rounds: int, **sides: Callable[[], float]) -> dict[str, float]:
    """Let every side run once per round, in turn; return the median of the seconds that each reports."""
    seconds = defaultdict(list)
    for side in sides.values():  # warm-up
        side()
    for _ in range(rounds):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: statistics.median(s) for name, s in seconds.items()}


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
    layers: int = 8  # of the shape
    width: int = 512  # of the shape, in heads of 64
    vocab: int = 6400  # tokens of the vocabulary
    length: int = 512  # tokens of a row
    rows: int = 4  # of a batch
    rounds: int = 9  # steps of each side
    compile: bool = True  # also measure ours compiled (needs a C++ compiler)


def train(config: TrainBench) -> None:
    """Time whole optimizer steps (forward, backward, AdamW) beside transformers under bf16 autocast."""
    shape = ModelConfig(
        *("llama", config.vocab, config.width, config.layers, config.width // 64),
        *(config.width * 11 // 4, config.length),
        tie_word_embeddings=True,
    )
    ours, theirs = both(shape, torch.float32)
    compiled = parallelize(build(shape, "meta"), common.Process(0, 1, "cpu"), compile=True)
    compiled.load_state_dict(ours.state_dict())
    ids = torch.randint(0, config.vocab, (config.rows, config.length + 1))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:].contiguous(), "doc_ids": None}
    losses = {}

    def our_step(name: str, model: Model) -> Callable[[], float]:
        model.compute_dtype = torch.bfloat16
        optimizer = make_optimizer(model, FitConfig("", lr=1e-4))

        def step() -> float:
            start = time.perf_counter()
            value, count, _ = next_token_loss(model, batch)
            (value / count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(name, value.item() / count.item())
            return time.perf_counter() - start

        return step

    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    theirs.train()

    def their_step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = theirs(input_ids=ids[:, :-1], labels=batch["ids"], shift_labels=batch["targets"]).loss
        loss.backward()
        their_optimizer.step()
        their_optimizer.zero_grad()
        losses.setdefault("transformers", loss.item())
        return time.perf_counter() - start

    sides = {"transformers": their_step, "ours": our_step("ours", ours)}
    if config.compile:
        sides["ours, compiled"] = our_step("ours, compiled", compiled)
    seconds = alternate(config.rounds, **sides)
    tokens = config.rows * config.length
    flops = flops_per_token(shape, config.length) * tokens
    ceiling = measured_flops("cpu", torch.bfloat16)
    print(
        f"train: {config.layers} x {config.width}, V {config.vocab}, {num_params(shape):,} parameters",
        end=", ",
    )
    print(f"B {config.rows}, T {config.length}, bf16; a matrix product reaches {ceiling / 1e12:.2f} TFLOP/s")
    for name, s in seconds.items():
        rate = f"{tokens / s:7.0f} tokens/s, {flops / s / 1e12:.3f} TFLOP/s"
        ratio = f"{seconds['transformers'] / s:.2f} x transformers"
        print(f"  {name:15s} {s * 1e3:6.0f} ms a step, {rate}, {ratio}, first loss {losses[name]:.4f}")


@dataclass
class DecodeBench:
    prompt: int = 32  # tokens
    new: int = 128  # tokens
    layers: int = 30  # of the shape
    rounds: int = 5  # texts of each side


def decode(config: DecodeBench) -> None:
    """Time greedy decoding of one text beside transformers.generate, bf16, on a 135M LLaMA shape."""
    shape = ModelConfig("llama", 49152, 576, config.layers, 9, 1536, 2048, 3, tie_word_embeddings=True)
    ours, theirs = both(shape, torch.bfloat16)
    fuse(ours)
    theirs.eval()
    ids = torch.randint(0, shape.vocab_size, (1, config.prompt), generator=torch.Generator().manual_seed(1))
    texts = {}

    def our_text() -> float:
        start = time.perf_counter()
        sampling = Sampling(config.new, temperature=0, ignore_eos=True)
        texts["ours"] = generate(ours, ids.tolist(), sampling)[0]
        return time.perf_counter() - start

    def their_text() -> float:
        start = time.perf_counter()
        out = theirs.generate(
            ids, max_new_tokens=config.new, min_new_tokens=config.new, do_sample=False, pad_token_id=0
        )
        texts["transformers"] = out[0, config.prompt :].tolist()
        return time.perf_counter() - start

    seconds = alternate(config.rounds, transformers=their_text, ours=our_text)
    size = sum(p.numel() * p.itemsize for p in ours.parameters())
    same = next((i for i, (a, b) in enumerate(zip(*texts.values())) if a != b), config.new)
    print(
        f"decode: {config.layers} x 576, {size / 1e6:.0f} MB of bf16 weights, prompt {config.prompt}",
        end=", ",
    )
    print(f"{config.new} new tokens (the first {same} agree); a copy reads {copy_rate() / 1e9:.1f} GB/s")
    for name, s in seconds.items():
        rate = f"{config.new / s:6.1f} tokens/s, {config.new * size / s / 1e9:5.1f} GB/s of weights"
        print(f"  {name:13s} {rate}, {seconds['transformers'] / s:.2f} x transformers")


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
    prompts = [tokenizer.encode_prompt(draw.choice(f["cloze"])) for f in chosen]
    values = defaultdict(set)
    for fact in facts:
        values[fact["relation"]].add(fact["value"])
    right = 0
    for i in range(0, len(chosen), 32):
        longest = max(len(tokenizer.encode(f["value"])) for f in chosen[i : i + 32]) + 2
        texts = [tokenizer.decode(t) for t in generate(model, prompts[i : i + 32], Sampling(longest, 0))]
        for answer, fact in zip(texts, chosen[i : i + 32]):
            # 二十三 begins with 二十 too: the longest known value at the beginning of the answer counts
            said = [v for v in values[fact["relation"]] if answer.startswith(v)]
            right += max(said, key=len, default="") == fact["value"]
    print(f"knowledge: {right} of {len(chosen)} facts completed ({right / len(chosen):.1%})")


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


@dataclass
class BitsBench:
    folder: tyro.conf.Positional[str]  # a run or model folder
    shards: str  # the packed folder that it was trained on
    row_tokens: int = 0  # tokens that the model sees at a time; 0: its context


def bits(config: BitsBench) -> None:
    """Compare bits per byte on the validation documents with xz -9e and a character trigram."""
    folder = model_folder(config.folder)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
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
    width = config.row_tokens or model.config.max_position_embeddings
    documents = [tokenizer.encode_document(t) for t in texts["val"]]
    nats = sum(sliding_nats(model, ids, width) for ids in documents)
    print(f"bits per byte on {len(texts['val'])} held-out documents, {size:,} bytes")
    print(f"  xz -9e             {8 * len(packed) / size:.3f}")
    print(f"  Kneser-Ney trigram {trigram_bits / size:.3f}")
    if not tokenizer.add_bos:  # nothing predicts a document's first token: it costs all its ln V nats
        nats += len(documents) * math.log(model.config.vocab_size)
    each = nats / sum(len(ids) - tokenizer.add_bos for ids in documents)
    print(f"  ours               {nats / math.log(2) / size:.3f}   ({each:.3f} nats per token)")


if __name__ == "__main__":
    common.run(train, decode, world, bits, doc=__doc__)
