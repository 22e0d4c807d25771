"""Faults, each really made: processes killed, stopped, slowed down while torchrun trains; what is left of the run.

The end of this file is what torchrun starts in these tests: train.py, with one fault put in. Rows of the list that are
not here: 1, 2, 6, 11, 13, 15, 20 in test_parallel.py; 3, 14, 16 in test_train.py; 8, 9, 21, 22, 23 in test_state.py;
17 in test_plan.py.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import packed_corpus

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpoint
import common
import state

ROOT = Path(__file__).resolve().parent.parent
ONE = common.Process(0, 1, "cpu")
FLAGS = [
    *(
        "--preset",
        "tiny",
        "--tokens_per_step",
        "512",
        "--micro_tokens",
        "256",
        "--row_tokens",
        "64",
        "--steps",
        "10",
    ),
    *("--lr", "3e-3", "--dropout", "0.1", "--save_every", "4", "--eval_every", "0", "--log_every", "1"),
    *("--peak_tflops", "1", "--dtype", "float32", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return packed_corpus(tmp_path_factory.mktemp("corpus"), 300, (1, 9), 300)


def start(shards, out, fault="", *more, ranks=2, launcher=(), **options) -> subprocess.Popen:
    """Start a run under torchrun; fault is "kind:rank:step", see `make_fault`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [*command, *launcher, __file__, "--data", str(shards), "--out", str(out), *FLAGS, *more],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "FAULT": fault},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def end(started: subprocess.Popen, timeout: float = 150) -> tuple[int, str]:
    out, err = started.communicate(timeout=timeout)
    return started.returncode, out + err


def digests(run: Path, step: int = 10) -> dict:
    """The SHA-256 of every rank's file: parameters, moments, RNG."""
    files = state.read_manifest(run / f"step_{step:07d}")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if "rank-" in name}


@pytest.fixture(scope="module")
def finished_run(shards, tmp_path_factory):
    """An uninterrupted run of two ranks."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    code, said = end(start(shards, out))
    assert code == 0, said
    return out


@pytest.fixture(scope="module")
def finished(finished_run):
    """The digests of its rank files."""
    return digests(finished_run)


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["kill:1:7", "raise:0:7", "kill-in-save:1:8", "kill-before-manifest:0:8"])
def test_torchrun_starts_anew_and_the_run_goes_on_exactly(shards, finished, tmp_path, fault):
    """A rank is killed in a step, raises, is killed in the midst of saving; rank 0 before the manifest."""
    code, said = end(start(shards, tmp_path / "run", fault, launcher=("--max-restarts", "1")))
    assert code == 0, said
    assert "resuming from" in said and "step_0000004" in said
    assert digests(tmp_path / "run") == finished
    assert not list((tmp_path / "run").glob("*.tmp"))


@pytest.mark.faults
def test_a_run_killed_before_its_first_step_was_saved_starts_anew(shards, finished, tmp_path):
    code, said = end(start(shards, tmp_path / "run", "kill:1:2", launcher=("--max-restarts", "1")))
    assert code == 0, said
    assert digests(tmp_path / "run") == finished


@pytest.mark.faults
def test_a_restart_does_not_go_on_with_a_run_of_another_launch(shards, finished_run):
    """It was refused in the first attempt, and must be in the second."""
    before = digests(finished_run)
    code, said = end(start(shards, finished_run, "", "--steps", "20", launcher=("--max-restarts", "1")))
    assert code == 1 and said.count("exists and is not empty") >= 2
    assert (
        digests(finished_run) == before
        and [p.name for p in state.saved_steps(finished_run)][-1] == "step_0000010"
    )


@pytest.mark.faults
def test_a_killed_rank_ends_the_job_with_its_number(shards, tmp_path):
    code, said = end(start(shards, tmp_path / "run", "kill:1:7"))
    assert code == 1 and "rank      : 1 (local_rank: 1)" in said and "SIGKILL" in said
    assert "no sign of rank 1" in said  # the other rank's own words
    assert state.newest_step(tmp_path / "run", ONE).name == "step_0000004"


@pytest.mark.faults
def test_a_frozen_rank_is_named_when_the_time_is_up(shards, tmp_path):
    started = start(
        shards, tmp_path / "run", "freeze:1:7", "--timeout", "8", launcher=("--shutdown-timeout", "2")
    )
    code, said = end(started, timeout=90)
    assert code == 1 and "no sign of rank 1" in said


@pytest.mark.faults
def test_workers_save_and_stop_when_the_launcher_is_killed_and_lock_the_run_until_then(
    shards, finished, tmp_path
):
    out = tmp_path / "run"
    started = start(shards, out, "slow:0:3", start_new_session=True)
    wait_for_step(out, 2, started)
    started.kill()
    code, said = end(start(shards, out, "", "--resume"))
    assert code == 1 and "trains here; wait until it has ended" in said, said
    give_up = time.monotonic() + 60
    while state.saved_steps(out) == [] or list(out.glob("*.tmp")):
        assert time.monotonic() < give_up, "the orphans did not save"
        time.sleep(0.2)
    for _ in range(100):  # the lock is free as soon as rank 0 has ended
        code, said = end(start(shards, out, "", "--resume"))
        if "trains here" not in said:
            break
    assert code == 0, said
    assert digests(out) == finished


@pytest.mark.faults
def test_twenty_ends_under_gloo_leave_the_exit_code_zero(tmp_path):
    """A plain exit under gloo aborts now and then after all work is done (pytorch#190489)."""
    script = tmp_path / "end.py"
    script.write_text(
        "import common, torch, torch.distributed as dist\n"
        "process = common.start_process('cpu')\n"
        "x = torch.ones(1000)\n"
        "[dist.all_reduce(x) for _ in range(20)]\n"
        "common.finish_process(0)\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    codes = [subprocess.run(command, env=env, capture_output=True, timeout=60).returncode for _ in range(20)]
    assert codes == [0] * 20


def wait_for_step(out: Path, step: int, started: subprocess.Popen) -> None:
    while not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count('"loss"') >= step
    ):
        assert started.poll() is None, "the run ended before it could be stopped"
        time.sleep(0.02)


# --- what torchrun starts ------------------------------------------------------------------------------------


def make_fault(kind: str, rank: int, step: int) -> None:
    """Put a fault into rank `rank`, at its step `step`, in the first of torchrun's attempts."""
    import train

    if int(os.environ["RANK"]) != rank or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return

    def strike():
        if kind == "raise":
            raise KeyError("a fault")
        if kind == "slow":
            time.sleep(25)
        else:
            os.kill(os.getpid(), signal.SIGSTOP if kind == "freeze" else signal.SIGKILL)

    def before(module, name: str, when) -> None:
        original = getattr(module, name)

        def wrapper(*args, **kwargs):
            if when(*args):
                strike()
            return original(*args, **kwargs)

        setattr(module, name, wrapper)

    if kind == "kill-in-save":  # its rows are written, the manifest is not
        before(checkpoint, "write_model", lambda model, folder, *_: f"{step:07d}" in str(folder))
    elif kind == "kill-before-manifest":
        before(
            common, "write_json", lambda path, *_: path.name == "manifest.json" and f"{step:07d}" in str(path)
        )
    else:
        count = iter(range(1, 10**9))  # 8 rows of a step, 4 of a rank: one micro-batch a step
        before(train, "next_token_loss", lambda *_: next(count) == step)


if __name__ == "__main__":
    import train

    with contextlib.suppress(ValueError):
        kind, rank, step = os.environ["FAULT"].split(":")
        make_fault(kind, int(rank), int(step))
    common.run(train.main, doc=train.__doc__)
