"""functional_trainer.step: accumulation, compilation, skipped steps, donation, precision."""

import functools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from functional_trainer import init_state, losses, make_train_step, optimizers, tree
from functional_trainer.moments import stored_in_8_bits
from functional_trainer.state import block, ema, kinds
from functional_trainer.step import evaluate
from functional_trainer.types import ONE_DEVICE
from tests.models import small

F64 = torch.float64
# Four rows of very different content: 1, 13, 5 and 8 tokens, 1, 9, 4 and 6 of them trained.
UNEVEN = [[1], [13], [3, 2], [8]]
LOSS = losses.sft("per_sequence", 0.1)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.trace_autograd_ops = False  # `compile="step"` sets these for the process
    torch._dynamo.config.capture_scalar_outputs = False


def tiny(**options):
    """Build a model of one MoE and one dense layer."""
    return small.model(**{"num_hidden_layers": 2} | options)


def adamw(peak=1e-2, total=10):
    return optimizers.adamw(optimizers.schedule("cosine", peak, total, warmup=2))


def run(steps=3, model=None, loss=LOSS, dtype=F64, rows=UNEVEN, optimizer=None, **options):
    """Train on `steps` different batches; return the state, every step's metrics, and how many graphs there then were.

    The state is donated: no tensor of it may move.
    """
    model, optimizer = model or tiny(), optimizer or adamw()
    state = init_state(model.init(0, dtype=dtype), optimizer)
    step = make_train_step(model, loss, optimizer, **{"backend": "aot_eager"} | options)
    history, graphs, places = [], [], [x.data_ptr() for x in tree.leaves(state)]
    for i in range(steps):
        state, metrics = step(state, small.batch(rows, seed=i))
        history.append({k: v.clone() for k, v in metrics.items()})
        graphs.append(counters["stats"]["unique_graphs"])
    assert [x.data_ptr() for x in tree.leaves(state)] == places
    return state, history, graphs


def flat(state):
    """Return every tensor of a state by path, copied."""
    return {k: v.detach().clone() for k, v in tree.flatten(state).items()}


def assert_same(a, b, tolerance):
    """Compare states and metrics of two runs."""
    torch.testing.assert_close(flat(a[0]), flat(b[0]), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a[1], b[1], rtol=tolerance, atol=tolerance)


# gradients -----------------------------------------------------------------------------------------------------------


def test_one_step_of_descent_by_hand():
    """With plain descent for an optimizer, what changes is the clipped gradient of the mean."""
    descent = optimizers.Optimizer(
        init=lambda p, group: {}, group=lambda path: 0, scalars=lambda *at: {"lr": torch.ones((), dtype=F64)},
        update=lambda p, g, *others: (p - g, {}),
    )  # fmt: skip
    model, batch = tiny(), small.batch(UNEVEN)
    params = model.init(0, dtype=F64)
    leaves = tree.map(lambda x: x.clone().requires_grad_(), params)
    output = model.apply(leaves, batch)
    logp, _ = losses.logprobs(output, model.unembed(leaves), batch, ONE_DEVICE)
    nll = -(logp * batch["weights"]).sum() / batch["weights"].sum()
    balance = output.aux["balance"].mean() / 27
    wanted = torch.autograd.grad(nll + 0.1 * balance, tree.leaves(leaves))
    norm = torch.cat([g.flatten() for g in wanted]).norm()
    before = [p.clone() for p in tree.leaves(params)]
    state, metrics = make_train_step(model, LOSS, descent, clip=0.5)(init_state(params, descent), batch)
    assert norm > 0.5
    for old, new, g in zip(before, tree.leaves(state.params), wanted, strict=True):
        torch.testing.assert_close(old - new, g * 0.5 / norm, rtol=1e-9, atol=1e-12)
    ours = [float(metrics[k]) for k in ("loss", "nll", "balance", "grad_norm", "lr", "skipped")]
    assert ours == pytest.approx(
        [*map(torch.Tensor.item, (nll + 0.1 * balance, nll, balance, norm)), 1.0, 0.0], rel=1e-9
    )
    assert int(state.step) == 1
    each: dict[str, torch.Tensor] = {}
    for path, g in zip(tree.flatten(params), wanted, strict=True):
        kind = "/".join(part for part in path.split("/") if not part.isdigit())
        each[kind] = each.get(kind, torch.zeros((), dtype=F64)) + g.square().sum()
    assert len(kinds(tree.flatten(params))["layers/attn/q"]) == 2 and list(kinds(tree.flatten(params))) == list(each)
    torch.testing.assert_close(metrics["grad_norms"], torch.stack(list(each.values())).sqrt(), rtol=1e-9, atol=0)


