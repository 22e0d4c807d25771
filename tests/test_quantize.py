"""A quantised folder holds what its formula says, loads as such, and refuses what would not be true."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file, save_file

import checkpoint
import common
import generate as gen
import inference
import kernels
import lora
import model as M
import quantize
import tokenizer as tok
from model import PRESETS, KVCache, Quantization, QuantLinear, build

FAMILIES = ("llama-tied", "llama-untied", "phi", "bloom")
WIDE = {"hidden_size": 128}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("tok")
    (root / "a.txt").write_text("\n\n".join(["我爱白纸，你好世界", "the quick brown fox"] * 20), "utf-8")
    tok.train(tok.Train([str(root / "a.txt")], str(root / "tok"), vocab_size=320))
    return tok.load_tokenizer(root / "tok")


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Give family -> a model folder of two layers whose matrices have 128 or more inputs."""
    root, made = tmp_path_factory.mktemp("models"), {}
    shapes = {
        "llama-tied": ("llama", 320, 128, 2, 4, 256, 64, 2),
        "llama-untied": ("llama", 320, 128, 2, 4, 256, 64, 2),
        "phi": ("phi", 320, 128, 2, 4, 256, 64),
        "bloom": ("bloom", 320, 128, 2, 4, 512, 64),
    }
    for name, shape in shapes.items():
        more = {"partial_rotary_factor": 0.5} if name == "phi" else {}
        config = M.ModelConfig(
            *shape, tie_word_embeddings=name in ("llama-tied", "bloom"), eos_token_id=2, **more
        )
        model = build(config)
        M.init_weights(model, seed=1)
        for p in model.parameters():
            if p.dim() == 1:
                p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))
        checkpoint.save_model(model, root / name, tokenizer)
        made[name] = root / name
    return made


