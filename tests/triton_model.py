"""Whole models on Triton kernels against the same models in plain torch and in fp64: loss, every gradient, tokens.

The kernels have their own tests; here it is what lies between them: dtypes, strides, what backward keeps, and that every
operation of a model that should be a kernel is one. Weights are numbers of bf16, so that all three runs begin alike.
"""

import contextlib

import interp_shim
import pytest
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from triton_cases import compare, name, pairwise, randn, twins

import kernels
import train
from common import Process
from generate import Sampling, generate
from inference import fuse
from model import ModelConfig, build
from parallel import ParallelConfig, parallelize

SHAPES = {  # vocabulary, width, layers, heads, MLP width, context; heads of 24 and 20 are padded, 3 are no power of two
    "llama": ModelConfig("llama", 99, 96, 2, 4, 80, 64, 2),
    "phi": ModelConfig("phi", 99, 60, 2, 3, 80, 64, partial_rotary_factor=0.4),
    "bloom": ModelConfig("bloom", 99, 48, 2, 3, 192, 64, tie_word_embeddings=True),
}
ALWAYS = {"attention", "attention_backward", "linear_nll", "linear_nll_backward", "norm", "norm_backward"}
OPERATORS = {  # what a training step launches
    "llama": ALWAYS | {"add_norm", "rope", "glu", "glu_backward"},
    "phi": ALWAYS | {"rope"},
    "bloom": ALWAYS | {"add_norm"},
}
CEILING = {torch.float32: (2e-6, 6e-6), torch.bfloat16: (1.2e-2, 8e-2)}  # twice the worst that was seen
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}  # of the largest number: one rounding of it


class Launched(TorchDispatchMode):
    """Note the names of our operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "baizhi":
            self.names.add(str(function).split(".")[1])
        return function(*args, **(kwargs or {}))


def made(family: str, dtype: torch.dtype, again: bool = False):
    """Make a model as training does, all the same; norm weights lie near 1. Weights are fp32, or fp64 in fp64."""
    kind = "bfloat16" if dtype == torch.bfloat16 else "float32"
    settings = ParallelConfig(dtype=kind, activation_checkpointing=again)
    model = parallelize(build(SHAPES[family], "meta"), Process(0, 1, "cpu"), settings)
    with torch.no_grad():
        for i, (key, p) in enumerate(model.named_parameters()):
            values = randn(*p.shape, seed=i, scale=0.15, grad=False)
            p.copy_((values + 1 if "norm" in key and key.endswith("weight") else values).bfloat16())
    if dtype == torch.float64:
        model.double().compute_dtype = None
    return model


def rows(packed: bool) -> dict:
    """Give a row of two blocks of attention, or two rows of documents as data.py packs them."""
    B, T = (2, 20) if packed else (1, 34)
    ids = torch.randint(0, 99, (B, T + 1), generator=torch.Generator().manual_seed(1))
    batch = {"ids": ids[:, :-1], "targets": ids[:, 1:].clone()}
    if packed:
        batch["doc_ids"] = torch.zeros(B, T, dtype=torch.long)
        for row, end in [(0, 1), (0, 7), (0, 19), (1, 10), (1, 15)]:
            batch["doc_ids"][row, end:] += 1
            batch["targets"][row, end - 1] = -100  # the last token of a document predicts nothing
        batch["doc_ids"][1, 15:], batch["targets"][1, 15:] = -1, -100  # the second row's end is empty
    return batch


def step(model, batch: dict, z_loss: float) -> dict[str, torch.Tensor]:
    """Give what the model returns for every token, and every parameter's gradient."""
    outputs = []

    def keep(*args, **options):
        outputs.append(model(*args, **options))
        return outputs[0]

    value, count, _ = train.next_token_loss(keep, batch, z_loss)
    (value / count).backward()
    tokens = dict(zip(("nll", "lse"), outputs[0] if z_loss else outputs))
    return tokens | {key: p.grad for key, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def every_launch_is_on_its_tensors_device(monkeypatch):
    """Triton launches on the current GPU: count the launches inside of torch.cuda.device_of."""
    begin, inside = interp_shim.launches, 0

    @contextlib.contextmanager
    def device_of(tensor):
        nonlocal inside
        before = interp_shim.launches
        yield
        inside += interp_shim.launches - before

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    yield
    assert inside == interp_shim.launches - begin > 0


CASES = pairwise(
    family=list(SHAPES),
    dtype=list(CEILING),
    packed=[False, True],
    again=[False, True],
    z_loss=[0.0, 1e-2],
)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_step_on_kernels_equals_the_step_in_plain_torch(case):
    family, dtype, batch = case["family"], case["dtype"], rows(case["packed"])
    before = interp_shim.launches
    with Launched() as operators:
        got = step(made(family, dtype, case["again"]), batch, case["z_loss"])
    assert interp_shim.launches > before and operators.names == OPERATORS[family]
    with twins(), Launched() as operators:
        plain, truth = (step(made(family, kind), batch, case["z_loss"]) for kind in (dtype, torch.float64))
    assert not operators.names and got.keys() == plain.keys() == truth.keys()
    for key, t in truth.items():
        back = key not in ("nll", "lse")
        assert got[key].dtype == plain[key].dtype == torch.float32
        what, bounds = (
            f"{family}, {'gradient of ' if back else ''}{key}",
            (CEILING[dtype][back], FLOOR[dtype]),
        )
        compare(got[key], plain[key], t, dtype, back, what, family, 1.0, *bounds)


def test_the_command_line_chooses_attention(tmp_path):
    flags = ["--out", str(tmp_path / "run"), "--device", "cpu", "--attention"]
    try:
        for choice in ("sdpa", "triton"):
            train.begin(tyro.cli(train.TrainConfig, args=[*flags, choice]))
            with Launched() as operators, torch.no_grad():
                made("bloom", torch.float32)(torch.ones(1, 2, dtype=torch.long))
            assert ("attention" in operators.names) == (choice == "triton") and "norm" in operators.names
    finally:
        kernels.use_attention("auto")


@pytest.mark.parametrize("family", SHAPES)
def test_a_ragged_batch_writes_the_same_tokens(family):
    prompts = [list(range(1, 1 + n)) for n in (1, 17, 9)]
    greedy = Sampling(max_new_tokens=6, temperature=0)
    with Launched() as operators:
        got = generate(fuse(made(family, torch.float32), rows=3), prompts, greedy)
    assert {"attention", "attention_decode", "norm"} <= operators.names
    with twins():
        want = generate(made(family, torch.float32), prompts, greedy)
        alone = [generate(made(family, torch.float32), [p], greedy)[0] for p in prompts]
    assert got == want == alone and len(set(map(tuple, want))) == 3
