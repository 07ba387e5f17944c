"""Options that recipes share, as frozen dataclasses: a field's docstring is its help text. Imports no torch."""

import importlib.util
import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

import tyro


@dataclass(frozen=True)
class ModelOptions:
    path: str | None = None
    """Hugging Face folder to start from (config.json, safetensors, tokenizer); overrides the preset."""
    preset: str = "tiny"
    """Architecture to start from random: tiny, 30b-a3b, 235b-a22b, 1t, dense-0.6b, dense-8b, dense-32b."""


def within(section: str, options: Any, **bounds: tuple[float, str]) -> None:
    """Check numbers by name, (least, "" or "below 1" or "at most 1"); ValueError names the flag. None is left alone."""
    for name, (least, most) in bounds.items():
        given = getattr(options, name)
        for x in given if isinstance(given, tuple) else [] if given is None else [given]:
            if not least <= x < math.inf or most == "below 1" and x >= 1 or most == "at most 1" and x > 1:
                flag, right = name.replace("_", "-"), f"at least {least}" + f" and {most}" * bool(most)
                raise ValueError(f"--{section}{flag} is {x}; it must be {right}")


def regex(flag: str, pattern: str) -> None:
    """Check a regular expression; ValueError names the flag."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{flag}: {pattern!r} is not a regular expression: {error}") from None


def forms(compile: str, remat: str, offload: tuple[str, ...]) -> None:
    """Check that a form of the step goes with how activations and moments are kept; ValueError says what would."""
    if remat.startswith("budget") and compile == "off":
        raise ValueError(f"--remat {remat} is a compiler's work: with --compile off use layer or selective")
    if offload and compile == "step":
        raise ValueError(f"--offload {' '.join(offload)} is not for one graph: use --compile layer or off")


Shape = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "unpaired", "prompt"
]  # fmt: skip


@dataclass(frozen=True)
class Source:
    """One of the `datasets` of a YAML file."""

    path: str
    """File, folder or glob, relative to the YAML file; or a dataset of the hub, owner/name."""
    type: Shape = "auto"
    """What rows look like (docs/data.md); auto is --data.type, else the columns of a file's first row decide."""
    columns: tuple[str, ...] = ()
    """Names of columns, OURS=THEIRS (none: --data.columns)."""
    weight: float = 1.0
    """Times that an epoch sees it."""
    epochs: float = float("inf")
    """Times that the whole run sees it at most."""
    limit: int = 0
    """Rows to take from its beginning (0: all)."""

    def __post_init__(self):
        if not self.path:
            raise ValueError("path is empty; give a file, folder, glob or a dataset of the hub (owner/name)")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}; it must be above 0")
        if not self.epochs > 0:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0")
        if not 0 <= self.limit < 2**63:
            raise ValueError(f"limit is {self.limit}; it must be at least 0 and below 2**63")


@dataclass(frozen=True)
class Mix:
    """A YAML file that says what to train on."""

    datasets: tuple[Source, ...]


