"""Rows of conversations and preferences: every form is read, written and read back; errors say where."""

import gzip
import itertools
import json

import pytest
from conftest import run_script

import chat
import data
from chat import as_messages, read_rows, to_form

ALPACA = [
    {
        "instruction": "【媒宣领域任务】以下面标题写一个50字的短文",
        "input": "'智能展览系统：…'",
        "output": "展览。",
        "check": "展",
    },
    {"instruction": "写\n", "input": "", "output": " 好 \n"},
    {
        "instruction": "再写",
        "input": "二\n三",
        "output": "丙",
        "system": "你是诗人",
        "history": [["q1", "a1"], ["q2", "a2"]],
    },
    {"instruction": "a", "input": "a", "output": "a", "kind": "sum", "id": 7, "tags": ["x"], "none": None},
]
INSTRUCTION = [
    {"instruction": "问", "response": "答", "source": "x"},
    {"instruction": "q", "input": "i", "response": "a"},
]
YAYI = [
    {
        "system": "",
        "conversations": [{"from": "human", "value": "你好"}, {"from": "yayi", "value": "好"}] * 2,
        "check": "好",
    },
    {"system": "厨师", "conversations": [{"from": "human", "value": "q"}, {"from": "yayi", "value": "a"}]},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "天气？"},
            {"from": "gpt", "value": "查"},
            {"from": "observation", "value": "晴"},
            {"from": "gpt", "value": "晴。"},
        ],
        "id": "x1",
    }
]
MESSAGES = [
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q\ni"},
            {"role": "assistant", "content": "a"},
        ],
        "check": "a",
        "kind": "fact",
    },
    {
        "messages": [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd")],
    },
]
PROMPT = [{"prompt": "q", "chosen": "好", "rejected": "坏", "kind": "value"}]
CONVERSATIONS = [
    {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "坏"},
        "check": "好",
    },
    {
        "conversations": [{"from": f, "value": v} for f, v in zip(("human", "gpt", "human"), "abc")],
        "chosen": {"from": "gpt", "value": "d"},
        "rejected": {"from": "gpt", "value": "e"},
    },
]
FILES = {  # the form, and rows as it writes them
    "alpaca": ALPACA,
    "instruction": INSTRUCTION,
    "yayi": YAYI,
    "sharegpt": SHAREGPT,
    "messages": MESSAGES,
    "prompt": PROMPT,
    "conversations": CONVERSATIONS,
}


