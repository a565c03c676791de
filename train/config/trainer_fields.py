"""Every field of Lightning's Trainer: taken with its meaning, or refused with what to use here."""

from collections.abc import Iterator, Mapping
from typing import Any

from train.config.classes import check_classes
from train.config.layers import Layers
from train.config.strict_yaml import load_yaml

PRECISIONS = ("bf16-mixed", "32-true")
TRAINER_DEFAULTS = {
    "precision": "bf16-mixed",
    "max_steps": 200,
    "use_distributed_sampler": False,  # the batch order is ours; Lightning would wrap it under DDP
    "check_val_every_n_epoch": None,  # the loader has no end, so validation counts steps
    "val_check_interval": 50,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "enable_progress_bar": False,  # Progress takes its place
    "enable_checkpointing": False,  # Checkpoints takes ModelCheckpoint's place
}
#: used by the harness or passed on; what each is to a pair: train/runs/declaration.py
TAKEN = (
    *(
        "accelerator",
        "strategy",
        "devices",
        "num_nodes",
        "precision",
        "callbacks",
        "profiler",
        "logger",
    ),
    *("max_steps", "val_check_interval", "limit_val_batches"),
    *("accumulate_grad_batches", "deterministic", "benchmark", "inference_mode"),
    *("detect_anomaly", "enable_model_summary", "enable_autolog_hparams", "log_every_n_steps"),
)
_STEPS = "the data has no epochs: trainer.max_steps ends a run"
_DATA = "each step sees its own windows of the data: data.global_batch_size, trainer.max_steps"
_ORDER = "the order of the data is data.seed's"
_CLIPPING = "use model.optimization.max_grad_norm"
_CHECKPOINTS = "use checkpoint_every and keep_checkpoints"
#: field -> why a value other than the default would be ignored here, or would be another run
REFUSED = {
    "fast_dev_run": "use trainer.max_steps",
    "max_time": "a run ends at trainer.max_steps; a signal saves, and the same command goes on",
    "max_epochs": _STEPS,
    "min_epochs": _STEPS,
    "min_steps": _STEPS,
    "limit_train_batches": _DATA,
    "overfit_batches": _DATA,
    "limit_test_batches": "no verb has a test split",
    "limit_predict_batches": "no verb predicts",
    "check_val_every_n_epoch": "the data has no epochs: use trainer.val_check_interval",
    "num_sanity_val_steps": "use lowbit validate",
    "enable_checkpointing": _CHECKPOINTS,
    "enable_progress_bar": "a run has its own bar",
    "gradient_clip_val": _CLIPPING,
    "gradient_clip_algorithm": _CLIPPING,
    "use_distributed_sampler": _ORDER,
    "reload_dataloaders_every_n_epochs": _ORDER,
    "barebones": "a run logs and saves",
    "plugins": "use trainer.precision and trainer.strategy; checkpoints are written by the run",
    "sync_batchnorm": "no model here has batch norm",
    "default_root_dir": "use run_dir",
    "model_registry": _CHECKPOINTS,
}

#: of Lightning's callbacks, those that would make another run of it
NO_CALLBACK = {
    "GradientAccumulationScheduler": "use trainer.accumulate_grad_batches",
    "BatchSizeFinder": "use data.global_batch_size",
    "LearningRateFinder": "use model.optimization.lr",
    "StochasticWeightAveraging": "it replaces the schedule: use model.optimization.schedule",
    "EarlyStopping": _STEPS,
    "Timer": "a run ends at trainer.max_steps",
    "ModelCheckpoint": _CHECKPOINTS,
    "OnExceptionCheckpoint": _CHECKPOINTS,
}


def check_given(layers: Layers, defaults: Mapping[str, Any], plugins: tuple[str, ...]) -> None:
    """Before the parser, which would look for the class that a refused field names."""
    for field, value in _given(layers):
        if field in REFUSED and value != defaults[field]:
            raise ValueError(f"trainer.{field}={str(value)[:60]} is not taken: {REFUSED[field]}")
        check_classes({"trainer": {field: value}}, plugins)


def check_values(trainer: Mapping[str, Any]) -> None:
    """Of what is taken: what Lightning takes and means nothing here, or refuses in its own way."""
    if trainer["precision"] not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={trainer['precision']}: expected one of {', '.join(PRECISIONS)}; "
            "weights and optimizer are FP32 in both"
        )
    callbacks = trainer["callbacks"] or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        name = callback["class_path"].rpartition(".")[2]
        if name in NO_CALLBACK:
            raise ValueError(f"trainer.callbacks: {name} is not taken: {NO_CALLBACK[name]}")
    for field in ("max_steps", "accumulate_grad_batches"):
        if trainer[field] < 1:
            raise ValueError(f"trainer.{field}={trainer[field]}: expected at least 1")
    if isinstance(trainer["logger"], bool):
        raise ValueError(
            f"trainer.logger={str(trainer['logger']).lower()}: expected a class; metrics.csv and "
            "TensorBoard are always written"
        )
    validation_interval(trainer)


def validation_interval(trainer: Mapping[str, Any]) -> int | float | None:
    """Lightning's own, in micro-batches; ours counts optimizer steps. The last always validates."""
    every = trainer["val_check_interval"]
    if every is None or (every == 1.0 and isinstance(every, float)):
        return 1.0  # of data without an end: never before the last step
    if type(every) is not int or every < 1:
        raise ValueError(
            f"trainer.val_check_interval={every!r}: expected a whole number of optimizer steps"
        )
    return every * int(trainer["accumulate_grad_batches"])


def _given(layers: Layers) -> Iterator[tuple[str, Any]]:
    """(field, value) of files, then of flags; a flag of something in a field has its text."""
    files = layers.plain.get("trainer")
    yield from files.items() if isinstance(files, dict) else ()
    for flag, following in zip(layers.flags, [*layers.flags[1:], "null"], strict=False):
        name, equals, text = flag.partition("=")
        field, *inside = name.removeprefix("--trainer.").split(".")
        if name.startswith("--trainer."):
            text = text if equals else following
            yield field.removesuffix("+"), text if inside else load_yaml(text)
