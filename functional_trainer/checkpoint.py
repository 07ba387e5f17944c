"""Training state on disk: `<run>/checkpoints/step-N/`, written by torch.distributed.checkpoint (DCP).

A state is a flat `{path: tensor or DTensor}` and an `extra` dict (step, configuration, data iterator: the same on every
rank), kept as `extra.json`. A checkpoint is written as `step-N.tmp`, synced, and renamed when whole; one that leaves is
renamed before it is deleted. So a folder called `step-N` is whole at every instant, whatever is killed; `best` too, the
one with the lowest held-out loss. Ranks share the file system; the mesh that loads may differ from the one that saved.

`Behind` does this in a thread, from a copy of the state, while the run goes on. DCP is imported when it is needed: with
the DTensors that it knows of, that takes more than a second.
"""

import base64
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from functional_trainer import backend
from functional_trainer.errors import listed

NAME = re.compile(r"step-(\d+)(\.old)?")  # .old: the previous content while a new one takes its place
Writer = Callable[[Mapping[str, Tensor], Any], None]
"""Given tensors by path and the process group to use, writes checkpoints of them."""
HINTS = {
    errno.ENOSPC: "free some space, keep fewer checkpoints (--keep) or move the run to a larger disk (--out)",
    errno.EDQUOT: "the disk quota is used up: keep fewer checkpoints (--keep) or move the run elsewhere (--out)",
    errno.EFBIG: "the file size limit is too low: see `ulimit -f`",
    errno.EROFS: "the file system is read-only: choose another folder (--out)",
    errno.EACCES: "this user may not write there: change the permissions or choose another folder (--out)",
}


class Behind:
    """Call writers of checkpoints in a thread, each with a copy of the state in host memory, one after another.

    Every rank makes one and calls it with the same. What a writer raises comes out of the next call, or at the end.
    """

    def __init__(self):
        self.stager: Any = None
        self.threads = ThreadPoolExecutor(1, "checkpoint")
        self.group = backend.host_group()  # its exchanges must not mix with those of the step
        self.writing: Future | None = None

    def __enter__(self) -> "Behind":
        return self

    def __call__(self, write: Writer, tensors: Mapping[str, Tensor]) -> None:
        """Wait for the writer before, copy the tensors, and return while `write` writes the copy."""
        from functional_trainer import dcp

        self.wait()
        self.stager = self.stager or dcp.stager()
        copy = self.stager.stage(dict(tensors))
        self.writing = self.threads.submit(write, copy, self.group)

    def wait(self) -> None:
        """Wait for the writer that was called last, and raise what it raised."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def __exit__(self, kind, *_) -> None:
        self.threads.shutdown()
        if kind is None:
            self.wait()


def at_once(write: Writer, tensors: Mapping[str, Tensor]) -> None:
    """Call a writer of checkpoints as `Behind` does, but wait for it and copy nothing."""
    write(tensors, None)


def save(
    folder: str | Path, step: int, tensors: Mapping[str, Tensor], extra: dict, keep: int | None = None, *,
    group: Any = None,
) -> Path:  # fmt: skip
    """Write `<folder>/checkpoints/step-<step>` and return it; every rank calls this with the same arguments.

    The `keep` newest checkpoints stay (None: all); older ones go once the new one is whole, and so do later ones, which
    belong to a branch that this step abandons. `extra` holds JSON values (string keys, lists) and bytes. Raises OSError
    when it cannot be written: the partial checkpoint is removed, the others stay. `group` is the process group to use.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    root = Path(folder) / "checkpoints"
    final = _write(root / f"step-{step}", tensors, extra, group)
    _on_main(lambda: _prune(root, step, keep), group)
    return final


def save_best(folder: str | Path, tensors: Mapping[str, Tensor], extra: dict, *, group: Any = None) -> Path:
    """Write `<folder>/checkpoints/best` as `save` does, in the place of the last one; `extra` has its "eval_loss"."""
    return _write(Path(folder) / "checkpoints" / "best", tensors, extra, group)


def best_loss(folder: str | Path) -> float:
    """Return the held-out loss of a run folder's best checkpoint, inf if there is none."""
    path = _present(Path(folder) / "checkpoints" / "best")
    if path is None:
        return math.inf
    loss = _extra(path).get("eval_loss")
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not math.isfinite(loss):
        raise ValueError(f"{path}/extra.json: eval_loss is {loss!r}, expected a number; delete {path} to begin anew")
    return loss


def latest(folder: str | Path) -> Path | None:
    """Return the newest whole checkpoint of a run folder, or None."""
    return max(_all(Path(folder) / "checkpoints"), default=(0, False, None))[2]


def find(path: str | Path, flag: str) -> Path:
    """Return the checkpoint that a folder is, or the newest of the run that it holds; ValueError names the flag."""
    found = _present(Path(path)) or latest(path)
    if found is None:
        raise ValueError(f"{flag} {path}: no checkpoint there; wanted .../checkpoints/step-N, .../best or a run folder")
    return found


def clean(folder: str | Path) -> None:
    """Remove what a killed run left half written, or half deleted, in the checkpoints of a run folder."""
    for stale in (Path(folder) / "checkpoints").glob("*.tmp"):
        shutil.rmtree(stale)


