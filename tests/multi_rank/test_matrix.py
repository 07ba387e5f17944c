"""Every axis alone, every pair and some triples of axes equal one process, uncompiled and compiled.

    make test-distributed

In float64 losses, gradients and the parameters after three steps agree to 1e-9; in float32 losses and gradients to
1e-5.
"""

import math

import pytest
import torch

from tests.multi_rank import launch, parity
from tests.multi_rank.test_mesh import differences

pytestmark = pytest.mark.slow

ALONE = ["dp2", "fsdp2", "ep2", "cp2", "tp2"]
TRIPLES = ["dp2 x fsdp2 x ep2", "fsdp2 x cp2 x ep2", "fsdp2 x cp2 x tp2"]
COMPILED = [
    *((mesh, f"moe, {form} compiled") for mesh in ALONE for form in ("layer", "step")),
    *((mesh, "dense, layer compiled") for mesh in ALONE),
    *((mesh, "moe, layer compiled") for mesh in TRIPLES),
    *((mesh, "moe, blocks, step compiled") for mesh in ("ep2", "ep2 x tp2")),
    *((mesh, "moe, by Inductor") for mesh in ("ep2", "cp2 x tp2")),
    ("fsdp2", "dense, step by Inductor"),
    ("cp2", "moe, policy of sequences, step compiled"),
    *((mesh, "moe, recomputed selectively, layer compiled") for mesh in ("fsdp2", "fsdp2 x ep2")),
    *((mesh, "dense, recomputed, layer compiled, 2 micro-batches") for mesh in ("fsdp2", "dp2 x fsdp2")),
]


def world(mesh: str) -> int:
    return math.prod(parity.ways(mesh).values())


def cases(mesh: str) -> list[str]:
    """Name the cases that a mesh runs."""
    sizes = parity.ways(mesh)
    rows = parity.ROWS // math.prod(sizes.get(axis, 1) for axis in ("dp", "fsdp", "ep"))
    return [name for name, case in parity.MATRIX.items() if rows % case.options.get("micro_batches", 1) == 0]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, torch.Tensor]]:
    return {name: parity.train(case) for name, case in parity.MATRIX.items()}


@pytest.mark.parametrize("mesh", parity.MESHES)
def test_a_mesh_equals_one_process(mesh, alone):
    ran = launch.run(world(mesh), parity.train_all, cases(mesh), [mesh])
    for name in cases(mesh):
        got, expected = ran[mesh, name], alone[name]
        if parity.MATRIX[name].dtype == torch.float32:
            first = [key for key in expected if key.startswith(("grads/", "0/"))]
            got, expected = ({key: run[key] for key in first} for run in (got, expected))
            assert not differences(got, expected, 1e-5), name
        else:
            assert not differences(got, expected), name


@pytest.mark.parametrize(("mesh", "case"), COMPILED)
def test_compiled_on_a_mesh_equals_one_process_uncompiled(mesh, case):
    ran = launch.run(world(mesh), parity.train_all, [case], [mesh])
    assert not differences(ran[mesh, case], parity.train(parity.COMPILED[case].uncompiled()))
