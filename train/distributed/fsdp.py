"""FSDP2: weights, gradients and optimizer state in shards, gathered block by block."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from train.checkpoints.folder import AtomicCheckpointIO
from train.checkpoints.sharded import load_sharded, save_sharded

# of precision; None: gathered as stored
COMPUTE_DTYPES: dict[Any, torch.dtype | None] = {"bf16-mixed": torch.bfloat16, "32-true": None}


class FullySharded(ModelParallelStrategy):
    """Lightning's strategy with data parallelism alone, and with our checkpoints.

    Lightning's own default is tensor parallelism, in which all ranks get the same batch.
    """

    def setup_environment(self) -> None:
        """With the mesh of data parallelism alone."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Between the micro-batches of a step gradients are summed here, not over the ranks."""
        assert self.lightning_module is not None
        root = self.lightning_module.model
        assert isinstance(root, FSDPModule)
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    def shard(self, model: LlamaForCausalLM, source: nn.Module | None) -> None:
        """Give a model on the meta device the weights that rank 0 holds in `source`, in shards."""
        mesh = self.device_mesh["data_parallel"]
        dtype = COMPUTE_DTYPES[self.precision_plugin.precision]
        if model.model.layers[0]._compiled_call_impl is not None:
            dtype = None  # gathers within a block would cut its graph into pieces
        shard_empty(model, mesh, self.root_device, dtype)
        scatter_weights(source, model)

    # Names and nesting of the state are those without shards; see checkpoints/sharded.py.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Shards under the names of whole tensors."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Shards, as the optimizer holds them."""
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """All ranks call it."""
        save_sharded(checkpoint, Path(filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """All ranks call it."""
        assert self.lightning_module is not None
        path, io = Path(checkpoint_path), self.checkpoint_io
        assert isinstance(io, AtomicCheckpointIO)
        io.verify(path)
        return load_sharded(path, self.lightning_module.state_dict(), self.optimizers)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning is to restore the optimizer too."""
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Into the shards."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Into the shards."""
        Strategy.load_optimizer_state_dict(self, checkpoint)


StrategyRegistry.register("fsdp2", FullySharded, description="fully sharded data parallelism")


def shard_empty(
    model: LlamaForCausalLM,
    mesh: DeviceMesh,
    device: torch.device,
    compute_dtype: torch.dtype | None,
) -> None:
    """Turn a model on the meta device into shards on `device`, their values still to be set.

    Weights are FP32, gradients are reduced in FP32. Those of linear layers are gathered in the
    compute dtype, to which autocast would round them anyway; the others (embedding, norms) in FP32,
    as one process has them, and so are all where `compute_dtype` is None. Quantization sees the
    gathered weight.
    """
    with torch.device("cpu"):  # its bits too are those of one process
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    for module in model.modules():
        if next(module.children(), None) is None and next(module.parameters(), None) is not None:
            module.to_empty(device=device)
    model.tie_weights()
    linear = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    other = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)
    for block in model.model.layers:
        if compute_dtype is not None:
            linears: list[nn.Module] = [m for m in block.modules() if isinstance(m, nn.Linear)]
            fully_shard(linears, mesh=mesh, mp_policy=linear)
        fully_shard(block, mesh=mesh, mp_policy=other)
    if not model.config.tie_word_embeddings:  # one parameter belongs to one group
        fully_shard(model.lm_head, mesh=mesh, mp_policy=linear)
        fully_shard(model.model.embed_tokens, mesh=mesh, mp_policy=other)
    fully_shard(model, mesh=mesh, mp_policy=other)


@torch.no_grad()
def scatter_weights(source: nn.Module | None, model: nn.Module) -> None:
    """Set the shards of `model` to the weights of `source`, which rank 0 alone holds."""
    weights = {} if source is None else dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        device = parameter.to_local().device
        full = weights[name].to(device) if weights else torch.empty(parameter.shape, device=device)
        parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))


def gathered(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The whole weights, on the CPU, by name; all ranks call it. Tied ones are one tensor."""
    state = model.state_dict().items()
    whole = {n: (v.full_tensor() if isinstance(v, DTensor) else v).cpu() for n, v in state}
    if model.config.tie_word_embeddings:
        whole["lm_head.weight"] = whole["model.embed_tokens.weight"]
    return whole
