# %% [markdown]
# # 3. The step by hand
#
# A train step, written out from the pieces it is made of, then shown to equal `make_train_step`. Then three things
# that must not change a result: how documents are packed, in what order, and how often gradients are accumulated. All
# of it in float64, where equal means equal to ten digits.

# %%
import torch

import models
from experiments.first_light import tasks
from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer import init_state, losses, make_train_step, optimizers, tree
from functional_trainer.data import Documents, Loader, Tokenizer
from functional_trainer.types import ONE_DEVICE

CONFIG = models.PRESETS["tiny"] | {"hidden_size": 48, "moe_intermediate_size": 40, "initializer_range": 0.2}
model = models.from_config(CONFIG)
tokenizer = Tokenizer(FOLDER)
chats = [record["messages"] for record in tasks.make(n_train=28, n_eval=0, seed=0)[0]]
documents = Documents.of(tokenizer.encode_chat(chat) for chat in chats)


def fresh():
    return model.init(seed=0, dtype=torch.float64)


def same(a, b):
    pairs = zip(tree.leaves(a), tree.leaves(b), strict=True)
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in pairs)


# %% [markdown]
# ## 1. The batch, and what to divide by
# A batch holds packed rows. A loss returns sums and never divides. What each sum is divided by comes from the columns
# of the batch alone, so it is known before anything is computed: trained tokens for the likelihood, all for the
# balance.

# %%
batch = next(Loader(documents, rows=4, seq_len=128, epochs=1))
assert batch["segment_ids"].amax(1).sum() == len(chats), "segments are numbered in each row: all documents are in"
loss = losses.sft(balance_coefficient=0.01)
weights = loss.weights(batch)
print({name: int(weight) for name, weight in weights.items()}, "of", batch["tokens"].numel(), "places")

# %% [markdown]
# ## 2. Sums, and the gradient of what is minimized


# %%
def gradient(params, batch, weights):
    """Return the value that is minimized and its gradient by path."""
    leaves = {path: x.detach().requires_grad_() for path, x in tree.flatten(params).items()}
    marked = tree.unflatten(leaves, params)
    sums, _ = loss.terms(model.apply(marked, batch), model.unembed(marked), batch, ONE_DEVICE)
    value = sum(loss.coefficients.get(name, 1.0) * sums[name] / weights[name] for name in sums)
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


value, grads = gradient(fresh(), batch, weights)
print(f"loss {value:.4f}; to guess evenly would be ln(384) = {torch.tensor(384).log():.4f}")

# %% [markdown]
# ## 3. Clip


# %%
def clipped(grads, most=1.0):
    norm = torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt()
    return norm, {path: g * (most / norm.clamp_min(most)) for path, g in grads.items()}


norm, grads = clipped(grads)
print(f"gradient norm {norm:.3f}, clipped to {clipped(grads)[0]:.3f}")

# %% [markdown]
# ## 4. AdamW
# Two running means for each parameter, corrected for having begun at zero. Weight decay pulls at matrices, not at
# norms.

# %%
LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1


def adamw(p, g, mu, nu, t, decay):
    mu, nu = BETA1 * mu + (1 - BETA1) * g, BETA2 * nu + (1 - BETA2) * g**2
    step = mu / (1 - BETA1**t) / ((nu / (1 - BETA2**t)).sqrt() + EPS)
    return p * (1 - LR * decay) - LR * step, mu, nu


params, losses_by_hand = tree.flatten(fresh()), []
moments = {path: (torch.zeros_like(p), torch.zeros_like(p)) for path, p in params.items()}
for t in (1, 2, 3):
    value, grads = gradient(tree.unflatten(params, fresh()), batch, weights)
    losses_by_hand.append(value)
    for path, g in clipped(grads)[1].items():
        params[path], *moments[path] = adamw(params[path], g, *moments[path], t, 0 if path.endswith("norm") else DECAY)
print("loss by hand:", *(f"{value:.10f}" for value in losses_by_hand))

# %% [markdown]
# ## 5. The same from the library
# Three steps with `make_train_step` end in the same weights.

# %%
optimizer = optimizers.adamw(optimizers.schedule("constant", peak=LR, total=3), (BETA1, BETA2), EPS, DECAY)


def trained(batches, **options):
    """Return the weights after a step on each batch, and the losses."""
    step, state = make_train_step(model, loss, optimizer, **options), init_state(fresh(), optimizer)
    return state.params, [step(state, batch)[1]["loss"] for batch in batches]


library, losses_of_library = trained([batch] * 3)
assert same(library, params) and same(losses_of_library, losses_by_hand)
assert not same(library, fresh()), "and three steps did something"

# %% [markdown]
# ## 6. Accumulation changes nothing
# The weights are summed over the whole batch before the first backward pass. So four passes over a row each are one
# pass over four rows. The mean of four means would be another loss, as the rows hold different numbers of trained
# tokens.

# %%
assert same(trained([batch] * 3, micro_batches=4)[0], library)

rows = [{name: column[i : i + 1] for name, column in batch.items()} for i in range(4)]
mean_of_means = sum(gradient(fresh(), row, loss.weights(row))[0] for row in rows) / 4
sum_of_sums = sum(gradient(fresh(), row, weights)[0] for row in rows)
print("trained tokens in each row:", [int(row["weights"].sum()) for row in rows])
print(f"mean of means {mean_of_means:.6f}, sum over the total weight {sum_of_sums:.6f}, whole {losses_by_hand[0]:.6f}")
assert same(sum_of_sums, losses_by_hand[0]) and not same(mean_of_means, sum_of_sums)

# %% [markdown]
# ## 7. Packing changes nothing
# The same documents, one a row: more padding, other neighbours, another order. The same weights come out.

# %%
alone = next(Loader(documents, rows=28, seq_len=32, epochs=1, packing="none", seed=5))
for name, packed in (("packed", batch), ("one a row", alone)):
    print(f"{name:10} {tuple(packed['tokens'].shape)}, {(packed['segment_ids'] == 0).double().mean():.0%} padding")
assert same(trained([alone] * 3)[0], library)

# %% [markdown]
# ## 8. A bad gradient changes nothing
# One weight that is not a number, and the state stays as it was, bit for bit. The step says so.

# %%
bad = batch | {"weights": batch["weights"].clone().fill_(float("nan"))}
state = init_state(fresh(), optimizer)
_, metrics = make_train_step(model, loss, optimizer)(state, bad)
assert int(metrics["skipped"]) == 1
assert all(map(torch.equal, tree.leaves(state.params), tree.leaves(fresh())))
