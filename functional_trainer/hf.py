"""Hugging Face folders: config.json and safetensors files, to and from a tree of parameters.

A name map is a table of rows (their name, our path, index), read in both directions:

    Name("model.layers.{i}.self_attn.q_proj.weight", "layers/{i}/attn/q")
    Name("model.layers.{i}.mlp.experts.{e}.up_proj.weight", "layers/{i}/moe/gate_up", "e,1")

`{i}` is a layer. `index` picks a part of our leaf along its leading batch dims, a number or a letter of their name in
each place: their tensor is `leaf[e, 1]`. Its shape follows from `Param.io`: out dims in one, in dims in one, batch
dims kept, except that a gate/up pair "2" that is not indexed joins the out dims; tables stay as they are. Our memory
order is theirs, so every tensor is a view. A model that exists in several spellings (one tensor per expert or all in
one) has one table for each.

A folder is compared with the table before anything is read, and one error counts what is wrong and lists the first.
"""

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from functional_trainer import param, tree
from functional_trainer.errors import brief, listed, read_json
from functional_trainer.param import Param, Part
from functional_trainer.types import ONE_DEVICE

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in a header, in the order in which the library writes tensors of several."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""Tensors that a file may hold although the model has tied them to another one; they must then be equal."""


@dataclass(frozen=True)
class Name:
    """One row of a name map: their tensor name, our path, and the part of our leaf that it is."""

    hf: str
    ours: str
    index: str = ""


@dataclass(frozen=True)
class Slot:
    """Where one of their tensors lives: `leaf[index]` of our path, viewed as `shape`."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


class Entry(NamedTuple):
    """One tensor as a safetensors header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def hf_shape(p: Param, indexed: int = 0) -> tuple[int, ...]:
    """Return the shape that Hugging Face gives to `p` with its first `indexed` batch dims picked."""
    if "," in p.io:
        return p.shape
    out, inn = p.out_in
    batch, sizes = p.batch[indexed:], p.shape[indexed:]
    kept = tuple(n for n, letter in zip(sizes, batch, strict=False) if letter != "2")
    body = sizes[len(batch) :]
    outs = math.prod(body[: len(out)]) * (2 if "2" in batch else 1)
    return (*kept, outs, math.prod(body[len(out) :])) if inn else (*kept, outs)


def expand(specs: tree.Tree, names: Sequence[Name]) -> dict[str, Slot]:
    """Spell a name map out for a tree of `Param`, in tree order; ValueError if it misses a part of a leaf."""
    rows = [(row, re.compile(re.escape(row.ours).replace(r"\{i\}", r"(?P<i>\d+)"))) for row in names]
    slots: dict[str, Slot] = {}
    for path, p in tree.flatten(specs).items():
        covered = 0
        for row, pattern in rows:
            if not (match := pattern.fullmatch(path)):
                continue
            places = [place for place in row.index.split(",") if place]
            ranges = [range(p.shape[d]) if s.isalpha() else (int(s),) for d, s in enumerate(places)]
            shape = hf_shape(p, len(places))
            for index in itertools.product(*ranges):
                slots[row.hf.format(**match.groupdict(), **dict(zip(places, index, strict=True)))] = Slot(
                    path, index, shape
                )
                covered += math.prod(shape)
        if covered != math.prod(p.shape):
            raise ValueError(f"the name map covers {covered} of the {math.prod(p.shape)} elements of {path} {p.shape}")
    return slots


def read_config(path: str | Path) -> dict[str, Any]:
    """Read `config.json` of a Hugging Face folder; ValueError says what the path is if it is none."""
    folder = Path(path)
    if folder.suffix == ".gguf" or (folder.is_dir() and not (folder / "config.json").exists() and _any(folder, "gguf")):
        raise ValueError(f"{folder}: GGUF is not read; use the folder of safetensors it was made from")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; wanted a local Hugging Face folder (config.json and safetensors)")
    file = folder / "config.json"
    if not file.exists():
        raise ValueError(f"{folder} has no config.json: not a Hugging Face folder, or a save into it was interrupted")
    return read_json(file)


