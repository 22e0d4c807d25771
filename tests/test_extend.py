"""Extending a vocabulary: old ids stay, new ones follow, and transformers, tokenizers and sentencepiece agree."""

import itertools
import json
import random
import shutil
import unicodedata
from collections import Counter

import pytest
import sentencepiece
import test_tokenizer_json
import tokenizers
from conftest import run_script
from test_bpe import texts
from test_tokenizer import DOCS, LINES, NASTY

import tokenizer as tok
from tokenizer import CONTROL, Extend, Train, extend, load_tokenizer, train

transformers = pytest.importorskip("transformers")
pytest.importorskip("regex")
NEW_WORDS = "光合作用 叶绿体 二氧化碳 阳光 细胞 蒸腾 chlorophyll leaf carbon".split()
YAYI = ["<|System|>", "<|Human|>", "<|YaYi|>", "<|End|>"]
OLD, SIZE = 480, 560
SIZES = {"char": (367, 386)}  # all the characters that there are: of the old text, of the new text too


def new_docs(n=200, seed=3):
    rng = random.Random(seed)
    rows = (
        "".join(rng.choices(NEW_WORDS[:6], k=9)) + "。 " + " ".join(rng.choices(NEW_WORDS, k=5))
        for _ in range(n)
    )
    return [row + rng.choice(["\n", "", " \t2024年"]) + row[:5] for row in rows]


NEW = new_docs()
MIXED = [line for text in [*new_docs(60, seed=4), *LINES[:150]] for line in text.split("\n") if line]
KINDS = {
    "bpe": {},
    "unigram": {"kind": "unigram"},
    "char": {"kind": "char"},
    "bpe-nfkc": {"nfkc": True},
    "bpe-no-bytes": {"byte_fallback": False},
    "bytebpe": {"kind": "bytebpe"},
    "bytebpe-nfkc": {"kind": "bytebpe", "nfkc": True},
}


