"""Conversations: the text and the ids of every template, what is trained, and others' bugs.

Golden strings are those that the systems themselves document; a bug of a public implementation is written here in
a few lines, and shown to differ from ours.
"""

import itertools
import json
import random
import re
import sys

import pytest
import sentencepiece
from conftest import run_script
from test_tokenizer import DOCS

import chat
import tokenizer as tok
from chat import BOS, EOS, TEMPLATES, spans
from tokenizer import load_tokenizer

SPECIALS = ["<|System|>", "<|Human|>", "<|YaYi|>", "<|End|>", "<|im_start|>", "<|im_end|>"]
INTRO = (
    "A chat between a human and an AI assistant named YaYi.\n"
    "YaYi is a helpful and harmless language model developed by Beijing Wenge Technology Co.,Ltd."
)
XUANYUAN = (
    "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，会对人类提出的问题给出有帮助、高质量、"
    "详细和礼貌的回答，并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问题和指示。\n"
)
every_template = pytest.mark.parametrize("name", TEMPLATES)


def talk(*contents, system=None):
    """Messages of user and assistant in turn."""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents)]
    return [{"role": "system", "content": system}] * (system is not None) + messages


def joined(parts):
    """The text of spans, bos and eos as ours are written."""
    own = {BOS: "<s>", EOS: "</s>"}
    return "".join(own.get(s.text, s.text) if s.special else s.text for s in parts)


def written(name, messages, open_reply=False, add_bos=False):
    return joined(spans(name, messages, open_reply, add_bos))


def trained(name, messages):
    """The text of every trained stretch."""
    runs = itertools.groupby(spans(name, messages), key=lambda s: s.trained)
    return [joined(run) for is_trained, run in runs if is_trained]


# --- 1. tokenizers of each kind -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "docs.jsonl"
    lines = [*DOCS, "\n".join(["Human: q Assistant: a", "[INST] <<SYS>> ##提问: ##回答: 问：答："] * 20)]
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def ours(data):
    """Our BPE, which has no dummy prefix, with every special token of the table."""
    out = data.parent / "ours"
    tok.train(tok.Train([str(data)], str(out), 700, specials=",".join(SPECIALS)))
    return load_tokenizer(out)


@pytest.fixture(scope="module")
def byte_level(data):
    pytest.importorskip("regex")
    out = data.parent / "bytes"
    tok.train(tok.Train([str(data)], str(out), 700, kind="bytebpe", specials=",".join(SPECIALS)))
    return load_tokenizer(out)


@pytest.fixture(scope="module")
def llama_folder(data):
    """SentencePiece as LLaMA has it: a space is put in front of every text."""
    folder = data.parent / "llama"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(
            [line for doc in DOCS for line in doc.splitlines()] + ["Human: [INST] Assistant:"] * 9
        ),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=SPECIALS,
        minloglevel=2,
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder):
    return load_tokenizer(llama_folder)


@pytest.fixture(scope="module")
def xverse(data):
    """A tokenizer.json as XVERSE's: Metaspace in front of every text, digits and punctuation apart, no bos."""
    hf = pytest.importorskip("tokenizers")
    P, D = hf.pre_tokenizers, hf.decoders
    spec = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", byte_fallback=True))
    spec.pre_tokenizer = P.Sequence([P.Metaspace(), P.Digits(individual_digits=True), P.Punctuation()])
    spec.decoder = D.Sequence([D.ByteFallback(), D.Metaspace()])
    named = ["<unk>", "<pad>", "<|startoftext|>", "<|endoftext|>"]
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = hf.trainers.BpeTrainer(vocab_size=800, special_tokens=named + bytes_, show_progress=False)
    spec.train_from_iterator(DOCS + ["Human: q Assistant: user system"] * 50, trainer)
    out = json.loads(spec.to_str())
    out["added_tokens"] = [t for t in out["added_tokens"] if t["content"] in named]
    folder = data.parent / "xverse"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(out))
    config = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<unk>"}))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def every_tokenizer(ours, byte_level, llama):
    return {"ours": ours, "byte-level": byte_level, "llama": llama}


# --- 2. golden strings --------------------------------------------------------------------------------------

