"""One decoder for three families: LLaMA (XVERSE, XuanYuan), Phi (Xiangxin, Phi2-Chinese), BLOOM (YaYi).

    ids -> embedding -> L blocks -> norm -> head -> logits, or the loss of every token

A family is a setting of switches, not a subclass:

              norm       position        mlp           block        biases            head
    llama     RMSNorm    RoPE            SwiGLU        sequential   none              own or tied
    phi       LayerNorm  RoPE, partial   gelu (tanh)   parallel     everywhere        own, with a bias
    bloom     LayerNorm  ALiBi           gelu (tanh)   sequential   all but the head  tied; embedding normed

This file is nn.Module and shapes, nothing else: files are in checkpoint.py, parallelism in parallel.py,
sampling in generate.py. Every operation that decides speed is a function of kernels/.

Precision is explicit. Parameters may be fp32 masters while `model.compute_dtype` is bf16: the embedding's
output is cast once, and every layer casts its weight to the dtype of what flows in. There is no autocast.

    model = build(PRESETS["demo"]);  init_weights(model, seed=1)
    logits = model(ids)                          # (B, T, V)
    nll = model(ids, targets)                    # (B, T) fp32, 0 where targets is -100

Touvron et al. 2023 (LLaMA 2); Gunasekar et al. 2023 (Phi); BigScience 2022 (BLOOM); Vaswani et al. 2017.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import warnings
import zlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import kernels

# --- 1. configuration ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Family:
    """The switches that make one decoder a LLaMA, a Phi or a BLOOM."""

    rms_norm: bool = False  # RMSNorm, else LayerNorm
    rope: bool = True  # rotary positions, else ALiBi
    gated: bool = False  # act(gate) * up, else act(up)
    act: str = "gelu_tanh"  # of the MLP, a name of kernels.ACTIVATIONS
    parallel: bool = False  # x + attention(n) + mlp(n) with one norm, else a norm for each, in turn
    bias: bool = False  # on every linear of the blocks
    head_bias: bool = False
    embed_norm: bool = False  # a norm after the embedding
    interleaved_qkv: bool = False  # one linear for q, k, v, whose rows go by head: (H, 3, D)


FAMILIES = {
    "llama": Family(rms_norm=True, gated=True, act="silu"),
    "phi": Family(parallel=True, bias=True, head_bias=True),
    "bloom": Family(rope=False, bias=True, embed_norm=True, interleaved_qkv=True),
}


@dataclass(frozen=True)
class Quantization:
    """How the matrices of the blocks are stored in few bits: see QuantLinear. ValueError for odd sizes."""

    bits: int  # 4 or 8
    group_size: int = -1  # inputs that share a scale and a zero; -1: all of a row
    sym: bool = True  # zeros lie in the middle; said, not used
    desc_act: bool = False  # g_idx groups the inputs in any order; False: one after another
    zeros_less_one: bool = True  # the file holds zero − 1 (GPTQ's format v1); False: zero itself (v2)
    head_bits: int = 0  # 8: the head too, one scale a row; 0: as it is

    def __post_init__(self):
        if self.bits not in (4, 8) or self.head_bits not in (0, 8):
            raise ValueError(f"{self.bits} bits, {self.head_bits} of the head: expected 4 or 8, and 0 or 8")
        if type(self.group_size) is not int or (
            self.group_size != -1 and self.group_size not in range(32, 1 << 20, 32)
        ):
            raise ValueError(f"group_size {self.group_size}: expected -1 or a multiple of 32")


@dataclass
class ModelConfig:
    """The shape of a model, under the names of LLaMA's config.json.

    ValueError where no Hugging Face class of the family could hold the combination.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int  # context length; ALiBi can go beyond it, RoPE cannot
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0  # the share of a head's dimensions that RoPE turns
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    head: str = "lm"  # lm | score (a number per token: reward model, critic) | none (hidden states)
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None  # several: any of them ends a text
    pad_token_id: int | None = None
    dropout: float = 0.0  # after the embedding and on both residual branches; a training option, not stored
    quantization: Quantization | None = None  # None: matrices are what they are

    def __post_init__(self):
        require = functools.partial(_require, self)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        for name in (*sizes, "max_position_embeddings"):
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name} must be a positive whole number")
        require(
            isinstance(self.vocab_size, int) and self.vocab_size >= 0, "vocab_size must be a whole number"
        )
        require(self.hidden_size % self.num_attention_heads == 0, "hidden_size: a multiple of the heads")
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        require(self.family in FAMILIES, f"family must be one of {', '.join(FAMILIES)}")
        require(self.head in ("lm", "score", "none"), "head must be lm, score or none")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0, "query heads: a multiple of kv heads"
        )
        if self.family != "llama":
            require(
                self.head_dim * self.num_attention_heads == self.hidden_size,
                "head_dim x heads != hidden_size",
            )
        if self.family == "bloom":
            require(self.num_key_value_heads == self.num_attention_heads, "BLOOM has no grouped heads")
            require(self.intermediate_size == 4 * self.hidden_size, "BLOOM's MLP is 4 x hidden_size wide")
            require(self.tie_word_embeddings or self.head != "lm", "BLOOM's head is tied to the embedding")
        else:
            require(
                self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
                f"cannot rotate {self.rotary_dim} dimensions",
            )
        if self.family != "phi":
            require(self.partial_rotary_factor == 1.0, "only Phi rotates a part of the head")
        require(0 <= self.dropout < 1, "dropout must lie in [0, 1)")
        if self.quantization and self.quantization.head_bits:
            require(not self.tie_word_embeddings, "a quantised head is not tied")

    @property
    def eos_ids(self) -> list[int]:
        """The ids that end a text."""
        eos = self.eos_token_id
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    @property
    def limit(self) -> int:
        """Tokens of the longest text that the model takes: a RoPE model's context; ALiBi goes on."""
        return self.max_position_embeddings if self.switches.rope else sys.maxsize

    @property
    def switches(self) -> Family:
        """The switches of the family."""
        return FAMILIES[self.family]

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns: int(D · factor), 32 of 80 for phi-2."""
        return int(self.head_dim * self.partial_rotary_factor)


def _require(config, condition, what):
    if not condition:
        raise ValueError(f"{what} ({config})")


def _llama(vocab, width, layers, heads, mlp, context, kv=0, eps=1e-5, **more) -> ModelConfig:
    return ModelConfig("llama", vocab, width, layers, heads, mlp, context, kv, norm_eps=eps, **more)


def _phi(vocab, width, layers, heads, mlp, context, rotary) -> ModelConfig:
    return ModelConfig("phi", vocab, width, layers, heads, mlp, context, partial_rotary_factor=rotary)


def _bloom(vocab, width, layers, heads) -> ModelConfig:
    return ModelConfig("bloom", vocab, width, layers, heads, 4 * width, 2048, tie_word_embeddings=True)


FROM_TOKENIZER = 0  # a vocab_size that train.py replaces by the tokenizer's, rounded up to a multiple of 64

PRESETS = {
    # vocabulary, width, layers, heads, MLP width, context (Phi: then the share of a head that RoPE turns)
    # - for a laptop
    "tiny": _llama(FROM_TOKENIZER, 64, 2, 4, 176, 256, kv=2, tie_word_embeddings=True),
    "demo": _llama(FROM_TOKENIZER, 256, 4, 4, 704, 512, tie_word_embeddings=True),
    "small": _llama(FROM_TOKENIZER, 512, 8, 8, 1408, 512, tie_word_embeddings=True),
    # - the published systems
    "phi-2": _phi(51200, 2560, 32, 32, 10240, 2048, 0.4),
    "xiangxin-3b": _phi(51200, 2560, 32, 32, 10240, 2048, 0.4),
    "phi2-chinese-0.2b": _phi(35840, 768, 16, 12, 4096, 512, 0.5),
    "phi2-chinese-v1": _phi(35840, 768, 24, 12, 4096, 512, 0.5),
    "phi2-chinese-head": _phi(35840, 960, 24, 16, 4096, 512, 0.5),
    "xverse-13b": _llama(100278, 5120, 40, 40, 13824, 8192, eps=1e-6),
    "xverse-13b-2": _llama(100534, 5120, 40, 40, 13824, 8192, eps=1e-6),
    "xuanyuan-6b": _llama(39438, 4096, 30, 32, 11008, 2048),
    "llama-2-7b": _llama(32000, 4096, 32, 32, 11008, 4096),
    "yayi-7b-llama2": _llama(32005, 4096, 32, 32, 11008, 4096),
    "llama-2-13b": _llama(32000, 5120, 40, 40, 13824, 4096),
    "yayi-13b-llama2": _llama(32005, 5120, 40, 40, 13824, 4096),
    "llama-2-70b": _llama(32000, 8192, 80, 64, 28672, 4096, kv=8),
    "xuanyuan-70b": _llama(39438, 8192, 80, 64, 28672, 8192, kv=8),
    "bloomz-7b1": _bloom(250880, 4096, 30, 32),
    "yayi-7b": _bloom(250684, 4096, 30, 32),
}

# --- 2. positions and the cache ----------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens seen so far, with room for `size` tokens a row.

    k, v: (L, B, K, S, D); lengths: (B,) tokens held by each row. To roll back, to reuse a prefix or to
    replace a row, assign to lengths and copy rows: what lies beyond lengths is never read.
    """

    def __init__(self, config: ModelConfig, batch: int, size: int, dtype: torch.dtype, device="cpu"):
        check_length(config, size)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, size, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)

    @property
    def size(self) -> int:
        """Tokens that fit in a row."""
        return self.k.shape[3]

    def take(self, rows: torch.Tensor) -> None:
        """Become the rows (N,) of this cache, in that order; one may stand there several times."""
        used, same = int(self.lengths.max()), len(rows) == len(self.lengths)
        for name in "kv":
            old = getattr(self, name)
            new = old if same else old.new_zeros(old.shape[0], len(rows), *old.shape[2:])
            new[:, :, :, :used] = old[:, rows, :, :used]
            setattr(self, name, new)
        self.lengths = self.lengths[rows]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor):
        """Store k, v (B, K, T, D) at positions (B, T); return all of the layer's: two (B, K, S, D)."""
        keys, values = self.k[layer], self.v[layer]
        if len(k) == 1:
            keys.index_copy_(2, positions[0], k)
            values.index_copy_(2, positions[0], v)
        else:
            row = torch.arange(len(k), device=k.device)[:, None]
            keys[row, :, positions] = k.transpose(1, 2)  # indexed (B, T), so the value is (B, T, K, D)
            values[row, :, positions] = v.transpose(1, 2)
        return keys, values


