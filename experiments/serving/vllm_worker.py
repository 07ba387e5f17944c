"""What a vLLM server gets so that a trainer can replace its weights in place. Needs vllm, torch and safetensors only.

    PYTHONPATH=experiments/serving python -m vllm.entrypoints.openai.api_server \\
        --worker-extension-cls vllm_worker.Weights ...

This folder has nothing but what runs beside vLLM, so that its path hides none of vLLM's libraries.

`begin_weights`, then `load_weights_from` or `load_weights_bytes` as often as it takes, then `finish_weights`, each by
/collective_rpc. On a GPU this is vLLM's own layerwise reload. On a CPU that one (0.32) leaves wrong weights behind, in
most cases without an error: a tied head is not packed again, nor are experts. Here what has been packed is made anew as
it was before the first load, filled, and packed again.
"""

import base64
from pathlib import Path
from typing import Any


class Weights:
    """Methods that vLLM adds to its worker (`--worker-extension-cls`), which has the rest."""

    model_runner: Any
    vllm_config: Any
    device: Any
    weights_begun = False

    def begin_weights(self) -> None:
        """Let the model take weights as they are in checkpoints."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
        from vllm.platforms import current_platform

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config), torch.device(self.device), torch.no_grad():
            if not current_platform.is_cpu():
                if self.weights_begun:  # by an update that was cut off, of which layers may have a part
                    finalize_layerwise_reload(model, self.vllm_config.model_config)
                initialize_layerwise_reload(model)
                self.weights_begun = True
                return
            for module in model.modules():
                _unpack(module)

    def load_weights_from(self, folder: str) -> int:
        """Load all safetensors files of a folder; return how many tensors they have."""
        import safetensors.torch

        files = sorted(Path(folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} has no safetensors files, as this server sees it")
        return sum(self._load(safetensors.torch.load_file(file)) for file in files)

    def load_weights_bytes(self, data: str) -> int:
        """Load a safetensors file given as base64; return how many tensors it has."""
        import safetensors.torch

        return self._load(safetensors.torch.load(base64.b64decode(data)))

    def finish_weights(self) -> None:
        """Bring what was loaded into the form that is computed with."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload
        from vllm.platforms import current_platform

        model = self.model_runner.get_model()
        with set_current_vllm_config(self.vllm_config), torch.device(self.device), torch.no_grad():
            if not current_platform.is_cpu():
                finalize_layerwise_reload(model, self.vllm_config.model_config)
                self.weights_begun = False
                return
            for module in model.modules():
                if hasattr(module, "cpu_linear") or hasattr(module, "w13_weight"):
                    module.quant_method.process_weights_after_loading(module)

    def _load(self, tensors: dict) -> int:
        import torch
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self.vllm_config), torch.device(self.device), torch.no_grad():
            self.model_runner.get_model().load_weights(iter(tensors.items()))
        return len(tensors)


def _unpack(module) -> None:
    """Give a packed module of the CPU backend the parameters that it was made with; what they hold is undefined."""
    if hasattr(module, "w13_weight"):  # experts
        config = module.moe_config
        module.quant_method.moe_kernel = None  # else what is loaded is not packed
        module.quant_method.create_weights(
            layer=module, num_experts=config.num_local_experts, hidden_size=module.hidden_size,
            intermediate_size_per_partition=config.intermediate_size_per_partition,
            params_dtype=module.w13_weight.dtype, weight_loader=module.weight_loader,
            global_num_experts=config.num_experts, unpadded_hidden_size=config.hidden_dim_unpadded,
        )  # fmt: skip
    elif hasattr(module, "cpu_linear") and module.weight.numel() == 0:  # linears; embeddings and heads keep theirs
        module.quant_method.create_weights(
            layer=module, input_size_per_partition=getattr(module, "input_size_per_partition", module.input_size),
            output_partition_sizes=module.output_partition_sizes,
            input_size=module.input_size, output_size=module.output_size, params_dtype=module.params_dtype,
            weight_loader=module.weight_loader,
        )  # fmt: skip
        module.update_param_tp_status()
