"""functional_trainer.config: YAML and command line of nested frozen dataclasses."""

import dataclasses
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import tyro
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from functional_trainer import config


@dataclass(frozen=True)
class Data:
    seq_len: int = 512
    """Tokens per packed row."""
    train: tuple[str, ...] = ()
    """Training files."""
    pack: Literal["first-fit", "off"] = "first-fit"
    """Packing strategy."""


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    warmup: int | None = None
    """Warm-up steps."""
    no_decay: tuple[str, ...] = (".*norm",)
    """Regexes without weight decay."""


@dataclass(frozen=True)
class Recipe:
    data: Data = Data(seq_len=99)
    """Data options."""
    optim: Optim = Optim()
    """Optimizer options."""
    out: Path = Path("runs/first")
    """Run folder."""
    resume: Literal["auto", "never"] | Path = "auto"
    """What to resume."""
    name: str | None = None
    """Name."""
    shuffle: bool = True
    """Shuffle."""
    mix: dict[str, float] = field(default_factory=dict)
    """Mixing weights."""
    stages: tyro.conf.Suppress[tuple[Data, ...]] = ()
    """Later stages."""

    def __post_init__(self):
        if self.data.seq_len < 1:
            raise ValueError(f"data.seq_len must be positive, got {self.data.seq_len}")


number = st.floats(allow_nan=False)
text = st.text(max_size=12)
data_values = st.builds(Data, st.integers(1, 10**30), st.tuples(text, text), st.sampled_from(["first-fit", "off"]))
recipes = st.builds(
    Recipe,
    data=data_values,
    optim=st.builds(Optim, number, st.tuples(number, number), st.none() | st.integers(), st.lists(text).map(tuple)),
    out=text.map(Path),
    resume=st.sampled_from(["auto", "never", Path("checkpoints/step-3")]),
    name=st.none() | text,
    shuffle=st.booleans(),
    mix=st.dictionaries(text, number, max_size=3),
    stages=st.lists(data_values, max_size=2).map(tuple),
)
odd = ("1e-3", "off", "null", "~", "true", "0123", "1:30", "2020-01-01", "", "=", "<<", "a: b", "# c", "- d", "'", '"')


@given(recipes)
@example(Recipe(optim=Optim(lr=1e-3, betas=(1e300, -0.0), no_decay=odd), mix=dict.fromkeys(odd, 1e-10), name="null"))
def test_dump_then_load_gives_an_equal_config(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    config.dump(recipe, path)
    again = config.load(Recipe, path)
    assert again == recipe and repr(again) == repr(recipe)


def test_dump_keeps_order_and_feeds_the_command_line(tmp_path):
    recipe = Recipe(Data(7, ("a b.jsonl",), "off"), Optim(3e-4, (0.8, 0.99), 5), Path("x/y"), Path("c"), "off", False)
    config.dump(recipe, tmp_path / "c.yaml")
    assert list(yaml.safe_load((tmp_path / "c.yaml").read_text())) == [f.name for f in dataclasses.fields(Recipe)]
    assert config.cli(Recipe, doc="Doc.", argv=["--config", str(tmp_path / "c.yaml")]) == recipe


def test_flags_override_the_files_in_order(tmp_path):
    (tmp_path / "a.yaml").write_text("data: {train: [x]}\noptim:\n  lr: 1e-2\n  warmup: 4\nname: a\n")
    (tmp_path / "b.yaml").write_text("optim: {warmup: 9}\ndata:\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    got = config.cli(Recipe, doc="Doc.", argv=["--optim.lr", "5e-3", *files, "--no-shuffle", "--data.seq_len", "3"])
    assert got == Recipe(Data(3, ("x",)), Optim(5e-3, warmup=9), name="a", shuffle=False)


def test_a_partial_section_keeps_the_defaults_of_its_parent(tmp_path):
    (tmp_path / "c.yaml").write_text("data:\n  pack: off\n")
    assert config.load(Recipe, tmp_path / "c.yaml") == Recipe(Data(99, (), "off"))


def test_every_bad_key_is_listed_once_with_what_is_right(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "data: {seq_lenn: 4, pack: best, train: one.jsonl, seq_len: 4.0}\n"
        "optim: {lr: fast, betas: [0.9], warmup: true}\n"
        "sed: 1\nlearning_rate: 2\noptim.lr: 3\nshuffle: 1\nname: 5\nresume: [x]\nstages: [{pac: off}]\nmix: {a: b}\n"
    )
    with pytest.raises(ValueError) as error:
        config.load(Recipe, tmp_path / "c.yaml")
    got = [line.strip() for line in str(error.value).splitlines()]
    assert got[0] == f"{tmp_path / 'c.yaml'}:"
    assert set(got[1:]) >= {
        "data.seq_lenn: did you mean data.seq_len?",
        "data.pack: expected first-fit | off, got str 'best'",
        "data.train: expected a list of str, got str 'one.jsonl'",
        "data.seq_len: expected int, got float 4.0",
        "optim.lr: expected float, got str 'fast'",
        "optim.betas: expected [float, float], got list [0.9]",
        "optim.warmup: expected int or null, got bool True",
        "optim.lr: write it nested, optim: {lr: ...}",
        "shuffle: expected bool, got int 1",
        "name: expected str or null, got int 5",
        "resume: expected auto | never or a path, got list ['x']",
        "stages[0].pac: did you mean stages[0].pack?",
        "mix.a: expected float, got str 'b'",
    }
    assert len(got) == 1 + 15


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1, 2]", "the file: expected a mapping of options, got list [1, 2]"),
        ("optim: 3", "optim: expected a mapping of options, got int 3"),
        ("name: a\nname: b", "repeated key name"),
        ("name: [", "is not valid YAML"),
        ("data: {seq_len: 0}", "data.seq_len must be positive, got 0"),
        ("1: x", "1: did you mean"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=".") as error:
        config.load(Recipe, tmp_path / "c.yaml")
    assert message in str(error.value) and "c.yaml" in str(error.value)


def test_a_required_option_is_named(tmp_path):
    @dataclass(frozen=True)
    class Needs:
        path: Path

    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ValueError, match="path: missing, expected a path"):
        config.load(Needs, tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config", "absent.yaml"], "--config: absent.yaml cannot be read: No such file or directory\n"),
        (["--config", "bad.yaml"], "naem: did you mean name?"),
        (["--data.seq-lenn", "4"], "--data.seq-len INT"),
        (["--seq-len", "4"], "--data.seq-len INT"),
        (["--data.seq-len", "0"], "data.seq_len must be positive, got 0"),
    ],
)
def test_the_command_line_exits_with_the_reason(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text("naem: x\n")
    with pytest.raises(SystemExit) as status:
        config.cli(Recipe, doc="Doc.", argv=argv)
    captured = capsys.readouterr()
    assert status.value.code == 2 and message in captured.err + captured.out


def test_help_has_a_line_for_every_option(capsys):
    with pytest.raises(SystemExit) as status:
        config.cli(Recipe, doc="Fine-tune.", argv=["--help"])
    out = capsys.readouterr().out
    assert status.value.code == 0 and "Fine-tune." in out and "--config FILE.yaml" in out
    for line in ("--data.seq-len INT", "Tokens per packed row. (default: 99)", "(default: 0.9 0.95)"):
        assert line in out


def test_importing_it_is_fast_and_brings_no_torch():
    code = "import sys, functional_trainer.config; sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
    assert time.monotonic() - start < 5