@dataclass
class Positions:
    """What attention needs to know about positions, computed once per forward pass for all layers."""

    index: torch.Tensor  # (B or 1, T) index of each token in its document or cache row
    cos: torch.Tensor | None = None  # (B or 1, 1, T, R) fp32, of kernels.rope_table
    sin: torch.Tensor | None = None
    slopes: torch.Tensor | None = None  # (H,) fp32
    lo: torch.Tensor | None = None  # (B, T) first key that each query sees
    cache: KVCache | None = None
    empty: bool = False  # the cache holds nothing yet, so the new tokens see only one another
    used: int = 0  # of the cache, by the longest row with its new tokens; known for more than one of them


def check_length(config: ModelConfig, length: int) -> None:
    """Refuse more tokens than a RoPE model was trained for (ValueError); under ALiBi only warn."""
    if length <= config.max_position_embeddings:
        return
    text = f"{length} tokens exceed the model's context of {config.max_position_embeddings}"
    if config.switches.rope:
        raise ValueError(f"{text}; shorten the input, or ask for fewer new tokens")
    warnings.warn(f"{text}; ALiBi can go on, but the model was not trained there", stacklevel=3)


def document_starts(doc_ids: torch.Tensor) -> torch.Tensor:
    """Find the index where each token's document begins: [[7, 7, 9]] -> [[0, 0, 2]].  (B, T) -> (B, T)."""
    index = torch.arange(doc_ids.shape[1], device=doc_ids.device).expand_as(doc_ids)
    begins = torch.ones_like(doc_ids, dtype=torch.bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    return torch.where(begins, index, 0).cummax(1).values


def alibi_slopes(heads: int) -> list[float]:
    """Give ALiBi's slope of each head: 2^(-8i/H) for a power of two, else the published interpolation.

    For 12 heads: the 8 slopes of 8 heads, then every other slope of 16 heads.
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    return first + [2 ** (-4 * i / power) for i in range(1, 2 * (heads - power), 2)]


def rope_frequencies(config: ModelConfig, device) -> torch.Tensor:
    """Give θ^(-2i/R) for i = 0 … R/2 − 1, fp32, where R counts the rotated dimensions only."""
    R = config.rotary_dim
    return config.rope_theta ** -(torch.arange(0, R, 2, dtype=torch.float32, device=device) / R)


# --- 3. layers ----------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer that casts its weight to the dtype of its input at use; its values are set elsewhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def reset_parameters(self):
        """Do nothing: `init_weights` or `checkpoint.load_into` sets every parameter."""


class QuantLinear(nn.Module):
    """A linear layer whose weight is stored in 4 or 8 bits, tensor by tensor as GPTQ folders hold it.

        W[n, k] = scales[g, n] · (q[k, n] − zero[g, n]),   g = g_idx[k]

    qweight (in/p, out) int32: q, p = 32/bits to a word along the inputs; qzeros (groups, out/p) int32: zero,
    or zero − 1, along the outputs; scales (groups, out) fp16, whatever dtype the model is cast to; g_idx
    (in,) int32. This forward is the definition: the whole weight is put together, then multiplied.
    Frantar et al. 2022, "GPTQ".
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, how: Quantization):
        super().__init__()
        self.in_features, self.out_features, self.how, self.bits = in_features, out_features, how, how.bits
        group, per = in_features if how.group_size == -1 else how.group_size, 32 // how.bits
        if in_features % group or in_features % per or out_features % per:
            raise ValueError(
                f"a matrix of {out_features} x {in_features} cannot be stored in {how.bits} bits: its inputs "
                f"must be a multiple of the group of {group}, both sizes of {per}"
            )
        groups = in_features // group
        self.qweight = _frozen(torch.empty(in_features // per, out_features, dtype=torch.int32))
        self.qzeros = _frozen(torch.empty(groups, out_features // per, dtype=torch.int32))
        self.scales = _frozen(torch.empty(groups, out_features, dtype=torch.float16))
        self.g_idx = _frozen(torch.empty(in_features, dtype=torch.int32))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def _apply(self, fn, recurse=True):
        """Move, but never cast the scales: `fn` sees their bits, which no cast of floats touches."""

        def careful(t):
            return fn(t.view(torch.int16)).view(torch.float16) if t is self.scales else fn(t)

        return super()._apply(careful, recurse)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Put the weight (out, in) together: products in fp32, rounded once; some outputs at a time."""
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.scales.device)
        per, groups = 32 // self.bits, self.g_idx.long()
        in_turn = torch.equal(self.g_idx, self.groups_in_turn())
        step = max(1, 2**20 // self.in_features // per) * per
        for a in range(0, self.out_features, step):
            q, zeros, scales = self.values(a, a + step)
            if in_turn:
                part = (q.unflatten(1, (len(self.scales), -1)) - zeros.float()[..., None]) * scales[..., None]
            else:
                part = (q - zeros.float()[:, groups]) * scales[:, groups]
            weight[a : a + step] = part.view(q.shape)
        return weight

    def groups_in_turn(self) -> torch.Tensor:
        """Give the g_idx (in,) of groups that follow one another."""
        index = torch.arange(self.in_features, dtype=torch.int32, device=self.g_idx.device)
        return index // (self.in_features // len(self.scales))

    def values(self, a: int = 0, b: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unpack some outputs, n: q (n, in) uint8, zeros (n, groups) uint8 and scales (n, groups) fp16."""
        b, per = self.out_features if b is None else b, 32 // self.bits
        zeros = self.qzeros[:, a // per : b // per]
        if self.how.zeros_less_one:
            zeros = zeros + kernels.ones(self.bits)  # may carry from field to field
        q = kernels.unpack(self.qweight[:, a:b], self.bits, 0)
        return q.t().contiguous(), kernels.unpack(zeros, self.bits, 1).t(), self.scales[:, a:b].t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        y = _QuantProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _QuantProduct(torch.autograd.Function):
    """y = x Wᵀ, dx = g W: the weight is put together again for the gradient, instead of kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g @ ctx.layer.dequantize(g.dtype), None


def _frozen(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def linear(config: ModelConfig, in_features: int, out_features: int, bias: bool) -> Linear | QuantLinear:
    """Make a linear layer of a block, of the kind that the config says."""
    if config.quantization:
        return QuantLinear(in_features, out_features, bias, config.quantization)
    return Linear(in_features, out_features, bias)


class Embedding(nn.Embedding):
    """A table of token vectors; its values are set elsewhere."""

    def reset_parameters(self):
        """Do nothing, as in Linear."""


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))
        self.bias = None if config.switches.rms_norm else nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """Normalise (..., C); with `residual` return (normalised sum, sum)."""
        if self.bias is None:
            return kernels.rms_norm(x, self.weight, self.eps, residual)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, residual)


class Attention(nn.Module):
    """Causal self-attention with grouped heads, RoPE or ALiBi, and a cache."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer  # its place in the cache
        H, K, D, C = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.hidden_size,
        )
        self.heads, self.kv_heads, self.head_dim = H, K, D
        self.interleaved = config.switches.interleaved_qkv
        bias = config.switches.bias
        if self.interleaved:
            self.query_key_value = linear(config, C, 3 * H * D, bias)
        else:
            self.q_proj = linear(config, C, H * D, bias)
            self.k_proj = linear(config, C, K * D, bias)
            self.v_proj = linear(config, C, K * D, bias)
        self.o_proj = linear(config, H * D, C, bias)

    def forward(self, x: torch.Tensor, at: Positions) -> torch.Tensor:
        """Mix information along time: (B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        q, k, v = self.project(x, at)
        if at.cache is None:
            y = kernels.attention(q, k, v, lo=at.lo, slopes=at.slopes)
        else:
            keys, values = at.cache.write(self.layer, k, v, at.index)  # (B, K, S, D)
            lengths = at.cache.lengths
            if at.empty:
                y = kernels.attention(q, k, v, slopes=at.slopes)
            elif T <= 8:  # a decoding step reads only the used part of the cache
                y = kernels.attention_decode(q, keys, values, lengths, at.slopes)
            else:
                keys, values = keys[:, :, : at.used], values[:, :, : at.used]
                y = kernels.attention(q, keys, values, start=lengths, slopes=at.slopes)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, self.heads * self.head_dim))

    def project(self, x: torch.Tensor, at: Positions):
        """Give the heads' queries (B, H, T, D), keys and values (B, K, T, D), turned to their positions."""
        B, T, _ = x.shape
        if self.interleaved:
            q, k, v = self.query_key_value(x).view(B, T, self.heads, 3, self.head_dim).unbind(3)
        else:
            q = self.q_proj(x).view(B, T, self.heads, self.head_dim)
            k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)
            v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if at.cos is not None:
            q, k = kernels.rope_pair(q, k, at.cos, at.sin)
        return q, k, v


class MLP(nn.Module):
    """The position-wise network: gated (LLaMA) or plain (Phi, BLOOM)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, F_, bias = config.hidden_size, config.intermediate_size, config.switches.bias
        self.act = config.switches.act
        self.gate_proj = linear(config, C, F_, bias) if config.switches.gated else None
        self.up_proj = linear(config, C, F_, bias)
        self.down_proj = linear(config, F_, C, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position: (B, T, C) -> (B, T, C)."""
        if self.gate_proj is None:
            return self.down_proj(kernels.ACTIVATIONS[self.act](self.up_proj(x)))
        return self.down_proj(kernels.glu(self.gate_proj(x), self.up_proj(x), self.act))


class Block(nn.Module):
    """Attention and MLP around the residual stream: one after the other, or side by side (Phi)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = None if config.switches.parallel else Norm(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, at: Positions) -> torch.Tensor:
        """Add this block's contribution to the residual stream (B, T, C)."""
        n = self.input_layernorm(x)
        a = self.self_attn(n, at)
        if self.post_attention_layernorm is None:
            return x + self.drop(a + self.mlp(n))
        n, x = self.post_attention_layernorm(self.drop(a), residual=x)  # one pass adds and normalises
        return x + self.drop(self.mlp(n))

    def drop(self, x: torch.Tensor) -> torch.Tensor:
        """Apply dropout, in training."""
        return F.dropout(x, self.config.dropout) if self.training and self.config.dropout else x


class Head(Linear):
    """The projection to the vocabulary, which is also where the loss of every token is computed."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None):
        """Return logits (..., V), or with targets (B, T) the pair (nll, lse), each (B, T) in fp32."""
        if targets is None:
            return super().forward(x)
        return token_losses(x, self.weight, self.bias, targets)


class QuantHead(QuantLinear):
    """The same, over a weight in 8 bits."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None):
        """Return logits (..., V), or with targets (B, T) the pair (nll, lse), each (B, T) in fp32."""
        if targets is None:
            return super().forward(x)
        return token_losses(x, self.dequantize(x.dtype), self.bias, targets)


def token_losses(x, weight, bias, targets):
    """Compute (nll, lse), each (B, T) in fp32, of x (B, T, C) under a head's weight (V, C) and bias."""
    nll, lse = kernels.linear_nll(x.flatten(0, 1), weight, bias, targets.flatten())
    return nll.view_as(targets), lse.view_as(targets)


# --- 4. the model -------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The decoder. Build it with `build`, fill it with `init_weights` or `checkpoint.load_model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: the dtype of the weights
        self.known_vocab = config.vocab_size  # ids from here on have no text; sampling never picks them
        self.compiled_steps = None  # inference.CompiledSteps of a model that only writes
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = Norm(config) if config.switches.embed_norm else None
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config)
        if config.head == "lm":
            sizes, how = (
                (config.hidden_size, config.vocab_size, config.switches.head_bias),
                config.quantization,
            )
            if how and how.head_bits:
                how = dataclasses.replace(how, bits=how.head_bits, group_size=-1)
                self.lm_head = QuantHead(*sizes, how)
            else:
                self.lm_head = Head(*sizes)
        elif config.head == "score":
            self.score = Linear(config.hidden_size, 1, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make the head share the embedding's tensor, where the config says so."""
        if self.config.head == "lm" and self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor | None = None,
        doc_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        num_new: torch.Tensor | None = None,
        last: bool = False,
        lse: bool = False,
    ):
        """Run the decoder over ids (B, T).

        targets  (B, T): return the nll of every token (B, T) in fp32, 0 where targets is -100; with `lse`
                 the pair (nll, logsumexp of the logits), for z-loss.
        doc_ids  (B, T): tokens see only earlier tokens of the same document; documents are contiguous, and a
                 row may exceed the context where no document does. −1: the empty end of a row, of any length.
        cache    the new tokens of row b stand at cache.lengths[b] + arange(T); lengths grow by num_new (B,),
                 by T if it is not given. Rows of unequal length are padded on the right.
        last     compute the head only at each row's last real position.

        Returns without targets: head lm: logits (B, T, V), or (B, V) with `last`; head score: (B, T, 1)
        fp32, or (B, 1); head none: hidden states (B, T, C), or (B, C). ValueError if a row, or with doc_ids
        a document, is longer than a RoPE model's context.
        """
        B, T = ids.shape
        if targets is not None and self.config.head != "lm":
            raise ValueError(
                f"a model with head {self.config.head!r} predicts no tokens; targets have no meaning"
            )
        x = self.embed_tokens(ids)  # (B, T, C)
        x = x.to(self.compute_dtype or x.dtype)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        x = F.dropout(x, self.config.dropout, self.training)
        at = self.positions(B, T, ids.device, doc_ids, cache)
        for layer in self.layers:
            x = layer(x, at)
        if cache is not None:
            cache.lengths = cache.lengths + (T if num_new is None else num_new)
        if last:
            end = torch.full((B,), T, device=ids.device) if num_new is None else num_new
            x = x[torch.arange(B, device=ids.device), end - 1]  # (B, C)
        x = self.norm(x)
        if self.config.head == "none":
            return x
        if self.config.head == "score":
            return self.score(x).float()
        if targets is None:
            return self.lm_head(x)
        nll, z = self.lm_head(x, targets)
        return (nll, z) if lse else nll

    def positions(self, B: int, T: int, device, doc_ids=None, cache: KVCache | None = None) -> Positions:
        """Compute what all blocks need to know about the positions of ids (B, T); errors as forward."""
        steps = torch.arange(T, device=device)[None]  # (1, T)
        if cache is not None:
            assert doc_ids is None, "a cache row is one document"
            # not for one token: who decodes has sized the cache, and asking would wait for the device
            used = int(cache.lengths.max()) + T if T > 1 else 0
            if used > cache.size:
                raise ValueError(f"{T} more tokens, padding included, do not fit a cache of {cache.size}")
            at = Positions(cache.lengths[:, None] + steps, cache=cache, empty=used == T, used=used)
        elif doc_ids is not None:
            lo = document_starts(doc_ids)
            at = Positions(steps - lo, lo=lo)
        else:
            at = Positions(steps)
        if cache is None:
            packed = doc_ids is not None and self.config.max_position_embeddings < T
            # no longer than its longest document; only a longer row must wait for the device to say how long
            check_length(self.config, int(at.index.where(doc_ids >= 0, -1).max()) + 1 if packed else T)
        frequencies, at.slopes = self.position_tables(device)
        if frequencies is not None:
            at.cos, at.sin = kernels.rope_table(at.index, frequencies)
        return at

    def position_tables(self, device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Give RoPE's frequencies (R/2,) and ALiBi's slopes (H,), fp32; one of them is None."""
        if self.config.switches.rope:
            return rope_frequencies(self.config, device), None
        return None, torch.tensor(alibi_slopes(self.config.num_attention_heads), device=device)


# --- 5. building, initialising, counting --------------------------------------------------------------------


def build(config: ModelConfig, device: str | torch.device = "cpu") -> Model:
    """Make a model with undefined weights; device "meta" takes no memory, for counting and for sharding."""
    config = dataclasses.replace(config)
    with torch.device(device):
        return Model(config)


@torch.no_grad()
def init_weights(model: nn.Module, seed: int, std: float | None = None) -> None:
    """Draw every weight from N(0, std²), residual outputs from N(0, std²/2L); norms 1, biases 0.

    By default std = √(2/5C) follows the width: 0.04 at C = 256, 0.014 at 4096; the usual 0.02 starts a narrow
    model too quietly (SmallInit: Nguyen & Salazar 2019, "Transformers without Tears"; residual outputs: GPT-2
    report, section 2.3). Each parameter has its own generator, seeded by `seed` and its name: the values
    depend neither on the number of ranks nor on which other parameters exist. A rank that holds only some
    rows of a parameter draws all, one parameter at a time, and keeps its own.
    """
    layers = model.config.num_hidden_layers
    std = std or math.sqrt(2 / (5 * model.config.hidden_size))
    for name, p in model.named_parameters():
        mine, a, b = own_rows(p)
        if name.endswith("bias"):
            mine.zero_()
        elif p.dim() == 1:
            mine.fill_(1.0)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = std / math.sqrt(2 * layers) if residual else std
            # 32 bits with the seed mixed in: a CPU generator ignores the higher bits of its seed
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            whole = torch.empty(p.shape, dtype=torch.float32).normal_(0, scale, generator=generator)
            mine.copy_(whole[a:b])


def rows(n: int, part: int, parts: int) -> tuple[int, int]:
    """Give rows [a, b) of n that `part` of `parts` holds: rows(5, 1, 2) -> (3, 5).  As torch.chunk cuts."""
    k = -(-n // parts)
    return min(part * k, n), min((part + 1) * k, n)


def own_rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """Give the rows of a tensor that are on this rank, and which they are: (local, a, b), local = x[a:b].

    A plain tensor is all here. FSDP2 makes DTensors, cut along dimension 0 over the last dimension of the
    device mesh (the first one, if there are two, holds copies).
    """
    if not hasattr(x, "device_mesh"):  # to import DTensor for isinstance takes a second
        return x, 0, len(x)
    mesh = x.device_mesh
    return x.to_local(), *rows(len(x), mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1))


def num_params(config: ModelConfig) -> int:
    """Count the parameters without allocating them; a tied head counts once."""
    whole = dataclasses.replace(config, quantization=None)
    return sum(p.numel() for p in build(whole, "meta").parameters())


def flops_per_token(config: ModelConfig, length: int, recompute: bool | None = None) -> float:
    """Count the floating-point operations to train one token in rows of `length` tokens.

    6 per parameter of a matrix product (2 forward, 4 backward), plus attention: 12·L·H·D·length for scores
    and weighted sums, halved because a causal query sees half of the row on average. The embedding look-up
    is free; the head counts, tied or not. (Chowdhery et al. 2022, PaLM, appendix B.)

    This is what the mathematics needs, for MFU (model FLOPs utilisation). With `recompute` it is what the
    hardware does, for HFU: the head's logits are computed twice, and under activation checkpointing (True)
    the forward pass of every block too.
    """
    head = config.vocab_size * config.hidden_size if config.head == "lm" else 0
    blocks = num_params(config) - config.vocab_size * config.hidden_size
    if not config.tie_word_embeddings:
        blocks -= head
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * length / 2
    if recompute is None:
        return 6 * (blocks + head) + attention
    return (6 * blocks + attention) * (4 / 3 if recompute else 1) + 8 * head
