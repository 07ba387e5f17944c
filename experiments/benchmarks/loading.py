"""Measure what loading and saving a large Hugging Face folder on several ranks of this machine takes in host memory.

    python experiments/benchmarks/loading.py                             # 5 GB, 4 ranks, fsdp2 x ep2, bfloat16
    python experiments/benchmarks/loading.py --mesh.fsdp 4 --mesh.ep 1 --dtype float32 --json loading.json

A random Qwen3-MoE is drawn and written by the ranks, each holding its part. Ranks of new processes load it and write it
again; files must be equal, byte for byte. A peak is the highest resident set of a rank (VmHWM, mapped pages of files
included) less what it was before: after imports, joining the others and building the specs; for saving, with the model
loaded. Loading may take the rank's part and the largest leaf. Saving may take the largest leaf and a part of it on
rank 0, a part on the others. Linux only: the kernel's mark of the peak is reset through /proc.
"""

import json
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from rich.console import Console
from rich.table import Table

from functional_trainer import config
from functional_trainer.options import MeshOptions

MB = 1e6
SLACK = 64 * MB
"""Allowed besides: headers, Python objects, and code of libraries that is paged in on first use."""


@dataclass(frozen=True)
class Options:
    ranks: int = 4
    """Processes, on gloo or one accelerator each."""
    mesh: MeshOptions = field(default_factory=lambda: MeshOptions(fsdp=2, ep=2))
    layers: int = 13
    """Of 340 MB each in the files."""
    hidden: int = 2048
    experts: int = 32
    vocab: int = 65536
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """How the model is held; files are bfloat16."""
    folder: str | None = None
    """Where to put the folders, 2 x 5 GB (default: a temporary one)."""
    json: str | None = None
    """File for the figures."""


def model_config(o: Options) -> dict[str, Any]:
    from models import PRESETS

    sizes = {"hidden_size": o.hidden, "num_hidden_layers": o.layers, "vocab_size": o.vocab, "num_experts": o.experts}
    sizes["num_experts_per_tok"] = min(o.experts, PRESETS["30b-a3b"]["num_experts_per_tok"])
    return PRESETS["30b-a3b"] | sizes | {"dtype": "bfloat16"}


def resident(kind: str) -> int:
    """Return bytes of this process: `VmRSS` now, `VmHWM` the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


class Peak:
    """Seconds, and the most memory above that at the start, of what runs inside."""

    def __enter__(self) -> "Peak":
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.begun = resident("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds, self.bytes = time.perf_counter() - self.begun, resident("VmHWM") - self.before


def measured(o: Options, model, shard, device, source: Path, again: Path) -> dict[str, float]:
    """Load and save; return what one rank took, and what it may take."""
    import torch
    import torch._dynamo  # which the first DTensor imports: a hundred MB that are not the weights'

    import models
    from functional_trainer import backend, tree

    with Peak() as loading:
        model, params = models.from_pretrained(source, getattr(torch, o.dtype), device, shard)
    leaves = tree.leaves(params)
    own = [shard.storage(x).nbytes for x in leaves]
    backend.barrier()
    with Peak() as saving:
        models.save_pretrained(model, params, again, shard)
    whole, width = max(x.numel() for x in leaves), getattr(torch, o.dtype).itemsize
    return {
        "part": sum(own), "load": loading.bytes, "load_most": sum(own) + whole * 2, "load_s": loading.seconds,
        "save": saving.bytes, "save_most": max(own) + (whole * width if shard.rank == 0 else 0),
        "save_s": saving.seconds, "largest": whole * 2,
    }  # fmt: skip


def rank(number: int, o: Options, port: int, folder: str, write: bool) -> None:
    """Write the folder, or load it and save it again; the figures go to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(o.ranks)}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    import torch

    import models
    from experiments.rules import RULES
    from functional_trainer import backend
    from sharding_rules.mesh import Mesh, make
    from sharding_rules.sharder import Sharder

    torch.set_num_threads(1)
    device = backend.setup()
    backend.join(device)
    sizes = {axis: getattr(o.mesh, axis) for axis in ("dp", "fsdp", "ep", "cp", "tp")}
    model = models.from_config(model_config(o))
    grid = make(Mesh(**sizes), device, o.ranks)
    assert grid is not None, "several ranks have a mesh"
    shard = Sharder.of(RULES["qwen3_moe"], grid, model.specs)
    source, again = Path(folder) / "model", Path(folder) / "again"
    if write:
        models.save_pretrained(model, model.init(0, torch.bfloat16, device, shard), source, shard)
    else:
        figures = measured(o, model, shard, device, source, again)
        (Path(folder) / f"rank-{number}.json").write_text(json.dumps(figures))
    backend.barrier()
    backend.leave()


def spread(o: Options, folder: str, write: bool) -> None:
    """Run `rank` in `o.ranks` new processes."""
    from torch.multiprocessing import start_processes

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_processes(rank, (o, port, folder, write), nprocs=o.ranks, start_method="spawn")


def equal(a: Path, b: Path) -> bool:
    """Say whether two folders hold the same files, reading a piece at a time."""
    names = sorted(file.name for file in a.iterdir())
    if names != sorted(file.name for file in b.iterdir()):
        return False
    for name in names:
        with open(a / name, "rb") as ours, open(b / name, "rb") as theirs:
            while piece := ours.read(1 << 24):
                if piece != theirs.read(1 << 24):
                    return False
            if theirs.read(1):
                return False
    return True


def report(o: Options, rows: list[dict[str, float]], size: float, same: bool) -> bool:
    """Print the figures; return whether all is within its bound."""
    table = Table(title=f"{size / 1e9:.2f} GB in bfloat16, held as {o.dtype} by {o.ranks} ranks; MB")
    for column in ("rank", "its part", "loading", "at most", "s", "saving", "at most", "s"):
        table.add_column(column, justify="right")
    for number, row in enumerate(rows):
        cells = [f"{row[k] / MB:,.0f}" for k in ("part", "load", "load_most")] + [f"{row['load_s']:.1f}"]
        cells += [f"{row[k] / MB:,.0f}" for k in ("save", "save_most")] + [f"{row['save_s']:.1f}"]
        table.add_row(str(number), *cells)
    within = all(row[k] <= row[f"{k}_most"] + SLACK for row in rows for k in ("load", "save"))
    console = Console(width=100)
    console.print(table)
    files = "equal byte for byte" if same else "saved again as float32" if o.dtype == "float32" else "DIFFERENT"
    largest = f"{rows[0]['largest'] / MB:,.0f} MB"
    console.print(f"largest leaf {largest} in the files; files {files}; within bounds: {within}")
    return within and (same or o.dtype == "float32")


def main(o: Options) -> None:
    with tempfile.TemporaryDirectory(dir=o.folder) as folder:
        spread(o, folder, write=True)
        size = sum(file.stat().st_size for file in (Path(folder) / "model").glob("*.safetensors"))
        spread(o, folder, write=False)
        rows = [json.loads((Path(folder) / f"rank-{number}.json").read_text()) for number in range(o.ranks)]
        good = report(o, rows, size, equal(Path(folder) / "model", Path(folder) / "again"))
    if o.json:
        Path(o.json).write_text(json.dumps({"bytes": size, "ranks": rows, "good": good}, indent=2))
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