def test_clip_binds_only_above_its_norm():
    norm = float(run(1, clip=0.0)[1][0]["grad_norm"])
    assert_same(run(clip=norm * 100), run(clip=0.0), 0)
    clipped, free = run(1, clip=norm / 3)[0], run(1, clip=0.0)[0]
    for a, b in zip(clipped.moments.values(), free.moments.values(), strict=True):
        torch.testing.assert_close(a["mu"] * 3, b["mu"], rtol=1e-9, atol=1e-15)


@given(st.permutations(UNEVEN), st.sampled_from([2, 4]))
@settings(max_examples=6)
def test_accumulation_equals_one_pass(rows, parts):
    assert_same(run(2, rows=rows, micro_batches=parts), run(2, rows=rows), 1e-12)


def test_accumulation_over_a_part_without_tokens():
    rows = [[], [13], [3, 2], []]
    assert_same(run(2, rows=rows, micro_batches=4), run(2, rows=rows), 1e-12)


def test_accumulation_refuses_what_does_not_add_up():
    with pytest.raises(ValueError, match="product of batch means .balance 'hf', KTO.: it needs micro_batches = 1"):
        make_train_step(tiny(), losses.sft("hf"), adamw(), micro_batches=2)
    with pytest.raises(ValueError, match="4 rows per device cannot be split into 3 equal micro-batches"):
        run(1, micro_batches=3)


def test_bfloat16_gradients_are_summed_in_float32():
    """And each is exactly what autograd gives for weights in bfloat16."""
    descent = optimizers.Optimizer(
        init=lambda p, group: {}, group=lambda path: 0, scalars=lambda *at: {"lr": torch.ones(())},
        update=lambda p, g, *others: (g, {}),
    )  # fmt: skip
    model = tiny(dtype=torch.bfloat16)
    params, batch = model.init(0), small.batch(UNEVEN)
    leaves = tree.map(lambda x: x.to(torch.bfloat16, copy=True).requires_grad_(), params)
    wanted = [torch.zeros_like(p) for p in tree.leaves(params)]
    for row in range(4):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        sums, _ = evaluate(model, LOSS, leaves, one, {})
        loss = sums["nll"] / batch["weights"].sum(dtype=F64) + 0.1 * sums["balance"] / 27
        for total, g in zip(wanted, torch.autograd.grad(loss, tree.leaves(leaves)), strict=True):
            assert g.dtype == torch.bfloat16
            total += g
    step = make_train_step(model, LOSS, descent, clip=0.0, micro_batches=4)
    state, _ = step(init_state(params, descent), batch)
    for ours, theirs in zip(tree.leaves(state.params), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


# forms of the step ---------------------------------------------------------------------------------------------------

FORMS = [
    ({"compile": "step"}, 1),
    ({"compile": "step", "micro_batches": 2}, 2),
    pytest.param({"compile": "step", "remat": "layer"}, 2, marks=pytest.mark.slow),
    ({"compile": "layer"}, None),
    pytest.param({"compile": "layer", "remat": "layer"}, None, marks=pytest.mark.slow),
    ({"compile": "off", "remat": "layer"}, 0),
    ({"compile": "off", "remat": "selective", "micro_batches": 2}, 0),
    pytest.param({"compile": "step", "remat": "selective", "micro_batches": 2}, 2, marks=pytest.mark.slow),
    ({"compile": "layer", "remat": "selective"}, None),
]


@functools.cache
def plain():
    return run(4)


@pytest.mark.parametrize(
    ("form", "graphs"), FORMS, ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else ""
)
def test_every_form_equals_the_uncompiled_step_and_compiles_once(form, graphs):
    """Data, learning rate and step number change: only the first step may compile."""
    result = run(4, **form)
    assert_same(result, plain(), 1e-11)
    assert len(set(result[2])) == 1 and (graphs is None or result[2][0] == graphs)
    assert len({float(metrics["lr"]) for metrics in result[1]}) == 3  # the peak comes twice


class Dispatched(TorchDispatchMode):
    """Count the ops that run, by name."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops[op.name()] += 1
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputation_changes_no_bit_and_selective_repeats_nothing_expensive(dtype, parts):
    """One MoE and one dense layer: each kind of op that is expensive on this device runs as often as without it."""
    ran, results = {}, {}
    for remat in ("none", "selective", "layer"):
        with Dispatched() as seen:
            results[remat] = run(2, model=tiny(dtype=dtype), dtype=torch.float32, remat=remat, micro_batches=parts)
        ran[remat] = seen.ops
        assert_same(results[remat], results["none"], 0)
    expensive = kernels.EXPENSIVE & ran["none"].keys()
    ours = {f"functional_trainer::{name}" for name in ("attention_documents", "grouped_matmul")}
    assert expensive == {"aten::mm", "aten::topk"} | ours
    for op in expensive:
        assert ran["none"][op] == ran["selective"][op] < ran["layer"][op], op
    assert ran["none"]["aten::silu"] < ran["selective"]["aten::silu"] == ran["layer"]["aten::silu"]


def test_compiled_selective_recomputation_repeats_nothing_expensive_either():
    """Of one MoE layer, forward and backward: three products outside the experts, each twice more in backward."""
    ops = Counter()

    def compiler(graph, inputs):
        ops.update(node.target.name() for node in graph.graph.nodes if hasattr(node.target, "name"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    model = tiny(num_hidden_layers=1, mlp_only_layers=[])
    run(1, model=model, compile="layer", remat="selective", backend=backend)
    ours = {"functional_trainer::attention_documents": 1, "functional_trainer::grouped_matmul": 2}
    assert {op: n for op, n in ops.items() if op in kernels.EXPENSIVE} == {"aten::mm": 9, "aten::topk": 1} | ours
    assert ops["aten::sort.stable"] + ops["aten::sort"] == 2  # the rows' order is cheap


@pytest.mark.slow
@pytest.mark.parametrize("form", ["step", "layer"])
def test_inductor_equals_the_uncompiled_step(form):
    """In float32, where Inductor's own order of additions is all that differs; the state stays where it was."""
    model = tiny(num_hidden_layers=1, mlp_only_layers=[])
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-3, 9), eps=1e-3)
    options = {"model": model, "dtype": torch.float32, "optimizer": optimizer}
    assert_same(run(2, compile=form, backend="inductor", **options), run(2, **options), 2e-5)
    cache = counters["aot_autograd"]
    assert cache["autograd_cache_hit"] + cache["autograd_cache_miss"] > 0 == cache["autograd_cache_bypass"]


