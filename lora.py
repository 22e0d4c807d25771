"""LoRA: train two thin matrices beside a frozen one, and keep them in the layout that PEFT reads.

    y = W x + b + (alpha / rank) · B A x        A (R, in) drawn at random, B (out, R) zero at the start

In training W never changes, so it has no gradient and no moments, it may be kept in bf16, or in 8 or 4 bits
(quantize.py), and one base serves many adapters of some MB each. At the start the model is the base, bit for
bit. `merge` adds the product to W and `unmerge` takes W back. A stage trains adapters with --lora; a saved
step is then an adapter folder:

    adapter_config.json  adapter_model.safetensors    as PEFT writes them; the first names the base's folder
    generation_config.json, tokenizer files, card     as in a model folder

A base may have got rows for new tokens (checkpoint.py resize). Adapters alone leave those rows as they were
made, and the model never learns to say the new tokens; --lora_new_rows trains them, in embedding and head.
Those that the chat template needs are called `template`.

    python sft.py --init out/run --data chat.jsonl --template plain --out out/sft --lora
    python sft.py --preset yayi-lora --init yayi-7b --data chat.jsonl --out out/yayi --lora_new_rows template
    python sft.py --init out/run-int4 --data chat.jsonl --template plain --out out/sft --lora   # base: 4 bits
    python generate.py out/sft                          # the base with its adapter, merged
    python lora.py merge out/sft --out out/merged       # a plain model folder

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank
Stabilization Scaling Factor for Fine-Tuning with LoRA" (rsLoRA); PEFT's TrainableTokens (new rows).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from tyro.conf import Positional

import checkpoint
import common
import inference
import kernels
from checkpoint import DTYPES, base_folder, hf_name, is_adapter, is_adapter_folder, parameters
from kernels.linear_nll import IGNORE
from model import Embedding, Head, Linear, Model, QuantLinear, build, own_rows
from tokenizer import Tokenizer, load_tokenizer

# --- 1. settings -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class LoraConfig:
    """What every stage that can train adapters can set."""

    lora: bool = False  # train adapters (LoRA) beside the weights of --init, which stay as they are
    lora_rank: int = 16  # rank of an adapter's two matrices
    lora_alpha: float = 32.0  # what an adapter adds is scaled by alpha / rank
    lora_dropout: float = 0.0  # on what an adapter reads
    lora_rslora: bool = False  # scale by alpha / sqrt(rank) instead
    lora_target: str = ""  # layers by Hugging Face name, "q_proj,v_proj", or all-linear; empty: q, v (or qkv)
    lora_new_rows: str = ""  # train these tokens' rows, too: "32000-32003,7"; "4": the last 4; or template

    def __post_init__(self):
        if self.lora_rank < 1:
            raise ValueError(f"--lora_rank {self.lora_rank} must be at least 1")
        if not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"--lora_alpha {self.lora_alpha} must be greater than 0")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout {self.lora_dropout} must lie in [0, 1)")

    def check_used(self, typed: dict) -> None:
        """Refuse settings of adapters where there are none; ValueError names the flag. typed: by flags."""
        for f in [] if self.lora else fields(LoraConfig):
            value = getattr(self, f.name)
            if f.name != "lora" and (f.name in typed or value != f.default):
                raise ValueError(f"--{f.name} {value} does nothing without --lora: add it, or leave this out")

    def scale(self, rank: int) -> float:
        """The factor of an adapter's output."""
        return self.lora_alpha / (math.sqrt(rank) if self.lora_rslora else rank)


@dataclass
class Adapters:
    """What all adapters of a model share; `model.adapters` holds it."""

    config: LoraConfig
    base: str = ""  # absolute path of the base's folder
    ids: list[int] = field(default_factory=list)  # tokens whose rows are trained, in rising order
    embedding: nn.Module | None = None  # a tied head takes the embedding's new rows
    merged: bool = False
    disabled: bool = False

    @property
    def active(self) -> bool:
        """True where layers must add what the adapters say."""
        return not (self.merged or self.disabled)

    def index(self, device) -> torch.Tensor:
        """The trained tokens (n,), on a device."""
        return torch.tensor(self.ids, device=device)


