"""Text to token ids and back: train a vocabulary, extend one, load one, stream its output, look inside it.

A model reads integers. A tokenizer cuts text into pieces of a fixed vocabulary and numbers them. Four kinds:
`bpe` joins the most frequent pair of neighbours again and again; `unigram` starts with too many pieces and
drops those that are missed least (12 times slower); `char` takes characters: SentencePiece learns these.
`bytebpe` joins bytes instead of characters, inside words only, as GPT, BLOOM, Qwen and DeepSeek do; this file
learns it, needs `regex` for it, and encodes through `tiktoken` where that is installed.

Ours are lossless: no normalisation, no space added in front, none removed, and a character outside the
vocabulary is spelt in UTF-8 bytes (<0xE4>), so decode(encode(text)) == text. (--nfkc and --no_byte_fallback
give that up: ① becomes 1, a rare character <unk>.) Every digit is a token of its own;
so are newline and tab (in bytebpe several may be one token). A space inside a piece is written ▁.
Special tokens (<s>, </s>, <|user|>) never come from text: whoever types </s> gets the letters of it.
encode(a) + encode(b) is in general not encode(a + b): a piece may span the seam, and a foreign model that
puts a space in front of every text (dummy prefix) puts one at the seam as well.

    python tokenizer.py train corpus.jsonl --vocab_size 8192 --out out/tok
    python tokenizer.py train zh/ en.txt.gz --kind unigram --specials "<|user|>,<|assistant|>" --out out/tok
    python tokenizer.py train zh/ --kind bytebpe --vocab_size 32000 --out out/tok
    python tokenizer.py extend out/tok new.jsonl --vocab_size 10000 --specials "<|tool|>" --out out/tok2
    python tokenizer.py stats out/tok corpus.jsonl
    python tokenizer.py dump out/tok --out out/vocabulary.tsv
    python tokenizer.py show out/tok --data chat.jsonl --template plain    # a conversation, what is trained

The folder loads in transformers as well (LlamaTokenizer, AutoTokenizer) and in tokenizers (tokenizer.json).
Of others we read tokenizer.model (SentencePiece) or else tokenizer.json (byte-level or Metaspace BPE).
For 100 M characters SentencePiece's BPE takes 6 GB and 76 CPU seconds, bytebpe (32,000 tokens) 3.0 and 240;
--max_chars draws a sample.

Papers: BPE, Sennrich et al. 2016 (1508.07909). Unigram, Kudo 2018 (1804.10959).
SentencePiece, Kudo & Richardson 2018 (1808.06226).
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import heapq
import io
import itertools
import json
import operator
import os
import random
import re
import struct
import sys
import time
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from tyro.conf import Positional

import chat
from common import atomic_folder, atomic_text, documents, human, progress, run

# Ids 0, 1, 2, 3 of ours. A byte-level vocabulary has no <unk>: there is nothing it cannot write.
BASE_SPECIALS = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
SPACE = "▁"  # U+2581: how SentencePiece writes a space inside a piece
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
FILES = ("tokenizer.model", "tokenizer.json", *CONFIGS)  # what belongs to a tokenizer in a model folder

# --- 1. inside a .model file --------------------------------------------------------------------------------
# A .model is a protocol buffer, sentencepiece_model.proto. SentencePiece's Python class does not tell the
# normaliser's settings nor a piece's type, so we read those few fields ourselves (protobuf is no dependency).

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # SentencePiece.Type
HOLE = 0  # ours: an id between added tokens that stands for nothing
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}  # TrainerSpec.ModelType


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Read an integer of 7 bits per byte, low bits first; the high bit says: more follows. -> value, end"""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Yield (field number, value, the field's own bytes) of a protocol buffer message, untyped."""
    at = 0
    while at < len(data):
        start = at
        key, at = varint(data, at)
        value = size = 0
        if key & 7 == 0:  # an integer, a bool, an enum
            value, at = varint(data, at)
        elif key & 7 == 2:  # a length and that many bytes: a string, a message
            size, at = varint(data, at)
        else:  # 8 bytes, or 4 (a float)
            size = {1: 8, 5: 4}[key & 7]
        value, at = (data[at : at + size], at + size) if key & 7 else (value, at)
        if at > len(data):
            raise IndexError("the message ends inside a field")
        yield key >> 3, value, data[start:at]


def proto_field(number: int, value: int | bytes) -> bytes:
    """Write one field of a protocol buffer message: an integer, or a string or message with its length."""

    def written(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 0x7F | 0x80]) + written(n >> 7)

    if isinstance(value, int):
        return written(number << 3) + written(value)
    return written(number << 3 | 2) + written(len(value)) + value


@dataclass
class ModelFile:
    """What a .model file says: pieces (id = place in the list) and the settings that we need."""

    data: bytes
    texts: list[str]
    scores: list[float]
    types: list[int]
    kind: str = "unigram"
    byte_fallback: bool = False
    unk_surface: str = " ⁇ "
    charsmap: bytes = b""  # the compiled normalisation rules; empty means identity
    dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    @classmethod
    def parse(cls, data: bytes, where: str) -> ModelFile:
        """Read the bytes of a .model; ValueError names `where` if they are none."""
        file, seen = cls(data, [], [], []), set()
        try:
            for number, message, _ in proto_fields(data):
                seen.add(number)
                fields = {n: value for n, value, _ in proto_fields(message)} if number <= 3 else {}
                if number == 1:
                    file.texts.append(fields[1].decode("utf-8"))
                    file.scores.append(struct.unpack("<f", fields.get(2, bytes(4)))[0])
                    file.types.append(fields.get(3, NORMAL))
                elif number == 2:  # trainer_spec
                    file.kind = MODEL_TYPES[fields.get(3, 1)]
                    file.byte_fallback = bool(fields.get(35, False))
                    file.unk_surface = fields.get(44, file.unk_surface.encode()).decode()
                elif number == 3:  # normalizer_spec
                    file.charsmap = fields.get(2, b"")
                    file.dummy_prefix = bool(fields.get(3, True))
                    file.remove_extra_whitespaces = bool(fields.get(4, True))
        except (IndexError, KeyError, TypeError, AttributeError, struct.error, UnicodeDecodeError):
            seen.clear()
        if not seen >= {1, 2, 3}:
            raise ValueError(f"{where}: not a SentencePiece model, or a damaged one")
        return file

    def add_tokens(self, added: dict[int, str]) -> None:
        """Give these ids these texts: beyond the model's own pieces, or in the place of one."""
        grow = max([len(self.texts) - 1, *added]) + 1 - len(self.texts)
        self.texts += [""] * grow
        self.scores += [0.0] * grow
        self.types += [HOLE] * grow
        for i, text in added.items():
            self.texts[i] = text
            self.types[i] = self.types[i] or USER_DEFINED

    def make_special(self, ids: Iterable[int]) -> None:
        """Make these pieces control symbols, which SentencePiece never produces from text."""
        changed = {i for i in ids if self.types[i] not in (CONTROL, UNKNOWN)}
        for i in changed:
            self.types[i] = CONTROL
        fields, piece = [], 0
        for number, message, raw in proto_fields(self.data) if changed else ():
            if number == 1:
                if piece in changed:
                    body = b"".join(r for n, _, r in proto_fields(message) if n != 3)
                    raw = proto_field(1, body + proto_field(3, CONTROL))
                piece += 1
            fields.append(raw)
        self.data = b"".join(fields) or self.data

    def append(self, pieces: list[tuple[str, float, int]]) -> bytes:
        """Give the bytes of this model with further pieces (text, score, type) at the end."""
        data = self.with_settings(2, {4: len(self.texts) + len(pieces)})  # trainer_spec.vocab_size
        for text, score, kind in pieces:
            score_field = bytes([2 << 3 | 5]) + struct.pack("<f", score)
            data += proto_field(1, proto_field(1, text.encode()) + score_field + proto_field(3, kind))
        return data

    def with_settings(self, spec: int, values: dict[int, int]) -> bytes:
        """Give the bytes of this model with other integers in trainer_spec (2) or normalizer_spec (3)."""
        fields = []
        for number, message, raw in proto_fields(self.data):
            if number == spec:
                rest = b"".join(r for n, _, r in proto_fields(message) if n not in values)
                raw = proto_field(spec, rest + b"".join(proto_field(n, v) for n, v in values.items()))
            fields.append(raw)
        return b"".join(fields)


# --- 2. inside a tokenizer.json -----------------------------------------------------------------------------
# The format of the `tokenizers` library: text -> normalizer -> pre_tokenizer, which cuts it -> BPE inside
# each piece. We read the components that byte-level BPE (GPT-2, BLOOM, Qwen, SmolLM, DeepSeek) and
# Metaspace BPE (XVERSE, LLaMA) use, apply them one after the other, and refuse any other by name.

# Byte-level vocabularies write each byte as one printable character: a space as Ġ, a newline as Ċ.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + sorted(set(range(256)) - set(PRINTABLE))  # also the order of their ids
LETTER = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + n) for n, b in enumerate(BYTE_ORDER[188:])}
BYTE_OF = {letter: b for b, letter in LETTER.items()}
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUNCTUATION = r"[!-/:-@\[-`{-~]|\p{P}"  # ASCII's symbols are punctuation here


def compiled(pattern: str | dict, where: str):
    r"""Compile a pattern as tokenizer.json writes one; `regex` knows \p{L} and nested sets, `re` does not."""
    try:
        import regex
    except ImportError:
        raise ValueError("byte-level BPE needs the regex package: pip install regex") from None
    if isinstance(pattern, dict):
        pattern = regex.escape(pattern["String"]) if "String" in pattern else pattern["Regex"]
    try:
        return regex.compile(pattern, regex.V1)
    except regex.error as error:
        raise ValueError(f"{where}: the pattern {pattern!r} cannot be read ({error})") from None


def leaves(spec: dict | None) -> list[dict]:
    """List the components of a normalizer, pre_tokenizer or decoder in order, Sequences opened."""
    if not spec or spec["type"] != "Sequence":
        return [spec] if spec else []
    kinds = ("normalizers", "pretokenizers", "decoders", "processors")
    parts = next((spec[kind] for kind in kinds if kind in spec), [])
    return [leaf for part in parts for leaf in leaves(part)]


