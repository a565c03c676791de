"""When a run saves, what beside weights and optimizer, and how a resumed run finds its place."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from train.checkpoints.folder import AtomicCheckpointIO, complete_checkpoints
from train.fit.record import RunRecord
from train.fit.resume import changed, rescale_progress, resume_report, run_origin
from train.fit.signals import Preempted, StopRequest
from train.loggers.event_log import EventLog
from train.loggers.metrics_csv import MetricsCsv
from train.loggers.others import OtherLoggers
from train.model.finite import check_kept
from train.model.generators import generator_states, restore_generators
from train.model.step import TrainState

DiskFull = Literal["stop", "continue"]


@dataclass(frozen=True)
class SavePolicy:
    """How often, how many, and what a full disk means."""

    every_n_steps: int = 50
    num_kept: int = 2
    disk_full: DiskFull = "stop"

    def __post_init__(self) -> None:
        if self.every_n_steps < 1 or self.num_kept < 2:
            raise ValueError(
                f"checkpoint_every={self.every_n_steps}, keep_checkpoints={self.num_kept}: at "
                "least 1 and 2, since the newest may be damaged"
            )


class Checkpoints(Callback):
    """Saves at optimizer steps, answers a requested stop there, restores the generators.

    At a step that validates, the save comes after the validation; a stop does not wait for it: the
    state from before is saved, and the resumed run begins with the validation.
    """

    def __init__(
        self,
        folder: Path,
        policy: SavePolicy,
        stop: StopRequest,
        record: RunRecord,
        others: OtherLoggers,
    ) -> None:
        self._folder, self._policy, self._stop, self._record = folder, policy, stop, record
        self._others = others
        self._restored: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """All ranks go on from the same step, or none does: each has looked for itself."""
        points = _gather(trainer, str(trainer.ckpt_path))
        if len(set(points)) > 1:
            raise ValueError(f"the ranks see different checkpoints to go on from: {points}")

    # --- when -----------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At an optimizer step's end, unless it validates."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        validates = _validation_follows(trainer) or _is_last(trainer)
        self._before_validation = self._position(trainer) if validates else None
        if not validates and self._due(trainer):
            self.save(trainer)
        self._stop_if_asked(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """A stop does not wait for the rest of the validation."""
        if self._before_validation is not None:  # it is, at a step's end alone
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Of a step that validates."""
        if self._before_validation is None:
            return  # between two micro-batches there is nothing whole to save
        self._before_validation = None
        if self._due(trainer):
            self.save(trainer)
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """The last step."""
        if self._before_validation is not None:  # the interval did not end with it
            _validate(trainer)
        self.save(trainer)

    def _due(self, trainer: Trainer) -> bool:
        return trainer.global_step % self._policy.every_n_steps == 0

    def _stop_if_asked(self, trainer: Trainer) -> None:
        signum = self._stop.agreed(trainer)
        if signum:
            self.save(trainer)
            raise Preempted(signum)

    # --- saving ---------------------------------------------------------------------------------

    def save(self, trainer: Trainer) -> None:
        """Save the step just finished, unless that has been done, and drop the oldest."""
        path = self._folder / f"step-{trainer.global_step:08d}"
        if trainer.strategy.broadcast(path.exists()):
            return
        check_kept(_kept(trainer), TrainState.of(trainer))
        failure = None
        try:
            for logger in trainer.loggers:  # a resume at this step must find this step's metrics
                if isinstance(logger, MetricsCsv):
                    logger.sync()
                elif isinstance(logger, EventLog):
                    logger.flush()
            trainer.save_checkpoint(path)
        except OSError as error:  # on the rank that writes, before the barrier that ends a save
            failure = str(error)
            trainer.strategy.barrier("Trainer.save_checkpoint")
        failure = trainer.strategy.broadcast(failure)
        if failure is not None:
            self._answer_failure(trainer, path, failure)
        elif trainer.is_global_zero:
            # a validation that is put off has yet to come into the step's row
            self._others.send(trainer.global_step - (self._before_validation is not None))
            for old in complete_checkpoints(self._folder)[: -self._policy.num_kept]:
                AtomicCheckpointIO().remove_checkpoint(old)

    def _answer_failure(self, trainer: Trainer, path: Path, failure: str) -> None:
        saved = complete_checkpoints(self._folder)
        newest = saved[-1].name if saved else "none"
        message = f"{path} not saved ({failure}); the newest complete one is {newest}"
        if self._policy.disk_full == "stop":
            raise OSError(f"{message}; make room and give the same command again")
        if trainer.is_global_zero:
            print(f"lowbit: {message}; going on, as disk_full=continue says", flush=True)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Beside Lightning's state: all ranks' generators, and what this is a checkpoint of."""
        pending = self._before_validation is not None
        position = self._before_validation or self._position(trainer)
        checkpoint["loops"]["fit_loop"] = position["fit_loop"]
        checkpoint["rng"] = _gather(trainer, position["rng"])
        checkpoint["origin"] = run_origin(trainer, module) | {
            "validation_pending": pending,
            "identity": self._record.identity,
            "segments": self._record.segments,
            "metrics": next((x.mark() for x in trainer.loggers if isinstance(x, MetricsCsv)), None),
            **self._record.circumstances,
        }

    def _position(self, trainer: Trainer) -> dict[str, Any]:
        fit_loop = copy.deepcopy(trainer.fit_loop.state_dict())
        return {"rng": generator_states(), "fit_loop": fit_loop}

    # --- resuming -------------------------------------------------------------------------------

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what `on_train_start` restores."""
        saved = checkpoint["origin"]
        rescale_progress(checkpoint["loops"]["fit_loop"], saved, trainer.accumulate_grad_batches)
        self._restored = {"rng": checkpoint["rng"], "origin": saved}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the generators and say what was restored."""
        if self._restored is None:
            return
        generators, origin = self._restored["rng"], self._restored["origin"]
        same_ranks = len(generators) == trainer.world_size
        if same_ranks:
            restore_generators(generators[trainer.global_rank])
        if trainer.is_global_zero:
            print(resume_report(trainer, module, same_ranks, len(generators)), flush=True)
            for line in changed(origin, self._record.circumstances | run_origin(trainer, module)):
                print(line, flush=True)
        if origin["validation_pending"]:
            _validate(trainer)
        self._restored = {"rng": generator_states()} if same_ranks else None

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """After the last step no training starts; the validation of that step may be left."""
        origin = self._restored and self._restored.get("origin")  # dropped when training starts
        if origin and origin["validation_pending"]:
            _validate(trainer)
        check_kept(_kept(trainer), TrainState.of(trainer))  # also where no step was left to do

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Once more: on its way here Lightning may have drawn for an iterator it then drops."""
        if self._restored is not None:
            restore_generators(self._restored["rng"])
            self._restored = None


def _kept(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Weights, and the optimizer's moments of each."""
    names = {id(p): name for name, p in trainer.lightning_module.named_parameters()}
    yield from trainer.lightning_module.named_parameters()
    for optimizer in trainer.optimizers:
        for parameter, moments in optimizer.state.items():
            for key, moment in moments.items():
                if isinstance(moment, Tensor):
                    # a weight that its layer has no more: FSDP2's are replaced at a run's end
                    yield f"{key} of {names.get(id(parameter), 'a weight')}", moment


def _validate(trainer: Trainer) -> None:
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def _validation_follows(trainer: Trainer) -> bool:
    every = trainer.val_check_batch  # counts micro-batches
    if not every or not _has_validation(trainer):
        return False
    return (trainer.fit_loop.total_batch_idx + 1) % every == 0


def _is_last(trainer: Trainer) -> bool:
    """The last weights are always validated."""
    return trainer.global_step == trainer.max_steps and _has_validation(trainer)


def _has_validation(trainer: Trainer) -> bool:
    return trainer.enable_validation and bool(sum(trainer.num_val_batches))


def _gather(trainer: Trainer, own: Any) -> list[Any]:
    """What each rank has."""
    gathered = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(gathered, own)
    return gathered
