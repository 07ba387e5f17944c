"""Write what docs/ takes from the code, tables of configuration.md and schedules.png: python experiments/docs.py"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from experiments import preference, qwen3_moe_grpo
from experiments.qwen3_moe_sft import Options
from functional_trainer import config, optimizers
from functional_trainer.loop import MAY_DIFFER
from functional_trainer.options import OptimOptions, Source

ROOT = Path(__file__).resolve().parents[1]
STEPS = 1000  # of the run whose schedules are drawn
BEGIN, END = "<!-- written by `make docs` from here -->\n\n", "\n<!-- to here -->\n"


def helps(cls: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass; a subclass's comes before its base's."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in itertools.pairwise(definition.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


def show(default: Any) -> str:
    """Write a default as on the command line, nothing for none."""
    if default is dataclasses.MISSING:
        return "must be given"
    words = default if isinstance(default, tuple) else () if default in (None, "") else (default,)
    return " ".join(f"`{word}`" for word in words)


def options(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (dotted name, type, default, help) of a dataclass's options, or of an instance's, sections left out."""
    cls = section if isinstance(section, type) else type(section)
    hints, named, texts = get_type_hints(cls), get_type_hints(cls, include_extras=True), helps(cls)
    for name in (field.name for field in dataclasses.fields(cls)):
        if not dataclasses.is_dataclass(hint := hints[name]):
            flag, default = getattr(named[name], "__metadata__", [None])[0], getattr(section, name, dataclasses.MISSING)
            yield flag.name if flag else prefix + name, hint, default, texts.get(name, "")


def sections(of: type = Options) -> dict[str, Any]:
    """Return every section of a recipe's options, as it is by default, by the prefix of its names; "" is `of`."""
    made = [field for field in dataclasses.fields(of) if dataclasses.is_dataclass(get_type_hints(of)[field.name])]
    return {"": of} | {f"{field.name}.": field.default_factory() for field in made}  # type: ignore[operator]


def table(*rows: tuple[str, ...]) -> str:
    """Lay out rows, the first of which is the head."""
    head, *others = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others]) + "\n"


def rows(section: Any, prefix: str) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each option of one section."""
    for name, hint, default, text in options(section, prefix):
        kind, free = config.describe(hint).removesuffix(" or null"), {name, name.split(".")[0]} & MAY_DIFFER
        yield f"`--{name.replace('_', '-')}`", kind, show(default), text, "yes" if free else ""


def tables() -> str:
    """Return what is generated of configuration.md: all options of one recipe, and what others have differently."""
    ours, head, parts = sections(), ("option", "value", "default", "meaning", "may differ"), list[str]()
    for recipe in (None, qwen3_moe_grpo, preference):
        script = f" of {Path(str(recipe.__file__)).relative_to(ROOT)}" if recipe else ""
        for name, section in sections(recipe.Options if recipe else Options).items():
            known = {*rows(ours[name], name)} if recipe and type(section) in (type, type(ours.get(name))) else {}
            if own := [row for row in rows(section, name) if row not in known]:
                parts.append(f"## {f'`--{name}*`' if name else 'The run'}{script}\n\n{table(head, *own)}")
    keys = [(f"`{name}`", config.describe(hint), show(default), text) for name, hint, default, text in options(Source)]
    title = "## `datasets`, in a YAML file of `--data.train` or `--data.eval`"
    return "\n".join([*parts, f"{title}\n\n{table(('key', 'value', 'default', 'meaning'), *keys)}"])


def page(text: str) -> str:
    """Return configuration.md with what stands between its marks written anew."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + tables() + END + rest.split(END)[1]


def curves() -> dict[str, list[float]]:
    """Return the learning rate of each step as a share of the peak, by schedule, at the default options."""
    import torch

    o, steps = OptimOptions(), torch.arange(STEPS)
    shapes = get_args(get_type_hints(OptimOptions)["schedule"])
    warmup = round(o.warmup * STEPS)
    return {k: optimizers.schedule(k, 1.0, STEPS, warmup, o.floor, o.decay)(steps).tolist() for k in shapes}


def main() -> None:
    from matplotlib.figure import Figure

    path = ROOT / "docs" / "configuration.md"
    path.write_text(page(path.read_text("utf-8")), "utf-8")
    figure = Figure(figsize=(7, 3), dpi=110, layout="constrained")
    axis = figure.add_subplot(xlabel=f"step of {STEPS}", ylabel="learning rate / peak", ylim=(0, 1.05))
    for (name, rates), style in zip(curves().items(), itertools.cycle(["-", "--", "-.", ":"])):
        axis.plot(rates, style, label=name)
    axis.legend()
    figure.savefig(ROOT / "docs" / "schedules.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
