"""What every field of a run is to a pair of runs, each declared once.

A field is a key of the resolved config.yaml or something that was resolved from it (the data's
fingerprint, the architecture in effect, ...). A key that stands here for the keys below it covers
them too. `tests/train/runs/test_identity.py` walks every configuration and fails for a field that
is declared nowhere: whoever adds one decides here what it does to a comparison.
"""

from collections.abc import Collection, Iterable
from enum import Enum
from functools import cache


class Group(Enum):
    """What a difference in a field means."""

    SHARED = "shared by a pair"  # refused, unless declared or allowed
    SEED = "shared by a pair, its own for every seed"  # as SHARED among the runs of one seed
    RECIPE = "the recipe's own"  # what a pair is about; one for all seeds of a label
    FREE = "what a run may do differently"  # moves no row and no validation
    NAMED = "named when it differs"  # moves last digits


_KEYS: dict[Group, Collection[str]] = {
    Group.SHARED: (
        *("architecture", "data.fingerprint", "data.seq_len", "data.global_batch_size"),
        *(
            "data.val_windows",
            "data.val_choice",
            "data.document_masking",
            "segments",
            "parts",
            "bf16_products",
        ),
        *("model.optimization", "model.compile_blocks", "model.distill_from", "teacher_weights"),
        *("trainer.precision", "trainer.max_steps", "trainer.accumulate_grad_batches"),
        *("trainer.val_check_interval", "trainer.check_val_every_n_epoch"),
        *("trainer.num_sanity_val_steps", "trainer.limit_train_batches"),
        *("trainer.limit_val_batches", "trainer.overfit_batches", "trainer.fast_dev_run"),
        *("trainer.max_epochs", "trainer.min_epochs", "trainer.min_steps"),
        *("trainer.callbacks", "trainer.plugins", "trainer.gradient_clip_val"),
        *("trainer.gradient_clip_algorithm", "trainer.deterministic", "trainer.benchmark"),
        *("trainer.use_distributed_sampler", "trainer.barebones", "trainer.sync_batchnorm"),
        "trainer.reload_dataloaders_every_n_epochs",
    ),
    Group.SEED: ("seed_everything", "data.seed", "initial_weights"),
    Group.RECIPE: ("model.policy", "model.control", "model.backend", "recipe_table", "backend"),
    Group.FREE: (
        *("run_dir", "resume", "checkpoint_every", "keep_checkpoints", "disk_full", "config"),
        *("log", "plugins", "diagnostics", "collective_timeout", "rendezvous_timeout", "declared"),
        *("data.path", "data.num_workers"),
        "model.distill_from.teacher",  # where it lies; teacher_weights is what it is
        *("model.init_from", "model.gradient_checkpointing", "model.keep"),
        *("model.validate_bf16", "trainer.logger", "trainer.max_time"),
        *("trainer.limit_test_batches", "trainer.limit_predict_batches"),
        *("trainer.log_every_n_steps", "trainer.enable_checkpointing"),
        *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler"),
        *("trainer.enable_autolog_hparams", "trainer.inference_mode", "trainer.detect_anomaly"),
        *("trainer.default_root_dir", "trainer.model_registry"),
    ),
    Group.NAMED: (
        *("threads", "machine", "versions", "kernels", "world_size", "trainer.accelerator"),
        *("trainer.strategy", "trainer.devices", "trainer.num_nodes"),
    ),
}
DECLARATION = {key: group for group, keys in _KEYS.items() for key in keys}

#: SHARED fields that a later start of the run may change: it then begins a segment of the run
SEGMENT = ("trainer.max_steps", "trainer.val_check_interval", "trainer.accumulate_grad_batches")
#: of config.yaml: what it becomes is in the field `architecture`
RESOLVED_ELSEWHERE = "model.llama"
#: the short names of `compare --allow`
ALIASES = {
    "data": "data.fingerprint",
    "batch": "data.global_batch_size",
    "seq_len": "data.seq_len",
    "model": "architecture",
    "max_steps": "trainer.max_steps",
    "data_seed": "data.seed",
}


@cache
def declared_key(field: str) -> str | None:
    """The key of DECLARATION that covers `field`."""
    parts = field.split(".")
    keys = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((key for key in keys if key in DECLARATION), None)


def group_of(field: str) -> Group:
    """ValueError for a field that is declared nowhere."""
    key = declared_key(field)
    if key is None:
        raise ValueError(f"the field {field} is not declared in train/runs/declaration.py")
    return DECLARATION[key]


def covers(key: str, field: str) -> bool:
    """Whether `key` is the field or stands above it."""
    return field == key or field.startswith(f"{key}.")


def any_covers(keys: Iterable[str], field: str) -> bool:
    return any(covers(ALIASES.get(key, key), field) for key in keys)
