"""linear_nll and the products with 8- and 4-bit matrices as Triton kernels; see triton_cases.py."""

import sys

import interp_shim
import pytest
import torch
import torch.nn.functional as F
import triton_cases as cases
from conftest import launch
from torch.utils.checkpoint import checkpoint
from triton_cases import DTYPES, check, compare, pairwise, randn

import kernels

linear_nll_file = sys.modules["kernels.linear_nll"]  # the attribute kernels.linear_nll is the function
OP = torch.ops.baizhi


# --- 1. linear_nll ------------------------------------------------------------------------------------------


@pytest.fixture(params=["one chunk", "chunks"])
def chunk(request, monkeypatch):
    small_chunks(monkeypatch, request.param)


def small_chunks(monkeypatch, kind):
    """Let the backward pass work in chunks of 64 words or so, and the forward pass in parts of 64 rows or so."""
    if kind == "chunks":
        monkeypatch.setitem(linear_nll_file.CHUNK_ELEMENTS, "cuda", 64 * 40)
        monkeypatch.setattr(linear_nll_file, "PAIRS", 64 * 4)


def head(N, V, C, dtype, bias="", targets="some", trained="xwb", scale=1.0, w_dtype=None):
    """Inputs of linear_nll: targets "some", "none", "all" say which rows are ignored."""
    x = randn(N, C, dtype=dtype, grad="x" in trained)
    w = randn(V, C, seed=1, scale=scale / C**0.5, dtype=w_dtype or dtype, grad="w" in trained)
    b = randn(V, seed=2, dtype=w_dtype or dtype, grad="b" in trained) if bias else None
    goal = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    goal[0], goal[-1] = 0, V - 1
    ignored = {
        "some": torch.arange(N) % 3 == 1,
        "blocks": torch.arange(N) < N // 2 + 13,
        "none": [],
        "all": slice(None),
    }
    goal[ignored[targets]] = -100
    return x, w, b, goal


SHAPES = [(37, 101, 48), (1, 2, 1), (64, 128, 64), (70, 150, 33), (65, 257, 7)]


@pytest.mark.parametrize(
    "case",
    pairwise(
        shape=SHAPES,
        dtype=DTYPES,
        bias=["", "bias"],
        targets=["some", "blocks", "none", "all"],
        trained=["xwb", "x", "wb"],
        chunk=["one chunk", "chunks"],
    ),
    ids=cases.name,
)
def test_linear_nll(case, monkeypatch):
    small_chunks(monkeypatch, case["chunk"])
    if case["trained"] == "x" and case["shape"] == (1, 2, 1):
        case = case | {"trained": "xwb"}
    inputs = head(*case["shape"], *(case[k] for k in ("dtype", "bias", "targets", "trained")))
    check(kernels.linear_nll, inputs, case["dtype"], zero=1e-3)


def test_linear_nll_survives_logits_of_80(chunk):
    inputs = head(40, 101, 48, torch.float32, scale=25.0)
    assert F.linear(*inputs[:2]).abs().max() > 70
    check(kernels.linear_nll, inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_nll_gives_fp32_masters_their_gradient_in_fp32(dtype, chunk):
    x, w, b, goal = head(40, 101, 48, dtype, "bias", w_dtype=torch.float32)
    w, b = (
        t.detach().to(dtype).float().requires_grad_() for t in (w, b)
    )  # so the cast to x's dtype is exact
    check(kernels.linear_nll, (x, w, b, goal), dtype)
    grads = torch.autograd.grad(kernels.linear_nll(x, w, b, goal)[0].sum(), (x, w, b))
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]


def test_linear_nll_takes_any_strides():
    x, w, _, goal = head(40, 66, 32, torch.float32)
    x = F.pad(x.detach(), (0, 3))[:, :32].requires_grad_()  # rows apart
    w = w.detach().t().contiguous().t().requires_grad_()  # by columns
    goal = goal.repeat_interleave(2)[::2]
    check(kernels.linear_nll, (x, w, None, goal), torch.float32)


@pytest.mark.parametrize("which", [0, 1])
def test_linear_nll_one_output_alone(which):
    inputs = head(40, 66, 32, torch.float32)

    def one(*inputs):
        return kernels.linear_nll(*inputs)[which]

    check(one, inputs, torch.float32)


def test_linear_nll_adds_a_tied_weights_gradient_to_the_embeddings():
    ids = torch.tensor([1, 2, 3, 3])
    goal = torch.tensor([2, 3, -100, 49])

    def tied(w):
        return kernels.linear_nll(F.embedding(ids, w), w, None, goal)

    check(tied, (randn(50, 16),), torch.float32)


def test_linear_nll_of_no_rows_is_empty():
    x, w, b, goal = head(4, 66, 32, torch.float32, "bias")
    nll, lse = kernels.linear_nll(x[:0], w, b, goal[:0])
    grads = torch.autograd.grad(nll.sum() + lse.sum(), (x, w, b))
    assert nll.shape == lse.shape == (0,) and not any(g.any() for g in grads)


