"""A run on disk comes back bit for bit, into any number of processes, or not at all; nobody else gets in its way."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, disk_full_after, launch, run_script
from safetensors.torch import load_file, save_file

import checkpoint
import common
import model as decoder
import state
from model import ModelConfig
from parallel import ParallelConfig, parallelize

ONE = common.Process(0, 1, "cpu")
RANK, MANIFEST = "state/rank-00000.safetensors", "state/manifest.json"


# --- helpers -------------------------------------------------------------------------------------------------


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder):
    """Digests of all files below a folder."""
    return {str(p.relative_to(folder)): sha(p) for p in folder.rglob("*") if p.is_file()}


def own_config(**changes):
    shape = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 88, "dropout": 0.1}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return ModelConfig("llama", **shape | tokens | {"max_position_embeddings": 128} | changes)


# --- one process ---------------------------------------------------------------------------------------------


def train_step(model, optimizer):
    rows = torch.randint(model.config.vocab_size, (2, 13))  # from the global RNG, as dropout is
    if model.config.head == "score":
        loss = (model(rows) - 1).square().mean()
    else:
        loss = model(rows[:, :-1], rows[:, 1:].contiguous()).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def fresh(seed, **changes):
    """A small model with dropout and its optimizer, which has no state yet."""
    made = decoder.build(own_config(**changes))
    decoder.init_weights(made, seed)
    return made.train(), torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.1)


def trained(seed=0, steps=3, **changes):
    torch.manual_seed(seed)
    made, optimizer = fresh(seed, **changes)
    for _ in range(steps):
        train_step(made, optimizer)
    return made, optimizer


def everything(model, optimizer):
    """All that a resumed run needs, as one dict of tensors; torch's own state dicts, not our code."""
    out = {f"parameter/{n}": p.detach().clone() for n, p in model.named_parameters()}
    names = [n for n, _ in model.named_parameters()]
    for i, values in optimizer.state_dict()["state"].items():
        out |= {f"{key}/{names[i]}": value.clone() for key, value in values.items()}
    return out


def assert_equal_dicts(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head": "score"}], ids=str)
def test_resumed_training_continues_bit_for_bit(changes, tmp_path):
    made, optimizer = trained(**changes)
    extra = {"position": [3, 17], "名": "训练", "lr": 1e-2}
    folder = state.save_step(tmp_path, 3, made, optimizer, extra, ONE)
    before, rng = everything(made, optimizer), torch.get_rng_state()
    losses = [train_step(made, optimizer) for _ in range(3)]
    after = everything(made, optimizer)

    other, its_optimizer = fresh(seed=9, **changes)
    torch.manual_seed(12345)
    assert state.newest_step(tmp_path, ONE) == folder
    assert state.load_step(folder, other, its_optimizer, ONE) == extra
    assert torch.equal(torch.get_rng_state(), rng)
    assert_equal_dicts(everything(other, its_optimizer), before)
    assert any(k.startswith("step/") for k in before) and any(k.startswith("exp_avg_sq/") for k in before)
    assert [train_step(other, its_optimizer) for _ in range(3)] == losses
    assert_equal_dicts(everything(other, its_optimizer), after)


def test_loaded_state_saves_again_to_the_same_bytes(tmp_path):
    made, optimizer = trained()
    first = state.save_step(tmp_path / "a", 3, made, optimizer, {"k": 1}, ONE)
    other, its_optimizer = fresh(seed=9)
    extra = state.load_step(first, other, its_optimizer, ONE)
    second = state.save_step(tmp_path / "b", 3, other, its_optimizer, extra, ONE)
    assert {"model.safetensors", RANK, MANIFEST} <= set(tree(first))
    assert tree(first) == tree(second)


def test_saved_step_is_a_model_folder_in_the_dtype_asked_and_the_state_stays_fp32(tmp_path):
    import transformers as tf

    made, optimizer = trained()
    folder = state.save_step(tmp_path, 3, made, optimizer, {}, ONE, dtype=torch.bfloat16)
    assert (tmp_path / "latest").read_text().strip() == folder.name == "step_0000003"
    theirs = tf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    for name, p in checkpoint.load_model(tmp_path).named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, theirs[checkpoint.hf_name(name, "llama")])
    held = load_file(folder / RANK)
    assert all(t.dtype == torch.float32 for n, t in held.items() if not n.startswith("rng/"))
    assert torch.equal(held["parameter/embed_tokens.weight"], made.embed_tokens.weight)


def test_manifest_holds_the_digest_and_size_of_every_other_file_of_the_step(tmp_path):
    folder = state.save_step(tmp_path, 3, *trained(), {"tokens": 78}, ONE)
    manifest = state.read_manifest(folder)
    files = tree(folder)
    del files[MANIFEST]
    assert {"model.safetensors", "config.json", RANK} <= set(files)
    assert manifest["files"] == {
        n: {"bytes": (folder / n).stat().st_size, "sha256": d} for n, d in files.items()
    }
    assert (manifest["step"], manifest["world"], manifest["extra"]) == (3, 1, {"tokens": 78})
    assert manifest["shapes"]["parameter/embed_tokens.weight"] == [101, 32]
    assert state.damage(folder) is None


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "run"
    made, optimizer = trained()
    state.save_step(run, 1, made, optimizer, {"at": 1}, ONE)
    train_step(made, optimizer)
    state.save_step(run, 2, made, optimizer, {"at": 2}, ONE)
    return run


