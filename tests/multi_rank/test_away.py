"""What goes to host memory on ranks comes back as it was: no bit of a run, no exchange and no checkpoint changes."""

import pytest
import torch

from tests.multi_rank import away, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    return launch.run(2, away.two_ranks, str(tmp_path_factory.mktemp("saved")))


@pytest.mark.parametrize("run", away.RUNS[2], ids=", ".join)
def test_no_bit_changes(run, two):
    assert two["odd"][run] == []


def test_no_bit_changes_on_four_ranks():
    assert launch.run(4, away.all_odd, away.RUNS[4]) == {run: [] for run in away.RUNS[4]}


@pytest.mark.slow
@pytest.mark.parametrize("world", away.COMPILED)
def test_no_bit_changes_where_layers_are_compiled(world):
    assert launch.run(world, away.all_odd, away.COMPILED[world]) == {run: [] for run in away.COMPILED[world]}


def test_gathered_weights_are_let_go_of_and_gathered_again_all_the_same(two):
    """Compiled and recomputed: three layers in forward, in backward again, embedding and head."""
    (here, count), (there, again) = two["gathers"]
    assert count == again >= 2 * 3 + 2
    assert here.keys() == there.keys() and all(torch.equal(here[path], there[path]) for path in here)


@pytest.mark.parametrize("pair", [("away", "away"), ("away", "here"), ("here", "away")], ids="-".join)
def test_a_checkpoint_is_the_same_wherever_moments_are(pair, two):
    wanted, found = two["resumed"]["here", "here"], two["resumed"][pair]
    assert wanted.keys() == found.keys() and any("moments/" in path for path in wanted)
    assert [path for path in wanted if not torch.equal(wanted[path], found[path])] == []
