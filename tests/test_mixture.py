"""Sources are mixed in exact shares, by weights that may change while a run goes on, and resuming is exact."""

import hashlib
import json
import random
import shutil
from collections import Counter

import pytest
import torch
import tyro
from conftest import run_script
from test_data import numbered, same_batch, write_shards

import common
import data
import model as M
import state
import tokenizer as tok
import train

ROW = 64
ONE = common.Process(0, 1, "cpu")

# --- helpers -------------------------------------------------------------------------------------------------


def folders_of(root, **lengths):
    """Pack documents of the given lengths, each source in a folder of its name."""
    for name, sizes in lengths.items():
        numbered(root / name, sizes)
    return [root / name for name in lengths]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A large source, a middle one with documents longer than a row, and a small one; unequal lengths."""
    rng = random.Random(3)
    sizes = {
        "zh": [rng.randint(1, 60) for _ in range(900)],
        "en": [rng.randint(5, 40) for _ in range(400)] + [65, 130, 200, 300],
        "code": [rng.randint(30, 90) for _ in range(60)],
    }
    return data.Shards(folders_of(tmp_path_factory.mktemp("three"), **sizes), "train")


def mixture(shards, seed=1, **weights):
    return data.Mixture(shards, ROW, seed, data.shares(weights, "--data"))


def source_of(shards, pieces):
    """Name the source of a row; it must be one."""
    (name,) = {n for n, s in shards.sources.items() for d, _, _ in pieces if d in s.documents}
    return name


def tokens_of(pieces):
    return sum(n for _, _, n in pieces)


def drawn(shards, stream, rows):
    return [(source_of(shards, p), tokens_of(p)) for p in (next(stream) for _ in range(rows))]


# --- 1. shares -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zh", [0.7, 0.5, 0.99, 0.003])
def test_with_two_sources_every_share_is_met_within_one_row_at_every_moment(tmp_path, zh):
    rng = random.Random(0)
    sizes = {n: [rng.randint(3, 90) for _ in range(300)] for n in ("zh", "en")}
    shards = data.Shards(folders_of(tmp_path, **sizes), "train")
    stream, taken, total = mixture(shards, zh=zh, en=1 - zh), Counter(), 0
    for name, tokens in drawn(shards, stream, 3000):
        taken[name] += tokens
        total += tokens
        assert abs(taken["zh"] - zh * total) < ROW


def test_with_many_sources_none_is_a_row_ahead_nor_two_behind(tmp_path):
    rng = random.Random(1)
    sizes = {f"s{n}": [rng.randint(3, 90) for _ in range(50)] for n in range(7)}
    shards = data.Shards(folders_of(tmp_path, **sizes), "train")
    for trial in range(5):
        stream = mixture(shards, **{name: rng.random() ** 3 for name in sizes})
        taken, total = Counter(), 0
        for name, tokens in drawn(shards, stream, 1500):
            taken[name] += tokens
            total += tokens
            for n, weight in stream.weights.items():
                assert -ROW < weight * total - taken[n] < 2 * ROW, trial


def test_ten_thousand_rows_are_within_a_hundredth_of_a_percent_of_the_weights(three):
    stream = mixture(three, zh=0.2, en=0.5, code=0.3)
    taken = Counter()
    for name, tokens in drawn(three, stream, 10_000):
        taken[name] += tokens
    for name, weight in stream.weights.items():
        assert taken[name] / taken.total() == pytest.approx(weight, abs=2e-4)
        assert stream.epochs()[f"epochs/{name}"] == taken[name] / three.sources[name].tokens


def test_a_weight_of_0_draws_nothing_and_weights_need_not_sum_to_1(three):
    assert {name for name, _ in drawn(three, mixture(three, zh=3, en=0, code=1), 500)} == {"zh", "code"}
    a, b = mixture(three, zh=7, en=2, code=1), mixture(three, zh=0.7, en=0.2, code=0.1)
    assert [next(a) for _ in range(300)] == [next(b) for _ in range(300)]


def test_every_source_has_its_own_epochs_in_which_each_document_comes_once(three):
    stream = mixture(three, zh=0.1, en=0.1, code=0.8)
    seen = Counter()
    while stream.streams["code"].epoch < 20:
        seen.update(next(stream))
    assert stream.streams["zh"].epoch == 0
    for name, source in three.sources.items():
        one = stream.streams[name]
        times = Counter(dict.fromkeys(source.documents, 0))
        for (document, start, _), count in (seen + Counter(one.waiting.values())).items():
            if document in source.documents and start == 0:
                times[document] += count
        assert set(times.values()) <= {one.epoch, one.epoch + 1}, name
        assert sum(times.values()) == one.epoch * len(times) + one.position + (one.start > 0), name


def test_sources_of_equal_size_are_shuffled_differently(tmp_path):
    shards = data.Shards(folders_of(tmp_path, zh=[20] * 200, en=[20] * 200), "train")
    stream = mixture(shards, zh=1, en=1)
    order = {"zh": [], "en": []}
    for _ in range(60):
        pieces = next(stream)
        name = source_of(shards, pieces)
        order[name] += [d - shards.sources[name].documents[0] for d, _, _ in pieces]
    assert sum(a == b for a, b in zip(order["zh"], order["en"])) < 10


def test_the_rows_of_a_source_do_not_depend_on_the_weights(three):
    """Weights decide when a source is drawn, never what it gives next."""
    rows = []
    for weights in ((1, 1, 1), (5, 1, 2), (1, 9, 9)):
        stream = mixture(three, **dict(zip(three.sources, weights)))
        every = [next(stream) for _ in range(400)]
        rows.append({n: [p for p in every if source_of(three, p) == n][:15] for n in three.sources})
    assert rows[0] == rows[1] == rows[2]


def test_without_weights_sources_come_in_proportion_to_their_tokens(three):
    """The law of one uniform shuffle over all documents: exact over an epoch of draws."""
    stream = data.RowStream(three, ROW, seed=2)
    taken = Counter()
    while stream.epoch < 12:
        for document, _, n in next(stream):
            taken[document] += n
    assert stream.epochs()["epochs"] == pytest.approx(taken.total() / three.tokens)
    for document, _, n in stream.waiting.values():
        taken[document] += n
    for name, source in three.sources.items():
        share = sum(taken[d] for d in source.documents) / taken.total()
        assert share == pytest.approx(source.tokens / three.tokens, abs=0.005), name


# --- 2. weights that change ------------------------------------------------------------------------------------


def test_new_weights_are_in_force_from_the_next_row_and_the_past_is_not_made_up_for(three):
    stream = mixture(three, zh=0.9, en=0.1, code=0.0)
    drawn(three, stream, 777)
    stream.set_weights(data.shares({"zh": 0.0, "en": 0.4, "code": 0.6}, ""))
    taken, total = Counter(), 0
    for name, tokens in drawn(three, stream, 500):
        taken[name] += tokens
        total += tokens
        assert abs(taken["en"] - 0.4 * total) < ROW
    assert set(taken) == {"en", "code"}


def test_a_mixture_resumes_exactly_from_json_also_across_changes_of_weights(three):
    changes = {0: (6, 3, 1), 90: (1, 1, 8), 200: (0, 1, 1), 260: (6, 3, 1)}
    stream = mixture(three, zh=1, en=1, code=1)
    rows, states = [], []
    for at in range(330):
        if at in changes:
            stream.set_weights(data.shares(dict(zip(three.sources, changes[at])), ""))
        states.append(json.dumps(stream.state()))
        rows.append(next(stream))
    for at in {0, 1, 89, 90, 91, 199, 200, 201, *range(5, 300, 29)}:
        resumed = mixture(three, zh=1, en=1, code=1)
        resumed.load_state(json.loads(states[at]))
        for ahead in range(at, at + 30):
            if ahead in changes and ahead > at:
                resumed.set_weights(data.shares(dict(zip(three.sources, changes[ahead])), ""))
            assert next(resumed) == rows[ahead], (at, ahead)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_a_state_saved_on_some_ranks_continues_on_others(three, before, after):
    def batches(rank, world):
        return data.Batches(mixture(three, zh=5, en=3, code=2), 8, 2, rank, world)

    alone, saved = batches(0, 1), batches(before - 1, before)
    for _ in range(7):
        next(alone), next(saved)
    state = json.loads(json.dumps(saved.state()))
    assert state == json.loads(json.dumps(alone.state()))
    ranks = [batches(r, after) for r in range(after)]
    for rank in ranks:
        rank.load_state(state)
    for _ in range(7):
        want, have = next(alone), [next(rank) for rank in ranks]
        rows = {k: torch.cat([b[k] for b in want]) for k in want[0]}
        parts = [{k: torch.cat([b[k] for b in mine]) for k in mine[0]} for mine in have]
        assert same_batch({k: torch.stack([p[k] for p in parts], 1).flatten(0, 1) for k in rows}, rows)


def test_a_state_of_a_mixture_is_small(three):
    stream = mixture(three, zh=1, en=1, code=1)
    drawn(three, stream, 2000)
    assert len(json.dumps(stream.state())) < 3 * data.WAITING * 20


# --- 3. what a user types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "folders", "weights"),
    [
        ("out/zh:0.7,out/en:0.3", ["out/zh", "out/en"], [0.7, 0.3]),
        ("out/zh, out/en,", ["out/zh", "out/en"], None),
        ("/a b/zh:7", ["/a b/zh"], [7.0]),
        ("a:b/zh:1,c:2e-1", ["a:b/zh", "c"], [1.0, 0.2]),
        ("", [], None),
    ],
)
def test_folders_and_weights_are_told_apart(text, folders, weights):
    assert data.split_weights(text) == (folders, weights)


@pytest.mark.parametrize("text", ["a:1,b", "a,b:1", "a:", "a:x"])
def test_a_weight_that_is_missing_or_no_number_is_refused(text):
    with pytest.raises(
        ValueError, match="--data .*: could not convert .*; write FOLDER:WEIGHT for every folder"
    ):
        data.split_weights(text)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"zh": -1, "en": 2}, "the weight of zh is -1, expected a number from 0 to 1e9"),
        ({"zh": 1, "en": float("nan")}, "the weight of en is nan"),
        ({"zh": float("inf"), "en": 1}, "the weight of zh is inf"),
        ({"zh": True, "en": 1}, "the weight of zh is True"),
        ({"zh": "0.7", "en": 1}, "the weight of zh is '0.7'"),
        ({"zh": 10**400, "en": 1}, "the weight of zh is 1000"),
        ({"zh": 0, "en": 0.0}, "all weights are 0"),
    ],
)
def test_weights_that_make_no_shares_are_refused(weights, message):
    with pytest.raises(ValueError, match=f"^here: {message}"):
        data.shares(weights, "here")


BAD_FILES = {
    "missing": (None, "no such file"),
    "half written": ('{"zh": 0.7, "e', "not valid JSON"),
    "empty": ("", "not valid JSON"),
    "a list": ("[0.7, 0.3]", "expected an object with a weight for zh, en; found list"),
    "one too few": ('{"zh": 1}', "a weight for zh, en; found zh"),
    "one too many": ('{"zh": 1, "en": 1, "fr": 1}', "a weight for zh, en; found zh, en, fr"),
    "all 0": ('{"zh": 0, "en": 0}', "all weights are 0"),
    "a word": ('{"zh": "much", "en": 1}', "the weight of zh is 'much'"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_of_weights_is_named(tmp_path, bad):
    text, message = BAD_FILES[bad]
    if text is not None:
        (tmp_path / "mix.json").write_text(text)
    with pytest.raises(ValueError, match=f"mix.json: .*{message}"):
        data.read_weights(tmp_path / "mix.json", ["zh", "en"])


def test_a_source_is_called_by_its_folders_name_or_by_its_path_if_two_share_it(tmp_path):
    for path in ("a/zh", "b/zh", "b/en"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_shards(tmp_path / path, [[1, 2], [3, 4, 5]])
    a, b, en = tmp_path / "a/zh", tmp_path / "b/zh", tmp_path / "b/en"
    sources = data.Shards([str(b) + "/", en], "train").sources
    assert sources == {"zh": (range(2), 5), "en": (range(2, 4), 5)}
    assert list(data.Shards([a, b], "train").sources) == [str(a), str(b)]
    with pytest.raises(ValueError, match="a folder twice; to repeat one give weights"):
        data.Shards([b, en, str(b) + "/"], "train")


def test_a_source_without_documents_is_named(tmp_path):
    write_shards(tmp_path / "zh", [[1, 2]])
    write_shards(tmp_path / "en", [])
    shards = data.Shards([tmp_path / "zh", tmp_path / "en"], "train")
    with pytest.raises(ValueError, match="en holds no training documents"):
        mixture(shards, zh=1, en=1)


# --- 4. a run --------------------------------------------------------------------------------------------------


class Editing(data.Batches):
    """Batches during which someone edits the file of weights: {step: new content}."""

    def __init__(self, *args, path, edits, step=0):
        super().__init__(*args)
        self.path, self.edits, self.step = path, edits, step

    def __next__(self):
        if self.step in self.edits:
            self.path.write_text(self.edits[self.step])
        self.step += 1
        return super().__next__()


def fit_on(shards, out, path, edits, resume=False):
    """Train a tiny model for 12 steps, with evaluations and saves every 3."""
    torch.manual_seed(0)
    model = M.build(M.ModelConfig("llama", 2**12, 16, 1, 2, 32, ROW))
    M.init_weights(model, 3)
    stream = data.Mixture(shards, ROW, 1, data.read_weights(path, shards.sources))
    if resume:
        stream.set_weights(data.shares(dict.fromkeys(shards.sources, 1), ""))  # as train.starting_weights
    cfg = train.FitConfig(
        str(out), resume, dtype="float32", peak_tflops=1.0, eval_every=3, save_every=3, keep=9
    )
    code = train.fit(
        model,
        Editing(stream, 4, 4, path=path, edits=edits),
        cfg,
        train.next_token_loss,
        refresh=lambda: train.reread(str(path), stream, ONE),
        steps=12,
        process=ONE,
        identity={},
    )
    assert code == 0
    return common.read_metrics(out / "metrics.jsonl")


def digest(run):
    (file,) = (run / "step_0000012" / "state").glob("rank-*.safetensors")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def small(tmp_path):
    rng = random.Random(4)
    sizes = {n: [rng.randint(5, 50) for _ in range(40)] for n in ("zh", "en")}
    (tmp_path / "data").mkdir()
    return data.Shards(folders_of(tmp_path / "data", **sizes), "train")


EDITS = {4: '{"zh": 1, "en": 3}', 7: '{"zh": 1, "e', 10: '{"zh": 0, "en": 1}'}


def test_the_file_is_read_at_evaluations_a_bad_one_is_announced_and_resuming_is_bit_exact(
    small, tmp_path, capsys
):
    path = tmp_path / "mix.json"
    path.write_text('{"zh": 3, "en": 1}')
    rows = fit_on(small, tmp_path / "whole", path, EDITS)
    news = {r["step"]: r for r in rows if "loss" not in r}
    assert {k: news[6][f"weight/{k}"] for k in ("zh", "en")} == {"zh": 0.25, "en": 0.75}
    assert "mix.json: not valid JSON" in news[9]["mixture_problem"]
    assert news[12]["weight/zh"] == 0 and set(news) == {6, 9, 12}
    printed = capsys.readouterr().out
    assert "step 6/12 | weight/zh 0.2500 | weight/en 0.7500" in printed
    assert "the old weights stay in force" in printed

    # resumed at step 6, where the new weights are in force and saved though the step came before; the file
    # is not looked at before step 9
    for step, content in ((6, EDITS[4]), (9, EDITS[10])):
        out = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "whole", out)
        for later in (p for p in state.saved_steps(out) if int(p.name[5:]) > step):
            shutil.rmtree(later)
        path.write_text(content)
        edits = {at - step: text for at, text in EDITS.items() if at >= step}
        again = fit_on(small, out, path, edits, resume=True)
        assert digest(out) == digest(tmp_path / "whole")
        assert [r.get("loss") for r in again] == [r.get("loss") for r in rows]


AGREE = """
import sys, common, data, train
process = common.start_process("cpu")
shards = data.Shards(sys.argv[1:3], "train")
mixture = data.Mixture(shards, 64, 1, data.shares({"zh": 1, "en": 1}, ""))
seen = []
for n in range(3):  # each rank finds another file, as an edit between two reads would have it
    news = train.reread(f"{sys.argv[3]}/{n}-rank{process.rank}.json", mixture, process)
    seen.append(mixture.weights)
    if process.first:
        print(n, news)
