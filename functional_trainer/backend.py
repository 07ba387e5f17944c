"""Devices: the only file that names them. Everything else asks here, or asks a tensor where it lives."""

import ctypes
import functools
import importlib.util
import os
import platform
import resource
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

COMMUNICATION = {"cuda": "nccl", "cpu": "gloo", "npu": "hccl", "xla": "xla"}

E4M3 = torch.float8_e4m3fn
# Dense peak, FLOP/s, by a part of the device's name: NVIDIA data sheets (no sparsity), Huawei's for the 910B.
# Those of e4m3 are the sheets' "FP8 Tensor Core" halved, for they are with sparsity: 3,958 of H100 and H200 SXM, 3,026
# of H100 PCIe, 3,341 of NVL, and of the DGX B200 data sheet 72 PFLOPS for 8 devices.
_H100 = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12, torch.float64: 67e12, E4M3: 1979e12}
PEAKS: dict[str, dict[torch.dtype, float]] = {
    "H200": _H100,
    "H100 PCIe": {
        torch.bfloat16: 756e12, torch.float16: 756e12, torch.float32: 51e12, torch.float64: 51e12, E4M3: 1513e12,
    },
    "H100 NVL": {
        torch.bfloat16: 835e12, torch.float16: 835e12, torch.float32: 60e12, torch.float64: 60e12, E4M3: 1670e12,
    },
    "Laptop": {},
    "H100": _H100,
    "B200": {torch.bfloat16: 2250e12, torch.float16: 2250e12, torch.float32: 75e12, E4M3: 4500e12},
    "A100": {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12, torch.float64: 19.5e12},
    "L40S": {torch.bfloat16: 362e12, torch.float16: 362e12, torch.float32: 91.6e12},
    "RTX 4090": {torch.bfloat16: 165e12, torch.float16: 165e12, torch.float32: 82.6e12},
    "910B": {torch.bfloat16: 376e12, torch.float16: 376e12},
}  # fmt: skip
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# PyTorch reads it at its first allocation: host memory in large pages, where Linux grants them to who asks. New memory
# of hundreds of MB then costs an expert layer at real widths 8 instead of 16 % more than its products (benchmarks.md).
TO_HOST, FROM_HOST = "to host", "from host"
"""Names of ranges of a trace in which copies are begun."""


