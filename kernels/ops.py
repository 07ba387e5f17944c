"""How ops are defined: functions of tensors that autograd and compilers see as one node, whatever is inside.

`torch.library.custom_op` does the same, but imports the compiler at the first call of any op, two seconds that a run
without compilation need not wait (docs/benchmarks.md, "Start-up"), and compares results with arguments at every call.
"""

from collections.abc import Callable
from typing import Any

import torch


def op(name: str, gradient: bool = False) -> Callable[[Callable], Any]:
    """Make a function, annotated and free of side effects, the op `name` ("functional_trainer::..."), on any device.

    Its shapes are said by `torch.library.register_fake`. With `gradient`, so is its gradient, by `register_autograd`;
    backward through any other op raises a RuntimeError. The function itself is the op's `__wrapped__`.
    """

    def define(fn: Callable) -> Any:
        schema = torch.library.infer_schema(fn, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "default", fn)
        if not gradient:
            torch.library.register_autograd(name, lambda ctx, *grads: _refuse(name))
        made = getattr(torch.ops.functional_trainer, name.rpartition("::")[2]).default
        made.__wrapped__ = fn
        return made

    return define


def _refuse(name: str) -> None:
    raise RuntimeError(f"{name} has no gradient: it is inside of another op, whose gradient was taken already")
