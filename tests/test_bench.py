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


def test_lengthened_text_begins_with_the_given_one_and_joins_halves_of_its_clauses():
    texts = ["今天天气很好，我们去公园散步。", "他在河边看见一只白鹭，慢慢走过去。"]
    whole = list(bench.lengthened(texts, 5000))
    assert whole[:2] == texts and sum(map(len, whole)) == 5000
    clauses = re.findall(r"[\u4e00-\u9fff]+", "".join(texts))
    halves = {a[:i] + b[j:] for a in clauses for b in clauses for i in range(len(a)) for j in range(len(b))}
    assert set(whole[2].rstrip("。").split("，")[:-1]) <= halves and len(set(whole)) > 10
    assert "".join(bench.lengthened(texts, 7)) == texts[0][:7]


def test_what_a_script_took_is_measured_and_its_failure_told():
    took = bench.watch("-c", "import time; x = bytearray(300_000_000); time.sleep(1); print('done')")
    assert took.output == "done\n" and took.seconds > 1 and took.cpu < took.seconds
    assert 290e6 < took.memory < 400e6
    with pytest.raises(ValueError, match="-c failed: .*no such luck"):
        bench.watch("-c", "raise SystemExit('no such luck')")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "corpus.jsonl"
    run_script("demo_corpus.py", "--out", path.parent / "demo", "--size_mb", "3")
    lines = (path.parent / "demo" / "pretrain" / "world.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[::8]))
    return path


def test_data_bench_gives_the_ids_of_tokenizers_and_packs(corpus):
    flags = "--vocab_size 2500 --learn_chars 100000 --encode_mb 0.02 --pack_mb 1 --rounds 1".split()
    done = run_script("bench.py", "data", corpus, *flags, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(the same ids)") == 3 and done.stdout.count("MB of memory at most") == 2


def test_bpe_bench_learns_what_tokenizers_learns(corpus):
    done = run_script("bench.py", "bpe", corpus, "--chars", "60000", "--vocab_size", "800")
    assert done.returncode == 0, done.stderr
    ours, theirs = (line for line in done.stdout.splitlines() if "CPU s" in line)
    rates = [float(re.search(r"([\d.]+) characters per token", line)[1]) for line in (ours, theirs)]
    assert rates[0] == rates[1] > 0.5 and "distinct pre-tokens" in ours


def test_clean_bench_scores_both_models_on_both_forms(corpus):
    flags = "--tokens 8192 --seeds 1 --vocab_size 2500 --held_out 0.005".split()
    done = run_script("bench.py", "clean", corpus, *flags, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    figures = [float(x) for x in re.findall(r"(\d\.\d+) on (?:raw|cleaned)", done.stdout)]
    assert len(figures) == 4 and all(0.5 < x < 8 for x in figures)


def test_dedup_finds_near_copies_and_no_others(corpus):
    flags = (corpus, "--documents", 300, "--pairs", 30)
    done = run_script("bench.py", "dedup", *flags, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"recall ([\d.]+)", done.stdout)[1]) >= 0.95
    assert float(re.search(r"precision ([\d.]+)", done.stdout)[1]) >= 0.95
    assert "characters in disorder: 0.0% found" in done.stdout and "300 documents" in done.stdout
