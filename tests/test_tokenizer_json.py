"""Reading others' tokenizer.json: each kind is trained here by `tokenizers`, which is also the oracle."""

import json
import random
import sys

import pytest
from test_bpe import ODD, assigned, random_text

import tokenizer as tok
from tokenizer import SPACE, load_tokenizer

hf = pytest.importorskip("tokenizers")
pytest.importorskip("regex")
N, P, D = hf.normalizers, hf.pre_tokenizers, hf.decoders

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+"]
CODE = [
    "def f(x):\n    return x + 1\n",
    "for i in range(10):\n\tprint(i)\n",
    "a[i] -= {'k': [1, 23]}  # don't\n",
]
rng = random.Random(0)
DOCS = [random_text(rng, 20) + rng.choice(["", *CODE]) for _ in range(1500)]
LINES = [random_text(rng, 20) + rng.choice(["", "", *CODE, *ODD]) for _ in range(3000)] + ODD
LINES = [
    text for text in LINES if "</s>" not in text and all(c in "\n\r\t\x00\x1b" or assigned(c) for c in text)
]
LINES += [
    "a  2",
    "  a",
    "x\u00a0 y",
    "don't DON'T I'LL",
    "a\n\n\n b",
    "１２３ 四五六 ½ Ⅷ",
    "e\u0301é",
    "ÀÉ한",
    "$+<=>^`|~ §±",
    "''",
    "  ",
]


def level(**options):
    return P.ByteLevel(add_prefix_space=False, use_regex=False, **options)


def isolated(patterns):
    return [P.Split(hf.Regex(pattern), "isolated") for pattern in patterns]


BYTE_KINDS = {  # normalizer, pre_tokenizer
    "gpt2": (None, P.ByteLevel(add_prefix_space=False)),
    "gpt2-prefix": (None, P.ByteLevel(add_prefix_space=True)),
    "bloom": (None, P.Sequence([P.Split(hf.Regex(BLOOM), "isolated"), level()])),
    "qwen": (N.NFC(), P.Sequence([*isolated([QWEN]), level()])),
    "smollm": (None, P.Sequence([P.Digits(individual_digits=True), P.ByteLevel(add_prefix_space=False)])),
    "deepseek": (N.Sequence([]), P.Sequence([*isolated(DEEPSEEK), level()])),
    "coder": (None, P.Sequence([*isolated(CODER), P.Digits(individual_digits=True), level()])),
}
xverse = P.Sequence([P.Metaspace(), P.Digits(individual_digits=True), P.Punctuation("isolated")])
llama = N.Sequence([N.Prepend(SPACE), N.Replace(" ", SPACE)])
llama_decoder = [D.Replace(SPACE, " "), D.ByteFallback(), D.Fuse(), D.Strip(" ", 1, 0)]
SPACE_KINDS = {  # normalizer, pre_tokenizer, decoder
    "xverse": (None, xverse, D.Sequence([D.Metaspace(), D.ByteFallback()])),
    "llama": (llama, None, D.Sequence(llama_decoder)),
    "mistral": (None, P.Metaspace(prepend_scheme="first", split=False), D.Sequence(llama_decoder)),
    "metaspace-never": (
        N.NFKC(),
        P.Metaspace(prepend_scheme="never"),
        D.Sequence([D.Metaspace(prepend_scheme="never"), D.ByteFallback()]),
    ),
}


