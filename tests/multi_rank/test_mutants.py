"""Mistakes in derived exchanges are seen, and no change of a row is silently wrong.

pytest -m slow -s tests/multi_rank/test_mutants.py    prints the list
"""

import pytest

from functional_trainer.types import ONE_DEVICE
from tests.multi_rank import launch, mutants
from tests.multi_rank.test_matrix import world

pytestmark = pytest.mark.slow

MESHES = ["fsdp2 x ep2", "cp2 x tp2", "dp2 x tp2"]
NO_GRADIENT = ("batch/columns > ", "act/rope", "act/attn_rows", "act/token_rows")
"""Integers, and tables made of them."""


def run(which, mesh: str) -> dict[str, str]:
    found = launch.run(world(mesh), which, mesh, mutants.one_step(ONE_DEVICE))
    for mistake, said in found.items():
        print(f"{said[:60]:62}{mistake}")
    return found


@pytest.mark.parametrize("mesh", MESHES)
def test_every_wrong_exchange_is_seen(mesh):
    found = run(mutants.exchanges, mesh)
    assert found.pop("nothing") == "same" and len(found) > 20
    missed = [mistake for mistake, said in found.items() if said == "same"]
    assert [m for m in missed if ", its gradient" not in m or not m.startswith(NO_GRADIENT)] == []


@pytest.mark.parametrize("mesh", MESHES)
def test_a_row_that_says_something_else_is_refused_or_computes_the_same(mesh):
    found = run(mutants.rows, mesh)
    assert len(found) > 30 and {"same"} < set(found.values())
    assert [row for row, said in found.items() if said == "differs"] == []
