"""Plan a training step on a mesh of any size: memory, exchanges and time of a device, found without one.

    python experiments/plan.py --model 235b-a22b --mesh fsdp=64,ep=8 --seq-len 4096 --gpu H100 --plot plan.png

The real step runs on tensors that have shapes only; docs/planning.md says what is counted. Exits with status 1, and the
cheapest change that would help, if it does not fit.
"""

import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from functional_trainer import config
from functional_trainer.options import OptimOptions


@dataclass(frozen=True)
class Options:
    model: str = "235b-a22b"
    """Hugging Face folder (config.json is enough) or preset."""
    mesh: str = "fsdp=64,ep=8"
    """Sizes of axes."""
    seq_len: int = 4096
    """Tokens of a row."""
    document: int = 0
    """Tokens of each document in a row, for the FLOPs of attention (0: a row is one)."""
    rows: int = 1
    """Rows of a step for each set of ranks that reads its own (dp x fsdp x ep sets)."""
    dispatch: Literal["exact", "static"] = "exact"
    """How tokens travel to experts; see --mesh.dispatch of training."""
    micro_batches: int = 1
    """Passes that these rows are split into."""
    remat: Literal["none", "selective", "layer"] = "layer"
    """What is computed again in backward."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; masters are float32."""
    reduce: Literal["compute", "master"] = "compute"
    """Type in which devices add gradients."""
    rules: str | None = None
    """Table of your own: FILE.py, FILE.py:NAME or FILE.yaml (default: the family's)."""
    gpu: Literal["H100", "H200", "B200", "A100"] = "H100"
    """Device, with the links and the network of its maker's server."""
    optim: OptimOptions = field(default_factory=OptimOptions)
    """Optimizer; its name and how moments are kept matter here."""
    plot: Path | None = None
    """Also draw it here."""


def pieces(o: Options, model: Any = None) -> tuple[Any, Any, Any, dict[str, int]]:
    """Return the model (of --model if not given), what builds its step, its rules and the sizes of the axes."""
    import torch

    from experiments.rules import chosen, read
    from functional_trainer import init_state, losses, make_train_step, optimizers
    from sharding_rules.mesh import parse

    model = model or read(o.model)

    def build(model, shard):
        optimizer = optimizers.from_options(o.optim, 1000, model.specs)
        how: dict[str, Any] = {"micro_batches": o.micro_batches, "remat": o.remat, "reduce": o.reduce}
        state = init_state(model.init(0, device="meta", shard=shard), optimizer)
        return make_train_step(model, losses.sft(), optimizer, shard=shard, **how), state

    sizes = parse(o.mesh)
    return replace(model, dtype=getattr(torch, o.dtype)), build, chosen(o.rules, model, sizes), sizes


def estimate(o: Options, model: Any = None) -> Any:
    """Return the `roofline.Estimate` of a step (of a model other than --model's, if given)."""
    import torch

    from functional_trainer import backend, flops
    from sharding_rules import plan, roofline

    model, _, rules, sizes = pieces(o, model)
    if o.rows % o.micro_batches:
        raise ValueError(f"--rows {o.rows} cannot be split into --micro-batches {o.micro_batches}")

    def costs(passes: int) -> dict:
        build = pieces(replace(o, micro_batches=passes), model)[1]
        rows = o.rows // o.micro_batches * passes
        return plan.plan(model, build, rules, sizes, rows, o.seq_len, o.document, o.dispatch)

    few = min(o.micro_batches, 2)  # costs are linear in the passes after the second
    total = base = costs(few)
    if o.micro_batches > 2:
        total = plan.onward(base, base, costs(3), o.micro_batches - 2)
    rows = o.rows * math.prod(sizes.get(axis, 1) for axis in ("dp", "fsdp", "ep"))
    documents = torch.full((rows * (o.seq_len // (o.document or o.seq_len)),), o.document or o.seq_len)
    need = flops.train_flops(model.specs, documents, getattr(model.config, "top_k", 0), model.config.windows)
    peak = backend.PEAKS[o.gpu][model.dtype]
    return roofline.Estimate(total, sizes, roofline.DEVICES[o.gpu], peak, rows * o.seq_len, need)


def main(o: Options) -> None:
    from rich.console import Console

    from experiments.fit import cheapest
    from sharding_rules import report

    e = estimate(o)
    title = (
        f"{o.model} on {o.mesh}: {e.world} x {o.gpu}, {e.tokens:,} tokens a step in rows of {o.seq_len}; {o.dtype}, "
        f"recomputed: {o.remat}, {o.micro_batches} micro-batches, {o.optim.name}"
    )
    report.show(e, title, Console(width=None if sys.stdout.isatty() else 120))
    if o.plot:
        report.plot(e, title, o.plot)
    if not e.fits:
        print(f"the cheapest change that fits: {cheapest(o)}")
        raise SystemExit(1)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
