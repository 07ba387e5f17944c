"""What is asked of the Triton kernel of symmetric products, to be run where Triton interprets."""

import torch

import kernels
from functional_trainer import optimizers
from kernels import symmetric


def error(batch: int, rows: int, columns: int, dtype: torch.dtype, added: bool, seed: int) -> float:
    """Return how far a product is from float64, as a share of its largest value; unwritten memory is full of NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    gen = torch.Generator().manual_seed(seed)
    x, a = (torch.randn(batch, rows, n, generator=gen, dtype=torch.float64) for n in (columns, rows))
    x, a = (x / columns**0.5).to(dtype), ((a + a.mT) / 2).to(dtype)
    wanted = 0.7 * x.double() @ x.double().mT - (1.5 * a.double() if added else 0)
    ours = symmetric.halves(x, a if added else None, 0.7, -1.5)
    assert ours.dtype == dtype and ours.shape == wanted.shape
    return ((ours.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item()


def orthogonal(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what Newton-Schulz makes of a tall, of a wide or of several matrices, by the kernel and in float64."""
    kernels.BACKENDS["symmetric_product"] = tuple(
        b._replace(serves=("cpu",)) if b.name == "triton" else b for b in kernels.BACKENDS["symmetric_product"]
    )
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours = optimizers.orthogonalize(x, dtype=torch.float32, backend="triton")
    return ours, optimizers.orthogonalize(x.double(), dtype=torch.float64)


def checked() -> None:
    """Check what compilers are told of the op."""
    x = torch.randn(2, 5, 7)
    for add in (None, x @ x.mT):
        torch.library.opcheck(torch.ops.functional_trainer.symmetric_product.default, (x, add, 0.5, 2.0))
