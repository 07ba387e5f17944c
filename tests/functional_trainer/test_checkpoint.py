"""functional_trainer.checkpoint: bit-exact, atomic, reshardable, and clear when the disk says no."""

import math
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

from functional_trainer import checkpoint

ROOT = Path(__file__).parents[2]


def state(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    weight = torch.randn(5, 3, 7, generator=draw)
    weight[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    return {
        "params/layers/0/attn/q": weight,
        "params/layers/0/norm": torch.randn(11, generator=draw).bfloat16(),
        "moments/layers/0/attn/q": torch.randn(7, 5, dtype=torch.float64, generator=draw).T,
        "step": torch.tensor(step),
        "empty": torch.zeros(0, 2),
    }


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


EXTRA = {"data": {"state": b"\x00\xff", "epoch": 3}, "config": {"lr": 1e-3, "files": ["a", None, True]}, "é": "\n"}


def test_round_trip_is_bit_exact_and_in_place(tmp_path):
    saved = state(3)
    saved["params/layers/0/attn/q"].requires_grad_()
    path = checkpoint.save(tmp_path, 3, saved, EXTRA)
    assert path == tmp_path / "checkpoints" / "step-3" and checkpoint.latest(tmp_path) == path
    like = {p: torch.full_like(t, 9) for p, t in saved.items()}
    like["params/layers/0/attn/q"].requires_grad_()
    storage = {p: t.data_ptr() for p, t in like.items()}
    got, extra = checkpoint.load(path, like)
    assert extra == EXTRA and got.keys() == saved.keys()
    for p, t in saved.items():
        assert got[p] is like[p] and got[p].data_ptr() == storage[p] and bits(got[p].detach()) == bits(t.detach()), p


def test_a_view_does_not_drag_its_whole_storage_along(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": torch.zeros(1_000_000)[:4]}, {})
    assert sum(f.stat().st_size for f in path.iterdir()) < 20_000


def test_keeps_the_newest_and_counts_numerically(tmp_path):
    for step in (2, 9, 10, 100):
        checkpoint.save(tmp_path, step, state(step), {}, keep=3)
    assert names(tmp_path) == ["step-10", "step-100", "step-9"]
    assert checkpoint.latest(tmp_path).name == "step-100"
    assert checkpoint.latest(tmp_path / "absent") is None
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        checkpoint.save(tmp_path, 101, state(1), {}, keep=0)


def test_an_earlier_step_replaces_the_branch_it_abandons(tmp_path):
    for step in (1, 2, 3, 4):
        checkpoint.save(tmp_path, step, state(step), {"branch": "old"})
    checkpoint.save(tmp_path, 2, state(20), {"branch": "new"}, keep=5)
    assert names(tmp_path) == ["step-1", "step-2"]
    tensors, extra = checkpoint.load(checkpoint.latest(tmp_path), state(0))
    assert extra == {"branch": "new"} and int(tensors["step"]) == 20


def test_a_crash_while_replacing_a_step_leaves_one_of_the_two(tmp_path):
    path = checkpoint.save(tmp_path, 2, state(2), {})
    path.rename(path.with_name("step-2.old"))  # the instant between the two renames
    (tmp_path / "checkpoints" / "step-2.tmp").mkdir()
    assert int(checkpoint.load(checkpoint.latest(tmp_path), state(0))[0]["step"]) == 2
    checkpoint.save(tmp_path, 2, state(5), {})
    path.with_name("step-2.old").mkdir()
    checkpoint.save(tmp_path, 2, state(6), {})
    assert names(tmp_path) == ["step-2"] and int(checkpoint.load(path, state(0))[0]["step"]) == 6


def test_the_best_is_replaced_whole_and_is_no_newest(tmp_path):
    assert checkpoint.best_loss(tmp_path) == math.inf
    path = checkpoint.save_best(tmp_path, state(2), {"eval_loss": 0.5})
    assert path == tmp_path / "checkpoints" / "best" and checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 3, state(3), {}, keep=1)
    path.rename(path.with_name("best.old"))  # the instant between the two renames
    path.with_name("best.tmp").mkdir()
    found = checkpoint.find(path, "--resume")
    assert int(checkpoint.load(found, state(0))[0]["step"]) == 2 and checkpoint.best_loss(tmp_path) == 0.5
    checkpoint.save_best(tmp_path, state(4), {"eval_loss": 0.25})
    assert names(tmp_path) == ["best", "step-3"] and checkpoint.find(path, "--resume") == path
    assert int(checkpoint.load(path, state(0))[0]["step"]) == 4 and checkpoint.best_loss(tmp_path) == 0.25
    assert checkpoint.find(tmp_path, "--resume").name == "step-3"
    with pytest.raises(ValueError, match=r"--resume \.: no checkpoint there"):
        checkpoint.find(".", "--resume")


def test_a_misfit_lists_everything_and_touches_nothing(tmp_path):
    path = checkpoint.save(tmp_path, 1, state(1), {})
    like = state(2)
    like["params/more"] = torch.zeros(2)
    del like["empty"]
    like["params/layers/0/attn/q"] = torch.zeros(5, 7, 3)
    like["params/layers/0/norm"] = torch.zeros(11)
    with pytest.raises(ValueError) as error:
        checkpoint.load(path, like)
    assert [line.strip() for line in str(error.value).splitlines()][1:] == [
        "params/layers/0/attn/q: torch.float32 [5, 3, 7] in the checkpoint, torch.float32 [5, 7, 3] in the model",
        "params/layers/0/norm: torch.bfloat16 [11] in the checkpoint, torch.float32 [11] in the model",
        "empty: torch.float32 [0, 2] in the checkpoint, absent in the model",
        "params/more: absent in the checkpoint, torch.float32 [2] in the model",
    ]
    assert "does not fit the model in 4 of 6 tensors" in str(error.value)
    with pytest.raises(ValueError, match="in 34 of 36 tensors") as error:
        checkpoint.load(path, like | {f"params/more/{i}": torch.zeros(2) for i in range(30)})
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "  ... and 14 more"
    assert torch.equal(like["step"], torch.tensor(2))


def test_a_folder_that_is_no_checkpoint_names_those_near_it(tmp_path):
    checkpoint.save(tmp_path, 4, state(4), {})
    for path in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-5"):
        with pytest.raises(FileNotFoundError, match="is not a checkpoint folder.*near it: step-4"):
            checkpoint.load(path, state(0))


@pytest.mark.parametrize("extra", [{"a": (1, 2)}, {1: "a"}, {"a": torch.zeros(1)}, {"a": {"base64": "AA=="}}])
def test_extra_that_would_change_is_refused(tmp_path, extra):
    with pytest.raises(ValueError, match="extra"):
        checkpoint.save(tmp_path, 1, state(1), extra)
    assert not (tmp_path / "checkpoints").exists()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.root
@pytest.mark.parametrize("size", [400_000, 1_000])
def test_a_full_disk_says_so_and_leaves_the_older_checkpoints(small_disk, size):
    """Fail while tensors are written (big), and while metadata is (small, with the disk filled up beforehand)."""
    checkpoint.save(small_disk, 1, state(1), {"n": 1}, keep=1)
    if size == 1_000:
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize
        (small_disk / "filler").write_bytes(bytes(free - 8192))
    with pytest.raises(OSError) as error:
        checkpoint.save(small_disk, 2, {"x": torch.zeros(size)}, {}, keep=1)
    parts = ("step-2", "No space left on device", "MB free", f"{size * 4 / 1e6:,.1f} MB", "--keep", "--out", "intact")
    for part in parts:
        assert part in str(error.value), part
    assert names(small_disk) == ["step-1"]
    assert checkpoint.load(checkpoint.latest(small_disk), state(0))[1] == {"n": 1}


@pytest.mark.root
def test_a_read_only_folder_says_so(small_disk):
    checkpoint.save(small_disk, 1, state(1), {})
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OSError, match="step-2: Read-only file system .*choose another folder"):
        checkpoint.save(small_disk, 2, state(2), {})
    assert names(small_disk) == ["step-1"]


def test_a_file_in_the_way_says_so(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="cannot write checkpoint .*step-2: File exists"):
        checkpoint.save(tmp_path, 2, state(2), {})


LIMITED = """
import resource, sys, torch
from functional_trainer import checkpoint
checkpoint.save(sys.argv[1], 1, {"x": torch.zeros(10)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(sys.argv[1], 2, {"x": torch.zeros(400_000)}, {})
except OSError as error:
    print(error)
"""


def run(code: str, *args, **env) -> subprocess.Popen:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_file_size_limit_says_so(tmp_path):
    out = run(LIMITED, tmp_path).communicate(timeout=60)[0]
    assert "File too large" in out and "ulimit" in out and names(tmp_path) == ["step-1"], out


def test_what_is_written_behind_is_the_state_when_it_was_asked_for(tmp_path):
    """The run goes on at once and changes every tensor in place, for several checkpoints in a row."""

    def write(step: int, go: threading.Event, copy, group):
        assert go.wait(60) and group is None
        checkpoint.save(tmp_path, step, copy, {"step": step}, group=group)

    tensors = state(0)
    with checkpoint.Behind() as behind:
        for step in (1, 2, 3):
            for p, t in state(step).items():
                tensors[p].copy_(t)
            go = threading.Event()
            behind(partial(write, step, go), tensors)
            assert checkpoint.latest(tmp_path) == (tmp_path / "checkpoints" / f"step-{step - 1}" if step > 1 else None)
            for t in tensors.values():
                t.zero_()
            go.set()
    for step in (1, 2, 3):
        got, _ = checkpoint.load(tmp_path / "checkpoints" / f"step-{step}", state(0))
        assert all(bits(got[p]) == bits(t) for p, t in state(step).items())


def test_what_fails_behind_is_raised_by_the_next_call_or_at_the_end(tmp_path):
    (tmp_path / "checkpoints").write_text("")

    def write(tensors, group):
        checkpoint.save(tmp_path, 2, tensors, {}, group=group)

    with pytest.raises(OSError, match="cannot write checkpoint .*step-2: File exists"), checkpoint.Behind() as behind:
        behind(write, state(1))
    with pytest.raises(OSError, match="File exists"), checkpoint.Behind() as behind:
        behind(write, state(1))
        behind(lambda *_: pytest.fail("called"), state(2))
    with pytest.raises(KeyError, match="first"), checkpoint.Behind() as behind:
        behind(write, state(1))
        raise KeyError("first")


KILLED = """
import os, random, signal, sys, time, torch
from functional_trainer import checkpoint
torch.set_num_threads(1)
folder, draw, reached, between = sys.argv[1], random.Random(0), 0, 0
for trial in range(25):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            reached += 1
            tensors = {f"layers/{i}": torch.full((997,), reached) for i in range(5)}
            checkpoint.save_best(folder, tensors, {"step": reached, "eval_loss": -reached})
            checkpoint.save(folder, reached, tensors, {"step": reached}, keep=2)
            os.write(write, reached.to_bytes(4, "little"))
    os.close(write)
    start = time.monotonic()
    told = os.read(read, 4)  # one save is done: the next take about as long, wait for a part of it
    time.sleep(draw.uniform(0, time.monotonic() - start))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    told = int.from_bytes((told + os.read(read, 1 << 20))[-4:], "little")
    between += any(name.endswith(".tmp") for name in os.listdir(folder + "/checkpoints"))
    for path in sorted(os.listdir(folder + "/checkpoints")):
        if not path.endswith(".tmp"):
            like = {f"layers/{i}": torch.zeros(997, dtype=torch.int64) for i in range(5)}
            tensors, extra = checkpoint.load(folder + "/checkpoints/" + path, like)
            assert all((t == extra["step"]).all() for t in tensors.values()), path
            assert path in (f"step-{extra['step']}", "best", "best.old"), path
    assert checkpoint.best_loss(folder) in (-told, -told - 1)
    reached = int(checkpoint.latest(folder).name[5:])
    assert reached in (told, told + 1), (reached, told)
checkpoint.save_best(folder, {"x": torch.zeros(1)}, {"eval_loss": -reached - 1})  # takes best.old away, if it is left
checkpoint.save(folder, reached + 1, {"x": torch.zeros(1)}, {}, keep=2)
print("interrupted", between, "left", *sorted(os.listdir(folder + "/checkpoints"), key=len))
assert reached >= 25 and between > 3
"""


def test_kill_9_at_any_instant_leaves_whole_checkpoints_only(tmp_path):
    process = run(KILLED, tmp_path)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0, out
    assert len(names(tmp_path)) == 3 and not any(n.endswith(".tmp") for n in names(tmp_path)), out


RANK = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor
from functional_trainer import checkpoint
folder, rank = sys.argv[1], int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
mesh = DeviceMesh("cpu", [0, 1])
full = {"a": torch.arange(6 * 5.0).view(6, 5), "b": torch.arange(7), "c": torch.tensor(2.5)}
layout = {"a": [Shard(0)], "b": [Shard(0)], "c": [Replicate()]}
place = lambda tensors, rows: {p: distribute_tensor(t, mesh, rows[p]) for p, t in tensors.items()}
path = checkpoint.save(folder, 1, {**place(full, layout), "plain": torch.ones(3)}, {"world": 2}, keep=1)
path = checkpoint.save(folder, 2, {**place(full, layout), "plain": torch.ones(3)}, {"world": 2}, keep=1)
for loss in (2.5, 1.5):
    assert checkpoint.best_loss(folder) == {2.5: float("inf"), 1.5: 2.5}[loss]
    checkpoint.save_best(folder, {**place(full, layout), "plain": torch.full((3,), loss)}, {"eval_loss": loss})
like = {**place({p: torch.zeros_like(t) for p, t in full.items()}, layout), "plain": torch.zeros(3)}
best = checkpoint.load(checkpoint.find(folder + "/checkpoints/best", "--resume"), like)[0]
assert torch.equal(best["plain"], torch.full((3,), 1.5)) and torch.equal(best["a"].full_tensor(), full["a"])
assert sorted(os.listdir(folder + "/checkpoints")) == ["best", "step-2"]
for source, rows in ((path, {"a": [Shard(1)], "b": [Replicate()], "c": [Replicate()]}),
                     (folder + "/single/checkpoints/step-7", layout)):
    like = {**place({p: torch.zeros_like(t) for p, t in full.items()}, rows), "plain": torch.zeros(3)}
    got, extra = checkpoint.load(source, like)
    for p, t in full.items():
        assert torch.equal(got[p].full_tensor(), t) and got[p].placements == tuple(rows[p]), p
    assert torch.equal(got["plain"], torch.ones(3)) and extra["world"] in (1, 2)
for at, tensors in ((folder + "/store", full), (folder + "/disk", {"x": torch.zeros(400_000)})):
    if os.path.exists(at):
        try:
            checkpoint.save(at, 3, tensors, {})
            print("no error")
        except OSError as error:
            print(error)
dist.barrier()
dist.destroy_process_group()
"""


def test_reshards_between_two_ranks_and_one_and_fails_on_both(tmp_path, small_disk):
    full = {"a": torch.arange(6 * 5.0).view(6, 5), "b": torch.arange(7), "c": torch.tensor(2.5), "plain": torch.ones(3)}
    checkpoint.save(tmp_path / "single", 7, full, {"world": 1})
    ranks = [run(RANK, tmp_path, RANK=str(r)) for r in range(2)]
    for process in ranks:
        out = process.communicate(timeout=120)[0]
        assert process.returncode == 0, out
        assert "store/checkpoints/step-3: Not a directory" in out, out
        assert "disk/checkpoints/step-3: No space left on device" in out, out
    assert names(small_disk) == []
    got, extra = checkpoint.load(checkpoint.latest(tmp_path), {p: torch.zeros_like(t) for p, t in full.items()})
    assert extra == {"world": 2} and all(torch.equal(got[p], t) for p, t in full.items())