def write(path, docs):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in docs), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write(tmp_path_factory.mktemp("new") / "new.jsonl", NEW)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, corpus):
    """Kind -> folders of a tokenizer of OLD tokens and of its extension to SIZE."""
    base, out = tmp_path_factory.mktemp("pairs"), {}
    data = write(base / "docs.jsonl", DOCS)
    for kind, options in KINDS.items():
        old, new = base / kind, base / f"{kind}-more"
        train(Train([data], str(old), OLD, specials="<|user|>", **options))
        extend(Extend(str(old), str(new), (corpus,), SIZES.get(kind, (OLD, SIZE))[1], specials="<|a|>,<|b|>"))
        out[kind] = old, new
    return out


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A LLaMA-like folder: SentencePiece BPE with a dummy prefix, as others train it; no tokenizer.json."""
    folder = tmp_path_factory.mktemp("foreign")
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([line for doc in DOCS for line in doc.split("\n")]),
            model_writer=file,
            model_type="bpe",
            vocab_size=480,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            byte_fallback=True,
            minloglevel=2,
        )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def same_old_ids(old, new):
    for i in range(old.vocab_size):
        assert old.backend.texts[i] == new.backend.texts[i], i
        assert old.backend.token_bytes[i] == new.backend.token_bytes[i], i


# --- what stays, what comes ---


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_keep_text_and_bytes_and_new_ones_follow(pairs, kind):
    old, new = map(load_tokenizer, pairs[kind])
    same_old_ids(old, new)
    assert (old.vocab_size, new.vocab_size) == SIZES.get(kind, (OLD, SIZE))
    a, b = old.vocab_size, old.vocab_size + 1
    assert [new.token_text(a), new.token_text(b)] == ["<|a|>", "<|b|>"]
    assert new.special_ids == old.special_ids | {a, b}
    assert (new.bos_id, new.eos_id, new.pad_id) == (old.bos_id, old.eos_id, old.pad_id)
    assert len(set(new.backend.texts)) == new.vocab_size  # no piece twice


@pytest.mark.parametrize("kind", KINDS)
def test_new_text_takes_fewer_tokens_and_the_new_ones_are_used(pairs, kind):
    old, new = map(load_tokenizer, pairs[kind])
    before, after = ([i for text in NEW for i in t.encode(text)] for t in (old, new))
    limit = {"char": 0.6, "bpe-no-bytes": 1.0}.get(kind, 0.45)  # without bytes the old one wrote <unk>
    assert len(after) < limit * len(before)
    used = {i for i in after if i >= old.vocab_size}
    assert len(used) > 0.5 * (new.vocab_size - old.vocab_size - 2)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "char", "bytebpe"])
def test_an_extended_tokenizer_is_lossless_and_makes_no_special_token(pairs, kind):
    t = load_tokenizer(pairs[kind][1])
    for text in [*NASTY, *MIXED, *texts(200), "<|a|><|b|>", "光<|a|>合"]:
        ids = t.encode(text)
        assert t.decode(ids) == text and t.special_ids.isdisjoint(ids)


@pytest.mark.parametrize("kind", ["bpe", "bytebpe"])
def test_old_text_is_merged_as_before_where_no_new_piece_joins_in(pairs, kind):
    """Undoing the new merges gives the old ids: old merges come first."""
    old, new = map(load_tokenizer, pairs[kind])
    for text in DOCS[:100]:
        undone = [
            p
            for i in new.encode(text)
            for p in ([i] if i < 480 else old.encode_bytes(new.backend.token_bytes[i]))
        ]
        assert undone == old.encode(text)


def test_the_model_file_counts_its_pieces_as_sentencepiece_reads_it(pairs):
    from sentencepiece import sentencepiece_model_pb2 as pb

    for kind in ("bpe", "unigram"):
        proto = pb.ModelProto.FromString((pairs[kind][1] / "tokenizer.model").read_bytes())
        assert proto.trainer_spec.vocab_size == len(proto.pieces) == SIZE
        assert [p.type for p in proto.pieces[480:483]] == [CONTROL, CONTROL, tok.NORMAL]
        old = pb.ModelProto.FromString((pairs[kind][0] / "tokenizer.model").read_bytes())
        assert list(proto.pieces[:480]) == list(old.pieces) and proto.normalizer_spec == old.normalizer_spec
    proto = pb.ModelProto.FromString((pairs["bpe"][1] / "tokenizer.model").read_bytes())
    scores = [p.score for p in proto.pieces if p.type == tok.NORMAL]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


# --- transformers and tokenizers ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [None, "llama", "bloom"])
def test_auto_tokenizer_and_tokenizer_json_give_our_ids(pairs, kind, model_type, tmp_path):
    folder = shutil.copytree(pairs[kind][1], tmp_path / "t")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    t = load_tokenizer(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in MIXED:
        assert auto.encode(text) == fast.encode(text).ids == t.encode_prompt(text), text
        if kind != "bpe-no-bytes":
            assert fast.decode(t.encode(text)) == t.decode(t.encode(text))
    assert len(auto) == t.vocab_size == fast.get_vocab_size()
    a = SIZES.get(kind, (OLD, SIZE))[0]
    assert auto.encode("<|b|>", add_special_tokens=False) == [a + 1] and "<|a|>" in auto.all_special_tokens
    assert [fast.id_to_token(i) for i in (a, a + 1)] == ["<|a|>", "<|b|>"]


@pytest.mark.parametrize("with_json", [False, True])
def test_a_llama_like_folder_is_extended_and_llama_tokenizer_gives_our_ids(
    foreign, corpus, with_json, tmp_path
):
    old = foreign
    if with_json:
        old = tmp_path / "old"
        transformers.LlamaTokenizer.from_pretrained(foreign).save_pretrained(old)
        shutil.copy(foreign / "tokenizer.model", old)
    assert (old / "tokenizer.json").exists() == with_json
    extend(Extend(str(old), str(tmp_path / "new"), (corpus,), SIZE, specials=",".join(YAYI)))
    t = load_tokenizer(tmp_path / "new")
    same_old_ids(load_tokenizer(old), t)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path / "new")
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "new/tokenizer.model"))
    both = [theirs]
    if with_json:
        both.append(transformers.AutoTokenizer.from_pretrained(tmp_path / "new"))
        both.append(tokenizers.Tokenizer.from_file(str(tmp_path / "new/tokenizer.json")))
    seen = set()
    for text in MIXED:
        ids = t.encode(text)
        seen.update(ids)
        assert ids == sp.encode(text) and t.decode(ids) == text
        for other in both if not text.startswith(" ") else ():  # transformers 5 puts no second space there
            got = other.encode(text, add_special_tokens=False)
            assert getattr(got, "ids", got) == ids, text
    assert max(seen) > 484 and any(t.token_text(i).startswith("▁") for i in seen if i > 484)
    for n, text in enumerate(YAYI):
        assert theirs.convert_tokens_to_ids(text) == sp.piece_to_id(text) == 480 + n
        assert theirs.encode(text, add_special_tokens=False)[-1] == 480 + n
        assert t.special_ids.isdisjoint(t.encode(f"{text}你好{text}")) and 480 + n in t.special_ids


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "qwen", "deepseek", "gpt2-prefix"])
def test_a_foreign_byte_level_vocabulary_goes_on_after_its_added_tokens(kind, corpus, tmp_path):
    """Added tokens beyond the vocabulary, a hole among them, keep their ids (as in Phi-2, Qwen and YaYi)."""
    spec = test_tokenizer_json.train(kind)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for i, text, special in ((1600, "<|old|>", True), (1601, "  \t ", False)):
        spec["added_tokens"].append({"id": i, "content": text, "special": special, **flags})
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "tokenizer.json").write_text(json.dumps(spec))
    (old / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    extend(Extend(str(old), str(new), (corpus,), 1660, specials=",".join(YAYI)))
    before, t = load_tokenizer(old), load_tokenizer(new)
    same_old_ids(before, t)
    assert before.vocab_size == 1602 and t.vocab_size == 1660
    fast = tokenizers.Tokenizer.from_file(str(new / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(new)
    for text in [*MIXED, *texts(300, seed=1), "a  \t b", "光合作用  \t 光合作用"]:
        if "</s>" not in text and (
            not fast.normalizer or fast.normalizer.normalize_str(text) == t.backend.normalize(text)
        ):
            assert fast.encode(text, add_special_tokens=False).ids == t.encode(text), text
            assert auto.encode(text, add_special_tokens=False) == t.encode(text)
    assert 1601 in t.encode("a  \t b")
    assert [auto.convert_tokens_to_ids(text) for text in YAYI] == [1602, 1603, 1604, 1605]
    assert fast.encode("<|YaYi|>", add_special_tokens=False).ids[-1:] == [1604]
    assert set(range(1602, 1606)) <= t.special_ids and t.special_ids.isdisjoint(t.encode("".join(YAYI)))
    assert sum(len(t.encode(x)) for x in NEW) < 0.8 * sum(len(before.encode(x)) for x in NEW)


@pytest.mark.parametrize("kind", ["bpe-nfkc", "bytebpe-nfkc"])
def test_new_pieces_are_learnt_from_text_as_the_old_tokenizer_normalises_it(pairs, kind, tmp_path):
    wide = write(tmp_path / "wide.jsonl", ["ＡＢＣ①㎏ ＡＢＣＤ。"] * 50)
    extend(Extend(str(pairs[kind][0]), str(tmp_path / "new"), (wide,), OLD + 4))
    old, new = load_tokenizer(pairs[kind][0]), load_tokenizer(tmp_path / "new")
    assert set(range(OLD, OLD + 4)) & set(new.encode("ＡＢＣ①㎏ ＡＢＣＤ。"))
    for text in new.backend.texts[OLD:]:
        assert unicodedata.normalize("NFKC", text) == text
    assert len(new.encode("ABC1kg ABCD。")) < len(old.encode("ABC1kg ABCD。"))


def test_a_word_at_the_beginning_is_learnt_with_the_dummy_space_of_a_llama_like_model(foreign, tmp_path):
    lines = write(tmp_path / "lines.jsonl", ["光合作用\n叶绿体"] * 50)
    extend(Extend(str(foreign), str(tmp_path / "new"), (lines,), OLD + 14))
    t = load_tokenizer(tmp_path / "new")
    assert [t.token_text(i) for i in t.encode("光合作用")] == ["▁光合作用"]


# --- learning on: byte-level BPE ---


def naive_continuation(words, split, pieces, size, least):
    """The definition: words as present tokens; join the most frequent pair whose union is no token yet."""
    pieces, joins = list(pieces), []
    while len(pieces) < size:
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(split[word]):
                if pieces[pair[0]] + pieces[pair[1]] not in pieces:
                    pairs[pair] += count
        best = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < least:
            break
        for ids in split.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [len(pieces)]
                i += 1
        pieces.append(pieces[best[0]] + pieces[best[1]])
        joins.append(best)
    return joins, pieces


@pytest.mark.parametrize("seed", range(30))
def test_learning_on_equals_the_naive_trainer_that_starts_from_tokens(seed):
    rng = random.Random(seed)
    letters = rng.choice([b"a", b"ab", b"abc", b"abcdefgh"])
    words = {
        bytes(rng.choices(letters, k=rng.randrange(1, 20))): rng.choice([1, 1, 2, 3, 99])
        for _ in range(rng.choice([1, 9, 80]))
    }
    pieces = [
        b"",
        *(bytes([b]) for b in range(97, 105)),
        b"ab",
        b"ba",
        b"aab",
        b"abab",
        b"aaaa",
    ]  # b"": a special
    split, packed = {}, tok.Words()
    for word, count in words.items():
        packed.add(word, count)
        ids, at = [], 0
        while at < len(word):  # any cut into tokens will do
            options = [i for i, piece in enumerate(pieces) if piece and word.startswith(piece, at)]
            ids.append(rng.choice(options))
            at += len(pieces[ids[-1]])
        split[word] = ids
    tokens = tok.np.array([i for word in words for i in split[word]], tok.np.int32)
    size, least, grown = len(pieces) + rng.choice([3, 60]), rng.choice([1, 2, 3]), list(pieces)
    joins = tok.learn_merges(packed, grown, size, least, tokens)
    assert (joins, grown) == naive_continuation(words, split, pieces, size, least)


def test_learning_on_from_the_same_text_equals_training_at_once(tmp_path):
    data = write(tmp_path / "d.jsonl", texts(400, seed=9))
    for n in (300, 700):
        train(Train([data], str(tmp_path / f"{n}"), n, kind="bytebpe"))
    extend(Extend(str(tmp_path / "300"), str(tmp_path / "new"), (data,), 700))
    assert (tmp_path / "new/tokenizer.json").read_bytes() == (tmp_path / "700/tokenizer.json").read_bytes()


def test_merges_written_as_strings_stay_strings(pairs, corpus, tmp_path):
    old = shutil.copytree(pairs["bpe"][0], tmp_path / "model")
    spec = json.loads((old / "tokenizer.json").read_text())
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (old / "tokenizer.json").write_text(json.dumps(spec))
    extend(Extend(str(old), str(tmp_path / "more"), (corpus,), SIZE))
    merges = json.loads((tmp_path / "more/tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) > len(spec["model"]["merges"]) and all(isinstance(m, str) for m in merges)
    spec = test_tokenizer_json.train("gpt2")
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    extend(Extend(str(tmp_path / "tokenizer.json"), str(tmp_path / "new"), (corpus,), 1620))
    merges = json.loads((tmp_path / "new/tokenizer.json").read_text())["model"]["merges"]
    assert len(merges) == len(spec["model"]["merges"]) + 20 and all(isinstance(m, str) for m in merges)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "new/tokenizer.json"))
    assert fast.encode(NEW[0], add_special_tokens=False).ids == load_tokenizer(tmp_path / "new").encode(
        NEW[0]
    )


# --- special tokens and tokens beyond the model ---


def test_special_tokens_alone_change_no_id_of_any_text(pairs, foreign, tmp_path):
    metaspace = tmp_path / "tokenizer.json"
    metaspace.write_text(json.dumps(test_tokenizer_json.train("xverse")))
    for n, source in enumerate(
        [foreign, foreign / "tokenizer.model", metaspace, *(pairs[k][0] for k in ("unigram", "bytebpe"))]
    ):
        extend(Extend(str(source), str(tmp_path / f"{n}"), specials=",".join(YAYI)))
        old, new = load_tokenizer(source), load_tokenizer(tmp_path / f"{n}")
        assert new.vocab_size == old.vocab_size + 4
        same_old_ids(old, new)
        for text in [*MIXED[:80], "<|Human|>你好<|End|>"]:
            assert new.encode(text) == old.encode(text)
        last = [new.vocab_size - 4 + n for n in range(4)]
        assert new.special_ids == old.special_ids | set(last)
        assert new.decode(last, skip_special=False) == "".join(YAYI) and new.decode(last) == ""


def test_a_special_token_written_like_bytes_of_an_old_one_is_refused(pairs, tmp_path):
    """tokenizer.json writes the bytes E4 BD as ä½: a token of that name would take the old one's place."""
    old = load_tokenizer(pairs["bytebpe"][0])
    letters = next(
        text for text in json.loads(old.files["tokenizer.json"])["model"]["vocab"] if "ä" in text[:-1]
    )
    with pytest.raises(ValueError, match="is how tokenizer.json writes the bytes of token"):
        tok.extend(tok.Extend(str(pairs["bytebpe"][0]), str(tmp_path / "t"), specials=letters))


