"""models.layers: routing and its balance against loops, rotary tables against closed forms."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from functional_trainer.types import ONE_DEVICE
from models import layers
from models.layers import Rope
from tests.models import small

F64 = torch.float64


@st.composite
def segment_rows(draw):
    """Draw rows of contiguous segments and padding, padding anywhere between documents."""
    S = draw(st.integers(1, 15))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int] = []
        while len(row) < S:
            segment = draw(st.sampled_from([0, max(row, default=0) + 1]))
            row += [segment] * draw(st.integers(1, 6))
        rows.append(row[:S])
    return torch.tensor(rows)


def documents(segments):
    """List (row, indices) of every run of equal segment ids in a row."""
    for row, ids in enumerate(segments.tolist()):
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or ids[end] != ids[start]:
                yield row, slice(start, end)
                start = end


@given(segment_rows(), st.integers(0, 99))
@settings(max_examples=50)
def test_document_fractions_are_means_over_documents(segments, seed):
    chosen = torch.rand(*segments.shape, 4, generator=torch.Generator().manual_seed(seed), dtype=F64)
    wanted = torch.empty_like(chosen)
    for row, at in documents(segments):
        wanted[row, at] = chosen[row, at].mean(0)
    torch.testing.assert_close(layers.document_fractions(chosen, segments), wanted, rtol=1e-12, atol=1e-12)


def test_document_fractions_of_counts_are_exact_in_float32():
    segments = (torch.arange(6000) // 7 + 1)[None]
    chosen = (torch.rand(1, 6000, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    exact = layers.document_fractions(chosen.double(), segments)
    assert torch.equal(layers.document_fractions(chosen, segments), exact.float())


@given(segment_rows(), st.integers(1, 5), st.booleans(), st.integers(0, 99))
@settings(max_examples=50)
def test_moe_and_its_sums_equal_a_loop(segments, top_k, normalize, seed):
    D, E, hidden = 3, 5, 4
    gen = torch.Generator().manual_seed(seed)
    shapes = {"router": (E, D), "gate_up": (E, 2, hidden, D), "down": (E, D, hidden)}
    p = {k: torch.randn(s, generator=gen, dtype=F64) for k, s in shapes.items()}
    x = torch.randn(*segments.shape, D, generator=gen, dtype=F64)
    y, aux = layers.moe(p, x, {"token_segment_ids": segments}, top_k, normalize, ONE_DEVICE)
    wanted, (load, prob) = torch.zeros_like(x), torch.zeros(2, E, dtype=F64)
    balance = torch.zeros((), dtype=F64)
    for row, at in documents(segments):
        if segments[row, at.start] == 0:
            continue
        f, mean = torch.zeros(E, dtype=F64), torch.zeros(E, dtype=F64)
        for s in range(at.start, at.stop):
            probs = torch.softmax(p["router"] @ x[row, s], 0)
            best = sorted(range(E), key=lambda e: -probs[e])[:top_k]
            share = sum(probs[e] for e in best) if normalize else 1
            for e in best:
                gate, up = p["gate_up"][e] @ x[row, s]
                wanted[row, s] += probs[e] / share * (p["down"][e] @ (torch.nn.functional.silu(gate) * up))
                f[e] += 1
            mean += probs
        length = at.stop - at.start
        load, prob = load + f, prob + mean
        balance += length * E * ((f / length) @ (mean / length))
    for ours, theirs in ((y, wanted), (aux["load"], load), (aux["prob"], prob), (aux["balance"], balance)):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_replayed_routing_replaces_the_choice_and_not_the_weights(normalize):
    gen = torch.Generator().manual_seed(0)
    shapes = {"router": (5, 3), "gate_up": (5, 2, 4, 3), "down": (5, 3, 4)}
    p = {k: torch.randn(s, generator=gen, dtype=F64) for k, s in shapes.items()}
    x, rows = torch.randn(1, 6, 3, generator=gen, dtype=F64), {"token_segment_ids": torch.ones(1, 6, dtype=torch.int64)}
    prob = torch.softmax(x @ p["router"].T, -1)
    own = prob.topk(2, -1).indices
    free = layers.moe(p, x, rows, 2, normalize, ONE_DEVICE)
    torch.testing.assert_close(layers.moe(p, x, rows | {"routed_experts": own}, 2, normalize, ONE_DEVICE), free)
    last = prob.topk(2, -1, largest=False).indices
    y, aux = layers.moe(p, x, rows | {"routed_experts": last}, 2, normalize, ONE_DEVICE)
    share = prob.gather(-1, last)
    share = share / share.sum(-1, keepdim=True) if normalize else share
    wanted = kernels.experts(x[0], share[0], last[0], p["gate_up"], p["down"], 5)[None]
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(aux["load"], torch.bincount(last.flatten(), minlength=5).double())


def test_the_balance_at_perfect_balance_is_top_k_per_token():
    E, top_k = 6, 2
    p = {"router": torch.eye(E, dtype=F64) * 3}
    p |= {"gate_up": torch.zeros(E, 2, 1, E, dtype=F64), "down": torch.zeros(E, E, 1, dtype=F64)}
    x = torch.stack([torch.eye(E, dtype=F64)[i] + torch.eye(E, dtype=F64)[(i + 1) % E] for i in range(E)])[None]
    rows = {"token_segment_ids": torch.ones(1, E, dtype=torch.int64)}
    _, aux = layers.moe(p, x, rows, top_k, True, ONE_DEVICE)
    assert aux["load"].tolist() == [2.0] * E
    torch.testing.assert_close(aux["balance"], torch.tensor(float(top_k * E), dtype=F64), rtol=1e-12, atol=0)


# positions -----------------------------------------------------------------------------------------------------------


def test_default_and_linear_rope():
    positions = torch.tensor([[0, 1, 7, 1000]])
    wanted = [[p / 50 ** (2 * i / 6) for i in range(3)] for p in positions[0].tolist()]
    cos, sin = Rope(50.0).tables(positions, 6, F64)
    angle = torch.tensor(wanted, dtype=F64)[None]
    torch.testing.assert_close((cos, sin), (angle.cos(), angle.sin()), rtol=1e-12, atol=1e-12)
    cos, sin = Rope(50.0, "linear", 2.5).tables(positions, 6, F64)
    torch.testing.assert_close((cos, sin), ((angle / 2.5).cos(), (angle / 2.5).sin()), rtol=1e-12, atol=1e-12)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 400), st.integers(0, 99))
@settings(max_examples=25)
def test_rope_scores_depend_on_distance_alone(i, j, shift, seed):
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(seed), dtype=F64)
    rope = Rope(100.0, "yarn", 4.0, 32, attention_factor=1.2)

    def score(a, b):
        at = [kernels.rope(x, *rope.tables(torch.tensor([[p]]), 8, F64)) for x, p in ((q, a), (k, b))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_pairs_and_slows_slow_ones(truncate):
    """By its paper: pairs above `beta_fast` turns stay, below `beta_slow` are interpolated, a ramp lies between."""
    theta, H, trained, factor = 1e4, 64, 256, 8.0
    rope = Rope(theta, "yarn", factor, trained, 32.0, 1.0, truncate, 1.5)
    plain, ours = (r.frequencies(H, F64, "cpu") for r in (Rope(theta), rope))
    turns = trained * plain / (2 * math.pi)
    ratio = ours / plain
    assert (turns > 40).any() and (turns < 0.5).any()
    torch.testing.assert_close(ratio[turns > 40], torch.ones_like(ratio[turns > 40]), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio[turns < 0.5], torch.full_like(ratio[turns < 0.5], 1 / factor), rtol=1e-12, atol=0)
    assert (ratio.diff() <= 0).all() and ((ratio < 0.99) & (ratio > 1.01 / factor)).sum() >= 5
    cos, sin = rope.tables(torch.tensor([[3]]), H, F64)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, 1.5**2), rtol=1e-12, atol=0)


def test_tables_are_at_least_float32():
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
        assert Rope().tables(torch.tensor([[70000]]), 4, dtype)[0].dtype == wide


# the skeleton --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [small.DENSE, small.MOE], ids=["dense", "moe"])
def test_a_kv_cache_in_pieces_equals_one_pass(raw):
    model = small.model(raw, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    params = model.init(0, dtype=F64)
    columns = {k: v for k, v in small.batch([[12], [12]], 12).items() if k in ("tokens", "segment_ids", "positions")}
    whole = model.apply(params, columns).hidden
    cache, parts, start = model.init_cache(2, 14, params), [], 0
    for n in (5, 1, 4, 2):
        out = model.apply(params, {k: v[:, start : start + n] for k, v in columns.items()}, cache=cache)
        cache, start = out.cache, start + n
        parts.append(out.hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="the KV cache holds 14 tokens per row, 17 are needed"):
        model.apply(params, {k: v[:, :5] for k, v in columns.items()}, cache=cache)


@pytest.mark.parametrize("raw", [small.DENSE, small.MOE], ids=["dense", "moe"])
def test_rows_of_a_kv_cache_each_at_its_own_place_equal_one_pass(raw):
    """What lies beyond a row's place is not seen, and is written over."""
    model = small.model(raw, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    params, place = model.init(0, dtype=F64), torch.tensor([7, 4])
    columns = {k: v for k, v in small.batch([[12], [12]], 12).items() if k in ("tokens", "segment_ids", "positions")}
    whole = model.apply(params, columns).hidden
    junk = columns | {"tokens": torch.where(columns["positions"] < place[:, None], columns["tokens"], 7)}
    cache = model.apply(params, junk, cache=model.init_cache(2, 12, params)).cache
    for step in range(3):
        here = (place + step)[:, None]
        batch = {k: v.gather(1, here) for k, v in columns.items()}
        out = model.apply(params, batch, cache=cache | {"length": place + step})
        expected = whole[torch.arange(2)[:, None], here]
        torch.testing.assert_close(out.hidden, expected, rtol=1e-9, atol=1e-9)
        assert out.cache["length"].tolist() == (place + step + 1).tolist()


def test_sums_of_layers_are_stacked_in_order():
    model, batch = small.model(), small.batch([[5, 4], [9]])
    aux = model.apply(model.init(0), batch).aux
    assert {k: tuple(v.shape) for k, v in aux.items()} == {"load": (2, 5), "prob": (2, 5), "balance": (2,)}
    assert aux["load"].sum(1).tolist() == [36.0, 36.0]
    torch.testing.assert_close(aux["prob"].sum(1), torch.full((2,), 18.0))
    dense = small.model(small.DENSE)
    assert dense.apply(dense.init(0), batch).aux == {}


def test_padding_changes_nothing():
    """Wider rows, junk in padding and rows of padding alone leave every real token and every sum as they were."""
    model = small.model()
    params = model.init(0, dtype=F64)
    batch = small.batch([[5, 4], [9]], width=9)
    wide = {k: torch.nn.functional.pad(v, (0, 3, 0, 1)) for k, v in batch.items()}
    wide["tokens"] = torch.where(wide["segment_ids"] == 0, 7, wide["tokens"])
    a, b = model.apply(params, batch), model.apply(params, wide)
    torch.testing.assert_close(b.hidden[:2, :9], a.hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b.aux, a.aux, rtol=1e-12, atol=1e-12)