def train(kind):
    """Train a small tokenizer of a kind; the special tokens come first."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    if kind in BYTE_KINDS:
        t = hf.Tokenizer(hf.models.BPE())
        t.normalizer, t.pre_tokenizer = (
            part or none for part, none in zip(BYTE_KINDS[kind], (N.Sequence([]), None))
        )
        t.decoder, specials, alphabet = D.ByteLevel(), specials[1:3], P.ByteLevel.alphabet()
    else:
        t = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        normalizer, splitter, decoder = SPACE_KINDS[kind]
        # LLaMA's has no pre_tokenizer, so that words would grow into sentences: it learns with one
        t.normalizer, t.decoder, alphabet = normalizer or N.Sequence([]), decoder, []
        t.pre_tokenizer = splitter or P.Metaspace(prepend_scheme="never")
    options = {
        "special_tokens": specials,
        "initial_alphabet": alphabet,
        "min_frequency": 2,
        "limit_alphabet": 400,
    }
    t.train_from_iterator(DOCS, hf.trainers.BpeTrainer(vocab_size=1600, show_progress=False, **options))
    spec = json.loads(t.to_str())
    spec["pre_tokenizer"] = None if kind == "llama" else spec["pre_tokenizer"]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if "0x" not in token["content"]]
    return spec


@pytest.fixture(scope="module")
def specs():
    return {kind: train(kind) for kind in [*BYTE_KINDS, *SPACE_KINDS]}


def both(spec):
    """Our tokenizer and theirs from one tokenizer.json; theirs told, as ours always is, to make no specials."""
    data = json.dumps(spec)
    theirs = hf.Tokenizer.from_str(data)
    theirs.encode_special_tokens = True
    return tok.from_files({"tokenizer.json": data.encode()}, "memory"), theirs


def differing(ours, theirs, lines=LINES):
    """Lines whose ids differ, with the pieces."""
    expected = [e.ids for e in theirs.encode_batch(lines, add_special_tokens=False)]
    return [
        (text, ours.backend.pieces(text)) for text, ids in zip(lines, expected) if ours.encode(text) != ids
    ]


@pytest.mark.parametrize("kind", [*BYTE_KINDS, *SPACE_KINDS])
def test_ids_and_text_equal_those_of_tokenizers(specs, kind):
    ours, theirs = both(specs[kind])
    same = lambda x: not theirs.normalizer or theirs.normalizer.normalize_str(x) == ours.backend.normalize(x)
    lines = [text for text in LINES if same(text)]  # their NFKC is of an older Unicode
    assert len(lines) > 2500 and not differing(ours, theirs, lines)
    assert kind not in BYTE_KINDS or ours.backend.tiktoken
    for text in lines[::3]:
        ids = ours.encode(text)
        if text.startswith(" ") or SPACE in text:  # their Metaspace drops every space of the first token
            continue
        assert ours.decode(ids) == theirs.decode(ids)
        assert kind in ("qwen", "metaspace-never", "gpt2-prefix") or ours.decode(ids) == text


@pytest.mark.parametrize("kind", BYTE_KINDS)
def test_python_encoder_equals_tokenizers(specs, kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    ours, theirs = both(specs[kind])
    assert not ours.backend.tiktoken and not differing(ours, theirs, LINES[::3])


def test_merges_in_another_order_than_ids_go_to_the_python_encoder(specs, capsys):
    spec = json.loads(json.dumps(specs["qwen"]))
    random.Random(1).shuffle(spec["model"]["merges"])
    tok.announce.cache_clear()
    ours, theirs = both(spec)
    assert not ours.backend.tiktoken and "not in the order of its ids" in capsys.readouterr().err
    assert not differing(ours, theirs, LINES[::3])


def test_tiktoken_serves_only_where_merging_makes_every_token(specs):
    """Of merges b+c, a+b, ab+c the word abc becomes a, bc: tiktoken, which takes a token whole, would differ."""
    merges = ["b c", "a b", "ab c", "x y", "xy z", "y z"]
    spec = json.loads(json.dumps(specs["gpt2"]))
    letters = sorted(text for text in spec["model"]["vocab"] if len(text) == 1)
    for chosen, whole in ((merges[:3], False), (merges[1:5], True), (merges[:2] + merges[3:], True)):
        vocab = [*letters, *(m.replace(" ", "") for m in chosen)]
        spec["model"] |= {"vocab": {text: i for i, text in enumerate(vocab)}, "merges": chosen}
        spec["added_tokens"] = []
        ours, theirs = both(spec)
        assert bool(ours.backend.tiktoken) == whole
        for word in ("abc", "abcabc", "xyz", "xyzyz", "bcab"):
            assert ours.encode(word) == theirs.encode(word).ids


def test_made_whole_equals_merging_every_token(specs):
    """The proof at the seams against the plain way, on random merges of three letters."""
    backend, answers = both(specs["gpt2"])[0].backend, []
    for seed in range(3000):
        rng, names, backend.ranks = random.Random(seed), list("abc"), {}
        for _ in range(rng.randrange(1, 9)):
            left, right = rng.randrange(len(names)), rng.randrange(len(names))
            if names[left] + names[right] not in names:
                backend.ranks[left, right] = len(backend.ranks), len(names)
                names.append(names[left] + names[right])
        merged = [backend.merge(["abc".index(c) for c in name]) for name in names]
        answers.append(backend.made_whole())
        assert answers[-1] == (merged == [[i] for i in range(len(names))]), (seed, names)
    assert 100 < sum(answers) < 2900


def test_nul_in_text_is_a_token_like_any_other(specs):
    ours, theirs = both(specs["qwen"])
    assert ours.backend.tiktoken
    for text in ("\0", "a\0b", "白\0\0纸 \0", "\0\n"):
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text


def test_pieces_that_are_tokens_are_taken_whole_with_ignore_merges(specs):
    spec = json.loads(json.dumps(specs["qwen"]))
    gone = {"".join(spec["model"]["merges"].pop(n)) for n in (700, 600, 500, 400, 300)}
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if not gone & set(m)]
    for ignore in (True, False):
        spec["model"]["ignore_merges"] = ignore
        ours, theirs = both(spec)
        assert bool(ours.backend.tiktoken) != ignore
        whole = [theirs.decode([i]) for i in range(300, 1600, 3)]
        assert not differing(ours, theirs, whole + LINES[::5])


@pytest.mark.parametrize("kind", ["qwen", "gpt2-prefix", "xverse", "llama", "mistral"])
def test_added_tokens_are_found_in_text_but_marks_are_not(specs, kind):
    spec = json.loads(json.dumps(specs[kind]))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    added = [("白白纸", False, False), (" \t ", False, False), ("Model", True, False), ("白白", True, False)]
    for n, (text, normalized, special) in enumerate(
        [*added, ("<think>", False, False), ("<|im|>", False, True)]
    ):
        assert text not in spec["model"]["vocab"]
        token = {"id": 1600 + n, "content": text, "normalized": normalized, "special": special, **flags}
        spec["added_tokens"].append(token)
    ours, theirs = both(spec)
    middle = ["白白纸", " \t  ", "白白", "Model", "<|im|>", "白白白纸"] * 100
    assert not differing(
        ours, theirs, [a + b + c for a, b, c in zip(LINES, middle, LINES[600:])] + middle[:6]
    )
    assert {1600, 1601} <= set(ours.encode("白白纸 \t 白")) and ours.decode([1600, 1602]).endswith("Model")
    assert not {1604, 1605} & set(ours.encode("<think>hm</think><|im|>"))
    assert ours.decode(ours.encode("x<think>")) == ("x<think>" if kind != "gpt2-prefix" else " x<think>")


@pytest.mark.parametrize("behavior, invert", [("isolated", False), ("isolated", True), ("removed", True)])
def test_split_equals_that_of_tokenizers(behavior, invert):
    for pattern in (hf.Regex(r"\d"), "-", hf.Regex(r"\s+|白|(?=a)"), hf.Regex(r"(a|白)+|(\d)(-)?")):
        theirs = P.Split(pattern, behavior, invert)
        stage = tok.splitting(json.loads(theirs.__getstate__()), "memory")
        pick = random.Random(2)
        for _ in range(300):
            text = "".join(pick.choices("ab12--  白纸", k=pick.randrange(12)))
            assert stage(text, True) == [piece for piece, _ in theirs.pre_tokenize_str(text)], text


def test_text_never_makes_a_special_token_even_by_merging(specs):
    spec = json.loads(json.dumps(specs["gpt2"]))
    vocab = {i: text for text, i in spec["model"]["vocab"].items()}
    special = next(i for i in range(300, 1600) if vocab[i].isascii() and vocab[i].isalpha())
    text = vocab[special]
    assert special in both(spec)[0].encode(text)
    spec["added_tokens"].append({"id": special, "content": text, "special": True, "normalized": False})
    ours = tok.from_files({"tokenizer.json": json.dumps(spec).encode()}, "memory")
    assert special in ours.special_ids and special not in ours.encode(text)
    assert ours.decode(ours.encode(text)) == text


def test_a_folder_is_loaded_with_its_config(specs, tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind, bos in (("deepseek", True), ("xverse", False)):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(specs[kind]))
        config = {
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "pad_token": "</s>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": bos}))
        t = load_tokenizer(folder)
        assert t.decode([t.bos_id, t.eos_id, t.pad_id], skip_special=False) == "<s></s></s>"
        assert t.add_bos == bos and t.encode_document("白纸") == [t.bos_id] * bos + t.encode("白纸") + [
            t.eos_id
        ]
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        assert theirs.encode("白纸 a  2", add_special_tokens=False) == t.encode("白纸 a  2")
        (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
        with pytest.raises(ValueError, match=r"special token '\[PAD\]' has no id"):
            load_tokenizer(folder)


def test_bos_is_put_first_where_only_the_post_processor_says_so(specs):
    spec = json.loads(json.dumps(specs["llama"]))
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single}
    config = json.dumps({"bos_token": "<s>"}).encode()
    for post, bos in (
        (None, False),
        (template, True),
        ({"type": "Sequence", "processors": [template]}, True),
    ):
        spec["post_processor"] = post
        files = {"tokenizer.json": json.dumps(spec).encode(), "tokenizer_config.json": config}
        assert tok.from_files(files, "memory").add_bos == bos


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "BertNormalizer"}}, "normalizer 'BertNormalizer' is not supported"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "pre_tokenizer 'UnicodeScripts' is not supported"),
        ({"decoder": {"type": "WordPiece"}}, "decoder 'WordPiece' is not supported"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model 'WordPiece' is not supported; only BPE without options"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}, "merge 'a' 'b' is not of the vocabulary"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [], "dropout": 0.1}}, "dropout of the model is not supported"),
        ({"model": None}, "not a tokenizer.json, or a damaged one"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}}, "cannot be read"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "No"}}, "behavior 'No'"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}, {"type": "Digits"}]}}, "after ByteLevel"),
    ],
)  # fmt: skip
def test_what_is_unknown_is_named(specs, tmp_path, change, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps({**specs["gpt2"], **change}))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    for data in ("", "{", "[]", "null", '{"model": []}', '{"model": {"vocab": [], "merges": []}}'):
        (tmp_path / "tokenizer.json").write_text(data)
        with pytest.raises(ValueError, match=f"{tmp_path}.*not a tokenizer.json"):
            load_tokenizer(tmp_path)
