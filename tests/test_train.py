"""The loop: what it computes, what it leaves on disk, and that nothing can make a resumed run differ."""

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, packed_corpus, run_script

import checkpoint
import common
import data
import model as M
import optim
import state
import tokenizer as tok
import train

ONE = common.Process(0, 1, "cpu")
# small, but with everything in it that resuming could get wrong: dropout, accumulation, documents longer than a row
FLAGS = [
    *("--preset", "tiny", "--tokens_per_step", "512", "--micro_tokens", "256", "--row_tokens", "64"),
    *(
        "--steps",
        "12",
        "--lr",
        "3e-3",
        "--warmup",
        "3",
        "--dropout",
        "0.1",
        "--save_every",
        "3",
        "--keep",
        "2",
    ),
    *("--eval_every", "6", "--log_every", "100", "--peak_tflops", "1", "--dtype", "float32"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A packed corpus of 600 documents about who owns what."""
    folder = tmp_path_factory.mktemp("corpus")
    return packed_corpus(folder, 600, (2, 20), 320)


def command(shards, out, *more, ranks=1):
    launcher = [sys.executable] if ranks == 1 else [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"),
    ]  # fmt: skip
    return [*launcher, "train.py", "--data", str(shards), "--out", str(out), *FLAGS, *more]


def run(shards, out, *more, ranks=1, expect=0):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = command(shards, out, *more, ranks=ranks)
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def state_digest(run_folder: Path, step: int = 12) -> str:
    """SHA-256 over every rank's file: parameters, moments, optimizer steps, RNG."""
    files = sorted((run_folder / f"step_{step:07d}" / "state").glob("rank-*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def losses(run_folder: Path) -> list[float]:
    return [r["loss"] for r in common.read_metrics(run_folder / "metrics.jsonl") if "loss" in r]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """An uninterrupted run of 12 steps on one process."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = run(shards, out)
    return out, done.stdout


@pytest.fixture(scope="module")
def finished_by_two(shards, tmp_path_factory):
    """An uninterrupted run of 12 steps on two processes."""
    out = tmp_path_factory.mktemp("runs") / "whole2"
    run(shards, out, ranks=2)
    return out


# --- what it computes ----------------------------------------------------------------------------------------


def one_step(tmp_path, batches, micro_rows, clip=0.0):
    """Take one step with `fit` on fixed rows, cut into micro-batches of `micro_rows`; return the parameters."""
    model = M.build(M.ModelConfig("llama", 64, 32, 2, 4, 64, 32, tie_word_embeddings=True))
    M.init_weights(model, 3)

    class Fixed:
        def __next__(self):
            return [{k: v[i : i + micro_rows] for k, v in batches.items()} for i in range(0, 8, micro_rows)]

        def state(self):
            return {}

    cfg = train.FitConfig(
        str(tmp_path / f"micro{micro_rows}"), lr=1e-2, clip=clip, dtype="float32", peak_tflops=1.0
    )
    assert train.fit(model, Fixed(), cfg, train.next_token_loss, steps=1, process=ONE, identity={}) == 0
    return model, cfg


def batch_of_unequal_rows():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (8, 32), generator=generator)
    targets = ids.roll(-1, 1).clone()
    for row in range(8):
        targets[row, 3 * row + 4 :] = -100  # a mean of means would weigh these rows wrongly
    return {"ids": ids, "targets": targets, "doc_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("micro_rows", [1, 2, 4])
def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path, micro_rows):
    whole, _ = one_step(tmp_path, batch_of_unequal_rows(), 8)
    parts, _ = one_step(tmp_path, batch_of_unequal_rows(), micro_rows)
    for a, b in zip(whole.parameters(), parts.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=2e-5)  # the first Adam step is lr·sign(g): rounding can show


def test_a_step_equals_adamw_on_the_mean_of_cross_entropy(tmp_path):
    batch = batch_of_unequal_rows()
    ours, cfg = one_step(tmp_path, batch, 2, clip=0.5)
    plain = M.build(ours.config)
    M.init_weights(plain, 3)
    optimizer = optim.make_optimizer(plain, cfg)
    for group in optimizer.param_groups:
        group["lr"] = optim.learning_rate(0, 1, cfg)
    loss = F.cross_entropy(plain(batch["ids"]).flatten(0, 1), batch["targets"].flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
    optimizer.step()
    row = common.read_metrics(Path(cfg.out) / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(a, b, rtol=0, atol=2e-5)


def test_two_ranks_agree_with_one(finished, finished_by_two, shards, tmp_path):
    """Dropout draws differ by rank, so this comparison is made without it."""
    run(shards, tmp_path / "one", "--dropout", "0")
    run(shards, tmp_path / "two", "--dropout", "0", ranks=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, rel=2e-5)
    tokens = [
        [r["tokens"] for r in common.read_metrics(tmp_path / n / "metrics.jsonl") if "tokens" in r]
        for n in ("one", "two")
    ]
    assert tokens[0] == tokens[1]


def test_the_run_learns_and_logs_every_step(finished):
    out, printed = finished
    rows = [r for r in common.read_metrics(out / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in rows] == list(range(1, 13))
    assert (
        rows[0]["loss"] == pytest.approx(math.log(320), rel=0.05) and rows[-1]["loss"] < rows[0]["loss"] - 0.5
    )
    for key in ("lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes", "tokens", "seconds"):
        assert all(math.isfinite(r[key]) for r in rows), key
    for word in ("parameters", "per parameter", "FLOPs: 6 x", "left", "val_bits_per_byte", "sample"):
        assert word in printed, word
    assert (out / "loss.png").stat().st_size > 1000
    assert json.loads((out / "run.json").read_text())["plan"] == {
        "row_tokens": 64, "rows_per_step": 8, "micro_rows": 4, "steps": 12,
    }  # fmt: skip


def test_validation_loss_and_bits_per_byte_are_those_of_a_plain_sum(finished, shards):
    out, _ = finished
    logged = [r for r in common.read_metrics(out / "metrics.jsonl") if "val_loss" in r][-1]
    folder = out / "step_0000012"
    model = checkpoint.load_model(folder, torch.float32)
    with torch.no_grad():  # the saved folder is bf16; the state has the fp32 weights that were evaluated
        state.load_step(folder, model, torch.optim.AdamW(model.parameters()), ONE)
    val = data.Shards([shards], "val")
    nats = count = 0
    for d in range(len(val)):
        ids = torch.from_numpy(val.read(d, 0, 10**9))[None]
        for a in range(
            0, ids.shape[1] - 1, 64
        ):  # rows of 64: a longer document is cut, each token predicted once
            piece = ids[:, a : a + 65]
            nats += F.cross_entropy(model(piece[:, :-1])[0], piece[0, 1:], reduction="sum").item()
            count += piece.shape[1] - 1
    assert logged["val_loss"] == pytest.approx(nats / count, rel=1e-4)
    assert logged["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / val.bytes, rel=1e-4)


def test_only_the_named_parameters_train_and_the_run_resumes(shards, finished, tmp_path):
    """The first stage after a vocabulary has grown: embedding and head learn, all else keeps its bits."""
    flags = ("--init", str(finished[0]), "--train_only", "embed_tokens,lm_head", "--save_dtype", "float32")
    for name in ("whole", "cut"):
        run(shards, tmp_path / name, *flags)
    shutil.rmtree(tmp_path / "cut" / "step_0000012")
    run(shards, tmp_path / "cut", *flags, "--resume")
    assert state_digest(tmp_path / "whole") == state_digest(tmp_path / "cut")
    before = checkpoint.load_model(finished[0], torch.float32).state_dict()
    after = checkpoint.load_model(tmp_path / "whole").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"embed_tokens.weight", "lm_head.weight"} & before.keys()
    done = run(shards, tmp_path / "no", "--train_only", "embedding", expect=2)
    assert "--train_only embedding: in no parameter's name" in done.stderr
    done = run(shards, tmp_path / "cut", "--resume", "--train_only", "embed_tokens", expect=2)
    assert "train_only: 'embed_tokens,lm_head' when saved, 'embed_tokens' now" in done.stderr


def test_init_refuses_data_of_another_byte_level_tokenizer(shards, tmp_path):
    """Such a folder has no tokenizer.model; ids of another tokenizer would be learnt as if they were its own."""
    corpus = shards.parent / "corpus.jsonl"
    for name, size in (("a", 300), ("b", 310)):
        tok.train(tok.Train((str(corpus),), out=str(tmp_path / name), vocab_size=size, kind="bytebpe"))
    a, b = (tok.load_tokenizer(tmp_path / name) for name in "ab")
    checkpoint.save_model(M.build(M.ModelConfig("llama", 320, 32, 1, 2, 64, 64)), tmp_path / "model", a)
    cfg = train.TrainConfig(str(tmp_path / "run"), init=str(tmp_path / "model"))
    assert train.model_config(cfg, a).vocab_size == 320
    with pytest.raises(ValueError, match="another tokenizer than the data.*checkpoint.py resize"):
        train.model_config(cfg, b)


def test_a_saved_step_is_a_model_folder_with_its_tokenizer(finished):
    out, _ = finished
    assert sorted(p.name for p in out.glob("step_*")) == ["step_0000009", "step_0000012"]  # --keep 2
    assert (out / "latest").read_text().strip() == "step_0000012"
    assert checkpoint.load_model(out).config.vocab_size == 320
    assert tok.load_tokenizer(out / "step_0000012").vocab_size == 320
    assert checkpoint.folder_dtype(out / "step_0000012") == torch.bfloat16


def test_same_seed_same_run_other_seed_other_run(finished, shards, tmp_path):
    out, _ = finished
    run(shards, tmp_path / "again")
    assert state_digest(tmp_path / "again") == state_digest(out)
    run(shards, tmp_path / "other", "--seed", "2")
    assert losses(tmp_path / "other") != losses(out)


def test_init_takes_weights_and_starts_afresh(finished, shards, tmp_path):
    out, _ = finished
    run(shards, tmp_path / "next", "--init", str(out))
    first = losses(tmp_path / "next")[0]
    assert first == pytest.approx(losses(out)[-1], rel=0.1) and first < losses(out)[0] - 0.3


# --- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_after_sigterm_is_bit_exact(shards, tmp_path, finished, finished_by_two, ranks):
    out = tmp_path / "run"
    code = stop_after(shards, out, 5, signal.SIGTERM, ranks)
    assert code == (143 if ranks == 1 else 1)  # torchrun answers 1 even to an orderly stop
    saved = state.saved_steps(out)[-1]
    assert 5 <= int(saved.name[5:]) < 12
    run(shards, out, "--resume", ranks=ranks)
    assert state_digest(out) == state_digest(finished[0] if ranks == 1 else finished_by_two)
    assert losses(out) == losses(finished[0] if ranks == 1 else finished_by_two)


def test_resume_needs_only_the_run_folder_and_a_finished_run_stops_at_once(finished):
    out, _ = finished
    before = state_digest(out)
    done = run_script("train.py", "--resume", "--out", out, OMP_NUM_THREADS=1)
    assert done.returncode == 0 and "resuming from" in done.stdout
    assert state_digest(out) == before and len(losses(out)) == 12


def test_resume_on_another_number_of_ranks_goes_on(shards, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(shards, one, "--dropout", "0")
    run(shards, two, "--dropout", "0", "--steps", "6", "--schedule", "wsd", "--warmup", "0", ranks=2)
    done = run(
        shards, two, "--resume", "--dropout", "0", "--steps", "9", "--schedule", "wsd", "--warmup", "0"
    )
    assert "saved by 2 processes" in done.stdout
    assert len(losses(two)) == 9 and losses(two)[-1] < losses(two)[0]


def test_resume_refuses_other_data_and_another_batch(finished, shards, tmp_path):
    out, _ = finished
    settings = (out / "run.json").read_bytes()
    done = run(shards, out, "--resume", "--tokens_per_step", "1024", expect=2)
    assert "rows_per_step: 8 when saved, 16 now" in done.stderr
    assert (out / "run.json").read_bytes() == settings  # a refused resume leaves nothing behind
    other = tmp_path / "corpus.txt"
    other.write_text("完全不同的一句话。\n\n另一句话，也不一样。\n" * 20)
    data.pack(data.PackConfig((str(other),), str(shards), str(tmp_path / "other"), 0.2, workers=1))
    done = run(tmp_path / "other", out, "--resume", expect=2)
    assert "cannot be resumed" in done.stderr and "data:" in done.stderr


def signal_all(process: subprocess.Popen, number: int) -> None:
    """Signal a process and all below it: torchrun gives every worker a session of its own."""
    family = [process.pid]
    for pid in family:
        with contextlib.suppress(FileNotFoundError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                family += map(int, (task / "children").read_text().split())
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def stop_after(shards, out: Path, step: int, number: int, ranks: int, during_save=False, more=()) -> int:
    """Start a run and send it a signal once it logged `step`, or while it writes the step after that."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        command(shards, out, *more, ranks=ranks), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count('"loss"') >= step):
        assert started.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.002)
    while (
        during_save
    ):  # run a few milliseconds, freeze, look: a save cannot end between the look and the kill
        signal_all(started, signal.SIGSTOP)
        time.sleep(0.002)
        if list(out.glob("step_*.tmp")):
            break
        signal_all(started, signal.SIGCONT)
        time.sleep(0.003)
        assert started.poll() is None, "the run ended before it saved"
    if number == signal.SIGKILL:
        signal_all(started, number)  # the launcher and every rank at once, as a power cut does
    else:
        started.send_signal(number)
    return started.wait(timeout=120)


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("during_save", [False, True], ids=["in a step", "in a save"])
def test_resume_after_kill_9_is_bit_exact(shards, tmp_path, finished, finished_by_two, ranks, during_save):
    whole = finished[0] if ranks == 1 else finished_by_two
    for attempt, step in enumerate((2, 4, 7)):
        out = tmp_path / f"run{attempt}"
        stop_after(shards, out, step, signal.SIGKILL, ranks, during_save)
        left_over = list(out.glob("step_*.tmp"))
        assert bool(left_over) or not during_save
        run(shards, out, "--resume", ranks=ranks)
        assert state_digest(out) == state_digest(whole)
        assert losses(out) == losses(whole)
        assert not list(out.glob("step_*.tmp"))


def test_three_kills_never_lose_a_run_nor_change_its_end(shards, tmp_path, finished):
    out = tmp_path / "run"
    for step in (2, 5, 9):
        stop_after(shards, out, step, signal.SIGKILL, 1, more=("--resume",) if out.exists() else ())
    run(shards, out, "--resume")
    assert state_digest(out) == state_digest(finished[0]) and losses(out) == losses(finished[0])


def test_resuming_at_the_end_of_an_epoch_skips_and_repeats_nothing(shards, tmp_path):
    whole = tmp_path / "whole"
    flags = ("--steps", "66", "--eval_every", "0", "--save_every", "1", "--keep", "99", "--dropout", "0")
    run(shards, whole, *flags)
    epochs = [state.read_manifest(step)["extra"]["batches"]["epoch"] for step in state.saved_steps(whole)]
    end = epochs.index(1)  # the first step after which the packer reads its second epoch
    assert 0 < end < 66 and epochs == [0] * end + [1] * (66 - end)
    for last in (end - 1, end):  # of the steps that are left: just before, and just after
        out = tmp_path / f"to{last}"
        out.mkdir()
        for name in ("run.json", "metrics.jsonl"):
            shutil.copy(whole / name, out)
        shutil.copytree(state.saved_steps(whole)[last], out / state.saved_steps(whole)[last].name)
        run(shards, out, *flags, "--resume")
        assert state_digest(out, 66) == state_digest(whole, 66) and losses(out) == losses(whole)


@pytest.mark.faults
def test_a_run_killed_before_its_first_save_starts_again_from_the_same_weights(shards, tmp_path, finished):
    more = ("--init", str(finished[0]), "--save_every", "10")
    run(shards, tmp_path / "whole", *more)
    stop_after(shards, tmp_path / "run", 2, signal.SIGKILL, 1, more=more)
    assert not state.saved_steps(tmp_path / "run")
    run_again = run_script("train.py", "--resume", "--out", tmp_path / "run", OMP_NUM_THREADS=1)
    assert run_again.returncode == 0, run_again.stderr
    assert state_digest(tmp_path / "run") == state_digest(tmp_path / "whole")


@pytest.mark.faults
def test_repeated_kills_at_random_moments_never_lose_the_run(shards, tmp_path, finished):
    out, draw = tmp_path / "run", random.Random(1)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for attempt in range(6):
        started = subprocess.Popen(
            command(shards, out, *(["--resume"] if (out / "run.json").exists() else []), "--save_every", "1"),
            cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            started.wait(timeout=5 + 2 * draw.random() + attempt)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        else:
            assert started.returncode == 0, started.stderr.read().decode()
    run(shards, out, "--resume", "--save_every", "1")
    assert state_digest(out) == state_digest(finished[0])


@pytest.mark.faults
def test_a_damaged_step_is_named_and_the_one_before_is_taken(finished, shards, tmp_path):
    out = tmp_path / "run"
    run(shards, out)
    file = out / "step_0000012" / "state" / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = run(shards, out, "--resume")
    assert "rank-00000.safetensors: damaged" in done.stderr and "step_0000009" in done.stdout
    assert (out / "step_0000012.damaged").exists()
    assert state_digest(out) == state_digest(finished[0])


# --- what goes wrong -----------------------------------------------------------------------------------------


def test_a_non_finite_loss_stops_with_the_last_good_step_intact(shards, tmp_path):
    out = tmp_path / "run"
    done = run(shards, out, "--lr", "1e30", "--clip", "0", "--save_every", "1", "--eval_every", "0", expect=2)
    assert "not finite" in done.stderr and "is saved" in done.stderr
    step = state.newest_step(out, ONE)
    assert state.damage(step) is None
    assert f"step {int(step.name[5:])} is saved" in done.stderr


def test_force_goes_on_with_another_batch_once_and_is_not_remembered(shards, tmp_path):
    out = tmp_path / "run"
    run(shards, out, "--steps", "6")
    done = run(shards, out, "--resume", "--force", "--steps", "9", "--tokens_per_step", "1024")
    assert "forced:  rows_per_step: 8 when saved, 16 now" in done.stdout
    assert "9 steps instead of 6" in done.stdout
    saved = json.loads((out / "run.json").read_text())["config"]
    assert saved["tokens_per_step"] == 1024
    done = run(shards, out, "--resume", "--steps", "12", "--tokens_per_step", "512", expect=2)
    assert "--force goes on all the same" in done.stderr


def test_a_run_of_another_optimizer_is_not_resumed_even_by_force(finished, shards):
    done = run(shards, finished[0], "--resume", "--force", "--optimizer", "muon", expect=2)
    assert (
        "optimizer: 'adamw' when saved, 'muon' now" in done.stderr
        and "--init takes its weights" in done.stderr
    )


def test_an_existing_run_is_not_overwritten(finished, shards):
    out, _ = finished
    before = state_digest(out)
    done = run(shards, out, expect=2)
    assert "--resume" in done.stderr and state_digest(out) == before


def test_flags_change_the_shape_of_a_preset_but_not_of_a_folder(shards, finished):
    tokenizer, plain = tok.load_tokenizer(shards), M.PRESETS["tiny"]
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 2048}
    config = train.model_config(train.TrainConfig("out", preset="tiny", **shape), tokenizer)
    assert shape.items() <= vars(config).items()
    assert config.num_attention_heads == 2 * plain.num_attention_heads and config.head_dim == plain.head_dim
    for name, value in shape.items():
        with pytest.raises(ValueError, match=f"takes the shape of its folder; leave out .*--{name}"):
            train.model_config(train.TrainConfig("out", init=str(finished[0]), **{name: value}), tokenizer)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "demoo"], "neither a folder with a config.json nor one of tiny, demo"),
        (["--row_tokens", "4096"], "exceeds the model's context"),
        (["--tokens_per_step", "32"], "take for example"),
        (["--steps", "3", "--tokens", "100"], "exclude each other"),
        (["--vocab_size", "128"], "the tokenizer has 320 tokens"),
        (["--preset", "xuanyuan-6b", "--hidden_size", "1000"], "not a multiple of the head size"),
        (["--data", ""], "--data is missing"),
        (["--resume"], "no run to resume"),
        (["--data", "nowhere"], "no tokenizer here"),
        (["--attention", "triton"], "no Triton kernel can run here .KERNELS=torch.; choose auto or sdpa"),
        (["--sample", "很长" * 200, "--row_tokens", "64"], "tokens long; a row has 64"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(shards, tmp_path, capsys, flags, message):
    import tyro

    cfg = tyro.cli(train.TrainConfig, args=["--data", str(shards), "--out", str(tmp_path / "run"), *flags])
    with pytest.raises(ValueError, match=message):
        train.main(cfg)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_stops_the_run_and_leaves_the_earlier_steps_whole(shards, tmp_path):
    """RLIMIT_FSIZE makes every file larger than the limit fail, as a full disk does."""
    out = tmp_path / "run"
    run(shards, out, "--steps", "3")
    limit = "import resource, signal, sys, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,) * 2); sys.argv = sys.argv[1:]; "
    limit += "runpy.run_path('train.py', run_name='__main__')"
    flags = ["train.py", "--out", str(out), "--resume", "--steps", "6", "--eval_every", "0"]
    done = run_script("-c", limit, *flags, OMP_NUM_THREADS=1)
    assert done.returncode == 2 and "could not be written" in done.stderr, done.stderr
    assert [p.name for p in state.saved_steps(out)] == ["step_0000003"]
    assert state.damage(out / "step_0000003") is None and not list(out.glob("*.tmp"))


def test_the_axis_of_the_plot_says_what_a_loss_is_the_mean_of(tmp_path):
    drawn = {}
    for unit in ("tokens", "pairs", "tokens again"):
        (tmp_path / unit).mkdir()
        row = {"step": 1, "loss": 0.5, f"{unit.split()[0]}_per_second": 9.0}
        (tmp_path / unit / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        assert common.plot_metrics(tmp_path / unit / "metrics.jsonl", {"loss": "training"}) is None
        drawn[unit] = (tmp_path / unit / "loss.png").read_bytes()
    assert drawn["tokens"] == drawn["tokens again"] != drawn["pairs"]


@pytest.mark.parametrize("field", ["lr", "clip", "log_every", "keep", "dropout", "tokens_per_step"])
def test_a_value_out_of_range_is_refused(field):
    with pytest.raises(ValueError, match=f"--{field} -1 must"):
        train.TrainConfig("x", **{field: -1})


def test_only_a_language_model_can_be_pretrained(shards, tmp_path):
    config = M.ModelConfig("llama", 320, 16, 1, 2, 32, 64, head="score")
    model = M.build(config)
    M.init_weights(model, 1)
    checkpoint.save_model(model, tmp_path / "reward")
    with pytest.raises(ValueError, match="needs a language-model head, not 'score'"):
        train.model_config(train.TrainConfig("x", init=str(tmp_path / "reward")), tok.load_tokenizer(shards))
    ids = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="predicts no tokens"):
        model(ids, ids)


def test_plan_shares_rows_over_ranks_and_micro_batches(shards):
    cfg = train.TrainConfig("x", tokens_per_step=64 * 48, micro_tokens=64 * 10, row_tokens=64, steps=5)
    p = train.plan(cfg, 64, data.Shards([shards], "train").tokens, world=2)
    assert (p.rows_per_step, p.micro_rows) == (48, 8)  # 24 rows a rank: 8 is its largest divisor up to 10


def test_a_published_preset_keeps_its_vocabulary(shards):
    tokenizer = tok.load_tokenizer(shards)
    cfg = train.TrainConfig("x", preset="xuanyuan-6b")
    assert train.model_config(cfg, tokenizer).vocab_size == 39438
    assert train.model_config(train.TrainConfig("x"), tokenizer).vocab_size == 320
