"""What would make a step fit that `experiments/plan.py` finds too large: changes from cheap to dear, each planned.

Schedules cost FLOPs, bfloat16 moments digits, host memory PCIe, 8 bits more digits, other meshes exchanges.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from experiments.estimate import estimate
from experiments.plan import Options
from functional_trainer import backend
from sharding_rules.mesh import parse

REMAT: tuple[Any, ...] = ("none", "selective", "layer")


def changes(o: Options) -> Iterator[list[tuple[str, Options]]]:
    """Yield what might make a step fit, the cheapest kinds first: its schedule, its moments, what is in host memory,
    8 bits, its mesh, more devices."""
    parts = [n for n in range(o.micro_batches, o.rows + 1) if o.rows % n == 0]
    schedules = [(r, n) for r in REMAT[REMAT.index(o.remat) :] for n in parts]
    yield [(f"--remat {r} --micro-batches {n}", replace(o, remat=r, micro_batches=n)) for r, n in schedules]
    o, least = replace(o, remat="layer", micro_batches=o.rows), f"--remat layer --micro-batches {o.rows}"
    half = replace(o, optim=replace(o.optim, moments="bfloat16"))
    yield [(f"{least} --optim.moments bfloat16", half)]
    sent: list[Any] = [("optimizer",), ("activations",), ("activations", "optimizer")]
    sent = [s for s in sent if set(s) > set(o.offload)]
    yield [(f"{least} --offload {' '.join(s)}", replace(o, offload=s)) for s in sent]
    if o.precision != "fp8" and backend.E4M3 in backend.PEAKS[o.gpu]:
        yield [(f"{least} --precision fp8", replace(o, precision="fp8"))]
    sizes, ways = parse(o.mesh), []
    for axis, n in ((axis, n) for axis in ("cp", "tp", "ep") for n in (2, 4, 8)):
        if sizes.get("fsdp", 1) % n == 0:
            ways.append((1 if axis == "ep" else n, sizes | {"fsdp": sizes["fsdp"] // n, axis: sizes.get(axis, 1) * n}))
    more = [(1, sizes | {"fsdp": sizes.get("fsdp", 1) * n}) for n in (2, 4, 8)]
    for some in (ways, *([one] for one in more)):
        found = []
        for times, mesh in some:
            text, rows = ",".join(f"{axis}={n}" for axis, n in mesh.items()), o.rows * times
            change = f"--mesh {text} --rows {rows} --remat layer --micro-batches {rows}"
            found.append((change, replace(o, mesh=text, rows=rows, micro_batches=rows)))
        yield found


def cheapest(o: Options) -> str:
    """Return the change that makes a step fit, of the first kind that does the one with the fastest tokens."""
    for tried in changes(o):
        able = []
        for name, changed in tried:
            try:
                e = estimate(changed)
            except ValueError:  # the model does not divide so
                continue
            able += [(e.longest * e.world / e.tokens, name, e)] if e.fits else []
        if able:
            _, name, e = min(able, key=lambda x: x[0])
            return f"{name}: {e.held / 2**30:.1f} GiB, {e.longest:.3f} s a step if nothing is overlapped"
    all_ = "recomputation, micro-batches, bfloat16 moments, host memory, 8 bits, cp, tp, ep, 8 times the devices"
    return f"nothing of what was tried: {all_}"
