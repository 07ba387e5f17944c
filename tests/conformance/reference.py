"""The other side of the comparison: transformers' Qwen3 and Qwen3-MoE at tiny random sizes, in any precision.

transformers casts to float32 in many places (norms, rotary tables, softmax, losses). `Float64` makes each such cast a
cast to float64, while a model is built and while it runs, so that the whole computation is float64.
"""

import contextlib
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LOW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class Float64(TorchFunctionMode):
    """Make every cast to float32 or lower, and every default dtype, float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        func = torch.Tensor.double if func in CASTS else func
        args, kwargs = tree_map(
            lambda x: torch.float64 if isinstance(x, torch.dtype) and x in LOW else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)

    def __enter__(self):
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        torch.set_default_dtype(self.default)


class SeesLowPrecision(TorchDispatchMode):
    """Record every operator, backward ones included, that makes a floating tensor below float64."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype in LOW for x in tree_leaves(out)):
            self.found.add(str(func))
        return out


def precision(dtype: torch.dtype):
    """Return the context in which a transformers model is built and computes wholly in `dtype`."""
    return Float64() if dtype == torch.float64 else contextlib.nullcontext()


def hf_model(folder: str | Path, dtype: torch.dtype = torch.float64) -> Any:
    """Load a folder with transformers, plain implementations of attention and experts; run it inside `precision`."""
    with precision(dtype):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()


def write_folder(raw: dict[str, Any], folder: Path, seed: int = 0, dtype=torch.float32, max_shard_size="5GB") -> Path:
    """Let transformers save a model of config `raw` whose every weight matters, then put `raw` itself as config.json.

    transformers spells a config its own way when it saves; the folder keeps the spelling of `raw`.
    """
    config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.3 if p.ndim == 1 else p.shape[-1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=gen) * std + name.endswith("norm.weight"))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    return folder


@contextlib.contextmanager
def saved(raw: dict[str, Any], **kwargs):
    """Write a folder that lives as long as the block."""
    with tempfile.TemporaryDirectory() as name:
        yield write_folder(raw, Path(name), **kwargs)


def examples(n: int):
    """Let hypothesis try `n` examples, the same ones in every run; shrinking such small models is not worth minutes."""
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=n, derandomize=True, database=None, suppress_health_check=quiet, phases=[Phase.generate]
    )


@st.composite
def ropes(draw) -> dict[str, Any]:
    """Draw the rope part of a config: default or YaRN, in the spelling of version 4, 5 or both at once."""
    theta = draw(st.sampled_from([50.0, 1e4, 1e6]))
    scaling: dict[str, Any] = {}
    if draw(st.booleans()):
        optional = {
            "attention_factor": st.sampled_from([0.8, 1.25]),
            "beta_fast": st.sampled_from([4.0, 16.0]),
            "beta_slow": st.sampled_from([0.25, 2.0]),
            "truncate": st.booleans(),
            "original_max_position_embeddings": st.sampled_from([19, 150, 4000]),
        }
        scaling = {"rope_type": "yarn", "factor": draw(st.sampled_from([None, 1.0, 2.5, 40.0]))}
        scaling |= draw(st.fixed_dictionaries({}, optional=optional))
        if draw(st.booleans()):
            scaling["mscale"] = draw(st.sampled_from([0.7, 1.0]))
            scaling["mscale_all_dim"] = draw(st.sampled_from([0.5, 1.2]))
    outside = {"original_max_position_embeddings": 30} if scaling and draw(st.sampled_from([0, 0, 1])) else {}
    if draw(st.booleans()):
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta} | scaling} | outside
    if scaling and draw(st.booleans()):
        scaling["type"] = scaling.pop("rope_type")
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}} if scaling and draw(st.booleans()) else {}
    return {"rope_theta": theta, "rope_scaling": scaling or None} | both | outside


