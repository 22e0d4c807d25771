"""What a conversation is: rows of messages, and the templates that turn one into text.

A row of data is {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}; a
preference row has "chosen" and "rejected" beside messages that end with the user. Files come in many forms
(alpaca, ShareGPT, …); `read_rows` knows a form by its keys, row by row, and gives this one. Other keys stay.

A template writes messages as spans: pieces of text, and special tokens. The reply with its end is what the
model is trained on, all else is given. Where generation begins is where training's given part ends:

    <|Human|>  :⏎白纸是什么？⏎⏎  <|YaYi|>   |   :⏎一张没有字的纸。⏎⏎  <|End|>
    given: nothing to learn here            |   trained: what the model will have to write

So a prompt is always an exact prefix of the row that was trained, token for token, and the loss mask needs no
search for a marker among ids. A special token stands only where the template puts it: whatever a user types
is text (tokenizer.py encodes it so).

    python data.py check chat.jsonl                                # which form, how many rows and turns
    python data.py convert chat.json --to alpaca --out chat.jsonl
    python tokenizer.py show out/tok --data chat.jsonl --template plain       # what is trained, in colour

Sources of the templates: the code of Phi2-mini-Chinese, XuanYuan and YaYi; XVERSE as LLaMA-Factory writes it;
Llama 2 (2307.09288, and its generation.py); ChatML (OpenAI). Jinja is written for others, never run here.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common

# --- 1. templates -------------------------------------------------------------------------------------------

BOS, EOS = "{bos}", "{eos}"  # in a template: the tokenizer's own, whatever their text is
ROLES = ("system", "user", "assistant", "exec")  # exec: what a tool returned
TURNS = ROLES[1:]


class Span(NamedTuple):
    """A stretch that is encoded as one: a text, or a special token (BOS, EOS or its text).

    follows: a text that goes on from the text before it, so no space belongs in front of it (see
    Tokenizer.encode_next).
    """

    text: str
    special: bool = False
    trained: bool = False
    follows: bool = False


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written. A part is a text or a special token; {} stands for the content.

    bos: how a conversation begins: "document": as documents do under the tokenizer; "never"; "once"; "turn":
    before every user turn.
    """

    name: str
    user: tuple[str, ...]
    opener: tuple[str, ...] = ()  # what stands before a reply and is given
    reply: tuple[str, ...]  # what is trained; the last part is what ends a reply
    after: tuple[str, ...] = ()  # what stands between a reply and the next turn, given
    system: tuple[str, ...]
    system_in_user: bool = False  # the system's text stands inside the first user turn, as {system}
    default_system: str = ""
    start: tuple[str, ...] = ()  # what stands between system and first turn
    exec: tuple[str, ...] = ()  # a tool's result; empty: the template knows none
    specials: tuple[str, ...] = ()  # the parts that are special tokens, BOS and EOS aside
    bos: str = "document"
    apart: bool = False  # every part is encoded as a text of its own

    @property
    def end(self) -> str:
        """What ends a reply: EOS, or the text of a special token."""
        return self.reply[-1]

    @property
    def lead(self) -> str:
        """What the model writes before a reply's content: ":\n" for yayi, a space for llama-2."""
        return "".join(self.reply[:-1]).partition("{}")[0]

    def content(self, text: str) -> str:
        """Take the reply's content out of what the model wrote: " 你好 " -> "你好" for llama-2."""
        after = "".join(self.reply[:-1]).partition("{}")[2]
        return text.removeprefix(self.lead).removesuffix(after)


# what XuanYuan's conversation.py and YaYi's consts.py say
XUANYUAN = (
    "以下是用户和人工智能助手之间的对话。用户以Human开头，人工智能助手以Assistant开头，会对人类提出的问题给出"
    "有帮助、高质量、详细和礼貌的回答，并且总是拒绝参与与不道德、不安全、有争议、政治敏感等相关的话题、问题和指示。"
)
YAYI = (
    "A chat between a human and an AI assistant named YaYi.\n"
    "YaYi is a helpful and harmless language model developed by Beijing Wenge Technology Co.,Ltd."
)

_xuanyuan = functools.partial(
    Template,
    system=("{}\n",),
    start=(" ",),
    user=("Human: {} ",),
    opener=("Assistant:",),
    reply=(" {}", EOS),
)
_yayi = functools.partial(
    Template,
    default_system=YAYI,
    system=("<|System|>", ":\n{}\n\n"),
    user=("<|Human|>", ":\n{}\n\n"),
    specials=("<|System|>", "<|Human|>", "<|YaYi|>", "<|End|>"),
)

