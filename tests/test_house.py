"""The rooms of train/: who may import whom. A room's floor is above those of all it imports."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS: dict[str, set[str]] = {
    "stats": set(),
    "output": set(),
    "config": set(),
    "audit": {"config", "output"},
    "checkpoints": set(),
    "runs": {"config"},
    "loggers": {"runs"},
    "curves": {"runs"},
    "distributed": {"checkpoints"},
    "quantized": {"checkpoints", "config"},
    "subjects": {"checkpoints", "runs"},
    "model": {"config", "distributed", "loggers", "runs"},
    "compare": {"curves", "output", "runs", "stats"},
    "microscope": {"loggers", "model"},
    "sweep": {"checkpoints", "compare", "config", "fit", "model", "output", "runs", "stats"},
    "ptq": {"checkpoints", "config", "model", "quantized", "runs", "subjects"},
    "export": {"checkpoints", "config", "quantized", "runs", "subjects"},
    "analysis": {
        "config",
        "export",
        "microscope",
        "model",
        "output",
        "quantized",
        "runs",
        "stats",
        "subjects",
    },
    "fit": {
        "checkpoints",
        "config",
        "distributed",
        "loggers",
        "microscope",
        "model",
        "runs",
        "stats",
    },
    "reproduce": {"analysis", "output", "runs", "stats", "subjects"},
    "plan": {"fit", "model"},
    "cli": {"output", "runs"},  # the verbs' modules by name, when they are called
}
LIBRARIES = {  # of third parties, that a room may import; others: any
    "stats": {"numpy"},
    "runs": {"numpy"},
    "config": {"yaml", "jsonargparse", "lowbit"},
}
OWN = {"train", "data"}
STDLIB = sys.stdlib_module_names
MOST_FILES, MOST_FLOORS = 20, 7


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path, train: Path) -> str:
    parts = path.relative_to(train).parts
    return parts[0] if len(parts) > 1 else Path(parts[0]).stem


def violations(train: Path) -> list[str]:
    """Imports between rooms, and of libraries, that the tables above do not have."""
    found = []
    for path in sorted(train.rglob("*.py")):
        room = room_of(path, train)
        if room == "__init__":
            continue
        for name in imported(path):
            root, *rest = name.split(".")
            if root == "train" and rest[0] != room and rest[0] not in ROOMS[room]:
                found.append(f"{path.relative_to(train)} imports {name}")
            known = root in STDLIB or root in OWN or root in LIBRARIES.get(room, {root})
            if not known:
                found.append(f"{path.relative_to(train)} imports {name}")
    return found


def floor(room: str, above: tuple[str, ...] = ()) -> int:
    assert room not in above, f"a circle: {' -> '.join([*above, room])}"
    return 1 + max((floor(below, (*above, room)) for below in ROOMS[room]), default=0)


def test_rooms_import_only_what_the_table_says() -> None:
    folders = {path.parent.name for path in (ROOT / "train").glob("*/__init__.py")}
    assert folders == ROOMS.keys() - {"cli"}
    assert violations(ROOT / "train") == []


def test_the_table_has_no_circle_and_few_floors() -> None:
    assert max(floor(room) for room in ROOMS) <= MOST_FLOORS


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("compare", "from train.fit.fit import fit"),
        ("fit", "import train.analysis.operands"),
        ("runs", "    from train.model.module import PretrainModule"),
        ("runs", "import torch"),
        ("stats", "    import lightning.pytorch"),
    ],
)
def test_an_import_against_the_table_is_found(tmp_path: Path, room: str, line: str) -> None:
    (tmp_path / room).mkdir()
    (tmp_path / room / "new.py").write_text(f"def run() -> None:\n    {line.strip()}\n")
    (found,) = violations(tmp_path)
    assert found.startswith(f"{room}/new.py imports ")


def test_every_folder_of_code_can_be_taken_in_at_once() -> None:
    for package in ("lowbit", "train", "data"):
        for folder in [ROOT / package, *(ROOT / package).rglob("*/")]:
            if folder.name != "__pycache__":
                files = [path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h")]
                assert len(files) <= MOST_FILES, folder


def test_every_package_is_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("lowbit", "train", "data")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(listed) == found and len(listed) == len(found)
