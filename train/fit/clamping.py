"""How often a code is clamped, or would be -128: what the symmetric range and the scale rule do."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lowbit import Backend, BlockFormat, Key, Operand, QuantizedTensor
from lowbit.backend import Wanted
from lowbit.stats import ClampCounts, clamp_counts
from train.model.module import PretrainModule

EVERY_N_STEPS = 50  # counting costs about what quantizing does


class _Counting:
    """A backend that counts what passes through it."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name
        self.counts = ClampCounts()

    def operand(self, x: Tensor, format: BlockFormat | None, dim: int, key: Key | None) -> Operand:
        if format is not None:
            self.counts += clamp_counts(x, format, dim, key=key)
        return self.inner.operand(x, format, dim, key)

    def operands(self, x: Tensor, across: Wanted, down: Wanted) -> tuple[Operand, Operand]:
        for dim, (format, key) in ((1, across), (0, down)):
            self.counts += clamp_counts(x, format, dim, key=key)
        return self.inner.operands(x, across, down)

    def stored(self, x: Tensor, format: BlockFormat, dim: int, key: Key | None) -> QuantizedTensor:
        self.counts += clamp_counts(x, format, dim, key=key)
        return self.inner.stored(x, format, dim, key)

    def restored(self, stored: QuantizedTensor, dtype: Any) -> Operand:
        return self.inner.restored(stored, dtype)

    def matmul(self, a: Operand, b: Operand, bias: Tensor | None, dtype: Any) -> Tensor:
        return self.inner.matmul(a, b, bias, dtype)


class CodeUse(Callback):
    """Logs `quant/clamped` and `quant/minus_128`, shares of all six operands' codes, now and then.

    Counted on the first micro-batch of every 50th step, on this rank; once what layers share.
    Exact arithmetic with the `rceil` rule never clamps: the shares are then 0.
    """

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Count in this micro-batch, if it is its turn."""
        assert isinstance(module, PretrainModule)
        self._counting = None
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first and (trainer.global_step + 1) % EVERY_N_STEPS == 0 and module.quantized_layers:
            layers = module.quantized_layers.values()
            self._counting = _Counting(next(iter(layers)).backend)
            for layer in layers:
                layer.backend = self._counting

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        """Log the shares."""
        assert isinstance(module, PretrainModule)
        if self._counting is None:
            return
        for layer in module.quantized_layers.values():
            layer.backend = self._counting.inner
        counts = self._counting.counts
        if counts.total:
            shares = {"clamped": counts.clamped, "minus_128": counts.minus_128}
            module.log_row({f"quant/{n}": float(c) / counts.total for n, c in shares.items()})
