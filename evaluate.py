"""Let a model sit an exam: questions with four answers, in the files of C-Eval.

    chosen = argmax over A, B, C, D of the logits of the next token behind "答案："

Nothing is generated: what the model would rather write does not count, no answer has to be looked for in a
text, and one forward pass does for a batch of questions. Who knows nothing gets 25 %. A base model reads the
prompt that C-Eval publishes, with --shots solved questions of the subject before the one that is asked:

    以下是中国关于{subject}考试的单项选择题，请选出其中的正确答案。⏎⏎
    {question}⏎A. {A}⏎B. {B}⏎C. {C}⏎D. {D}⏎答案：B⏎⏎   …   {question}⏎A. {A}⏎…⏎D. {D}⏎答案：

Under a chat template, the folder's own or --template, a question laid out like this is what the user says (as
in the demonstration's instruction rows), the letter is the reply, and solved questions are earlier turns. The
sentence about the exam is left out: only four letters are compared, so nobody has to be told to write one.

    python evaluate.py out/sft --exam out/demo/exam              # through the chat template of the folder
    python evaluate.py out/run --exam out/demo/exam --shots 5    # a base model, behind five solved questions
    python evaluate.py out/run --exam ceval --shots 5 --out out/run-ceval.json

An exam is val/SUBJECT_val.csv with columns question, A, B, C, D, answer; for shots also dev/SUBJECT_dev.csv.

Hendrycks et al. 2021, "Measuring Massive Multitask Language Understanding" (logits of the letters, shots);
Huang et al. 2023, "C-Eval" (the prompt, the files, the average over subjects).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import common
from generate import Prefix, load, prefill
from model import Model
from tokenizer import Tokenizer

# --- 1. reading an exam -------------------------------------------------------------------------------------

LETTERS = "ABCD"
COLUMNS = ("question", *LETTERS, "answer")  # others, such as id and explanation, are not looked at


@dataclass(frozen=True)
class Question:
    """A question with its four answers, and the letter of the right one."""

    subject: str
    text: str
    answers: tuple[str, ...]
    right: str  # A, B, C or D
    where: str  # file:line

    def layout(self) -> str:
        """Lay the question out as C-Eval does, up to where the letter is to follow."""
        answers = (f"{letter}. {answer}" for letter, answer in zip(LETTERS, self.answers, strict=True))
        return "\n".join([self.text, *answers, "答案："])


def read_exam(folder: str | Path, part: str = "val") -> dict[str, list[Question]]:
    """Read PART/SUBJECT_PART.csv for all subjects of an exam's folder: {subject: questions}.

    A subject's name is that of its file, as in C-Eval's own evaluation. ValueError: no such file; as
    read_questions.
    """
    folder, end = Path(folder) / part, f"_{part}.csv"
    subjects = sorted(path.name.removesuffix(end) for path in folder.glob(f"*{end}"))
    if not subjects:
        raise ValueError(
            f"{folder}: no SUBJECT{end} here; --exam is a folder in C-Eval's form: its own, or FOLDER/exam "
            "after python demo_corpus.py --out FOLDER"
        )
    return {subject: read_questions(folder / f"{subject}{end}", subject) for subject in subjects}


def read_questions(path: Path, subject: str) -> list[Question]:
    """Read one .csv of questions, with or without a byte order mark.

    ValueError with file:line: not UTF-8, not CSV, a column that is missing, a row of another length than the
    header, an empty question, an answer that is no letter; and a file without questions.
    """
    data = path.read_bytes()
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#04x})") from None
    header: list[str] = []
    found, line = [], 1  # line: where a row begins; quoted cells may hold line breaks
    try:
        for row in lines:
            where, line = f"{path}:{line}", lines.line_num + 1
            if not row:
                continue
            if not header:
                if missing := [name for name in COLUMNS if row.count(name) != 1]:
                    raise ValueError(f"{where}: needs one column {missing[0]!r}; found {', '.join(row)}")
                header = row
                continue
            if len(row) != len(header):
                raise ValueError(f"{where}: {len(row)} cells, but the header names {len(header)} columns")
            cell = dict(zip(header, row, strict=True))
            right = cell["answer"].strip()
            if not cell["question"].strip():
                raise ValueError(f"{where}: the question is empty")
            if right not in tuple(LETTERS):
                raise ValueError(f"{where}: the answer is {right!r}, expected A, B, C or D")
            answers = tuple(cell[letter] for letter in LETTERS)
            found.append(Question(subject, cell["question"], answers, right, where))
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not CSV ({error})") from None
    if not found:
        raise ValueError(f"{path}: no questions")
    return found


def read_shots(folder: str | Path, subjects: Sequence[str], count: int) -> dict[str, list[Question]]:
    """Read the first `count` solved questions of every subject. ValueError: fewer, or none."""
    known = read_exam(folder, "dev") if count else {}
    shots = {subject: known.get(subject, [])[:count] for subject in subjects}
    for subject, found in shots.items():
        if len(found) < count:
            path = Path(folder) / "dev" / f"{subject}_dev.csv"
            raise ValueError(f"{path}: {len(found)} solved questions, too few for --shots {count}")
    return shots


# --- 2. prompts ---------------------------------------------------------------------------------------------


def encode(
    question: Question, shots: Sequence[Question], tokenizer: Tokenizer, template: str | None = None
) -> tuple[list[int], list[int]]:
    """Encode a question behind solved ones: the prompt's ids, and the four letters' that may follow.

    template None: the tokenizer's own; without any, the prompt of base models. How a letter is written is
    seen in context: the whole text is encoded with each of them, and the four may differ in one token only.
    What precedes it is the prompt; so a space or line break that a template puts before a reply is in the
    prompt, or in the letter's token where the tokenizer joins the two. ValueError where they differ in more.
    """
    if template or tokenizer.template:
        say = lambda role, content: {"role": role, "content": content}
        talk = [m for q in shots for m in (say("user", q.layout()), say("assistant", q.right))]
        talk.append(say("user", question.layout()))
        rows = [tokenizer.encode_chat([*talk, say("assistant", x)], template=template)[0] for x in LETTERS]
    else:
        text = f"以下是中国关于{question.subject}考试的单项选择题，请选出其中的正确答案。\n\n"
        text += "".join(f"{q.layout()}{q.right}\n\n" for q in shots) + question.layout()
        rows = [tokenizer.encode_prompt(text + letter) for letter in LETTERS]
    same = len(os.path.commonprefix(rows))
    letters, behind = [row[same] for row in rows if row[same:]], [row[same + 1 :] for row in rows]
    if len(set(letters)) < len(LETTERS) or any(rest != behind[0] for rest in behind):
        raise ValueError(
            f"{question.where}: this tokenizer does not write the letters A, B, C, D as four single tokens "
            f"here, but as {', '.join(str(row[same:]) for row in rows)}: their logits cannot be compared"
        )
    return rows[0][:same], letters


def encode_fitting(
    question: Question, shots: Sequence[Question], tokenizer: Tokenizer, limit: int, template: str | None
) -> tuple[list[int], list[int], int]:
    """Encode a question behind as many of its shots, from the first, as leave it at most `limit` tokens.

    Returns prompt, letters (as `encode`), and the number of shots. ValueError: it is too long without any.
    """
    for kept in range(len(shots), -1, -1):
        prompt, letters = encode(question, shots[:kept], tokenizer, template)
        if len(prompt) <= limit:
            return prompt, letters, kept
    raise ValueError(f"{question.where}: {len(prompt)} tokens exceed the model's context of {limit}")


# --- 3. answers ---------------------------------------------------------------------------------------------


@dataclass
class Accuracy:
    """What a model chose, and how much of it is right."""

    questions: list[Question]
    chosen: list[str]  # a letter for each
    logits: list[list[float]]  # of the four letters, for each
    shots: list[int]  # solved questions before each

    def subjects(self) -> dict[str, tuple[int, int]]:
        """Count by subject: {subject: (right, asked)}."""
        counts: dict[str, tuple[int, int]] = {}
        for question, letter in zip(self.questions, self.chosen, strict=True):
            right, asked = counts.get(question.subject, (0, 0))
            counts[question.subject] = right + (letter == question.right), asked + 1
        return counts

    def macro(self) -> float:
        """Average the shares of right answers over subjects, each counted alike: C-Eval's average."""
        shares = [right / asked for right, asked in self.subjects().values()]
        return sum(shares) / len(shares)

    def micro(self) -> tuple[float, float]:
        """Give the share of right answers p, and its standard error √(p(1−p)/n)."""
        n = len(self.questions)
        p = sum(right for right, _ in self.subjects().values()) / n
        return p, math.sqrt(p * (1 - p) / n)


