"""Instruction tuning: what is trained, that packing and ranks change nothing, what a run leaves, what is refused."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import launch, packed_corpus, run_script

import chat
import checkpoint
import common
import data
import generate
import lora
import model as M
import sft
import tokenizer as tok
import train

ONE = common.Process(0, 1, "cpu")
SHAPES = {
    "llama": M.ModelConfig("llama", 328, 32, 2, 4, 64, 512, 2, tie_word_embeddings=True),
    "phi": M.ModelConfig("phi", 328, 32, 2, 2, 64, 512, partial_rotary_factor=0.5),
    "bloom": M.ModelConfig("bloom", 328, 32, 2, 4, 128, 512, tie_word_embeddings=True),
}

pytestmark = pytest.mark.usefixtures("one_thread")


def say(role, content):
    return {"role": role, "content": content}


def conversations(count: int, seed: int = 0) -> list[dict]:
    """Talks of one to three turns about who owns how many of what; the last answer can be checked."""
    draw, rows = random.Random(seed), []
    names, things = "王小明 李红 张伟 赵静 陈东".split(), "书 笔 灯 伞 琴 画 茶杯 木船".split()
    for n in range(count):
        messages = [say("system", "请用中文回答。")] if n % 7 == 3 else []
        for _ in range(draw.choice([1, 1, 2, 3])):
            who, what, many = draw.choice(names), draw.choice(things), str(draw.randint(2, 99))
            messages += [
                say("user", f"{'【问答任务】' if n % 5 == 0 else ''}{who}有几个{what}？"),
                say("assistant", f"{who}有{many}个{what}。"),
            ]
        rows.append({"messages": messages, "check": many, "kind": ("one", "more")[len(messages) > 2]})
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a packed corpus, its tokenizer, random models of three families, and conversations."""
    folder = tmp_path_factory.mktemp("sft")
    packed_corpus(folder, 200, (2, 12), 320)
    tokenizer = tok.load_tokenizer(folder / "tok")
    for name, config in SHAPES.items():
        ids = {f"{key}_token_id": getattr(tokenizer, f"{key}_id") for key in ("bos", "eos", "pad")}
        model = M.build(dataclasses.replace(config, **ids))
        M.init_weights(model, 3)
        checkpoint.save_model(model, folder / name, tokenizer)
    write(folder / "chat.jsonl", conversations(60))
    return folder


def settings(world: Path, out, **changes) -> sft.SftConfig:
    """Settings of a run of 6 steps whose rows are 64 tokens long."""
    usual = {"init": str(world / "llama"), "data": str(world / "chat.jsonl"), "template": "plain", "steps": 6}
    usual |= {"tokens_per_step": 512, "micro_tokens": 256, "row_tokens": 64, "lr": 3e-3, "dtype": "float32"}
    usual |= {"eval_every": 2, "save_every": 2, "keep": 9, "log_every": 100, "peak_tflops": 1.0, "val": 0.1}
    usual |= {"save_dtype": "float32", "max_new_tokens": 6, "device": "cpu"}
    return sft.SftConfig(out=str(out), **{**usual, **changes})


def metrics(run: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in common.read_metrics(run / "metrics.jsonl") if key in row]


def digest(run: Path, step: int = 6) -> str:
    files = sorted((run / f"step_{step:07d}" / "state").glob("rank-*.safetensors"))
    assert files
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


# --- what is computed ----------------------------------------------------------------------------------------


