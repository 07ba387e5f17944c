"""Compile every Triton kernel and config of ours for NVIDIA's generations, without a GPU, and report what came out.

    python experiments/benchmarks/compiled_kernels.py --write docs/kernels.md

Of each: registers a thread, bytes spilled, shared memory, and the tensor-core instruction. A kernel must not spill,
must fit into shared memory, and must use wgmma on sm_90 and tcgen05 on sm_100 in 16 bit and in 8, which sm_80 has not.
Exits with status 1 otherwise.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from functional_trainer import config

TARGETS = {"sm80": (80, 163 * 1024), "sm90": (90, 227 * 1024), "sm100": (100, 227 * 1024)}
"""Compute capability, and the most shared memory of a block in bytes (CUDA programming guide, capabilities)."""
POINTERS = {
    "_up": "x w bias scale order ends h a", "_rows": "x w ends y", "_down_grad": "dout w scale order ends h a dh ds",
    "_weight_grad": "g x order ends dw", "_combine": "y inverse ends out", "_row_sums": "x ends out",
    "_count": "expert counts", "_place": "expert ends order inverse", "_symmetric": "x add y",
    "_quantise": "x x_scale order ends data scale turned turned_scale", "_product": "a a_scale b b_scale order ends y",
}  # fmt: skip
WHOLE = {"order": "*i64", "ends": "*i64", "inverse": "*i64", "ds": "*fp32", "expert": "*i64", "counts": "*i32"}
CONSTS = {
    "E": 128, "E2": 128, "K": 8, "SCALED": True, "GATHER_G": True, "GATHER_X": False, "TRANSPOSED": True,
    "BIASED": False, "ACT": "swiglu", "LIMIT": 7.0, "ALPHA": 1.702,
}  # fmt: skip
CLAMPED, GEGLU = {"ACT": "clamped_swiglu", "BIASED": True}, {"ACT": "geglu"}
PLAIN = {"E2": 256, "SCALED": False, "GATHER": False}
EIGHT = dict.fromkeys(("data", "turned", "a", "b"), "*fp8e4nv") | dict.fromkeys(
    ("x_scale", "scale", "turned_scale", "a_scale", "b_scale"), "*fp32"
)


class Kernel(NamedTuple):
    """A kernel of a module of `kernels`, and what it is compiled with besides CONSTS and WHOLE.

    Those that multiply matrices have no `tile` (rows, outputs) of their own: they are compiled with every config.
    `dtype` is given where none of `--dtypes` is its operands' type. EIGHT are the types of kernels in 8 bits.
    """

    module: str
    fn: str
    consts: dict[str, Any]
    tile: tuple[int, int] | None = None
    warps: int = 4
    dtype: str | None = None
    types: dict[str, str] = {}


KERNELS = {
    "up": Kernel("moe_triton", "up", {}), "up, clamped": Kernel("moe_triton", "up", CLAMPED),
    "up, geglu": Kernel("moe_triton", "up", GEGLU), "rows": Kernel("moe_triton", "rows", {}),
    "down_grad": Kernel("moe_triton", "down_grad", {}),
    "down_grad, clamped": Kernel("moe_triton", "down_grad", CLAMPED),
    "down_grad, geglu": Kernel("moe_triton", "down_grad", GEGLU),
    "weight_grad": Kernel("moe_triton", "weight_grad", {}),
    "combine": Kernel("moe_triton", "combine", {}, (1, 1024)),
    "row_sums": Kernel("moe_triton", "row_sums", {}, (32, 128)),
    "count": Kernel("sort_triton", "count", {"BLOCK": 128, "E2": 256}, (128, 256), dtype="int64"),
    "count, 512 experts": Kernel(
        "sort_triton", "count", {"BLOCK": 128, "E": 512, "E2": 1024}, (128, 1024), dtype="int64"
    ),
    "place": Kernel("sort_triton", "place", {"BLOCK": 128}, (128, 128), dtype="int64"),
    "symmetric": Kernel("symmetric_triton", "symmetric", {"ALPHA": 2.0315, "BETA": -4.775, "ADDED": True}),
    **{
        f"quantise, {form}": Kernel("fp8_triton", "quantise", PLAIN | {"FORM": form}, (128, 128), 8, types=EIGHT)
        for form in ("rows", "both", "square")
    },
    "quantise, again": Kernel(
        "fp8_triton", "quantise", {"E2": 256, "SCALED": True, "GATHER": True, "FORM": "turned"}, (128, 128), 8, "e4m3",
        EIGHT | {"x": "*fp8e4nv"},
    ),
    **{
        f"product, over {what}": Kernel(
            "fp8_triton", "product", {"E2": 256, "SUM": what, "GATHER": what == "inputs"}, types=EIGHT
        )
        for what in ("inputs", "outputs", "rows")
    },
}  # fmt: skip
"""What is compiled. "clamped" is GPT-OSS's activation with biases; quantised "again" are gathered rows in 8 bits."""
BEGIN, END = "<!-- written by compiled_kernels.py from here -->\n\n", "\n<!-- to here -->\n"


@dataclass(frozen=True)
class Options:
    generations: tuple[Literal["sm80", "sm90", "sm100"], ...] = ("sm80", "sm90", "sm100")
    """Targets."""
    dtypes: tuple[Literal["bf16", "fp16", "fp32"], ...] = ("bf16", "fp16", "fp32")
    """Types of operands."""
    only: tuple[str, ...] = tuple(KERNELS)
    """Kernels and variants to compile."""
    write: Path | None = None
    """Page whose table is written anew, between its marks."""


