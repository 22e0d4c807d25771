import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

import tokenizer as tok
from tokenizer import Train, load_tokenizer, train, train_model, training_lines

ROOT = Path(__file__).parent.parent
WORDS = [
    "白纸",
    "语言",
    "模型",
    "训练",
    "数据",
    "今天",
    "天气",
    "很好",
    "我们",
    "一起",
    "学习",
    "中文",
    "文本",
    "处理",
    "编码",
    "字符",
    "上海",
    "北京",
    "春风",
    "明月",
    "系统",
    "文件",
]
ENGLISH = [
    "the",
    "model",
    "reads",
    "tokens",
    "and",
    "writes",
    "text",
    "while",
    "training",
    "data",
    "flows",
    "into",
    "memory",
    "every",
    "single",
    "day",
]
CODE = [
    "def f(x):\n    return x + 1\n",
    "for i in range(10):\n\tprint(i)\n",
    'if a == "b":\n        pass\n',
    "{'k': [1, 23]}\n",
]


def corpus(n=400, seed=0):
    """Mixed Chinese, English and code, with newlines, tabs, runs of spaces and digits."""
    rng = random.Random(seed)
    docs = []
    for _ in range(n):
        zh = "".join(rng.choices(WORDS, k=rng.randrange(5, 30))) + rng.choice("。！？，；")
        en = " ".join(rng.choices(ENGLISH, k=rng.randrange(5, 20))).capitalize() + rng.choice(
            [".", "?  ", ",", "…"]
        )
        docs.append(
            rng.choice(["{}\n{}", "{}{}", "{} {}\n\n"]).format(zh, en)
            + rng.choice(["", *CODE, f" {rng.randrange(9999)}年"])
        )
    return docs


DOCS = corpus()
NASTY = [
    "", " ", "  ", "\n", "\t", "\r\n", "\x00", "\x00a\x00", "a\n\n\n\tb", "  lead", "trail  ", "a  b   c    d", "▁", "▁a ▁", " ▁ ▁▁",
    "▅", "\ufffd", "⁇", "\ufeff", "😀", "👨‍👩‍👧", "𠮷㐂", "ＡＢＣ①㎏　", "مرحبا", "한국어", "日本語", "Ünïcödé", "e\u0301", "\u2028", "\x7f\x1b[0m",
    "2023年1月", "</s>", "<s></s><unk><pad>", "<0x41>", "<0xE4><0xBD><0xA0>", "<|user|>hi<|assistant|>", "\U0010ffff", "\ue000",
]  # fmt: skip


def random_text(rng):
    """Characters of all planes, whitespace runs, control characters, emoji, words."""
    pick = [
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: rng.choice(" \n\t\r\u3000▁") * rng.randrange(1, 6),
        lambda: chr(rng.randrange(32)),
        lambda: rng.choice(WORDS + ENGLISH + NASTY),
        lambda: chr(rng.randrange(0x4E00, 0x9FFF)),
    ]
    return "".join(rng.choice(pick)() for _ in range(rng.randrange(30)))


