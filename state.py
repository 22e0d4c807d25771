"""A run on disk: the training state, from which --resume goes on exactly, and the folder that holds it.

    out/run/lock                 held while a process trains here
    out/run/latest, best         the last complete step; the one with the lowest validation loss
    out/run/step_0002000/        a model (or adapter) folder with a card that says where it comes from
        state/rank-00000.safetensors   rows of every parameter and optimizer moment, this rank's RNG
        state/manifest.json            step, data position, shapes, layout, SHA-256 of every file

S·R ranks write a step together, S shards of R replicas each: DDP has S = 1, ZeRO R = 1, HSDP both; one
process has one of each. Rank i·S + j writes of a tensor with n rows

    rows(rows(n, j, S), i, R)       the j-th of S parts, as FSDP2 cuts it, and of that the i-th of R

so every row is written once and all disks are busy. Any layout loads into any other: a rank reads the rows
that it holds, from whichever files have them, straight into its part; no rank ever holds the whole.

A step is written as step_N.tmp and renamed when every digest is known: one that can be seen is whole. If a
rank cannot write, all ranks say so, and the earlier steps are intact. Loading takes the newest step whose
digests are right. No pickle: safetensors and JSON, and nothing that they say is trusted.

    python state.py check out/run           # is every saved step whole?

Mitchell et al. 2019, "Model Cards for Model Reporting".
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tyro.conf import Positional

import common
from checkpoint import file_sha256, gather, open_tensors, parameters, together, write_model
from model import FAMILIES, ModelConfig, num_params, own_rows, rows

# --- 1. who writes which rows -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How the rows of every tensor are spread over the files of a step; rank = replica · shards + shard."""

    shards: int
    replicas: int

    def part(self, n: int, rank: int) -> tuple[int, int]:
        """Rows [a, b) of n that `rank` writes: Layout(2, 2).part(10, 2) -> (3, 5)."""
        replica, shard = divmod(rank, self.shards)
        a, b = rows(n, shard, self.shards)
        c, d = rows(b - a, replica, self.replicas)
        return a + c, a + d


