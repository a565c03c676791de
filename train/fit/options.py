"""What `lowbit fit` takes beside the model's, the data's and the trainer's options."""

from lightning.pytorch.cli import LightningArgumentParser

from train.distributed.rendezvous import PATIENCE
from train.fit.saving import DiskFull
from train.microscope.microscope import Diagnostics


def add_options(parser: LightningArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        type=str,
        default="auto",
        help="auto: from the newest valid checkpoint of the run folder, if it has one; "
        "never: refuse a folder that holds a run; PATH: from this checkpoint.",
    )
    parser.add_argument("--checkpoint_every", type=int, default=50, help="In optimizer steps.")
    parser.add_argument("--keep_checkpoints", type=int, default=2, help="At least 2.")
    parser.add_argument(
        "--disk_full",
        type=DiskFull,
        default="stop",
        help="When a checkpoint cannot be written: stop, or continue without it.",
    )
    _add_parts(parser)
    parser.add_argument(
        "--declared",
        type=list[str] | None,
        default=None,
        help="Keys in which this run differs from others on purpose; a sweep gives those "
        "of its overrides, and `lowbit compare` names them.",
    )
    parser.add_argument(
        "--collective_timeout",
        type=int,
        default=600,
        help="Seconds that a rank waits for the others before it gives up.",
    )
    parser.add_argument(
        "--rendezvous_timeout",
        type=int,
        default=PATIENCE,
        help="The same before they have met, where no launcher ends them.",
    )


def _add_parts(parser: LightningArgumentParser) -> None:
    """What of others', or of ours, runs beside the training."""
    parser.add_argument(
        "--plugins",
        type=str | None,
        default=None,
        help="Packages whose classes may be named (callbacks, loggers, optimizers), with commas "
        "between; they are imported, and so run. On the command line alone.",
    )
    parser.add_argument(
        "--log",
        type=str | None,
        default=None,
        help="Further loggers by their short names, with commas between: wandb, mlflow, csv, "
        "trackio (any of Lightning's, with its settings: --trainer.logger).",
    )
    parser.add_argument(
        "--diagnostics",
        type=Diagnostics | None,
        default=None,
        help="What formats do to operands and gradients while the run trains.",
    )