assert seen == [{"zh": 0.75, "en": 0.25}] * 2 + [{"zh": 0.1, "en": 0.9}], (process.rank, seen)
print("agreed")
common.finish_process()
"""


def test_all_ranks_take_the_weights_that_rank_0_read(small, tmp_path):
    files = {
        "0-rank0": '{"zh": 3, "en": 1}', "0-rank1": '{"zh": 1, "en": 3}',
        "1-rank0": "{", "1-rank1": '{"zh": 1, "en": 3}',
        "2-rank0": '{"zh": 0.1, "en": 0.9}', "2-rank1": "{",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "agree.py").write_text(AGREE)
    folders = (tmp_path / "data" / name for name in ("zh", "en"))
    launch = ("-m", "torch.distributed.run", "--nproc_per_node", 2, "--standalone")
    done = run_script(*launch, tmp_path / "agree.py", *folders, tmp_path, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("agreed") == 2 and "1 {'mixture_problem'" in done.stdout


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Two packed corpora, zh and en, with one tokenizer; and `bare`, which has no validation part."""
    root = tmp_path_factory.mktemp("packed")
    draw = random.Random(0)
    words = {
        "zh": "王小明 李红 有 三 本 书 和 一 盏 灯 。".split(),
        "en": "the fox has two books and a lamp".split(),
    }
    for name, choice in words.items():
        lines = (" ".join(draw.choices(choice, k=draw.randint(3, 40))) for _ in range(300))
        text = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
        (root / f"{name}.jsonl").write_text(text, "utf-8")
    tok.train(tok.Train([str(root / f"{n}.jsonl") for n in words], str(root / "tok"), vocab_size=320))
    for source, name, ratio in (("zh", "zh", 0.1), ("en", "en", 0.1), ("en", "bare", 0.0)):
        files = (str(root / f"{source}.jsonl"),)
        data.pack(data.PackConfig(files, str(root / "tok"), str(root / name), ratio, workers=1))
    return root