@dataclass(frozen=True)
class DataOptions:
    train: tuple[str, ...] = ()
    """Files, folders, globs, datasets of the hub, YAML files of them (none: the project's own tasks); docs/data.md."""
    weights: tuple[float, ...] = ()
    """Times that an epoch sees each of --data.train (none: once)."""
    epochs: tuple[float, ...] = ()
    """Times that the whole run sees each of --data.train at most (none: no limit)."""
    limits: tuple[int, ...] = ()
    """Rows to take from the beginning of each of --data.train (none, or 0: all)."""
    eval: tuple[str, ...] = ()
    """The same for the held-out loss; only with --data.train."""
    type: Shape = "auto"
    """What rows look like (docs/data.md); auto recognises it by the columns of a file's first row."""
    columns: tuple[str, ...] = ()
    """Names of columns, OURS=THEIRS: prompt=question completion=answer."""
    split: float = 0.0
    """Share of the training rows to hold out instead of --data.eval, by a hash of their content."""
    tokenizer: str | None = None
    """Folder of the tokenizer and chat template (default: the model's, else the one that ships with the project)."""
    seq_len: int = 256
    """Tokens in a packed row."""
    packing: Literal["first_fit", "best_fit", "none"] = "first_fit"
    """How documents are put into rows; none is one a row, similar lengths together."""
    overlong: Literal["split", "truncate", "drop"] = "split"
    """What happens to documents longer than a row; the log counts them."""
    workers: int = 0
    """Processes, of each rank, that tokenize and fill batches ahead (0: a thread)."""
    cache: str | None = None
    """Folder that keeps tokenized data, so that it is tokenized once (default: in the user's cache folder)."""
    answer_tokens: int = 32
    """Most tokens of a greedy answer to a held-out question."""

    def __post_init__(self):
        each: Any = {"train": "path", "eval": "path", "weights": "weight", "epochs": "epochs", "limits": "limit"}
        for name, of_source in each.items():
            if name not in ("train", "eval") and (given := getattr(self, name)) and len(given) != len(self.train):
                raise ValueError(f"--data.{name} are {len(given)} for {len(self.train)} of --data.train")
            try:
                _ = [Source(**{"path": "any", of_source: value}) for value in getattr(self, name)]
            except ValueError as error:
                raise ValueError(f"--data.{name}: {error}") from None
        within("data.", self, seq_len=(1, ""), workers=(0, ""), answer_tokens=(1, ""))
        if not 0 <= self.split < 1 or self.split and (self.eval or not self.train):
            raise ValueError(f"--data.split {self.split}: a share below 1 of --data.train, and not with --data.eval")
        if (self.type != "auto" or self.columns) and not self.train:
            raise ValueError("--data.type and --data.columns say how to read --data.train, which is not given")
        if self.eval and not self.train:
            raise ValueError("--data.eval is given without --data.train; give both (the shipped tasks have their own)")

    def sources(self) -> list[Source]:
        """List --data.train as sources."""
        count = len(self.train)
        columns = self.weights or (1.0,) * count, self.epochs or (float("inf"),) * count, self.limits or (0,) * count
        return [
            Source(path, self.type, self.columns, weight, epochs, limit)
            for path, weight, epochs, limit in zip(self.train, *columns, strict=True)
        ]


OptimName = Literal["adamw", "muon", "lion", "sgd", "adafactor"]
USED_BY = {
    "betas": ("adamw", "lion"), "eps": ("adamw",), "momentum": ("muon", "sgd"), "muon_scale": ("muon",),
    "floor": ("cosine", "linear", "wsd"), "decay": ("wsd",),
}  # fmt: skip
"""Options that only some optimizers or schedules read."""


@dataclass(frozen=True)
class OptimGroup:
    """An exception for the parameters whose whole path a regex matches; what is None is as for all others."""

    pattern: str
    name: OptimName | None = None
    lr: float | None = None
    weight_decay: float | None = None
    frozen: bool = False

    @classmethod
    def parse(cls, text: str) -> "OptimGroup":
        """Read `REGEX -> frozen` or `REGEX -> [NAME] [lr=X] [weight_decay=X]`; ValueError says what is wrong."""
        pattern, arrow, words = (part.strip() for part in text.partition("->"))
        wrong = f"--optim.groups {text!r}: expected 'REGEX -> frozen' or 'REGEX -> [NAME] [lr=X] [weight_decay=X]'"
        given: dict[str, Any] = {}
        for word in words.split():
            key, _, value = word.partition("=")
            try:
                new: dict[str, Any] = (
                    {key: float(value)} if key in ("lr", "weight_decay")
                    else {"frozen": True} if word == "frozen" else {"name": word}
                )  # fmt: skip
            except ValueError:
                raise ValueError(f"{wrong}; {value!r} is no number") from None
            if any(not 0 <= number < float("inf") for number in new.values() if isinstance(number, float)):
                raise ValueError(f"{wrong}; {word} is not a number of at least 0")
            if new.keys() & given.keys() or new.get("name", "adamw") not in get_args(OptimName):
                raise ValueError(f"{wrong}, each once, NAME one of {', '.join(get_args(OptimName))}; not {word!r}")
            given |= new
        if not pattern or not given or "frozen" in given and len(given) > 1:
            raise ValueError(wrong)
        regex(f"--optim.groups {text!r}", pattern)
        return cls(pattern, **given)


