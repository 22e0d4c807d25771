"""The operations that decide speed: one per file, each with its formula and its plain-torch definition.

The plain-torch functions here are the definition, the CPU path, and what any faster kernel has to agree
with. They take all options, run in any floating dtype (float64 included) and are differentiable, matvec
excepted. model.py calls them and never looks at the device.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, D head dim, C width, F mlp
width, V vocabulary, N rows (B·T flattened).
"""

from kernels.attention import attention, attention_decode, use_attention
from kernels.glu import ACTIVATIONS, glu
from kernels.linear_nll import linear_nll
from kernels.matvec import by_columns, columns_are_faster, matvec
from kernels.norm import layer_norm, rms_norm
from kernels.quant import Packed, ones, pack, packed, unpack
from kernels.rope import rope, rope_pair, rope_table

__all__ = [
    "ACTIVATIONS",
    "Packed",
    "attention",
    "attention_decode",
    "by_columns",
    "columns_are_faster",
    "glu",
    "layer_norm",
    "linear_nll",
    "matvec",
    "ones",
    "pack",
    "packed",
    "rms_norm",
    "rope",
    "rope_pair",
    "rope_table",
    "unpack",
    "use_attention",
]