def normalizing(spec: dict, where: str) -> Callable[[str], str]:
    """Make a function of one normalizer; ValueError names one that we do not know."""
    kind = spec["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return functools.partial(unicodedata.normalize, kind)
    if kind == "Prepend":
        return lambda text: text and spec["prepend"] + text
    if kind == "Replace":
        pattern = compiled(spec["pattern"], where)
        return lambda text: pattern.sub(lambda _: spec["content"], text)
    raise ValueError(f"{where}: normalizer {kind!r} is not supported")


def splitting(spec: dict, where: str) -> Callable[[str, bool], list[str]]:
    """Make a function of one pre_tokenizer: (piece, does the text begin with it) -> pieces.

    None instead of True or False: it goes on from another text, so no space is put in front.
    """
    kind, behavior, gaps = spec["type"], spec.get("behavior", "Isolated"), True
    mark, scheme = "", "never"  # what stands for a space, and whether one is put in front
    if kind == "ByteLevel":
        mark, scheme = " ", "always" if spec.get("add_prefix_space", True) else "never"
        pattern = compiled(GPT2_SPLIT, where) if spec.get("use_regex", True) else None
    elif kind == "Metaspace":
        mark, scheme = spec["replacement"], prepend_scheme(spec)
        pattern = compiled(f"{mark}?[^{mark}]*", where) if spec.get("split", True) else None
    elif kind == "Split":
        pattern, gaps = compiled(spec["pattern"], where), behavior == "Isolated"
        if not gaps and not (behavior == "Removed" and spec.get("invert")):
            raise ValueError(f"{where}: behavior {behavior!r} of Split is not supported")
    elif kind == "Digits":
        pattern = compiled(r"\p{N}" if spec.get("individual_digits") else r"\p{N}+", where)
    elif kind == "Punctuation" and behavior == "Isolated":
        pattern = compiled(PUNCTUATION, where)
    else:
        raise ValueError(f"{where}: pre_tokenizer {kind!r} is not supported")

    def cut(text: str) -> list[str]:  # each match is a piece, and so is what lies between two
        if not gaps:
            return [match[0] for match in pattern.finditer(text)]
        spans = [0, *(place for match in pattern.finditer(text) for place in match.span()), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(spans)]

    if pattern and gaps and not pattern.groups:
        cut = compiled(f"({pattern.pattern})", where).split  # the same, twice as fast

    def split(text: str, first: bool | None) -> list[str]:
        text = text.replace(" ", mark) if mark else text
        wanted = first if scheme == "first" else scheme == "always" and first is not None
        if wanted and not text.startswith(mark):
            text = mark + text
        return list(filter(None, cut(text))) if pattern else [text]

    return split


def prepend_scheme(spec: dict) -> str:
    """Say when a Metaspace puts a space in front: always, never, first; older files have a bool."""
    return spec.get("prepend_scheme") or ("always" if spec.get("add_prefix_space", True) else "never")


@dataclass
class JsonFile(ModelFile):
    """What a tokenizer.json says: pieces, as ModelFile has them, and the components."""

    where: str = ""
    spec: dict = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes, where: str) -> JsonFile:
        """Read the bytes of a tokenizer.json; ValueError names `where` and what cannot be read."""
        try:
            file = cls(data, [], [], [], where=where, spec=json.loads(data))
            model = file.spec["model"]
            kind = model.get("type") or ("BPE" if "merges" in model else None)
            bad = [k for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
            if kind != "BPE" or bad:
                what = f"{bad[0]} of the model" if bad else f"model {kind!r}"
                raise ValueError(f"{where}: {what} is not supported; only BPE without options is")
            model["merges"] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            file.add_tokens({i: text for text, i in model["vocab"].items()})
            for text, i in model["vocab"].items():
                byte = model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text)
                file.types[i] = UNKNOWN if text == model.get("unk_token") else BYTE if byte else NORMAL
                file.scores[i] = float(-i)
            for token in file.spec.get("added_tokens", []):
                file.add_tokens({token["id"]: token["content"]})
                if file.types[token["id"]] != UNKNOWN:
                    file.types[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where}: not a tokenizer.json, or a damaged one ({error!r})") from None
        return file

    def make_special(self, ids: Iterable[int]) -> None:
        """Make these pieces control symbols, which no text produces."""
        for i in ids:
            self.types[i] = self.types[i] if self.types[i] == UNKNOWN else CONTROL


# --- 3. the tokenizer ---------------------------------------------------------------------------------------


