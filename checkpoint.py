"""Model folders in the Hugging Face layout: what other tools read and write.

A model folder is config.json, model.safetensors (or several files and an index) and the tokenizer's files.
There is no export step. Names are mapped by one table per family, tensors never: nothing is split, fused,
permuted or transposed, so one table serves loading, saving, adapters and sharding.

    model = load_model("out/run")                     # a model folder, or a run's latest complete step
    save_model(model, "out/copy", tokenizer, dtype=torch.bfloat16)

A model whose parameters are cut over ranks (FSDP2, see parallel.py) reads and writes the same folders, byte
for byte. Each rank reads its own rows only. To write, a tensor is cast where it lies and then put together,
and only the rank that writes its file keeps it: W ranks write W files at a time, and none holds more than one
file's tensors.

No file is ever unpickled: weights only from safetensors, the rest from JSON. The training state, which lies
beside the model folder, is the matter of state.py.

    python checkpoint.py resize out/run --tokenizer out/tok2 --out out/wider    # rows for more tokens
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tyro.conf import Positional

import common
from model import FAMILIES, Model, ModelConfig, Quantization, QuantLinear, build, own_rows
from tokenizer import Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --- 1. names -----------------------------------------------------------------------------------------------

# (ours, theirs), matched as whole dotted parts of a parameter's name; what is not listed has the same name
RENAMES = {
    "llama": [],
    "phi": [
        ("self_attn.o_proj", "self_attn.dense"),
        ("mlp.up_proj", "mlp.fc1"),
        ("mlp.down_proj", "mlp.fc2"),
        ("norm", "final_layernorm"),
    ],
    "bloom": [
        ("embed_tokens", "word_embeddings"),
        ("embed_norm", "word_embeddings_layernorm"),
        ("layers", "h"),
        ("self_attn.query_key_value", "self_attention.query_key_value"),
        ("self_attn.o_proj", "self_attention.dense"),
        ("mlp.up_proj", "mlp.dense_h_to_4h"),
        ("mlp.down_proj", "mlp.dense_4h_to_h"),
        ("norm", "ln_f"),
    ],
}
BODY = {"llama": "model.", "phi": "model.", "bloom": "transformer."}  # before every name but the head's
HEADS = ("lm_head.", "score.")


def hf_name(name: str, family: str) -> str:
    """Translate a parameter's name: ("layers.0.mlp.up_proj.bias", "phi") -> "model.layers.0.mlp.fc1.bias"."""
    dotted = f".{name}."
    for ours, theirs in RENAMES[family]:
        dotted = dotted.replace(f".{ours}.", f".{theirs}.")
    name = dotted[1:-1]
    return name if name.startswith(HEADS) else BODY[family] + name


ADAPTERS = ("lora_A.weight", "lora_B.weight", "new_rows")  # what lora.py adds; no model folder holds it
QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx")  # of a model.QuantLinear; never cast


def is_adapter(name: str) -> bool:
    """Tell whether a parameter belongs to an adapter, not to the model itself."""
    return name.endswith(ADAPTERS)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Collect a model's parameters under their plain names, without the prefixes of DDP and compile.

    Those of FSDP2 as they are kept: cut over the ranks, in fp32.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass some may still be gathered, and then in bf16
    return {n.removeprefix("module.").replace("_orig_mod.", ""): p for n, p in model.named_parameters()}


# --- 2. config.json -----------------------------------------------------------------------------------------