TEMPLATES = {
    template.name: template
    for template in (
        # Base models of ours have no special tokens but </s>. 问 and 答 are what Chinese texts write; a line
        # break, a token of its own in our vocabularies, keeps question and answer apart.
        Template(
            name="plain",
            system=("{}\n",),
            user=("问：{}\n",),
            opener=("答：",),
            reply=("{}", EOS),
        ),
        Template(
            name="phi2-chinese",
            system=("{}\n",),  # theirs has none
            user=("##提问:\n{}\n",),
            opener=("##回答:",),
            reply=("\n{}", EOS),
        ),
        Template(
            name="xverse",
            system=("{}",),
            user=("Human: {}\n\nAssistant: ",),
            reply=("{}", EOS),
            bos="never",
            apart=True,
        ),
        Template(
            name="xverse-2",
            system=("system: ", "{}\n"),
            user=("user: ", "{}\n"),
            exec=("exec: ", "{}\n"),
            opener=("assistant: ",),
            reply=("{}", EOS),
            bos="never",
            apart=True,
        ),
        _xuanyuan(name="xuanyuan-6b"),
        _xuanyuan(name="xuanyuan-13b", default_system=XUANYUAN),  # and 70B
        Template(
            name="xuanyuan-176b",
            system=("{}\n",),
            user=("Human: {}\n\n",),
            opener=("Assistant: ",),
            reply=("{}", EOS),
            bos="once",
        ),
        _yayi(name="yayi", opener=("<|YaYi|>",), reply=(":\n{}\n\n", "<|End|>")),
        _yayi(name="yayi-multi", opener=("<|YaYi|>", ":\n"), reply=("{}\n\n", "<|End|>")),
        Template(
            name="llama-2",
            system=("<<SYS>>\n{}\n<</SYS>>\n\n",),
            system_in_user=True,
            user=("[INST] {system}{} [/INST]",),
            reply=(" {} ", EOS),
            bos="turn",
        ),
        Template(
            name="chatml",
            system=("<|im_start|>", "system\n{}", "<|im_end|>", "\n"),
            user=("<|im_start|>", "user\n{}", "<|im_end|>", "\n"),
            opener=("<|im_start|>", "assistant\n"),
            reply=("{}", "<|im_end|>"),
            after=("\n",),
            specials=("<|im_start|>", "<|im_end|>"),
        ),
    )
}