@pytest.mark.slow
def test_the_graphs_of_layers_do_not_depend_on_depth():
    few = run(1, model=tiny(mlp_only_layers=[]), compile="layer")[2]
    torch._dynamo.reset()
    counters.clear()
    assert run(1, model=tiny(num_hidden_layers=5, mlp_only_layers=[]), compile="layer")[2] == few


def mixed(specs):
    """Build an optimizer of four kinds, with frozen leaves and an average."""
    rate = optimizers.schedule("cosine", 1e-2, 10, warmup=2)
    return optimizers.with_ema(optimizers.by_path(
        ("embed|.*/attn/o|layers/1/mlp_norm", None), (".*/attn/[kv]", optimizers.lion(rate)),
        (".*/moe/(gate_up|down)|.*/attn/q", optimizers.muon(rate, specs, dtype=F64)),
        (".*/mlp/.*", optimizers.adafactor(rate, specs)),
        (".*", optimizers.adamw(rate, storage=stored_in_8_bits())),
    ), 0.9)  # fmt: skip


@pytest.mark.parametrize("form", [{"compile": "step"}, {"compile": "layer", "micro_batches": 2}, {"micro_batches": 4}])
def test_every_form_is_the_same_with_several_optimizers_and_frozen_leaves(form):
    model = tiny()
    plain, wanted = run(3, model=model, optimizer=mixed(model.specs)), tree.flatten(model.init(0, dtype=F64))
    result = run(3, model=model, optimizer=mixed(model.specs), **form)
    assert len(set(result[2])) == 1  # compiled once
    codes = [k for k in flat(plain[0]) if k.endswith("_code")]
    a, b = flat(plain[0]), flat(result[0])
    assert all((a.pop(k).int() - b.pop(k).int()).abs().max() <= 1 for k in codes)  # a number between two codes
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    frozen = {"embed", "layers/0/attn/o", "layers/1/attn/o", "layers/1/mlp_norm"}
    moved = {k for k, p in tree.flatten(result[0].params).items() if not torch.equal(p, wanted[k])}
    assert moved == wanted.keys() - frozen == result[0].moments.keys()
    averaged = tree.flatten(ema(result[0]))
    assert all(torch.equal(averaged[k], wanted[k]) for k in frozen)
    assert all(not torch.equal(averaged[k], wanted[k]) for k in moved)


