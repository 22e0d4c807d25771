"""From text files to batches: pack once, then train from memory-mapped tokens in one exact, resumable stream.

`pack` turns documents into shards: token ids in uint16 (uint32 for a vocabulary beyond 65,536), each document
between <s> (where the tokenizer has it) and one EOS, an index of where documents end, the tokenizer itself
and a report. A share of the documents, chosen by the hash of their text, becomes the validation part: copies
of a document fall on the same side.

Training reads rows of T tokens from one global stream, a pure function of (shards, seed, weights in force):

  - every epoch is a fresh permutation of all documents;
  - a row starts with the document that waits longest; the largest of the waiting ones that fit fill it;
  - no document is cut unless it is longer than a row, no token is lost or repeated within an epoch.

Several folders are shuffled as one, so each has its share of the tokens; with weights (Mixture) every folder
is a stream of its own, and the next row comes from the one that is owed most.

Rows may have several lengths (buckets), so that a long document stays whole and a short one pays for no long
row: each row takes the shortest length that its first document, and what fits beside it, nearly fill. Rows of
one length collect until they make a step, so steps of all lengths come as chance has it, with equal tokens.

With one length, and N rows a step, step s takes the global rows [s·N, (s+1)·N). Rank r of W materialises
rows r, r+W, … of a step. All ranks hold the same small state (an epoch, a position, a few waiting documents,
the rows of steps that are not yet full), so a run resumes exactly, on any number of ranks.

Conversations (ChatRows) and preference pairs (PairRows) are documents too, encoded when a run starts; only
their replies are trained. They share rows as others do, by themselves or beside plain text (Joined), or have
a padded row each (PaddedBatches).

    python data.py pack out/demo/pretrain --tokenizer out/tok --out out/shards
    python data.py check corpus.jsonl            # the first bad line, with file:line and why
    python data.py convert chat.json more.jsonl --to alpaca --out all.jsonl      # forms: see chat.py
    python data.py show out/shards --rows 2      # how documents share rows

Batches are dicts of (B, T) tensors: ids; targets, already shifted, −100 where nothing is trained (a
document's last token predicts nothing of the next); doc_ids, which attention needs to keep documents apart.

Zhao et al. 2024, "Analysing the Impact of Sequence Composition on Language Model Pre-Training" (why masks);
Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (best-fit packing); XuanYuan2 (buckets
of 2k, 4k, 8k and 16k tokens).
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
import os
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import tyro

import chat
import common
from tokenizer import Tokenizer, load_tokenizer

IGNORE = -100  # a target that is not trained
# at least so many pieces wait for a row, and the tokens of two rows: a larger pool leaves smaller gaps
WAITING = 256
NEARLY_FULL = 0.99  # of a row: what it must hold for no longer one to be tried
BLOCK_BYTES = 1 << 20  # bytes of documents that a packing worker takes at a time
POOL = 64  # padded micro-batches cut from documents that were sorted by length together

# --- 1. packing --------------------------------------------------------------------------------------------


@dataclass
class PackConfig:
    files: tyro.conf.Positional[tuple[str, ...]]  # .txt, .jsonl (.gz, .zst), .parquet, or folders of them
    tokenizer: str  # folder of the tokenizer
    out: str  # folder to write
    val_ratio: float = 0.01  # share of the documents kept for validation
    shard_tokens: int = 100_000_000  # tokens per shard file
    workers: int = 0  # processes; 0: one per core
    overwrite: bool = False  # replace --out if it exists


def pack(config: PackConfig) -> None:
    """Tokenise documents into memory-mapped shards."""
    files = common.document_files(config.files)
    if not 0 <= config.val_ratio < 1:
        raise ValueError(f"--val_ratio {config.val_ratio} must lie in [0, 1)")
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.eos_id is None:
        raise ValueError(
            f"{config.tokenizer}: this tokenizer has no end-of-text token to put after documents"
        )
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    workers = config.workers or os.cpu_count() or 1
    with common.atomic_folder(config.out, config.overwrite) as out:
        writers = {part: ShardWriter(out, part, dtype, config.shard_tokens) for part in ("train", "val")}
        with common.progress(common.plain_bytes(files), "pack", "B") as bar:
            blocks = ((f, block) for f in files for block in _blocks(f))
            start = (_start_worker, config.tokenizer, config.val_ratio)
            for size, parts in common.ordered_map(_encode_block, blocks, workers, *start):
                for part, ids, sizes in parts:
                    writers[part].add(ids, sizes)
                bar.update(size)
        for writer in writers.values():
            writer.close()
        tokenizer.save(out)
        report = {
            "format": 1,
            "tokenizer": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "dtype": np.dtype(dtype).name,
            "sources": [str(f) for f in files],
            **{part: writer.report() for part, writer in writers.items()},
        }
        if not report["train"]["documents"]:
            raise ValueError(
                "no document went into the training part; give more text or a smaller --val_ratio"
            )
        common.write_json(out / "shards.json", report)
    for part in ("train", "val"):
        r = report[part]
        rate = r["bytes"] / max(1, r["tokens"])
        print(f"{part}: {r['documents']:,} documents, {r['tokens']:,} tokens, {rate:.2f} bytes per token")


def _blocks(file: Path) -> Iterator[list[tuple[int, bytes]]]:
    block, size = [], 0
    for line, raw in common.raw_documents(file):
        block.append((line, raw))
        size += len(raw)
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


_worker: dict = {}  # what a packing process keeps between blocks


def _start_worker(tokenizer: str, val_ratio: float) -> None:
    _worker.update(tokenizer=load_tokenizer(tokenizer), val_ratio=val_ratio)


def drawn(data: bytes) -> float:
    """Give a number in [0, 1) that the bytes of a document alone decide: copies fall on the same side."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64


