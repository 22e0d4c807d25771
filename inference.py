"""A loaded model, rearranged to write fast: fused, packed, and with a step of its own for one row.

    q, k, v -> qkv,   gate, up -> gate_up        one product instead of three or two
    8 or 4 bits -> kernels.packed                the forms that this machine's products read
    one row on a CPU -> OneRow                   vectors instead of (1, 1, C), no modules

A rearranged model computes what it computed before, but for rounding. It is never saved, and not trained.
generate.load does this; nobody else needs to.

    model = fuse(checkpoint.load_model("out/run"))
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.nn as nn

import kernels
from model import (
    MLP,
    Attention,
    Head,
    KVCache,
    Linear,
    Model,
    Norm,
    Positions,
    QuantHead,
    QuantLinear,
    token_losses,
)

# --- 1. fewer and faster products ---------------------------------------------------------------------------


class FusedAttention(Attention):
    """Attention whose q, k and v come from one matrix, qkv_proj: H·D rows of q, K·D of k, K·D of v."""

    def project(self, x: torch.Tensor, at: Positions):
        """Give q (B, H, T, D), k and v (B, K, T, D), turned to their positions."""
        B, T, _ = x.shape
        heads = self.qkv_proj(x).view(B, T, self.heads + 2 * self.kv_heads, self.head_dim).transpose(1, 2)
        qk, v = heads.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if at.cos is not None:
            qk = kernels.rope(qk, at.cos, at.sin)
        return *qk.split((self.heads, self.kv_heads), dim=1), v


class FusedMLP(nn.Module):
    """A gated MLP whose gate and up come from one matrix."""

    def __init__(self, mlp: MLP, dtype: torch.dtype):
        super().__init__()
        self.gate_up_proj = _join(dtype, mlp.gate_proj, mlp.up_proj)
        self.down_proj = mlp.down_proj
        self.act = mlp.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transform each position: (B, T, C) -> (B, T, C)."""
        return self.down_proj(kernels.glu(*self.gate_up_proj(x).chunk(2, dim=-1), self.act))


