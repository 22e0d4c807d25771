"""Byte-level BPE: learning merges, and encoding with them. Oracles: a naive trainer, `tokenizers`, tiktoken."""

import json
import random
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

import tokenizer as tok
from tokenizer import BYTE_ORDER, Train, count_words, learn_merges, load_tokenizer, split_pattern, train

regex = pytest.importorskip("regex")

BYTES = [bytes([b]) for b in BYTE_ORDER]
HAN = "白纸上写着你好世界语言模型训练数据今天气很我们一起学习中文本处理编码字符海北京春风明月"
WORDS = [
    "the",
    "model",
    "reads",
    " and",
    "'s",
    "ing",
    "I'll",
    "über",
    "слово",
    "한국어",
    "مرحبا",
    "ab",
    "aaaa",
]
ODD = [
    "",
    " ",
    "  ",
    "a  2",
    " \n \n",
    "\t\tx",
    "\r\n\r\n",
    "2023年1月",
    "\u3000全角　",
    "😀👨‍👩‍👧",
    "𠮷㐂",
    "\x00\x1b",
    "</s>",
    "▁a ▁",
]


def assigned(c: str) -> bool:
    """Engines know different versions of Unicode: a letter of one is unassigned in another."""
    return unicodedata.category(c) not in ("Cn", "Cs", "Co")


def random_text(rng, n=40):
    """Han, words, runs of spaces, digits, emoji, any assigned character."""
    pick = [
        lambda: "".join(rng.choices(HAN, k=rng.randrange(1, 9))) + rng.choice(["，", "。", "", " "]),
        lambda: rng.choice(WORDS) + rng.choice([" ", "", ", "]),
        lambda: rng.choice(" \n\t\r\u3000\u00a0") * rng.randrange(1, 5),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 7))),
        lambda: rng.choice(ODD),
        lambda: next(c for c in iter(lambda: chr(rng.randrange(0x20000)), None) if assigned(c)),
        lambda: chr(rng.randrange(0x1F300, 0x1F64F)) * rng.randrange(1, 3),
        lambda: chr(rng.randrange(0x20000, 0x2A6D0)),
    ]
    return "".join(rng.choice(pick)() for _ in range(rng.randrange(n)))


def texts(n, seed=0):
    rng = random.Random(seed)
    return [random_text(rng) for _ in range(n)]


DOCS = texts(800)


# --- learning merges ---


def naive_merges(words: dict[bytes, int], vocabulary: list[bytes], size: int, min_frequency: int):
    """The definition: count all pairs, join the most frequent (of equals the smallest ids), again and again."""
    vocabulary, special, merges, banned = list(vocabulary), set(vocabulary[:-256]), [], set()
    id_of = {piece: i for i, piece in enumerate(vocabulary)}
    split = {word: [id_of[bytes([b])] for b in word] for word in words}
    while len(vocabulary) < size:
        pairs = Counter()
        for word, ids in split.items():
            for pair in zip(ids, ids[1:]):
                pairs[pair] += words[word]
        best = min((p for p in pairs if p not in banned), key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < min_frequency:
            break
        if vocabulary[best[0]] + vocabulary[best[1]] in special:
            banned.add(best)
            continue
        for ids in split.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [len(vocabulary)]
                i += 1
        vocabulary.append(vocabulary[best[0]] + vocabulary[best[1]])
        merges.append(best)
    return merges, vocabulary


def learn(words: dict[bytes, int], vocabulary: list[bytes], size: int, min_frequency: int):
    packed, vocabulary = tok.Words(), list(vocabulary)
    for word, count in words.items():
        packed.add(word, count)
    return learn_merges(packed, vocabulary, size, min_frequency), vocabulary


@pytest.mark.parametrize("seed", range(40))
def test_merges_equal_the_naive_trainers_with_ties_and_runs(seed):
    rng = random.Random(seed)
    letters = rng.choice([b"a", b"ab", b"abc", b"abcdefgh", bytes(range(256))])
    words = {}
    for _ in range(rng.choice([1, 5, 60, 200])):
        words[bytes(rng.choices(letters, k=rng.randrange(1, 30)))] = rng.choice([1, 1, 2, 3, 1000])
    vocabulary = [b"<s>", b"ab", b"aaaa"][: rng.randrange(4)] + BYTES
    size, least = len(vocabulary) + rng.choice([3, 50, 400]), rng.choice([1, 2, 3])
    assert learn(words, vocabulary, size, least) == naive_merges(words, vocabulary, size, least)


def test_merges_equal_the_naive_trainers_on_text():
    words = dict(count_words(DOCS[:80], split_pattern()))
    assert learn(words, BYTES, 600, 2) == naive_merges(words, BYTES, 600, 2)


def test_the_textbook_example():
    merges, vocabulary = learn(
        {b"aaabdaaabac": 1}, BYTES, 259, 2
    )  # Wikipedia's: aa, then ab before aab's ties
    assert vocabulary[256:] == [b"aa", b"ab", b"aaab"] and len(merges) == 3


def test_counts_are_the_same_however_often_the_dictionary_is_spilled(monkeypatch):
    pattern = split_pattern()
    once = dict(count_words(DOCS, pattern))
    assert once == {
        w.encode(): n for w, n in Counter(w for d in DOCS for w in regex.findall(pattern, d)).items()
    }
    monkeypatch.setattr(tok, "SPILL", 50)
    many = count_words(DOCS, pattern)
    assert dict(many) == once and list(many) == sorted(many)


def library(docs, pattern, size, specials, min_frequency=2):
    """The same training by `tokenizers`."""
    hf = pytest.importorskip("tokenizers")
    t = hf.Tokenizer(hf.models.BPE())
    split = hf.pre_tokenizers.Split(hf.Regex(pattern), "isolated")
    level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.pre_tokenizer = hf.pre_tokenizers.Sequence([split, level])
    trainer = hf.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=specials,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=min_frequency,
        show_progress=False,
    )
    t.train_from_iterator(docs, trainer)
    return json.loads(t.to_str())["model"]


