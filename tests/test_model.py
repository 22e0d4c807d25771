"""model.py against transformers and against itself: the same tokens by every road give the same numbers.

Bounds, measured here: fp32 logits of weights N(0, 0.3²) (standard deviation 2.5) differ from transformers' by up to
3e-5 (asked: 1e-4); ours by another road (cache, packing) by up to 1e-5 (asked: 5e-5). bf16 compute against fp32, four
layers of weights N(0, 0.1²), relative L2: logits 1e-2, nll 1.3e-3, gradient 1.4e-2 (asked: twice that).
"""

import copy
import dataclasses
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, tiny_hf

import checkpoint
import kernels
from model import (
    PRESETS,
    KVCache,
    ModelConfig,
    alibi_slopes,
    build,
    document_starts,
    flops_per_token,
    init_weights,
    num_params,
    rope_frequencies,
)

HF, SELF = 1e-4, 5e-5
pytestmark = pytest.mark.usefixtures("one_thread")


def tokens(*shape, seed=0, vocab=99):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def gap(a, b):
    assert a.shape == b.shape and a.isfinite().all()
    return (a.float() - b.float()).abs().max().item()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tiny_folder):
    """(transformers' model, ours loaded from its folder); nobody changes them."""
    hf, folder = tiny_folder(request.param)
    return hf.requires_grad_(False), checkpoint.load_model(folder).requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def ours(request, tiny_folder):
    """A fresh copy of our model, to train or to change."""
    return checkpoint.load_model(tiny_folder(request.param)[1])


def small(family: str = "llama", **changes) -> ModelConfig:
    """A config of about 20,000 parameters; `changes` override its fields."""
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {
        "intermediate_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": family == "bloom",
    }
    shape |= {"llama": {"num_key_value_heads": 2}, "phi": {"partial_rotary_factor": 0.5}}.get(family, {})
    return ModelConfig(**{"family": family, **shape, **changes})


def fresh(config, seed=1, std=0.02):
    model = build(config)
    init_weights(model, seed, std)
    return model


# --- 1. the published shapes ---------------------------------------------------------------------------------

PUBLISHED = {
    "phi-2": 2_779_683_840,
    "xiangxin-3b": 2_779_683_840,
    "phi2-chinese-0.2b": 193_651_200,
    "phi2-chinese-v1": 262_932_992,
    "phi2-chinese-head": 346_327_424,
    "xverse-13b": 13_715_031_040,
    "xverse-13b-2": 13_717_652_480,
    "xuanyuan-6b": 6_394_580_992,
    "llama-2-7b": 6_738_415_616,
    "yayi-7b-llama2": 6_738_456_576,
    "llama-2-13b": 13_015_864_320,
    "yayi-13b-llama2": 13_015_915_520,
    "llama-2-70b": 68_976_648_192,
    "xuanyuan-70b": 69_098_512_384,
    "bloomz-7b1": 7_069_016_064,
    "yayi-7b": 7_068_213_248,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    assert num_params(PRESETS[name]) == PUBLISHED[name]


def test_every_preset_but_the_laptop_ones_is_a_published_model():
    assert set(PRESETS) - set(PUBLISHED) == {"tiny", "demo", "small"}


def test_phi_2_rotates_32_of_80_dimensions():
    config = PRESETS["phi-2"]
    assert (config.head_dim, config.rotary_dim) == (80, 32)
    freq = rope_frequencies(config, "cpu")
    assert freq.dtype == torch.float32 and len(freq) == 16
    want = torch.tensor([10000.0 ** (-2 * i / 32) for i in range(16)])  # over 32, not over 80
    torch.testing.assert_close(freq, want, rtol=1e-6, atol=0)


def test_kv_cache_of_xverse_13b_takes_819200_bytes_a_token():
    cache = KVCache(PRESETS["xverse-13b"], batch=2, size=16, dtype=torch.bfloat16, device="meta")
    assert (cache.k.nbytes + cache.v.nbytes) / (2 * 16) == 819_200


def test_kv_cache_holds_kv_heads_only():
    config = PRESETS["llama-2-70b"]
    assert KVCache(config, 1, 8, torch.bfloat16, "meta").k.shape == (80, 1, 8, 8, 128)


def test_build_on_meta_takes_no_memory():
    model = build(PRESETS["llama-2-70b"], "meta")
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())


