"""Generation is transformers' greedy search token for token; sampling is the softmax; batches change nothing."""

import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_script, tiny_hf, tiny_pairs

import chat
import checkpoint
import generate as gen
import inference
import kernels
import tokenizer as tok
from generate import Sampling, generate
from model import KVCache, Model, ModelConfig, build, init_weights

FAMILIES = ("llama-tied", "phi", "bloom")  # grouped heads and a tied head; biases; 6 heads and ALiBi
SENTENCE = "我爱😀和🀄，还有👨‍👩‍👧，以及𠮷！"  # what the small trained model knows by heart
CONTEXT = 128  # of tiny_hf's models

pytestmark = pytest.mark.usefixtures("one_thread")


# --- helpers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Train a tokenizer that knows Han and Latin letters but no emoji: those are spelt in bytes."""
    root = tmp_path_factory.mktemp("tok")
    rows = ["我爱白纸，还有和以及！你好世界", "the quick brown fox jumps over the lazy dog", "0123456789"]
    (root / "a.txt").write_text("\n\n".join(rows * 20), "utf-8")
    tok.train(tok.Train([str(root / "a.txt")], str(root / "tok"), vocab_size=345))
    return tok.load_tokenizer(root / "tok")


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    return tiny_pairs(tokenizer, tmp_path_factory)