def layout_of(model: nn.Module, process: common.Process) -> Layout:
    """Read off the parameters how they are spread over the ranks."""
    for p in parameters(model).values():
        if isinstance(p, DTensor):
            mesh = p.device_mesh
            shards = mesh.size(mesh.ndim - 1)
            assert process.rank % shards == mesh.get_local_rank(mesh.ndim - 1), "neighbours share a copy"
            return Layout(shards, process.world // shards)
    return Layout(1, process.world)


def state_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Give the parameters that a saved state holds: all, or beside a base with adapters the trained ones.

    Such a base (lora.py) never changes, and is read again from the folder that it came from.
    """
    adapted = getattr(getattr(model, "module", model), "adapters", None) is not None
    return {name: p for name, p in parameters(model).items() if p.requires_grad or not adapted}


def training_state(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """Name every tensor that a state holds: "parameter/NAME", and "exp_avg/NAME" of what AdamW keeps."""
    out = {}
    for name, p in state_parameters(model).items():
        out[f"parameter/{name}"] = p.detach()
        for kind, value in optimizer.state.get(p, {}).items():
            assert value.shape in ((), p.shape), f"{kind} of {name} has neither its shape nor none"
            out[f"{kind}/{name}"] = value
    return out


# --- 2. saving ----------------------------------------------------------------------------------------------


def save_step(
    run: Path,
    step: int,
    model,
    optimizer,
    extra: dict,
    process,
    tokenizer=None,
    dtype=None,
    card=None,
    writer: Callable = write_model,
) -> Path:
    """Write step_N (a model folder, its card, the training state) so that it appears whole or not at all.

    Every rank calls this. `extra` is JSON that load_step returns unchanged; extra["evaluation"] may hold
    {"val_loss": 2.31, ...}, by which `best_step` chooses. dtype: of the model folder. card: see write_cards.
    writer: lora.write_adapter where adapters are trained; then step_N is an adapter folder.
    ValueError on all ranks if one of them could not write (a full disk): the earlier steps are untouched.
    """
    folder = run / f"step_{step:07d}"
    tmp = folder.with_name(folder.name + ".tmp")
    layout, tensors = layout_of(model, process), training_state(model, optimizer)
    files: dict[str, dict] = {}

    def prepare():
        if process.first:
            shutil.rmtree(tmp, ignore_errors=True)
            (tmp / "state").mkdir(parents=True)

    def write_rows():
        mine = {}
        for name, tensor in tensors.items():
            if tensor.dim() == 0:
                if process.first:  # a step counter, the same everywhere
                    mine[name] = tensor.cpu()
                continue
            local, start, _ = own_rows(tensor)
            a, b = layout.part(len(tensor), process.rank)
            if a < b:
                mine[name] = local[a - start : b - start].cpu().contiguous()
        mine["rng/cpu"] = torch.get_rng_state()
        if process.device.startswith("cuda"):
            mine["rng/cuda"] = torch.cuda.get_rng_state()
        save_file(mine, tmp / rank_file(process.rank))
        common.sync(tmp / rank_file(process.rank))  # the first rank cannot, from another machine
        return {rank_file(process.rank): digest(tmp / rank_file(process.rank))}

    def write_folder():
        names = writer(model, tmp, tokenizer, dtype)  # first, because all ranks meet in it
        if process.first and card is not None:
            names += write_cards(tmp, card)
        return {name: digest(tmp / name) for name in names}

    def finish():
        if process.first:
            manifest = {"step": step, "world": process.world, "shards": layout.shards}
            manifest |= {"replicas": layout.replicas, "files": files, "extra": extra}
            manifest["shapes"] = {name: list(tensor.shape) for name, tensor in tensors.items()}
            manifest = json.loads(json.dumps(manifest))  # as it will be read
            manifest["digest"] = fingerprint(manifest)
            common.write_json(tmp / "state" / "manifest.json", manifest)
            common.publish(tmp, folder)
            common.atomic_text(run / "latest", folder.name + "\n")
            _note_best(run, saved_steps(run))

    try:
        for work in (
            prepare,
            write_rows,
            write_folder,
            finish,
        ):  # all have done one before any begins the next
            for written in together(work, f"{folder} could not be written; the earlier steps are intact"):
                files |= written or {}
    except ValueError:
        if process.first:
            shutil.rmtree(tmp, ignore_errors=True)
        raise
    return folder


def rank_file(rank: int) -> str:
    """The file of a rank within a step's folder."""
    return f"state/rank-{rank:05d}.safetensors"


def digest(path: Path) -> dict:
    """Size and SHA-256 of a file: {"bytes": 1234, "sha256": "9f86…"}."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def fingerprint(value) -> str:
    """SHA-256 of a JSON value, to compare configurations."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def disk_need(
    config: ModelConfig,
    trained: int,
    keep: int,
    save_dtype: torch.dtype,
    optimizer_bytes: float = 8,
    keep_best: bool = False,
    adapters: bool = False,
) -> int:
    """Bytes that a run takes on disk: `keep` steps, the one being written, and the best one if it is kept.

    A step has 4 bytes a parameter, `optimizer_bytes` (8: AdamW) for each of the `trained` ones, and the model
    folder in save_dtype. With adapters it has only the trained ones, in fp32 (see lora.py). Tokenizer,
    manifest and log, some MB in all, are not counted.
    """
    n = trained if adapters else num_params(config)
    step = 4 * n + optimizer_bytes * trained + (4 if adapters else save_dtype.itemsize) * n
    return round((keep + 1 + keep_best) * step)


# --- 3. finding a whole step --------------------------------------------------------------------------------


def begun(run: Path) -> bool:
    """Tell whether the run has a saved step; every rank calls this, and all hear what the first one sees."""
    return gather(bool(saved_steps(run)))[0]


def saved_steps(run: Path) -> list[Path]:
    """The run's step folders, oldest first."""
    steps = (p for p in run.glob("step_*") if p.is_dir() and re.fullmatch("[0-9]+", p.name[5:]))
    return sorted(steps, key=lambda p: int(p.name[5:]))


FIELDS = {"step": int, "world": int, "shards": int, "replicas": int}
FIELDS |= {"shapes": dict, "files": dict, "extra": dict, "digest": str}
FILE = re.compile(
    r"state/rank-[0-9]{5,9}\.safetensors|(?!\.+$)[\w.-]{1,200}"
)  # nothing outside of the folder