def test_frozen_leaves_take_no_part_in_the_norm():
    names, model = ("embed", "unembed"), tiny()
    only = optimizers.by_path(("embed|unembed", adamw()), (".*", None))
    norm = run(1, model=model, optimizer=only)[1][0]["grad_norm"]
    leaves = tree.map(lambda x: x.clone().requires_grad_(), model.init(0, dtype=F64))
    batch = small.batch(UNEVEN)
    sums, _ = evaluate(model, LOSS, leaves, batch, {})
    loss = sums["nll"] / batch["weights"].sum(dtype=F64) + 0.1 * sums["balance"] / 27
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, [leaves[n] for n in names])]).norm()
    torch.testing.assert_close(norm, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["adafactor", "8bit"])
def test_what_needs_whole_leaves_is_refused_on_several_devices(kind):
    rate, specs = optimizers.schedule("constant", 1e-2, 10), tiny().specs
    whole = (
        optimizers.adafactor(rate, specs) if kind == "adafactor" else optimizers.lion(rate, storage=stored_in_8_bits())
    )
    with pytest.raises(ValueError, match="8 bit are for one device; on several use adamw, muon, lion or sgd"):
        make_train_step(tiny(), LOSS, whole, shard=SimpleNamespace(world=2))


@pytest.mark.parametrize("form", ["off", "step"])
def test_the_logged_rate_is_that_of_the_most_parameters(form):
    few, most = (optimizers.adamw(optimizers.schedule("constant", peak, 10)) for peak in (0.5, 0.25))
    both = optimizers.by_path(("embed|.*norm", few), (".*", most))
    assert float(run(1, optimizer=both, compile=form)[1][0]["lr"]) == 0.25


def test_a_step_that_would_train_nothing_is_refused():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        init_state(tiny().init(0), optimizers.by_path((".*", None)))


def test_layers_compile_when_all_sizes_are_equal():
    """Dynamo makes a graph of its own for sizes that agree or are one, and stops with an error at eight."""
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_experts"), 4)
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "moe_intermediate_size": 4, "attention_bias": True}
    model = tiny(**sizes)
    batches = [small.batch(UNEVEN, vocab=4)]
    results = []
    for form in ("layer", "off"):
        optimizer = adamw()
        step = make_train_step(model, LOSS, optimizer, compile=form, backend="aot_eager")
        state, metrics = step(init_state(model.init(0, dtype=F64), optimizer), batches[0])
        results.append((state, [metrics]))
    assert_same(*results, 1e-11)


def test_graphs_cached_on_disk_carry_the_fingerprint_of_the_ops():
    """A cache knows an op by its name: without the fingerprint a new version is called as the old one was."""
    seen = []

    def backend(graph, inputs):
        seen.append(torch.compiler.config.cache_key_tag)
        return graph

    run(1, compile="layer", backend=backend)
    assert set(seen) == {kernels.SOURCE}
    assert torch.compiler.config.cache_key_tag == ""


