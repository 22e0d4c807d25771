"""Packing loses and repeats nothing; the stream of rows resumes exactly on any number of ranks; errors say where."""

import gzip
import hashlib
import itertools
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import common
import data
import tokenizer as tok

WORDS = (
    "白纸 上 写 着 你好 世界 今天 天气 很 好 the quick brown fox jumps over lazy dog 2023 年 。 ，".split()
)


# --- helpers -------------------------------------------------------------------------------------------------


def texts(count, seed=0, words=(1, 30)):
    """Make different documents: random words, each with its number in front."""
    rng = random.Random(seed)
    return [f"{seed}.{n} " + " ".join(rng.choices(WORDS, k=rng.randint(*words))) for n in range(count)]


def write_jsonl(path, documents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents), "utf-8")
    return path


def write_shards(folder, documents, dtype="uint16", shard_tokens=10**9):
    """Write lists of ids as packed shards; return the training part."""
    folder.mkdir()
    writers = {p: data.ShardWriter(folder, p, dtype, shard_tokens) for p in ("train", "val")}
    for document in documents:
        writers["train"].add(np.asarray(document, np.uint32), [(len(document), 4 * len(document))])
    for writer in writers.values():
        writer.close()
    report = {"tokenizer": "none", "vocab_size": 2**20, "eos_id": 2, "dtype": dtype}
    common.write_json(folder / "shards.json", report | {p: w.report() for p, w in writers.items()})
    return data.Shards([folder], "train")


def numbered(folder, lengths):
    """Write documents in which every token of the corpus has an id of its own: 0, 1, 2, …"""
    ends = np.cumsum(lengths)
    return write_shards(folder, [range(e - n, e) for e, n in zip(ends, lengths)], "uint32")


def all_pieces(shards, document, row):
    """Cut one document as the packer promises to: only if it is longer than a row, at multiples of the row."""
    n = shards.length(document)
    return [(document, at, min(row, n - at)) for at in range(0, n, row)]


def packed(files, tokenizer, out, **options):
    """Pack in this process; return the training part, the validation part and the report."""
    data.pack(data.PackConfig(tuple(map(str, files)), str(tokenizer), str(out), **{"workers": 1} | options))
    return data.Shards([out], "train"), data.Shards([out], "val"), common.read_json(out / "shards.json")


def read_all(shards):
    return [shards.read(d, 0, 10**9).tolist() for d in range(len(shards))]


