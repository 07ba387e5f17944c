"""Hugging Face folders: the name map both ways, bit-identical files, and errors that say everything at once."""

import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from functional_trainer import hf, tree
from functional_trainer.hf import Name
from functional_trainer.param import Param, init
from functional_trainer.types import OneDevice

SPECS = {
    "embed": Param((23, 6), "V,D"),
    "layers": [
        {
            "q": Param((5, 4, 6), "D->NH"),
            "q_bias": Param((5, 4), "NH"),
            "o": Param((6, 5, 4), "NH->D"),
            "mlp": Param((2, 7, 6), "2:D->F"),
        },
        {"moe": {"gate_up": Param((3, 2, 9, 6), "E2:D->F"), "down": Param((3, 6, 9), "E:F->D")}},
    ],
    "norm": Param((6,), "D", "ones"),
}
SHARED = (
    Name("model.embed_tokens.weight", "embed"),
    Name("l.{i}.q.weight", "layers/{i}/q"),
    Name("l.{i}.q.bias", "layers/{i}/q_bias"),
    Name("l.{i}.o.weight", "layers/{i}/o"),
    Name("l.{i}.gate.weight", "layers/{i}/mlp", "0"),
    Name("l.{i}.up.weight", "layers/{i}/mlp", "1"),
    Name("norm.weight", "norm"),
)
PER_EXPERT = SHARED + (
    Name("l.{i}.experts.{e}.gate.weight", "layers/{i}/moe/gate_up", "e,0"),
    Name("l.{i}.experts.{e}.up.weight", "layers/{i}/moe/gate_up", "e,1"),
    Name("l.{i}.experts.{e}.down.weight", "layers/{i}/moe/down", "e"),
)
FUSED = SHARED + (
    Name("l.{i}.experts.gate_up", "layers/{i}/moe/gate_up"),
    Name("l.{i}.experts.down", "layers/{i}/moe/down"),
)
VARIANTS = (PER_EXPERT, FUSED)
CONFIG = {"model_type": "test", "hidden_size": 6, "dtype": "float32", "name": "é"}


def params(dtype=torch.float32, seed=0):
    return init(SPECS, seed, dtype)


