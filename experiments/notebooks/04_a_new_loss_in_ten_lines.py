# %% [markdown]
# # 4. A new loss in ten lines
#
# A loss is two functions. `terms` returns sums over tokens, `weights` what each is divided by. This page writes one
# with label smoothing (https://arxiv.org/abs/1512.00567) and a z-loss (https://arxiv.org/abs/2204.02311), checks it
# against `torch`, trains with it, and draws the curves.

# %%
import tempfile

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import models
from experiments.first_light import tasks
from experiments.first_light.make_tokenizer import FOLDER
from functional_trainer import init_state, losses, make_train_step, optimizers
from functional_trainer.data import Documents, Loader, Tokenizer, records
from functional_trainer.losses import Loss
from functional_trainer.types import ONE_DEVICE

model = models.from_config(models.PRESETS["tiny"] | {"moe_intermediate_size": 96})
tokenizer = Tokenizer(FOLDER)

# %% [markdown]
# ## The idea
# Label smoothing asks for a little probability on every token: the target's log-probability counts `1 - epsilon`, the
# mean over the vocabulary `epsilon`. A z-loss keeps the normaliser of the softmax, log Z, near zero.
#
# Both seem to need all logits. But a logit is a dot product `h . w`, so the target's log-probability gives log Z, and
# the mean log-probability is `h . mean(w) - log Z`. Nothing as large as the vocabulary is kept for a token.

# %% [markdown]
# ## The loss
# The two terms have weights of their own: the smoothed likelihood is a mean over trained tokens, the z-loss over all
# tokens. What `terms` returns second is only reported. Maths on hidden states runs inside `shard.local`, which does
# nothing on one device, and says where each operand lives on several.


# %%
def log_z_and_mean(h_BSD, w_VD, targets_BS, logp_BS):
    log_z_BS = (h_BSD * w_VD[targets_BS]).sum(-1) - logp_BS
    return log_z_BS, h_BSD @ w_VD.mean(0) - log_z_BS


def smooth(epsilon: float = 0.1, z: float = 1e-4) -> Loss:
    def terms(output, unembed, batch, shard):
        logp_BS, _ = losses.logprobs(output, unembed, batch, shard)
        ins = "act/residual > act/block_in", "params/unembed", *("batch/columns > act/rows",) * 2
        log_z_BS, mean_BS = shard.local(log_z_and_mean, ins, ("act/rows > batch/columns",) * 2)(
            output.hidden, unembed.weight, batch["targets"], logp_BS
        )
        smoothed_BS = (1 - epsilon) * logp_BS + epsilon * mean_BS
        sums = {"smoothed": -(smoothed_BS * batch["weights"]).sum()}
        sums |= {"z": (log_z_BS.square() * (batch["segment_ids"] != 0)).sum()}
        sure = (logp_BS.detach().exp() > 0.5) * batch["weights"]
        reported = {"sure": sure.sum(), "nll": -(logp_BS.detach() * batch["weights"]).sum()}
        return sums, reported

    def weights(batch):
        return {"smoothed": batch["weights"].sum(), "z": (batch["segment_ids"] != 0).sum()}

    return Loss(terms, weights, coefficients={"z": z})


# %% [markdown]
# ## Data
# The shipped tasks, sums of two numbers and letters to sort, in the form in which any chats come: lines of JSON.

# %%
with tempfile.TemporaryDirectory() as folder:
    train, _ = tasks.write(folder, n_train=4000, n_eval=10)
    documents = Documents.of(tokenizer.encode_chat(record.messages, record.tools) for record in records(train))
batch = next(Loader(documents, rows=4, seq_len=128))
print(tokenizer.decode(batch["tokens"][0, :40].tolist(), skip_special=False))

# %% [markdown]
# ## Check it against torch
# `F.cross_entropy` with all logits says the same.

# %%
params = model.init(seed=0)
output, unembed = model.apply(params, batch), model.unembed(params)
sums, reported = smooth(epsilon=0.2).terms(output, unembed, batch, ONE_DEVICE)
logits, trained = output.hidden @ unembed.weight.T, batch["weights"] != 0
expected = F.cross_entropy(logits[trained], batch["targets"][trained], label_smoothing=0.2, reduction="sum")
real = batch["segment_ids"] != 0
print(f"smoothed {sums['smoothed']:.3f} and {expected:.3f}")
assert torch.allclose(sums["smoothed"], expected, rtol=1e-5)
assert torch.allclose(sums["z"], logits.logsumexp(-1)[real].square().sum(), rtol=1e-4)

# %% [markdown]
# ## Train with it
# The step takes the loss as it takes any other, and its metrics hold each term, divided, and each reported sum. One
# run has the z-loss, the other has not.


# %%
def run(loss: Loss, steps: int = 80):
    optimizer = optimizers.adamw(optimizers.schedule("cosine", peak=3e-3, total=steps, warmup=8))
    step, state = make_train_step(model, loss, optimizer), init_state(model.init(seed=0), optimizer)
    rows = []
    for batch in (batch for batch, _ in zip(Loader(documents, rows=4, seq_len=128), range(steps), strict=False)):
        state, metrics = step(state, batch)
        tokens = batch["weights"].sum()
        rows.append({"nll": metrics["nll"] / tokens, "sure": metrics["sure"] / tokens, "z": metrics["z"].sqrt()})
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


runs = {"z-loss": run(smooth(z=0.1)), "no z-loss": run(smooth(z=0.0))}

# %%
figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
titles = {"nll": "negative log-likelihood", "sure": "share of tokens given over 1/2", "z": "|log Z|, root mean square"}
for axis, (name, title) in zip(axes, titles.items(), strict=True):
    for label, columns in runs.items():
        axis.plot(columns[name], label=label)
    axis.set(title=title, xlabel="step")
axes[0].legend()

# %% [markdown]
# ## What happened
# Both runs learned, and the z-loss did what it is for.

# %%
for label, columns in runs.items():
    print(f"{label:10}", *(f"{name} {rows[0]:.2f} -> {sum(rows[-5:]) / 5:.2f}  " for name, rows in columns.items()))
    assert columns["nll"][-1] < 0.5 * columns["nll"][0] and columns["sure"][-1] > columns["sure"][0]
assert runs["z-loss"]["z"][-1] < 0.5 * runs["no z-loss"]["z"][-1]
