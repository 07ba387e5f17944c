# %% [markdown]
# # 7. Rules for a new model in five minutes
#
# A model says what it computes and names where its tensors are. A table says how these names are split over devices,
# and all that devices send each other follows. This page writes a table for a model that has none, with the mistakes
# that everybody makes, and reads what `lint` says of each. No devices are needed: `lint` runs the model's own maths on
# small tensors, whole and in parts.

# %%
import torch
import torch.nn.functional as F
from rich.console import Console

from functional_trainer import param, tree
from functional_trainer.param import Param
from sharding_rules import P, Rules, explain, zero
from sharding_rules.lint import lint
from sharding_rules.listen import Listener
from sharding_rules.mesh import parse

# %% [markdown]
# ## The model
# Embeddings, then layers of a norm and an MLP. Maths runs in `shard.local(fn, operands, results)`: the names are the
# only thing that it says about devices. `act/x` is where hidden states are; "a > b" comes as a and is wanted as b;
# "sum:" says that where the maths is split, what comes out are shares of a sum.


# %%
def specs(dim, hidden, vocab, depth):
    mlp = {"up": Param((hidden, dim), "D->F"), "down": Param((dim, hidden), "F->D")}
    return {"embed": Param((vocab, dim), "V,D"), "layers": [{"norm": Param((dim,), "D", "ones")} | mlp] * depth}


def apply(params, tokens_BS, shard):
    at = "params/layers/_/"  # one name for all layers
    look_up = shard.local(lambda w_VD, t_BS: w_VD[t_BS], ("params/embed", "batch/columns > act/ids"), ("act/x",))
    norm = shard.local(lambda x_BSD, w_D: F.rms_norm(x_BSD, w_D.shape, w_D), ("act/x", at + "norm"), ("act/x",))
    mlp = shard.local(lambda x, up, down: (x @ up.T).relu() @ down.T, ("act/x", at + "up", at + "down"), ("sum:act/x",))
    x_BSD = look_up(params["embed"], tokens_BS)
    for p in params["layers"]:
        x_BSD = x_BSD + mlp(norm(x_BSD, p["norm"]), p["up"], p["down"])
    return x_BSD


# %% [markdown]
# ## Listening
# Parameters are known from specs, so the model may be as large as you like: this one has five billion. What it asks for
# is heard from a small one, whose sizes are even and all differ, so that a dim can be told by its size.

# %%
big = {f"params/{path}": p.shape for path, p in tree.flatten(specs(4096, 16384, 65536, 36)).items()}
listener, small = Listener(), specs(6, 10, 14, 1)
apply(param.init(small, 0, torch.float64), torch.arange(14).expand(4, -1), listener)
heard = listener.heard({6: 4096})
print(sorted(heard.shapes), f"{len(heard.regions)} regions")


def check(rules, mesh):
    """Print what is wrong with a table; return the kinds of problems."""
    found = lint(rules, big, heard, parse(mesh))
    print("\n\n".join(map(str, found)) or "nothing is wrong")
    return {problem.kind for problem in found}


assert {"act/x", "act/ids", "batch/columns", "params/embed"} < {*heard.shapes}

# %% [markdown]
# ## No table
# A path without a row is an error: no row takes everything. The rows that it proposes store each parameter in parts.

# %%
assert check(Rules(()), "fsdp=8") == {"unmatched"}

# %% [markdown]
# ## Data parallelism
# `zero(...)` axes split what is stored, and are gathered before use. Plain axes split also what is computed: here the
# rows of the batch. There are two slips in this table.

# %%
DATA, Z = ("dp", "fsdp"), zero("fsdp", "tp")
acts = ((r"batch/columns|act/ids", P(DATA, None)), (r"act/x", P(DATA, None, None)))
slips = ((r"params/embed", P(None, Z)), (r"params/layers/\d+/norm", P(Z)), (r"params/layers/\w+/mlp/.*", P(None, Z)))
assert check(Rules((*slips, *acts)), "fsdp=8") == {"unmatched", "dead"}

# %% [markdown]
# `\d+` matches every layer, but maths asks for `_`, which stands for any. And `up` and `down` are in no `mlp/`.

# %%
layers = ((r"params/layers/\w+/norm", P(Z)), (r"params/layers/\w+/(up|down)", P(None, Z)))
first = Rules(((r"params/embed", P(None, Z)), *layers, *acts))
assert not check(first, "fsdp=8") and not check(first, "dp=2,fsdp=64")
placed = explain.explain(first, big, parse("fsdp=8"))
Console(width=120).print(explain.parameters(placed, "a device's part on fsdp=8", torch.bfloat16))

# %% [markdown]
# ## More devices than parts
# The same table on tp does not fail anywhere, but nothing is computed in parts: half of the devices are wasted. And an
# axis size that divides nothing is refused, with one that would do.

# %%
assert check(first, "fsdp=8,tp=2") == {"wasted"}
assert check(first, "fsdp=7") == {"indivisible"}

# %% [markdown]
# ## Tensor parallelism
# tp splits hidden units: the rows of `up` and the columns of `down`. What comes out are shares of a sum, as the model
# says. That is all: two rows.

# %%
UP, DOWN, NORM = (rf"params/layers/\w+/{name}" for name in ("up", "down", "norm"))
mlp = ((UP, P("tp", zero("fsdp"))), (DOWN, P(zero("fsdp"), "tp")))
RULES = Rules(((r"params/embed", P(None, Z)), (NORM, P(Z)), *mlp, *acts))
for mesh in ("", "fsdp=64", "dp=2,fsdp=8,tp=8", "tp=16"):
    assert not check(RULES, mesh)

# %% [markdown]
# ## The same, wrong four times
# Hidden units are split in `up`, and not in `down`.

# %%
assert check(RULES.change({DOWN: P(zero("fsdp", "tp"), None)}), "fsdp=8,tp=2") == {"maths"}

# %% [markdown]
# The width of hidden states is split, so that norms see half of it: a mean over half is another mean. Nothing crashes
# in such a run. It trains something else.

# %%
width = {r"act/x": P(DATA, None, "tp"), r"params/embed": P(None, "tp"), NORM: P("tp"), UP: P(None, "tp")}
assert "maths" in check(RULES.change(width | {DOWN: P("tp", None)}), "tp=2")

# %% [markdown]
# The vocabulary is split, but this look-up does not know of parts (`kernels.embedding` does).

# %%
assert check(RULES.change({r"params/embed": P("tp", zero("fsdp"))}), "fsdp=8,tp=2") == {"whole"}

# %% [markdown]
# Each device computes its part and all is well, only that nobody stores `down` in parts. No loss curve shows that.

# %%
assert check(RULES.change({DOWN: P(None, "tp")}), "fsdp=64,tp=2") == {"giant"}

# %% [markdown]
# ## What it takes
# Put the table into `my_rules.py`, call it `RULES`, and `experiments/rules.py lint --rules my_rules.py` checks it for a
# model that the project knows, as training with `--rules my_rules.py` does before it begins.

# %%
placed = explain.explain(RULES, big, parse("dp=2,fsdp=8,tp=8"))
print(explain.totals(placed, param.count(specs(4096, 16384, 65536, 36)), torch.bfloat16))