def same(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def rewrite(folder, change):
    """Change the tensors of a saved single-file folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path):
    hf.save(params(), SPECS, PER_EXPERT, tmp_path / "m", CONFIG)
    return tmp_path / "m"


def error(folder, **kwargs):
    with pytest.raises(ValueError) as caught:
        hf.load(folder, SPECS, VARIANTS, **kwargs)
    return str(caught.value)


def test_shapes_and_views_follow_io():
    slots = hf.expand(SPECS, PER_EXPERT)
    assert {name: slot.shape for name, slot in slots.items() if "experts.1" in name or "l.0" in name} == {
        "l.0.q.weight": (20, 6),
        "l.0.q.bias": (20,),
        "l.0.o.weight": (6, 20),
        "l.0.gate.weight": (7, 6),
        "l.0.up.weight": (7, 6),
        "l.1.experts.1.gate.weight": (9, 6),
        "l.1.experts.1.up.weight": (9, 6),
        "l.1.experts.1.down.weight": (6, 9),
    }
    fused = hf.expand(SPECS, FUSED)
    assert fused["l.1.experts.gate_up"].shape == (3, 18, 6) and fused["l.1.experts.down"].shape == (3, 6, 9)
    assert slots["model.embed_tokens.weight"].shape == (23, 6)


def test_a_map_that_misses_a_part_of_a_leaf_is_refused():
    with pytest.raises(ValueError, match=r"covers 42 of the 84 elements of layers/0/mlp \(2, 7, 6\)"):
        hf.expand(SPECS, tuple(row for row in PER_EXPERT if row.hf != "l.{i}.up.weight"))


def test_tensors_land_where_their_name_says(folder):
    p, file = params(), load_file(folder / "model.safetensors")
    assert torch.equal(file["l.1.experts.2.up.weight"], p["layers"][1]["moe"]["gate_up"][2, 1])
    assert torch.equal(file["l.1.experts.2.down.weight"], p["layers"][1]["moe"]["down"][2])
    assert torch.equal(file["l.0.o.weight"], p["layers"][0]["o"].flatten(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("names", VARIANTS, ids=["per_expert", "fused"])
@pytest.mark.parametrize("limit", [5e9, 700])
def test_save_load_save_is_bit_identical(tmp_path, dtype, names, limit):
    config = CONFIG | {"dtype": str(dtype).removeprefix("torch.")}
    hf.save(params(dtype), SPECS, names, tmp_path / "a", config, max_shard_bytes=limit)
    loaded, used = hf.load(tmp_path / "a", SPECS, VARIANTS)
    assert used is names and same(loaded, params(dtype)) and hf.read_config(tmp_path / "a") == config
    hf.save(loaded, SPECS, used, tmp_path / "b", hf.read_config(tmp_path / "a"), max_shard_bytes=limit)
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "b").iterdir())
    assert len(files) == 2 if limit == 5e9 else len(files) > 5
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_shards_hold_at_most_the_limit_and_the_index_is_right(tmp_path):
    hf.save(params(), SPECS, PER_EXPERT, tmp_path, CONFIG, max_shard_bytes=700)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    assert index["metadata"] == {"total_parameters": 974, "total_size": 3896}
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / file, "pt") as f:
            assert sorted(f.keys()) == sorted(n for n, where in index["weight_map"].items() if where == file)
            assert f.metadata() == {"format": "pt"}
            assert len(f.keys()) == 1 or sum(f.get_tensor(n).nbytes for n in f.keys()) <= 700


class Part(OneDevice):
    """Keeps one half of a dim of every leaf that has the dim, as a mesh would."""

    def __init__(self, dim, half):
        self.dim, self.half = dim, half

    def part(self, shape):
        halves = [slice(n // 2 * self.half, n // 2 * (self.half + 1)) for n in shape]
        return tuple(halves[d] if d == self.dim else slice(0, n) for d, n in enumerate(shape))

    def init_leaf(self, path, shape, make):
        return make(self.part(shape))


@pytest.mark.parametrize("names", VARIANTS, ids=["per_expert", "fused"])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_load_reads_the_part_that_is_kept_and_converts_it(tmp_path, names, dim, half):
    hf.save(params(), SPECS, names, tmp_path, CONFIG, max_shard_bytes=700)
    shard = Part(dim, half)
    loaded, _ = hf.load(tmp_path, SPECS, VARIANTS, dtype=torch.float64, shard=shard)
    assert same(loaded, tree.map(lambda x: x.double()[shard.part(x.shape)], params()))


def test_load_opens_no_tensor_of_which_nothing_is_kept(folder, monkeypatch):
    seen = []

    class Handle:
        def __init__(self, handle):
            self.handle = handle

        def get_tensor(self, name):
            seen.append(name)
            return self.handle.get_tensor(name)

    read = hf._open
    monkeypatch.setattr(hf, "_open", lambda file: contextlib.nullcontext(Handle(read(file))))
    where = [(folder / "model.safetensors", f"l.1.experts.{e}.down.weight", (e,)) for e in range(3)]
    part = (slice(1, 2), slice(0, 6), slice(3, 6))
    down = hf._read((3, 6, 9), where, torch.float32, None, part)
    assert seen == ["l.1.experts.1.down.weight"] and torch.equal(down, params()["layers"][1]["moe"]["down"][part])


@pytest.mark.parametrize("limit", [5e9, 700])
def test_save_collects_each_leaf_once_and_only_rank_0_writes(tmp_path, limit):
    class Collecting(OneDevice):
        def collect(self, x):
            seen.append(x)
            return x * 2 if self.rank == 0 else None

    for rank in (0, 1):
        seen: list = []
        shard = Collecting()
        shard.rank = rank
        hf.save(params(), SPECS, PER_EXPERT, tmp_path / str(rank), CONFIG, shard, limit)
        assert len(seen) == len(tree.flatten(SPECS))
    assert not (tmp_path / "1").exists()
    assert same(hf.load(tmp_path / "0", SPECS, VARIANTS)[0], tree.map(lambda x: x * 2, params()))


def test_files_are_those_of_the_safetensors_library(tmp_path):
    """Byte for byte, with every dtype in one file and names that sort apart from leaves."""
    mixed = params() | {"norm": torch.rand(6, dtype=torch.float16), "embed": torch.rand(23, 6, dtype=torch.float64)}
    mixed["layers"][0]["q"] = torch.rand(5, 4, 6).bfloat16()
    names = (*PER_EXPERT[:-1], Name("a é.{i}.{e}", "layers/{i}/moe/down", "e"))
    hf.save(mixed, SPECS, names, tmp_path, CONFIG)
    again = tmp_path / "again.safetensors"
    save_file(load_file(tmp_path / "model.safetensors"), again, metadata={"format": "pt"})
    assert again.read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_loaded_tensors_do_not_depend_on_the_file(folder):
    loaded, _ = hf.load(folder, SPECS, VARIANTS)
    with (folder / "model.safetensors").open("r+b") as f:
        f.write(b"\xff" * (folder / "model.safetensors").stat().st_size)
    assert same(loaded, params())


def test_dtype_in_config_follows_the_tensors_only_when_it_must(tmp_path):
    for key in ("dtype", "torch_dtype"):
        hf.save(params(), SPECS, FUSED, tmp_path, {key: "bfloat16", "n": None})
        assert hf.read_config(tmp_path) == {key: "float32", "n": None}
    mixed = params(torch.bfloat16) | {"norm": torch.ones(6)}
    hf.save(mixed, SPECS, FUSED, tmp_path, {"dtype": "bfloat16"})
    assert hf.read_config(tmp_path) == {"dtype": "bfloat16"}
    assert same(hf.load(tmp_path, SPECS, VARIANTS)[0], mixed)
    hf.save(params(), SPECS, FUSED, tmp_path, {"model_type": "x"})
    assert hf.read_config(tmp_path) == {"model_type": "x"}


def test_everything_wrong_is_in_one_error(folder):
    def change(tensors):
        del tensors["norm.weight"], tensors["l.1.experts.2.down.weight"]
        tensors["l.0.q.weight"] = torch.ones(4, 6)
        tensors["l.0.o.weight"] = torch.ones(6, 20, dtype=torch.int8)
        tensors["surplus.weight"] = torch.ones(3, 2)
        tensors["l.1.experts.0.gate.weight"] = torch.ones(9, 6, dtype=torch.bfloat16)

    rewrite(folder, change)
    message = error(folder)
    assert message.startswith(f"{folder} does not fit the model, 6 problem(s):")
    for line in (
        "missing   norm.weight (6,)",
        "missing   l.1.experts.2.down.weight (6, 9)",
        "extra     surplus.weight (3, 2) in model.safetensors",
        "shape     l.0.q.weight is (4, 6), the model needs (20, 6)",
        "dtype     l.0.o.weight (6, 20) is I8, not one of F64, F32, BF16, F16",
        "dtype     the parts of layers/1/moe/gate_up are ['BF16', 'F32']; give a dtype",
    ):
        assert f"\n  {line}" in message, message
    assert "5 problem(s)" in error(folder, dtype=torch.float32)
    rewrite(folder, lambda tensors: tensors.update({f"more.{i}": torch.ones(1) for i in range(30)}))
    first, *lines = error(folder).splitlines()
    assert "36 problem(s):" in first and len(lines) == 21 and lines[-1] == "  ... and 16 more"


def test_a_tensor_in_two_files_or_not_in_the_index_is_an_error(tmp_path):
    hf.save(params(), SPECS, FUSED, tmp_path, CONFIG, max_shard_bytes=700)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    where = index["weight_map"].pop("norm.weight")
    (tmp_path / hf.INDEX).write_text(json.dumps(index))
    assert f"unlisted  norm.weight: in {where}, not in {hf.INDEX}" in error(tmp_path)
    index["weight_map"] |= {"norm.weight": where, "again": "model-00009.safetensors"}
    (tmp_path / hf.INDEX).write_text(json.dumps(index))
    save_file({"norm.weight": torch.ones(6)}, tmp_path / "model-00009.safetensors")
    message = error(tmp_path)
    assert f"duplicate norm.weight: in {where} and in model-00009.safetensors" in message


def test_an_equal_tied_tensor_is_accepted_and_a_different_one_is_not(folder):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(hf.load(folder, SPECS, VARIANTS)[0], params())
    rewrite(folder, lambda t: t["lm_head.weight"].add_(1))
    assert "untied    lm_head.weight (23, 6) differs from model.embed_tokens.weight" in error(folder)
    rewrite(folder, lambda t: t.update({"lm_head.weight": torch.ones(22, 6)}))
    assert "untied    lm_head.weight (22, 6) differs" in error(folder)


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(ValueError, match="does not exist; wanted a local Hugging Face folder"):
        hf.read_config("Qwen/Nowhere-3B")
    with pytest.raises(ValueError, match="is a file"):
        hf.read_config(folder / "model.safetensors")
    with pytest.raises(ValueError, match="has no config.json"):
        hf.read_config(tmp_path)
    (tmp_path / "weights.gguf").touch()
    for path in (tmp_path, tmp_path / "weights.gguf"):
        with pytest.raises(ValueError, match="GGUF is not read"):
            hf.read_config(path)
    (folder / "config.json").write_text("{,}")
    with pytest.raises(ValueError, match=r"config.json: not valid JSON"):
        hf.read_config(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="wanted a JSON object, found list"):
        hf.read_config(folder)


def test_folders_without_whole_safetensors(tmp_path, folder):
    assert "it holds no weights" in error(tmp_path)
    (tmp_path / "other.safetensors").touch()
    assert "it has other.safetensors but not the index" in error(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickles, which are not read: load and save it once with transformers" in error(tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert f"{file}: not a whole safetensors file, {cut} bytes" in error(folder)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "run `git lfs pull`" in error(folder)
    (folder / hf.INDEX).write_text('{"weight_map": {"a": "gone.safetensors", "b": "gone2.safetensors"}}')
    assert "has both" in error(folder)
    file.unlink()
    assert "2 of 2 files in model.safetensors.index.json are missing: gone.safetensors, gone2" in error(folder)
    (folder / hf.INDEX).write_text('{"weight_map": []}')
    assert 'no "weight_map"' in error(folder)


def test_a_second_save_replaces_the_model_and_nothing_else(tmp_path):
    hf.save(params(), SPECS, PER_EXPERT, tmp_path, CONFIG, max_shard_bytes=700)
    (tmp_path / "tokenizer.json").write_text("mine")
    (tmp_path / "model_notes.safetensors").write_text("mine")
    hf.save(params(seed=1), SPECS, FUSED, tmp_path, CONFIG)
    names = ["config.json", "model.safetensors", "model_notes.safetensors", "tokenizer.json"]
    assert sorted(f.name for f in tmp_path.iterdir()) == names
    assert same(hf.load(tmp_path, SPECS, VARIANTS)[0], params(seed=1))


def saves_small_files(folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        hf.save(params(seed=1), SPECS, FUSED, folder, CONFIG)
    except OSError as caught:
        os._exit(7 if "could not write the" in str(caught) and str(folder) in str(caught) else 8)
    os._exit(0)


def saves_forever(folder, started):
    for seed in range(10**9):
        hf.save(params(seed=seed), SPECS, PER_EXPERT, folder, CONFIG, max_shard_bytes=1500)
        started.set()


def test_a_full_disk_is_an_error_that_leaves_the_old_model(folder):
    child = multiprocessing.get_context("fork").Process(target=saves_small_files, args=(folder,))
    child.start()
    child.join(60)
    assert child.exitcode == 7
    assert sorted(f.name for f in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert same(hf.load(folder, SPECS, VARIANTS)[0], params())


def interrupted_or_whole(folder):
    """Return whether the folder says that it is no model; if it says it is one, it must be one of `params(seed)`."""
    try:
        hf.read_config(folder)
    except ValueError as caught:
        assert "a save into it was interrupted" in str(caught)
        return True
    loaded, _ = hf.load(folder, SPECS, VARIANTS)
    assert any(same(loaded, params(seed=seed)) for seed in range(50))
    return False


@pytest.mark.parametrize("milliseconds", [1, 7])
def test_a_kill_leaves_a_whole_model_or_one_that_says_it_is_none(tmp_path, milliseconds):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    child = context.Process(target=saves_forever, args=(tmp_path, started))
    child.start()
    assert started.wait(60)
    time.sleep(milliseconds / 1000)
    child.kill()
    child.join()
    interrupted_or_whole(tmp_path)
    hf.save(params(), SPECS, FUSED, tmp_path, CONFIG)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("limit", [5e9, 1500], ids=["one_file", "sharded"])
def test_death_between_any_two_moves_is_seen(tmp_path, monkeypatch, limit):
    class Death(BaseException):
        pass

    def dies_at(n):
        """Let every change of a directory entry count down to death."""
        left = [n]
        for name in ("replace", "unlink"):
            real = getattr(Path, name)

            def counted(self, *args, real=real, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    raise Death
                return real(self, *args, **kwargs)

            patch.setattr(Path, name, counted)

    states = []
    for n in itertools.count():
        folder = tmp_path / str(n)
        hf.save(params(seed=1), SPECS, PER_EXPERT, folder, CONFIG, max_shard_bytes=1500)
        try:
            with monkeypatch.context() as patch:
                dies_at(n)
                hf.save(params(seed=2), SPECS, PER_EXPERT, folder, CONFIG, max_shard_bytes=limit)
        except Death:
            states.append(interrupted_or_whole(folder))
            continue
        break
    assert not states[0] and all(states[1:]) and len(states) > 5
    assert same(hf.load(folder, SPECS, VARIANTS)[0], params(seed=2))