def load(
    path: str | Path,
    specs: tree.Tree,
    variants: Sequence[Sequence[Name]],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    shard=ONE_DEVICE,
) -> tuple[tree.Tree, Sequence[Name]]:
    """Read the parameters of a folder, leaf by leaf, in `dtype` (None: the file's), placed by `shard.init_leaf`.

    Of each leaf this process holds and reads the part that it keeps. `variants` are the name maps the folder may be
    written in; the one that fits best is used and returned. Missing, extra, duplicate and mis-shaped tensors and
    unknown dtypes are in one ValueError, which counts them and lists the first.
    """
    folder = Path(path)
    files, promised = _files(folder)
    with ExitStack() as stack:
        handles = {file: stack.enter_context(_open(file)) for file in files}
        entries, problems = _scan(handles, promised)
        held, needed = sum(math.prod(e.shape) for e in entries.values()), param.count(specs)
        if needed > 10 * held + 10**6:  # before each tensor of so large a model is named
            what = f"config.json is of a model of {needed:.3g} parameters"
            raise ValueError(f"{folder}: {what}, the files hold {held:.3g}")
        expanded = [expand(specs, names) for names in variants]
        best = min(range(len(variants)), key=lambda v: len(expanded[v].keys() ^ entries.keys()))
        slots = expanded[best]
        parts: dict[str, list[str]] = {}
        for name, slot in slots.items():
            parts.setdefault(slot.path, []).append(name)
        problems += _mismatches(slots, entries) + _mixed(parts, entries, dtype) + _untied(slots, entries, handles)
        if problems:
            raise ValueError(f"{folder} does not fit the model, {len(problems)} problem(s):{listed(problems)}")
    flat = {}
    for leaf_path, p in tree.flatten(specs).items():
        where = [(entries[name].file, name, slots[name].index) for name in parts[leaf_path]]
        kind = dtype or DTYPES[entries[parts[leaf_path][0]].dtype]
        flat[leaf_path] = shard.init_leaf(leaf_path, p.shape, partial(_read, p.shape, where, kind, device))
    return tree.unflatten(flat, like=specs), variants[best]


def _read(
    shape: tuple[int, ...], where: Sequence[tuple[Path, str, tuple[int, ...]]], dtype: torch.dtype, device, part: Part
) -> torch.Tensor:
    """Read a part of a leaf of this shape, whose tensors, given by (file, name, index), are mapped and not copied.

    Files are opened for it and closed after it, so that the pages that were read do not stay with the process.
    """
    leaf = torch.empty([s.stop - s.start for s in part], dtype=dtype, device=device)
    kept = [at for at in where if all(s.start <= i < s.stop for i, s in zip(at[2], part, strict=False))]
    with ExitStack() as stack:
        handles = {file: stack.enter_context(_open(file)) for file in dict.fromkeys(file for file, *_ in kept)}
        for file, name, index in kept:
            theirs = handles[file].get_tensor(name).view(shape[len(index) :])
            own = leaf[tuple(i - s.start for i, s in zip(index, part, strict=False))]
            own.copy_(theirs[part[len(index) :]])
    return leaf


