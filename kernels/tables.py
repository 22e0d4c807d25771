"""Block sizes, warps and pipeline stages of every kernel, by GPU.

Nothing is tuned while a program runs: ranks that measure disagree, and other blocks sum in another order. A
file of the same form, {"op": {"arch": {"dim dtype": {...}}}}, named by the variable KERNEL_TABLE, goes before
this table.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

from kernels.dispatch import interpreted


def _tile(n: int, v: int, c: int, group: int, warps: int = 4, stages: int = 2) -> dict[str, int]:
    """Blocks of a tile of logits (rows, vocabulary, width), row blocks that share W, warps, stages."""
    names = "BLOCK_N", "BLOCK_V", "BLOCK_C", "GROUP", "num_warps", "num_stages"
    return dict(zip(names, (n, v, c, group, warps, stages)))


def _flash(m: int, n: int, warps: int = 4, stages: int = 2, **more: int) -> dict[str, int]:
    """Blocks of attention (queries, keys), warps, stages; whole=1 pads a head of 80 or 96, else it is cut."""
    return {"BM": m, "BN": n, "num_warps": warps, "num_stages": stages, **more}


# op -> arch -> "dim dtype" -> launch; "*" stands for every other dim, dtype or arch. `dim` is the head dim,
# or a row's width. The interpreter has small blocks of its own, so that tests cross their borders.
TABLE: dict[str, dict[str, dict[str, dict[str, int]]]] = {
    "norm_forward": {  # BLOCK: the widest row that stays in registers
        "interpreter": {"*": {"BLOCK": 64, "num_warps": 4}},
        "*": {"*": {"BLOCK": 16384, "num_warps": 8}},
    },
    "norm_backward": {
        "interpreter": {"*": {"BLOCK": 64, "num_warps": 4}},
        "*": {"*": {"BLOCK": 8192, "num_warps": 16}},
    },
    "rope": {  # HEADS of one token in a program
        "interpreter": {"*": {"HEADS": 2, "num_warps": 4}},
        "gfx942": {"*": {"HEADS": 16, "num_warps": 2}, "80 *": {"HEADS": 32, "num_warps": 1}},
        "*": {"*": {"HEADS": 16, "num_warps": 4}, "80 *": {"HEADS": 32, "num_warps": 4}},
    },
    "glu": {
        "interpreter": {"*": {"BLOCK": 64, "num_warps": 4}},
        "*": {"*": {"BLOCK": 2048, "num_warps": 4}},
    },
    # no spills with documents, with one and with several heads in a group; 8 warps fill an SM's registers
    "attention": {
        "interpreter": {"*": _flash(32, 32)},
        "sm_86": {"*": _flash(128, 64, 8)},
        "sm_90": {"*": _flash(128, 64, 8, 3), "128 *": _flash(128, 128, 8)},
        "gfx942": {"*": _flash(128, 64, 8, 1), "128 *": _flash(128, 32, 8, 1)},
        "*": {"*": _flash(128, 64, 8, 3)},
    },
    "attention_dq": {
        "interpreter": {"*": _flash(32, 32)},
        "sm_86": {"128 *": _flash(64, 32)},
        "sm_90": {"*": _flash(128, 64, 8)},
        "gfx942": {"*": _flash(64, 32, 4, 1)},
        "*": {"*": _flash(64, 64), "96 *": _flash(64, 32)},
    },
    "attention_dkv": {
        "interpreter": {"*": _flash(32, 32)},
        "sm_90": {"*": _flash(64, 64, 8)},
        "gfx942": {"*": _flash(32, 64, 4, 1)},
        "*": {"*": _flash(64, 64, 8, whole=1), "64 *": _flash(32, 64)},
    },
    "attention_decode": {  # CHUNK: keys of one program, a multiple of BN
        "interpreter": {"*": {"BN": 16, "CHUNK": 32}},
        "*": {"*": {"BN": 64, "CHUNK": 256, "num_warps": 4, "num_stages": 2}},
    },
    # dim is the group; PROGRAMS of each processor are wanted: where rows give fewer, inputs are split
    "quant_vector": {  # one warp loads 128 words of a row, so that it needs no other's x
        "interpreter": {"*": {"BLOCK_N": 32, "BLOCK_W": 64, "PROGRAMS": 2}},
        "gfx942": {  # 64 lanes
            "32 *": {"BLOCK_N": 2, "BLOCK_W": 256, "PROGRAMS": 16, "num_warps": 1},
            "*": {"BLOCK_N": 4, "BLOCK_W": 256, "PROGRAMS": 16, "num_warps": 1},
        },
        "*": {
            "32 *": {"BLOCK_N": 2, "BLOCK_W": 128, "PROGRAMS": 24, "num_warps": 1},
            "*": {"BLOCK_N": 4, "BLOCK_W": 128, "PROGRAMS": 24, "num_warps": 1},
        },
    },
    "quant_matrix": {
        "interpreter": {"*": {"BLOCK_N": 32, "PROGRAMS": 2}},
        "gfx942": {
            "* float32": {"BLOCK_N": 32, "PROGRAMS": 4, "num_warps": 2, "num_stages": 2},
            "*": {"BLOCK_N": 64, "PROGRAMS": 4, "num_warps": 4, "num_stages": 2},
        },
        "*": {
            "* float32": {"BLOCK_N": 32, "PROGRAMS": 4, "num_warps": 2, "num_stages": 2},
            "*": {"BLOCK_N": 64, "PROGRAMS": 4, "num_warps": 4, "num_stages": 3},
        },
    },
    "quant_combine": {
        "interpreter": {"*": {"BLOCK": 64}},
        "*": {"*": {"BLOCK": 256, "num_warps": 4}},
    },
    "quant_whole": {
        "interpreter": {"*": {"BLOCK_N": 32}},
        "*": {"*": {"BLOCK_N": 64, "num_warps": 4}},
    },
    "linear_nll": {
        "interpreter": {"*": _tile(32, 64, 32, 2)},
        "sm_86": {"*": _tile(128, 128, 32, 8, 4, 3), "* float32": _tile(64, 64, 16, 8, 4, 3)},
        "sm_90": {"*": _tile(256, 128, 64, 8, 8, 3), "* float32": _tile(64, 64, 16, 8, 4, 3)},
        "gfx942": {"*": _tile(128, 128, 64, 8, 8, 2), "* float32": _tile(64, 64, 16, 8, 4, 2)},
        "*": {"*": _tile(128, 256, 32, 8, 8, 3), "* float32": _tile(64, 64, 16, 8, 4, 3)},
    },
    "linear_nll_backward": {  # 128 x 256 spills: the exponentials and the stores need registers of their own
        "interpreter": {"*": _tile(32, 64, 32, 2)},
        "sm_90": {"*": _tile(128, 128, 64, 8, 4, 3), "* float32": _tile(64, 64, 16, 8, 4, 3)},
        "gfx942": {"*": _tile(128, 128, 64, 8, 8, 2), "* float32": _tile(64, 64, 16, 8, 4, 2)},
        "*": {"*": _tile(128, 128, 32, 8, 4, 3), "* float32": _tile(64, 64, 16, 8, 4, 3)},
    },
    "linear_nll_combine": {
        "interpreter": {"*": {"BLOCK_N": 16, "BLOCK_T": 2}},
        "*": {"*": {"BLOCK_N": 32, "BLOCK_T": 32, "num_warps": 4}},
    },
}


# what was asked for: (op, arch, "dim dtype") -> launch
asked: dict[tuple[str, str, str], dict[str, int]] = {}


def launch(op: str, dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the launch of an op: its block sizes, num_warps and num_stages by name.

    The most exact entry wins: first the arch, then the dim, then the dtype. KeyError: the op has no entry.
    """
    return _find(op, dim, dtype, _arch())


