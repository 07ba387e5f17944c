"""functional_trainer.remat: budgets of recomputation, and what is sent to host memory."""

import gc
from dataclasses import replace

import pytest
import torch

from experiments.benchmarks.live_bytes import LiveBytes
from functional_trainer import backend, init_state, losses, make_train_step, optimizers, remat, tree
from functional_trainer.options import RunOptions
from functional_trainer.step import evaluate
from tests.models import small

LOSS = losses.sft("per_sequence", 0.1)
BUDGETS = ("budget:1", "budget:0.5", "budget:0.2", "budget:0")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(offload=(), steps=2, **options):
    """Train a model of one MoE and one dense layer; return all of the state, and the losses."""
    model = small.model(num_hidden_layers=3)
    optimizer = optimizers.adamw(optimizers.schedule("cosine", 1e-2, 10, warmup=2))
    state = init_state(model.init(0), optimizer, offload="optimizer" in offload)
    step = make_train_step(model, LOSS, optimizer, **{"backend": "aot_eager", "offload": offload} | options)
    seen = []
    for i in range(steps):
        state, metrics = step(state, small.batch([[13], [3, 2]], seed=i))
        seen.append(metrics["loss"].item())
    return tree.flatten(state), seen


def saved(how: str) -> int:
    """Return the bytes that compiled layers hand to autograd, without the weights' and the batch's."""
    model = small.model(num_hidden_layers=2, mlp_only_layers=[])
    batch = small.batch([[13], [8, 5]])
    leaves = tree.map(lambda p: p.requires_grad_(), model.init(0))
    model = remat.wrap_layer(model, compile=True, remat=how, backend="aot_eager")
    given = {x.untyped_storage().data_ptr() for x in tree.leaves((leaves, batch))}
    found: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        found[x.untyped_storage().data_ptr()] = x
        return x

    with remat.budgeted(how), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        evaluate(model, losses.sft(), leaves, batch, {})
    return sum(x.untyped_storage().nbytes() for at, x in found.items() if at not in given)


def same(ours, wanted) -> bool:
    return ours[1] == wanted[1] and all(map(torch.equal, ours[0].values(), wanted[0].values()))


@pytest.mark.parametrize("form", ["layer", pytest.param("step", marks=pytest.mark.slow)])
def test_a_budget_changes_no_bit(form):
    wanted = run(compile=form)
    assert same(run(compile=form, remat="budget:0.2"), wanted)


def test_less_is_kept_with_a_smaller_budget():
    sizes = [saved(how) for how in BUDGETS]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == saved("none")
    assert sizes[-1] < 0.4 * sizes[0] and len(set(sizes)) == 4


@pytest.mark.parametrize("text", ["budget", "budget:2", "budget:-0.5", "budget:x", "all", "budget:nan"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(ValueError, match="it is none, selective, layer, or budget:X with X from 0 to 1"):
        remat.budget(text)
    with pytest.raises(ValueError, match=f"--remat {text}: it is none, selective"):
        RunOptions(remat=text)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="--remat budget:0.5 is a compiler's work: with --compile off use layer"):
        run(remat="budget:0.5", compile="off")
    for what in ("activations", "optimizer"):
        with pytest.raises(ValueError, match=f"--offload {what} is not for one graph: use --compile layer or off"):
            run(offload=(what,), compile="step")


BOTH = ("activations", "optimizer")


@pytest.mark.parametrize(
    ("what", "options"),
    [
        (BOTH[:1], {}), (BOTH[1:], {}), (BOTH, {"remat": "layer", "micro_batches": 2}), (BOTH, {"remat": "selective"}),
        (BOTH, {"compile": "layer"}),
        pytest.param(BOTH, {"compile": "layer", "remat": "layer"}, marks=pytest.mark.slow),
        pytest.param(BOTH, {"compile": "layer", "remat": "budget:0.3"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_was_away_comes_back_as_it_was(what, options):
    assert same(run(what, **options), run(**options))


def held(offload: bool) -> int:
    """Return the bytes that a forward pass leaves for backward."""
    model, batch = small.model(num_hidden_layers=3, mlp_only_layers=[]), small.batch([[13], [8, 5]])
    leaves = tree.map(lambda p: p.requires_grad_(), model.init(0))
    model = remat.wrap_layer(model, compile=False, remat="none", offload=offload)
    with LiveBytes((leaves, batch)) as live:
        before = live.now
        sums = evaluate(model, losses.sft(), leaves, batch, {})
        gc.collect()
        after = live.now - before
    del sums
    return after


def test_what_was_sent_away_is_not_here_too():
    """Some small tensors stay, and what forward made outside of layers: embeddings, norms, the head."""
    assert held(True) < 0.35 * held(False)


def test_the_layer_before_is_on_its_way(monkeypatch):
    """When backward is in a layer, what it needs is there and what the layer before needs has been asked for."""
    asked: list[int] = []
    order: list[remat.Offload] = []
    fetch, made = remat.Offload.fetch, remat.Offload.__init__

    def init(self, *args):
        made(self, *args)
        order.append(self)

    def fetching(self):
        if self.away:
            asked.append(order.index(self))
        fetch(self)

    monkeypatch.setattr(remat.Offload, "__init__", init)
    monkeypatch.setattr(remat.Offload, "fetch", fetching)
    model = remat.wrap_layer(small.model(num_hidden_layers=4), compile=False, remat="none", offload=True)
    ran: list[tuple[int, list[int]]] = []
    inner = model.layer

    def marked(p, x, rows, **options):
        layer = len(order)
        x.register_hook(lambda grad: ran.append((layer, list(asked)))) if x.requires_grad else None
        return inner(p, x, rows, **options)

    leaves = tree.map(lambda p: p.requires_grad_(), model.init(0))
    sums, _ = evaluate(replace(model, layer=marked), losses.sft(), leaves, small.batch([[13], [8, 5]]), {})
    torch.autograd.grad(sums["nll"], tree.leaves(leaves), allow_unused=True)
    assert asked == [3, 2, 1, 0]
    assert ran == [(3, [3, 2]), (2, [3, 2, 1]), (1, [3, 2, 1, 0]), (0, [3, 2, 1, 0])]


def test_copies_to_and_from_the_host():
    x = torch.arange(5.0)
    there = backend.send_away(x)
    assert torch.equal(there, x) and there.data_ptr() != x.data_ptr()
    back = backend.bring_back(there, x.device)()
    assert torch.equal(back, x) and back.data_ptr() != there.data_ptr()
    assert backend.send_away(x + 1, there) is there and torch.equal(there, x + 1)