def new_ids(text: str, tokens: int) -> list[int]:
    """Read --lora_new_rows: ("32000-32001,7", 32003) -> [7, 32000, 32001]; ("2", 32003) -> the last 2.

    tokens: how many the tokenizer has. ValueError: not such a list, or no such token.
    """
    flag, parts = f"--lora_new_rows {text}", [p.strip() for p in text.split(",") if p.strip()]
    if not all(re.fullmatch(r"\d+(-\d+)?", p) for p in parts):
        raise ValueError(f"{flag}: expected ids as in 32000-32003,7, or how many tokens were added, as in 4")
    if len(parts) == 1 and "-" not in parts[0] and "," not in text:
        parts = [f"{tokens - int(parts[0])}-{tokens - 1}"] if 0 < int(parts[0]) <= tokens else ["1-0"]
    ids: set[int] = set()
    for part in parts:
        first, _, last = part.partition("-")
        ids |= set(range(int(first), min(int(last or first), tokens) + 1))
    if text and (not ids or max(ids) >= tokens):
        raise ValueError(f"{flag}: the vocabulary has the tokens 0 to {tokens - 1}")
    return sorted(ids)


# --- 2. layers ---------------------------------------------------------------------------------------------


class LoraLinear(Linear):
    """A frozen linear layer with an adapter beside it: y = W x + b + scale · B A dropout(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if not self.adapters.active:
            return super().forward(x)
        a, b = self.lora_A.weight, self.lora_B.weight
        p = self.adapters.config.lora_dropout
        dropped = F.dropout(x, p) if self.training and p else None
        return _LowRank.apply(x, dropped, self.weight, self.bias, a, b, self.scale)

    def change(self) -> torch.Tensor:
        """What merging adds to the weight: scale · B A, (out, in) in fp32."""
        return self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())


class LoraQuant(QuantLinear):
    """The same beside a weight in 4 or 8 bits (Dettmers et al. 2023, "QLoRA")."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        y = super().forward(x)
        if not self.adapters.active:
            return y
        p = self.adapters.config.lora_dropout
        h = F.linear(F.dropout(x, p, self.training and p > 0), self.lora_A.weight.to(x.dtype))
        return y + F.linear(h * self.scale, self.lora_B.weight.to(x.dtype))


class _LowRank(torch.autograd.Function):
    """y = x Wᵀ + b + h Bᵀ, h = s·(x Aᵀ):   dh = s·(g B),   dx = g W + dh A,   dA = dhᵀ x,   dB = gᵀ h.

    What autograd would make of the formula has the same products, but three more passes over tensors as
    large as x and y: the sums are written into the products' outputs here.
    """

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scale):
        assert not weight.requires_grad, "beside an adapter the weight is frozen"
        read = x if dropped is None else dropped
        h = F.linear(read, a.to(x.dtype)) * scale  # (..., R)
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y.view(-1, len(weight)).addmm_(h.view(-1, len(a)), b.to(x.dtype).t())
        ctx.save_for_backward(read, weight, a, b, h)
        ctx.scale, ctx.drops = scale, dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        read, weight, a, b, h = ctx.saved_tensors
        shape, read, h = read.shape, read.flatten(0, -2), h.flatten(0, -2)
        g = g.reshape(-1, len(weight))  # (N, out)
        dh = (g @ b.to(g.dtype)) * ctx.scale  # (N, R)
        dx = dropped = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight.to(g.dtype)
            if not ctx.drops:
                dx.addmm_(dh, a.to(g.dtype))
            dx = dx.view(shape)
        if ctx.needs_input_grad[1]:
            dropped = (dh @ a.to(g.dtype)).view(shape)
        return dx, dropped, None, None, (dh.t() @ read).to(a.dtype), (g.t() @ h).to(b.dtype), None


class LoraEmbedding(Embedding):
    """A frozen table of which some rows are trained: `new_rows` (n, C) stand for those of adapters.ids."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up (B, T) -> (B, T, C)."""
        x = super().forward(ids)
        if not self.adapters.active:
            return x
        new = self.adapters.index(ids.device)
        slot = torch.searchsorted(new, ids.contiguous()).clamp_(max=len(new) - 1)
        # fp32 until here: the gradient of a row adds up all its tokens
        rows = F.embedding(slot, self.new_rows).to(x.dtype)
        return torch.where((new[slot] == ids)[..., None], rows, x)


