"""What layers exchange is on its way while another layer computes: read from traces of two ranks."""

import pytest

import models
from functional_trainer import param
from tests.multi_rank import ahead, launch, parity
from tests.multi_rank.ahead import DEPTH


@pytest.fixture(scope="module")
def traces():
    return launch.run(2, ahead.all_traced)


def spans(events: list[str], name: str) -> list[list[str]]:
    """Return what comes before the first event of a name, and after each of them."""
    found: list[list[str]] = [[]]
    for event in events:
        if event == name:
            found.append([])
        else:
            found[-1].append(event)
    return found


@pytest.mark.parametrize("remat", ["none", "selective", "layer"])
def test_the_next_layer_is_on_its_way_when_a_layer_runs(remat, traces):
    first, *after = spans(traces[remat]["events"], "forward")
    assert len(after) == DEPTH
    assert first[-2:] == ["gather"] * 2  # begun, and nothing waited for
    assert [span.count("gather") for span in after[:-1]] == [1] * (DEPTH - 2) + [0]
    assert all(span[-1] == "gather" for span in after[: DEPTH - 2])


@pytest.mark.parametrize("remat", ["selective", "layer"])
def test_backward_gathers_again_a_layer_ahead(remat, traces):
    after = spans(traces[remat]["events"], "backward")[1:]
    assert [span.count("gather") for span in after] == [2] + [1] * (DEPTH - 2) + [0]
    assert all(span.index("wait") > span.index("gather") for span in after[:-1])
    assert traces[remat]["gathered"] == 2


def test_no_copy_of_a_weight_waits_for_backward(traces):
    """What a recomputed layer saves is its input and, where that is asked for, products: not its weights."""
    specs = models.from_config(parity.DENSE).specs["layers"][0]
    for remat, fold in (("layer", 3), ("selective", 20)):
        weights, others = traces[remat]["saved"]
        assert weights == param.count(specs)
        assert others < fold * parity.ROWS // 2 * parity.LENGTH * parity.DENSE["hidden_size"]


@pytest.mark.parametrize("remat", ["none", "selective", "layer"])
def test_gradients_are_on_their_way_when_the_layer_before_computes(remat, traces):
    after = spans(traces[remat]["events"], "backward")[1:]
    assert len(after) == DEPTH
    assert all(span[-1] == "scatter" for span in after[:-1])  # and nobody has waited for it


def test_without_recomputation_backward_gathers_nothing(traces):
    assert all("gather" not in span for span in spans(traces["none"]["events"], "backward")[1:])


@pytest.mark.slow
def test_in_one_graph_gradients_are_on_their_way_when_the_layer_before_computes():
    """What is waited for after a scatter is the one before it: after the first nothing is. See test_overlap.py too."""
    after = spans(launch.run(2, ahead.one_graph), "scatter")[1:]
    assert len(after) > DEPTH and "wait" not in after[0]
    assert all("wait" in span for span in after[1:])
    assert sum("product" in span for span in after) >= DEPTH
