"""Model folders are what transformers writes and reads (cut over several ranks: see test_state.py)."""

import hashlib
import json
import os
import pickle
import shutil
import signal
import tempfile

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from conftest import disk_full_after, run_script, tiny_hf
from safetensors.torch import load_file, save_file

import checkpoint
import model as decoder
import tokenizer as tok
from model import ModelConfig

# name -> (family of conftest.tiny_hf, overrides of its configuration)
CASES = {
    "llama": ("llama", {}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-tied": ("llama-tied", {}),
    "llama-wide-heads": ("llama", {"head_dim": 24}),
    "phi": ("phi", {}),
    "phi-gqa": ("phi", {"num_key_value_heads": 2}),
    "phi-tied": ("phi", {"tie_word_embeddings": True}),
    "bloom": ("bloom", {}),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- helpers -------------------------------------------------------------------------------------------------


def case_hf(case, dtype=torch.float32):
    family, config = CASES[case]
    return tiny_hf(family, dtype=dtype, **config)


def ids(vocab=99):
    return torch.randint(vocab, (2, 17), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def assert_same_logits(ours, theirs):
    """Compare an own and a transformers model in fp32, to 1e-5 of the largest logit."""
    a, b = ours.float()(ids()), theirs.float().eval()(ids())
    b = b.logits if hasattr(b, "logits") else b.last_hidden_state
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def assert_same_tensors(ours, theirs):
    """Every parameter is, bit for bit and in dtype, the tensor of transformers under the mapped name."""
    state = theirs.state_dict()
    for name, p in ours.named_parameters():
        other = state[checkpoint.hf_name(name, ours.config.family)]
        assert p.dtype == other.dtype and torch.equal(p, other), name


def load_hf(folder, cls):
    """Load a folder with transformers, which must find every tensor and nothing else."""
    theirs, info = cls.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not info.get("error_msgs"), info
    return theirs


def own_config(family="llama", **changes):
    shape = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 112, "num_key_value_heads": 2}
    if family == "phi":
        shape |= {"partial_rotary_factor": 0.4}
    if family == "bloom":
        shape = {
            "hidden_size": 48,
            "num_attention_heads": 6,
            "intermediate_size": 192,
            "tie_word_embeddings": True,
        }
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    shape |= {"vocab_size": 99, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return ModelConfig(family, **{**shape, **tokens, **changes})


@torch.no_grad()
def own_model(config, seed=0, dtype=torch.float32):
    """Build one of our models with random values everywhere, biases and norms too."""
    made = decoder.build(config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in made.named_parameters():
        p.normal_(0, 0.3, generator=generator)
        if p.dim() == 1 and not name.endswith("bias"):
            p.add_(1.0)
    return made.to(dtype).eval()


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def edit_tensors(folder, change):
    """Rewrite model.safetensors with what `change` makes of its dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_config(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return folder


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder):
    """Digests of all files below a folder."""
    return {str(p.relative_to(folder)): sha(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def saved(tmp_path):
    """A function that saves one of our models and gives (model, folder)."""

    def save(family="llama", seed=0, **changes):
        made, folder = own_model(own_config(family, **changes), seed), tmp_path / f"saved-{family}"
        checkpoint.save_model(made, folder)
        return made, folder

    return save


# --- transformers -> here ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_folder_of_transformers_loads_here_with_equal_tensors_and_logits(case, tmp_path):
    theirs = case_hf(case)
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load_model(tmp_path)
    assert_same_tensors(ours, theirs)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["llama-tied", "phi", "bloom"])
def test_folder_of_transformers_loads_in_its_own_dtype(case, dtype, tmp_path):
    theirs = case_hf(case, DTYPES[dtype])
    theirs.save_pretrained(tmp_path)
    ours = checkpoint.load_model(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {DTYPES[dtype]}
    assert_same_tensors(ours, theirs)
    # read again, because Module.to(bf16) rounded the fp32 inv_freq of RoPE too; from_pretrained does not
    assert_same_logits(ours, load_hf(tmp_path, type(theirs)))
    assert {p.dtype for p in checkpoint.load_model(tmp_path, torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("case", ["llama", "phi", "bloom"])
def test_sharded_folder_of_transformers_loads_here(case, tmp_path):
    theirs = case_hf(case)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ours = checkpoint.load_model(tmp_path)
    assert_same_tensors(ours, theirs)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_folder_of_a_bare_transformers_body_loads_here_without_a_head(family, tmp_path):
    theirs = tiny_hf(family).base_model
    theirs.save_pretrained(tmp_path)
    assert not any(
        n.startswith(("model.", "transformer.")) for n in load_file(tmp_path / "model.safetensors")
    )
    ours = checkpoint.load_model(tmp_path)
    assert ours.config.head == "none"
    assert_same_logits(ours, theirs)


def test_bare_body_bloom_folder_that_claims_to_be_a_language_model_loads_with_its_tied_head(tmp_path):
    theirs = tiny_hf("bloom")
    theirs.base_model.save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["BloomForCausalLM"])
    ours = checkpoint.load_model(tmp_path)
    assert ours.config.head == "lm" and ours.lm_head.weight is ours.embed_tokens.weight
    assert_same_logits(ours, theirs)


def test_config_without_architectures_is_a_language_model(tmp_path):
    theirs = tiny_hf("bloom")
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, remove=["architectures"])
    assert_same_logits(checkpoint.load_model(tmp_path), theirs)


def test_folder_without_a_dtype_in_its_config_loads_in_the_dtype_of_its_tensors(tmp_path):
    tiny_hf("phi", dtype=torch.bfloat16).save_pretrained(tmp_path)
    edit_config(tmp_path, remove=["dtype", "torch_dtype"])
    assert {p.dtype for p in checkpoint.load_model(tmp_path).parameters()} == {torch.bfloat16}


def test_inv_freq_buffers_of_old_folders_are_ignored(tmp_path):
    theirs = tiny_hf("llama")
    theirs.save_pretrained(tmp_path)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)}
    edit_tensors(tmp_path, lambda t: t | buffers)
    assert_same_logits(checkpoint.load_model(tmp_path), theirs)


def test_repeated_equal_head_of_a_tied_folder_is_accepted(tmp_path):
    theirs = tiny_hf("llama-tied")
    theirs.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    ours = checkpoint.load_model(tmp_path)
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert_same_logits(ours, theirs)


# --- here -> transformers ------------------------------------------------------------------------------------

OWN = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama mha": {"num_key_value_heads": 4},
    "llama wide heads": {"head_dim": 24, "rope_theta": 5e5},
    "phi": {"rope_theta": 5e4},
    "phi tied": {"tie_word_embeddings": True},
    "bloom": {},
}


@pytest.mark.parametrize("case", OWN)
def test_saved_folder_loads_in_transformers_with_equal_tensors_and_logits(case, tmp_path):
    import transformers as tf

    family = case.split()[0]
    ours = own_model(own_config(family, **OWN[case]))
    checkpoint.save_model(ours, tmp_path / "m")
    for cls in (getattr(tf, f"{family.capitalize()}ForCausalLM"), tf.AutoModelForCausalLM):
        theirs = load_hf(tmp_path / "m", cls)
        assert type(theirs).__name__ == f"{family.capitalize()}ForCausalLM"
        assert_same_tensors(ours, theirs)
        assert_same_logits(ours, theirs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_dtype_asked_of_save_model_is_the_dtype_in_the_folder(family, dtype, tmp_path):
    import transformers as tf

    ours = own_model(own_config(family))
    checkpoint.save_model(ours, tmp_path / "m", dtype=DTYPES[dtype])
    assert {p.dtype for p in ours.parameters()} == {torch.float32}  # the model itself is left alone
    theirs = load_hf(tmp_path / "m", tf.AutoModelForCausalLM)
    assert_same_tensors(ours.to(DTYPES[dtype]), theirs)
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_shards_and_index_load_in_transformers_and_here(family, tmp_path):
    import transformers as tf

    ours = own_model(own_config(family))
    checkpoint.save_model(ours, tmp_path / "m", shard_bytes=50_000)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "m" / "model.safetensors").exists()
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 50_000
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in ours.parameters())
    theirs = load_hf(tmp_path / "m", tf.AutoModelForCausalLM)
    assert_same_tensors(ours, theirs)
    assert_same_logits(ours, theirs)
    assert_same_logits(checkpoint.load_model(tmp_path / "m"), theirs)


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_model_without_a_head_loads_as_the_bare_model_of_transformers(family, tmp_path):
    import transformers as tf

    ours = own_model(own_config(family, head="none"))
    checkpoint.save_model(ours, tmp_path / "m")
    theirs = load_hf(tmp_path / "m", tf.AutoModel)
    assert_same_logits(ours, theirs)
    back = checkpoint.load_model(tmp_path / "m")
    assert back.config.head == "none"
    assert_same_logits(back, theirs)


@torch.no_grad()
def scores(theirs):
    """The score of transformers' classifier at three positions: it pools the last token, so cut the row there."""
    theirs = theirs.float().eval()
    return torch.stack([theirs(ids()[:1, : t + 1]).logits[0] for t in (0, 8, 16)])  # (3, 1)


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
@pytest.mark.parametrize("tied", [False, True])
def test_score_head_is_the_classifier_of_transformers_in_both_directions(family, tied, tmp_path):
    import transformers as tf

    ours = own_model(own_config(family, head="score", tie_word_embeddings=tied))
    checkpoint.save_model(ours, tmp_path / "ours")
    theirs = load_hf(tmp_path / "ours", tf.AutoModelForSequenceClassification)
    assert type(theirs).__name__ == f"{family.capitalize()}ForSequenceClassification"
    assert theirs.config.num_labels == 1 and torch.equal(theirs.score.weight, ours.score.weight)
    with torch.no_grad():
        expected = ours(ids())[0, [0, 8, 16]]
    assert (scores(theirs) - expected).abs().max() <= 2e-5 * expected.abs().max()

    theirs.save_pretrained(tmp_path / "theirs")
    back = checkpoint.load_model(tmp_path / "theirs")
    assert back.config.head == "score"
    for (name, a), (other, b) in zip(ours.named_parameters(), back.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)


def test_saved_config_says_the_same_to_transformers_and_to_us(saved):
    import transformers as tf

    for family in ("llama", "phi", "bloom"):
        made, folder = saved(family)
        assert checkpoint.read_config(folder) == made.config
        theirs = tf.AutoConfig.from_pretrained(folder)
        assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
        assert theirs.vocab_size == 99 and theirs.num_hidden_layers == 2 and theirs.dtype == torch.float32
        generation = tf.GenerationConfig.from_pretrained(folder)
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)


def test_rope_is_written_in_the_new_form_and_in_the_old_one(saved):
    for family, part in (("llama", None), ("phi", 0.4)):
        _, folder = saved(family, rope_theta=12345.0)
        raw = json.loads((folder / "config.json").read_text())
        assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 12345.0
        assert raw.get("partial_rotary_factor") == raw["rope_parameters"].get("partial_rotary_factor") == part


def test_compiled_model_saves_to_the_same_bytes(saved, tmp_path):
    made, folder = saved("phi")
    made.layers[1] = torch.compile(made.layers[1])  # nothing is compiled before the first call
    checkpoint.save_model(torch.compile(made), tmp_path / "compiled")
    assert tree(tmp_path / "compiled") == tree(folder)


def test_save_model_refuses_a_folder_that_holds_something_and_leaves_it_alone(saved):
    made, folder = saved()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="not empty"):
        checkpoint.save_model(made, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not folder.with_name(folder.name + ".tmp").exists()


# --- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", decoder.PRESETS)
def test_every_preset_has_the_tensor_names_and_shapes_of_transformers(preset):
    import dataclasses

    import transformers as tf

    config = dataclasses.replace(
        decoder.PRESETS[preset], vocab_size=decoder.PRESETS[preset].vocab_size or 640, num_hidden_layers=3
    )
    ours = decoder.build(config, "meta")
    names = [n for n, _ in ours.named_parameters()]
    mapped = {checkpoint.hf_name(n, config.family): list(p.shape) for n, p in ours.named_parameters()}
    assert len(mapped) == len(names)  # one to one
    raw = checkpoint.config_dict(config, torch.bfloat16)
    with torch.device("meta"):
        theirs = tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model(**raw))
    expected = {n: list(p.shape) for n, p in theirs.state_dict().items()}
    if config.tie_word_embeddings:
        assert expected.pop("lm_head.weight") == list(ours.lm_head.weight.shape)
    assert mapped == expected


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_saved_tensors_are_the_parameters_bit_for_bit_under_names_that_are_one_to_one(family, saved):
    made, folder = saved(family)
    tensors = load_file(folder / "model.safetensors")
    parameters = dict(made.named_parameters())
    assert len({checkpoint.hf_name(n, family) for n in parameters}) == len(parameters) == len(tensors)
    for name, p in parameters.items():
        assert torch.equal(tensors[checkpoint.hf_name(name, family)], p), name
    assert set(tensors) == set(tiny_hf(family).state_dict()) - (
        {"lm_head.weight"} if family == "bloom" else set()
    )


# --- config.json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_old_top_level_rope_keys_are_read_as_transformers_reads_them(family, tmp_path):
    import transformers as tf

    tiny_hf(family).save_pretrained(tmp_path)
    old = {"rope_theta": 777.0} | ({"partial_rotary_factor": 0.25} if family == "phi" else {})
    edit_config(tmp_path, remove=["rope_parameters"], **old)
    ours = checkpoint.load_model(tmp_path)
    assert ours.config.rope_theta == 777.0
    assert ours.config.partial_rotary_factor == (0.25 if family == "phi" else 1.0)
    assert_same_logits(ours, tf.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_rope_parameters_win_over_the_old_top_level_keys(tmp_path):
    import transformers as tf

    tiny_hf("phi").save_pretrained(tmp_path)
    new = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.25}
    edit_config(tmp_path, rope_parameters=new, rope_theta=10000.0, partial_rotary_factor=0.5)
    ours = checkpoint.load_model(tmp_path)
    assert (ours.config.rope_theta, ours.config.partial_rotary_factor) == (777.0, 0.25)
    assert_same_logits(ours, tf.AutoModelForCausalLM.from_pretrained(tmp_path))


SHAPE = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_keys_that_are_not_given_take_the_defaults_of_transformers(family, tmp_path):
    import transformers as tf

    raw = {"model_type": family, **SHAPE} | ({} if family == "bloom" else {"intermediate_size": 96})
    config = checkpoint.read_config(write_config(tmp_path, raw))
    theirs = tf.AutoConfig.for_model(**raw)
    eps = {"llama": "rms_norm_eps", "phi": "layer_norm_eps", "bloom": "layer_norm_epsilon"}[family]
    assert config.norm_eps == getattr(theirs, eps)
    assert config.num_key_value_heads == 4 and config.head_dim == 16
    assert config.max_position_embeddings == 2048
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    if family != "bloom":
        assert theirs.num_key_value_heads == 4 and theirs.max_position_embeddings == 2048
        assert config.rope_theta == theirs.rope_parameters["rope_theta"]
        assert config.partial_rotary_factor == theirs.rope_parameters.get("partial_rotary_factor", 1.0)
        assert config.partial_rotary_factor == {"llama": 1.0, "phi": 0.5}[family]


def test_null_kv_heads_mean_as_many_as_query_heads(tmp_path):
    raw = {"model_type": "llama", **SHAPE, "intermediate_size": 96, "num_key_value_heads": None}
    assert checkpoint.read_config(write_config(tmp_path, raw)).num_key_value_heads == 4


@pytest.mark.parametrize("names", [("n_embed", "n_layer", "n_head"), ("hidden_size", "num_hidden_layers", "num_attention_heads")])  # fmt: skip
def test_bloom_config_is_read_under_old_and_new_names(names, tmp_path):
    raw = dict(zip(names, (48, 3, 6))) | {"model_type": "bloom", "vocab_size": 99}
    raw |= {"layer_norm_epsilon": 1e-3, "seq_length": 77}
    config = checkpoint.read_config(write_config(tmp_path, raw))
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 6)
    assert (config.norm_eps, config.max_position_embeddings, config.intermediate_size) == (1e-3, 77, 192)
    assert config.tie_word_embeddings


def test_a_list_of_eos_tokens_is_kept(tmp_path):
    raw = {"model_type": "llama", **SHAPE, "intermediate_size": 96, "eos_token_id": [7, 8]}
    assert checkpoint.read_config(write_config(tmp_path, raw)).eos_token_id == [7, 8]


def test_xverse_folder_reads_as_llama_and_is_written_as_llama(tmp_path):
    import transformers as tf

    theirs = tiny_hf("llama")
    theirs.save_pretrained(tmp_path / "x")
    auto = {"AutoConfig": "configuration_xverse.XverseConfig", "AutoModelForCausalLM": "modeling_xverse.X"}
    edit_config(tmp_path / "x", model_type="xverse", architectures=["XverseForCausalLM"], auto_map=auto)
    ours = checkpoint.load_model(tmp_path / "x")
    assert ours.config.family == "llama"
    assert_same_logits(ours, theirs)
    checkpoint.save_model(ours, tmp_path / "copy")
    raw = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert (
        raw["model_type"] == "llama"
        and raw["architectures"] == ["LlamaForCausalLM"]
        and "auto_map" not in raw
    )
    assert_same_tensors(ours, load_hf(tmp_path / "copy", tf.AutoModelForCausalLM))


PUBLISHED = {
    "llama-2-7b": """{
  "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
  "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
  "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32,
  "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "tie_word_embeddings": false, "torch_dtype": "float16",
  "transformers_version": "4.31.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    "llama-2-70b": """{
  "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 8192, "initializer_range": 0.02, "intermediate_size": 28672, "max_position_embeddings": 4096,
  "model_type": "llama", "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8,
  "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
  "tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.32.0.dev0",
  "use_cache": true, "vocab_size": 32000}""",
    "phi-2": """{
  "_name_or_path": "microsoft/phi-2", "architectures": ["PhiForCausalLM"], "attention_dropout": 0.0,
  "bos_token_id": 50256, "embd_pdrop": 0.0, "eos_token_id": 50256, "hidden_act": "gelu_new",
  "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 10240, "layer_norm_eps": 1e-05,
  "max_position_embeddings": 2048, "model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 32, "partial_rotary_factor": 0.4, "qk_layernorm": false, "resid_pdrop": 0.1,
  "rope_scaling": null, "rope_theta": 10000.0, "tie_word_embeddings": false, "torch_dtype": "float16",
  "transformers_version": "4.37.0", "use_cache": true, "vocab_size": 51200}""",
    "bloomz-7b1": """{
  "apply_residual_connection_post_layernorm": false, "architectures": ["BloomForCausalLM"],
  "attention_dropout": 0.0, "attention_softmax_in_fp32": true, "bias_dropout_fusion": true, "bos_token_id": 1,
  "eos_token_id": 2, "hidden_dropout": 0.0, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
  "masked_softmax_fusion": true, "model_type": "bloom", "n_embed": 4096, "n_inner": null, "n_layer": 30,
  "num_attention_heads": 32, "offset_alibi": 100, "pad_token_id": 3, "pretraining_tp": 4, "seq_length": 2048,
  "skip_bias_add": true, "skip_bias_add_qkv": false, "slow_but_exact": false, "torch_dtype": "float16",
  "transformers_version": "4.20.0", "unk_token_id": 0, "use_cache": true, "vocab_size": 250880}""",
    "xverse-13b": """{
  "architectures": ["XverseForCausalLM"], "auto_map": {"AutoConfig": "configuration_xverse.XverseConfig",
  "AutoModelForCausalLM": "modeling_xverse.XverseForCausalLM"}, "bos_token_id": 2, "eos_token_id": 3,
  "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 13824,
  "max_position_embeddings": 8192, "max_tokenizer_truncation": 6144, "model_type": "xverse",
  "num_attention_heads": 40, "num_hidden_layers": 40, "pad_token_id": 1, "rms_norm_eps": 1e-06,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.29.2", "use_cache": true,
  "vocab_size": 100278}""",
}
# preset, parameters (the architecture table), the folder's dtype, bos, eos, pad
EXPECTED = {
    "llama-2-7b": (6_738_415_616, torch.float16, 1, 2, None),
    "llama-2-70b": (68_976_648_192, torch.float16, 1, 2, 0),
    "phi-2": (2_779_683_840, torch.float16, 50256, 50256, None),
    "bloomz-7b1": (7_069_016_064, torch.float16, 1, 2, 3),
    "xverse-13b": (13_715_031_040, torch.bfloat16, 2, 3, 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_reads_into_the_preset_and_its_parameter_count(name, tmp_path):
    import dataclasses

    count, dtype, bos, eos, pad = EXPECTED[name]
    config = checkpoint.read_config(write_config(tmp_path, PUBLISHED[name]))
    tokens = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    assert config == dataclasses.replace(decoder.PRESETS[name], **tokens)
    assert decoder.num_params(config) == count
    assert checkpoint.folder_dtype(tmp_path) == dtype


# --- refusals: config.json -----------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
REFUSED = {
    "unknown key": ("llama", {"attn_logit_cap": 30.0}, "attn_logit_cap = 30.0"),
    "two unknown keys": ("llama", {"wobble": 1, "alpha_depth": 2}, "alpha_depth = 2, wobble = 1"),
    "rope_scaling": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    "yarn": ("llama", {"rope_parameters": YARN}, "yarn"),
    "llama3 rope": ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    "rope_parameters with a factor": (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}},
        "factor",
    ),
    "attention_bias": ("llama", {"attention_bias": True}, "attention_bias"),
    "mlp_bias": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "another activation": ("llama", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
    "erf gelu": ("phi", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "qk_layernorm": ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    "post-norm residual": ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual"),
    "untied bloom": ("bloom", {"tie_word_embeddings": False}, "tied"),
    "sliding window": ("llama", {"sliding_window": 4096}, "sliding_window"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
    "another model": ("llama", {"model_type": "qwen2"}, "'qwen2'"),
    "odd rotation": ("phi", {"rope_parameters": {"partial_rotary_factor": 0.45}}, "cannot rotate 7"),
    "many labels": (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
        "3 labels",
    ),
    "two labels unsaid": ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "2 labels"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "multiple of kv heads"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_config_that_changes_the_function_is_refused_with_the_key_named(what, saved):
    family, changes, words = REFUSED[what]
    _, folder = saved(family)
    edit_config(folder, remove=["rope_theta", "partial_rotary_factor"], **changes)
    with pytest.raises(ValueError) as error:
        checkpoint.load_model(folder)
    assert words in str(error.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_config_without_a_needed_key_is_refused_with_the_key_named(key, saved):
    _, folder = saved()
    edit_config(folder, remove=[key])
    with pytest.raises(ValueError, match=f'config.json: no "{key}"'):
        checkpoint.load_model(folder)


def test_config_without_a_model_type_is_refused(saved):
    _, folder = saved()
    edit_config(folder, remove=["model_type"])
    with pytest.raises(ValueError, match="model_type is None"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("text", ["{not json", "", "[1, 2]", '"llama"', "\udcff"])
def test_config_that_is_no_json_object_is_refused_with_the_file_named(text, saved):
    _, folder = saved()
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="config.json: not "):
        checkpoint.load_model(folder)


# --- refusals: weights ---------------------------------------------------------------------------------------


def test_missing_unexpected_and_wrongly_shaped_tensors_are_listed_in_one_error_before_anything_is_copied(
    saved,
):
    made, folder = saved("phi")

    def spoil(t):
        del t["model.layers.1.mlp.fc1.bias"], t["lm_head.bias"]
        t["model.layers.7.mlp.fc1.bias"] = torch.zeros(3)
        t["model.embed_tokens.weight"] = torch.zeros(98, 64)
        t["model.final_layernorm.weight"] = torch.zeros(63)

    edit_tensors(folder, spoil)
    target = own_model(made.config, seed=1)
    before = {n: p.clone() for n, p in target.named_parameters()}
    with pytest.raises(ValueError) as error:
        checkpoint.load_into(target, folder)
    text = str(error.value)
    assert "2 missing: lm_head.bias, model.layers.1.mlp.fc1.bias" in text
    assert "1 unexpected: model.layers.7.mlp.fc1.bias" in text
    assert "2 of another shape" in text
    assert "model.embed_tokens.weight [98, 64] instead of [99, 64]" in text
    assert "model.final_layernorm.weight [63] instead of [64]" in text
    assert all(torch.equal(p, before[n]) for n, p in target.named_parameters())


def test_folder_of_another_width_is_refused(saved):
    _, folder = saved("llama")
    with pytest.raises(ValueError, match=r"instead of \[99, 32\]"):
        checkpoint.load_into(own_model(own_config("llama", hidden_size=32)), folder)


def test_folder_of_another_family_is_refused(saved):
    _, folder = saved("llama")
    with pytest.raises(ValueError, match="missing.*\n.*unexpected"):
        checkpoint.load_into(own_model(own_config("bloom")), folder)


def test_tied_config_with_a_different_head_is_refused(saved):
    _, folder = saved("llama", tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match="tied, but lm_head.weight differs from the embedding"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("old", ["model.layers.0.self_attn.Wqkv.weight", "transformer.h.0.mixer.Wqkv.weight"])
def test_old_fused_phi_names_are_refused_with_the_remedy(old, saved):
    _, folder = saved("phi")
    edit_tensors(folder, lambda t: t | {old: torch.zeros(2)})
    with pytest.raises(ValueError, match="old fused Phi names.*q_proj, k_proj"):
        checkpoint.load_model(folder)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_pickled_weights_are_refused_and_never_opened(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    _, folder = saved()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="pickled weights"):
        checkpoint.load_model(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoint.load_model(folder)
    assert not (tmp_path / "exploded").exists()


def test_folder_without_weights_is_refused(saved):
    _, folder = saved()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no model.safetensors"):
        checkpoint.load_model(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 20_000, -1])
def test_truncated_weights_are_refused_with_the_file_named(keep, saved):
    _, folder = saved()
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: not a whole safetensors file"):
        checkpoint.load_model(folder)


@pytest.fixture
def sharded(tmp_path):
    checkpoint.save_model(own_model(own_config()), tmp_path / "m", shard_bytes=50_000)
    return tmp_path / "m"


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_index_that_names_a_missing_file_is_refused_with_the_file_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink(missing_ok=True)
    edit_index(sharded, lambda i: i["weight_map"].update({"lm_head.weight": "model-00099.safetensors"}))
    with pytest.raises(ValueError, match="files that are not here: model-00099.safetensors"):
        checkpoint.load_model(sharded)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "{parent}/x.safetensors", "inner/x.safetensors", "..\\x"]
)
def test_index_that_points_outside_the_folder_is_refused_even_where_the_tensor_is(name, sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    (sharded / "inner").mkdir()
    for place in (sharded.parent, sharded / "inner"):
        shutil.copy(sharded / index["weight_map"]["lm_head.weight"], place / "x.safetensors")
    name = name.format(parent=sharded.parent)
    edit_index(sharded, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(ValueError, match="names files outside of this folder"):
        checkpoint.load_model(sharded)


@pytest.mark.parametrize("name", ["..", ".", "", 7, None, ["x"]])
def test_index_with_a_name_that_is_no_file_is_refused(name, sharded):
    edit_index(sharded, lambda i: i["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(ValueError, match="no valid weight_map|not here"):
        checkpoint.load_model(sharded)


def test_index_that_names_a_tensor_that_its_file_does_not_hold_is_refused(sharded):
    def swap(index):
        other = next(f for f in index["weight_map"].values() if f != index["weight_map"]["lm_head.weight"])
        index["weight_map"]["lm_head.weight"] = other

    edit_index(sharded, swap)
    with pytest.raises(ValueError, match="lm_head.weight"):
        checkpoint.load_model(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, []])
def test_index_without_a_weight_map_is_refused(index, sharded):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError):
        checkpoint.load_model(sharded)


# --- which folder is meant -----------------------------------------------------------------------------------


def test_folder_of_a_run_means_its_latest_step(saved, tmp_path):
    made, folder = saved()
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "step_0000005")
    (run / "latest").write_text("step_0000005\n")
    assert checkpoint.model_folder(run) == run / "step_0000005"
    assert checkpoint.model_folder(str(run / "step_0000005")) == run / "step_0000005"
    pairs = zip(made.parameters(), checkpoint.load_model(run).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_folder_that_is_neither_a_model_nor_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a model folder .* nor a run"):
        checkpoint.load_model(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        checkpoint.load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="config.json: no such file"):
        checkpoint.read_config(tmp_path)


@pytest.mark.parametrize("size, extra", [(5000, {}), (30_000, {"shard_bytes": 40_000}), (200, {})])
def test_save_model_on_a_full_disk_is_a_clear_error_and_leaves_no_folder(size, extra, tmp_path):
    made = own_model(own_config())
    with (
        disk_full_after(size),
        pytest.raises(ValueError, match="m could not be written\n.*(os error|Errno) 27"),
    ):
        checkpoint.save_model(made, tmp_path / "m", **extra)
    assert list(tmp_path.iterdir()) == []
    checkpoint.save_model(made, tmp_path / "m", **extra)


def test_write_model_names_every_file_that_it_wrote(vocabularies, tmp_path):
    old, _ = loaded(vocabularies)
    names = checkpoint.write_model(own_model(own_config()), tmp_path, old, shard_bytes=50_000)
    assert len(names) == len(set(names)) and set(names) == set(tree(tmp_path)) and len(names) > 6


KILLED = """
import resource, signal, sys, checkpoint
model = checkpoint.load_model(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel kills who writes beyond the limit
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
checkpoint.save_model(model, sys.argv[2])
"""


def test_killed_export_leaves_nothing_under_the_final_name_and_the_next_works(saved, tmp_path):
    made, folder = saved()
    assert run_script("-c", KILLED, folder, tmp_path / "copy").returncode == -signal.SIGXFSZ
    assert not (tmp_path / "copy").exists() and (tmp_path / "copy.tmp").exists()
    checkpoint.save_model(made, tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(folder) and not (tmp_path / "copy.tmp").exists()


# --- rows for an extended vocabulary ----------------------------------------------------------------------

OLD, TABLE, NEW = 300, 320, 350  # tokens, rows of the model, tokens of the extended tokenizer
MARKS = ["<|System|>", "<|Human|>"]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """Kind -> folders of a tokenizer of OLD tokens and of its extension: ours, one with dummy prefix, byte-level."""
    pytest.importorskip("regex")
    base, out = tmp_path_factory.mktemp("vocabularies"), {}
    rows = {
        "old": "the model reads text and writes text. " * 3,
        "new": "光合作用 the chlorophyll reads 叶绿体。二氧化碳 transforms sunlight, 细胞的蒸腾作用 carbon dioxide。"
        * 9,
    }
    for name, text in rows.items():
        (base / f"{name}.txt").write_text(text * 4)
    for kind in ("bpe", "bytebpe"):
        tok.train(
            tok.Train([str(base / "old.txt")], str(base / kind), OLD if kind == "bpe" else 280, kind=kind)
        )
    files = {"tokenizer.model": tok.train_model([rows["old"]], OLD, add_dummy_prefix=True)}
    tok.from_files(files, "memory").save(base / "dummy")
    for kind in ("bpe", "dummy", "bytebpe"):
        size = len(tok.load_tokenizer(base / kind).backend.texts) + NEW - OLD
        more = [str(base / f"{kind}-more"), (str(base / "new.txt"),), size, ",".join(MARKS)]
        tok.extend(tok.Extend(str(base / kind), *more))
        out[kind] = base / kind, base / f"{kind}-more"
    return out


def loaded(vocabularies, kind="bpe"):
    return [tok.load_tokenizer(folder) for folder in vocabularies[kind]]


def sub_tokens(folder, text):
    """The old ids of a new token, by other libraries: sentencepiece behind a newline, tokenizers' model alone."""
    if not (folder / "tokenizer.model").exists():
        return [
            t.id for t in tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).model.tokenize(text)
        ]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    newline = sp.piece_to_id("\n")
    ids = sp.encode("\n" + text.replace("▁", " "))
    return ids[ids.index(newline) + 1 :]


@pytest.mark.parametrize("kind", ["bpe", "dummy", "bytebpe"])
@pytest.mark.parametrize("family", ["phi", "llama", "llama-tied", "bloom"])
def test_new_rows_are_the_mean_of_the_sub_tokens_and_old_rows_keep_their_bits(kind, family, vocabularies):
    old, new = loaded(vocabularies, kind)
    texts = new.backend.texts
    if kind == "bytebpe":
        spec = json.loads((vocabularies[kind][1] / "tokenizer.json").read_text())
        texts = {i: text for text, i in spec["model"]["vocab"].items()}
    model = checkpoint_of(tiny_hf(family, vocab_size=TABLE))
    made = checkpoint.resize_model(model, old, new, multiple=64)
    assert made.config.vocab_size == 384 and made.config.family == model.config.family
    names = (
        ["embed_tokens.weight"]
        + ["lm_head.weight"] * (family in ("phi", "llama"))
        + ["lm_head.bias"] * (family == "phi")
    )
    before, after = checkpoint.parameters(model), checkpoint.parameters(made)
    assert before.keys() == after.keys()
    for name, p in after.items():
        if name not in names:
            assert p is before[name] or torch.equal(p, before[name])
            continue
        table, wide = before[name].detach().double(), p.detach()
        n = old.vocab_size
        assert len(p) == 384 and torch.equal(wide[:n], before[name][:n])
        for i in range(n, new.vocab_size):
            ids = sub_tokens(vocabularies[kind][0], texts[i])
            assert max(ids) < n
            assert (wide[i].double() - table[ids].mean(0)).abs().max() < 1e-6, (i, new.token_text(i), ids)
        end = max(TABLE, new.vocab_size)
        assert torch.equal(
            wide[new.vocab_size : TABLE], before[name][new.vocab_size :][: max(0, TABLE - new.vocab_size)]
        )
        assert (wide[end:].double() - table[:n].mean(0)).abs().max() < 1e-6
    assert (made.lm_head.weight is made.embed_tokens.weight) == (family in ("llama-tied", "bloom"))


def checkpoint_of(hf):
    """Our model with the weights of one of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return checkpoint.load_model(folder)


def test_sub_tokens_of_a_word_get_no_space_in_front_and_of_a_spaced_word_keep_it(vocabularies):
    old, new = loaded(vocabularies, "dummy")
    rows = checkpoint.new_rows(old, new, OLD)
    assert sorted(rows) == list(range(OLD, NEW))
    spaced = 0
    for i, ids in rows.items():
        data = new.backend.token_bytes[i] or new.backend.texts[i].encode()
        assert b"".join(old.backend.token_bytes[p] for p in ids) == data
        spaced += data.startswith(b" ")
    assert 0 < spaced < len(rows)


def test_a_token_of_a_part_of_a_character_is_the_mean_of_its_bytes(vocabularies):
    old, new = loaded(vocabularies, "bytebpe")
    rows = checkpoint.new_rows(old, new, old.vocab_size)
    parts = [i for i in rows if new.token_kind(i) == "byte"]
    assert parts
    for i, ids in rows.items():
        data = new.backend.token_bytes[i] or new.backend.texts[i].encode()
        assert b"".join(old.backend.token_bytes[p] for p in ids) == data


def test_a_token_that_the_old_tokenizer_cannot_spell_gets_the_mean_of_all(tmp_path):
    lines = ["the model reads text"] * 9
    files = {"tokenizer.model": tok.train_model(lines, 40, byte_fallback=False)}
    tok.from_files(files, "memory").save(tmp_path / "old")
    (tmp_path / "new.txt").write_text("光合 光合 光合")
    tok.extend(tok.Extend(str(tmp_path / "old"), str(tmp_path / "new"), (str(tmp_path / "new.txt"),), 42))
    old, new = tok.load_tokenizer(tmp_path / "old"), tok.load_tokenizer(tmp_path / "new")
    model = own_model(own_config(vocab_size=40))
    made = checkpoint.resize_model(model, old, new, multiple=1)
    mean = model.embed_tokens.weight.double().mean(0)
    assert made.config.vocab_size == 42
    assert (made.embed_tokens.weight[40:].double() - mean).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["phi", "llama", "llama-tied", "bloom"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resized_folder_loads_in_transformers_with_the_old_logits_on_old_ids(
    family, dtype, vocabularies, tmp_path
):
    hf = tiny_hf(family, vocab_size=TABLE, dtype=DTYPES[dtype])
    hf.save_pretrained(tmp_path / "old")
    old, new = vocabularies["bpe"]
    for path in old.iterdir():
        shutil.copy(path, tmp_path / "old")
    checkpoint.resize(checkpoint.Resize(str(tmp_path / "old"), str(new), str(tmp_path / "new")))
    model = checkpoint.load_model(tmp_path / "new")
    theirs = load_hf(tmp_path / "new", type(hf))
    assert model.embed_tokens.weight.dtype == theirs.dtype == DTYPES[dtype]
    assert_same_tensors(model, theirs)
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.config.vocab_size == 384
    hf = load_hf(tmp_path / "old", type(hf))  # as tiny_hf casts it, its RoPE frequencies would be bf16
    was, now = hf.get_input_embeddings().weight, theirs.get_input_embeddings().weight
    assert torch.equal(was[:OLD], now[:OLD])
    hf, theirs, model = hf.float(), theirs.float(), model.float()
    with torch.no_grad():
        a, b, c = hf(ids(OLD)).logits, theirs(ids(OLD)).logits, model(ids(OLD))
    assert (a[..., :OLD] - b[..., :OLD]).abs().max() <= 1e-5 * a.abs().max()
    assert (c - b).abs().max() <= 1e-5 * b.abs().max()
    t, auto = (
        tok.load_tokenizer(tmp_path / "new"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "new"),
    )
    assert t.digest == tok.load_tokenizer(new).digest
    assert (
        auto.encode("光合作用 reads") == t.encode_prompt("光合作用 reads")
        and max(t.encode("光合作用")) >= OLD
    )


def test_resized_model_takes_the_token_ids_that_the_new_tokenizer_names(vocabularies):
    old, new = loaded(vocabularies)
    made = checkpoint.resize_model(own_model(own_config(vocab_size=TABLE, bos_token_id=7)), old, new)
    assert (made.config.bos_token_id, made.config.eos_token_id, made.config.pad_token_id) == (1, 2, 3)
    several = own_model(own_config(vocab_size=TABLE, eos_token_id=[2, 9]))
    assert checkpoint.resize_model(several, old, new).config.eos_token_id == [2, 9]
    new.pad_id = None
    assert checkpoint.resize_model(several, old, new).config.pad_token_id == 0


@pytest.mark.parametrize("head", ["score", "none"])
@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_a_model_without_a_vocabulary_head_gets_embedding_rows_only(head, family, vocabularies, tmp_path):
    old, new = loaded(vocabularies)
    config = own_config(family, vocab_size=TABLE, head=head)
    model = own_model(config)
    made = checkpoint.resize_model(model, old, new)
    checkpoint.save_model(made, tmp_path / "m", new)
    again = checkpoint.load_model(tmp_path / "m")
    assert again.embed_tokens.weight.shape[0] == 384
    with torch.no_grad():
        assert torch.equal(again(ids(OLD)), model(ids(OLD)))


def test_shrinking_needs_to_be_asked_for_and_drops_only_rows_that_no_token_uses(vocabularies):
    old, new = loaded(vocabularies)
    model = own_model(own_config(vocab_size=512))
    with pytest.raises(ValueError, match="the table has 512 rows, and 350 tokens need only 384; --shrink"):
        checkpoint.resize_model(model, old, new)
    made = checkpoint.resize_model(model, old, new, shrink=True)
    assert len(made.embed_tokens.weight) == len(made.lm_head.weight) == 384
    assert torch.equal(made.embed_tokens.weight[:OLD], model.embed_tokens.weight[:OLD])
    assert torch.equal(made.embed_tokens.weight[NEW:], model.embed_tokens.weight[NEW:384])
    assert not torch.equal(made.embed_tokens.weight[OLD], model.embed_tokens.weight[OLD])  # padding before
    assert len(checkpoint.resize_model(model, old, new, multiple=512).embed_tokens.weight) == 512
    tight = checkpoint.resize_model(model, old, new, multiple=1, shrink=True)
    assert len(tight.embed_tokens.weight) == NEW


def test_a_tokenizer_that_is_no_extension_is_refused_with_the_first_differing_id(vocabularies, tmp_path):
    old, new = loaded(vocabularies)
    model = own_model(own_config(vocab_size=TABLE))
    with pytest.raises(
        ValueError,
        match="no extension of the old one: id 300 was '<|System|>' and is nothing".replace("|", r"\|"),
    ):
        checkpoint.resize_model(model, new, old)
    swapped = tok.load_tokenizer(vocabularies["bpe"][1])
    table = swapped.backend.token_bytes
    table[270], table[271] = table[271], table[270]
    with pytest.raises(ValueError, match="id 270 was .* and is .*; make it with tokenizer.py extend"):
        checkpoint.resize_model(model, old, swapped)
    with pytest.raises(ValueError, match="no extension of the old one: id 0 was"):
        checkpoint.resize_model(model, old, loaded(vocabularies, "bytebpe")[1])
    with pytest.raises(ValueError, match="--multiple must be 1 or more"):
        checkpoint.resize_model(model, old, new, multiple=0)


def test_ids_that_had_no_token_and_tokens_that_had_no_row_count_as_new(vocabularies, tmp_path):
    """A hole that is filled; a table with fewer rows than the tokenizer has tokens."""
    base = vocabularies["bytebpe"][0]
    spec = json.loads((base / "tokenizer.json").read_text())
    last = {
        "id": 282,
        "content": "<|late|>",
        "special": True,
        "normalized": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
    }
    spec["added_tokens"].append(last)
    old = tok.from_files({"tokenizer.json": json.dumps(spec).encode()}, "memory")
    spec["added_tokens"].append({**last, "id": 281, "content": "<|hole|>"})
    new = tok.from_files({"tokenizer.json": json.dumps(spec).encode()}, "memory")
    model = own_model(own_config(vocab_size=283))
    made = checkpoint.resize_model(model, old, new, multiple=1)
    was, now = model.embed_tokens.weight.double(), made.embed_tokens.weight
    assert [i for i in range(283) if not torch.equal(now[i], model.embed_tokens.weight[i])] == [281]
    assert (now[281].double() - was[old.encode("<|hole|>")].mean(0)).abs().max() < 1e-6
    small = checkpoint.resize_model(own_model(own_config(vocab_size=270)), old, new, multiple=1)
    assert len(small.embed_tokens.weight) == 283


def test_command_line_resizes_a_run_and_takes_the_old_tokenizer_from_elsewhere(vocabularies, tmp_path):
    old, new = vocabularies["bpe"]
    run = tmp_path / "run"
    checkpoint.save_model(own_model(own_config(vocab_size=TABLE)), run / "step_0000007")
    (run / "latest").write_text("step_0000007\n")
    args = ("checkpoint.py", "resize", run, "--tokenizer", new, "--out", tmp_path / "wide")
    done = run_script(*args)
    assert done.returncode == 2 and "no tokenizer here" in done.stderr
    done = run_script(*args, "--old_tokenizer", old, "--save_dtype", "bfloat16", "--multiple", 16)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("wide: 320 -> 352 rows, 50 for new tokens, 2 of padding")
    made = checkpoint.load_model(tmp_path / "wide")
    assert made.embed_tokens.weight.shape[0] == 352 and made.embed_tokens.weight.dtype == torch.bfloat16
