# %% [markdown]
# # 5. Looking into the router
#
# In a layer with experts a router sends each token to 2 of 8 MLPs. Which, and why? This page listens to the routers,
# draws their load, trains with and without a balance loss, and asks whether digits and letters go different ways.

# %%
import matplotlib.pyplot as plt
import torch

import models
from experiments.first_light import tasks
from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer import init_state, losses, make_train_step, optimizers
from functional_trainer.data import Documents, Loader, Tokenizer
from functional_trainer.types import OneDevice

model = models.from_config(models.PRESETS["tiny"] | {"moe_intermediate_size": 96})
tokenizer = Tokenizer(FOLDER)
LAYERS, EXPERTS, TOP_K = 2, model.config.experts, model.config.top_k
chats = [record["messages"] for record in tasks.make(n_train=4000, n_eval=0, seed=0)[0]]
documents = Documents.of(tokenizer.encode_chat(chat) for chat in chats)
look_at = next(Loader(documents, rows=24, seq_len=128, seed=1))
real = look_at["segment_ids"] != 0
print(f"{int(real.sum())} tokens to look at")

# %% [markdown]
# ## Listening
# A model asks its argument `shard` where each piece of maths is to run, and names the operands. On one device `shard`
# just runs it. So one that also writes down what the routers answered is all that listening takes.


# %%
class Listening(OneDevice):
    def __init__(self):
        self.experts = []

    def local(self, fn, ins, outs):
        def heard(*args):
            weights_BSK, id_BSK, *sums = fn(*args)
            self.experts.append(id_BSK)
            return weights_BSK, id_BSK, *sums

        return heard if "params/layers/_/moe/router" in ins else fn


@torch.no_grad()
def routing(params):
    """Return the experts of each token in each layer, (B, S, L, K); padding has expert 8, which is none."""
    shard = Listening()
    model.apply(params, look_at, shard)
    return torch.stack(shard.experts, 2)


fresh = model.init(seed=0)
id_BSLK = routing(fresh)
for token, experts in list(zip(look_at["tokens"][0].tolist(), id_BSLK[0].tolist(), strict=True))[:12]:
    print(f"{tokenizer.backend.id_to_token(token):14} layer 0: {experts[0]}   layer 1: {experts[1]}")

# %% [markdown]
# Is that what the model did? Its own sums say so. And a batch that carries the choice as a column gives the same
# result: this is how a routing is replayed.

# %%
output = model.apply(fresh, look_at)
load_LE = torch.stack([(id_BSLK[:, :, i, :, None] == torch.arange(EXPERTS)).sum((0, 1, 2)) for i in range(LAYERS)])
assert torch.equal(load_LE, output.aux["load"].long()) and load_LE.sum() == LAYERS * TOP_K * real.sum()
replayed = model.apply(fresh, look_at | {"routed_experts": id_BSLK.clamp_max(EXPERTS - 1)})
assert torch.equal(replayed.hidden[real], output.hidden[real])

# %% [markdown]
# ## With and without a balance loss
# Nothing makes a router use all experts. The balance loss does: for each document, experts times the sum over experts
# of their share of tokens times their mean probability. It falls as the load evens out.


# %%
def train(coefficient: float, steps: int = 60):
    loss = losses.sft(balance_coefficient=coefficient)
    optimizer = optimizers.adamw(optimizers.schedule("cosine", peak=3e-3, total=steps, warmup=8))
    step, state = make_train_step(model, loss, optimizer), init_state(model.init(seed=0), optimizer)
    for batch, _ in zip(Loader(documents, rows=4, seq_len=128), range(steps), strict=False):
        state, metrics = step(state, batch)
    return state.params, float(metrics["nll"])


(free, free_loss), (balanced, balanced_loss) = train(0.0), train(0.05)
print(f"loss on the last batch: {free_loss:.3f} without, {balanced_loss:.3f} with")

# %% [markdown]
# Entropy puts a load into one number. Its exponential says how many experts, all used alike, would have that entropy.


# %%
def shares(id_BSLK, where):
    """Return each expert's share of the slots of the tokens at `where`, (L, E)."""
    counts = (id_BSLK[where][..., None] == torch.arange(EXPERTS)).sum((0, 2)).double()
    return counts / counts.sum(-1, keepdim=True)


def effective(share):
    return torch.special.entr(share).sum(-1).exp()


routes = {"untrained": id_BSLK, "no balance loss": routing(free), "with balance loss": routing(balanced)}
figure, axes = plt.subplots(1, 3, figsize=(12, 2.4), layout="constrained")
for axis, (name, ids) in zip(axes, routes.items(), strict=True):
    share_LE = shares(ids, real)
    image = axis.imshow((EXPERTS * share_LE).numpy(), vmin=0, vmax=3, aspect="auto")
    axis.set(title=name, xlabel="expert", ylabel="layer", yticks=range(LAYERS))
    print(f"{name:18} effective experts by layer:", *(f"{n:.2f}" for n in effective(share_LE)))
figure.colorbar(image, ax=axes, label="load, 1 is even")

_, without, with_it = (effective(shares(ids, real)) for ids in routes.values())
assert (without < with_it).all() and (with_it <= EXPERTS).all()

# %% [markdown]
# ## Who goes where
# Digits and capital letters are single tokens here. If experts know nothing of them, both get the same shares. The
# distance between two sets of shares is half the sum of differences: 0 is alike, 1 has no expert in common. Chance
# alone gives some distance, so the yardstick is digits against digits, split at random.

# %%
text = {i: token.removeprefix("Ġ") for token, i in tokenizer.backend.get_vocab().items()}
words = [text.get(i, "") for i in range(model.config.vocab)]
is_digit = torch.tensor([word.isdigit() for word in words])[look_at["tokens"]] & real
is_letter = torch.tensor([len(word) == 1 and word.isupper() for word in words])[look_at["tokens"]] & real
coin = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) < 0.5
print(f"{int(is_digit.sum())} digits, {int(is_letter.sum())} letters")


def distance(ids, a, b):
    return (shares(ids, a) - shares(ids, b)).abs().sum(-1) / 2


for name, ids in routes.items():
    apart, chance = distance(ids, is_digit, is_letter), distance(ids, is_digit & coin, is_digit & ~coin)
    print(f"{name:18} digits to letters", *(f"{d:.2f}" for d in apart), "  by chance", *(f"{d:.2f}" for d in chance))
    assert (apart > 2 * chance).all()

# %%
figure, axes = plt.subplots(1, LAYERS, figsize=(9, 2.6), layout="constrained", sharey=True)
for layer, axis in enumerate(axes):
    for offset, (label, where) in enumerate({"digits": is_digit, "letters": is_letter}.items()):
        share_E = shares(routes["with balance loss"], where)[layer].tolist()
        axis.bar([expert + 0.4 * offset for expert in range(EXPERTS)], share_E, 0.4, label=label)
    axis.set(title=f"with balance loss, layer {layer}", xlabel="expert", ylabel="share of slots")
axes[0].legend()
