"""What tests/aot.py compiles ahead of time of attention: real shapes, no data."""

import torch

HEADS = {
    "60": (60, 16, 16),
    "64": (64, 64, 8),
    "80": (80, 32, 32),
    "96": (96, 32, 32),
    "128": (128, 40, 40),
}  # D, H, K; 60 phi2-chinese-head, 80 Phi, 128 13B
T = 8192


def attention_launches() -> dict:
    """Give name -> a function that launches kernels on meta tensors."""
    from kernels import _attention_triton as flash

    found = {}

    def add(name, D, H, K, lo=True, slopes=False, cache=False):
        def empty(heads, length=T):  # tokens first, as the projections give them
            return torch.empty(1, length, heads, D, dtype=torch.bfloat16, device="meta").transpose(1, 2)

        whole = lambda *shape: torch.empty(*shape, dtype=torch.int64, device="meta")
        fp32 = lambda *shape: torch.empty(*shape, dtype=torch.float32, device="meta")
        q, k, v, o, do = empty(H), empty(K), empty(K), empty(H), empty(H)
        more = whole(1, T) if lo else None, whole(1) if cache else None, fp32(H) if slopes else None
        found[f"attention {name}"] = lambda: flash.forward(q, k, v, *more)
        found[f"attention backward {name}"] = lambda: flash.backward(do, q, k, v, o, fp32(1, H, T), *more)

    def add_decoding(name, D, H, K, queries=1, slopes=False):
        q = torch.empty(1, queries, H, D, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        k, v = (torch.empty(1, K, T, D, dtype=torch.bfloat16, device="meta") for _ in "kv")
        lengths = torch.empty(1, dtype=torch.int64, device="meta")
        more = torch.empty(H, device="meta") if slopes else None
        found[f"attention_decode {name}"] = lambda: flash.decode(q, k, v, lengths, more)

    for name, shape in HEADS.items():
        add(f"D {name}, documents", *shape)
        add_decoding(f"D {name}", *shape)
    add("D 128, plain", 128, 40, 40, lo=False)
    add("D 128, 8 heads a group, documents", 128, 64, 8)
    add("D 80, 4 heads a group, documents", 80, 32, 8)
    add("D 128, ALiBi, documents", 128, 32, 32, slopes=True)
    add("D 128, cache", 128, 40, 40, lo=False, cache=True)
    add_decoding("D 128, 8 heads a group, 8 queries", 128, 64, 8, queries=8)
    return found