def test_build_does_not_share_the_presets_config():
    before = dataclasses.replace(PRESETS["phi-2"])
    build(PRESETS["phi-2"], "meta").config.dropout = 0.5
    assert PRESETS["phi-2"] == before


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_flops_per_token_counts_the_matrix_products(family):
    from torch.utils.flop_counter import FlopCounterMode

    model, T = fresh(small(family)), 16
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, T, vocab=61))
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if str(op) in ("aten.mm", "aten.addmm"))
    c = model.config
    attention = 12 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * T / 2
    ignored = 6 * (sum(p.numel() for n, p in model.named_parameters() if p.dim() == 1))  # norms and biases
    assert flops_per_token(c, T) == pytest.approx(3 * products / T + attention + ignored)
    assert ignored < 0.05 * flops_per_token(c, T)


BAD = [
    ("gpt2", {}, "family must be"),
    ("llama", {"head": "lmm"}, "head must be"),
    ("llama", {"num_key_value_heads": 3}, "multiple of kv heads"),
    ("llama", {"partial_rotary_factor": 0.5}, "only Phi"),
    ("llama", {"head_dim": 7}, "rotate 7"),
    ("phi", {"head_dim": 16}, "head_dim"),
    ("phi", {"hidden_size": 33}, "head_dim"),
    ("phi", {"partial_rotary_factor": 0.4}, "rotate 3"),
    ("phi", {"partial_rotary_factor": 0.1}, "rotate 0"),
    ("bloom", {"num_key_value_heads": 2}, "grouped"),
    ("bloom", {"tie_word_embeddings": False}, "tied"),
    ("bloom", {"intermediate_size": 96}, "4 x"),
    ("bloom", {"dropout": 1.0}, "dropout"),
    ("phi", {"dropout": -0.1}, "dropout"),
]


@pytest.mark.parametrize("family, changes, words", BAD, ids=[f"{f} {w}" for f, _, w in BAD])
def test_a_shape_that_no_family_holds_is_refused(family, changes, words):
    with pytest.raises(ValueError, match=words):
        small(family, **changes)


# --- 2. logits equal transformers' ---------------------------------------------------------------------------


def test_logits_equal_transformers(pair):
    hf, model = pair
    ids = tokens(3, 40)
    want = hf(ids).logits
    assert want.std() > 1  # weights large enough to show a mistake
    assert gap(model(ids), want) < HF


def test_every_parameter_changes_the_logits(pair):
    """So that agreement with transformers says something about each of them."""
    hf, model = copy.deepcopy(pair)
    ids = tokens(2, 24)
    before = model(ids)
    for name, p in model.named_parameters():
        if name.endswith("k_proj.bias") and not model.config.switches.rope:
            continue
        saved = p.clone()
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
        assert gap(model(ids), before) > 1e-2, name
        p.copy_(saved)


def test_one_token_at_a_time_equals_transformers(pair):
    hf, model = pair
    ids = tokens(2, 21)
    cache = KVCache(model.config, 2, 30, torch.float32)
    steps = [model(ids[:, i : i + 1], cache=cache) for i in range(21)]
    assert cache.lengths.tolist() == [21, 21]
    assert gap(torch.cat(steps, 1), hf(ids).logits) < HF


@pytest.mark.parametrize("pieces", [[21], [13, 8], [9, 12], [1, 20], [3, 9, 9], [12, 1, 8], [8, 8, 5]])
@pytest.mark.parametrize("rows", [1, 3])
def test_chunked_prefill_equals_transformers(pair, pieces, rows):
    hf, model = pair
    ids = tokens(rows, 21)
    cache = KVCache(model.config, rows, 21, torch.float32)  # exactly full at the end
    out = [model(piece, cache=cache) for piece in ids.split(pieces, 1)]
    assert gap(torch.cat(out, 1), hf(ids).logits) < HF


def ragged(rows):
    """Pad lists of tokens on the right with rubbish; return ids and their real counts."""
    T = max(map(len, rows))
    return torch.stack([torch.cat([r, torch.full((T - len(r),), 77)]) for r in rows]), torch.tensor(
        [len(r) for r in rows]
    )