@pytest.fixture
def run(two_steps, tmp_path):
    """A copy of a run with the whole steps 1 and 2."""
    return shutil.copytree(two_steps, tmp_path / "run")


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "a flipped bit in the middle of the rank file": (RANK, flip),
    "a flipped bit in the header of the rank file": (RANK, lambda p: flip(p, 0.001)),
    "a flipped bit in the last byte of the rank file": (RANK, lambda p: flip(p, 0.9999999)),
    "a truncated rank file": (RANK, cut),
    "an empty rank file": (RANK, lambda p: p.write_bytes(b"")),
    "a zeroed rank file": (RANK, zero),
    "a missing rank file": (RANK, Path.unlink),
    "a longer rank file": (RANK, lambda p: p.write_bytes(p.read_bytes() + b"\0")),
    "a truncated manifest": (MANIFEST, cut),
    "an empty manifest": (MANIFEST, lambda p: p.write_bytes(b"")),
    "a zeroed manifest": (MANIFEST, zero),
    "a missing manifest": (MANIFEST, Path.unlink),
    "a manifest that is a list": (MANIFEST, lambda p: p.write_text("[]")),
    "a manifest of odd types": (MANIFEST, lambda p: p.write_text('{"files": [1]}')),
    "a manifest of another data position": (MANIFEST, lambda p: p.write_text(p.read_text().replace('"at": 2', '"at": 3'))),
    "a flipped bit in the weights": ("model.safetensors", flip),
    "missing weights": ("model.safetensors", Path.unlink),
    "a flipped bit in config.json": ("config.json", flip),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_step_is_named_and_the_next_older_one_is_taken(what, run, capsys):
    name, spoil = DAMAGES[what]
    assert state.newest_step(run, ONE) == run / "step_0000002"
    assert capsys.readouterr().err == ""
    spoil(run / "step_0000002" / name)
    assert state.newest_step(run, ONE) == run / "step_0000001"
    err = capsys.readouterr().err
    assert str(run / "step_0000002" / name) in err and "damaged step" in err
    assert state.load_step(run / "step_0000001", *fresh(9), ONE) == {"at": 1}


def test_every_flipped_bit_of_a_manifest_is_noticed(run):
    path = run / "step_0000002" / MANIFEST
    data, value = path.read_bytes(), json.loads(path.read_bytes())
    for at in range(0, len(data), 11):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        if state.damage(path.parent.parent) is None:
            assert json.loads(path.read_bytes()) == value  # 1e-05 and 1E-05 are one number


def test_truncated_file_is_reported_with_both_sizes(run):
    path = run / "step_0000002" / RANK
    size = path.stat().st_size
    cut(path)
    assert state.damage(run / "step_0000002") == f"{path}: {size // 2} bytes instead of {size}"