GOLDEN = {
    "plain": "问：q1\n答：a1</s>问：q2\n答：",
    "phi2-chinese": "##提问:\nq1\n##回答:\na1</s>##提问:\nq2\n##回答:",
    "xverse": "Human: q1\n\nAssistant: a1</s>Human: q2\n\nAssistant: ",
    "xverse-2": "user: q1\nassistant: a1</s>user: q2\nassistant: ",
    "xuanyuan-6b": " Human: q1 Assistant: a1</s>Human: q2 Assistant:",
    "xuanyuan-13b": XUANYUAN + " Human: q1 Assistant: a1</s>Human: q2 Assistant:",
    "xuanyuan-176b": "<s>Human: q1\n\nAssistant: a1</s>Human: q2\n\nAssistant: ",
    "yayi": f"<|System|>:\n{INTRO}\n\n<|Human|>:\nq1\n\n<|YaYi|>:\na1\n\n<|End|><|Human|>:\nq2\n\n<|YaYi|>",
    "yayi-multi": f"<|System|>:\n{INTRO}\n\n<|Human|>:\nq1\n\n<|YaYi|>:\na1\n\n<|End|><|Human|>:\nq2\n\n<|YaYi|>:\n",
    "llama-2": "<s>[INST] q1 [/INST] a1 </s><s>[INST] q2 [/INST]",
    "chatml": "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
    "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n",
}
WITH_SYSTEM = {
    "plain": "s\n问：q",
    "phi2-chinese": "s\n##提问:\nq",
    "xverse": "sHuman: q",
    "xverse-2": "system: s\nuser: q",
    "xuanyuan-6b": "s\n Human: q",
    "xuanyuan-13b": "s\n Human: q",
    "xuanyuan-176b": "<s>s\nHuman: q",
    "yayi": "<|System|>:\ns\n\n<|Human|>:\nq",
    "yayi-multi": "<|System|>:\ns\n\n<|Human|>:\nq",
    "llama-2": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq",
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq",
}
REPLIES = {  # what is trained of the reply "a"
    "plain": "a</s>",
    "phi2-chinese": "\na</s>",
    "xverse": "a</s>",
    "xverse-2": "a</s>",
    "xuanyuan-6b": " a</s>",
    "xuanyuan-13b": " a</s>",
    "xuanyuan-176b": "a</s>",
    "yayi": ":\na\n\n<|End|>",
    "yayi-multi": "a\n\n<|End|>",
    "llama-2": " a </s>",
    "chatml": "a<|im_end|>",
}


@every_template
def test_a_conversation_is_written_as_its_system_documents(name):
    assert written(name, talk("q1", "a1", "q2"), open_reply=True) == GOLDEN[name]
    assert written(name, talk("q", system="s"), open_reply=True).startswith(WITH_SYSTEM[name])
    with_bos = written(name, talk("q1", "a1", "q2"), open_reply=True, add_bos=True)
    never, own = ("xverse", "xverse-2"), ("llama-2", "xuanyuan-176b")  # no bos; one of the template's own
    assert with_bos == ("" if name in never + own else "<s>") + GOLDEN[name]


@every_template
def test_every_reply_with_its_end_is_trained_and_nothing_else(name):
    assert trained(name, talk("q1", "a", "q2", "a", system="s")) == [REPLIES[name]] * 2
    assert not any(s.trained for s in spans(name, talk("q1"), open_reply=True))
    assert spans(name, talk("q1", "a"))[-1 - (name == "chatml")].text == TEMPLATES[name].end


def test_yayi_with_an_input_is_one_user_message():
    # YaYi's PROMPT_WITH_INPUT_FORMAT, filled
    expected = f"<|System|>:\n{INTRO}\n\n<|Human|>:\n写短文\n智能展览\n\n<|YaYi|>:\n好\n\n<|End|>"
    row = chat.as_messages({"instruction": "写短文", "input": "智能展览", "output": "好"})
    assert written("yayi", row["messages"]) == expected


def test_an_empty_system_text_means_the_default_one():
    assert written("yayi-multi", talk("q", "a", system="")) == written("yayi-multi", talk("q", "a"))
    assert written("xuanyuan-13b", talk("q", "a", system="")).startswith(XUANYUAN)


def test_exec_is_a_turn_of_xverse_2_only():
    call = [*talk("天气？", "查询"), {"role": "exec", "content": "晴"}]
    text = "user: 天气？\nassistant: 查询</s>exec: 晴\nassistant: "
    assert written("xverse-2", call, open_reply=True) == text
    with pytest.raises(
        ValueError, match="xverse: message 3: unknown role 'exec'; expected one of system, user, as"
    ):
        spans("xverse", call, open_reply=True)


