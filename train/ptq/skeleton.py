"""A decoder without its weights: where its blocks are, what each is called with, who reads what."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from train.ptq.source import Source
from train.quantized.on_meta import parameters_on_meta


class _PastTheLastBlock(Exception):  # noqa: N818  # no error
    """Norm and head are not wanted."""


@dataclass(frozen=True)
class Calls:
    """What the blocks receive from the model around them."""

    hidden: Tensor  #: of the first block [1, tokens, width]
    others: list[dict[str, Any]]  #: keyword arguments of each block: masks, positions


class Skeleton:
    """The model of a source; one block at a time has weights."""

    def __init__(self, source: Source) -> None:
        make: Any = AutoModelForCausalLM.from_config
        with parameters_on_meta():
            self.model: Any = make(source.config, dtype=torch.float32).eval()
        self.model.config.use_cache = False
        self.source = source
        self.prefix, self.blocks = _decoder_blocks(self.model, source.name)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of a block, by full name."""
        within = self.blocks[index].named_modules(prefix=f"{self.prefix}.{index}")
        return {name: module for name, module in within if isinstance(module, nn.Linear)}

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module its weights, in FP32."""
        state = {}
        for name, _ in module.named_parameters():
            full = f"{prefix}.{name}"
            if full not in self.source.entries:
                raise ValueError(f"{self.source.name} lacks the tensor {full}")
            state[name] = self.source.tensor(full).to(torch.float32)
        module.load_state_dict(state, strict=False, assign=True)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights, which it loses after."""
        block = self.blocks[index]
        self.fill(block, f"{self.prefix}.{index}")
        try:
            yield block
        finally:
            block.to("meta")

    def calls(self, ids: Tensor | None, tokens: int = 2) -> Calls:
        """What the blocks are called with for `ids` [1, tokens]; without ids, for zeros in the
        place of embeddings, which then need no memory.
        """
        embeddings = self.model.get_input_embeddings()
        if ids is None:
            width = embeddings.weight.shape[1]
            return self._record(inputs_embeds=torch.zeros(1, tokens, width))
        return self._record(input_ids=ids)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """All that comes before the blocks has its weights."""
        embeddings = self.model.get_input_embeddings()
        (name,) = [n for n, module in self.model.named_modules() if module is embeddings]
        self.fill(embeddings, name)
        try:
            yield
        finally:
            embeddings.to("meta")

    def _record(self, **inputs: Tensor) -> Calls:
        others: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def stub(*args: Any, **kwargs: Any) -> Tensor:
            hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
            first.append(hidden)
            others.append(kwargs)
            if len(others) == len(self.blocks):
                raise _PastTheLastBlock
            return hidden

        for block in self.blocks:
            block.forward = stub
        try:
            self.model(**inputs, use_cache=False)
        except _PastTheLastBlock:
            return Calls(first[0], others)
        finally:
            for block in self.blocks:
                del block.forward
        raise ValueError(f"{self.source.name}: its forward does not pass all its decoder blocks")


def run(block: nn.Module, hidden: Tensor, others: Mapping[str, Any]) -> Tensor:
    """What a block makes of `hidden` [1, tokens, width]."""
    found: Any = block(hidden, **others)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def readers(
    block: nn.Module, linears: Mapping[str, nn.Linear], hidden: Tensor, others: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """Names of the layers that read one and the same tensor, in the order in which they run.

    ValueError for a layer that does not run on every token, as experts do.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            for tensor, names in seen:
                if tensor is args[0]:
                    return names.append(name)
            seen.append((args[0], [name]))

        return hook

    handles = [m.register_forward_pre_hook(note(name)) for name, m in linears.items()]
    try:
        run(block, hidden, others)
    finally:
        for handle in handles:
            handle.remove()
    found = [tuple(names) for _, names in seen]
    if sorted(name for names in found for name in names) != sorted(linears):
        ran = {name for names in found for name in names}
        odd = next((name for name in linears if name not in ran), None) or found[0][0]
        raise ValueError(f"layer {odd} does not run once on every token: it cannot be calibrated")
    return found


def _decoder_blocks(model: nn.Module, name: str) -> tuple[str, Sequence[nn.Module]]:
    """The longest list of alike modules that hold linear layers."""
    lists = [
        (place, module)
        for place, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and len({type(block) for block in module}) == 1
        and any(isinstance(part, nn.Linear) for part in module[0].modules())
    ]
    if not lists:
        raise ValueError(f"{name} is a {type(model).__name__}, which has no decoder blocks")
    place, blocks = max(lists, key=lambda found: len(found[1]))
    return place, list(blocks)
