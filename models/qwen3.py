"""Qwen3 dense decoder (https://arxiv.org/abs/2505.09388). Letters as in `models/layers.py`."""

from dataclasses import dataclass, field

from functional_trainer.param import Param
from functional_trainer.tree import Tree
from models import layers
from models.config import LAYERS, Reader
from models.layers import Rope
from models.model import Model


@dataclass(frozen=True)
class Config:
    """Sizes of a Qwen3 decoder, read from a Hugging Face dict."""

    vocab: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    windows: tuple[int | None, ...]
    """Sliding window of each layer, None for full attention; its length is the depth."""
    rope: Rope
    eps: float
    tied: bool
    bias: bool
    std: float
    hf: dict = field(hash=False, compare=False, repr=False)


def read(hf: dict) -> Config:
    """Read a `qwen3` config dict; defaults are those of transformers."""
    get = Reader(hf)
    get.only("hidden_act", "silu", "experts and MLPs are SwiGLU")
    get.only("attention_dropout", 0.0, "training has no dropout")
    heads, depth = get.size("num_attention_heads", 32), get.size("num_hidden_layers", 32, most=LAYERS)
    window = get.window()
    first = get("max_window_layers", 28)
    kinds = get(
        "layer_types", ["sliding_attention" if window and i >= first else "full_attention" for i in range(depth)]
    )
    if len(kinds) != depth or any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise ValueError(
            f"config.json of qwen3: layer_types must name full_attention or sliding_attention {depth} times"
        )
    if "sliding_attention" in kinds and window is None:
        raise ValueError("config.json of qwen3: layer_types has sliding_attention but use_sliding_window is false")
    config = Config(
        vocab=get.size("vocab_size", 151936),
        dim=get.size("hidden_size", 4096),
        heads=heads,
        kv_heads=get.size("num_key_value_heads", 32 if "num_key_value_heads" not in hf else heads),
        head_dim=get.size("head_dim", 128),
        hidden=get.size("intermediate_size", 22016),
        windows=tuple(window if k == "sliding_attention" else None for k in kinds),
        rope=get.rope(),
        eps=get.number("rms_norm_eps", 1e-6),
        tied=get("tie_word_embeddings", False),
        bias=get("attention_bias", False),
        std=get.number("initializer_range", 0.02),
        hf=hf,
    )
    get.done()
    return config


def specs(c: Config) -> Tree:
    """Declare the parameters."""

    def layer() -> Tree:
        return {
            "attn_norm": Param((c.dim,), "D", init="ones"),
            "attn": layers.attention_specs(c.dim, c.heads, c.kv_heads, c.head_dim, c.bias, c.std),
            "mlp_norm": Param((c.dim,), "D", init="ones"),
            "mlp": layers.mlp_specs(c.dim, c.hidden, c.std),
        }

    return layers.decoder_specs(c.vocab, c.dim, [layer() for _ in c.windows], c.tied, c.std)


NAMES = (*layers.DECODER_NAMES, *layers.ATTENTION_NAMES, *layers.MLP_NAMES)


def from_config(hf: dict) -> Model:
    """Build the model of a `qwen3` config dict."""
    c = read(hf)

    def layer(p, x_BSD, rows, *, window, dtype, shard, cache):
        p = shard.weights(p, layers.LAYER, dtype)

        def feed(p, h_BSD):
            return layers.mlp(p["mlp"], h_BSD, shard), {}

        return layers.block(p, x_BSD, rows, c.eps, window, shard, cache, feed)

    return Model(config=c, specs=specs(c), layer=layer, names=(NAMES,))


PRESETS: dict[str, dict] = {
    "0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip
PRESETS["8b"] = PRESETS["0.6b"] | {
    "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_hidden_layers": 36,
    "max_window_layers": 36, "tie_word_embeddings": False,
}  # fmt: skip
PRESETS["32b"] = PRESETS["8b"] | {
    "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64, "num_hidden_layers": 64,
    "max_window_layers": 64,
}  # fmt: skip