@every_template
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "found none"),
        ([{"role": "tool", "content": "q"}], "message 1: unknown role 'tool'"),
        ([{"role": "user", "value": "q"}], "message 1: expected"),
        ([{"role": "user", "content": None}], "message 1: content is NoneType"),
        ([*talk("q", "a"), {"role": "system", "content": "s"}], "message 3: a system message stands first"),
        (talk("q") + talk("q"), "message 2: user after user, expected assistant"),
        ([*talk("q", "a"), {"role": "assistant", "content": "b"}], "message 3: assistant after assistant"),
        ([{"role": "assistant", "content": "a"}], "message 1: assistant, expected user"),
        ([{"role": "system", "content": "s"}], "the last message is of system"),
        (talk("q", " \n"), "message 2: an empty reply"),
    ],
)
def test_what_is_no_conversation_is_refused_by_message(name, messages, message):
    with pytest.raises(ValueError, match=f"template {name}: .*{message}"):
        spans(name, messages)


def test_a_reply_is_opened_only_after_a_question():
    with pytest.raises(ValueError, match="the last message is of assistant, expected user or exec"):
        spans("plain", talk("q", "a"), open_reply=True)
    with pytest.raises(ValueError, match="no chat template 'yai'; there are plain, "):
        spans("yai", talk("q"))


def test_contents_that_look_like_placeholders_stay_what_they_are():
    odd = "{}{system}{bos}{eos}{0}%s{{}}"
    for name in TEMPLATES:
        parts = spans(name, talk(odd, odd, odd, odd, system=odd))
        assert joined(parts).count(odd) == 5
        assert {s.text for s in parts if s.special} <= {BOS, EOS, *TEMPLATES[name].specials}


@every_template
def test_the_content_is_taken_out_of_what_is_generated(name):
    template = TEMPLATES[name]
    for content in ("a", " a ", "一\n\n二", ":\n"):
        text = "".join(s.text for s in spans(template, talk("q", content)) if s.trained and not s.special)
        assert template.content(text) == content
    assert template.content(REPLIES[name].split("a")[0] + "cut") == "cut"  # stopped by its length


# --- 3. ids -------------------------------------------------------------------------------------------------


def some_talk(rng):
    """A conversation of odd texts."""
    bits = [
        "白纸",
        " a",
        "b ",
        "\n",
        "\n\n",
        ":\n",
        "\n你",
        "1",
        "。",
        "<|YaYi|>",
        "[EOS]",
        "</s>",
        "<s>",
        "x\ty",
        "😀",
    ]
    text = lambda: "".join(rng.choices(bits, k=rng.randrange(1, 7)))
    turns = [text() for _ in range(2 * rng.randrange(1, 4))]
    turns[1::2] = [t if t.strip() else "a" for t in turns[1::2]]
    return talk(*turns, system=rng.choice([None, "", text()]))


@every_template
def test_the_open_prompt_is_an_exact_prefix_of_the_trained_ids(every_tokenizer, name):
    rng = random.Random(0)
    for tokenizer, _ in itertools.product(every_tokenizer.values(), range(40)):
        messages = some_talk(rng)
        replies = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        for n in replies:
            ids, mask = tokenizer.encode_chat(messages[: n + 1], template=name)
            prompt, given = tokenizer.encode_chat(messages[:n], open_reply=True, template=name)
            assert (ids[: len(prompt)], mask[: len(prompt)]) == (prompt, given)
            assert given[-1] == 0 and mask[len(prompt)] == 1  # the very next token is the first to learn
            assert [i for i, m in zip(ids, mask) if m][-1:] == tokenizer.end_ids(name)


@every_template
def test_decoding_the_ids_gives_the_text_of_the_spans(ours, byte_level, name):
    rng = random.Random(1)
    for tokenizer, _ in itertools.product((ours, byte_level), range(40)):
        messages = some_talk(rng)
        ids, mask = tokenizer.encode_chat(messages, template=name)
        parts = spans(name, messages, add_bos=tokenizer.add_bos)
        assert tokenizer.decode(ids, skip_special=False) == joined(parts)
        for is_trained in (0, 1):
            text = tokenizer.decode([i for i, m in zip(ids, mask) if m == is_trained], skip_special=False)
            assert text == joined(s for s in parts if s.trained == is_trained)


def test_prompt_and_reply_are_encoded_apart_and_each_as_one_text(ours):
    prompt, reply = "Human: 白纸\n\nAssistant: ", "今天天气"
    ids, mask = ours.encode_chat(talk("白纸", "今天天气"), template="xuanyuan-176b")
    given = [ours.bos_id, *ours.encode(prompt)]
    assert ids == [*given, *ours.encode(reply), ours.eos_id]
    assert mask == [0] * len(given) + [1] * (len(ours.encode(reply)) + 1)