# our field -> (their key, transformers' default; ... means the key must be there)
FIELDS = {
    "llama": {
        "vocab_size": ("vocab_size", ...),
        "hidden_size": ("hidden_size", ...),
        "num_hidden_layers": ("num_hidden_layers", ...),
        "num_attention_heads": ("num_attention_heads", ...),
        "num_key_value_heads": ("num_key_value_heads", 0),
        "intermediate_size": ("intermediate_size", ...),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "head_dim": ("head_dim", 0),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    },
    "phi": {
        "vocab_size": ("vocab_size", ...),
        "hidden_size": ("hidden_size", ...),
        "num_hidden_layers": ("num_hidden_layers", ...),
        "num_attention_heads": ("num_attention_heads", ...),
        "num_key_value_heads": ("num_key_value_heads", 0),
        "intermediate_size": ("intermediate_size", ...),
        "max_position_embeddings": ("max_position_embeddings", 2048),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "tie_word_embeddings": ("tie_word_embeddings", False),
    },
    "bloom": {
        "vocab_size": ("vocab_size", ...),
        "hidden_size": (("hidden_size", "n_embed"), ...),
        "num_hidden_layers": (("n_layer", "num_hidden_layers"), ...),
        "num_attention_heads": (("n_head", "num_attention_heads"), ...),
        "max_position_embeddings": ("seq_length", 2048),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": ("tie_word_embeddings", True),
    },
}
# keys that change the function: only these values are what our decoder computes
FIXED = {
    "hidden_act": {"llama": ("silu",), "phi": ("gelu_new", "gelu_pytorch_tanh")},
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "qk_layernorm": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "rope_scaling": (None,),
    "is_decoder": (True, False, None),  # every model here is one
    "add_cross_attention": (False, None),
    "sliding_window": (None,),
}
HARMLESS = {
    *("_name_or_path", "architectures", "attention_dropout", "attention_softmax_in_fp32", "auto_map"),
    *("bad_words_ids", "bias_dropout_fusion", "bos_token", "chunk_size_feed_forward", "dtype"),
    *("embd_pdrop", "eos_token", "finetuning_task", "hidden_dropout", "id2label", "initializer_range"),
    *("is_encoder_decoder", "label2id", "masked_softmax_fusion", "max_tokenizer_truncation", "model_type"),
    *("n_inner", "num_labels", "offset_alibi", "output_attentions", "output_hidden_states"),
    *("pretraining_tp", "problem_type", "resid_pdrop", "return_dict", "skip_bias_add", "skip_bias_add_qkv"),
    *("slow_but_exact", "tokenizer_class", "torch_dtype", "torchscript", "transformers_version"),
    *("unk_token_id", "use_cache"),
}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
ROPE = ("rope_parameters", "rope_theta", "partial_rotary_factor")


def read_config(folder: str | Path) -> ModelConfig:
    """Read config.json into a ModelConfig.

    Of an adapter folder: its base's, with the adapter's own ids of special tokens.
    ValueError: no such file, another kind of model, a key that changes the function and is not understood.
    """
    if is_adapter_folder(folder):
        path = Path(folder) / "generation_config.json"
        ids = read_object(path) if path.exists() else {}
        ids = {key: ids[key] for key in TOKENS if ids.get(key) is not None}
        return dataclasses.replace(read_config(base_folder(folder)), **ids)
    path = Path(folder) / "config.json"
    raw = read_object(path)
    family = {"xverse": "llama"}.get(raw.get("model_type"), raw.get("model_type"))
    if family not in FAMILIES:
        raise ValueError(f"{path}: model_type is {family!r}; known: {', '.join(FAMILIES)}, xverse")
    values, known = {}, {*HARMLESS, *FIXED, *TOKENS, *ROPE, "quantization_config"}
    for field, (keys, default) in FIELDS[family].items():
        keys = (keys,) if isinstance(keys, str) else keys
        known.update(keys)
        found = [raw[k] for k in keys if raw.get(k) is not None]
        if not found and default is ...:
            raise ValueError(f'{path}: no "{keys[0]}"')
        values[field] = found[0] if found else default
    for key, allowed in FIXED.items():
        allowed = allowed.get(family, (raw.get(key),)) if isinstance(allowed, dict) else allowed
        if key in raw and raw[key] not in allowed:
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported (understood: {allowed[0]!r})")
    unknown = sorted(k for k in raw if k not in known)
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(f'{k} = {raw[k]!r}' for k in unknown)}: not understood, and it may change "
            "what the model computes; remove the key if you know that it does not"
        )
    if family == "bloom":
        values["intermediate_size"] = 4 * values["hidden_size"]
    else:
        values.update(_read_rope(raw, family, path))
    values["head"] = _read_head(raw, path)
    if values["head"] == "score":
        values["tie_word_embeddings"] = values["tie_word_embeddings"] and family == "bloom"
    values |= {key: raw.get(key) for key in TOKENS}
    if raw.get("quantization_config"):
        values["quantization"] = _read_quantization(raw["quantization_config"], path)
    return ModelConfig(family, **values)


