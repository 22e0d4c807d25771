"""An exam asks what C-Eval's asks, word for word; the answer is the letter that transformers' logits prefer."""

import csv
import dataclasses
import json
import math

import pytest
import torch
from conftest import run_script, tiny_pairs

import chat
import common
import demo_corpus
import evaluate
import generate as gen
import tokenizer as tok
from evaluate import Accuracy, Question, accuracy, encode, read_exam, read_shots
from model import ModelConfig, build, init_weights

FAMILIES = ("llama-tied", "phi", "bloom")
CONTEXT = 160  # of the RoPE models: room for some solved questions, not for five
HEADER = "id,question,A,B,C,D,answer\n"
YAYI = chat.TEMPLATES["yayi"].specials

pytestmark = pytest.mark.usefixtures("one_thread")


# --- helpers -------------------------------------------------------------------------------------------------


def asked(n: int, right: str = "A", subject: str = "算术") -> Question:
    answers = tuple(str(n + d) for d in (2, 1, 3, 5))
    return Question(subject, f"{n}加2等于多少？" + "请算。" * (n % 3), answers, right, f"val.csv:{n + 2}")


QUESTIONS = [asked(n, "ABCD"[n % 4], subject) for subject in ("算术", "sums") for n in range(7)]
SHOTS = {subject: [asked(n, "CADBC"[n - 20], subject) for n in range(20, 25)] for subject in ("算术", "sums")}