def test_llama_2_ids_are_those_of_transformers_for_the_joint_text(llama, llama_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaTokenizer.from_pretrained(llama_folder)
    encode = lambda text: theirs.encode(text, add_special_tokens=False)
    for question, answer in [
        ("the model", "reads data"),
        ("白纸上写着？", "语言模型。"),
        ("a\n b", "x  y\n"),
        ("1", "2023"),
    ]:
        messages = talk(question, answer, "今天", "天气", system="学习 中文")
        first = f"[INST] <<SYS>>\n学习 中文\n<</SYS>>\n\n{question} [/INST] {answer} "
        expected = [1, *encode(first), 2, 1, *encode("[INST] 今天 [/INST] 天气 "), 2]
        assert llama.encode_chat(messages, template="llama-2")[0] == expected


def test_xuanyuan_ids_are_those_of_transformers_for_each_turn(llama, llama_folder):
    theirs = pytest.importorskip("transformers").LlamaTokenizer.from_pretrained(llama_folder)
    encode = lambda text: theirs.encode(text, add_special_tokens=False)
    # legacy=True, as XuanYuan loads it: text after </s> gets a space in front like any other
    ids, _ = llama.encode_chat(talk("白纸", "语言", "今天", "天气"), template="xuanyuan-6b")
    sp = llama.backend.processor
    first = sp.encode(" Human: 白纸 Assistant: 语言")  # transformers 5 puts no second space there
    assert ids == [1, *first, 2, *encode("Human: 今天 Assistant: 天气"), 2]


def test_text_that_goes_on_has_one_space_and_not_two(llama, ours):
    two, one = llama.encode(" 好"), llama.encode_next(" 好")
    text = lambda ids: "".join(llama.backend.texts[i] for i in ids)
    assert text(two).startswith("▁▁") and text(one).startswith("▁") and not text(one).startswith("▁▁")
    joint = llama.encode("[/INST] the model")
    assert llama.encode("[/INST]") + llama.encode_next(" the model") == joint
    assert llama.encode("[/INST]") + llama.encode(" the model") != joint
    for text in ("好", " 好", "▁", "", "\n"):  # no prefix, no difference
        assert ours.encode_next(text) == ours.encode(text)
    with pytest.raises(ValueError):
        llama.encode_next("\ud800")


@pytest.mark.parametrize("scheme", ["normalizer", "always", "first"])
def test_text_that_goes_on_is_the_rest_of_the_joint_text_under_tokenizer_json(data, tmp_path, scheme):
    hf = pytest.importorskip("tokenizers")
    spec = hf.Tokenizer(hf.models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":
        N = hf.normalizers
        spec.normalizer = N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")])
        spec.pre_tokenizer = None
    else:
        spec.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    spec.decoder = hf.decoders.Sequence(
        [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    )
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = hf.trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False, max_token_length=8
    )
    spec.train_from_iterator([line for doc in DOCS for line in doc.split()], trainer)
    out = json.loads(spec.to_str()) | {"added_tokens": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(out))
    ours, theirs = load_tokenizer(tmp_path), hf.Tokenizer.from_str(json.dumps(out))
    for before, after in [
        ("the model", " reads"),
        ("Assistant:", " 白纸"),
        ("白纸。", " a b"),
        ("a", "  b"),
        ("a\n", "白纸"),
    ]:
        ids = theirs.encode(before + after).ids
        assert ours.encode(before) + ours.encode_next(after) == ids


@pytest.mark.parametrize("name", ["xverse", "xverse-2"])
def test_xverse_encodes_its_pieces_apart_without_bos(xverse, name):
    spec = pytest.importorskip("tokenizers").Tokenizer.from_str(xverse.files["tokenizer.json"].decode())
    pieces = {  # as LLaMA-Factory cuts the first template, and XVERSE's own code the second
        "xverse": [
            "系统",
            "Human: q1\n\nAssistant: ",
            "白纸",
            3,
            "Human: 2 天\n\nAssistant: ",
            "the model",
            3,
        ]
        + ["Human: x\n\nAssistant: ", "写", 3],
        "xverse-2": [
            "system: ",
            "系统\n",
            "user: ",
            "q1\n",
            "assistant: ",
            "白纸",
            3,
            "user: ",
            "2 天\n",
            "assistant: ",
        ]
        + ["the model", 3, "user: ", "x\n", "assistant: ", "写", 3],
    }[name]
    golden = [i for piece in pieces for i in ([piece] if piece == 3 else spec.encode(piece).ids)]
    messages = talk("q1", "白纸", "2 天", "the model", "x", "写", system="系统")
    ids, mask = xverse.encode_chat(messages, template=name)
    assert ids == golden and xverse.eos_id == 3
    assert [i for i, m in zip(ids, mask) if m] == [
        i for a in ("白纸", "the model", "写") for i in [*spec.encode(a).ids, 3]
    ]
    assert (
        spec.encode("Human: q1\n\nAssistant: 白纸").ids
        != spec.encode("Human: q1\n\nAssistant: ").ids + spec.encode("白纸").ids
    )


def test_special_tokens_stand_only_where_the_template_puts_them(every_tokenizer):
    typed = "<|YaYi|>:\n好<|End|><|Human|></s><s>[EOS]<unk><|im_end|>"
    for tokenizer, name in itertools.product(every_tokenizer.values(), TEMPLATES):
        rows = talk(typed, typed, typed, typed, system=typed), talk("q", "a", "q", "a", system="s")
        found, expected = (
            [i for i in tokenizer.encode_chat(messages, template=name)[0] if i in tokenizer.special_ids]
            for messages in rows
        )
        assert found == expected


def test_a_missing_special_token_names_all_and_the_remedy(llama, tmp_path, data):
    out = tmp_path / "small"
    tok.train(tok.Train([str(data)], str(out), 600, specials="<|Human|>"))
    small = load_tokenizer(out)
    with pytest.raises(ValueError, match=r"special token <\|System\|>, <\|YaYi\|>, <\|End\|>; do ") as error:
        small.encode_chat(talk("q", "a"), template="yayi")
    command = str(error.value)
    assert '--specials "<|System|>,<|YaYi|>,<|End|>"' in command and "python checkpoint.py resize" in command
    for call in (small.with_template, small.end_ids):
        with pytest.raises(ValueError, match="has no special token"):
            call("yayi")
    tok.extend(tok.Extend(str(out), str(tmp_path / "wide"), specials="<|System|>,<|YaYi|>,<|End|>"))
    wide = load_tokenizer(tmp_path / "wide").with_template("yayi")
    assert [wide.backend.texts[i] for i in wide.end_ids()] == ["<|End|>"]


def test_a_tokenizer_without_template_asks_for_one(ours, tmp_path):
    assert ours.template is None
    with pytest.raises(ValueError, match="give --template: plain, phi2-chinese"):
        ours.encode_chat(talk("q", "a"))
    named = ours.with_template("plain")
    assert (named.template, named.digest) == ("plain", ours.digest)
    named.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.template == "plain" and again.encode_chat(talk("q", "a")) == ours.encode_chat(
        talk("q", "a"), template="plain"
    )
    assert again.encode_chat(talk("q", "a"), template="llama-2")[0][0] == again.bos_id  # another, for once
    assert again.with_template("chatml").template == "chatml"


# --- 4. Jinja -----------------------------------------------------------------------------------------------


@every_template
def test_jinja_gives_transformers_the_same_string(ours, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    for add_bos in (True, False):
        config = json.loads(ours.files["tokenizer_config.json"]) | {
            "add_bos_token": add_bos,
            "chat_template": "stale",
        }
        files = ours.files | {"tokenizer_config.json": json.dumps(config).encode()}
        tokenizer = tok.from_files(files, "test").with_template(name)
        folder = tmp_path / str(add_bos)
        tokenizer.save(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.add_bos == add_bos
        assert b"stale" not in tokenizer.files["tokenizer_config.json"]
        for messages, open_reply in [
            (talk("q"), True),
            (talk("q1", "a1", "q2"), True),
            (talk("q", system="s"), True),
            (talk("q", system=""), True),
            (talk("q", "a"), False),
            (talk(' "q"\\n{{x}}', "a\n", "白\t纸\\", "'b'", system="{% s %}"), False),
        ]:
            string = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_reply)
            assert string == written(name, messages, open_reply, add_bos)
        with pytest.raises(Exception, match="unknown role"):
            theirs.apply_chat_template([*talk("q"), {"role": "tool", "content": "x"}], tokenize=False)


def test_jinja_of_xverse_2_knows_exec(ours, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours.with_template("xverse-2").save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    call = [*talk("天气？", "查询"), {"role": "exec", "content": "晴"}]
    string = theirs.apply_chat_template(call, tokenize=False, add_generation_prompt=True)
    assert string == written("xverse-2", call, open_reply=True)


def test_a_foreign_folder_is_recognised_by_its_jinja_and_never_runs_it(ours, tmp_path):
    named = ours.with_template("chatml")
    config = json.loads(named.files["tokenizer_config.json"])
    config.pop("baizhi_template")
    jinja = named.files["chat_template.jinja"].decode()
    other_space = jinja.replace("\n", "\n\n  ").encode()
    without = {k: v for k, v in named.files.items() if k != "chat_template.jinja"}

    def template(config, **files):
        return tok.from_files(
            without | {"tokenizer_config.json": json.dumps(config).encode()} | files, "test"
        ).template

    assert template(config, **{"chat_template.jinja": other_space}) == "chatml"
    assert template(config | {"chat_template": jinja}) == "chatml"
    assert template(config | {"chat_template": [{"name": "default", "template": jinja}]}) == "chatml"
    assert template(config | {"chat_template": "{{ messages.__class__ }}"}) is None
    assert template(config, **{"chat_template.jinja": b"\xff{% for"}) is None
    assert template(config) is None
    for name, files, message in (
        ("later", without, "no chat template 'later'"),
        ("plain", named.files, "give --template"),  # the Jinja beside it is chatml's
        (["plain"], without, "give --template"),
    ):
        stated = json.dumps({"baizhi_template": name}).encode()
        odd = tok.from_files(files | {"tokenizer_config.json": stated}, "test")
        with pytest.raises(ValueError, match=message):
            odd.encode_chat(talk("q", "a"))
        assert odd.encode("白纸")  # all but chat works


# --- 5. others' bugs ----------------------------------------------------------------------------------------
# Each is first written as the public code has it.


def test_bug_xuanyuan_puts_eos_before_the_answer_and_bos_inside_it(llama):
    """JsonDatasetSFT: tokenizer(prompt) + [eos] + tokenizer(response) + [eos]."""
    call = lambda text: [llama.bos_id, *llama.encode(text)]  # add_bos_token=True
    prompt, response = "Human: 白纸\nAssistant: ", "语言"
    theirs = [*call(prompt), llama.eos_id, *call(response), llama.eos_id]
    assert theirs.count(llama.eos_id) == theirs.count(llama.bos_id) == 2
    ids, _ = llama.encode_chat(talk("白纸", "语言"), template="xuanyuan-6b")
    assert ids[-1] == llama.eos_id and ids.count(llama.eos_id) == 1
    assert ids[0] == llama.bos_id and ids.count(llama.bos_id) == 1


def test_bug_xuanyuan_trains_on_another_prompt_than_it_asks_with(llama):
    asked = " Human: 白纸 Assistant:"  # cli_demo.py, conversation.py
    trained_on = "Human: 白纸\nAssistant: "  # llm-code/dataset.py
    ids, mask = llama.encode_chat(talk("白纸", "语言"), template="xuanyuan-6b")
    given = [i for i, m in zip(ids, mask) if not m][1:]
    assert given == llama.encode(asked) != llama.encode(trained_on)
    assert llama.encode_chat(talk("白纸"), open_reply=True, template="xuanyuan-6b")[0][1:] == given


def test_bug_xuanyuan_trains_padding_and_dolly_masks_the_end_where_pad_is_eos(llama):
    """labels += [pad] of JsonDatasetSFT; labels[labels == pad] = -100 of DataCollatorForPT. Ours uses spans."""
    ids, mask = llama.encode_chat(talk("白纸", "语言"), template="xuanyuan-6b")
    pad, context = llama.eos_id, 300
    padded = [-100 if not m else i for i, m in zip(ids, mask)] + [pad] * (context - len(ids))
    assert padded.count(pad) / (context - mask.count(0)) > 0.9  # nearly all that is learnt is eos after eos
    by_value = [-100 if i == pad else i for i in ids]
    assert by_value[-1] == -100  # and here a reply never learns to end
    assert ids[-1] == llama.eos_id and mask[-1] == 1


def public_yayi_labels(tokenizer, ids):
    """DataCollatorForCompletionOnlyLM_Multi_Rounds of YaYi's trainer_multi_rounds.py."""
    human, yayi = (tokenizer.special_id[text] for text in ("<|Human|>", "<|YaYi|>"))
    at = lambda token: [n for n, i in enumerate(ids) if i == token]
    labels = list(ids)
    labels[: at(human)[0] + 3] = [-100] * (at(human)[0] + 3)
    for start, end in zip(at(human), at(yayi)):
        labels[start : end + 3] = [-100] * (end + 3 - start)
    return labels


def test_bug_yayi_masks_three_tokens_whatever_they_are(byte_level, ours):
    """`<|YaYi|>`, `:` and `\\n` are three tokens under one vocabulary and two where `:\\n` is one."""
    messages = talk("白纸", "语言", "今天", "天气")
    for tokenizer in (byte_level, ours):
        ids, mask = tokenizer.encode_chat(messages, template="yayi-multi")
        public = [int(label != -100) for label in public_yayi_labels(tokenizer, ids)]
        answer = [*tokenizer.encode_next("语言\n\n"), tokenizer.special_id["<|End|>"]]
        start = mask.index(1)
        assert ids[start : start + len(answer)] == answer
        assert (public == mask) == (len(tokenizer.encode(":\n")) == 2)
    # a vocabulary where ":\n" is one token: the public mask loses the first token of every answer
    spec = json.loads(byte_level.files["tokenizer.json"])
    vocab = spec["model"]["vocab"]
    vocab[":Ċ"] = max(vocab.values()) + 1
    spec["model"]["merges"].insert(0, [":", "Ċ"])
    merged = tok.from_files(byte_level.files | {"tokenizer.json": json.dumps(spec).encode()}, "test")
    ids, mask = merged.encode_chat(messages, template="yayi-multi")
    public = [int(label != -100) for label in public_yayi_labels(merged, ids)]
    first = mask.index(1)
    assert len(merged.encode(":\n")) == 1 and mask[first] == 1 and public[first] == 0


def test_bug_yayi_typed_role_tokens_break_the_public_mask(ours):
    """Encoded as their tokenizer does, a typed <|YaYi|> is the token, and zip(human, yayi) pairs the wrong ones."""
    messages = talk("什么是<|YaYi|>？", "语言", "今天", "天气")
    text = written("yayi-multi", messages)
    ids = []
    for part in re.split(r"(<\|\w+\|>)", text):  # every special token in the text becomes an id
        ids += [ours.special_id[part]] if part in ours.special_id else ours.encode(part)
    yayi = ours.special_id["<|YaYi|>"]
    public = [i for i, label in zip(ids, public_yayi_labels(ours, ids)) if label != -100]
    assert (
        ids.count(yayi) == 3 and ours.special_id["<|Human|>"] in public
    )  # a question's mark would be trained
    ids, mask = ours.encode_chat(messages, template="yayi-multi")
    assert ids.count(yayi) == 2
    assert "".join(ours.decode([i for i, m in zip(ids, mask) if m]).split()) == "语言天气"


def test_bug_yayi_masks_only_up_to_the_first_reply(ours):
    """The single-turn collator takes everything after the first <|YaYi|> for the answer, questions included."""
    ids, mask = ours.encode_chat(talk("q1", "语言", "今天", "天气"), template="yayi")
    first = ids.index(ours.special_id["<|YaYi|>"]) + 1
    public = [0] * first + [1] * (len(ids) - first)
    assert sum(public) > sum(mask) and trained("yayi", talk("q1", "语言", "今天", "天气")) == [
        ":\n语言\n\n<|End|>",
        ":\n天气\n\n<|End|>",
    ]


def test_bug_yayi_readme_opens_a_reply_as_training_never_did(ours):
    """README: the prompt ends `<|YaYi|>:`, and a colon is no place where training's given part ends."""
    text = written("yayi", talk("q"), open_reply=True)
    readme = ours.encode_chat(talk("q"), open_reply=True, template="yayi")[0] + ours.encode(":")
    for name in ("yayi", "yayi-multi"):
        ids, mask = ours.encode_chat(talk("q", "语言"), template=name)
        given = ids[: mask.index(1)]
        assert ours.encode_chat(talk("q"), open_reply=True, template=name)[0] == given != readme
    assert text.endswith("<|YaYi|>")


def test_bug_phi2_chinese_dpo_ends_the_prompt_and_begins_the_answer(ours):
    """dpo data: [BOS]{prompt}[EOS] and [BOS]{chosen}[EOS], without ##提问; the template of SFT is ours for both."""
    theirs = [ours.bos_id, *ours.encode("白纸"), ours.eos_id, ours.bos_id, *ours.encode("语言"), ours.eos_id]
    ids, mask = ours.encode_chat(talk("白纸", "语言"), template="phi2-chinese")
    assert theirs.count(ours.eos_id) == 2 and ids.count(ours.eos_id) == 1 and ids.count(ours.bos_id) == 1
    assert ours.decode(ids) == "##提问:\n白纸\n##回答:\n语言"
    assert ours.decode([i for i, m in zip(ids, mask) if m], skip_special=False) == "\n语言</s>"


def test_bug_a_marker_searched_among_ids_is_not_found(llama):
    """TRL's collator looks for the ids of "\\n##回答:" in those of the text, and silently masks the row if absent."""
    ids, mask = llama.encode_chat(talk("白纸", "语言"), template="phi2-chinese")
    marker = llama.encode("##回答:")  # encoded alone it begins with ▁
    assert not any(ids[n : n + len(marker)] == marker for n in range(len(ids)))
    assert sum(mask) == len(llama.encode_next("\n语言")) + 1


# --- 6. looking ---------------------------------------------------------------------------------------------


def test_highlight_tells_what_is_trained_and_what_is_special(ours):
    messages = talk("</s>\x1b[2J", "白纸")
    ids, mask = ours.encode_chat(messages, template="plain")
    assert tok.highlight(ours, ids, mask, colour=False) == "«<s>»问：</s>\\x1b[2J\n答：⟦白纸«</s>»⟧"
    coloured = tok.highlight(ours, ids, mask, colour=True)
    assert coloured == "\x1b[7m<s>\x1b[27m问：</s>\\x1b[2J\n答：\x1b[32m白纸\x1b[7m</s>\x1b[27m\x1b[39m"


def test_highlight_keeps_every_character_of_texts_in_bytes(ours):
    ids, mask = ours.encode_chat(talk("😀{}", "𠮷{}"), template="plain")
    assert tok.highlight(ours, ids, mask, colour=False) == "«<s>»问：😀{}\n答：⟦𠮷{}«</s>»⟧"


def test_show_prints_conversations_in_brackets_where_there_is_no_terminal(ours, tmp_path):
    ours.save(tmp_path / "tok")
    rows = [
        {"instruction": "【媒宣】写", "input": "题", "output": "文"},
        {"messages": talk("q1", "a1", "q2", "a2")},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_script("tokenizer.py", "show", tmp_path / "tok", "--data", path, "--template", "xverse")
    assert done.returncode == 0, done.stderr
    assert "Human: 【媒宣】写\n题\n\nAssistant: ⟦文«</s>»⟧\n" in done.stdout
    assert "Human: q1\n\nAssistant: ⟦a1«</s>»⟧Human: q2\n\nAssistant: ⟦a2«</s>»⟧\n" in done.stdout
    assert f"--- {path}:2: " in done.stdout and "\x1b" not in done.stdout
    done = run_script("tokenizer.py", "show", tmp_path / "tok", "--data", path)
    assert done.returncode == 2 and f"{path}:1: this tokenizer says no chat template" in done.stderr


def test_colour_needs_a_terminal_and_no_color_unset(ours, monkeypatch):
    ids, mask = ours.encode_chat(talk("q", "a"), template="plain")
    assert "\x1b" not in tok.highlight(ours, ids, mask)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in tok.highlight(ours, ids, mask)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in tok.highlight(ours, ids, mask)


# --- trl's forms ----------------------------------------------------------------------------------------------


def said(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {
            "prompt": [said("user", "问")],
            "chosen": [said("assistant", "好")],
            "rejected": [said("assistant", "坏")],
        },
        {
            "chosen": [said("user", "问"), said("assistant", "好")],
            "rejected": [said("user", "问"), said("assistant", "坏")],
        },
        {
            "prompt": "问",
            "chosen": [said("user", "问"), said("assistant", "好")],
            "rejected": [said("user", "问"), said("assistant", "坏")],
        },
    ],
)
def test_preferences_in_the_forms_of_trl_are_one_pair(row):
    pair = chat.as_messages(row, "pairs")
    assert pair["messages"] == [said("user", "问")] and (pair["chosen"], pair["rejected"]) == ("好", "坏")


@pytest.mark.parametrize(
    "row, message",
    [
        (
            {
                "chosen": [said("user", "甲"), said("assistant", "好")],
                "rejected": [said("user", "乙"), said("assistant", "坏")],
            },
            "different",
        ),
        (
            {
                "prompt": "丙",
                "chosen": [said("user", "甲"), said("assistant", "好")],
                "rejected": [said("user", "甲"), said("assistant", "坏")],
            },
            "prompt",
        ),
        (
            {"prompt": "丙", "chosen": [said("user", "甲")], "rejected": [said("assistant", "坏")]},
            "expected assistant",
        ),
        ({"prompt": "丙", "chosen": [], "rejected": "坏"}, "messages that end with one"),
    ],
)
def test_pairs_that_do_not_fit_together_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        chat.as_messages(row, "pairs")


def test_prompt_and_completion_are_a_conversation():
    for completion in ("答", [said("assistant", "答")]):
        row = chat.as_messages({"prompt": "问", "completion": completion})
        assert row["messages"] == [said("user", "问"), said("assistant", "答")]
