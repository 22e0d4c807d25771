"""Compile every Triton kernel for GPUs that are not here, look at the machine code, compare with kernels/aot.json.

    python tests/aot.py                        all launches for all targets; fails on what is worse than committed
    python tests/aot.py --only "norm" --targets sm_90
    python tests/aot.py --write                writes kernels/aot.json

The launchers of kernels/_*_triton.py run on meta tensors of real shapes under a driver that only says which GPU it
is; instead of a launch, Triton compiles. So block sizes, warps and divisible strides are those of a real launch.
ptxas and nvdisasm come with the triton wheel.

It fails on: a launch that does not compile; spilled registers, unless the launch allows for some and says why; more
shared memory than the GPU has; tensor-core instructions that ptxas had to serialise; an address computed with a
32-bit product of a program's number and a stride; 5 % more registers, shared memory or instructions in the hot loop
than committed. It measures no time: a kernel can pass here and be slow.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
assert os.environ.pop("TRITON_INTERPRET", "0") != "1", "an interpreting process cannot compile"

import torch  # noqa: E402

COMMITTED = ROOT / "kernels" / "aot.json"
SHARED = {"sm_80": 166_912, "sm_86": 101_376, "sm_90": 232_448, "gfx942": 65_536}  # bytes a program may have
COMPARED = ("regs", "spill", "shared", "loop", "per_weight")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A call of a launcher on meta tensors, and what is known about it. A table may also hold the call alone."""

    run: Callable[[], object]
    spill: dict[str, int] = dataclasses.field(default_factory=dict)  # target -> bytes that may be spilled
    why: str = ""  # reason for these spills
    # kernel -> quantised weights that one program reads in one turn of its hot loop
    weights: dict[str, Callable[[], int]] = dataclasses.field(default_factory=dict)
    targets: tuple[str, ...] = tuple(SHARED)


# --- the launches ----------------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def row_launches() -> dict[str, Launch | Callable]:
    """Norms, rotary embedding and gated unit: 13B (C 5120, F 13824, D 128), Phi (C 2560, D 80 R 32), fp32."""
    from kernels import _glu_triton as glu
    from kernels import _norm_triton as norm
    from kernels import _rope_triton as rope

    N, fp32 = 8192, torch.float32
    found = {}
    for C, dtype in ((5120, torch.bfloat16), (2560, torch.bfloat16), (20480, torch.bfloat16), (5120, fp32)):
        x, w, tag = meta(N, C, dtype=dtype), meta(C, dtype=dtype), f"{C} {str(dtype)[6:]}"
        one, two = meta(1, N, dtype=fp32), meta(2, N, dtype=fp32)
        found[f"add_rms_norm {tag}"] = lambda x=x, w=w: norm.norm_forward(x, x, w, None, 1e-5)
        found[f"add_rms_norm backward {tag}"] = lambda x=x, w=w, s=one: norm.norm_backward(x, x, x, w, s)
        found[f"layer_norm {tag}"] = lambda x=x, w=w: norm.norm_forward(x, None, w, w, 1e-5)
        found[f"layer_norm backward {tag}"] = lambda x=x, w=w, s=two: norm.norm_backward(x, None, x, w, s)
    for H, D, R in ((40, 128, 128), (32, 80, 32)):
        x, table = meta(1, N, H, D).transpose(1, 2), meta(1, 1, N, R, dtype=fp32)
        found[f"rope {R} of {D}"] = lambda x=x, table=table: rope.rope(x, x, table, table, False)
    for act in ("silu", "gelu", "gelu_tanh"):
        x = meta(N, 13824)
        found[f"glu {act}"] = lambda x=x, act=act: glu.glu_forward(x, x, act)
        found[f"glu backward {act}"] = lambda x=x, act=act: glu.glu_backward(x, x, x, act)
    return found


TABLES = {"aot": "row_launches", "aot_attention": "attention_launches", "aot_linear": "linear_launches"}


