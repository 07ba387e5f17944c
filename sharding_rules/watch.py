"""What one rank holds, sends and multiplies while a step runs, op by op; tensors may be meta tensors.

Bytes are those of storages that ops return, each once and for as long as it lives, by what they are. What a copy of
`--offload` puts into host memory is not among them, and counted for itself.

    parameters, optimizer, batch   held before the step        weights cast   masters in the compute dtype
    weights gathered               a layer's, whole in use     activations    what forward made
    logits                         inside the chunked head     gradients      one for each parameter, this rank's part
    backward                       gradients of activations and of whole weights, and activations computed again
    update                         the optimizer's own tensors

The peak is kept for each segment of the step, for a segment's is linear in the number of layers and the step's is not:
"forward" with the loss and its backward, backward of the "last" layer, of "others", of the "first", and the "rest".

What a kernel of ATen takes and gives back within one call is not seen, nor what attention and grouped products hold
inside. Of collectives the larger side is counted, in bytes, and of products operands and results.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from functional_trainer import tree

Costs = dict[tuple, float]
"""("memory", segment, what): bytes; ("sent" or "calls", kind, group): bytes or times; ("product", FLOPs, bytes): times;
("rest", "params" or "moments"): bytes; ("host",): most bytes; ("copied", "to host" or "from host"): bytes. A product of
operands in 8 bits is a "product in 8 bits"."""

COLLECTIVES = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "all_to_all_single")
COPIES = ("to host", "from host")
"""Ranges of a trace in which `--offload` copies."""
OURS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # our ops have one body, whatever the device


def size(tensors: Any) -> int:
    """Return the bytes of a tree's tensors."""
    return sum(x.nbytes for x in tree.leaves(tensors) if isinstance(x, torch.Tensor))


def pairs(length: int, window: int | None, causal: bool = True) -> int:
    """Count the keys that the queries of a document see."""
    near = min(length, window or length)
    back = near * (near + 1) // 2 + (length - near) * near
    return back if causal else 2 * back - length


