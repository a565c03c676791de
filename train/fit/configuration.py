"""The command line and YAML of a run: LightningCLI, with formats by name and a run folder."""

import sys
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from data.durable import write_durably
from data.module import TokenDataModule
from train.checkpoints.folder import AtomicCheckpointIO, read_manifest, step_of
from train.config.building import building, check_flags, check_nulls, check_sections
from train.config.classes import check_classes, check_flags_classes, plugins_of
from train.config.formats import check_flagged_formats, check_formats
from train.config.layers import Layers
from train.config.policies import check_name, read_policy
from train.config.strict_yaml import load_yaml, use_strict_yaml
from train.config.trainer_fields import (
    TRAINER_DEFAULTS,
    check_given,
    check_values,
    validation_interval,
)
from train.distributed.ranks import check_strategy, on_first_rank
from train.distributed.rendezvous import set_patience
from train.fit.clamping import CodeUse
from train.fit.non_finite import NonFiniteReport
from train.fit.options import add_options
from train.fit.progress import Progress
from train.fit.record import RunRecord, Start
from train.fit.resume import choose_resume_point
from train.fit.saving import Checkpoints, SavePolicy
from train.fit.signals import StopRequest, leave_signals_alone
from train.fit.spikes import SpikeReport
from train.fit.step_metrics import StepMetrics
from train.fit.throughput import StepTimes, Throughput
from train.loggers.event_log import EventLog
from train.loggers.metrics_csv import MetricsCsv
from train.loggers.named import Named, gone_on_with, named_loggers, short_names
from train.loggers.others import OtherLoggers
from train.microscope.microscope import Microscope
from train.model.architecture import check_architecture
from train.model.module import PretrainModule
from train.runs.folders import check_run_folder
from train.runs.lock import RunLock
from train.runs.names import checked_name, checked_run_dir
from train.runs.provenance import command_line