def read_object(path: Path) -> dict:
    value = common.read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def _read_rope(raw: dict, family: str, path: Path) -> dict:
    rope = raw.get("rope_parameters") or {}  # transformers 5; older files have the keys at the top
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{path}: rope_type {kind!r} is not supported (understood: 'default')")
    odd = set(rope) - {"rope_type", "rope_theta", "partial_rotary_factor"}
    if odd:
        raise ValueError(f"{path}: rope_parameters holds {', '.join(sorted(odd))}, which is not understood")
    part = {"llama": 1.0, "phi": 0.5}[family]  # PhiConfig's default; phi-2 itself says 0.4
    return {
        "rope_theta": rope.get("rope_theta") or raw.get("rope_theta") or 10000.0,
        "partial_rotary_factor": rope.get("partial_rotary_factor")
        or raw.get("partial_rotary_factor")
        or part,
    }


HEAD_RULE = "+:^lm_head$"  # in quantization_config's "dynamic", which says what single layers do otherwise
# keys of quantization_config that say how it was made, or how others run it, not what the tensors mean
MADE_BY = {
    *("act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs"),
    *("damp_auto_increment", "damp_percent", "dataset", "device", "disable_exllama", "exllama_config"),
    *("fail_safe", "gptaq", "gptaq_alpha", "hyb_act", "max_input_length", "meta", "model_file_base_name"),
    *("model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "mse"),
    *("modules_in_block_to_quantize", "offload_to_disk", "offload_to_disk_path", "pack_impl", "pad_token_id"),
    *("quantizer", "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama"),
}


def _read_quantization(raw: dict, path: Path) -> Quantization:
    """Read a quantization_config of GPTQ's kind; ValueError for any other, and for what is not understood."""
    path = f"{path}: quantization_config"
    if not isinstance(raw, dict) or raw.get("quant_method") != "gptq":
        raise ValueError(f"{path}: {raw!r:.200}; only quant_method 'gptq' is read")
    forms = {raw[key] for key in ("checkpoint_format", "format") if raw.get(key)} or {"gptq"}
    if not forms <= {"gptq", "gptq_v2"} or len(forms) > 1 or raw.get("pack_dtype", "int32") != "int32":
        raise ValueError(f"{path}: only checkpoint_format gptq and gptq_v2, packed in int32, are read")
    known = {"quant_method", "checkpoint_format", "format", "pack_dtype", "bits", "group_size", "lm_head"}
    known |= {"dynamic", "sym", "desc_act", *MADE_BY}
    known |= {"method"} if raw.get("method") == "gptq" else set()  # gptqmodel 7 says it twice
    unknown = sorted(key for key, value in raw.items() if value and key not in known)
    rules = raw.get("dynamic") or {}
    if unknown or not isinstance(rules, dict) or set(rules) - {HEAD_RULE}:
        what = ", ".join(unknown) or f"dynamic {rules!r}"
        raise ValueError(f"{path}: {what} is not understood, and it may change what the tensors mean")
    bits, group = raw.get("bits"), raw.get("group_size", -1)
    head = rules.get(HEAD_RULE, {"bits": bits, "group_size": group})
    if raw.get("lm_head") and head != {"bits": 8, "group_size": -1}:
        raise ValueError(f"{path}: a head is read in 8 bits with one scale a row, not {head}")
    sym, order, less = raw.get("sym", True), raw.get("desc_act", False), forms == {"gptq"}
    try:
        return Quantization(bits, group, bool(sym), bool(order), less, 8 if raw.get("lm_head") else 0)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _say_quantization(how: Quantization) -> dict:
    """Say a Quantization as a quantization_config."""
    said = {"quant_method": "gptq", "bits": how.bits, "group_size": how.group_size, "sym": how.sym}
    said |= {"desc_act": how.desc_act, "checkpoint_format": "gptq" if how.zeros_less_one else "gptq_v2"}
    said |= {"pack_dtype": "int32", "lm_head": how.head_bits > 0}
    return said | ({"dynamic": {HEAD_RULE: {"bits": 8, "group_size": -1}}} if how.head_bits else {})


def _read_head(raw: dict, path: Path) -> str:
    name = (raw.get("architectures") or ["ForCausalLM"])[0]
    if name.endswith("ForSequenceClassification"):
        labels = len(raw["id2label"]) if "id2label" in raw else raw.get("num_labels", 2)
        if labels != 1:
            raise ValueError(f"{path}: {labels} labels; only num_labels 1 (a reward model) is read")
        return "score"
    return "lm" if name.endswith("ForCausalLM") else "none"


def config_dict(config: ModelConfig, dtype: torch.dtype) -> dict:
    """Say a ModelConfig in the words of transformers' config.json, for version 5 and for older ones."""
    family = config.family
    kind = {"lm": "ForCausalLM", "score": "ForSequenceClassification", "none": "Model"}[config.head]
    name = next(n for n, t in DTYPES.items() if t == dtype)
    out = {"architectures": [family.capitalize() + kind], "model_type": family}
    out.update(dtype=name, torch_dtype=name)  # the key of transformers 5, and of older ones
    for field, (keys, _) in FIELDS[family].items():
        out[keys if isinstance(keys, str) else keys[0]] = getattr(config, field)
    if family == "llama":
        out.update(hidden_act="silu", attention_bias=False, mlp_bias=False)
    if family == "phi":
        out.update(hidden_act="gelu_new", qk_layernorm=False, embd_pdrop=0.0, resid_pdrop=0.0)
        out["partial_rotary_factor"] = config.partial_rotary_factor
    if family == "bloom":
        out.update(apply_residual_connection_post_layernorm=False, attention_dropout=0.0, hidden_dropout=0.0)
    else:
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if family == "phi":
            rope["partial_rotary_factor"] = config.partial_rotary_factor
        out.update(rope_theta=config.rope_theta, rope_parameters=rope)
    if config.head == "score":
        out.update(num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})
    if config.quantization:
        out["quantization_config"] = _say_quantization(config.quantization)
    return out | {key: getattr(config, key) for key in TOKENS}