class SentencePieceBackend:
    """Plain text to ids by SentencePiece, and what each id stands for.

    texts, types, scores: lists over ids. token_bytes[id]: UTF-8, one byte for a byte piece, b"" for a special
    token, None for a hole. leading_space: ids whose first space is dropped at the start of a decoded text.
    own, add_bos: ids of bos, eos, pad, unk, and whether bos begins a document, where no config says it.
    """

    def __init__(self, file: ModelFile):
        import sentencepiece

        self.texts, self.types, self.scores = file.texts, file.types, file.scores
        for i, (text, kind) in enumerate(zip(file.texts, file.types)):
            if kind == CONTROL and len(text) == 1:  # SentencePiece does look up single characters among these
                raise ValueError(f"special token {text!r} (id {i}): one character, which text would produce")
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=file.data)

        def bytes_of(text: str, kind: int) -> bytes | None:
            if kind == BYTE:
                return bytes([int(text[3:5], 16)])
            if kind == UNKNOWN:
                return file.unk_surface.encode()
            return {HOLE: None, CONTROL: b""}.get(kind, text.replace(SPACE, " ").encode())

        self.token_bytes = [bytes_of(text, kind) for text, kind in zip(file.texts, file.types)]
        # A model with a dummy prefix puts a space in front of every text; decoding takes it away again.
        prefixed = file.dummy_prefix or file.remove_extra_whitespaces
        spaced = {i for i, text in enumerate(file.texts) if text.startswith(SPACE)}
        self.leading_space = spaced if prefixed else set()
        self.strips_all = file.remove_extra_whitespaces  # not one leading space but all of them
        own = {k: getattr(self.processor, f"{k}_id")() for k in BASE_SPECIALS}
        self.own, self.add_bos = {k: i for k, i in own.items() if i >= 0}, True
        # SentencePiece reads a real ▁ as a space. Where nothing else is lost either, spell it in bytes.
        self.space_in_bytes = None
        if file.byte_fallback and not file.charsmap and not prefixed:
            byte_ids = {data: i for i, data in enumerate(self.token_bytes) if file.types[i] == BYTE}
            self.space_in_bytes = [byte_ids[bytes([b])] for b in SPACE.encode()]

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """Encode plain text; inside: it goes on from another. ValueError for a lone surrogate."""
        try:
            if self.space_in_bytes is None or SPACE not in text:
                return (self.inside if inside else self.processor).encode(text)
            first, *others = [self.processor.encode(part) for part in text.split(SPACE)]
        except RuntimeError:
            text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError here, which is a ValueError
            raise
        return first + [i for part in others for i in self.space_in_bytes + part]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode what stands inside a text; [] for bytes that are no characters (see Tokenizer)."""
        try:
            return self.inside.encode(data.decode())
        except UnicodeDecodeError:
            return [i for i, kind in enumerate(self.types) if kind == BYTE and self.token_bytes[i] == data]

    @functools.cached_property
    def inside(self):
        """The same model, but it puts no space in front and removes none."""
        import sentencepiece

        file = ModelFile.parse(self.processor.serialized_model_proto(), "the model")
        return sentencepiece.SentencePieceProcessor(model_proto=file.with_settings(3, {3: 0, 4: 0}))


@functools.cache
def announce(message: str) -> None:
    """Say something on stderr, once."""
    print(message, file=sys.stderr)


class BpeBackend:
    """Plain text to ids by the components of a tokenizer.json; attributes as SentencePieceBackend's.

    `merge` defines the ids. For byte-level BPE tiktoken does the same in Rust where its rule (join the
    neighbours whose union is a token, the smallest id first) gives the same; that is checked here.
    """

    def __init__(self, file: JsonFile):
        spec, model, where = file.spec, file.spec["model"], file.where
        splitters = leaves(spec.get("pre_tokenizer"))
        self.normalizers = [
            (leaf["type"], normalizing(leaf, where)) for leaf in leaves(spec.get("normalizer"))
        ]
        idle = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}  # it cuts nothing
        self.splitters = [splitting(leaf, where) for leaf in splitters if not idle.items() <= leaf.items()]
        self.byte_level = "ByteLevel" in [leaf["type"] for leaf in splitters]
        if "ByteLevel" in [leaf["type"] for leaf in splitters[:-1]]:
            raise ValueError(f"{where}: a pre_tokenizer after ByteLevel is not supported")
        self.types, self.scores = file.types, file.scores
        self.unk = next((i for i, kind in enumerate(file.types) if kind == UNKNOWN), None)
        starts = [post.get("single", [])[:1] for post in leaves(spec.get("post_processor"))]
        self.own, self.add_bos = {"unk": self.unk}, any("SpecialToken" in part for s in starts for part in s)

        # No merge may end in a special token: then user text would produce it.
        self.id_of = {text: i for i, text in enumerate(file.texts) if file.types[i] in (NORMAL, BYTE)}
        self.ranks, known = {}, set(file.texts)  # (left id, right id) -> (rank, id of the union)
        for rank, (left, right) in enumerate(model["merges"]):
            if {left, right, left + right} <= self.id_of.keys():
                self.ranks[self.id_of[left], self.id_of[right]] = rank, self.id_of[left + right]
            elif not {left, right, left + right} <= known:
                raise ValueError(f"{where}: merge {left!r} {right!r} is not of the vocabulary")
        self.fuse_unk, self.byte_fallback = model.get("fuse_unk"), model.get("byte_fallback")
        self.whole_pieces = model.get("ignore_merges")  # a piece that is a token is not looked into
        self.find_added(spec.get("added_tokens", []), where)
        self.read_decoder(file)
        cache = functools.lru_cache(maxsize=1 << 16)  # for short pieces: they come again and again
        self.cached, self.cached_splitters = cache(self.encode_piece), list(map(cache, self.splitters))
        self.tiktoken = self.byte_level and self.load_tiktoken()

    def find_added(self, added: list[dict], where: str) -> None:
        """Prepare the search for added tokens in text: those that are neither special nor look like a mark.

        Some files flag marks of the chat format, such as <think> or <|User|>, as not special. Text from a
        user must not produce them either, so what stands in <> or [] is never looked for.
        """
        self.added_id, texts = {}, {False: [], True: []}  # is it looked for after normalising?
        for token in added:
            text, i, late = token["content"], token["id"], bool(token.get("normalized"))
            if self.types[i] != USER_DEFINED or re.fullmatch(r"<.*>|\[.*\]", text, re.DOTALL):
                continue
            if token.get("single_word") or token.get("lstrip") or token.get("rstrip"):
                raise ValueError(f"{where}: added token {text!r}: single_word, lstrip, rstrip not supported")
            texts[late].append(self.normalize(text) if late else text)
            self.added_id[texts[late][-1]] = i
        longest = {
            late: sorted(map(re.escape, found), key=len, reverse=True) for late, found in texts.items()
        }
        self.added = {
            late: re.compile(f"({'|'.join(found)})" if found else "(?!)") for late, found in longest.items()
        }

    def read_decoder(self, file: JsonFile) -> None:
        """Work out what each id stands for: texts, token_bytes, leading_space."""
        decoders = {leaf["type"]: leaf for leaf in leaves(file.spec.get("decoder"))}
        unknown = decoders.keys() - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
        if unknown:
            raise ValueError(f"{file.where}: decoder {min(unknown)!r} is not supported")
        spaced = not decoders.keys().isdisjoint({"Metaspace", "Replace"})

        def bytes_of(text: str, kind: int) -> bytes | None:
            if kind in (HOLE, CONTROL, UNKNOWN):
                return None if kind == HOLE else b""
            if kind == BYTE:
                return bytes([int(text[3:5], 16)])
            if kind == NORMAL and self.byte_level and BYTE_OF.keys() >= set(text):
                return bytes([BYTE_OF[c] for c in text])
            return (text.replace(SPACE, " ") if spaced and kind == NORMAL else text).encode()

        self.texts, self.token_bytes = file.texts, list(map(bytes_of, file.texts, file.types))
        for i, data in enumerate(self.token_bytes):
            if self.byte_level and self.types[i] == NORMAL:
                try:
                    self.texts[i] = data.decode().replace(" ", SPACE)
                except UnicodeDecodeError:  # a part of a character
                    self.texts[i], self.types[i] = "".join(f"<0x{b:02X}>" for b in data), BYTE
        prefixed = "Metaspace" in decoders and prepend_scheme(decoders["Metaspace"]) != "never"
        prefixed = prefixed or decoders.get("Strip", {}).get("start")
        starts = {i for i, data in enumerate(self.token_bytes) if data and data.startswith(b" ")}
        self.leading_space, self.strips_all = starts if prefixed else set(), False

    def load_tiktoken(self):
        """Give a tiktoken encoding of the same vocabulary; None where its rule or the package is missing."""
        try:
            import tiktoken

            if tuple(map(int, tiktoken.__version__.split(".")[:2])) < (0, 13):
                raise ImportError("its time grows with the square of a piece's length")
        except ImportError:
            announce(
                "encoding in pure Python, many times slower than with tiktoken (pip install -U tiktoken)"
            )
            return None
        made = [i for _, i in self.ranks.values()]
        ids = [*(self.id_of.get(letter) for letter in LETTER.values()), *made]
        same = None not in ids and made == sorted(set(made))
        same = same and (not self.whole_pieces or set(ids) >= set(self.id_of.values()))
        if not same or not self.made_whole():
            announce("the merges of this tokenizer are not in the order of its ids: encoding in pure Python")
            return None
        ranks = {self.token_bytes[i]: i for i in ids}
        # NUL parts the pieces: what no pattern matches is left out
        return tiktoken.Encoding("baizhi", pat_str=r"[^\x00]+", mergeable_ranks=ranks, special_tokens={})

    def made_whole(self) -> bool:
        """Whether merging the bytes of every token gives that token: tiktoken takes such a piece whole.

        Merging goes through the ranks in ascending order. It goes wrong where a part x of the left half and
        a part y of the right one meet at the seam and are joined before either is taken up by its own half.
        Such parts are the half itself, its own half at the seam, and so on down to one byte. With the merges
        b+c, a+b, ab+c the bytes of abc become a, bc.
        """
        birth = {made: (rank, pair) for pair, (rank, made) in self.ranks.items()}

        def at_seam(i: int, side: int, rank: int) -> list[tuple[int, int]]:
            parts = [(i, rank)]  # and the rank at which it is taken up
            while i in birth:
                rank, i = birth[i][0], birth[i][1][side]
                parts.append((i, rank))
            return parts

        for (left, right), (rank, _) in self.ranks.items():
            if any(birth[half][0] > rank for half in (left, right) if half in birth):
                return False  # a half that comes after the whole: the ranks are of another kind
            for (x, until), (y, other) in itertools.product(at_seam(left, 1, rank), at_seam(right, 0, rank)):
                seam = self.ranks.get((x, y), (rank, 0))[0]
                if seam < until and seam <= other:  # of equal pairs, as in aaa, the leftmost is joined
                    return False
        return True

    def normalize(self, text: str, inside: bool = False) -> str:
        """Apply the normalizers, one after the other; inside a text nothing is put in front."""
        for kind, normalizer in self.normalizers:
            text = text if inside and kind == "Prepend" else normalizer(text)
        return text

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """Encode plain text; inside: it goes on from another. ValueError for a lone surrogate."""
        text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
        ids = []
        for n, part in enumerate(self.added[False].split(text)):  # text, added token, text, ...
            if n % 2:
                ids.append(self.added_id[part])
                continue
            goes_on = inside and n == 0
            for m, section in enumerate(self.added[True].split(self.normalize(part, goes_on))):
                if m % 2:
                    ids.append(self.added_id[section])
                    continue
                pieces = self.pieces(section, None if goes_on and m == 0 else n == m == 0)
                runs = [(bool(self.tiktoken), pieces)]
                if "\0" in section:  # which parts the pieces in what tiktoken gets
                    runs = itertools.groupby(pieces, lambda piece: self.tiktoken and "\0" not in piece)
                for fast, group in runs:
                    if fast:  # one call for many: a call takes as long as a piece
                        ids += self.tiktoken.encode_ordinary("\0".join(group))
                        continue
                    for piece in group:
                        ids += self.cached(piece) if len(piece) < 64 else self.encode_piece(piece)
        return ids

    def pieces(self, text: str, first: bool | None = True) -> list[str]:
        """Apply the splitters, one after the other, each to every piece of the one before."""
        pieces = [text] if text else []
        for split, again in zip(self.splitters, self.cached_splitters):
            begin = split(pieces[0], first) if pieces else []
            rest = ((again if len(piece) < 64 else split)(piece, False) for piece in pieces[1:])
            pieces = [*begin, *itertools.chain.from_iterable(rest)]
        return pieces

    def encode_piece(self, piece: str) -> list[int]:
        """Encode what the splitters left in one piece."""
        data = piece.encode() if self.byte_level else piece
        name = "".join(LETTER[b] for b in data) if self.byte_level else piece
        if self.whole_pieces and name in self.id_of:
            return [self.id_of[name]]
        return self.merge(self.symbols(data))

    def symbols(self, piece: bytes | str) -> list[int]:
        """Give the ids that merging starts from: of bytes, or of characters, some spelt in bytes, or unk."""
        ids = []
        for c in piece:
            i = self.id_of.get(LETTER[c] if self.byte_level else c, self.unk)
            spelt = [i]
            if i == self.unk and self.byte_fallback:
                spelt = [self.id_of.get(f"<0x{b:02X}>", i) for b in c.encode()]
                spelt = [i] if i in spelt else spelt
            if None in spelt:
                raise ValueError(f"the vocabulary has no token for {c!r} and none for the unknown")
            if spelt != [self.unk] or not (self.fuse_unk and ids[-1:] == spelt):
                ids += spelt
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode what stands inside a text; [] for what the vocabulary cannot spell (see Tokenizer)."""
        try:
            piece = data if self.byte_level else data.decode().replace(" ", SPACE)
            return self.merge(self.symbols(piece))
        except ValueError:
            return [] if len(data) > 1 else [i for i, b in enumerate(self.token_bytes) if b == data]

    def merge(self, ids: list[int]) -> list[int]:
        """Join neighbours, the pair of lowest rank first and of equal ones the leftmost, until none joins.

        >>> with ranks a+b -> 0, ab+c -> 1:  a b c a b  ->  ab c ab  ->  abc ab
        """
        end = len(ids)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))  # a linked list over places
        pairs = enumerate(itertools.pairwise(ids))
        heap = [(*self.ranks[pair], place, pair) for place, pair in pairs if pair in self.ranks]
        heapq.heapify(heap)
        ids = ids.copy()
        while heap:
            _, new, place, (left, right) = heapq.heappop(heap)
            gone = after[place]
            if ids[place] != left or gone == end or ids[gone] != right:
                continue  # one of the two has been joined with another since
            ids[place], ids[gone], after[place] = new, -1, after[gone]
            if after[place] < end:
                before[after[place]] = place
            for at in (before[place], place):
                pair = (ids[at], ids[after[at]]) if at >= 0 and after[at] < end else None
                if pair in self.ranks:
                    heapq.heappush(heap, (*self.ranks[pair], at, pair))
        return [i for i in ids if i >= 0]