@torch.inference_mode()
def accuracy(
    model: Model,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    shots: dict[str, list[Question]] | None = None,
    template: str | None = None,
    batch: int = 32,
) -> Accuracy:
    """Choose a letter for every question, `batch` questions of like length at a time.

    shots: solved questions to show first, by subject; where they exceed a RoPE model's context the last ones
    are left out, which is announced. What the questions of a subject begin with is computed once. The head
    runs in fp32: in bf16 the two best logits were equal for 354 of 850 questions to the demonstration's SFT
    model, and A would win. ValueError with file:line, as encode_fitting, before any is answered.
    """
    limit, solved = model.config.limit, shots or {}
    prompts = [encode_fitting(q, solved.get(q.subject, []), tokenizer, limit, template) for q in questions]
    cut = [kept for q, (_, _, kept) in zip(questions, prompts) if kept < len(solved.get(q.subject, []))]
    if cut:
        print(
            f"{len(cut):,} of {len(questions):,} questions got fewer solved ones before them, the least "
            f"{min(cut)}: more exceed the model's context of {limit} tokens",
            file=sys.stderr,
        )
    kind = lambda i: (questions[i].subject, prompts[i][2])  # what questions that begin alike share
    order = sorted(range(len(questions)), key=lambda i: (*kind(i), len(prompts[i][0])))
    logits: list[list[float]] = [[]] * len(questions)
    fine = model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    with fine, common.progress(len(questions), "exam", "question") as bar:
        for group in (list(found) for _, found in itertools.groupby(order, kind)):
            ids = [prompts[i][0] for i in group]
            alike = os.path.commonprefix(ids)[: len(ids[0]) - 1]  # every prompt keeps a token of its own
            prefix = Prefix(alike)
            for at in range(0, len(group), batch):
                part = group[at : at + batch]
                rows, _ = prefill(model, ids[at : at + batch], 0, prefix)  # (B, V)
                letters = torch.tensor([prompts[i][1] for i in part], device=rows.device)  # (B, 4)
                for i, row in zip(part, rows.gather(1, letters).tolist()):
                    logits[i] = row
                bar.update(len(part))
    chosen = [LETTERS[row.index(max(row))] for row in logits]
    return Accuracy(list(questions), chosen, logits, [kept for _, _, kept in prompts])


