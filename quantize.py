"""Store a model's matrices in 8 or 4 bits: half or a quarter of the bytes.

    q = round(w / scale) + zero,   ŵ = scale · (q − zero)          one scale and zero for a group of inputs

Every weight is rounded to the nearest value that its group can hold. 8 bits: a group is a row; 4 bits: 128
inputs of a row, and the scale is searched: a smaller one cuts off the largest weights and rounds all others
more finely; that of the least squared error is taken. Zero is in the middle; with --no_sym between the least
and the largest weight. Embedding, norms, biases and, without --head_bits 8, the head stay as they are.

The folder has GPTQ's layout: qweight, qzeros, scales, g_idx instead of a weight, and a quantization_config
(checkpoint_format gptq; with --no_sym gptq_v2). It is made tensor by tensor: about ten bytes a weight of the
largest matrix, and one file of the result, are held at a time; --text loads the whole model.

    python quantize.py out/sft --out out/sft-int4
    python quantize.py out/sft --bits 8 --out out/sft-int8 --text corpus.jsonl   # perplexity before and after
    python generate.py out/sft-int4

Frantar et al. 2022, "GPTQ" (groups; its way of rounding is not here yet); Dettmers et al. 2022, "LLM.int8()".
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import save_file

import checkpoint
import common
import kernels
from generate import load, score
from model import Linear, Model, Quantization, build
from tokenizer import load_tokenizer

# --- 1. one matrix ------------------------------------------------------------------------------------------

SHRINK = [1 - 0.025 * i for i in range(21)]  # shares of the scale that keeps the largest weight: 1 … 0.5
ROWS = 2**22  # weights that are worked at once: the search needs eight fp32 numbers for each
TINY = 2.0**-24  # the least fp16 above 0: the scale of a group of zeros


def round_to_nearest(
    weight: torch.Tensor, bits: int, group: int, sym: bool = True, search: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise a matrix: weight (N, K) -> q (N, K) uint8, zeros (N, K/group) uint8, scales (N, K/group) fp16.

    search: try smaller scales and keep the one of the least squared error. ValueError: not finite; a group's
    range is beyond fp16.
    """
    w = weight.float().unflatten(1, (-1, group))  # (N, G, group)
    if not w.isfinite().all():
        raise ValueError("holds inf or nan")
    low, high, middle = (1, 2**bits - 1, 2 ** (bits - 1)) if bits == 8 else (0, 15, 8)  # int8: ±127
    if sym:
        zero = torch.full_like(w[..., :1], middle)
        widest = w.abs().amax(-1, keepdim=True) / (high - middle)
    else:
        low = 0
        least, most = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        widest = (most - least) / high
    if widest.max() > 65280:  # the largest number of both fp16 and bf16
        raise ValueError(f"a scale of {float(widest.max()):.3g} is beyond fp16")
    best = None
    for share in SHRINK if search else SHRINK[:1]:
        scale = (widest * share).clamp(min=TINY).bfloat16().half().float()  # exact as either
        if not sym:
            zero = (-least * share / scale).round().clamp(0, high)
        q = (w / scale + zero).round().clamp(low, high)
        error = ((q - zero) * scale - w).square().sum(-1, keepdim=True)
        if best is None:
            best = [error, q, zero.clone(), scale]
        else:
            better = error < best[0]
            best = [torch.where(better, new, old) for new, old in zip((error, q, zero, scale), best)]
    _, q, zero, scale = best
    return q.flatten(1).byte(), zero.squeeze(-1).byte(), scale.squeeze(-1).half()


def pack_matrix(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, how: Quantization) -> dict:
    """Bring q (N, K), zeros and scales (N, G) into the tensors of model.QuantLinear, by their names."""
    K, G = q.shape[1], scales.shape[1]
    return {
        "qweight": kernels.pack(q.t(), how.bits, 0),
        "qzeros": kernels.pack(zeros.t(), how.bits, 1) - how.zeros_less_one * kernels.ones(how.bits),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(K) // (K // G)).int(),
    }


# --- 2. a folder --------------------------------------------------------------------------------------------