# --- 3. reading a model folder ------------------------------------------------------------------------------


def model_folder(folder: str | Path) -> Path:
    """Resolve what a user means by FOLDER: a model or adapter folder, a run's latest step, or RUN/best."""
    folder = Path(folder)
    if folder.name in ("best", "latest") and folder.is_file():  # a run's file that names a step
        return folder.parent / folder.read_text().strip()
    if (folder / "config.json").exists() or is_adapter_folder(folder):
        return folder
    if (folder / "latest").exists():
        return folder / (folder / "latest").read_text().strip()
    if not folder.exists():
        raise ValueError(f"{folder}: no such folder")
    raise ValueError(f"{folder}: neither a model folder (config.json) nor a run with a saved step (latest)")


def is_adapter_folder(folder: str | Path) -> bool:
    """Tell whether a folder holds an adapter (see lora.py) and no model of its own."""
    return (Path(folder) / "adapter_config.json").exists() and not (Path(folder) / "config.json").exists()


def base_folder(folder: str | Path) -> Path:
    """Find the model folder that an adapter folder was trained on; a model folder is its own base.

    ValueError names the path if it is not there (any more), and says what to do.
    """
    folder = Path(folder)
    if not is_adapter_folder(folder):
        return folder
    config = folder / "adapter_config.json"
    base = read_object(config).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f'{config}: names no base model; write its folder into "base_model_name_or_path"')
    if is_adapter_folder(base):
        raise ValueError(
            f"{config}: its base {base} is an adapter folder itself; merge it: python lora.py merge"
        )
    if not (Path(base) / "config.json").exists():
        raise ValueError(
            f"{config}: its base model {base} is not there; put it back, or write the folder where it is now "
            'into "base_model_name_or_path"'
        )
    return Path(base)


def folder_digest(folder: str | Path) -> str:
    """SHA-256 over what decides a folder's outputs: shape, the bytes of all weights, an adapter and its base.

    It reads every byte (about 1 GB/s a core): a changed, damaged or replaced file is never missed.
    """
    folder = model_folder(folder)
    parts = [repr(read_config(folder)), str(folder_dtype(folder))]
    if is_adapter_folder(folder):
        said = read_object(folder / "adapter_config.json") | {"base_model_name_or_path": ""}  # it may move
        parts += [repr(sorted(said.items())), folder_digest(base_folder(folder))]
        names = [folder / "adapter_model.safetensors"]
    else:
        names = sorted(set(tensor_files(folder).values()))
    parts += map(file_sha256, names)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha.update(block)
    return sha.hexdigest()