@dataclass(frozen=True)
class OptimOptions:
    name: OptimName = "adamw"
    """Optimizer; muon takes the matrices and leaves all else to adamw with the same learning rate."""
    groups: tuple[str, ...] = ()
    """Exceptions by parameter path, the first that matches: 'REGEX -> frozen', 'REGEX -> lion lr=1e-4'."""
    lr: float = 3e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the two moments of adamw; of lion's momentum, in its step and for the next."""
    momentum: float = 0.95
    """Momentum of muon (Nesterov's form) and sgd."""
    muon_scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Size of a muon step: adamw's usual one, so that its learning rate serves; or sqrt(max(1, rows / columns))."""
    moments: Literal["float32", "bfloat16", "8bit"] = "float32"
    """How moments are kept; float32 means the master weights' type. 8bit is for one device."""
    ema: float = 0.0
    """Decay of an average of the weights, in float32, written to hf-ema/ at the end (0: none)."""
    eps: float = 1e-8
    """Added by adamw to the root of the second moment."""
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

    def __post_init__(self):
        for text in self.groups:
            OptimGroup.parse(text)
        for pattern in self.no_decay:
            regex("--optim.no-decay", pattern)
        fractions = dict.fromkeys(("betas", "momentum", "ema", "warmup"), (0, "below 1"))
        others = dict.fromkeys(("lr", "eps", "weight_decay", "floor", "max_grad_norm"), (0, ""))
        within("optim.", self, **fractions, **others, decay=(0, "at most 1"))
        names = [self.name, *(OptimGroup.parse(text).name for text in self.groups)]
        chosen = {*names, self.schedule} | ({"adamw"} if self.name == "muon" else set())
        for option, users in USED_BY.items():
            usual = getattr(OptimOptions, option)
            if getattr(self, option) != usual and not chosen & {*users}:
                flag, kind = f"--optim.{option.replace('_', '-')}", "schedule" if "wsd" in users else "name"
                said, right = f"--optim.{kind} {getattr(self, kind)}", " or ".join(users)
                raise ValueError(f"{flag} has no effect with {said}, only with {right}; leave it at {usual}")


@dataclass(frozen=True)
class MeshOptions:
    layout: Annotated[str, tyro.conf.arg(name="mesh", prefix_name=False)] = ""
    """All sizes at once, as fsdp=4,ep=2; or auto, which picks them by what a step would take and says why."""
    dp: int = 1
    """Data-parallel devices that hold the same parameters; fsdp below them makes it HSDP."""
    fsdp: int = 0
    """Data-parallel devices that store parameters in shards (0: all that the others leave)."""
    ep: int = 1
    """Data-parallel devices over which experts are spread."""
    cp: int = 1
    """Devices that share the tokens of a row (Ulysses)."""
    tp: int = 1
    """Devices that share heads, hidden units and the vocabulary."""
    dispatch: Literal["exact", "static"] = "exact"
    """How tokens travel to experts: just the rows, whose numbers the host waits for, or blocks of a fixed size."""
    reduce: Literal["compute", "master"] = "compute"
    """Type in which devices add gradients: --dtype, or the master weights', which is twice the bytes of bfloat16."""
    pp: int = 1
    """Pipeline stages; there are none yet, so 1."""

    def __post_init__(self):
        within("mesh.", self, fsdp=(0, ""), **dict.fromkeys(("dp", "ep", "cp", "tp", "pp"), (1, "")))
        if self.layout and any(getattr(self, a) != (a != "fsdp") for a in ("dp", "fsdp", "ep", "cp", "tp", "pp")):
            raise ValueError(f"--mesh {self.layout} says all sizes at once; leave --mesh.dp, --mesh.fsdp, ... away")
        if self.pp != 1:
            raise ValueError(f"--mesh.pp {self.pp}: pipeline stages do not exist yet; use fsdp, ep, cp and tp")


