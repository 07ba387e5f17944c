"""functional_trainer.losses: values by hand, and independence of packing, order and accumulation."""

import pytest
import torch
import torch.nn.functional as F

import models
from functional_trainer import losses, tree
from functional_trainer.step import evaluate, objective, total_weights
from functional_trainer.types import ONE_DEVICE, Output, Unembed
from tests.models import small

F64 = torch.float64
MODEL = small.model()
PARAMS = MODEL.init(0, dtype=F64)


def value(loss, batch, params=PARAMS):
    """Return the objective and its terms, as the step makes them."""
    total, means, _ = objective(MODEL, loss, ONE_DEVICE, params, batch, total_weights(loss, batch), {})
    return total, means


def gradient(loss, batch):
    leaves = tree.map(lambda x: x.detach().requires_grad_(), PARAMS)
    return torch.autograd.grad(value(loss, batch, leaves)[0], tree.leaves(leaves))


def one_row_each(batch):
    """Unpack a batch: one document a row."""
    rows = []
    for r, segments in enumerate(batch["segment_ids"]):
        for s in range(1, int(segments.max()) + 1):
            at = segments == s
            rows.append({k: F.pad(v[r][at], (0, len(segments) - int(at.sum()))) for k, v in batch.items()})
    return {k: torch.stack([row[k] for row in rows]) for k in batch}


def test_sft_by_hand():
    batch = small.batch([[5, 4], [9, 2]])
    batch["weights"][0, 3] = 0.25  # weights need not be 0 or 1
    loss = losses.sft(balance="none")
    columns = {k: batch[k] for k in ("segment_ids", "positions")}
    logp = models.logits(MODEL, PARAMS, batch["tokens"], **columns).log_softmax(-1)
    total = count = 0.0
    for r in range(2):
        for s in range(13):
            w = float(batch["weights"][r, s])
            total, count = total - w * float(logp[r, s, batch["targets"][r, s]]), count + w
    ours, terms = value(loss, batch)
    assert float(ours) == pytest.approx(total / count, rel=1e-12)
    assert set(terms) == {"nll"}


@pytest.mark.parametrize("balance", ["per_sequence", "hf"])
def test_balance_is_added_with_its_coefficient(balance):
    batch = small.batch([[5, 4], [9, 2]])
    plain, (total, terms) = value(losses.sft("none"), batch)[0], value(losses.sft(balance, 0.3), batch)
    torch.testing.assert_close(total, plain + 0.3 * terms["balance"], rtol=1e-12, atol=0)
    aux = MODEL.apply(PARAMS, batch).aux
    if balance == "per_sequence":
        wanted = aux["balance"].mean() / 20
    else:
        f, p = aux["load"].sum(0) / 40, aux["prob"].sum(0) / 40  # 20 tokens in each of 2 layers
        wanted = 5 * (f * p).sum()
    torch.testing.assert_close(terms["balance"], wanted, rtol=1e-12, atol=0)
    assert terms["balance"] > 2 - 1e-9 or balance == "hf"  # top_k at perfect balance


def test_the_hf_form_by_hand():
    load, prob = torch.tensor([[3.0, 1.0], [1.0, 3.0]]), torch.tensor([[1.5, 0.5], [1.0, 1.0]])
    # 2 experts, 4 layer-tokens: f = (1, 1), P = (2.5, 1.5) / 4
    assert float(losses.pooled_balance({"load": load, "prob": prob})) == pytest.approx(2 * (2.5 + 1.5) / 4)


@pytest.mark.parametrize("change", ["unpack", "reverse", "wider", "padding rows"])
def test_sft_does_not_depend_on_the_layout_of_documents(change):
    batch = small.batch([[5, 4, 1], [9, 2], [13]])
    other = {
        "unpack": lambda: one_row_each(batch),
        "reverse": lambda: {k: v.flip(0) for k, v in batch.items()},
        "wider": lambda: {k: F.pad(v, (0, 5)) for k, v in batch.items()},
        "padding rows": lambda: {k: F.pad(v, (0, 0, 1, 2)) for k, v in batch.items()},
    }[change]()
    loss = losses.sft("per_sequence", 0.3)
    torch.testing.assert_close(value(loss, other), value(loss, batch), rtol=1e-10, atol=1e-12)
    for a, b in zip(gradient(loss, other), gradient(loss, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_sums_over_parts_are_the_sums_of_the_whole():
    batch = small.batch([[5, 4, 1], [9, 2], [13]])
    loss = losses.sft("per_sequence")
    whole, _ = evaluate(MODEL, loss, PARAMS, batch, {})
    parts = [evaluate(MODEL, loss, PARAMS, {k: v[i : i + 1] for k, v in batch.items()}, {})[0] for i in range(3)]
    torch.testing.assert_close(whole, {k: sum(p[k] for p in parts) for k in whole}, rtol=1e-12, atol=0)
    weights = [loss.weights({k: v[i : i + 1] for k, v in batch.items()}) for i in range(3)]
    torch.testing.assert_close(loss.weights(batch), {k: sum(w[k] for w in weights) for k in weights[0]})


@pytest.mark.parametrize("balance", ["per_sequence", "hf", "none"])
@pytest.mark.parametrize("empty", ["weights", "rows"])
def test_a_batch_without_trained_tokens_gives_a_finite_zero(balance, empty):
    batch = small.batch([[5, 4], [9, 2]] if empty == "weights" else [[], []])
    batch["weights"].zero_()
    loss = losses.sft(balance, 0.0 if empty == "weights" else 0.3)
    assert float(value(loss, batch)[0]) == 0.0
    assert all(not g.any() for g in gradient(loss, batch))


def test_weights_are_counted_exactly():
    """More tokens than float32 can count, as a long accumulation has."""
    columns = {"weights": torch.ones(1).expand(2**24 + 3), "segment_ids": torch.ones(1).expand(2**24 + 3)}
    weights = losses.sft().weights(columns)
    assert {k: int(v) for k, v in weights.items()} == {"nll": 2**24 + 3, "balance": 2**24 + 3}


def test_reported_sums_are_the_load_without_gradient():
    batch = small.batch([[5, 4]])
    params = tree.map(lambda x: x.detach().requires_grad_(), PARAMS)
    _, reported = evaluate(MODEL, losses.sft(), params, batch, {})
    assert set(reported) == {"load"} and not reported["load"].requires_grad
    assert reported["load"].sum(1).tolist() == [18.0, 18.0]


def test_a_soft_cap_and_a_bias_reach_the_loss():
    batch, gen = small.batch([[5, 4]]), torch.Generator().manual_seed(0)
    hidden, w, bias = (torch.randn(s, generator=gen, dtype=F64) for s in ((1, 13, 4), (23, 4), (23,)))
    sums, _ = losses.sft("none").terms(Output(hidden, {}), Unembed(w, bias, 1.5), batch, ONE_DEVICE)
    z = 1.5 * torch.tanh((hidden @ w.T + bias) / 1.5)
    wanted = F.cross_entropy(z[0], batch["targets"][0], reduction="none") @ batch["weights"][0].double()
    torch.testing.assert_close(sums["nll"], wanted, rtol=1e-12, atol=0)


def test_only_sums_accumulate():
    assert losses.sft("per_sequence").accumulates and losses.sft("none").accumulates
    assert not losses.sft("hf").accumulates