def tensor_files(folder: Path) -> dict[str, Path]:
    """Map every tensor of a model folder to the file that holds it; ValueError if there are no weights."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
            raise ValueError(f"{index}: no valid weight_map")
        shards = sorted(set(weight_map.values()))
        if any("/" in f or "\\" in f for f in shards):
            raise ValueError(f"{index}: names files outside of this folder")
        missing = [f for f in shards if not (folder / f).is_file()]
        if missing:
            raise ValueError(f"{folder}: the index names files that are not here: {', '.join(missing)}")
        for shard in shards:
            with open_tensors(folder / shard) as file:
                absent = sorted({n for n, f in weight_map.items() if f == shard} - set(file.keys()))
            if absent:
                raise ValueError(f"{folder / shard}: lacks {len(absent)} tensors of the index: {absent[0]} …")
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if single.exists():
        with open_tensors(single) as file:
            return dict.fromkeys(file.keys(), single)
    hint = ""
    if is_adapter_folder(folder):
        hint = ": an adapter alone; python lora.py merge makes a model folder of it"
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        hint = "; pickled weights (.bin, .pt) are never opened: convert them to safetensors"
    raise ValueError(f"{folder}: no model.safetensors and no index{hint}")


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def _match(names: set[str], model: nn.Module, folder: Path) -> tuple[dict, list, list]:
    """Match a folder's tensor names with the model's: {theirs: ours}, what is missing, what is unexpected."""
    config = model.config
    if any("Wqkv" in n or ".mixer." in n for n in names):
        raise ValueError(
            f"{folder}: the old fused Phi names (Wqkv, mixer); take the current checkpoint, where q_proj, "
            "k_proj and v_proj are separate (transformers 4.37 and later)"
        )
    body = BODY[config.family]
    if not any(n.startswith(body) for n in names):  # saved from the bare body, as bigscience/bloom is
        names = {n if n.startswith(HEADS) else body + n: n for n in names}
    else:
        names = {n: n for n in names}
    wanted = {hf_name(ours, config.family): ours for ours in parameters(model) if not is_adapter(ours)}
    ignored = {n for n in names if n.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"))}
    if config.head == "none" or (config.head == "lm" and config.tie_word_embeddings):
        ignored |= {n for n in names if n.startswith(HEADS)}
    missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted) - ignored)
    return {names[n]: ours for n, ours in wanted.items() if n in names}, missing, extra


def misfit(path: Path, what: str, **kinds: list[str]) -> str:
    """Say what does not fit, with the first names of each kind."""
    lines = [f"{path}: {what}"]
    for kind, names in kinds.items():
        if names:
            more = f" … and {len(names) - 20} more" if len(names) > 20 else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(names[:20])}{more}")
    return "\n".join(lines)


Edit = Callable[[str, torch.Tensor, int, int], torch.Tensor]


@torch.no_grad()
def load_into(model: nn.Module, folder: str | Path, edit: Edit | None = None) -> None:
    """Copy a model folder's weights into an allocated model, casting to its dtype, one tensor at a time.

    A rank reads only the rows that it holds; if the model is cut over ranks, all of them call this. edit:
    (our name, rows [a, b) of the tensor, a, b) -> what to copy instead; lora.py merges an adapter so.

    ValueError lists every missing, unexpected or wrongly shaped tensor before anything is copied.
    """
    folder = model_folder(folder)
    files, ours = fitting(model, folder)
    target = parameters(model)
    for theirs, name in ours.items():
        mine, a, b = own_rows(target[name])
        part = _read_rows(files, theirs, a, b)
        mine.copy_(edit(name, part, a, b) if edit else part)
    bare = getattr(model, "module", model)
    _check_tied(files, target, bare.config, folder, edit)
    for name, layer in bare.named_modules():
        if isinstance(layer, QuantLinear) and not torch.isin(layer.g_idx, layer.groups_in_turn()).all():
            raise ValueError(f"{folder}: {name}.g_idx names groups that are not there")


def fitting(model: nn.Module, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Match a folder's tensors with a model's: the file of each, {their name: ours}.

    ValueError lists every missing, unexpected or wrongly shaped tensor.
    """
    files, bare = tensor_files(folder), getattr(model, "module", model)
    ours, missing, extra = _match(set(files), bare, folder)
    target, wrong = parameters(model), []
    if bare.config.quantization:
        if not bare.config.quantization.desc_act:
            missing = [name for name in missing if not name.endswith(".g_idx")]  # some leave it out
        extra = [name for name in extra if not _is_zero_bias(name, files)]
    for theirs, name in ours.items():
        with open_tensors(files[theirs]) as file:
            shape = list(file.get_slice(theirs).get_shape())
        if shape != list(target[name].shape):
            wrong.append(f"{theirs} {shape} instead of {list(target[name].shape)}")
    if missing or extra or wrong:
        kinds = {"missing": missing, "unexpected": extra, "of another shape": wrong}
        raise ValueError(misfit(folder, "the tensors do not fit config.json", **kinds))
    return files, ours


