"""What layers may hold on to beside what the unquantized model holds: time against memory."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from lowbit.backend import Operand


@dataclass(frozen=True)
class Keep:
    """Neither changes a bit of the results but signs of zero."""

    quantized_weights: bool = False
    """Quantize a weight once for all micro-batches of a step, and hold its copies: for each GEMM
    that reads the weight one in the compute dtype. Not under FSDP2 nor torch.compile."""
    quantized_inputs: bool = False
    """Between forward and backward hold wgrad's input as codes of a byte and scales, instead of the
    input itself or the operand in BF16. Stochastically rounded ones are held for each layer."""


class _Updates:
    """How many steps the optimizers of this process have taken."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._add)

    def _add(self, *_: object) -> None:
        self.count += 1


_updates = _Updates()


class KeptWeights:
    """The quantized copies of one layer's weight, until it changes."""

    def __init__(self) -> None:
        self._made_from: object = None
        self._operands: dict[str, Operand] = {}

    def keep_for(self, weight: Tensor, *numerics: object) -> None:
        """Let go of them if they were made of another state of the weight, or by other numerics.

        A weight's version counts its changes in place, but for those of fused optimizers.
        """
        made_from = (weight.data_ptr(), weight._version, _updates.count, *numerics)
        if made_from != self._made_from:
            self._made_from, self._operands = made_from, {}

    def operand(self, name: str, make: Callable[[], Operand]) -> Operand:
        """The operand called `name`, made if it is not here."""
        if name not in self._operands:
            self._operands[name] = make()
        return self._operands[name]