def gradients(model, batches) -> tuple[float, dict]:
    """The mean loss over batches, and its gradient by parameter."""
    model.zero_grad()
    total = count = 0
    for batch in batches:
        value, n, _ = sft.tuning_loss(model, batch)
        value.backward()
        total, count = total + value.item(), count + int(n)
    return total / count, {name: p.grad / count for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", SHAPES)
def test_packed_and_padded_rows_give_the_gradient_of_plain_cross_entropy_on_replies(world, family):
    tokenizer = tok.load_tokenizer(world / "tok")
    rows = data.ChatRows(conversations(40), tokenizer, 128, "plain")
    model = checkpoint.load_model(world / family).train()
    packed = gradients(model, data.validation_batches(rows, 128, 3))
    batches = data.PaddedBatches(rows, 512, 512, seed=1)
    padded = gradients(model, [batch for _ in range(batches.steps(1)) for batch in next(batches)])

    model.zero_grad()
    losses = []  # one conversation after the other, by torch's own cross-entropy
    for row in rows.rows:
        ids, mask = tokenizer.encode_chat(row["messages"], template="plain")
        logits = model(torch.tensor([ids[:-1]]))[0]
        losses.append(
            F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")[torch.tensor(mask[1:]) > 0]
        )
    loss = torch.cat(losses).mean()
    loss.backward()
    for mean, grads in (packed, padded):
        assert mean == pytest.approx(loss.item(), rel=1e-6)
        for name, p in model.named_parameters():
            assert (grads[name] - p.grad).abs().max() <= 1e-5 * max(1.0, p.grad.abs().max()), name


MODES = {
    "full": {},
    "full zero3": {"shard": "zero3"},
    "lora": {"lora": True, "lora_target": "all-linear", "lr": 1e-2},
    "lora zero3": {"shard": "zero3", "lora": True, "lora_target": "all-linear", "lr": 1e-2},
    "padded": {"packing": False, "tokens_per_step": 1024},
}


SHORT = {"steps": 3, "eval_every": 0, "save_every": 0}


def tune_all(world: str, out: str) -> None:
    """What every rank runs in the test below."""
    torch.set_num_threads(1)
    process = common.start_process("cpu", 120)
    for name, changes in MODES.items():
        assert sft.tune(settings(Path(world), Path(out) / name, **{**SHORT, **changes}), process) == 0


def test_two_ranks_agree_with_one_in_full_and_with_adapters(world, tmp_path):
    launch(tune_all, world, tmp_path / "two")
    for name, changes in MODES.items():
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert sft.tune(settings(world, one, **{**SHORT, **changes, "shard": "none"}), ONE) == 0
        for key in ("loss", "grad_norm", "tokens", "val_loss"):
            assert metrics(one, key) == pytest.approx(metrics(two, key), rel=3e-5), (name, key)
        for key in ("exact_match", "sample"):  # replies too: greedy, in fp32
            assert metrics(one, key) == metrics(two, key), (name, key)
        a, b = (lora.load_model(run).state_dict() for run in (one, two))
        assert all(torch.allclose(a[n], b[n], rtol=0, atol=3e-5) for n in a), name


def test_mixed_in_text_has_its_share_of_the_tokens_and_all_of_it_is_trained(world, tmp_path):
    cfg = settings(world, tmp_path / "run", lm_mix=0.3, lm_data=str(world / "shards"), steps=8, eval_every=0)
    tokenizer, config = sft.start_from(cfg)
    chats = sft.Conversations.read(cfg, tokenizer, 64).train
    feed = sft.packed(cfg, chats, 64, ONE)
    held, trained = [0, 0], [0, 0]  # conversations, text
    for _ in range(60):
        for batch in next(feed.batches):
            for doc_ids, targets, part in zip(batch["doc_ids"], batch["targets"], batch["part"].tolist()):
                held[part] += int((doc_ids >= 0).sum())
                trained[part] += int((targets != data.IGNORE).sum())
    assert held[1] / sum(held) == pytest.approx(0.3, abs=0.01)
    assert trained[1] > 0.9 * held[1] and trained[0] < 0.6 * held[0]  # text: all but documents' last tokens

    assert sft.tune(cfg, ONE) == 0
    rows = [row for row in common.read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    each = [row["tokens/chat"] + row["tokens/lm"] for row in rows]
    assert [sum(each[: i + 1]) for i in range(8)] == [row["tokens"] for row in rows]
    assert min(row["tokens/lm"] for row in rows) > 0 < min(row["tokens/chat"] for row in rows)


def test_epochs_are_passes_over_the_conversations(world, tmp_path):
    for name, changes in {
        "packed": {},
        "padded": {"packing": False},
        "mixed": {"lm_mix": 0.25, "lm_data": str(world / "shards")},
    }.items():
        cfg = settings(world, tmp_path / name, steps=0, epochs=6, eval_every=0, **changes)
        tokenizer, _ = sft.start_from(cfg)
        chats = sft.Conversations.read(cfg, tokenizer, 64).train
        feed = sft.packed(cfg, chats, 64, ONE) if cfg.packing else sft.padded(cfg, chats, ONE)
        for _ in range(feed.plan.steps):
            next(feed.batches)
        done = feed.epochs["epochs/chat" if cfg.lm_mix else "epochs"]
        assert done == pytest.approx(6, abs=0.3), name


# --- resuming ------------------------------------------------------------------------------------------------

RESUMED = {
    "packing": {"dropout": 0.1},
    "padding": {"packing": False, "dropout": 0.1},
    "adapters": {"lora": True, "lora_dropout": 0.1},
    "mixed text": {"lm_mix": 0.3},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_resuming_gives_the_bits_of_a_run_that_was_not_stopped(world, tmp_path, kind):
    changes = dict(RESUMED[kind])
    if "lm_mix" in changes:
        changes["lm_data"] = str(world / "shards")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert sft.tune(settings(world, whole, **changes), ONE) == 0
    shutil.copytree(whole, cut)
    for step in (4, 6):
        shutil.rmtree(cut / f"step_{step:07d}")
    assert sft.tune(train.saved_settings(sft.SftConfig(out=str(cut), resume=True)), ONE) == 0
    assert digest(cut) == digest(whole)
    for key in ("loss", "val_loss", "exact_match", "sample"):
        assert metrics(cut, key) == metrics(whole, key)


def test_a_run_that_gets_sigterm_saves_and_goes_on_exactly(world, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert sft.tune(settings(world, whole, steps=30, eval_every=0), ONE) == 0

    def stop():
        while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    code = sft.tune(settings(world, out, steps=30, eval_every=0), ONE)
    thread.join()
    assert code == 143 and not (out / "step_0000030").exists()
    assert sft.tune(train.saved_settings(sft.SftConfig(out=str(out), resume=True)), ONE) == 0
    assert digest(out, 30) == digest(whole, 30) and metrics(out) == metrics(whole)


def test_a_changed_conversation_template_or_base_is_refused(world, tmp_path):
    shutil.copytree(world / "llama", tmp_path / "base")
    shutil.copy(world / "chat.jsonl", tmp_path / "chat.jsonl")
    here = {"init": str(tmp_path / "base"), "data": str(tmp_path / "chat.jsonl"), "eval_every": 0}
    for name, lora_too in (("full", False), ("adapters", True)):
        assert sft.tune(settings(world, tmp_path / name, lora=lora_too, **here), ONE) == 0
    again = lambda name, **more: sft.tune(
        dataclasses.replace(
            train.saved_settings(sft.SftConfig(out=str(tmp_path / name), resume=True)), steps=8, **more
        ),
        ONE,
    )
    with pytest.raises(ValueError, match="template: 'plain' when saved, 'xuanyuan-6b' now"):
        again("full", template="xuanyuan-6b")
    with pytest.raises(ValueError, match="packing: True when saved"):
        again("full", packing=False)
    with pytest.raises(ValueError, match="lora: .*'lora_rank': 16"):
        again("adapters", lora_rank=8)
    write(tmp_path / "chat.jsonl", conversations(60, seed=1))
    with pytest.raises(ValueError, match="cannot be resumed, because this changed.*\n  data: "):
        again("full")
    assert again("full", force=True) == 0  # the data begin anew
    write(tmp_path / "chat.jsonl", conversations(60))
    model = checkpoint.load_model(tmp_path / "base")
    with torch.no_grad():
        model.norm.weight[0] += 1
    shutil.rmtree(tmp_path / "base")
    checkpoint.save_model(model, tmp_path / "base", tok.load_tokenizer(world / "llama"))
    with pytest.raises(ValueError, match="\n  base: '[0-9a-f]{64}' when saved"):
        again("adapters")


# --- what a run leaves, and shows ----------------------------------------------------------------------------


def test_show_prints_what_is_trained_and_how_full_rows_are_and_writes_nothing(world, tmp_path, capsys):
    cfg = settings(world, tmp_path / "run", show=3, val=0, row_tokens=512)
    sft.main(dataclasses.replace(cfg, out=""))
    said = capsys.readouterr().out
    question, answer = (m["content"] for m in conversations(1)[0]["messages"][:2])
    assert question.startswith("【问答任务】")  # a domain's prefix is text like any other
    assert f"--- {world}/chat.jsonl:1: " in said and said.count("\n--- ") == 2
    assert f"«<s>»问：{question}\n答：⟦{answer}«</s>»⟧" in said
    assert "conversations: 60; dropped 0 of more than 512 tokens" in said
    assert "of the positions of rows of 512 tokens are filled" in said
    assert not (tmp_path / "run").exists()


def test_rows_that_are_too_long_are_counted_and_dropped_or_cut(world, tmp_path, capsys):
    tokenizer = tok.load_tokenizer(world / "tok")
    size = lambda messages: len(tokenizer.encode_chat(messages, template="plain")[0])
    long = [m for m in (row["messages"] for row in conversations(60)) if size(m) > 32]
    saved = sum(size(m[: 3 if m[0]["role"] == "system" else 2]) <= 32 for m in long)
    assert 0 < saved < len(long) < 60
    for too_long, dropped, cut in (("drop", len(long), 0), ("cut", len(long) - saved, saved)):
        sft.main(settings(world, tmp_path / "run", show=1, val=0, row_tokens=32, too_long=too_long))
        said = capsys.readouterr().out
        assert f"dropped {dropped} of more than 32 tokens" in said and f"; {cut} cut at whole turns" in said


def test_a_cut_conversation_is_asked_where_it_was_cut(world, tmp_path):
    cfg = settings(world, tmp_path / "run", too_long="cut", row_tokens=32, val=0.5)
    tokenizer, config = sft.start_from(cfg)
    chats = sft.Conversations.read(cfg, tokenizer, 32)
    evaluate = sft.Evaluation(chats.held, sft.packed(cfg, chats.train, 32, ONE), cfg, tokenizer, config, ONE)
    assert chats.held.cut and 0 < len(evaluate.tests) < len(chats.held)
    for i, row in enumerate(chats.held.rows):
        replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert tokenizer.decode(chats.held.read(i, 0, 99).tolist()).endswith(replies[-1])
        assert row["check"] in replies[-1] if "check" in row else row not in evaluate.tests
    assert all(row.keys() == {"where"} for row in chats.train.rows)


def test_a_check_may_be_a_number(world, tmp_path):
    rows = [{"messages": [say("user", f"{n}？")], "check": check} for n, check in enumerate((42, "x", ["x"]))]
    cfg = settings(world, tmp_path / "run", test=str(write(tmp_path / "test.jsonl", rows)))
    tokenizer, config = sft.start_from(cfg)
    chats = sft.Conversations.read(cfg, tokenizer, 64)
    evaluate = sft.Evaluation(chats.held, sft.packed(cfg, chats.train, 64, ONE), cfg, tokenizer, config, ONE)
    assert [row["check"] for row in evaluate.tests] == [42, "x"]


@pytest.mark.parametrize(
    ("count", "val", "held"),
    [(19, None, 0), (20, None, 1), (1000, None, 50), (41000, None, 2000), (41000, 0.05, 2050)],
)
def test_by_default_a_20th_is_held_out_and_at_most_2000(count, val, held):
    rows = [{"messages": [say("user", str(n))]} for n in range(count)]
    assert [len(part) for part in sft.split(rows, val)] == [count - held, held]


def test_the_best_step_is_saved_wherever_it_was_and_can_be_started_from(world, tmp_path):
    """The last rate is 0, so the step before is as good; then the rate is so high that the loss rises."""
    out = tmp_path / "run"
    changes = {"eval_every": 1, "save_every": 0, "keep": 1, "lr": 0.05}
    assert sft.tune(settings(world, out, **changes, steps=5), ONE) == 0

    def best() -> int:
        """The step that RUN/best names; it must have the lowest loss that was ever logged."""
        logged = [row for row in common.read_metrics(out / "metrics.jsonl") if "val_loss" in row]
        lowest = min(logged, key=lambda row: row["val_loss"])
        folder = checkpoint.model_folder(out / "best")
        told = json.loads((folder / "run_card.json").read_text())
        assert (
            folder == out / f"step_{lowest['step']:07d}"
            and told["evaluation"]["val_loss"] == lowest["val_loss"]
        )
        return lowest["step"]

    first = best()
    assert first < 5 and {p.name for p in out.glob("step_*")} == {f"step_{n:07d}" for n in (first, 5)}
    generate.load(out / "best")
    again = train.saved_settings(sft.SftConfig(out=str(out), resume=True))
    assert sft.tune(dataclasses.replace(again, steps=7, lr=5.0), ONE) == 0
    assert best() == first and {p.name for p in out.glob("step_*")} == {f"step_{n:07d}" for n in (first, 7)}
    assert sft.tune(settings(world, tmp_path / "next", init=str(out / "best"), steps=1), ONE) == 0


def test_a_run_in_full_goes_on_without_its_base_and_adapters_say_what_they_miss(world, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(world / "llama", base)
    changes = {"init": str(base), "eval_every": 0}
    for name in ("full", "adapters"):
        assert sft.tune(settings(world, tmp_path / name, lora=name == "adapters", **changes), ONE) == 0
    again = {
        n: train.saved_settings(sft.SftConfig(out=str(tmp_path / n), resume=True))
        for n in ("full", "adapters")
    }
    base.rename(tmp_path / "moved")
    assert sft.tune(dataclasses.replace(again["full"], steps=8), ONE) == 0
    step = tmp_path / "full" / "step_0000008"
    assert sft.start_folder(again["full"]) == step
    (step / "config.json").write_text("{}")  # such a step is passed over
    assert sft.start_folder(again["full"]) == tmp_path / "full" / "step_0000006"
    with pytest.raises(ValueError, match=f"{base}: the base of these adapters is not there; .* --init"):
        sft.tune(again["adapters"], ONE)
    moved = dataclasses.replace(again["adapters"], init=str(tmp_path / "moved"), steps=8)
    assert sft.tune(moved, ONE) == 0


def test_a_restart_by_torchrun_takes_the_settings_as_they_were_saved(world, tmp_path, monkeypatch):
    """The command line is still that of the start, where --init may be a run that has gone on since."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--init", "out/base", "--lr", "1"])
    cfg = settings(world, tmp_path, init="out/base", lr=1.0)
    saved = dataclasses.asdict(dataclasses.replace(cfg, init="out/base/step_0000100"))
    common.write_json(tmp_path / "run.json", {"config": saved, "launcher": common.launcher()})
    again, _ = train.begin(cfg)
    assert (again.init, again.lr, again.resume) == ("out/base/step_0000100", 1.0, True)
    common.write_json(tmp_path / "run.json", {"config": saved, "launcher": "another"})
    with pytest.raises(ValueError, match="exists and is not empty"):
        train.begin(cfg)


QUESTIONS = [
    ("谁有书？", "王小明有书。", "王小明"),
    ("谁有琴？", "李红有琴。", "李红"),
    ("有几个灯？", "有42个灯。", "42"),
]


def test_a_tuned_model_answers_and_stops_by_the_command_line(world, tmp_path):
    """From pretrained weights to answers, with the files that a user has."""
    rows = [{"instruction": q, "output": a, "check": c, "kind": "fact"} for q, a, c in QUESTIONS]
    write(tmp_path / "facts.jsonl", rows)
    flags = ["--init", world / "llama", "--data", tmp_path / "facts.jsonl", "--template", "plain"]
    flags += ["--out", tmp_path / "run", "--steps", 60, "--lr", "1e-2", "--tokens_per_step", 512]
    flags += ["--row_tokens", 64, "--val", 0, "--test", tmp_path / "facts.jsonl", "--eval_every", 0]
    flags += ["--dtype", "float32", "--peak_tflops", 1, "--sample", "谁有书？|谁有琴？", "--save_every", 0]
    done = run_script("sft.py", *flags, OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert "exact_match 1.0000" in done.stdout
    assert "sample: 谁有书？ -> 王小明有书。 | 谁有琴？ -> 李红有琴。" in done.stdout
    step = tmp_path / "run" / "step_0000060"
    card = json.loads((step / "run_card.json").read_text())
    assert card["stage"] == "instruction tuning" and card["template"] == "plain"
    assert "instruction tuning on 3 conversations" in (step / "README.md").read_text()
    asked = ["generate.py", tmp_path / "run", "--questions", tmp_path / "facts.jsonl", "--temperature", 0]
    done = run_script(*asked, "--out", tmp_path / "replies.jsonl", OMP_NUM_THREADS=1)
    assert done.returncode == 0, done.stderr
    assert "fact 3 of 3 (100.0%)" in done.stdout
    replies = [json.loads(line)["reply"] for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert replies == [answer for _, answer, _ in QUESTIONS]  # to the end, and not a token more


def test_the_logged_exact_match_is_that_of_the_saved_folder(world, tmp_path):
    test = write(
        tmp_path / "test.jsonl",
        [
            {**r, "messages": r["messages"][:2]}
            for r in conversations(30, 5)
            if r["messages"][0]["role"] == "user"
        ],
    )
    out = tmp_path / "run"
    assert (
        sft.tune(settings(world, out, test=str(test), test_rows=20, steps=40, lr=1e-2, eval_every=0), ONE)
        == 0
    )
    model, tokenizer = generate.load(out, torch.float32)
    rows = chat.read_rows([test], "questions")
    rows = [rows[i * len(rows) // 20] for i in range(20)]
    replies = generate.answer(model, tokenizer, rows, generate.Sampling(max_new_tokens=6, temperature=0))
    right = generate.exact_matches(rows, replies)
    logged = common.read_metrics(out / "metrics.jsonl")[-1]
    assert logged["exact_match"] == sum(a for a, _ in right.values()) / 20
    for kind, (a, b) in right.items():
        assert logged[f"exact_match/{kind}"] == a / b
    assert logged["perplexity"] == pytest.approx(2.718281828 ** logged["val_loss"], rel=1e-6)


def test_the_saved_folder_knows_the_template_and_where_replies_end(world, tmp_path):
    """With YaYi's special tokens; a text may still end with </s>."""
    specials = "<|System|>,<|Human|>,<|YaYi|>,<|End|>"
    tok.extend(tok.Extend(str(world / "tok"), str(tmp_path / "tok"), specials=specials))
    old, new = tok.load_tokenizer(world / "tok"), tok.load_tokenizer(tmp_path / "tok")
    wider = checkpoint.resize_model(checkpoint.load_model(world / "llama"), old, new, shrink=True)
    checkpoint.save_model(wider, tmp_path / "base", new)
    cfg = settings(
        world, tmp_path / "run", init=str(tmp_path / "base"), template="yayi", row_tokens=512, steps=1
    )
    assert sft.tune(cfg, ONE) == 0
    folder = checkpoint.model_folder(tmp_path / "run")
    end = new.special_id["<|End|>"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [old.eos_id, end]
    assert checkpoint.read_config(folder).eos_ids == [old.eos_id, end]
    assert tok.load_tokenizer(folder).template == "yayi"
    again = dataclasses.replace(cfg, init=str(tmp_path / "run"), template="", out=str(tmp_path / "next"))
    assert sft.start_from(again)[0].template == "yayi"


@pytest.mark.parametrize(("rows", "warned"), [("template", False), ("", True), ("1", True), ("4", False)])
def test_adapters_train_the_rows_of_the_templates_special_tokens_or_warn(
    world, tmp_path, capsys, rows, warned
):
    specials = "<|System|>,<|Human|>,<|YaYi|>,<|End|>"
    tok.extend(tok.Extend(str(world / "tok"), str(tmp_path / "tok"), specials=specials))
    old, new = tok.load_tokenizer(world / "tok"), tok.load_tokenizer(tmp_path / "tok")
    wider = checkpoint.resize_model(checkpoint.load_model(world / "llama"), old, new, shrink=True)
    checkpoint.save_model(wider, tmp_path / "base", new)
    cfg = settings(world, tmp_path / "run", init=str(tmp_path / "base"), template="yayi", row_tokens=512)
    cfg = dataclasses.replace(cfg, lora=True, lora_new_rows=rows, steps=2)
    assert sft.tune(cfg, ONE) == 0
    said = capsys.readouterr().out
    assert ("--lora_new_rows template trains them" in said) == warned
    base, tuned = (lora.load_model(tmp_path / n).embed_tokens.weight for n in ("base", "run"))
    changed = (base != tuned).any(1).nonzero().flatten().tolist()
    ids = sorted(new.special_id[token] for token in specials.split(","))
    assert changed == {"": [], "1": ids[-1:]}.get(rows, ids)
    if rows == "template":
        again = train.saved_settings(sft.SftConfig(out=str(tmp_path / "run"), resume=True))
        assert sft.tune(dataclasses.replace(again, steps=3), ONE) == 0


def test_the_presets_of_yayis_adapters_train_the_rows_that_were_added_to_bloom(tmp_path):
    """On the meta device: 7,864,320 parameters of adapters (YaYi's), and four rows of 4,096."""
    for name in ("yayi-lora", "yayi-multi-lora"):
        cfg = train.with_preset(sft.SftConfig(out="x", preset=name), sft.PRESETS)
        assert cfg.lora_new_rows == "template"
        model = M.build(dataclasses.replace(M.PRESETS["bloomz-7b1"], vocab_size=250752), device="meta")
        lora.attach(model, dataclasses.replace(cfg, lora_new_rows="250680,250681,250682,250683,"), 250684)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 7864320 + 4 * 4096


def test_adapters_are_saved_alone_and_load_with_their_base(world, tmp_path):
    out = tmp_path / "run"
    assert sft.tune(settings(world, out, lora=True, lr=1e-2), ONE) == 0
    names = {p.name for p in checkpoint.model_folder(out).iterdir()}
    assert "adapter_model.safetensors" in names and not any(n.startswith("model") for n in names)
    base, tuned = checkpoint.load_model(world / "llama"), lora.load_model(out)
    changed = {n for n, p in base.state_dict().items() if not torch.equal(p, tuned.state_dict()[n])}
    assert changed == {f"layers.{i}.self_attn.{x}_proj.weight" for i in (0, 1) for x in "qv"}
    assert metrics(out, "val_loss")[-1] < metrics(out, "val_loss")[0]


# --- presets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sft.PRESETS)
def test_a_preset_makes_sound_settings_and_typed_flags_win(name, monkeypatch):
    cfg = train.with_preset(sft.SftConfig(out="x", preset=name, lr=7e-7), sft.PRESETS)
    assert cfg.template in chat.TEMPLATES and cfg.preset == name
    for key, value in sft.PRESETS[name].items():
        assert getattr(cfg, key) == value
        assert type(value) is (float if key == "val" else type(getattr(sft.SftConfig(out="x"), key))), key
    cfg.check_used({})
    monkeypatch.setattr(sys, "argv", ["sft.py", "--lr", "7e-7", "--no_packing", "--lora-rank=4"])
    typed = sft.SftConfig(out="x", preset=name, lr=7e-7, packing=False, lora_rank=4)
    typed = train.with_preset(typed, sft.PRESETS)
    assert (typed.lr, typed.packing, typed.lora_rank) == (7e-7, False, 4)
    assert typed.template == cfg.template


@pytest.mark.parametrize("flag", ["--lora_rank=16", "--lora-alpha", "--lora_new_rows"])
def test_a_typed_flag_of_adapters_without_lora_is_refused(world, tmp_path, monkeypatch, flag):
    monkeypatch.setattr(sys, "argv", ["sft.py", flag])
    name = flag.split("=")[0].replace("-", "_").strip("_")
    for preset in ("", "yayi-sft"):
        with pytest.raises(ValueError, match=f"--{name} .* without --lora"):
            sft.main(settings(world, tmp_path / "run", preset=preset))
    assert not (tmp_path / "run").exists()


def test_presets_say_what_was_published():
    """The figures of rows XV13, XY8, PC7, YY7, YY8 and YY9 of the features."""
    recipe = lambda name, *keys: tuple(sft.PRESETS[name][key] for key in keys)
    assert recipe("xverse-sft", "lr", "clip", "epochs", "schedule") == (2e-5, 0.5, 2.0, "cosine")
    assert recipe("xuanyuan-sft", "lr", "weight_decay", "warmup", "seed") == (5e-5, 0.01, 0, 1234)
    assert recipe("phi2-chinese-sft", "lr", "epochs", "row_tokens", "val") == (5e-5, 3.0, 320, 4096)
    assert recipe("yayi-sft", "lr", "epochs", "warmup", "val", "seed") == (5e-6, 2.0, 100, 400, 515)
    assert recipe("yayi-multi-sft", "lr", "schedule") == (5e-7, "cosine")
    assert recipe("yayi-lora", "lora_rank", "lora_alpha", "lora_target", "lr") == (
        16,
        32.0,
        "query_key_value",
        5e-4,
    )


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": ""}, "--init is missing"),
        ({"data": ""}, "--data is missing"),
        ({"out": ""}, "--out is missing"),
        ({"template": ""}, "names no chat template. Give one.*--template plain"),
        ({"template": "yayy"}, "no chat template 'yayy'; there are plain, phi2-chinese"),
        ({"template": "yayi"}, r"no special token <\|System\|>.*tokenizer.py extend.*checkpoint.py resize"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"init": "nowhere"}, "nowhere: no such folder"),
        ({"row_tokens": 513}, "--row_tokens 513 exceeds the model's context of 512"),
        ({"row_tokens": 8}, "no conversation can be trained: 54 are longer than 8 tokens"),
        ({"val": 60}, "--val: holding out 60 of 60 rows.*; 0 holds out none"),
        ({"lm_mix": 0.3}, "--lm_mix .* and --lm_data .* go together"),
        ({"lm_data": "out/x"}, "--lm_mix .* and --lm_data .* go together"),
        ({"lm_mix": 0.3, "lm_data": "out/x", "packing": False}, "--lm_mix needs packing"),
        ({"lm_mix": 0.3, "lm_data": "out/x"}, "out/x: not a folder written by data.py pack"),
        ({"test": "{world}/unchecked.jsonl"}, 'no row has a "check"'),
        ({"sample": "很长" * 300}, "--sample: .* leave no room in the model's context of 512"),
        ({"tokens_per_step": 32}, "take for example"),
        ({"steps": 3, "tokens": 100}, "exclude each other"),
        ({"packing": False, "steps": -1}, "must not be negative"),
        ({"lora": True, "lora_target": "qkv"}, "--lora_target qkv: no such linear layer"),
        ({"lora_rank": 8}, "--lora_rank 8 does nothing without --lora"),
        ({"test": "{world}/tool.jsonl"}, "tool.jsonl:1: template plain: .*exec"),
        ({"init": "{world}/score"}, "needs a language-model head, not 'score'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_before_anything_is_written(world, tmp_path, changes, message):
    unchecked = world / "unchecked.jsonl"
    if not unchecked.exists():
        write(unchecked, [{"messages": [say("user", "你好")], "check": ["好"]}])
        tool = [say("user", "几点？"), say("assistant", "问钟。"), say("exec", "9")]
        write(world / "tool.jsonl", [{"messages": tool, "check": 9}])
        model = M.build(dataclasses.replace(SHAPES["llama"], head="score", tie_word_embeddings=False))
        M.init_weights(model, 1)
        checkpoint.save_model(model, world / "score", tok.load_tokenizer(world / "tok"))
    changes = {k: v.format(world=world) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        sft.main(settings(world, **{"out": tmp_path / "run", **changes}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("lm_mix", 1.0),
        ("lm_mix", -0.1),
        ("val", -1.0),
        ("show", -1),
        ("max_new_tokens", 0),
        ("preset", "yay"),
    ],
)
def test_a_value_out_of_range_is_refused(flag, value):
    with pytest.raises(ValueError, match=f"--{flag} {value}"):
        sft.SftConfig(out="x", **{flag: value})


def test_adapters_on_an_adapter_folder_are_refused_with_the_remedy(world, tmp_path):
    assert sft.tune(settings(world, tmp_path / "one", lora=True, steps=1), ONE) == 0
    with pytest.raises(ValueError, match="python lora.py merge"):
        sft.tune(settings(world, tmp_path / "two", lora=True, steps=1, init=str(tmp_path / "one")), ONE)
    full = settings(world, tmp_path / "full", steps=1, init=str(tmp_path / "one"))
    assert sft.tune(full, ONE) == 0  # in full: the base with the adapter merged into it


def test_text_packed_with_another_tokenizer_is_not_mixed_in(world, tmp_path):
    corpus = world / "corpus.jsonl"
    tok.train(tok.Train((str(corpus),), out=str(tmp_path / "tok"), vocab_size=300))
    data.pack(data.PackConfig((str(corpus),), str(tmp_path / "tok"), str(tmp_path / "lm"), 0.05, workers=1))
    with pytest.raises(ValueError, match="chat and lm have different tokenizers"):
        sft.tune(settings(world, tmp_path / "run", lm_mix=0.3, lm_data=str(tmp_path / "lm")), ONE)