# --- 4. command line ----------------------------------------------------------------------------------------


@dataclass
class EvaluateConfig:
    folder: tyro.conf.Positional[str]  # a model folder or a run
    exam: str  # folder with val/*.csv and, for shots, dev/*.csv
    shots: int = 0  # solved questions before each
    template: str = ""  # chat template, a name of chat.TEMPLATES; default: the folder's, or none
    batch: int = 32  # questions that are worked on together
    out: str = ""  # .json for the results of every question
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = ""  # float32, bfloat16; default: the folder's


def main(config: EvaluateConfig) -> None:
    """Let a model sit an exam: print the share of right answers by subject, and both averages."""
    for name, least in (("shots", 0), ("batch", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name} {getattr(config, name)} must be at least {least}")
    if config.out and Path(config.out).exists():
        raise ValueError(f"{config.out} exists; choose another --out or remove it")
    dtype = {"": None, "float32": torch.float32, "bfloat16": torch.bfloat16}.get(config.dtype, config.dtype)
    if isinstance(dtype, str):
        raise ValueError(f"--dtype {dtype}: expected float32 or bfloat16")
    exam = read_exam(config.exam)
    shots = read_shots(config.exam, list(exam), config.shots)
    device = common.start_process(config.device).device
    model, tokenizer = load(config.folder, dtype, device, rows=config.batch)
    questions = [question for found in exam.values() for question in found]
    result = accuracy(model, tokenizer, questions, shots, config.template or None, config.batch)
    p, error = result.micro()
    if config.out:
        told = {name: getattr(config, name) for name in ("folder", "exam", "shots", "template")}
        told |= {"macro": result.macro(), "micro": p, "standard_error": error}
        columns = zip(questions, result.chosen, result.logits, result.shots, strict=True)
        rows = [dataclasses.asdict(q) | {"chosen": c, "logits": x, "shots": n} for q, c, x, n in columns]
        common.write_json(config.out, told | {"questions": rows})
    width = max(map(len, exam))
    print(f"{'subject':{width}}   questions   right   per cent")
    for subject, (right, asked) in result.subjects().items():
        print(f"{subject:{width}}   {asked:9,d}   {right:5,d}   {100 * right / asked:8.1f}")
    everything = f"of all {len(questions):,} questions {p:.1%} ± {error:.1%}"
    print(f"average of subjects {result.macro():.1%}, {everything}")


if __name__ == "__main__":
    common.run(main, doc=__doc__)