@functools.cache  # searching takes longer than launching
def _find(op: str, dim: int, dtype: torch.dtype, gpu: str) -> dict[str, int]:
    kind = str(dtype).removeprefix("torch.")
    for table in (_overrides(), TABLE):
        by_arch = table.get(op, {})
        for arch in (gpu, "*"):
            for key in (f"{dim} {kind}", f"{dim} *", f"* {kind}", "*"):
                if key in by_arch.get(arch, {}):
                    asked[op, gpu, f"{dim} {kind}"] = by_arch[arch][key]
                    return by_arch[arch][key]
    raise KeyError(f"kernels/tables.py has no launch of {op} for {gpu}, {dim}, {kind}")


def forget() -> None:
    """Empty `asked`, and search again for what was found before."""
    asked.clear()
    _find.cache_clear()


def override(op: str, arch: str, key: str, launch: dict[str, int]) -> None:
    """Let a launch go before every table from now on, in this process (bench.py tries launches so)."""
    _overrides().setdefault(op, {}).setdefault(arch, {})[key] = launch
    _find.cache_clear()


@functools.cache
def _overrides() -> dict:
    path = os.environ.get("KERNEL_TABLE")
    return json.loads(Path(path).read_text("utf-8")) if path else {}


def _arch() -> str:
    """Name the current GPU: sm_80, sm_86, sm_90 (the nearest that is not newer), or gfx942 for all of AMD's.

    sm_120 counts as sm_86: like it, it is a card for players, with 99 KiB of shared memory.
    """
    if interpreted():
        return "interpreter"
    from triton.runtime import driver

    target = driver.active.get_current_target()
    if target.backend != "cuda":
        return "gfx942"  # others have 64 KiB of shared memory, too; NVIDIA's blocks would not fit
    if target.arch >= 120:
        return "sm_86"
    return f"sm_{max((a for a in (80, 86, 90) if a <= target.arch), default=80)}"