def read_manifest(folder: Path) -> dict:
    """Read the manifest of a saved step; ValueError names it if it is not one that save_step has written."""
    path = folder / "state" / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        whole = isinstance(manifest, dict) and manifest.get("digest") == fingerprint(
            {key: value for key, value in manifest.items() if key != "digest"}
        )
    except (OSError, ValueError, RecursionError) as error:  # missing; not JSON; brackets nested 1,000 deep
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not whole:
        raise ValueError(f"{path}: damaged (its digest is not the one written)")
    for key, kind in FIELDS.items():
        if type(manifest.get(key)) is not kind:
            raise ValueError(f"{path}: {key} is not a {kind.__name__}")
    ours = [name for name in manifest["files"] if name.startswith("state/")]
    world = manifest["shards"] * manifest["replicas"]
    if not (manifest["shards"] > 0 and world == manifest["world"] == len(ours) > 0):
        raise ValueError(f"{path}: shards x replicas, world and the number of rank files do not agree")
    for name, written in manifest["files"].items():
        odd = not FILE.fullmatch(name) or (name in ours and name not in map(rank_file, range(world)))
        if odd or not (isinstance(written, dict) and written.keys() == {"bytes", "sha256"}):
            raise ValueError(f"{path}: {name!r} is no file of a step")
    for name, shape in manifest["shapes"].items():
        if "/" not in name or not (isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)):
            raise ValueError(f"{path}: the shape of {name!r} is {shape!r}")
    return manifest


def damage(folder: Path, part: int = 0, parts: int = 1, tensors: bool = True) -> str | None:
    """Say what is wrong with a saved step, by its manifest's sizes and digests; None if it is whole.

    Only every `parts`-th file is looked at, from file `part` on: W ranks check a step in a W-th of the time.
    tensors False: only the small files are looked at (config, tokenizer), in no time.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    names = [name for name in sorted(files) if tensors or not name.endswith(".safetensors")]
    for name in names[part::parts]:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                return f"{path}: {size} bytes instead of {expected['bytes']}"
            if digest(path) != expected:
                return f"{path}: damaged (its SHA-256 is not the one written)"
        except FileNotFoundError:
            return f"{path}: missing"
        except OSError as error:
            return f"{path}: cannot be read ({error})"
    return None


def newest_step(run: Path, process) -> Path:
    """Find the newest whole step, the same on every rank; damaged ones are named on stderr and passed over.

    Every rank calls this and checks its share of the files. ValueError on all if the run holds no whole step.
    """
    damaged = []
    for name in gather([p.name for p in reversed(saved_steps(run))])[0]:
        found = [what for what in gather(damage(run / name, process.rank, process.world)) if what]
        if not found:
            return run / name
        damaged.append(found[0])
        if process.first:
            print(f"passing over a damaged step: {found[0]}", file=sys.stderr)
    raise ValueError("\n  ".join([f"{run}: no saved step to resume from", *damaged]))


def best_step(run: Path, metric: str = "val_loss") -> Path | None:
    """Find the saved step with the lowest finite extra["evaluation"][metric]; None if no step has one."""
    return _best(saved_steps(run), metric)


def lowest_loss(run: Path, metric: str = "val_loss") -> float:
    """Give the best step's extra["evaluation"][metric]; infinity if no step has one."""
    best = best_step(run, metric)
    return read_manifest(best)["extra"]["evaluation"][metric] if best else math.inf


def _best(steps: list[Path], metric: str = "val_loss") -> Path | None:
    found = []
    for folder in steps:
        try:
            evaluation = read_manifest(folder)["extra"].get("evaluation")
        except ValueError:  # a damaged step is never the best; newest_step names it
            continue
        value = evaluation.get(metric) if isinstance(evaluation, dict) else None
        if isinstance(value, int | float) and abs(value) < math.inf:
            found.append((value, folder))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _note_best(run: Path, steps: list[Path]) -> None:
    """Write the name of the best of `steps` to RUN/best; call it before the others go."""
    best = _best(steps)
    if best is None:
        (run / "best").unlink(missing_ok=True)
    else:
        common.atomic_text(run / "best", best.name + "\n")