def same_batch(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def joined(batches):
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train a small tokenizer once: every character of WORDS, and bytes."""
    root = tmp_path_factory.mktemp("tok")
    corpus = write_jsonl(root / "corpus.jsonl", texts(300))
    tok.train(tok.Train([str(corpus)], str(root / "tok"), vocab_size=360))
    return root / "tok"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return tok.load_tokenizer(folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Shards of 300 documents of 1 to 40 tokens and four longer than any row used here."""
    rng = random.Random(5)
    lengths = [rng.randint(1, 40) for _ in range(300)] + [65, 128, 129, 200]
    return numbered(tmp_path_factory.mktemp("many") / "shards", lengths)


# --- 1. rows -------------------------------------------------------------------------------------------------


GOLDEN_DOCUMENTS = [
    [1, 11, 12, 13, 2],
    [1, 21, 2],
    [1, 31, 32, 2],
    [1, 41, 2],
    [1, 51, 52, 53, 54, 55, 56, 57, 58, 59, 2],  # longer than a row of 8
    [1, 61, 2],
    [1, 71, 72, 73, 74, 2],
]
_ = -100
GOLDEN_ROWS = [  # worked by hand for rows of 8: ids, targets, doc_ids
    ([1, 11, 12, 13, 2, 1, 21, 2], [11, 12, 13, 2, _, 21, 2, _], [0, 0, 0, 0, 0, 1, 1, 1]),
    ([1, 31, 32, 2, 1, 41, 2, 0], [31, 32, 2, _, 41, 2, _, _], [0, 0, 0, 0, 1, 1, 1, -1]),
    ([1, 51, 52, 53, 54, 55, 56, 57], [51, 52, 53, 54, 55, 56, 57, 58], [0, 0, 0, 0, 0, 0, 0, 0]),
    ([58, 59, 2, 1, 61, 2, 0, 0], [59, 2, _, 61, 2, _, _, _], [0, 0, 0, 1, 1, 1, -1, -1]),
    ([1, 71, 72, 73, 74, 2, 0, 0], [71, 72, 73, 74, 2, _, _, _], [0, 0, 0, 0, 0, 0, -1, -1]),
]


def test_hand_worked_documents_pack_into_the_hand_worked_rows(tmp_path):
    shards = write_shards(tmp_path / "s", GOLDEN_DOCUMENTS)
    rows = list(data.RowStream(shards, 8, seed=0, shuffle=False))
    batch = data.collate(shards, rows, 8)
    for key, column in zip(("ids", "targets", "doc_ids"), zip(*GOLDEN_ROWS)):
        assert batch[key].dtype == torch.int64
        assert batch[key].tolist() == list(column), key


def test_a_packed_text_is_bos_text_eos_and_its_eos_is_trained(folder, tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["你好</s><s>", "the quick"])
    train, _, _ = packed([tmp_path / "a.jsonl"], folder, tmp_path / "s", val_ratio=0.0)
    documents = [
        [1, *tokenizer.encode("你好</s><s>"), 2],
        [1, *tokenizer.encode("the quick"), 2],
    ]  # ids 1, 2: <s>, </s>
    assert read_all(train) == documents
    assert [d.count(2) for d in documents] == [1, 1], "a typed </s> is letters"
    batch = data.collate(train, list(data.RowStream(train, 64, 0, shuffle=False)), 64)
    at = (batch["ids"] == 2).nonzero()
    assert len(at) == 2
    assert (batch["targets"] == 2).sum() == 2
    for b, t in at.tolist():
        assert batch["targets"][b, t - 1] == 2
        assert batch["targets"][b, t] == data.IGNORE


@pytest.mark.parametrize("row", [7, 64, 200])
def test_without_shuffling_every_token_stands_once_and_is_predicted_once(tmp_path, row):
    rng = random.Random(row)
    lengths = [rng.choice([1, 2, rng.randint(1, 60), rng.randint(1, 300)]) for _ in range(400)]
    shards = numbered(tmp_path / "s", lengths)
    batch = joined(list(data.validation_batches(shards, row, 3)))
    ids, targets, doc_ids = batch["ids"], batch["targets"], batch["doc_ids"]
    total, firsts = sum(lengths), np.cumsum([0, *lengths[:-1]])
    assert ids[doc_ids >= 0].sort().values.tolist() == list(range(total))
    predicted = targets[targets != data.IGNORE]
    assert predicted.sort().values.tolist() == sorted(set(range(total)) - set(firsts.tolist()))
    trained = targets != data.IGNORE
    assert torch.equal(targets[trained], ids[trained] + 1), (
        "the target is the next token of the same document"
    )


@pytest.mark.parametrize("row", [16, 64, 512])
def test_every_token_of_every_document_comes_exactly_once_per_epoch(many, row):
    stream = data.RowStream(many, row, seed=3)
    emitted = Counter()
    while stream.epoch < 3:
        pieces = next(stream)
        assert sum(n for _, _, n in pieces) <= row
        emitted.update(pieces)
        # all drawn pieces have come or still wait: whole epochs, and a prefix of the permutation of this one
        drawn = Counter()
        if len(emitted) % 9 == 0 or stream.epoch == 3:
            for d in range(len(many)):
                drawn.update(dict.fromkeys(all_pieces(many, d, row), stream.epoch))
            for p in range(stream.position):
                drawn.update(all_pieces(many, data.shuffled(p, len(many), 3, stream.epoch), row))
            if stream.start:  # a long document is drawn piece by piece
                begun = data.shuffled(stream.position, len(many), 3, stream.epoch)
                drawn.update(p for p in all_pieces(many, begun, row) if p[1] < stream.start)
            assert emitted + Counter(stream.waiting.values()) == +drawn
    assert max(emitted.values()) <= 4


def test_no_document_but_one_longer_than_a_row_is_cut(many):
    stream = data.RowStream(many, 64, seed=1)
    for _ in range(300):
        for piece in next(stream):
            assert piece in all_pieces(many, piece[0], 64)


def test_documents_of_a_row_are_numbered_contiguously_and_padding_is_its_own_document(many):
    stream = data.RowStream(many, 64, seed=2)
    for _ in range(60):
        pieces = next(stream)
        doc_ids = data.collate(many, [pieces], 64)["doc_ids"][0].tolist()
        runs = [(n, len(list(g))) for n, g in itertools.groupby(doc_ids)]
        room = 64 - sum(n for _, _, n in pieces)
        assert runs == [(i, n) for i, (_, _, n) in enumerate(pieces)] + ([(-1, room)] if room else [])


def test_a_waiting_document_is_never_overtaken_for_ever(many):
    stream = data.RowStream(many, 64, seed=1)
    for _ in range(200):
        stream._refill()
        oldest = next(iter(stream.waiting.values()))
        assert next(stream)[0] == oldest


def log_normal(rng, median, spread, count):
    return [max(3, round(rng.lognormvariate(math.log(median), spread))) for _ in range(count)]


@pytest.mark.parametrize("row", [512, 2048])
@pytest.mark.parametrize("kind", ["web", "short", "even"])
def test_padding_is_below_2_percent_on_realistic_lengths(tmp_path, row, kind):
    """Measured: 0.71 and 0.19 % (web), 0.28 and 0.08 % (short), 1.6 and 0.15 % (even)."""
    rng = random.Random(0)
    lengths = {
        "web": log_normal(rng, 450, 1.1, 6000),  # pages: some longer than any row
        "short": log_normal(rng, 150, 1.0, 6000),
        "even": [rng.randint(20, 400) for _ in range(6000)],
    }[kind]
    stream = data.RowStream(numbered(tmp_path / "s", lengths), row, seed=0)
    rows = [next(stream) for _ in range(2500)]
    padding = 1 - sum(n for pieces in rows for _, _, n in pieces) / (row * len(rows))
    print(f"padding {100 * padding:.3f} %")
    assert padding < 0.02
    assert stream.tokens == sum(n for pieces in rows for _, _, n in pieces)


def test_tiny_documents_fill_a_long_row(tmp_path):
    """WAITING of them would fill a quarter of it."""
    rng = random.Random(0)
    stream = data.RowStream(
        numbered(tmp_path / "s", [rng.randint(5, 30) for _ in range(6000)]), 16384, seed=0
    )
    assert all(sum(n for _, _, n in next(stream)) > 0.98 * 16384 for _ in range(40))


# --- 2. order, seeds, resuming, ranks -------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_shuffled_is_a_bijection_for_every_small_count(epoch):
    for n in range(1, 301):
        assert sorted(data.shuffled(p, n, 9, epoch) for p in range(n)) == list(range(n)), n


@pytest.mark.parametrize("n", [10**9 + 7, 2**40])
def test_shuffled_stays_in_range_and_repeats_nothing_for_a_large_count(n):
    rng = random.Random(1)
    positions = {rng.randrange(n) for _ in range(5000)}
    images = [data.shuffled(p, n, 3, 1) for p in positions]
    assert min(images) >= 0 and max(images) < n
    assert len(set(images)) == len(positions)
    assert 0.47 < sum(images) / len(images) / n < 0.53, "spread over the whole range"


def test_shuffled_differs_by_epoch_and_by_seed():
    def order(seed, epoch):
        return tuple(data.shuffled(p, 50, seed, epoch) for p in range(50))

    orders = [order(seed, epoch) for seed in range(8) for epoch in range(8)]
    assert len(set(orders)) == len(orders)
    assert tuple(range(50)) not in orders
    agree = [sum(x == y for x, y in zip(a, b)) for a, b in itertools.combinations(orders, 2)]
    assert sum(agree) / len(agree) < 2, "two random permutations agree in one place on average"


def test_the_same_seed_gives_the_same_rows_and_another_seed_other_rows(many):
    a, b, c = (data.RowStream(many, 64, seed) for seed in (4, 4, 5))
    first, again, other = ([next(s) for _ in range(120)] for s in (a, b, c))
    assert first == again
    assert not {tuple(r) for r in first[:20]} & {tuple(r) for r in other[:20]}


def test_the_stream_resumes_exactly_from_json_at_any_row_and_at_epoch_boundaries(many):
    stream = data.RowStream(many, 64, seed=6)
    rows, states = [], []
    for _ in range(330):
        states.append(json.dumps(stream.state()))
        rows.append(next(stream))
    epochs = [json.loads(s)["epoch"] for s in states]
    assert len(set(epochs)) >= 3
    crossings = [i for i in range(1, len(epochs)) if epochs[i] != epochs[i - 1]]
    for at in {0, 1, *range(0, 320, 23), *crossings, *(i - 1 for i in crossings)}:
        resumed = data.RowStream(many, 64, seed=6)
        resumed.load_state(json.loads(states[at]))
        assert [next(resumed) for _ in range(8)] == rows[at : at + 8], at
        assert json.dumps(resumed.state()) == states[at + 8]


def test_the_end_of_an_epoch_and_the_beginning_of_the_next_are_the_same_place(many):
    whole = data.RowStream(many, 64, seed=6)
    whole.load_state({"epoch": 0, "position": len(many), "start": 0, "tokens": 0, "waiting": [[0, 0, 3]]})
    other = data.RowStream(many, 64, seed=6)
    other.load_state({"epoch": 1, "position": 0, "start": 0, "tokens": 0, "waiting": [[0, 0, 3]]})
    assert [next(whole) for _ in range(50)] == [next(other) for _ in range(50)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_together_have_the_one_rank_rows_of_each_step(many, world):
    alone = data.Batches(data.RowStream(many, 64, 7), 8, 8)
    ranks = [data.Batches(data.RowStream(many, 64, 7), 8, 2, r, world) for r in range(world)]
    for _ in range(12):
        (want,) = next(alone)
        have = [joined(next(rank)) for rank in ranks]
        together = {
            k: torch.stack([h[k] for h in have], 1).flatten(0, 1) for k in want
        }  # row i is rank i % W's
        assert same_batch(together, want)
        assert all(rank.state() == alone.state() for rank in ranks)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1)])