class LoraHead(Head):
    """A frozen head of which some rows are trained: its own `new_rows` (n, C), or the tied embedding's."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None):
        """Return logits (..., V), or with targets (B, T) the pair (nll, lse), each (B, T) in fp32."""
        if not self.adapters.active:
            return super().forward(x, targets)
        rows = self.rows.to(x.dtype)
        new = self.adapters.index(x.device)
        weight = self.weight.to(x.dtype).index_copy(0, new, rows)
        if targets is None:
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        flat, goal = x.flatten(0, 1), targets.flatten()
        nll, lse = kernels.linear_nll(flat, weight.detach(), self.bias, goal)
        # The kernel has x's gradient right. It could give the rows' too, but as a part of that of all V rows,
        # so it is made here, of n logits: sums whose value is 0 and whose gradient is that of nll and lse.
        # They take 16 bytes for each token and row, and `weight` is a second table until the backward pass:
        # this is for some hundreds of rows, not for all.
        bias = None if self.bias is None else self.bias[new].to(x.dtype)
        z = F.linear(flat.detach(), rows, bias).float()  # (N, n)
        trained = (goal != IGNORE)[:, None]
        share = torch.where(trained, (z - lse[:, None]).exp(), 0).detach()  # the softmax at new tokens
        sum_lse, sum_goal = (share * z).sum(-1), (z * (goal[:, None] == new)).sum(-1)
        lse = lse + (sum_lse - sum_lse.detach())
        nll = nll + (sum_lse - sum_lse.detach()) - (sum_goal - sum_goal.detach())
        return nll.view_as(targets), lse.view_as(targets)

    @property
    def rows(self) -> torch.Tensor:
        """The trained rows (n, C)."""
        return self.new_rows if "new_rows" in self._parameters else self.adapters.embedding.new_rows


# --- 3. attaching ------------------------------------------------------------------------------------------


def _bare(model: nn.Module) -> Model:
    return getattr(model, "module", model)  # inside DDP


def attached(model: nn.Module) -> bool:
    """Tell whether a model has adapters."""
    return getattr(_bare(model), "adapters", None) is not None


def linear_layers(model: Model) -> dict[str, str]:
    """Map the Hugging Face name of every linear layer but the head to ours."""
    layers = (n for n, m in model.named_modules() if isinstance(m, Linear | QuantLinear))
    found = [n for n in layers if n != "lm_head"]
    return {_hf(n, model): n for n in found if not is_adapter(f"{n}.weight")}


def _hf(module: str, model: Model) -> str:
    return hf_name(f"{module}.weight", model.config.family).removesuffix(".weight")


def target_layers(model: Model, target: str) -> list[str]:
    """Find the layers that --lora_target means, by our names; PEFT matches the ends of names in the same way.

    ValueError names a word that is at the end of no layer's name, and those that there are.
    """
    layers = linear_layers(model)
    if not target:
        target = "query_key_value" if model.config.switches.interleaved_qkv else "q_proj,v_proj"
    if target == "all-linear":
        return [ours for ours in layers.values() if ours.startswith("layers.")]
    chosen = set()
    for word in filter(None, (w.strip() for w in target.split(","))):
        found = {ours for theirs, ours in layers.items() if f".{theirs}".endswith(f".{word}")}
        if not found:
            there = ", ".join(dict.fromkeys(theirs.rpartition(".")[2] for theirs in layers))
            also = "; rows of the head are trained by --lora_new_rows" if word == "lm_head" else ""
            raise ValueError(f"--lora_target {word}: no such linear layer; there are {there}{also}")
        chosen |= found
    if not chosen:
        raise ValueError(f"--lora_target {target}: names no layer")
    return [ours for ours in layers.values() if ours in chosen]


def attach(model: Model, cfg: LoraConfig, tokens: int = 0) -> None:
    """Freeze a model and put adapters beside its layers, in place; no parameter of its own changes its name.

    Call it before `parallelize`, on the meta device; then load_into and init_adapter. tokens: how many the
    tokenizer has, for --lora_new_rows; 0: model.known_vocab. ValueError: no such layer, no such token.
    """
    if model.config.head == "score":
        raise ValueError("adapters beside a score head, which must be trained whole, are not supported")
    names = target_layers(model, cfg.lora_target)
    ids = new_ids(cfg.lora_new_rows, tokens or model.known_vocab)
    _attach(
        model, cfg, dict.fromkeys(names, cfg.lora_rank), ids, {"embed_tokens", "lm_head"} if ids else set()
    )


def _attach(model: Model, cfg: LoraConfig, ranks: dict[str, int], ids: list[int], tables: set[str]) -> None:
    """Attach to the layers in `ranks`; train the rows `ids` of `tables`, of embed_tokens and lm_head."""
    assert not attached(model), "adapters are attached already"
    model.requires_grad_(False)
    model.adapters = shared = Adapters(cfg, ids=ids)
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        quantised = isinstance(layer, QuantLinear)
        device = (layer.scales if quantised else layer.weight).device
        made = {"bias": False, "device": device, "dtype": torch.float32}
        layer.lora_A = Linear(layer.in_features, rank, **made)
        layer.lora_B = Linear(rank, layer.out_features, **made)
        layer.__class__ = LoraQuant if quantised else LoraLinear
        layer.adapters, layer.scale = shared, cfg.scale(rank)
    tied = model.config.tie_word_embeddings
    if model.config.head != "lm":
        tables = tables & {"embed_tokens"}
    elif tied and tables:
        tables = {"embed_tokens", "lm_head"}
    for name, kind in (("embed_tokens", LoraEmbedding), ("lm_head", LoraHead)):
        if name in tables:
            if isinstance(model.get_submodule(name), QuantLinear):
                raise ValueError("rows of a head in 8 bits are not trained; quantise without --head_bits 8")
            table = model.get_submodule(name)
            table.__class__, table.adapters = kind, shared
            if name == "embed_tokens" or not tied:
                rows = torch.empty(len(ids), model.config.hidden_size, device=table.weight.device)
                table.new_rows = nn.Parameter(rows)
    shared.embedding = model.embed_tokens if tables else None


@torch.no_grad()
def init_adapter(model: nn.Module, seed: int) -> None:
    """Draw every A as PEFT does, set B to 0 and new rows to those of the base, which must be loaded.

    A is uniform in ±1/√in (Kaiming, a = √5), drawn like model.init_weights by `seed` and the parameter's
    name, so it depends neither on the number of ranks nor on other layers. All ranks call this.
    """
    for name, p in parameters(_bare(model)).items():
        if not is_adapter(name):
            continue
        mine, a, b = own_rows(p.detach())
        if name.endswith("lora_A.weight"):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            every = torch.empty(p.shape, dtype=torch.float32)
            mine.copy_(nn.init.kaiming_uniform_(every, a=math.sqrt(5), generator=generator)[a:b])
        elif name.endswith("new_rows"):
            mine.copy_(_base_rows(model, name.removesuffix(".new_rows"))[a:b])
        else:
            mine.zero_()


def _base_rows(model: nn.Module, table: str) -> torch.Tensor:
    """Give the base's rows (n, C), in fp32, of the tokens whose rows are trained; all ranks call this."""
    ids = _bare(model).adapters.ids
    weight = parameters(_bare(model))[f"{table}.weight"].detach()
    mine, a, b = own_rows(weight)
    found = torch.zeros(len(ids), weight.shape[1], device=mine.device)
    here = [k for k, i in enumerate(ids) if a <= i < b]
    found[here] = mine[[ids[k] - a for k in here]].float()
    if isinstance(weight, DTensor):  # each rank has some of them
        mesh = weight.device_mesh
        found = found.to(mesh.device_type)
        dist.all_reduce(found, group=mesh.get_group(mesh.ndim - 1))
    return found


