"""A disk that is full or read-only: one message, older checkpoints intact, and the same command goes on later."""

import importlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from functional_trainer import checkpoint
from tests.experiments import sft_runs
from tests.experiments.sft_runs import learned, run, same_checkpoint, same_state

pytestmark = [pytest.mark.root, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
FLAGS = (
    *("--model.path", "moe", "--compile", "off", "--optim.lr", 1e-2, "--steps", 6, "--batch", 4, "--data.seq-len", 64),
    *("--data.train", "train.jsonl", "--data.eval", "eval.jsonl", "--eval-every", 2, "--save-every", 2),
    *("--keep-best", "--samples", 1),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a model, data and a whole run."""
    place = tmp_path_factory.mktemp("disk")
    sft_runs.folder(place / "moe")
    sft_runs.chats(place / "train.jsonl", 40)
    sft_runs.chats(place / "eval.jsonl", 6, seed=1)
    run(place, *FLAGS, "--out", "whole")
    return place


@pytest.fixture
def disk(place) -> Iterator[Path]:
    disk = place / "small"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)
    disk.rmdir()


@dataclass(frozen=True)
class Full:
    """Called in a run before it starts: fill its disk to the last page when a function is entered for the n-th time."""

    place: str
    nth: int
    disk: Path

    def __call__(self) -> None:
        module, _, path = self.place.partition(":")
        owner, calls = importlib.import_module(module), []
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        function = getattr(owner, name)

        def filled(*args, **options):
            calls.append(1)
            if len(calls) == self.nth:
                with open(self.disk / "filler", "wb", buffering=0) as filler:
                    for size in (1 << 16, 1 << 12):
                        try:
                            while True:
                                filler.write(bytes(size))
                        except OSError:
                            pass
            return function(*args, **options)

        setattr(owner, name, filled)


CASES = {  # where, the n-th time, the message, checkpoints that must be there then
    "config": ("functional_trainer.config:dump", 1, "--out small/run cannot be written: No space left on device", ()),
    "tokens": ("functional_trainer.data.cache:_write", 1, "cannot write the token cache small/cache: No space", ()),
    "metrics": ("functional_trainer.metrics:Metrics.log", 4, "cannot write the metrics of step 4", ("step-2", "best")),
    "samples": ("functional_trainer.metrics:Metrics.samples", 2, "cannot write", ("step-2", "best")),
    "tensors": (
        "functional_trainer.checkpoint:_Writer.write_data", 4,
        "cannot write checkpoint small/run/checkpoints/step-4: No space left on device", ("step-2", "best"),
    ),
    "extra": (
        "functional_trainer.checkpoint:_publish", 2,
        "cannot write checkpoint small/run/checkpoints/step-2: No space left on device", ("best",),
    ),
    "best": (
        "functional_trainer.checkpoint:_Writer.write_data", 3,
        "cannot write checkpoint small/run/checkpoints/best: No space left on device", ("step-2", "best"),
    ),
    "hf": ("functional_trainer.hf:_write", 1, "could not write the", ("step-4", "step-6", "best")),
    "tokenizer": ("functional_trainer.data.chat:Tokenizer.save", 1, "small/run/hf", ("step-4", "step-6", "best")),
}  # fmt: skip


QUICK = ("tokens", "extra", "hf")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(place, disk, case):
    where, nth, message, kept = CASES[case]
    flags = (*FLAGS, "--data.cache", "small/cache", "--out", "small/run")
    printed = run(place, *flags, status=1, setup=Full(where, nth, disk))
    last = printed.splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in printed, printed
    assert "No space left on device" in last, printed
    found = {path.name for path in (disk / "run").glob("checkpoints/*")}
    assert found == set(kept)
    for name in found:
        sft_runs.tensors(disk / "run" / "checkpoints" / name)
    (disk / "filler").unlink()
    run(place, *flags)
    assert learned(disk / "run") == learned(place / "whole")
    same_state(disk / "run", place / "whole")
    same_checkpoint(*(out / "checkpoints" / "best" for out in (disk / "run", place / "whole")))
    for file in (place / "whole" / "hf").iterdir():
        assert (disk / "run" / "hf" / file.name).read_bytes() == file.read_bytes()
    assert not [path for path in disk.rglob("*") if path.suffix in (".tmp", ".old") or path.name == ".saving"]


def test_a_run_that_became_read_only_is_said_and_goes_on_later(place, disk):
    flags = (*FLAGS, "--out", "small/run")
    run(place, *flags)
    (disk / "run" / "checkpoints" / "step-6").rename(disk / "step-6")
    before = {path: os.stat(path).st_mtime_ns for path in disk.rglob("*")}
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    printed = run(place, *flags, status=1)
    assert "error: --out small/run cannot be written: Read-only file system; choose another folder" in printed
    assert "Traceback" not in printed and before == {path: os.stat(path).st_mtime_ns for path in disk.rglob("*")}
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert checkpoint.latest(disk / "run") == disk / "run" / "checkpoints" / "step-4"
    assert "2 are left" in run(place, *flags)
    same_state(disk / "run", place / "whole")