@dataclass
class QuantizeConfig:
    folder: tyro.conf.Positional[str]  # a model folder or a run
    out: str  # folder to write
    bits: Literal[4, 8] = 4  # a weight's
    group_size: int = 0  # inputs that share a scale; -1: a row; 0: 8 bits -1, 4 bits 128, 64 or 32
    sym: bool = True  # zero in the middle; --no_sym: between the least and the largest weight of a group
    head_bits: Literal[0, 8] = 0  # 8: the head too, one scale a row; a tied head is untied
    search: bool = True  # 4 bits: the scale of the least error; --no_search: the one that cuts nothing off
    text: str = ""  # .txt, .jsonl, …: perplexity before and after, in rows of up to 1,024 tokens
    text_tokens: int = 20_000  # of it at most
    shard_bytes: int = 2_000_000_000  # a file of the result holds at most so much
    device: str = "auto"  # for the perplexity: auto, cpu, cuda


def quantize_folder(config: QuantizeConfig) -> None:
    """Write a quantised copy of a model folder; say of every matrix how much it changed.

    ValueError: an adapter, a quantised folder, a matrix that does not fit the groups; nothing is written.
    """
    folder = checkpoint.model_folder(config.folder)
    if checkpoint.is_adapter_folder(folder):
        raise ValueError(f"{folder}: an adapter; merge it first: python lora.py merge {folder} --out MERGED")
    shape = checkpoint.read_config(folder)
    if shape.quantization:
        raise ValueError(f"{folder} is quantised already; take the model it was made of")
    if config.head_bits and shape.head != "lm":
        raise ValueError(f"--head_bits {config.head_bits}: {folder} has no language-model head")
    how = plan(shape, config)
    result = dataclasses.replace(
        shape, quantization=how, tie_word_embeddings=shape.tie_word_embeddings and not how.head_bits
    )
    build(result, "meta")  # refuses matrices that do not fit
    device = common.start_process(config.device).device
    with common.atomic_folder(config.out) as tmp:
        before = perplexity(folder, config, device) if config.text else None
        lines, sizes = write_quantized(folder, shape, result, config, tmp)
        report = {"tensors": lines, "bytes": sizes}
        if config.text:
            report["perplexity"] = {"before": before, "after": perplexity(tmp, config, device)}
        common.write_json(tmp / "quantization.json", report)
    worst = max(lines, key=lambda line: line["relative_error"])
    mean = math.sqrt(sum(line["relative_error"] ** 2 for line in lines) / len(lines))
    print(
        f"relative error of {len(lines)} matrices: {mean:.4f}, "
        f"the largest {worst['relative_error']:.4f} in {worst['name']}"
    )
    was, now = sizes["before"], sizes["after"]
    print(
        f"weights: {was / 1e9:.3f} GB ({was / 2**30:.3f} GiB) -> {now / 1e9:.3f} GB ({now / 2**30:.3f} GiB)"
    )
    if config.text:
        a, b = report["perplexity"]["before"], report["perplexity"]["after"]
        print(f"perplexity on {config.text}: {a:.4f} -> {b:.4f} ({b / a - 1:+.2%})")
    print(
        f"{config.out}: {config.bits} bits, groups of {how.group_size}, head {how.head_bits or 'as it was'}"
    )


def plan(shape, config: QuantizeConfig) -> Quantization:
    """Choose the group: what was typed; else a row for 8 bits, the largest that fits, up to 128, for 4."""
    group = config.group_size
    if not group:
        inputs = {m.in_features for m in matrices(build(shape, "meta")).values()}
        fitting = [g for g in (128, 64, 32) if all(n % g == 0 for n in inputs)] if config.bits == 4 else []
        group = next(iter(fitting), -1)
    less = config.sym  # symmetric folders are written as everyone reads them, others as v2, which is exact
    return Quantization(config.bits, group, config.sym, zeros_less_one=less, head_bits=config.head_bits)