# --- 4. with and without -----------------------------------------------------------------------------------


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Let the model compute what its base does, bit for bit: the reference of a policy with adapters."""
    shared = _bare(model).adapters
    if shared.merged:
        raise ValueError("merged adapters cannot be disabled: unmerge them first")
    shared.disabled = True
    try:
        yield
    finally:
        shared.disabled = False


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the adapters to the weights, in fp32, and round to the weights' dtype: no layer has more to do now.

    The weights that change are kept beside them (as much memory again) until `unmerge`. One process only.
    """
    model = _bare(model)
    shared = model.adapters
    if shared.merged:
        return
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise ValueError("the model is cut over ranks; save the adapter and merge it with lora.py merge")
    if model.config.quantization:
        raise ValueError("quantised weights take no sum; save the adapter and merge it with lora.py merge")
    for layer in _lora_layers(model):
        layer.base = layer.weight.data
        layer.weight.data = (layer.base.float() + layer.change()).to(layer.base.dtype)
    for table in _tables(model):
        table.base = table.weight.data[shared.ids]
        table.weight.data[shared.ids] = table.new_rows.to(table.weight.dtype)
    shared.merged = True


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put back the weights that `merge` has kept: the same bits as before."""
    model = _bare(model)
    shared = model.adapters
    if not shared.merged:
        return
    for layer in _lora_layers(model):
        layer.weight.data = layer.__dict__.pop("base")
    for table in _tables(model):
        table.weight.data[shared.ids] = table.__dict__.pop("base")
    shared.merged = False


def _lora_layers(model: Model) -> list[LoraLinear | LoraQuant]:
    return [m for m in model.modules() if isinstance(m, LoraLinear | LoraQuant)]


def _tables(model: Model) -> list[nn.Module]:
    """The modules with new rows of their own."""
    return [m for m in model.modules() if "new_rows" in m._parameters]


# --- 5. adapter folders ------------------------------------------------------------------------------------

PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
# what is said of the base, of PEFT, or of how training began, and changes no output
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("loftq_config", "runtime_config", "r", "lora_alpha", "trainable_token_indices"),
}
FIXED = {  # only these values are what we compute, and of all other keys only those that switch it off
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_rslora": (False, True, None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the base too
}


def write_adapter(model, folder: Path, tokenizer: Tokenizer | None = None, dtype=None) -> list[str]:
    """Write the files of an adapter folder into an existing folder: checkpoint.write_model's counterpart.

    Every rank calls this; returns the names of the files that this one wrote. The adapter is fp32 whatever
    `dtype` is: it is small. ValueError if load_into was not told what the base is.
    """
    model = _bare(model)
    first = not dist.is_initialized() or dist.get_rank() == 0
    config, tensors = _adapter_config(model), {}
    for name, p in parameters(model).items():
        if not is_adapter(name):
            continue
        value = checkpoint.whole(p.detach(), torch.float32)
        if not name.endswith("new_rows"):
            tensors[PREFIX + hf_name(name, model.config.family)] = value
        elif name == "lm_head.new_rows" and model.lm_head.bias is not None:
            # PEFT (0.21) forgets a head's bias beside trained rows. As an adapter of the head they are right:
            # one column of B for each row, 1 where it stands, and in A what was added to it
            where = torch.zeros(len(model.lm_head.weight), len(value), device=value.device)
            where[model.adapters.ids, range(len(value))] = 1.0
            tensors[f"{PREFIX}lm_head.lora_A.weight"] = value - _base_rows(model, "lm_head")
            tensors[f"{PREFIX}lm_head.lora_B.weight"] = where
        else:
            tensors[PREFIX + _hf(name.removesuffix(".new_rows"), model) + ROWS] = value
    if not first:
        return []
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    common.sync(folder / "adapter_model.safetensors")
    common.write_json(folder / "adapter_config.json", config)
    common.write_json(folder / "generation_config.json", checkpoint.generation_config(model.config))
    written = ["adapter_model.safetensors", "adapter_config.json", "generation_config.json"]
    if tokenizer is not None:
        tokenizer.save(folder)
        written += tokenizer.files
    return written


def save_adapter(model: nn.Module, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write an adapter folder that PEFT loads too; atomic; every rank calls this (see save_model)."""
    checkpoint.save_folder(folder, lambda tmp: write_adapter(model, tmp, tokenizer))