@st.composite
def configs(draw, family: str | None = None) -> dict[str, Any]:
    """Draw a config.json of Qwen3 or Qwen3-MoE, all sizes different, head_dim not hidden / heads."""
    family = family or draw(st.sampled_from(["qwen3", "qwen3_moe"]))
    kv_heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    raw = {
        "architectures": ["Qwen3ForCausalLM" if family == "qwen3" else "Qwen3MoeForCausalLM"],
        "model_type": family,
        "vocab_size": draw(st.sampled_from([37, 53])),
        "hidden_size": draw(st.sampled_from([20, 22, 28])),
        "intermediate_size": draw(st.sampled_from([17, 31])),
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([2, 6, 10, 14])),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "dtype": "float32",
    } | draw(ropes())
    assume(raw["head_dim"] * raw["num_attention_heads"] != raw["hidden_size"])
    if draw(st.booleans()):
        raw |= {"use_sliding_window": True, "sliding_window": draw(st.sampled_from([None, 1, 2, 3, 5, 9]))}
    else:
        raw |= {"use_sliding_window": False, "sliding_window": draw(st.sampled_from([None, 3]))}
    return raw | draw(dense_only(raw) if family == "qwen3" else moe_only(layers))


@st.composite
def dense_only(draw, raw: dict[str, Any]) -> dict[str, Any]:
    """Draw what only Qwen3 has: which layers slide."""
    kinds = ["full_attention"] + ["sliding_attention"] * bool(raw["use_sliding_window"] and raw["sliding_window"])
    layers = raw["num_hidden_layers"]
    if draw(st.booleans()):
        return {"layer_types": draw(st.lists(st.sampled_from(kinds), min_size=layers, max_size=layers))}
    return {"max_window_layers": draw(st.integers(0, layers))}


@st.composite
def moe_only(draw, layers: int) -> dict[str, Any]:
    """Draw what only Qwen3-MoE has: experts, and which layers have them."""
    experts = draw(st.sampled_from([4, 5, 9, 16]))
    return {
        draw(st.sampled_from(["num_experts", "num_local_experts"])): experts,
        "num_experts_per_tok": draw(st.integers(1, min(8, experts))),
        "moe_intermediate_size": draw(st.sampled_from([7, 11])),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.sampled_from([1, 1, 2])),
        "mlp_only_layers": draw(st.sampled_from([None, [], [0], [layers - 1]])),
        "router_aux_loss_coef": 0.1,
        "max_window_layers": draw(st.integers(0, layers)),
    }


@st.composite
def batches(draw, vocab: int) -> dict[str, torch.Tensor]:
    """Draw rows of one document each, padded on the right, with uneven and partly masked labels."""
    lengths = draw(st.lists(st.integers(2, 13), min_size=1, max_size=3))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (len(lengths), max(lengths))
    positions = torch.arange(shape[1]).expand(shape)
    real = positions < torch.tensor(lengths)[:, None]
    tokens = torch.randint(vocab, shape, generator=gen) * real
    trained = real[:, 1:] & (torch.rand(shape[0], shape[1] - 1, generator=gen) < draw(st.sampled_from([0.3, 1.0])))
    trained[0, 0] = True
    return {
        "tokens": tokens,
        "targets": torch.nn.functional.pad(tokens[:, 1:], (0, 1)),
        "segment_ids": real.to(torch.int64),
        "positions": positions * real,
        "weights": torch.nn.functional.pad(trained, (0, 1)).to(torch.float32),
    }


def hf_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Say the same to transformers: it shifts labels itself, and reads -100 as not trained."""
    labels = torch.where(batch["weights"] > 0, batch["targets"], -100)
    return {
        "input_ids": batch["tokens"],
        "attention_mask": batch["segment_ids"],
        "labels": torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-100),
    }


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Compare with an error relative to the largest element of `theirs`."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, (what, ours.shape, theirs.shape, ours.dtype)
    error = (ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)
    assert error <= tolerance, f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}"
