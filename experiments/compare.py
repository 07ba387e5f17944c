"""Compare runs: one picture of their losses, one table of how they ended, and the options that differ.

python experiments/compare.py runs/a runs/b --picture compare.png
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from the clone without installing

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from functional_trainer import config


@dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders."""
    picture: str = "compare.png"
    """Where to draw the losses."""


def summary(run: str) -> dict[str, str]:
    """Say how a run ended; ValueError if the folder holds none."""
    from functional_trainer import metrics, page

    rows, _ = metrics.history(run)
    if rows:
        return page.summary(rows)
    raise ValueError(f"{run}: no run in this folder (no metrics.jsonl, or it is empty); give folders of runs")


def table(title: str, names: tuple[str, ...], columns: list[dict[str, Any]], only_different: bool) -> Table:
    """Lay out one row a key and one column a run."""
    shown = Table(title=title)
    for head in ("", *names):
        shown.add_column(escape(head), overflow="fold")
    for key in dict.fromkeys(k for column in columns for k in column):
        cells = [str(column.get(key, "")) for column in columns]
        if not only_different or len(set(cells)) > 1:
            shown.add_row(*map(escape, (key, *cells)))
    return shown


def main(o: Options) -> None:
    from functional_trainer import page, plots

    if len(o.runs) < 2:
        raise ValueError("give at least two run folders")
    ends = [summary(run) for run in o.runs]
    files = [Path(run) / "config.yaml" for run in o.runs]
    options = [page.flat(yaml.safe_load(file.read_text("utf-8"))) if file.exists() else {} for file in files]
    try:
        plots.runs(o.runs, o.picture)
    except (OSError, ValueError) as error:
        raise ValueError(f"--picture {o.picture}: {getattr(error, 'strerror', None) or error}") from None
    console = Console()
    console.print(table("how they ended", o.runs, ends, only_different=False))
    console.print(table("options that differ", o.runs, options, only_different=True))
    console.print(f"losses are drawn in {o.picture}", highlight=False)


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__ or "")