def prune(run: Path, keep: int, keep_best: bool = False) -> None:
    """Delete all but the newest `keep` steps and the best (keep 0: none), and what a killed save left."""
    steps = saved_steps(run)
    stay = steps[-keep:]
    if keep_best and (best := _best(steps)) and best not in stay:
        stay = [best, *stay]
    if steps:
        _note_best(run, stay)
    for folder in steps:
        if folder not in stay:  # renamed first: half of a deleted step would look like a damaged one
            folder.rename(folder.with_name(folder.name + ".old"))
    for rubbish in (*run.glob("step_*.tmp"), *run.glob("step_*.old")):
        shutil.rmtree(rubbish, ignore_errors=True)


def set_aside(run: Path, newest: Path) -> None:
    """Rename the steps after `newest`, which are damaged, so that they neither count nor get in the way."""
    steps = saved_steps(run)
    after = steps.index(newest) + 1
    common.atomic_text(run / "latest", newest.name + "\n")
    _note_best(run, steps[:after])
    for folder in steps[after:]:
        target = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


# --- 4. loading ---------------------------------------------------------------------------------------------


def load_step(folder: Path, model, optimizer, process) -> dict:
    """Restore parameters, optimizer state and RNG from a saved step; return its `extra`.

    Every rank calls this and reads the rows that it holds, whatever the layout in which they were saved. The
    RNG is restored only if the layout is the same. ValueError on all ranks if the step is of another model,
    or if a file does not hold what the manifest says.
    """
    manifest = read_manifest(folder)
    together(lambda: _load(folder, manifest, model, optimizer, process))
    return manifest["extra"]


@torch.no_grad()
def _load(folder: Path, manifest: dict, model, optimizer, process) -> None:
    target, shapes = state_parameters(model), manifest["shapes"]
    settings = {p: group for group in optimizer.param_groups for p in group["params"]}
    saved = {n.removeprefix("parameter/"): s for n, s in shapes.items() if n.startswith("parameter/")}
    here = {name: list(p.shape) for name, p in target.items()}
    wrong = sorted(name for name in saved | here if saved.get(name) != here.get(name))
    states = [key.split("/", 1) for key in shapes if not key.startswith("parameter/")]
    wrong += [f"{kind}/{n}" for kind, n in states if shapes[f"{kind}/{n}"] not in ([], here.get(n))]
    if wrong:
        raise ValueError(f"{folder}: the saved state is of another model: {', '.join(wrong[:20])}")
    if unknown := sorted(name for _, name in states if name not in here):
        raise ValueError(f"{folder}: optimizer state of a parameter that there is not: {unknown[0]}")
    frozen = sorted({name for _, name in states if target[name] not in settings})
    if frozen:
        raise ValueError(f"{folder}: trained when it was saved, but not now: {', '.join(frozen[:20])}")
    old = Layout(manifest["shards"], manifest["replicas"])
    reader = _Reader(folder, old)
    for name, p in target.items():
        reader.read(f"parameter/{name}", p)
    optimizer.state.clear()
    for kind, name in states:
        p = target[name]
        if shapes[f"{kind}/{name}"]:
            value = torch.zeros_like(p)  # cut over the ranks where p is
        else:  # AdamW counts where p is, if it is fused, else on the CPU
            there = any(settings[p].get(key) for key in ("fused", "capturable"))
            value = torch.zeros((), device=p.device if there else "cpu")
        reader.read(f"{kind}/{name}", value)
        optimizer.state[p][kind] = value
    if old == layout_of(model, process):
        reader.restore_rng(process)
    elif process.first:
        before, now = manifest["world"], process.world
        print(f"saved by {before} processes, resumed by {now}: dropout draws other numbers now")