class Tokenizer:
    """The public face of a tokenizer: ids from text, text from ids, special tokens, saving.

    bos_id, eos_id, pad_id, unk_id: int, or None where there is none. vocab_size counts added tokens.
    special_ids: ids that no text produces (but a model without byte fallback does read unknown characters as
    unk_id). add_bos: whether documents start with bos. digest: hex SHA-256 of model and special tokens.
    template: the name of the chat template that the folder is meant for, or None.
    """

    def __init__(
        self,
        backend,
        special: dict[str, int | None],
        add_bos: bool,
        files: dict[str, bytes],
        template: str | None = None,
    ):
        self.backend, self.files, self.template = backend, files, template  # files: what save writes
        self.source = next(name for name in ("tokenizer.model", "tokenizer.json") if name in files)
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            special[k] for k in ("bos", "eos", "pad", "unk")
        )
        self.add_bos = add_bos and self.bos_id is not None
        self.vocab_size = len(backend.texts)
        self.special_ids = frozenset(i for i, kind in enumerate(backend.types) if kind in (CONTROL, UNKNOWN))
        names = sorted((i, backend.texts[i]) for i in self.special_ids)
        identity = json.dumps([self.vocab_size, names, sorted(special.items()), self.add_bos])
        self.digest = hashlib.sha256(files[self.source] + identity.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode text as it is: adds no special token and makes none, whatever the text says.

        Nor are added tokens looked for that a .model does not know, or that look like <a mark>.
        ValueError for a lone surrogate (half of a UTF-16 pair), which is no Unicode text.
        """
        return self.backend.encode(text)

    def encode_next(self, text: str) -> list[int]:
        """Encode text that goes on from another: as encode, but no space is put in front.

        " 好" after "答:" is ▁好 under a model with a dummy prefix, where encode would give ▁▁好.
        """
        return self.backend.encode(text, inside=True)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode UTF-8, or a part of a character, as inside a text: cut nowhere, no space put in front.

        [] where the vocabulary cannot spell it.
        """
        return self.backend.encode_bytes(data)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the beginning of a document: bos (where the model uses one) + text."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def encode_document(self, text: str) -> list[int]:
        """Encode a whole document: bos (where the model uses one) + text + eos."""
        return self.encode_prompt(text) + ([] if self.eos_id is None else [self.eos_id])

    def encode_chat(
        self, messages: list[dict], open_reply: bool = False, template: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Encode a conversation by the folder's template or another: ids, and a mask that is 1 on replies.

        mask 1: a token that is trained, the one that ends a reply included. open_reply: end where the model
        is to reply; these ids are a prefix of the conversation's with that reply. What messages say is text,
        never a special token. ValueError: no conversation, no template, tokens that are missing.
        """
        template = self.chat_template(template)
        ids, mask = [], []
        for span in chat.spans(template, messages, open_reply, self.add_bos):
            if span.special:
                new = [self.template_id(span.text, template)]
            else:
                new = self.encode_next(span.text) if span.follows else self.encode(span.text)
            ids += new
            mask += [int(span.trained)] * len(new)
        return ids, mask

    def end_ids(self, template: str | None = None) -> list[int]:
        """Give the ids that end a reply under the template: what belongs into eos_token_id."""
        template = self.chat_template(template)
        return [self.template_id(template.end, template)]

    def chat_template(self, name: str | None = None) -> chat.Template:
        """Give the template of a name, or the folder's own; ValueError where there is none."""
        if name is None and self.template is None:
            names = ", ".join(chat.TEMPLATES)
            raise ValueError(f"this tokenizer says no chat template that we know; give --template: {names}")
        return chat.find_template(self.template if name is None else name)

    def template_id(self, text: str, template: chat.Template) -> int:
        """Give the id of a special token of a template; ValueError names all that are missing."""
        own = {chat.BOS: self.bos_id, chat.EOS: self.eos_id}
        i = own[text] if text in own else self.special_id.get(text)
        if i is None and text in own:
            raise ValueError(f"template {template.name}: this tokenizer has no {text.strip('{}')} token")
        if i is None:
            missing = [token for token in template.specials if token not in self.special_id]
            raise ValueError(
                f"template {template.name}: this tokenizer has no special token {', '.join(missing)}; do "
                f'python tokenizer.py extend FOLDER --specials "{",".join(missing)}" --out NEW and '
                "python checkpoint.py resize FOLDER --tokenizer NEW --out NEW_FOLDER"
            )
        return i

    @functools.cached_property
    def special_id(self) -> dict[str, int]:
        """The ids of special tokens by their text."""
        return {self.backend.texts[i]: i for i in self.special_ids}

    def with_template(self, name: str) -> Tokenizer:
        """Give the same tokenizer for another chat template: its files name it, and hold its Jinja.

        ValueError: no such template, or special tokens that are missing.
        """
        template = chat.find_template(name)
        begins = (chat.BOS,) if template.bos in ("once", "turn") else ()
        for part in (template.end, *begins, *template.specials):
            self.template_id(part, template)
        config = json.loads(self.files.get(CONFIGS[0], b"{}")) | {"baizhi_template": name}
        config.pop("chat_template", None)  # an older place; transformers 5 reads the file beside it
        text = json.dumps(config, ensure_ascii=False, indent=1)
        jinja = chat.jinja(template, self.add_bos)
        files = self.files | {CONFIGS[0]: text.encode(), "chat_template.jinja": jinja.encode()}
        return from_files(files, f"the tokenizer with template {name}")

    def decode(self, ids: Iterable[int], skip_special: bool = True, at_start: bool = True) -> str:
        """Turn ids into text; special tokens vanish, or show as they are written with skip_special=False.

        Each byte that belongs to no character becomes U+FFFD; <unk> shows as ⁇. at_start=False for ids that
        continue a text. ValueError for an id outside the vocabulary, such as a padding row of the embedding.
        """
        stream = self.stream(skip_special, at_start)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def stream(self, skip_special: bool = True, at_start: bool = True) -> StreamDecoder:
        """Start decoding ids one by one, as they are generated; at_start=False: they continue a text."""
        return StreamDecoder(self, skip_special, at_start)

    def token_kind(self, i: int) -> str:
        """Tell what an id is: special, byte, piece, or hole (an id between added tokens)."""
        return {CONTROL: "special", UNKNOWN: "special", BYTE: "byte", HOLE: "hole"}.get(
            self.backend.types[i], "piece"
        )

    def token_text(self, i: int) -> str:
        """Show a token on one line: a space as ▁, a byte as <0xE4>, what cannot be printed as an escape."""
        return "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode() for c in self.backend.texts[i]
        )

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, byte for byte as they were loaded, into a folder (made if missing)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (Path(folder) / name).write_bytes(data)


# --- 4. streaming -------------------------------------------------------------------------------------------

# SentencePiece shows each byte that belongs to no character as one U+FFFD; Python's "replace" joins some.
codecs.register_error("each_byte", lambda error: ("\ufffd", error.start + 1))


class StreamDecoder:
    """Decode ids one at a time: what push returned, joined, plus flush, is decode of all ids.

    A character spelt in bytes is held back until it is whole. A push costs the same, however long the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, at_start: bool = True):
        self.backend = tokenizer.backend
        self.skip_special = skip_special
        self.utf8 = codecs.getincrementaldecoder("utf-8")("each_byte")
        self.at_start = at_start  # there a dummy prefix (the space that LLaMA puts first) is dropped

    def push(self, i: int) -> str:
        """Take the next id; return the text that is now certain: often one piece, sometimes ""."""
        table = self.backend.token_bytes
        data = table[i] if 0 <= i < len(table) else None
        if data is None:
            raise ValueError(f"id {i} is not in the vocabulary of {len(table)} tokens")
        if not data:  # a special token; it also ends a character, if one was begun
            return self.flush() + ("" if self.skip_special else self.backend.texts[i])
        if self.at_start:
            if i in self.backend.leading_space:
                data = data[1:]
            self.at_start = self.backend.strips_all and not data
        return self.utf8.decode(data)

    def flush(self) -> str:
        """Return what was held back: an unfinished character becomes U+FFFD. Decoding may go on after it."""
        return self.utf8.decode(b"", final=True)


# --- 5. loading ---------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder (ours, or any with tokenizer.model or tokenizer.json) or one such file.

    Where a folder has both, SentencePiece's tokenizer.model speaks. ValueError when there is none, when it is
    damaged or unsupported, or when it names a special token that has no id.
    """
    path = Path(path)
    if path.is_file():
        files = {f"tokenizer.{'json' if path.suffix == '.json' else 'model'}": path.read_bytes()}
    else:
        files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    if not files.keys() & set(FILES[:2]):
        raise ValueError(
            f"{path}: no tokenizer here; looked for {path / 'tokenizer.model'} and tokenizer.json"
        )
    return from_files(files, str(path))


def from_files(files: dict[str, bytes], where: str) -> Tokenizer:
    """Make a tokenizer from the contents of its files (name -> bytes)."""

    def read(name: str) -> dict:
        try:
            return json.loads(files.get(name, b"{}"))
        except ValueError as error:
            raise ValueError(f"{where}/{name}: not valid JSON ({error})") from None

    def literal(token) -> str | None:  # as the files write one: "<s>", {"content": "<s>", ...}, or null
        return token["content"] if isinstance(token, dict) else token

    if "tokenizer.model" in files:
        file, backend_of = ModelFile.parse(files["tokenizer.model"], where), SentencePieceBackend
    else:
        file, backend_of = JsonFile.parse(files["tokenizer.json"], where), BpeBackend
    config = read("tokenizer_config.json")
    added = {i: text for text, i in read("added_tokens.json").items()}
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    file.add_tokens(added | {i: literal(token) for i, token in listed.items()})
    specials = {i for i, token in listed.items() if isinstance(token, dict) and token.get("special")}

    stated = read("special_tokens_map.json") | config  # where both speak, the config is the newer file
    named = {k: literal(stated[f"{k}_token"]) for k in BASE_SPECIALS if f"{k}_token" in stated}
    more = stated.get("additional_special_tokens") or stated.get("extra_special_tokens") or []
    more = [literal(token) for token in (more.values() if isinstance(more, dict) else more)]
    id_of = {text: i for i, text in enumerate(file.texts)}
    for text in [t for t in named.values() if t is not None] + more:
        if text not in id_of:
            raise ValueError(f"{where}: special token {text!r} has no id in the model or the added tokens")
        specials.add(id_of[text])
    file.make_special(specials)

    backend = backend_of(file)
    special = {k: id_of.get(named[k]) if k in named else backend.own.get(k) for k in BASE_SPECIALS}
    add_bos = config.get("add_bos_token")
    add_bos = backend.add_bos if add_bos is None else add_bos
    return Tokenizer(backend, special, add_bos, files, stated_template(config, files))


def stated_template(config: dict, files: dict[str, bytes]) -> str | None:
    """Name the chat template that a folder states: by its name, or by Jinja that is word for word ours."""
    jinja = config.get("chat_template")
    if isinstance(jinja, list):  # of several, each with a name
        named = {j.get("name"): j.get("template") for j in jinja if isinstance(j, dict)}
        jinja = named.get("default")
    if "chat_template.jinja" in files:
        jinja = files["chat_template.jinja"].decode("utf-8", "replace")
    ours, found = config.get("baizhi_template"), chat.recognise(jinja) if isinstance(jinja, str) else None
    if ours is None:
        return found
    if jinja is not None and found != ours:
        return None  # another Jinja beside our name: transformers would write other prompts than we
    return ours if isinstance(ours, str) else None


# --- 6. the folder that transformers reads ------------------------------------------------------------------

# how the JSON files describe a special token
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}


def folder_files(model: bytes, add_bos: bool) -> dict[str, bytes]:
    """Describe a trained .model for transformers and tokenizers: file name -> content.

    transformers' LlamaTokenizer knows one behaviour: BPE with byte fallback, no normalisation. That is ours
    for bpe and char; for unigram, --nfkc or --no_byte_fallback the config names the class that obeys
    tokenizer.json instead. Unigram ids may differ at near-ties in texts of
    10,000 characters or more: SentencePiece sums scores in fp32 (a sum near 100,000 is exact to 0.008),
    tokenizers in fp64. Line by line they agree.
    """
    file = ModelFile.parse(model, "the trained model")
    specials = {i: text for i, text in enumerate(file.texts) if file.types[i] in (CONTROL, UNKNOWN)}
    as_llama = file.kind != "unigram" and not file.charsmap and file.byte_fallback
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(file.charsmap).decode()}
    in_bytes = [{"type": "ByteFallback"}] if file.byte_fallback else []
    fast = {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [charsmap, to_mark] if file.charsmap else [to_mark],
        },
        "decoder": {"type": "Sequence", "decoders": [to_space, *in_bytes, {"type": "Fuse"}]},
        "model": fast_model(file),
    }
    described = describe(specials, "LlamaTokenizer" if as_llama else "PreTrainedTokenizerFast", add_bos, fast)
    return {"tokenizer.model": model} | described