def load(path: str | Path, like: Mapping[str, Tensor], below: str = "") -> tuple[dict[str, Tensor], dict]:
    """Read a checkpoint into the tensors of `like`, in place and bit for bit, and return (tensors, extra).

    With `below` only what has a path below it is read, and `like` must be just that. Raises FileNotFoundError if `path`
    holds no checkpoint, and one ValueError that counts missing, extra and mis-shaped tensors and lists the first;
    nothing has been written to `like` then. ValueError too for what is damaged, as far as can be seen: DCP keeps no
    checksum of numbers.
    """
    path = Path(path)
    if not (path / ".metadata").is_file() or not (path / "extra.json").is_file():
        here = ", ".join(p.name for _, _, p in sorted(_all(path)) + sorted(_all(path.parent))) or "none"
        raise FileNotFoundError(f"{path} is not a checkpoint folder (checkpoints/step-N of a run); near it: {here}")
    had = {p: kind for p, kind in _saved(path).items() if p.startswith(below)}
    want = {p: f"{t.dtype} {list(t.shape)}" for p, t in like.items()}
    problems = [
        f"{p}: {had.get(p, 'absent')} in the checkpoint, {want.get(p, 'absent')} in the model"
        for p in had | want
        if had.get(p) != want.get(p)
    ]
    if problems:
        count = f"{len(problems)} of {len(had | want)} tensors"
        raise ValueError(f"{path} does not fit the model in {count}:{listed(problems)}")
    from functional_trainer import dcp

    tensors, extra = dict(like), _extra(path)
    try:
        dcp.read(path, tensors)
    except Exception as error:
        raise _damaged(f"{path}: its tensors", error) from None
    return tensors, extra


def _saved(path: Path) -> dict[str, str]:
    """Describe the tensors that a checkpoint's index lists: type and shape by path."""
    from functional_trainer import dcp

    try:
        return dcp.index(path)
    except Exception as error:  # it is a pickle
        raise _damaged(f"{path}/.metadata", error) from None


def _extra(path: Path) -> dict[str, Any]:
    try:
        extra = _decode((path / "extra.json").read_text("utf-8"))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(f"{path}/extra.json", error) from None
    if not isinstance(extra, dict):
        raise _damaged(f"{path}/extra.json", TypeError("not an object"))
    return extra


def _damaged(what: str, error: BaseException) -> ValueError:
    why = str(error).strip().partition("\n")[0][:200]
    return ValueError(f"{what} cannot be read ({type(error).__name__}: {why}); copy it again or take another one")


def _present(path: Path) -> Path | None:
    """Return the checkpoint at `path`, or the one that it was about to replace when it was killed."""
    return next((p for p in (path, Path(f"{path}.old")) if (p / "extra.json").is_file()), None)


def _all(root: Path) -> list[tuple[int, bool, Path]]:
    """List whole checkpoints as (step, current, path)."""
    found = [(NAME.fullmatch(p.name), p) for p in root.iterdir()] if root.is_dir() else []
    return [(int(m[1]), m[2] is None, p) for m, p in found if m]


def _write(final: Path, tensors: Mapping[str, Tensor], extra: dict, group: Any) -> Path:
    from functional_trainer import dcp

    text = _encode(extra)
    partial = final.with_name(f"{final.name}.tmp")
    try:
        _on_main(lambda: _prepare(final.parent, partial), group)
        dcp.write(partial, tensors, group)
        _on_main(lambda: _publish(partial, final, text), group)
    except BaseException as error:
        if _is_main():
            shutil.rmtree(partial, ignore_errors=True)
        raise _explain(error, final, sum(t.numel() * t.element_size() for t in tensors.values())) from None
    return final


def _prepare(root: Path, partial: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    clean(root.parent)
    partial.mkdir()


def _publish(partial: Path, final: Path, extra: str) -> None:
    with open(partial / "extra.json", "w") as file:
        file.write(extra)
        file.flush()
        os.fsync(file.fileno())
    _sync(partial)
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    partial.rename(final)
    _sync(final.parent)
    if old.exists():
        _remove(old)


def _prune(root: Path, step: int, keep: int | None) -> None:
    found = sorted(_all(root), reverse=True)
    kept = [path for number, current, path in found if current and number <= step][:keep]
    for _, _, path in found:
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path.rename(path.with_name(f"{path.name}.tmp")))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _on_main(action: Callable[[], None], group: Any) -> None:
    """Run `action` on rank 0; what it raises is raised on every rank."""
    error: list[BaseException | None] = [None]
    if _is_main():
        try:
            action()
        except Exception as raised:
            error = [raised]
    if dist.is_initialized():
        dist.broadcast_object_list(error, group=group)
    if error[0] is not None:
        raise error[0]


def _explain(error: BaseException, final: Path, size: int) -> BaseException:
    """Turn whatever a failed save raised into the error to raise."""
    if not isinstance(error, OSError):
        return error
    where = next(p for p in final.parents if p.exists())
    room = f"{shutil.disk_usage(where).free / 1e6:,.1f} MB free, the checkpoint needs about {size / 1e6:,.1f} MB"
    hint = HINTS.get(error.errno or 0, "check the folder")
    reason = os.strerror(error.errno) if error.errno else str(error)
    message = f"cannot write checkpoint {final}: {reason} ({room}); {hint}. Older ones are intact."
    return OSError(error.errno or errno.EIO, message)


def _encode(extra: dict) -> str:
    def wrap(value: Any) -> dict:
        if isinstance(value, bytes):
            return {"base64": base64.b64encode(value).decode()}
        raise ValueError(f"extra holds a {type(value).__name__}, it may hold JSON values and bytes")

    text = json.dumps(extra, default=wrap)
    if _decode(text) != extra:
        raise ValueError("extra would not survive JSON: it has tuples, keys that are not strings, or nan")
    return text


def _decode(text: str) -> Any:
    return json.loads(text, object_hook=lambda d: base64.b64decode(d["base64"]) if d.keys() == {"base64"} else d)