@pytest.fixture(scope="module")
def scholar(tokenizer, tmp_path_factory):
    """Train a tiny model until it says SENTENCE and </s>, whatever comes; return its folder."""
    torch.set_num_threads(1)
    config = ModelConfig("llama", 384, 64, 2, 4, 128, 64, 2, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    model = build(config)
    init_weights(model, seed=1)
    row = torch.tensor([tokenizer.encode_document(SENTENCE)])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = model(row[:, :-1], row[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    folder = tmp_path_factory.mktemp("scholar") / "model"
    checkpoint.save_model(model, folder, tokenizer)
    return folder


def loaded(folder):
    return gen.load(folder, torch.float32)


def prompts_of(tokenizer):
    """Four prompts of unequal length, one of them a single token."""
    texts = ["", "我爱", "the quick brown fox", "你好世界，the lazy dog 0123"]
    return [tokenizer.encode_prompt(t) for t in texts]


def greedy(n, **more):
    return Sampling(max_new_tokens=n, temperature=0, **more)


@torch.no_grad()
def hf_greedy(hf, prompt, n):
    """Continue one prompt by transformers' greedy search; the EOS that ends it is cut off."""
    out = hf.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=n, pad_token_id=0)
    new = out[0, len(prompt) :].tolist()
    return new[:-1] if new and new[-1] == hf.config.eos_token_id else new


# --- 1. greedy is transformers' ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_transformers_greedy_alone_and_in_a_ragged_batch(family, made):
    hf, folder = made(family)
    model, tokenizer = loaded(folder)
    prompts = prompts_of(tokenizer)
    want = [hf_greedy(hf, p, 24) for p in prompts]
    assert len(set(map(tuple, want))) == 4 and max(len(set(w)) for w in want) >= 4, "the outputs vary"
    assert [generate(model, [p], greedy(24))[0] for p in prompts] == want
    assert generate(model, prompts, greedy(24)) == want
    assert generate(model, prompts[::-1], greedy(24)) == want[::-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_changes_no_logits_and_leaves_no_single_projections(family, made):
    _, folder = made(family)
    plain = checkpoint.load_model(folder, torch.float32)
    fused, tokenizer = loaded(folder)
    for prompt in prompts_of(tokenizer):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            want = plain(ids)
            torch.testing.assert_close(fused(ids), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    names = {n.split(".")[-2] for n, _ in fused.named_parameters()}
    assert not names & {"q_proj", "k_proj", "v_proj", "gate_proj"}
    assert names & {"qkv_proj", "query_key_value"}
    assert not any(p.requires_grad for p in fused.parameters()) and not fused.training
    assert sum(p.numel() for p in fused.parameters()) == sum(p.numel() for p in plain.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_is_never_saved(family, made, tmp_path):
    _, folder = made(family)
    model, tokenizer = loaded(folder)
    with pytest.raises(ValueError, match="was fused"):
        checkpoint.save_model(model, tmp_path / "saved", tokenizer)
    assert not (tmp_path / "saved").exists()


def test_fuse_follows_the_rows_that_are_asked_last(made):
    _, folder = made("llama-tied")
    model, _ = gen.load(folder, torch.float16, rows=1)
    by_columns = kernels.columns_are_faster(model.lm_head.weight)
    assert model.lm_head.weight.t().is_contiguous() == by_columns
    assert gen.fuse(model, rows=8).lm_head.weight.is_contiguous()
    assert model.lm_head.weight is model.embed_tokens.weight


def test_score_of_one_token_is_empty(made):
    for family in FAMILIES:
        model, _ = loaded(made(family)[1])
        assert gen.score(model, [[5]])[0].shape == (0,)


def test_any_of_several_eos_ids_ends_a_text(scholar, tmp_path):
    model, tokenizer = loaded(scholar)
    ids = tokenizer.encode_prompt("我爱")
    whole = generate(model, [ids], greedy(8, ignore_eos=True))[0]
    shutil.copytree(scholar, tmp_path / "two")
    config = json.loads((tmp_path / "two/config.json").read_text())
    config["eos_token_id"] = [2, whole[3]]
    (tmp_path / "two/config.json").write_text(json.dumps(config))
    (tmp_path / "two/generation_config.json").unlink()  # it would win
    model, _ = loaded(tmp_path / "two")
    assert generate(model, [ids], greedy(8))[0] == whole[: whole.index(whole[3])]
    checkpoint.save_model(checkpoint.load_model(tmp_path / "two"), tmp_path / "copy")
    assert json.loads((tmp_path / "copy/config.json").read_text())["eos_token_id"] == [2, whole[3]]


@pytest.mark.parametrize("family", FAMILIES)
def test_score_is_the_cross_entropy_of_the_plain_model_and_of_transformers(family, made):
    hf, folder = made(family)
    plain = checkpoint.load_model(folder, torch.float32)
    fused, tokenizer = loaded(folder)
    ids = tokenizer.encode_document("你好世界，the quick 😀")
    row = torch.tensor([ids])
    with torch.no_grad():
        want = F.cross_entropy(hf(row).logits[0, :-1], row[0, 1:], reduction="none")
        nll = plain(row[:, :-1], row[:, 1:])[0]
    for model in (plain, fused):
        have = gen.score(model, [ids])[0]
        assert have.dtype == torch.float32 and have.shape == (len(ids) - 1,)
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(have, nll, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_greedy_runs_and_its_first_token_is_fp32s_or_nearly_as_likely(family, made):
    _, folder = made(family)
    model, tokenizer = gen.load(folder, torch.bfloat16)
    exact, _ = loaded(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    prompts = prompts_of(tokenizer)
    out = generate(model, prompts, greedy(12, ignore_eos=True))
    assert [len(o) for o in out] == [12] * 4
    for prompt, new in zip(prompts, out):
        with torch.no_grad():
            logits = exact(torch.tensor([prompt]))[0, -1]
        assert logits[new[0]] > logits.max() - 0.4 * logits.std()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_for_one_row_is_the_models_forward(family, dtype, made):
    """OneRow is Model.forward written flat: the same logits after every token, whatever the weights' layout."""
    _, folder = made(family)
    _, tokenizer = loaded(folder)
    ids = tokenizer.encode_prompt("我爱the quick 你好世界")
    steps, columns = {}, {}
    for rows in (1, 2):
        model, _ = gen.load(folder, dtype, rows=rows)
        columns[rows] = model.lm_head.weight.stride(0) == 1
        one = inference.OneRow(model)
        flat, plain = (KVCache(model.config, 1, 32, dtype) for _ in range(2))
        with torch.inference_mode():
            model(torch.tensor([ids[:3]]), cache=flat)
            model(torch.tensor([ids[:3]]), cache=plain)
            steps[rows] = [one(i, flat) for i in ids[3:]]
            want = [model(torch.tensor([[i]]), cache=plain)[0, -1] for i in ids[3:]]
        assert int(flat.lengths) == int(plain.lengths) == len(ids)
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        for a, b in zip(steps[rows], want, strict=True):
            assert a.dtype == dtype and (a.double() - b.double()).norm() < bound * b.double().norm()
    assert columns == {1: kernels.columns_are_faster(model.lm_head.weight), 2: False}


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_logits_are_as_near_to_fp32_as_those_of_transformers(family, made):
    """Measured, relative L2: one pass 4.1, 1.4, 1.4 % (llama, phi, bloom), steps 4.2, 1.5, 1.4; theirs 4.3, 1.4, 1.8."""
    hf, folder = made(family)
    model, _ = gen.load(folder, torch.bfloat16)
    ids = torch.randint(4, 300, (4, 100), generator=torch.Generator().manual_seed(3))
    one, cache = inference.OneRow(model), KVCache(model.config, 1, 100, torch.bfloat16)
    with torch.inference_mode():
        want, theirs, ours = (m(ids) for m in (hf, copy.deepcopy(hf).bfloat16(), model))
        want, theirs = want.logits, theirs.logits
        model(ids[:1, :50], cache=cache)
        steps = torch.stack([one(int(i), cache) for i in ids[0, 50:]])

    def far(got, want):
        return float((got.double() - want.double()).norm() / want.double().norm())

    assert far(ours, want) < 1.25 * far(theirs, want) < 0.1
    assert far(steps, want[0, 50:]) < 1.25 * far(theirs[0, 50:], want[0, 50:])


def test_one_row_is_taken_where_it_fits(made, monkeypatch):
    _, folder = made("llama-tied")
    model, tokenizer = loaded(folder)
    calls = []
    step = inference.OneRow.__call__
    monkeypatch.setattr(inference.OneRow, "__call__", lambda self, *a: calls.append(a) or step(self, *a))
    ids = tokenizer.encode_prompt("我爱")
    generate(model, [ids], greedy(4, ignore_eos=True))
    assert len(calls) == 3  # the first token comes from the prompt's forward
    generate(model, [ids, ids], greedy(4))
    unfused = checkpoint.load_model(folder, torch.float32)
    generate(unfused.eval(), [ids], greedy(4))
    model.compute_dtype = torch.bfloat16  # fp32 weights that compute in bf16
    generate(model, [ids], greedy(4))
    assert len(calls) == 3


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(("family", "rows"), [("llama-tied", 1), ("bloom", 1), ("phi", 3)])
def test_compiled_steps_write_the_same_and_are_one_graph_for_caches_of_every_size(family, rows, made):
    from torch._dynamo.utils import counters

    _, folder = made(family)
    model, tokenizer = loaded(folder)
    compiled = gen.load(folder, torch.float32, rows=rows, compiled=True)[0]
    assert model.compiled_steps is None and compiled.compiled_steps is not None
    prompts = [tokenizer.encode_prompt(text) for text in ("我爱the", "quick", "你好世界")][:rows]
    counters.clear()
    for new in (5, 20, 11):
        want = generate(model, prompts, greedy(new, ignore_eos=True))
        assert generate(compiled, prompts, greedy(new, ignore_eos=True)) == want
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_command_line_compiles_too(made):
    _, folder = made("llama-tied")
    flags = ("--prompt", "我爱", "--temperature", "0", "--max_new_tokens", "8", "--device", "cpu")
    plain, compiled = (run_script("generate.py", folder, *flags, *more) for more in ((), ("--compile",)))
    assert compiled.returncode == 0 and compiled.stdout == plain.stdout != ""


def test_compiling_without_a_compiler_is_refused(made, monkeypatch):
    _, folder = made("llama-tied")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="--compile needs a C\\+\\+ compiler"):
        gen.load(folder, compiled=True)


# --- 2. sampling ---------------------------------------------------------------------------------------------


def p_value(counts, probs):
    """Pearson's chi-square test: the probability of counts as far from probs as these, or farther."""
    expected = probs.double() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    x = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    return float(torch.special.gammaincc((kept.sum() - 1).double() / 2, x / 2))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_ten_thousand_draws_follow_the_softmax(temperature):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.5
    sampling, generator = Sampling(temperature=temperature), torch.Generator().manual_seed(0)
    draws = torch.tensor([gen.sample(logits, sampling, generator) for _ in range(10_000)])
    counts = torch.bincount(draws, minlength=12).double()
    assert p_value(counts, (logits / temperature).softmax(-1)) > 1e-3
    assert p_value(counts, (logits / (temperature * 1.2)).softmax(-1)) < 1e-3, "the test can tell"


def test_top_k_and_top_p_keep_the_tokens_that_transformers_keeps():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    rng = torch.Generator().manual_seed(1)
    for n in range(60):
        logits = torch.randn(200, generator=rng) * (0.5 + n % 7)
        t, k, p = (0.7, 1.0, 1.5)[n % 3], (0, 1, 5, 50, 200, 1000)[n % 6], (1.0, 0.9, 0.5, 0.05)[n % 4]
        want = (logits / t)[None]
        want = TopKLogitsWarper(k)(None, want) if k else want
        want = TopPLogitsWarper(p)(None, want) if p < 1 else want
        have = gen.logits_to_probs(logits, Sampling(temperature=t, top_k=k, top_p=p))
        assert torch.equal(have > 0, want[0].softmax(-1) > 0), (t, k, p)
        torch.testing.assert_close(have, want[0].softmax(-1))


def test_top_p_keeps_at_least_the_likeliest_token_and_no_filter_changes_the_logits():
    logits = torch.tensor([1.0, 4.0, 3.0, 2.0])
    before = logits.clone()
    assert gen.logits_to_probs(logits, Sampling(top_p=1e-9)).tolist() == [0, 1, 0, 0]
    assert gen.logits_to_probs(logits, Sampling(top_k=2)).nonzero().flatten().tolist() == [1, 2]
    assert torch.equal(logits, before)


def test_filtered_draws_follow_the_filtered_softmax():
    logits = torch.randn(30, generator=torch.Generator().manual_seed(4))
    sampling, generator = Sampling(top_k=12, top_p=0.8), torch.Generator().manual_seed(0)
    draws = torch.tensor([gen.sample(logits, sampling, generator) for _ in range(10_000)])
    probs = gen.logits_to_probs(logits, sampling)
    assert 2 < (probs > 0).sum() < 12
    assert p_value(torch.bincount(draws, minlength=30).double(), probs) > 1e-3


def test_a_generated_first_token_follows_the_models_softmax(made):
    _, folder = made("phi")
    model, _ = loaded(folder)
    with torch.no_grad():
        probs = model(torch.tensor([[1, 300]]))[0, -1].softmax(-1)
    order = probs.argsort(descending=True)
    draws = generate(
        model,
        [[1, 300]] * 2000,
        [Sampling(max_new_tokens=1, seed=s, ignore_eos=True) for s in range(2000)],
    )
    rank = {
        int(t): min(r, 9) for r, t in enumerate(order)
    }  # the nine likeliest tokens, and all others together
    counts = torch.bincount(torch.tensor([rank[d[0]] for d in draws]), minlength=10).double()
    assert p_value(counts, torch.cat([probs[order[:9]], probs[order[9:]].sum()[None]])) > 1e-3


@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_text_does_not_depend_on_the_batch_it_is_in(family, temperature, made):
    _, folder = made(family)
    model, tokenizer = loaded(folder)
    prompts = prompts_of(tokenizer)
    samplings = [
        Sampling(max_new_tokens=n, temperature=temperature, seed=s, top_k=40)
        for n, s in ((20, 5), (3, 6), (20, 7), (11, 5))
    ]
    alone = [generate(model, [p], s)[0] for p, s in zip(prompts, samplings)]
    assert generate(model, prompts, samplings) == alone
    assert generate(model, prompts[2:] + prompts[:1], samplings[2:] + samplings[:1]) == alone[2:] + alone[:1]


def test_every_prompt_can_have_its_own_sampling(made):
    _, folder = made("llama-tied")
    model, tokenizer = loaded(folder)
    prompt = tokenizer.encode_prompt("你好")
    samplings = [
        greedy(9, ignore_eos=True),
        Sampling(max_new_tokens=4, temperature=3.0, seed=1, ignore_eos=True),
        Sampling(max_new_tokens=9, temperature=3.0, seed=2, ignore_eos=True),
        Sampling(max_new_tokens=9, temperature=3.0, seed=2, ignore_eos=True),
        Sampling(max_new_tokens=9, temperature=3.0, seed=2, top_k=1, ignore_eos=True),
    ]
    out = generate(model, [prompt] * 5, samplings)
    assert [len(o) for o in out] == [9, 4, 9, 9, 9]
    assert out[4] == out[0], "the likeliest of one"
    assert out[2] == out[3] and out[1] != out[2][:4], "the same seed the same text, another seed another"


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -1},
        {"stop": ("",)},
        {"num_beams": 0},
        {"length_penalty": float("inf")},
    ],
)
def test_a_sampling_that_makes_no_sense_is_refused_by_the_name_of_its_flag(bad):
    with pytest.raises(ValueError, match=f"--{next(iter(bad))} "):
        Sampling(**bad)


# --- 3. where a text ends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_eos_ends_a_row_and_is_not_returned_unless_ignored(family, made):
    _, folder = made(family)
    model, tokenizer = loaded(folder)
    prompts = prompts_of(tokenizer)
    free = generate(model, prompts, greedy(16, ignore_eos=True))
    assert [len(row) for row in free] == [16] * 4
    eos = next(t for t in free[2] if free[2].index(t) >= 2)  # a token that the model says in the middle
    model.config.eos_token_id = eos
    want = [row[: row.index(eos)] if eos in row else row for row in free]
    assert len(want[2]) >= 2 and len({len(w) for w in want}) > 1
    assert generate(model, prompts, greedy(16)) == want
    assert generate(model, prompts, greedy(16, ignore_eos=True)) == free
    mixed = [greedy(16, ignore_eos=i == 2) for i in range(4)]
    assert generate(model, prompts, mixed) == [w if i != 2 else free[2] for i, w in enumerate(want)]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_no_row_gets_more_than_max_new_tokens(n, made):
    _, folder = made("phi")
    model, tokenizer = loaded(folder)
    prompts = prompts_of(tokenizer)
    assert [len(r) for r in generate(model, prompts, greedy(n, ignore_eos=True))] == [n] * 4
    steps = list(gen.decode(model, prompts, greedy(n, ignore_eos=True)))
    assert len(steps) == n and all(len(step) == 4 for step in steps)


@pytest.mark.parametrize("family", ["llama-tied", "phi"])
def test_a_prompt_beyond_a_rope_context_is_refused(family, made):
    _, folder = made(family)
    model, _ = loaded(folder)
    for prompts in ([[5] * (CONTEXT + 1)], [[5], [5] * (CONTEXT + 1)]):
        with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens exceed the model's context of {CONTEXT}"):
            generate(model, prompts, greedy(1))


@pytest.mark.parametrize("family", ["llama-tied", "phi"])
def test_a_rope_model_stops_where_its_context_ends_while_other_rows_go_on(family, made):
    hf, folder = made(family)
    model, _ = loaded(folder)
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randint(4, 300, (n,), generator=rng).tolist() for n in (CONTEXT - 5, 3, CONTEXT, 60)]
    sampling = greedy(40, ignore_eos=True)
    out = generate(model, prompts, sampling)
    assert [len(row) for row in out] == [5, 40, 0, 40]
    assert [generate(model, [p], sampling)[0] for p in prompts] == out
    hf.generation_config.eos_token_id = None
    for prompt, row in zip(prompts, out):
        if row:
            ids = torch.tensor([prompt])
            want = hf.generate(ids, do_sample=False, max_new_tokens=len(row), pad_token_id=0)
            assert want[0, len(prompt) :].tolist() == row
    hf.generation_config.eos_token_id = 2


@pytest.mark.filterwarnings("ignore:.*exceed the model's context")
def test_bloom_goes_on_beyond_its_context_and_warns(made, tmp_path):
    hf, folder = made("bloom")
    model, _ = loaded(folder)
    model.config.max_position_embeddings = 16
    prompt = torch.randint(4, 300, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    with pytest.warns(UserWarning, match="exceed the model's context of 16"):
        out = generate(model, [prompt], greedy(8))
    assert out == [hf_greedy(hf, prompt, 8)]


def test_an_empty_prompt_is_refused(made):
    _, folder = made("phi")
    model, _ = loaded(folder)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, [[5], []], greedy(1))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_rows_of_the_table_beyond_the_tokenizer_are_never_sampled(temperature, tokenizer, tmp_path):
    known = tokenizer.vocab_size
    hf = tiny_hf("phi", vocab_size=384)
    assert known < 384
    with torch.no_grad():
        hf.lm_head.bias[known:] = 1000  # the likeliest by far
    hf.save_pretrained(tmp_path / "hf")
    checkpoint.save_model(checkpoint.load_model(tmp_path / "hf"), tmp_path / "ours", tokenizer)
    model, _ = loaded(tmp_path / "ours")
    sampling = Sampling(max_new_tokens=20, temperature=temperature, ignore_eos=True)
    prompts = [[1], [1, 300, 301]]
    assert all(i < known for row in generate(model, prompts, sampling) for i in row)
    model.known_vocab = 384
    assert all(i >= known for row in generate(model, prompts, sampling) for i in row), "the test can tell"


# --- 4. streaming ----------------------------------------------------------------------------------------------


def test_a_trained_model_says_its_sentence_and_stops_and_its_stream_breaks_no_character(scholar):
    model, tokenizer = loaded(scholar)
    assert all(tokenizer.token_kind(i) == "byte" for i in tokenizer.encode("😀🀄👩𠮷"))
    for known in ("", "我爱", "我爱😀和"):
        prompt = tokenizer.encode_prompt(known)
        new = generate(model, [prompt], greedy(100))[0]
        assert tokenizer.decode(new) == SENTENCE[len(known) :]
        assert model.config.eos_token_id not in new
        parts = list(gen.stream(model, tokenizer, prompt, greedy(100)))
        assert "".join(parts) == SENTENCE[len(known) :]
        assert not any("\ufffd" in part for part in parts)
        assert sum(bool(part) for part in parts) > 8, "it streams: many parts"


def test_a_prompt_that_ends_inside_a_character_is_continued_by_its_bytes(scholar):
    model, tokenizer = loaded(scholar)
    ids = tokenizer.encode_prompt("我爱😀")
    assert len(ids) - len(tokenizer.encode_prompt("我爱")) == 4
    new = generate(model, [ids[:-2]], greedy(100))[0]
    assert tokenizer.decode(ids[:-2] + new) == SENTENCE


@pytest.mark.parametrize("n", range(1, 16))
def test_the_stream_is_the_decoded_text_wherever_it_is_cut(scholar, n):
    model, tokenizer = loaded(scholar)
    prompt = tokenizer.encode_prompt("我爱")
    want = tokenizer.decode(generate(model, [prompt], greedy(n))[0])
    parts = list(gen.stream(model, tokenizer, prompt, greedy(n)))
    assert "".join(parts) == want
    assert not any("\ufffd" in part for part in parts[:-1]), "only the end may be an unfinished character"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_of_random_tokens_is_the_decoded_text(family, made):
    _, folder = made(family)
    model, tokenizer = loaded(folder)
    for seed in range(3):
        sampling = Sampling(max_new_tokens=40, temperature=3.0, seed=seed, ignore_eos=seed == 2)
        new = generate(model, [[1, 300]], sampling)[0]
        assert "".join(gen.stream(model, tokenizer, [1, 300], sampling)) == tokenizer.decode(new)


def test_the_prompt_of_the_feature_list_survives_decoding(tokenizer):
    for text in ("年轻人不应该再努力了，年轻人就应该享受生活，", "emoji 😀👨‍👩‍👧 and 𠮷㐂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


# --- 5. loading ------------------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer, tmp_path):
    small = tiny_hf("phi", vocab_size=tokenizer.vocab_size - 1)
    small.save_pretrained(tmp_path / "small")
    tokenizer.save(tmp_path / "small")
    want = (
        f"small: the tokenizer has {tokenizer.vocab_size} tokens, the model only {tokenizer.vocab_size - 1}"
    )
    with pytest.raises(ValueError, match=want):
        gen.load(tmp_path / "small")


def test_a_run_folder_means_its_latest_step(scholar, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "step_0000060").symlink_to(scholar)
    (tmp_path / "run" / "latest").write_text("step_0000060\n")
    model, tokenizer = loaded(tmp_path / "run")
    assert tokenizer.decode(generate(model, [[1]], greedy(100))[0]) == SENTENCE


def test_the_tokenizers_eos_serves_where_the_config_has_none(scholar, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for path in scholar.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({k: v for k, v in config.items() if k != "eos_token_id"}))
    assert checkpoint.read_config(folder).eos_token_id is None
    model, tokenizer = loaded(folder)
    assert model.config.eos_token_id == tokenizer.eos_id
    assert tokenizer.decode(generate(model, [[1]], greedy(100))[0]) == SENTENCE


# --- rules on the logits, beams -----------------------------------------------------------------------------


@torch.no_grad()
def hf_generate(hf, prompt, n, eos=None, **settings):
    """Continue one prompt by transformers' generate; give the new tokens without the EOS that ends them."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": n, "pad_token_id": 0, "eos_token_id": eos, **settings}
    new = hf.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()
    ends = [i for i, t in enumerate(new) if t == eos]
    return new[: ends[0]] if ends else new


def test_every_rule_changes_the_logits_as_in_transformers():
    from transformers import (
        MinPLogitsWarper,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rng = torch.Generator().manual_seed(1)
    for n in range(120):
        logits = torch.randn(40, generator=rng) * 3
        ids = torch.randint(0, 8, (1 + n % 30,), generator=rng)
        s = Sampling(
            temperature=(0.5, 1.0, 1.3)[n % 3],
            top_k=(0, 5, 20)[n % 3],
            top_p=(1.0, 0.6, 0.95, 0.3)[n % 4],
            min_p=(0.0, 0.05, 0.4)[n // 3 % 3],
            repetition_penalty=(1.0, 1.3, 0.8)[n // 2 % 3],
            no_repeat_ngram_size=n % 5,
        )
        processors = [
            s.repetition_penalty != 1 and RepetitionPenaltyLogitsProcessor(s.repetition_penalty),
            s.no_repeat_ngram_size > 0 and NoRepeatNGramLogitsProcessor(s.no_repeat_ngram_size),
            s.temperature != 1 and TemperatureLogitsWarper(s.temperature),
            s.top_k > 0 and TopKLogitsWarper(s.top_k),
            s.top_p < 1 and TopPLogitsWarper(s.top_p),
            s.min_p > 0 and MinPLogitsWarper(s.min_p),
        ]
        want = logits[None]
        for processor in filter(None, processors):
            want = processor(ids[None], want)
        have = gen.logits_to_probs(gen.apply_rules(logits, ids.tolist(), s), s)
        assert torch.equal(have > 0, want[0].softmax(-1) > 0), s
        torch.testing.assert_close(have, want[0].softmax(-1))


def test_the_repetition_penalty_by_hand():
    s = Sampling(repetition_penalty=2.0)
    logits = torch.tensor([3.0, -1.0, 3.0, -1.0])
    assert gen.apply_rules(logits, [2, 3, 3], s).tolist() == [3.0, -1.0, 1.5, -2.0]
    assert logits.tolist() == [3.0, -1.0, 3.0, -1.0]


RULES = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.9, "no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.1},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_under_rules_is_transformers_alone_and_in_a_ragged_batch(family, rules, made):
    hf, folder = made(family)
    model, tokenizer = loaded(folder)
    prompts = prompts_of(tokenizer)
    want = [hf_generate(hf, p, 20, **rules) for p in prompts]
    assert want != [hf_generate(hf, p, 20) for p in prompts], "the rules do something"
    sampling = greedy(20, ignore_eos=True, **rules)
    assert generate(model, prompts, sampling) == want
    assert [generate(model, [p], sampling)[0] for p in prompts] == want


@pytest.mark.parametrize("n", [1, 2, 4])
def test_no_ngram_stands_twice(n, made):
    model, tokenizer = loaded(made("phi")[1])
    prompt = tokenizer.encode_prompt("你好世界")
    for seed in range(3):
        s = Sampling(max_new_tokens=80, temperature=0.3, no_repeat_ngram_size=n, seed=seed, ignore_eos=True)
        text = prompt + generate(model, [prompt], s)[0]
        new = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        assert len(set(new)) == len(new) and len(text) == len(prompt) + 80


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 2},
        {"num_beams": 4, "length_penalty": 0.0},
        {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True},
        {"num_beams": 3, "length_penalty": -1.0, "no_repeat_ngram_size": 2},
        {"num_beams": 5, "length_penalty": 0.6, "repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_beam_search_is_transformers_alone_and_in_a_ragged_batch(family, settings, made):
    hf, folder = made(family)
    model, tokenizer = loaded(folder)
    prompts = prompts_of(tokenizer)
    free = generate(model, prompts, greedy(12, ignore_eos=True, **settings))
    likely = [t for row in free for t in row[:11]]
    lengths = set()
    for eos in sorted(set(likely), key=likely.count)[-3:] + [likely[3]]:  # tokens that often end a beam
        model.config.eos_token_id = eos
        want = [hf_generate(hf, p, 12, eos=eos, **settings) for p in prompts]
        sampling = greedy(12, **settings)
        assert generate(model, prompts, sampling) == want
        assert [generate(model, [p], sampling)[0] for p in prompts] == want
        lengths |= {len(row) for row in want}
    assert len(lengths) > 1, "some end by EOS, some at max_new_tokens"


def test_one_beam_is_greedy_and_more_find_a_likelier_text(made):
    model, tokenizer = loaded(made("llama-tied")[1])
    prompt = tokenizer.encode_prompt("你好")

    def logp(new):
        return -float(gen.score(model, [prompt + new])[0][-len(new) :].sum())

    single = generate(model, [prompt], greedy(16, ignore_eos=True))[0]
    beamed = generate(model, [prompt], greedy(16, num_beams=8, ignore_eos=True))[0]
    assert len(single) == len(beamed) == 16 and logp(beamed) > logp(single)


def test_beams_that_sample_stop_at_texts_or_differ_are_refused(made):
    model, tokenizer = loaded(made("phi")[1])
    for bad in (Sampling(num_beams=2), greedy(4, num_beams=2, stop=("a",))):
        with pytest.raises(
            ValueError, match="--num_beams above 1 needs --temperature 0, and knows no --stop"
        ):
            generate(model, [[5]], bad, tokenizer)
    with pytest.raises(ValueError, match="num_beams must be the same for all prompts, not 2 and 3"):
        generate(model, [[5], [6]], [greedy(4, num_beams=2), greedy(4, num_beams=3)])
    with pytest.raises(ValueError, match="stop texts are found with the tokenizer"):
        generate(model, [[5]], greedy(4, stop=("a",)))


def test_beams_end_where_a_rope_context_ends(made):
    model, _ = loaded(made("phi")[1])
    rng = torch.Generator().manual_seed(2)
    prompts = [torch.randint(4, 300, (n,), generator=rng).tolist() for n in (CONTEXT - 5, 3, CONTEXT)]
    out = generate(model, prompts, greedy(40, num_beams=3, ignore_eos=True))
    assert [len(row) for row in out] == [5, 40, 0]


# --- stop texts ----------------------------------------------------------------------------------------------


def test_a_stop_text_is_found_across_tokens_and_is_not_part_of_the_text(scholar):
    model, tokenizer = loaded(scholar)
    ids = tokenizer.encode_prompt("我爱")
    whole = gen.complete(model, tokenizer, [ids], greedy(100))[0]
    assert "我爱" + whole == SENTENCE
    for n in range(1, 4):
        for i in range(len(whole) - n):
            stop = whole[i : i + n]
            sampling = greedy(100, stop=("never", stop))
            want = whole[: whole.index(stop)]
            assert "".join(gen.stream(model, tokenizer, ids, sampling)) == want
            assert gen.complete(model, tokenizer, [ids, ids], [sampling, greedy(100)]) == [want, whole]


def test_a_stop_text_ends_the_work_and_half_of_one_is_given_in_the_end(scholar):
    model, tokenizer = loaded(scholar)
    ids = tokenizer.encode_prompt("我爱")
    stopped = generate(model, [ids], greedy(100, stop=("和",)), tokenizer)[0]
    assert tokenizer.decode(stopped, at_start=False).endswith("和")
    assert len(stopped) < len(generate(model, [ids], greedy(100))[0])
    assert "我爱" + gen.complete(model, tokenizer, [ids], greedy(100, stop=("！？",)))[0] == SENTENCE


class Letters:
    """A tokenizer of one letter a token, and one special token."""

    special_id = {"<end>": 7}

    def stream(self, at_start):
        decoder = type("Decoder", (), {})()
        decoder.push, decoder.flush = (lambda i: "" if i == 7 else chr(i)), lambda: ""
        return decoder


def pushed(writer, text):
    return [writer.push(ord(c)) for c in text]


def test_the_earliest_stop_text_counts_even_where_they_overlap():
    writer = gen.Writer(Letters(), ("cd", "bcx", "b!"))
    assert pushed(writer, "abcd") == ["a", "", "", "b"] and writer.ended
    writer = gen.Writer(Letters(), ("aab",))
    assert "".join(pushed(writer, "aaab")) + writer.flush() == "a" and writer.ended


def test_stop_texts_are_looked_for_behind_the_lead_and_may_be_special_tokens():
    writer = gen.Writer(Letters(), ("\n", "<end>"), lead=":\n")
    assert pushed(writer, ":\nab\n") == ["", "", "a", "b", ""] and writer.ended
    writer = gen.Writer(Letters(), ("<end>",), lead=":\n")
    assert pushed(writer, ":ab") == ["", ":a", "b"] and not writer.ended
    assert writer.push(7) == "" and writer.ended and writer.push(ord("c")) == ""


# --- a shared beginning --------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Count the tokens that the model is given: a list of the sizes of its inputs."""
    sizes, forward = [], Model.forward

    def counted(self, ids, *args, **kwargs):
        sizes.append(ids.numel())
        return forward(self, ids, *args, **kwargs)

    monkeypatch.setattr(Model, "forward", counted)
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_prompts_begin_with_is_computed_once(family, made, computed):
    hf, folder = made(family)
    model, _ = loaded(folder)
    rng = torch.Generator().manual_seed(5)
    common, *ends = (torch.randint(4, 300, (n,), generator=rng).tolist() for n in (60, 1, 7, 12))
    prompts = [common + end for end in ends]
    want = [hf_generate(hf, p, 8) for p in prompts]
    computed.clear()
    assert generate(model, prompts, greedy(8, ignore_eos=True)) == want
    assert computed[:2] == [60, 3 * 12]
    assert generate(model, [prompts[0]] * 2, greedy(8, ignore_eos=True)) == want[:1] * 2
    prefix = gen.Prefix()
    for prompt, row in zip(prompts, want):
        assert generate(model, [prompt], greedy(8, ignore_eos=True), prefix=prefix) == [row]
        assert prefix.ids == (prompt + row)[:-1], "the last token was never read"
    beams = greedy(8, num_beams=3, ignore_eos=True)
    assert generate(model, prompts, beams) == [hf_generate(hf, p, 8, num_beams=3) for p in prompts]


def test_a_conversation_computes_only_what_is_new(made, computed):
    model, _ = loaded(made("llama-tied")[1])
    rng = torch.Generator().manual_seed(6)
    prefix, text = gen.Prefix(), []
    for turn in range(3):
        text = text + torch.randint(4, 300, (10,), generator=rng).tolist()
        computed.clear()
        new = generate(model, [text], greedy(6, ignore_eos=True), prefix=prefix)[0]
        assert computed[0] == (10 if turn == 0 else 11), "the last token of the reply, and the question"
        assert new == generate(model, [text], greedy(6, ignore_eos=True))[0]
        text = text + new
    other = [9, *text[1:]]  # nothing shared
    assert generate(model, [other], greedy(4), prefix=prefix) == generate(model, [other], greedy(4))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_scored_together_as_alone(family, made):
    model, tokenizer = loaded(made(family)[1])
    rows = [tokenizer.encode_document(text) for text in ("你好世界", "the quick brown fox", "", "我")]
    for row, nll in zip(rows, gen.score(model, rows)):
        torch.testing.assert_close(nll, gen.score(model, [row])[0])


# --- conversations -------------------------------------------------------------------------------------------


def test_a_history_is_shortened_by_whole_turns_and_the_newest_question_stays(tokenizer):
    rng = random.Random(1)
    for n in range(60):
        messages = [{"role": "system", "content": "你好" * rng.randint(0, 3)}] if n % 3 == 0 else []
        for _ in range(rng.randint(0, 4)):
            messages += [
                {"role": "user", "content": "我爱白纸" * rng.randint(1, 6)},
                {"role": "assistant", "content": "the quick " * rng.randint(1, 6)},
            ]
        messages.append({"role": "user", "content": "你好世界以及" * rng.randint(1, 9)})
        most = rng.randint(30, 120)
        kept = gen.fit_history(messages, tokenizer, most, "plain")
        ids, _ = tokenizer.encode_chat(kept, open_reply=True, template="plain")
        assert len(ids) <= most
        system = [m for m in messages if m["role"] == "system"]
        assert kept[: len(system)] == system
        turns = kept[len(system) :]
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2) + ["user"]
        assert messages[-1]["content"].startswith(turns[-1]["content"]) and turns[-1]["content"]
        assert turns[:-1] == messages[len(messages) - len(turns) : -1]
        if turns[-1] != messages[-1]:  # cut: then nothing else is left, and one character more is too much
            more = messages[-1] | {"content": messages[-1]["content"][: len(turns[-1]["content"]) + 1]}
            ids, _ = tokenizer.encode_chat([*system, more], open_reply=True, template="plain")
            assert len(turns) == 1 and len(ids) > most
        elif len(kept) < len(messages):  # the turn that went did not fit
            more = system + messages[len(messages) - len(turns) - 2 :]
            ids, _ = tokenizer.encode_chat(more, open_reply=True, template="plain")
            assert len(ids) > most
    with pytest.raises(ValueError, match="leaves no room"):
        gen.fit_history([{"role": "system", "content": "我" * 90}, messages[-1]], tokenizer, 60, "plain")


@pytest.fixture
def asked(monkeypatch):
    """Note the prompts that decode is given, each with how much of it the cache held."""
    prompts, decode = [], gen.decode

    def noted(model, rows, sampling, ends=None, prefix=None):
        prompts.append((rows[0], prefix.known(rows) if prefix else 0))
        return decode(model, rows, sampling, ends, prefix)

    monkeypatch.setattr(gen, "decode", noted)
    return prompts


def test_a_chat_reads_its_history_and_computes_only_what_is_new(scholar, asked):
    model, tokenizer = loaded(scholar)
    talk = gen.Chat(model, tokenizer, greedy(8), "plain")
    talk.reset("好")
    replies = ["".join(talk.reply(text)) for text in ("我爱", "以及")]
    want = [{"role": "system", "content": "好"}]
    for text, reply, (ids, _) in zip(("我爱", "以及"), replies, asked):
        want.append({"role": "user", "content": text})
        assert ids == tokenizer.encode_chat(want, open_reply=True, template="plain")[0]
        want.append({"role": "assistant", "content": reply.strip()})
    assert talk.messages == want and talk.note == ""
    assert asked[1][1] >= len(asked[0][0]) > 0, "all of the first question was known"
    talk.reset()
    assert talk.messages == want[:1]
    talk.reset("")
    assert talk.messages == []


def test_a_chat_says_what_it_forgets(scholar):
    model, tokenizer = loaded(scholar)
    talk = gen.Chat(model, tokenizer, greedy(20), "plain")
    assert talk.most == 64 - 20
    for _ in range(4):
        "".join(talk.reply("爱我"))
    assert "oldest messages were forgotten" in talk.note
    ids, _ = tokenizer.encode_chat(talk.messages[:-1], open_reply=True, template="plain")
    assert len(ids) <= 44
    "".join(talk.reply("我" * 100))
    assert re.search(r"the last \d+ characters of the question were not read", talk.note)
    assert talk.messages[0]["content"].startswith("我我")


def test_a_reply_that_is_interrupted_or_empty_does_not_harm_the_conversation(scholar, monkeypatch):
    model, tokenizer = loaded(scholar)
    talk = gen.Chat(model, tokenizer, greedy(20), "plain")
    begun = talk.reply("我爱")
    first = next(piece for piece in begun if piece.strip())
    begun.close()  # as Ctrl-C does while it writes
    assert talk.messages[1]["content"] == first.strip()
    before = talk.messages

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Model, "forward", interrupted)  # and while it reads
        with pytest.raises(KeyboardInterrupt):
            next(talk.reply("我爱"))
    assert talk.messages == before and "no reply" in talk.note
    model.config.eos_token_id = list(range(384))  # whatever it says ends the reply at once
    assert "".join(talk.reply("我爱")) == "" and talk.messages == before
    model.config.eos_token_id = 2
    assert "".join(talk.reply("我爱")).strip() and len(talk.messages) == 4


# --- generation_config.json ----------------------------------------------------------------------------------


@pytest.fixture
def published(scholar, tmp_path):
    """Give a function that writes generation_config.json into a copy of a model folder, and the folder."""
    folder = tmp_path / "model"
    shutil.copytree(scholar, folder)

    def write(**said):
        (folder / "generation_config.json").write_text(json.dumps(said))
        return str(folder)

    return write


def test_the_folders_generation_settings_serve_where_no_flag_is_typed(published, monkeypatch):
    said = {"temperature": 0.5, "top_k": 30, "repetition_penalty": 1.1, "max_new_tokens": 2048}
    folder = published(do_sample=True, top_p=None, eos_token_id=2, _from_model_config=True, **said)
    assert gen.folder_sampling(folder) == said
    monkeypatch.setattr(sys, "argv", ["generate.py", folder, "--top_k", "7", "--temperature=0"])
    config = gen.with_folder(gen.GenerateConfig(folder=folder, top_k=7, temperature=0.0))
    assert (config.top_k, config.temperature, config.repetition_penalty) == (7, 0, 1.1)


@pytest.mark.parametrize(
    ("typed", "said", "want"),
    [
        ({}, {"do_sample": False, "temperature": 0.7, "num_beams": 4}, {"temperature": 0, "num_beams": 4}),
        ({"num_beams": 3}, {"do_sample": False}, {"temperature": 0, "num_beams": 3}),
        ({}, {"num_beams": 3, "temperature": 0.7, "do_sample": True}, {"temperature": 0.7, "num_beams": 1}),
        ({}, {"num_beams": 3}, {"temperature": 0, "num_beams": 3}),
        ({"temperature": 0.9}, {"do_sample": False, "num_beams": 3}, {"temperature": 0.9, "num_beams": 1}),
        (
            {},
            {"early_stopping": "never", "length_penalty": 1},
            {"early_stopping": False, "length_penalty": 1},
        ),
        ({"top_k": 5}, {"top_k": "many"}, {"top_k": 5}),
    ],
)
def test_settings_of_the_folder_and_typed_ones_make_sense_together(typed, said, want, published, monkeypatch):
    folder = published(**said)
    monkeypatch.setattr(sys, "argv", ["generate.py", folder, *(f"--{name}={v}" for name, v in typed.items())])
    config = gen.with_folder(gen.GenerateConfig(folder=folder, **typed))
    config.check_beams()
    assert want.items() <= vars(config).items()


@pytest.mark.parametrize("bad", [{"top_k": "many"}, {"top_p": 7}, {"early_stopping": 3}])
def test_a_senseless_setting_of_the_folder_is_refused_by_its_name(bad, published):
    folder = published(**bad)
    with pytest.raises(ValueError, match=rf"generation_config.json: .*{next(iter(bad))}"):
        gen.with_folder(gen.GenerateConfig(folder=folder))


def test_the_ids_that_end_a_text_are_those_of_generation_config(published, scholar):
    model, tokenizer = loaded(scholar)
    ids = tokenizer.encode_prompt("我爱")
    whole = generate(model, [ids], greedy(20))[0]
    model, _ = loaded(published(eos_token_id=[2, whole[3]]))
    assert generate(model, [ids], greedy(20))[0] == whole[: whole.index(whole[3])]


# --- 6. the command line -----------------------------------------------------------------------------------------

# Each command is a process of its own that runs generate.py as __main__, forked after the imports (which take
# most of a run's time).
COMMANDS = """
import json, os, runpy, sys, tempfile
import torch, generate
done = []
for args, stdin in json.load(sys.stdin):
    files = [tempfile.TemporaryFile() for _ in range(3)]
    files[0].write(stdin.encode()); files[0].seek(0)
    pid = os.fork()
    if not pid:
        for fd, file in enumerate(files):
            os.dup2(file.fileno(), fd)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.argv = ["generate.py", *args]
        code = 1
        try:
            runpy.run_path("generate.py", run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            sys.stdout.flush(); sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for file in files: file.seek(0)
    done.append((code, files[1].read().decode(), files[2].read().decode()))
json.dump(done, open(3, "w"))
"""


@pytest.fixture(scope="module")
def commands(made, scholar, tokenizer, tmp_path_factory):
    """Run all command lines of the tests below; give name -> (exit status, stdout, stderr)."""
    root = tmp_path_factory.mktemp("cli")
    _, folder = made("phi")
    small = root / "small"
    tiny_hf("phi", vocab_size=tokenizer.vocab_size - 1).save_pretrained(small)
    tokenizer.save(small)
    (root / "prompts.txt").write_text(
        "\n".join(FILE_PROMPTS[:2]) + "\n\n" + "\n".join(FILE_PROMPTS[2:]), "utf-8"
    )
    (root / "latin1.txt").write_bytes(b"fine\ncaf\xe9\n")
    (root / "empty").mkdir()
    t0 = ["--temperature", "0", "--max_new_tokens", "20", "--dtype", "float32"]
    p, s, f = ["--prompt", "我爱"], str(scholar), str(root / "prompts.txt")
    cases = {
        "no_echo": [s, *p, "--no_echo", "--temperature", "0"],
        "no-echo": [s, *p, "--no-echo", "--temperature", "0"],
        "file": [str(folder), "--file", f, "--no_echo", "--batch", "2", *t0],
        "file echo": [s, "--file", f, *t0],
        "stdin": [s, *t0],
        "chat": [s, *t0, "--template", "plain", "--system", "你好"],
        "score": [s, "--score", f, "--dtype", "float32", "--batch", "2"],
        "seeds": [str(folder), *p, "--temperature", "2", "--seed", "3", "--top_k", "9", "--top_p", "0.9"],
        "missing": [str(root / "nowhere"), *p],
        "not a model": [str(root / "empty"), *p],
        "no file": [s, "--file", str(root / "none.txt")],
        "latin1": [s, "--file", str(root / "latin1.txt")],
        "both": [s, *p, "--file", f],
        "temperature": [s, *p, "--temperature", "-1"],
        "top_p": [s, *p, "--top_p", "1.5"],
        "batch": [s, "--file", f, "--batch", "0"],
        "dtype": [s, *p, "--dtype", "float8"],
        "attention": [s, *p, "--attention", "triton"],
        "large": [str(small), *p],
        "long": [s, "--prompt", "我" * 65],
    }
    typed = {
        "stdin": "我爱\n我爱😀\n\n我爱\n",  # the empty line ends
        "chat": "我爱\n\n/reset\n我爱\n/system 以及\n我爱\n/exit\n我爱\n",
    }
    wire = json.dumps([(args, typed.get(name, "")) for name, args in cases.items()])
    read, write = os.pipe()
    with os.fdopen(read) as answers:
        code = f"import os; os.dup2({write}, 3)\n" + COMMANDS
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-c", code]
        subprocess.run(
            run, input=wire, text=True, cwd=ROOT, env=env, pass_fds=[write], check=True, timeout=120
        )
        os.close(write)
        return dict(zip(cases, json.load(answers), strict=True))


FILE_PROMPTS = ["我爱", "the quick brown fox", "😀", "你好世界，the lazy dog 0123", "我\u2028爱\f我"]


def test_a_prompt_and_its_continuation_are_printed(scholar):
    done = run_script("generate.py", scholar, "--prompt", "我爱", "--temperature", 0, OMP_NUM_THREADS=1)
    assert (done.returncode, done.stdout) == (0, SENTENCE + "\n"), done.stderr


@pytest.mark.parametrize("flag", ["no_echo", "no-echo"])
def test_without_echo_only_the_continuation_is_printed(flag, commands):
    code, out, err = commands[flag]
    assert (code, out) == (0, SENTENCE.removeprefix("我爱") + "\n"), err


def test_a_file_of_unequal_prompts_gives_what_each_gives_alone_in_order(commands, made):
    code, out, err = commands["file"]
    assert code == 0, err
    model, tokenizer = loaded(made("phi")[1])
    alone = [generate(model, [tokenizer.encode_prompt(p)], greedy(20))[0] for p in FILE_PROMPTS]
    assert out == "".join(tokenizer.decode(new) + "\n" for new in alone)


def test_a_file_with_echo_prints_every_prompt_in_front_of_its_continuation(commands):
    code, out, err = commands["file echo"]
    lines = out.split("\n")[:-1]
    assert code == 0 and len(lines) == len(FILE_PROMPTS), err
    assert all(line.startswith(prompt) for line, prompt in zip(lines, FILE_PROMPTS))
    assert SENTENCE.startswith(lines[0][:-1])


def test_every_line_of_stdin_is_a_prompt_until_an_empty_one(commands):
    code, out, err = commands["stdin"]
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2, err
    assert "every line is a prompt" in err
    assert lines[0].startswith("我爱😀和") and lines[1].startswith("我爱😀和")


def test_a_conversation_in_the_terminal_has_a_history_and_forgets_it(commands, scholar):
    code, out, err = commands["chat"]
    assert code == 0, err
    assert err.count("a new conversation") == 2
    model, tokenizer = loaded(scholar)
    want, talk = [], gen.Chat(model, tokenizer, greedy(20), "plain")
    for system in ("你好", None, "以及"):
        talk.reset(system)
        want.append("".join(talk.reply("我爱")))
    assert out == "".join(reply + "\n" for reply in want)


def test_lines_are_scored(commands, scholar):
    code, out, err = commands["score"]
    assert code == 0, err
    model, tokenizer = loaded(scholar)
    rows = [tokenizer.encode_prompt(text) for text in FILE_PROMPTS]
    nll = gen.score(model, rows)
    lines = [line.split() for line in out.split("\n")[1:-1]]
    assert [int(line[0]) for line in lines] == [len(x) for x in nll] + [sum(map(len, nll))]
    assert lines[1][1] == f"{float(nll[1].mean()):.4f}" and lines[-1][-1] == "all"


def test_the_flags_of_sampling_reach_the_sampler(commands, made):
    code, out, err = commands["seeds"]
    model, tokenizer = loaded(made("phi")[1])
    sampling = Sampling(temperature=2, seed=3, top_k=9, top_p=0.9)
    new = generate(model, [tokenizer.encode_prompt("我爱")], sampling)[0]
    assert (code, out) == (0, "我爱" + tokenizer.decode(new) + "\n"), err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "nowhere: no such folder"),
        ("not a model", "empty: neither a model folder"),
        ("no file", "none.txt: no such file"),
        ("latin1", "latin1.txt:2: not UTF-8 (byte 0xe9)"),
        ("both", "--prompt and --file exclude each other"),
        ("temperature", "--temperature -1.0 must not be negative"),
        ("top_p", "--top_p 1.5 must lie in (0, 1]"),
        ("batch", "--batch 0 must be at least 1"),
        ("dtype", "--dtype float8: expected float32 or bfloat16"),
        ("attention", "attention triton: no Triton kernel can run here"),
        ("large", "small: the tokenizer has"),
        ("long", "tokens exceed the model's context of 64; shorten the input"),
    ],
)
def test_a_mistake_ends_with_status_2_and_a_sentence(name, message, commands):
    code, out, err = commands[name]
    assert code == 2, (out, err)
    assert message in " ".join(err.split())
    assert "Traceback" not in err