def rel(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def make(folder, out, **how):
    quantize.quantize_folder(quantize.QuantizeConfig(str(folder), str(out), **how))
    return out


def by_hand(tensors, name, bits, less_one):
    """Put a weight together from the tensors of a GPTQ folder, with numpy and plain loops over the bits."""
    words, stored = (tensors[f"{name}.{part}"].numpy().view(np.uint32) for part in ("qweight", "qzeros"))
    if less_one:  # on whole words, as other tools convert v1 to v2: a field may carry into the next
        stored = stored + np.uint32(0x11111111 if bits == 4 else 0x01010101)
    per, mask = 32 // bits, 2**bits - 1
    inputs, outputs = words.shape[0] * per, words.shape[1]
    scales, group = tensors[f"{name}.scales"].double().numpy(), tensors[f"{name}.g_idx"].numpy()
    weight = np.zeros((outputs, inputs))
    for k in range(inputs):
        q = (words[k // per] >> (bits * (k % per))) & mask
        zero = [(stored[group[k], n // per] >> (bits * (n % per))) & mask for n in range(outputs)]
        weight[:, k] = scales[group[k]] * (q.astype(int) - np.array(zero, dtype=int))
    return torch.from_numpy(weight)


# --- the format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_packing_loses_nothing_and_puts_the_first_value_lowest(bits, dim):
    values = torch.randint(0, 2**bits, (64, 32), generator=torch.Generator().manual_seed(1))
    words = kernels.pack(values, bits, dim)
    assert words.dtype == torch.int32 and torch.equal(kernels.unpack(words, bits, dim).long(), values)
    row = torch.arange(1, 32 // bits + 1)
    assert hex(int(kernels.pack(row, bits, 0)) & 0xFFFFFFFF) == {4: "0x87654321", 8: "0x4030201"}[bits]


def test_a_weight_by_hand():
    layer = QuantLinear(32, 8, False, Quantization(4, 32))
    q = torch.arange(32).repeat(8, 1) % 16
    parts = quantize.pack_matrix(q, torch.full((8, 1), 8), torch.full((8, 1), 0.5), Quantization(4, 32))
    for name, value in parts.items():
        getattr(layer, name).data.copy_(value)
    assert int(layer.qzeros[0, 0]) & 0xFFFFFFFF == 0x77777777, "zero 8 is stored as 7"
    assert layer.dequantize(torch.float32)[3].tolist() == [(k % 16 - 8) / 2 for k in range(32)]


def test_zeros_stored_too_low_by_one_carry_from_field_to_field():
    layer = QuantLinear(32, 8, False, Quantization(4, 32, sym=False))
    zeros = torch.tensor([[0], [5], [8], [8], [8], [8], [8], [15]])
    parts = quantize.pack_matrix(torch.zeros(8, 32), zeros, torch.ones(8, 1), Quantization(4, 32, sym=False))
    assert hex(int(parts["qzeros"]) & 0xFFFFFFFF) == "0xe777773f", "0x...850 less 0x11111111"
    for name, value in parts.items():
        getattr(layer, name).data.copy_(value)
    assert layer.dequantize(torch.float32)[:, 0].tolist() == [-float(z) for z in zeros]


def test_inputs_belong_to_the_groups_that_g_idx_names():
    how, rng = Quantization(4, 32, desc_act=True), torch.Generator().manual_seed(5)
    weight, order = torch.randn(16, 128, generator=rng), torch.randperm(128, generator=rng)
    q, zeros, scales = quantize.round_to_nearest(weight, 4, 32)
    plain, shuffled = QuantLinear(128, 16, False, how), QuantLinear(128, 16, False, how)
    for layer, values, groups in (
        (plain, q, torch.arange(128) // 32),
        (shuffled, q[:, order], (torch.arange(128) // 32)[order]),
    ):
        parts = quantize.pack_matrix(values, zeros, scales, how) | {"g_idx": groups}
        for name, value in parts.items():
            getattr(layer, name).data.copy_(value)
    want = plain.dequantize(torch.float32)
    assert (want - weight).norm() < 0.15 * weight.norm()
    assert torch.equal(shuffled.dequantize(torch.float32), want[:, order])


def quant_layer(weight, how, g_idx=None):
    """Make a QuantLinear of a weight; g_idx: the groups of its inputs, each of them rounded by itself."""
    layer = QuantLinear(weight.shape[1], len(weight), True, how)
    groups = torch.arange(weight.shape[1]) // how.group_size if g_idx is None else g_idx
    order = groups.argsort(stable=True)
    q, zeros, scales = quantize.round_to_nearest(weight[:, order], how.bits, how.group_size)
    parts = quantize.pack_matrix(q[:, order.argsort()], zeros, scales, how) | {"g_idx": groups}
    for name, value in parts.items():
        getattr(layer, name).data.copy_(value)
    layer.bias.data = torch.randn(len(weight), generator=torch.Generator().manual_seed(9))
    return layer


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_the_order_of_their_groups_are_sorted_once_at_load(bits):
    how, rng = Quantization(bits, 32, desc_act=True), torch.Generator().manual_seed(5)
    groups = (torch.arange(128) // 32)[torch.randperm(128, generator=rng)]
    layer = quant_layer(torch.randn(64, 128, generator=rng), how, groups)
    packed = inference.pack(layer, torch.float32)
    assert isinstance(packed, inference.PackedLinear) and packed.order is not None
    torch.testing.assert_close(packed.dequantize(torch.float32), layer.dequantize(torch.float32))
    for rows in (1, 5, 40):
        x = torch.randn(rows, 128, generator=rng)
        assert rel(packed(x), layer(x)) < 5e-3
    layer.g_idx.data[0] = (layer.g_idx[0] + 1) % 4  # groups of 31 and 33: no product knows them
    packed = inference.pack(layer, torch.float32)
    assert type(packed) is M.Linear and rel(packed(x), layer(x)) < 1e-6


def test_layers_whose_inputs_are_grouped_differently_are_joined_as_whole_ones():
    how, rng = Quantization(4, 32, desc_act=True), torch.Generator().manual_seed(6)
    layers = [
        quant_layer(torch.randn(32, 64, generator=rng), how, (torch.arange(64) // 32).roll(shift))
        for shift in (0, 0, 7)
    ]
    x = torch.randn(3, 64, generator=rng)
    for part, kind in ((layers[:2], QuantLinear), (layers, M.Linear)):
        joined = inference._join(torch.float32, *part)
        assert type(joined) is kind
        torch.testing.assert_close(joined(x), torch.cat([layer(x) for layer in part], -1))


def test_scales_are_exact_in_bf16_and_fp16():
    """So the products, whose scales have the dtype of the activations, compute what the folder says."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    for bits, group, sym in ((8, 256, True), (4, 64, True), (4, 64, False)):
        scales = quantize.round_to_nearest(weight, bits, group, sym)[2]
        assert scales.dtype == torch.float16 and torch.equal(scales, scales.bfloat16().half())


def test_casting_a_model_moves_no_bit_of_its_scales(folders, tmp_path):
    model = checkpoint.load_model(make(folders["llama-tied"], tmp_path / "q"), torch.float32)
    for name, p in model.named_parameters():
        if name.endswith("scales"):
            p.data.copy_(p * 1.001)  # as foreign folders have them: not exact in bf16
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith(checkpoint.QUANTIZED)}
    model.bfloat16().float().to(torch.float16)
    after = dict(model.named_parameters())
    assert len(before) == 4 * 14 and all(torch.equal(after[n], p) for n, p in before.items())
    assert {p.dtype for n, p in after.items() if n not in before} == {torch.float16}
    scales = after["layers.0.self_attn.q_proj.scales"]
    assert not torch.equal(scales, scales.bfloat16().half()), "the test can tell"


# --- rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_a_weight_that_the_format_can_hold_is_held_exactly(bits, sym):
    rng = torch.Generator().manual_seed(2)
    low, high, zero = (0, 2**bits - 1, 3) if not sym else (1, 2**bits - 1, 2 ** (bits - 1))
    q = torch.randint(low, high + 1, (8, 64), generator=rng)
    q[:, ::32], q[:, 1::32] = low, high  # both ends are there, so the scale is known
    scale = 2.0 ** -torch.randint(0, 9, (8, 2, 1), generator=rng)
    weight = ((q.unflatten(1, (2, 32)) - zero) * scale).flatten(1)
    have, zeros, scales = quantize.round_to_nearest(weight, bits, 32, sym)
    assert (
        torch.equal(have.long(), q) and (zeros == zero).all() and torch.equal(scales.float(), scale[..., 0])
    )


def error(weight, bits, group, **how):
    q, zeros, scales = quantize.round_to_nearest(weight, bits, group, **how)
    spread = [t.float().repeat_interleave(group, 1) for t in (zeros, scales)]
    return float((((q.float() - spread[0]) * spread[1]) - weight).norm() / weight.norm())


def test_smaller_groups_the_search_and_a_free_zero_make_smaller_errors():
    rng = torch.Generator().manual_seed(3)
    weight = torch.randn(256, 512, generator=rng)
    errors = [error(weight, 4, g) for g in (512, 128, 64, 32)]
    assert errors == sorted(errors, reverse=True)
    # published for Gaussian weights: 0.160 row-wise, 0.117, 0.108, 0.097, without a search
    plain = [error(weight, 4, g, search=False) for g in (128, 64, 32)]
    assert plain == pytest.approx([0.117, 0.108, 0.097], rel=0.05)
    assert all(a < b for a, b in zip(errors[1:], plain))
    assert error(weight + 3, 4, 64, sym=False) < 0.7 * error(weight + 3, 4, 64)
    assert error(weight, 8, 512) < 0.01


def test_zeros_subnormals_and_huge_weights():
    weight = torch.zeros(4, 64)
    weight[1] = 1e-9
    q, zeros, scales = quantize.round_to_nearest(weight, 4, 32)
    assert (q == 8).all() and (scales > 0).all() and (zeros == 8).all()
    with pytest.raises(ValueError, match="beyond fp16"):
        quantize.round_to_nearest(torch.full((1, 32), 1e6), 4, 32)
    with pytest.raises(ValueError, match="inf or nan"):
        quantize.round_to_nearest(torch.full((1, 32), float("nan")), 8, 32)


# --- GPTQ --------------------------------------------------------------------------------------------------------


def correlated(rows, K, seed=1):
    """Inputs as a model has them: a few directions and a few features carry most."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=rng) @ torch.randn(8, K, generator=rng)
    return (x + 0.3 * torch.randn(rows, K, generator=rng)) * torch.rand(K, generator=rng).exp().square()


def obq_in_order(weight, H, zeros, scales, low, high, group):
    """Round input after input by the formula of Frantar et al. 2022, "Optimal Brain Compression", in fp64.

    The inverse is not factored: after every input it is taken anew of what is left of H.
    """
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H))
    W, left = weight.clone(), H.diagonal().argsort(descending=True).tolist()
    q = torch.zeros_like(W)
    while left:
        j, inverse = left[0], torch.linalg.inv(H[left][:, left])
        scale, zero = scales[:, j // group].double(), zeros[:, j // group].double()
        q[:, j] = (W[:, j] / scale + zero).round().clamp(low, high)
        error = (W[:, j] - (q[:, j] - zero) * scale) / inverse[0, 0]
        W[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return q


@pytest.mark.parametrize(("bits", "group", "sym"), [(4, 32, True), (4, 32, False), (8, 160, True)])
def test_gptq_is_optimal_brain_quantisation_in_the_order_of_power(bits, group, sym, monkeypatch):
    monkeypatch.setattr(quantize, "COLUMNS", 48)  # blocks that end amid a group
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(3)).double()
    x = correlated(500, 160).double()
    H = x.T @ x
    _, zeros, scales = quantize.round_to_nearest(weight, bits, group, sym)
    low, high = quantize.limits(bits, sym)
    want = obq_in_order(weight, H, zeros, scales, low, high, group)
    q, *same = quantize.gptq(weight, H.float(), zeros, scales, low, high)
    assert torch.equal(same[0], zeros) and torch.equal(same[1], scales)
    assert (q != want).double().mean() < 0.01, "fp32 may decide a tie otherwise, and what follows it"


def test_gptq_makes_the_products_better_and_the_weights_worse():
    weight, x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)), correlated(2000, 256)
    H = x.T @ x
    near = quantize.Rounding(Quantization(4, 128), True)("w", weight)
    good = quantize.Rounding(Quantization(4, 128), True)("w", weight, H)
    for rounded, name in ((near, "nearest_output_error"), (good, "output_error")):
        y = x @ (quantize.values_of(*rounded[:3]) - weight).T
        assert good.errors[name] == pytest.approx(float(y.norm() / (x @ weight.T).norm()), rel=1e-3)
    assert good.errors["output_error"] < 0.5 * good.errors["nearest_output_error"]
    assert good.errors["relative_error"] > near.errors["relative_error"]
    alone = quantize.Rounding(Quantization(4, 128), True)("w", weight, torch.eye(256))
    assert torch.equal(alone.q, near.q), "independent inputs: nothing can make up for an error"


def test_gptq_with_inputs_that_never_come():
    """Zero rows of H, or of all of it, leave weights to the nearest value."""
    weight, H = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), torch.zeros(64, 64)
    near = quantize.Rounding(Quantization(4, 64), True)("w", weight)
    assert torch.equal(quantize.Rounding(Quantization(4, 64), True)("w", weight, H).q, near.q)
    H[:32, :32] = correlated(100, 32).T @ correlated(100, 32)
    some = quantize.Rounding(Quantization(4, 64), True)("w", weight, H)
    assert torch.equal(some.q[:, 32:], near.q[:, 32:]) and not torch.equal(some.q, near.q)


@pytest.fixture
def text(tmp_path):
    words = ["我", "爱", "白纸", "你好", "世界", "the", "quick", "brown", "fox", "，"]
    rng = random.Random(1)
    lines = ["".join(rng.choices(words, k=60)) for _ in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines), "utf-8")
    return tmp_path / "a.txt"


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_what_the_quantised_model_computes(family, folders, text, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "best_dtype", lambda device: torch.float32)
    made = []
    init = quantize.Calibration.__init__

    def spy(self, model, read, rows):
        made.append((self, rows))
        init(self, model, read, rows)

    monkeypatch.setattr(quantize.Calibration, "__init__", spy)
    folder = make(folders[family], tmp_path / "q", group_size=32, calibrate=str(text), calibrate_tokens=1500)
    (calibration, rows) = made[0]
    assert rows.shape == (1500 // 64, 64)
    model = checkpoint.load_model(folder, torch.float32)
    with torch.no_grad():
        hidden = model.norm(calibration.x)
        assert rel(model.lm_head(hidden), model(rows)) < 1e-5
        plain = checkpoint.load_model(folders[family], torch.float32)
        assert rel(model(rows), plain(rows)) > 1e-3
    for line in json.loads((folder / "quantization.json").read_text())["tensors"]:
        assert 0 < line["output_error"] < line["nearest_output_error"]
    near = make(folders[family], tmp_path / "near", group_size=32)
    a, b = (load_file(f / "model.safetensors") for f in (folder, near))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) == (not name.endswith("qweight")), name
    assert (folder / "config.json").read_text() == (near / "config.json").read_text()


def test_a_text_too_short_to_calibrate_is_refused(folders, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"empty\.txt: no text"):
        make(folders["phi"], tmp_path / "q", calibrate=str(tmp_path / "empty.txt"))
    assert not (tmp_path / "q").exists()


def test_a_tokenizer_of_another_model_does_not_calibrate(folders, tmp_path):
    shutil.copytree(folders["phi"], tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    tensors = load_file(tmp_path / "model/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        tensors[name] = tensors[name][:100].clone()
    save_file(tensors, tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    (tmp_path / "text.txt").write_text("我爱白纸" * 99, "utf-8")
    with pytest.raises(ValueError, match="the tokenizer has .* tokens, the model only 100"):
        make(tmp_path / "model", tmp_path / "q", calibrate=str(tmp_path / "text.txt"))
    assert not (tmp_path / "q").exists()


# --- folders -----------------------------------------------------------------------------------------------------

KINDS = {
    "int8": {"bits": 8},
    "int4": {},
    "g32": {"group_size": 32},
    "asymmetric": {"sym": False, "group_size": 64},
    "row": {"group_size": -1, "search": False},
    "head": {"head_bits": 8},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_quantised_folder_computes_what_its_tensors_say(family, kind, folders, tmp_path, capsys):
    how = KINDS[kind]
    if family == "bloom" and kind == "head":
        with pytest.raises(ValueError, match="BLOOM's head is tied"):
            make(folders[family], tmp_path / "q", **how)
        assert not (tmp_path / "q").exists()
        return
    folder = make(folders[family], tmp_path / "q", **how)
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits, less_one = how.get("bits", 4), how.get("sym", True)
    assert (said["bits"], said["checkpoint_format"]) == (bits, "gptq" if less_one else "gptq_v2")
    assert said["group_size"] == how.get("group_size", -1 if bits == 8 else 128)
    tensors = load_file(folder / "model.safetensors")
    plain = checkpoint.load_model(folders[family], torch.float32)
    if kind == "head":
        plain.config = dataclasses.replace(plain.config, tie_word_embeddings=False)
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.clone())
    for name, layer in plain.named_modules():
        stored = checkpoint.hf_name(f"{name}.weight", plain.config.family).removesuffix(".weight")
        if f"{stored}.qweight" in tensors:
            b = 8 if name == "lm_head" else bits
            weight = by_hand(tensors, stored, b, less_one).float()
            assert 0 < (weight - layer.weight).norm() / layer.weight.norm() < (0.02 if b == 8 else 0.2)
            layer.weight.data = weight
    ids = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(4))
    model = checkpoint.load_model(folder, torch.float32)
    with torch.no_grad():
        want = plain(ids)
        torch.testing.assert_close(model(ids), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids[:, :-1], ids[:, 1:]), plain(ids[:, :-1], ids[:, 1:]))
    for rows in (1, 8):
        loaded, tokenizer = gen.load(folder, torch.float32, rows=rows)
        assert not any(isinstance(m, QuantLinear) for m in loaded.modules())
        bound = 1e-2 if bits == 4 else 1e-5  # the 4-bit product rounds activations to bf16
        cache, one = KVCache(loaded.config, 1, 20, torch.float32), inference.OneRow(loaded)
        with torch.inference_mode():
            assert rel(loaded(ids), want) < 1e-5, "many rows: whole matrices"
            torch.testing.assert_close(
                loaded(ids[:, :-1], ids[:, 1:]), plain(ids[:, :-1], ids[:, 1:]), rtol=1e-4, atol=1e-4
            )
            assert rel(loaded(ids[:1, :3], cache=cache), want[:1, :3]) < bound
            for t in range(3, 20):
                assert rel(one(int(ids[0, t]), cache), want[0, t]) < bound
        with pytest.raises(ValueError, match="was fused"):
            checkpoint.save_model(loaded, tmp_path / "no")
    assert ("round fp32 activations to bf16" in capsys.readouterr().err) == (bits == 4)
    checkpoint.save_model(model, tmp_path / "copy", tokenizer, torch.float32)
    copy = load_file(tmp_path / "copy/model.safetensors")
    assert copy.keys() == tensors.keys() and all(torch.equal(copy[n], tensors[n]) for n in tensors)
    assert checkpoint.read_config(tmp_path / "copy") == checkpoint.read_config(folder)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_compiled_step_over_packed_matrices_writes_the_same(bits, folders, tmp_path):
    folder = make(folders["llama-tied"], tmp_path / "q", bits=bits, head_bits=8)
    plain, compiled = (gen.load(folder, torch.float32, compiled=c)[0] for c in (False, True))
    sampling = gen.Sampling(20, temperature=0, ignore_eos=True)
    assert gen.generate(compiled, [[5, 6, 7]], sampling) == gen.generate(plain, [[5, 6, 7]], sampling)


def test_only_the_blocks_matrices_are_quantised_and_the_report_says_how_well(folders, tmp_path, capsys):
    folder = make(folders["phi"], tmp_path / "q")
    tensors = load_file(folder / "model.safetensors")
    few = {n.rpartition(".")[0] for n in tensors if n.endswith("qweight")}
    kept = {n for n in tensors if n.endswith("weight") and not n.endswith("qweight")}
    assert len(few) == 2 * 6 and {n.split(".")[-2] for n in kept} == {
        *("embed_tokens", "input_layernorm", "final_layernorm", "lm_head")
    }
    source = load_file(folders["phi"] / "model.safetensors")
    for name in kept | {n for n in tensors if n.endswith("bias")}:
        assert torch.equal(tensors[name], source[name])
    report = json.loads((folder / "quantization.json").read_text())
    for line in report["tensors"]:
        weight = by_hand(tensors, line["name"].removesuffix(".weight"), 4, 1)
        off = weight - source[line["name"]]
        assert line["relative_error"] == pytest.approx(
            float(off.norm() / source[line["name"]].norm()), rel=1e-4
        )
        assert line["max_error"] == pytest.approx(float(off.abs().max()), rel=1e-3)
    assert {line["name"].removesuffix(".weight") for line in report["tensors"]} == few
    assert report["bytes"]["after"] == sum(t.numel() * t.itemsize for t in tensors.values())
    assert "relative error of 12 matrices" in capsys.readouterr().out


def test_small_files_make_a_folder_with_an_index_of_the_same_tensors(folders, tmp_path):
    one = load_file(make(folders["llama-untied"], tmp_path / "one") / "model.safetensors")
    many = make(folders["llama-untied"], tmp_path / "many", shard_bytes=50_000)
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 3 and (many / "model.safetensors.index.json").is_file()
    again = {name: t for file in files for name, t in load_file(file).items()}
    assert again.keys() == one.keys() and all(torch.equal(again[n], one[n]) for n in one)
    checkpoint.load_model(many)
    model = checkpoint.load_model(folders["llama-untied"])
    checkpoint.save_model(model, tmp_path / "source", shard_bytes=100_000)
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    from_many = load_file(make(tmp_path / "source", tmp_path / "q") / "model.safetensors")
    assert from_many.keys() == one.keys() and all(torch.equal(from_many[n], one[n]) for n in one)


@pytest.mark.parametrize(("how", "published"), [((8, -1), 13.73), ((4, 128), 8.01), ((4, -1), 7.83)])
def test_xverse_13b_has_the_published_sizes(how, published):
    """GiB of weights and scales alone; the zeros of GPTQ's layout are what we have above it."""
    config = dataclasses.replace(PRESETS["xverse-13b"], quantization=Quantization(*how))
    model = build(config, "meta").bfloat16()
    assert sum(p.numel() * p.itemsize for p in model.parameters()) / 2**30 == pytest.approx(
        published, rel=0.01
    )


# --- what is refused ---------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused_and_nothing_is_written(folders, tmp_path):
    folder = make(folders["llama-tied"], tmp_path / "q")
    with pytest.raises(ValueError, match="is quantised already"):
        make(folder, tmp_path / "again")
    model = checkpoint.load_model(folders["llama-tied"])
    lora.attach(model, lora.LoraConfig(lora=True))
    lora.load_into(model, folders["llama-tied"])
    lora.init_adapter(model, 1)
    lora.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="an adapter; merge it first"):
        make(tmp_path / "adapter", tmp_path / "again")
    with pytest.raises(ValueError, match="its inputs must be a multiple of the group of 96"):
        make(folders["llama-tied"], tmp_path / "again", group_size=96)
    with pytest.raises(ValueError, match="group_size 20: expected -1 or a multiple of 32"):
        make(folders["llama-tied"], tmp_path / "again", group_size=20)
    with pytest.raises(ValueError, match="exists and is not empty"):
        make(folders["llama-tied"], folder)
    for kind in ("score", "none"):
        headless = build(dataclasses.replace(checkpoint.read_config(folders["bloom"]), head=kind))
        M.init_weights(headless, 1)
        checkpoint.save_model(headless, tmp_path / kind)
        with pytest.raises(ValueError, match="no language-model head"):
            make(tmp_path / kind, tmp_path / "again", head_bits=8)
        checkpoint.load_model(make(tmp_path / kind, tmp_path / f"{kind} in 4 bits"))
    tensors = load_file(folders["llama-untied"] / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(200, 128)
    shutil.copytree(folders["llama-untied"], tmp_path / "odd")
    save_file(tensors, tmp_path / "odd/model.safetensors")
    with pytest.raises(ValueError, match="1 of another shape: model.layers.1.mlp.up_proj.weight"):
        make(tmp_path / "odd", tmp_path / "again")
    old = tok.load_tokenizer(folder)
    with pytest.raises(ValueError, match="a quantised model is not resized"):
        checkpoint.resize_model(checkpoint.load_model(folder), old, old)
    assert M.num_params(checkpoint.read_config(folder)) == M.num_params(
        checkpoint.read_config(folders["llama-tied"])
    )
    assert not (tmp_path / "again").exists()


def test_what_others_write_loads_and_what_we_write_they_read(folders, tmp_path):
    from transformers import GPTQConfig

    folder = make(folders["llama-untied"], tmp_path / "q", group_size=32)
    ids, config = torch.arange(20)[None], json.loads((folder / "config.json").read_text())
    want = checkpoint.load_model(folder, torch.float32)(ids)
    theirs = GPTQConfig.from_dict(dict(config["quantization_config"]))
    assert (theirs.bits, theirs.group_size, theirs.desc_act, theirs.sym) == (4, 32, False, True)
    config["quantization_config"] = theirs.to_dict() | {"is_marlin_format": False, "damp_percent": 0.01}
    config["quantization_config"]["method"] = "gptq"  # gptqmodel 7 writes this, and the two names
    config |= {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("g_idx")]:
        del tensors[name]  # as some tools do
        tensors[name.replace("g_idx", "bias")] = torch.zeros(8, dtype=torch.float16)  # as older ones did
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(checkpoint.load_model(folder, torch.float32)(ids), want)
    bias = next(n for n in tensors if n.endswith(".bias"))
    save_file(tensors | {bias: torch.ones(8)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 unexpected: {bias}"):
        checkpoint.load_model(folder)
    groups = {bias.replace("bias", "g_idx"): torch.full((256 if "down_proj" in bias else 128,), 9).int()}
    save_file(tensors | groups, folder / "model.safetensors")
    with pytest.raises(ValueError, match="g_idx names groups that are not there"):
        checkpoint.load_model(folder)


def test_the_order_and_symmetry_that_a_folder_says_are_said_again():
    said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "sym": False}
    how = checkpoint._read_quantization(said, "config.json")
    assert how == Quantization(4, 64, sym=False, desc_act=True, zeros_less_one=True)
    assert said.items() <= checkpoint._say_quantization(how).items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "only quant_method 'gptq' is read"),
        ({"group_size": None}, "group_size None: expected -1 or a multiple of 32"),
        ({"format": "gptq_v2"}, "only checkpoint_format gptq and gptq_v2"),
        ({"bits": 3}, "expected 4 or 8"),
        ({"checkpoint_format": "marlin"}, "only checkpoint_format gptq and gptq_v2"),
        ({"method": "awq"}, "method is not understood"),
        ({"rotation": "hadamard"}, "rotation is not understood, and it may change what the tensors mean"),
        ({"dynamic": {"-:.*down.*": {}}}, "dynamic .* is not understood"),
        ({"lm_head": True}, "a head is read in 8 bits with one scale a row"),
    ],
)
def test_a_foreign_quantization_that_is_not_understood_is_refused(change, message, folders, tmp_path):
    folder = make(folders["llama-untied"], tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(folder)


def test_beside_quantised_weights_adapters_are_trained_and_nothing_else(folders, tmp_path):
    folder = make(folders["llama-tied"], tmp_path / "q")
    (tmp_path / "a.jsonl").write_text('{"instruction": "你好", "output": "世界"}\n' * 20, "utf-8")
    flags = [
        "--init",
        folder,
        "--data",
        tmp_path / "a.jsonl",
        "--template",
        "plain",
        "--val",
        0,
        "--lr",
        3e-3,
    ]
    flags += ["--row_tokens", 64, "--tokens_per_step", 128, "--steps", 8, "--warmup", 0, "--peak_tflops", 1]
    done = run_script("sft.py", *flags, "--out", tmp_path / "run")
    assert done.returncode == 2 and "quantised weights are not trained" in done.stderr, done.stderr
    done = run_script("sft.py", *flags, "--out", tmp_path / "run", "--lora", "--lora_target", "all-linear")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    model, tokenizer = gen.load(tmp_path / "run", torch.float32)
    ids, _ = tokenizer.encode_chat([{"role": "user", "content": "你好"}], open_reply=True)
    base, _ = gen.load(folder, torch.float32)
    reply = tokenizer.encode("世界")
    mine, before = (float(gen.score(m, [ids + reply])[0][-len(reply) :].sum()) for m in (model, base))
    assert mine < before, "merged with its base, put together"
    done = run_script("lora.py", "merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert checkpoint.read_config(tmp_path / "merged").quantization is None


def test_the_command_reports_perplexity_before_and_after(folders, tmp_path):
    (tmp_path / "a.txt").write_text("我爱白纸，你好世界\n\nthe quick brown fox\n" * 30, "utf-8")
    done = run_script(
        "quantize.py",
        folders["llama-tied"],
        "--out",
        tmp_path / "q",
        "--bits",
        8,
        "--text",
        tmp_path / "a.txt",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "q/quantization.json").read_text())["perplexity"]
    model = checkpoint.load_model(folders["llama-tied"])
    tokenizer = tok.load_tokenizer(folders["llama-tied"])
    ids = [i for text in common.documents([tmp_path / "a.txt"]) for i in tokenizer.encode_document(text)]
    rows = [ids[i : i + 65] for i in range(0, len(ids) - 1, 64)]
    nll = torch.cat([x for row in rows for x in gen.score(model, [row])])
    assert report["before"] == pytest.approx(float(nll.mean().exp()), rel=1e-3)
    assert (
        report["after"] == pytest.approx(report["before"], rel=0.01) and report["after"] != report["before"]
    )