def _is_zero_bias(name: str, files: dict[str, Path]) -> bool:
    """Older tools write a bias of zeros beside every quantised matrix."""
    if not name.endswith(".bias") or f"{name.removesuffix('bias')}qweight" not in files:
        return False
    with open_tensors(files[name]) as file:
        return not file.get_tensor(name).any()


def _read_rows(files: dict[str, Path], name: str, a: int, b: int) -> torch.Tensor:
    with open_tensors(files[name]) as file:
        return file.get_slice(name)[a:b]


def _check_tied(files, target, config, folder, edit):
    """A tied folder may repeat the head; ignoring one that differs would change the model."""
    if config.head == "lm" and config.tie_word_embeddings and "lm_head.weight" in files:
        table = target["embed_tokens.weight"]
        mine, a, b = own_rows(table)
        head = _read_rows(files, "lm_head.weight", a, b)
        head = edit("embed_tokens.weight", head, a, b) if edit else head
        same = torch.equal(head.to(mine), mine)
        if not all(gather(same) if isinstance(table, DTensor) else [same]):  # the other ranks' rows too
            raise ValueError(f"{folder}: tied, but lm_head.weight differs from the embedding")


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Model:
    """Load a model folder, or a run's latest step, for inference; dtype None keeps the folder's own."""
    folder = model_folder(folder)
    config = read_config(folder)
    model = build(config, "meta").to(dtype or folder_dtype(folder))
    materialize(model, device)
    load_into(model, folder)
    return model.eval()


def folder_dtype(folder: Path) -> torch.dtype:
    """The dtype that config.json states, else that of the first tensor; of an adapter folder: its base's."""
    folder = base_folder(folder)
    raw = common.read_json(folder / "config.json")
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name in DTYPES:
        return DTYPES[name]
    tensor, path = next(iter(tensor_files(folder).items()))
    with open_tensors(path) as file:
        return file.get_slice(tensor)[:1].dtype


def materialize(model: Model, device: str) -> None:
    """Give a meta model, cut over ranks or not, real but undefined memory; a tied head is tied again.

    The groups of quantised matrices follow one another, unless a folder says otherwise.
    """
    model.to_empty(device=device)
    model.tie()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.g_idx.data.copy_(module.groups_in_turn())


# --- 4. writing a model folder ------------------------------------------------------------------------------


def gather(value) -> list:
    """Collect one value from every rank, on every rank; [value] without a process group."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable, failure: str = "") -> list:
    """Do `work` on every rank, wait for all, and give what each returned.

    If one cannot (a full disk, a bad file), all raise the same ValueError: `failure`, then who could not and
    why.
    """
    try:
        outcome = work(), None
    except (OSError, SafetensorError, ValueError) as error:
        outcome = None, str(error)
    outcomes = gather(outcome)
    ranks: dict[str, list[str]] = {}
    for rank, (_, error) in enumerate(outcomes):
        if error is not None:
            ranks.setdefault(error, []).append(str(rank))
    if ranks:
        everywhere = len(outcomes)
        lines = [e if len(r) == everywhere else f"rank {', '.join(r)}: {e}" for e, r in ranks.items()]
        raise ValueError("\n  ".join(filter(None, [failure, *lines])))
    return [value for value, _ in outcomes]


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def save_model(
    model: nn.Module,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model folder that transformers loads too; in a process group, every rank calls this.

    Atomic; ValueError on all ranks if FOLDER holds something already or cannot be written (a full disk).
    dtype None keeps the parameters' dtype. Tensors beyond `shard_bytes` go to further files with an index.
    """
    save_folder(folder, lambda tmp: write_model(model, tmp, tokenizer, dtype, shard_bytes))


def save_folder(folder: str | Path, write: Callable[[Path], list[str]]) -> None:
    """Let all ranks `write` into a temporary folder, and put it in its place: see save_model."""
    failure = f"{folder} could not be written"
    place = common.atomic_folder(folder) if _place()[0] == 0 else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        tmp = together(lambda: stack.enter_context(place), failure)[0]
        together(lambda: write(tmp), failure)
        together(stack.pop_all().close, failure)  # rank 0 puts the folder in its place


