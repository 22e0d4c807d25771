"""Text to token ids and back: train a vocabulary, load one, stream its output, look inside it.

A model reads integers. A tokenizer cuts text into pieces of a fixed vocabulary and numbers them. Here
SentencePiece learns the pieces: `bpe` joins the most frequent pair of neighbours again and again; `unigram`
starts with too many pieces and drops those that are missed least (12 times slower); `char` takes characters.

Ours are lossless: no normalisation, no space added in front, none removed, and a character outside the
vocabulary is spelt in UTF-8 bytes (<0xE4>), so decode(encode(text)) == text. (--nfkc gives that up: ① becomes
1.) Every digit is a token of its own; so are newline and tab. A space inside a piece is written ▁.
Special tokens (<s>, </s>, <|user|>) never come from text: whoever types </s> gets the letters of it.
encode(a) + encode(b) is in general not encode(a + b): a piece may span the seam, and a foreign model that
puts a space in front of every text (dummy prefix) puts one at the seam as well.

    python tokenizer.py train corpus.jsonl --vocab_size 8192 --out out/tok
    python tokenizer.py train zh/ en.txt.gz --kind unigram --specials "<|user|>,<|assistant|>" --out out/tok
    python tokenizer.py stats out/tok corpus.jsonl
    python tokenizer.py dump out/tok --out out/vocabulary.tsv

The folder loads in transformers as well (LlamaTokenizer, AutoTokenizer) and in tokenizers (tokenizer.json).
Memory: SentencePiece's BPE takes 6 GB and 76 CPU seconds for 100 M characters; --max_chars draws a sample.

Papers: BPE, Sennrich et al. 2016 (1508.07909). Unigram, Kudo 2018 (1804.10959).
SentencePiece, Kudo & Richardson 2018 (1808.06226).
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import io
import json
import random
import re
import struct
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from common import atomic_folder, atomic_text, documents, human, run

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
                    body += bytes([3 << 3, CONTROL])
                    size = [len(body)] if len(body) < 128 else [len(body) & 127 | 128, len(body) >> 7]
                    raw = bytes([1 << 3 | 2, *size]) + body
                piece += 1
            fields.append(raw)
        self.data = b"".join(fields) or self.data


# --- 2. the tokenizer ---------------------------------------------------------------------------------------


class SentencePieceBackend:
    """Plain text to ids by SentencePiece, and what each id stands for.

    texts, types, scores: lists over ids. token_bytes[id]: UTF-8, one byte for a byte piece, b"" for a special
    token, None for a hole. leading_space: ids whose first space is dropped at the start of a decoded text.
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
        # SentencePiece reads a real ▁ as a space. Where nothing else is lost either, spell it in bytes.
        self.space_in_bytes = None
        if file.byte_fallback and not file.charsmap and not prefixed:
            byte_ids = {data: i for i, data in enumerate(self.token_bytes) if file.types[i] == BYTE}
            self.space_in_bytes = [byte_ids[bytes([b])] for b in SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Encode plain text; ValueError for a lone surrogate."""
        try:
            if self.space_in_bytes is None or SPACE not in text:
                return self.processor.encode(text)
            first, *others = [self.processor.encode(part) for part in text.split(SPACE)]
        except RuntimeError:
            text.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError here, which is a ValueError
            raise
        return first + [i for part in others for i in self.space_in_bytes + part]


class Tokenizer:
    """The public face of a tokenizer: ids from text, text from ids, special tokens, saving.

    bos_id, eos_id, pad_id, unk_id: int, or None where there is none. vocab_size counts added tokens.
    special_ids: ids that no text produces (but a model without byte fallback does read unknown characters as
    unk_id). add_bos: whether documents start with bos. digest: hex SHA-256 of model and special tokens.
    """

    def __init__(self, backend, special: dict[str, int | None], add_bos: bool, files: dict[str, bytes]):
        self.backend, self.files = backend, files  # files: name -> content, what save writes
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (
            special[k] for k in ("bos", "eos", "pad", "unk")
        )
        self.add_bos = add_bos and self.bos_id is not None
        self.vocab_size = len(backend.texts)
        self.special_ids = frozenset(i for i, kind in enumerate(backend.types) if kind in (CONTROL, UNKNOWN))
        names = sorted((i, backend.texts[i]) for i in self.special_ids)
        identity = json.dumps([self.vocab_size, names, sorted(special.items()), self.add_bos])
        self.digest = hashlib.sha256(files["tokenizer.model"] + identity.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode text as it is: adds no special token and makes none, whatever the text says.

        Nor are a foreign folder's added tokens looked for that its .model does not know.
        ValueError for a lone surrogate (half of a UTF-16 pair), which is no Unicode text.
        """
        return self.backend.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Encode the beginning of a document: bos (where the model uses one) + text."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def encode_document(self, text: str) -> list[int]:
        """Encode a whole document: bos (where the model uses one) + text + eos."""
        return self.encode_prompt(text) + ([] if self.eos_id is None else [self.eos_id])

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


# --- 3. streaming -------------------------------------------------------------------------------------------

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


# --- 4. loading ---------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder (ours, or any with SentencePiece's tokenizer.model) or a bare .model.

    ValueError when there is none, when it is damaged, or when it names a special token that has no id.
    """
    path = Path(path)
    if path.is_file():
        files = {"tokenizer.model": path.read_bytes()}
    else:
        files = {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}
    if "tokenizer.model" not in files:
        raise ValueError(f"{path}: no tokenizer here; looked for {path / 'tokenizer.model'}")
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

    file = ModelFile.parse(files["tokenizer.model"], where)
    config = read("tokenizer_config.json")
    added = {i: text for text, i in read("added_tokens.json").items()}
    listed = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    file.add_tokens(added | {i: literal(token) for i, token in listed.items()})
    specials = {i for i, token in listed.items() if isinstance(token, dict) and token.get("special")}

    stated = read("special_tokens_map.json") | config  # where both speak, the config is the newer file
    named = {k: literal(stated[f"{k}_token"]) for k in ("bos", "eos", "pad", "unk") if f"{k}_token" in stated}
    more = stated.get("additional_special_tokens") or stated.get("extra_special_tokens") or []
    more = [literal(token) for token in (more.values() if isinstance(more, dict) else more)]
    id_of = {text: i for i, text in enumerate(file.texts)}
    for text in [t for t in named.values() if t is not None] + more:
        if text not in id_of:
            raise ValueError(f"{where}: special token {text!r} has no id in the model or the added tokens")
        specials.add(id_of[text])
    file.make_special(specials)

    backend = SentencePieceBackend(file)
    special = {}
    for k in ("bos", "eos", "pad", "unk"):
        own = getattr(backend.processor, f"{k}_id")()  # the model's own, where the files are silent; -1: none
        special[k] = id_of.get(named[k]) if k in named else (own if own >= 0 else None)
    add_bos = config.get("add_bos_token")
    return Tokenizer(backend, special, add_bos=True if add_bos is None else add_bos, files=files)


# --- 5. the folder that transformers reads ------------------------------------------------------------------


def folder_files(model: bytes, add_bos: bool) -> dict[str, bytes]:
    """Describe a trained model for transformers and tokenizers: file name -> content.

    transformers' LlamaTokenizer knows one behaviour: BPE with byte fallback, no normalisation. That is ours
    for bpe and char; for unigram, --nfkc or --no_byte_fallback the config names the class that obeys
    tokenizer.json instead. Unigram ids may differ at near-ties in texts of
    10,000 characters or more: SentencePiece sums scores in fp32 (a sum near 100,000 is exact to 0.008),
    tokenizers in fp64. Line by line they agree.
    """
    file = ModelFile.parse(model, "the trained model")
    unk, bos, eos, pad = file.texts[:4]
    specials = {i: text for i, text in enumerate(file.texts) if file.types[i] in (CONTROL, UNKNOWN)}
    as_llama = file.kind != "unigram" and not file.charsmap and file.byte_fallback
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    named = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    named["additional_special_tokens"] = [text for i, text in specials.items() if i >= 4]
    off = ("add_eos_token", "add_prefix_space", "legacy", "clean_up_tokenization_spaces")
    config = named | dict.fromkeys((*off, "spaces_between_special_tokens"), False)
    config |= {
        "tokenizer_class": "LlamaTokenizer" if as_llama else "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "added_tokens_decoder": {str(i): {"content": text, **flags} for i, text in specials.items()},
    }
    start = [{"SpecialToken": {"id": bos, "type_id": 0}}] if add_bos else []
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(file.charsmap).decode()}
    in_bytes = [{"type": "ByteFallback"}] if file.byte_fallback else []
    fast = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in specials.items()],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [charsmap, to_mark] if file.charsmap else [to_mark],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*start, first],
            "pair": [*start, first, *start, second],
            "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}} if add_bos else {},
        },
        "decoder": {"type": "Sequence", "decoders": [to_space, *in_bytes, {"type": "Fuse"}]},
        "model": fast_model(file),
    }
    content = {"tokenizer_config.json": config, "special_tokens_map.json": named, "tokenizer.json": fast}
    texts = {name: json.dumps(value, ensure_ascii=False, indent=1) for name, value in content.items()}
    return {"tokenizer.model": model} | {name: text.encode() for name, text in texts.items()}


def fast_model(file: ModelFile) -> dict:
    """Describe pieces and scores as tokenizer.json's "model"."""
    if file.kind == "unigram":
        vocab = list(zip(file.texts, file.scores))
        return {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": file.byte_fallback}
    # SentencePiece joins any two neighbours whose union is a piece, the piece of best score (smallest id)
    # first. A list of merges ranks each pair: by the union's id, then as transformers orders a .model's.
    id_of = {text: i for i, text in enumerate(file.texts) if file.types[i] == NORMAL}
    halves = ((i, cut, text[:cut], text[cut:]) for text, i in id_of.items() for cut in range(1, len(text)))
    merges = sorted(half for half in halves if half[2] in id_of and half[3] in id_of)
    return {
        "type": "BPE",
        "unk_token": file.texts[0],
        "fuse_unk": True,
        "byte_fallback": file.byte_fallback,
        "vocab": {text: i for i, text in enumerate(file.texts)},
        "merges": [[left, right] for _, _, left, right in merges],
    }


# --- 6. training --------------------------------------------------------------------------------------------

BASE_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0, 1, 2, 3
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


def check_specials(specials: list[str]) -> None:
    """Refuse user-defined special tokens that collide; ValueError says which."""
    for n, text in enumerate(specials):
        if text in specials[:n]:
            raise ValueError(f"--specials: {text!r} is given twice")
        if text in BASE_SPECIALS or re.fullmatch("<0x[0-9A-F]{2}>", text):
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
        "character_coverage": 0.9995,
        "max_sentencepiece_length": 16,
        "control_symbols": list(specials),  # not user_defined_symbols: those would be found in text
        "user_defined_symbols": list(OWN_TOKENS),
        "num_threads": THREADS,
        "minloglevel": 2,
    }
    for i, name in enumerate(("unk", "bos", "eos", "pad")):
        defaults |= {f"{name}_id": i, f"{name}_piece": BASE_SPECIALS[i]}
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


@dataclass
class Train:
    corpus: Positional[list[str]]  # files or folders: .txt, .jsonl ("text" of each line), .gz of both
    out: str  # folder to write
    vocab_size: int = 8192  # tokens in all: special ones, 256 bytes, pieces
    kind: Literal["bpe", "unigram", "char"] = "bpe"  # how the vocabulary is learnt; char: single characters
    nfkc: bool = False  # normalise with NFKC (full-width letters become ASCII, ① becomes 1): not lossless
    byte_fallback: bool = True  # spell unknown characters in bytes; without it they become <unk>
    character_coverage: float = 0.9995  # share of the text's characters that get a token of their own
    specials: str = ""  # more special tokens, separated by commas: "<|user|>,<|assistant|>"
    add_bos: bool = True  # start every document with <s>, as LLaMA does
    max_chars: int = 100_000_000  # learn from a random sample of about so many characters (6 GB of memory)
    seed: int = 0  # of that sample


def train(config: Train) -> None:
    """Train a tokenizer and write a folder that this file and transformers load."""
    began = time.perf_counter()
    specials = [text for text in config.specials.split(",") if text]
    check_specials(specials)
    chars = sum(map(len, documents(config.corpus)))
    share = min(1.0, config.max_chars / max(chars, 1))
    rng = random.Random(config.seed)
    every = (line for text in documents(config.corpus) for line in training_lines(text))
    lines = (line for line in every if share == 1.0 or rng.random() < share)
    with atomic_folder(config.out) as folder:
        model = train_model(
            lines,
            config.vocab_size,
            specials,
            model_type=config.kind,
            normalization_rule_name="nfkc" if config.nfkc else "identity",
            byte_fallback=config.byte_fallback,
            character_coverage=config.character_coverage,
        )
        tokenizer = from_files(folder_files(model, config.add_bos), config.out)
        tokenizer.save(folder)
    size, _, ids = measure(tokenizer, texts_up_to(config.corpus, 1_000_000))
    print(
        f"{config.out}: {config.kind}, {tokenizer.vocab_size} tokens, learnt from {human(chars * share)} of "
        f"{human(chars)} characters in {time.perf_counter() - began:.1f} s; "
        f"{len(ids) / size:.3f} tokens per character"
    )


# --- 7. statistics ------------------------------------------------------------------------------------------

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


if __name__ == "__main__":
    run(train, stats, dump, doc=__doc__)