class _Reader:
    """Reads rows of the tensors of a saved step, from whichever rank's file has them."""

    def __init__(self, folder: Path, layout: Layout):
        self.folder, self.layout, self.files = folder, layout, {}

    def open(self, rank: int):
        """Give a rank's file, opened when it is first needed."""
        if rank not in self.files:
            self.files[rank] = open_tensors(self.folder / rank_file(rank))
        return self.files[rank]

    def part(self, rank: int, key: str, shape: list[int]):
        """Give the part of a tensor in a rank's file, to be cut; ValueError if its shape is not `shape`."""
        try:
            found = self.open(rank).get_slice(key)
        except SafetensorError as error:
            raise ValueError(f"{self.folder / rank_file(rank)}: {error}") from None
        if found.get_shape() != shape:
            where = f"{self.folder / rank_file(rank)}: {key}"
            raise ValueError(f"{where} has shape {found.get_shape()} instead of {shape}")
        return found

    def read(self, key: str, value: torch.Tensor) -> None:
        """Fill the rows of a tensor that this rank holds."""
        if value.dim() == 0:
            self.part(0, key, [])
            value.copy_(self.open(0).get_tensor(key))
            return
        mine, a, b = own_rows(value)
        for rank in range(self.layout.shards * self.layout.replicas):
            c, d = self.layout.part(len(value), rank)
            low, high = max(a, c), min(b, d)
            if low < high:
                part = self.part(rank, key, [d - c, *value.shape[1:]])
                mine[low - a : high - a].copy_(part[low - c : high - c])

    def restore_rng(self, process) -> None:
        """Set this rank's random number generators as they were."""
        try:
            torch.set_rng_state(self.open(process.rank).get_tensor("rng/cpu"))
            on_gpu = "rng/cuda" in self.open(process.rank).keys()  # noqa: SIM118  # no dict
            if on_gpu and process.device.startswith("cuda"):
                torch.cuda.set_rng_state(self.open(process.rank).get_tensor("rng/cuda"))
        except (SafetensorError, RuntimeError, TypeError) as error:
            path = self.folder / rank_file(process.rank)
            raise ValueError(f"{path}: no state of the random number generator ({error})") from None


# --- 5. one process group at a time -------------------------------------------------------------------------

_held: dict[
    tuple[int, int], object
] = {}  # device and inode of a lock -> its file, open until this process ends


def lock(run: Path, process) -> None:
    """Make the run's folder and keep every other process group out of it until this one has ended.

    Every rank calls this. The kernel frees the lock when rank 0 dies, however it does: no stale file can be
    in the way. ValueError on all ranks: somebody trains here; the folder cannot be made or written.
    """
    text = together(lambda: _lock(run) if process.first else None)[0]

    def seen():
        end = time.monotonic() + 20  # a network file system may take its time
        while not (run / "lock").exists() or (run / "lock").read_text() != text:
            if time.monotonic() > end:
                raise ValueError(
                    f"{run}: not the same folder on all machines; --out must lie on shared storage"
                )
            time.sleep(0.1)

    together(seen)


def _lock(run: Path) -> str:
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / "lock", "a+")  # noqa: SIM115  # not emptied: it may name the holder
    except OSError as error:
        raise ValueError(f"{run}: no folder that can be written to ({error}); choose another --out") from None
    stat = os.fstat(file.fileno())
    if (stat.st_dev, stat.st_ino) in _held:
        return (run / "lock").read_text()  # by this process
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.readline(200).strip() or "another process"
        raise ValueError(
            f"{run}: {holder} trains here; wait until it has ended, or choose another --out"
        ) from None
    except OSError as error:
        print(f"warning: {run} cannot be locked ({error}); see that nobody else trains here", file=sys.stderr)
    text = f"process {os.getpid()} on {socket.gethostname()}\n{time.time()}\n"
    file.truncate(0)
    file.write(text)
    file.flush()
    _held[stat.st_dev, stat.st_ino] = file
    return text


# --- 6. where a model comes from ----------------------------------------------------------------------------

LIMITS = """\
- It was not trained on benchmarks by intention; whether the training text contains some was not measured.
- Most of the training text is Chinese; it is weak in other languages.
- It can state falsehoods fluently. Check what it says before you rely on it.
"""
RAW = "- No reinforcement learning from human feedback and no alignment for safety was done.\n"


