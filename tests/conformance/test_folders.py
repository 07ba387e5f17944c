"""Folders travel both ways: what transformers saves is read and rewritten bit by bit, what we save it loads."""

import json

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file

import models
from functional_trainer import hf, tree
from tests.conformance.reference import assert_close, configs, examples, hf_model, saved


def tensors(folder):
    """Return all tensors of a folder, whatever files they are in."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def identical(a, b):
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("max_shard_size", ["5GB", "6KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(raw=configs())
@examples(5)
def test_untouched_folders_are_rewritten_bit_by_bit(tmp_path, raw, dtype, max_shard_size):
    raw = raw | {"dtype": str(dtype).removeprefix("torch.")}
    with saved(raw, dtype=dtype, max_shard_size=max_shard_size) as folder:
        model, params = models.from_pretrained(folder)
        assert {x.dtype for x in tree.flatten(params).values()} == {dtype}
        models.save_pretrained(model, params, tmp_path)
        assert (folder / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
        assert identical(tensors(folder), tensors(tmp_path))


@given(configs())
@examples(10)
def test_a_folder_wholly_by_transformers_is_understood_and_comes_back_equal(tmp_path, caplog, raw):
    caplog.clear()
    with saved(raw) as folder:
        hf_model(folder, torch.float32).save_pretrained(folder)
        model, params = models.from_pretrained(folder)
        assert not caplog.records, "a key that transformers writes is called unknown"
        models.save_pretrained(model, params, tmp_path)
        assert (folder / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()
        assert identical(tensors(folder), tensors(tmp_path))


@given(configs("qwen3_moe"))
@examples(5)
def test_fused_files_stay_fused_and_load_in_transformers(raw):
    with saved(raw) as folder:
        per_expert, reference = tensors(folder), hf_model(folder, torch.float32)
        fused = {k: v.clone() for k, v in reference.state_dict().items()}
        if raw["tie_word_embeddings"]:
            del fused["lm_head.weight"]
        model, params = models.from_pretrained(folder)
        save_file(fused, folder / "model.safetensors", metadata={"format": "pt"})
        model_2, params_2 = models.from_pretrained(folder)
        assert identical(tree.flatten(params), tree.flatten(params_2))
        models.save_pretrained(model_2, params_2, folder)
        assert identical(tensors(folder), fused)
        assert identical(hf_model(folder, torch.float32).state_dict(), reference.state_dict())
        models.save_pretrained(model, params, folder)
        assert identical(tensors(folder), per_expert)


@given(configs())
@examples(8)
def test_our_initial_weights_reload_in_transformers(tmp_path, raw):
    model = models.from_config(raw)
    params = model.init(3)
    models.save_pretrained(model, params, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == raw
    theirs = hf_model(tmp_path, torch.float32)
    state, flat = dict(theirs.named_parameters()), tree.flatten(params)
    slots = hf.expand(model.specs, model.names[-1])
    assert identical(state, {n: flat[s.path][s.index].reshape(s.shape) for n, s in slots.items()})
    tokens = torch.arange(30).view(3, 10)
    with torch.no_grad():
        assert_close(models.logits(model, params, tokens), theirs(tokens).logits, 1e-5)


@given(configs("qwen3_moe").filter(lambda raw: not raw["mlp_only_layers"] and raw["decoder_sparse_step"] == 1))
@examples(2)
def test_everything_wrong_with_a_folder_is_said_at_once(raw):
    with saved(raw) as folder:
        file = folder / "model.safetensors"
        content = load_file(file)
        missing = "model.layers.0.mlp.experts.3.up_proj.weight"
        shape = tuple(content.pop(missing).shape)
        content["model.norm.weight"] = torch.ones(raw["hidden_size"] + 1)
        content["model.layers.99.mlp.gate.weight"] = torch.ones(3, 2)
        save_file(content, file)
        with pytest.raises(ValueError) as caught:
            models.from_pretrained(folder)
    d = raw["hidden_size"]
    for line in (
        f"missing   {missing} {shape}",
        "extra     model.layers.99.mlp.gate.weight (3, 2) in model.safetensors",
        f"shape     model.norm.weight is ({d + 1},), the model needs ({d},)",
    ):
        assert line in str(caught.value)
    assert "3 problem(s)" in str(caught.value)


@given(configs().filter(lambda raw: raw["tie_word_embeddings"]))
@examples(2)
def test_a_tied_head_in_the_file_must_equal_the_embedding(raw):
    with saved(raw) as folder:
        file = folder / "model.safetensors"
        content = load_file(file)
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        save_file(content, file)
        models.from_pretrained(folder)
        content["lm_head.weight"][2, 1] += 1
        save_file(content, file)
        with pytest.raises(ValueError, match="lm_head.weight .* differs from model.embed_tokens.weight"):
            models.from_pretrained(folder)
