"""Preference tuning: the losses, what of a pair is counted, the reference, and runs that resume exactly.

Oracles: numbers worked by hand, the papers' formulas written again as a loop over tokens, one conversation at a time.
"""

import dataclasses
import functools
import json
import math
import random
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, launch, packed_corpus
from safetensors.torch import load_file, save_file

import chat
import checkpoint
import common
import data
import dpo
import lora
import model as M
import tokenizer as tok
import train

ONE = common.Process(0, 1, "cpu")
LN2 = math.log(2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A vocabulary of 326 with the special tokens of YaYi; its template is `plain`."""
    folder = tmp_path_factory.mktemp("corpus")
    packed_corpus(folder, 200, (2, 8), 320)
    specials = "<|System|>,<|Human|>,<|YaYi|>,<|End|>"
    tok.train(
        tok.Train((str(folder / "corpus.jsonl"),), out=str(folder / "t"), vocab_size=326, specials=specials)
    )
    return tok.load_tokenizer(folder / "t").with_template("plain")


def small(vocab: int, seed: int = 1, std: float = 0.3, context: int = 96, **changes) -> M.Model:
    """A tiny LLaMA whose weights are large enough for answers to differ by many nats."""
    shape = {"num_key_value_heads": 2, "tie_word_embeddings": True} | changes
    model = M.build(M.ModelConfig("llama", vocab, 32, 2, 4, 64, context, **shape))
    M.init_weights(model, seed, std)
    return model


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def pair(question: str, chosen: str, rejected: str) -> dict:
    return {"messages": [user(question)], "chosen": chosen, "rejected": rejected}


def toy_pairs(n: int, seed: int = 0) -> list[dict]:
    """Questions about numbers of things; the rejected answer has another number, and is sometimes longer."""
    draw, pairs = random.Random(seed), []
    for _ in range(n):
        who, what = draw.choice("王小明 李红 张伟 赵静".split()), draw.choice("书 笔 灯 茶杯 木船".split())
        a, b = draw.sample(range(2, 99), 2)
        more = "，我想是这样" * draw.randint(0, 2)
        pairs.append(pair(f"{who}有几个{what}？", f"{who}有{a}个{what}。", f"有{b}个{more}"))
    return pairs


PAIRS = [
    *toy_pairs(6),
    {
        "messages": [user("你好"), {"role": "assistant", "content": "你好，请说。"}, user("李红有几支笔？")],
        "chosen": "李红有3支笔。",
        "rejected": "不知道",
    },
    pair("王小明有几本书？" * 3, "很多", "王小明有很多很多书，我想是这样。"),
]


def config(**changes) -> dpo.DPOConfig:
    return dpo.DPOConfig(out="out", init="init", **changes)


def cut(width: int, micro: int) -> train.Plan:
    return train.Plan(width, 2 * micro, micro, 1)


def one_batch(pairs: data.PairRows, width: int = 192) -> dict:
    """All pairs in one batch of packed rows."""
    return next(data.validation_batches(pairs, width, 1000))


def alone(model, tokenizer, row: dict, answer: str) -> float:
    """Oracle: log π(answer) in a forward pass of its own, from the logits, token by token."""
    prompt = tokenizer.encode_chat(row["messages"], open_reply=True)[0]
    ids = prompt + tokenizer.encode(row[answer]) + [tokenizer.eos_id]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0].double()
    return sum(float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(len(prompt), len(ids)))


# --- 1. the loss ---------------------------------------------------------------------------------------------


def test_dpo_cdpo_and_ipo_equal_numbers_worked_by_hand():
    """π: −10 and −12, reference: −11 and −10. h = 2 − (−1) = 3; β 0.1: σ(0.3) = 1/(1 + e^−0.3) = 0.574443."""
    h = torch.tensor(3.0, dtype=torch.float64)
    loss = lambda *args: float(dpo.preference_loss(h, *args))
    assert abs(loss("dpo", 0.1) - 0.5543552444685272) < 1e-12  # −ln 0.574443
    # ε 0.2: 0.8·0.554355 + 0.2·0.854355 (−ln σ(−0.3) = 0.554355 + 0.3)
    assert abs(loss("dpo", 0.1, 0.2) - 0.6143552444685272) < 1e-12
    assert abs(loss("ipo", 0.1) - 4.0) < 1e-12  # (3 − 5)²
    assert abs(loss("dpo", 0.5) - 0.20141327798275246) < 1e-12  # ln(1 + e^−1.5)
    zero = torch.zeros(1, dtype=torch.float64)
    for smoothing in (0.0, 0.1, 0.4):
        assert abs(float(dpo.preference_loss(zero, "dpo", 0.7, smoothing)) - LN2) < 1e-15
    assert abs(float(dpo.preference_loss(zero, "ipo", 0.1)) - 25) < 1e-12


def by_loop(model, reference, tokenizer, rows, kind, beta, smoothing, normalised) -> float:
    """The papers' losses again: one conversation at a time, with Python's floats."""
    total = 0.0
    for row in rows:
        gain = {}
        for answer in ("chosen", "rejected"):
            gain[answer] = alone(model, tokenizer, row, answer) - alone(reference, tokenizer, row, answer)
            if normalised:
                gain[answer] /= len(tokenizer.encode(row[answer])) + 1
        h = gain["chosen"] - gain["rejected"]
        if kind == "ipo":
            total += (h - 1 / (2 * beta)) ** 2
        else:
            total += (1 - smoothing) * math.log1p(math.exp(-beta * h))
            total += smoothing * math.log1p(math.exp(beta * h))
    return total


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind, beta, smoothing", [("dpo", 0.1, 0.0), ("dpo", 0.3, 0.1), ("ipo", 0.2, 0.0)])
def test_loss_of_packed_pairs_equals_a_loop_over_conversations(tokenizer, kind, beta, smoothing, normalised):
    model, reference = small(tokenizer.vocab_size), small(tokenizer.vocab_size, seed=2)
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    assert len(pairs) == len(PAIRS)
    pairs.reference = dpo.compute_reference(reference, pairs, cut(192, 3), ONE)
    cfg = config(loss=kind, beta=beta, label_smoothing=smoothing, length_normalised=normalised)
    value, count, logs = dpo.pair_loss(model, one_batch(pairs), cfg)
    expected = by_loop(model, reference, tokenizer, PAIRS, kind, beta, smoothing, normalised)
    assert int(count) == len(PAIRS)
    assert abs(value.item() - expected) < 1e-5 * abs(expected)


def test_gradients_equal_autograd_through_the_formula():
    """gradcheck in fp64, from per-token nll in packed rows through sums and loss."""
    torch.manual_seed(0)
    doc_ids = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3, -1], [0, 1, 1, -1, -1, -1, -1, -1, -1]])
    ref = torch.randn(2, 2, 2, dtype=torch.float64)
    real = torch.tensor([[1, 1], [1, 0]])

    def total(nll, *how):
        gain = -dpo.answer_sums(nll, doc_ids, 2) - ref
        return (dpo.preference_loss(gain[..., 0] - gain[..., 1], *how) * real).sum()

    nll = torch.rand(2, 9, dtype=torch.float64, requires_grad=True)
    for how in (("dpo", 0.7), ("dpo", 0.7, 0.2), ("ipo", 0.7)):
        assert torch.autograd.gradcheck(functools.partial(lambda how, x: total(x, *how), how), nll)
    (grad,) = torch.autograd.grad(total(nll, "dpo", 0.7), nll)
    assert (grad[doc_ids < 0] == 0).all() and (grad[doc_ids >= 0] != 0).all()
    # Rafailov et al. 2023, section 4: β·σ(−βh)·∇(log π(chosen) − log π(rejected)); nll = −log π
    gain = -dpo.answer_sums(nll, doc_ids, 2) - ref
    weight = 0.7 * torch.sigmoid(-0.7 * (gain[..., 0] - gain[..., 1]))
    assert torch.allclose(grad[0, :2], weight[0, 0]) and torch.allclose(grad[0, 2:5], -weight[0, 0])


def test_every_log_is_what_its_sentence_says(tokenizer):
    model, reference = small(tokenizer.vocab_size), small(tokenizer.vocab_size, seed=2)
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    pairs.reference = dpo.compute_reference(reference, pairs, cut(192, 3), ONE)
    logs = dpo.pair_loss(model.eval(), one_batch(pairs), config(beta=0.2))[2]
    policy, ref = (
        np.array([[alone(m, tokenizer, r, a) for a in ("chosen", "rejected")] for r in PAIRS])
        for m in (model, reference)
    )
    lengths = np.array([[len(tokenizer.encode(r[a])) + 1 for a in ("chosen", "rejected")] for r in PAIRS])
    gain = policy - ref
    h = gain[:, 0] - gain[:, 1]
    expected = {
        "accuracy": (h > 0).mean(),
        "margin": 0.2 * h.mean(),
        "chosen_logp": policy[:, 0].mean(),
        "rejected_logp": policy[:, 1].mean(),
        "chosen_reward": 0.2 * gain[:, 0].mean(),
        "rejected_reward": 0.2 * gain[:, 1].mean(),
        "chosen_tokens": lengths[:, 0].mean(),
        "rejected_tokens": lengths[:, 1].mean(),
        "kl": -gain.sum() / lengths.sum(),
        "accuracy_shorter": (h > 0)[lengths[:, 0] <= lengths[:, 1]].mean(),
    }
    assert 0 < expected["accuracy"] < 1 and len(set(map(tuple, lengths))) > 3
    assert logs.keys() == expected.keys()
    for name, (total, count) in logs.items():
        assert abs(float(total) / float(count) - expected[name]) < 1e-4, name
    explained = ", ".join(dpo.NORMAL)
    assert all(name in explained for name in logs)


# --- 2. what of a pair is counted ----------------------------------------------------------------------------


def test_packed_log_probabilities_equal_each_answer_alone(tokenizer):
    """Whatever the width of the rows; no pair is torn, and one row holds several."""
    model = small(tokenizer.vocab_size)
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    expected = np.array([[alone(model, tokenizer, r, a) for a in ("chosen", "rejected")] for r in PAIRS])
    assert np.ptp(expected) > 50
    for width in (max(map(pairs.length, range(len(pairs)))), 192, 400):
        found = dpo.compute_reference(model, pairs, cut(width, 2), ONE)
        assert np.abs(found - expected).max() < 1e-3 and np.abs(found / expected - 1).max() < 1e-5
    batch = one_batch(pairs, 400)
    assert (batch["pairs"] >= 0).sum(1).max() > 2
    assert sorted(p for row in batch["pairs"].tolist() for p in row if p >= 0) == list(range(len(pairs)))


def test_a_row_may_be_longer_than_the_context_of_a_rope_model(tokenizer):
    """Two answers of nearly a context each stand in one row; each is its own document."""
    model = small(tokenizer.vocab_size, context=40)
    pairs = data.PairRows(PAIRS[:6], tokenizer, 40)
    width = max(map(pairs.length, range(len(pairs))))
    assert width > 40
    found = dpo.compute_reference(model, pairs, cut(3 * width, 2), ONE)
    for n, row in enumerate(pairs.rows):
        assert abs(found[n, 1] - alone(model, tokenizer, row, "rejected")) < 1e-3


def test_targets_are_the_answer_and_its_end_alone(tokenizer):
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    batch = one_batch(pairs, 192)
    for b in range(len(batch["ids"])):
        for n, number in enumerate(batch["pairs"][b].tolist()):
            for side, answer in enumerate(("chosen", "rejected") if number >= 0 else ()):
                at = batch["doc_ids"][b] == 2 * n + side
                ids, targets = batch["ids"][b][at], batch["targets"][b][at]
                trained = targets[targets != data.IGNORE].tolist()
                assert trained == tokenizer.encode(PAIRS[number][answer]) + [tokenizer.eos_id]
                places = (targets != data.IGNORE).nonzero().flatten()
                assert (ids[places[1:]] == targets[places[:-1]]).all()  # shifted by one, once
                prompt = tokenizer.encode_chat(PAIRS[number]["messages"], open_reply=True)[0]
                assert ids[: len(prompt)].tolist() == prompt
                assert places[0] == len(prompt) - 1  # the prompt's last token predicts the answer's first
    assert (batch["targets"][batch["doc_ids"] < 0] == data.IGNORE).all()


@pytest.mark.parametrize(
    "template", ["plain", "phi2-chinese", "yayi", "yayi-multi", "xuanyuan-6b", "llama-2"]
)
def test_the_span_of_an_answer_is_that_of_tuning_by_conversations(tokenizer, template):
    """ids and mask of sft.py's rows, but that earlier replies are not trained again."""
    t = tokenizer.with_template(template)
    pairs = data.PairRows(PAIRS, t, 400)
    for n, row in enumerate(PAIRS):
        at = 0
        for answer in ("chosen", "rejected"):
            conversation = [*row["messages"], {"role": "assistant", "content": row[answer]}]
            sft = data.ChatRows([{"messages": conversation}], t, 400)
            length = sft.length(0)
            assert (pairs.read(n, at, length) == sft.read(0, 0, length)).all()
            ours, theirs = pairs.trained(n, at, length), sft.trained(0, 0, length)
            last = np.flatnonzero(np.diff(theirs, prepend=0) == 1)[-1]  # where the last reply begins
            assert (ours[:last] == 0).all() and (ours[last:] == theirs[last:]).all()
            assert theirs[:last].any() == (len(row["messages"]) > 1)
            at += length
        assert at == pairs.length(n)


def test_a_prompt_is_the_same_tokens_before_both_answers(tokenizer):
    """Answers that begin with what could merge with the prompt's end: the seam stays where it is."""
    t = tokenizer.with_template("phi2-chinese")  # the reply begins with a line break of the template's own
    row = pair("几个？", "\n\n个", "：？\n个")
    chosen, rejected = data._encode_answers(row, t, None)
    prompt = t.encode_chat(row["messages"], open_reply=True)[0]
    assert chosen[0][: len(prompt)] == rejected[0][: len(prompt)] == prompt
    assert not any(chosen[1][: len(prompt)]) and all(chosen[1][len(prompt) :])


def test_phi2_chinese_concatenation_is_not_what_sft_has_trained(tokenizer):
    """Its DPO data: [BOS]{prompt}[EOS] + [BOS]{chosen}[EOS], no ##提问 around it. Ours has SFT's ids, and one end."""
    t = tokenizer.with_template("phi2-chinese")
    row = PAIRS[0]
    bos, eos = t.bos_id, t.eos_id
    question = t.encode(row["messages"][0]["content"])
    theirs = [bos, *question, eos, bos, *t.encode(row["chosen"]), eos]
    pairs = data.PairRows([row], t, 96)
    ours = pairs.read(0, 0, int(pairs.seams[0])).tolist()
    sft, mask = t.encode_chat([*row["messages"], {"role": "assistant", "content": row["chosen"]}])
    assert ours == sft != theirs
    assert theirs.count(eos) == 2 and theirs.index(eos) < theirs.index(eos, len(question) + 2)
    assert ours.count(eos) == 1 and ours[-1] == eos and mask[-1] == 1
    inside = ours[mask.index(1) :]
    assert bos not in inside  # theirs has one before the answer
    assert t.decode(ours).startswith("##提问:") and "##回答:" in t.decode(ours)


def test_pairs_are_left_out_whole_where_one_answer_does_not_fit(tokenizer):
    """Never is one answer cut, or cut elsewhere than the other: the pair goes, and is counted."""
    long = pair("几个？", "三个", "三个" * 60)
    rows = [*toy_pairs(3), long, {**long, "chosen": long["rejected"], "rejected": "三个"}]
    rows += [pair("几个？", "三个", "三个"), pair("几个？", "三", "四")]
    size = [[len(ids) for ids, _ in data._encode_answers(row, tokenizer, None)] for row in rows]
    context = max(map(max, size)) - 1
    pairs = data.PairRows(rows, tokenizer, context)
    assert pairs.dropped == {"too long": 2, "equal": 1} and pairs.rows == [*rows[:3], rows[6]]
    assert pairs.tokens == sum(map(sum, (size[i] for i in (0, 1, 2, 6))))
    assert len(data.PairRows(rows, tokenizer, context + 1)) == 6  # a conversation of just the context is kept
    both = sum(size[3])
    assert len(data.PairRows(rows, tokenizer, 1000, both)) == 6
    assert len(data.PairRows(rows, tokenizer, 1000, both - 1)) == 4  # the row must hold both
    assert (
        pairs.counts
        == [[len(tokenizer.encode(r[a])) + 1 for a in ("chosen", "rejected")] for r in pairs.rows]
    ).all()


def test_the_fingerprint_notices_any_change_of_a_pair(tokenizer):
    of = lambda rows: data.PairRows(rows, tokenizer, 200).fingerprint
    rows = toy_pairs(3)
    swapped = [{**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}, *rows[1:]]
    assert of(rows) == of(json.loads(json.dumps(rows)))
    assert len({of(rows), of(swapped), of(rows[::-1]), of(rows[:2]), of([*rows, rows[0]])}) == 5


def test_labels_of_xuanyuan_decide_which_answer_is_chosen(tokenizer, tmp_path):
    """A3 … A1, B1 … B3: whose answer is better, and how clearly; A0 and B0 prefer nothing and are left out."""
    labels = ["A3", "A2", "A1", "A0", "B0", "B1", "B2", "B3"]
    rows = [
        {"prompt": "几个？", "response_a": f"甲{i}", "response_b": f"乙{i}", "label": l}
        for i, l in enumerate(labels)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    pairs = data.PairRows(chat.read_rows([path], "pairs"), tokenizer, 96)
    assert [r["chosen"] for r in pairs.rows] == ["甲0", "甲1", "甲2", "乙5", "乙6", "乙7"]
    assert [r["rejected"] for r in pairs.rows] == ["乙0", "乙1", "乙2", "甲5", "甲6", "甲7"]


# --- 3. the reference ----------------------------------------------------------------------------------------


def with_adapters(vocab: int, dropout: float = 0.0) -> M.Model:
    """A model whose adapters say something: B is not zero."""
    model = small(vocab)
    lora.attach(model, lora.LoraConfig(lora_rank=4, lora_dropout=dropout))
    lora.init_adapter(model, 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lora_B.weight"):
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    return model


def test_the_first_loss_is_ln_2_with_a_cached_and_with_a_live_reference(tokenizer):
    """In fp32 through the real model and packed rows; the reference's rows are packed otherwise."""
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    model = small(tokenizer.vocab_size)
    frozen = small(tokenizer.vocab_size).requires_grad_(False).eval()
    live = functools.partial(dpo.live_reference, frozen=frozen)
    for width in (150, 300):
        pairs.reference = dpo.compute_reference(model, pairs, cut(width, 1), ONE)
        batch = one_batch(pairs)
        for smoothing in (0.0, 0.2):
            cfg = config(label_smoothing=smoothing)
            values = [dpo.pair_loss(model, batch, cfg, reference)[0].item() for reference in (None, live)]
            assert all(abs(value / len(PAIRS) - LN2) < 1e-6 for value in values)
    assert torch.equal(live(model, batch), dpo.answer_logps(frozen, batch))
    assert (live(model, batch) - batch["reference"]).abs().max() < 1e-3  # of up to 130 nats
    ipo = dpo.pair_loss(model, batch, config(loss="ipo", beta=0.1), live)[0].item()
    assert abs(ipo / len(PAIRS) - 25) < 1e-4


def test_with_adapters_the_base_is_the_reference(tokenizer):
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    base, model = small(tokenizer.vocab_size), with_adapters(tokenizer.vocab_size)
    batch = one_batch(pairs)
    with torch.no_grad():
        assert torch.equal(dpo.live_reference(model, batch), dpo.answer_logps(base, batch))
    assert (
        dpo.compute_reference(model, pairs, cut(192, 2), ONE)
        == dpo.compute_reference(base, pairs, cut(192, 2), ONE)
    ).all()
    assert (dpo.answer_logps(model, batch) - dpo.answer_logps(base, batch)).abs().max() > 0.1
    assert lora.attached(model) and model.adapters.active  # afterwards they say something again


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_dropout_of_the_policy_never_touches_the_reference(tokenizer, kind):
    """Nor does the reference draw a random number: cached and live give the policy the same dropout."""
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    model = (
        small(tokenizer.vocab_size, dropout=0.5)
        if kind == "full"
        else with_adapters(tokenizer.vocab_size, 0.5)
    )
    batch = one_batch(pairs)
    assert model.training
    torch.manual_seed(1)
    assert not torch.equal(dpo.answer_logps(model, batch), dpo.answer_logps(model, batch))
    before = torch.get_rng_state()
    first = dpo.live_reference(model, batch)
    assert torch.equal(first, dpo.live_reference(model, batch)) and not first.requires_grad
    assert torch.equal(torch.get_rng_state(), before) and model.training
    with dpo.base_of(model), torch.no_grad():
        assert torch.equal(first, dpo.answer_logps(model.eval(), batch))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_leaves_the_reference_as_it_was_bit_for_bit(tokenizer, kind):
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    batch, cfg = one_batch(pairs), config()
    frozen = small(tokenizer.vocab_size).requires_grad_(False).eval() if kind == "full" else None
    model = small(tokenizer.vocab_size) if kind == "full" else with_adapters(tokenizer.vocab_size)
    held = {n: p for n, p in (frozen or model).named_parameters() if not p.requires_grad}
    before, said = {n: p.clone() for n, p in held.items()}, dpo.live_reference(model, batch, frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        value, count, _ = dpo.pair_loss(
            model, batch, cfg, functools.partial(dpo.live_reference, frozen=frozen)
        )
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item() / count.item())
    assert losses[-1] < losses[0] - 0.1
    assert len(held) > 10 and all(p.grad is None and torch.equal(p, before[n]) for n, p in held.items())
    assert torch.equal(said, dpo.live_reference(model, batch, frozen))


def test_the_cache_is_used_only_where_nothing_has_changed(tokenizer, tmp_path, capsys):
    model, other = small(tokenizer.vocab_size), small(tokenizer.vocab_size, seed=2)
    pairs = data.PairRows(PAIRS, tokenizer, 96)
    cfg, p = dpo.DPOConfig(out=str(tmp_path), init="x"), cut(192, 2)
    path = tmp_path / "reference.safetensors"

    def ask(model, **key) -> str:
        pairs.reference = None
        parts = {"train": pairs}
        dpo.cached_reference(model, cfg, parts, p, {"weights": "a", "row_tokens": 192} | key, ONE)
        return capsys.readouterr().out

    assert "not computed yet" in ask(model) and f"{len(PAIRS)} pairs" in ask(model, weights="z")
    ask(model)
    first = pairs.reference
    assert (first == dpo.compute_reference(model, pairs, cut(192, 2), ONE)).all()
    assert "read from" in ask(other) and (pairs.reference == first).all()  # the key says that nothing changed
    assert "weights changed" in ask(other, weights="b") and (pairs.reference != first).any()
    assert "row_tokens changed" in ask(model, weights="b", row_tokens=100)
    ask(model)
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1  # inside a number
    path.write_bytes(raw)
    assert "damaged" in ask(model) and (pairs.reference == first).all()
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a whole safetensors file" in ask(model) and (pairs.reference == first).all()
    assert "read from" in ask(model)


def test_a_cache_that_cannot_be_written_leaves_nothing_behind(tokenizer, tmp_path):
    path = tmp_path / "reference.safetensors"
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(OSError):
        dpo._write(path, {"train": torch.zeros(3, 2, dtype=torch.float64)}, {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


# --- 4. runs -------------------------------------------------------------------------------------------------

TINY = {
    "tokens_per_step": 768,
    "micro_tokens": 192,
    "steps": 8,
    "save_every": 4,
    "eval_every": 8,
    "warmup": 2,
}
TINY |= {"lr": 3e-3, "dtype": "float32", "device": "cpu", "peak_tflops": 1.0, "max_new_tokens": 4, "val": 12}
TINY |= {"save_dtype": "float32", "keep_best": False, "log_every": 100}


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory):
    """A folder with a tuned model (its template is plain) and 60 pairs."""
    folder = tmp_path_factory.mktemp("world")
    checkpoint.save_model(small(tokenizer.vocab_size, std=0.05), folder / "sft", tokenizer)
    conversations(folder / "pairs.jsonl", toy_pairs(60))
    return folder


def settings(world, out: Path, **changes) -> dpo.DPOConfig:
    where = {"init": str(world / "sft"), "data": str(world / "pairs.jsonl"), "out": str(out)}
    return dpo.DPOConfig(**where, **TINY | changes)


def metrics(out: Path, name: str = "loss") -> list:
    return [row[name] for row in common.read_metrics(out / "metrics.jsonl") if name in row]


def final_state(out: Path, step: int = 8) -> dict:
    return load_file(out / f"step_{step:07d}" / "state" / "rank-00000.safetensors")


HOW = {
    "full": {"dropout": 0.1},
    "full, live": {"dropout": 0.1, "reference": "live"},
    "lora": {"lora": True, "lora_rank": 4, "lora_dropout": 0.1},
    "lora, live": {"lora": True, "lora_rank": 4, "lora_dropout": 0.1, "reference": "live"},
}


@pytest.mark.parametrize("how", HOW)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(world, tmp_path, how):
    """Killed after step 4: step 8 has the same weights, moments and RNG; the log goes on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cfg = settings(world, whole, **HOW[how])
    assert dpo.prefer(cfg, ONE) == 0
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "step_0000008")
    if how == "full":  # the policy has moved on, but the reference is computed from --init again
        (killed / "reference.safetensors").unlink()
    assert dpo.prefer(dataclasses.replace(cfg, out=str(killed), resume=True), ONE) == 0
    a, b = final_state(whole), final_state(killed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert metrics(whole) == metrics(killed) and len(metrics(whole)) == 8
    assert metrics(whole, "val_loss") == metrics(killed, "val_loss")
    assert abs(metrics(whole)[0] - LN2) < (0.05 if "full" in how else 1e-6)  # dropout; at first B is 0
    if "live" not in how:
        one, two = (load_file(out / "reference.safetensors") for out in (whole, killed))
        assert one.keys() == two.keys() == {"train", "val"} and all(torch.equal(one[k], two[k]) for k in one)
    if "lora" in how:
        assert (whole / "step_0000008" / "adapter_model.safetensors").exists()
        assert not any("exp_avg" in n and "lora" not in n for n in a)


def test_a_run_stopped_before_its_first_step_goes_on(world, tmp_path):
    """What is there then: the settings and the reference."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    cfg = settings(world, whole, steps=2, save_every=0, eval_every=0)
    assert dpo.prefer(cfg, ONE) == 0
    stopped.mkdir()
    for name in ("run.json", "reference.safetensors"):
        shutil.copy(whole / name, stopped)
    assert dpo.prefer(dataclasses.replace(cfg, out=str(stopped), resume=True), ONE) == 0
    a, b = (final_state(out, 2) for out in (whole, stopped))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_changed_objective_or_start_is_not_resumed(world, tmp_path):
    cfg = settings(world, tmp_path / "run", steps=2, save_every=1, eval_every=0, test_rows=0)
    assert dpo.prefer(cfg, ONE) == 0
    cache = tmp_path / "run" / "reference.safetensors"
    before = checkpoint.file_sha256(cache)
    again = dataclasses.replace(cfg, resume=True, steps=3)
    with pytest.raises(ValueError, match="objective"):
        dpo.prefer(dataclasses.replace(again, beta=0.2), ONE)
    with pytest.raises(ValueError, match="reference: 'cached' when saved, 'live' now"):
        dpo.prefer(dataclasses.replace(again, reference="live"), ONE)
    other = tmp_path / "other"
    shutil.copytree(world / "sft", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="init"):
        dpo.prefer(dataclasses.replace(again, init=str(other)), ONE)
    with pytest.raises(ValueError, match="optimizer"):  # not even by force
        dpo.prefer(dataclasses.replace(again, init=str(other), optimizer="muon", force=True), ONE)
    # the reference that the run needs when it goes on as it was
    assert checkpoint.file_sha256(cache) == before
    assert dpo.prefer(dataclasses.replace(again, init=str(other), force=True), ONE) == 0
    assert checkpoint.file_sha256(cache) != before


def test_runs_that_differ_in_beta_share_a_reference_cache(world, tmp_path, monkeypatch, capsys):
    """One file, computed once; it is no other than a run's own. Other pairs have a file of their own."""
    cache = tmp_path / "cache"
    flags = [
        "--init",
        world / "sft",
        "--data",
        world / "pairs.jsonl",
        "--reference_cache",
        cache,
        "--steps",
        1,
    ]
    flags += ["--tokens_per_step", 768, "--device", "cpu", "--dtype", "float32", "--peak_tflops", 1]
    flags += ["--test_rows", 0, "--max_new_tokens", 1]
    say = functools.partial(type_in, monkeypatch, capsys, *flags)
    assert "not computed yet" in say("--out", tmp_path / "a", "--val", 12)
    (file,) = cache.iterdir()
    said = say("--out", tmp_path / "b", "--val", 12, "--beta", 0.3, "--lr", 1e-4)
    assert f"log-probabilities read from {file}" in said and list(cache.iterdir()) == [file]
    assert not (tmp_path / "a" / "reference.safetensors").exists()
    assert abs(metrics(tmp_path / "b")[0] - LN2) < 1e-5
    assert dpo.prefer(settings(world, tmp_path / "c", steps=1, micro_tokens=8192), ONE) == 0
    own, shared = load_file(tmp_path / "c" / "reference.safetensors"), load_file(file)
    assert all(torch.equal(own[name], shared[name]) for name in ("train", "val"))
    assert "not computed yet" in say("--out", tmp_path / "d", "--val", 20) and len(list(cache.iterdir())) == 2


def test_the_base_of_adapters_is_hashed_once(world, tmp_path, monkeypatch):
    """It takes a second a gigabyte."""
    digests, real = [], checkpoint.folder_digest
    monkeypatch.setattr(checkpoint, "folder_digest", lambda folder: digests.append(folder) or real(folder))
    assert dpo.prefer(settings(world, tmp_path / "run", **LORA | {"steps": 1, "eval_every": 0}), ONE) == 0
    assert digests == [str(world / "sft")]


def test_by_default_a_20th_is_held_out_but_at_most_2000(world, tokenizer):
    """The default of sft.py."""
    cfg = dataclasses.replace(settings(world, Path("out")), val=None)
    shape = M.ModelConfig("llama", tokenizer.vocab_size, 32, 2, 4, 64, 96)
    assert [len(part) for part in dpo.read_pairs(cfg, tokenizer, shape)[:2]] == [57, 3]
    assert dpo.DPOConfig(out="out").val is None


def test_accuracy_and_margin_rise_on_a_toy_set(world, tmp_path):
    """Held-out pairs too: the rejected answers have no name in front."""
    cfg = settings(world, tmp_path / "run", steps=30, eval_every=15, save_every=0, beta=0.2)
    assert dpo.prefer(cfg, ONE) == 0
    accuracy, margin, loss = (metrics(tmp_path / "run", name) for name in ("accuracy", "margin", "loss"))
    assert abs(margin[0]) < 1e-4 and abs(loss[0] - LN2) < 1e-5
    assert accuracy[-5:] == [1.0] * 5 and margin[-1] > margin[4] > margin[1] > 0.01 and loss[-1] < 0.2
    assert (
        metrics(tmp_path / "run", "val_accuracy")[-1] == 1.0
        and metrics(tmp_path / "run", "val_margin")[-1] > 1
    )
    assert metrics(tmp_path / "run", "chosen_reward")[-1] > metrics(tmp_path / "run", "rejected_reward")[-1]


def ranks_worker(world: str, out: str) -> None:
    """Two ranks: cut and not, full and with adapters."""
    torch.set_num_threads(1)
    process = common.start_process("cpu")
    for name, changes in CASES.items():
        assert dpo.prefer(settings(Path(world), Path(out) / name, **changes), process) == 0
    common.finish_process()


SHORT = {"steps": 3, "save_every": 0, "eval_every": 3, "max_new_tokens": 1}
LORA = SHORT | {"lora": True, "lora_rank": 4}
CASES = {
    "ddp": SHORT,
    "zero3": SHORT | {"shard": "zero3"},
    "zero3-live": SHORT | {"shard": "zero3", "reference": "live"},
    "ddp-lora": LORA,
    "zero3-lora-live": LORA | {"shard": "zero3", "reference": "live"},
}


def test_one_process_equals_two_ranks(world, tmp_path):
    """Losses, gradient norms and held-out figures of three steps, DDP and zero3, full and with adapters."""
    launch(ranks_worker, world, tmp_path, world=2)
    alone = {}
    for name, changes in CASES.items():
        kind = "lora" if "lora" in name else "full"
        if kind not in alone:
            alone[kind] = tmp_path / kind
            changes = {k: v for k, v in changes.items() if k not in ("shard", "reference")}
            assert dpo.prefer(settings(world, alone[kind], **changes), ONE) == 0
        a, b = (common.read_metrics(folder / "metrics.jsonl") for folder in (alone[kind], tmp_path / name))
        assert len(a) == len(b) == 4
        for one, two in zip(a, b):
            for key in (
                "loss",
                "grad_norm",
                "margin",
                "kl",
                "pairs",
                "val_loss",
                "val_margin",
                "val_accuracy",
            ):
                assert (key in one) == (key in two)
                assert abs(one.get(key, 0) - two.get(key, 0)) < 1e-4 * max(1, abs(one.get(key, 0))), (
                    name,
                    key,
                )
        if "live" not in name:
            one, two = (load_file(f / "reference.safetensors") for f in (alone[kind], tmp_path / name))
            assert all((one[k] - two[k]).abs().max() < 1e-3 for k in ("train", "val"))
    assert abs(metrics(alone["lora"])[0] - LN2) < 1e-6 and metrics(alone["full"])[-1] < 0.69


# --- 5. what is refused, and the command ---------------------------------------------------------------------


def test_the_template_is_that_of_tuning(world, tokenizer, tmp_path):
    """Another one is refused; a folder that names none needs one, and the run's folder names it from then on."""
    cfg = settings(world, tmp_path / "run", steps=1, eval_every=0)
    with pytest.raises(ValueError, match="--template yayi: .* was tuned with plain"):
        dpo.prefer(dataclasses.replace(cfg, template="yayi"), ONE)
    bare = tmp_path / "bare"
    shutil.copytree(world / "sft", bare)
    (bare / "chat_template.jinja").unlink()
    raw = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in raw.items() if k != "baizhi_template"})
    )
    with pytest.raises(ValueError, match="names no chat template"):
        dpo.prefer(dataclasses.replace(cfg, init=str(bare)), ONE)
    assert dpo.prefer(dataclasses.replace(cfg, init=str(bare), template="phi2-chinese"), ONE) == 0
    assert tok.load_tokenizer(tmp_path / "run" / "step_0000001").template == "phi2-chinese"


def test_settings_that_make_no_sense_are_refused(world, tmp_path):
    for words, changes in {
        "beta": {"beta": 0.0},
        "label_smoothing 0.5": {"label_smoothing": 0.5},
        "loss dpo": {"loss": "ipo", "label_smoothing": 0.1},
        "preset": {"preset": "nosuch"},
        "lora_rank": {"lora_rank": 0},
        "lr": {"lr": -1.0},
        "reference_cache": {"reference_cache": "cache", "reference": "live"},
    }.items():
        with pytest.raises(ValueError, match=words):
            config(**changes)
    cfg = settings(world, tmp_path / "run")
    with pytest.raises(ValueError, match="--init is missing"):
        dpo.prefer(dataclasses.replace(cfg, init=""), ONE)
    with pytest.raises(ValueError, match="--data is missing"):
        dpo.prefer(dataclasses.replace(cfg, data=""), ONE)
    with pytest.raises(ValueError, match="no pair is left to train on .48 too long, 0 equal"):
        dpo.prefer(dataclasses.replace(cfg, row_tokens=8), ONE)
    with pytest.raises(ValueError, match="--val: holding out 60"):
        dpo.prefer(dataclasses.replace(cfg, val=60), ONE)
    conversations(tmp_path / "bad.jsonl", [PAIRS[0], {"prompt": "几个？", "chosen": "三"}])
    with pytest.raises(ValueError, match="bad.jsonl:2"):
        dpo.prefer(dataclasses.replace(cfg, data=str(tmp_path / "bad.jsonl")), ONE)
    assert not (tmp_path / "run").exists()


def type_in(monkeypatch, capsys, *words) -> str:
    """Run dpo.py as from a shell, in this process; give what it prints."""
    monkeypatch.setattr(sys, "argv", ["dpo.py", *map(str, words)])
    capsys.readouterr()
    runpy.run_path(str(ROOT / "dpo.py"), run_name="__main__")
    return capsys.readouterr().out


def test_the_command_needs_no_name_takes_presets_and_resumes(world, early, tmp_path, monkeypatch, capsys):
    say = functools.partial(type_in, monkeypatch, capsys)
    shutil.copytree(world / "sft", tmp_path / "tuned" / "step_0000007")
    (tmp_path / "tuned" / "latest").write_text("step_0000007\n")
    flags = ["--init", tmp_path / "tuned", "--data", world / "pairs.jsonl", "--out", tmp_path / "run"]
    flags += [
        "--steps",
        2,
        "--tokens_per_step",
        768,
        "--device",
        "cpu",
        "--peak_tflops",
        1,
        "--save_every",
        1,
    ]
    flags += ["--preset", "chatlm-dpo-lora", "--lora_rank", 2, "--test_rows", 0, "--max_new_tokens", 4]
    said = say(*flags)
    assert all(name in said for name in dpo.NORMAL)
    assert "finished: 2 steps" in said and "pairs/s" in said and "warning" not in said
    saved = common.read_json(tmp_path / "run" / "run.json")["config"]
    assert (saved["lora"], saved["lora_rank"], saved["lora_alpha"], saved["lora_dropout"]) == (
        True,
        2,
        16.0,
        0.1,
    )
    # a run that goes on: its next step does not become the reference
    assert Path(saved["init"]) == tmp_path / "tuned" / "step_0000007"
    said = say("--resume", "--out", tmp_path / "run", "--steps", 3)
    assert "resuming from" in said and "reference: log-probabilities read" in said and "finished: 3" in said
    rows = [{"messages": [*p["messages"], {"role": "assistant", "content": p["chosen"]}]} for p in PAIRS]
    path, out = conversations(tmp_path / "chat.jsonl", rows), tmp_path / "pairs.jsonl"
    said = say(
        "make-rejected", "--init", early, "--data", path, "--out", out, "--max_new_tokens", 60, "--seed", SEED
    )
    assert f"pairs of {len(PAIRS)} rows" in said and chat.read_rows([out], "pairs")


# --- 6. make-rejected ----------------------------------------------------------------------------------------


def test_similarity_is_dice_over_neighbouring_characters():
    assert dpo.similarity("小明有三只猫", "小明有两只猫") == 0.6  # 小明 明有 只猫 of 5 and 5
    assert dpo.similarity("ab", "ab") == 1 and dpo.similarity("a", "b") == 0 and dpo.similarity("", "ab") == 0
    assert dpo.similarity("aaa", "aa") == 2 / 3  # a pair counts as often as it occurs
    draw = random.Random(0)
    for _ in range(50):
        a, b = ("".join(draw.choices("甲乙丙", k=draw.randint(1, 8))) for _ in range(2))
        shared, rest = 0, [b[i : i + 2] for i in range(len(b) - 1)]
        for i in range(len(a) - 1):
            if a[i : i + 2] in rest:
                rest.remove(a[i : i + 2])
                shared += 1
        both = len(a) + len(b) - 2
        assert dpo.similarity(a, b) == (1 if a == b else 2 * shared / max(1, both))


SEED = 53  # its samples have 4 characters and more, and all come to their end


@pytest.fixture(scope="module")
def early(tokenizer, tmp_path_factory):
    """An untrained model folder: what it writes is noise, of all lengths, that ends by chance (p about 0.08)."""
    folder = tmp_path_factory.mktemp("early") / "model"
    return save_noise(tokenizer, folder, {tokenizer.eos_id: 3.3})


def save_noise(tokenizer, folder: Path, bias: dict[int, float]) -> Path:
    """A folder of an untrained model whose head's bias says how likely some tokens are; else none is special."""
    model = M.build(M.ModelConfig("phi", tokenizer.vocab_size, 32, 1, 4, 64, 96))
    M.init_weights(model, 1)
    for i in tokenizer.special_ids:
        model.lm_head.bias.data[i] = bias.get(i, -100.0)
    checkpoint.save_model(model, folder, tokenizer)
    return folder


def conversations(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def rejected(early, path: Path, out: Path, **changes) -> list[dict]:
    how = {"max_new_tokens": 60, "device": "cpu", "batch": 4, "seed": SEED} | changes
    dpo.make_rejected(dpo.MakeRejectedConfig(init=str(early), data=str(path), out=str(out), **how))
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_make_rejected_pairs_a_reply_with_a_sample(early, tmp_path):
    """The conversation and all other keys stay; the sample depends on seed and row, not on the batch."""
    rows = [
        {"messages": [*p["messages"], {"role": "assistant", "content": p["chosen"] + "\n"}], "check": str(n)}
        for n, p in enumerate([*PAIRS, PAIRS[0]])
    ]
    path = conversations(tmp_path / "chat.jsonl", rows)
    pairs = rejected(early, path, tmp_path / "pairs.jsonl")
    assert len(pairs) >= 5
    for p in pairs:
        source = rows[int(p["check"])]
        assert p["messages"] == source["messages"][:-1]
        assert p["chosen"] == source["messages"][-1]["content"].strip()
        assert p["rejected"] == p["rejected"].strip() not in ("", p["chosen"])
        assert p.keys() == {"messages", "check", "chosen", "rejected"}
    assert chat.read_rows([tmp_path / "pairs.jsonl"], "pairs")
    assert rejected(early, path, tmp_path / "again.jsonl") == pairs
    assert rejected(early, path, tmp_path / "alone.jsonl", batch=1) == pairs
    assert rejected(early, path, tmp_path / "other.jsonl", seed=6) != pairs
    first, last = (
        next((p["rejected"] for p in pairs if p["check"] == str(n)), None) for n in (0, len(PAIRS))
    )
    assert first != last  # one question twice: two samples


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A vocabulary that can spell a space, with the special tokens of all templates."""
    folder = tmp_path_factory.mktemp("spaced")
    rows = [{"text": f"{p['chosen']} {p['rejected']} "} for p in toy_pairs(200)]
    path = conversations(folder / "corpus.jsonl", rows)
    specials = ",".join(sorted({token for t in chat.TEMPLATES.values() for token in t.specials}))
    tok.train(tok.Train((str(path),), out=str(folder / "t"), vocab_size=330, specials=specials))
    return tok.load_tokenizer(folder / "t")


@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_a_sampled_reply_is_taken_out_of_the_template(spaced, template):
    """What the template writes around a reply is no part of it: the same words are equal, and dropped."""
    t = spaced.with_template(template)
    for text in ("你好", "第一行\n\n第二行：", "你好\n", " 你好 "):
        row = {"messages": [user("问？"), {"role": "assistant", "content": text}], "where": "x:1"}
        asked = t.encode_chat(row["messages"][:1], open_reply=True)[0]
        ids, mask = t.encode_chat(row["messages"])
        new = ids[len(asked) : len(mask) - mask[::-1].index(1)]  # what a model writes
        assert [new[-1]] == t.end_ids()
        reply = dpo.reply_text(t, new[:-1])
        assert reply == text.strip() and dpo.make_pair(row, reply, 0.9) == (None, "equal")
    assert dpo.reply_text(t, [*new[:-1], t.bos_id, *new[:-1]]) is None  # no text can say it
    pair, why = dpo.make_pair(row, "再见", 0.9)
    assert pair == {"messages": [user("问？")], "chosen": "你好", "rejected": "再见"} and not why


def test_make_rejected_drops_what_teaches_nothing(early, tmp_path, capsys):
    """Equal, alike, too long: counted. Equal and alike are made from the model's own answers, by seed and row."""
    questions = [p["messages"] for p in PAIRS[:4]]
    rows = [
        {"messages": [*q, {"role": "assistant", "content": "无"}], "n": n} for n, q in enumerate(questions)
    ]
    path = conversations(tmp_path / "chat.jsonl", rows)
    pairs = rejected(early, path, tmp_path / "first.jsonl")
    own = [p["rejected"] for p in sorted(pairs, key=lambda p: p["n"])]
    assert len(own) == 4
    replies = [own[0], own[1] + "。", "甲乙丙丁", "无"]
    rows = [{"messages": [*q, {"role": "assistant", "content": r}]} for q, r in zip(questions, replies)]
    rows.append({"messages": [user("几个？" * 60), {"role": "assistant", "content": "三个"}]})
    path = conversations(tmp_path / "mixed.jsonl", rows)
    assert 0.8 < dpo.similarity(own[1], replies[1]) < 1 and dpo.similarity(own[2], replies[2]) < 0.8
    capsys.readouterr()
    pairs = rejected(early, path, tmp_path / "pairs.jsonl", max_similar=0.8)
    assert sorted(p["rejected"] for p in pairs) == sorted(own[2:])  # short questions first
    said = capsys.readouterr().out
    assert "2 pairs of 5 rows" in said
    assert all(w in said for w in ("1 equal", "1 more than 0.8 alike", "1 too long"))


@pytest.mark.parametrize(
    "likely, why, context",
    [
        ("{eos}", "3 empty", 96),
        ("", "3 unfinished", 96),
        ("", "3 unfinished", 30),
        ("<|End|>", "3 unfinished", 96),
    ],
)
def test_make_rejected_drops_replies_that_are_empty_or_do_not_end(tokenizer, tmp_path, likely, why, context):
    """A head's bias says that every reply ends at once, never ends, or ends as the template's replies do not."""
    i = {"{eos}": tokenizer.eos_id}.get(likely, tokenizer.special_id.get(likely))
    folder = save_noise(tokenizer, tmp_path / "model", {i: 100.0} if likely else {})
    if context < 96:
        path = folder / "config.json"
        path.write_text(json.dumps(common.read_json(path) | {"max_position_embeddings": context}))
    rows = [{"messages": [*p["messages"], {"role": "assistant", "content": p["chosen"]}]} for p in PAIRS[:3]]
    path = conversations(tmp_path / "chat.jsonl", rows)
    with pytest.raises(ValueError, match=f"no pair is left of 3 rows: {why}"):
        rejected(folder, path, tmp_path / "pairs.jsonl", max_new_tokens=8 if context == 96 else 500)
    assert not list(tmp_path.glob("pairs*"))


def test_a_reply_that_ends_with_its_last_token_is_whole(tokenizer, early):
    """--max_new_tokens counts the end: one less, and it is unfinished."""
    asked = tokenizer.encode_chat([user("几个？")], open_reply=True)[0]
    model, _ = dpo.load(early)
    config = dpo.MakeRejectedConfig(init="x", data="x", out="x", max_new_tokens=60, seed=SEED)
    ((_, whole),) = dpo.sample_replies(model, tokenizer, {0: asked}, config)
    count = len(dpo.generate(model, [asked], config)[0])
    assert whole and count < 59
    for limit, expected in ((count + 1, whole), (count, None)):
        shorter = dataclasses.replace(config, max_new_tokens=limit)
        assert list(dpo.sample_replies(model, tokenizer, {0: asked}, shorter)) == [(0, expected)]


def test_make_rejected_says_where_a_row_is_that_cannot_be_written(early, tmp_path):
    tool = [{"role": "assistant", "content": "查"}, {"role": "exec", "content": "3"}]
    rows = [PAIRS[0]["messages"], [user("几个？"), *tool]]  # `plain` knows no tools
    rows = [{"messages": [*m, {"role": "assistant", "content": "三"}]} for m in rows]
    path = conversations(tmp_path / "chat.jsonl", rows)
    with pytest.raises(ValueError, match="chat.jsonl:2: template plain"):
        rejected(early, path, tmp_path / "pairs.jsonl")
    assert not list(tmp_path.glob("pairs*"))


def test_what_was_sampled_before_make_rejected_was_stopped_is_there(early, tmp_path, monkeypatch):
    """After two batches, as by Ctrl-C; nor does the next run overwrite it."""
    rows = [{"messages": [*p["messages"], {"role": "assistant", "content": "无"}]} for p in PAIRS]
    path = conversations(tmp_path / "chat.jsonl", rows)
    whole = rejected(early, path, tmp_path / "whole.jsonl", batch=2)
    calls, real = [], dpo.generate

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(dpo, "generate", stopped)
    with pytest.raises(KeyboardInterrupt):
        rejected(early, path, tmp_path / "pairs.jsonl", batch=2)
    found = [json.loads(line) for line in (tmp_path / "pairs.jsonl.tmp").read_text("utf-8").splitlines()]
    assert 1 < len(found) <= 4 and found == whole[: len(found)] and not (tmp_path / "pairs.jsonl").exists()
    with pytest.raises(ValueError, match="pairs.jsonl.tmp exists"):
        rejected(early, path, tmp_path / "pairs.jsonl", batch=2)


def test_make_rejected_overwrites_nothing_and_writes_no_empty_file(early, tmp_path):
    path = conversations(
        tmp_path / "chat.jsonl", [{"messages": [user("几个？" * 60), {"role": "assistant", "content": "三"}]}]
    )
    with pytest.raises(ValueError, match="no pair is left of 1 rows: 1 too long"):
        rejected(early, path, tmp_path / "pairs.jsonl")
    assert not list(tmp_path.glob("pairs*"))
    with pytest.raises(ValueError, match="exists"):
        rejected(early, path, path)
    with pytest.raises(ValueError, match="--template yayi: .* was tuned with plain"):
        rejected(early, path, tmp_path / "pairs.jsonl", template="yayi")
    with pytest.raises(ValueError, match="max_similar"):
        dpo.MakeRejectedConfig(init="x", data="x", out="x", max_similar=1.5)
