"""Qwen3 mixture-of-experts decoder (https://arxiv.org/abs/2505.09388). Letters as in `models/layers.py`."""

from dataclasses import dataclass, field

from functional_trainer.hf import Name
from functional_trainer.param import Param
from functional_trainer.tree import Tree
from models import layers
from models.config import EXPERTS, LAYERS, Reader
from models.layers import Rope
from models.model import Model


@dataclass(frozen=True)
class Config:
    """Sizes of a Qwen3-MoE decoder, read from a Hugging Face dict."""

    vocab: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    """Width of the layers that are dense."""
    experts: int
    top_k: int
    expert_hidden: int
    sparse: tuple[bool, ...]
    """Whether each layer has experts; its length is the depth."""
    normalize: bool
    """Whether the top-k router weights are made to sum to one."""
    windows: tuple[int | None, ...]
    rope: Rope
    eps: float
    tied: bool
    bias: bool
    std: float
    hf: dict = field(hash=False, compare=False, repr=False)


def read(hf: dict) -> Config:
    """Read a `qwen3_moe` config dict; defaults are those of transformers."""
    get = Reader(hf)
    get.only("hidden_act", "silu", "experts and MLPs are SwiGLU")
    get.only("attention_dropout", 0.0, "training has no dropout")
    get("max_window_layers"), get("layer_types")  # transformers' Qwen3-MoE does not read them either
    dim, depth = get.size("hidden_size", 2048), get.size("num_hidden_layers", 24, most=LAYERS)
    heads = get.size("num_attention_heads", 32)
    experts = get("num_experts", 128)
    experts = get("num_local_experts", experts)
    if not 0 <= experts <= EXPERTS:
        get.wrong("num_experts", experts, f"0 to {EXPERTS}")
    dense, every = get("mlp_only_layers", [], expect=list), get.size("decoder_sparse_step", 1)
    if not all(type(i) is int for i in dense):
        get.wrong("mlp_only_layers", dense, "a list of layer numbers")
    get.number("router_aux_loss_coef", 1e-3)  # what recipes weigh the balance loss with
    window = get.window()
    config = Config(
        vocab=get.size("vocab_size", 151936),
        dim=dim,
        heads=heads,
        kv_heads=get.size("num_key_value_heads", 4),
        head_dim=get.size("head_dim", dim // heads),
        hidden=get.size("intermediate_size", 6144),
        experts=experts,
        top_k=get.size("num_experts_per_tok", 8),
        expert_hidden=get.size("moe_intermediate_size", 768),
        sparse=tuple(i not in dense and experts > 0 and (i + 1) % every == 0 for i in range(depth)),
        normalize=get("norm_topk_prob", False),
        windows=(window,) * depth,
        rope=get.rope(),
        eps=get.number("rms_norm_eps", 1e-6),
        tied=get("tie_word_embeddings", False),
        bias=get("attention_bias", False),
        std=get.number("initializer_range", 0.02),
        hf=hf,
    )
    if any(config.sparse) and config.top_k > experts:
        raise ValueError(f"config.json of qwen3_moe: num_experts_per_tok {config.top_k} exceeds num_experts {experts}")
    get.done()
    return config


def specs(c: Config) -> Tree:
    """Declare the parameters."""

    def layer(sparse: bool) -> Tree:
        feed = (
            {"moe": layers.moe_specs(c.dim, c.experts, c.expert_hidden, c.std)}
            if sparse
            else {"mlp": layers.mlp_specs(c.dim, c.hidden, c.std)}
        )
        return {
            "attn_norm": Param((c.dim,), "D", init="ones"),
            "attn": layers.attention_specs(c.dim, c.heads, c.kv_heads, c.head_dim, c.bias, c.std),
            "mlp_norm": Param((c.dim,), "D", init="ones"),
        } | feed

    return layers.decoder_specs(c.vocab, c.dim, [layer(s) for s in c.sparse], c.tied, c.std)


PER_EXPERT = (
    Name(layers.HUB + "mlp.gate.weight", "layers/{i}/moe/router"),
    Name(layers.HUB + "mlp.experts.{e}.gate_proj.weight", "layers/{i}/moe/gate_up", "e,0"),
    Name(layers.HUB + "mlp.experts.{e}.up_proj.weight", "layers/{i}/moe/gate_up", "e,1"),
    Name(layers.HUB + "mlp.experts.{e}.down_proj.weight", "layers/{i}/moe/down", "e"),
)
FUSED = (
    Name(layers.HUB + "mlp.gate.weight", "layers/{i}/moe/router"),
    Name(layers.HUB + "mlp.experts.gate_up_proj", "layers/{i}/moe/gate_up"),
    Name(layers.HUB + "mlp.experts.down_proj", "layers/{i}/moe/down"),
)
SHARED = (*layers.DECODER_NAMES, *layers.ATTENTION_NAMES, *layers.MLP_NAMES)


def from_config(hf: dict) -> Model:
    """Build the model of a `qwen3_moe` config dict."""
    c = read(hf)

    def layer(p, x_BSD, rows, *, window, dtype, shard, cache):
        p = shard.weights(p, layers.LAYER, dtype)

        def feed(p, h_BSD):
            if "moe" not in p:
                return layers.mlp(p["mlp"], h_BSD, shard), {}
            return layers.moe(p["moe"], h_BSD, rows, c.top_k, c.normalize, shard)

        return layers.block(p, x_BSD, rows, c.eps, window, shard, cache, feed)

    return Model(config=c, specs=specs(c), layer=layer, names=((*SHARED, *PER_EXPERT), (*SHARED, *FUSED)))


PRESETS: dict[str, dict] = {
    "30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip
PRESETS["235b-a22b"] = PRESETS["30b-a3b"] | {
    "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64,
    "num_hidden_layers": 94, "max_window_layers": 94,
}  # fmt: skip
PRESETS["1t"] = PRESETS["30b-a3b"] | {  # the sizes of Kimi K2 (https://arxiv.org/abs/2507.20534), in this family's form
    "hidden_size": 7168, "intermediate_size": 18432, "max_position_embeddings": 131072, "max_window_layers": 61,
    "moe_intermediate_size": 2048, "num_attention_heads": 64, "num_experts": 384, "num_hidden_layers": 61,
    "num_key_value_heads": 8, "vocab_size": 163840,
}  # fmt: skip
PRESETS["tiny"] = PRESETS["30b-a3b"] | {
    "bos_token_id": None, "head_dim": 32, "hidden_size": 128, "initializer_range": 0.06, "intermediate_size": 256,
    "max_position_embeddings": 512, "max_window_layers": 2, "moe_intermediate_size": 320, "num_attention_heads": 4,
    "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "rope_theta": 10000.0, "router_aux_loss_coef": 0.005, "vocab_size": 384,
}  # fmt: skip