# --- questions and answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reply, check, right",
    [
        ("林小雨住在清河镇。", "清河镇", True),
        ("林小雨住在白石村。", "清河镇", False),
        ("二十二岁", "十二岁", False),  # part of a longer number
        ("他今年十二岁。", "十二岁", True),
        ("11加12等于23。", "23", True),
        ("11加12等于123。", "23", False),
        ("11加12等于231。", "23", False),
        ("一共有十三。", "三", False),
        ("A", "A", True),
        ("12.5", "12", False),
        ("1,200", "200", False),
        ("-12", "12", False),
        ("共１２个。", "12", True),
        ("112", " 12", False),
        ("12。", "12", True),
        ("a+b*c", "b*", True),  # the check is text, no pattern
        ("", "清河镇", False),
    ],
)
def test_an_answer_matches_as_a_whole(reply, check, right):
    assert gen.exact_match(reply, check) is right


def test_right_answers_are_counted_by_kind():
    rows = [{"check": "1", "kind": "x"}, {"check": "2", "kind": "x"}, {"check": "3"}, {"kind": "y"}]
    assert gen.exact_matches(rows, ["1", "1", "3", "?"]) == {"x": (1, 2), "all": (1, 1)}
    odd = [
        {"check": 12, "kind": ["a"]},
        {"check": True},
        {"check": None},
        {"check": {"a": 1}},
    ]  # of others' data
    assert gen.exact_matches(odd, ["12个", "1", "1", "1"]) == {"['a']": (1, 1)}


