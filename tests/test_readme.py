"""The README's promises: every command in it runs, both languages say the same, numbers are the code's."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

from model import PRESETS, num_params

TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md")}


def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def test_both_languages_have_the_same_commands_and_files():
    english, chinese = (commands(t) for t in TEXTS.values())
    assert english == chinese and len(english) > 10
    named = [re.findall(r"^\| `([\w/]+(?:\.py|/))` \|", t, re.M) for t in TEXTS.values()]
    assert named[0] == named[1] and all((ROOT / file).exists() for file in named[0])


def test_every_preset_stands_in_the_readme_with_its_parameter_count():
    for text in TEXTS.values():
        for name, config in PRESETS.items():
            assert f"`{name}`" in text
            if config.vocab_size:
                assert f"{num_params(config):,}" in text


def test_the_two_commands_are_the_only_ones_that_are_not_run_here():
    assert commands(TEXTS["README.md"])[:2] == ["bash speedrun.sh", "bash test.sh"]


@pytest.mark.parametrize("script", ["speedrun.sh", "test.sh", "setup.sh", ".ci/run"])
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("arguments", [["--bugdet", "tiny"], ["--budget", "huge"]])
def test_speedrun_refuses_what_it_does_not_know(arguments):
    done = subprocess.run(["bash", ROOT / "speedrun.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and arguments[0] in done.stderr


def test_every_command_of_the_readme_runs(tmp_path):
    """On a small corpus and the tiny preset, in the order in which they stand."""
    for line in commands(TEXTS["README.md"])[2:]:
        words = shlex.split(line.replace("out/", f"{tmp_path}/out/"))
        if words[0] == "torchrun":
            words = ["python", "-m", "torch.distributed.run", *words[1:]]
            words[words.index("8")] = "2"
        assert words[0] == "python", line
        if "demo_corpus.py" in words:
            words += ["--size_mb", "3"]
        if "--preset" in words and "plan.py" not in words:
            words[words.index("--preset") + 1] = "tiny"
            words += ["--steps", "3", "--row_tokens", "64", "--tokens_per_step", "512", "--peak_tflops", "1"]
        if words[1] in ("sft.py", "dpo.py") and "make-rejected" not in words:
            words += ["--steps", "3", "--test_rows", "8"]
        words[0] = sys.executable
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
