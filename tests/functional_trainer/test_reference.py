"""functional_trainer.reference: live and kept log-probabilities are the same, and those of the weights at the start."""

import pytest
import torch

from functional_trainer import init_state, make_train_step, optimizers, tree
from functional_trainer.data import Loader
from functional_trainer.loop import eval_losses
from functional_trainer.preference import MPO, preference, running_mean
from functional_trainer.reference import Reference, checksum
from functional_trainer.types import ONE_DEVICE
from tests.functional_trainer.test_data_preferences import couples, pairs, record
from tests.models import small

CPU, F64 = torch.device("cpu"), torch.float64
STORES = {"pairs": (pairs, MPO), "answers": (couples, {"kto": 1.0})}


def loader(form="pairs", rows=2, **options) -> Loader:
    """Nine prompts of random ids with answers of random lengths."""
    gen = torch.Generator().manual_seed(0)
    draw = lambda low, high, count: torch.randint(low, high, (count,), generator=gen).tolist()  # noqa: E731
    sizes = [draw(1, 5, 3) for _ in range(9)]
    ids = {r: draw(0, 23, 12) for r in range(18)}

    def encode(r):
        (one,) = r.messages
        length = one["prompt"] + one["answer"] + 1
        whole = [*ids[one["at"]][: one["prompt"] + 1], *ids[9 + one["side"]]][:length]
        return whole, [False] * (one["prompt"] + 1) + [True] * one["answer"]

    both = [record([(p, a), (p, b)], at) for at, (p, a, b) in enumerate(sizes)]
    return Loader(STORES[form][0](both, encode), rows=rows, seq_len=40, overlong="drop", **options)


def by_hand(model, params, batch):
    """Return log-probabilities of trained targets from all logits."""
    output = model.apply(params, batch, ONE_DEVICE, {})
    logits = output.hidden @ model.unembed(params).weight.T
    logp = logits.log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    return torch.where(batch["weights"] != 0, logp, 0)


