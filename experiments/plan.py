"""Plan a training step on a mesh of any size: memory, exchanges and time of a device, found without one.

    python experiments/plan.py --model 235b-a22b --mesh fsdp=64,ep=8 --seq-len 4096 --gpu H100 --plot plan.png

The real step runs on tensors that have shapes only; docs/planning.md says what is counted. Exits with status 1, and the
cheapest change that would help, if it does not fit.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from functional_trainer import config
from functional_trainer.options import Fp8Options, OptimOptions, within


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
    remat: str = "layer"
    """What is computed again in backward: none, selective, layer."""
    offload: tuple[Literal["activations", "optimizer"], ...] = ()
    """What is in host memory."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; masters are float32."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """Operands of products with weights, taken to be those of a kernel in 8 bits."""
    fp8: Fp8Options = field(default_factory=Fp8Options)
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

    def __post_init__(self):
        within("", self, seq_len=(1, ""), document=(0, ""), rows=(1, ""), micro_batches=(1, ""))
        if self.document and self.seq_len % self.document:
            raise ValueError(f"--document {self.document}: --seq-len {self.seq_len} is not whole documents of that")
        if self.plot and self.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot {self.plot}: name a .png, .svg or .pdf")
        if self.remat not in ("none", "selective", "layer"):
            say = "only a compiler knows what that keeps; a plan, --mesh auto's too, takes none, selective or layer"
            raise ValueError(f"--remat {self.remat}: {say}")


def pieces(o: Options, model: Any = None) -> tuple[Any, Any, Any, dict[str, int]]:
    """Return the model (of --model if not given), what builds its step, its rules and the sizes of the axes."""
    import torch

    from experiments.rules import chosen, read
    from functional_trainer import init_state, losses, make_train_step, optimizers
    from sharding_rules.mesh import parse

    model = model or read(o.model)

    def build(model, shard):
        optimizer = optimizers.from_options(o.optim, 1000, model.specs)
        how: dict[str, Any] = {k: getattr(o, k) for k in ("micro_batches", "remat", "reduce", "offload")}
        params = model.init(0, device="meta", shard=shard)
        state = init_state(params, optimizer, offload="optimizer" in o.offload)
        return make_train_step(model, losses.sft(), optimizer, shard=shard, **how), state

    sizes = parse(o.mesh)
    return replace(model, dtype=getattr(torch, o.dtype)), build, chosen(o.rules, model, sizes), sizes


def eight(o: Options, model: Any) -> dict:
    """Return how products are in 8 bits; ValueError if the device has none."""
    from functional_trainer import backend, precision

    if o.precision == "fp8" and backend.E4M3 not in backend.PEAKS[o.gpu]:
        raise ValueError(f"--precision fp8: {o.gpu} has no products of operands in 8 bits; plan for H100, H200 or B200")
    return dict(precision.fp8(o.fp8, model)) if o.precision == "fp8" else {}


def main(o: Options) -> None:
    from rich.console import Console

    from experiments.estimate import estimate
    from experiments.fit import cheapest
    from sharding_rules import report

    e = estimate(o)
    title = (
        f"{o.model} on {o.mesh}: {e.world} x {o.gpu}, {e.tokens:,} tokens a step in rows of {o.seq_len}; {o.dtype}, "
        f"recomputed: {o.remat}, {o.micro_batches} micro-batches, {o.optim.name}"
        f"{f', products in 8 bits: {o.fp8.recipe}' * (o.precision == 'fp8')}"
        f"{', in host memory: ' * bool(o.offload)}{' and '.join(o.offload)}"
    )
    report.show(e, title, Console(width=None if sys.stdout.isatty() else 120))
    if o.plot:
        report.plot(e, title, o.plot)
    if not e.fits:
        print(f"the cheapest change that fits: {cheapest(o)}")
        raise SystemExit(1)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
