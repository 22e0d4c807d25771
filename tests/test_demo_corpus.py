"""The embedded demonstration data: what it promises is counted here from the files, by the checker."""

import csv
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import demo_corpus as d

ROOT = Path(__file__).parent.parent
FOLDER_SUBJECTS = ("world_facts", "world_two_hop", "world_sums")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Built:
    """The default corpus as a reader finds it on disk, and everything that its sentences state."""

    def __init__(self, folder):
        d.main(d.DemoConfig(out=str(folder)))
        self.folder, self.world = folder, d.build_world(1)
        self.documents = [row["text"] for row in lines(folder / "pretrain" / "world.jsonl")]
        self.text = "\n".join(self.documents)
        self.sft, self.dpo = lines(folder / "sft.jsonl"), lines(folder / "dpo.jsonl")
        self.facts = lines(folder / "facts.jsonl")
        self.report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        self.readings = [r for text in self.documents for r in d.check_document(self.world, text)]
        self.sentences = [
            s for text in self.documents for line in text.split("\n") for s in d.split_sentences(line)
        ]
        self.val = {}
        for subject in FOLDER_SUBJECTS:
            with open(folder / "exam" / "val" / f"{subject}_val.csv", encoding="utf-8", newline="") as file:
                self.val[subject] = list(csv.DictReader(file))

    @property
    def exam(self):
        return [row for rows in self.val.values() for row in rows]

    def turns(self):
        """(what the user says, what the assistant says) of every instruction row."""
        for row in self.sft:
            if "messages" in row:
                said = [m["content"] for m in row["messages"]]
                yield from zip(said[::2], said[1::2])
            else:
                yield (row["instruction"] + "\n" + row["input"]).strip(), row["output"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return Built(tmp_path_factory.mktemp("demo") / "out")


@pytest.fixture(scope="module")
def answers(built):
    """Every question that the table can ask of the world, with its answer, worked out here."""
    facts, found = built.world.facts, {}
    for (name, subject), value in facts.items():
        relation = d.RELATIONS[name]
        for ask in relation.asks:
            found[ask.replace("{s}", subject)] = value
        for second in d.RELATIONS if relation.via else ():
            if (second, value) in facts:
                for ask in d.RELATIONS[second].asks:
                    found[ask.replace("{s}", relation.via.replace("{s}", subject))] = facts[second, value]
    return found | {f"{a}加{b}等于多少？": str(a + b) for a in range(100) for b in range(100)}


# --- the checker ---------------------------------------------------------------------------------------------


def test_numbers_and_times_are_said_as_people_say_them():
    said = {0: "零", 10: "十", 12: "十二", 20: "二十", 37: "三十七", 100: "一百", 105: "一百零五"}
    said |= {110: "一百一十", 115: "一百一十五", 240: "二百四十", 999: "九百九十九"}
    assert {n: d.chinese(n) for n in said} == said
    times = {
        450: "早上七点半",
        500: "早上八点二十分",
        14 * 60: "下午两点",
        12 * 60: "中午十二点",
        21 * 60: "晚上九点",
    }
    assert {m: d.clock(m) for m in times} == times


def test_checker_judges_sentences_written_by_hand(built):
    world = built.world
    her = next(s for s in world.words["person"] if s in world.female)
    him = next(s for s in world.words["person"] if s not in world.female)
    home, food, his = world.facts["home", her], world.facts["food", her], world.facts["home", him]
    other = next(p for p in world.words["place"] if p != home)
    cases = {
        f"{her}住在{home}。": (True, True),
        f"{her}住在{other}。": (True, False),
        f"{her}住在红烧肉。": (False, False),
        f"林无名住在{home}。": (False, False),
        f"{her}住在{home}": (False, False),
        f"{her}住在{home}，爱吃{food}。": (True, True),
        f"{her}住在{other}，爱吃{food}。": (True, False),
        f"听说，{her}爱吃{food}。": (True, True),
        f"她住在{home}，爱吃{food}。": (True, True),
        f"爱吃{food}。": (False, False),
        f"{her}住在{home}，他爱吃{food}。": (False, False),
        f"{her}说：“我住在{home}，爱吃{food}。”": (True, True),
        f"{her}说：“我住在{other}。”": (True, False),
        f"{her}说：“他住在{home}。”": (False, False),
        f"{her}说：“我住在{home}。": (False, False),
        f"我住在{home}。": (False, False),
        f"{her}住在{home}，{him}住在{his}。": (True, True),
        "37加25等于62。": (True, True),
        "37加25等于63。": (True, False),
        "二十五与三十七的和是六十二。": (True, True),
        "篮子里有三十七个梨，又放进二十五个，一共是六十二个。": (True, True),
        "篮子里有三十七个梨，又放进二十五个，一共是六十个。": (True, False),
        "从早上八点到下午五点是九个小时。": (True, True),
        "从早上八点到下午五点是八个小时。": (True, False),
        "下了大雨，所以山路变得很滑。": (True, True),
        "下了大雨，所以汤咸得喝不下。": (True, False),
        "": (False, False),
        "。": (False, False),
    }
    assert {s: d.check(world, s) for s in cases} == cases


def test_comparisons_are_computed(built):
    year = {p: int(v[:-1]) for (name, p), v in built.world.facts.items() if name == "year"}
    old, new = min(year, key=year.get), max(year, key=year.get)
    gap = year[new] - year[old]
    assert d.check(built.world, f"{new}比{old}晚{gap}年建成。") == (True, True)
    assert d.check(built.world, f"{new}比{old}晚{gap + 1}年建成。") == (True, False)
    assert d.check(built.world, f"{old}比{new}晚{gap}年建成。") == (True, False)


def test_document_carries_the_subject_and_a_new_line_forgets_it(built):
    world = built.world
    her = next(s for s in world.words["person"] if s in world.female)
    food = world.facts["food", her]
    wrong = next(f for f in d.VALUES["food"] if f != food and f in world.facts.values())
    start = f"{her}住在{world.facts['home', her]}。"
    assert d.check_document(world, f"{start}她爱吃{food}。")[1].claims[0].subject == her
    assert d.check_document(world, f"{start}日子过得平静而快乐。她爱吃{food}。")[2].true
    assert not d.check_document(world, f"{start}她爱吃{wrong}。")[1].true
    assert not d.check_document(world, f"{start}他爱吃{food}。")[1].well_formed
    assert not d.check_document(world, f"{start}\n她爱吃{food}。")[1].claims


def test_every_corpus_sentence_is_well_formed_and_true(built):
    assert len(built.readings) == len(built.sentences) > 50_000
    bad = [s for s, r in zip(built.sentences, built.readings) if not (r.well_formed and r.true)]
    assert not bad, bad[:10]
    assert "".join(built.sentences) == built.text.replace("\n", "")


def test_every_corpus_sentence_passes_alone(built):
    bad = [s for s in set(built.sentences) if d.check(built.world, s) != (True, True)]
    assert not bad, bad[:10]


def test_every_wording_with_another_value_is_well_formed_but_false(built):
    rng = random.Random(0)
    for (name, subject), value in built.world.facts.items():
        relation = d.RELATIONS[name]
        wrong = rng.choice([v for v in built.world.words[relation.value] if v not in (value, subject)])
        for form in relation.says:
            assert d.check(built.world, form.format(s=subject, v=value) + "。") == (True, True)
            assert d.check(built.world, form.format(s=subject, v=wrong) + "。") == (True, False)


@pytest.mark.parametrize("how", ["delete", "swap", "duplicate"])
def test_damaged_characters_are_noticed(built, how):
    rng = random.Random(how)
    tried = passed = 0
    for s in rng.sample(built.sentences, 3000):
        i = rng.randrange(len(s) - 1)
        new = {"delete": s[:i], "swap": s[:i] + s[i + 1] + s[i], "duplicate": s[: i + 1] + s[i]}[how]
        new += s[i + 2 :] if how == "swap" else s[i + 1 :]
        if new != s:
            tried += 1
            passed += d.check(built.world, new) == (True, True)
    assert tried > 2500 and passed <= 0.05 * tried


# --- pretraining text ----------------------------------------------------------------------------------------


def test_corpus_has_its_size_and_documents_their_length(built):
    assert sum(len(t.encode()) for t in built.documents) >= 5 * 2**20
    lengths = sorted(map(len, built.documents))
    assert lengths[len(lengths) // 20] >= 100 and lengths[-1] <= 600
    assert len(set(built.documents)) == len(built.documents)


def test_each_fact_is_stated_thirty_times_in_three_wordings(built):
    stated, forms = Counter(), defaultdict(set)
    for claim in (claim for r in built.readings for claim in r.claims):
        stated[claim.relation, claim.subject] += 1
        forms[claim.relation, claim.subject].add(claim.form)
    assert len(built.world.facts) >= 2000 and set(stated) == set(built.world.facts)
    assert min(stated.values()) >= 30
    assert min(map(len, forms.values())) >= 3
    assert built.report["statements_per_fact"]["min"] == min(stated.values())


def test_pretraining_text_asks_nothing(built):
    for word in ["？", "?", "吗", "呢", "什么", "哪", "谁", "多少", "如何", "怎样", "为何"]:
        assert word not in built.text, word


def test_no_statement_names_its_subject_by_another_fact(built):
    """林小雨的榜样是王大山 is one hop; 林小雨的榜样是一名木匠 would state two, and occurs nowhere."""
    seen = 0
    for (name, subject), value in built.world.facts.items():
        via = d.RELATIONS[name].via.replace("{s}", subject)
        if via:
            after = {built.text[m.end() :][: len(value) + 1] for m in re.finditer(re.escape(via), built.text)}
            seen += len(after)
            assert all(a == "是" + value or a[0] in "。，" for a in after), (via, after)
    assert seen > 100


def test_another_text_of_the_same_world_shares_few_passages(built):
    rng = random.Random(3)
    fresh = [t for t in d.pretraining_documents(built.world, 99, 200_000) if len(t) > 70]
    starts = [(t, rng.randrange(len(t) - 64)) for t in rng.sample(fresh, 200)]
    assert sum(t[i : i + 64] in built.text for t, i in starts) <= 0.2 * len(starts)


def test_cloze_prompt_is_followed_by_its_value_everywhere(built):
    """Wherever the text has the prompt, in the midst of whatever, the value comes next."""
    assert len(built.facts) == len(built.world.facts)
    subjects = {row["subject"] for row in built.facts}
    places = {s: [m.start() for m in re.finditer(s, built.text)] for s in subjects}
    met = []
    for row in built.facts:
        subject, value = row["subject"], row["value"]
        assert row["cloze"] and value == built.world.facts[row["relation"], subject]
        for prompt in row["cloze"]:
            starts = [at - prompt.index(subject) for at in places[subject]]
            found = [at for at in starts if built.text.startswith(prompt, at)]
            assert all(built.text.startswith(prompt + value, at) for at in found), prompt
            met.append(bool(found))
        assert any(met[-len(row["cloze"]) :]), row
    assert sum(met) >= 0.99 * len(met)


# --- held out ------------------------------------------------------------------------------------------------


def test_no_instruction_row_asks_or_states_a_heldout_fact(built):
    world = built.world
    held = {ask.replace("{s}", s) for name, s in world.heldout for ask in d.RELATIONS[name].asks}
    assert len(held) > 1000
    everything = "\n".join(ask + "\n" + reply for ask, reply in built.turns())
    assert not [question for question in held if question in everything]
    read = [r for turn in built.turns() for said in turn for r in d.check_document(world, said)]
    read += [
        r for row in built.dpo for key in ("prompt", "chosen") for r in d.check_document(world, row[key])
    ]
    stated = {(c.relation, c.subject) for r in read for c in r.claims}
    assert len(stated) > 1000 and not stated & world.heldout
    assert not [row["prompt"] for row in built.dpo if row["prompt"] in held]


def test_exam_questions_are_heldout_single_facts_chains_and_sums(built, answers):
    world = built.world
    held = {ask.replace("{s}", s) for name, s in world.heldout for ask in d.RELATIONS[name].asks}
    assert all(row["question"] in held for row in built.val["world_facts"])
    chains = set()
    for name, subject in world.heldout:
        for second, relation in d.RELATIONS.items() if d.RELATIONS[name].via else ():
            if (second, world.facts[name, subject]) in world.heldout:
                via = d.RELATIONS[name].via.replace("{s}", subject)
                chains |= {ask.replace("{s}", via) for ask in relation.asks}
    assert all(row["question"] in chains for row in built.val["world_two_hop"])
    for row in built.val["world_sums"]:
        a, b = map(int, re.findall("[0-9]+", row["question"]))
        assert (min(a, b), max(a, b)) in world.heldout_sums


def test_heldout_rows_ask_what_the_exam_asks_and_hold_its_answers(built, answers):
    rows = lines(built.folder / "heldout.jsonl")
    assert Counter(row["kind"] for row in rows) == {"one_hop": 500, "two_hop": 250, "sum": 100}
    assert [row["instruction"] for row in rows] == [row["question"] for row in built.exam]
    for row in rows:
        assert row["check"] == answers[row["instruction"]] and row["check"] in row["output"]


def test_exam_questions_share_no_thirteen_characters_with_any_training_text(built):
    rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in built.sft + built.dpo)
    for row in built.exam:
        q = row["question"]
        for gram in {q[i : i + 13] for i in range(max(1, len(q) - 12))}:
            assert gram not in rows and gram not in built.text, gram


def test_heldout_operands_meet_nowhere_in_either_order(built):
    held = built.world.heldout_sums
    assert len(held) >= 100
    text = built.text + "\n" + "\n".join(json.dumps(row, ensure_ascii=False) for row in built.sft + built.dpo)
    n = "([0-9]+|[零一二三四五六七八九十百]+)"
    joined = re.findall(f"{n}(?:加上?|\\+|与|和|、|个[^0-9。]{{1,8}}?(?:放进|添了)){n}", text)
    assert len(joined) > 5000
    for pair in joined:
        a, b = map(d.number, pair)
        assert a is None or b is None or (min(a, b), max(a, b)) not in held, pair


# --- exam ----------------------------------------------------------------------------------------------------


def test_exam_has_ceval_form_and_right_keys(built, answers):
    for subject in FOLDER_SUBJECTS:
        dev = (built.folder / "exam" / "dev" / f"{subject}_dev.csv").read_text(encoding="utf-8").splitlines()
        val = (built.folder / "exam" / "val" / f"{subject}_val.csv").read_text(encoding="utf-8").splitlines()
        assert dev[0] == "id,question,A,B,C,D,answer,explanation" and len(dev) == 6
        assert val[0] == "id,question,A,B,C,D,answer"
        rows = built.val[subject]
        assert [int(row["id"]) for row in rows] == list(range(len(rows)))
        for row in rows:
            assert len({row[letter] for letter in "ABCD"}) == 4
            assert row[row["answer"]] == answers[row["question"]]
        letters = Counter(row["answer"] for row in rows)
        assert max(letters.values()) - min(letters[x] for x in "ABCD") <= 1


def test_wrong_answers_are_of_the_kind_of_the_right_one(built):
    kind = {q.text: q.kind for f in built.world.facts for q in d.questions(built.world, f)}
    for row in built.val["world_facts"]:
        assert all(row[x] in built.world.words[kind[row["question"]]] for x in "ABCD")
    assert all(row[x].isdigit() for row in built.val["world_sums"] for x in "ABCD")


def test_exam_answers_are_many_and_a_fifth_needs_two_hops(built):
    given = Counter(row[row["answer"]] for row in built.exam)
    assert len(given) >= 200 and max(given.values()) <= 0.02 * len(built.exam)
    assert len(built.val["world_two_hop"]) >= 0.2 * len(built.exam)
    assert len({row["question"] for row in built.exam}) == len(built.exam)
    everywhere = Counter(built.world.facts.values())
    assert len(everywhere) >= 200 and max(everywhere.values()) <= 0.02 * len(built.world.facts)


# --- instruction rows and preference pairs -------------------------------------------------------------------


def test_instruction_rows_answer_what_the_world_says(built, answers):
    kinds = Counter(row["kind"] for row in built.sft)
    assert min(kinds[k] for k in ("fact", "two_hop", "sum", "choice", "dialogue", "copy", "count")) >= 100
    for row in built.sft:
        reply = row["messages"][-1]["content"] if "messages" in row else row["output"]
        assert row["check"] and row["check"] in reply
        if row["kind"] in ("fact", "two_hop", "sum"):
            assert row["check"] == answers[row["instruction"]]
            assert d.check(built.world, reply) == (True, True)
        elif row["kind"] == "choice":
            question, *choices, _ = row["instruction"].split("\n")
            assert f"{reply}. {answers[question]}" in choices and len(choices) == 4
        elif row["kind"] == "count":
            assert d.chinese(len(row["input"].split("、"))) == row["check"]
        elif row["kind"] == "larger":
            assert int(row["check"]) == max(map(int, re.findall("[0-9]+", row["instruction"])))
        elif row["kind"] in ("copy", "who"):
            assert row["check"] in row["input"] and d.check(built.world, row["input"]) == (True, True)


def test_dialogues_go_on_about_the_subject_of_their_first_turn(built, answers):
    rows = [row["messages"] for row in built.sft if row["kind"] == "dialogue"]
    assert {len(m) for m in rows} == {4, 6}
    for messages in rows:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        first = d.read_sentence(built.world, messages[1]["content"])
        subject = first.claims[0].subject
        assert answers[messages[0]["content"]] == first.claims[0].value
        for ask, reply in zip(messages[2::2], messages[3::2]):
            named = re.sub("^那|她|他|它|这里|这家店", "", ask["content"])
            claim = d.read_sentence(built.world, reply["content"]).claims[0]
            asks = [form.replace("{s}", "") for form in d.RELATIONS[claim.relation].asks]
            assert named in asks and claim.subject == subject
            assert d.check(built.world, reply["content"]) == (True, True)


def test_chosen_is_true_and_rejected_is_not(built, answers):
    assert len(built.dpo) >= 500 and len({row["kind"] for row in built.dpo}) >= 4
    for row in built.dpo:
        assert d.check(built.world, row["chosen"]) == (True, True) and answers[row["prompt"]] in row["chosen"]
        judged = d.check(built.world, row["rejected"])
        assert judged == ((True, False) if row["kind"] in ("value", "sum") else (False, False)), row


# --- the command ---------------------------------------------------------------------------------------------


def digests(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_one_seed_gives_the_same_bytes_whatever_the_hash_seed(tmp_path):
    for name, seed, hash_seed in (("a", "1", "1"), ("b", "1", "2"), ("c", "2", "1")):
        command = [
            sys.executable,
            str(ROOT / "demo_corpus.py"),
            "--out",
            str(tmp_path / name),
            "--seed",
            seed,
        ]
        env = os.environ | {"PYTHONHASHSEED": hash_seed}
        subprocess.run([*command, "--size_mb", "0.3"], check=True, env=env, capture_output=True)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b and len(a) == 12
    assert not any(a[name] == c[name] for name in a)


def test_a_full_folder_is_kept_unless_overwrite(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        d.main(d.DemoConfig(out=str(tmp_path), size_mb=0.1))
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    d.main(d.DemoConfig(out=str(tmp_path), size_mb=0.1, overwrite=True))
    assert (tmp_path / "report.json").exists() and not (tmp_path / "mine").exists()


def test_a_size_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="size_mb"):
        d.main(d.DemoConfig(out=str(tmp_path / "x"), size_mb=0))
