"""What tests/aot.py compiles ahead of time of linear_nll and the quantised products: real shapes, no data."""

import torch

SHAPES = {"13B": (8192, 5120, 100278), "Phi": (8192, 2560, 51200)}  # N rows, C width, V vocabulary
BF16 = torch.bfloat16


def _empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def linear_launches() -> dict:
    """Give name -> a function that launches kernels on meta tensors; one chunk, as all are alike."""
    from kernels import _linear_nll_triton as nll

    found = {}
    for name, (N, C, V) in SHAPES.items():
        x, w, goals = _empty(N, C), _empty(V, C), _empty(N, dtype=torch.int64)
        b = _empty(V) if name == "Phi" else None  # Phi's head has a bias
        rows = _empty(N, dtype=torch.float32)
        found[f"linear_nll {name}"] = lambda x=x, w=w, b=b, goals=goals: nll.forward(x, w, b, goals, 1 << 24)
        found[f"linear_nll backward {name}"] = lambda x=x, w=w, b=b, goals=goals, rows=rows: nll.backward(
            rows, rows, x, w, b, goals, rows, True, BF16, b is not None, 1 << 30
        )
    x, w = _empty(512, 576, dtype=torch.float32), _empty(17_000, 576, dtype=torch.float32)
    goals, rows = _empty(512, dtype=torch.int64), _empty(512, dtype=torch.float32)
    found["linear_nll fp32"] = lambda: nll.forward(x, w, None, goals, 1 << 24)
    found["linear_nll backward fp32"] = lambda: nll.backward(
        rows, rows, x, w, None, goals, rows, True, torch.float32, False, 1 << 30
    )
    for name, (N, K) in {"13B down": (5120, 13824), "Phi fc1": (10240, 2560)}.items():
        for bits, group in ((4, 128), (4, 32), (8, 128)):
            for M in (1, 16, 64) if group == 128 and name == "13B down" else (1,):
                found[f"int{bits} group {group} M {M} {name}"] = _quantised(N, K, bits, group, M)
    found["int4 group 128 M 16 fp32"] = _quantised(5120, 13824, 4, 128, 16, torch.float32)
    found["int4 whole"] = _quantised(5120, 13824, 4, 128, 0)
    return found


def _quantised(N: int, K: int, bits: int, group: int, M: int, dtype=BF16):
    """Make a function that launches the product of M rows by a matrix (N, K); M 0: its putting together."""
    from aot import Launch

    from kernels import _quant_triton as quant
    from kernels import tables

    block = 1024 // bits
    words = -(-K // block) * 32
    q, x = _empty(N, words, dtype=torch.int32), _empty(M, K, dtype=dtype)
    scales = _empty(words // 32 * block // group, N, dtype=torch.float16)
    zeros = _empty(*scales.shape, dtype=torch.uint8)

    def weights() -> int:
        how = tables.launch("quant_vector", group, dtype)
        return how["BLOCK_N"] * how["BLOCK_W"] * 32 // bits

    if not M:
        return lambda: quant.whole(q, scales, zeros, K, bits, group, BF16)
    run = lambda: quant.product(x, q, scales, zeros, bits, group)
    return Launch(run, weights={"vector_kernel": weights} if M == 1 else {})