@pytest.mark.parametrize("lengths", [[5, 12, 1, 9], [3, 1, 2], [20, 1], [4]])
def test_ragged_rows_equal_each_row_alone(pair, lengths):
    """A right-padded prefill, then decode steps, then a second ragged piece, all in one batch."""
    hf, model = pair
    more, second = 3, [2 + 5 * (i % 3) for i in range(len(lengths))]
    rows = [tokens(n + more + s, seed=i) for i, (n, s) in enumerate(zip(lengths, second))]
    want = [hf(r[None]).logits[0] for r in rows]
    cache = KVCache(model.config, len(rows), 60, torch.float32)
    ids, num_new = ragged([r[:n] for r, n in zip(rows, lengths)])
    logits = model(ids, cache=cache, num_new=num_new, last=True)
    assert logits.shape == (len(rows), 99) and cache.lengths.tolist() == lengths
    for b, n in enumerate(lengths):
        assert gap(logits[b], want[b][n - 1]) < HF
    for step in range(more):
        ids = torch.stack([r[n + step : n + step + 1] for r, n in zip(rows, lengths)])
        logits = model(ids, cache=cache)
        for b, n in enumerate(lengths):
            assert gap(logits[b, 0], want[b][n + step]) < HF
    ids, num_new = ragged([r[n + more :] for r, n in zip(rows, lengths)])
    logits = model(ids, cache=cache, num_new=num_new, last=True)
    for b in range(len(rows)):
        assert gap(logits[b], want[b][-1]) < HF
    assert cache.lengths.tolist() == [len(r) for r in rows]


def test_a_piece_whose_padding_does_not_fit_the_cache_is_refused(pair):
    """Row 0 is nearly full and takes 1 token, row 1 takes 6: the padding of row 0 would lie beyond the cache."""
    _, model = pair
    long, short = tokens(12), tokens(8, seed=1)
    cache = KVCache(model.config, 2, 12, torch.float32)
    ids, num_new = ragged([long[:11], short[:2]])
    model(ids, cache=cache, num_new=num_new)
    ids, num_new = ragged([long[11:], short[2:]])
    with pytest.raises(ValueError, match="padding included, do not fit a cache of 12"):
        model(ids, cache=cache, num_new=num_new, last=True)


def test_a_row_without_new_tokens_stays_as_it_was(pair):
    _, model = pair
    ids = tokens(2, 9)
    cache = KVCache(model.config, 2, 20, torch.float32)
    model(ids[:, :5], cache=cache)
    model(ids[:, 5:8], cache=cache, num_new=torch.tensor([0, 3]), last=True)
    assert cache.lengths.tolist() == [5, 8]
    got = model(torch.stack([ids[0, 5:6], ids[1, 8:9]]), cache=cache)
    assert gap(got[0, 0], model(ids)[0, 5]) < SELF and gap(got[1, 0], model(ids)[1, 8]) < SELF


def test_last_equals_the_last_position_of_all(pair):
    _, model = pair
    ids = tokens(3, 10)
    full = model(ids)
    assert gap(model(ids, last=True), full[:, -1]) < SELF
    num_new = torch.tensor([10, 4, 1])
    assert gap(model(ids, num_new=num_new, last=True), full[torch.arange(3), num_new - 1]) < SELF


# --- 3. the cache is only memory -----------------------------------------------------------------------------


def test_rollback_is_an_assignment_to_lengths(pair):
    _, model = pair
    a, b = tokens(2, 20), tokens(2, 20, seed=1)
    cache = KVCache(model.config, 2, 32, torch.float32)
    model(a, cache=cache)
    cache.lengths = torch.tensor([6, 11])  # what lies beyond is never read
    got = model(b[:, :9], cache=cache)
    for row, keep in enumerate((6, 11)):
        whole = torch.cat([a[row, :keep], b[row, :9]])[None]
        assert gap(got[row], model(whole)[0, keep:]) < SELF
    cache.lengths[:] = 0
    assert gap(model(b, cache=cache), model(b)) < SELF


def test_row_replacement_and_prefix_reuse_are_row_copies(pair):
    _, model = pair
    a, b = tokens(3, 10), tokens(1, 15, seed=1)
    cache, single = (KVCache(model.config, n, 32, torch.float32) for n in (3, 1))
    model(a, cache=cache)
    model(b, cache=single)
    cache.k[:, 1], cache.v[:, 1], cache.lengths[1] = single.k[:, 0], single.v[:, 0], 15
    cache.k[:, 2], cache.v[:, 2], cache.lengths[2] = single.k[:, 0], single.v[:, 0], 4  # a prefix of it
    new = tokens(3, 2, seed=2)
    got = model(new, cache=cache)
    for row, before in enumerate((a[0], b[0], b[0, :4])):
        whole = torch.cat([before, new[row]])[None]
        assert gap(got[row], model(whole)[0, -2:]) < SELF