def launches() -> dict[str, Launch]:
    """All launches by name."""
    found = {}
    for file, function in TABLES.items():
        if file == "aot":
            made = row_launches()
        elif (ROOT / "tests" / f"{file}.py").exists():
            made = getattr(importlib.import_module(file), function)()
        else:
            continue
        found |= {k: Launch(v) if callable(v) else v for k, v in made.items()}
    return found


# --- compiling --------------------------------------------------------------------------------------------------


class _Driver:
    """Answers what Triton asks about the GPU when it compiles."""

    def __init__(self, name: str):
        from triton.backends.compiler import GPUTarget

        self.name = name
        self.target = GPUTarget("hip", name, 64) if name[0] == "g" else GPUTarget("cuda", int(name[3:]), 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return list(SHARED).index(self.name)  # Triton keeps compiled kernels by device: one number per target

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_active_torch_device(self):
        return torch.device("meta")


def compile_launch(name: str, target: str) -> list[dict]:
    """Compile all kernels of one launch; one row of the report for each."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    made, stock = [], JITFunction.run

    def only_compile(self, *args, grid, warmup, **options):
        made.append((self.fn.__name__.strip("_"), stock(self, *args, grid=grid, warmup=True, **options)))

    launch, start = launches()[name], time.time()
    driver.set_active(_Driver(target))
    JITFunction.run = only_compile
    try:
        launch.run()
    except Exception as e:
        problem = f"does not compile: {type(e).__name__}: {str(e)[-600:]}"
        return [{"key": name, "target": target, "problems": [problem]}]
    finally:
        JITFunction.run = stock
    rows, seen = [], collections.Counter()
    for kernel, compiled in made:
        seen[kernel] += 1
        key = f"{name}: {kernel}" + (f" {seen[kernel]}" if seen[kernel] > 1 else "")
        row = {
            "key": key,
            "target": target,
            "warps": compiled.metadata.num_warps,
            "shared": compiled.metadata.shared,
        }
        row |= _amd(compiled) if target[0] == "g" else _nvidia(compiled, int(target[3:]))
        if kernel in launch.weights and row["loop"]:
            lanes = row["warps"] * (64 if target[0] == "g" else 32)
            row["per_weight"] = round(row["loop"] * lanes / launch.weights[kernel](), 2)
        allowed = launch.spill.get(target, 0)
        problems = [f"address in 32 bits: {line}" for line in narrow_products(compiled.asm["ttir"])]
        if row["spill"] > allowed:
            problems.append(f"spills {row['spill']} bytes, allowed {allowed}")
        if row["shared"] > SHARED[target]:
            problems.append(f"shared memory {row['shared']} of {SHARED[target]} bytes")
        if row.pop("serialised", False):
            problems.append("tensor-core instructions are serialised (ptxas)")
        rows.append({**row, "problems": problems, "seconds": time.time() - start})
    return rows


# --- reading machine code -----------------------------------------------------------------------------------------

# /*0040*/  @P0 LDG.E.128 R4, ...
OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)")
TENSOR = re.compile(r"^(HGMMA\.\w+|[HI]MMA\.\d+)")


def _nvidia(compiled, arch: int) -> dict:
    import triton.backends.nvidia as nvidia
    from triton.backends.nvidia.compiler import get_ptxas

    def tool(*command) -> str:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        return done.stdout + done.stderr

    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        cubin.write_bytes(compiled.asm["cubin"])
        name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        # a second time, as Triton does it, for what ptxas says
        log = tool(get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", name, ptx, "-o", os.devnull)
        sass = tool(Path(nvidia.__file__).parent / "bin" / "nvdisasm", "-c", cubin).splitlines()
    kinds = collections.Counter()
    for line in sass:
        if not (found := OPCODE.match(line)):
            continue
        op = found[1]
        if tensor := TENSOR.match(op):
            kinds[tensor[1]] += 1
        elif op.startswith(("LDG", "STG")) and not op.startswith("LDGSTS"):
            width = re.search(r"\.(64|128)\b", op)
            kinds[f"{op[:3]}{width[1] if width else 32}"] += 1
        elif name := {"LDGSTS": "cp.async", "UTMALD": "TMA", "LDSM.1": "ldmatrix"}.get(op[:6]):
            kinds[name] += 1
        elif op.startswith(("ATOM", "RED.")):
            kinds["ATOM"] += 1
    stores, loads = map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups())
    return {
        "regs": int(re.search(r"Used (\d+) registers", log)[1]),
        "spill": stores + loads,
        "loop": _hot_loop(sass),
        "kinds": dict(sorted(kinds.items())),
        "serialised": "serializ" in log,
    }


def _hot_loop(sass: list[str]) -> int:
    """Count the instructions of the loop with the most tensor-core work; without such work, of the longest one.

    Only innermost loops count: what lies between a label and a later jump back to it, with no such jump inside.
    """
    labels, best = {}, (0, 0)
    last_jump = -1
    for i, line in enumerate(sass):
        if found := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[found[1]] = i
        elif (found := re.search(r"\bBRA\b[^(`]*`\((\.L_x_\d+)\)", line)) and found[1] in labels:
            if labels[found[1]] > last_jump:  # else a loop lies inside
                ops = [m[1] for m in map(OPCODE.match, sass[labels[found[1]] : i + 1]) if m]
                if len(ops) > 1:  # a jump to itself pads the end of every kernel
                    best = max(best, (sum(bool(TENSOR.match(op)) for op in ops), len(ops)))
            last_jump = i
    return best[1]


def _amd(compiled) -> dict:
    text = compiled.asm["amdgcn"]
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
    kinds = collections.Counter(re.findall(r"\bv_mfma_[a-z0-9_]+", text))
    kinds.update(re.findall(r"\b(?:global|buffer)_(?:load|store)_[a-z0-9]+", text))
    # scalar registers that do not fit go to lanes of a vector register, not to memory: they are not counted
    spill = 4 * number("vgpr_spill_count")
    return {"regs": number("vgpr_count"), "spill": spill, "loop": 0, "kinds": dict(sorted(kinds.items()))}


def narrow_products(ttir: str) -> list[str]:
    """Find 32-bit products of a varying number and an argument that end in an address.

    Varying: a program's number, a loop's, or what was loaded. `row * stride` passes 2³¹ in a long tensor, without a
    word from Triton: one of them must be int64 before they meet. Products with constants are fine (blocks are small),
    and so are those of a lane's number: a block's rows are few.
    """
    made, line_of = {}, {}  # value -> (operation, operands); value -> its line
    names = re.compile(r"%[\w#]+")
    for line in ttir.splitlines():
        line = re.sub(r"\s*loc\(.*$", "", line).strip()
        if loop := re.match(r"(?:(%\w+)(?::\d+)? = )?scf\.for (%\w+) = ", line):
            made[loop[2]] = ("loop", [])
            pairs = re.findall(
                r"(%\w+) = (%\w+)", line.split("iter_args", 1)[-1] if "iter_args" in line else ""
            )
            made |= {inside: ("carried", [outside]) for inside, outside in pairs}
            if loop[1]:
                made[loop[1]] = ("carried", [outside for _, outside in pairs])
        elif value := re.match(r"(%\w+)(?::\d+)? = \"?([\w.]+)\"?(.*)$", line):
            made[value[1]] = (value[2], names.findall(value[3].split(" : ")[0]))
            line_of[value[1]] = line

    def reach(value: str, wanted: Callable[[str, str], bool], seen: set) -> bool:
        """Tell whether `value` is computed from something wanted, not looking through other addresses."""
        value = value.split("#")[0]
        if value in seen:
            return False
        seen.add(value)
        operation, operands = made.get(value, ("argument", []))
        if wanted(operation, value):
            return True
        return operation != "tt.load" and any(reach(v, wanted, seen) for v in operands)

    varies = lambda op, _: op in ("tt.get_program_id", "loop", "tt.load")
    argument = lambda op, _: op == "argument"
    bad = []
    for value, (operation, operands) in made.items():
        if operation != "arith.muli" or not re.search(r"i32>?$", line_of[value]):
            continue
        a, b = operands
        pairs = ((a, b), (b, a))
        if not any(reach(x, varies, set()) and reach(y, argument, set()) for x, y in pairs):
            continue
        offsets = [pair[1] for op, pair in made.values() if op == "tt.addptr"]
        if any(reach(o, lambda _, v, value=value: v == value, set()) for o in offsets):
            bad.append(line_of[value])
    return bad


# --- the report ---------------------------------------------------------------------------------------------------


def compare(row: dict, committed: dict | None) -> list[str]:
    """Say what is more than 5 % worse than the committed numbers."""
    worse = []
    for what in COMPARED:
        old, new = (committed or {}).get(what), row.get(what, 0)
        if old is None:
            continue
        if new > 1.05 * old and new - old > 2 * (what == "regs"):
            worse.append(f"{what} {old} -> {new}")
    return worse


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--only", default="", help="launches whose name matches this pattern")
    options.add_argument("--targets", default=",".join(SHARED), help="GPUs, by comma")
    options.add_argument("--write", action="store_true", help="write kernels/aot.json")
    options.add_argument("--jobs", type=int, default=os.cpu_count())
    chosen = options.parse_args()
    committed = json.loads(COMMITTED.read_text("utf-8")) if COMMITTED.exists() else {}
    wanted = [
        (name, target)
        for name, launch in launches().items()
        for target in chosen.targets.split(",")
        if re.search(chosen.only, name) and target in launch.targets
    ]
    start, failed, report = time.time(), 0, {}
    print(f"{'':56}{'target':8}{'warps':>5}{'regs':>6}{'spill':>6}{'shared':>8}{'loop':>6}  instructions")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
        for rows in pool.map(compile_launch, *zip(*wanted)):
            for row in rows:
                key, target, problems = row["key"], row["target"], row["problems"]
                problems += compare(row, committed.get(key, {}).get(target))
                failed += bool(problems)
                if "regs" in row:
                    kinds = " ".join(f"{k}:{n}" for k, n in row["kinds"].items())
                    weight = f" {row['per_weight']} per weight" if "per_weight" in row else ""
                    numbers = (
                        f"{row['warps']:5}{row['regs']:6}{row['spill']:6}{row['shared']:8}{row['loop']:6}"
                    )
                    print(f"{key:56}{target:8}{numbers}  {kinds}{weight}")
                    kept = {what: row[what] for what in ("warps", *COMPARED) if what in row}
                    report.setdefault(key, {})[target] = kept
                else:
                    print(f"{key:56}{target}")
                for problem in problems:
                    print(f"  FAIL {problem}", flush=True)
    if chosen.write:
        kept = committed if chosen.only or chosen.targets != ",".join(SHARED) else {}
        for key, targets in report.items():
            kept[key] = {**kept.get(key, {}), **targets}
        lines = [
            f"{json.dumps(key)}: {{\n"
            + ",\n".join(f"  {json.dumps(t)}: {json.dumps(n)}" for t, n in sorted(kept[key].items()))
            + "\n}"
            for key in sorted(kept)
        ]
        COMMITTED.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")
        print(f"wrote {COMMITTED.relative_to(ROOT)}")
    gone = [] if chosen.only or chosen.write else sorted(set(committed) - set(report))
    failed += len(gone)
    for key in gone:
        print(f"FAIL {key}: committed, and not compiled any more (--write forgets it)")
    new = sorted(set(report) - set(committed))
    print(f"{len(new)} not in kernels/aot.json yet" if new and not chosen.write else "", end="")
    print(f"\n{sum(map(len, report.values()))} kernels, {failed} with problems, {time.time() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
