"""Every Triton kernel in Triton's interpreter: one process per file, as TRITON_INTERPRET is read at import.

The files tests/triton_*.py hold the tests (pytest does not collect them by itself); tests/triton_cases.py says
what they accept. By hand: TRITON_INTERPRET=1 python -m pytest tests/triton_norm.py
"""

import importlib.util
import json
import re

import aot
import pytest
import torch
from conftest import ROOT, run_script

import kernels
from kernels import dispatch

FILES = [p for p in sorted((ROOT / "tests").glob("triton_*.py")) if p.name != "triton_cases.py"]
no_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@no_triton
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_kernels_in_the_interpreter(path):
    env = {"TRITON_INTERPRET": 1, "KERNELS": "auto", "OMP_NUM_THREADS": 1}
    done = run_script("-m", "pytest", "-x", path, timeout=900, **env)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout)


def test_a_machine_without_triton_runs_the_twins():
    code = "import sys; sys.modules['triton'] = None; import torch, kernels; x = torch.ones(2, 4, requires_grad=True);"
    code += "kernels.glu(kernels.rms_norm(x, x[0], 1e-5), x).sum().backward();"
    code += "print([m for m in sys.modules if m.endswith('_triton') and m.startswith('kernels')])"
    done = run_script("-c", code, KERNELS="auto")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_table_of_kernels_readme_is_that_of_aot_json(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "kernels" / "README.md").read_text("utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    table = re.search(r"\| kernel \| sm_80 .*?\n\|[-|]*\n(.*?\n)\n", text, re.DOTALL)[1]
    assert capsys.readouterr().out == table
    rows = json.loads((ROOT / "kernels" / "aot.json").read_text("utf-8"))
    assert f"{len(rows)} kernels of launches, {sum(map(len, rows.values()))} compilations" in " ".join(
        text.split()
    )


TTIR = """
tt.func public @kernel(%x: !tt.ptr<f32>, %stride: i32 {tt.divisibility = 16 : i32}, %n: i32 loc("n"(#loc))) {
  %c8 = arith.constant 8 : i32
  %row = tt.get_program_id x : i32 loc(#loc17)
  %cols = tt.make_range {end = 16 : i32, start = 0 : i32} : tensor<16xi32>
  %0 = arith.extsi %row : i32 to i64
  %1 = arith.extsi %stride : i32 to i64
  %2 = arith.muli %0, %1 : i64
  %3 = tt.addptr %x, %2 : !tt.ptr<f32>, i64
  %4 = tt.splat %stride : i32 -> tensor<16xi32>
  %5 = arith.muli %cols, %4 : tensor<16xi32>
  %6 = tt.splat %3 : !tt.ptr<f32> -> tensor<16x!tt.ptr<f32>>
  %7 = tt.addptr %6, %5 : tensor<16x!tt.ptr<f32>>, tensor<16xi32>
  %8 = arith.muli %row, %c8 : i32
  %9 = tt.addptr %x, %8 : !tt.ptr<f32>, i32
  scf.for %r = %c0 to %n step %c1 iter_args(%sum = %zero) -> (f32) : i32 {
    %10 = arith.muli %row, %stride : i32 loc(#loc7)
    MORE
  }
"""


@pytest.mark.parametrize(
    "more, found",
    [
        ("", 0),  # the product %10 is in no address
        ("%11 = tt.addptr %x, %10 : !tt.ptr<f32>, i32", 1),
        ("%11 = arith.extsi %10 : i32 to i64\n %12 = tt.addptr %x, %11 : !tt.ptr<f32>, i64", 1),  # too late
        ("%11 = arith.muli %n, %r : i32\n %12 = tt.addptr %x, %11 : !tt.ptr<f32>, i32", 1),
        (
            "%11 = tt.load %9 : !tt.ptr<i32>\n %12 = arith.muli %11, %n : i32\n %13 = tt.addptr %x, %12 : !tt.ptr<f32>",
            1,
        ),
    ],
)
def test_addresses_in_32_bits_are_found(more, found):
    assert len(aot.narrow_products(TTIR.replace("MORE", more))) == found


def test_worse_numbers_than_committed_are_found():
    old = {"regs": 100, "spill": 0, "shared": 1000, "loop": 200}
    assert not aot.compare({"regs": 105, "spill": 0, "shared": 1050, "loop": 210}, old)
    assert not aot.compare({"regs": 300, "spill": 0, "shared": 1000, "loop": 200}, None)
    for what, value in (("regs", 106), ("spill", 4), ("shared", 1051), ("loop", 211)):
        assert aot.compare({**old, what: value}, old)


@no_triton
def test_on_a_gpu_all_ops_are_one_graph(monkeypatch):
    """Tensors without memory stand for a GPU's. What chooses the kernels and says so must not end the graph."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def block(x, norm, w, lo, goals, angles):
        y, h = kernels.rms_norm(x, norm, 1e-5, x)
        q, k = kernels.rope_pair(*(y.unflatten(-1, (2, 16)).transpose(1, 2),) * 2, angles, angles)
        y = kernels.attention(q, k, k, lo).transpose(1, 2).flatten(2)
        y = kernels.layer_norm(kernels.glu(y, h), norm, norm, 1e-5)
        return kernels.linear_nll(y.flatten(0, 1), w, None, goals)

    monkeypatch.setenv("KERNELS", "auto")
    dispatch._chosen.__wrapped__.cache_clear()
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    def empty(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device="cuda")

    with FakeTensorMode():
        places = empty(1, 4, dtype=torch.int64), empty(4, dtype=torch.int64)
        inputs = empty(1, 4, 32), empty(32), empty(40, 32), *places, empty(1, 1, 4, 16, dtype=torch.float32)
        torch.compile(block, backend=backend, fullgraph=True)(*inputs)
    assert len(graphs) == 1 and graphs[0].count("torch.ops.baizhi.") == 6