def test_a_run_of_damaged_steps_only_is_refused_with_all_of_them_listed(run, capsys):
    flip(run / "step_0000001" / RANK)
    (run / "step_0000002" / "model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        state.newest_step(run, ONE)
    for text in (str(error.value), capsys.readouterr().err):
        assert f"{run / 'step_0000001' / RANK}: damaged" in text
        assert f"{run / 'step_0000002' / 'model.safetensors'}: missing" in text


@pytest.mark.parametrize("exists", [True, False])
def test_a_run_without_steps_is_refused(exists, tmp_path):
    if exists:
        (tmp_path / "run" / "step_0000001.tmp").mkdir(parents=True)
    with pytest.raises(ValueError, match="no saved step to resume from"):
        state.newest_step(tmp_path / "run", ONE)


def test_half_written_step_is_ignored_and_removed_by_prune(run):
    shutil.copytree(run / "step_0000002", run / "step_0000003.tmp")
    assert state.newest_step(run, ONE) == run / "step_0000002"
    assert [p.name for p in state.saved_steps(run)] == ["step_0000001", "step_0000002"]
    state.prune(run, keep=5)
    assert sorted(p.name for p in run.iterdir()) == ["latest", "step_0000001", "step_0000002"]


@pytest.mark.parametrize("keep, left", [(0, [2, 3, 10, 10000000]), (1, [10000000]), (2, [10, 10000000]), (9, [2, 3, 10, 10000000])])  # fmt: skip
def test_prune_keeps_the_newest_steps_by_number_and_everything_that_is_no_step(keep, left, tmp_path):
    for name in ("step_0000002", "step_0000010", "step_0000003", "step_10000000", "step_x", "notes"):
        (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / "step_0000001").write_text("a file")
    state.prune(tmp_path, keep)
    others = ["notes", "step_0000001", "step_x"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others + [f"step_{n:07d}" for n in left])


def test_newest_step_is_the_one_of_the_highest_number(run):
    (run / "step_0000002").rename(run / "step_12345678")  # an eighth digit sorts wrongly as text
    shutil.copytree(run / "step_0000001", run / "step_9999999")
    assert state.newest_step(run, ONE) == run / "step_12345678"


def test_leftover_of_a_killed_save_of_the_same_step_does_no_harm(tmp_path):
    made, optimizer = trained()
    rubbish = tmp_path / "step_0000003.tmp" / "state"
    rubbish.mkdir(parents=True)
    (rubbish / "rank-00007.safetensors").write_bytes(b"old")
    folder = state.save_step(tmp_path, 3, made, optimizer, {}, ONE)
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    assert state.damage(folder) is None and not rubbish.exists()


def test_saving_a_step_again_replaces_it(run):
    made, optimizer = trained(seed=4)
    state.save_step(run, 2, made, optimizer, {"at": "again"}, ONE)
    other, its_optimizer = fresh(9)
    assert state.load_step(state.newest_step(run, ONE), other, its_optimizer, ONE) == {"at": "again"}
    assert_equal_dicts(everything(other, its_optimizer), everything(made, optimizer))
    assert sorted(p.name for p in run.iterdir()) == ["latest", "step_0000001", "step_0000002"]


@pytest.mark.parametrize("changes, words", [({"hidden_size": 64}, "embed_tokens.weight"), ({"num_hidden_layers": 3}, "layers.2.mlp.up_proj.weight"), ({"num_hidden_layers": 1}, "layers.1.mlp.up_proj.weight"), ({"head": "score"}, "score.weight")])  # fmt: skip
def test_state_of_another_model_is_refused_and_changes_nothing(changes, words, run):
    other, optimizer = fresh(9, **changes)
    before = everything(other, optimizer)
    with pytest.raises(ValueError, match="the saved state is of another model") as error:
        state.load_step(run / "step_0000002", other, optimizer, ONE)
    assert words in str(error.value)
    assert_equal_dicts(everything(other, optimizer), before)


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("size, extra", [(1000, ""), (40_000, ""), (1_000_000, "x" * 2_000_000)])
def test_full_disk_is_a_clear_error_and_leaves_the_earlier_steps_as_they_were(step, size, extra, run):
    made, optimizer = trained(seed=4)
    before = tree(run)
    with (
        disk_full_after(size),
        pytest.raises(ValueError, match="could not be written; the earlier steps are intact"),
    ):
        state.save_step(run, step, made, optimizer, {"long": extra}, ONE)
    assert tree(run) == before
    assert state.newest_step(run, ONE) == run / "step_0000002"
    folder = state.save_step(run, step, made, optimizer, {}, ONE)  # and the next attempt works
    assert state.damage(folder) is None


def test_file_in_the_place_of_the_run_is_a_clear_error(run):
    (run / "step_0000003.tmp").write_text("in the way")
    with pytest.raises(ValueError, match="could not be written; the earlier steps are intact"):
        state.save_step(run, 3, *trained(), {}, ONE)
    assert state.newest_step(run, ONE) == run / "step_0000002"


# --- nothing that a file says is trusted ---------------------------------------------------------------------


def craft(folder, change):
    """Change a manifest and give it the digest that belongs to it."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    manifest = change(manifest) or manifest
    manifest["digest"] = state.fingerprint(manifest)
    path.write_text(json.dumps(manifest))


def put(**values):
    return lambda manifest: manifest.update(values)


def put_file(name, written=None):
    written = {"bytes": 1, "sha256": ""} if written is None else written
    return lambda manifest: manifest["files"].update({name: written})


MANIFESTS = {
    "a number for the folder of files": put(files=7),
    "a list of files": put(files=[]),
    "no files": put(files={}),
    "a text as step": put(step="2"),
    "no world": lambda manifest: {k: v for k, v in manifest.items() if k != "world"},
    "true for a number": put(world=True),
    "a million ranks": put(world=10**6, shards=10**6),
    "no ranks": put(world=0, shards=0),
    "less than no ranks": put(shards=-1, replicas=-1),
    "another product": put(shards=2),
    "null for extra": put(extra=None),
    "a file above": put_file("../latest"),
    "a file from the root": put_file("/etc/passwd"),
    "a file in the folder above": put_file(".."),
    "a file of no name": put_file(""),
    "a file behind a backslash": put_file("..\\latest"),
    "a file in a folder": put_file("other/model.safetensors"),
    "a hidden way up": put_file("state/../../latest"),
    "a second file of one rank": put_file("state/rank-000000.safetensors"),
    "a rank too many": put_file("state/rank-00001.safetensors"),
    "a newline in a name": put_file("model.safetensors\n"),
    "a zero in a name": put_file("a\0b"),
    "a file without a digest": put_file("extra.json", {"bytes": 1}),
    "a file that is a number": put_file("extra.json", 3),
    "shapes that are a list": put(shapes=[]),
    "a shape of texts": lambda m: m["shapes"].update({"parameter/norm.weight": ["x"]}),
    "a negative shape": lambda m: m["shapes"].update({"parameter/norm.weight": [-1]}),
    "a shape that is a number": lambda m: m["shapes"].update({"parameter/norm.weight": 32}),
    "a tensor without a kind": lambda m: m["shapes"].update({"norm.weight": [32]}),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_crafted_manifest_is_refused_with_its_name_and_the_older_step_is_taken(what, run, capsys):
    folder = run / "step_0000002"
    craft(folder, MANIFESTS[what])
    for read in (state.read_manifest, lambda f: state.load_step(f, *fresh(9), ONE)):
        with pytest.raises(ValueError, match=f"^{folder / MANIFEST}: "):
            read(folder)
    assert state.newest_step(run, ONE) == run / "step_0000001"
    assert state.best_step(run) is None


RAW = {
    "deep": b"[" * 100_000,
    "many digits": b'{"step": ' + b"9" * 5000 + b"}",
    "not UTF-8": b"\xff\xfe{}",
    "a pickle": pickle.dumps({"step": 1}),
    "a text": b'"manifest"',
}


@pytest.mark.parametrize("what", [*RAW, "a folder"])
def test_anything_else_in_the_place_of_a_manifest_is_refused_with_its_name(what, run):
    path = run / "step_0000002" / MANIFEST
    path.unlink()
    path.write_bytes(RAW[what]) if what in RAW else path.mkdir()
    with pytest.raises(ValueError, match=f"^{path}: (cannot be read|damaged)"):
        state.read_manifest(run / "step_0000002")
    assert state.newest_step(run, ONE) == run / "step_0000001"


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def refresh_digest(folder, name=RANK):
    craft(folder, lambda m: m["files"].update({name: state.digest(folder / name)}))


def test_pickle_in_the_place_of_a_rank_file_is_refused_and_never_opened(run, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    folder = run / "step_0000002"
    (folder / RANK).write_bytes(pickle.dumps(Bomb()))
    refresh_digest(folder)
    assert state.newest_step(run, ONE) == folder  # whoever can write here can also write digests
    with pytest.raises(ValueError, match=f"{folder / RANK}: not a whole safetensors file"):
        state.load_step(folder, *fresh(9), ONE)
    assert not (tmp_path / "exploded").exists()


TENSORS = {
    "a missing parameter": ({"parameter/norm.weight": None}, "norm.weight"),
    "a missing moment": ({"exp_avg/norm.weight": None}, "exp_avg/norm.weight"),
    "fewer rows": ({"parameter/norm.weight": torch.zeros(31)}, "shape [31] instead of [32]"),
    "a matrix for a vector": ({"parameter/norm.weight": torch.zeros(32, 2)}, "shape [32, 2] instead of [32]"),
    "a counter with rows": ({"step/norm.weight": torch.zeros(4)}, "shape [4] instead of []"),
    "no random numbers": ({"rng/cpu": None}, "no state of the random number generator"),
    "random numbers of another kind": ({"rng/cpu": torch.zeros(9)}, "no state of the random number generator"),
    "too few of them": ({"rng/cpu": torch.zeros(9, dtype=torch.uint8)}, "no state of the random number generator"),
    "a state that cannot be": ({"rng/cpu": torch.full((5056,), 255, dtype=torch.uint8)}, "no state of the random"),
}  # fmt: skip


@pytest.mark.parametrize("what", TENSORS)
def test_crafted_rank_file_is_refused_with_its_name(what, run):
    folder, (changes, words) = run / "step_0000002", TENSORS[what]
    held = load_file(folder / RANK) | changes
    save_file({name: t for name, t in held.items() if t is not None}, folder / RANK)
    refresh_digest(folder)
    with pytest.raises(ValueError) as error:
        state.load_step(folder, *fresh(9), ONE)
    assert str(error.value).startswith(f"{folder / RANK}: ") and words in str(error.value)


def test_state_of_a_parameter_that_is_not_trained_now_is_refused(run):
    made, _ = fresh(9)
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p is not made.norm.weight])
    with pytest.raises(ValueError, match="trained when it was saved, but not now: norm.weight"):
        state.load_step(run / "step_0000002", made, optimizer, ONE)


@pytest.mark.parametrize("fused, device", [(True, "parameter"), (False, "cpu")])
def test_the_optimizer_gets_the_kind_of_step_counter_that_it_makes_itself(fused, device, run):
    made, _ = fresh(9)
    optimizer = torch.optim.AdamW(made.parameters(), fused=fused)
    state.load_step(run / "step_0000002", made, optimizer, ONE)
    loaded = {n: (v.dtype, v.device, v.shape) for n, v in optimizer.state[made.norm.weight].items()}
    own, own_optimizer = fresh(9)
    own_optimizer = torch.optim.AdamW(own.parameters(), fused=fused)
    train_step(own, own_optimizer)
    assert loaded == {
        n: (v.dtype, v.device, v.shape) for n, v in own_optimizer.state[own.norm.weight].items()
    }
    train_step(made, optimizer)


# --- the best step, and room for all -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """One saved step of a very small model."""
    made = decoder.build(own_config(vocab_size=8, hidden_size=8, num_hidden_layers=1, intermediate_size=8))
    decoder.init_weights(made, 1)
    return state.save_step(
        tmp_path_factory.mktemp("bare"), 1, made, torch.optim.AdamW(made.parameters()), {}, ONE
    )


@pytest.fixture
def losses(bare, tmp_path):
    """A function that makes a run whose step N has the N-th validation loss."""

    def make(*values):
        for step, value in enumerate(values, 1):
            folder = shutil.copytree(bare, tmp_path / "run" / f"step_{step:07d}")
            evaluation = value if isinstance(value, dict) or value is None else {"val_loss": value}
            craft(folder, put(step=step, extra={"evaluation": evaluation}))
        return tmp_path / "run"

    return make


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "values, best",
    [
        ([3.0, 2.0, 2.5], 2), ([NAN, 2, 3], 2), ([-INF, INF, 4.5], 3), ([None, {}, 1.5], 3), ([2.0, 2.0], 1),
        ([NAN], None), ([], None), ([None, {"val_loss": "1"}, {"val_loss": None}], None), ([10**400, 7.0], 2),
        ([{"val_loss": [1]}, {"other": 1.0, "val_loss": 9.0}], 2),
    ],
)  # fmt: skip
def test_best_step_has_the_lowest_finite_loss(values, best, losses):
    run = losses(*values)
    assert state.best_step(run) == (best and run / f"step_{best:07d}")


def test_best_step_by_another_measure(losses):
    run = losses({"val_loss": 1.0, "bits_per_byte": 0.9}, {"val_loss": 2.0, "bits_per_byte": 0.8})
    assert state.best_step(run, "bits_per_byte").name == "step_0000002"


def test_a_step_with_a_damaged_manifest_is_never_the_best(losses):
    run = losses(1.0, 2.0, 3.0)
    flip(run / "step_0000001" / MANIFEST)
    assert state.best_step(run).name == "step_0000002"


@pytest.mark.parametrize("keep, keep_best, left, best", [(2, True, [2, 4, 5], 2), (2, False, [4, 5], 4), (4, True, [2, 3, 4, 5], 2), (1, True, [2, 5], 2), (0, True, [1, 2, 3, 4, 5], 2), (1, False, [5], 5), (9, False, [1, 2, 3, 4, 5], 2)])  # fmt: skip
def test_prune_keeps_the_best_step_if_asked_and_names_the_best_that_is_left(
    keep, keep_best, left, best, losses
):
    run = losses(5.0, 1.0, 4.0, 2.0, 3.0)
    state.prune(run, keep, keep_best)
    assert [int(p.name[5:]) for p in state.saved_steps(run)] == left
    assert (run / "best").read_text() == f"step_{best:07d}\n"
    state.prune(run, keep, keep_best)
    assert [int(p.name[5:]) for p in state.saved_steps(run)] == left


def test_best_is_removed_when_no_step_with_a_loss_is_left(losses):
    run = losses(1.0, None)
    state.prune(run, 2)
    assert (run / "best").read_text() == "step_0000001\n"
    state.prune(run, 1)
    assert not (run / "best").exists()


def test_setting_aside_the_best_and_the_latest_step_names_others(losses):
    run = losses(3.0, 2.0, 1.0)
    state.prune(run, 3)
    (run / "latest").write_text("step_0000003\n")
    flip(run / "step_0000003" / RANK)
    state.set_aside(run, state.newest_step(run, ONE))
    assert (run / "best").read_text() == (run / "latest").read_text() == "step_0000002\n"
    assert (run / "step_0000003.damaged").is_dir() and len(state.saved_steps(run)) == 2
    assert checkpoint.model_folder(run) == run / "step_0000002"


def test_saving_a_step_names_the_best(tmp_path):
    made = trained(steps=1)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None)):
        extra = {"evaluation": {"val_loss": loss} if loss else None}
        state.save_step(tmp_path, step, *made, extra, ONE)
        assert (tmp_path / "best").read_text() == f"step_{min(step, 2):07d}\n"
        assert (tmp_path / "latest").read_text() == f"step_{step:07d}\n"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen, keep_best", [(0, False), (0, True), (1, True)])
def test_disk_need_is_what_steps_really_take(dtype, frozen, keep_best, tmp_path):
    config = own_config(vocab_size=2000, hidden_size=128, intermediate_size=352)
    made = decoder.build(config)
    decoder.init_weights(made, 1)
    if frozen:
        made.embed_tokens.weight.requires_grad_(False)
    params = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params)
    train_step(made, optimizer)
    folder = state.save_step(tmp_path, 1, made, optimizer, {}, ONE, dtype=dtype)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    need = state.disk_need(config, sum(p.numel() for p in params), 2, dtype, keep_best=keep_best)
    assert abs(need / (size * (4 if keep_best else 3)) - 1) < 0.01


# --- one process group at a time -----------------------------------------------------------------------------

HOLD = "import sys, time, state, common\nfrom pathlib import Path\nstate.lock(Path(sys.argv[1]), common.Process(0, 1, 'cpu'))\nprint('held', flush=True)\ntime.sleep(100)"


def test_lock_keeps_a_second_process_out_and_is_free_when_the_first_is_killed(tmp_path):
    run = tmp_path / "deep" / "run"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen([sys.executable, "-c", HOLD, run], env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ValueError) as error:
            state.lock(run, ONE)
        holder = f"process {first.pid} on {socket.gethostname()}"
        assert (
            str(error.value)
            == f"{run}: {holder} trains here; wait until it has ended, or choose another --out"
        )
        state.lock(tmp_path / "deep", ONE)  # another folder is another matter
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    state.lock(run, ONE)
    assert (run / "lock").read_text().splitlines()[0] == f"process {os.getpid()} on {socket.gethostname()}"
    state.lock(run, ONE)  # once more by the same process: it has it already
    shutil.rmtree(run)
    state.lock(run, ONE)


@pytest.mark.parametrize("where", ["/proc/baizhi/run", "file/run", "file"])
def test_a_run_that_cannot_be_written_to_is_refused_before_anything_else(where, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match="run: no folder that can be|file: no folder that can be"):
        state.lock(tmp_path / where, ONE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_run_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="no folder that can be written to"):
        state.lock(tmp_path, ONE)


# --- cards ---------------------------------------------------------------------------------------------------

CARD = {
    "name": "墨 1", "stage": "pretraining", "model": dataclasses.asdict(own_config()), "parameters": 193_651_200,
    "tokens": 3_873_024_000, "steps": 1234, "data": {"zh": "ab12", "en\n## forged": "cd34"}, "tokenizer": "ef56",
    "optimizer": "AdamW, betas 0.9 0.95", "schedule": {"kind": "wsd", "lr": 5e-4}, "tokens_per_second": 123456.7,
    "mfu": 0.4321, "hfu": 0.5432, "devices": "8 x NVIDIA H100", "code": "0123abc-dirty",
    "evaluation": {"val_loss": 2.3456, "sample": "第一行\n第二行"},
}  # fmt: skip


def test_card_says_what_it_was_given_and_is_read_by_the_hub_library(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    assert state.write_cards(tmp_path, CARD) == ["run_card.json", "README.md"]
    assert json.loads((tmp_path / "run_card.json").read_text()) == CARD
    made = hub.ModelCard.load(tmp_path / "README.md")
    assert (made.data.language, made.data.library_name, made.data.tags) == (
        "zh",
        "baizhi",
        ["baizhi", "llama"],
    )
    assert made.data.pipeline_tag == "text-generation"
    for words in (
        "# 墨 1\n", "- Parameters: 193,651,200\n", "- Trained tokens: 3,873,024,000\n", "- Tokens per parameter: 20\n",
        "- Data: zh (fingerprint ab12); en ## forged (fingerprint cd34)\n", "- Tokenizer (SHA-256): ef56\n",
        "- Schedule: kind wsd, lr 0.0005\n", "some of it twice): 54.3%\n", "the mathematics needs): 43.2%\n",
        "- Devices: 8 x NVIDIA H100\n", "- Code: 0123abc-dirty\n", "- val_loss: 2.3456\n", "- sample: 第一行 第二行\n",
        "2 layers, 32 wide, 4 heads", "No reinforcement learning from human feedback", "falsehoods fluently",
        "weak in other languages", "was not measured", "Tokens per second: 1.2346e+05\n",
    ):  # fmt: skip
        assert words in made.text, words


def test_card_leaves_out_what_it_is_not_told(tmp_path):
    state.write_cards(tmp_path, {})
    text = (tmp_path / "README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Limits"]
    assert not any(c.isdigit() for c in text) and "None" not in text
    state.write_cards(tmp_path, {"alignment": "DPO on 1,000 pairs", "mfu": 0.0})
    text = (tmp_path / "README.md").read_text()
    assert "- Alignment: DPO on 1,000 pairs\n" in text and "No reinforcement" not in text
    assert "needs): 0.0%\n" in text and "HFU" not in text


def test_a_card_of_preferences_counts_pairs(tmp_path):
    state.write_cards(tmp_path, {"pairs": 12345, "pairs_per_second": 67.8})
    text = (tmp_path / "README.md").read_text()
    assert "- Trained pairs: 12,345\n" in text and "- Pairs per second: 67.8\n" in text
    assert "okens" not in text.partition("## Limits")[0]


def test_cards_of_a_step_are_under_its_digests(tmp_path):
    folder = state.save_step(tmp_path, 3, *trained(steps=1), {}, ONE, card=CARD)
    assert {"README.md", "run_card.json"} <= set(state.read_manifest(folder)["files"])
    assert state.damage(folder) is None
    rows = folder / "state" / "rank-00000.safetensors"
    rows.write_bytes(rows.read_bytes()[:-1])
    assert "rank-00000" in state.damage(folder) and state.damage(folder, tensors=False) is None
    (folder / "README.md").write_text("another")
    assert "README.md: 7 bytes instead of" in state.damage(folder)


def test_code_version_is_the_commit_and_says_if_files_were_changed(tmp_path):
    if not shutil.which("git"):
        pytest.skip("no git")
    git = lambda *words: subprocess.run(  # noqa: E731
        ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (tmp_path / "state.py").write_text("1")
    without = state.code_version(tmp_path)
    assert without.startswith("sha256:") and len(without) == 7 + 64
    git("init", "-q")
    assert state.code_version(tmp_path) == without  # a checkout, but not of these files
    git("add", "state.py")
    git("commit", "-q", "-m", "first")
    assert state.code_version(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "out").mkdir()  # what is not in the checkout is not the code
    assert state.code_version(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "state.py").write_text("2")
    assert state.code_version(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_code_version_without_git_is_a_digest_of_the_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("a.py", "kernels/b.py", "notes.txt", "tests/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = state.code_version(tmp_path)
    for name, same in (("notes.txt", True), ("tests/c.py", True), ("a.py", False), ("kernels/b.py", False)):
        (tmp_path / name).write_text("other")
        assert (state.code_version(tmp_path) == before) == same, name
        before = state.code_version(tmp_path)


# --- command line --------------------------------------------------------------------------------------------


def test_command_check_names_the_damaged_step_of_a_run(run, capsys):
    state.check(state.Check(str(run)))
    assert capsys.readouterr().out.count(": whole\n") == 2
    (run / "step_0000002" / "config.json").write_text("{}")
    done = run_script("state.py", "check", run)
    assert done.returncode == 2 and "not every step is whole" in done.stderr
    assert done.stdout.count(": whole\n") == 1
    assert f"{run / 'step_0000002' / 'config.json'}: 2 bytes instead of" in done.stdout
    with pytest.raises(ValueError, match="no saved step here"):
        state.check(state.Check(str(run.parent / "none")))


# --- several processes ---------------------------------------------------------------------------------------

SMALL = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 44, "num_hidden_layers": 1, "dropout": 0.0}
CASES = {  # 37 and 44 rows are cut unevenly
    # a head of one row; some parameters are not trained; of the matrices the optimizer keeps another thing
    "frozen": {"head": "score"},
    "tied": {"tie_word_embeddings": True},
}
MODES = {
    "ddp": ParallelConfig(dtype="float32"),
    "zero3": ParallelConfig(shard="zero3", dtype="float32"),
    "zero2": ParallelConfig(shard="zero2", dtype="bfloat16"),
    "offload": ParallelConfig(shard="zero3", offload=True, dtype="float32"),
    "hsdp": ParallelConfig(shard="zero3", replicas=2, dtype="float32"),
}
LAYOUTS = {"one": (1, 1), "ddp-2": (1, 2), "zero3-2": (2, 1), "offload-2": (2, 1)}
LAYOUTS |= {"zero3-4": (4, 1), "hsdp-4": (2, 2)}  # shards, replicas


def chunk(tensor, part, parts):
    """What torch.chunk gives to a part; it may make fewer parts than asked."""
    cut = tensor.chunk(parts)
    return cut[part] if part < len(cut) else tensor[:0]


def freeze(model, case):
    for name in ("norm.weight", "layers.0.self_attn.q_proj.weight") if case == "frozen" else ():
        model.get_parameter(name).requires_grad_(False)
    return model


def make_truth(case):
    """A small model with an optimizer that has been used; one process, without our code for state."""
    made = freeze(decoder.build(own_config(**SMALL | CASES[case])), case)
    decoder.init_weights(made, 3)
    params = [p for p in made.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2, fused=True)
    torch.manual_seed(11)
    for _ in range(2):
        train_step(made, optimizer)
    for p in params if case == "frozen" else []:
        if p.dim() == 2:  # as with Muon
            optimizer.state[p] = {"momentum_buffer": torch.randn(p.shape)}
    return made, optimizer


def spread(case, process, mode):
    """A model over all ranks and a fresh optimizer; every value that is not set will show."""
    model = freeze(decoder.build(own_config(**SMALL | CASES[case]), "meta"), case)
    model = parallelize(model, process, MODES[mode])
    params = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in model.parameters():
            getattr(p, "_local_tensor", p).fill_(float("nan"))
    return model, torch.optim.AdamW(params, lr=1e-2, fused=True)


def differs(model, optimizer, full, rank, shards):
    """Name what is not bit for bit the rows of the truth that belong to this rank."""
    found = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("module.")
        found[f"parameter/{name}"] = p.detach()
        if optimizer is not None:
            found |= {f"{kind}/{name}": value for kind, value in optimizer.state.get(p, {}).items()}
    wrong = sorted(set(found) ^ {n for n in full if optimizer is not None or n.startswith("parameter/")})
    for name, value in found.items():
        expected = full[name]
        if value.dim() and hasattr(value, "to_local"):
            value, expected = value.to_local(), chunk(expected, rank % shards, shards)
        if not (value.dtype == expected.dtype and torch.equal(value, expected)):
            wrong.append(name)
    return wrong


def said(work):
    """The words of the ValueError that something raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return "no error"


def dump(path, model, optimizer):
    save_file({n: t.contiguous() for n, t in everything(model, optimizer).items()}, path)


def matrix(folder, modes, sources, save=True):
    """Load each case from each source into each mode and save it again; models too. In each process."""
    folder, process = Path(folder), common.start_process("cpu")
    rank, world, out = process.rank, process.world, {}
    for case in CASES:
        full = load_file(folder / case / "truth")
        for mode in modes.split(","):
            shards = LAYOUTS[f"{mode}-{world}"][0]
            for source in sources.split(","):
                made = spread(case, process, mode)
                extra = state.load_step(folder / case / source / "step_0000002", *made, process)
                wrong = differs(*made, full, rank, shards)
                out[f"{case}: {source} -> {mode}-{world}"] = wrong + (
                    [] if extra == {"case": case} else [extra]
                )
            if save:
                to = folder / case / f"{mode}-{world}"
                state.save_step(to, 2, *made, {"case": case}, process)
                checkpoint.save_model(made[0], f"{to}-model", None, torch.bfloat16, 1000)
            model, _ = spread(case, process, mode)
            checkpoint.load_into(model, folder / case / "fp32-model")
            out[f"{case}: model -> {mode}-{world}"] = differs(model, None, full, rank, shards)
            if mode == "zero3" and case != "frozen":
                loss = train_step(*made)  # on these states the optimizer goes on
                steps = {float(s["step"]) for s in made[1].state.values() if "step" in s}
                out[f"{case}: {mode}-{world} goes on"] = (
                    [] if steps == {3.0} and loss == loss else [steps, loss]
                )
    (folder / f"matrix-{world}-{rank}.json").write_text(json.dumps(out))
    return process, folder


def two(folder):
    """Two processes, first time."""
    process, folder = matrix(folder, "ddp,zero3,offload", "one")
    made = spread("tied", process, "zero2")
    state.load_step(folder / "tied" / "one" / "step_0000002", *made, process)
    with torch.no_grad():
        made[0](torch.zeros(1, 5, dtype=torch.long))  # leaves whole parameters behind, in bf16
    state.save_step(folder / "gathered", 2, *made, {}, process)
    common.finish_process()


def four(folder):
    """Four processes, and what goes wrong in one of them."""
    process, folder = matrix(folder, "zero3,hsdp", "one,zero3-2")
    rank, out = process.rank, {}
    model, optimizer = spread("tied", process, "zero3")  # no optimizer state: less in a rank's file
    run = folder / "faults"
    folder_of = state.save_step(run, 1, model, optimizer, {}, process)
    weights, mine = (folder_of / name for name in ("model.safetensors", state.rank_file(rank)))
    assert mine.stat().st_size < 0.9 * weights.stat().st_size
    for who, size in ((2, 1000), (0, int(0.9 * weights.stat().st_size))):
        with disk_full_after(size) if rank == who else contextlib.nullcontext():
            what = said(lambda: state.save_step(run, 2, model, optimizer, {}, process))
        out[f"rank {who} has no space for {size}"] = what
    with disk_full_after(500) if rank == 1 else contextlib.nullcontext():
        out["export"] = said(lambda: checkpoint.save_model(model, run / "export", None, None, 1000))
    dist.barrier()
    out["left"] = sorted(p.name for p in run.iterdir())
    out["taken"] = said(lambda: checkpoint.save_model(model, folder_of))
    (folder / f"faults-{rank}.json").write_text(json.dumps(out))
    common.finish_process()


def pair(folder):
    """Two processes, second time; what is found is written down for the tests to judge."""
    folder = Path(folder)
    process, _ = matrix(folder, "ddp,zero3", "zero3-4,hsdp-4", save=False)
    rank, out = process.rank, {}

    # each rank's copy of a step lacks the files that hold no row of its own
    mine = shutil.copytree(folder / "tied" / "zero3-4" / "step_0000002", folder / f"copy-{rank}")
    for other in {0: (2, 3), 1: (0,)}[rank]:  # 37 rows in four parts: 10 10 10 7; in two: 19 18
        with open(mine / state.rank_file(other), "r+b") as file:
            file.seek(
                8 + int.from_bytes(file.read(8), "little")
            )  # all but the header, which names the tensors
            file.write(b"\xff" * (os.fstat(file.fileno()).st_size - file.tell()))
    full = load_file(folder / "tied" / "truth")
    made = spread("tied", process, "zero3")
    state.load_step(mine, *made, process)
    out["read"] = [n for n in differs(*made, full, rank, 2) if not n.startswith("step/")]

    # one rank's file does not hold what the manifest says
    made = spread("tied", process, "zero3")
    if rank == 1:
        tensors = load_file(mine / state.rank_file(3))
        save_file(tensors | {"exp_avg/norm.weight": torch.zeros(3)}, mine / state.rank_file(3))
    out["crafted"] = said(lambda: state.load_step(mine, *made, process))
    out["locked"] = said(lambda: state.lock(folder / "locked", process))
    out["no folder"] = said(lambda: state.lock(Path("/proc/no/such"), process))
    out["free"] = said(lambda: state.lock(folder / "free", process))

    # a state saved by one process
    made = fresh(seed=9, head="score")
    out["extra"] = state.load_step(state.newest_step(folder / "one", process), *made, process)
    dump(folder / f"loaded-{rank}", *made)

    # saved by two, restored by two, under DDP: each rank gets its own RNG back
    made = torch.nn.parallel.DistributedDataParallel(made[0]), made[1]
    torch.manual_seed(100 + rank)
    run = folder / "two"
    state.save_step(run, 4, *made, {"by": 2}, process)
    out["drawn"] = torch.rand(3).tolist()
    torch.manual_seed(7)
    again, optimizer = fresh(seed=8, head="score")
    wrapped = torch.nn.parallel.DistributedDataParallel(again)
    state.load_step(state.newest_step(run, process), wrapped, optimizer, process)
    out["drawn again"] = torch.rand(3).tolist()
    dump(folder / f"again-{rank}", again, optimizer)

    # a damaged newest step: both ranks take the same older one
    state.save_step(run, 5, *made, {}, process)
    if rank == 0:
        flip(run / "step_0000005" / "state" / "rank-00001.safetensors")
    dist.barrier()
    out["newest"] = state.newest_step(run, process).name
    dist.barrier()
    if rank == 0:
        shutil.rmtree(run / "step_0000005")
        (run / "step_0000008.tmp").write_text("in the way")
    dist.barrier()

    # failures of one rank, and of what only rank 0 writes
    for what, step, extra, limit in (
        ("rank 1 has no space", 6, {}, 1000 if rank == 1 else None),
        ("no space for the manifest", 7, {"x": "x" * 1_000_000}, 500_000),
        ("folder cannot be made", 8, {}, None),
    ):
        with disk_full_after(limit) if limit else contextlib.nullcontext():
            out[what] = said(lambda: state.save_step(run, step, *made, extra, process))  # noqa: B023
    out["steps"] = sorted(p.name for p in run.iterdir() if p.is_dir())
    (folder / f"out-{rank}.json").write_text(json.dumps(out))
    common.finish_process()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that `two`, `four` and `pair` have written, and what the last one printed."""
    folder = tmp_path_factory.mktemp("ranks")
    state.save_step(folder / "one", 3, *trained(head="score"), {"by": 1}, ONE)
    for case in CASES:
        made, optimizer = make_truth(case)
        (folder / case).mkdir()
        save_file(named_state(made, optimizer), folder / case / "truth")
        state.save_step(folder / case / "one", 2, made, optimizer, {"case": case}, ONE)
        checkpoint.save_model(made, folder / case / "one-model", None, torch.bfloat16, 1000)
        checkpoint.save_model(made, folder / case / "fp32-model", None, None, 1000)
    launch(two, folder)
    launch(four, folder, world=4)
    state.lock(folder / "locked", ONE)
    return folder, launch(pair, folder)


def named_state(model, optimizer):
    """Every tensor that training changes, by torch's own means."""
    out = {f"parameter/{n}": p.detach() for n, p in model.named_parameters()}
    for name, p in model.named_parameters():
        out |= {f"{kind}/{name}": value for kind, value in optimizer.state.get(p, {}).items()}
    return {name: value.clone() for name, value in out.items()}


@pytest.fixture(scope="module")
def two_ranks(ranks):
    """Give (folder written by `pair`, the full state, what each rank said, what it printed)."""
    folder, outputs = ranks
    out = [json.loads((folder / f"out-{rank}.json").read_text()) for rank in range(2)]
    return folder, everything(*trained(head="score")), out, outputs


@pytest.mark.parametrize("world, last", [(2, "pair"), (4, "four")])
def test_every_layout_loads_into_every_other_bit_for_bit(world, last, ranks):
    """Parameters, moments, momentum, step counters; and model folders of several files into cut models."""
    found = [json.loads((ranks[0] / f"matrix-{world}-{rank}.json").read_text()) for rank in range(world)]
    assert all(
        len(f) == 2 * 2 * 3 + 1 for f in found
    )  # cases x modes x (sources and a model), and one goes on
    assert not {rank: {k: v for k, v in f.items() if v} for rank, f in enumerate(found) if any(f.values())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_one_process_loads_what_any_layout_saved(case, layout, ranks):
    model = freeze(decoder.build(own_config(**SMALL | CASES[case])), case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    step = state.newest_step(ranks[0] / case / layout, ONE)
    assert state.load_step(step, model, optimizer, ONE) == {"case": case}
    assert_equal_dicts(named_state(model, optimizer), load_file(ranks[0] / case / "truth"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_each_file_holds_exactly_the_rows_of_its_rank_and_all_together_each_row_once(case, layout, ranks):
    step, full = ranks[0] / case / layout / "step_0000002", load_file(ranks[0] / case / "truth")
    shards, replicas = LAYOUTS[layout]
    manifest = state.read_manifest(step)
    assert (manifest["shards"], manifest["replicas"], manifest["world"]) == (
        shards,
        replicas,
        shards * replicas,
    )
    pieces: dict = {name: {} for name in full}
    for rank in range(shards * replicas):
        held = load_file(step / state.rank_file(rank))
        expected = {}
        for name, tensor in full.items():
            if tensor.dim():
                tensor = chunk(chunk(tensor, rank % shards, shards), rank // shards, replicas)
            if len(tensor) if tensor.dim() else rank == 0:
                expected[name] = tensor
        assert_equal_dicts({n: t for n, t in held.items() if n != "rng/cpu"}, expected)
        for name, tensor in expected.items():
            pieces[name][rank % shards, rank // shards] = tensor
    for name, tensor in full.items():
        parts = [part for _, part in sorted(pieces[name].items())]
        assert torch.equal(torch.cat(parts) if tensor.dim() else parts[0], tensor), name


@pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "one"])
@pytest.mark.parametrize("case", CASES)
def test_model_folder_written_by_many_is_that_of_one_process_byte_for_byte(case, layout, ranks):
    folder = ranks[0] / case
    files = tree(folder / "one-model")
    assert len(files) > 6 and tree(folder / f"{layout}-model") == files
    one, many = (tree(folder / name / "step_0000002") for name in ("one", layout))
    assert {n: d for n, d in one.items() if "state/" not in n} == {
        n: d for n, d in many.items() if "state/" not in n
    }


def test_parameters_left_gathered_by_an_evaluation_are_saved_in_fp32_all_the_same(ranks):
    for rank in range(2):
        one, other = (
            load_file(ranks[0] / run / "step_0000002" / state.rank_file(rank))
            for run in ("tied/zero3-2", "gathered")
        )
        assert_equal_dicts(*({n: t for n, t in held.items() if n != "rng/cpu"} for held in (one, other)))


def test_a_rank_that_cannot_write_under_fsdp_makes_all_raise_and_leaves_nothing(ranks):
    found = [json.loads((ranks[0] / f"faults-{rank}.json").read_text()) for rank in range(4)]
    assert all(f == found[0] for f in found)
    for what, words in found[0].items():
        if what.startswith("rank "):
            assert (
                "could not be written; the earlier steps are intact" in words and f"\n  {what[:6]}: " in words
            )
    assert "export could not be written\n  rank 1: " in found[0]["export"]
    assert found[0]["left"] == ["latest", "step_0000001"]
    assert "not empty" in found[0]["taken"]


def test_a_rank_reads_only_the_rows_that_it_holds(two_ranks):
    _, _, found, _ = two_ranks
    assert [f["read"] for f in found] == [[], []]


def test_a_file_that_does_not_hold_what_the_manifest_says_makes_all_ranks_raise_and_is_named(two_ranks):
    folder, _, found, _ = two_ranks
    path = folder / "copy-1" / state.rank_file(3)
    words = f"rank 1: {path}: exp_avg/norm.weight has shape [3] instead of [4]"
    assert [f["crafted"] for f in found] == [words] * 2


def test_all_ranks_say_who_holds_the_run_or_that_it_cannot_be_written(two_ranks):
    folder, _, found, _ = two_ranks
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    words = (
        f"rank 0: {folder / 'locked'}: {holder} trains here; wait until it has ended, or choose another --out"
    )
    assert [f["locked"] for f in found] == [words] * 2
    assert found[0]["no folder"] == found[1]["no folder"]
    assert "rank 0: /proc/no/such: no folder that can be written to" in found[0]["no folder"]
    assert [f["free"] for f in found] == ["no error"] * 2


def test_state_saved_by_one_process_loads_in_two(two_ranks):
    folder, full, said, outputs = two_ranks
    assert [s["extra"] for s in said] == [{"by": 1}] * 2
    for rank in range(2):
        assert_equal_dicts(load_file(folder / f"loaded-{rank}"), full)
    assert "saved by 1 processes, resumed by 2" in outputs[0]


def test_state_saved_by_two_processes_loads_in_one(two_ranks, capsys):
    folder, full, _, _ = two_ranks
    made = fresh(seed=5, head="score")
    step = state.newest_step(folder / "two", ONE)
    assert step.name == "step_0000004"
    assert state.load_step(step, *made, ONE) == {"by": 2}
    assert_equal_dicts(everything(*made), full)
    assert "saved by 2 processes, resumed by 1" in capsys.readouterr().out


def test_state_saved_by_two_processes_loads_in_two_with_each_ranks_own_random_numbers(two_ranks):
    folder, full, said, _ = two_ranks
    for rank in range(2):
        assert_equal_dicts(load_file(folder / f"again-{rank}"), full)
        assert said[rank]["drawn"] == said[rank]["drawn again"]
    assert said[0]["drawn"] != said[1]["drawn"]


def test_all_ranks_pass_over_the_same_damaged_step(two_ranks):
    _, _, said, outputs = two_ranks
    assert [s["newest"] for s in said] == ["step_0000004"] * 2
    assert "step_0000005/state/rank-00001.safetensors: damaged" in outputs[0]


@pytest.mark.parametrize(
    "what", ["rank 1 has no space", "no space for the manifest", "folder cannot be made"]
)
def test_a_rank_that_cannot_write_makes_all_ranks_raise(what, two_ranks):
    _, _, said, _ = two_ranks
    assert said[0][what] == said[1][what]
    assert "could not be written; the earlier steps are intact" in said[0][what]
    assert ("rank 1: " if what == "rank 1 has no space" else "rank 0: ") in said[0][what]
    assert said[0]["steps"] == ["step_0000004"]


def test_whole_step_written_by_two_processes_is_a_model_folder_for_transformers(two_ranks):
    import transformers as tf

    folder, full, _, _ = two_ranks
    step = folder / "two" / "step_0000004"
    assert state.damage(step) is None
    theirs = tf.AutoModelForSequenceClassification.from_pretrained(step)
    assert torch.equal(theirs.score.weight, full["parameter/score.weight"])