def test_linear_nll_words_that_a_bias_forbids():
    x, w, b, goal = head(20, 101, 16, torch.float32, "bias", "none")
    b = torch.where(torch.arange(101) < 70, -float("inf"), b.detach())  # whole tiles of them
    goal.clamp_(min=70)
    nll, lse = kernels.linear_nll(x, w, b, goal)
    want = kernels.linear_nll(x, w[70:], b[70:], goal - 70)
    dx, dw = torch.autograd.grad(nll.sum() + lse.square().sum(), (x, w))
    assert torch.allclose(nll, want[0], atol=1e-5) and torch.allclose(lse, want[1], atol=1e-5)
    assert dx.isfinite().all() and not dw[:70].any()


def test_linear_nll_holds_no_more_than_it_says(monkeypatch):
    """Of the logits' gradient a chunk, of the forward pass its pairs."""
    from kernels import _linear_nll_triton as launchers

    sizes, empty = [], torch.empty

    def spy(*shape, **how):
        sizes.append(torch.Size(shape[0] if isinstance(shape[0], tuple) else shape).numel())
        return empty(*shape, **how)

    x, w, _, goal = head(128, 512, 8, torch.bfloat16)
    monkeypatch.setattr(launchers.torch, "empty", spy)
    nll, lse = launchers.forward(x.detach(), w.detach(), None, goal, 512)
    launchers.backward(
        nll, lse, x.detach(), w.detach(), None, goal, lse, True, torch.bfloat16, False, 64 * 128
    )
    assert max(sizes) == 64 * 128 < nll.numel() * len(w)


@pytest.mark.parametrize("bias", ["", "bias"])
def test_linear_nll_is_an_operator_that_torch_understands(bias):
    inputs = head(9, 40, 8, torch.bfloat16, bias)
    torch.library.opcheck(OP.linear_nll.default, inputs)
    grads = randn(9, grad=False), randn(9, grad=False)
    frozen = [None if t is None else t.detach() for t in inputs]
    for needs in ((True, True, bool(bias)), (True, False, False), (False, True, False)):
        torch.library.opcheck(OP.linear_nll_backward.default, (*grads, *frozen, grads[0], *needs))


def test_linear_nll_compiled_and_checkpointed():
    inputs = head(33, 70, 16, torch.float32, "bias")

    def loss(x, w, b, goal):
        nll, lse = kernels.linear_nll(x * 2, w, b, goal)
        return nll.mean() + 1e-2 * lse.square().mean()

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = lambda *inputs: checkpoint(loss, *inputs, use_reentrant=False)
    want = torch.autograd.grad(loss(*inputs), inputs[:3])
    for other in (whole, again):
        assert all(map(torch.equal, torch.autograd.grad(other(*inputs), inputs[:3]), want))