OPTIONS = {
    "bpe": {},
    "unigram": {"kind": "unigram"},
    "char": {"kind": "char"},
    "bpe-nfkc": {"nfkc": True},
    "unigram-nfkc": {"kind": "unigram", "nfkc": True},
    "bpe-no-bytes": {"byte_fallback": False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "docs.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in DOCS), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="module")
def folders(data):
    out = {}
    for name, options in OPTIONS.items():
        out[name] = data.parent / name
        train(Train([str(data)], str(out[name]), 480, specials="<|user|>,<|assistant|>", **options))
    return out


@pytest.fixture(scope="module")
def ours(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A model as others train them: dummy prefix, <|user|> as a user-defined symbol, which text would produce."""
    path = tmp_path_factory.mktemp("foreign") / "tokenizer.model"
    lines = [line for doc in DOCS for line in doc.split("\n")]
    options = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=file,
            model_type="bpe",
            vocab_size=480,
            user_defined_symbols=["<|user|>"],
            minloglevel=2,
            **options,
        )
    return path


# --- text -> ids -> text ---


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_decode_of_encode_is_the_text(ours, kind):
    rng = random.Random(0)
    for text in [*NASTY, *DOCS[:100], *(random_text(rng) for _ in range(1500))]:
        assert ours[kind].decode(ours[kind].encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "bpe-nfkc", "unigram-nfkc"])
def test_text_never_makes_a_special_token(ours, kind):
    t, rng = ours[kind], random.Random(1)
    literals = [t.token_text(i) for i in t.special_ids]
    assert sorted(literals) == sorted(["<unk>", "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"])
    for text in (
        literals + NASTY + [random_text(rng) + rng.choice(literals) + random_text(rng) for _ in range(300)]
    ):
        assert t.special_ids.isdisjoint(t.encode(text))


def test_byte_literal_in_text_stays_text(ours):
    t = ours["bpe"]
    assert "<0x41>" not in [t.token_text(i) for i in t.encode("<0x41>")]


def test_encode_equals_sentencepiece(folders, ours):
    for kind, t in ours.items():
        sp = sentencepiece.SentencePieceProcessor(model_file=str(folders[kind] / "tokenizer.model"))
        for text in DOCS[:100] + [n for n in NASTY if "▁" not in n]:
            assert t.encode(text) == sp.encode(text)


def test_digits_newline_and_tab_are_tokens(ours):
    for t in ours.values():
        assert [t.token_text(i) for i in t.encode("2023\n\n\t")] == ["2", "0", "2", "3", "\\n", "\\n", "\\t"]


def test_documents_and_prompts_get_bos_and_eos(ours, data, tmp_path):
    t = ours["bpe"]
    assert (t.unk_id, t.bos_id, t.eos_id, t.pad_id) == (0, 1, 2, 3)
    assert t.encode_document("白纸") == [1, *t.encode("白纸"), 2]
    assert t.encode_prompt("白纸") == [1, *t.encode("白纸")]
    train(Train([str(data)], str(tmp_path / "t"), 480, add_bos=False))
    without = load_tokenizer(tmp_path / "t")
    assert without.encode_document("白纸") == [*without.encode("白纸"), 2]


def test_lone_surrogate_is_refused(ours):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ours["bpe"].encode("a\ud800b")


def test_id_outside_the_vocabulary_is_refused(ours):
    t = ours["bpe"]
    assert t.vocab_size == 480
    for i in (480, 100_000, -1):
        with pytest.raises(ValueError, match=f"id {i} is not in the vocabulary of 480"):
            t.decode([5, i])


def test_special_tokens_show_only_when_asked(ours):
    t = ours["bpe"]
    ids = t.encode_document("白纸")
    assert t.decode(ids) == "白纸"
    assert t.decode(ids, skip_special=False) == "<s>白纸</s>"


def test_unknown_character_without_byte_fallback_is_unk(ours):
    t = ours["bpe-no-bytes"]
    assert t.encode("𠮷")[-1] == t.unk_id
    assert "⁇" in t.decode(t.encode("𠮷"))


# --- streaming ---


def random_ids(t, byte_ids, rng):
    """Any ids, lone bytes, characters of 2 to 4 bytes cut short, special tokens."""
    pick = [
        lambda: [rng.randrange(t.vocab_size)],
        lambda: [rng.choice(byte_ids)],
        lambda: [byte_ids[b] for b in rng.choice("你😀é𠮷ß").encode()][: rng.randrange(1, 5)],
        lambda: [rng.choice([0, 1, 2])],
    ]
    return [i for _ in range(rng.randrange(8)) for i in rng.choice(pick)()]


def test_streamed_text_equals_decode_and_sentencepiece(ours, folders, foreign):
    rng = random.Random(2)
    for t, path in ((ours["bpe"], folders["bpe"] / "tokenizer.model"), (load_tokenizer(foreign), foreign)):
        sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        byte_ids = [sp.piece_to_id(f"<0x{b:02X}>") for b in range(256)]
        for _ in range(3000):
            ids = random_ids(t, byte_ids, rng)
            stream = t.stream()
            streamed = "".join([stream.push(i) for i in ids]) + stream.flush()
            assert streamed == t.decode(ids) == sp.decode(ids), [t.token_text(i) for i in ids]


def test_stream_never_shows_half_a_character(ours):
    t, rng = ours["bpe"], random.Random(3)
    for text in ["😀", "👨‍👩‍👧", "𠮷㐂", *(random_text(rng).replace("\ufffd", "") for _ in range(300))]:
        stream, shown = t.stream(), ""
        for i in t.encode(text):
            shown += stream.push(i)
            assert text.startswith(shown)
        assert shown == text and stream.flush() == ""


def test_unfinished_character_is_flushed_as_replacement(ours):
    t = ours["bpe"]
    half = t.encode("😀")[-4:-1]
    stream = t.stream()
    assert [stream.push(i) for i in half] == ["", "", ""]
    assert stream.flush() == "\ufffd" * 3 == t.decode(half)


def test_stream_drops_the_dummy_space_only_at_the_start(foreign):
    t = load_tokenizer(foreign)
    ids = t.encode("the model")
    assert t.token_text(ids[0]).startswith("▁")
    stream = t.stream()
    assert "".join(stream.push(i) for i in [1, *ids, 2, *ids]) == "the model the model"


# --- transformers and tokenizers read what we write ---

LINES = [line for doc in corpus(300, seed=7) for line in doc.split("\n") if line] + [
    "𠮷 rare 㐂",
    "  two  spaces ",
    "😀",
]


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("with_json", [True, False])
def test_llama_tokenizer_gives_our_ids(ours, folders, kind, with_json, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(folders[kind], tmp_path / "t")
    if not with_json:
        (folder / "tokenizer.json").unlink()
    theirs, t = transformers.LlamaTokenizer.from_pretrained(folder), ours[kind]
    for text in LINES + DOCS[:50]:
        assert theirs.encode(text) == t.encode_prompt(text)
        assert theirs.decode(t.encode(text)) == text
    assert len(theirs) == t.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (
        1,
        2,
        3,
        0,
    )
    assert theirs.convert_tokens_to_ids("<|user|>") == 4


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("model_type", [None, "llama", "phi", "bloom"])
def test_auto_tokenizer_and_tokenizer_json_give_our_ids(ours, folders, kind, model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(folders[kind], tmp_path / "t")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    auto, fast = (
        transformers.AutoTokenizer.from_pretrained(folder),
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")),
    )
    for text in LINES[:200]:
        ids = ours[kind].encode_prompt(text)
        assert auto.encode(text) == fast.encode(text).ids == ids
        if kind != "bpe-no-bytes":  # sentencepiece shows <unk> as ⁇, tokenizers as nothing
            assert fast.decode(ids) == ours[kind].decode(ids)


def test_foreign_dummy_prefix_model_encodes_as_llama_tokenizer(foreign, tmp_path):
    transformers = pytest.importorskip("transformers")
    shutil.copy(foreign, tmp_path)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **special})
    )
    t, theirs = load_tokenizer(tmp_path), transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in LINES[:200]:
        if not text.startswith(
            " "
        ):  # transformers 5 adds no second space there; sentencepiece, the original, does
            assert t.encode_prompt(text) == theirs.encode(text)
        assert t.decode(t.encode(text)) == text


def test_foreign_user_defined_special_is_not_made_by_text(foreign, tmp_path):
    shutil.copy(foreign, tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(foreign))
    special = sp.piece_to_id("<|user|>")
    assert special in sp.encode("hi <|user|>")  # what would happen
    token = {"content": "<|user|>", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(special): token}})
    )
    t = load_tokenizer(tmp_path)
    assert special in t.special_ids and special not in t.encode("hi <|user|>")
    assert t.decode(t.encode("hi <|user|>")) == "hi <|user|>"
    for text in DOCS[:50]:
        assert t.encode(text) == sp.encode(text)


def test_added_tokens_count_and_stay_out_of_text(foreign, tmp_path):
    shutil.copy(foreign, tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 480, "word": 482}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    t = load_tokenizer(tmp_path)
    assert (t.vocab_size, t.pad_id, t.bos_id, t.eos_id) == (483, 480, 1, 2)
    assert t.decode([480, 482]) == "word" and t.decode(t.encode("<pad>word")) == "<pad>word"
    assert 480 not in t.encode("<pad>")
    with pytest.raises(ValueError, match="id 481 is not in"):
        t.decode([481])


def test_one_character_special_token_is_refused(foreign, tmp_path):
    shutil.copy(foreign, tmp_path)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(foreign))
    token = {"content": "白", "special": True}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(sp.piece_to_id("白")): token}})
    )
    with pytest.raises(ValueError, match="one character, which text would produce"):
        load_tokenizer(tmp_path)


def test_model_that_removes_extra_spaces_decodes_as_sentencepiece(tmp_path):
    path, rng = tmp_path / "t5.model", random.Random(5)
    with open(path, "wb") as file:
        lines = iter([line for doc in DOCS for line in doc.split("\n")])
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=400, minloglevel=2
        )
    t, sp = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for _ in range(500):
        ids = [rng.choice([rng.randrange(400), sp.piece_to_id("▁"), 1]) for _ in range(rng.randrange(6))]
        assert t.decode(ids) == sp.decode(ids)
    assert all(t.encode(doc) == sp.encode(doc) for doc in DOCS)


def test_special_token_without_id_is_named(foreign, tmp_path):
    shutil.copy(foreign, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    with pytest.raises(ValueError, match=r"special token '\[PAD\]' has no id"):
        load_tokenizer(tmp_path)


# --- files ---


def test_saved_tokenizer_is_the_same(ours, foreign, tmp_path):
    digests = set()
    for name, t in {**ours, "foreign": load_tokenizer(foreign)}.items():
        t.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert again.digest == t.digest and re.fullmatch("[0-9a-f]{64}", t.digest)
        assert [again.encode(x) for x in LINES[:50]] == [t.encode(x) for x in LINES[:50]]
        digests.add(t.digest)
    assert len(digests) == len(ours) + 1


def test_digest_knows_the_special_tokens(folders, ours, tmp_path):
    folder = shutil.copytree(folders["bpe"], tmp_path / "t")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert load_tokenizer(folder).digest != ours["bpe"].digest


def test_missing_or_damaged_tokenizer_is_named(folders, tmp_path):
    with pytest.raises(ValueError, match="no tokenizer here; looked for .*tokenizer.model"):
        load_tokenizer(tmp_path)
    good = (folders["bpe"] / "tokenizer.model").read_bytes()
    for data in (b"", b"hello world", bytes(1000), *(good[:n] for n in range(1, len(good), 997))):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(ValueError, match="not a SentencePiece model"):
            load_tokenizer(tmp_path)


# --- training ---


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(kind):
    lines = [line for doc in DOCS for line in training_lines(doc)]
    assert train_model(lines, 450, model_type=kind) == train_model(lines, 450, model_type=kind)


def test_long_lines_are_cut_but_never_skipped(tmp_path):
    text = "天地玄黄。" * 70_000  # one line of 1 MB
    assert len(text.encode()) > 1_000_000
    assert "".join(training_lines(text)) == text
    assert max(len(x.encode()) for x in training_lines(text + "😀" * 9999)) < 4192
    (tmp_path / "long.txt").write_text(text)
    train(Train([str(tmp_path / "long.txt")], str(tmp_path / "t"), 272))
    assert len(load_tokenizer(tmp_path / "t").encode("天地玄黄。")) <= 3


def test_training_lines_keep_every_character_but_the_cuts():
    rng = random.Random(4)
    for _ in range(200):
        text = random_text(rng) * rng.choice([1, 300])
        assert "".join(training_lines(text)) == re.sub("[\n\t▅]", "", text)


def test_max_chars_samples_the_whole_corpus(tmp_path, capsys):
    docs = tmp_path / "docs.jsonl"
    docs.write_text(
        "".join(json.dumps({"text": "甲乙丙丁" if n < 5000 else "戊己庚辛"}) + "\n" for n in range(10_000))
    )
    models = []
    for n, seed in enumerate((0, 0, 1)):
        train(Train([str(docs)], str(tmp_path / f"t{n}"), 273, max_chars=8000, seed=seed))
        models.append(load_tokenizer(tmp_path / f"t{n}"))
    assert "learnt from 8K of 40K characters" in capsys.readouterr().out
    assert models[0].digest == models[1].digest
    assert len(models[0].encode("甲乙丙丁戊己庚辛")) <= 6  # pieces from the first half and from the second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 90_000}, r"vocab_size 90000 is too large for this text; at most \d+"),
        ({"vocab_size": 90_000, "kind": "unigram"}, "too large"),
        ({"vocab_size": 280}, r"vocab_size 280 is too small for this text: .* are \d+"),
        ({"vocab_size": 5}, "too small"),
        ({"specials": "<|a|>,<|a|>"}, "'<|a|>' is given twice"),
        ({"specials": "</s>"}, "'</s>' is in every vocabulary already"),
        ({"specials": "<0x41>"}, "in every vocabulary already"),
        ({"specials": "①"}, "two characters or more"),
        ({"specials": "a b"}, "no space"),
    ],
)
def test_bad_options_are_explained(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        train(Train([str(data)], str(tmp_path / "t"), **{"vocab_size": 480, **options}))
    assert not (tmp_path / "t").exists() and not (tmp_path / "t.tmp").exists()


def test_the_largest_vocabulary_named_by_the_error_can_be_trained():
    lines = [line for doc in DOCS[:50] for line in training_lines(doc)]
    for kind in ("bpe", "unigram"):
        with pytest.raises(ValueError) as error:
            train_model(lines, 90_000, model_type=kind)
        most = int(re.search(r"at most (\d+)", str(error.value))[1])
        sp = sentencepiece.SentencePieceProcessor(model_proto=train_model(lines, most, model_type=kind))
        assert sp.get_piece_size() == most


@pytest.mark.parametrize("text", ["", "\n\n\n"])
def test_empty_corpus_is_explained(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(ValueError, match="the corpus is empty"):
        train(Train([str(tmp_path / "a.jsonl")], str(tmp_path / "t"), 480))


# --- command line ---


def command(*args, code=0):
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, ROOT / "tokenizer.py", *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        encoding="utf-8",
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_command_line_trains_measures_and_dumps(data, tmp_path, folders):
    out = command(
        "train", data, "--vocab_size", 480, "--out", tmp_path / "t", "--specials", "<|user|>,<|assistant|>"
    )
    assert re.search(r"bpe, 480 tokens, learnt from .* tokens per character", out)
    assert (tmp_path / "t" / "tokenizer.model").read_bytes() == (
        folders["bpe"] / "tokenizer.model"
    ).read_bytes()
    assert "exists and is not empty" in command("train", data, "--out", tmp_path / "t", code=2)

    table = command("stats", tmp_path / "t", data)
    assert "FAIL" not in table and re.search(r"digits are split +PASS", table)
    numbers = json.loads(command("stats", tmp_path / "t", data, "--json"))
    t = load_tokenizer(tmp_path / "t")
    ids = [i for doc in DOCS for i in t.encode(doc)]
    assert numbers["tokens per character"] == pytest.approx(len(ids) / sum(map(len, DOCS)))
    assert numbers["bytes per token"] == pytest.approx(sum(len(d.encode()) for d in DOCS) / len(ids))
    assert sum(numbers["entries by kind"].values()) == numbers["vocabulary"] == 480
    assert numbers["failed"] == {}

    command("dump", tmp_path / "t", "--out", tmp_path / "v.tsv")
    rows = [line.split("\t") for line in (tmp_path / "v.tsv").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [int(row[0]) for row in rows] == list(range(480)) and all(len(row) == 4 for row in rows)
    assert rows[1][1::2] == ["special", "<s>"] and rows[6][3] == "\\n" and rows[8][1::2] == ["byte", "<0x00>"]


def test_training_says_what_makes_a_vocabulary_lossy(data, tmp_path, capsys):
    for n, (options, said) in enumerate(
        [
            ({}, None),
            ({"byte_fallback": False}, "not lossless, by --no_byte_fallback:"),
            ({"byte_fallback": False, "nfkc": True}, "not lossless, by --nfkc and --no_byte_fallback:"),
        ]
    ):
        config = tok.Train([str(data)], str(tmp_path / str(n)), kind="char", vocab_size=900, **options)
        tok.train(config)
        out = capsys.readouterr().out
        assert said in out if said else "lossless" not in out


def test_stats_warn_of_json_escapes_and_lossy_options(tmp_path, folders, capsys):
    text = "\n".join(f"line\\nThe {w}\\nThis {w}" for w in ENGLISH * 30)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    train(Train([str(tmp_path / "a.jsonl")], str(tmp_path / "t"), 340))
    tok.stats(tok.Stats(str(tmp_path / "t"), [str(tmp_path / "a.jsonl")]))
    assert re.search("warning: nTh.*JSON escapes", capsys.readouterr().out)
    tok.stats(tok.Stats(str(folders["bpe-nfkc"]), [str(tmp_path / "a.jsonl")]))
    assert re.search("full width +FAIL .*'ＡＢＣ.* came back as 'ABC", capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char"])
def test_a_space_comes_back_although_the_training_text_had_none(tmp_path, kind):
    (tmp_path / "a.txt").write_text("我爱白纸你好世界\n\n他有三只猫\n\n" * 30, "utf-8")
    tok.train(tok.Train([str(tmp_path / "a.txt")], str(tmp_path / "tok"), kind=kind, vocab_size=277))
    tokenizer = tok.load_tokenizer(tmp_path / "tok")
    for text in ("我 爱", " a  b ", "▁"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
