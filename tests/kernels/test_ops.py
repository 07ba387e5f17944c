"""Every op of ours as PyTorch sees it: registration, the same bits in every run, and the table of backends."""

import importlib
import subprocess
import sys

import pytest
import torch

import kernels

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])


def leaf(*shape, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen).to(dtype).requires_grad_()


def samples():
    """Name each op and give it arguments."""
    q, k = leaf(2, 6, 4, 8), leaf(2, 6, 2, 8, seed=1)
    with torch.no_grad():
        out, lse = torch.ops.functional_trainer.attention_documents(q, k, k, SEGMENTS, None, 0.3)
    h, w, targets = leaf(7, 5), leaf(9, 5, seed=1), torch.arange(7)
    counts = torch.tensor([3, 0, 2])
    x, grad, experts = leaf(7, 4), torch.ones(7, 6), leaf(3, 6, 4, seed=2)
    dlogp = torch.ones(7)
    order, inverse = torch.tensor([5, 0, 1, 2, 3, 4]), torch.tensor([1, 2, 3, 4, 5, 0])
    routed = (experts, counts, order, inverse, 2)
    tokens, rows = leaf(3, 4), leaf(6, 4)
    recipe = kernels.RECIPES["tile"]
    x8, w8, experts8 = recipe.operand(x.detach()), recipe.weight(experts[0].detach()), recipe.weight(experts.detach())
    return {
        "attention_documents": [
            *((q, k, leaf(2, 6, 2, 8, seed=2), SEGMENTS, w, 0.3) for w in (None, 2)),
            (q, k, leaf(2, 6, 2, 5, seed=2), SEGMENTS, 2, 0.3, False, 5.0, leaf(4), None),
            (q, k, leaf(2, 6, 2, 8, seed=2), SEGMENTS, None, 0.3, True, None, None, SEGMENTS % 2),
        ],
        "attention_documents_grad": [
            (torch.ones_like(q), q.detach(), k.detach(), k.detach(), SEGMENTS, out, lse, None, 0.3, *rest)
            for rest in ((), (True, 5.0, leaf(4).detach(), SEGMENTS % 2))
        ],
        "embedding": [(leaf(9, 4), SEGMENTS)],
        "embedding_grad": [(torch.ones(2, 6, 4), SEGMENTS, 9)],
        "fp8_matmul": [(*x8[:2], *w8[:2], [*x8[2:], *w8[2:]], torch.float32)],
        "fp8_grouped_matmul": [
            (*x8[:2], *experts8[:2], counts, [*x8[2:], *experts8[2:]], t) for t in (torch.float32, torch.bfloat16)
        ],
        "grouped_matmul": [
            (x, experts, counts, None, None, 1, False, False),
            (x, leaf(3, 8, 4), counts, None, None, 1, False, False),
            (tokens, *routed, True, False), (rows, *routed, False, True),
            (*(leaf(*n, dtype=torch.bfloat16) for n in ((7, 4), (3, 6, 4))), counts, None, None, 1, False, False),
        ],
        "grouped_matmul_grad": [
            (grad, x.detach(), experts.detach(), counts, None, None, 1, False, False),
            (grad[:6], tokens.detach(), *(t if isinstance(t, int) else t.detach() for t in routed), True, False),
        ],
        "grouped_mm": [
            (leaf(8, 4), leaf(3, 4, 8, seed=1), torch.tensor([3, 3, 8], dtype=torch.int32)),
            (leaf(8, 4).mT, leaf(8, 12, seed=1), torch.tensor([3, 3, 8], dtype=torch.int32)),
        ],
        "grouped_weight_grad": [(grad, x.detach(), counts), (grad.bfloat16(), x.detach().bfloat16(), counts)],
        "linear_logprob": [
            (h, w, targets, None, None, 0, 0.0, 1.0, True, True),
            (h, w, targets, leaf(9, seed=3), targets > 4, 3, 2.0, 0.7, True, False),
            (*(leaf(n, 5, dtype=torch.bfloat16) for n in (7, 9)), targets, None, None, 0, 0.0, 1.0, False, True),
        ],
        "linear_logprob_grad": [
            (dlogp, dlogp, dlogp, (h @ w.T).detach(), h.detach(), w.detach(), targets, None, m, 0, 0.0, 1.0, True, keep)
            for m, keep in ((None, False), (targets > 4, True))
        ],
    }  # fmt: skip