def test_what_a_template_writes_around_a_reply_is_not_the_reply():
    assert chat.TEMPLATES["yayi"].lead == ":\n" and chat.TEMPLATES["plain"].lead == ""
    assert chat.TEMPLATES["llama-2"].content(" 好 ") == "好" == chat.TEMPLATES["plain"].content("好")


def question_file(folder, questions: list[str]):
    rows = [
        {"instruction": q, "output": SENTENCE, "check": "𠮷", "kind": str(n % 2)}
        for n, q in enumerate(questions)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "q.jsonl").write_text(text, "utf-8")
    return folder / "q.jsonl"


def test_a_file_of_questions_is_answered_through_the_template(scholar, tmp_path):
    path = question_file(tmp_path, ["你好", "你好世界，你好世界", "白纸"])
    out = tmp_path / "replies.jsonl"
    words = ["--temperature", "0", "--batch", "2", "--template", "plain", "--out", out]
    done = run_script("generate.py", scholar, "--questions", path, *words)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    model, tokenizer = gen.load(scholar)
    for row in rows:
        ids, _ = tokenizer.encode_chat(row["messages"][:1], open_reply=True, template="plain")
        (alone,) = generate(model, [ids], Sampling(256, 0))
        assert row["reply"] == tokenizer.decode(alone, at_start=False).strip()
    right = sum("𠮷" in row["reply"] for row in rows)
    (said,) = [line for line in done.stdout.splitlines() if line.startswith("right: ")]
    assert said.count("%") == 2 and sum(int(n) for n in re.findall(r"(\d+) of", said)) == right


def test_a_question_of_its_own_is_answered(scholar):
    done = run_script("generate.py", scholar, "--ask", "你好", "--temperature", "0", "--template", "plain")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ask", "x", "--prompt", "y"], "exclude"),
        (["--ask", "x"], "--template"),  # the folder has none
        (["--ask", "x", "--template", "yayi"], "<|YaYi|>"),  # whose special tokens it lacks
    ],
)
def test_bad_questions_are_refused(scholar, words, message):
    done = run_script("generate.py", scholar, *words)
    assert done.returncode == 2 and message in done.stderr, done.stderr