def describe(specials: dict[int, str], python_class: str, add_bos: bool, fast: dict) -> dict[str, bytes]:
    """Write tokenizer.json from its components `fast`, and the two files beside it: name -> content."""
    bos = BASE_SPECIALS["bos"]
    named = {f"{k}_token": text for k, text in BASE_SPECIALS.items() if text in specials.values()}
    more = [text for text in specials.values() if text not in named.values()]
    named["additional_special_tokens"] = more
    off = ("add_eos_token", "add_prefix_space", "legacy", "clean_up_tokenization_spaces")
    config = named | dict.fromkeys((*off, "spaces_between_special_tokens"), False)
    config |= {
        "tokenizer_class": python_class,
        "add_bos_token": add_bos,
        "added_tokens_decoder": {str(i): {"content": text, **FLAGS} for i, text in specials.items()},
    }
    start = [{"SpecialToken": {"id": bos, "type_id": 0}}] if add_bos else []
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ids = [i for i, text in specials.items() if text == bos]
    fast = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **FLAGS} for i, text in specials.items()],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*start, first],
            "pair": [*start, first, *start, second],
            "special_tokens": {bos: {"id": bos, "ids": ids, "tokens": [bos]}} if add_bos else {},
        },
        **fast,
    }
    content = {"tokenizer_config.json": config, "special_tokens_map.json": named, "tokenizer.json": fast}
    texts = {name: json.dumps(value, ensure_ascii=False, indent=1) for name, value in content.items()}
    return {name: text.encode() for name, text in texts.items()}


def fast_model(file: ModelFile) -> dict:
    """Describe pieces and scores as tokenizer.json's "model"."""
    if file.kind == "unigram":
        vocab = list(zip(file.texts, file.scores))
        return {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": file.byte_fallback}
    # SentencePiece joins any two neighbours whose union is a piece, the piece of best score first: in
    # ours the smallest id. A list of merges ranks each pair: by its union, then as transformers orders them.
    id_of = {text: i for i, text in enumerate(file.texts) if file.types[i] == NORMAL}
    halves = (
        (-file.scores[i], i, text[:cut], text[cut:])
        for text, i in id_of.items()
        for cut in range(1, len(text))
    )
    merges = sorted(half for half in halves if half[2] in id_of and half[3] in id_of)
    return {
        "type": "BPE",
        "unk_token": file.texts[0],
        "fuse_unk": True,
        "byte_fallback": file.byte_fallback,
        "vocab": {text: i for i, text in enumerate(file.texts)},
        "merges": [[left, right] for _, _, left, right in merges],
    }


# --- 7. training with SentencePiece -------------------------------------------------------------------------

OWN_TOKENS = ("\n", "\t")  # text, but always tokens of their own
LINE = 1000  # characters: SentencePiece skips an input over 4,192 bytes without a word
THREADS = 4  # part of the model's bytes, so not the number of cores


def training_lines(text: str) -> Iterator[str]:
    """Cut a document into SentencePiece's training inputs, LINE characters at most; nothing is dropped.

    No piece holds a newline or a tab, so cutting there loses nothing. Nor a ▅ (U+2585): SentencePiece uses it
    itself and skips a line that has one. A longer line is cut after the last sentence end or space that fits.
    """
    for line in re.split("[\n\t▅]", text):
        start = 0
        while len(line) - start > LINE:
            ends = [line.rfind(mark, start, start + LINE) + 1 for mark in "。！？；，.!? "]
            cut = max(ends) if max(ends) > start else start + LINE
            yield line[start:cut]
            start = cut
        if start < len(line):
            yield line[start:]


def check_specials(specials: list[str], present: Iterable[str] = tuple(BASE_SPECIALS.values())) -> None:
    """Refuse user-defined special tokens that collide; ValueError says which."""
    for n, text in enumerate(specials):
        if text in specials[:n]:
            raise ValueError(f"--specials: {text!r} is given twice")
        if text in present or re.fullmatch("<0x[0-9A-F]{2}>", text):
            raise ValueError(f"--specials: {text!r} is in every vocabulary already")
        if len(text) < 2 or re.search(rf"[\s{SPACE}]", text):
            raise ValueError(f"--specials: {text!r} must have two characters or more, and no space")


def train_model(lines: Iterable[str], vocab_size: int, specials: Iterable[str] = (), **options) -> bytes:
    """Train SentencePiece on lines (see training_lines) and return the bytes of tokenizer.model.

    `options` are SentencePiece's own and win over the ones below. The same lines give the same bytes.
    ValueError for an empty text or a vocab_size that does not fit it.
    """
    import sentencepiece

    defaults = {
        "model_type": "bpe",
        "split_digits": True,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,  # indentation: four spaces may be one piece
        "required_chars": SPACE,  # a text may hold none; one that is typed later would come back as ▁
        "character_coverage": 0.9995,
        "max_sentencepiece_length": 16,
        "control_symbols": list(specials),  # not user_defined_symbols: those would be found in text
        "user_defined_symbols": list(OWN_TOKENS),
        "num_threads": THREADS,
        "minloglevel": 2,
    }
    for i, (name, piece) in enumerate(BASE_SPECIALS.items()):
        defaults |= {f"{name}_id": i, f"{name}_piece": piece}
    model = io.BytesIO()
    train = sentencepiece.SentencePieceTrainer.train
    try:
        train(sentence_iterator=iter(lines), model_writer=model, vocab_size=vocab_size, **defaults | options)
    except RuntimeError as error:
        message = str(error)
        found = re.search(r"too high .* <= (\d+)|smaller than required_chars. \d+ vs (\d+)", message)
        size = f"vocab_size {vocab_size} is too"
        if found and found[1]:
            raise ValueError(f"{size} large for this text; at most {found[1]}, or give more text") from None
        if found:
            need = f"its characters, 256 bytes and special tokens are {found[2]}"
            raise ValueError(f"{size} small for this text: {need}; or lower --character_coverage") from None
        if "sentences_.empty()" in message:
            raise ValueError("the corpus is empty: there is no text to learn from") from None
        raise
    return model.getvalue()


# --- 8. training byte-level BPE -----------------------------------------------------------------------------
# Text is cut into pre-tokens (a word with its space, a run of Han, a digit), and only inside one are pairs
# joined. So it is enough to know each distinct pre-token and its count: 100 M characters of Chinese have some
# 10 M of them, 250 MB. They lie end to end in one array, a gap between each two.

BLOCK_CHARS = 10_000  # characters: what is cut into pre-tokens, and drawn or not drawn, at a time
SPILL = 1_000_000  # distinct pre-tokens in the dictionary before it is emptied
PART = 1 << 24  # places that are looked at together


def split_pattern(split_digits: bool = True, max_han: int = 0) -> str:
    """Write the regular expression that cuts text into pre-tokens: GPT-4's and Qwen's, with two options."""
    mark, digits = r"[^\r\n\p{L}\p{N}]?", r"\p{N}" if split_digits else r"\p{N}{1,3}"
    letters = rf"{mark}\p{{L}}+"
    if max_han:
        letters = rf"{mark}\p{{Han}}{{1,{max_han}}}|{mark}(?:(?!\p{{Han}})\p{{L}})+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    return rf"'(?:[sdmtSDMT]|ll|LL|ve|VE|re|RE)|{letters}|{digits}|{rest}"


def text_blocks(text: str) -> Iterator[str]:
    """Cut a document into blocks of BLOCK_CHARS characters at most, after a newline where there is one."""
    start = 0
    while start < len(text):
        end = start + BLOCK_CHARS
        newline = text.rfind("\n", start, end) + 1 if end < len(text) else 0
        yield text[start : newline or end]
        start = newline or end


@dataclass
class Words:
    """Distinct pre-tokens: their UTF-8 end to end, the bytes of each, and how often each occurs."""

    text: bytearray = field(default_factory=bytearray)
    sizes: array = field(default_factory=lambda: array("i"))
    counts: array = field(default_factory=lambda: array("q"))

    def add(self, word: bytes, count: int) -> None:
        """Put a pre-token at the end."""
        self.text += word
        self.sizes.append(len(word))
        self.counts.append(count)

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        start = 0
        for size, count in zip(self.sizes, self.counts):
            yield bytes(self.text[start : start + size]), count
            start += size


def count_words(blocks: Iterable[str], pattern: str | Callable[[str], list[str]]) -> Words:
    """Count the pre-tokens of a text, in the order of their bytes; `pattern` matches them, or cuts a text.

    A dictionary of all would take 200 bytes for each. So it is emptied whenever it holds SPILL, into a
    sorted run without Python objects, and the runs are merged at the end.
    """
    find = compiled(pattern, "the split pattern").findall if isinstance(pattern, str) else pattern
    counter, runs = Counter(), []

    def spill() -> None:
        runs.append(Words())
        for word in sorted(counter):  # UTF-8 sorts as the characters do
            runs[-1].add(word.encode(), counter[word])
        counter.clear()

    for block in blocks:
        counter.update(find(block))
        if len(counter) >= SPILL:
            spill()
    spill()
    if len(runs) == 1:
        return runs[0]
    words = Words()
    for word, same in itertools.groupby(heapq.merge(*runs), key=operator.itemgetter(0)):
        words.add(word, sum(count for _, count in same))
    return words


@dataclass
class Pairs:
    """The pairs of neighbours that came up together, and where.

    Pair k is keys[k] = left << 32 | right, ascending. It stood at the places at[starts[k]:ends[k]]; some are
    joined with another neighbour since, so bounds[k], its count at first, is at most too high. It never
    rises: only the newest token makes new pairs.
    """

    keys: np.ndarray
    bounds: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    at: np.ndarray
    unused: int = 0  # places in `at` that belong to no pair any more

    @classmethod
    def gather(cls, home: int, lefts: tuple, rights: tuple, weigh: Callable, least: int) -> Pairs:
        """Group the places of (left, home) and (home, right) by pair; drop pairs rarer than `least`."""
        (left, left_at), (right, right_at) = lefts, rights
        # a number for each place: bit 62 (does home stand left?), the neighbour's id, the place (32 bits)
        code, side = np.empty(len(left) + len(right), np.int64), 1 << 30
        code[: len(left)], code[len(left) :] = left, right
        code[len(left) :] |= side  # so that one sort, by neighbour and place, serves both
        code <<= 32  # in place, for there may be 20 M at the beginning
        code[: len(left)] |= left_at
        code[len(left) :] |= right_at
        code.sort()
        at = code.astype(np.int32)  # the low half
        code >>= 32
        starts = np.flatnonzero(code[1:] != code[:-1]) + 1
        starts = np.r_[0, starts] if len(at) else starts
        counts = np.add.reduceat(weigh(at), starts, dtype=np.int64) if len(at) else starts
        keep, sizes = counts >= least, np.diff(starts, append=len(at))
        other, ends = code[starts[keep]], np.cumsum(sizes[keep])
        keys = np.where(other < side, other << 32 | home, home << 32 | other & (side - 1))
        return cls(keys, counts[keep], ends - sizes[keep], ends, at[np.repeat(keep, sizes)])

    def update(self, k: int, at: np.ndarray, bound: int) -> None:
        """Let pair k have these places, a part of its former ones, and this bound: 0, and it is done with."""
        self.unused += int(self.ends[k] - self.starts[k]) - len(at)
        self.bounds[k], self.ends[k] = bound, self.starts[k] + len(at)
        self.at[self.starts[k] : self.ends[k]] = at
        if self.unused > len(self.at) // 2:  # free the memory
            ends = np.cumsum(self.ends - self.starts)
            moved = np.repeat((ends - self.ends).astype(np.int32), self.ends - self.starts)
            self.at = self.at[np.arange(len(moved), dtype=np.int32) - moved]
            self.starts, self.ends, self.unused = ends - (self.ends - self.starts), ends, 0


def learn_merges(
    words: Words, vocabulary: list[bytes], size: int, min_frequency: int, tokens: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """Join the most frequent pair of neighbours again and again; return the pairs, as ids. Empties `words`.

    `vocabulary` (special tokens, then 256 bytes) grows to `size`, or less where no pair is left that occurs
    min_frequency times. Of equally frequent pairs the smallest (left id, right id) wins, as in `tokenizers`.
    `tokens`: the ids that all words consist of at first, end to end, where these are not the bytes; then the
    vocabulary may hold anything.

    ids[p] is the token whose first or last byte is place p; `gap` between words and inside tokens. So the
    token after the one at p starts at p + its length, and the one before it ends at p - 1. What a join
    changes is told to nobody: a pair's places are checked when its turn has come, and if its count has fallen
    it waits for another. Each group of pairs has its best one in the heap: groups[home] are those that came
    up when the token `home` did, (x, home) and (home, y).

    Words ab (3 times) and abc (twice); a, b, c are 0, 1, 2; size 5, so gap = 5:
        place       0 1 2 3 4 5 6 7
        ids         5 0 1 5 0 1 2 5
        ab  -> 3    5 3 3 5 3 3 2 5     (b, c) still waits, with its count of 2; when its turn comes,
        abc -> 4    5 3 3 5 4 5 4 5     its place no longer holds b c

    Memory: 12 bytes for each byte of the distinct words.
    """
    known, n = set(vocabulary), len(words.text) + len(words.sizes) + 1
    if n >= 1 << 31:
        raise ValueError(f"{human(n)} bytes of distinct pre-tokens are too many; lower --max_chars")
    gap, narrow = size, np.min_scalar_type(size)
    ids = np.full(n, gap, narrow)
    sizes = np.frombuffer(words.sizes, np.int32)
    # few counts differ: a place needs but two bytes to say which of them its word has
    amounts, which = np.unique(np.frombuffer(words.counts, np.int64), return_inverse=True)
    which = np.repeat(which.astype(np.min_scalar_type(len(amounts))), sizes + 1)
    weigh = lambda at: amounts[which[at]]
    length = np.ones(size, np.int32)
    length[: len(vocabulary)] = [len(piece) for piece in vocabulary]
    begins = np.ones(n, bool)  # does a token begin here?
    begins[np.r_[0, np.cumsum(sizes + 1)]] = False
    if tokens is None:
        id_of_byte = np.empty(256, narrow)
        for i, piece in enumerate(vocabulary[-256:], len(vocabulary) - 256):
            id_of_byte[piece[0]] = i
        ids[begins] = id_of_byte[np.frombuffer(words.text, np.uint8)]
    else:
        at = np.flatnonzero(begins)[np.cumsum(length[tokens]) - length[tokens]]
        ids[at] = ids[at + length[tokens] - 1] = tokens
        begins[:] = False
        begins[at] = True
        del at
    del sizes
    words.text, words.sizes, words.counts = bytearray(), array("i"), array("q")

    groups, heap, merges = {}, [], []

    def wait(home: int) -> None:
        """Put the best pair of a group into the heap; argmax takes the first of equal ones."""
        pairs = groups[home]
        best = int(pairs.bounds.argmax()) if len(pairs.bounds) else 0
        if len(pairs.bounds) and pairs.bounds[best] > 0:
            heapq.heappush(heap, (-int(pairs.bounds[best]), int(pairs.keys[best]), home, best))
        else:
            del groups[home]

    none = np.empty(0, np.int32), np.empty(0, np.int32)
    parts = [slice(p, p + PART) for p in range(0, n, PART)]
    amount = sum(np.bincount(ids[part], minlength=gap + 1) for part in parts)[:gap]
    block = np.cumsum(amount) // PART  # tokens of one block are looked for together
    for low, high in itertools.pairwise([*np.flatnonzero(np.diff(block, prepend=-1)).tolist(), gap]):
        found = (begins[part] & (ids[part] >= low) & (ids[part] < high) for part in parts)
        at = np.concatenate([np.flatnonzero(f).astype(np.int32) + p.start for f, p in zip(found, parts)])
        order = np.argsort(ids[at], kind="stable")
        at = at[order]
        del order
        ends = np.cumsum(np.bincount(ids[at], minlength=high)[low:high])
        for left, mine in enumerate(np.split(at, ends[:-1]), low):
            if len(mine):
                right = ids[mine + length[left]]
                rights = right[right < gap], mine[right < gap]
                groups[left] = Pairs.gather(left, none, rights, weigh, min_frequency)
                wait(left)
    del begins, at

    bar = progress(size - len(vocabulary), "merges", "")
    while heap and len(vocabulary) < size:
        bound, key, home, k = heapq.heappop(heap)
        pairs, left, right = groups[home], key >> 32, key & 0xFFFFFFFF
        at = pairs.at[pairs.starts[k] : pairs.ends[k]]
        at = at[(ids[at] == left) & (ids[at + length[left]] == right)]
        count = int(weigh(at).sum())
        if count < -bound:
            pairs.update(k, at, count if count >= min_frequency else 0)
            wait(home)
            continue
        pairs.update(k, at[:0], 0)
        wait(home)
        joined = vocabulary[left] + vocabulary[right]
        if joined in known:  # a special token, which no text makes; or a token that is also cut another way
            continue
        if left == right:  # of aaa the first two are joined: take every other place of a row
            nth = np.arange(len(at))
            first = np.r_[True, np.diff(at) != length[left]]
            at = at[(nth - np.maximum.accumulate(np.where(first, nth, 0))) % 2 == 0]
        new, seam, end = len(vocabulary), at + length[left], at + length[left] + length[right]
        ids[seam - 1] = ids[seam] = gap
        ids[at] = ids[end - 1] = new
        length[new] = length[left] + length[right]
        merges.append((left, right))
        vocabulary.append(joined)
        known.add(joined)
        before, after = ids[at - 1], ids[end]
        far = (before < gap) & (before != new)  # (new, new) is found from its left half
        lefts = before[far], at[far] - length[before[far]]
        groups[new] = Pairs.gather(new, lefts, (after[after < gap], at[after < gap]), weigh, min_frequency)
        wait(new)
        bar.update()
    bar.close()
    return merges


def train_bytes(
    blocks: Iterable[str],
    vocab_size: int,
    specials: Iterable[str] = (),
    split_digits: bool = True,
    max_han: int = 0,
    min_frequency: int = 2,
    nfkc: bool = False,
    add_bos: bool = True,
) -> dict[str, bytes]:
    """Learn byte-level BPE from text and return the folder's files: name -> content.

    Ids: <s>, </s>, <pad>, your special tokens, 256 bytes in GPT-2's order, then pairs as they were joined.
    ValueError for an empty text or a vocab_size that does not fit it.
    """
    named = [*list(BASE_SPECIALS.values())[1:], *specials]
    vocabulary = [text.encode() for text in named] + [bytes([b]) for b in BYTE_ORDER]
    if vocab_size < len(vocabulary):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and special tokens are {len(vocabulary)}"
        )
    pattern = split_pattern(split_digits, max_han)
    texts = (unicodedata.normalize("NFKC", block) for block in blocks) if nfkc else blocks
    words = count_words(texts, pattern)
    if not words.sizes:
        raise ValueError("the corpus is empty: there is no text to learn from")
    print(f"{len(words.sizes):,} distinct pre-tokens", file=sys.stderr)
    merges = learn_merges(words, vocabulary, vocab_size, min_frequency)
    if len(vocabulary) < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} is too large for this text; "
            f"at most {len(vocabulary)}, or give more text"
        )
    letters = [*named, *("".join(LETTER[b] for b in piece) for piece in vocabulary[len(named) :])]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    fast = {
        "normalizer": {"type": "NFKC"} if nfkc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(letters)},
            "merges": [[letters[left], letters[right]] for left, right in merges],
        },
    }
    return describe(dict(enumerate(named)), "PreTrainedTokenizerFast", add_bos, fast)