def lines():
    header = "以下是中国关于算术考试的单项选择题，请选出其中的正确答案。"
    return [header, "答案：", "加等于多少？请算。", "A. 12", "B. 34", "C. 56", "D. 78", "问：答："] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Train a tokenizer on what the prompts say; it knows the special tokens of one template."""
    root = tmp_path_factory.mktemp("tok")
    (root / "a.txt").write_text("\n\n".join(lines()), "utf-8")
    tok.train(tok.Train([str(root / "a.txt")], str(root / "tok"), 345, specials=",".join(YAYI)))
    return tok.load_tokenizer(root / "tok")


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    return tiny_pairs(tokenizer, tmp_path_factory, CONTEXT)


def special(text=None, vocab_size=345, **options):
    """Make a SentencePiece tokenizer with options that our own training does not offer."""
    data = tok.train_model(text or lines(), vocab_size, **options)
    return tok.from_files({"tokenizer.model": data}, "special")


def write_exam(root, val: dict[str, str], dev: dict[str, str] | None = None):
    for part, files in (("val", val), ("dev", dev or {})):
        for subject, text in files.items():
            (root / part).mkdir(parents=True, exist_ok=True)
            (root / part / f"{subject}_{part}.csv").write_text(text, "utf-8")
    return root


def rows(questions) -> str:
    return HEADER + "".join(
        f"{n},{q.text},{','.join(q.answers)},{q.right}\n" for n, q in enumerate(questions)
    )


# --- 1. prompts ----------------------------------------------------------------------------------------------

QUESTION = Question("物理", "光是什么？", ("水", "波", "火", "土"), "B", "x:2")
SOLVED = Question("物理", "冰是什么？", ("水", "波", "火", "土"), "A", "x:1")


def test_a_base_model_reads_c_evals_prompt_word_for_word(tokenizer):
    (prompt, letters), (longer, same) = (encode(QUESTION, shots, tokenizer) for shots in ([], [SOLVED]))
    text = "光是什么？\nA. 水\nB. 波\nC. 火\nD. 土\n答案："
    header = "以下是中国关于物理考试的单项选择题，请选出其中的正确答案。\n\n"
    assert tokenizer.decode(prompt, skip_special=False) == "<s>" + header + text
    shot = "冰是什么？\nA. 水\nB. 波\nC. 火\nD. 土\n答案：A\n\n"
    assert tokenizer.decode(longer, skip_special=False) == "<s>" + header + shot + text
    assert [tokenizer.decode([i]) for i in letters] == list("ABCD") and letters == same


def test_under_a_template_the_user_asks_and_earlier_turns_are_solved(tokenizer):
    prompt, letters = encode(QUESTION, [SOLVED], tokenizer, "plain")
    text = (
        "<s>问：冰是什么？\nA. 水\nB. 波\nC. 火\nD. 土\n答案：\n答：A</s>"
        "问：光是什么？\nA. 水\nB. 波\nC. 火\nD. 土\n答案：\n答："
    )
    assert tokenizer.decode(prompt, skip_special=False) == text
    assert [tokenizer.decode([i]) for i in letters] == list("ABCD")
    named = tokenizer.with_template("plain")
    assert encode(QUESTION, [SOLVED], named) == (prompt, letters), "the folder's own template counts"


def test_questions_are_laid_out_as_the_demonstration_teaches_choices():
    one = demo_corpus.Question("光是什么？", "波", "word", "光是波。")
    assert QUESTION.layout() == demo_corpus.choice_text(one, list(QUESTION.answers))


@pytest.mark.parametrize("template", [None, "plain", "yayi", "llama-2", "xverse", "xuanyuan-6b"])
@pytest.mark.parametrize("prefix", [False, True], ids=["", "dummy prefix"])
def test_prompt_and_letter_are_how_the_tokenizer_writes_that_answer(template, prefix):
    tokenizer = special(specials=YAYI, add_dummy_prefix=prefix)
    prompt, letters = encode(QUESTION, [], tokenizer, template)
    for letter, i in zip("ABCD", letters):
        talk = [{"role": "user", "content": QUESTION.layout()}, {"role": "assistant", "content": letter}]
        if template is None:
            head = "以下是中国关于物理考试的单项选择题，请选出其中的正确答案。\n\n"
            whole = tokenizer.encode_document(head + QUESTION.layout() + letter)
        else:
            whole, _ = tokenizer.encode_chat(talk, template=template)
            given, _ = tokenizer.encode_chat(talk[:1], open_reply=True, template=template)
            assert prompt[: len(given)] == given
        assert whole[: len(prompt) + 1] == [*prompt, i]
        assert tokenizer.decode([i], at_start=False).strip() == letter
    lead = {"yayi": ":\n"}.get(template, "")
    assert tokenizer.decode(prompt, at_start=False).endswith(lead)


def test_a_letter_is_seen_in_context_not_looked_up():
    """Under a dummy prefix "A" alone is ▁A or ▁, A: neither is what stands behind 答案：."""
    tokenizer = special(add_dummy_prefix=True, user_defined_symbols=["▁A", "▁B", "▁C", "▁D"])
    alone = [tokenizer.encode(letter) for letter in "ABCD"]
    _, letters = encode(QUESTION, [], tokenizer)
    assert all(len(ids) == 1 for ids in alone) and not {i for ids in alone for i in ids} & set(letters)
    _, spaced = encode(QUESTION, [], tokenizer, "xuanyuan-6b")  # writes "Assistant: A"
    assert [[i] for i in spaced] == alone


def test_a_letter_that_joins_the_colon_is_compared_as_such():
    tokenizer = special(user_defined_symbols=["：A", "：B", "：C", "：D"])
    prompt, letters = encode(QUESTION, [], tokenizer)
    assert tokenizer.decode(prompt).endswith("答案")
    assert [tokenizer.decode([i]) for i in letters] == ["：A", "：B", "：C", "：D"]


@pytest.mark.parametrize(
    "template, options",
    [
        (None, {"user_defined_symbols": ["：A"]}),  # one letter joins the colon
        ("yayi", {"user_defined_symbols": ["A\n\n"], "specials": YAYI}),  # one joins what follows
        (
            None,
            {"text": ["光是什么？答案："] * 20, "vocab_size": 16, "byte_fallback": False},
        ),  # <unk> for all
    ],
    ids=["before", "behind", "unknown"],
)
def test_letters_that_are_not_four_single_tokens_are_refused(template, options):
    with pytest.raises(ValueError, match="x:2: this tokenizer does not write the letters A, B, C, D"):
        encode(QUESTION, [], special(**options), template)


# --- 2. answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "plain"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_chosen_letters_are_those_of_transformers_logits(family, template, made):
    hf, folder = made(family)
    model, tokenizer = gen.load(folder, torch.float32, rows=4)
    shots = {subject: found[:1] for subject, found in SHOTS.items()}
    for solved in ({}, shots):
        result = accuracy(model, tokenizer, QUESTIONS, solved, template, batch=4)
        want = []
        for question in QUESTIONS:
            prompt, letters = encode(question, solved.get(question.subject, []), tokenizer, template)
            with torch.no_grad():
                want.append(hf(torch.tensor([prompt])).logits[0, -1, letters].tolist())
        got = torch.tensor(result.logits)
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-4, atol=1e-4 * float(got.abs().max()))
        assert result.chosen == ["ABCD"[row.index(max(row))] for row in want]
        assert got.std(0).min() > 0.01 * got.abs().max(), "a mix-up of questions would show"


def test_batch_size_and_order_change_no_answer(made):
    model, tokenizer = gen.load(made("llama-tied")[1], torch.float32, rows=4)
    one, three, all_ = (accuracy(model, tokenizer, QUESTIONS, SHOTS, batch=n) for n in (1, 3, 99))
    assert one.chosen == three.chosen == all_.chosen
    for other in (three, all_):
        torch.testing.assert_close(torch.tensor(one.logits), torch.tensor(other.logits), rtol=1e-4, atol=1e-4)
    back = accuracy(model, tokenizer, QUESTIONS[::-1], SHOTS)
    assert back.chosen[::-1] == one.chosen and back.questions == QUESTIONS[::-1]


@pytest.mark.filterwarnings("ignore:.*ALiBi can go on")
def test_what_the_questions_of_a_subject_begin_with_is_computed_once(made):
    model, tokenizer = gen.load(made("bloom")[1], torch.float32, rows=4)
    shapes = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    accuracy(model, tokenizer, QUESTIONS[:7], SHOTS, batch=3)
    prompts = [encode(q, SHOTS["算术"], tokenizer)[0] for q in QUESTIONS[:7]]
    assert shapes[0][0] == 1 and [rows for rows, _ in shapes[1:]] == [3, 3, 1]
    assert max(T for _, T in shapes[1:]) + shapes[0][1] == max(map(len, prompts))
    assert shapes[0][1] > 4 * max(T for _, T in shapes[1:]), "the solved questions are the first part"


def test_a_question_may_begin_with_all_of_another(made):
    model, tokenizer = gen.load(made("llama-tied")[1], torch.float32)
    one = dataclasses.replace(QUESTION, text="光？")
    two = dataclasses.replace(one, text=one.layout() + "？")
    together = accuracy(model, tokenizer, [one, two], batch=1).logits
    alone = [accuracy(model, tokenizer, [q]).logits[0] for q in (one, two)]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-4)


def test_a_model_that_always_says_c_gets_the_share_of_cs(made):
    hf, folder = made("phi")
    model, tokenizer = gen.load(folder, torch.float32)
    _, letters = encode(QUESTIONS[0], [], tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.zero_()
        model.lm_head.bias[letters[2]] = 1.0
    result = accuracy(model, tokenizer, QUESTIONS)
    assert set(result.chosen) == {"C"} and result.subjects() == {"算术": (2, 7), "sums": (2, 7)}


def test_a_model_that_has_learnt_the_answers_gets_all_right(tokenizer):
    questions = [asked(n, "DBCACADB"[n]) for n in range(8)]
    parts = [encode(q, [], tokenizer, "plain") for q in questions]
    config = ModelConfig("llama", tokenizer.vocab_size, 64, 2, 4, 128, CONTEXT, 2)
    model = build(config)
    init_weights(model, seed=1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    T = max(len(prompt) for prompt, _ in parts)
    ids, targets = torch.zeros(8, T, dtype=torch.long), torch.full((8, T), -100)
    for b, ((prompt, letters), q) in enumerate(zip(parts, questions)):
        ids[b, : len(prompt)] = torch.tensor(prompt)
        targets[b, len(prompt) - 1] = letters["ABCD".index(q.right)]
    before = accuracy(model.eval(), tokenizer, questions, template="plain").micro()[0]
    for _ in range(150):
        loss = model(ids, targets).sum() / 8
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.02:
            break
    after = accuracy(model, tokenizer, questions, template="plain")
    assert before < 1 and after.micro() == (1.0, 0.0) and after.chosen == list("DBCACADB")


def test_in_bf16_the_letters_are_told_apart_more_finely_than_bf16_can(made):
    hf, folder = made("llama-tied")
    model, tokenizer = gen.load(folder, torch.bfloat16, rows=4)
    result = accuracy(model, tokenizer, QUESTIONS)
    logits = torch.tensor(result.logits)
    assert (logits.bfloat16().float() != logits).float().mean() > 0.9
    prompt, letters = encode(QUESTIONS[3], [], tokenizer)
    with torch.inference_mode():
        after, _ = gen.prefill(model, [prompt], 0)
    assert after.dtype == torch.bfloat16, "the model is left as it was"
    assert (after[0, letters].float() - logits[3]).abs().max() < 0.02 * after.float().abs().max()


# --- 3. the context ------------------------------------------------------------------------------------------


def test_shots_that_do_not_fit_are_left_out_whole_from_the_last(made, tokenizer, capsys):
    _, folder = made("llama-tied")
    model, _ = gen.load(folder, torch.float32, rows=4)
    long = dataclasses.replace(QUESTIONS[0], text="请算" + "水" * 12, right="D")
    result = accuracy(model, tokenizer, [*QUESTIONS, long], SHOTS)
    for question, kept in zip(result.questions, result.shots):
        prompts = [encode(question, SHOTS[question.subject][:n], tokenizer)[0] for n in range(6)]
        fits = [n for n in range(6) if len(prompts[n]) <= CONTEXT]
        assert kept == fits[-1]
    assert 0 < result.shots[-1] < result.shots[0] < 5
    first = {"算术": SHOTS["算术"][: result.shots[0]]}
    alone = accuracy(model, tokenizer, QUESTIONS[:1], first).logits[0]
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(result.logits[0]), rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().err
    assert "15 of 15 questions got fewer" in said and f"the least {result.shots[-1]}" in said, said
    assert f"context of {CONTEXT} tokens" in said


@pytest.mark.filterwarnings("ignore:.*ALiBi can go on")
def test_alibi_reads_beyond_the_context_it_was_trained_on(made, tokenizer, capsys):
    model, _ = gen.load(made("bloom")[1], torch.float32, rows=4)
    result = accuracy(model, tokenizer, QUESTIONS, SHOTS)
    assert set(result.shots) == {5} and "fewer" not in capsys.readouterr().err


def test_a_prompt_may_fill_the_context_to_the_last_token(tokenizer):
    prompt, _ = encode(QUESTION, [], tokenizer)
    for less in (0, 1):
        config = ModelConfig("llama", tokenizer.vocab_size, 64, 1, 4, 128, len(prompt) - less)
        model = build(config)
        init_weights(model, seed=1)
        if less:
            with pytest.raises(ValueError, match=f"x:2: {len(prompt)} tokens exceed the model's context"):
                accuracy(model.eval(), tokenizer, [QUESTION], {"物理": [SOLVED]})
        else:
            assert accuracy(model.eval(), tokenizer, [QUESTION], {"物理": [SOLVED]}).shots == [0]


# --- 4. files ------------------------------------------------------------------------------------------------


def test_an_exam_is_read_with_a_byte_order_mark_other_columns_and_quoted_cells(tmp_path):
    text = '\ufeffid,answer,question,A,B,C,D,explanation\r\n0, B ,"一,\n二",1,2,3,4,x\r\n\r\n1,D,三,5,,"""7""",8,\r\n'
    write_exam(tmp_path, {"b": text, "a_b": HEADER + "0,四,1,2,3,4,A\n"})
    exam = read_exam(tmp_path)
    assert list(exam) == ["a_b", "b"]
    path = tmp_path / "val" / "b_val.csv"
    assert exam["b"] == [
        Question("b", "一,\n二", ("1", "2", "3", "4"), "B", f"{path}:2"),
        Question("b", "三", ("5", "", '"7"', "8"), "D", f"{path}:5"),
    ]


def test_the_demonstrations_exam_is_one(tmp_path):
    world = demo_corpus.build_world(1)
    demo_corpus.write_exam(tmp_path, world, 1, demo_corpus.exam(world, 1))
    exam, csvs = read_exam(tmp_path), sorted((tmp_path / "val").glob("*.csv"))
    assert [len(found) for found in exam.values()] == [500, 100, 250] and len(csvs) == 3
    with open(csvs[1], encoding="utf-8") as file:
        first = next(csv.DictReader(file))
    question = exam["world_sums"][0]
    assert (question.text, question.right) == (first["question"], first["answer"])
    assert question.answers == tuple(first[letter] for letter in "ABCD")
    shots = read_shots(tmp_path, list(exam), 5)
    assert {len(found) for found in shots.values()} == {5}
    assert read_shots(tmp_path, list(exam), 2)["world_sums"] == shots["world_sums"][:2]


@pytest.mark.parametrize(
    "data, message",
    [
        (b"id,question,A,B,C,D\n0,x,1,2,3,4\n", ":1: needs one column 'answer'; found id, question, A"),
        (b"question,A,B,B,C,D,answer\n", ":1: needs one column 'B'"),
        (HEADER.encode() + b"0,x,1,2,3,4,A\n1,y,1,2,3,4,E\n", ":3: the answer is 'E', expected A, B, C or D"),
        (HEADER.encode() + b"0,x,1,2,3,4,AB\n", ":2: the answer is 'AB'"),
        (HEADER.encode() + b"0,x,1,2,3,4,\n", ":2: the answer is ''"),
        (HEADER.encode() + b'0,"x\ny",1,2,3,4,A\n1, ,1,2,3,4,B\n', ":4: the question is empty"),
        (HEADER.encode() + b"0,x,1,2,3,4\n", ":2: 6 cells, but the header names 7 columns"),
        (HEADER.encode() + b"0,x,1,2,3,4,A\n1,\xb9\xe2,1,2,3,4,A\n", ":3: not UTF-8 (byte 0xb9)"),
        (HEADER.encode() + b'0,x,1,2,3,4,A\n1,"x,1,2,3,4,A\n', ":3: not CSV ("),
        (HEADER.encode(), ": no questions"),
        (b"", ": no questions"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(data, message, tmp_path):
    path = tmp_path / "val" / "s_val.csv"
    path.parent.mkdir()
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_exam(tmp_path)
    assert str(caught.value).startswith(f"{path}{message}"), caught.value


def test_missing_folders_and_solved_questions_are_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere/val: no SUBJECT_val.csv here; .*demo_corpus.py --out"):
        read_exam(tmp_path / "nowhere")
    write_exam(tmp_path, {"s": rows(QUESTIONS[:1])})
    with pytest.raises(ValueError, match="dev: no SUBJECT_dev.csv here"):
        read_shots(tmp_path, ["s"], 1)
    assert read_shots(tmp_path, ["s"], 0) == {"s": []}, "without shots no dev files are needed"
    write_exam(tmp_path, {}, {"s": rows(QUESTIONS[:2])})
    with pytest.raises(ValueError, match=r"dev/s_dev.csv: 2 solved questions, too few for --shots 3"):
        read_shots(tmp_path, ["s"], 3)
    with pytest.raises(ValueError, match=r"dev/t_dev.csv: 0 solved questions"):
        read_shots(tmp_path, ["s", "t"], 1)


# --- 5. results ----------------------------------------------------------------------------------------------


def test_macro_counts_subjects_alike_and_micro_questions():
    questions = [asked(n, "A", "x") for n in range(8)] + [asked(n, "B", "y") for n in range(2)]
    result = Accuracy(questions, list("AAAAAABC" + "AB"), [], [])
    assert result.subjects() == {"x": (6, 8), "y": (1, 2)}
    assert result.macro() == (0.75 + 0.5) / 2
    assert result.micro() == (0.7, pytest.approx(math.sqrt(0.7 * 0.3 / 10)))


def test_the_command_prints_a_table_and_writes_every_answer(made, tmp_path):
    _, folder = made("llama-tied")
    val = {"s": rows(QUESTIONS[:5]), "long_name": rows(QUESTIONS[5:7])}
    write_exam(tmp_path, val, {name: rows(SHOTS["sums"]) for name in val})
    out = tmp_path / "out" / "results.json"
    words = [folder, "--exam", tmp_path, "--shots", "1", "--batch", "2", "--dtype", "float32"]
    done = run_script("evaluate.py", *words, "--out", out)
    assert done.returncode == 0, done.stderr
    model, tokenizer = gen.load(folder, torch.float32, rows=2)
    exam = read_exam(tmp_path)
    questions = [q for found in exam.values() for q in found]
    want = accuracy(model, tokenizer, questions, read_shots(tmp_path, list(exam), 1), batch=2)
    found = common.read_json(out)
    assert [row["chosen"] for row in found["questions"]] == want.chosen
    assert [row["where"] for row in found["questions"]] == [q.where for q in questions]
    assert found["shots"] == 1 and {row["shots"] for row in found["questions"]} == {1}
    assert (found["macro"], found["micro"], found["standard_error"]) == (want.macro(), *want.micro())
    head, *table, last = done.stdout.splitlines()
    assert head.split() == ["subject", "questions", "right", "per", "cent"]
    for line, (subject, (right, n)) in zip(table, want.subjects().items(), strict=True):
        assert line.split() == [subject, str(n), str(right), f"{100 * right / n:.1f}"]
    p, error = want.micro()
    assert last == f"average of subjects {want.macro():.1%}, of all 7 questions {p:.1%} ± {error:.1%}"
    again = run_script("evaluate.py", *words, "--out", out)
    assert again.returncode == 2 and "choose another --out" in again.stderr
    assert json.loads(out.read_text("utf-8")) == found


@pytest.mark.parametrize(
    "words, message",
    [
        ({"shots": -1}, "--shots -1 must be at least 0"),
        ({"batch": 0}, "--batch 0 must be at least 1"),
        ({"dtype": "float16"}, "--dtype float16: expected float32 or bfloat16"),
        ({"exam": "nowhere"}, "nowhere/val: no SUBJECT_val.csv"),
        ({"template": "plane"}, "no chat template 'plane'; there are plain"),
    ],
)
def test_bad_flags_are_refused(words, message, made, tmp_path):
    write_exam(tmp_path, {"s": rows(QUESTIONS[:1])})
    config = evaluate.EvaluateConfig(**({"folder": str(made("phi")[1]), "exam": str(tmp_path)} | words))
    with pytest.raises(ValueError, match=message):
        evaluate.main(config)
