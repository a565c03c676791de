"""Other verbs for scripts/torture.py: what they leave must be what they leave undisturbed."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from faults import Block
from torture_runs import ended, forked

from lowbit.kernels.cpu import build
from train.sweep import processes

TIMES = {"seconds", "command", "commands", "time", "path"}
RECIPES = ("bf16", "mxint8")


@dataclass
class Verb:
    """A call of one process, as often as it takes; what it leaves is compared by content."""

    name: str
    call: Callable[[Path], Any]  #: of the folder that it may write in: arguments, or what to call
    compared: tuple[str, ...]  #: globs below it
    processes: int = 1
    variant: str = "-"
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}
    before: Callable[[], Any] = lambda: None  #: in its process
    folder: Path = field(default_factory=Path)

    @property
    def ranks(self) -> int:
        return self.processes

    def like(self) -> "Verb":
        """Another of its kind."""
        return replace(self)

    def begin(self, folder: Path) -> None:
        """In a folder that there is not yet."""
        folder.mkdir(parents=True)
        self.folder = folder

    def start(self, block: Block | None, rank: int) -> list[int]:
        """Its processes, all with the same call."""
        call, environment = self.call(self.folder), self.environment(self.folder)
        blocks = [block if own == rank else None for own in range(self.processes)]
        log = self.folder / "log"
        return [forked(log, call, one, environment, self.before) for one in blocks]

    def untrue(self, codes: Sequence[int], by_io: bool) -> list[str]:
        """Verbs leave no record of how they ended."""
        return []

    def differences(self, other: "Verb", *, by_io: bool) -> list[str]:
        """Files that are not the same, or more or fewer."""
        ours, theirs = self._content(), other._content()
        return [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]

    def _content(self) -> dict[str, Any]:
        found = {path for glob in self.compared for path in self.folder.glob(glob)}
        return {
            str(path.relative_to(self.folder)): self._read(path) for path in found if path.is_file()
        }

    def _read(self, path: Path) -> Any:
        """Without what is another at each call: times, places."""
        raw = path.read_bytes().replace(str(self.folder).encode(), b"FOLDER")
        return _timeless(json.loads(raw)) if path.suffix == ".json" else raw


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in TIMES | {"checksum"}}
    return [_timeless(one) for one in value] if isinstance(value, list) else value


class Forked:
    """A run of a sweep as a fork of the sweep, in place of an interpreter of its own."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self.returncode: int | None = None
        arguments = command[command.index("train.cli") + 1 :]
        log = Path(os.environ["TORTURE_LOG"])
        self.pid = forked(log, arguments, None, {}, options["preexec_fn"])

    def poll(self) -> int | None:
        if self.returncode is None and (status := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(status[1])
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def fork_runs() -> None:
    """In the process of a sweep: its runs are `Forked`."""
    vars(processes)["subprocess"] = SimpleNamespace(Popen=Forked, STDOUT=None)


def prepare_verb(place: Path) -> Verb:
    def arguments(folder: Path) -> list[str]:
        text = ["--text", f"{place}/inputs/text/*.txt", "--tokenizer", "bytes"]
        return ["prepare", str(folder / "out"), *text, "--val-fraction", "0.2"]

    return Verb("prepare", arguments, ("out/*",))


def finished_runs(place: Path) -> Path:
    """Two of them, once."""
    runs = place / "verbs" / "runs"
    if not runs.exists():
        for recipe in RECIPES:
            config = Path(__file__).parents[1] / "configs" / "recipe" / f"{recipe}.yaml"
            layers = ["-c", f"{place}/inputs/config.yaml", "-c", str(config)]
            own = ["--data.path", f"{place}/inputs/tokens", "--run_dir", str(runs / recipe)]
            child = forked(
                place / "verbs.log", ["fit", *layers, *own, "--trainer.max_steps", "4"], None, {}
            )
            codes, _ = ended([child], 600)
            if codes != [0]:
                raise RuntimeError((place / "verbs.log").read_text()[-2000:])
    return runs


def compare_verb(place: Path) -> Verb:
    runs = finished_runs(place)

    def arguments(folder: Path) -> list[str]:
        return ["compare", *(str(runs / name) for name in RECIPES), "--out", str(folder / "out")]

    return Verb("compare", arguments, ("out/*.json", "out/*.csv", "out/*.png"))


def export_verb(place: Path) -> Verb:
    run = finished_runs(place) / "mxint8"

    def arguments(folder: Path) -> list[str]:
        return ["export", str(run), str(folder / "out"), "--layout", "lowbit"]

    return Verb("export", arguments, ("out*", "out*/*"))


def branches_verb(place: Path) -> Verb:
    point = finished_runs(place) / "bf16" / "checkpoints" / "step-00000003"

    def arguments(folder: Path) -> list[str]:
        configs = Path(__file__).parents[1] / "configs" / "recipe"
        recipes = [f"{configs}/{name}.yaml" for name in RECIPES]
        branch = ["--branch-from", str(point), "--horizon", "1", "--branches", "2", "--casts"]
        return ["sweep", *branch, "--out", str(folder / "out"), "--recipes", *recipes]

    return Verb("branches", arguments, ("out/*.json",))


def sweep_verb(place: Path) -> Verb:
    def arguments(folder: Path) -> list[str]:
        configs = Path(__file__).parents[1] / "configs" / "recipe"
        recipes = [f"{configs}/{name}.yaml" for name in RECIPES]
        layers = ["-c", f"{place}/inputs/config.yaml", "--recipes", *recipes]
        own = ["--data.path", f"{place}/inputs/tokens", "--trainer.max_steps", "4"]
        return ["sweep", "--out", str(folder / "out"), *layers, "--", *own]

    def environment(folder: Path) -> dict[str, str]:
        return {"TORTURE_LOG": str(folder / "log")}

    left = ("out/*/hf/*.safetensors", "out/*/cast_gap.json")
    return Verb("sweep", arguments, left, environment=environment, before=fork_runs)


def kernels_verb(place: Path) -> Verb:
    """Two processes build the same library, and use it."""

    def environment(folder: Path) -> dict[str, str]:
        return {"LOWBIT_CACHE": str(folder / "cache")}

    return Verb(
        "kernels", lambda folder: built, ("cache/*.so",), processes=2, environment=environment
    )


def built() -> int:
    """2 where it cannot be; what it rounds is the definition's."""
    try:
        build.load()
    except build.BuildError as error:
        print(f"lowbit: error: {error}")
        return 2
    return 0


VERBS: dict[str, Callable[[Path], Any]] = {
    "prepare": prepare_verb,
    "compare": compare_verb,
    "export": export_verb,
    "branches": branches_verb,
    "sweep": sweep_verb,
    "kernels": kernels_verb,
}
