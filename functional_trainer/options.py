"""Options that recipes share, as frozen dataclasses: a field's docstring is its help text. Imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelOptions:
    path: str | None = None
    """Hugging Face folder to start from (config.json, safetensors, tokenizer); overrides the preset."""
    preset: str = "tiny"
    """Architecture to start from random: tiny, 30b-a3b, 235b-a22b, dense-0.6b, dense-8b, dense-32b."""


@dataclass(frozen=True)
class DataOptions:
    train: tuple[str, ...] = ()
    """JSONL files, folders or globs of OpenAI messages to train on (none: the tasks that ship with the project)."""
    eval: tuple[str, ...] = ()
    """The same for the held-out loss; only with --data.train."""
    tokenizer: str | None = None
    """Folder of the tokenizer and chat template (default: the model's, else the one that ships with the project)."""
    seq_len: int = 256
    """Tokens in a packed row."""
    packing: Literal["first_fit", "best_fit", "none"] = "first_fit"
    """How documents are put into rows; none is one document a row."""
    overlong: Literal["split", "truncate", "drop"] = "split"
    """What happens to documents longer than a row; the log counts them."""
    answer_tokens: int = 32
    """Most tokens of a greedy answer to a held-out question."""

    def __post_init__(self):
        if self.eval and not self.train:
            raise ValueError("--data.eval is given without --data.train; give both (the shipped tasks have their own)")


@dataclass(frozen=True)
class OptimOptions:
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, per unit of learning rate."""
    no_decay: tuple[str, ...] = (r".*norm", r".*bias")
    """Regexes of parameter paths that are exempt from weight decay."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up; wsd stays at the peak and falls at the end."""
    warmup: float = 0.1
    """Fraction of the steps in which the learning rate rises linearly."""
    floor: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    decay: float = 0.2
    """Fraction of the steps in which wsd falls."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm (0: never)."""


@dataclass(frozen=True)
class MeshOptions:
    fsdp: int = 0
    """Data-parallel processes that store parameters in shards (0: all that --mesh.ep leaves)."""
    ep: int = 1
    """Data-parallel processes over which experts are spread."""


@dataclass(frozen=True)
class RunOptions:
    out: str = "runs/run"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, tensorboard/, loss.png, hf/."""
    resume: str = "auto"
    """auto continues the run in --out if there is one, never refuses to, PATH continues from that checkpoint."""
    steps: int = 0
    """Optimizer steps (0: what --epochs takes)."""
    epochs: int = 1
    """Passes over the data, if --steps is 0."""
    batch: int = 16
    """Packed rows per optimizer step, over all devices."""
    micro_batch: int = 0
    """Packed rows per device and pass; the rest is gradient accumulation (0: all at once)."""
    eval_every: int = 100
    """Steps between held-out losses (0: only at the end)."""
    save_every: int = 500
    """Steps between checkpoints (0: only at the end)."""
    keep: int = 2
    """Checkpoints to keep."""
    max_skipped: int = 5
    """Non-finite gradients in a row after which the run stops."""
    compile: Literal["auto", "step", "layer", "off"] = "auto"
    """Compile the whole step, one layer, or nothing (auto: layer, see docs/benchmarks.md)."""
    remat: Literal["none", "layer"] = "none"
    """Recompute layers in backward to save memory."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type; master weights and moments are float32, float64 if that is asked for."""
    device: str = "auto"
    """Device type, or one device as in cuda:1 (auto: the accelerator if there is one)."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    def __post_init__(self):
        least = {"steps": 0, "epochs": 1, "batch": 1, "micro_batch": 0, "eval_every": 0, "save_every": 0, "keep": 1}
        for name, bound in {**least, "max_skipped": 1, "seed": 0}.items():
            if getattr(self, name) < bound:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} is {getattr(self, name)}; it must be at least {bound}")

    def micro_batches(self, world: int) -> int:
        """Return the passes of a step on each of `world` devices; ValueError if they cannot be equal."""
        rows = world * self.micro_batch
        if self.batch % (rows or world):
            raise ValueError(
                f"--batch {self.batch} rows cannot be shared equally by {world} device(s) in passes of --micro-batch "
                f"{self.micro_batch}; use a multiple of {rows or world}"
            )
        return self.batch // rows if rows else 1