def find_template(name: str | Template) -> Template:
    """Give the template of a name; ValueError lists the names."""
    if isinstance(name, Template):
        return name
    if name not in TEMPLATES:
        raise ValueError(f"no chat template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def check_messages(messages: list[dict], ends: tuple[str, ...] = TURNS, tools: bool = True) -> None:
    """Refuse what is no conversation; ValueError says which message, from 1, and why.

    `system` first or nowhere; then user and assistant in turn, a user first; exec stands where user does, but
    not first. The last one's role is in `ends`. A reply is not empty: there would be nothing to train.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of messages, found none")
    before = ""
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f'message {n}: expected {{"role": …, "content": …}}, found {message!r:.80}')
        role, content = message["role"], message["content"]
        known = ROLES if tools else ROLES[:-1]
        if role not in known:
            raise ValueError(f"message {n}: unknown role {role!r}; expected one of {', '.join(known)}")
        if not isinstance(content, str):
            raise ValueError(f"message {n}: content is {type(content).__name__}, expected a string")
        if role == "system":
            if n > 1:
                raise ValueError(f"message {n}: a system message stands first or nowhere")
            continue
        expected = {"": ("user",), "assistant": ("user", "exec")}.get(before, ("assistant",))
        if role not in expected:
            after = f" after {before}" if before else ""
            raise ValueError(f"message {n}: {role}{after}, expected {' or '.join(expected)}")
        if role == "assistant" and not content.strip():
            raise ValueError(f"message {n}: an empty reply, which nothing can be learnt from")
        before = role
    if (before or "system") not in ends:
        raise ValueError(f"the last message is of {before or 'system'}, expected {' or '.join(ends)}")


def filled(part: str, content: str, system: str = "") -> str:
    """Put contents into a part. All at once: a content may itself hold {}."""
    values = {"{}": content, "{system}": system}
    return "".join(values.get(piece, piece) for piece in re.split(r"(\{\}|\{system\})", part))


def spans(
    template: str | Template, messages: list[dict], open_reply: bool = False, add_bos: bool = False
) -> list[Span]:
    """Write a conversation as spans.

    open_reply: end where the model is to write the next reply. add_bos: whether documents begin with bos
    under this tokenizer. Texts that touch are one span if both are trained or both given (not under
    `apart`). ValueError for what is no conversation, or a role that the template does not know.
    """
    template = find_template(template)
    try:
        check_messages(messages, ("user", "exec") if open_reply else TURNS, bool(template.exec))
    except ValueError as error:
        raise ValueError(f"template {template.name}: {error}") from None
    result: list[Span] = []

    def write(parts: tuple[str, ...], content: str = "", trained: bool = False) -> None:
        for part in parts:
            special = part in (BOS, EOS) or part in template.specials
            text = part if special else filled(part, content, given)
            if not text:
                continue
            touches = bool(result) and not special and not result[-1].special and not template.apart
            if touches and result[-1].trained == trained:
                result[-1] = result[-1]._replace(text=result[-1].text + text)
            else:
                result.append(Span(text, special, trained, touches))

    given = ""  # the system's text inside a user turn
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    system = system or template.default_system
    if template.bos == "once" or (template.bos == "document" and add_bos):
        write((BOS,))
    if system and not template.system_in_user:
        write(template.system, system)
    write(template.start)
    turns = [m for m in messages if m["role"] != "system"]
    for n, message in enumerate(turns):
        if message["role"] == "assistant":
            write(template.opener)
            write(template.reply, message["content"], trained=True)
            write(template.after)
            continue
        if template.bos == "turn":
            write((BOS,))
        inside = template.system_in_user and system and n == 0
        given = filled(template.system[0], system) if inside else ""
        write(template.exec if message["role"] == "exec" else template.user, message["content"])
    if open_reply:
        write(template.opener)
    return result


def jinja(template: str | Template, add_bos: bool = False) -> str:
    """Write a template in Jinja, as transformers, vLLM and llama.cpp read it: it gives the spans' text."""
    template = find_template(template)

    def expression(parts: tuple[str, ...], content: str = "message['content']", system: str = "") -> str:
        names, terms = {"{}": content, "{system}": system, BOS: "bos_token", EOS: "eos_token"}, []
        for part in parts:
            pieces = [part] if part in names else re.split(r"(\{\}|\{system\})", part)
            terms += [names.get(piece, json.dumps(piece, ensure_ascii=False)) for piece in pieces if piece]
        return " + ".join(filter(None, terms))

    lines = [
        f"{{%- set system = {json.dumps(template.default_system, ensure_ascii=False)} -%}}",
        "{%- if messages[0]['role'] == 'system' and messages[0]['content'] -%}",
        "{%- set system = messages[0]['content'] -%}",
        "{%- endif -%}",
    ]
    if template.bos == "once" or (template.bos == "document" and add_bos):
        lines.append("{{- bos_token -}}")
    inside = ""
    if template.system_in_user:  # turns alternate, so the first user's is message 1 or, after system, 2
        inside = f'(({expression(template.system, "system")}) if system and loop.index <= 2 else "")'
    else:
        lines.append(f"{{%- if system -%}}{{{{- {expression(template.system, 'system')} -}}}}{{%- endif -%}}")
    lines += [f"{{{{- {expression(template.start)} -}}}}"] * bool(template.start)
    start = (BOS,) * (template.bos == "turn")
    turns = {"user": start + template.user, "exec": start * bool(template.exec) + template.exec}
    turns["assistant"] = template.opener + template.reply + template.after
    lines.append("{%- for message in messages -%}")
    for n, (role, parts) in enumerate((role, parts) for role, parts in turns.items() if parts):
        lines.append(f"{{%- {'elif' if n else 'if'} message['role'] == '{role}' -%}}")
        lines.append(f"{{{{- {expression(parts, system=inside)} -}}}}")
    lines += [
        "{%- elif message['role'] != 'system' or not loop.first -%}",
        "{{- raise_exception('unknown role, or system not first: ' + message['role']) -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    if template.opener:
        lines.append(
            f"{{%- if add_generation_prompt -%}}{{{{- {expression(template.opener)} -}}}}{{%- endif -%}}"
        )
    return "\n".join(lines) + "\n"


def recognise(text: str) -> str | None:
    """Name the template whose Jinja this is, but for white space; None for any other."""
    squeezed = " ".join(text.split())
    for name in TEMPLATES:
        if squeezed in (" ".join(jinja(name, add_bos).split()) for add_bos in (False, True)):
            return name
    return None


# --- 2. rows ------------------------------------------------------------------------------------------------

# how files name the roles
NAMES = {"human": "user", "gpt": "assistant", "yayi": "assistant", "bot": "assistant", "tool": "exec"}
NAMES |= {"observation": "exec", "function": "exec", "function_response": "exec"} | {r: r for r in ROLES}
CHAT_FORMS = "messages | conversations | prompt with completion | instruction with output or response (and "
CHAT_FORMS += "input, history, system)"
QUESTIONS = {"prompt", "messages", "conversations", "instruction"}
PAIR_FORMS = "prompt, messages, conversations or instruction, with chosen and rejected, or with response_a, "
PAIR_FORMS += "response_b and label (A3 … B3)"
KINDS = {"chat": ("assistant",), "pairs": ("user", "exec"), "questions": TURNS}  # who has the last word


def read_rows(paths: Iterable[str | Path], kind: str = "chat") -> list[dict]:
    """Read rows of a kind: "chat", "pairs" (preferences), or "questions" (they need no last reply).

    Files, or folders of them: .json (one array, or lines), .jsonl, .jsonl.gz, .jsonl.zst. Gives rows in the
    form of messages (pairs: with "chosen" and "rejected"), other keys as they are, and "where" (file:line, or
    file: row n of an array). Pairs labelled A0 or B0 (no preference) are left out, which is announced.
    ValueError names file:line.
    """
    rows, undecided, files = [], 0, row_files(paths)
    for path in files:
        for where, row in json_rows(path):
            try:
                json.dumps(row, ensure_ascii=False).encode()
                row = as_messages(row, kind)
            except UnicodeEncodeError:
                raise ValueError(f"{where}: a lone surrogate, which is no Unicode text") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            undecided += row is None
            rows += [row | {"where": where}] if row else []
    if undecided:
        print(f"{undecided:,} pairs labelled A0 or B0 left out: they prefer nothing", file=sys.stderr)
    if not rows:
        raise ValueError(f"{', '.join(map(str, files))}: no rows")
    return rows


def row_files(paths: Iterable[str | Path]) -> list[Path]:
    """List the files to read: a file as given, a folder's sorted and recursively; ValueError as documents."""
    suffixes, files = (".json", ".jsonl", ".jsonl.gz", ".jsonl.zst"), []
    for path in map(Path, paths):
        inside = sorted(p for p in path.rglob("*") if p.name.endswith(suffixes) and p.is_file())
        if path.is_dir() and not inside:
            raise ValueError(f"{path}: no {', '.join(suffixes)} file in this folder")
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if not path.is_dir() and not path.name.endswith(suffixes):
            raise ValueError(f"{path}: unknown kind of file; expected one of {', '.join(suffixes)}")
        files += inside if path.is_dir() else [path]
    if not files:
        raise ValueError("no input files were given")
    return files


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) of a file's objects; a .json is an array or, as some name them, holds lines."""
    if path.suffix != ".json":
        lines = common.raw_documents(path)
    else:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
        if data.lstrip().startswith(b"["):
            yield from array_rows(data, path)
            return
        lines = ((n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip())
    for n, line in lines:
        yield f"{path}:{n}", common.parse_json_line(line, f"{path}:{n}")


def array_rows(data: bytes, path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, object) of one JSON array."""
    try:
        rows = json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: JSON that cannot be read ({error})") from None
    for n, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {n}: expected a JSON object, found {type(row).__name__}")
        yield f"{path}: row {n}", row


def as_messages(row: dict, kind: str = "chat") -> dict | None:
    """Turn a row of any known form into the form of messages; None: a pair that prefers nothing."""
    row = dict(row)
    found = ", ".join(map(repr, row)) or "none"
    if "where" in row:
        raise ValueError('"where" is a key that we use; rename it')
    pair = {}
    if kind == "pairs":
        if {"response_a", "response_b", "label"} <= row.keys():
            label = row["label"]
            if not isinstance(label, str) or not re.fullmatch("[AB][0-3]", label):
                raise ValueError(f"label {label!r}; expected A3, A2, A1, A0, B0, B1, B2 or B3")
            pair = {"chosen": row.pop("response_a"), "rejected": row.pop("response_b")}
            if label[0] == "B":
                pair = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
            if label[1] == "0":
                return None
        elif {"chosen", "rejected"} <= row.keys():
            pair = {key: row.pop(key) for key in ("chosen", "rejected")}
        else:
            raise ValueError(f"no known form of a preference: keys {found}; expected {PAIR_FORMS}")
        (before, other), replies = zip(
            *(reply_text(answer, key) for key, answer in pair.items()), strict=True
        )
        if before != other:
            raise ValueError('"chosen" and "rejected" answer different conversations')
        pair = dict(zip(pair, replies, strict=True))
    elif {"chosen", "rejected"} <= row.keys():
        raise ValueError("a preference row (chosen, rejected), expected a conversation; dpo.py takes these")
    if pair and before:  # trl's form: both answers as whole conversations, with or without a prompt
        stated = take_messages(row, kind, found) if row.keys() & QUESTIONS else before
        if stated != before:
            raise ValueError('what stands before the last message of "chosen" is not the prompt')
        messages = before
    else:
        messages = take_messages(row, kind, found)
    check_messages(messages, KINDS[kind])
    for n, message in enumerate(messages, 1):
        if message["role"] != "system" and not message["content"].strip():
            raise ValueError(f"message {n}: empty")
    return {"messages": messages} | pair | row


def reply_text(answer, key: str) -> tuple[list[dict], str]:
    """Give a reply, and the messages before it: of a string, of a message of the assistant, of several."""
    before: list[dict] = []
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list) and answer:
        *before, last = [one_message(m, f'"{key}", message {n}') for n, m in enumerate(answer, 1)]
        if last["role"] != "assistant":
            raise ValueError(f'"{key}" ends with a message of {last["role"]}, expected assistant')
        answer = last["content"]
    if not isinstance(answer, str) or not answer.strip():
        what = type(answer).__name__ if answer else "empty"
        raise ValueError(f'"{key}" is {what}, expected a reply: a text, or messages that end with one')
    return before, answer


def one_message(message, what: str) -> dict:
    """Read {"role", "content"} or {"from", "value"}."""
    for role, content in (("role", "content"), ("from", "value")):
        if isinstance(message, dict) and {role, content} <= message.keys():
            if message[role] not in NAMES:
                raise ValueError(
                    f"{what}: unknown role {message[role]!r}; expected one of {', '.join(NAMES)}"
                )
            if not isinstance(message[content], str):
                raise ValueError(f"{what}: {content} is {type(message[content]).__name__}, expected a string")
            if more := [key for key in message if key not in (role, content) and message[key] is not None]:
                raise ValueError(f"{what}: {more[0]!r} would be lost; a message is {role} and {content}")
            return {"role": NAMES[message[role]], "content": message[content]}
    raise ValueError(f'{what}: expected {{"role", "content"}} or {{"from", "value"}}, found {message!r:.80}')


def take_messages(row: dict, kind: str, found: str) -> list[dict]:
    """Take a row's conversation out of it, by the first form whose keys it has."""
    say = lambda role, content: {"role": role, "content": content}

    def text(key: str) -> str:
        value = row.pop(key, None)
        if value is not None and not isinstance(value, str):
            raise ValueError(f'"{key}" is {type(value).__name__}, expected a string')
        return value or ""

    output = next((key for key in ("output", "response") if key in row), "output")
    if name := next((key for key in ("messages", "conversations") if key in row), None):
        turns = row.pop(name)
        if not isinstance(turns, list):
            raise ValueError(f'"{name}" is {type(turns).__name__}, expected a list')
        messages = [one_message(turn, f"message {n}") for n, turn in enumerate(turns, 1)]
    elif "instruction" in row and (kind != "chat" or output in row):
        instruction, extra, messages = text("instruction"), text("input"), []
        if not instruction.strip():
            raise ValueError('"instruction" is empty')
        for n, turn in enumerate(row.pop("history", None) or [], 1):
            if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)):
                raise ValueError(f'"history" {n}: expected ["question", "answer"]')
            messages += [say("user", turn[0]), say("assistant", turn[1])]
        messages.append(say("user", f"{instruction}\n{extra}" if extra.strip() else instruction))
        if extra.strip():
            row["input"] = extra
        reply = text(output) if kind != "pairs" else ""
        if kind == "chat" and not reply.strip():
            raise ValueError(f'"{output}" is empty')
        messages += [say("assistant", reply)] if reply.strip() else []
    elif "prompt" in row and (kind != "chat" or "completion" in row):
        if not isinstance(prompt := row.pop("prompt"), list):
            row["prompt"] = prompt
            prompt = [say("user", text("prompt"))]
        messages = [one_message(turn, f"message {n}") for n, turn in enumerate(prompt, 1)]
        if "completion" in row:
            before, reply = reply_text(row.pop("completion"), "completion")
            messages += [*before, say("assistant", reply)]
    else:
        what = "a preference's prompt" if kind == "pairs" else "a conversation"
        forms = PAIR_FORMS if kind == "pairs" else CHAT_FORMS
        raise ValueError(f"no known form of {what}: keys {found}; expected {forms}")
    if system := text("system"):
        if messages and messages[0]["role"] == "system":
            raise ValueError('a "system" key and a system message: which one?')
        messages = [say("system", system), *messages]
    return messages