@dataclass(frozen=True)
class Fp8Options:
    recipe: Literal["tile", "row"] = "tile"
    """What shares a scale: 128 neighbours, and 128 x 128 of a weight; or a row. docs/kernels.md."""
    exclude: str = "(un)?embed|.*norm|.*bias|.*/router"
    """Regex of parameter paths that stay in --dtype; what is no matrix must be among them."""

    def __post_init__(self):
        regex("--fp8.exclude", self.exclude)


@dataclass(frozen=True)
class RunOptions:
    out: str = "runs/run"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, index.html, hf/."""
    resume: str = "auto"
    """auto continues the run in --out if there is one, never refuses to, PATH continues from that checkpoint."""
    init_from: str | None = None
    """Checkpoint or run folder to take the weights from, and nothing else, before the first step."""
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
    saving: Literal["auto", "async", "wait"] = "auto"
    """Write checkpoints while the run goes on, from a copy in host memory, or wait (auto: async but on the CPU)."""
    keep_best: bool = False
    """Keep checkpoints/best besides: of the lowest held-out loss so far, or highest eval_reward, at evaluations."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others; where a step takes half as long, each process prints its stacks."""
    max_skipped: int = 5
    """Non-finite gradients in a row after which the run stops."""
    samples: int | None = None
    """Held-out questions to answer at each evaluation (default: 4, and none on a mesh, which gathers the weights)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well; wandb must be installed."""
    profile: int = 0
    """Steps to profile, after three: trace.json, and the ten operations that cost most (0: none)."""
    rules: str | None = None
    """Sharding table of your own: FILE.py, FILE.py:NAME or FILE.yaml (default: the family's); docs/sharding.md."""
    compile: Literal["auto", "step", "layer", "off"] = "auto"
    """Compile the whole step, one layer, or nothing (auto: layer, see docs/benchmarks.md)."""
    remat: str = "none"
    """Compute layers again in backward: none, selective (not products, attention), layer, budget:X (share kept)."""
    offload: tuple[Literal["activations", "optimizer"], ...] = ()
    """Keep in host memory what layers leave for backward, or moments; not with --compile step."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type; master weights and moments are float32, float64 if that is asked for."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """Operands of products with weights: in --dtype, or in 8 bits, where --fp8.exclude does not match."""
    fp8: Fp8Options = field(default_factory=Fp8Options)
    device: str = "auto"
    """Device type, or one device as in cuda:1 (auto: the accelerator if there is one)."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""

    def __post_init__(self):
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError(f"--wandb {self.wandb}: wandb is not installed; pip install wandb")
        if self.precision != "fp8" and self.fp8 != Fp8Options():
            raise ValueError("--fp8.recipe and --fp8.exclude say how products are in 8 bits; add --precision fp8")
        if not re.fullmatch(r"none|selective|layer|budget:(0|1|0?\.\d+|[01]\.0*)", self.remat):
            raise ValueError(f"--remat {self.remat}: it is none, selective, layer, or budget:X with X from 0 to 1")
        forms(self.compile, self.remat, self.offload)
        if self.steps and self.epochs != 1:
            without = "say --steps 0, or leave --epochs away"
            raise ValueError(f"--epochs {self.epochs} has no effect with --steps {self.steps}; {without}")
        none = ("steps", "micro_batch", "eval_every", "save_every", "profile", "seed", "samples")
        within("", self, **dict.fromkeys(none, (0, "")))
        within("", self, **dict.fromkeys(("epochs", "batch", "keep", "max_skipped", "timeout"), (1, "")))

    def packed_rows(self, world: int) -> int:
        """Return the packed rows of a step on `world` devices, as far as they are known before."""
        return self.batch

    def micro_batches(self, world: int) -> int:
        """Return the passes of a step on each of `world` devices; ValueError if they cannot be equal."""
        rows = world * self.micro_batch
        if self.batch % (rows or world):
            raise ValueError(
                f"--batch {self.batch} rows cannot be shared equally by {world} device(s) in passes of --micro-batch "
                f"{self.micro_batch}; use a multiple of {rows or world}"
            )
        return self.batch // rows if rows else 1
