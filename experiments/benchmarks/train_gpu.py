"""Train on one GPU, beside transformers and torchtitan: tokens a second, MFU and peak memory at real widths.

    python experiments/benchmarks/train_gpu.py                            # Qwen3-30B-A3B, as deep as fits
    python experiments/benchmarks/train_gpu.py --model 235b-a22b --contestants 'ours-layer*' torchtitan --json out.json

The model is as deep as AdamW leaves room for; documents of 512 to 2048 tokens are packed in rows of 4096. All train
from the same random weights on the same batch, with AdamW, clipping and no router loss (torchtitan has none), and the
first losses must agree. `ours` and torchtitan keep float32 masters and moments, `-bf16` and transformers bfloat16 ones.
What torchtitan does of its own defaults, and what not: `torchtitan_step.py`. MFU counts 6 FLOPs a token of every weight
that the token meets and 12 N H a layer of every pair of tokens that causal attention compares within real documents
(`functional_trainer/flops.py`), over seconds and the device's dense peak in bfloat16.

`gpu_suite.py` runs this with its default model. What cannot run here, for want of a package, is left out.
"""

import dataclasses
import gc
import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run from the clone without installing

from experiments.benchmarks import sft_cpu
from experiments.benchmarks.gpu_checks import TOKENS, At
from functional_trainer import config

GIB = 2**30
PEERS = {"flash_attn": "flash-attn", "liger_kernel": "liger-kernel", "torchtitan": "torchtitan"}
"""What contestants need beyond transformers: importable as, and installed as."""
Name = Literal["30b-a3b", "235b-a22b"]


@dataclass(frozen=True)
class Options:
    model: Name = "30b-a3b"
    """Preset whose widths are trained (on the CPU it is tiny)."""
    device: str = "auto"
    """Device to train on."""
    contestants: tuple[str, ...] = ()
    """Names, with wildcards ("ours-*"); none means all."""
    layers: int = 0
    """Depth (0: as many layers as fit)."""
    rows: int = 2
    """Rows of 4096 tokens a step."""
    rounds: int = 3
    """Times each contestant is built and timed."""
    steps: int = 5
    """Timed steps a round, after two untimed ones."""
    json: Path | None = None
    """Also write the results here."""


def timed_config(model: str, layers: int, small: bool) -> dict[str, Any]:
    """Return a preset at some depth, or on the CPU a small one."""
    import models

    return models.PRESETS["tiny" if small else model] | {"num_hidden_layers": layers, **TOKENS}


def layers_that_fit(model: str, device: Any, tokens: int) -> int:
    """Return the depth that free memory has room for: 18 bytes a parameter, activations, logits, a leaf's update."""
    import torch

    import models

    one, two = (models.from_config(timed_config(model, n, False)) for n in (1, 2))
    layer = models.count(two) - models.count(one)
    fixed = models.count(one) - layer
    c = one.config
    # bfloat16 kept for backward: routed rows (in, gate, up, product, out) and about 20 copies of the residual.
    kept = 2 * tokens * (c.top_k * (2 * c.dim + 3 * c.expert_hidden) + 20 * c.dim)
    free = 0.92 * torch.get_device_module(device).mem_get_info()[0]
    logits, update = 14 * tokens * c.vocab, 12e9
    return max(
        1,
        min(
            models.PRESETS[model]["num_hidden_layers"],
            math.floor((free - 18 * fixed - logits - update) / (18 * layer + kept)),
        ),
    )


def prefer(op: str, name: str) -> None:
    """Make a backend of an op this process's default."""
    import kernels

    table = kernels.BACKENDS[op]
    kernels.BACKENDS[op] = (*(b._replace(default_on=("*",)) for b in table if b.name == name), *table)


def drawn(model: Any, device: Any, dtype: Any, seed: int = 0) -> Any:
    """Draw the parameters that every contestant starts from; on the device, where billions of them take no time."""
    import torch

    from functional_trainer import param, tree

    rng = torch.Generator(device).manual_seed(seed)

    def one(p: Any) -> Any:
        x = torch.empty(p.shape, device=device)
        return (x.normal_(0.0, p.std, generator=rng) if p.init == "normal" else x.fill_(p.init == "ones")).to(dtype)

    return tree.map(one, model.specs, is_leaf=param.is_param)


def our_step(
    at: At, model: Any, batch: Any, weights: Callable, form: str, attention: str | None, masters: str,
    experts: str | None = None,
) -> Callable[[], Callable]:  # fmt: skip
    """Return what builds a fresh state and its step; the compiled step itself is made once."""
    import torch

    from functional_trainer import init_state, losses, make_train_step, optimizers

    for op, name in (("attention", attention), ("experts", experts)):
        if name:
            prefer(op, name)
    adamw = optimizers.adamw(optimizers.schedule("constant", sft_cpu.LR, 1), sft_cpu.BETAS, weight_decay=sft_cpu.DECAY)
    model = dataclasses.replace(model, dtype=torch.bfloat16)
    step = make_train_step(model, losses.sft("none"), adamw, compile=form, backend=at.compiler)  # type: ignore[arg-type]

    def build() -> Callable:
        state = init_state(weights(getattr(torch, masters)), adamw)
        return lambda: step(state, batch)[1]["loss"]

    return build