def write(path, rows):
    """A .json array or .jsonl lines."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read(path):
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def convert(paths, to, out):
    data.convert(data.ConvertConfig(files=tuple(map(str, paths)), to=to, out=str(out)))
    return read(out)


# --- 1. forms -----------------------------------------------------------------------------------------------


def test_every_form_becomes_the_same_messages():
    say = lambda *pairs: [{"role": role, "content": content} for role, content in pairs]
    one = say(("user", "q\ni"), ("assistant", "a"))
    for row in (
        {"instruction": "q", "input": "i", "output": "a"},
        {"instruction": "q", "input": "i", "response": "a"},
        {"instruction": "q\ni", "output": "a"},
        {"conversations": [{"from": "human", "value": "q\ni"}, {"from": "gpt", "value": "a"}]},
        {"conversations": [{"from": "human", "value": "q\ni"}, {"from": "yayi", "value": "a"}], "system": ""},
        {"conversations": [{"role": "user", "content": "q\ni"}, {"role": "assistant", "content": "a"}]},
        {"messages": [*one[:1], {"role": "assistant", "content": "a", "tool_calls": None}]},
    ):
        found = as_messages(row)
        assert found["messages"] == one
        assert found.keys() - {"input"} == {"messages"} and found.get("input", "i") == "i"
    pair = {"messages": one[:1], "chosen": "好", "rejected": "坏"}
    reply = lambda text: {"from": "gpt", "value": text}
    for row in (
        {"prompt": "q\ni", "chosen": "好", "rejected": "坏"},
        {"prompt": one[:1], "chosen": "好", "rejected": {"role": "assistant", "content": "坏"}},
        {
            "conversations": [{"from": "human", "value": "q\ni"}],
            "chosen": reply("好"),
            "rejected": reply("坏"),
        },
        {"instruction": "q\ni", "chosen": "好", "rejected": "坏"},
        pair,
    ):
        assert as_messages(row, "pairs") == pair


def test_history_and_system_of_alpaca_are_earlier_turns():
    roles = [(m["role"], m["content"]) for m in as_messages(ALPACA[2])["messages"]]
    assert roles == [
        ("system", "你是诗人"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "再写\n二\n三"),
        ("assistant", "丙"),
    ]


def test_labels_say_which_answer_is_better_and_undecided_pairs_are_left_out(tmp_path, capsys):
    labels = ["A3", "A2", "A1", "A0", "B0", "B1", "B2", "B3"]
    rows = [{"prompt": "q", "response_a": "a", "response_b": "b", "label": label} for label in labels]
    found = read_rows([write(tmp_path / "a.jsonl", rows)], "pairs")
    assert [(row["chosen"], row["rejected"], row["label"]) for row in found] == [
        (*("ab" if label[0] == "A" else "ba"), label) for label in labels if label[1] != "0"
    ]
    assert "2 pairs labelled A0 or B0 left out" in capsys.readouterr().err
    assert [row["where"] for row in found][3] == f"{tmp_path / 'a.jsonl'}:6"
    with pytest.raises(ValueError, match=r"b.jsonl:1: label 'C1'; expected A3, A2"):
        read_rows([write(tmp_path / "b.jsonl", [rows[0] | {"label": "C1"}])], "pairs")


def test_questions_need_no_reply_and_may_have_one():
    asked = [{"role": "user", "content": "q"}]
    for row in ({"messages": asked}, {"prompt": "q"}, {"instruction": "q", "input": "", "output": ""}):
        assert as_messages(row | {"check": "a"}, "questions") == {"messages": asked, "check": "a"}
    answered = as_messages({"instruction": "q", "output": "a"}, "questions")["messages"]
    assert answered == [*asked, {"role": "assistant", "content": "a"}]


# --- 2. round trips -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_form_comes_back_as_it_was_through_messages(tmp_path, form, suffix):
    other = {".json": ".jsonl", ".jsonl": ".json"}[suffix]
    file, middle = write(tmp_path / f"in{suffix}", FILES[form]), tmp_path / f"middle{other}"
    rows = convert([file], "messages", middle)
    assert all("messages" in row and "where" not in row for row in rows)
    assert convert([middle], form, tmp_path / f"back{suffix}") == FILES[form]


@pytest.mark.parametrize(
    ("start", "through"),
    [(a, b) for a, b in itertools.permutations(chat.FORMS["chat"], 2)]
    + [(a, b) for a, b in itertools.permutations(chat.FORMS["pairs"], 2)],
)
def test_a_row_comes_back_through_every_other_form(start, through):
    which = "pairs" if {start, through} & {"prompt", "conversations"} else "chat"
    rows = FILES["conversations" if which == "pairs" else start] + PROMPT * (which == "pairs")
    tried = 0
    for row in rows:
        try:
            row = to_form(as_messages(row, which), start)
            other = to_form(as_messages(row, which), through)
        except ValueError as error:
            assert "has no place for" in str(error)  # never lost in silence
            continue
        tried += 1
        assert to_form(as_messages(other, which), start) == row
    assert tried or "sharegpt" in (start, through)


def test_yayi_instructions_come_back_from_conversations(tmp_path):
    """data_convert.py --mode inst2chat, then chat2inst: theirs loses `input` and appends to the old file."""
    rows = [row for row in ALPACA if "history" not in row]
    file = write(tmp_path / "inst.jsonl", rows)
    talk = convert([file], "yayi", tmp_path / "chat.json")
    assert talk[0]["conversations"][0] == {
        "from": "human",
        "value": rows[0]["instruction"] + "\n" + rows[0]["input"],
    }
    assert all(list(row)[:2] == ["system", "conversations"] for row in talk)
    for _ in range(2):
        assert convert([tmp_path / "chat.json"], "alpaca", tmp_path / "back.jsonl") == rows

    def public_chat_to_inst(path, out):
        for line in json.loads(path.read_text("utf-8")):
            first, second = (turn["value"].strip() for turn in line["conversations"][:2])
            with open(out, "a+", encoding="utf-8") as file:
                file.write(json.dumps({"instruction": first, "input": "", "output": second}) + "\n")

    for _ in range(2):
        public_chat_to_inst(tmp_path / "chat.json", tmp_path / "public.jsonl")
    assert (
        len(read(tmp_path / "public.jsonl")) == 2 * len(rows)
        and read(tmp_path / "public.jsonl")[0]["input"] == ""
    )


def test_several_files_are_merged_in_order(tmp_path):
    a, b = write(tmp_path / "a.json", YAYI), write(tmp_path / "b.jsonl", ALPACA[:2])
    merged = convert([b, a], "messages", tmp_path / "out.jsonl")
    assert [row["messages"][-1]["content"] for row in merged] == ["展览。", " 好 \n", "好", "a"]
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "2.jsonl", ALPACA[:1])
    write(folder / "1.json", YAYI[1:])
    assert [row["where"] for row in read_rows([folder])] == [f"{folder}/1.json: row 1", f"{folder}/2.jsonl:1"]


def test_what_a_form_cannot_hold_is_an_error_with_file_and_line_and_nothing_is_written(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    file = write(tmp_path / "a.jsonl", [*YAYI[1:], *SHAREGPT])
    for form in ("alpaca", "instruction", "yayi"):
        with pytest.raises(ValueError, match=rf"a.jsonl:2: {form}: has no place for a tool's result"):
            convert([file], form, out)
    file = write(tmp_path / "b.json", CONVERSATIONS)
    with pytest.raises(ValueError, match=r"b.json: row 1: prompt: has no place for a system text"):
        convert([file], "prompt", out)
    with pytest.raises(
        ValueError, match=r"b.json: row 1: preferences have no form 'yayi'; there are messages, al"
    ):
        convert([file], "yayi", out)
    with pytest.raises(
        ValueError, match=r"a.jsonl:1: conversations have no form 'prompt'; there are messages"
    ):
        convert([tmp_path / "a.jsonl"], "prompt", out)
    file = write(tmp_path / "c.jsonl", [MESSAGES[1] | {"output": "x"}])
    with pytest.raises(ValueError, match=r"c.jsonl:1: the key 'output' of this row means something else"):
        convert([file], "alpaca", out)
    file = write(tmp_path / "d.jsonl", [MESSAGES[1] | {"input": "x"}])
    with pytest.raises(ValueError, match=r'd.jsonl:1: "input" is not the end of the question'):
        convert([file], "alpaca", out)
    with pytest.raises(ValueError, match="a.jsonl holds conversations; .*b.json holds preferences: take one"):
        convert([tmp_path / "b.json", tmp_path / "a.jsonl"], "messages", out)
    with pytest.raises(ValueError, match="expected a name that ends with .json or .jsonl"):
        convert([tmp_path / "a.jsonl"], "messages", tmp_path / "out.txt")
    assert out.read_text() == "old" and not list(tmp_path.glob("*.tmp"))


# --- 3. files and errors ------------------------------------------------------------------------------------


def test_arrays_lines_gzip_and_byte_order_marks_are_read(tmp_path):
    lines = "".join(json.dumps(row) + "\n\n" for row in ALPACA)  # empty lines between
    array = json.dumps(ALPACA, indent=2)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf \n" + array.encode())
    (tmp_path / "b.json").write_text(lines)  # as YaYi names its lines
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    expected = [as_messages(row) for row in ALPACA]
    for name in ("a.json", "b.json", "c.jsonl.gz", "d.jsonl"):
        rows = read_rows([tmp_path / name])
        wheres = [row.pop("where") for row in rows]
        assert rows == expected
        place = ": row 2" if name == "a.json" else ":3"
        assert wheres[1] == f"{tmp_path / name}{place}"


def test_broken_files_say_where(tmp_path):
    good = json.dumps(ALPACA[0])
    for name, content, message in [
        ("a.json", b'[\n{"instruction": 1,}\n]', r"a.json:2: not JSON"),
        ("b.json", b"[1]", r"b.json: row 1: expected a JSON object, found int"),
        ("c.json", b'["\n\n\xff"]', r"c.json:3: not UTF-8 \(byte 0xff\)"),
        ("d.jsonl", f"{good}\n[]\n".encode(), r"d.jsonl:2: expected a JSON object, found list"),
        ("e.jsonl", f"{good}\n{{\n".encode(), r"e.jsonl:2: not JSON"),
        ("f.jsonl", b"\n", r"f.jsonl: no rows"),
        ("g.json", b"[]", r"g.json: no rows"),
        ("h.csv", b"", r"h.csv: unknown kind of file; expected one of .json, .jsonl"),
        ("i.json", b"[" * 10**5, r"i.json: JSON that cannot be read"),
        ("j.jsonl", b'{"instruction": "\\ud800", "output": "a"}', r"j.jsonl:1: a lone surrogate"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_rows([tmp_path / name])
    with pytest.raises(ValueError, match="no such file or folder"):
        read_rows([tmp_path / "none.json"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no .json, .jsonl"):
        read_rows([tmp_path / "empty"])


say = lambda *roles: [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("row", "which", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            "chat",
            "no known form of a conversation: keys 'question', 'answer'; exp",
        ),
        (
            {"text": "t"},
            "chat",
            "expected messages | conversations | prompt with completion | instruction with output or response",
        ),
        ({"instruction": "q"}, "chat", "keys 'instruction'; expected messages"),
        ({}, "chat", "keys none"),
        ({"instruction": "", "output": "a"}, "chat", '"instruction" is empty'),
        ({"instruction": " \n", "input": "x", "output": "a"}, "chat", '"instruction" is empty'),
        ({"instruction": "q", "output": ""}, "chat", '"output" is empty'),
        ({"instruction": "q", "response": " "}, "chat", '"response" is empty'),
        ({"instruction": "q", "output": 5}, "chat", '"output" is int, expected a string'),
        ({"instruction": "q", "output": "a", "history": [["q"]]}, "chat", '"history" 1: expected'),
        ({"messages": say("user")}, "chat", "the last message is of user, expected assistant"),
        (
            {"messages": say("user", "user", "assistant")},
            "chat",
            "message 2: user after user, expected assistant",
        ),
        ({"messages": say("assistant")}, "chat", "message 1: assistant, expected user"),
        (
            {"messages": say("user", "assistant", "system")},
            "chat",
            "message 3: a system message stands first",
        ),
        (
            {"messages": say("user", "robot")},
            "chat",
            "message 2: unknown role 'robot'; expected one of human, gpt",
        ),
        ({"messages": "x"}, "chat", '"messages" is str, expected a list'),
        ({"messages": []}, "chat", "found none"),
        ({"messages": [{"role": "user"}]}, "chat", "message 1: expected {"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "chat", "message 1: content is list"),
        (
            {"messages": [{"role": "user", "content": "x", "weight": 0}]},
            "chat",
            "message 1: 'weight' would be lost",
        ),
        ({"messages": [{"role": "user", "content": " "}, *say("assistant")]}, "chat", "message 1: empty"),
        (
            {"messages": say("system", "user", "assistant"), "system": "s"},
            "chat",
            'a "system" key and a system mess',
        ),
        ({"messages": say("user", "assistant"), "where": 1}, "chat", '"where" is a key that we use'),
        (PROMPT[0], "chat", "a preference row (chosen, rejected), expected a conversation"),
        (
            MESSAGES[0],
            "pairs",
            "no known form of a preference: keys 'messages', 'check', 'kind'; expected prompt",
        ),
        (
            {"chosen": "a", "rejected": "b"},
            "pairs",
            "no known form of a preference's prompt: keys 'chosen', 'reject",
        ),
        (PROMPT[0] | {"chosen": ""}, "pairs", '"chosen" is empty, expected a reply'),
        (PROMPT[0] | {"rejected": 3}, "pairs", '"rejected" is int, expected a reply'),
        (
            PROMPT[0] | {"rejected": {"from": "human", "value": "x"}},
            "pairs",
            '"rejected" ends with a message of user',
        ),
        (PROMPT[0] | {"prompt": ""}, "pairs", "message 1: empty"),
        (
            PROMPT[0] | {"prompt": say("user", "assistant")},
            "pairs",
            "the last message is of assistant, expected user",
        ),
    ],
)
def test_a_bad_row_says_file_line_and_what_was_expected(tmp_path, row, which, message):
    good = PROMPT[0] if which == "pairs" else ALPACA[0]
    for name, place in (("a.jsonl", ":2: "), ("a.json", ": row 2: ")):
        file = write(tmp_path / name, [good, row])
        with pytest.raises(ValueError) as error:
            read_rows([file], which)
        assert str(error.value).startswith(f"{file}{place}") and message in str(error.value)


# --- 4. commands --------------------------------------------------------------------------------------------


def test_check_tells_documents_conversations_and_preferences_apart(tmp_path, capsys):
    files = [
        write(tmp_path / "a.json", ALPACA[:2]),
        write(tmp_path / "b.jsonl", SHAREGPT),
        write(tmp_path / "c.jsonl", CONVERSATIONS),
        write(tmp_path / "d.jsonl", [{"text": "白纸"}, {"text": "ab"}]),
    ]
    data.check(data.CheckConfig(files=tuple(map(str, files))))
    chars = sum(len(m["content"]) for row in ALPACA[:2] + SHAREGPT for m in as_messages(row)["messages"])
    assert capsys.readouterr().out.splitlines() == [
        f"3 conversations, {chars} characters, no bad line; messages: 1 system, 3 user, 4 assistant, 1 exec",
        "2 preferences, 9 characters, no bad line; messages: 1 system, 3 user, 1 assistant",
        "2 documents, 4 characters, no bad line",
    ]
    write(files[1], [*SHAREGPT, {"conversations": []}])
    with pytest.raises(ValueError, match=r"b.jsonl:2: expected a list of messages, found none"):
        data.check(data.CheckConfig(files=tuple(map(str, files))))
    with pytest.raises(ValueError, match=r"e.json: row 1: no known form of a conversation: keys 'x'"):
        data.check(data.CheckConfig(files=(str(write(tmp_path / "e.json", [{"x": 1}])),)))


def test_convert_runs_as_a_command_twice_with_the_same_bytes(tmp_path):
    file, out = write(tmp_path / "a.json", YAYI), tmp_path / "new" / "out.jsonl"
    for _ in range(2):
        done = run_script("data.py", "convert", file, file, "--to", "alpaca", "--out", out)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out}: 4 conversations as alpaca\n"
        assert [row["output"] for row in read(out)] == ["好", "a"] * 2
    bad = write(tmp_path / "b.jsonl", [{"instruction": ""}])
    done = run_script("data.py", "convert", bad, "--to", "messages", "--out", out)
    assert done.returncode == 2 and f"error: {bad}:1: " in done.stderr
    assert len(read(out)) == 4