def _adapter_config(model: Model) -> dict:
    """Say in PEFT's words what is attached."""
    shared = model.adapters
    if not shared.base:
        raise ValueError("the adapter's base is not known: load it with lora.load_into")
    cfg = shared.config
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear | LoraQuant)}
    names = {_hf(n, model): (len(m.lora_A.weight), m.scale) for n, m in layers.items()}
    short = {n.rpartition(".")[2] for n in names}
    enough = set(target_layers(model, ",".join(short))) == layers.keys()
    targets = sorted(short if enough else names)
    ranks = {n: rank for n, (rank, _) in names.items() if rank != cfg.lora_rank}
    factors = {n: scale / cfg.scale(rank) for n, (rank, scale) in names.items()}
    alphas = {n: f * cfg.lora_alpha for n, f in factors.items() if not math.isclose(f, 1)}
    tables = {n: m for n, m in model.named_modules() if "new_rows" in m._parameters}
    rows = {_hf(n, model).rpartition(".")[2]: shared.ids for n in tables}
    if "lm_head" in rows and model.lm_head.bias is not None:
        n = len(rows.pop("lm_head"))
        targets, ranks = [*targets, "lm_head"], {**ranks, "lm_head": n}
        alphas["lm_head"] = math.sqrt(n) if cfg.lora_rslora else n  # a scale of 1
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": shared.base,
        "inference_mode": True,
        "r": cfg.lora_rank,
        "lora_alpha": int(cfg.lora_alpha) if cfg.lora_alpha % 1 == 0 else cfg.lora_alpha,
        "lora_dropout": cfg.lora_dropout,
        "use_rslora": cfg.lora_rslora,
        "target_modules": targets,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "trainable_token_indices": rows or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