def setup(name: str = "auto", deterministic: bool | None = None) -> torch.device:
    """Choose this process's device, by type ("auto", "cuda", "cpu", "npu", "xla") or with an index ("cuda:1").

    Deterministic algorithms are the default on the CPU, where they cost nothing measurable, and off elsewhere.
    ValueError says which devices there are.
    """
    kind, _, index = name.partition(":")
    if plugin := {"npu": "torch_npu", "xla": "torch_xla"}.get(kind):
        if importlib.util.find_spec(plugin) is None:
            raise ValueError(f"--device {name}: {plugin} is not installed; pip install '.[{kind}]'")
        importlib.import_module(plugin)  # registers the device type
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    absent = kind not in COMMUNICATION or kind == "cuda" and not torch.cuda.is_available()
    if absent or not (index or "0").isdigit():
        have = [k for k in ("cuda", "cpu") if k == "cpu" or torch.cuda.is_available()]
        raise ValueError(f"--device {name}: not on this machine; it has {', '.join(have)}")
    rank = int(index or os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    if kind == "cpu":
        keep_host_memory()
    deterministic = kind == "cpu" if deterministic is None else deterministic
    if kind == "cpu":  # the other function imports Inductor, 2 s, for choices that it makes by measuring: not on a CPU
        torch.set_deterministic_debug_mode("warn" if deterministic else "default")
    else:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def keep_host_memory() -> None:
    """Let freed host memory stay with the process and use huge pages: a step allocates the same buffers every time.

    That holds for buffers of any size: none is mapped by itself, which would make Linux clear its pages anew at every
    step (benchmarks.md). All threads allocate from one arena, so that what one has freed serves the others. Only glibc
    knows these switches; elsewhere nothing happens. Huge pages work if torch has not allocated anything large yet.
    """
    if platform.system() != "Linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, (1 << 31) - 1)
    libc.mallopt(arena_max, 1)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator at its first large allocation


def probe_compiler(device: torch.device) -> None:
    """Begin to ask, in threads, what vector instructions the host's C++ compiler and cores have, if it will be used.

    Inductor asks before its first kernel, one question after another: 9 s on 2 cores where its cache on disk is empty.
    Asked in two threads while data and model are read, it costs a third of that (docs/benchmarks.md, "Start-up").
    """
    if device.type != "cpu" or platform.machine() != "x86_64":
        return
    import torch._inductor.codecache  # here, not in the threads: setuptools changes sys.meta_path under other imports
    import torch.utils.cpp_extension  # noqa: F401
    from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker

    cores = set(x86_isa_checker())
    have = [isa for isa in supported_vec_isa_list if set(str(isa).split()) <= cores]
    for half in (have[::2], have[1::2]):
        threading.Thread(target=lambda isas: [bool(isa) for isa in isas], args=(half,), daemon=True).start()


class OneThreadGloo(dist.ProcessGroupGloo):
    """A group of gloo that completes its exchanges on one thread, in order.

    PyTorch's has two, and each writes the name of what it completed to one string, without a lock: two all-gathers
    under way free its buffer twice, and some thousand steps later malloc aborts (`ProcessGroupGloo::runLoop` and
    `lastCompletedWorkName`, PyTorch 2.13).
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._threads, options._timeout = 1, timeout
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
        super().__init__(store, rank, size, options)


def complete_on_one_thread() -> None:
    """Have every group of gloo that is made from now on be a `OneThreadGloo`."""
    dist.distributed_c10d.ProcessGroupGloo = OneThreadGloo  # type: ignore[misc]


def join(device: torch.device, timeout: float = 1800, folder: str | Path = ".") -> tuple[int, int]:
    """Join the processes that torchrun or `accelerate launch` announces; return (rank, world), (0, 1) if none.

    A rank that waits longer than `timeout` seconds for the others gives up: with a traceback, and on NCCL with what its
    flight recorder holds in `<folder>/flight-recorder-<rank>`.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # exchanges that are remembered
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{folder}/flight-recorder-")
        patience = timedelta(seconds=timeout)
        store, rank, world = next(dist.rendezvous("env://", timeout=patience))
        # After a restart torchrun's store still has the addresses of the processes that are gone.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        kind = COMMUNICATION[device.type]
        complete_on_one_thread()
        dist.init_process_group(kind, store=store, rank=rank, world_size=world, timeout=patience)
    return dist.get_rank(), dist.get_world_size()


def flight_record() -> bytes:
    """Return the last exchanges of this process as JSON, nothing if there are none or this PyTorch keeps none."""
    if not dist.is_initialized():
        return b""
    name = "_dump_nccl_trace_json" if dist.get_backend() == COMMUNICATION["cuda"] else "_dump_fr_trace_json"
    return getattr(torch._C._distributed_c10d, name, bytes)()


def everyone(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return what each rank gives, in their order; a thread beside the step's needs a `host_group` of its own."""
    if not dist.is_initialized():
        return [value]
    given = [None] * dist.get_world_size()
    dist.all_gather_object(given, value, group)
    return given


def together(make: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return what `make` returns on each rank; what it raises on one ends all of them at once, none waits for it.

    Others than the one raise ValueError if it does, else RuntimeError, and say what it was and where.
    """
    value, error = None, None
    try:
        value = make()
    except Exception as raised:
        error = raised
    told = (isinstance(error, ValueError), f"{type(error).__name__}: {error}") if error else None
    given = everyone((value, told), group)
    if error:
        raise error
    for rank, (_, theirs) in enumerate(given):
        if theirs:
            raise (ValueError if theirs[0] else RuntimeError)(f"rank {rank}: {theirs[1]}")
    return [value for value, _ in given]


def host_group(timeout: float = 1800) -> dist.ProcessGroup | None:
    """Make a process group of all ranks that exchanges host memory, None without several; every rank calls this.

    A rank that waits longer than `timeout` seconds for the others gives up.
    """
    if not dist.is_initialized():
        return None
    return dist.new_group(backend=COMMUNICATION["cpu"], timeout=timedelta(seconds=timeout))


def barrier() -> None:
    """Wait for every rank, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def has_own_memory(device: torch.device) -> bool:
    """Say whether tensors of the device lie outside the host's memory."""
    return device.type != "cpu"


def memory(device: torch.device) -> int:
    """Return the bytes that this process may hold on its device: a GPU's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def describe(device: torch.device) -> str:
    """Return the device's name as its maker writes it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def peak_flops(device: torch.device, dtype: torch.dtype, count: int = 1) -> float | None:
    """Return the dense peak in FLOP/s of `count` such devices, None where it is unknown."""
    name = describe(device)
    peak = next((table.get(dtype) for key, table in PEAKS.items() if key in name), None)
    return None if peak is None else peak * count


@functools.cache
def _side(device: torch.device) -> Any:
    """Return the stream of a GPU on which copies from and to the host run beside the work."""
    return torch.cuda.Stream(device)


def send_away(x: torch.Tensor, host: torch.Tensor | None = None) -> torch.Tensor:
    """Begin to copy a tensor to host memory (pinned, on a stream of its own) and return the copy; on the CPU copy it.

    The copy may be read by `bring_back`, or after `synchronize`. `host` is where to copy to, if there is such memory.
    """
    own = x.device.type == "cuda"
    with record_function(TO_HOST):
        where = "meta" if x.is_meta else "cpu"
        host = torch.empty(x.shape, dtype=x.dtype, device=where, pin_memory=own) if host is None else host
        if not own:
            return host.copy_(x.detach())
        side = _side(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            host.copy_(x.detach(), non_blocking=True)
        x.record_stream(side)
        return host


def bring_back(x: torch.Tensor, device: torch.device) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor from host memory to a device, and return what waits for it; on the CPU copy it."""
    with record_function(FROM_HOST):
        if device.type != "cuda":
            made = x.clone()
            return lambda: made
        side, now = _side(device), torch.cuda.current_stream(device)
        with torch.cuda.stream(side):
            moved = x.to(device, non_blocking=True)
            came = side.record_event()
        moved.record_stream(now)

    def wait() -> torch.Tensor:
        now.wait_event(came)
        return moved

    return wait


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def record_memory(device: torch.device) -> None:
    """Start to record what a GPU's allocator does; elsewhere do nothing."""
    if device.type == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=100_000)


def dump_memory(device: torch.device, path: Path) -> bool:
    """Write what was recorded to `path` and stop; return whether there was anything to record."""
    if device.type == "cuda":
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
    return device.type == "cuda"


def peak_memory(device: torch.device) -> int:
    """Return the most bytes held so far: by the allocator on a GPU, by the process (resident set) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
