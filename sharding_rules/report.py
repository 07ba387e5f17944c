"""An estimate as text and as a picture."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from sharding_rules.roofline import SPARE, Estimate

GIB, GB = 2**30, 1e9
ORDER = (
    "parameters", "optimizer", "batch", "weights cast", "weights gathered", "activations", "logits", "gradients",
    "backward", "update",
)  # fmt: skip
SEGMENTS = {
    "forward": "forward, loss",
    "last": "backward, last layer",
    "first": "backward, first layer",
    "rest": "embedding, update",
}


def table(title: str, *heads: str) -> Table:
    made = Table(title=title, title_justify="left")
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i else "left")
    return made


def memory(e: Estimate) -> Table:
    """Return what a device holds at the fullest moment of each part of a step."""
    segments = [s for s in SEGMENTS if s in e.memory]
    heads = [SEGMENTS[s] for s in segments]
    made = table("memory of a device, GiB, where it is fullest in each part of a step", "", *heads)
    for what in ORDER:
        if any(e.memory[s][what] for s in segments):
            made.add_row(what, *(f"{e.memory[s][what] / GIB:.2f}" for s in segments))
    made.add_section()
    made.add_row("together", *(f"{e.memory[s].total() / GIB:.2f}" for s in segments))
    return made


def exchanges(e: Estimate) -> Table:
    """Return what a device says in a step."""
    made = table("exchanges of a device in a step", "collective", "axes", "calls", "GB sent", "ms", "over")
    for x in e.exchanges:
        name, over = x.kind.removesuffix("_into_tensor").removesuffix("_tensor"), "links" if x.inside else "network"
        made.add_row(name, " ".join(x.axes), f"{x.calls:.0f}", f"{x.sent / GB:.3f}", f"{x.seconds * 1e3:.1f}", over)
    for direction, (nbytes, seconds) in e.copies.items():
        made.add_row(f"copy {direction}", "", "", f"{nbytes / GB:.3f}", f"{seconds * 1e3:.1f}", "PCIe")
    return made


def verdict(e: Estimate) -> str:
    """Return times, rates, and whether it fits."""
    more = e.done * e.world / e.flops
    lines = [
        f"{e.flops / e.tokens / GB:.1f} GFLOP a token; {more:.2f} times that with recomputation and the update",
        f"work {e.work:.3f} s, exchanges {e.talk:.3f} s",
    ]
    if e.host:
        lines.append(f"{e.host / GIB:.1f} GiB of each device are in host memory, pinned")
    for name, seconds in (("everything overlapped", e.shortest), ("nothing overlapped", e.longest)):
        rate = e.tokens / seconds / e.world
        lines.append(f"{name}: {seconds:.3f} s a step, {rate:,.0f} tokens/s a device, MFU {e.mfu(seconds):.1%}")
    room, most = e.device.memory * (1 - SPARE), e.memory[e.fullest].most_common(3)
    lines.append(
        f"{'fits' if e.fits else 'DOES NOT FIT'}: {e.held / GIB:.1f} GiB at most, {room / GIB:.1f} GiB are there "
        f"({e.device.memory / GB:.0f} GB less {SPARE:.0%}); most of it {', '.join(what for what, _ in most)}"
    )
    return "\n".join(lines)


def show(e: Estimate, title: str, console: Console) -> None:
    """Print an estimate."""
    console.print(title)
    console.print(memory(e))
    console.print(exchanges(e))
    console.print(verdict(e), highlight=False)


def plot(e: Estimate, title: str, path: Path) -> None:
    """Draw memory by part of the step, and the time of work and of each exchange."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    segments = [s for s in SEGMENTS if s in e.memory]
    names, base = [SEGMENTS[s].replace(", ", ",\n") for s in segments], [0.0] * len(segments)
    for what in ORDER:
        sizes = [e.memory[s][what] / GIB for s in segments]
        if max(sizes) > 0.001 * e.held / GIB:
            left.bar(names, sizes, bottom=base, label=what)
            base = [a + b for a, b in zip(base, sizes, strict=True)]
    left.axhline(e.device.memory * (1 - SPARE) / GIB, color="black", linestyle="--", linewidth=1)
    left.set(ylabel="GiB a device", title="memory")
    left.legend(fontsize=8)
    bars = [("work", e.work), *((f"{x.kind.split('_into')[0]}\n{' '.join(x.axes)}", x.seconds) for x in e.exchanges)]
    bars += [(f"copy\n{direction}", seconds) for direction, (_, seconds) in e.copies.items()]
    bars = [(name, seconds) for name, seconds in bars if seconds > 0.005 * e.longest]
    right.barh([name for name, _ in bars], [seconds for _, seconds in bars])
    right.invert_yaxis()
    right.set(xlabel="seconds a step", title="time")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
