"""What several test files share: a quiet environment, tiny random transformers models, running our scripts.

from conftest import FAMILIES, run_script, tiny_hf
hf = tiny_hf("phi")                                # a random PhiForCausalLM in fp32, eval
hf = tiny_hf("llama-tied", vocab_size=512, dtype=torch.bfloat16)
hf, folder = tiny_folder("bloom")                  # fixture: the same, saved once per session (do not write there)
done = run_script("train.py", "--help")            # a CompletedProcess; extra environment as keywords
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ.update(
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",  # also the bars of from_pretrained and save_pretrained
    TOKENIZERS_PARALLELISM="false",
)

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("phi", "llama", "llama-tied", "bloom")


def tiny_hf(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config):
    """Build a tiny random model of transformers, in eval mode; `config` overrides keys of its configuration.

    phi: 4 heads of 16, 6 of them rotated. llama: 4 query and 2 kv heads, own head; "llama-tied": tied. bloom: 6
    heads of 8 (no power of two). Weights are N(0, 0.3²), biases too, norm weights 1 + N(0, 0.3²): a wrong
    rotation, a forgotten bias or a swapped norm changes the logits visibly.
    """
    import transformers as tf

    shape = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if family == "phi":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
        more = {"intermediate_size": 96, "max_position_embeddings": 128, "rope_parameters": rope}
        made = tf.PhiForCausalLM(tf.PhiConfig(**{**shape, **tokens, **more, **config}))
    elif family in ("llama", "llama-tied"):
        more = {"num_key_value_heads": 2, "intermediate_size": 112, "max_position_embeddings": 128}
        more |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": family == "llama-tied"}
        made = tf.LlamaForCausalLM(tf.LlamaConfig(**{**shape, **tokens, **more, **config}))
    elif family == "bloom":
        shape = {"vocab_size": 99, "hidden_size": 48, "n_layer": 2, "n_head": 6, "seq_length": 128}
        made = tf.BloomForCausalLM(tf.BloomConfig(**{**shape, **tokens, **config}))
    else:
        raise AssertionError(family)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            p.normal_(0, 0.3, generator=generator)
            if p.dim() == 1 and not name.endswith("bias"):
                p.add_(1.0)
    return made.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Give a function family -> (transformers model, folder it was saved to), made once per session."""
    made = {}

    def get(family: str):
        if family not in made:
            hf, folder = tiny_hf(family), tmp_path_factory.mktemp("hf") / family
            hf.save_pretrained(folder)
            made[family] = hf, folder
        return made[family]

    return get


@pytest.fixture(scope="session")
def _threads():
    return torch.get_num_threads()


@pytest.fixture
def one_thread(_threads):
    """Run a test on one thread: tiny tensors gain nothing from more, and lose much where cores are shared."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(_threads)


def run_script(*args, timeout: float = 120, cwd: Path | str = ROOT, **env) -> subprocess.CompletedProcess:
    """Run `python ARGS` as a user would (in the repository root), with output captured; keywords go to os.environ."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )
