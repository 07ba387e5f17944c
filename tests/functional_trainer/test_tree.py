"""functional_trainer.tree: paths to leaves and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functional_trainer import tree

KEYS = st.text("abcxyz_", min_size=1, max_size=4)
TREES = st.recursive(
    st.integers(),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3), st.dictionaries(KEYS, inner, min_size=1, max_size=3)
    ),
    max_leaves=12,
)


@given(TREES)
def test_flatten_and_unflatten_are_inverse(t):
    flat = tree.flatten(t)
    assert list(flat.values()) == tree.leaves(t)
    assert tree.unflatten(flat, t) == t
    assert tree.unflatten(dict(reversed(flat.items())), t) == t  # by path, not by order


@given(TREES)
def test_maps_agree(t):
    seen = {}
    out = tree.map_with_path(lambda path, x, y: seen.setdefault(path, x + y), t, t)
    assert seen == {k: 2 * v for k, v in tree.flatten(t).items()}
    assert out == tree.map(lambda x, y: x + y, t, t)


def test_paths_read_as_in_the_rules():
    t = {"layers": [{"attn": {"q": 1}}, {"mlp": {"down": 2}}], "embed": 3}
    assert tree.flatten(t) == {"layers/0/attn/q": 1, "layers/1/mlp/down": 2, "embed": 3}


@pytest.mark.parametrize("flat", [{"a": 1}, {"a": 1, "b/0": 2, "c": 3}, {"a": 1, "b/1": 2}])
def test_other_paths_are_named(flat):
    with pytest.raises(KeyError, match=r"trees differ in \d paths, e.g. .*(b/0|c|b/1)"):
        tree.unflatten(flat, {"a": 0, "b": [0]})