def test_extending_twice_keeps_all_special_tokens(pairs, tmp_path):
    for kind in ("bpe", "bytebpe"):
        extend(Extend(str(pairs[kind][1]), str(tmp_path / kind), specials="<|c|>"))
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            more = json.loads((tmp_path / kind / name).read_text())["additional_special_tokens"]
            assert more == ["<|user|>", "<|a|>", "<|b|>", "<|c|>"]
        auto = transformers.AutoTokenizer.from_pretrained(tmp_path / kind)
        assert auto.convert_tokens_to_ids(["<|user|>", "<|a|>", "<|c|>"])[1:] == [480, SIZE]


def test_special_tokens_that_a_folder_adds_become_control_pieces_at_their_ids(foreign, corpus, tmp_path):
    old = shutil.copytree(foreign, tmp_path / "old")
    config = json.loads((old / "tokenizer_config.json").read_text())
    marks = {str(480 + n): {"content": text, "special": True} for n, text in enumerate(["<pad>", *YAYI])}
    (old / "tokenizer_config.json").write_text(
        json.dumps({**config, "pad_token": "<pad>", "added_tokens_decoder": marks})
    )
    extend(Extend(str(old), str(tmp_path / "new"), (corpus,), SIZE))
    t = load_tokenizer(tmp_path / "new")
    same_old_ids(load_tokenizer(old), t)
    sp = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "new/tokenizer.model"))
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path / "new")
    assert t.pad_id == theirs.pad_token_id == 480 and sp.get_piece_size() == len(theirs) == SIZE
    for n, text in enumerate(["<pad>", *YAYI]):
        assert sp.is_control(480 + n) and sp.id_to_piece(480 + n) == text
        assert theirs.convert_tokens_to_ids(text) == 480 + n
    for text in MIXED[:60]:
        assert theirs.encode(text, add_special_tokens=False) == t.encode(text)