def test_the_cache_follows_the_compute_dtype(ours):
    ours.compute_dtype = torch.bfloat16
    cache = KVCache(ours.config, 2, 16, torch.bfloat16)
    with torch.no_grad():
        ours(tokens(2, 10), cache=cache)
        logits = ours(tokens(2, 1), cache=cache)
    assert logits.dtype == cache.k.dtype == torch.bfloat16
    written = cache.k.abs().amax(-1).amin((0, 1, 2)) > 0  # (S,)
    assert written.tolist() == [True] * 11 + [False] * 5


# --- 4. packed rows ------------------------------------------------------------------------------------------


def pack(docs):
    """One row of documents, the targets shifted inside each and −100 on its last token."""
    ids = torch.cat(docs)[None]
    targets = torch.cat([torch.cat([d[1:], torch.tensor([-100])]) for d in docs])[None]
    doc_ids = torch.cat([torch.full((len(d),), i + 5) for i, d in enumerate(docs)])[None]
    return ids, targets, doc_ids


DOCS = [tokens(n, seed=n) for n in (7, 1, 12, 2)]


def test_packed_row_equals_separate_rows(pair):
    hf, model = pair
    ids, targets, doc_ids = pack(DOCS)
    alone = [pack([d]) for d in DOCS]
    logits, nll = model(ids, doc_ids=doc_ids), model(ids, targets, doc_ids)
    assert gap(logits, torch.cat([model(i) for i, _, _ in alone], 1)) < SELF
    assert gap(logits, torch.cat([hf(i).logits for i, _, _ in alone], 1)) < HF
    assert gap(nll, torch.cat([model(i, t) for i, t, _ in alone], 1)) < SELF
    assert gap(logits, model(ids)) > 0.1  # without doc_ids the documents do see one another


def test_packed_row_has_the_gradients_of_separate_rows(ours):
    ids, targets, doc_ids = pack(DOCS)
    ours(ids, targets, doc_ids).sum().backward()
    packed = {n: p.grad.clone() for n, p in ours.named_parameters()}
    ours.zero_grad()
    for d in DOCS:
        i, t, _ = pack([d])
        ours(i, t).sum().backward()
    for name, p in ours.named_parameters():
        assert (packed[name] - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-6, name


def test_rows_packed_differently_in_one_batch_do_not_mix(pair):
    _, model = pair
    a, b = [DOCS[0], DOCS[2]], [DOCS[2], DOCS[0]]
    packed = [pack(x) for x in (a, b)]
    ids, targets, doc_ids = (torch.cat([p[i] for p in packed]) for i in range(3))
    nll = model(ids, targets, doc_ids)
    for row, p in enumerate(packed):
        assert gap(nll[row : row + 1], model(*p)) < SELF


def test_document_starts_finds_where_each_document_begins():
    doc_ids = torch.tensor([[7, 7, 9, 7, 7], [0, 1, 2, 2, 2], [3, 3, 3, 3, 3]])
    assert document_starts(doc_ids).tolist() == [[0, 0, 2, 3, 3], [0, 1, 2, 2, 2], [0, 0, 0, 0, 0]]


# --- 5. the loss ---------------------------------------------------------------------------------------------


def test_nll_equals_the_loss_of_transformers(pair):
    hf, model = pair
    ids = tokens(3, 30)
    labels = ids.clone()
    labels[0, :7], labels[1, 20:], labels[2, 5:9] = -100, -100, -100
    targets = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1)
    nll = model(ids, targets)
    assert nll.dtype == torch.float32 and nll.shape == (3, 30) and (nll[targets == -100] == 0).all()
    assert abs(nll.sum() / (targets != -100).sum() - hf(ids, labels=labels).loss) < 1e-5
    each = F.cross_entropy(hf(ids).logits.mT, targets, reduction="none")
    assert gap(nll, each) < HF


def test_lse_is_the_normaliser_of_the_logits(pair):
    _, model = pair
    ids, targets = tokens(2, 12), tokens(2, 12, seed=1)
    targets[0, 3] = -100
    nll, lse = model(ids, targets, lse=True)
    assert torch.equal(nll, model(ids, targets))
    assert lse.dtype == torch.float32 and gap(lse, model(ids).logsumexp(-1) * (targets != -100)) < SELF


