"""Store a model's matrices in 8 or 4 bits: half or a quarter of the bytes.

    q = round(w / scale) + zero,   ŵ = scale · (q − zero)          one scale and zero for a group of inputs

8 bits: a group is a row; 4 bits: 128 inputs of a row, and the scale is searched: a smaller one cuts off the
largest weights and rounds all others more finely; that of the least squared error is taken. Zero is in the
middle; with --no_sym between the least and the largest weight. Embedding, norms, biases and, without
--head_bits 8, the head stay as they are.

Each weight is rounded to the nearest value. With --calibrate TEXT (GPTQ) what counts is the error of the
products: column after column is rounded, and the columns that are left make up for it, as far as the inputs
of that text allow: with H = Σ x xᵀ and U the upper Cholesky factor of its inverse,

    e = (w_j − ŵ_j) / U_jj,   w_k ← w_k − e · U_jk  for all k > j       inputs of much power first

The folder has GPTQ's layout: qweight, qzeros, scales, g_idx instead of a weight, and a quantization_config
(checkpoint_format gptq; with --no_sym gptq_v2). It is made layer by layer: about ten bytes a weight of the
largest matrix and one file of the result are held at a time; with --calibrate a block, its H and the
activations of the text; --text loads the whole model.

    python quantize.py out/sft --out out/sft-int4
    python quantize.py out/sft --out out/sft-gptq --calibrate corpus.jsonl
    python quantize.py out/sft --bits 8 --out out/sft-int8 --text corpus.jsonl   # perplexity before and after
    python generate.py out/sft-int4

Frantar et al. 2022, "GPTQ"; Dettmers et al. 2022, "LLM.int8()".
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn
import tyro
from safetensors.torch import save_file

import checkpoint
import common
import kernels
from generate import check_vocabulary, load, score
from model import Block, Linear, Model, ModelConfig, Quantization, build
from tokenizer import Tokenizer, load_tokenizer

# --- 1. one matrix ------------------------------------------------------------------------------------------

# Shares of the scale that keeps the largest weight. The least squared error often lies lower, but cutting off
# costs more than it says: down to 0.5 the demonstration's perplexity rose by 1.3 %, down to 0.9 by 0.2 %.
SHRINK = [1 - 0.025 * i for i in range(5)]
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
    low, high = limits(bits, sym)
    if sym:
        middle = 2 ** (bits - 1)
        zero = torch.full_like(w[..., :1], middle)
        widest = w.abs().amax(-1, keepdim=True) / (high - middle)
    else:
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


def limits(bits: int, sym: bool) -> tuple[int, int]:
    """Give the least and the largest q; symmetric int8 is ±127 around its zero."""
    return (1, 255) if bits == 8 and sym else (0, 2**bits - 1)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    low: int,
    high: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose q in [low, high] so that products change least: weight (N, K) -> q (N, K) uint8, zeros, scales.

    hessian (K, K) fp32: Σ x xᵀ of the inputs. zeros and scales (N, G) are given before and stay ("static
    groups"): so inputs can be taken by their power ("act-order") and yet stay where they are.
    """
    power, group = hessian.diagonal(), weight.shape[1] // zeros.shape[1]
    order = power.argsort(descending=True)
    H = hessian[order][:, order]
    H.diagonal().add_(0.01 * power.mean() + (power.mean() == 0))  # so that it can be inverted
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, q = weight.float()[:, order], torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for a in range(0, len(order), COLUMNS):
        b = min(a + COLUMNS, len(order))
        errors = torch.empty_like(W[:, a:b])
        for j in range(a, b):
            g = int(order[j]) // group
            scale, zero = scales[:, g].float(), zeros[:, g].float()
            value = (W[:, j] / scale + zero).round_().clamp_(low, high)
            q[:, order[j]] = value.byte()
            error = (W[:, j] - (value - zero) * scale) / U[j, j]
            W[:, j + 1 : b].addr_(error, U[j, j + 1 : b], alpha=-1)
            errors[:, j - a] = error
        W[:, b:] -= errors @ U[a:b, b:]
    return q, zeros, scales


COLUMNS = 128  # after so many columns the rest of the matrix is corrected at once