@dataclass
class Saved:
    """An adapter folder, read and checked against a model."""

    config: LoraConfig
    base: str  # as written there
    layers: dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # our name -> A (R, in), B (out, R), scale
    ids: list[int]  # in rising order
    rows: dict[str, torch.Tensor]  # embed_tokens, lm_head -> (n, C)

    def edit(self, name: str, part: torch.Tensor, a: int, b: int) -> torch.Tensor:
        """Merge into rows [a, b) of a base's parameter: checkpoint.load_into's `edit`."""
        name = name.removesuffix(".weight")
        if name in self.layers:
            A, B, scale = self.layers[name]
            # the whole product on every rank: its bits depend on where it is cut
            return part.float() + (scale * (B @ A))[a:b]
        if name in self.rows:
            part = part.float()
            for k, i in enumerate(self.ids):
                if a <= i < b:
                    part[i - a] = self.rows[name][k]
        return part


def read_adapter(folder: str | Path, model: Model) -> Saved:
    """Read an adapter folder for a model; ValueError names what we do not compute, and what does not fit."""
    folder = Path(folder)
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    raw = checkpoint.read_object(path)
    cfg = _read_config(raw, path)
    if not weights.exists():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle, which is never opened: convert it to safetensors"
        raise ValueError(f"{weights}: no such file{hint if pickled else ''}")
    with checkpoint.open_tensors(weights) as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  # no dict
    layers, rows, wrong = {}, {}, []
    known = linear_layers(model)
    if model.config.head == "lm" and not model.config.tie_word_embeddings:
        known["lm_head"] = "lm_head"
    alphas = _alphas(raw, known, path)
    for theirs, ours in known.items():
        A, B = (tensors.pop(f"{PREFIX}{theirs}.lora_{x}.weight", None) for x in "AB")
        if A is None and B is None:
            continue
        layer = model.get_submodule(ours)
        whole, inputs, outputs = A is not None and B is not None, layer.in_features, layer.out_features
        rank = A.shape[0] if whole and A.dim() else 0
        if rank and [*A.shape, *B.shape] == [rank, inputs, outputs, rank]:
            layers[ours] = A, B, cfg.scale(rank) * alphas.get(theirs, 1.0)
        else:
            wrong.append(f"{theirs}.lora_A, lora_B")
    ids, order, tables = _trained_rows(raw, model, path)
    for name in tables:
        value = tensors.pop(PREFIX + _hf(name, model) + ROWS, None)
        if value is None or value.shape != (len(ids), model.config.hidden_size):
            wrong.append(_hf(name, model) + ROWS)
        else:
            rows[name] = value[order]
    targets = raw.get("target_modules")
    if isinstance(targets, list) and not (raw.get("layers_to_transform") or raw.get("exclude_modules")):
        wanted = {n: o for n, o in known.items() if any(f".{n}".endswith(f".{t}") for t in targets)}
        absent = (f"{n}.lora_A, lora_B" for n, ours in wanted.items() if ours not in layers)
        wrong += [name for name in absent if name not in wrong]
    if wrong or tensors or not (layers or rows):
        kinds = {"missing or of another shape": wrong, "unexpected": sorted(tensors)}
        raise ValueError(checkpoint.misfit(weights, "the tensors do not fit this model", **kinds))
    return Saved(cfg, str(raw.get("base_model_name_or_path") or ""), layers, ids, rows)