def test_nll_does_not_see_right_padding(pair):
    _, model = pair
    ids, targets = tokens(2, 12), tokens(2, 12, seed=1)
    padded = torch.cat([ids, torch.zeros(2, 9, dtype=torch.long)], 1)
    nll = model(padded, torch.cat([targets, torch.full((2, 9), -100)], 1))
    assert gap(nll[:, :12], model(ids, targets)) < SELF and (nll[:, 12:] == 0).all()


def test_gradients_equal_transformers(ours, request):
    family = request.node.callspec.params["ours"]
    hf, ids = tiny_hf(family), tokens(2, 20)
    hf(ids, labels=ids).loss.backward()
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    (ours(ids, targets).sum() / 38).backward()
    theirs = dict(hf.named_parameters())
    for name, p in ours.named_parameters():
        want = theirs[checkpoint.hf_name(name, ours.config.family)].grad
        assert (p.grad - want).norm() <= 1e-4 * want.norm() + 1e-6, name


# --- 6. positions --------------------------------------------------------------------------------------------


def test_partial_rotary_of_04_and_05_differ(tiny_folder):
    """The default of PhiConfig is 0.5, phi-2 says 0.4: no shape tells them apart."""
    model = checkpoint.load_model(tiny_folder("phi")[1])
    assert model.config.rotary_dim == 6
    other = build(dataclasses.replace(model.config, partial_rotary_factor=0.5))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert gap(model(tokens(1, 20)), other.eval()(tokens(1, 20))) > 0.1


@pytest.mark.parametrize("heads", [*range(1, 17), 20, 32])
def test_alibi_slopes_equal_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # (heads, 1, S): slope · position
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), alibi[:, 0, 1], rtol=1e-6, atol=0)


def test_rope_refuses_the_first_token_beyond_the_context():
    model = fresh(small(max_position_embeddings=2048, num_hidden_layers=1)).eval()
    with torch.no_grad():
        model(tokens(1, 2048, vocab=61), last=True)
        with pytest.raises(ValueError, match="2049.*2048"):
            model(tokens(1, 2049, vocab=61), last=True)
    with pytest.raises(ValueError, match="2049.*2048"):
        KVCache(model.config, 1, 2049, torch.float32)


def test_phi_2_refuses_2049_tokens():
    model = build(PRESETS["phi-2"], "meta")
    ids = torch.empty(1, 2049, dtype=torch.long, device="meta")
    with pytest.raises(ValueError, match="2049.*2048"):
        model(ids, ids)
    assert model(ids[:, :2048], last=True).shape == (1, 51200)


def test_bloom_goes_beyond_its_context_with_a_warning(tiny_folder):
    hf, folder = tiny_folder("bloom")
    model, ids = checkpoint.load_model(folder), tokens(1, 150)  # the context is 128
    with torch.no_grad(), pytest.warns(UserWarning, match="150.*128"):
        logits = model(ids)
        assert gap(logits, hf(ids).logits) < HF
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(ids[:, :128])


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_packed_row_may_exceed_the_context_where_no_document_does(family):
    """Documents of 5 in a row of 100; then the empty end of a row, which is no document and may be any length."""
    model = fresh(small(family))
    ids, doc_ids = tokens(1, 100, vocab=61), torch.arange(100)[None] // 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = model(ids, doc_ids=doc_ids)
        alone = torch.cat([model(ids[:, i : i + 5]) for i in range(0, 100, 5)], 1)
        assert gap(logits, alone) < SELF
        model(ids, doc_ids=torch.full_like(ids, -1))


def test_a_document_longer_than_the_context_is_refused_in_a_packed_row():
    """64 tokens are the context: a document of 64 passes, of 65 does not, wherever it stands in the row."""
    model = fresh(small("llama"))
    ids, doc_ids = tokens(2, 80, vocab=61), torch.zeros(2, 80, dtype=torch.long)
    doc_ids[:, :8], doc_ids[0, 72:], doc_ids[1, 72:] = 7, -1, 9
    model(ids, doc_ids=doc_ids)
    doc_ids[1, 72] = 0
    with pytest.raises(ValueError, match="65 tokens exceed the model's context of 64"):
        model(ids, doc_ids=doc_ids)
    with pytest.raises(ValueError, match="80 tokens"):
        model(ids)


