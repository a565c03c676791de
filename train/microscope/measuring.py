"""Hooks on linear layers that measure the six operands as their GEMMs receive them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowbit import BlockFormat, QuantLinear, crest_factor, rotate
from lowbit.operands import LayerNumerics
from lowbit.recipe import OPERANDS, ROLES
from lowbit.stats import QuantizationError, quantization_error, quantization_errors
from train.microscope.layers import place_of

BINS = 64  # of a histogram of crest factors at blocks of 32, which lie between 1 and sqrt(32)
LARGEST_CREST = 32**0.5


@dataclass(frozen=True)
class Measured:
    """One operand in one format; those of micro-batches and ranks add up."""

    error: QuantizationError
    crest: float  #: sum of the blocks' crest factors
    blocks: int  #: that have one: those not of zeros alone

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(
            self.error + other.error, self.crest + other.crest, self.blocks + other.blocks
        )

    def numbers(self) -> list[float]:
        """For a sum over ranks."""
        return [*vars(self.error).values(), self.crest, self.blocks]

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Measured":
        """What `numbers` gave."""
        *error, crest, blocks = numbers
        return cls(QuantizationError(*error), crest, int(blocks))  # type: ignore[arg-type]


Found = dict[tuple[str, bool], Measured]  # by format, and whether it is the trained one


class StepMeasurement:
    """One optimizer step's measurements of `layers`, over all its micro-batches."""

    def __init__(
        self,
        layers: dict[str, nn.Linear],
        operands: Sequence[str],
        formats: Sequence[BlockFormat],
    ) -> None:
        self.layers, self.operands, self.formats = layers, tuple(operands), tuple(formats)
        self.found: dict[tuple[str, str, str, bool], Measured] = {}
        self.histograms = {operand: torch.zeros(BINS, dtype=torch.float64) for operand in operands}
        self._handles: list[Any] = []
        self._micro_batches = 0

    def begin_micro_batch(self) -> None:
        """Hook the layers; what flows through them is measured at once."""
        self._micro_batches += 1
        self._seen: set[str] = set()  # activation checkpointing repeats a layer's forward
        self._last: tuple[Tensor | None, Any, dict[str, Found]] = (None, None, {})
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))

    def end_micro_batch(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = (None, None, {})

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def on_forward(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            assert isinstance(layer, nn.Linear)
            if name in self._seen:
                return
            self._seen.add(name)
            numerics = layer.numerics() if isinstance(layer, QuantLinear) else None

            def on_gradient(g: Tensor) -> None:
                self._record(name, "grad_output", _matrix(g), numerics)

            self._look_at_input(name, inputs[0], numerics)
            if self._micro_batches == 1:  # the others have the same weights
                self._record(name, "weight", _as_computed(layer.weight), numerics)
            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]  # torch's

        return on_forward

    def _look_at_input(self, name: str, x: Tensor, numerics: LayerNumerics | None) -> None:
        """q, k and v read the same tensor: look once."""
        recipe = numerics.recipe if numerics else None
        shared = recipe is None or not recipe.is_random
        if self._last[0] is x and self._last[1] == recipe and shared:
            self._add(name, self._last[2])
            return
        found = self._record(name, "input", _as_computed(_matrix(x)), numerics)
        self._last = x, recipe, found

    def _record(
        self, name: str, tensor: str, x: Tensor, numerics: LayerNumerics | None
    ) -> dict[str, Found]:
        """Measure the operands that are made of this tensor."""
        with torch.no_grad():
            found = {
                operand: self._measure(operand, x, numerics)
                for operand in self.operands
                if ROLES[operand].tensor == tensor
            }
        self._add(name, found)
        return found

    def _add(self, name: str, found: dict[str, Found]) -> None:
        for operand, by_format in found.items():
            for (format, trained), measured in by_format.items():
                key = name, operand, format, trained
                before = self.found.get(key)
                self.found[key] = before + measured if before else measured

    def _measure(self, operand: str, x: Tensor, numerics: LayerNumerics | None) -> Found:
        """In the trained format, of what its GEMM's rotation leaves, and in the what-if formats."""
        role = ROLES[operand]
        dim = role.axis
        trained = numerics.recipe.format(operand) if numerics else None
        rotation = numerics.recipe.rotation(role.gemm) if numerics else None
        key = numerics.key_of(role) if numerics else None
        found: Found = {}
        wanted = [(format, None) for format in self.formats if format != trained or rotation]
        crests = _Crests(x, dim)
        if trained and rotation:
            turned = rotate(x, rotation, dim)
            error = quantization_error(turned, trained, dim, key=key)
            mean = _Crests(turned, dim).sum_and_blocks(trained.block_size)
            found[f"{trained} hadamard({rotation.size})", True] = Measured(error, *mean)
        own = [(trained, key)] if trained and not rotation else []
        errors = quantization_errors(x, [*own, *wanted], dim)
        for (format, _), error in zip([*own, *wanted], errors, strict=True):
            mean = crests.sum_and_blocks(format.block_size)
            found[str(format), format == trained and not rotation] = Measured(error, *mean)
        self.histograms[operand] += crests.histogram()
        return found

    def rows(self, trainer: Trainer) -> list[dict[str, Any]]:
        """One a layer, operand and format, over all ranks."""
        layers = list(self.layers)
        keys = sorted(self.found, key=lambda k: (layers.index(k[0]), OPERANDS.index(k[1]), *k[2:]))
        numbers = torch.tensor([self.found[key].numbers() for key in keys], dtype=torch.float64)
        summed = trainer.strategy.reduce(numbers.to(trainer.strategy.root_device), reduce_op="sum")
        rows = []
        for (name, operand, format, trained), sums in zip(keys, summed.tolist(), strict=True):
            measured = Measured.of(sums)
            rows.append(
                place_of(name)
                | {"operand": operand, "format": format, "trained": trained}
                | {"qsnr_db": measured.error.qsnr_db, "underflow": measured.error.underflow_share}
                | {"crest": measured.crest / measured.blocks if measured.blocks else float("nan")}
            )
        return rows

    def crest_histograms(self, trainer: Trainer) -> dict[str, Tensor]:
        """Counts by operand, over all layers and ranks."""
        device = trainer.strategy.root_device
        return {
            operand: trainer.strategy.reduce(counts.to(device), reduce_op="sum").cpu()
            for operand, counts in self.histograms.items()
        }


def _matrix(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def _as_computed(x: Tensor) -> Tensor:
    """As a linear layer takes it under autocast."""
    device, x = x.device.type, x.detach()
    if isinstance(x, DTensor):  # a sharded weight: every rank gathers it at the same place
        x = x.full_tensor()
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class _Crests:
    """Crest factors of the blocks of a matrix along `dim`, each block size once."""

    def __init__(self, x: Tensor, dim: int) -> None:
        self.x, self.dim = x, dim
        self._of: dict[int, tuple[Tensor, float]] = {}

    def _in_blocks(self, size: int) -> tuple[Tensor, float]:
        """Those that are a number, and their sum: blocks of zeros have none."""
        if size not in self._of:
            all_blocks = crest_factor(self.x, size, self.dim)
            total = float(all_blocks.nansum())
            valid = all_blocks == all_blocks
            self._of[size] = all_blocks if valid.all() else all_blocks[valid], total
        return self._of[size]

    def sum_and_blocks(self, size: Any) -> tuple[float, int]:
        """Of the crest factors, and how many there are; none in 2-D."""
        if not isinstance(size, int):
            return 0.0, 0
        found, total = self._in_blocks(size)
        return total, found.numel()

    def histogram(self) -> Tensor:
        """Counts in BINS bins from 1 to LARGEST_CREST, blocks of 32."""
        found = self._in_blocks(32)[0].flatten()
        place = ((found - 1) * (BINS / (LARGEST_CREST - 1))).to(torch.int64).clamp_(0, BINS - 1)
        return place.bincount(minlength=BINS).cpu()