def write_cards(folder: Path, card: dict) -> list[str]:
    """Write run_card.json (`card` as it is) and a model card, README.md, into a folder; return their names.

    All figures come from the card; what it lacks is left out. Keys: name, stage, init, model (ModelConfig as
    a dict), parameters, tokens or pairs, steps, data {name: fingerprint}, tokenizer (its digest), optimizer,
    schedule (text, or a dict of settings), tokens_per_second or pairs_per_second, mfu, hfu (shares of 1),
    devices, code (code_version()),
    evaluation {metric: value}, alignment (what was done for it, if anything).
    """
    common.write_json(folder / "run_card.json", card)
    model = card.get("model") or {}
    family = [model["family"]] if model.get("family") in FAMILIES else []
    head = {"language": "zh", "library_name": "baizhi", "pipeline_tag": "text-generation"}
    head["tags"] = json.dumps(["baizhi", *family])  # a JSON list is a YAML list
    shape = {"num_hidden_layers": "layers", "hidden_size": "wide", "num_attention_heads": "heads"}
    shape |= {"intermediate_size": "wide in the MLP", "vocab_size": "tokens in the vocabulary"}
    shape |= {"max_position_embeddings": "tokens of context"}
    shape = ", ".join(f"{_said(model[key])} {word}" for key, word in shape.items() if key in model)
    each = None
    if card.get("tokens") and card.get("parameters"):
        each = f"{card['tokens'] / card['parameters']:.3g}"
    data = [f"{name} (fingerprint {mark})" for name, mark in (card.get("data") or {}).items()]
    share = {key: f"{card[key]:.1%}" for key in ("mfu", "hfu") if card.get(key) is not None}
    sections = {
        "What it is": {
            "Stage": card.get("stage"),
            "Family": model.get("family"),
            "Shape": shape,
            "Parameters": card.get("parameters"),
        },
        "Training": {
            "Started from": card.get("init"),
            "Trained tokens": card.get("tokens"),
            "Trained pairs": card.get("pairs"),
            "Optimizer steps": card.get("steps"),
            "Tokens per parameter": each,
            "Data": "; ".join(data),
            "Tokenizer (SHA-256)": card.get("tokenizer"),
            "Optimizer": card.get("optimizer"),
            "Schedule": card.get("schedule"),
            "Code": card.get("code"),
        },
        "Speed": {
            "Tokens per second": card.get("tokens_per_second"),
            "Pairs per second": card.get("pairs_per_second"),
            "MFU (model FLOPs utilisation: what the mathematics needs)": share.get("mfu"),
            "HFU (hardware FLOPs utilisation: what is computed, some of it twice)": share.get("hfu"),
            "Devices": card.get("devices"),
        },
        "Results": card.get("evaluation") or {},
    }
    text = "".join(["---\n", *(f"{key}: {value}\n" for key, value in head.items()), "---\n\n"])
    text += f"# {_said(card.get('name') or 'A language model trained with Baizhi')}\n"
    for title, said in sections.items():
        lines = [f"- {key}: {_said(value)}\n" for key, value in said.items() if value not in (None, "")]
        text += "".join([f"\n## {title}\n\n", *lines]) if lines else ""
    done = card.get("alignment")
    text += f"\n## Limits\n\n{f'- Alignment: {_said(done)}{chr(10)}' if done else RAW}{LIMITS}"
    common.atomic_text(folder / "README.md", text)
    return ["run_card.json", "README.md"]


def _said(value) -> str:
    """Write a value on one line: 193651200 -> '193,651,200', {'lr': 0.001} -> 'lr 0.001'."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return " ".join(str(value).split())
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def code_version(folder: Path | None = None) -> str:
    """Name the version of the files in `folder`: git's commit, "-dirty" if one was changed, or a digest."""
    folder = folder or Path(__file__).resolve().parent
    git = ["git", "--no-optional-locks", "-C", str(folder)]
    asked = [
        ["ls-files", "--error-unmatch", "state.py"],
        ["rev-parse", "HEAD"],
        ["status", "-s", "-uno", "."],
    ]
    try:
        said = [
            subprocess.run(git + words, capture_output=True, text=True, timeout=20, check=True).stdout
            for words in asked
        ]
        return said[1].strip() + ("-dirty" if said[2].strip() else "")
    except (OSError, subprocess.SubprocessError):  # no git, or no checkout, or not of these files
        sha = hashlib.sha256()
        for path in sorted([*folder.glob("*.py"), *folder.glob("kernels/*.py")]):
            sha.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return f"sha256:{sha.hexdigest()}"


# --- 7. command line ----------------------------------------------------------------------------------------


@dataclass
class Check:
    run: Positional[str]  # folder of a run


def check(config: Check) -> None:
    """Compare every file of a run's saved steps with the digests in its manifest."""
    steps = saved_steps(Path(config.run))
    if not steps:
        raise ValueError(f"{config.run}: no saved step here")
    found = {folder: damage(folder) for folder in steps}
    for folder, what in found.items():
        print(f"{folder}: {what or 'whole'}")
    if any(found.values()):
        raise ValueError(f"{config.run}: not every step is whole; --resume takes the newest that is")


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:  # the word may be left out
        del sys.argv[1]
    common.run(check, doc=__doc__)