def _read_config(raw: dict, path: Path) -> LoraConfig:
    """Take from adapter_config.json what we compute; ValueError names what we do not."""
    if raw.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA is understood")
    for key, value in raw.items():
        allowed = FIXED.get(key, (None, False, [], {}, ""))
        if key not in HARMLESS and value not in allowed:
            raise ValueError(
                f"{path}: {key} = {value!r} is not supported (understood: {allowed[0]!r}); merge this "
                "adapter with PEFT and take the model folder that it writes"
            )
    numbers = {key: raw.get(key) for key in ("r", "lora_alpha", "lora_dropout")}
    if type(raw.get("r")) is not int or not all(map(_is_number, numbers.values())):
        raise ValueError(f"{path}: r must be a whole number, lora_alpha and lora_dropout numbers: {numbers}")
    try:
        return LoraConfig(
            lora_rank=numbers["r"],
            lora_alpha=float(numbers["lora_alpha"]),
            lora_dropout=float(numbers["lora_dropout"]),
            lora_rslora=bool(raw.get("use_rslora")),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_number(value) -> bool:
    """Tell whether a JSON value is a number that counts: no bool, NaN, infinity, none of 400 digits."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _alphas(raw: dict, known: dict, path: Path) -> dict[str, float]:
    """Give the layers whose alpha differs, as a factor of lora_alpha, by their Hugging Face names."""
    factors, given = {}, raw.get("alpha_pattern") or {}
    if not isinstance(given, dict):
        raise ValueError(f"{path}: alpha_pattern must map layers' names to numbers; it is {str(given)[:200]}")
    for word, alpha in given.items():
        if not re.fullmatch(r"[\w.]+", word) or not _is_number(alpha):
            raise ValueError(f"{path}: alpha_pattern {word!r}: {alpha!r} is not a layer's name and a number")
        found = [n for n in known if re.fullmatch(rf"(.*\.)?{word}", n) and n not in factors]
        factors |= dict.fromkeys(found, alpha / raw["lora_alpha"])
    return factors


def _trained_rows(raw: dict, model: Model, path: Path) -> tuple[list[int], list[int], list[str]]:
    """Read trainable_token_indices: the ids in rising order, where each stands, the tables that have rows."""
    given = raw.get("trainable_token_indices") or {}
    given = given if isinstance(given, dict) else {"embed_tokens": given}
    names = {_hf(n, model).rpartition(".")[2]: n for n in ("embed_tokens", "lm_head")} | {
        "embed_tokens": "embed_tokens"
    }
    lists = list(given.values())
    sound = all(isinstance(ids, list) and ids == lists[0] for ids in lists)
    ids = lists[0] if lists and sound else []
    sound = sound and all(type(i) is int and 0 <= i < model.config.vocab_size for i in ids)
    if not sound or len(set(ids)) < len(ids) or any(n.rpartition(".")[2] not in names for n in given):
        raise ValueError(
            f"{path}: trainable_token_indices must be one list of ids below {model.config.vocab_size}, for "
            f"the embedding, the head or both; it is {str(given)[:200]}"
        )
    tables = [names[n.rpartition(".")[2]] for n in given]
    if model.config.tie_word_embeddings:
        tables = tables and ["embed_tokens"]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return [ids[k] for k in order], order, tables


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Load an adapter folder, ours or PEFT's, beside the base that `model` already holds.

    Without adapters the model gets those of the folder first; that must come before `parallelize`, as in
    `attach`. All ranks call this. ValueError: the folder does not fit the model, or the adapters it has.
    """
    bare, folder = _bare(model), checkpoint.model_folder(folder)
    saved = read_adapter(folder, bare)
    head, added = saved.layers.pop("lm_head", None), None
    if head:  # trained rows beside a bias: see write_adapter
        A, B, scale = head
        where = torch.zeros(len(B), len(saved.ids))
        where[saved.ids, range(len(saved.ids))] = 1.0
        if not torch.equal(B, where):
            raise ValueError(f"{folder}: an adapter of the head can be merged, but not trained")
        saved.rows["lm_head"] = added = scale * A
    if not attached(model):
        ranks = {name: len(A) for name, (A, _, _) in saved.layers.items()}
        _attach(bare, saved.config, ranks, saved.ids, set(saved.rows))
        for name, (_, _, scale) in saved.layers.items():
            bare.get_submodule(name).scale = scale
    values = {f"{n}.lora_{x}.weight": v for n, pair in saved.layers.items() for x, v in zip("AB", pair)}
    values |= {f"{name}.new_rows": value for name, value in saved.rows.items()}
    mine = {name: p for name, p in parameters(bare).items() if is_adapter(name)}
    shapes = [{name: p.shape for name, p in side.items()} for side in (mine, values)]
    same = shapes[0] == shapes[1] and bare.adapters.ids == saved.ids
    if not same or any(bare.get_submodule(n).scale != scale for n, (*_, scale) in saved.layers.items()):
        raise ValueError(f"{folder}: layers, ranks, scales or trained rows differ from those attached")
    bare.adapters.base = bare.adapters.base or saved.base
    if added is not None:
        values["lm_head.new_rows"] = _base_rows(model, "lm_head") + added.to(bare.lm_head.weight.device)
    for name, p in mine.items():
        rows, a, b = own_rows(p.detach())
        rows.copy_(values[name][a:b])


def load_into(model: nn.Module, folder: str | Path) -> None:
    """Load what --init names into an allocated model: a model folder, or an adapter folder's base, merged.

    Every rank reads its own rows. Merged in fp32, then cast. A model with attached adapters remembers the
    folder as their base. ValueError: adapters are attached, and `folder` holds an adapter itself.
    """
    folder, bare = checkpoint.model_folder(folder), _bare(model)
    if not is_adapter_folder(folder):
        checkpoint.load_into(model, folder)
        if attached(model):
            bare.adapters.base = str(folder.resolve())
        return
    if attached(model):
        raise ValueError(
            f"{folder} is an adapter folder, and adapters need a model folder as their base; make one of it: "
            f"python lora.py merge {folder} --out FOLDER"
        )
    if bare.config.quantization:
        raise ValueError(
            f"{folder}: its base is quantised; make a whole model: python lora.py merge {folder}"
        )
    checkpoint.load_into(model, base_folder(folder), read_adapter(folder, bare).edit)


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Model:
    """Load a model folder, an adapter folder (merged) or a run's latest step; dtype None: as on disk.

    A quantised base with an adapter becomes a whole model: its weights are put together first.
    """
    folder = checkpoint.model_folder(folder)
    model = build(checkpoint.read_config(folder), "meta")
    model.to(dtype or checkpoint.folder_dtype(folder))
    checkpoint.materialize(model, device)
    if model.config.quantization and is_adapter_folder(folder):
        checkpoint.load_into(model, base_folder(folder))
        _merge_whole(model, read_adapter(folder, model))
    else:
        load_into(model, folder)
    return model.eval()


@torch.no_grad()
def _merge_whole(model: Model, adapter: Saved) -> None:
    """Put the matrices of a quantised model together, the adapter merged in fp32, in place."""
    for name, p in parameters(model).items():
        if name.endswith(".weight"):
            p.copy_(adapter.edit(name, p, 0, len(p)))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            plain = inference.whole(layer, torch.float32)
            merged = adapter.edit(f"{name}.weight", plain.weight, 0, len(plain.weight))
            plain.weight = nn.Parameter(merged.to(model.embed_tokens.weight.dtype))
            model.set_submodule(name, plain)
    model.config = dataclasses.replace(model.config, quantization=None)


def tokenizer_folder(folder: str | Path) -> Path:
    """Find the folder of a model's tokenizer: its own, or its base's where an adapter has none (PEFT's)."""
    folder = checkpoint.model_folder(folder)
    own = any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    return folder if own else base_folder(folder)


# --- 6. command line ---------------------------------------------------------------------------------------


@dataclass
class Merge:
    folder: Positional[str]  # an adapter folder, or a run of adapters
    out: str  # model folder to write
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # of the new folder; empty: as the base's


def merge_folder(config: Merge) -> None:
    """Write a plain model folder: the base with the adapter merged into it."""
    folder = checkpoint.model_folder(config.folder)
    if not is_adapter_folder(folder):
        raise ValueError(f"{folder}: no adapter folder, so there is nothing to merge")
    model = load_model(folder)
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    checkpoint.save_model(model, config.out, tokenizer, DTYPES.get(config.save_dtype))
    print(f"{config.out}: {base_folder(folder)} with the adapter of {folder}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["merge"]:  # the word may be left out
        del sys.argv[1]
    common.run(merge_folder, doc=__doc__)