def test_a_state_saved_on_some_ranks_continues_on_others(many, before, after):
    alone = data.Batches(data.RowStream(many, 64, 7), 8, 8)
    saved = data.Batches(data.RowStream(many, 64, 7), 8, 2, before - 1, before)
    for _ in range(5):
        next(alone), next(saved)
    state = json.loads(json.dumps(saved.state()))
    ranks = [data.Batches(data.RowStream(many, 64, 7), 8, 4, r, after) for r in range(after)]
    for rank in ranks:
        rank.load_state(state)
    for _ in range(5):
        (want,) = next(alone)
        have = [joined(next(rank)) for rank in ranks]
        assert same_batch({k: torch.stack([h[k] for h in have], 1).flatten(0, 1) for k in want}, want)


def test_micro_batches_cut_the_same_rows(many):
    for micro in (1, 2, 4):
        whole = data.Batches(data.RowStream(many, 64, 7), 8, 8)
        parts = data.Batches(data.RowStream(many, 64, 7), 8, micro)
        for _ in range(3):
            (want,), have = next(whole), next(parts)
            assert [len(b["ids"]) for b in have] == [micro] * (8 // micro)
            assert same_batch(joined(have), want)


def test_validation_rows_are_shared_out_once_among_ranks_which_all_have_as_many(many):
    alone = joined(list(data.validation_batches(many, 64, 5)))
    for world in (2, 3):
        ranks = [joined(list(data.validation_batches(many, 64, 5, r, world))) for r in range(world)]
        assert len({len(r["ids"]) for r in ranks}) == 1  # under FSDP all make a forward pass together
        trained = sum(int((r["targets"] != data.IGNORE).sum()) for r in ranks)
        assert trained == int((alone["targets"] != data.IGNORE).sum())  # what fills up has nothing to train
        for i, row in enumerate(alone["ids"]):
            assert torch.equal(ranks[i % world]["ids"][i // world], row)


def test_a_part_without_documents_is_refused(tmp_path):
    write_shards(tmp_path / "s", [[1, 2]])
    with pytest.raises(ValueError, match="no documents"):
        data.RowStream(data.Shards([tmp_path / "s"], "val"), 8, 0)


# --- 3. reading documents -------------------------------------------------------------------------------------


def test_an_empty_line_ends_a_document_of_a_txt_and_a_bom_is_no_text(tmp_path):
    raw = "\ufeff第一\n第二行\n\n\n \n第三\r\n第四\r\n\r\nlast".encode()
    (tmp_path / "a.txt").write_bytes(raw)
    with gzip.open(tmp_path / "b.txt.gz", "wb") as file:
        file.write(raw)
    want = ["第一\n第二行", "第三\r\n第四", "last"]
    assert list(common.documents([tmp_path / "a.txt"])) == want
    assert list(common.documents([tmp_path / "b.txt.gz"])) == want


def test_a_jsonl_line_is_a_document_with_its_newlines_and_a_bom_is_no_text(tmp_path):
    lines = '\ufeff{"text": "a\\n\\nb", "n": 1}\n\n  \n{"text": "😀"}\r\n{"text": ""}'.encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(lines)
    assert list(common.documents([tmp_path / "a.jsonl"])) == ["a\n\nb", "😀", ""]
    assert list(common.documents([tmp_path / "b.jsonl.gz"])) == ["a\n\nb", "😀", ""]


def test_folders_are_read_recursively_and_sorted_and_mix_all_kinds(folder, tokenizer, tmp_path):
    source = tmp_path / "source"
    write_jsonl(source / "b" / "1.jsonl", ["three", "", "  \n", "four"])
    (source / "a.txt").write_text("one\n\ntwo\n", "utf-8")
    (source / "b" / "deep").mkdir()
    with gzip.open(source / "b" / "deep" / "x.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "five"}\n')
    (source / "b" / "readme.md").write_text("not read")
    single = write_jsonl(tmp_path / "z.jsonl", ["zero"])
    train, _, report = packed([single, source], folder, tmp_path / "s", val_ratio=0.0)
    assert [tokenizer.decode(d) for d in read_all(train)] == ["zero", "one", "two", "three", "four", "five"]
    assert report["sources"] == [
        str(single),
        *(str(source / p) for p in ("a.txt", "b/1.jsonl", "b/deep/x.jsonl.gz")),
    ]
    assert report["train"]["documents"] == 6, "empty documents are skipped"


def test_every_kind_of_file_packs_into_the_same_shards(folder, tmp_path):
    zstandard, pa = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    documents = [f"{text}\n{text}" for text in texts(150)]
    raw = write_jsonl(tmp_path / "a.jsonl", documents).read_bytes()
    lines = "\n\n".join(documents).encode()
    for name, content in {
        "b.jsonl.gz": gzip.compress(raw),
        "c.jsonl.zst": zstandard.compress(raw),
        "d.txt": lines,
        "e.txt.gz": gzip.compress(lines),
        "f.txt.zst": zstandard.compress(lines),
    }.items():
        (tmp_path / name).write_bytes(content)
    table = pa.table({"url": ["x"] * 150, "text": documents})
    parquet.write_table(table, tmp_path / "g.parquet", row_group_size=40)
    digests = []
    for file in common.document_files([tmp_path]):
        workers = 2 if file.suffix == ".parquet" else 1  # packing forks: after pyarrow has been loaded, too
        _, _, report = packed([file], folder, tmp_path / file.name[0], workers=workers, val_ratio=0.2)
        digests.append([report[part]["shards"][0]["sha256"] for part in ("train", "val")])
    assert len(digests) == 7 and all(d == digests[0] for d in digests)


def test_the_order_of_a_folders_files_is_that_of_their_names(tmp_path):
    names = [f"{n:02}" for n in range(40)]
    for name in random.Random(1).sample(names, 40):  # a directory lists them in no order
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", [name])
    assert list(common.documents([tmp_path / "in"])) == names


# --- 4. what pack writes --------------------------------------------------------------------------------------


def test_the_report_counts_documents_tokens_bytes_and_digests_as_they_are(folder, tokenizer, tmp_path):
    documents = texts(200, seed=1) + ["😀 emoji", "汉字"]
    write_jsonl(tmp_path / "a.jsonl", documents)
    train, val, report = packed([tmp_path / "a.jsonl"], folder, tmp_path / "s", val_ratio=0.25)
    assert report["format"] == 1 and report["dtype"] == "uint16"
    assert report["tokenizer"] == tokenizer.digest == tok.load_tokenizer(tmp_path / "s").digest
    assert (report["vocab_size"], report["eos_id"]) == (tokenizer.vocab_size, 2)
    both = [d for part in (train, val) for d in read_all(part)]
    assert sorted(both) == sorted(tokenizer.encode_document(d) for d in documents)
    for name, part in (("train", train), ("val", val)):
        kept = [tokenizer.decode(d) for d in read_all(part)]
        assert report[name]["documents"] == len(kept) == len(part)
        assert report[name]["tokens"] == sum(len(tokenizer.encode_document(t)) for t in kept) == part.tokens
        assert report[name]["bytes"] == sum(len(t.encode()) for t in kept) == part.bytes
        for entry in report[name]["shards"]:
            file = tmp_path / "s" / entry["file"]
            assert hashlib.sha256(file.read_bytes()).hexdigest() == entry["sha256"]
            assert file.stat().st_size == 2 * entry["tokens"]


def test_one_worker_and_two_write_the_same_bytes_in_several_shards(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_BYTES", 2000)  # bytes: many blocks out of a small corpus
    files = [write_jsonl(tmp_path / f"{n}.jsonl", texts(200, seed=n)) for n in range(2)]
    options = {"val_ratio": 0.2, "shard_tokens": 1500}
    train, _, report = packed(files, folder, tmp_path / "one", workers=1, **options)
    packed(files, folder, tmp_path / "two", workers=2, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(report["train"]["shards"]) >= 4 and len(report["val"]["shards"]) >= 2
    whole, _, one_shard = packed(files, folder, tmp_path / "whole", val_ratio=0.2)
    assert len(one_shard["train"]["shards"]) == 1
    assert read_all(train) == read_all(whole), "shards change nothing of the documents"


@pytest.mark.parametrize("shard_tokens", [1, 10, 10**9])
def test_shards_of_any_size_hold_the_same_documents(tmp_path, shard_tokens):
    documents = [[1, *range(10, 10 + n), 2] for n in (0, 5, 30, 1, 7, 12)]
    shards = write_shards(tmp_path / "s", documents, shard_tokens=shard_tokens)
    assert len(list((tmp_path / "s").glob("train-*.bin"))) == {1: 6, 10: 3, 10**9: 1}[shard_tokens]
    assert read_all(shards) == documents
    assert [shards.length(d) for d in range(6)] == [len(d) for d in documents]
    assert shards.read(2, 3, 4).tolist() == documents[2][3:7]
    assert shards.read(2, 30, 99).tolist() == documents[2][30:], "a read ends with its document"


def test_several_folders_read_as_one_and_the_fingerprint_tells_their_ids(folder, tmp_path):
    for name in "ab":
        write_jsonl(tmp_path / f"{name}.jsonl", texts(20, seed=ord(name)))
        packed([tmp_path / f"{name}.jsonl"], folder, tmp_path / name, val_ratio=0.0)
    a, b, both = (data.Shards([tmp_path / n for n in names], "train") for names in ("a", "b", "ab"))
    assert read_all(both) == read_all(a) + read_all(b)
    assert both.tokens == a.tokens + b.tokens and both.bytes == a.bytes + b.bytes
    assert len({a.fingerprint, b.fingerprint, both.fingerprint}) == 3
    assert a.fingerprint == data.Shards([tmp_path / "a"], "train").fingerprint


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_ids_take_two_bytes_up_to_65536_tokens_and_four_beyond(folder, tmp_path, vocab_size, dtype):
    large = tmp_path / "tok"
    tok.load_tokenizer(folder).save(large)
    (large / "added_tokens.json").write_text(json.dumps({"<|last|>": vocab_size - 1}))
    assert tok.load_tokenizer(large).vocab_size == vocab_size
    write_jsonl(tmp_path / "a.jsonl", texts(10))
    train, _, report = packed([tmp_path / "a.jsonl"], large, tmp_path / "s", val_ratio=0.0)
    assert report["dtype"] == dtype
    size = (tmp_path / "s" / report["train"]["shards"][0]["file"]).stat().st_size
    assert size == train.tokens * np.dtype(dtype).itemsize
    encode = tok.load_tokenizer(folder).encode_document
    assert read_all(train) == [encode(t) for t in texts(10)]


def test_ids_beyond_65535_survive_in_four_bytes(tmp_path):
    documents = [[1, 65535, 65536, 250_000, 2], [1, 2**31, 2]]
    assert read_all(write_shards(tmp_path / "s", documents, "uint32")) == documents


def test_the_validation_part_shares_no_text_and_does_not_depend_on_the_order_of_files(
    folder, tokenizer, tmp_path
):
    documents = texts(300, seed=2)
    a = write_jsonl(tmp_path / "a.jsonl", documents[:200])
    b = write_jsonl(tmp_path / "b.jsonl", documents[100:])  # the middle hundred come twice
    parts = []
    for name, files in (("ab", (a, b)), ("ba", (b, a))):
        train, val, _ = packed(files, folder, tmp_path / name, val_ratio=0.3)
        parts.append([Counter(map(tokenizer.decode, read_all(part))) for part in (train, val)])
    train, val = parts[0]
    assert parts[0] == parts[1]
    assert not set(train) & set(val), "copies fall on the same side"
    assert train + val == Counter(documents[:200] + documents[100:])
    assert 0.2 < len(val) / 300 < 0.4


def test_a_smaller_validation_part_is_inside_a_larger_one(folder, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(200, seed=3))
    found = []
    for ratio in (0.0, 0.1, 0.4):
        _, val, _ = packed([tmp_path / "a.jsonl"], folder, tmp_path / str(ratio), val_ratio=ratio)
        found.append(set(map(tuple, read_all(val))))
    assert found[0] == set()
    assert found[1] < found[2]


# --- 5. errors ------------------------------------------------------------------------------------------------

BAD_LINES = {
    "not UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8 .*0xff"),
    "not JSON": (b'{"text": "a"', "not JSON"),
    "an array": (b'["text"]', "expected a JSON object, found list"),
    "no text": (b'{"content": "a", "id": 3}', "no \"text\" key; found 'content', 'id'"),
    "an empty object": (b"{}", 'no "text" key; found an empty object'),
    "a number": (b'{"text": 7}', '"text" is int, expected a string'),
    "null": (b'{"text": null}', '"text" is NoneType, expected a string'),
    "a list": (b'{"text": ["a"]}', '"text" is list, expected a string'),
    "a number of 5,000 digits": (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "JSON that cannot be read"),
    "brackets nested too deep": (b'{"text": ' + b"[" * 10**5, "JSON that cannot be read"),
    "a lone surrogate": (b'{"text": "a\\ud83d"}', "lone surrogate"),
}


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(bad, folder, tmp_path):
    raw, message = BAD_LINES[bad]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + raw + b'\n{"text": "fine"}\n')
    for read in (
        lambda: list(common.documents([path])),
        lambda: packed([path], folder, tmp_path / "s"),
    ):
        with pytest.raises(ValueError, match=f"a.jsonl:3: .*{message}"):
            read()
    assert not list(tmp_path.glob("s*"))


def test_a_txt_that_is_not_utf8_is_named_by_file_and_the_bad_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\n\ntwo\n\xb0\xd7\xd6\xbd\nthree\n")  # GBK
    with pytest.raises(ValueError, match="a.txt:5: not UTF-8"):
        list(common.documents([tmp_path / "a.txt"]))


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_a_truncated_gzip_is_named(kept, folder, tmp_path):
    raw = gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts(500)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(raw[: int(len(raw) * kept)])
    with pytest.raises(ValueError, match="a.jsonl.gz: not a whole gzip file"):
        packed([tmp_path / "a.jsonl.gz"], folder, tmp_path / "s")
    assert not list(tmp_path.glob("s*"))


@pytest.mark.parametrize("flip", [30, -6])
def test_a_gzip_with_a_flipped_byte_is_named(flip, tmp_path):
    raw = bytearray(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts(500)).encode()))
    raw[flip] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    with pytest.raises(ValueError, match="a.jsonl.gz"):
        list(common.documents([tmp_path / "a.jsonl.gz"]))


def test_paths_that_give_no_documents_are_errors_that_say_so(folder, tmp_path):
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "plain.jsonl.gz").write_text("this is no gzip")
    write_jsonl(tmp_path / "blank.jsonl", ["", " \n"])
    for name, message in {
        "a.csv": "a.csv: unknown kind of file; expected one of .txt",
        "missing.jsonl": "missing.jsonl: no such file or folder",
        "empty": "empty: no .txt.* file in this folder",
        "plain.jsonl.gz": "plain.jsonl.gz: not a whole gzip file",
        "blank.jsonl": "no document went into the training part",
    }.items():
        with pytest.raises(ValueError, match=message):
            packed([tmp_path / name], folder, tmp_path / "s")
        assert not list(tmp_path.glob("s*"))
    with pytest.raises(ValueError, match="no input files"):
        packed([], folder, tmp_path / "s")


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_share_for_validation_outside_0_to_1_is_refused(ratio, folder, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    with pytest.raises(ValueError, match="--val_ratio"):
        packed([tmp_path / "a.jsonl"], folder, tmp_path / "s", val_ratio=ratio)


def test_damaged_and_missing_shard_files_are_named(folder, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(20))
    packed([tmp_path / "a.jsonl"], folder, tmp_path / "s", val_ratio=0.0)
    bin_, npy = tmp_path / "s/train-00000.bin", tmp_path / "s/train-00000.npy"
    whole, index = bin_.read_bytes(), npy.read_bytes()
    for damaged in (whole[:-2], whole + b"\0\0"):
        bin_.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-00000.bin: missing or not of the size"):
            data.Shards([tmp_path / "s"], "train")
    bin_.unlink()
    with pytest.raises(ValueError, match="train-00000.bin: missing"):
        data.Shards([tmp_path / "s"], "train")
    bin_.write_bytes(whole)
    for damaged in (None, index[:-16], b"", index[:-16] + bytes(16)):
        npy.unlink() if damaged is None else npy.write_bytes(damaged)
        with pytest.raises(ValueError, match="train-00000.npy"):
            data.Shards([tmp_path / "s"], "train")
    npy.write_bytes(index)
    assert len(data.Shards([tmp_path / "s"], "train")) == 20
    with pytest.raises(ValueError, match="not a folder written by data.py pack"):
        data.Shards([tmp_path], "train")


def test_folders_packed_with_different_tokenizers_are_refused(folder, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(50))
    tok.train(tok.Train([str(tmp_path / "a.jsonl")], str(tmp_path / "tok"), vocab_size=340))
    for name, tokenizer in (("a", folder), ("b", tmp_path / "tok")):
        packed([tmp_path / "a.jsonl"], tokenizer, tmp_path / name)
    with pytest.raises(ValueError, match="/a, .*/b were packed with different tokenizers"):
        data.Shards([tmp_path / "a", tmp_path / "b"], "train")


def test_an_existing_out_is_refused_unchanged_and_overwrite_replaces_it(folder, tmp_path):
    first, second = (write_jsonl(tmp_path / f"{n}.jsonl", texts(30, seed=n)) for n in range(2))
    packed([first], folder, tmp_path / "s")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="exists and is not empty"):
        packed([second], folder, tmp_path / "s")
    assert tree(tmp_path) == before
    _, _, report = packed([second], folder, tmp_path / "s", overwrite=True)
    packed([second], folder, tmp_path / "fresh")
    assert tree(tmp_path / "s") == tree(tmp_path / "fresh")
    assert report["sources"] == [str(second)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.jsonl", "1.jsonl", "fresh", "s"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_that_fails_leaves_nothing_and_keeps_what_was_there(workers, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK_BYTES", 1000)
    good = write_jsonl(tmp_path / "a.jsonl", texts(100))
    bad = tmp_path / "b.jsonl"
    bad.write_bytes(good.read_bytes() + b"{\n")
    with pytest.raises(ValueError, match="b.jsonl:101: not JSON"):
        packed([good, bad], folder, tmp_path / "new", workers=workers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    packed([good], folder, tmp_path / "s")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="b.jsonl:101"):
        packed([bad], folder, tmp_path / "s", workers=workers, overwrite=True)
    assert tree(tmp_path) == before


# --- 6. the command line --------------------------------------------------------------------------------------


def test_pack_check_and_show_run_as_commands(folder, tokenizer, tmp_path):
    source = write_jsonl(tmp_path / "in" / "a.jsonl", texts(40))
    done = run_script("data.py", "check", source.parent, OMP_NUM_THREADS=1)
    chars = sum(map(len, texts(40)))
    assert (done.returncode, done.stdout) == (0, f"40 documents, {chars:,} characters, no bad line\n")

    args = ("pack", source.parent, "--tokenizer", folder, "--val_ratio", 0.2, "--workers", 2)
    done = run_script("data.py", *args, "--out", tmp_path / "s", OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    _, _, report = packed([source], folder, tmp_path / "here", val_ratio=0.2)
    written = common.read_json(tmp_path / "s" / "shards.json")
    assert written == report
    for part in ("train", "val"):
        r = report[part]
        assert f"{part}: {r['documents']:,} documents, {r['tokens']:,} tokens, " in done.stdout

    again = run_script("data.py", *args, "--out", tmp_path / "s", OMP_NUM_THREADS=1)
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr and "Traceback" not in again.stderr

    done = run_script("data.py", "show", tmp_path / "s", "--rows", 2, "--length", 200, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    stream = data.RowStream(data.Shards([tmp_path / "s"], "train"), 200, 0)
    rows = [next(stream) for _ in range(2)]
    shown = [" | ".join(tokenizer.decode(stream.shards.read(*p).tolist()) for p in row) for row in rows]
    assert done.stdout.splitlines() == shown
    assert f"[{len(rows[0])} documents, {sum(n for _, _, n in rows[0])} of 200 positions]" in done.stderr


def test_check_stops_at_the_first_bad_line_with_status_2(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(3))
    with open(tmp_path / "a.jsonl", "a") as file:
        file.write('{"txet": 1}\n{broken\n')
    done = run_script("data.py", "check", tmp_path / "a.jsonl", OMP_NUM_THREADS=1)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == f"error: {tmp_path / 'a.jsonl'}:4: no \"text\" key; found 'txet'"


def test_packing_never_loads_torch(folder, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", texts(5))
    code = (
        "import sys, data; data.pack(data.PackConfig((sys.argv[1],), sys.argv[2], sys.argv[3], workers=1)); "
        "sys.exit('torch' in sys.modules)"
    )
    done = run_script("-c", code, tmp_path / "a.jsonl", folder, tmp_path / "s", cwd=ROOT)
    assert done.returncode == 0, done.stderr