def values_of(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Give the weights (N, K) fp32 that q, zeros and scales stand for."""
    groups = q.float().unflatten(1, (zeros.shape[1], -1))
    return ((groups - zeros[..., None]) * scales.float()[..., None]).flatten(1)


class Rounded(NamedTuple):
    """A quantised matrix, and how far it is from what it was."""

    q: torch.Tensor  # (N, K) uint8
    zeros: torch.Tensor  # (N, G) uint8
    scales: torch.Tensor  # (N, G) fp16
    errors: dict[str, float]  # relative_error, max_error; of GPTQ output_error and that of rounding alone


class Rounding:
    """One way to quantise matrices."""

    def __init__(self, how: Quantization, sym: bool, search: bool = True):
        self.how, self.sym, self.search = how, sym, search and how.bits == 4

    def __call__(self, name: str, weight: torch.Tensor, hessian: torch.Tensor | None = None) -> Rounded:
        """Round a matrix (N, K) to the nearest values or, with a hessian (K, K), by GPTQ."""
        group = weight.shape[1] if self.how.group_size == -1 else self.how.group_size
        how = self.how.bits, group, self.sym, self.search
        step = max(1, ROWS // weight.shape[1])
        try:
            parts = [round_to_nearest(w, *how) for w in weight.split(step)]
            found = tuple(torch.cat(part) for part in zip(*parts))
            more = {}
            if hessian is not None:
                more["nearest_output_error"] = output_error(weight, values_of(*found), hessian)
                found = gptq(weight, hessian, found[1], found[2], *limits(self.how.bits, self.sym))
                more["output_error"] = output_error(weight, values_of(*found), hessian)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        wrong = whole = largest = 0.0
        for a in range(0, len(weight), step):
            w = weight[a : a + step].float()
            error = values_of(*(t[a : a + step] for t in found)) - w
            wrong, whole = wrong + float(error.square().sum()), whole + float(w.square().sum())
            largest = max(largest, float(error.abs().max()))
        relative = math.sqrt(wrong / whole) if whole else 0.0
        return Rounded(*found, {"relative_error": relative, "max_error": largest} | more)


def output_error(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor) -> float:
    """Compare the products of all inputs x of hessian = Σ x xᵀ: ‖(ŵ − w) x‖ / ‖w x‖."""
    wrong, whole = (float(((m @ hessian) * m).sum()) for m in (rounded - weight.float(), weight.float()))
    return math.sqrt(wrong / whole) if whole > 0 else 0.0


def pack_matrix(q: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, how: Quantization) -> dict:
    """Bring q (N, K), zeros and scales (N, G) into the tensors of model.QuantLinear, by their names."""
    K, G = q.shape[1], scales.shape[1]
    return {
        "qweight": kernels.pack(q.t(), how.bits, 0),
        "qzeros": kernels.pack(zeros.t(), how.bits, 1) - how.zeros_less_one * kernels.ones(how.bits),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(K) // (K // G)).int(),
    }


# --- 2. what a text makes of the inputs ---------------------------------------------------------------------


class Calibration:
    """The activations of a text, taken through the blocks of a model one by one, as each is quantised."""

    def __init__(self, model: Model, read: Callable[[str], torch.Tensor], rows: torch.Tensor):
        """Embed rows (R, T) of ids. model: on the meta device; read: give its tensor of a name."""
        self.model, self.read, self.device = model, read, rows.device
        x = read("embed_tokens.weight")[rows.cpu()].to(self.device, common.best_dtype(str(self.device)))
        if model.embed_norm is not None:
            x = self._filled(model.embed_norm, "embed_norm", x.dtype)(x)
        self.x = x  # (R, T, C)

    def _filled(self, module: nn.Module, name: str, dtype: torch.dtype) -> nn.Module:
        module = copy.deepcopy(module).to(dtype).to_empty(device=self.device).requires_grad_(False)
        for part, p in module.named_parameters():
            p.copy_(self.read(f"{name}.{part}"))
        return module

    @torch.no_grad()
    def layer(self, i: int, work: Rounding) -> dict[str, Rounded]:
        """Quantise the matrices of block i in the order of use, {name of the weight: matrix}.

        Each sees inputs that come through the rounded ones before it.
        """
        block = self._filled(self.model.layers[i], f"layers.{i}", self.x.dtype).eval()
        names = {m: f"layers.{i}.{n}.weight" for n, m in block.named_modules() if isinstance(m, Linear)}
        found = {}
        for layers in self._stages(block):
            hessian = self._hessian(block, layers[0])
            for layer in layers:
                name = names[layer]
                rounded = work(name, self.read(name).to(self.device), hessian)
                layer.weight.copy_(values_of(*rounded[:3]))
                found[name] = Rounded(*(t.cpu() for t in rounded[:3]), rounded.errors)
        self._run(block, self.x)
        return found

    @staticmethod
    def _stages(block: Block) -> list[list[Linear]]:
        """Group the matrices by the input that they read, in the order of use."""
        attn, mlp = block.self_attn, block.mlp
        qkv = [attn.query_key_value] if attn.interleaved else [attn.q_proj, attn.k_proj, attn.v_proj]
        up = [mlp.up_proj] if mlp.gate_proj is None else [mlp.gate_proj, mlp.up_proj]
        return [qkv, [attn.o_proj], up, [mlp.down_proj]]

    def _hessian(self, block: Block, layer: Linear) -> torch.Tensor:
        """Sum up x xᵀ (K, K) fp32 over all inputs x of a layer."""
        H = torch.zeros(layer.in_features, layer.in_features, device=self.device)

        def add(_, inputs):
            x = inputs[0].flatten(0, 1).float()
            H.addmm_(x.T, x)

        hook = layer.register_forward_pre_hook(add)
        self._run(block)
        hook.remove()
        return H

    def _run(self, block: Block, out: torch.Tensor | None = None) -> None:
        """Put all activations through a block, a few thousand tokens at a time; keep the results in `out`."""
        T = self.x.shape[1]
        at = self.model.positions(1, T, self.device)
        for r in range(0, len(self.x), max(1, 4096 // T)):
            part = slice(r, r + max(1, 4096 // T))
            y = block(self.x[part], at)
            if out is not None:
                out[part] = y


# --- 3. a folder --------------------------------------------------------------------------------------------


@dataclass
class QuantizeConfig:
    folder: tyro.conf.Positional[str]  # a model folder or a run
    out: str  # folder to write
    bits: Literal[4, 8] = 4  # a weight's
    group_size: int = 0  # inputs that share a scale; -1: a row; 0: 8 bits -1, 4 bits 128, 64 or 32
    sym: bool = True  # zero in the middle; --no_sym: between the least and the largest weight of a group
    head_bits: Literal[0, 8] = 0  # 8: the head too, one scale a row; a tied head is untied
    search: bool = True  # 4 bits: the scale of the least error; --no_search: the one that cuts nothing off
    calibrate: str = ""  # .txt, .jsonl, …: GPTQ, with this text; not the one of --text
    calibrate_tokens: int = 131_072  # of it at most, in rows of up to 512
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
        text = config.text, config.text_tokens, device
        before = perplexity(folder, *text) if config.text else None
        lines, sizes = write_quantized(folder, shape, result, config, tmp, device)
        report = {"tensors": lines, "bytes": sizes}
        if config.text:
            report["perplexity"] = {"before": before, "after": perplexity(tmp, *text)}
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


def plan(shape: ModelConfig, config: QuantizeConfig) -> Quantization:
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
    folder: Path, shape: ModelConfig, result: ModelConfig, config: QuantizeConfig, out: Path, device: str
) -> tuple[list[dict], dict]:
    """Write weights, config and tokenizer into a folder; return the report's lines and the sizes in bytes."""
    source = build(shape, "meta")
    files, names = checkpoint.fitting(source, folder)
    theirs = {ours: name for name, ours in names.items()}

    def read(ours: str) -> torch.Tensor:
        with checkpoint.open_tensors(files[theirs[ours]]) as file:
            return file.get_tensor(theirs[ours])

    few, how, dtype = set(matrices(source)), result.quantization, checkpoint.folder_dtype(folder)
    counts = {name: p.numel() for name, p in checkpoint.parameters(source).items()}
    head = dataclasses.replace(how, bits=8, group_size=-1) if how.head_bits else None
    heads = ("lm_head.weight", "embed_tokens.weight" if shape.tie_word_embeddings else "")
    lines, work = [], Rounding(how, config.sym, config.search)
    calibration, layer, known = None, -1, {}
    if config.calibrate:
        calibration = Calibration(source, read, calibration_rows(folder, shape, config).to(device))
    shards, sizes = Shards(out, config.shard_bytes), {"before": 0, "after": 0}

    def add(prefix: str, rounded: Rounded, how: Quantization) -> None:
        lines.append({"name": f"{prefix}weight", "bits": how.bits} | rounded.errors)
        packed = pack_matrix(rounded.q, rounded.zeros, rounded.scales, how)
        shards.add_all({prefix + name: tensor for name, tensor in packed.items()})

    with common.progress(len(names), "quantise", " tensors") as bar:
        for ours in sorted(theirs, key=_by_layer):
            if calibration and _by_layer(ours)[0] > layer:
                layer = _by_layer(ours)[0]
                known = calibration.layer(layer, work)
            saved = checkpoint.hf_name(ours, shape.family)
            sizes["before"] += counts[ours] * dtype.itemsize
            if head and ours in heads:
                add("lm_head.", Rounding(head, config.sym)("lm_head.weight", read(ours)), head)
            if ours.removesuffix(".weight") in few and ours.endswith(".weight"):
                add(saved.removesuffix("weight"), known.pop(ours, None) or work(saved, read(ours)), how)
            elif not (head and ours == "lm_head.weight"):
                shards.add_all({saved: read(ours).to(dtype)})
            bar.update()
    sizes["after"] = shards.close()
    write_rest(folder, result, out, dtype)
    return lines, sizes


def calibration_rows(folder: Path, shape: ModelConfig, config: QuantizeConfig) -> torch.Tensor:
    """Read the ids (R, T) of whole rows of the calibration text; ValueError: no text, a foreign tokenizer."""
    tokenizer = load_tokenizer(folder)
    check_vocabulary(folder, tokenizer, shape)
    length = min(512, shape.max_position_embeddings)
    rows = text_rows(config.calibrate, tokenizer, config.calibrate_tokens, length)
    return torch.tensor([row[:-1] for row in rows if len(row) == len(rows[0])])


def write_rest(folder: Path, result: ModelConfig, out: Path, dtype: torch.dtype) -> None:
    """Write what belongs to a folder beside its tensors: the configs, and the tokenizer if there is one."""
    common.write_json(out / "config.json", checkpoint.config_dict(result, dtype))
    if result.head == "lm":
        path = folder / "generation_config.json"
        said = checkpoint.read_object(path) if path.is_file() else checkpoint.generation_config(result)
        common.write_json(out / "generation_config.json", said)
    if any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        load_tokenizer(folder).save(out)


def _by_layer(name: str) -> tuple[int, str]:
    """Sort what belongs to no block first, then block after block."""
    return (int(name.split(".")[1]) if name.startswith("layers.") else -1, name)


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


# --- 4. perplexity ------------------------------------------------------------------------------------------


def perplexity(folder: str | Path, text: str, most: int, device: str = "cpu") -> float:
    """exp of the mean nll of up to `most` tokens of a text, one document after another in long rows."""
    model, tokenizer = load(folder, device=device, rows=8)
    rows = text_rows(text, tokenizer, most, min(model.config.max_position_embeddings, 1024))
    total = sum(float(score(model, [row])[0].double().sum()) for row in rows)
    return math.exp(total / sum(len(row) - 1 for row in rows))


def text_rows(path: str, tokenizer: Tokenizer, most: int, length: int) -> list[list[int]]:
    """Read up to `most` tokens of a text in rows of `length`, the last may be shorter.

    A row ends with the token that the next begins with, so that each is predicted once.
    """
    ids = []
    for document in common.documents([path]):
        ids += tokenizer.encode_document(document)
        if len(ids) > most:
            break
    ids = ids[: most + 1]
    if len(ids) < 2:
        raise ValueError(f"{path}: no text")
    return [ids[start : start + length + 1] for start in range(0, len(ids) - 1, length)]


if __name__ == "__main__":
    common.run(quantize_folder, doc=__doc__)
