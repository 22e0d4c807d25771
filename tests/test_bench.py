"""The measuring tools measure what they say."""

import itertools
import math
import re

import pytest
import torch
from conftest import run_script

import bench
from model import ModelConfig, build, init_weights


def test_kneser_ney_probabilities_sum_to_one():
    model = bench.KneserNey(["白纸黑字", "白纸上写字", "黑白分明", "字字分明"])
    known = sorted({c for t in ("白纸黑字", "白纸上写字", "黑白分明") for c in t} | {"\x03"})
    for context in itertools.product(["\x02", *known[:4]], known):
        total = sum(model.probability((*context, c)) for c in known)
        unseen = (0x110000 - len(known)) * model.probability((*context, "\U0001f600"))
        assert total + unseen == pytest.approx(1.0)


def test_kneser_ney_equals_a_hand_worked_example():
    """One text "ab": every n-gram is seen once, so n1 / (n1 + 2 n2) = 1 and all mass goes to the floor."""
    model = bench.KneserNey(["ab"])
    assert model.probability(("\x02", "\x02", "a")) == pytest.approx(1 / 0x110000)
    # "aab" and "ab": bigram types before a: ^a, aa; before b: ab; before end: b$. Unigram discount 2 / (2 + 2).
    model = bench.KneserNey(["aab", "ab"])
    counts, totals, followers, discount = model.levels[2]
    assert counts == {("a",): 2, ("b",): 1, ("\x03",): 1} and totals[()] == 4 and followers[()] == 3
    assert discount == pytest.approx(2 / (2 + 2 * 1))


def test_kneser_ney_prefers_text_like_its_own():
    model = bench.KneserNey(["今天天气很好，我们去公园。" * 3] * 5)
    assert model.bits("今天天气很好") < 0.5 * model.bits("好很气天天今") and math.isfinite(
        model.bits("没见过😀")
    )


def test_sliding_windows_code_every_token_once_and_see_half_a_window():
    config = ModelConfig("llama", 61, 32, 2, 4, 64, 64)
    model = build(config).eval()
    init_weights(model, 1, std=0.3)
    ids = torch.randint(0, 61, (150,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(ids[None, :32], ids[None, 1:33]).sum()
        assert bench.sliding_nats(model, ids[:33].tolist(), 32) == pytest.approx(float(whole), rel=1e-5)
        want = float(whole)
        for start in range(16, 150, 16):  # by hand: the second half of each window is new
            part = model(ids[None, start : start + 32][:, : 149 - start], ids[None, start + 1 : start + 33])
            want += float(part[0, 16:].sum())
    assert bench.sliding_nats(model, ids.tolist(), 32) == pytest.approx(want, rel=1e-5)


def test_train_and_decode_benches_agree_with_transformers():
    """Ours and theirs start from the same weights: the first loss must be the same, and the texts begin alike."""
    flags = "--layers 1 --width 64 --vocab 512 --length 64 --rows 2 --rounds 1 --no-compile".split()
    done = run_script("bench.py", "train", *flags, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "first loss" in line]
    assert len(losses) == 2 and losses[0] == pytest.approx(losses[1], rel=2e-3)
    done = run_script(
        "bench.py", "decode", *"--layers 1 --prompt 4 --new 4 --rounds 1".split(), OMP_NUM_THREADS=1
    )
    assert done.returncode == 0 and "x transformers" in done.stdout, done.stderr
    assert int(re.search(r"the first (\d+) agree", done.stdout)[1]) >= 1