FLAGS = "--preset tiny --row_tokens 64 --tokens_per_step 512 --micro_tokens 256 --warmup 0 --final_lr 1 --eval_every 4"
FLAGS = (*FLAGS.split(), "--dtype", "float32", "--peak_tflops", "1", "--seed", "5")


@pytest.fixture
def run(monkeypatch, capsys):
    """Give a function that runs the command in this process; it returns the output, steps and evaluations."""

    def command(out, *more):
        words = ["--out", str(out), *FLAGS, *map(str, more)]
        monkeypatch.setattr("sys.argv", ["train.py", *words])  # --resume asks which flags were typed
        train.main(tyro.cli(train.TrainConfig, args=words))
        rows = common.read_metrics(out / "metrics.jsonl")
        return capsys.readouterr().out, *(
            [r for r in rows if ("loss" in r) is kind] for kind in (True, False)
        )

    return command


def test_a_mixed_run_reports_each_source_and_goes_on_exactly_on_other_ranks(packed, tmp_path, run):
    mixed = ("--data", f"{packed / 'zh'}:0.7,{packed / 'en'}:0.3")
    printed, steps, evaluations = run(tmp_path / "one", *mixed, "--steps", 8)
    assert "mixture: zh 70.0% (" in printed and "val_loss/zh " in printed and "epochs/en " in printed
    stream = mixture(data.Shards([packed / "zh", packed / "en"], "train"), seed=5, zh=0.7, en=0.3)
    for row in evaluations:
        for _ in range(4 * 8):
            next(stream)
        assert {k: row[k] for k in ("epochs/zh", "epochs/en")} == stream.epochs()
        low, high = sorted((row["val_loss/zh"], row["val_loss/en"]))
        assert low < row["val_loss"] < high

    launch = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        2,
        "--standalone",
        "train.py",
        *FLAGS,
        *mixed,
    )
    done = run_script(*launch, "--steps", 4, "--out", tmp_path / "two", OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    _, again, later = run(tmp_path / "two", "--resume", "--steps", 8)
    assert [r["tokens"] for r in again] == [r["tokens"] for r in steps]
    assert [r["loss"] for r in again] == pytest.approx([r["loss"] for r in steps], rel=1e-4)
    for a, b in zip(evaluations, later, strict=True):
        assert a["epochs/zh"] == b["epochs/zh"] and a["val_loss/en"] == pytest.approx(
            b["val_loss/en"], rel=1e-4
        )

    other = f"{packed / 'zh'}:1,{packed / 'en'}:1"
    with pytest.raises(ValueError, match="mixture: {'zh': 0.7, 'en': 0.3} when saved"):
        run(tmp_path / "two", "--resume", "--steps", 12, "--data", other)


def test_a_run_with_a_file_of_weights_resumes_even_if_the_file_is_bad_by_then(packed, tmp_path, run):
    out, path = tmp_path / "run", tmp_path / "mix.json"
    path.write_text('{"zh": 4, "en": 1}')
    mixed = ("--data", f"{packed / 'zh'},{packed / 'en'}", "--mixture", path)
    printed, _, _ = run(out, *mixed, "--steps", 4)
    assert "mixture: zh 80.0% (" in printed
    path.write_text("{")
    printed, _, rows = run(out, "--resume", "--steps", 8)
    assert "mix.json: not valid JSON" in rows[-2]["mixture_problem"] and "old weights stay" in printed
    stream = mixture(data.Shards([packed / "zh", packed / "en"], "train"), seed=5, zh=4, en=1)
    for _ in range(8 * 8):
        next(stream)
    assert {k: rows[-1][k] for k in ("epochs/zh", "epochs/en")} == stream.epochs()


def test_a_run_without_validation_documents_reports_its_epochs(packed, tmp_path, run):
    _, _, (row,) = run(tmp_path / "run", "--data", packed / "bare", "--steps", 4)
    stream = data.RowStream(data.Shards([packed / "bare"], "train"), ROW, 5)
    for _ in range(4 * 8):
        next(stream)
    assert row["epochs"] == stream.epochs()["epochs"] and "val_loss" not in row


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "ZH:1,EN:1", "--mixture", "MIX"], "--mixture and weights in --data exclude each other"),
        (["--data", "ZH,EN", "--mixture", "MIX"], "mix.json: expected an object with a weight for zh, en"),
        (["--data", "ZH,EN", "--mixture", "nowhere.json"], "nowhere.json: no such file"),
        (["--data", "ZH:1,EN"], "write FOLDER:WEIGHT for every folder, or for none"),
        (["--data", "ZH:0,EN:0"], "--data: all weights are 0"),
    ],
)
def test_wrong_mixtures_are_refused_before_anything_is_written(packed, tmp_path, flags, message):
    (tmp_path / "mix.json").write_text('{"zh": 1}')
    places = {"ZH": packed / "zh", "EN": packed / "en", "MIX": tmp_path / "mix.json"}
    for word, place in places.items():
        flags = [flag.replace(word, str(place)) for flag in flags]
    cfg = tyro.cli(train.TrainConfig, args=["--out", str(tmp_path / "run"), *FLAGS, *flags])
    with pytest.raises(ValueError, match=message):
        train.main(cfg)
    assert not (tmp_path / "run").exists()