def save(
    params: tree.Tree,
    specs: tree.Tree,
    names: Sequence[Name],
    path: str | Path,
    hf_config: dict[str, Any],
    shard=ONE_DEVICE,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write config.json and safetensors files of at most `max_shard_bytes` (more only for a single larger tensor).

    Rank 0 collects one leaf at a time (`shard.collect`) and writes it; the others hold none. Files appear under their
    names only when all are whole, config.json last; other files of the folder stay. OSError when the disk refuses.
    """
    folder, leaves = Path(path), tree.flatten(params)
    shards = _plan(expand(specs, names), leaves, max_shard_bytes)
    new = folder / ".saving"
    try:
        if shard.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        _write(new, shards, leaves, shard)
        if shard.rank == 0:
            if len(shards) > 1:
                _write_json(new / INDEX, _index(shards, leaves), sort_keys=True)
            _write_json(new / "config.json", _with_dtype(hf_config, {leaf.dtype for leaf in leaves.values()}))
            _publish(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values()) / 1e9
        raise OSError(f"could not write the {size:.3g} GB of the model to {folder}: {error}") from error


def _any(folder: Path, suffix: str) -> bool:
    return next(folder.glob(f"*.{suffix}"), None) is not None


def _write_json(file: Path, value: Any, sort_keys: bool = False) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """List the safetensors files of a folder, and what its index promises: `{tensor: file}` ({} without an index)."""
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise ValueError(f"{folder} has both {SINGLE} and {INDEX}: keep the one that is meant")
    if single.exists():
        return [single], {}
    if not index.exists():
        hint = "it holds no weights"
        if _any(folder, "bin") or _any(folder, "pth"):
            hint = "its weights are pickles, which are not read: load and save it once with transformers"
        elif _any(folder, "gguf"):
            hint = "GGUF is not read; use the folder of safetensors it was made from"
        elif _any(folder, "safetensors"):
            found = ", ".join(sorted(f.name for f in folder.glob("*.safetensors"))[:3])
            hint = f"it has {found} but not the index that says which tensor is where"
        raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: {hint}")
    promised = read_json(index).get("weight_map")
    if not isinstance(promised, dict) or not promised or not all(_is_name(name) for name in promised.values()):
        raise ValueError(f'{index}: no "weight_map"; wanted {{"weight_map": {{tensor name: file name}}}}')
    files = [folder / name for name in sorted(set(promised.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        what = f"{len(absent)} of {len(files)} files in {INDEX} are missing"
        raise ValueError(f"{folder}: {what}: {brief(', '.join(absent))}")
    return files, promised


def _is_name(name: Any) -> bool:
    """Whether `name` is that of a file of a folder, not a path out of it."""
    return isinstance(name, str) and name.isprintable() and 0 < len(name) < 256 and Path(name).name == name


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as f:
            if f.read(11) == b"version htt":
                raise ValueError(f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` there") from None
        what = f"not a whole safetensors file, {file.stat().st_size} bytes ({brief(error)})"
        raise ValueError(f"{file}: {what}: copy it again") from None


def _scan(handles: dict[Path, Any], promised: dict[str, str]) -> tuple[dict[str, Entry], list[str]]:
    """Read every header: `{tensor: Entry}`, and where files and index contradict each other."""
    entries: dict[str, Entry] = {}
    problems = []
    for file, handle in handles.items():
        for name in handle.keys():
            if name in entries:
                problems.append(f"duplicate {name}: in {entries[name].file.name} and in {file.name}")
            part = handle.get_slice(name)
            entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
    for name, file_name in promised.items():
        if name in entries and entries[name].file.name != file_name:
            problems.append(f"misplaced {name}: in {entries[name].file.name}, {INDEX} says {file_name}")
    unlisted = sorted(entries.keys() - promised.keys()) if promised else []
    problems += [f"unlisted  {name}: in {entries[name].file.name}, not in {INDEX}" for name in unlisted]
    return entries, problems


def _mismatches(slots: dict[str, Slot], entries: dict[str, Entry]) -> list[str]:
    extra = [name for name in entries if name not in slots and TIED.get(name) not in slots]
    lines = [f"missing   {name} {slot.shape}" for name, slot in slots.items() if name not in entries]
    lines += [f"extra     {name} {entries[name].shape} in {entries[name].file.name}" for name in extra]
    for name in (name for name in slots if name in entries):
        _, shape, dtype = entries[name]
        if shape != slots[name].shape:
            lines.append(f"shape     {name} is {shape}, the model needs {slots[name].shape}")
        if dtype not in DTYPES:
            lines.append(f"dtype     {name} {shape} is {dtype}, not one of {', '.join(DTYPES)}")
    return lines


def _mixed(parts: dict[str, list[str]], entries: dict[str, Entry], dtype: torch.dtype | None) -> list[str]:
    """Name the leaves whose parts have several dtypes: without a `dtype` to convert to, there is no right one."""
    if dtype is not None:
        return []
    found = {path: sorted({entries[n].dtype for n in names if n in entries}) for path, names in parts.items()}
    return [f"dtype     the parts of {path} are {d}; give a dtype" for path, d in found.items() if len(d) > 1]


def _untied(slots: dict[str, Slot], entries: dict[str, Entry], handles: dict[Path, Any]) -> list[str]:
    lines = []
    for name, twin in TIED.items():
        if name in slots or name not in entries or twin not in slots or twin not in entries:
            continue
        a, b = (handles[entries[n].file].get_tensor(n) for n in (name, twin))
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a, b):
            lines.append(f"untied    {name} {tuple(a.shape)} differs from {twin}, but the config ties them")
    return lines


def _plan(slots: dict[str, Slot], leaves: dict[str, torch.Tensor], limit: float) -> dict[str, dict[str, Slot]]:
    """Deal tensors, in tree order, to files of at most `limit` bytes: `{file name: {tensor: Slot}}`."""
    groups: list[dict[str, Slot]] = [{}]
    used = 0.0
    for name, slot in slots.items():
        size = math.prod(slot.shape) * leaves[slot.path].element_size()
        if groups[-1] and used + size > limit:
            groups.append({})
            used = 0.0
        groups[-1][name] = slot
        used += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{k:05d}-of-{len(groups):05d}.safetensors": group for k, group in enumerate(groups, 1)}


def _write(folder: Path, shards: dict[str, dict[str, Slot]], leaves: dict[str, torch.Tensor], shard) -> None:
    """Write safetensors files, each tensor at its place as its leaf comes; ranks other than 0 only send their parts."""
    path, whole = "", None
    for file, slots in shards.items():
        header, places = _header(slots, leaves)
        with open(folder / file if shard.rank == 0 else os.devnull, "wb") as out:
            out.write(header)
            for name, slot in slots.items():
                if slot.path != path:  # a leaf is collected once, also when files share it
                    whole = None
                    path, whole = slot.path, shard.collect(leaves[slot.path])
                if whole is not None:
                    out.seek(len(header) + places[name][0])
                    out.write(whole[slot.index].reshape(-1).view(torch.uint8).numpy().data)


def _header(slots: dict[str, Slot], leaves: dict[str, torch.Tensor]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return what a safetensors file of these tensors begins with, and where behind it each begins and ends.

    As the library orders them: wide types first, then by name (github.com/huggingface/safetensors).
    """
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    order = list(DTYPES)
    types = {name: kinds[leaves[slot.path].dtype] for name, slot in slots.items()}
    about: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in sorted(slots, key=lambda n: (order.index(types[n]), n)):
        start, end = end, end + math.prod(slots[name].shape) * DTYPES[types[name]].itemsize
        places[name] = start, end
        about[name] = {"dtype": types[name], "shape": slots[name].shape, "data_offsets": (start, end)}
    text = json.dumps(about, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _index(shards: dict[str, dict[str, Slot]], leaves: dict[str, torch.Tensor]) -> dict[str, Any]:
    numel = sum(leaf.numel() for leaf in leaves.values())
    size = sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())
    weight_map = {name: file for file, slots in shards.items() for name in slots}
    return {"metadata": {"total_parameters": numel, "total_size": size}, "weight_map": weight_map}


def _with_dtype(config: dict[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """Correct the dtype that the config states, if the tensors have another one."""
    stated = {key: config[key] for key in ("dtype", "torch_dtype") if config.get(key)}
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    widest = str(max(dtypes, key=lambda d: torch.finfo(d).bits)).removeprefix("torch.")
    return config | {key: widest for key, value in stated.items() if value not in names}


def _publish(new: Path, folder: Path) -> None:
    """Move whole files into place; between the first and the last move the folder has no config.json."""
    (folder / "config.json").unlink(missing_ok=True)
    for old in [folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda f: f.name == "config.json"):
        file.replace(folder / file.name)
    new.rmdir()