class Compiled(NamedTuple):
    """What a compiler made of a kernel."""

    kernel: str
    generation: str
    dtype: str
    config: str
    registers: int
    spilled: int
    shared: int
    instruction: str

    @property
    def wrong(self) -> str:
        """Say what is not as it must be."""
        wanted = {"sm80": "mma", "sm90": "wgmma", "sm100": "tcgen05"}[self.generation]
        wanted += ", 8 bit" if KERNELS[self.kernel].types else ""
        cores = self.dtype != "fp32" or KERNELS[self.kernel].types  # whose result is float32
        if not KERNELS[self.kernel].tile and cores and self.instruction != wanted:
            return f"uses {self.instruction}, not {wanted}"
        if self.spilled:
            return f"spills {self.spilled} bytes"
        most = TARGETS[self.generation][1]
        return f"wants {self.shared} bytes of shared memory, {most} are there" if self.shared > most else ""


def source(kernel: Any, dtype: str, sizes: dict[str, Any], whole: dict[str, str]) -> Any:
    """Return a kernel with the types of its arguments; sizes of the model are multiples of 16, as all real ones are."""
    from triton.compiler import ASTSource

    pointers = POINTERS[kernel.fn.__name__].split()
    consts = {k: v for k, v in (CONSTS | sizes).items() if k in kernel.arg_names}
    types = {name: whole.get(name, f"*{dtype}") if name in pointers else "i32" for name in kernel.arg_names}
    types |= dict.fromkeys(consts, "constexpr")
    given = [i for i, name in enumerate(kernel.arg_names) if name not in consts]
    places = {(kernel.arg_names.index(k),): v for k, v in consts.items()}
    attrs = {(i,): [["tt.divisibility", 16]] for i in given}
    return ASTSource(fn=kernel, signature=types, constexprs=places, attrs=attrs)


def usage(cubin: bytes) -> tuple[int, int]:
    """Return registers and local bytes (which is where spills go) of a kernel's code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", said) for name in ("REG", "STACK", "LOCAL"))
    return int(registers[1]), int(stack[1]) + int(local[1])  # type: ignore[index]


def compiled(o: Options) -> Iterator[Compiled]:
    """Compile everything that is asked for."""
    import triton
    from triton.backends.compiler import GPUTarget

    from kernels.moe_triton import Config

    for generation in o.generations:
        for name in o.only:
            k = KERNELS[name]
            module = importlib.import_module(f"kernels.{k.module}")
            if k.types and not module.CONFIGS[generation]["product"]:
                continue
            for dtype in (k.dtype,) if k.dtype else o.dtypes:
                wide = dtype == "fp32" and not k.types
                tiles = () if k.tile else (module.FLOAT32,) if wide else module.CONFIGS[generation][k.fn]
                for c in [Config(*k.tile, 1, k.warps, 1)] if k.tile else tiles:
                    sizes = {"BM": c.BM, "BN": c.BN, "BK": c.BK, "PRECISION": "ieee"}
                    made = triton.compile(
                        source(getattr(module, f"_{k.fn}"), dtype, sizes | k.consts, WHOLE | k.types),
                        target=GPUTarget("cuda", TARGETS[generation][0], 32),
                        options={"num_warps": c.warps, "num_stages": c.stages},
                    )
                    ptx = made.asm["ptx"]
                    marks = ("tcgen05.mma", "tcgen05"), ("wgmma.mma", "wgmma"), ("mma.sync", "mma")
                    instruction = next((short for mark, short in marks if mark in ptx), "fma")
                    instruction += ", 8 bit" if re.search(r"mma\S*(\.e4m3\.e4m3|kind::f8f6f4)", ptx) else ""
                    size = f"{c.BM} x {c.BN} x {c.BK}, {c.warps} warps, {c.stages} stages"
                    got = usage(made.asm["cubin"])
                    yield Compiled(name, generation, dtype, size, *got, made.metadata.shared, instruction)


def table(found: list[Compiled]) -> str:
    """Lay out what was found."""
    head = "| kernel | target | type | tile, warps, stages | registers | spilled | shared, KiB | products by |"
    rows = [
        f"| {c.kernel} | {c.generation} | {c.dtype} | {c.config} | {c.registers} | {c.spilled} | "
        f"{c.shared / 1024:.1f} | {c.instruction} |" for c in found
    ]  # fmt: skip
    return "\n".join([head, "|---|---|---|---|---|---|---|---|", *rows]) + "\n"


def main(o: Options) -> None:
    from rich.progress import track

    if odd := [name for name in o.only if name not in KERNELS]:
        raise ValueError(f"--only {odd[0]}: no kernel is called so; these are: {'; '.join(KERNELS)}")
    found = []
    for c in track(compiled(o), "compiling", total=None, transient=True):
        found.append(c)
    text = table(found)
    if o.write:
        if BEGIN not in (page := o.write.read_text("utf-8")) or END not in page:
            raise ValueError(f"--write {o.write}: it has no marks between which the table would be written")
        before, rest = page.split(BEGIN)
        o.write.write_text(before + BEGIN + text + END + rest.split(END)[1], "utf-8")
    print(text)
    wrong = [f"{c.kernel} on {c.generation} in {c.dtype} ({c.config}): {c.wrong}" for c in found if c.wrong]
    print(
        "\n".join(wrong) or f"{len(found)} compiled: no spills, within shared memory, on tensor cores in 16 bit and 8"
    )
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
