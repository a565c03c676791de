"""`lowbit fit` and `lowbit validate`."""

import logging
import signal
import warnings
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from lowbit import bf16
from lowbit.kernels.cpu.memory import keep_freed_memory
from train.checkpoints.folder import read_manifest, step_of
from train.distributed.fsdp import gathered
from train.distributed.ranks import is_lost_rank
from train.fit.configuration import RunCLI
from train.fit.export import Export
from train.fit.record import describe_run, finish_record
from train.fit.resume import (
    adopt_older,
    bring_rows,
    check_origin,
    check_rows,
    check_same_origin,
    check_same_run,
    check_weights,
    recipe_of,
    set_later_aside,
)
from train.fit.signals import Preempted, end_with_launcher, requeue
from train.fit.slow import facts_of, slow_lines
from train.model.architecture import check_positions
from train.model.products import check_products
from train.model.recipe_table import describe
from train.runs.identity import Identity
from train.runs.record import run_status


def fit(argv: list[str]) -> int:
    """Train one run, or go on with it; leaves a finished run folder."""
    _quiet()
    end_with_launcher()
    cli = RunCLI("fit", argv)
    if cli.trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    with cli.lock, cli.stop:
        try:
            return _fit(cli)
        except Preempted as preempted:
            if not cli.trainer.is_global_zero:
                return 0  # one exit code a job: a launcher kills the others over a second one
            print(f"lowbit: {preempted} after step {cli.trainer.global_step}, saved", flush=True)
            if preempted.signum == signal.SIGUSR1:
                requeue()
            return 128 + preempted.signum
        except RuntimeError as error:
            if cli.trainer.world_size == 1 or not is_lost_rank(error):
                raise
            raise ConnectionError(
                f"rank {cli.trainer.global_rank} lost another rank, which ended or did not answer "
                f"within {cli.config['collective_timeout']} s; the same command goes on from the "
                f"newest checkpoint ({str(error).partition('. ')[0]})"
            ) from error


def _fit(cli: RunCLI) -> int:
    trainer, module, run_dir = cli.trainer, cli.model, cli.run_dir
    point = cli.resume_point
    cli.datamodule.trainer = trainer
    if point is not None:
        _check_same_run(cli, point)
        if run_status(run_dir) == "finished" and step_of(point) == trainer.max_steps:
            print(f"{run_dir} is finished: nothing to do")
            return 0
    _check_fits(cli)
    cli.datamodule.setup("fit")
    cli.datamodule.train_dataloader()  # raises for too little data before anything is written
    module.initial.replaced = point is not None
    if point is None:
        module.initial.read()
    if module.teacher is not None:
        module.teacher.read()
    if trainer.is_global_zero:
        print("\n".join([f"{run_dir}:", *describe(module, trainer.max_steps)]), flush=True)
        _begin(cli)
        cli.others.connect()
        for line in slow_lines(facts_of(trainer, module)):
            print(line, flush=True)
    try:
        trainer.fit(module, cli.datamodule, ckpt_path=point, weights_only=True)
    finally:
        cli.others.close()
    if trainer.global_step < trainer.max_steps:
        raise ValueError(
            f"{run_dir} ended after step {trainer.global_step} of {trainer.max_steps}: one of "
            "trainer.callbacks ended it"
        )
    weights = gathered(module.model)  # from all ranks
    if trainer.is_global_zero:
        export = Export(run_dir, module.model.config, cli.datamodule)
        finish_record(run_dir, export.write(weights, cli.record))
        found = module.validation.get("val/loss")  # the bar still shows the one before
        result = "" if found is None else f"val loss {found:.4f}, "
        print(f"\n{result}{trainer.max_steps} steps done; weights in {run_dir / 'hf'}", flush=True)
    return 0


def _check_same_run(cli: RunCLI, point: Path) -> None:
    """The checkpoint is of this configuration, recipe and data, and not beyond the last step."""
    adopt_older(point, cli.run_dir, cli.config, cli.datamodule)
    identity = _identity(cli)
    check_same_run(point, cli.run_dir, identity)
    now = {"recipe": recipe_of(cli.model), "data_fingerprint": cli.datamodule.fingerprint}
    origin = read_manifest(point)["origin"]
    check_origin(point, origin, now)
    check_products(point, origin, bf16.products(cli.trainer.strategy.root_device.type))
    check_same_origin(point, identity)
    check_weights(point, cli.run_dir)
    check_rows(point, cli.run_dir)
    if step_of(point) > cli.trainer.max_steps:
        raise ValueError(f"{point} is beyond trainer.max_steps={cli.trainer.max_steps}")


def _identity(cli: RunCLI) -> Identity:
    """Of the run that the command line describes, but for its initial weights."""
    config = cli.plain_config()
    return Identity.of(describe_run(cli.trainer, cli.model, cli.datamodule, config), config)


def _begin(cli: RunCLI) -> None:
    """Make the run folder this job's own; the first thing that is written."""
    cli.run_dir.mkdir(parents=True, exist_ok=True)
    fresh = not cli.lock.held
    cli.lock.acquire()
    if fresh and run_status(cli.run_dir) is not None:
        raise ValueError(f"{cli.run_dir}: another job began this run a moment ago")
    if cli.resume_point is not None:
        set_later_aside(cli.run_dir, cli.resume_point)
        bring_rows(cli.resume_point, cli.run_dir, _identity(cli))
        cli.record.announce(cli.trainer.max_steps)
    cli.write_config(cli.run_dir / "config.yaml")


def validate(argv: list[str]) -> int:
    """Print the validation loss of a checkpoint, or of the initial weights."""
    _quiet()
    cli = RunCLI("validate", argv)
    _check_fits(cli)
    checkpoint = cli.config["checkpoint"]
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"--checkpoint {checkpoint}: there is no such checkpoint folder")
    cli.model.initial.replaced = checkpoint is not None
    cli.datamodule.trainer = cli.trainer
    cli.datamodule.setup("validate")  # raises for too little data
    cli.trainer.validate(
        cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True
    )
    for name, value in cli.model.validation.items():
        print(f"{name} {value:.6f}")
    return 0


def _check_fits(cli: RunCLI) -> None:
    tokens, model = cli.datamodule.vocab_size, cli.model.model.config.vocab_size
    if tokens > model:
        raise ValueError(f"the data's vocabulary of {tokens} exceeds the model's of {model}")
    check_positions(cli.datamodule.seq_len, cli.model.model.config.max_position_embeddings)


def _quiet() -> None:
    """Lightning's advice is about choices made here on purpose."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")  # what is logged has been reduced
    # FSDP2 about outputs that are views: nothing changes a linear layer's output in place
    warnings.filterwarnings("ignore", ".*returned a view tensor.*")
    # a CSVLogger's file: it gets all rows again
    warnings.filterwarnings("ignore", ".*Previous log files in this directory.*")
    # validation of a checkpoint needs none of what training wrote into it
    warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # inside Lightning