@pytest.mark.slow
def test_graphs_cached_on_disk_know_what_an_autograd_function_does(tmp_path, monkeypatch):
    """Two of one name that differ in their backward only: each gets its own graph, and the first one's is found."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def gradient(factor):
        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, grad):
                return grad * factor

        torch._dynamo.reset()
        x = torch.ones(3, requires_grad=True)
        with kernels.kept_on_disk():
            torch.compile(lambda x: Scaled.apply(x).sin(), fullgraph=True)(x).sum().backward()
        cache = counters["aot_autograd"]
        return float(x.grad[0] / torch.tensor(2.0).cos()), cache["autograd_cache_hit"], cache["autograd_cache_miss"]

    found = [gradient(factor) for factor in (3.0, 5.0, 3.0)]
    assert [value for value, _, _ in found] == pytest.approx([3, 5, 3])
    assert [counts for _, *counts in found] == [[0, 1], [0, 2], [1, 2]]


# state ---------------------------------------------------------------------------------------------------------------


def counting():
    """Build a loss with a buffer: tokens per expert seen so far."""
    return replace(LOSS, update=lambda buffers, sums: {"seen": buffers["seen"] + sums["load"].sum(0)})


@pytest.mark.parametrize("form", ["off", "step", "layer"])
def test_a_non_finite_gradient_changes_nothing(form):
    model, optimizer = tiny(), adamw()
    state = init_state(model.init(0, dtype=F64), optimizer, {"seen": torch.zeros(5, dtype=F64)})
    step = make_train_step(model, counting(), optimizer, compile=form, backend="aot_eager")
    state, _ = step(state, small.batch(UNEVEN))
    assert state.buffers["seen"].sum() == 2 * 27  # top-2 of 27 tokens
    column = state.params["layers"][0]["attn"]["o"][:, 0, 0]
    for fault in ("nan weight", "inf parameter"):
        batch, kept = small.batch(UNEVEN, seed=1), column.clone()
        if fault == "nan weight":
            batch["weights"][1, 5] = torch.nan
        else:
            column.fill_(torch.inf)
        before = flat(state)
        for n in (1, 2):
            state, metrics = step(state, batch)
            assert int(metrics["skipped"]) == int(state.skipped) == n and not metrics["grad_norm"].isfinite()
            after = flat(state)
            assert {k for k in before if not torch.equal(before[k], after[k])} == {"step", "skipped"}
        column.copy_(kept)
        state, metrics = step(state, small.batch(UNEVEN, seed=2))
        assert int(metrics["skipped"]) == int(state.skipped) == 0 and metrics["loss"].isfinite()
        after = flat(state)
        assert all(x.isfinite().all() for x in after.values())
        assert all(not torch.equal(before[k], after[k]) for k in before if k.startswith(("params", "buffers")))


def test_a_buffer_without_a_dim_is_refused():
    with pytest.raises(ValueError, match="buffers a/mean have no dim, .*: add one"):
        init_state(tiny().init(0), adamw(), {"a": {"mean": torch.zeros(())}, "b": torch.zeros(1)})


def test_an_overflowing_norm_is_skipped_too():
    """Every gradient is finite in float32, the sum of their squares is not."""
    huge = replace(LOSS, coefficients={"nll": 1e30})
    state, history, _ = run(1, loss=huge, dtype=torch.float32)
    assert not history[0]["grad_norm"].isfinite() and int(state.skipped) == 1
    assert torch.equal(state.params["embed"], tiny().init(0)["embed"])


def test_a_step_changes_everything_but_the_skip_count():
    start = flat(init_state(tiny().init(0, dtype=F64), adamw()))
    end = flat(run(1)[0])
    assert {k for k in start if torch.equal(start[k], end[k])} == {"skipped"}


def test_bfloat16_compute_trains_float32_masters():
    """Updates far below bfloat16's resolution add up."""
    model = tiny(dtype=torch.bfloat16)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-2, 40))
    state = init_state(model.init(0), optimizer)
    step = make_train_step(model, LOSS, optimizer)
    batch, values = small.batch(UNEVEN), []
    for _ in range(30):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss"]))
    assert {x.dtype for x in tree.leaves((state.params, state.moments))} == {torch.float32}
    assert model.apply(state.params, batch).hidden.dtype == torch.bfloat16
    assert values[-1] < 0.5 * values[0]
    wide = float(run(1, dtype=torch.float32)[1][0]["loss"])
    assert values[0] == pytest.approx(wide, rel=0.05)


def test_small_updates_are_not_lost_to_bfloat16():
    model = tiny(dtype=torch.bfloat16)
    optimizer = optimizers.adamw(optimizers.schedule("constant", 1e-5, 9), weight_decay=0.0)
    before = tree.flatten(model.init(0))
    state, *_ = run(1, model=model, dtype=torch.float32, optimizer=optimizer)
    moved = [(v != before[k]).float().mean() for k, v in tree.flatten(state.params).items() if "norm" in k]
    assert min(moved) > 0.9  # norm scales are near 1, where bfloat16's steps are 0.004


def test_a_block_is_a_path_up_to_its_first_index():
    paths = {"layers/0/attn/q": "layers/0", "vision/layers/11/mlp/down": "vision/layers/11", "3/w": "3", "embed": ""}
    assert {path: block(path) for path in paths} == paths
    assert block("layers/1/moe/2/w") == "layers/1" and block("layers2/w") == ""
