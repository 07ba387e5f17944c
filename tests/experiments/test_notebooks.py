"""Every notebook runs, cell by cell, draws the figures that its README promises, and is a percent file."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "notebooks"
ROW = re.compile(r"^\| \[(\w+\.py)\]\(\1\) \| .+ \| (\d+) \|$", re.M)
LISTED = ROW.findall((FOLDER / "README.md").read_text("utf-8"))


class Cell(NamedTuple):
    kind: str
    line: int
    source: str


def cells(text: str) -> Iterator[Cell]:
    """Split a percent file into cells; ValueError for text outside of them and for code in a cell of text."""
    line, kind, lines = 0, "", []
    for number, content in enumerate([*text.splitlines(), "# %%"], 1):
        if not content.startswith("# %%"):
            lines.append(content)
            continue
        if not kind and any(lines):
            raise ValueError(f"line 1: {lines[0]!r} is not in a cell")
        if kind == "markdown" and (code := [x for x in lines if x and x[:2] not in ("#", "# ")]):
            raise ValueError(f"the text cell at line {line} has code: {code[0]!r}")
        if kind:
            yield Cell(kind, line, "\n".join(lines).rstrip())
        if content not in ("# %%", "# %% [markdown]"):
            raise ValueError(f"line {number}: {content!r} begins no cell of a known kind")
        line, kind, lines = number, "markdown" if "[" in content else "code", []


def execute(path: Path) -> None:
    """Run the code cells in a fresh namespace; an error carries a note that names notebook and cell."""
    scope = {"__name__": "__main__"}
    for i, cell in enumerate(cells(path.read_text("utf-8")), 1):
        if cell.kind == "code":
            try:  # line numbers are those of the file
                exec(compile("\n" * cell.line + cell.source, str(path), "exec"), scope)
            except Exception as error:
                error.add_note(f"in {path.name}, cell {i}, which begins at line {cell.line}")
                raise


def test_the_readme_lists_exactly_what_is_there():
    names = [name for name, _ in LISTED]
    assert {file.name for file in FOLDER.iterdir() if file.is_file()} == {"README.md", *names}
    assert [name[:3] for name in names] == [f"{i:02}_" for i in range(1, 9)]


@pytest.mark.parametrize("name, figures", [(name, int(figures)) for name, figures in LISTED])
def test_it_runs(name, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plt.close("all")
    try:
        execute(FOLDER / name)
        drawn = [plt.figure(number) for number in plt.get_fignums()]
        assert len(drawn) == figures
        for figure in drawn:
            figure.canvas.draw()
            assert figure.axes and all(axis.has_data() for axis in figure.axes)
    finally:
        plt.close("all")
    assert not list(tmp_path.iterdir()), "it leaves files behind"


@pytest.mark.parametrize("name", [name for name, _ in LISTED])
def test_it_is_text_and_code_in_turns(name):
    found = list(cells((FOLDER / name).read_text("utf-8")))
    assert found[0].kind == "markdown" and found[0].source.startswith(f"# # {int(name[:2])}. ")
    assert all(cell.source for cell in found), "no cell is empty"
    code = [cell.source for cell in found if cell.kind == "code"]
    assert len(code) >= 6 and len(found) - len(code) >= 6
    assert sum("assert " in source for source in code) >= 2, "what it claims could fail"
    assert max(source.count("\n") for source in code) <= 32, "cells are short"


def test_an_error_names_notebook_and_cell(tmp_path):
    (tmp_path / "a.py").write_text("# %% [markdown]\n# Text\n\n# %%\nx = 1\n\n# %%\nassert x == 2\n")
    with pytest.raises(AssertionError) as caught:
        execute(tmp_path / "a.py")
    assert caught.value.__notes__ == ["in a.py, cell 3, which begins at line 7"]
    assert caught.traceback[-1].lineno == 7


@pytest.mark.parametrize(
    "text, report",
    [
        ("x = 1\n# %%\n", "line 1: 'x = 1' is not in a cell"),
        ("# %% [markdown]\n# Text\nx = 1\n", "text cell at line 1 has code: 'x = 1'"),
        ("# %% [raw]\ntext\n", "line 1: '# %% .raw.' begins no cell"),
    ],
)
def test_what_is_no_percent_file_is_refused(text, report):
    with pytest.raises(ValueError, match=report):
        list(cells(text))
