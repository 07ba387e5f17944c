"""Which of a few configs of a kernel is the fastest for operands of a kind: measured once, kept on disk.

A kind is the device's name, the kernel, the operands' type and sizes, their rows rounded up to a power of two. The
file is `tuned-VERSION.json` in the user's cache folder, VERSION a fingerprint of this package. While a CUDA graph is
captured nothing can be measured: a kind that was not met before gets the first config, so run a step before capturing.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton.testing

T = TypeVar("T")


def generation(x: torch.Tensor) -> str:
    """Return which of NVIDIA's generations a tensor is on: "sm80", "sm90" or "sm100"; "sm90" on the host."""
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    return "sm100" if major >= 10 else "sm90" if major == 9 else "sm80"


def folder() -> Path:
    """Return where results are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "functional-trainer"


@functools.cache
def known() -> dict[str, int]:
    """Return what was measured before: the place of the fastest config by kind."""
    try:
        return json.loads(_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}


def _file() -> Path:
    import kernels

    return folder() / f"tuned-{kernels.SOURCE[:16]}.json"


def fastest(kernel: str, configs: Sequence[T], run: Callable[[T], None], x: torch.Tensor, sizes: list[Any]) -> T:
    """Return the config with which `run` takes the least time. On the host, or if there is one, nothing is measured."""
    if len(configs) == 1 or not x.is_cuda:
        return configs[0]
    rows = 2 ** (max(x.shape[0], 1) - 1).bit_length()
    kind = f"{torch.cuda.get_device_name(x.device)} {kernel} {x.dtype} {rows} {' '.join(map(str, sizes))}"
    if kind not in known():
        if torch.cuda.is_current_stream_capturing():
            return configs[0]
        times = [triton.testing.do_bench(lambda c=c: run(c), warmup=5, rep=20) for c in configs]
        known()[kind] = min(range(len(configs)), key=times.__getitem__)
        _keep()
    return configs[known()[kind]]


def _keep() -> None:
    """Write what is known; a folder that cannot be written to keeps nothing."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
        partial = _file().with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known(), indent=1), "utf-8")
        partial.replace(_file())
    except OSError:
        pass