def matrices(model: Model) -> dict[str, Linear]:
    """Find the linear layers of the blocks, by name; no norm, embedding or head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear) and n.startswith("layers.")}


def write_quantized(
    folder: Path, shape, result, config: QuantizeConfig, out: Path
) -> tuple[list[dict], dict]:
    """Write weights, config and tokenizer into a folder; return the report's lines and the sizes in bytes."""
    source = build(shape, "meta")
    files, names = checkpoint.fitting(source, folder)
    few = set(matrices(source))
    lines, shards, sizes = [], Shards(out, config.shard_bytes), {"before": 0, "after": 0}
    dtype = checkpoint.folder_dtype(folder)
    how = result.quantization
    head = dataclasses.replace(how, bits=8, group_size=-1) if how.head_bits else None
    heads = ("lm_head.weight", "embed_tokens.weight" if shape.tie_word_embeddings else "")
    with common.progress(len(names), "quantise", " tensors") as bar:
        for theirs, ours in sorted(names.items(), key=lambda pair: files[pair[0]]):
            with checkpoint.open_tensors(files[theirs]) as file:
                tensor = file.get_tensor(theirs)
            sizes["before"] += tensor.numel() * dtype.itemsize
            saved = checkpoint.hf_name(ours, shape.family)
            if head and ours in heads:
                shards.add_all(quantized(tensor, "lm_head.weight", head, config, lines))
            if ours.removesuffix(".weight") in few and ours.endswith(".weight"):
                shards.add_all(quantized(tensor, saved, how, config, lines))
            elif not (head and ours == "lm_head.weight"):
                shards.add_all({saved: tensor.to(dtype)})
            bar.update()
    sizes["after"] = shards.close()
    common.write_json(out / "config.json", checkpoint.config_dict(result, dtype))
    if shape.head == "lm":
        path = folder / "generation_config.json"
        said = checkpoint.read_object(path) if path.is_file() else checkpoint.generation_config(result)
        common.write_json(out / "generation_config.json", said)
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        load_tokenizer(folder).save(out)
    return lines, sizes


def quantized(
    tensor: torch.Tensor, name: str, how: Quantization, config: QuantizeConfig, lines: list
) -> dict:
    """Quantise one matrix; return its tensors under their names, and add a line to the report."""
    group = tensor.shape[1] if how.group_size == -1 else how.group_size
    parts, wrong, whole, largest = [], 0.0, 0.0, 0.0
    for w in tensor.split(max(1, ROWS // tensor.shape[1])):
        try:
            q, zeros, scales = round_to_nearest(
                w, how.bits, group, config.sym, config.search and how.bits == 4
            )
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        zero, scale = (t.float().repeat_interleave(group, 1) for t in (zeros, scales))
        error = (q - zero) * scale - w.float()
        wrong, whole = wrong + float(error.square().sum()), whole + float(w.float().square().sum())
        largest = max(largest, float(error.abs().max()))
        parts.append((q, zeros, scales))
    relative = math.sqrt(wrong / whole) if whole else 0.0
    lines.append({"name": name, "bits": how.bits, "relative_error": relative, "max_error": largest})
    q, zeros, scales = (torch.cat(part) for part in zip(*parts))
    return {
        f"{name.removesuffix('weight')}{part}": t for part, t in pack_matrix(q, zeros, scales, how).items()
    }


class Shards:
    """The files of a model folder, written as tensors come."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.held: dict[str, torch.Tensor] = {}
        self.names: list[list[str]] = []  # of the tensors of each file
        self.held_bytes = self.bytes = 0

    def add_all(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take tensors by name; write a file when the next would make it too large."""
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.itemsize
            if self.held and self.held_bytes + size > self.limit:
                self._write()
            self.held[name] = tensor.contiguous()
            self.held_bytes += size

    def _write(self) -> None:
        self.names.append(list(self.held))
        save_file(self.held, self.folder / f"{len(self.names)}.tmp", metadata={"format": "pt"})
        self.bytes += self.held_bytes
        self.held, self.held_bytes = {}, 0

    def close(self) -> int:
        """Write what is held, name the files and their index; return the bytes of all tensors."""
        self._write()
        for i, name in enumerate(checkpoint.shard_files(len(self.names)), 1):
            (self.folder / f"{i}.tmp").rename(self.folder / name)
        if len(self.names) > 1:
            index = checkpoint.shard_index(self.names, self.bytes)
            common.write_json(self.folder / "model.safetensors.index.json", index)
        return self.bytes


# --- 3. perplexity ------------------------------------------------------------------------------------------


def perplexity(folder: Path, config: QuantizeConfig, device: str) -> float:
    """exp of the mean nll of the tokens of --text, one document after another in rows of the context."""
    model, tokenizer = load(folder, device=device, rows=8)
    ids: list[int] = []
    for document in common.documents([config.text]):
        ids += tokenizer.encode_document(document)
        if len(ids) > config.text_tokens:
            break
    length = min(model.config.max_position_embeddings, 1024)
    ids = ids[: config.text_tokens + 1]
    if len(ids) < 2:
        raise ValueError(f"{config.text}: no text")
    rows = [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]
    total = sum(float(score(model, [row])[0].double().sum()) for row in rows)
    return math.exp(total / (len(ids) - 1))


if __name__ == "__main__":
    common.run(quantize_folder, doc=__doc__)