def test_every_op_has_samples():
    """But for those of Triton, which are checked where it interprets (test_moe_triton.py and the like)."""
    names = torch._C._dispatch_get_all_op_names()
    ours = {n.split("::")[1] for n in names if n.startswith("functional_trainer::")}
    interpreted = {"moe", "moe_grad", "sort_by_expert", "symmetric_product", "fp8_quantise", "fp8_product"}
    assert sorted(ours - interpreted) == sorted(samples())


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name):
    """PyTorch's check that nothing is mutated multiplies operands, which it cannot where they are in 8 bits."""
    tests = ["test_schema"] * (not name.startswith("fp8"))
    tests += ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for args in samples()[name]:
        torch.library.opcheck(getattr(torch.ops.functional_trainer, name).default, args, test_utils=tests)


# determinism ---------------------------------------------------------------------------------------------------------

T, D, E, K, V = 384, 32, 6, 3, 40


def everything(table, gate_up, down, weights, tokens, expert, segments, positions):
    """Chain every op; tokens and experts repeat, so that their gradients meet."""
    x = kernels.embedding(table, tokens)
    x = x + kernels.attention(*(x.unflatten(-1, (4, 8)),) * 3, segments, positions).flatten(2)
    y = kernels.experts(x.flatten(0, 1), weights, expert, gate_up, down, E)
    logp, entropy = kernels.linear_logprob(y, table, tokens.flatten())
    return logp.sum() + entropy.sum()


@pytest.mark.parametrize("mode", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_same_bits_in_every_run(mode):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gen = torch.Generator().manual_seed(0)
        leaves = [leaf(V, D), leaf(E, 2, 24, D), leaf(E, D, 24), leaf(T, K)]
        data = [
            torch.randint(V, (2, T // 2), generator=gen), torch.randint(E + 1, (T, K), generator=gen),
            (torch.arange(T // 2) // 50 + 1).expand(2, -1), (torch.arange(T // 2) % 50).expand(2, -1),
        ]  # fmt: skip
        fn = everything if mode == "eager" else torch.compile(everything, fullgraph=True)
        first = None
        for _ in range(5):
            value = fn(*leaves, *data)
            result = value, *torch.autograd.grad(value, leaves)
            first = first or result
            assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))
        if mode == "inductor":
            plain = everything(*leaves, *data)
            wanted = plain, *torch.autograd.grad(plain, leaves)
            torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-3)
    finally:
        torch.set_num_threads(threads)


# the table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(kernels.BACKENDS))
def test_every_device_has_a_default_that_serves_it(op):
    for device in ("cpu", "cuda", "npu", "xla"):
        chosen = kernels.pick(op, device)
        assert device in chosen.serves or "*" in chosen.serves
        assert kernels.pick(op, device, chosen.name) == chosen
    assert (
        op in ("exchange", "sort", "symmetric_product") or kernels.pick(op, "xla", "reference").name == "reference"
    )  # plain PyTorch all


def test_defaults_on_the_cpu_were_measured_there():
    assert all("cpu" in kernels.pick(op, "cpu").measured_on for op in kernels.BACKENDS)


def test_expensive_ops_are_named_as_they_are_called():
    """A mistaken name would be recomputed in silence. flash-attn's are known only where that is installed."""
    importlib.import_module("torch.nn.attention.varlen")  # registers its own
    known = {schema.name for schema in torch._C._jit_get_all_schemas()} | {"flex_attention"}
    assert kernels.EXPENSIVE - known <= {
        "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward"
    }  # fmt: skip


EAGER_STEP = """
import sys
import torch
from experiments import recipe
import models
from functional_trainer import init_state, losses, make_train_step, optimizers
from functional_trainer.options import OptimOptions

row = torch.arange(16).expand(2, -1)
batch = {"tokens": row, "targets": row, "segment_ids": row // 8 + 1, "positions": row % 8, "weights": row * 0.1}
model = models.from_config(models.PRESETS["tiny"] | {"num_hidden_layers": 1, "vocab_size": 32})
optimizer = optimizers.from_options(OptimOptions(), 10, model.specs)
state, values = make_train_step(model, losses.sft(), optimizer)(init_state(model.init(0), optimizer), batch)
print(values["loss"].isfinite().item(), [name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_a_step_without_compilation_does_not_import_the_compiler():
    """That takes seconds, which every start would pay, and DTensors' sympy half of them."""
    said = subprocess.run([sys.executable, "-c", EAGER_STEP], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "True []"


def test_an_op_without_a_gradient_says_so():
    grad = torch.ops.functional_trainer.embedding_grad(torch.ones(2, 6, 4, requires_grad=True), SEGMENTS, 9)
    with pytest.raises(RuntimeError, match="functional_trainer::embedding_grad has no gradient"):
        grad.sum().backward()