# --- 9. the command train -----------------------------------------------------------------------------------


@dataclass
class Train:
    corpus: Positional[list[str]]  # files or folders: .txt, .jsonl (.gz, .zst), .parquet
    out: str  # folder to write
    vocab_size: int = 8192  # tokens in all: special ones, 256 bytes, pieces
    kind: Literal["bpe", "unigram", "char", "bytebpe"] = "bpe"  # how the vocabulary is learnt; see above
    nfkc: bool = False  # normalise with NFKC (full-width letters become ASCII, ① becomes 1): not lossless
    split_digits: bool = True  # every digit is a token of its own
    byte_fallback: bool = True  # spell unknown characters in bytes; without it they become <unk>
    character_coverage: float = 0.9995  # share of the text's characters that get a token of their own
    max_han: int = 0  # bytebpe: cut runs of Han to so many characters; 0: as long as they are
    min_frequency: int = 2  # bytebpe: join no pair that occurs less often
    specials: str = ""  # more special tokens, separated by commas: "<|user|>,<|assistant|>"
    add_bos: bool = True  # start every document with <s>, as LLaMA does
    max_chars: int = 100_000_000  # learn from a random sample of about so many characters (6 GB of memory)
    seed: int = 0  # of that sample


def check_options(config: Train) -> None:
    """Refuse options that the kind of vocabulary does not have; ValueError says which."""
    default = {"byte_fallback": True, "character_coverage": 0.9995}
    if config.kind != "bytebpe":
        default = {"max_han": 0, "min_frequency": 2}
    for name, value in default.items():
        if getattr(config, name) != value:
            raise ValueError(f"--{name}: --kind {config.kind} has no such option")
    if config.max_han < 0 or config.min_frequency < 1:
        raise ValueError("--max_han must be 0 or more, --min_frequency 1 or more")