def write_model(model, folder: Path, tokenizer=None, dtype=None, shard_bytes=5_000_000_000) -> list[str]:
    """Write the files of a model folder into an existing folder (not atomic: see save_model).

    In a process group, every rank calls this; returns the names of the files that this one wrote. A rank that
    cannot write raises OSError or SafetensorError only after its part in what the others write.
    """
    model = getattr(model, "module", model)
    rank, world = _place()
    if any("qkv_proj" in name for name, _ in model.named_modules()):
        raise ValueError("this model was fused by generate.load; save the one of checkpoint.load_model")
    if not getattr(getattr(model, "adapters", None), "merged", True):
        raise ValueError("this model has adapters: lora.save_adapter writes them, lora.merge puts them in")
    tensors = {
        hf_name(n, model.config.family): p.detach() for n, p in parameters(model).items() if not is_adapter(n)
    }
    kinds = {n: p.dtype if n.endswith(QUANTIZED) else dtype or p.dtype for n, p in tensors.items()}
    bytes_of = {n: p.numel() * kinds[n].itemsize for n, p in tensors.items()}
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(map(bytes_of.get, shards[-1])) + bytes_of[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = shard_files(len(shards))
    written, problem = [], None
    for start in range(0, len(files), world):  # one file for each rank
        mine = {}
        for owner, names in enumerate(shards[start : start + world]):
            for name in names:
                if owner == rank or isinstance(tensors[name], DTensor):
                    tensor = whole(tensors[name], kinds[name])
                    if owner == rank:
                        mine[name] = tensor.cpu().contiguous()
        if mine and not problem:
            try:
                # transformers asks for this word
                save_file(mine, folder / files[start + rank], metadata={"format": "pt"})
                common.sync(folder / files[start + rank])  # who publishes cannot, from another machine
                written.append(files[start + rank])
            except (OSError, SafetensorError) as error:
                problem = error
    if problem:
        raise problem
    if rank == 0:
        values = {"config.json": config_dict(model.config, next(iter(kinds.values())))}
        if len(shards) > 1:
            values["model.safetensors.index.json"] = shard_index(shards, sum(bytes_of.values()))
        if model.config.head == "lm":
            values["generation_config.json"] = generation_config(model.config)
        for name, value in values.items():
            common.write_json(folder / name, value)
        written += values
        if tokenizer is not None:
            tokenizer.save(folder)
            written += tokenizer.files
    return written


def shard_files(count: int) -> list[str]:
    """Name the files of a model folder's weights."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def shard_index(shards: list[list[str]], size: int) -> dict:
    """Say which file holds which tensors, and how many bytes all of them have."""
    files = shard_files(len(shards))
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def generation_config(config: ModelConfig) -> dict:
    """The ids of the special tokens, for transformers' generate()."""
    return {key: getattr(config, key) for key in TOKENS if getattr(config, key) is not None}


def whole(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a tensor and, if it is cut over ranks, put it together on every one of them."""
    if not isinstance(p, DTensor):
        return p.to(dtype)
    mesh = p.device_mesh
    mine = p.to_local().to(
        mesh.device_type, dtype
    )  # cast first: less to send; offloaded rows are in main memory
    cut = {"shape": p.shape, "stride": p.stride()}  # as rows may be unevenly cut
    return DTensor.from_local(mine, mesh, p.placements, run_check=False, **cut).full_tensor()


# --- 5. rows for an extended vocabulary ---------------------------------------------------------------------

VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # what has a row per token


def new_rows(old: Tokenizer, new: Tokenizer, used: int) -> dict[int, list[int]]:
    """Map each token without a row among the first `used` to the ids into which the old tokenizer cuts it.

    The rows after those belong to no old token: they are padding. [] where it cannot spell it. ValueError
    names the first old id that means something else now.
    """

    def spelt(tokenizer: Tokenizer, i: int) -> bytes | None:
        """What a token stands for, a special one for the letters of its name; None: a hole, for nothing."""
        if i >= tokenizer.vocab_size or tokenizer.token_kind(i) == "hole":
            return None
        return tokenizer.backend.token_bytes[i] or tokenizer.backend.texts[i].encode()

    parts = {}
    for i in range(max(old.vocab_size, new.vocab_size)):
        before, now = spelt(old, i), spelt(new, i)
        if before is not None and before != now:
            now = "nothing" if now is None else repr(now.decode(errors="replace"))
            raise ValueError(
                f"the new tokenizer is no extension of the old one: id {i} was "
                f"{before.decode(errors='replace')!r} and is {now}; make it with tokenizer.py extend"
            )
        if now is not None and (before is None or i >= used):
            parts[i] = [p for p in old.encode_bytes(now) if p < used and p != old.unk_id]
    return parts


@torch.no_grad()
def resize_model(
    model: Model, old: Tokenizer, new: Tokenizer, multiple: int = 64, shrink: bool = False
) -> Model:
    """Give a model with a row for every token of `new`, which extends `old`; their number is a multiple.

    A new token's row is the mean of the rows of the old tokens that spell it, in the embedding, the head and
    the head's bias: the model goes on reading and writing about what it did (Hewitt 2021, "Initializing new
    word embeddings"). Where no old tokens spell it, and in padding rows, it is the mean of all old tokens'
    rows: the logit of a zero row, 0, can exceed all others; that of the mean row never exceeds the largest.
    Rows of old tokens keep their bits, so do padding rows that no new token takes; all other tensors are
    shared with `model`.

    ValueError: `new` does not extend `old`; the table would become smaller, and not `shrink`.
    """
    if model.config.quantization:
        raise ValueError("a quantised model is not resized; resize the one that it was made of")
    height = model.config.vocab_size
    used = min(height, old.vocab_size)
    if multiple < 1:
        raise ValueError("--multiple must be 1 or more")
    size = -(-new.vocab_size // multiple) * multiple
    parts = new_rows(old, new, used)
    if size < height and not shrink:
        raise ValueError(
            f"the table has {height} rows, and {new.vocab_size} tokens need only {size}; --shrink drops the "
            f"rest, which no token uses; --multiple {height} keeps the table as large as it is"
        )

    def resized(table: torch.Tensor) -> torch.Tensor:
        """(height, ...) -> (size, ...); the means in fp64, a block at a time."""
        mean = sum(block.double().sum(0) for block in table[:used].split(4096)) / used
        out = table.new_empty(size, *table.shape[1:])
        out[:height] = table[:size]
        out[height:] = mean.to(out.dtype)
        for i, ids in parts.items():
            out[i] = table[ids].double().mean(0) if ids else mean
        return out

    ids = {f"{k}_token_id": getattr(new, f"{k}_id") for k in ("bos", "eos", "pad")}
    ids = {key: i for key, i in ids.items() if i is not None}
    if ids.get("eos_token_id") in model.config.eos_ids:
        del ids["eos_token_id"]  # it may be one of several
    made = build(dataclasses.replace(model.config, vocab_size=size, **ids), "meta")
    tensors = {n: resized(p) if n in VOCABULARY else p for n, p in parameters(model).items()}
    if "lm_head.weight" in made.state_dict():
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])  # tied: named once only
    made.load_state_dict(tensors, assign=True)
    made.tie()
    made.compute_dtype, made.known_vocab = model.compute_dtype, new.vocab_size
    return made.train(model.training)


@dataclass
class Resize:
    folder: Positional[str]  # a model folder or a run, with its tokenizer
    tokenizer: str  # the tokenizer that extends it
    out: str  # model folder to write, with that tokenizer
    old_tokenizer: str = ""  # the tokenizer that FOLDER was trained with, where FOLDER holds none
    multiple: int = 64  # round the number of rows up to a multiple: matrix products are faster, ranks share
    shrink: bool = False  # drop rows that no token uses
    save_dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # of the new folder; empty: as it was


def resize(config: Resize) -> None:
    """Give a model rows for an extended tokenizer: each new one is the mean of the tokens that spelt it."""
    folder = model_folder(config.folder)
    old, new = load_tokenizer(config.old_tokenizer or folder), load_tokenizer(config.tokenizer)
    model = load_model(folder)
    made = resize_model(model, old, new, config.multiple, config.shrink)
    save_model(made, config.out, new, DTYPES.get(config.save_dtype))
    used = min(old.vocab_size, model.config.vocab_size)
    print(
        f"{config.out}: {model.config.vocab_size} -> {made.config.vocab_size} rows, "
        f"{new.vocab_size - used} for new tokens, {made.config.vocab_size - new.vocab_size} of padding"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["resize"]:  # the word may be left out
        del sys.argv[1]
    common.run(resize, doc=__doc__)