@pytest.mark.parametrize(
    ("added", "message"),
    [({"word": 480}, "'word' (id 480) is not special"), ({"<x>": 481}, "id 480 is a hole")],
)
def test_a_token_that_a_model_file_cannot_hold_is_named(foreign, added, message, tmp_path):
    old = shutil.copytree(foreign, tmp_path / "old")
    (old / "added_tokens.json").write_text(json.dumps(added))
    (old / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": ["<x>"] * ("<x>" in added)})
    )
    with pytest.raises(ValueError) as error:
        extend(Extend(str(old), str(tmp_path / "new"), specials="<|a|>"))
    assert message in str(error.value) and not (tmp_path / "new").exists()


# --- refusals, command line ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to add: give a corpus and --vocab_size, or --specials"),
        ({"corpus": ()}, "nothing to add"),
        ({"vocab_size": 480}, "--vocab_size 480 is what there will be in all, and the tokenizer has 480 tokens"),
        ({"vocab_size": 482, "specials": "<|a|>,<|b|>"}, "with --specials 482"),
        ({"vocab_size": 600, "corpus": ()}, "name a corpus"),
        ({"vocab_size": 90_000}, r"too large for this text; at most \d+"),
        ({"specials": "<|user|>"}, "'<|user|>' is token"),
        ({"specials": "<|a|>,<|a|>"}, "'<|a|>' is given twice"),
        ({"specials": "a b"}, "no space"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytebpe"])
def test_bad_options_are_explained(pairs, corpus, kind, options, message, tmp_path):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        extend(Extend(str(pairs[kind][0]), str(tmp_path / "t"), **{"corpus": (corpus,), **options}))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytebpe"])
def test_the_largest_vocabulary_named_by_the_error_can_be_reached(pairs, corpus, kind, tmp_path):
    with pytest.raises(ValueError) as error:
        extend(Extend(str(pairs[kind][0]), str(tmp_path / "t"), (corpus,), 90_000, specials="<|a|>"))
    most = int(str(error.value).split("at most ")[1].split(",")[0])
    extend(Extend(str(pairs[kind][0]), str(tmp_path / "t"), (corpus,), most, specials="<|a|>"))
    assert load_tokenizer(tmp_path / "t").vocab_size == most


def test_pieces_for_metaspace_bpe_without_a_model_are_refused(corpus, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(test_tokenizer_json.train("xverse")))
    with pytest.raises(ValueError, match="Metaspace BPE: new pieces need its tokenizer.model"):
        extend(Extend(str(tmp_path / "tokenizer.json"), str(tmp_path / "t"), (corpus,), 1700))


def test_files_that_disagree_are_refused(pairs, corpus, tmp_path):
    folder = shutil.copytree(pairs["bpe"][0], tmp_path / "old")
    shutil.copy(pairs["unigram"][0] / "tokenizer.json", folder)
    with pytest.raises(ValueError, match="tokenizer.json and tokenizer.model of this folder disagree"):
        extend(Extend(str(folder), str(tmp_path / "t"), specials="<|a|>"))


def test_command_line_says_what_was_added_and_what_it_saves(pairs, corpus, tmp_path):
    args = (
        "tokenizer.py",
        "extend",
        pairs["bpe"][0],
        corpus,
        "--vocab_size",
        SIZE,
        "--specials",
        "<|a|>,<|b|>",
    )
    done = run_script(*args, "--out", tmp_path / "t")
    assert done.returncode == 0, done.stderr
    old, new = load_tokenizer(pairs["bpe"][0]), load_tokenizer(tmp_path / "t")
    before, after = (sum(len(t.encode(x)) for x in NEW) / sum(map(len, NEW)) for t in (old, new))
    occur = len({i for x in NEW for i in new.encode(x) if i >= 480})
    assert done.stdout.strip().endswith(
        f"2 special tokens and 78 pieces after 480 old tokens; tokens per character of the new text {before:.3f} -> {after:.3f}, {occur} new ones occur"
    )
    assert new.digest == load_tokenizer(pairs["bpe"][1]).digest  # and the same text gives the same bytes
    done = run_script(*args, "--out", tmp_path / "t")
    assert done.returncode == 2 and "exists and is not empty" in done.stderr