# --- 7. heads, dropout, dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_score_head_gives_one_fp32_number_per_token(family):
    model = fresh(small(family, head="score", tie_word_embeddings=False)).eval()
    assert model.score.weight.shape == (1, 32) and model.score.bias is None and not hasattr(model, "lm_head")
    model.compute_dtype = torch.bfloat16
    ids = tokens(2, 9, vocab=61)
    out = model(ids)
    assert out.shape == (2, 9, 1) and out.dtype == torch.float32
    assert model(ids, num_new=torch.tensor([9, 4]), last=True).shape == (2, 1)


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_score_is_a_linear_map_of_the_hidden_states(family):
    score = fresh(small(family, head="score"), std=0.3).eval()
    hidden = build(small(family, head="none")).eval()
    hidden.load_state_dict({n: t for n, t in score.state_dict().items() if not n.startswith("score")})
    ids = tokens(2, 9, vocab=61)
    x = hidden(ids)
    assert x.shape == (2, 9, 32) and hidden(ids, last=True).shape == (2, 32)
    assert gap(score(ids), x @ score.score.weight.T) < SELF
    cache = KVCache(score.config, 2, 16, torch.float32)
    score(ids[:, :5], cache=cache)
    assert gap(score(ids[:, 5:], cache=cache), score(ids)[:, 5:]) < SELF


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_dropout_acts_in_training_only(family):
    model = fresh(small(family, dropout=0.5), std=0.2)
    ids = tokens(2, 9, vocab=61)
    assert gap(model(ids), model(ids)) > 1e-2
    torch.manual_seed(3)
    first = model(ids)
    torch.manual_seed(3)
    assert torch.equal(first, model(ids))
    plain = build(small(family))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids), plain(ids))
    assert torch.equal(plain(ids), plain.eval()(ids))


def test_bf16_compute_over_fp32_masters(ours):
    ids, targets = tokens(2, 24), tokens(2, 24, seed=1)
    ours.compute_dtype = torch.bfloat16
    assert ours(ids).dtype == torch.bfloat16
    nll, lse = ours(ids, targets, lse=True)
    assert nll.dtype == lse.dtype == torch.float32
    nll.sum().backward()
    for name, p in ours.named_parameters():
        assert p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), name


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_bf16_compute_is_close_to_fp32(family):
    model = fresh(small(family, num_hidden_layers=4), std=0.1)
    ids = tokens(4, 60, vocab=61)
    targets = tokens(4, 60, seed=1, vocab=61)
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        model.zero_grad()
        nll = model(ids, targets)
        nll.sum().backward()
        outputs.append(
            (model(ids).double(), nll.double(), torch.cat([p.grad.flatten() for p in model.parameters()]))
        )
    for name, a, b, bound in zip(("logits", "nll", "gradient"), *outputs, (2e-2, 3e-3, 3e-2)):
        assert (a - b).norm() < bound * a.norm(), (name, ((a - b).norm() / a.norm()).item())


def test_bf16_weights_equal_bf16_compute_over_the_same_masters(ours):
    """Inference holds bf16 weights, training casts fp32 masters at use: the same arithmetic."""
    ids = tokens(2, 20)
    with torch.no_grad():
        low = copy.deepcopy(ours).to(torch.bfloat16)
        ours.compute_dtype = torch.bfloat16
        assert torch.equal(low(ids), ours(ids))


@pytest.mark.parametrize("road", ["weights", "compute_dtype", "cache"])
def test_a_bf16_model_turns_by_fp32_angles(road, monkeypatch):
    """bf16 angles would make one of positions 1,000 and 1,001 (XuanYuan-70B's report)."""
    model, tables, rope = fresh(small(max_position_embeddings=2048)), [], kernels.rope_pair
    monkeypatch.setattr(kernels, "rope_pair", lambda q, k, *t: tables.append(t) or rope(q, k, *t))
    cache = None
    if road == "compute_dtype":
        model.compute_dtype = torch.bfloat16
    else:
        model = model.to(torch.bfloat16)
    if road == "cache":
        cache = KVCache(model.config, 1, 2048, torch.bfloat16)
    with torch.no_grad():
        model(tokens(1, 2048, vocab=61), cache=cache, last=True)
    for cos, sin in tables:
        assert cos.dtype == sin.dtype == torch.float32
        assert len(torch.stack([cos[0, 0, :, 0], sin[0, 0, :, 0]], 1).unique(dim=0)) == 2048
    assert len(tables) == model.config.num_hidden_layers


