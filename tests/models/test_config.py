"""Reading config.json: what is refused, what is warned of, what the defaults are."""

import logging

import pytest

import models
from functional_trainer import tree
from models.layers import Rope
from tests.models import small


@pytest.mark.parametrize("raw", [small.DENSE, small.MOE], ids=["qwen3", "qwen3_moe"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen9"}, r"'qwen9' is not implemented; these are: qwen3, qwen3_moe"),
        ({"model_type": None}, "None is not implemented"),
        ({"attention_dropout": 0.1}, r"attention_dropout = 0.1 is not supported \(training has no dropout\); use 0.0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"hidden_size": "10"}, r"hidden_size is '10', expected"),
        ({"hidden_size": 10.0}, r"hidden_size is 10.0, expected"),
        ({"hidden_size": True}, r"hidden_size is True, expected"),
        ({"vocab_size": 0}, "vocab_size is 0, expected at least 1"),
        ({"num_attention_heads": -6}, "num_attention_heads is -6, expected at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected at least 1"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"head_dim": 5}, "head_dim is 5, expected an even number"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6', expected"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope .*llama3.* is not supported; default, linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "is not supported; default, linear and yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1"),
    ],
)
def test_refused(raw, change, message):
    with pytest.raises(ValueError, match=message):
        models.from_config(raw | change)


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (small.MOE, {"num_experts_per_tok": 6}, "num_experts_per_tok 6 exceeds num_experts 5"),
        (small.MOE, {"mlp_only_layers": 1}, "mlp_only_layers is 1, expected"),
        (small.MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected at least 1"),
        (
            small.DENSE,
            {"layer_types": ["full_attention"]},
            "layer_types must name full_.* or sliding_attention 2 times",
        ),
        (small.DENSE, {"layer_types": ["linear_attention"] * 2}, "layer_types must name"),
        (small.DENSE, {"layer_types": ["sliding_attention"] * 2}, "but use_sliding_window is false"),
    ],
)
def test_refused_by_a_family(raw, change, message):
    with pytest.raises(ValueError, match=message):
        models.from_config(raw | change)


@pytest.mark.parametrize("raw", [small.DENSE, small.MOE], ids=["qwen3", "qwen3_moe"])
def test_unknown_keys_are_named(raw, caplog):
    with caplog.at_level(logging.WARNING):
        models.from_config(raw | {"transformers_version": "5.0", "use_cache": False})
        assert not caplog.records
        extra = {"softcap": 3.0, "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "wobble": 1}}
        models.from_config(raw | extra)
    text = caplog.text
    assert raw["model_type"] in text and "rope.wobble" in text and "softcap" in text and "yarn" not in text


def test_rope_in_either_spelling():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    old = models.from_config(small.MOE | {"rope_theta": 500.0, "rope_scaling": scaling})
    new = models.from_config(small.MOE | {"rope_parameters": scaling | {"rope_theta": 500.0}})
    assert old.config.rope == new.config.rope
    assert (old.config.rope.kind, old.config.rope.theta, old.config.rope.trained_length) == ("yarn", 500.0, 16)
    assert models.from_config(small.MOE).config.rope == Rope(1e4)
    assert models.from_config(small.MOE | {"rope_theta": 1000000}).config.rope == Rope(1e6)  # an int in many files


def test_the_raw_dict_is_kept():
    raw = small.MOE | {"something_else": [1, 2]}
    assert models.from_config(raw).config.hf == raw


def test_presets_have_the_published_sizes():
    """Parameters as the model cards state them: total, and those that one token uses."""
    experts = {"30b-a3b": 30.5e9, "235b-a22b": 235e9, "1t": 1.04e12}
    published = experts | {"dense-0.6b": 0.6e9, "dense-8b": 8.2e9, "dense-32b": 32.8e9}
    for name, total in published.items():
        assert abs(models.count(models.from_config(models.PRESETS[name])) / total - 1) < 0.01, name
    tiny = models.from_config(models.PRESETS["tiny"])
    assert models.count(tiny) >= 2e6 and tiny.config.experts >= 8


def test_unknown_presets_are_named():
    with pytest.raises(ValueError, match="'tny' is not one of .*tiny"):
        models.preset("tny", None)


def test_specs_follow_the_config():
    dense = tree.flatten(models.from_config(small.MOE | {"mlp_only_layers": [], "decoder_sparse_step": 2}).specs)
    assert {p.split("/")[1] for p in dense if "/moe/" in p} == {"1"}
    assert {p.split("/")[1] for p in dense if "/mlp/" in p} == {"0", "2"}
    biased = tree.flatten(models.from_config(small.DENSE | {"attention_bias": True}).specs)
    assert {k: biased[f"layers/0/attn/{k}_bias"].shape for k in "qkvo"} == {
        "q": (6, 4), "k": (2, 4), "v": (2, 4), "o": (10,)
    }  # fmt: skip
    assert "unembed" not in biased and "unembed" in dense