class RunCLI(LightningCLI):
    """Builds trainer, module and data of one run; nothing is written yet."""

    run_dir: Path
    resume_point: Path | None
    lock: RunLock
    stop: StopRequest
    record: RunRecord
    others: OtherLoggers
    _parsers: ClassVar[dict[tuple[type, str], LightningArgumentParser]] = {}

    def __init__(self, verb: str, argv: list[str]) -> None:
        self._verb = verb
        self._plugins = plugins_of(argv)
        use_strict_yaml(partial(check_classes, plugins=self._plugins))
        try:
            with building():
                super().__init__(
                    PretrainModule,
                    TokenDataModule,
                    args=argv,
                    run=False,
                    save_config_callback=None,
                    seed_everything_default=0,
                    trainer_defaults=TRAINER_DEFAULTS,
                    auto_configure_optimizers=False,
                    load_from_checkpoint_support=False,
                    parser_kwargs={
                        "prog": f"lowbit {verb}",
                        "exit_on_error": False,
                        "allow_abbrev": False,
                    },
                )
        except BaseException:
            if hasattr(self, "lock"):
                self.lock.release()
            raise

    def setup_parser(self, *how: Any) -> None:
        """Built once a process: a sweep reads the configuration of each of its runs."""
        of = type(self), self._verb
        if of not in self._parsers:
            super().setup_parser(*how)
            self._parsers[of] = self.parser
        self.parser = self._parsers[of]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What LightningCLI does not have."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run: configuration, metrics, checkpoints, weights "
            "(default: runs/<policy name>-s<seed>).",
        )
        if self._verb == "validate":
            parser.add_argument(
                "--checkpoint", type=str | None, default=None, help="Whose weights to validate."
            )
        add_options(parser)  # `validate` and `plan` take what a run wrote
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """From `args` alone, whatever sys.argv holds; files and policies as `Layers` has them."""
        layers = Layers.read(args)
        defaults = parser.get_defaults().as_dict()
        check_sections(layers.plain, defaults)
        check_formats(layers.plain)
        check_flagged_formats(layers.flags)
        check_classes(layers.plain, self._plugins)
        check_flags_classes(layers.flags, self._plugins)
        check_given(layers, defaults["trainer"], self._plugins)
        if layers.plain.get("plugins"):
            raise ValueError("plugins is set by a file: it is given on the command line alone")
        check_flags(layers.flags, parser._option_string_actions)
        self.config = parser.parse_args(layers.arguments())
        check_nulls(self.config.as_dict(), defaults)
        short_names(self.config["log"])
        self.config["plugins"] = None  # what allows code to run is the command's, not the run's
        if self._verb != "fit":
            self.config["trainer"]["logger"] = self.config["log"] = None
        if on_first_rank():
            for line in layers.replaced:
                print(f"lowbit: {line}", file=sys.stderr, flush=True)
        model = self.plain_config()["model"]
        check_architecture(model["llama"])
        check_name(read_policy(model["policy"]), model["control"])
        check_values(self.config["trainer"])

    def instantiate_classes(self) -> None:
        """An architecture that transformers refuses is a user's error."""
        try:
            super().instantiate_classes()
        except StrictDataclassError as error:
            raise ValueError(f"model.llama: {error.__cause__}") from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with our loggers, checkpoints and record."""
        if self._verb == "validate":
            return super().instantiate_trainer(logger=False, plugins=[AtomicCheckpointIO()])
        name = f"{checked_name(self.model.policy.name)}-s{self.model.seed}"
        self.run_dir = checked_run_dir(self.config["run_dir"] or f"runs/{name}")
        self.lock, self.stop = RunLock(self.run_dir), StopRequest()
        is_writer = on_first_rank()
        if is_writer:
            check_run_folder(self.run_dir)
        if is_writer and self.run_dir.is_dir():
            self.lock.acquire()  # before anything in it is read or tidied
        self.resume_point = choose_resume_point(
            self.run_dir, self.config["resume"], is_writer=is_writer
        )
        step = 0 if self.resume_point is None else step_of(self.resume_point)
        patient = self.config["disk_full"] == "continue"
        board = EventLog(self.run_dir, step + 1, patient=patient)
        self.others = OtherLoggers(self._named(step), self.run_dir, self._described)
        trainer = super().instantiate_trainer(
            logger=[board, MetricsCsv(self.run_dir, step, patient=patient), *self.others.loggers],
            plugins=[AtomicCheckpointIO(self.resume_point)],
            profiler=self.config_init["trainer"]["profiler"] or StepTimes(),
            val_check_interval=validation_interval(self.config_init["trainer"]),
        )
        origin = {} if self.resume_point is None else read_manifest(self.resume_point)["origin"]
        start = Start(self.plain_config(), command_line(), step, origin)
        self.record = RunRecord(self.run_dir, start)
        check_strategy(trainer, self.model.keep)
        leave_signals_alone(trainer)
        if hasattr(trainer.strategy, "_timeout"):  # of strategies that join several processes
            set_patience(trainer.strategy, self.config)
        trainer.callbacks += self._callbacks()  # type: ignore[attr-defined]
        return trainer

    def _named(self, step: int) -> list[Named]:
        """The loggers that the user asked for, where the first ones left off."""
        configs = (self.config_init, self.plain_config())
        pairs = zip(*(_list(config["trainer"]["logger"]) for config in configs), strict=True)
        named = named_loggers(pairs, self.config["log"], self.run_dir)
        return gone_on_with(named, self.run_dir, step) if on_first_rank() else named

    def _described(self) -> dict[str, Any]:
        """For these loggers."""
        identity = self.record.identity or {}
        return self.plain_config() | {"identity": identity.get("hash")}

    def _callbacks(self) -> list[Callback]:
        """In the order they act: a checkpoint comes after the metrics of its step."""
        given = ("checkpoint_every", "keep_checkpoints", "disk_full")
        policy = SavePolicy(*(self.config[key] for key in given))
        checkpoints = Checkpoints(
            self.run_dir / "checkpoints", policy, self.stop, self.record, self.others
        )
        report = NonFiniteReport(self.run_dir)
        diagnostics = self.config_init["diagnostics"]
        microscope = [Microscope(diagnostics, self.model, self.run_dir)] if diagnostics else []
        metrics = [CodeUse(), *microscope, Throughput(self.run_dir), StepMetrics(), SpikeReport()]
        return [*metrics, Progress(), report, checkpoints, self.record, self.others]

    def plain_config(self) -> dict[str, Any]:
        """The resolved configuration as plain data, the caller's own."""
        return deepcopy(self._plain)

    @cached_property
    def _plain(self) -> dict[str, Any]:
        plain: dict[str, Any] = load_yaml(self.parser.dump(self.config, skip_none=False))
        return plain

    def write_config(self, path: Path) -> None:
        """The resolved configuration, as `-c` reads it."""
        write_durably(path, self.parser.dump(self.config, skip_none=False))


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


class Resolving(RunCLI):
    """Reads the command line and builds nothing."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def instantiate_classes(self) -> None:
        """The configuration is all that is wanted."""


def resolved_config(argv: list[str]) -> dict[str, Any]:
    """What config.yaml of the run with these arguments would hold; errors as `lowbit fit` has."""
    return Resolving("fit", argv).plain_config()
