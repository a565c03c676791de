"""`lowbit fit` and `lowbit validate`."""

import logging
import shutil
import warnings
from pathlib import Path

from train.checkpoint import step_of
from train.configuration import RunCLI
from train.module import PretrainModule
from train.record import finish_record, run_status
from train.resume import check_unchanged


def fit(argv: list[str]) -> int:
    """Train one run, or go on with it; leaves a finished run folder."""
    _quiet()
    cli = RunCLI("fit", argv)
    trainer, module, run_dir = cli.trainer, cli.model, cli.run_dir
    config = run_dir / "config.yaml"
    if cli.resume_point is not None and config.exists():
        check_unchanged(config, cli.plain_config())
    if run_status(run_dir) == "finished" and cli.resume_point is not None:
        if step_of(cli.resume_point) >= trainer.max_steps:
            print(f"{run_dir} is finished: nothing to do")
            return 0
    _check_vocabulary(cli)
    cli.datamodule.trainer = trainer
    cli.datamodule.setup("fit")
    cli.datamodule.train_dataloader()  # raises for too little data before anything is written
    print(f"{run_dir}: {_describe(module)}", flush=True)
    if cli.resume_point is not None:
        print(f"{run_dir}: going on from {cli.resume_point.name}", flush=True)
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        cli.write_config(config)
    trainer.fit(module, cli.datamodule, ckpt_path=cli.resume_point, weights_only=True)
    if trainer.global_step >= trainer.max_steps and trainer.is_global_zero:
        _export(module, run_dir / "hf")
        finish_record(run_dir)
    return 0


def validate(argv: list[str]) -> int:
    """Print the validation loss of a checkpoint, or of the initial weights."""
    _quiet()
    cli = RunCLI("validate", argv)
    _check_vocabulary(cli)
    checkpoint = cli.config["checkpoint"]
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"--checkpoint {checkpoint}: there is no such checkpoint folder")
    cli.trainer.validate(
        cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True
    )
    for name, value in cli.model.validation.items():
        print(f"{name} {value:.6f}")
    return 0


def _check_vocabulary(cli: RunCLI) -> None:
    tokens, model = cli.datamodule.vocab_size, cli.model.model.config.vocab_size
    if tokens > model:
        raise ValueError(f"the data's vocabulary of {tokens} exceeds the model's of {model}")


def _describe(module: PretrainModule) -> str:
    parameters = sum(p.numel() for p in module.parameters())
    count = len(module.quantized_layers)
    return f"{parameters / 1e6:.1f} M parameters, {count} linear layers under {module.policy.name}"


def _export(module: PretrainModule, folder: Path) -> None:
    """Plain safetensors that `from_pretrained` loads, complete or not there."""
    staging = folder.with_name("hf.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    module.model.save_pretrained(staging)
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _quiet() -> None:
    """Lightning's advice is about choices made here on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")  # inside Lightning