def sampled(paths: list[str], cut: Callable[[str], Iterable[str]], share: float, seed: int) -> Iterator[str]:
    """Yield the parts into which `cut` cuts each document: a random share of them."""
    rng = random.Random(seed)
    parts = (part for text in documents(paths) for part in cut(text))
    return (part for part in parts if share == 1.0 or rng.random() < share)


def train(config: Train) -> None:
    """Train a tokenizer and write a folder that this file and transformers load."""
    began = time.perf_counter()
    specials = [text for text in config.specials.split(",") if text]
    check_specials(specials)
    check_options(config)
    chars = sum(map(len, documents(config.corpus)))
    share = min(1.0, config.max_chars / max(chars, 1))
    parts = sampled(
        config.corpus, text_blocks if config.kind == "bytebpe" else training_lines, share, config.seed
    )
    with atomic_folder(config.out) as folder:
        if config.kind == "bytebpe":
            names = ("split_digits", "max_han", "min_frequency", "nfkc", "add_bos")
            options = {name: getattr(config, name) for name in names}
            files = train_bytes(parts, config.vocab_size, specials, **options)
        else:
            model = train_model(
                parts,
                config.vocab_size,
                specials,
                model_type=config.kind,
                normalization_rule_name="nfkc" if config.nfkc else "identity",
                split_digits=config.split_digits,
                byte_fallback=config.byte_fallback,
                character_coverage=config.character_coverage,
            )
            files = folder_files(model, config.add_bos)
        tokenizer = from_files(files, config.out)
        tokenizer.save(folder)
    size, _, ids = measure(tokenizer, texts_up_to(config.corpus, 1_000_000))
    print(
        f"{config.out}: {config.kind}, {tokenizer.vocab_size} tokens, learnt from {human(chars * share)} of "
        f"{human(chars)} characters in {time.perf_counter() - began:.1f} s; "
        f"{len(ids) / size:.3f} tokens per character"
    )
    lossy = ["--nfkc"] * config.nfkc + ["--no_byte_fallback"] * (not config.byte_fallback)
    if lossy:
        print(
            f"not lossless, by {' and '.join(lossy)}: `tokenizer.py stats` shows texts that do not come back"
        )


# --- 10. extending a vocabulary -----------------------------------------------------------------------------
# New tokens come after all old ids, and no old id changes its meaning: special tokens first, then pieces that
# are learnt from new text. A model follows with `checkpoint.py resize`.


@dataclass
class Extend:
    tokenizer: Positional[str]  # folder, .model or tokenizer.json to start from
    out: str  # folder to write
    corpus: Positional[tuple[str, ...]] = ()  # files or folders with the new text
    vocab_size: int = 0  # tokens in all, old ones included; 0: no new pieces, only --specials
    specials: str = ""  # new special tokens, separated by commas: "<|System|>,<|Human|>"
    max_chars: int = 100_000_000  # learn from a random sample of about so many characters
    seed: int = 0  # of that sample


def extend(config: Extend) -> None:
    """Add special tokens, and pieces learnt from new text, to a tokenizer; old ids stay what they are."""
    old = load_tokenizer(config.tokenizer)
    specials = [text for text in config.specials.split(",") if text]
    check_specials(specials, present=())
    for text in specials:
        if text in old.backend.texts:
            raise ValueError(f"--specials: {text!r} is token {old.backend.texts.index(text)} already")
    pieces = config.vocab_size - old.vocab_size - len(specials) if config.vocab_size else 0
    if not config.vocab_size and not specials:
        raise ValueError("nothing to add: give a corpus and --vocab_size, or --specials")
    if config.vocab_size and not config.corpus:
        raise ValueError("--vocab_size: new pieces are learnt from text: name a corpus")
    if config.vocab_size and pieces < 1:
        raise ValueError(
            f"--vocab_size {config.vocab_size} is what there will be in all, and the tokenizer has "
            f"{old.vocab_size} tokens"
            + (f", with --specials {old.vocab_size + len(specials)}" * bool(specials))
        )
    chars = sum(map(len, documents(config.corpus))) if pieces else 0
    share = min(1.0, config.max_chars / max(chars, 1))
    is_model = old.source == "tokenizer.model"
    cut = training_lines if is_model else text_blocks
    grow = extended_model if is_model else extended_json
    parts = sampled(config.corpus, cut, share, config.seed) if pieces else ()
    with atomic_folder(config.out) as folder:
        new = from_files(grow(old, parts, pieces, specials), config.out)
        new.save(folder)
    line = (
        f"{config.out}: {len(specials)} special tokens and {pieces} pieces after {old.vocab_size} old tokens"
    )
    if config.corpus:
        sizes = [measure(t, texts_up_to(config.corpus, 1_000_000)) for t in (old, new)]
        before, after = (len(ids) / max(size, 1) for size, _, ids in sizes)
        occur = len({i for i in sizes[1][2] if i >= old.vocab_size})
        # the others are parts of longer pieces, or are joined otherwise because old merges come first
        line += f"; tokens per character of the new text {before:.3f} -> {after:.3f}, {occur} new ones occur"
    print(line)


def with_specials(files: dict[str, bytes], specials: dict[int, str], fast: dict | None) -> dict[str, bytes]:
    """Add special tokens to what a folder's JSON files say; `fast` is its tokenizer.json, if it has one."""
    config, stated = (json.loads(files.get(name, b"{}")) for name in CONFIGS[:2])
    names = ("extra_special_tokens", "additional_special_tokens")  # of transformers 5, and of older ones
    places = [(part, name) for part in (config, stated) for name in names if isinstance(part.get(name), list)]
    for part, name in places or [(config, names[1])]:
        part[name] = part.get(name, []) + list(specials.values())
    described = {i: {"content": text, **FLAGS} for i, text in specials.items()}
    listed = {str(i): token for i, token in described.items()}
    config["added_tokens_decoder"] = config.get("added_tokens_decoder", {}) | listed
    content = {CONFIGS[0]: config} | ({CONFIGS[1]: stated} if CONFIGS[1] in files else {})
    content = content if specials else {}
    if fast:
        added = [{"id": i} | token for i, token in described.items()]
        content["tokenizer.json"] = fast | {"added_tokens": fast.get("added_tokens", []) + added}
    texts = {name: json.dumps(value, ensure_ascii=False, indent=1) for name, value in content.items()}
    return files | {name: text.encode() for name, text in texts.items()}


def extended_model(
    old: Tokenizer, lines: Iterable[str], wanted: int, specials: list[str]
) -> dict[str, bytes]:
    """Extend a SentencePiece model, and the JSON files beside it: name -> content.

    ValueError: a token beyond the model that is not special, or a hole (a .model can hold neither there); a
    tokenizer.json that does not agree with the model; a text with too few new pieces.
    """
    file = ModelFile.parse(old.files["tokenizer.model"], "tokenizer.model")
    texts, types = old.backend.texts, old.backend.types
    beyond = range(len(file.texts), old.vocab_size)  # tokens that only the JSON files know
    for i in beyond:
        if types[i] != CONTROL:
            what = f"{texts[i]!r} (id {i}) is not special" if texts[i] else f"id {i} is a hole"
            raise ValueError(
                f"of the tokens that the folder adds beyond its tokenizer.model, {what}: the model cannot "
                "hold it there; declare it special in tokenizer_config.json, or start without it"
            )
    pieces = [(text, 0.0, CONTROL) for text in [*(texts[i] for i in beyond), *specials]]
    if wanted:
        taken = {*file.texts, *texts, *specials}
        pieces += [(text, score, NORMAL) for text, score in learn_pieces(file, lines, wanted, taken)]
    fast = json.loads(old.files["tokenizer.json"]) if "tokenizer.json" in old.files else None
    model = file.append(pieces)
    if fast:
        vocab, made = fast["model"]["vocab"], fast_model(ModelFile.parse(model, "the extended model"))
        known = vocab if isinstance(vocab, dict) else {text: i for i, (text, _) in enumerate(vocab)}
        same = all(known.get(text) == i for i, text in enumerate(file.texts))
        if not same or fast["model"].get("type", "BPE") != made["type"]:
            raise ValueError("tokenizer.json and tokenizer.model of this folder disagree: remove one of them")
        if "merges" in made:
            made["merges"] = as_written(made["merges"], fast["model"]["merges"])
        fast["model"] |= {key: made[key] for key in ("vocab", "merges") if key in made}
    files = old.files | {"tokenizer.model": model}
    return with_specials(files, dict(enumerate(specials, old.vocab_size)), fast)


def learn_pieces(
    file: ModelFile, lines: Iterable[str], wanted: int, taken: set[str]
) -> list[tuple[str, float]]:
    """Learn pieces, with scores, that a SentencePiece model lacks, by training another one of its kind."""
    import sentencepiece

    if file.kind == "word":
        raise ValueError("a SentencePiece model of words cannot be extended; bpe, unigram and char can")
    if file.charsmap:
        off = dict.fromkeys(("add_dummy_prefix", "escape_whitespaces", "remove_extra_whitespaces"), False)
        lines = map(sentencepiece.SentencePieceNormalizer(model_proto=file.data, **off).normalize, lines)
    lines = list(lines)
    letters = len(set().union(*lines))
    model = train_model(
        lines,
        len(taken) + wanted + letters + 300,  # enough even if every old piece were learnt again
        model_type=file.kind,
        byte_fallback=file.byte_fallback,
        add_dummy_prefix=file.dummy_prefix,
        remove_extra_whitespaces=file.remove_extra_whitespaces,
        hard_vocab_limit=False,
    )
    learnt = ModelFile.parse(model, "the trained model")
    rows = zip(learnt.texts, learnt.scores, learnt.types)
    new = [(text, score) for text, score, kind in rows if kind == NORMAL and text not in taken]
    # Characters first: pieces are put together from them. Of each kind the most frequent first, as learnt.
    new.sort(key=lambda row: len(row[0]) > 1)
    if len(new) < wanted:
        most = len(taken) + len(new)
        raise ValueError(f"--vocab_size is too large for this text; at most {most}, or give more text")
    if file.kind == "unigram":
        # The learnt log-probabilities, as they are. A piece that occurs often in the new text must beat the
        # sum of two old ones: with 4,000 pieces of Python's library and 1,500 learnt on torch.nn, the latter
        # takes 0.276 tokens per character (one model of both: 0.275), 0.282 with the scores capped at the
        # lowest old one, 0.292 shifted below it. In old text 0.5 % of the cuts were new.
        return new[:wanted]
    # A BPE piece's score is its rank: what old pieces join is joined before.
    lowest = min(score for score, kind in zip(file.scores, file.types) if kind == NORMAL)
    return [(text, lowest - 1 - n) for n, (text, _) in enumerate(new[:wanted])]


