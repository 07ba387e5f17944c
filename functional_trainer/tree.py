"""Pytrees of tensors, addressed by path: `layers/3/attn/q`.

Trees are nested dicts, lists and registered dataclasses (torch's own pytree registry). Every table of this
project (sharding, weight decay, Hugging Face names) is matched against these paths.
"""

from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree

Tree = Any

leaves = pytree.tree_leaves
structure = pytree.tree_structure
map = pytree.tree_map


def path_str(path: tuple) -> str:
    """Join pytree keys with `/`."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def map_with_path(f: Callable, tree: Tree, *rest: Tree, is_leaf: Callable | None = None) -> Tree:
    """Apply `f(path, leaf, *leaves_of_rest)` to every leaf."""
    return pytree.tree_map_with_path(lambda p, x, *r: f(path_str(p), x, *r), tree, *rest, is_leaf=is_leaf)


def flatten(tree: Tree) -> dict[str, Any]:
    """Flatten to `{path: leaf}` in tree order."""
    return {path_str(p): x for p, x in pytree.tree_flatten_with_path(tree)[0]}


def unflatten(flat: dict[str, Any], like: Tree) -> Tree:
    """Rebuild the structure of `like` from `{path: leaf}`; the paths must agree exactly."""
    paths = list(flatten(like))
    if set(paths) != set(flat):
        odd = sorted(set(paths) ^ set(flat))
        raise KeyError(f"trees differ in {len(odd)} paths, e.g. {odd[:3]}")
    return pytree.tree_unflatten([flat[p] for p in paths], structure(like))