class PackedLinear(nn.Module):
    """A linear layer over a kernels.Packed matrix; order (in,) sorts the inputs by group, None: they are."""

    def __init__(self, matrix: kernels.Packed, order: torch.Tensor | None, bias: torch.Tensor | None):
        super().__init__()
        self.matrix, self.order, self.bias = matrix, order, bias
        self.out_features, self.in_features = matrix.N, matrix.K

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        y = self.matrix(x if self.order is None else x[..., self.order])
        return y if self.bias is None else y + self.bias

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Put the weight (out, in) together."""
        weight = self.matrix.weight(dtype)
        return weight if self.order is None else weight[:, self.order.argsort()]


class PackedHead(PackedLinear):
    """The same, as the head of a model."""

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None = None):
        """Return logits (..., V), or with targets (B, T) the pair (nll, lse), each (B, T) in fp32."""
        if targets is None:
            return super().forward(x)
        return token_losses(x, self.dequantize(x.dtype), self.bias, targets)


def _join(dtype: torch.dtype, *layers: Linear | QuantLinear) -> Linear | QuantLinear:
    """Make one linear layer of several that read the same input, of that dtype."""
    first = layers[0]
    sizes = first.in_features, sum(p.out_features for p in layers), first.bias is not None
    with torch.device("meta"):
        if not isinstance(first, QuantLinear):
            new = Linear(*sizes)
        elif all(torch.equal(p.g_idx, first.g_idx) for p in layers):
            new = QuantLinear(*sizes, first.how)
        else:  # their inputs are grouped in different orders
            return _join(dtype, *(whole(layer, dtype) for layer in layers))
    for name, p in first.named_parameters():
        parts = [getattr(layer, name) for layer in layers]
        value = p if name == "g_idx" else torch.cat(parts, _output_dim(name))
        setattr(new, name, nn.Parameter(value, requires_grad=False))
    return new


def _output_dim(name: str) -> int:
    return 1 if name in ("qweight", "qzeros", "scales") else 0


def whole(layer: QuantLinear, dtype: torch.dtype) -> Linear:
    """Put a quantised matrix together, in a plain layer."""
    with torch.device("meta"):
        kind = Head if isinstance(layer, QuantHead) else Linear
        new = kind(layer.in_features, layer.out_features, layer.bias is not None)
    new.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
    new.bias = layer.bias
    return new


def pack(layer: QuantLinear, dtype: torch.dtype, rows: int = 1) -> PackedLinear | Linear:
    """Rearrange a quantised layer for this machine's products with inputs of a dtype, `rows` at a time.

    Where there is none the matrix is put together.
    """
    q, zeros, scales = layer.values()
    order = matrix = None
    if not torch.equal(layer.g_idx, layer.groups_in_turn()):
        order = layer.g_idx.argsort(stable=True)
        q = q[:, order]
    if order is None or torch.equal(layer.g_idx[order], layer.groups_in_turn()):
        matrix = kernels.packed(q, zeros, scales, layer.bits, dtype, rows)
    if matrix is None:
        return whole(layer, dtype)
    return (PackedHead if isinstance(layer, QuantHead) else PackedLinear)(matrix, order, layer.bias)


@torch.no_grad()
def fuse(model: Model, rows: int = 1, compiled: bool = False) -> Model:
    """Stack q, k, v and gate, up of every layer, and pack what is quantised, in place, for inference.

    Weights are stored for `rows` rows at a time. For one, 16-bit ones lie by columns where that is faster
    (1.5 times with two threads on a CPU, see kernels/matvec.py); 2 to 16 rows at a time would then be slower.
    compiled: decoding steps are compiled when they are first used (see CompiledSteps).
    """
    dtype = model.compute_dtype or model.embed_tokens.weight.dtype
    for layer in model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        if isinstance(attn, FusedAttention):
            continue  # stacked before
        if attn.interleaved:
            attn.qkv_proj = _by_kind(attn.query_key_value, attn.heads, dtype)
            del attn.query_key_value
        else:
            attn.qkv_proj = _join(dtype, attn.q_proj, attn.k_proj, attn.v_proj)
            del attn.q_proj, attn.k_proj, attn.v_proj
        attn.__class__ = FusedAttention
        if mlp.gate_proj is not None:
            layer.mlp = FusedMLP(mlp, dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, pack(module, dtype, rows))
    if model.config.quantization:
        _announce(model, dtype)
    for module in model.modules():
        if isinstance(module, Linear):
            columns = rows == 1 and kernels.columns_are_faster(module.weight)
            module.weight.data = kernels.by_columns(module.weight) if columns else module.weight.contiguous()
    model.requires_grad_(False).eval()
    if compiled:
        model.compiled_steps = CompiledSteps(model)
    return model


def _by_kind(layer: Linear | QuantLinear, heads: int, dtype: torch.dtype) -> Linear | QuantLinear:
    """Bring the outputs of BLOOM's query_key_value from (H, 3, D) into the order (3, H, D)."""
    if isinstance(layer, QuantLinear) and layer.out_features // (3 * heads) % 8:
        layer = whole(layer, dtype)  # a word of qzeros holds outputs of two heads
    for name, p in list(layer.named_parameters()):
        if name != "g_idx":
            dim = _output_dim(name)
            value = p.unflatten(dim, (heads, 3, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
    return layer


def _announce(model: Model, dtype: torch.dtype) -> None:
    """Say on stderr what a quantised model does here that nobody would guess."""
    matrices = [m for layer in model.layers for m in layer.modules() if isinstance(m, PackedLinear | Linear)]
    plain = sum(isinstance(m, Linear) for m in matrices)
    if plain:
        print(
            f"{plain} of {len(matrices)} quantised matrices have no product here: they are put together, and "
            f"take the memory of {dtype} ones".replace("torch.", ""),
            file=sys.stderr,
        )
    elif dtype == torch.float32 and model.config.quantization.bits == 4 and model.norm.weight.is_cpu:
        print("products of few rows with 4-bit matrices round fp32 activations to bf16", file=sys.stderr)


def weight_bytes(model: Model) -> int:
    """Count the bytes of the weights that a step for one row reads: of the embedding, one row."""
    plain = sum(p.numel() * p.itemsize for p in model.parameters())
    if not model.config.tie_word_embeddings:
        plain -= model.embed_tokens.weight[1:].numel() * model.embed_tokens.weight.itemsize
    return plain + sum(m.matrix.nbytes for m in model.modules() if isinstance(m, PackedLinear))


# --- 2. decoding steps -------------------------------------------------------------------------------------


def steps(model: Model, rows: int) -> Callable[[torch.Tensor, torch.Tensor, KVCache], torch.Tensor]:
    """Choose the function that puts one more token after each of `rows` rows of a cache.

    It takes ids (B,), num_new (B,) of 1, or 0 for rows that have ended, and the cache; returns logits (B, V).
    """
    if model.compiled_steps:
        return model.compiled_steps
    if rows == 1 and OneRow.fits(model):
        one = OneRow(model)
        return lambda ids, num_new, cache: one(int(ids), cache)[None]
    return lambda ids, num_new, cache: model(ids[:, None], cache=cache, num_new=num_new, last=True)


class CompiledSteps:
    """Decoding steps that torch.compile has made one graph of: OneRow's, and Model.forward's for more rows.

    A graph serves caches of every size, and reads all of them: one for each number of rows is made when it is
    first used. On a CPU that takes minutes for a deep model (30 layers: 2), and a C++ compiler.
    """

    def __init__(self, model: Model):
        self.one_row = OneRow(model) if OneRow.fits(model) else None
        self.row = torch.compile(self._row, dynamic=False)
        self.rows = torch.compile(model.forward, dynamic=False)

    def __call__(self, ids: torch.Tensor, num_new: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Step, as `steps` says."""
        for t in (cache.k, cache.v):
            torch._dynamo.maybe_mark_dynamic(t, 3)  # S
        if self.one_row is None or len(ids) > 1:
            return self.rows(ids[:, None], cache=cache, num_new=num_new, last=True)
        logits = self.row(ids, cache)
        cache.lengths = cache.lengths + num_new
        return logits[None]

    def _row(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        one = self.one_row

        def attend(i, q, k, v):
            keys, values = cache.write(i, k, v, cache.lengths[None])
            return kernels.attention_decode(q, keys, values, cache.lengths, one.slopes)

        return one.run(one.table.index_select(0, ids)[0], cache.lengths, attend)


# --- 3. one row ---------------------------------------------------------------------------------------------


class OneRow:
    """A fused model on a CPU that continues one row by one token: Model.forward, written flat.

    At this size the arithmetic is a few vectors between matrices, and Python a third of the time: here are
    vectors instead of (1, 1, C), no modules, nothing computed twice, and kernels.matvec.
    """

    def __init__(self, model: Model):
        self.config = config = model.config
        self.table = model.embed_tokens.weight
        self.embed_norm = _row_norm(model.embed_norm) if config.switches.embed_norm else None
        self.layers = [
            (
                _row_norm(layer.input_layernorm),
                _row_product(layer.self_attn.qkv_proj),
                _row_product(layer.self_attn.o_proj),
                None if config.switches.parallel else _row_norm(layer.post_attention_layernorm),
                _row_mlp(layer.mlp),
            )
            for layer in model.layers
        ]
        self.norm, self.head = _row_norm(model.norm), _row_product(model.lm_head)
        self.rope, self.slopes = model.position_tables("cpu")

    @staticmethod
    def fits(model: Model) -> bool:
        """Tell whether this model can be run this way."""
        weight = model.embed_tokens.weight
        one_dtype = model.compute_dtype in (None, weight.dtype)
        return weight.is_cpu and one_dtype and isinstance(model.layers[0].self_attn, FusedAttention)

    def __call__(self, token: int, cache: KVCache) -> torch.Tensor:
        """Put a token after those of the cache's only row; return the logits (V,) of the next."""
        position = int(cache.lengths)
        new, used = (
            [t[:, :, :, p].unbind() for t in (cache.k, cache.v)]
            for p in (slice(position, position + 1), slice(position + 1))
        )

        def attend(i, q, k, v):
            new[0][i].copy_(k)
            new[1][i].copy_(v)
            return kernels.attention(q, used[0][i], used[1][i], slopes=self.slopes)

        logits = self.run(self.table[token], cache.lengths, attend)
        cache.lengths = cache.lengths + 1
        return logits

    def run(self, x: torch.Tensor, position: torch.Tensor, attend: Callable) -> torch.Tensor:
        """Map a token's embedding (C,) at a position (1,) to the logits (V,) of the next.

        attend(i, q, k, v) keeps k and v (1, K, 1, D) of layer i, and gives the attention (1, H, 1, D) of q.
        """
        H, K, D = (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim)
        if self.embed_norm:
            x = self.embed_norm(x)
        if self.rope is not None:
            cos, sin = kernels.rope_table(position[None], self.rope)
        for i, (norm, qkv, out, mlp_norm, mlp) in enumerate(self.layers):
            n = norm(x)
            heads = qkv(n).view(1, H + 2 * K, 1, D)
            qk, v = heads[:, : H + K], heads[:, H + K :]
            if self.rope is not None:
                qk = kernels.rope(qk, cos, sin)
            y = attend(i, qk[:, :H], qk[:, H:], v)
            x = out(y.view(-1), x)
            x = mlp(n if mlp_norm is None else mlp_norm(x), x)  # Phi: attention and MLP read the same norm
        return self.head(self.norm(x))


def _row_product(layer: Linear | PackedLinear) -> Callable[..., torch.Tensor]:
    """Make the function that maps (in,) to (out,), and adds a vector."""
    if isinstance(layer, PackedLinear):

        def packed(x, add=None):
            y = layer(x)
            return y if add is None else y + add

        return packed
    weight, bias = layer.weight, layer.bias

    def product(x, add=None):
        if bias is not None:
            add = bias if add is None else add + bias
        return kernels.matvec(weight, x, add)

    return product


def _row_norm(norm: Norm) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if bias is None:
        return lambda x: kernels.rms_norm(x, weight, eps)
    return lambda x: kernels.layer_norm(x, weight, bias, eps)


def _row_mlp(mlp: MLP | FusedMLP) -> Callable[..., torch.Tensor]:
    up = _row_product(mlp.gate_up_proj if isinstance(mlp, FusedMLP) else mlp.up_proj)
    down, act, width = _row_product(mlp.down_proj), mlp.act, mlp.down_proj.in_features
    activation = kernels.ACTIVATIONS[act]

    def gated(x, add):
        h = up(x)
        return down(kernels.glu(h[:width], h[width:], act), add)

    return gated if isinstance(mlp, FusedMLP) else lambda x, add: down(activation(up(x)), add)
