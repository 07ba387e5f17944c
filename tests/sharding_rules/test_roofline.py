"""Times from costs, by hand."""

from dataclasses import replace

import pytest

from sharding_rules import report
from sharding_rules.roofline import DEVICES, Device, Estimate, exchange, together

SIZES = {"dp": 3, "fsdp": 4, "ep": 4, "tp": 2}  # tp is innermost: a node of 8 holds tp and ep
BOX = Device(memory=1000, bandwidth=10, link=100, node=8, network=5, host=20)


@pytest.mark.parametrize("axes, ranks", [
    (("tp",), 2), (("ep",), 4), (("ep", "tp"), 8), (("fsdp",), 1), (("fsdp", "ep"), 4), (("dp",), 1),
    (("dp", "fsdp", "ep", "tp"), 8),
])  # fmt: skip
def test_ranks_of_a_group_that_share_a_node(axes, ranks):
    assert together(axes, SIZES, 8) == ranks


def test_a_group_of_many_nodes_uses_a_card_a_rank_and_no_more_than_its_links():
    inside = exchange("all_gather_into_tensor", ("ep",), 1, 800, SIZES, BOX)
    assert (inside.sent, inside.seconds, inside.inside) == (600, 6, True)
    across = exchange("all_reduce", ("fsdp", "ep"), 1, 1600, SIZES, BOX)
    assert (across.sent, across.seconds, across.inside) == (3000, 3000 / (4 * 5), False)
    swap = exchange("all_to_all_single", ("fsdp", "ep"), 1, 1600, SIZES, BOX)
    assert swap.seconds == max(1600 * 3 / 16 / 100, 1600 * 12 / 16 / 5)
    fast = BOX._replace(network=80)
    assert exchange("all_reduce", ("fsdp", "ep"), 1, 1600, SIZES, fast).seconds == 3000 / 100


def estimate(held: int) -> Estimate:
    costs = {
        ("memory", "forward", "activations"): held, ("memory", "rest", "gradients"): 7,
        ("calls", "all_gather_into_tensor", ("ep",)): 2, ("sent", "all_gather_into_tensor", ("ep",)): 800,
        ("product", 600, 10): 3, ("product", 1, 40): 2, ("rest", "params"): 10, ("rest", "moments"): 20,
    }  # fmt: skip
    return Estimate(costs, SIZES, BOX, peak=100, tokens=960, flops=96 * 1000)


def test_work_takes_the_longer_of_arithmetic_and_memory():
    e = estimate(900)
    assert e.work == 3 * 6 + 2 * 4 + (3 * 10 + 2 * 20) / 10 and e.talk == 6 and e.done == 1802
    assert e.mfu(10) == 96 * 1000 / 10 / 100 / 96
    assert e.fullest == "forward" and e.held == 900 and e.fits and not estimate(921).fits


def test_copies_and_products_in_8_bits_have_rates_of_their_own():
    """A step takes the longest of what can run at a time, or all of it one after the other."""
    e = estimate(1)
    more = {("product in 8 bits", 5000, 10): 2, ("copied", "to host"): 4000, ("copied", "from host"): 1000}
    e = replace(e, costs=e.costs | more | {("host",): 3 * 2**30}, peak8=250)
    assert e.work == 26 + 7 + 2 * 5000 / 250 and e.done == 11802
    assert e.copies == {"to host": (4000, 200), "from host": (1000, 50)}
    assert e.shortest == 200 and e.longest == e.work + 6 + 250
    assert "3.0 GiB of each device are in host memory" in report.verdict(e)
    assert [str(c) for c in report.exchanges(e).columns[5].cells][-2:] == ["PCIe", "PCIe"]


def test_a_report_says_all_of_it(tmp_path):
    e = estimate(921)
    assert "DOES NOT FIT" in report.verdict(e)
    said = report.verdict(estimate(1))
    assert "overlapped: 33.000 s a step" in said and "overlapped: 39.000 s a step" in said and "\nfits: " in said
    report.plot(e, "title", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_devices_are_as_large_as_peaks_are_known_for():
    from functional_trainer import backend

    assert DEVICES.keys() <= backend.PEAKS.keys()