def extended_json(
    old: Tokenizer, blocks: Iterable[str], wanted: int, specials: list[str]
) -> dict[str, bytes]:
    """Extend a tokenizer.json of byte-level BPE by learning on where its merges end: name -> content."""
    spec, backend = json.loads(old.files["tokenizer.json"]), old.backend
    if wanted and not backend.byte_level:
        raise ValueError("tokenizer.json is Metaspace BPE: new pieces need its tokenizer.model beside it")
    # `tokenizers` numbers an added token by itself unless the vocabulary holds it
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    held, listed = set(vocab.values()), {token["id"] for token in spec.get("added_tokens", [])}
    vocab |= {text: i for i, text in enumerate(backend.texts) if i not in held and backend.types[i] != HOLE}
    unlisted = [i for i in range(old.vocab_size) if i not in held | listed and backend.types[i] != HOLE]
    for i in unlisted:  # only the folder's other files name it
        special = backend.types[i] == CONTROL
        spec.setdefault("added_tokens", []).append(
            {"id": i, "content": backend.texts[i], **FLAGS, "special": special}
        )
    pieces = [data or text.encode() for data, text in zip(backend.token_bytes, backend.texts)]
    pieces += [text.encode() for text in specials]
    if clash := [text for text in specials if text in vocab]:
        raise ValueError(
            f"--specials: {clash[0]!r} is how tokenizer.json writes the bytes of token {vocab[clash[0]]}; "
            "take another name"
        )
    vocab |= {text: i for i, text in enumerate(specials, old.vocab_size)}
    if wanted:
        start, size = len(pieces), len(pieces) + wanted
        words = count_words(blocks, functools.partial(pretokens, backend))
        if not words.sizes:
            raise ValueError("the corpus is empty: there is no text to learn from")
        joins = learn_merges(words, pieces, size, 2, present_tokens(backend, words))
        if len(pieces) < size:
            raise ValueError(
                f"--vocab_size is too large for this text; at most {len(pieces)}, or give more text"
            )
        letters = lambda i: "".join(LETTER[b] for b in pieces[i])
        vocab |= {letters(i): i for i in range(start, size)}
        merges += as_written([[letters(left), letters(right)] for left, right in joins], merges)
    return with_specials(old.files, dict(enumerate(specials, old.vocab_size)), spec)


def as_written(pairs: list[list[str]], merges: list) -> list:
    """Write pairs as a file writes its merges: as pairs, or as older files do: "left right"."""
    return [" ".join(pair) for pair in pairs] if merges and isinstance(merges[0], str) else pairs


def pretokens(backend: BpeBackend, text: str) -> list[str]:
    """Cut a text as its encoder does before it merges, added tokens left out."""
    parts = backend.added[False].split(text)[::2]
    sections = (s for part in parts for s in backend.added[True].split(backend.normalize(part))[::2])
    return [piece for section in sections for piece in backend.pieces(section)]


def present_tokens(backend: BpeBackend, words: Words) -> np.ndarray:
    """Encode every word; give all ids, end to end."""
    ids, texts = array("i"), (word.decode() for word, _ in words)
    while batch := list(itertools.islice(texts, 1000)):
        joined = "\0".join(batch)  # as in BpeBackend.encode: one call for many
        if backend.tiktoken and joined.count("\0") == len(batch) - 1:
            ids.extend(backend.tiktoken.encode_ordinary(joined))
        else:
            ids.extend(itertools.chain.from_iterable(map(backend.encode_piece, batch)))
    sizes = np.array([len(data or b"") for data in backend.token_bytes], np.int32)
    ids = np.frombuffer(ids, np.int32)
    if sizes[ids].sum() != len(words.text):
        raise ValueError("this tokenizer has no token for some bytes of the text, so it cannot learn on")
    return ids


# --- 11. statistics -----------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "newline, tab": "a\n\n\tb\r\n",
    "spaces": "  leading,  double, trailing   ",
    "emoji": "😀",
    "joined emoji": "👨‍👩‍👧",
    "rare Han": "𠮷㐂",
    "full width": "ＡＢＣ１２３，①㎏　。",
    "control characters": "\x00\x1b\x7f",
    "typed specials": "<s>hi</s><unk><pad><0x41>",
    "the space mark": "▁a▁",
    "Chinese": "白纸上写着：“你好，世界！”",
    "Russian": "Съешь ещё этих мягких булок",
    "Spanish": "¿Dónde está el niño?",
    "French": "Où êtes-vous, cœur naïf ?",
    "Japanese": "日本語のテキストです。",
    "Korean": "한국어 문장입니다.",
    "Arabic": "مرحبا بالعالم",
}


def texts_up_to(paths: Iterable[str], max_chars: int) -> Iterator[str]:
    """Yield documents until they hold max_chars characters; the last one is cut."""
    left = max_chars
    for text in documents(paths):
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int, list[int]]:
    """Encode texts; return their characters, their bytes and all their ids."""
    chars, size, ids = 0, 0, []
    for text in texts:
        chars += len(text)
        size += len(text.encode())
        ids += tokenizer.encode(text)
    return chars, size, ids


def script(piece: str) -> str:
    """Name the kind of a piece by its first letter: Han, Latin, other letters; or no letters."""
    letter = next((c for c in piece if c.isalpha()), "")
    if "\u3400" <= letter <= "\u9fff" or letter >= "\U00020000":
        return "Han"
    return ("Latin" if letter < "\u0250" else "other letters") if letter else "no letters"


@dataclass
class Stats:
    tokenizer: Positional[str]  # folder or .model file
    corpus: Positional[list[str]]  # files or folders to encode
    max_chars: int = 10_000_000  # encode so much of the corpus
    json: bool = False  # print JSON


def stats(config: Stats) -> None:
    """Say how well a tokenizer fits a corpus, what its vocabulary holds, and which texts it does not keep."""
    tokenizer = load_tokenizer(config.tokenizer)
    chars, size, ids = measure(tokenizer, texts_up_to(config.corpus, config.max_chars))
    if not ids:
        raise ValueError("the corpus is empty: there is nothing to encode")
    kinds = [tokenizer.token_kind(i) for i in range(tokenizer.vocab_size)]
    texts = tokenizer.backend.texts
    pieces = [text.replace(SPACE, " ") for text, kind in zip(texts, kinds) if kind == "piece"]
    single = sum(len(piece) == 1 for piece in pieces)
    # Text with JSON escapes left in it teaches pieces like "nThe", from "\\nThe" (XVERSE's has some).
    residue = [piece for piece in pieces if re.match("n[A-Z]", piece)]
    used = Counter(kinds[i] for i in ids)
    table = {
        "vocabulary": tokenizer.vocab_size,
        "tokens per character": len(ids) / chars,
        "bytes per token": size / len(ids),
        "byte tokens in the text %": 100 * used["byte"] / len(ids),
        "unknown in the text %": 100 * ids.count(tokenizer.unk_id) / len(ids),
        "vocabulary used %": 100 * len(set(ids)) / tokenizer.vocab_size,
        "single-character entries %": 100 * single / tokenizer.vocab_size,
        "entries with U+FFFD": sum("\ufffd" in piece for piece in pieces),
        "n[A-Z] entries": len(residue),
        "entries by kind": dict((Counter(kinds) - Counter(piece=len(pieces))) + Counter(map(script, pieces))),
    }
    digits = len(tokenizer.encode("a2023")) - len(tokenizer.encode("a"))
    checks = {"digits are split": "" if digits == 4 else f"2023 is {digits} tokens"}
    for name, text in ROUND_TRIPS.items():
        back = tokenizer.decode(tokenizer.encode(text))
        checks[name] = "" if back == text else f"{text!r} came back as {back!r}"
    if config.json:
        table["failed"] = {name: problem for name, problem in checks.items() if problem}
        print(json.dumps(table, ensure_ascii=False, indent=2))
        return
    for name, value in table.items():
        value = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:28}{value:.4g}" if isinstance(value, float) else f"{name:28}{value}")
    for name, problem in checks.items():
        print(f"{name:28}{'FAIL  ' + problem if problem else 'PASS'}")
    if residue:
        print(f"warning: {', '.join(residue[:8])}: was this trained on text with JSON escapes (\\n) in it?")


@dataclass
class Dump:
    tokenizer: Positional[str]  # folder or .model file
    out: str = ""  # file to write; empty: print


def dump(config: Dump) -> None:
    """Write the vocabulary readably: id, kind, score and text of each token, separated by tabs."""
    tokenizer = load_tokenizer(config.tokenizer)
    rows = (
        f"{i}\t{tokenizer.token_kind(i)}\t{tokenizer.backend.scores[i]:g}\t{tokenizer.token_text(i)}\n"
        for i in range(tokenizer.vocab_size)
    )
    if config.out:
        atomic_text(config.out, "".join(rows))
    else:
        print("".join(rows), end="")


# --- 12. a conversation in colour ---------------------------------------------------------------------------


def highlight(tokenizer: Tokenizer, ids: list[int], mask: list[int], colour: bool | None = None) -> str:
    """Show what is trained, by encode_chat's ids and mask: in green, special tokens inverted.

    Without colour: ⟦trained⟧ and «special». colour=None: colour if stdout is a terminal and NO_COLOR is not
    set. Control characters show as escapes, so that data cannot steer the terminal.
    """
    if colour is None:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    stream, result = tokenizer.stream(skip_special=False), []
    kind = lambda pair: (pair[1], pair[0] in tokenizer.special_ids)
    for trained, stretch in itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        parts = []
        for (_, special), pairs in itertools.groupby(stretch, key=kind):
            text = "".join([stream.push(i) for i, _ in pairs]) + stream.flush()
            text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
            inverted = f"\x1b[7m{text}\x1b[27m" if colour else f"«{text}»"
            parts.append(inverted if special else text)
        green = "\x1b[32m{}\x1b[39m" if colour else "⟦{}⟧"
        text = "".join(parts)
        result.append(green.replace("{}", text) if trained else text)
    return "".join(result)


@dataclass
class Show:
    tokenizer: Positional[str]  # folder or .model file
    data: str  # file of conversations, of any form that chat.py knows
    template: str = ""  # chat template; empty: the one that the folder names
    rows: int = 3  # conversations to show


def show(config: Show) -> None:
    """Print conversations as a model is trained on them: what it learns to write in colour, or in ⟦ ⟧."""
    tokenizer = load_tokenizer(config.tokenizer)
    for row in chat.read_rows([config.data])[: config.rows]:
        try:
            ids, mask = tokenizer.encode_chat(row["messages"], template=config.template or None)
        except ValueError as error:
            raise ValueError(f"{row['where']}: {error}") from None
        print(f"--- {row['where']}: {len(ids)} tokens, {sum(mask)} trained")
        print(highlight(tokenizer, ids, mask))


if __name__ == "__main__":
    run(train, extend, stats, dump, show, doc=__doc__)