@pytest.mark.parametrize("form", STORES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_live_and_kept_numbers_are_those_of_the_start_weights(form, dtype, tmp_path):
    model = small.model(dtype=dtype)
    params = model.init(0, dtype=dtype)
    reference = Reference.of(model, params)
    begun = tree.map(torch.clone, params)
    live, kept, said = loader(form, epochs=1, seed=3), loader(form, epochs=1, seed=3), []
    reference.keep(params, [kept], tmp_path, CPU, said.append)
    tree.map(lambda p: p.add_(1), params)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == F64 else {"rtol": 1e-5, "atol": 1e-5}
    count = 0
    for batch, stored in zip(live, kept, strict=True):
        now = reference(batch)
        assert stored["ref_logprobs"].dtype == now["ref_logprobs"].dtype == dtype
        assert {k: v for k, v in stored.items() if k != "ref_logprobs"}.keys() == batch.keys()
        torch.testing.assert_close(now["ref_logprobs"], stored["ref_logprobs"], **tolerance)
        torch.testing.assert_close(now["ref_logprobs"], by_hand(model, begun, batch), **tolerance)
        count += int((now["ref_logprobs"] != 0).sum())
    assert count == live.stats["seen_trained_tokens"] >= 50
    (line,) = said
    assert f"{len(live.stream.documents)} documents by the reference: kept in {tmp_path}/reference-" in line


def test_what_is_kept_is_found_by_content_and_weights(tmp_path):
    model = small.model()
    first, second = model.init(0), model.init(1)
    said: list[str] = []

    def keep(params, **options):
        data = loader(epochs=1, **options)
        Reference.of(model, params).keep(params, [data], tmp_path, CPU, said.append)
        return next(data)

    one = keep(first)
    assert torch.equal(keep(first, seed=0, packing="best_fit")["ref_logprobs"], one["ref_logprobs"])
    assert "found in" in said[1]
    other = keep(second)
    assert "kept in" in said[2] and not torch.allclose(other["ref_logprobs"], one["ref_logprobs"])
    assert len(list(tmp_path.glob("reference-*.npy"))) == 2
    assert checksum(first, ONE_DEVICE) == checksum(model.init(0), ONE_DEVICE) != checksum(second, ONE_DEVICE)


@pytest.mark.slow
def test_workers_bring_what_is_kept(tmp_path):
    model = small.model()
    params = model.init(0)
    alone, worked = loader(epochs=1), loader(epochs=1, workers=1)
    Reference.of(model, params).keep(params, [alone, worked], tmp_path, CPU, lambda text: None)
    for a, b in zip(alone, worked, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    worked.close()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    model = small.model()
    params = model.init(0)
    with pytest.raises(OSError, match="cannot write the token cache .*file/x: Not a directory.*--data.cache"):
        Reference.of(model, params).keep(params, [loader()], tmp_path / "file" / "x", CPU)


@pytest.mark.parametrize("form", STORES)
def test_a_step_and_an_evaluation_run_a_live_reference_first(form, tmp_path):
    model, loss = small.model(dtype=F64), preference(STORES[form][1], balance=0.1)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0))
    found = []
    for live in (True, False):
        params, data, held_out = model.init(0, dtype=F64), loader(form, seed=1), loader(form, epochs=1, shuffle=False)
        reference = Reference.of(model, params)
        step, measured = make_train_step(model, loss, optimizer), loss
        if live:
            step, measured = reference.before(step), reference.within(loss)
        else:
            reference.keep(params, [data, held_out], tmp_path, CPU, lambda text: None)
        state = init_state(params, optimizer, running_mean())
        metrics = []
        for _ in range(3):
            state, row = step(state, next(data))
            metrics.append({k: v.clone() for k, v in row.items()})
        metrics[0].pop("rewards/accuracies", None)  # policy and reference differ by rounding
        evaluated, _ = eval_losses(model, measured, state.params, {"h": held_out}, state.buffers, ONE_DEVICE, CPU)
        found.append((metrics, evaluated, tree.flatten(state)))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    first = found[0][0][0]
    assert float(first["rewards/chosen"]) == pytest.approx(0, abs=1e-9), "policy and reference begin alike"
    assert abs(float(found[0][0][2]["rewards/chosen"])) > 1e-4


@pytest.mark.parametrize("name", ["dpo", "ipo", "bco", "kto", "mpo"])
def test_packing_and_accumulation_do_not_change_the_loss(name, tmp_path):
    """All of the data in one batch, in other rows and micro-batches."""
    terms = MPO if name == "mpo" else {name: 1.0}
    form = "answers" if name == "kto" else "pairs"
    model, loss = small.model(dtype=F64), preference(terms, balance=0.1)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 10, 0))
    how = [(2, "none", 1), (4, "first_fit", 1), (6, "best_fit", 1)] + [(6, "first_fit", 3)] * (name != "kto")
    found = []
    for rows, packing, parts in how:
        params = model.init(0, dtype=F64)
        (batch,) = loader(form, rows=18 if packing == "none" else rows * 2, epochs=1, packing=packing)
        reference = Reference.of(model, model.init(1, dtype=F64), micro_batches=parts)
        step = reference.before(make_train_step(model, loss, optimizer, micro_batches=parts))
        state, metrics = step(init_state(params, optimizer, running_mean()), batch)
        metrics = {k: v for k, v in metrics.items() if k != "load"}
        found.append(tree.map(torch.clone, (metrics, tree.flatten(state))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_a_compiled_reference_says_the_same():
    model = small.model(num_hidden_layers=1, dtype=F64)
    params = model.init(0, dtype=F64)
    batch = next(loader())
    plain, compiled = (Reference.of(model, params, compile=form)(batch) for form in ("off", "layer"))
    torch.testing.assert_close(plain, compiled, rtol=1e-9, atol=1e-9)
