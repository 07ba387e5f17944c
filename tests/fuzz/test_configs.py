"""Broken YAML files and command lines: options that are what the text says, or one message that names the place."""

import contextlib
import dataclasses
import io
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

import models
from experiments.qwen3_moe_sft import Options
from functional_trainer import config, optimizers, tree
from functional_trainer.data.records import renames
from tests.fuzz.broken import ODD_TEXT, Refused, apply, change, damage, tried, twice
from tests.models import small

with tempfile.TemporaryDirectory() as _folder:
    config.dump(Options(), Path(_folder) / "c.yaml")
    YAML = (Path(_folder) / "c.yaml").read_bytes()
SPECS = models.from_config(small.MOE).specs
PLAIN = config._plain(Options(data=dataclasses.replace(Options().data, train=("a.jsonl", "b.csv"), weights=(1.0, 2.0))))


def usable(o: Options) -> None:
    """Assert that accepted options make an optimizer with sane learning rates, or say why they do not."""
    assert all(not isinstance(x, float) or math.isfinite(x) for x in tree.leaves(dataclasses.asdict(o)))
    optimizer = tried(lambda: optimizers.from_options(o.optim, 100, SPECS), "--optim.", "warm-up")
    tried(lambda: renames(o.data.columns), "--data.columns")
    tried(lambda: o.micro_batches(2), "--batch")
    if not isinstance(optimizer, Refused):
        for step in (0, 1, 50, 99, 100):
            count = torch.tensor(step)
            groups = {optimizer.group(path) for path in tree.flatten(SPECS)} - {None}
            rates = [float(optimizer.scalars(count, count, group)["lr"]) for group in groups]
            assert all(
                0 <= rate <= max(o.optim.lr, 1e-300) * 1.0001 or o.optim.groups or o.optim.floor > 1 for rate in rates
            )


def loaded(content: bytes) -> Options | Refused:
    """Load a file; if it is accepted, assert that what was read can be written and read again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.yaml"
        path.write_bytes(content)
        found = tried(lambda: config.load(Options, path), str(path))
        if isinstance(found, Options):
            config.dump(found, Path(folder) / "again.yaml")
            assert repr(config.load(Options, Path(folder) / "again.yaml")) == repr(found)
            usable(found)
        return found


def bytes_broken(damages: list) -> None:
    content = YAML
    for one in damages:
        content = one(content)
    loaded(content)


def values_broken(changes: list) -> None:
    """A value that is accepted is the one that the options have; what is refused is named."""
    value, paths = apply(PLAIN, changes)
    found = loaded(yaml.dump(value, Dumper=config._Dumper).encode())
    if isinstance(found, Options):
        flat, given = _flat(config._plain(found)), _flat(value)
        assert not {key: (x, flat.get(key)) for key, x in given.items() if x is not None and flat.get(key) != x}
    elif len(paths) == 1:
        name = [key for key in paths[0] if isinstance(key, str)][-1]  # that of a list, not the place in it
        assert name.replace("_", "-") in found.message.replace("_", "-") or "mapping" in found.message


def _flat(value: Any) -> dict[str, Any]:
    """Flatten, numbers as floats, so that 1 and 1.0 are equal, and nan equal to itself."""
    number = lambda x: repr(float(x)) if isinstance(x, int | float) and not isinstance(x, bool) else x  # noqa: E731
    return {path: number(x) for path, x in tree.flatten(value).items()}


TEXTS = ["!!int x", "!!float x", "!!bool x", "!!map [a]", "!!map 3", "!!timestamp x", "!!binary 3", "!!set [a]"]
TEXTS += ["!!python/object:os.system x", "!!merge x", "&a [*a]", "*nothing", "[" * 1000, "{" * 1000, "9" * 5000, "\t"]
TEXTS += ["1" + "0" * 400, "? [a]\n: b", "a: b: c", "\ufeff", "|\n x", "<<: 3", "x" * 9000 + ": 1", "--- 1\n--- 2"]
TEXTS += ["[&a [x, x], &b [*a, *a], &c [*b, *b]" + ", &c [*c, *c]" * 30 + "]"]


def text_broken(text: str, before: str) -> None:
    """Put YAML's odder syntax in the place of a value or of a line."""
    loaded((before + text + "\nsteps: 3\n").encode())


FLAGS = [f"--{path.replace('/', '.').replace('_', '-')}" for path in tree.flatten(dataclasses.asdict(Options()))]
FLAGS += ["--data.train", "--keep-best", "--no-keep-best", "--config", "--nothing", "--", "-", "--batch=", "--out=="]
VALUES = [*ODD_TEXT, "0", "1", "-1", "0.5", "-0.5", "1e400", "nan", "inf", "99999999999999999999999", "auto", "None"]
VALUES += ["a.jsonl", "/", "--", "True", "off", "[1, 2]", "embed -> frozen", "( -> lion", "0x10", "1_000", "\u0661"]
words = st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(st.sampled_from(VALUES), max_size=2)), max_size=4)


def command_broken(flags: list) -> None:
    argv = [word for flag, values in flags for word in (flag, *values)]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            found = config.cli(Options, doc="Doc.", argv=argv)
    except SystemExit as stop:
        message = said.getvalue()
        assert stop.code == 2 and message.strip() and "Traceback" not in message, (argv, stop.code, message)
        return
    usable(found)


test_bytes_quickly, test_bytes = twice(bytes_broken, 150, st.lists(damage, min_size=1, max_size=3))
test_values_quickly, test_values = twice(values_broken, 150, st.lists(change, min_size=1, max_size=3))
places = st.sampled_from(["", "out: ", "batch: ", "optim: ", "optim: {lr: ", "data: {train: ", "optim:\n  lr: "])
test_texts_quickly, test_texts = twice(text_broken, 60, st.sampled_from(TEXTS), places)
test_commands_quickly, test_commands = twice(command_broken, 120, words)