def hf_step(
    at: At, model: Any, batch: Any, weights: Callable, attention: str, compiled: bool, liger: bool
) -> Callable[[], Callable]:
    """Return what builds transformers' model, all in bfloat16, and its step."""
    import torch

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3_moe

        apply_liger_kernel_to_qwen3_moe()
    inputs = sft_cpu.hf_inputs(batch)
    how = {"attn_implementation": attention, "experts_implementation": "grouped_mm"}

    def build() -> Callable:
        module = sft_cpu.hf_module(model, torch.bfloat16, at.device, weights(torch.bfloat16), **how)
        forward = torch.compile(module, backend=at.compiler) if compiled else module
        return sft_cpu.hf_train(module, forward, inputs)

    return build


def torchtitan(at: At, model: Any, batch: Any, weights: Callable) -> Callable[[], Callable]:
    """Return what builds torchtitan's model and its step."""
    from experiments.benchmarks import torchtitan_step

    return torchtitan_step.titan_step(at, model, batch, weights)


def installed() -> list[str]:
    """Return those of PEERS that can be imported here."""
    return [name for name in PEERS if importlib.util.find_spec(name)]


def contestants(small: bool) -> dict[str, Callable]:
    """Return what makes each contestant that can run here, by name."""
    have = installed()
    ours = partial(our_step, attention=None, masters="float32")
    theirs = partial(hf_step, attention="sdpa", compiled=False, liger=False)
    found: dict[str, Callable] = {"ours-layer": partial(ours, form="layer"), "hf-sdpa": theirs}
    if "torchtitan" in have:
        found["torchtitan"] = torchtitan
    if small:
        return found
    found["ours-layer-bf16"] = partial(ours, form="layer", masters="bfloat16")
    found["ours-layer-triton"] = partial(ours, form="layer", experts="triton")
    found["ours-layer-flex"] = partial(ours, form="layer", attention="flex")
    found["ours-step"] = partial(ours, form="step")
    found["ours-off"] = partial(ours, form="off")
    found["hf-sdpa-compiled"] = partial(theirs, compiled=True)
    if "flash_attn" in have:
        found["ours-layer-flash"] = partial(ours, form="layer", attention="flash_attn")
        found["hf-flash"] = partial(theirs, attention="flash_attention_2")
    if "liger_kernel" in have:
        found["hf-liger"] = partial(theirs, liger=True)
    return found


class Timer:
    """One contestant in its own process."""

    def __init__(self, at: At, model: str, name: str, layers: int, rows: int):
        import models

        self.at, small = at, at.small
        self.model = models.from_config(timed_config(model, layers, small))
        length = at.pick(64, 4096)
        batch = sft_cpu.packed_batch(rows, length, self.model.config.vocab, seed=3, shortest=length // 8)
        self.batch = {k: v.to(at.device) for k, v in batch.items()}
        weights = partial(drawn, self.model, at.device)
        self.build = contestants(small)[name](at, self.model, self.batch, weights)

    def round(self, steps: int) -> dict[str, float]:
        """Build, warm up and time; give the memory back. Return seconds a step, the first's, peak GiB, first loss."""
        import torch

        from functional_trainer import backend

        device = torch.get_device_module(self.at.device)
        if not self.at.small:
            device.reset_peak_memory_stats()
        step, seconds, losses = self.build(), [], []
        for _ in range(2 + steps):
            backend.synchronize(self.at.device)
            begin = time.perf_counter()
            losses.append(step().detach().clone())
            backend.synchronize(self.at.device)
            seconds.append(time.perf_counter() - begin)
        peak = backend.peak_memory(self.at.device) / GIB
        del step
        gc.collect()
        if not self.at.small:
            device.empty_cache()
        first, last = losses[0].item(), losses[-1].item()
        if not math.isfinite(last):
            raise ValueError(f"the loss is {last}")
        return {"step_s": statistics.median(seconds[2:]), "first_s": seconds[0], "peak_gib": peak, "loss": first}

    def useful(self, seconds: float) -> tuple[float, float | None]:
        """Return tokens a second and MFU."""
        import torch

        from functional_trainer import backend, flops

        c, lengths = self.model.config, flops.lengths(self.batch["segment_ids"])
        work = flops.train_flops(self.model.specs, lengths, c.top_k, c.windows)
        rate = self.batch["tokens"].numel() / seconds
        return rate, flops.mfu(work, seconds, backend.peak_flops(self.at.device, torch.bfloat16))


def main(o: Options) -> None:
    from experiments.benchmarks import gpu_suite  # whose processes and table these are

    own = dataclasses.asdict(o) | {"only": o.contestants, "what": "speed"}
    gpu_suite.main(gpu_suite.Options(**{k: v for k, v in own.items() if k != "contestants"}))


if __name__ == "__main__":
    config.run(main, Options, doc=__doc__)
