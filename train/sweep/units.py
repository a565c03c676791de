"""Units of branches: one after another in this process, or several at a time in others."""

import json
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, ClassVar

from lowbit import bf16
from train.checkpoints.folder import step_of, verify_checkpoint
from train.fit.resume import recipe_of
from train.model.module import PretrainModule
from train.runs.belonging import corpus_of, refuse_foreign, run_identity
from train.runs.identity import digest
from train.runs.record import read_record, read_whole_config
from train.sweep.continuation import Continuation, Outcome, arm_section, build_module
from train.sweep.processes import begin_worker, share_cores
from train.sweep.request import Variant


@dataclass(frozen=True)
class BranchPoint:
    """A checkpoint, and the configuration of the run it is of."""

    path: Path
    step: int
    digest: str
    config: dict[str, Any]
    identity: dict[str, Any] | None = None  #: of the run; none of a run from before there were any

    @classmethod
    def read(cls, path: Path) -> "BranchPoint":
        """Verified; ValueError or FileNotFoundError for what is no checkpoint of a run."""
        if not path.is_dir():
            raise FileNotFoundError(f"--branch-from {path}: there is no such checkpoint folder")
        manifest = verify_checkpoint(path)
        run = path.parent.parent
        if not (run / "config.yaml").exists():
            raise FileNotFoundError(f"{path} lies in no run folder: {run}/config.yaml is missing")
        identity = manifest["origin"].get("identity")
        refuse_foreign(path, identity, run_identity(run, read_record(run)), segments=False)
        digest = _digest(json.dumps(manifest["files"], sort_keys=True))
        config = read_whole_config(run)
        known = {"fingerprint": manifest["origin"].get("data_fingerprint")}
        if not corpus_of(path, known, Path(config["data"]["path"])).val.tokens:
            raise ValueError(
                f"{config['data']['path']} was prepared without a validation split, by which "
                f"branches from {path} would be judged"
            )
        return cls(path, step_of(path), digest.hex(), config, identity)

    @property
    def max_steps(self) -> int:
        """Of the run."""
        return int(self.config["trainer"]["max_steps"])

    def seed(self, branch: int) -> int:
        """Of the batches, dropout and stochastic rounding of a branch."""
        return int.from_bytes(_digest(f"{self.digest}:{branch}")[:4]) >> 1


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=8).digest()


class Arms:
    """The modules of the variants; the judge computes under the baseline's numerics."""

    _built: ClassVar[dict[tuple[Path, tuple[str, ...]], "Arms"]] = {}  # the last ones

    def __init__(self, config: dict[str, Any], variants: Sequence[Variant]) -> None:
        self._arms = {variant.label: build_module(config, variant) for variant in variants}
        self._judge = build_module(config, variants[0])

    @classmethod
    def of(cls, point: BranchPoint, variants: Sequence[Variant]) -> "Arms":
        """Those of the checkpoint's run, built once as long as checkpoints are of one run."""
        key = point.path.parent, tuple(map(repr, variants))
        if key not in cls._built:
            cls._built = {key: cls(point.config, variants)}
        return cls._built[key]

    def recipe(self, label: str) -> dict[str, str]:
        """What tells this arm from another of its name."""
        module = self._arms[label]
        layers = module.quantized_layers
        table = [{"layer": name} | layer.recipe.table() for name, layer in layers.items()]
        own = {"recipe": recipe_of(module), "control": module.control, "backend": module.backend}
        return {"recipe_table": digest(table), "recipe_hash": digest(own)}

    def outcomes(
        self, continuation: Continuation, labels: Collection[str] | None = None
    ) -> dict[str, Outcome | None]:
        """By label, of all or of `labels`; None where it diverged."""
        pairs: list[tuple[str, PretrainModule]] = [*self._arms.items()]
        return {
            label: continuation.run(module, self._judge)
            for label, module in pairs
            if labels is None or label in labels
        }


@dataclass(frozen=True)
class Unit:
    """One branch of one checkpoint: all variants that it lacks, over the same batches."""

    checkpoint: int  #: which of those given
    point: BranchPoint
    branch: int
    variants: tuple[Variant, ...]  #: the baseline's first
    horizon: int
    missing: tuple[str, ...]  #: labels of those that are to be run

    @bf16.everywhere()
    def run(self) -> dict[str, Any]:
        """What branches.json holds of it."""
        began, seed = time.perf_counter(), self.point.seed(self.branch)
        continuation = Continuation(self.point.path, self.point.config, seed, self.horizon)
        found = Arms.of(self.point, self.variants).outcomes(continuation, self.missing)
        return {
            "checkpoint": self.checkpoint, "branch": self.branch, "seed": seed,
            "validation_windows": len(continuation.windows["ids"]),
            "windows": continuation.windows,
            "losses": {label: one and one.loss for label, one in found.items()},
            "window_losses": {
                label: one and [float(f"{x:.9g}") for x in one.windows]  # FP32's digits
                for label, one in found.items()
            },
            "weight_shifts": {
                label: one and [float(f"{x:.6g}") for x in one.shifts]
                for label, one in found.items()
            },
            "seconds": time.perf_counter() - began,
        }  # fmt: skip


@dataclass(frozen=True)
class CastUnit:
    """The weights of one checkpoint, evaluated under all variants that it lacks."""

    checkpoint: int
    point: BranchPoint
    variants: tuple[Variant, ...]

    def run(self) -> dict[str, Any]:
        """What casts.json holds of it."""
        from train.sweep.casts import checkpoint_casts

        sections = [arm_section(self.point.config, variant) for variant in self.variants]
        found = checkpoint_casts(self.point.path, self.point.config, sections)
        return {"checkpoint": self.checkpoint, "digest": self.point.digest} | found


class Workers:
    """`jobs` units at a time. Used as a context, beyond which no process of theirs is left."""

    def __init__(self, jobs: int) -> None:
        self._pool: ProcessPoolExecutor | None = None
        if jobs > 1:
            share_cores(os.environ, jobs)  # which the processes inherit
            self._pool = ProcessPoolExecutor(
                jobs, get_context("spawn"), initializer=begin_worker, initargs=(os.getpid(),)
            )

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            for process in active_children():
                process.terminate()
            self._pool.shutdown(cancel_futures=True)

    def results(self, units: Iterable["Unit | CastUnit"]) -> Iterator[dict[str, Any]]:
        """Of all units, each when it is done."""
        if self._pool is None:
            yield from (unit.run() for unit in units)
            return
        done: Iterator[Future[dict[str, Any]]] = as_completed(
            [self._pool.submit(unit.run) for unit in units]
        )
        yield from (future.result() for future in done)