# --- 3. forms -----------------------------------------------------------------------------------------------

FORMS = {
    "chat": ("messages", "alpaca", "instruction", "sharegpt", "yayi"),
    "pairs": ("messages", "alpaca", "conversations", "prompt"),
}
SAID = {"user": "human", "assistant": "gpt", "exec": "observation", "system": "system"}  # by ShareGPT


def kind_of(row: dict) -> str | None:
    """Tell by its keys what a row of a file is: "documents", "pairs", "chat", or None: nothing known."""
    if {"chosen", "rejected"} <= row.keys() or {"response_a", "response_b", "label"} <= row.keys():
        return "pairs"
    if row.keys() & {"messages", "conversations", "instruction"} or {"prompt", "completion"} <= row.keys():
        return "chat"
    return "documents" if "text" in row else None


def to_form(row: dict, form: str) -> dict:
    """Write a row of read_rows in a form of FORMS; as_messages reads it back.

    Other keys stay. An empty system is no system. ValueError: what the form cannot hold.
    """
    kind = "pairs" if "chosen" in row else "chat"
    if form not in FORMS[kind]:
        what = {"chat": "conversations", "pairs": "preferences"}[kind]
        raise ValueError(f"{what} have no form {form!r}; there are {', '.join(FORMS[kind])}")
    rest = {key: value for key, value in row.items() if key not in ("messages", "where")}
    messages = row["messages"]
    if form == "messages":
        return {"messages": messages} | rest
    if form in ("sharegpt", "conversations"):
        talk = [{"from": SAID[m["role"]], "value": m["content"]} for m in messages]
        for key in ("chosen", "rejected") if kind == "pairs" else ():
            rest[key] = {"from": "gpt", "value": rest[key]}
        return held({"conversations": talk}, rest, ("chosen", "rejected"))
    if any(m["role"] == "exec" for m in messages):
        raise ValueError(f"{form}: has no place for a tool's result (exec)")
    first = messages[0]["role"] == "system"
    system, turns = messages[0]["content"] if first else "", messages[first:]
    if form == "yayi":
        talk = [{"from": "human" if m["role"] == "user" else "yayi", "value": m["content"]} for m in turns]
        return held({"system": system, "conversations": talk}, rest)
    *history, question = turns if kind == "pairs" else turns[:-1]
    if form == "prompt":
        if system or history:
            raise ValueError(f"{form}: has no place for a system text or several turns")
        return held({"prompt": question["content"]}, rest, ("chosen", "rejected"))
    # alpaca, instruction: "input" is a part of the question that is kept apart
    instruction, extra = question["content"], rest.pop("input", "")
    if extra:
        instruction = instruction.removesuffix(f"\n{extra}")
        if instruction == question["content"] or not instruction.strip():
            raise ValueError('"input" is not the end of the question, where alpaca has it')
    result = {"instruction": instruction}
    if extra or form == "alpaca":
        result["input"] = extra
    if kind == "chat":
        result["output" if form == "alpaca" else "response"] = turns[-1]["content"]
    if system:
        result["system"] = system
    if history:
        pairs = zip(history[::2], history[1::2], strict=True)
        result["history"] = [[user["content"], reply["content"]] for user, reply in pairs]
    return held(result, rest, ("chosen", "rejected"))


def held(result: dict, rest: dict, meant: tuple[str, ...] = ()) -> dict:
    """Put a row's other keys beside its form; ValueError for one that the form means otherwise."""
    forms = {"messages", "conversations", "instruction", "prompt", "system", "history", "output", "response"}
    for key in rest:
        if key in forms | result.keys() and key not in meant:
            raise ValueError(f"the key {key!r} of this row means something else in that form; rename it")
    return result | rest
