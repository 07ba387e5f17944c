"""Runs in 8 bits on two ranks equal one process, weights having travelled in 8 bits."""

import pytest
import torch

from tests.multi_rank import eight_bits, launch
from tests.multi_rank.test_mesh import differences

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ran() -> dict:
    return launch.run(2, eight_bits.two_ranks)


def split(run: dict) -> tuple[dict, dict[str, int]]:
    return {k: v for k, v in run.items() if k != "sent"}, run["sent"]


EXACT = [run for run in eight_bits.RUNS if run[1] != "moe, routed" and run[2] == "tile"]


@pytest.mark.parametrize("run", EXACT, ids=", ".join)
def test_a_mesh_equals_one_process(run, ran):
    """Where tiles are the same: in float64, losses, gradients and parameters after three steps."""
    alone, sent = split(eight_bits.train(run[1], run[2]))
    assert not sent and not differences(split(ran[run])[0], alone)


@pytest.mark.parametrize("run", [run for run in eight_bits.RUNS if run not in EXACT], ids=", ".join)
def test_where_tiles_are_others_it_differs_by_their_rounding(run, ran):
    """An expert's tokens are not grouped alike, or a row's scale along tokens is a rank's; on ep2 the weight of a slot
    multiplies after the second product."""
    alone, got = (split(r)[0] for r in (eight_bits.train(run[1], run[2]), ran[run]))
    assert abs(got["0/loss"] / alone["0/loss"] - 1) < 1e-3
    for key in (k for k in alone if k.startswith("grads/")):
        assert (got[key] - alone[key]).norm() <= 0.12 * alone[key].norm(), key


def test_what_travels_is_bytes_where_borders_are_those_of_tiles(ran):
    """Two layers of 256 x 256 (q and o, k and v half), three tiles' worth a matrix, and scales of 4 bytes a tile."""
    sent = {run: split(r)[1] for run, r in ran.items()}
    assert sent["fsdp2", "moe", "tile, gathered whole"].keys() == {"torch.float64"}
    for run in EXACT:
        assert 8 * sent[run]["torch.uint8"] > 0.9 * 8 * sent[run]["torch.float64"]
    dense, row = sent["fsdp2", "dense", "tile"], sent["fsdp2", "dense", "row"]
    attention, mlp = 2 * (128 * 256 + 64 * 256), 3 * 128 * 256
    assert dense["torch.uint8"] == 2 * (attention + mlp) + 4 * 2 * (2 * 2 + 2 * 2 + 2 * 2 + 2)
    assert row["torch.uint8"] == 2 * (128 * 256 + 4 * 256 + 128 * 256 + 4 * 256)


def test_gathered_in_8_bits_or_whole_the_bits_are_the_same(ran):
    packed, whole = (split(ran["fsdp2", "moe", how])[0] for how in ("tile", "tile, gathered whole"))
    assert packed.keys() == whole.keys() and all(torch.equal(packed[k], whole[k]) for k in packed)