class _Mark(torch.autograd.Function):
    """Say when forward and backward come by, and with which gradient."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward = backward
        forward()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.backward(grad)
        return grad, None, None


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


class Watch(TorchDispatchMode):
    """Count the bytes of what is held, collectives and products; `document` is the length of documents in tokens."""

    def __init__(self, document: int = 1):
        super().__init__()
        self.document = document
        self.sizes: dict[int, tuple[int, str]] = {}
        self.now: Counter[str] = Counter()
        self.segment, self.label = "forward", "weights cast"
        self.inside: list[str] = []
        self.ranges: list[str] = []
        self.host, self.most = 0, 0
        self.peaks: dict[str, Counter[str]] = {}
        self.sent: Counter[tuple] = Counter()
        self.products: Counter[tuple] = Counter()

    @property
    def costs(self) -> Costs:
        held = {("memory", segment, what): n for segment, by in self.peaks.items() for what, n in by.items() if n}
        return held | dict(self.sent) | dict(self.products) | ({("host",): self.most} if self.most else {})

    # what is held ----------------------------------------------------------------------------------------------------

    def see(self, tensors: Any, what: str) -> None:
        """Count the storages of a tree that are new."""
        for x in tree.leaves(tensors):
            if isinstance(x, torch.Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes(), what
                self._hold(storage.nbytes(), what)
                weakref.finalize(storage, self._freed, key)
        if self.now.total() > self.peaks.get(self.segment, Counter()).total():
            self.peaks[self.segment] = self.now.copy()

    def _hold(self, nbytes: int, what: str) -> None:
        if what == "host":
            self.host += nbytes
            self.most = max(self.most, self.host)
        else:
            self.now[what] += nbytes

    def _freed(self, key: int) -> None:
        nbytes, what = self.sizes.pop(key)
        self._hold(-nbytes, what)

    def rename(self, x: torch.Tensor, what: str) -> None:
        """Say what a tensor turns out to be."""
        nbytes, old = self.sizes[key := x.untyped_storage()._cdata]
        self.now[old] -= nbytes
        self.now[what] += nbytes
        self.sizes[key] = nbytes, what

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """Name what is made here."""
        self.inside.append(what)
        try:
            yield
        finally:
            self.inside.pop()

    def leaf(self, w: torch.Tensor) -> torch.Tensor:
        """Return a parameter whose gradient is known as one."""
        return _Mark.apply(w, lambda: None, lambda grad: self.rename(grad, "gradients"))

    def marked(self, model: Any) -> Any:
        """Return the model with layers that say where the step is."""
        depth, calls, layer = len(model.specs["layers"]), Counter[str](), model.layer

        def mark(x: torch.Tensor, index: int) -> torch.Tensor:
            def forward() -> None:
                if index == 0 and not in_backward():
                    self.segment, self.label = "forward", "activations"

            def backward(grad: torch.Tensor) -> None:  # all from layer `index` on is done
                self.segment = {0: "rest", depth: "last", 1: "first"}.get(index, "others")
                self.label = "gradients" if index == 0 else self.label

            return _Mark.apply(x, forward, backward)

        def marking(p, x, rows, **options):
            index = 1 if in_backward() else calls["forward"] % depth
            calls["forward"] += not in_backward()
            made, aux = layer(p, mark(x, index), rows, **options)
            return mark(made, depth) if index == depth - 1 else made, aux

        return replace(model, layer=marking)

    # ops -------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs, copies = func.overloadpacket.__name__, kwargs or {}, self.ranges[-1:]
        if name.startswith("linear_logprob") and func.namespace == "functional_trainer":
            with self.within("logits"), self:
                made = func.redispatch(OURS, *args, **kwargs)
        elif name == "wait_tensor" and args[0].is_meta:  # elsewhere it returns what it was given, of shapes a copy
            made = args[0]
        else:
            made = func(*args, **kwargs)
        if func.namespace == "_c10d_functional" and (kind := name.removesuffix("_")) in COLLECTIVES:
            self.sent["calls", kind, args[-1]] += 1
            self.sent["sent", kind, args[-1]] += max(args[0].nbytes, made.nbytes)
        elif count := FLOPS.get(name):
            kind = "product in 8 bits" if name.startswith("fp8") else "product"
            self.products[kind, count(self.document, *args), size((args, made))] += 1
        elif func.namespace == "profiler":
            self._range(*args)
        elif copies and copies[0] in COPIES and name in ("copy_", "clone"):
            self.sent["copied", copies[0]] += made.nbytes
        away = "host" if copies == ["to host"] else None
        self.see(made, away or (self.inside[-1] if self.inside else "backward" if in_backward() else self.label))
        return made

    def _range(self, name: Any, *args: Any) -> None:
        """Note that a range of this name begins, or that the innermost one ends."""
        if isinstance(name, str):
            self.ranges.append(name)
        else:
            self.ranges.pop()


def _mm(document: int, *args) -> int:
    a, b = (x for x in args if isinstance(x, torch.Tensor) and x.ndim > 1)  # a bias is a vector
    return 2 * a.numel() * b.shape[-1]


def _addmm(document: int, total, a, b) -> int:
    return 2 * a.numel() * b.shape[-1]


def _grouped(document: int, x, w, counts, order, inverse, slots, gather, combine) -> int:
    return 2 * x.shape[0] * (slots if gather else 1) * w.shape[1] * w.shape[2]


def _eight(document: int, a, a_scale, b, *others) -> int:
    return 2 * a.numel() * b.shape[-2]


def _attention(document: int, q, k, v, window: int | None, causal: bool, scores: int, values: int) -> int:
    """Count products of each query with the keys that it sees, of the head dims of scores and of values.

    What the blocks of a prefix see ahead of them is not counted.
    """
    seen = q.shape[0] * q.shape[1] // document * pairs(document, window, causal)
    return 2 * q.shape[2] * (scores * q.shape[3] + values * v.shape[3]) * seen


FLOPS: dict[str, Callable[..., int]] = {
    "mm": _mm,
    "matmul": _mm,  # inside our ops, where autograd does not take it apart
    "bmm": _mm,
    "addmm": _addmm,
    "addmm_": _addmm,
    "fp8_matmul": _eight,
    "fp8_grouped_matmul": _eight,
    "grouped_matmul": _grouped,
    "grouped_matmul_grad": lambda document, grad, *args: 2 * _grouped(document, *args),
    "grouped_weight_grad": lambda document, grad, x, counts: 2 * x.numel() * grad.shape[1],
    "attention_documents": lambda document, q, k, v, segments, window, scale, causal=True, *rest: _attention(
        document, q, k, v, window, causal, 1, 1
    ),
    "attention_documents_grad": lambda document, grad, q, k, v, segments, out, lse, window, scale, causal=True, *rest: (
        _attention(document, q, k, v, window, causal, 3, 2)  # scores again, and four products
    ),
}
"""FLOPs of ops that are products, by name."""
