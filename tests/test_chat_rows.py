"""Conversations as rows: only replies are trained, none is cut, held-out questions are unseen, mixtures are exact."""

import functools
import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data import joined, log_normal, numbered, same_batch, write_jsonl, write_shards

import data
import model as M
import tokenizer as tok

CHARACTERS = "白纸上写着你好世界今天气很一二三四五六七八九十问答：。？！， \nHumanAsite#提回"
MARKS = "<|im_start|>,<|im_end|>,<|System|>,<|Human|>,<|YaYi|>,<|End|>"
IGNORE = data.IGNORE

# --- helpers -------------------------------------------------------------------------------------------------


def chat(*turns, system="", **keys):
    """Make a row: a question, a reply, a question, …"""
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages, **keys}


def conversations(count, seed=0, most=40):
    """Make different rows of one to three turns of up to `most` characters; each names its number."""
    draw = random.Random(seed)

    def words():
        return "".join(draw.choices("白纸上写着你好世界今天气很", k=draw.randint(1, most)))

    return [
        chat(f"{n}？{words()}", *(words() for _ in range(draw.choice((1, 1, 1, 3, 5))))) for n in range(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer with one token a character, so that a test can count by hand."""
    root = tmp_path_factory.mktemp("chars")
    corpus = write_jsonl(root / "corpus.jsonl", [CHARACTERS] * 50)
    tok.train(tok.Train([str(corpus)], str(root / "tok"), kind="char", vocab_size=400, specials=MARKS))
    return root / "tok"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tok.load_tokenizer(folder)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return data.ChatRows(conversations(300), tokenizer, 256, "plain")


@pytest.fixture(scope="module")
def text(folder, tmp_path_factory):
    """Plain text of the same tokenizer, packed; some documents are longer than a row."""
    root, draw = tmp_path_factory.mktemp("text"), random.Random(1)
    texts = ["".join(draw.choices("一二三四五六七八九十", k=draw.choice((20, 60, 300)))) for _ in range(300)]
    corpus = write_jsonl(root / "corpus.jsonl", texts)
    data.pack(data.PackConfig((str(corpus),), str(folder), str(root / "lm"), 0.0, workers=1))
    return data.Shards([root / "lm"], "train")


def shown(tokenizer, ids):
    """Write ids as one sign each: </s> as E, <s> as B, a line break as /, no target as ·"""
    signs = {tokenizer.bos_id: "B", tokenizer.eos_id: "E", IGNORE: "·"}
    return "".join(signs.get(i) or tokenizer.token_text(i).replace("\\n", "/").replace("▁", " ") for i in ids)


def alone(rows, document):
    """One row that holds one document and nothing else."""
    n = rows.length(document)
    return data.collate(rows, [[(document, 0, n)]], n)


@functools.cache
def by_ids(rows):
    return {tuple(rows.read(d, 0, rows.length(d)).tolist()): d for d in range(len(rows))}


def pieces_of(rows, batch):
    """Find the documents of a batch of padded rows by their ids."""
    known = by_ids(rows)
    ends = [int((row != 0).sum()) for row in batch["ids"]]  # no document here holds <unk>, id 0
    return [known[tuple(row[:n].tolist())] for row, n in zip(batch["ids"], ends) if n]


# --- 1. packed rows ------------------------------------------------------------------------------------------


def test_hand_worked_conversations_pack_into_the_hand_worked_row(tokenizer):
    made = data.ChatRows([chat("你好？", "好。", "天？", "白"), chat("纸", "！")], tokenizer, 32, "plain")
    assert [made.length(i) for i in range(2)] == [21, 9] and made.tokens == 30
    batch = data.collate(made, list(data.RowStream(made, 32, 0, shuffle=False)), 32)
    assert (
        shown(tokenizer, batch["ids"][0, :30].tolist())
        == "B问：你好？/答：好。E问：天？/答：白EB问：纸/答：！E"
    )
    assert shown(tokenizer, batch["targets"][0].tolist()) == "········好。E·······白E·······！E···"
    assert batch["doc_ids"][0].tolist() == [0] * 21 + [1] * 9 + [-1] * 2
    assert made.bytes == len("好。白！".encode())


@pytest.mark.parametrize("width", [256, 1000])
def test_a_packed_row_is_its_conversations_one_after_another(rows, width):
    stream = data.RowStream(rows, width, seed=3)
    for _ in range(40):
        pieces = next(stream)
        batch = data.collate(rows, [pieces], width)
        each = [alone(rows, d) for d, _, _ in pieces]
        end = sum(rows.length(d) for d, _, _ in pieces)
        for key in ("ids", "targets"):
            assert torch.equal(batch[key][0, :end], torch.cat([b[key][0] for b in each]))
        assert batch["doc_ids"][0].tolist() == [
            n for n, (_, _, count) in enumerate(pieces) for _ in range(count)
        ] + [-1] * (width - end)
        assert (batch["targets"][0, end:] == IGNORE).all()


def test_packed_and_padded_rows_give_the_loss_and_the_gradient_of_each_row_alone(rows, tokenizer, one_thread):
    torch.manual_seed(0)
    model = M.build(M.ModelConfig("llama", tokenizer.vocab_size, 32, 2, 4, 64, 256))
    M.init_weights(model, 1)

    def gradient(batches):
        model.zero_grad()
        nll = sum(model(b["ids"], b["targets"], doc_ids=b.get("doc_ids")).sum() for b in batches)
        nll.backward()
        return nll.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    step = data.PaddedBatches(rows, 2048, 512, 5)
    padded = next(step)
    documents = [d for batch in padded for d in pieces_of(rows, batch)]
    packed = data.RowStream(rows, 256, 0, shuffle=False)
    packed.documents = documents
    want, grad = gradient([alone(rows, d) for d in documents])
    for batches in (padded, [data.collate(rows, [row], 256) for row in packed]):
        assert "doc_ids" in batches[0] or batches is padded
        have, other = gradient(batches)
        assert have == pytest.approx(want, rel=1e-5)
        assert (grad - other).norm() < 1e-5 * grad.norm()


REPLIES = {  # what a template trains of a reply, written by hand
    "plain": "{}</s>",
    "phi2-chinese": "\n{}</s>",
    "xuanyuan-6b": " {}</s>",
    "llama-2": " {} </s>",
    "yayi": ":\n{}\n\n<|End|>",
    "yayi-multi": "{}\n\n<|End|>",
    "chatml": "{}<|im_end|>",
}


@pytest.mark.parametrize("template", REPLIES)
def test_every_reply_with_its_end_is_a_target_and_nothing_of_a_prompt(tokenizer, template):
    source = conversations(40)
    made = data.ChatRows(source, tokenizer, 1000, template)
    assert made.rows == source and not made.dropped
    for d, row in enumerate(source):
        batch = alone(made, d)
        targets = batch["targets"][0]
        trained = (targets != IGNORE).nonzero().flatten().tolist()
        assert all(targets[t] == batch["ids"][0, t + 1] for t in trained), "the next token"
        runs = []  # stretches without a gap: one per reply
        for t in trained:
            if not runs or runs[-1][-1] != t - 1:
                runs.append([])
            runs[-1].append(t)
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        texts = [tokenizer.decode(targets[run].tolist(), skip_special=False, at_start=False) for run in runs]
        assert texts == [REPLIES[template].format(reply) for reply in replies]


def test_each_token_is_trained_once_an_epoch_or_never(rows):
    batches = joined(list(data.validation_batches(rows, 256, 4)))
    assert int((batches["targets"] != IGNORE).sum()) == int(rows.mask.sum())
    assert int((batches["doc_ids"] >= 0).sum()) == rows.tokens == len(rows.mask)
    halves = [joined(list(data.validation_batches(rows, 256, 4, rank, 2))) for rank in range(2)]
    assert sum(int((h["targets"] != IGNORE).sum()) for h in halves) == int(rows.mask.sum())


@pytest.mark.parametrize("width", [256, [256, 512]])
def test_no_conversation_is_cut_and_each_comes_once_an_epoch(rows, width):
    stream, seen = data.RowStream(rows, width, seed=2), Counter()
    while stream.epoch < 3:
        seen.update(next(stream))
    seen.update(stream.waiting.values())
    assert {(start, count == rows.length(d)) for d, start, count in seen} == {(0, True)}
    begun = {data.shuffled(p, len(rows), 2, 3) for p in range(stream.position)}
    assert {d: n for (d, _, _), n in seen.items()} == {d: 3 + (d in begun) for d in range(len(rows))}


def test_no_target_is_the_first_token_of_another_document(rows):
    stream = data.RowStream(rows, 512, seed=4)
    batch = data.collate(rows, [next(stream) for _ in range(20)], 512)
    ends = batch["doc_ids"][:, :-1] != batch["doc_ids"][:, 1:]
    assert ends.sum() > 50
    assert (batch["targets"][:, :-1][ends] == IGNORE).all() and (batch["targets"][:, -1] == IGNORE).all()


# --- 2. rows that are too long -------------------------------------------------------------------------------

LONG = chat(
    "一一", "二二", "三三", "四四", "五五", "六六", check="六", kind="数"
)  # <s>, 3 turns of 10 tokens
SHORT = chat("一", "二")  # <s>, and 8 tokens


@pytest.mark.parametrize(("context", "kept"), [(31, [LONG, SHORT]), (30, [SHORT]), (9, [SHORT])])
def test_rows_of_more_than_the_context_are_dropped_and_counted_one_as_long_is_kept(tokenizer, context, kept):
    made = data.ChatRows([LONG, SHORT], tokenizer, context, "plain")
    assert made.rows == kept
    assert (made.dropped, made.cut, made.untrained) == (2 - len(kept), 0, 0)


@pytest.mark.parametrize(("context", "turns"), [(31, 3), (30, 2), (21, 2), (20, 1), (11, 1), (10, 0), (9, 0)])
def test_rows_are_cut_at_whole_turns_from_the_end(tokenizer, context, turns):
    made = data.ChatRows([LONG, SHORT], tokenizer, context, "plain", "cut")
    assert (made.dropped, made.cut) == (turns == 0, 0 < turns < 3)
    begun = {"messages": LONG["messages"][: 2 * turns], "kind": "数"}  # the check was that of the last reply
    assert made.rows == [*{0: [], 3: [LONG]}.get(turns, [begun]), SHORT]
    if turns:
        begun, _ = tokenizer.encode_chat(LONG["messages"][: 2 * turns], template="plain")
        assert made.read(0, 0, 99).tolist() == begun and len(begun) <= context
        assert made.bytes == len("二二四四六六"[: 2 * turns].encode()) + len("二".encode())
    assert made.read(len(made) - 1, 0, 99)[-1] == tokenizer.eos_id


def test_a_cut_row_keeps_its_system_and_ends_with_a_reply_also_where_tools_are_called():
    messages = [
        {"role": r, "content": r} for r in "system user assistant exec assistant user assistant".split()
    ]

    def kept(most):
        return [m["role"] for m in data.whole_turns(messages, lambda m: len(m) <= most)]

    assert [len(kept(most)) for most in range(9)] == [0, 0, 0, 3, 3, 5, 5, 7, 7]
    assert kept(6) == "system user assistant exec assistant".split()


def test_rows_that_need_not_be_kept_leave_only_their_place(tokenizer):
    source = [LONG | {"where": "a.jsonl:1"}, chat("一？"), SHORT]
    whole, bare = (data.ChatRows(source, tokenizer, 30, "plain", "cut", keep) for keep in (True, False))
    assert bare.rows == [{"where": "a.jsonl:1"}, {"where": "row 3"}] and len(bare) == len(whole)
    assert bare.fingerprint == whole.fingerprint and (bare.cut, bare.untrained) == (1, 1)


def test_a_pair_that_the_template_cannot_write_is_named(tokenizer):
    pair = chat("一？", chosen="二", rejected="三")
    call = chat("一", "二", chosen="三", rejected="四")
    call["messages"].append({"role": "exec", "content": "2"})
    for place, words in (({"where": "b.jsonl:7"}, "^b.jsonl:7: .*exec"), ({}, "^row 2: .*exec")):
        with pytest.raises(ValueError, match=words):
            data.PairRows([pair, call | place], tokenizer, 64, template="plain")


def test_a_row_without_a_reply_is_left_out_and_counted(tokenizer):
    made = data.ChatRows([chat("一？"), SHORT, chat("二？")], tokenizer, 64, "plain")
    assert made.rows == [SHORT] and (made.dropped, made.untrained) == (0, 2)
    assert len(data.ChatRows([], tokenizer, 64, "plain")) == 0


def test_what_cannot_be_trained_is_named(tokenizer):
    with pytest.raises(
        ValueError, match="no conversation .*: 2 are longer than 8 tokens .*, 1 hold no reply"
    ):
        data.ChatRows([LONG, SHORT, chat("一")], tokenizer, 8, "plain")
    call = chat("一", "二")
    call["messages"] += [{"role": "exec", "content": "3"}, {"role": "assistant", "content": "三"}]
    with pytest.raises(ValueError, match=r"^a.jsonl:7: .*exec"):
        data.ChatRows([SHORT, call | {"where": "a.jsonl:7"}], tokenizer, 64, "plain")
    with pytest.raises(ValueError, match=r"^row 2: .*exec"):
        data.ChatRows([SHORT, call], tokenizer, 64, "plain")


def test_the_fingerprint_notices_another_word_mask_template_or_tokenizer(tokenizer):
    def fingerprint(*rows, template="plain", context=64):
        return data.ChatRows(rows, tokenizer, context, template).fingerprint

    same = fingerprint(LONG, SHORT)
    assert same == fingerprint(LONG, SHORT, context=99)
    others = [fingerprint(SHORT, LONG), fingerprint(LONG), fingerprint(LONG, SHORT, template="xuanyuan-6b")]
    made = data.ChatRows([LONG, SHORT], tokenizer, 64, "plain")
    made.mask = made.mask ^ (np.arange(len(made.mask)) == 7)
    others.append(made.fingerprint)
    made = data.ChatRows([LONG, SHORT], tokenizer, 64, "plain")
    made.tokenizer = "another"
    assert len({same, *others, made.fingerprint}) == 6


# --- 3. rows that are held out -------------------------------------------------------------------------------


def asked(rows):
    return [r["messages"][0]["content"] for r in rows]


def test_rows_of_one_question_are_held_out_together(tokenizer):
    draw = random.Random(0)
    rows = [chat(f"问{n % 97}" + " " * draw.randint(0, 2), f"答{n}") for n in range(500)]
    rows += [chat(f"问{n}", "一", "二", f"三{n}") for n in range(97)]
    for seed in range(5):
        train, held = data.hold_out(rows, 60, seed)
        assert not {q.strip() for q in asked(train)} & {q.strip() for q in asked(held)}
        assert 60 - 7 < len(held) <= 60 and len(train) + len(held) == len(rows)


@pytest.mark.parametrize(
    ("size", "count"), [(40, 40), (1, 1), (0.1, 40), (0.5, 200), (0.0024, 1), (0, 0), (399, 399)]
)
def test_a_number_or_a_share_of_rows_is_held_out(size, count):
    rows = [chat(f"问{n}", f"答{n}", index=n) for n in range(400)]
    train, held = data.hold_out(rows, size, 3)
    assert (len(train), len(held)) == (400 - count, count)
    for part in (train, held):
        assert [r["index"] for r in part] == sorted(r["index"] for r in part), "in the order that they had"
    assert sorted(r["index"] for r in train + held) == list(range(400))


def test_what_is_held_out_depends_on_questions_and_seed_not_on_the_order():
    rows = [chat(f"问{n // 2}", f"答{n}") for n in range(400)]
    mixed = random.Random(1).sample(rows, len(rows))
    held = [sorted(asked(data.hold_out(r, 0.2, seed)[1])) for r in (rows, mixed) for seed in (1, 2)]
    assert held[0] == held[2] and held[1] == held[3] and held[0] != held[1]
    longer = asked(data.hold_out([*rows, *(chat(f"新{n}", "答") for n in range(40))], 80, 1)[1])
    assert len(set(longer) & set(held[0])) > 0.8 * len(set(held[0])), "new rows move few of the others"


@pytest.mark.parametrize("size", [-1, 2.5, 400, 1e9, 0.999, 0.001, float("nan"), float("inf")])
def test_a_size_that_leaves_no_rows_on_one_side_is_refused(size):
    rows = [chat(f"问{n}", "答") for n in range(400)]
    with pytest.raises(ValueError, match="holding out .* of 400 rows with 400 different questions: give"):
        data.hold_out(rows, size)


def test_rows_of_one_single_question_cannot_be_split():
    with pytest.raises(ValueError, match="holding out 5 of 40 rows with 1 different questions"):
        data.hold_out([chat("问", f"答{n}") for n in range(40)], 5)


# --- 4. answers and plain text -------------------------------------------------------------------------------


@pytest.fixture
def both(rows, text):
    return data.Joined({"chat": rows, "lm": text})


def test_joined_parts_are_their_documents_one_after_another(both, rows, text):
    assert len(both) == len(rows) + len(text) and both.tokens == rows.tokens + text.tokens
    assert both.sources["chat"] == (range(len(rows)), rows.tokens)
    assert both.sources["lm"] == (range(len(rows), len(both)), text.tokens)
    for part, first in ((rows, 0), (text, len(rows))):
        for i in (0, 1, len(part) - 1):
            n = part.length(i)
            assert both.length(first + i) == n
            assert both.read(first + i, 2, 5).tolist() == part.read(i, 2, 5).tolist()
            assert both.read(first + i, n - 1, 5).tolist() == part.read(i, n - 1, 1).tolist()
            mask = both.trained(first + i, 1, n)
            assert mask is None if part is text else mask.tolist() == part.trained(i, 1, n).tolist()


@pytest.mark.parametrize("share", [0.3, 0.05])
def test_lm_mix_gives_its_share_of_the_tokens_and_text_is_trained_whole_and_replies_alone(
    both, rows, text, tokenizer, share
):
    stream = data.Mixture(both, 256, 1, {"chat": 1 - share, "lm": share})
    batches, taken, trained = data.Batches(stream, 8, 4), Counter(), Counter()
    numbers = set(tokenizer.encode("一二三四五六七八九十"))
    ends = 0
    for step in range(100):
        for batch in next(batches):
            for ids, targets, doc_ids in zip(*(batch[k] for k in ("ids", "targets", "doc_ids"))):
                kind = "lm" if numbers & set(ids.tolist()) else "chat"
                taken[kind] += int((doc_ids >= 0).sum())
                trained[kind] += int((targets != IGNORE).sum())
                if kind == "lm":  # all but what a document's last token would predict
                    inner = doc_ids[:-1] == doc_ids[1:]
                    inner &= doc_ids[:-1] >= 0
                    assert torch.equal(targets[:-1][inner], ids[1:][inner])
        ends = max(ends, abs(taken["lm"] / taken.total() - share)) if step >= 20 else 0
    assert ends < 0.01 and taken["lm"] / taken.total() == pytest.approx(share, abs=2e-3)
    assert trained["lm"] > 0.95 * taken["lm"]
    assert trained["chat"] / taken["chat"] == pytest.approx(rows.mask.mean(), abs=0.02)


def test_a_mixture_of_answers_and_text_resumes_exactly_on_other_numbers_of_ranks(both):
    def batches(rank=0, world=1):
        stream = data.Mixture(both, 256, 1, {"chat": 0.7, "lm": 0.3})
        return data.Batches(stream, 8, 2, rank, world)

    whole = batches()
    for _ in range(7):
        next(whole)
    state = json.loads(json.dumps(whole.state()))
    ranks = [batches(rank, 2) for rank in range(2)]
    for rank in ranks:
        rank.load_state(state)
    for _ in range(5):
        want, have = joined(next(whole)), [joined(next(rank)) for rank in ranks]
        assert same_batch({k: torch.stack([h[k] for h in have], 1).flatten(0, 1) for k in want}, want)


def test_text_of_another_tokenizer_is_refused_and_the_fingerprint_is_of_both(both, rows, text, tmp_path):
    with pytest.raises(ValueError, match="chat and lm have different tokenizers; pack"):
        data.Joined({"chat": rows, "lm": write_shards(tmp_path / "other", [[1, 5, 2]])})
    others = [
        {"chat": rows},
        {"chat": text, "lm": rows},
        {"chat": rows, "lm": rows},
        {"chat": rows, "zh": text},
    ]
    prints = {both.fingerprint, *(data.Joined(parts).fingerprint for parts in others)}
    assert len(prints) == 5
    assert data.Joined({"chat": rows, "lm": text}).fingerprint == both.fingerprint


# --- 5. padded rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("room", "pools"), [(1024, 1), (100, 4)])
def test_padded_rows_hold_each_conversation_once_an_epoch(rows, room, pools):
    batches = data.PaddedBatches(rows, room, room, 7)
    steps, seen = batches.steps(2), Counter()
    assert batches.pools == pools and abs(batches.steps(1) - steps / 2) <= 2
    assert abs(batches.steps(0.5) - steps / 4) <= 2 and abs(batches.steps(1.5) - steps * 0.75) <= 2
    orders = []
    for _ in range(steps):
        (batch,) = next(batches)
        found = pieces_of(rows, batch)
        seen.update(found)
        orders.append(found)
        for row, d in zip(range(len(found)), found, strict=True):
            n, one = rows.length(d), alone(rows, d)
            assert torch.equal(batch["targets"][row, :n], one["targets"][0])
            assert (batch["targets"][row, n:] == IGNORE).all()
    assert seen == dict.fromkeys(range(len(rows)), 2)
    assert batches.epochs() == {"epochs": 2.0}
    assert [len(o) for o in orders] != sorted(len(o) for o in orders), "in random order"
    if pools > 1:  # a pool's documents stand together in an epoch, others in the next, and with another seed
        other = data.PaddedBatches(rows, room, room, 8)
        thirds = [orders[: steps // 8], orders[steps // 2 :][: steps // 8]]
        thirds += [[pieces_of(rows, *next(other)) for _ in range(steps // 8)]]
        first, second, another = (set(sum(part, [])) for part in thirds)
        assert len(first) > 60 and max(len(first & second), len(first & another)) < len(first) / 2


def test_padded_rows_are_of_like_length_a_multiple_of_8_and_no_more_than_was_asked_for(rows):
    batches = data.PaddedBatches(rows, 4096, 2048, 7)
    assert batches.micros == 2
    positions = filled = plain = 0
    longest = rows.longest
    for _ in range(batches.steps(3)):
        step = next(batches)
        assert len(step) == 2
        for batch in step:
            lengths = [rows.length(d) for d in pieces_of(rows, batch)]
            width = batch["ids"].shape[1]
            assert width == min(longest, -(-max(lengths) // 8) * 8) and batch["ids"].numel() <= 2048
            assert set(batch) == {"ids", "targets"}
            positions += batch["ids"].numel()
            filled += sum(lengths)
            plain += len(lengths) * longest
    assert filled / positions > 0.85 and filled / plain < 0.4  # lengths grouped, and as they come


def test_padding_is_below_5_percent_on_realistic_lengths(tmp_path):
    """Measured: 4.0 %, and 65 % where rows come as chance has it."""
    lengths = [min(n, 1024) for n in log_normal(random.Random(0), 150, 0.7, 4000)]
    documents = numbered(tmp_path / "s", lengths)
    batches, positions = data.PaddedBatches(documents, 16384, 4096, 1), 0
    for _ in range(batches.steps(1)):
        positions += sum(batch["ids"].numel() for batch in next(batches))
    chance = sum(16 * -(-max(lengths[i : i + 16]) // 8) * 8 for i in range(0, 4000, 16))
    print(f"padding {1 - batches.tokens / positions:.4f}, by chance {1 - sum(lengths) / chance:.4f}")
    assert batches.tokens > 0.95 * positions and sum(lengths) < 0.55 * chance


def test_a_conversation_longer_than_a_micro_batch_is_a_micro_batch(tokenizer):
    made = data.ChatRows([LONG, SHORT, SHORT, SHORT], tokenizer, 31, "plain")
    batches = data.PaddedBatches(made, 20, 20, 0)
    shapes = Counter(tuple(b["ids"].shape) for _ in range(batches.steps(1)) for b in next(batches))
    assert shapes == {(1, 31): 1, (1, 16): 3}  # 31, not 32: no wider than the longest, so within any context


def test_padded_rows_resume_exactly_from_json_at_any_step(rows):
    batches = data.PaddedBatches(rows, 1500, 500, 7)
    steps, states = [], []
    for _ in range(3 * batches.steps(1)):
        states.append(json.dumps(batches.state()))
        steps.append(next(batches))
    assert len({json.loads(s)["pool"] for s in states}) >= 3
    for at in range(0, len(steps) - 3, 5):
        resumed = data.PaddedBatches(rows, 1500, 500, 7)
        resumed.load_state(json.loads(states[at]))
        for ahead in range(at, at + 3):
            assert all(map(same_batch, next(resumed), steps[ahead]))
        assert json.dumps(resumed.state()) == states[at + 3]
    other = data.PaddedBatches(rows, 1500, 500, 8)
    assert not all(a["ids"].shape == b["ids"].shape for a, b in zip(next(other), steps[0]))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_share_the_padded_micro_batches_that_one_rank_has(rows, world):
    """Up to 4 ranks take whole ones, 8 ranks share the rows of each."""
    one = data.PaddedBatches(rows, 1024, 256, 7)
    ranks = [data.PaddedBatches(rows, 1024, 256, 7, rank, world) for rank in range(world)]
    blanks = 0  # a micro-batch of one row leaves nothing for the second of two ranks
    for at in range(20):
        want, have = next(one), [next(rank) for rank in ranks]
        assert {len(mine) for mine in have} == {max(1, 4 // world)}
        if world <= 4:
            assert all(same_batch(want[i], have[i % world][i // world]) for i in range(4))
        else:
            for i, batch in enumerate(want):
                for half in range(2):
                    (part,) = have[2 * i + half]
                    mine = {k: v[half::2] for k, v in batch.items()}
                    blank = len(batch["ids"]) == half
                    blanks += blank
                    assert (part["targets"] == IGNORE).all() if blank else same_batch(part, mine)
        assert {json.dumps(rank.state()) for rank in ranks} == {json.dumps(one.state())}
        if at == 9:  # on with as many ranks, anew from the state of one
            ranks = [data.PaddedBatches(rows, 1024, 256, 7, rank, world) for rank in range(world)]
            for rank in ranks:
                rank.load_state(one.state())
    assert (blanks > 0) == (world == 8)


def test_micro_batches_that_ranks_cannot_share_are_refused_with_a_number_that_fits(rows):
    with pytest.raises(ValueError, match="makes 2 micro-batches of at most 512 .* take --micro_tokens 342"):
        data.PaddedBatches(rows, 1024, 512, 7, 0, 3)
    assert data.PaddedBatches(rows, 1024, 342, 7, 0, 3).micros == 3


# --- 6. what others' code gets wrong -------------------------------------------------------------------------


def buggy_xuanyuan(tokenizer, question, answer, most):
    """Label as XuanYuan's JsonDatasetSFT does: an EOS after the prompt, padding trained as EOS -> EOS."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    prompt, response = [bos, *tokenizer.encode(question), eos], [bos, *tokenizer.encode(answer), eos]
    ids, labels = (prompt + response)[:most], ([IGNORE] * len(prompt) + response)[:most]
    pad = most - len(ids)
    ids, labels = torch.tensor(ids + [eos] * pad), torch.tensor(labels + [eos] * pad)
    return ids[:-1], labels[1:]


def buggy_dolly(ids, pad_id):
    """Label as dolly's collator and DataCollatorForPT do: whatever has the padding's id is not trained."""
    return torch.where(ids == pad_id, IGNORE, ids)[1:]


def test_padding_is_never_trained_where_xuanyuans_targets_are_93_percent_eos_to_eos(tokenizer):
    eos, row = tokenizer.eos_id, chat("一" * 100, "二" * 190)
    ids, targets = buggy_xuanyuan(tokenizer, *(m["content"] for m in row["messages"]), 4096)
    idle = ((ids == eos) & (targets == eos)).sum() / 4096
    assert 0.92 < idle < 0.94
    assert idle * 4096 / (targets != IGNORE).sum() > 0.95, "nearly all that is trained"
    made = data.ChatRows([row], tokenizer, 4096, "xuanyuan-6b")
    batch = data.collate(made, [[(0, 0, made.length(0))]], 4096)
    batch["ids"][batch["doc_ids"] < 0] = eos  # even so
    assert not ((batch["ids"] == eos) & (batch["targets"] == eos)).any()
    assert int((batch["targets"] != IGNORE).sum()) == 192  # " ", 190 signs, EOS


def test_no_eos_stands_before_a_reply_and_no_bos_in_it(tokenizer):
    ids, _ = buggy_xuanyuan(tokenizer, "一", "二", 32)
    assert shown(tokenizer, ids.tolist()).startswith("B一EB二E"), "theirs"
    for template in REPLIES:
        made = data.ChatRows([SHORT], tokenizer, 999, template)
        ids = made.read(0, 0, 999).tolist()
        assert tokenizer.eos_id not in ids[:-1]
        assert tokenizer.bos_id not in ids[1:]


def test_a_pad_that_is_eos_deletes_no_eos_from_the_targets(tokenizer, rows, one_thread):
    made = data.ChatRows([LONG, SHORT], tokenizer, 64, "plain")
    ids = torch.tensor(made.read(0, 0, 99).tolist())
    eos = tokenizer.eos_id
    assert (buggy_dolly(ids, pad_id=eos) == eos).sum() == 0, "theirs learns no end"
    model = M.build(M.ModelConfig("llama", tokenizer.vocab_size, 32, 1, 2, 32, 64))
    M.init_weights(model, 1)
    for batch in (
        data.collate(made, [[(0, 0, 31), (1, 0, 9)]], 64),
        data.collate(made, [[(0, 0, 31)], [(1, 0, 9)]], 64),
        next(data.PaddedBatches(made, 128, 128, 0))[0],
    ):
        assert (batch["targets"] == eos).sum() == 4, "one for every reply"
        nll = model(batch["ids"], batch["targets"], doc_ids=batch.get("doc_ids"))
        padded = torch.where(batch["ids"] == 0, eos, batch["ids"])
        assert not torch.equal(padded, batch["ids"])
        assert torch.equal(model(padded, batch["targets"], doc_ids=batch.get("doc_ids")), nll)


def test_a_prompt_as_long_as_the_context_trains_nothing_instead_of_a_nan(tokenizer):
    row = chat("一" * 80, "二")
    ids, targets = buggy_xuanyuan(tokenizer, *(m["content"] for m in row["messages"]), 64)
    assert (targets == IGNORE).all()
    assert F.cross_entropy(torch.zeros(63, 9), targets).isnan(), "theirs: a mean over nothing"
    for too_long in ("drop", "cut"):
        made = data.ChatRows([row, SHORT], tokenizer, 64, "plain", too_long)
        assert made.rows == [SHORT] and made.dropped == 1
        for batch in (*data.validation_batches(made, 64, 2), *next(data.PaddedBatches(made, 64, 64, 0))):
            assert (batch["targets"] != IGNORE).any(1).all()