@pytest.mark.parametrize("options", [{}, {"split_digits": False, "min_frequency": 3}, {"max_han": 2}])
def test_vocabulary_and_merges_equal_those_of_tokenizers(options):
    files = tok.train_bytes(DOCS, 1200, ["<|user|>"], **options)
    ours = json.loads(files["tokenizer.json"])["model"]
    least = options.pop("min_frequency", 2)
    theirs = library(DOCS, split_pattern(**options), 1200, ["<s>", "</s>", "<pad>", "<|user|>"], least)
    assert ours["vocab"] == theirs["vocab"]
    assert ours["merges"] == theirs["merges"]


# --- text -> ids -> text ---

OPTIONS = {
    "plain": {},
    "numbers": {"split_digits": False},
    "han": {"max_han": 2, "add_bos": False},
    "nfkc": {"nfkc": True},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folders(data):
    out = {name: data.parent / name for name in OPTIONS}
    for name, options in OPTIONS.items():
        train(
            Train([str(data)], str(out[name]), 1000, kind="bytebpe", specials="<|user|>,<|bot|>", **options)
        )
    return out


@pytest.fixture(scope="module")
def ours(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


def in_python(files):
    """Load without tiktoken: the Python encoder is the definition."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tiktoken", None)
        t = tok.from_files(files, "memory")
    assert not t.backend.tiktoken
    return t


def test_decode_of_encode_is_the_text(ours):
    for name in ("plain", "numbers", "han"):
        for text in [*ODD, *texts(1500, seed=1), "".join(map(chr, [*range(0xD800), 0x10FFFF]))]:
            assert ours[name].decode(ours[name].encode(text)) == text


def test_tiktoken_gives_the_ids_of_the_python_encoder(ours):
    pytest.importorskip("tiktoken")
    fast, slow = ours["plain"], in_python(ours["plain"].files)
    assert fast.backend.tiktoken
    rng = random.Random(3)
    wild = [
        "".join(chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(9))
        for _ in range(1000)
    ]
    for text in [*ODD, *texts(3000, seed=2), *wild, "a" * 5000, "白纸" * 2000, " " * 5000]:
        assert fast.encode(text) == slow.encode(text)


def test_missing_tiktoken_is_announced_once(ours, capsys):
    tok.announce.cache_clear()
    for _ in range(3):
        in_python(ours["plain"].files)
    assert capsys.readouterr().err.count("pip install -U tiktoken") == 1


def test_missing_regex_is_explained(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(ValueError, match="pip install regex"):
        tok.from_files(ours["plain"].files, "memory")


def test_a_piece_of_a_megabyte_is_encoded(ours):
    for text in ("=" * 1_000_000, "白纸" * 30_000, " " * 100_000):
        assert ours["plain"].decode(ours["plain"].encode(text)) == text


def test_text_never_makes_a_special_token(ours):
    t = ours["plain"]
    literals = [t.token_text(i) for i in sorted(t.special_ids)]
    assert literals == ["<s>", "</s>", "<pad>", "<|user|>", "<|bot|>"]
    assert (t.bos_id, t.eos_id, t.pad_id, t.unk_id) == (0, 1, 2, None)
    for text in [*literals, *(a + b + a for a, b in zip(texts(200, seed=4), literals * 40))]:
        assert t.special_ids.isdisjoint(t.encode(text))
    many = tok.from_files(
        tok.train_bytes(["<|user|> </s>"] * 9, 266, ["<|user|>"], min_frequency=1), "memory"
    )
    assert many.special_ids.isdisjoint(many.encode("<|user|> </s>"))


def test_documents_get_bos_and_eos(ours):
    body = ours["plain"].encode("白纸")
    assert ours["plain"].encode_document("白纸") == [0, *body, 1]
    assert ours["han"].encode_document("白纸") == [*ours["han"].encode("白纸"), 1]
    assert ours["plain"].decode([0, *body, 3, 1], skip_special=False) == "<s>白纸<|user|></s>"


def test_lone_surrogates_and_foreign_ids_are_refused(ours):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ours["plain"].encode("a\ud800b")
    with pytest.raises(ValueError, match="id 1000 is not in the vocabulary of 1000"):
        ours["plain"].decode([1000])


def test_streamed_text_equals_decode_and_shows_no_half_character(ours):
    t, rng = ours["plain"], random.Random(5)
    for text in [*ODD, *(x.replace("\ufffd", "") for x in texts(300, seed=6))]:
        stream, shown = t.stream(), ""
        for i in t.encode(text):
            shown += stream.push(i)
            assert text.startswith(shown)
        assert shown == text and stream.flush() == ""
    for _ in range(500):
        ids = [rng.randrange(1000) for _ in range(rng.randrange(8))]
        data = b"".join(t.backend.token_bytes[i] for i in ids if i > 4)
        if not {0, 1, 2, 3, 4} & set(ids) and "\ufffd" not in data.decode(errors="replace"):
            assert t.decode(ids) == data.decode()


def test_digits_and_han_runs_are_cut_as_asked(ours):
    assert [ours["plain"].token_text(i) for i in ours["plain"].encode("2023")] == list("2023")
    assert ours["numbers"].backend.pieces("12345") == ["123", "45"]
    assert ours["han"].backend.pieces("，白纸上写 ab二〇") == ["，白纸", "上写", " ab", "二〇"]
    assert ours["plain"].backend.pieces("，白纸上写 ab") == ["，白纸上写", " ab"]
    assert ours["nfkc"].decode(ours["nfkc"].encode("ＡＢ①")) == "AB1"


# --- files ---


@pytest.mark.parametrize("name", OPTIONS)
def test_transformers_and_tokenizers_give_our_ids(ours, folders, name):
    transformers, hf = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    auto = transformers.AutoTokenizer.from_pretrained(folders[name])
    fast = hf.Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    t = ours[name]
    for text in texts(500, seed=7):
        if "</s>" not in text and (
            name != "nfkc" or fast.normalizer.normalize_str(text) == t.backend.normalize(text)
        ):
            ids = t.encode_prompt(text)
            assert auto.encode(text) == fast.encode(text).ids == ids
            assert fast.decode(ids) == t.decode(ids)
    assert len(auto) == t.vocab_size == 1000
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (0, 1, 2)
    assert auto.convert_tokens_to_ids("<|user|>") == 3


def test_saved_tokenizer_is_the_same(ours, tmp_path):
    for name, t in ours.items():
        t.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert again.digest == t.digest and re.fullmatch("[0-9a-f]{64}", t.digest)
        assert not (tmp_path / name / "tokenizer.model").exists()
        bare = load_tokenizer(tmp_path / name / "tokenizer.json")
        assert bare.encode(DOCS[0]) == again.encode(DOCS[0]) == t.encode(DOCS[0])
    assert len({t.digest for t in ours.values()}) == len(ours)


def test_training_is_deterministic_and_blocks_keep_the_text(monkeypatch):
    assert tok.train_bytes(DOCS, 600) == tok.train_bytes(DOCS[::-1], 600)
    monkeypatch.setattr(tok, "BLOCK_CHARS", 30)
    for text in [*texts(200, seed=8), "白" * 100]:
        assert "".join(tok.text_blocks(text)) == text and all(len(b) <= 30 for b in tok.text_blocks(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 90_000}, r"vocab_size 90000 is too large for this text; at most \d+"),
        ({"vocab_size": 258}, "too small: 256 bytes and special tokens are 259"),
        ({"byte_fallback": False}, "--byte_fallback: --kind bytebpe has no such option"),
        ({"kind": "bpe", "max_han": 2}, "--max_han: --kind bpe has no such option"),
        ({"max_han": -1}, "--max_han must be 0 or more"),
    ],
)
def test_bad_options_are_explained(data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(Train([str(data)], str(tmp_path / "t"), **{"vocab_size": 500, "kind": "bytebpe", **options}))
    assert not (tmp_path / "t").exists() and not (tmp_path / "t.tmp").exists()


def test_empty_corpus_is_explained(tmp_path):
    Path(tmp_path / "a.jsonl").write_text('{"text": ""}')
    with pytest.raises(ValueError, match="the corpus is empty"):
        train(Train([str(tmp_path / "a.jsonl")], str(tmp_path / "t"), 480, kind="bytebpe"))


def test_stats_and_dump_read_it(folders, data, tmp_path, capsys):
    tok.stats(tok.Stats(str(folders["plain"]), [str(data)]))
    table = capsys.readouterr().out
    assert "FAIL" not in table and re.search(r"digits are split +PASS", table)
    tok.dump(tok.Dump(str(folders["plain"]), str(tmp_path / "v.tsv")))
    rows = [line.split("\t") for line in (tmp_path / "v.tsv").read_text(encoding="utf-8").split("\n")[:-1]]
    assert [int(row[0]) for row in rows] == list(range(1000))
    assert rows[0][1::2] == ["special", "<s>"] and ["byte", "<0xE4>"] in [row[1::2] for row in rows]
