"""From what a rank does to how long it must take: a roofline of products, memory and exchanges.

    products    each takes the longer of FLOPs / peak and bytes / memory bandwidth, recomputed ones too
    update      parameters, moments and gradients are read, the first two written
    copies      bytes to and from host memory / what PCIe carries in a direction; both directions at a time
    exchanges   bytes that leave a rank / what its links carry. Of n ranks a gather, a scatter and an all-to-all send
                (n - 1) / n of their larger side, a reduction twice that (a ring's, the least there is)

A group whose ranks are all on one node uses the node's links. In one that has m ranks on each of several nodes, rings
run over the m network cards of a node at once, and an all-to-all sends to (n - m) / n of the ranks over its own card.
A step is at least the longest of work, exchanges and copies (all overlapped), and nothing being overlapped their sum.
Network cards are taken to have lanes of their own beside those to host memory. Launches,
latencies, elementwise operations, input and stragglers cost nothing here, so measured steps are longer.
"""

import itertools
import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from sharding_rules.watch import Costs


class Device(NamedTuple):
    """What a device has: bytes, and bytes per second in one direction."""

    memory: float
    bandwidth: float
    link: float
    """To the other devices of its node."""
    node: int
    network: float
    """To other nodes."""
    host: float
    """To the host's memory."""


DEVICES = {
    # NVIDIA H100 SXM data sheet: 80 GB, 3.35 TB/s, NVLink 900 GB/s in both directions together, PCIe Gen5 128 GB/s in
    # both. DGX H100 data sheet: 8 devices, each with a ConnectX-7 card of 400 Gb/s.
    "H100": Device(80e9, 3.35e12, 450e9, 8, 50e9, 64e9),
    # NVIDIA H200 SXM data sheet: 141 GB, 4.8 TB/s, NVLink 900 GB/s, PCIe Gen5 128 GB/s. DGX H200's: as DGX H100.
    "H200": Device(141e9, 4.8e12, 450e9, 8, 50e9, 64e9),
    # NVIDIA DGX B200 data sheet: 8 devices with 1440 GB and 64 TB/s together, NVLink 14.4 TB/s, 400 Gb/s a card; its
    # Xeon 8570 have PCIe 5.0.
    "B200": Device(180e9, 8e12, 900e9, 8, 50e9, 64e9),
    # NVIDIA A100 80GB SXM data sheet: 2.039 TB/s, NVLink 600 GB/s, PCIe Gen4 64 GB/s. DGX A100's: 8 cards of 200 Gb/s.
    "A100": Device(80e9, 2.039e12, 300e9, 8, 25e9, 32e9),
}
SPARE = 0.08
"""Share of the memory that is left to the context, NCCL's buffers and fragmentation: a guess, not measured."""


def together(axes: tuple[str, ...], sizes: dict[str, int], node: int) -> int:
    """Return how many ranks of a group along `axes` share a node, ranks being numbered with the last axis innermost."""
    stride, strides = 1, {}
    for axis, n in reversed(sizes.items()):
        strides[axis], stride = stride, stride * n
    at = itertools.product(*(range(0, sizes[axis] * strides[axis], strides[axis]) for axis in axes))
    return sum(sum(offsets) < node for offsets in at)


class Exchange(NamedTuple):
    """What a rank says in a step in one kind of collective along some axes."""

    kind: str
    axes: tuple[str, ...]
    calls: float
    sent: float
    """Bytes that leave the rank."""
    seconds: float
    inside: bool
    """Whether it stays within nodes."""


def exchange(kind: str, axes: tuple[str, ...], calls: float, nbytes: float, sizes: dict[str, int], d: Device):
    """Return the exchange of `nbytes` (the larger side of each call, summed) on a mesh of these devices."""
    n, m = math.prod(sizes[axis] for axis in axes), together(axes, sizes, d.node)
    sent = nbytes * (n - 1) / n * (2 if kind == "all_reduce" else 1)
    if m == n:
        seconds = sent / d.link
    elif kind == "all_to_all_single":
        seconds = max(nbytes * (m - 1) / n / d.link, nbytes * (n - m) / n / d.network)
    else:
        seconds = sent / min(d.link, m * d.network)
    return Exchange(kind, axes, calls, sent, seconds, m == n)


@dataclass(frozen=True)
class Estimate:
    """A step on a mesh of `device`s with a peak of `peak` FLOP/s, of `peak8` for products of operands in 8 bits."""

    costs: Costs
    sizes: dict[str, int]
    device: Device
    peak: float
    tokens: int
    """Tokens of a step, over all devices."""
    flops: float
    """FLOPs that they need, forward and backward, by `functional_trainer.flops`."""
    peak8: float = math.nan

    @property
    def world(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def memory(self) -> dict[str, Counter[str]]:
        """Bytes by segment of the step and by what they are."""
        found: dict[str, Counter[str]] = {}
        for key, n in self.costs.items():
            if key[0] == "memory":
                found.setdefault(key[1], Counter())[key[2]] += round(n)
        return found

    @property
    def fullest(self) -> str:
        return max(self.memory, key=lambda segment: self.memory[segment].total())

    @property
    def held(self) -> int:
        """The most bytes that a device holds."""
        return self.memory[self.fullest].total()

    @property
    def fits(self) -> bool:
        return self.held <= self.device.memory * (1 - SPARE)

    @property
    def exchanges(self) -> list[Exchange]:
        """What is said, the slowest first."""
        found = []
        for (what, *key), calls in self.costs.items():
            if what == "calls":
                kind, axes = key
                found.append(exchange(kind, axes, calls, self.costs["sent", kind, axes], self.sizes, self.device))
        return sorted(found, key=lambda e: -e.seconds)

    @property
    def done(self) -> float:
        """FLOPs of a device's products, recomputed ones too."""
        return sum(key[1] * n for key, n in self.costs.items() if key[0].startswith("product"))

    @property
    def work(self) -> float:
        """Seconds of products and of the update."""
        peaks = {"product": self.peak, "product in 8 bits": self.peak8}
        products = sum(n * max(key[1] / peaks[key[0]], key[2] / self.device.bandwidth)
                       for key, n in self.costs.items() if key[0] in peaks)  # fmt: skip
        params, moments = self.costs["rest", "params"], self.costs["rest", "moments"]
        return products + (3 * params + 2 * moments) / self.device.bandwidth

    @property
    def talk(self) -> float:
        """Seconds of exchanges."""
        return sum(e.seconds for e in self.exchanges)

    @property
    def copies(self) -> dict[str, tuple[float, float]]:
        """Bytes and seconds of copies, by direction."""
        found = {key[1]: n for key, n in self.costs.items() if key[0] == "copied"}
        return {direction: (n, n / self.device.host) for direction, n in found.items()}

    @property
    def host(self) -> int:
        """The most bytes that a device has in host memory."""
        return round(self.costs.get(("host",), 0))

    @property
    def shortest(self) -> float:
        """Seconds of a step, everything overlapped."""
        return max(self.work, self.talk, *(seconds for _, seconds in self.copies.values()))

    @property
    def longest(self) -> float:
        """Seconds of a step, nothing overlapped."""
        return self.work + self.talk + sum(seconds for _, seconds in self.copies.values())

    def mfu(self, seconds: float) -> float:
        return self.flops / seconds / self.peak / self.world
