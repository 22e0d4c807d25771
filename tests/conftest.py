"""What several test files share: a quiet environment, tiny random transformers models, running our scripts.

from conftest import FAMILIES, run_script, tiny_hf
hf = tiny_hf("phi")                                # a random PhiForCausalLM in fp32, eval
hf = tiny_hf("llama-tied", vocab_size=512, dtype=torch.bfloat16)
hf, folder = tiny_folder("bloom")                  # fixture: the same, saved once per session (do not write there)
done = run_script("train.py", "--help")            # a CompletedProcess; extra environment as keywords
launch(worker, folder, world=4)                    # a function of a test file in four processes of one gloo group
with disk_full_after(1000): ...                    # writes beyond that many bytes of a file fail
shards = packed_corpus(folder, 600, (2, 20), 320)  # a small packed corpus
"""

import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
from pathlib import Path

os.environ.update(
    TRANSFORMERS_VERBOSITY="error",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",  # also the bars of from_pretrained and save_pretrained
    TOKENIZERS_PARALLELISM="false",
)
if os.environ.get("TRITON_INTERPRET") != "1":  # the twins, on a machine with a GPU, too
    os.environ["KERNELS"] = "torch"  # the kernels: tests/test_triton.py

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


def tiny_pairs(tokenizer, tmp_path_factory, context: int = 128):
    """Make a function family -> (transformers model, our folder of it with the tokenizer), each made once."""
    import checkpoint

    made = {}

    def get(family: str):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            more = {} if family == "bloom" else {"max_position_embeddings": context}
            hf = tiny_hf(family, vocab_size=tokenizer.vocab_size, **more)
            hf.save_pretrained(root / "hf")
            checkpoint.save_model(checkpoint.load_model(root / "hf"), root / "ours", tokenizer)
            made[family] = hf, root / "ours"
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


def launch(function, *args, world: int = 2, timeout: float = 300) -> list[str]:
    """Run a function of a test file in `world` processes of one gloo group; every one must end with status 0.

    It gets the arguments as text; returns what each process wrote.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    file = function.__module__
    code = f"import sys, {file}; {file}.{function.__name__}(*sys.argv[1:])"
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, args)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [w.communicate(timeout=timeout)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    assert [w.returncode for w in workers] == [0] * world, "\n".join(outputs)
    return outputs


@contextlib.contextmanager
def disk_full_after(size: int):
    """Let every write beyond `size` bytes of a file fail, as a full disk does (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def packed_corpus(folder: Path, documents: int, sentences: tuple[int, int], vocab_size: int) -> Path:
    """Write documents about who owns what, learn a tokenizer, pack; return the packed folder."""
    import data
    import tokenizer as tok

    draw = random.Random(0)
    names, things = "王小明 李红 张伟 赵静 陈东".split(), "书 笔 灯 伞 琴 画 茶杯 木船".split()
    texts = [
        "。".join(
            f"{draw.choice(names)}有{draw.randint(2, 99)}个{draw.choice(things)}"
            for _ in range(draw.randint(*sentences))
        )
        for _ in range(documents)
    ]
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8"
    )
    tok.train(tok.Train((str(corpus),), out=str(folder / "tok"), vocab_size=vocab_size))
    data.pack(data.PackConfig((str(corpus),), str(folder / "tok"), str(folder / "shards"), 0.05, workers=1))
    return folder / "shards"