def _encode_block(block: tuple[Path, list[tuple[int, bytes]]]) -> tuple[int, list[tuple]]:
    """Encode a block's documents; returns its bytes and per part (part, ids, [[tokens, bytes], …] int64)."""
    path, lines = block
    parts = {part: (array("I"), array("q")) for part in ("train", "val")}
    for line, raw in lines:
        text = common.parse_document(raw, path, line)
        if not text.strip():
            continue
        data = text.encode()
        ids, sizes = parts["val" if drawn(data) < _worker["val_ratio"] else "train"]
        document = _worker["tokenizer"].encode_document(text)
        ids.extend(document)
        sizes.extend((len(document), len(data)))
    done = [
        (part, np.frombuffer(ids, np.uint32), np.frombuffer(sizes, np.int64).reshape(-1, 2))
        for part, (ids, sizes) in parts.items()
        if ids
    ]
    return sum(len(raw) for _, raw in lines), done


class ShardWriter:
    """Writes PART-00000.bin (ids) and PART-00000.npy (int64 (documents + 1, 2): token and byte offsets)."""

    def __init__(self, folder: Path, part: str, dtype, shard_tokens: int):
        self.folder, self.part, self.dtype, self.shard_tokens = folder, part, dtype, shard_tokens
        self.file = None
        self.done: list[dict] = []

    def add(self, ids: np.ndarray, sizes: np.ndarray) -> None:
        """Append documents: all their ids in a row, and (documents, 2) tokens and bytes of each."""
        if self.file is None:
            self.path = self.folder / f"{self.part}-{len(self.done):05d}.bin"
            self.file, self.digest, self.sizes = open(self.path, "wb"), hashlib.sha256(), []  # noqa: SIM115
            self.tokens = 0
        data = ids.astype(self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)
        self.sizes.append(np.asarray(sizes, np.int64))
        self.tokens += len(ids)
        if self.tokens >= self.shard_tokens:
            self.close()

    def close(self) -> None:
        """Finish the shard that is open, if one is."""
        if self.file is None:
            return
        self.file.close()
        offsets = np.zeros((1 + sum(map(len, self.sizes)), 2), np.int64)
        np.cumsum(np.concatenate(self.sizes), axis=0, out=offsets[1:])
        np.save(self.path.with_suffix(".npy"), offsets)
        tokens, size = (int(n) for n in offsets[-1])
        entry = {"file": self.path.name, "documents": len(offsets) - 1, "tokens": tokens, "bytes": size}
        self.done.append(entry | {"sha256": self.digest.hexdigest()})
        self.file = None

    def report(self) -> dict:
        """Sum up what was written, with the SHA-256 of every shard's ids."""
        return {k: sum(e[k] for e in self.done) for k in ("documents", "tokens", "bytes")} | {
            "shards": self.done
        }


# --- 2. documents: packed text, conversations, both --------------------------------------------------------


class Source(NamedTuple):
    """One packed folder (or other part) among several: which documents are its own, and their tokens."""

    documents: range
    tokens: int


class Documents:
    """What rows are made of: documents by number, each a list of tokens. Shards, ChatRows, Joined are such.

    tokens, bytes: of all. sources: {name: Source}. tokenizer: its digest. fingerprint: SHA-256 of all that a
    resumed run must find unchanged.
    """

    sources: dict[str, Source]
    tokens: int
    bytes: int
    vocab_size: int
    tokenizer: str
    fingerprint: str

    def __len__(self) -> int:
        raise NotImplementedError

    def length(self, document: int) -> int:
        """Tokens of a document."""
        raise NotImplementedError

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        """Copy `count` tokens of a document from its token `start` on, int64; fewer at its end."""
        raise NotImplementedError

    def trained(self, document: int, start: int, count: int) -> np.ndarray | None:
        """Tell which of the tokens that `read` gives are targets to train on (1) or not (0); None: all."""
        return None

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(map(self.length, range(len(self))), default=0)

    def complete(self, batch: dict, rows: list[list[Span]]) -> dict:
        """Add to a batch of these rows what such documents need besides: nothing."""
        return batch


class Shards(Documents):
    """One part (train or val) of one or more packed folders, as a list of documents in memory-mapped files.

    `sources` are the folders, each by its name (out/zh is zh), or all by their paths if two are named alike.
    ValueError: not a packed folder, a folder twice, or folders packed with different tokenizers.
    """

    def __init__(self, folders: list[str | Path], part: str):
        self.ids, self.offsets, self.digests = [], [], []
        for folder in folders:
            if not (Path(folder) / "shards.json").exists():
                raise ValueError(f"{folder}: not a folder written by data.py pack (no shards.json)")
        self.reports = [common.read_json(Path(f) / "shards.json") for f in folders]
        if len({r["tokenizer"] for r in self.reports}) > 1:
            raise ValueError(f"{', '.join(map(str, folders))} were packed with different tokenizers")
        if len({Path(f).resolve() for f in folders}) < len(folders):
            raise ValueError(f"{', '.join(map(str, folders))}: a folder twice; to repeat one give weights")
        for folder, report in zip(folders, self.reports, strict=True):
            for entry in report[part]["shards"]:
                path = Path(folder) / entry["file"]
                if (
                    not path.exists()
                    or path.stat().st_size != entry["tokens"] * np.dtype(report["dtype"]).itemsize
                ):
                    raise ValueError(f"{path}: missing or not of the size that shards.json says; pack again")
                self.ids.append(np.memmap(path, report["dtype"], "r"))
                self.offsets.append(_read_index(path.with_suffix(".npy"), entry))
                self.digests.append(entry["sha256"])
        self.first = np.cumsum([0] + [len(o) - 1 for o in self.offsets]).tolist()  # each shard's document
        names = [Path(f).absolute().name for f in folders]
        names = names if len(set(names)) == len(names) else list(map(str, folders))
        ends = np.cumsum([0] + [r[part]["documents"] for r in self.reports]).tolist()
        self.sources = {
            n: Source(range(a, b), r[part]["tokens"])
            for n, a, b, r in zip(names, ends, ends[1:], self.reports, strict=False)
        }
        self.tokens = sum(len(i) for i in self.ids)
        self.bytes = sum(int(o[-1, 1]) for o in self.offsets)
        self.vocab_size, self.tokenizer = (self.reports[0][k] for k in ("vocab_size", "tokenizer"))

    def __len__(self) -> int:
        return self.first[-1]

    def length(self, document: int) -> int:
        shard, i = self._find(document)
        return int(self.offsets[shard][i + 1, 0] - self.offsets[shard][i, 0])

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        shard, i = self._find(document)
        a, b = (int(n) for n in self.offsets[shard][i : i + 2, 0])
        return np.asarray(self.ids[shard][a + start : min(a + start + count, b)], np.int64)

    def _find(self, document: int) -> tuple[int, int]:
        shard = bisect.bisect_right(self.first, document) - 1
        return shard, document - self.first[shard]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join([self.tokenizer, *self.digests]).encode()).hexdigest()


def _read_index(path: Path, entry: dict) -> np.ndarray:
    try:
        offsets = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: missing or damaged ({error}); pack again") from None
    shape, end = (entry["documents"] + 1, 2), [entry["tokens"], entry["bytes"]]
    if offsets.shape != shape or offsets[-1].tolist() != end:
        raise ValueError(f"{path}: not the index that shards.json describes; pack again")
    return offsets


class ChatRows(Documents):
    """Conversations as documents: tokens by the chat template, of which only the replies are trained.

    rows: {"messages": …}, as chat.read_rows gives them; `self.rows[i]` is that of document i. Rows of more
    than `context` tokens are left out, or with too_long "cut" lose their last turns, so that they end with a
    reply all the same; without a first reply that fits they are left out too. So no reply is ever cut. How
    many it were: `dropped`, `cut`; `untrained`: rows that hold no reply, left out as well. A row that was cut
    is in `rows` as it is now, without its "check", which speaks of the last reply. keep_rows False: only
    "where" of each row is kept, not its texts, which take more memory than the tokens.

    `bytes` are those of the replies, for bits per byte. Encoded once and held in memory, 5 bytes a token.
    ValueError: what the template cannot write (its row's "where" says where it is); no row is left.
    """

    def __init__(
        self,
        rows: Iterable[dict],
        tokenizer: Tokenizer,
        context: int,
        template: str | None = None,
        too_long: Literal["drop", "cut"] = "drop",
        keep_rows: bool = True,
    ):
        encode = functools.partial(tokenizer.encode_chat, template=template)
        ids, mask, ends = array("I"), array("B"), array("q", [0])
        self.rows, self.dropped, self.cut, self.untrained, self.bytes = [], 0, 0, 0, 0
        for n, row in enumerate(rows, 1):
            messages = row["messages"]
            try:
                tokens, trained = encode(messages)
            except ValueError as error:
                raise ValueError(f"{row.get('where', f'row {n}')}: {error}") from None
            if too_long == "cut" and len(tokens) > context:
                messages = whole_turns(messages, lambda m: len(encode(m)[0]) <= context) or messages
                tokens, trained = encode(messages)
            if len(tokens) > context:
                self.dropped += 1
            elif not any(trained[1:]):  # nothing predicts a first token
                self.untrained += 1
            else:
                if len(messages) < len(row["messages"]):
                    self.cut += 1
                    row = {k: v for k, v in row.items() if k != "check"} | {"messages": messages}
                self.rows.append(row if keep_rows else {"where": row.get("where", f"row {n}")})
                ids.extend(tokens)
                mask.extend(trained)
                ends.append(len(ids))
                self.bytes += sum(len(m["content"].encode()) for m in messages if m["role"] == "assistant")
        if not self.rows and (self.dropped or self.untrained):
            raise ValueError(
                f"no conversation can be trained: {self.dropped} are longer than {context} tokens (take a "
                f"longer context, or cut them at whole turns), {self.untrained} hold no reply"
            )
        self._keep("chat", ids, mask, ends, tokenizer)

    def _keep(self, name: str, ids: array, mask: array, ends: array, tokenizer: Tokenizer) -> None:
        """Keep the tokens of all documents end to end; document i is [ends[i], ends[i + 1])."""
        self.ids, self.mask = np.frombuffer(ids, np.uint32), np.frombuffer(mask, np.uint8)
        self.ends, self.tokens = np.frombuffer(ends, np.int64), len(ids)
        self.sources = {name: Source(range(len(self)), self.tokens)}
        self.vocab_size, self.tokenizer = tokenizer.vocab_size, tokenizer.digest

    def __len__(self) -> int:
        return len(self.rows)

    def length(self, document: int) -> int:
        return int(self.ends[document + 1] - self.ends[document])

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        return self.ids[self._span(document, start, count)].astype(np.int64)

    def trained(self, document: int, start: int, count: int) -> np.ndarray:
        return self.mask[self._span(document, start, count)]

    def _span(self, document: int, start: int, count: int) -> slice:
        a, b = self.ends[document : document + 2].tolist()
        return slice(a + start, min(a + start + count, b))

    @property
    def fingerprint(self) -> str:
        parts = (self.tokenizer.encode(), self.ends, self.ids, self.mask)
        return hashlib.sha256(b"".join(hashlib.sha256(p).digest() for p in parts)).hexdigest()


def whole_turns(messages: list[dict], fits: Callable[[list[dict]], bool]) -> list[dict]:
    """Give the longest beginning of a conversation that ends with a reply and fits; [] if none does."""
    ends = [n for n, message in enumerate(messages, 1) if message["role"] == "assistant"]
    fit = bisect.bisect_left(ends, True, key=lambda n: not fits(messages[:n]))
    return messages[: ends[fit - 1]] if fit else []


