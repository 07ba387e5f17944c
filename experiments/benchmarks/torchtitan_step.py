"""A training step of torchtitan's Qwen3-MoE on one device, for `train_gpu.py`. Written for torchtitan 0.3.0.

Of torchtitan are the model (sizes apart that of its "30B-A3B"), FlexAttention under its mask for packed documents,
`parallelize_qwen3` with compilation on, which compiles each layer, and the loss in 8 chunks, compiled too. So are the
float32 masters cast to bfloat16, which its FSDP does on a mesh of one. Not used, for everyone's step to do the same:
recomputation, which its 30B-A3B has on by default, and the bias that balances experts. Not used either: its CUDA graph
of forward and backward.

FlexAttention has no backward on a CPU, so there PyTorch's attention takes the same mask. Compilation keeps its graphs.
"""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from experiments.benchmarks import sft_cpu
from experiments.benchmarks.gpu_checks import At
from functional_trainer import hf, tree


class MaskedAttention(torch.nn.Module):
    """PyTorch's attention of q, k, v (B, S, N, H) under a mask of FlexAttention's."""

    def forward(self, q, k, v, *, attention_masks, scale, enable_gqa):
        S = q.shape[1]
        mask_B1SS = create_mask(attention_masks.mask_mod, q.shape[0], 1, S, S, device=q.device)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1SS, scale=scale, enable_gqa=enable_gqa)
        return out.transpose(1, 2)


def sized(raw: dict[str, Any]) -> Any:
    """Return torchtitan's config of a Qwen3-MoE with the sizes of a Hugging Face dict."""
    from torchtitan.models import qwen3
    from torchtitan.models.common import CosSinRoPE

    V, D, H = raw["vocab_size"], raw["hidden_size"], raw["head_dim"]
    base = qwen3.model_registry("30B-A3B").model
    layers = qwen3._build_qwen3_moe_layers(
        n_layers=raw["num_hidden_layers"], dim=D, n_heads=raw["num_attention_heads"], head_dim=H,
        n_kv_heads=raw["num_key_value_heads"], moe_hidden_dim=raw["moe_intermediate_size"],
        num_experts=raw["num_experts"], top_k=raw["num_experts_per_tok"], attn_backend="flex",
        moe_comm_backend="standard",
        rope=CosSinRoPE.Config(dim=H, max_seq_len=raw["max_position_embeddings"], theta=raw["rope_theta"]),
    )  # fmt: skip
    for layer in layers:
        layer.moe.load_balance_coeff = None
    return dataclasses.replace(
        base, vocab_size=V, dim=D, layers=layers, norm=dataclasses.replace(base.norm, normalized_shape=D),
        tok_embeddings=dataclasses.replace(base.tok_embeddings, num_embeddings=V, embedding_dim=D),
        lm_head=dataclasses.replace(base.lm_head, in_features=D, out_features=V),
    )  # fmt: skip


def module_of(config: Any, model: Any, params: Any, device: torch.device) -> Any:
    """Return torchtitan's module with copies of our parameters."""
    from torchtitan.models.qwen3 import Qwen3StateDictAdapter

    with device:
        module = config.build()
        module.init_states(buffer_device=device)
    leaves, slots = tree.flatten(params), hf.expand(model.specs, model.names[0])
    theirs = {name: leaves[slot.path][slot.index].view(slot.shape) for name, slot in slots.items()}
    module.load_state_dict(Qwen3StateDictAdapter(config, None).from_hf(theirs))
    return module.train()


def one_device(device: torch.device) -> tuple[Any, Any]:
    """Start a process group of one and return torchtitan's settings and meshes for it."""
    from torchtitan.config import ParallelismConfig
    from torchtitan.distributed import ParallelDims, parallel_dims
    from torchtitan.distributed.utils import set_spmd_backend

    if not dist.is_initialized():
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    how = ParallelismConfig(spmd_backend="partial_dtensor")  # its other two differ where tensors are sharded
    set_spmd_backend(how.spmd_backend)
    parallel_dims.device_type = device.type  # torchtitan takes it for a GPU where there is none
    meshes = ParallelDims.from_config(how, 1)
    meshes.build_mesh()
    return how, meshes


def titan_step(at: At, model: Any, batch: Any, weights: Callable[[torch.dtype], Any]) -> Callable[[], Callable]:
    """Return what builds torchtitan's model with `weights` and its step."""
    from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
    from torchtitan.config import CompileConfig, TrainingConfig
    from torchtitan.models import qwen3

    how, meshes = one_device(at.device)
    compiler = CompileConfig(enable=True, backend=at.compiler)
    labels = batch["targets"].masked_fill(batch["weights"] == 0, -100)
    inputs = {"tokens": batch["tokens"], "positions": batch["positions"], "labels": labels}

    def build() -> Callable:
        config = sized(model.config.hf)
        module = module_of(config, model, weights(torch.float32), at.device)
        if at.small:
            for layer in module.layers.values():
                layer.attention.inner_attention = MaskedAttention()
        qwen3.parallelize_qwen3(
            module, parallel_dims=meshes, training=TrainingConfig(), parallelism=how, compile_config=compiler,
            ac_config=None, dump_folder="",
        )  # fmt: skip
        loss = ChunkedLossWrapper.Config(loss_fn=CrossEntropyLoss.Config()).build(compile_config=compiler)
        loss.set_lm_head(module.lm_head)
        module._skip_lm_head = True

        def forward(tokens, positions, labels):
            hidden = module(tokens, positions, module.get_attention_masks(positions))
            return SimpleNamespace(loss=loss(hidden, labels, (labels != -100).sum())[0])

        return sft_cpu.hf_train(module, forward, inputs)

    return build