# --- 8. initial weights and learning -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_init_weights_is_bitwise_reproducible_and_follows_the_seed(family):
    a, b, c = (fresh(small(family), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert all(not torch.equal(a[n], c[n]) for n in a if a[n].dim() == 2)


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_init_weights_draws_the_published_scales(family):
    model = fresh(
        small(family, hidden_size=128, num_attention_heads=4, intermediate_size=512, vocab_size=500)
    )
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            want = 0.02 / 2 if residual else 0.02  # sqrt(2 L) = 2
            assert p.std().item() == pytest.approx(want, rel=0.03), name
            assert abs(p.mean().item()) < 4 * want / p.numel() ** 0.5, name


def test_init_weights_of_a_name_does_not_depend_on_other_parameters():
    """A parameter's values come from seed and name: neither the number of layers nor another head changes them."""
    a = fresh(small("phi")).state_dict()
    b = fresh(small("phi", num_hidden_layers=3)).state_dict()
    c = fresh(small("phi", head="score")).state_dict()
    for name in a:
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # their scale says 1/sqrt(2 L)
            torch.testing.assert_close(a[name] * 2**0.5, b[name] * 3**0.5, rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(a[name], b[name]), name
        assert name.startswith("lm_head") or torch.equal(a[name], c[name]), name
    matrices = [t.flatten()[:16] for n, t in a.items() if t.dim() == 2]
    assert len(torch.stack(matrices).unique(dim=0)) == len(matrices)  # no two names draw the same numbers


def test_init_weights_of_a_bf16_model_are_the_rounded_fp32_values():
    low = build(small()).to(torch.bfloat16)
    init_weights(low, 1)
    for (name, p), q in zip(low.named_parameters(), fresh(small(), std=None).parameters()):
        assert p.dtype == torch.bfloat16 and torch.equal(p, q.bfloat16()), name


def test_init_weights_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    fresh(small())
    assert torch.equal(torch.rand(3), want)


def test_a_tied_head_is_one_tensor_also_after_a_deep_copy():
    model = fresh(small(tie_word_embeddings=True))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert sum(n.endswith("lm_head.weight") for n, _ in model.named_parameters()) == 0
    twin = copy.deepcopy(model)
    assert twin.lm_head.weight is twin.embed_tokens.weight
    assert twin.lm_head.weight is not model.lm_head.weight


TEXT = """白日依山尽，黄河入海流。欲穷千里目，更上一层楼。床前明月光，疑是地上霜。举头望明月，低头思故乡。
春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。
红豆生南国，春来发几枝。愿君多采撷，此物最相思。松下问童子，言师采药去。只在此山中，云深不知处。"""


def learn(model, steps, seed=1, T=48, B=6, lr=2e-3):
    """Train on random windows of the fixed Chinese text, as bytes; return the curve of mean losses."""
    data = torch.tensor(list(TEXT.encode()))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    curve = []
    for _ in range(steps):
        at = torch.randint(len(data) - T - 1, (B, 1), generator=generator) + torch.arange(T)
        loss = model(data[at], data[at + 1]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(loss.item())
    return curve


def test_a_small_phi_learns_chinese_and_the_same_seed_gives_the_same_curve():
    config = ModelConfig("phi", 256, 128, 4, 4, 512, 64, partial_rotary_factor=0.5)
    assert 0.8e6 < num_params(config) < 1.2e6
    first = learn(fresh(config), 60)
    again = learn(fresh(config), 20)
    assert sum(first[-5:]) / 5 < 0.5 * first[0]
    assert first[:20] == again  # bit for bit
    assert learn(fresh(config, seed=2), 2) != first[:2]


@pytest.mark.parametrize("family", ["llama", "phi", "bloom"])
def test_a_deep_copied_one_layer_model_learns_as_the_original_would(family):
    model = fresh(small(family, num_hidden_layers=1, vocab_size=256))
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    curve = learn(twin, 25, lr=1e-2)
    assert sum(curve[-5:]) / 5 < 0.75 * curve[0]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert learn(model, 25, lr=1e-2) == curve