def sharded_head(folder):
    """Train a head that FSDP2 cut into two shards; compare with the whole one."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    interp_shim.install()
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    class Head(torch.nn.Linear):
        def forward(self, x, goal):
            return kernels.linear_nll(x, self.weight, self.bias, goal)

    torch.manual_seed(0)
    model, whole = Head(16, 67), Head(16, 67)
    whole.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    x, _, _, goal = head(40, 67, 16, torch.float32)
    model(x[rank::2], goal[rank::2])[0].sum().backward()  # FSDP takes the mean over ranks
    whole(x, goal)[0].sum().backward()
    for mine, truth in zip(model.parameters(), whole.parameters()):
        assert torch.allclose(2 * mine.grad.full_tensor(), truth.grad, atol=1e-5)
    dist.destroy_process_group()


def test_linear_nll_under_fsdp(tmp_path):
    launch(sharded_head, tmp_path)


# --- 2. products with matrices of 8 and 4 bits ----------------------------------------------------------------


def matrix(N, K, bits, G, zeros, scale_dtype=torch.float16):
    """q, zeros, scales of a matrix (N, K) with G groups in a row, in which every value occurs; and itself in fp64."""
    draw = torch.Generator().manual_seed(1000 * cases.SEED + N + K)
    q = torch.randint(2**bits, (N, K), generator=draw, dtype=torch.uint8)
    q.view(-1)[: 2**bits] = torch.arange(2**bits)[: N * K]
    zero = torch.full((N, G), 2 ** (bits - 1), dtype=torch.uint8)
    if zeros == "asymmetric":
        zero = torch.randint(2**bits, (N, G), generator=draw, dtype=torch.uint8)
    scales = (torch.rand(N, G, generator=draw) * 0.1 + 0.01).to(scale_dtype)
    w = (q.double().view(N, G, -1) - zero.double()[..., None]) * scales.double()[..., None]
    return (q, zero, scales), w.flatten(1)


def check_product(stored, w, x, bits, dtype, label):
    packed = kernels.packed(*stored, bits, dtype)
    assert isinstance(packed, kernels.Packed) and w.shape == (packed.N, packed.K)
    runs = []
    for seed in (1, 2):
        with interp_shim.order(seed):
            runs.append((packed(x), packed.weight(dtype)))
    assert all(map(torch.equal, *runs)), "other bits when programs run in another order"
    y, whole = runs[0]
    assert y.dtype == dtype and y.shape == (*x.shape[:-1], len(w))
    compare(y, x @ w.to(dtype).T, x.double() @ w.T, dtype, False, f"int{bits}", f"int{bits} {label}")
    compare(whole, w.to(dtype), w, dtype, False, f"int{bits} weight", f"int{bits} weight")


# (outputs, inputs, groups): one group of any length; groups of 32, 64, 96, 128, 256; inputs % 256, inputs % 128
MATRICES = [
    (37, 512, 1),
    (20, 100, 1),
    (16, 320, 10),
    (33, 384, 6),
    (40, 288, 3),
    (24, 512, 4),
    (16, 1024, 4),
]
SCALES = [torch.float16, torch.float32]
ZEROS = ["symmetric", "asymmetric"]


def run_product(case):
    stored, w = matrix(*case["matrix"][:2], case["bits"], case["matrix"][2], case["zeros"], case["scales"])
    x = randn(case["M"], w.shape[1], dtype=case["dtype"], grad=False)
    check_product(stored, w, x, case["bits"], case["dtype"], "vector" if case["M"] == 1 else "matrix")


@pytest.mark.parametrize(
    "case",
    pairwise(matrix=MATRICES, bits=[4, 8], M=[1], dtype=DTYPES, zeros=ZEROS, scales=SCALES),
    ids=cases.name,
)
def test_products_with_one_row(case):
    run_product(case)


@pytest.mark.parametrize(
    "case",
    pairwise(matrix=MATRICES, bits=[4, 8], M=[2, 17, 64, 65], dtype=DTYPES, zeros=ZEROS, scales=SCALES),
    ids=cases.name,
)
def test_products_with_several_rows(case):
    run_product(case)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("M", [1, 32])
def test_a_product_reads_every_field(bits, M):
    """Inputs that are 1 at one place alone give the matrix, column by column, without an error."""
    stored, w = matrix(16, 256, bits, 2, "asymmetric", torch.float32)
    packed, step = kernels.packed(*stored, bits, torch.float32), 1 if M > 1 else 23
    got = torch.cat([packed(x) for x in torch.eye(256)[::step].split(M)])
    assert torch.equal(got.double(), w.float().double().T[::step])


def test_a_product_takes_any_shape_and_strides():
    stored, w = matrix(20, 256, 4, 2, "asymmetric")
    packed = kernels.packed(*stored, 4, torch.float32)
    x = randn(2, 3, 256, grad=False)
    for other in (
        x,
        x[:, :1],
        x[0, 0],
        x[:, :0],
        F.pad(x, (1, 2))[..., 1:-2],
        x.mT.contiguous().mT,
        x[:1, :1] * 1,
    ):
        y = packed(other)
        assert y.shape == (*other.shape[:-1], 20)
        assert torch.allclose(y.double(), other.double() @ w.T, atol=1e-4)


@pytest.mark.parametrize("G", [16, 6])
def test_groups_that_are_no_multiple_of_32_have_no_product(G):
    stored, _ = matrix(8, 240, 4, G, "symmetric")
    assert kernels.packed(*stored, 4, torch.float32) is None


def test_nbytes_counts_what_a_product_reads():
    stored, _ = matrix(64, 1024, 4, 8, "symmetric")
    assert kernels.packed(*stored, 4, torch.bfloat16).nbytes == 64 * 512 + 64 * 8 * 3


def test_products_are_operators_that_torch_understands():
    stored, w = matrix(20, 300, 4, 1, "asymmetric")
    packed = kernels.packed(*stored, 4, torch.float32)
    parts = packed.words, packed.scales, packed.zeros
    for M in (1, 3):
        torch.library.opcheck(OP.quant_product.default, (randn(M, 300, grad=False), *parts, 4, packed.group))
    torch.library.opcheck(OP.quant_whole.default, (*parts, 300, 4, packed.group, torch.bfloat16))
    for M in (3, 70):
        x = randn(M, 300, grad=False)
        assert torch.equal(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_quantised_layer_takes_the_product(shuffled):
    import inference
    from model import Quantization, QuantLinear

    layer, draw = QuantLinear(96, 24, True, Quantization(4, 32)), torch.Generator().manual_seed(0)
    for words in (layer.qweight, layer.qzeros):
        words.copy_(torch.randint(-(2**31), 2**31, words.shape, generator=draw))
    layer.scales.copy_(torch.rand(layer.scales.shape, generator=draw))
    layer.g_idx.copy_((torch.arange(96) % 3 if shuffled else torch.arange(96) // 32).int())
    torch.nn.init.normal_(layer.bias)
    packed = inference.pack(layer, torch.float32)
    x = randn(2, 5, 96, grad=False)
    assert type(packed.matrix).__name__ == "PackedGPU"
    with torch.no_grad():
        assert torch.allclose(packed(x), layer(x), rtol=1e-4, atol=1e-3)
        assert torch.equal(packed.dequantize(torch.bfloat16), layer.dequantize(torch.bfloat16))
