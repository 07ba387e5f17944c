"""Logits, losses and every gradient equal transformers', on random configs of both families."""

import copy

import pytest
import torch
import transformers
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

import models
from functional_trainer import hf, losses, tree
from functional_trainer.types import ONE_DEVICE
from tests.conformance.reference import Float64, assert_close, batches, configs, examples, hf_inputs, hf_model, saved


def objective(loss, model, params, batch):
    """Return what a train step differentiates: coefficient x sum / weight, over the terms."""
    sums, _ = loss.terms(model.apply(params, batch), model.unembed(params), batch, ONE_DEVICE)
    weights = loss.weights(batch)
    return sum(loss.coefficients.get(name, 1.0) * total / weights.get(name, 1) for name, total in sums.items())


def gradients(model, params, scalar) -> dict[str, torch.Tensor]:
    """Return the gradients under transformers' in-memory names (experts fused) and shapes."""
    flat = tree.flatten(params)
    grads = dict(zip(flat, torch.autograd.grad(scalar, list(flat.values())), strict=True))
    slots = hf.expand(model.specs, model.names[-1])
    return {name: grads[slot.path][slot.index].reshape(slot.shape) for name, slot in slots.items()}


def load(folder, dtype):
    model, params = models.from_pretrained(folder, dtype=dtype)
    return model, tree.map(lambda x: x.requires_grad_(), params)


@given(st.data())
@examples(25)
def test_float32_logits(data):
    raw = data.draw(configs())
    batch = data.draw(batches(raw["vocab_size"]))
    with saved(raw) as folder, torch.no_grad():
        model, params = load(folder, torch.float32)
        reference = hf_model(folder, torch.float32)
        theirs = reference(batch["tokens"], attention_mask=batch["segment_ids"]).logits
    ours = models.logits(model, params, batch["tokens"], segment_ids=batch["segment_ids"], positions=batch["positions"])
    real = batch["segment_ids"] > 0
    assert_close(ours[real], theirs[real], 1e-5)


@given(st.data())
@examples(25)
def test_float64_loss_and_every_gradient(data):
    raw = data.draw(configs())
    batch = data.draw(batches(raw["vocab_size"]))
    with saved(raw) as folder:
        model, params = load(folder, torch.float64)
        reference = hf_model(folder)
    moe = any("moe" in layer for layer in params["layers"])
    with Float64():
        out = reference(**hf_inputs(batch), **({"output_router_logits": True} if moe else {}))
        out.loss.backward()
    ours = objective(losses.sft("hf", raw.get("router_aux_loss_coef")), model, params, batch)
    assert_close(ours, out.loss.detach(), 1e-9, "loss")
    grads = gradients(model, params, ours)
    theirs = {name: p.grad for name, p in reference.named_parameters()}
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        assert_close(grad, torch.zeros_like(grad) if theirs[name] is None else theirs[name], 1e-9, name)


@given(st.data())
@examples(15)
def test_hf_balance_loss_alone(data):
    raw = data.draw(configs("qwen3_moe").filter(lambda raw: not raw["mlp_only_layers"]))
    batch = data.draw(batches(raw["vocab_size"]))
    with saved(raw) as folder:
        model, params = load(folder, torch.float64)
        reference = hf_model(folder)
    assume(any("moe" in layer for layer in params["layers"]))
    with Float64(), torch.no_grad():
        theirs = reference(**hf_inputs(batch), output_router_logits=True).aux_loss
    with_it, without = (objective(losses.sft(form, 1.0), model, params, batch) for form in ("hf", "none"))
    assert_close((with_it - without).detach(), theirs, 1e-9)


def on_meta(raw):
    """Build transformers' model without weights."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
        return transformers.AutoModelForCausalLM.from_config(config)


def assert_same_reading(raw):
    """Compare how both sides understand a config: every tensor's name and shape, windows, and the plain numbers."""
    model, theirs = models.from_config(raw), on_meta(raw)
    slots = hf.expand(model.specs, model.names[-1])
    assert {n: s.shape for n, s in slots.items()} == {n: tuple(p.shape) for n, p in theirs.named_parameters()}
    c, their = model.config, theirs.config
    assert c.windows == tuple(layer.self_attn.sliding_window for layer in theirs.model.layers)
    assert c.rope.theta == their.rope_parameters["rope_theta"] and c.std == their.initializer_range
    assert (c.eps, c.tied, c.bias) == (their.rms_norm_eps, their.tie_word_embeddings, their.attention_bias)
    if raw["model_type"] == "qwen3_moe":
        assert (c.top_k, c.normalize) == (their.num_experts_per_tok, their.norm_topk_prob)


@given(configs())
@examples(100)
def test_configs_are_read_as_transformers_reads_them(raw):
    assert_same_reading(raw)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_defaults_are_those_of_transformers(family):
    assert_same_reading({"model_type": family})


@pytest.mark.parametrize("preset", models.PRESETS)
def test_presets_have_the_tensors_of_transformers(preset):
    assert_same_reading(models.PRESETS[preset])


@given(configs("qwen3"), st.sampled_from([2, 8, 22, 64]))
@examples(200)
def test_rotary_tables(raw, head_dim):
    raw = raw | {"head_dim": head_dim}
    positions = torch.tensor([[0, 1, 2, 40, 63]])
    with Float64():
        theirs = Qwen3RotaryEmbedding(transformers.Qwen3Config.from_dict(copy.deepcopy(raw)))
        cos_sin = theirs(torch.zeros(1), positions)
    ours = models.from_config(raw).config.rope.tables(positions, head_dim, torch.float64)
    for mine, full in zip(ours, cos_sin, strict=True):
        assert_close(mine, full[..., : head_dim // 2], 1e-12)