class Joined(Documents):
    """Parts of unlike kinds side by side, each one source of a Mixture: {"chat": ChatRows, "lm": Shards}.

    So plain text, trained whole, is mixed into answers (hybrid tuning, XuanYuan; Zhang & Yang 2023) in exact
    shares of the tokens. ValueError: parts of different tokenizers.
    """

    def __init__(self, parts: dict[str, Documents]):
        self.parts = list(parts.values())
        if len({part.tokenizer for part in self.parts}) > 1:
            raise ValueError(f"{' and '.join(parts)} have different tokenizers; pack with that of the model")
        self.first = np.cumsum([0, *map(len, self.parts)]).tolist()  # each part's document
        self.sources = {
            name: Source(range(a, a + len(part)), part.tokens)
            for (name, part), a in zip(parts.items(), self.first, strict=False)
        }
        self.tokens, self.bytes = (sum(getattr(p, k) for p in self.parts) for k in ("tokens", "bytes"))
        self.vocab_size, self.tokenizer = self.parts[0].vocab_size, self.parts[0].tokenizer

    def __len__(self) -> int:
        return self.first[-1]

    def length(self, document: int) -> int:
        part, i = self._find(document)
        return part.length(i)

    def read(self, document: int, start: int, count: int) -> np.ndarray:
        part, i = self._find(document)
        return part.read(i, start, count)

    def trained(self, document: int, start: int, count: int) -> np.ndarray | None:
        part, i = self._find(document)
        return part.trained(i, start, count)

    def _find(self, document: int) -> tuple[Documents, int]:
        n = bisect.bisect_right(self.first, document) - 1
        return self.parts[n], document - self.first[n]

    @property
    def fingerprint(self) -> str:
        parts = (f"{name} {part.fingerprint}" for name, part in zip(self.sources, self.parts, strict=True))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def hold_out(rows: Sequence[dict], size: float, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """Split rows into (train, held): hold out `size` rows, or below 1 that share of them.

    Rows of one first question (white space aside) fall on the same side: nothing that is held was trained.
    So it may be a few less. Chosen by the hash of the question: another order of the rows changes nothing.
    ValueError: a size that is no number of rows, or leaves nothing on one side.
    """
    wanted = round(size * len(rows)) if 0 < size < 1 else size
    groups: dict[float, list[int]] = {}
    for i, row in enumerate(rows):
        question = next(m["content"] for m in row["messages"] if m["role"] == "user")
        groups.setdefault(drawn(f"{seed} {' '.join(question.split())}".encode()), []).append(i)
    held: set[int] = set()
    for _, group in sorted(groups.items()):
        if len(held) + len(group) <= wanted:
            held.update(group)
    if size and not (0 < len(held) < len(rows) and wanted < len(rows) and wanted % 1 == 0):
        raise ValueError(
            f"holding out {size:g} of {len(rows)} rows with {len(groups)} different questions: give a whole "
            "number of rows, or a share below 1, that leaves some on both sides"
        )
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


# --- 3. the stream of rows ---------------------------------------------------------------------------------


def shuffled(position: int, count: int, seed: int, epoch: int) -> int:
    """Give the element at `position` of a random permutation of range(count), without storing it.

    So the state of a shuffled corpus is one integer, whatever its size. A Feistel network permutes the next
    power of four: each turn (left, right) → (right, left ^ f(right)) can be undone whatever f is, so nothing
    is lost, and four turns mix well. What falls outside is permuted again until it is inside (cycle walking;
    Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            mixed = (right + 1) * 0x9E3779B97F4A7C15 + (seed * 0x100000001B3 + epoch * 0x1000193 + turn)
            mixed = ((mixed ^ (mixed >> 31)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed ^ (mixed >> 29)) & mask)
        position = left << half | right
        if position < count:
            return position


Span = tuple[int, int, int]  # document, offset of the first token in it, number of tokens


def row_length(pieces: list[Span], lengths: Sequence[int]) -> int:
    """Give the shortest of the lengths of rows that holds the pieces."""
    tokens = sum(count for _, _, count in pieces)
    return next(length for length in lengths if length >= tokens)


class RowStream:
    """Yields rows as lists of pieces that together hold at most T tokens; the same on every rank.

    With `shuffle` it goes on for ever, epoch after epoch; without (validation) it ends with the documents.
    `row` is T, or several lengths, the shortest first; `row_length` then says how long a row is.
    `documents` are those to read; None: all.

    What best-fit costs beside a plain stream, which cuts a document wherever a row ends: 30 to 90 us a row,
    5 KB of state (more where 256 documents do not make two of the longest rows), and empty positions: in the
    long run 0.7, 0.2 and 0.1 % in rows of 512, 2048 and 4096 for lengths as on the web (log-normal, median
    450 tokens, sigma 1.1), 1.8 % for 20 to 400 tokens in rows of 512. A larger WAITING gains little. Where
    most documents are longer than half a row, hardly anything fits beside them and a tenth stays empty: give
    longer rows besides.
    """

    def __init__(
        self,
        shards: Documents,
        row: int | Sequence[int],
        seed: int,
        shuffle: bool = True,
        documents: range | None = None,
    ):
        self.documents = range(len(shards)) if documents is None else documents
        if not self.documents:
            raise ValueError("this part of the packed data holds no documents")
        self.lengths = [row] if isinstance(row, int) else list(row)  # of rows
        self.row = self.lengths[-1]  # the longest
        self.shards, self.seed, self.shuffle = shards, seed, shuffle
        self.epoch = self.position = self.start = 0  # of the next piece to be drawn
        self.tokens = 0  # in all rows so far
        self.waiting: dict[int, Span] = {}  # number of arrival -> piece, the oldest first
        self.by_length: list[tuple[int, int]] = []  # (tokens, -arrival), sorted: the last is the longest
        self.held = 0  # tokens that wait

    def state(self) -> dict:
        """Everything that the next rows depend on, as JSON."""
        place = {name: getattr(self, name) for name in ("epoch", "position", "start", "tokens")}
        return place | {"waiting": [list(piece) for piece in self.waiting.values()]}

    def load_state(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self.epoch, self.position, self.start = state["epoch"], state["position"], state["start"]
        self.tokens = state["tokens"]
        self.waiting = {n: tuple(piece) for n, piece in enumerate(state["waiting"])}
        self.by_length = sorted((piece[2], -n) for n, piece in self.waiting.items())
        self.held = sum(piece[2] for piece in self.waiting.values())

    def epochs(self) -> dict[str, float]:
        """Say how many passes over the documents the rows so far amount to."""
        return {"epochs": self.tokens / self.shards.tokens}

    def _refill(self) -> None:
        arrival = next(reversed(self.waiting), -1)
        while len(self.waiting) < WAITING or self.held < 2 * self.row:
            if self.position == len(self.documents):
                if not self.shuffle:
                    return
                self.epoch, self.position = self.epoch + 1, 0
            place = self.position
            if self.shuffle:
                place = shuffled(place, len(self.documents), self.seed, self.epoch)
            document = self.documents[place]
            length = self.shards.length(document)
            count = min(self.row, length - self.start)  # only a document longer than a row is cut
            arrival += 1
            self.waiting[arrival] = (document, self.start, count)
            bisect.insort(self.by_length, (count, -arrival))
            self.held += count
            self.start += count
            if self.start == length:
                self.position, self.start = self.position + 1, 0

    def __iter__(self) -> Iterator[list[Span]]:
        return self

    def __next__(self) -> list[Span]:
        self._refill()
        if not self.waiting:
            raise StopIteration
        oldest = next(iter(self.waiting))
        first = bisect.bisect_left(self.by_length, (self.waiting[oldest][2], -oldest))
        best = 0.0
        for length in self.lengths:
            taken, tokens = self._best_fit(first, length)
            if tokens / length > best:  # of equally full rows the shorter
                best, chosen = tokens / length, taken
            if best >= NEARLY_FULL:
                break
        pieces = [self.waiting.pop(-self.by_length[at][1]) for at in chosen]
        for at in sorted(chosen, reverse=True):
            del self.by_length[at]
        tokens = sum(count for _, _, count in pieces)
        self.tokens, self.held = self.tokens + tokens, self.held - tokens
        return pieces

    def _best_fit(self, first: int, length: int) -> tuple[list[int], int]:
        """Fill a row, beginning with by_length[first]; returns places in by_length and their tokens, or 0."""
        room = length - self.by_length[first][0]
        if room < 0:
            return [], 0
        taken, at = [first], len(self.by_length)
        while True:  # the longest that fits, of equals the oldest; each stands below the one before
            at = bisect.bisect_right(self.by_length, (room, 0), 0, at) - 1
            at -= at == first
            if at < 0:
                return taken, length - room
            taken.append(at)
            room -= self.by_length[at][0]


class Mixture:
    """Yields rows of several sources in given shares of the tokens; each row comes from one source.

    The next row is taken from the source that is owed most: nothing is drawn by chance. A source is never
    more than a row of tokens ahead of its share, and with two sources never more than a row behind, over
    any number of rows since the weights came into force. Every source is a RowStream with an order and an
    epoch of its own, so a small source with a large weight is repeated while a large one is not yet through.
    Where rows have several lengths, "a row" is the longest.

    weights: {source: share}, as `shares` gives them. ValueError: a source with a weight has no documents.
    """

    def __init__(self, shards: Documents, row: int | Sequence[int], seed: int, weights: dict[str, float]):
        self.shards, self.streams = shards, {}
        for n, (name, source) in enumerate(shards.sources.items()):
            if not source.documents:
                raise ValueError(f"--data: {name} holds no training documents; leave it out")
            # one order for two folders of equal size would pair their documents, line by line
            self.streams[name] = stream = RowStream(shards, row, seed + (n << 32), documents=source.documents)
        self.row, self.lengths = stream.row, stream.lengths
        self.set_weights(weights)

    def set_weights(self, weights: dict[str, float]) -> None:
        """Take other weights from the next row on; what was owed before is not made up for."""
        self.weights = {name: weights[name] for name in self.streams}
        self.owed = dict.fromkeys(self.streams, 0.0)  # tokens that a source is behind its share

    def state(self) -> dict:
        """Everything that the next rows depend on, as JSON."""
        streams = {name: stream.state() for name, stream in self.streams.items()}
        return {"weights": self.weights, "owed": self.owed, "streams": streams}

    def load_state(self, state: dict) -> None:
        """Go on where `state` was taken, with the weights that were in force."""
        self.set_weights(state["weights"])
        self.owed = dict(state["owed"])
        for name, stream in self.streams.items():
            stream.load_state(state["streams"][name])

    def epochs(self) -> dict[str, float]:
        """Say how many passes over each source the rows so far amount to."""
        sources = self.shards.sources
        return {f"epochs/{name}": s.tokens / sources[name].tokens for name, s in self.streams.items()}

    def __iter__(self) -> Iterator[list[Span]]:
        return self

    def __next__(self) -> list[Span]:
        wanted = [name for name, weight in self.weights.items() if weight]
        name = max(wanted, key=lambda name: self.owed[name] + self.weights[name] * self.row)
        pieces = next(self.streams[name])
        count = sum(n for _, _, n in pieces)
        for other, weight in self.weights.items():
            self.owed[other] += weight * count
        self.owed[name] -= count
        return pieces


def shares(weights: dict, where: str) -> dict[str, float]:
    """Scale weights so that they sum to 1; ValueError names `where` and the weight that is none."""
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not 0 <= weight <= 1e9:
            raise ValueError(f"{where}: the weight of {name} is {weight!r}, expected a number from 0 to 1e9")
    total = math.fsum(weights.values())
    if not total:
        raise ValueError(f"{where}: all weights are 0; give at least one source a weight")
    return {name: weight / total for name, weight in weights.items()}


def split_weights(text: str) -> tuple[list[str], list[float] | None]:
    """Read "out/zh:0.7,out/en:0.3" as folders and weights, "out/zh,out/en" as folders and None."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not any(":" in item for item in items):
        return items, None
    pairs = [item.rpartition(":") for item in items]
    try:
        return [folder for folder, _, _ in pairs], [float(weight) for _, _, weight in pairs]
    except ValueError as error:
        raise ValueError(
            f"--data {text}: {error}; write FOLDER:WEIGHT for every folder, or for none"
        ) from None


def read_weights(path: str | Path, sources: Iterable[str]) -> dict[str, float]:
    """Read a file {"zh": 0.7, "en": 0.3} as shares; ValueError unless it names just the sources."""
    weights, names = common.read_json(path), list(sources)
    if not isinstance(weights, dict) or set(weights) != set(names):
        found = ", ".join(weights) if isinstance(weights, dict) else type(weights).__name__
        raise ValueError(f"{path}: expected an object with a weight for {', '.join(names)}; found {found}")
    return shares({name: weights[name] for name in names}, str(path))


def collate(shards: Documents, rows: list[list[Span]], width: int) -> dict:
    """Materialise rows as a batch of (B, T) int64 tensors ids, targets, doc_ids.

    The end of a row that no document filled is a document of its own (doc_id −1) with nothing to train; nor
    is a target that the documents' `trained` says is none. What is trained follows from where a token stands,
    never from its id: padding may be the end-of-text token (it is 0 here).
    """
    import torch

    ids = np.zeros((len(rows), width), np.int64)
    targets = np.full((len(rows), width), IGNORE, np.int64)
    doc_ids = np.full((len(rows), width), -1, np.int64)
    for b, pieces in enumerate(rows):
        at = 0
        for n, (document, start, count) in enumerate(pieces):
            tokens = shards.read(document, start, count + 1)  # one more: what the piece's last token predicts
            ids[b, at : at + count] = tokens[:count]
            targets[b, at : at + len(tokens) - 1] = tokens[1:]
            mask = shards.trained(document, start + 1, count)
            if mask is not None:
                targets[b, at : at + len(mask)][mask == 0] = IGNORE
            doc_ids[b, at : at + count] = n
            at += count
    batch = {"ids": ids, "targets": targets, "doc_ids": doc_ids}
    return shards.complete({name: torch.from_numpy(array) for name, array in batch.items()}, rows)


class Batches:
    """The micro-batches of every optimizer step for one rank, with the state that resumes them exactly.

    Step s takes the global rows [s·rows_per_step, (s+1)·rows_per_step) where all are of one length; rank r
    takes rows r, r + W, … of a step, in micro-batches of `micro_rows`. Iterating yields a list of batches
    (dicts) per step.

    Where rows have several lengths, both numbers are of the longest, and of shorter rows as many more make
    the same tokens. The first length of which there are enough rows makes the next step; the others, less
    than a step of each, stay for later ones (so `epochs`, and new weights of a Mixture, are ahead by them).
    What waits when a run ends was not trained: in a run of a hundred steps all documents of a length that has
    under 1 % of the tokens. Take fewer tokens a step for short runs.
    """

    def __init__(
        self, stream: RowStream | Mixture, rows_per_step: int, micro_rows: int, rank: int = 0, world: int = 1
    ):
        assert rows_per_step % (micro_rows * world) == 0
        assert not any(stream.row % length for length in stream.lengths)
        self.stream, self.rows_per_step, self.micro_rows = stream, rows_per_step, micro_rows
        self.rank, self.world = rank, world
        self._sort([])

    def _sort(self, rows: list[list[Span]]) -> None:
        self.ready: dict[int, list] = {length: [] for length in self.stream.lengths}  # rows for later steps
        for pieces in rows:
            self.ready[row_length(pieces, self.stream.lengths)].append(pieces)

    def __iter__(self) -> Iterator[list[dict]]:
        return self

    def __next__(self) -> list[dict]:
        while True:
            pieces = next(self.stream)
            length = row_length(pieces, self.stream.lengths)
            self.ready[length].append(pieces)
            times = self.stream.row // length
            if len(self.ready[length]) == times * self.rows_per_step:
                break
        rows, self.ready[length] = self.ready[length][self.rank :: self.world], []
        size = times * self.micro_rows
        groups = (rows[i : i + size] for i in range(0, len(rows), size))
        return [collate(self.stream.shards, group, length) for group in groups]

    def state(self) -> dict:
        """The position in the stream, as JSON; the same on every rank."""
        ready = [[list(piece) for piece in row] for rows in self.ready.values() for row in rows]
        return self.stream.state() | {"ready": ready}  # empty where all rows are of one length

    def load_state(self, state: dict) -> None:
        """Go on where `state` was taken, on any number of ranks."""
        self.stream.load_state(state)
        self._sort([[tuple(piece) for piece in row] for row in state["ready"]])


class PaddedBatches:
    """As Batches, but one document a row: rows of like length together, padded to a multiple of 8 tokens.

    An epoch is a permutation of the documents, cut into pools; a pool is sorted by length and cut into
    micro-batches of at most tokens_per_step / N positions (or one document), which come in random order. N is
    the least number of micro-batches of at most `micro_tokens`. Every step takes the next N; rank r of W
    takes r, r + W, …, and where W > N, W / N ranks share the rows of each. So steps do not depend on W, and
    every rank has as many micro-batches (some perhaps of one empty row). There are no doc_ids: nothing but
    padding comes after a document.

    Padding for 1,000 rows of alpaca (17 to 755 tokens, half of them below 154): 3, 5 and 8 % in micro-batches
    of 2048, 4096 and 8192 tokens; 50 to 60 % where rows come as chance has it. Packing leaves 0.4 % empty.

    ValueError: N micro-batches that W ranks cannot share evenly.
    """

    def __init__(
        self,
        rows: Documents,
        tokens_per_step: int,
        micro_tokens: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ):
        self.micros = -(-tokens_per_step // micro_tokens)
        if self.micros % world and world % self.micros:
            even = -(-tokens_per_step // (-(-self.micros // world) * world))
            raise ValueError(
                f"--tokens_per_step {tokens_per_step} makes {self.micros} micro-batches of at most "
                f"{micro_tokens} tokens, which {world} ranks cannot share evenly; take --micro_tokens {even}"
            )
        self.rows, self.seed, self.rank, self.world = rows, seed, rank, world
        self.room = tokens_per_step // self.micros  # positions of a micro-batch
        self.pools = min(len(rows), max(1, round(rows.tokens / (POOL * self.room))))  # in an epoch
        self.load_state({"pool": 0, "place": 0, "tokens": 0})

    def state(self) -> dict:
        """The position in the stream, as JSON; the same on every rank."""
        return {name: getattr(self, name) for name in ("pool", "place", "tokens")}

    def load_state(self, state: dict) -> None:
        """Go on where `state` was taken, on any number of ranks that can share a step."""
        self.pool, self.place, self.tokens = (state[name] for name in ("pool", "place", "tokens"))
        self.groups = self._cut(self.pool)

    def epochs(self) -> dict[str, float]:
        """Say how many passes over the documents the steps so far amount to."""
        return {"epochs": self.tokens / self.rows.tokens}

    def steps(self, epochs: float) -> int:
        """Count the steps in which every document comes `epochs` times."""
        whole = max(1, math.ceil(epochs))
        micros = sum(len(self._cut(pool)) for pool in range(whole * self.pools))
        return max(1, math.ceil(micros * epochs / whole / self.micros))

    def _width(self, document: int) -> int:
        return min(-(-self.rows.length(document) // 8) * 8, self.rows.longest)

    def _cut(self, pool: int) -> list[list[int]]:
        """Cut a pool, counted over all epochs, into micro-batches: lists of documents, the longest first."""
        (epoch, pool), count = divmod(pool, self.pools), len(self.rows)
        places = range(pool * count // self.pools, (pool + 1) * count // self.pools)
        documents = (shuffled(place, count, self.seed, epoch) for place in places)
        groups: list[list[int]] = []
        for document in sorted(documents, key=self.rows.length, reverse=True):
            if not groups or (len(groups[-1]) + 1) * self._width(groups[-1][0]) > self.room:
                groups.append([])
            groups[-1].append(document)
        order = (shuffled(i, len(groups), self.seed + 1 + pool, epoch) for i in range(len(groups)))
        return [groups[i] for i in order]

    def __iter__(self) -> Iterator[list[dict]]:
        return self

    def __next__(self) -> list[dict]:
        step = []
        for _ in range(self.micros):
            if self.place == len(self.groups):
                self.load_state({"pool": self.pool + 1, "place": 0, "tokens": self.tokens})
            step.append(self.groups[self.place])
            self.place += 1
            self.tokens += sum(map(self.rows.length, step[-1]))
        share = max(1, self.world // self.micros)  # ranks that share a micro-batch
        batches = []
        for group in step[self.rank // share :: max(1, self.world // share)]:
            mine = [[(d, 0, self.rows.length(d))] for d in group[self.rank % share :: share]]
            batch = collate(self.rows, mine or [[]], self._width(group[0]))
            batches.append({name: batch[name] for name in ("ids", "targets")})
        return batches


def validation_batches(
    shards: Documents, width: int, rows: int, rank: int = 0, world: int = 1, documents: range | None = None
) -> Iterator[dict]:
    """Yield this rank's share of the validation rows once, `rows` at a time, in a fixed order.

    Every rank yields as many batches of the same size, some with empty rows: under FSDP a forward pass is
    made by all ranks together.
    """
    whole = list(RowStream(shards, width, 0, shuffle=False, documents=documents))
    whole += [[]] * (-len(whole) % world)
    mine = whole[rank::world]
    for i in range(0, len(mine), rows):
        yield collate(shards, mine[i : i + rows], width)


# --- 4. preference pairs -----------------------------------------------------------------------------------


class PairRows(ChatRows):
    """Preference pairs: a document is a conversation with the chosen answer, then the same with the rejected.

    So a pair is never torn, and a row is packed with whole pairs: the chosen answer of a row's n-th pair has
    doc_id 2n, the rejected 2n + 1. Only the last reply, with the token that ends it, is trained: the same
    span as in ChatRows. Rows are chat.read_rows(..., "pairs"); nothing is ever cut. Left out, and counted in
    `dropped`: pairs of which one conversation exceeds `context` tokens or both together `longest` (0: no
    limit), and pairs of equal answers.

    ValueError: what the template cannot write (its row's "where" says where it is).

    counts: (pairs, 2) trained tokens of each answer. Batches have besides (P: the pairs of the fullest row)
        pairs      (B, P) int64: which pair it is, −1 where a row has fewer
        reference  (B, P, 2) fp64: its rows of `self.reference` (pairs, 2), where that is not None
    """

    def __init__(
        self,
        rows: Iterable[dict],
        tokenizer: Tokenizer,
        context: int,
        longest: int = 0,
        template: str | None = None,
    ):
        ids, mask, ends = array("I"), array("B"), array("q", [0])
        self.rows, self.dropped, self.bytes, counts, seams = [], {"too long": 0, "equal": 0}, 0, [], []
        self.reference: np.ndarray | None = None
        for n, row in enumerate(rows, 1):
            try:
                (chosen, left), (rejected, right) = _encode_answers(row, tokenizer, template)
            except ValueError as error:
                raise ValueError(f"{row.get('where', f'row {n}')}: {error}") from None
            both = len(chosen) + len(rejected)
            if chosen == rejected:
                self.dropped["equal"] += 1
            elif max(len(chosen), len(rejected)) > context or both > (longest or both):
                self.dropped["too long"] += 1
            else:
                self.rows.append(row)
                ids.extend(chosen + rejected)
                mask.extend(left + right)
                ends.append(len(ids))
                seams.append(len(chosen))
                counts.append((sum(left), sum(right)))
                self.bytes += len(row["chosen"].encode()) + len(row["rejected"].encode())
        self._keep("pairs", ids, mask, ends, tokenizer)
        self.seams, self.counts = np.array(seams, np.int64), np.array(counts, np.int64).reshape(-1, 2)

    def complete(self, batch: dict, rows: list[list[Span]]) -> dict:
        """Give both answers of each pair a doc_id of its own, and say which pairs they are."""
        import torch

        most = max([1, *map(len, rows)])
        pairs = torch.full((len(rows), most), -1)
        reference = torch.zeros(len(rows), most, 2, dtype=torch.float64)
        for b, pieces in enumerate(rows):
            at = 0
            for n, (pair, start, count) in enumerate(pieces):
                assert start == 0 and count == self.length(pair), "rows are at least as long as any pair"
                seam = at + int(self.seams[pair])
                batch["doc_ids"][b, at:seam], batch["doc_ids"][b, seam : at + count] = 2 * n, 2 * n + 1
                pairs[b, n] = pair
                if self.reference is not None:
                    reference[b, n] = torch.from_numpy(self.reference[pair])
                at += count
        batch["pairs"] = pairs
        return batch if self.reference is None else batch | {"reference": reference}


def _encode_answers(row: dict, tokenizer: Tokenizer, template: str | None) -> list[tuple[list, list]]:
    """Encode a pair's two conversations: [(ids, mask of the last reply), …], chosen and rejected."""
    asked, answers = row["messages"], []
    # a prefix of both; earlier replies in it would cancel but for rounding
    given = len(tokenizer.encode_chat(asked, open_reply=True, template=template)[0])
    assert given, "a target at the seam would let the chosen answer predict the rejected conversation"
    for name in ("chosen", "rejected"):
        messages = [*asked, {"role": "assistant", "content": row[name]}]
        ids, mask = tokenizer.encode_chat(messages, template=template)
        answers.append((ids, [0] * given + mask[given:]))
    return answers


# --- 5. looking --------------------------------------------------------------------------------------------


@dataclass
class CheckConfig:
    files: tyro.conf.Positional[tuple[str, ...]]  # .txt, .jsonl (.gz, .zst), .parquet, folders of them; .json


def check(config: CheckConfig) -> None:
    """Read every document, conversation or preference; stop at the first bad line: where it is and why."""
    named = [[Path(f)] if f.endswith(".json") else common.document_files([f]) for f in config.files]
    count, size, said = Counter(), Counter(), Counter()
    for file in (file for files in named for file in files):
        kind = file_kind(file)
        if kind == "documents":
            texts = ([text] for text in common.documents([file]))
        else:
            rows = chat.read_rows([file], kind)
            said.update((kind, message["role"]) for row in rows for message in row["messages"])
            replies = ("chosen", "rejected") if kind == "pairs" else ()
            texts = ([m["content"] for m in row["messages"]] + [row[r] for r in replies] for row in rows)
        for parts in texts:
            count[kind] += 1
            size[kind] += sum(map(len, parts))
    if not count:
        raise ValueError(f"{', '.join(config.files)}: no documents")
    for kind in count:
        roles = ", ".join(f"{said[kind, role]:,} {role}" for role in chat.ROLES if said[kind, role])
        line = f"{count[kind]:,} {KINDS[kind]}, {size[kind]:,} characters, no bad line"
        print(f"{line}; messages: {roles}" if roles else line)


KINDS = {"documents": "documents", "chat": "conversations", "pairs": "preferences"}


def file_kind(file: Path) -> str:
    """Tell by its first row what a file holds: "documents", "chat" (conversations), "pairs" (preferences)."""
    if re.search(r"\.jsonl?(\.gz|\.zst)?$", file.name):
        for _, row in chat.json_rows(file):
            return chat.kind_of(row) or ("chat" if file.suffix == ".json" else "documents")
    return "documents"


@dataclass
class ConvertConfig:
    files: tyro.conf.Positional[tuple[str, ...]]  # .json, .jsonl (.gz, .zst), folders; several are merged
    to: str  # messages, alpaca, instruction, sharegpt or yayi; of preferences also conversations, prompt
    out: str  # file to write: .json is one array, .jsonl has a row on each line


def convert(config: ConvertConfig) -> None:
    """Write conversations or preferences of any known form in another; what it cannot hold is an error."""
    out, files = Path(config.out), chat.row_files(config.files)
    if out.suffix not in (".json", ".jsonl"):
        raise ValueError(f"--out {out}: expected a name that ends with .json or .jsonl")
    kinds = {file_kind(file): file for file in reversed(files)}
    if len(kinds) > 1:
        held = "; ".join(f"{file} holds {KINDS[kind]}" for kind, file in kinds.items())
        raise ValueError(f"{held}: take one kind")
    rows = []
    for row in chat.read_rows(files, "pairs" if "pairs" in kinds else "chat"):
        try:
            rows.append(chat.to_form(row, config.to))
        except ValueError as error:
            raise ValueError(f"{row['where']}: {error}") from None
    if out.suffix == ".json":
        common.write_json(out, rows)
    else:
        common.atomic_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{out}: {len(rows):,} {KINDS[min(kinds)]} as {config.to}")


@dataclass
class ShowConfig:
    folder: tyro.conf.Positional[str]  # a packed folder
    rows: int = 1  # rows to show
    length: int = 128  # tokens of a row
    seed: int = 0  # of the stream


def show(config: ShowConfig) -> None:
    """Print rows of the training stream, bars between documents; how full each row is goes to stderr."""
    tokenizer: Tokenizer = load_tokenizer(config.folder)
    stream = RowStream(Shards([config.folder], "train"), config.length, config.seed)
    for _ in range(config.rows):
        pieces = next(stream)
        texts = [tokenizer.decode(stream.shards.read(*p).tolist()) for p in pieces]
        filled = sum(count for _, _, count in pieces)
        print(" | ".join(texts))
        print(f"  [{len(pieces)} documents, {filled} of {config.length} positions]", file=sys.stderr)


if __name__ == "__main__":
    common.run(pack, check, convert, show, doc=__doc__)
