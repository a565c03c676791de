"""Whose a folder is: we write into new or empty ones, and into those that carry our mark."""

import re
from pathlib import Path

from data.plain import read_json, read_text

#: a file that our verbs leave in the folders that they write, and what stands in it
RESULTS = {
    **dict.fromkeys(("compare.json", "branches.json", "run.json"), "format_version"),
    **dict.fromkeys(("analyze.json", "eval.json"), "protocol"),
    **{"theory.json": "conventions", "reproduce.json": "nvint8", "search.json": "search"},
}
_HOLDER = re.compile(r"\S+, process \d+\s*")
EXPORTED = re.compile(
    r"(generation_|tokenizer_|special_tokens_)?(config|map)\.json|tokenizer\.json|README\.md"
    r"|(pytorch_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|chat_template\.jinja"
    r"|lowbit\.json|identity\.json"
)


def check_run_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new, empty or a run's, with an hf/ of ours."""
    if is_free(folder):
        return
    if not _is_run(folder):
        raise FileExistsError(f"{_held(folder)}, expected a new or empty folder or a run")
    if (folder / "hf").is_symlink():
        raise FileExistsError(f"{folder}/hf is a link, through which no run writes: move it away")
    held = {path.name for path in folder.glob("hf/*")}
    foreign = sorted(name for name in held if not EXPORTED.fullmatch(name))
    if not held & {"lowbit.json", "identity.json"} and _says(folder / "run.json", "identity"):
        foreign = sorted(held)  # someone's model: a run signs what it leaves
    if foreign:
        raise FileExistsError(f"{folder}/hf holds {foreign[0]}, which is not ours: move it away")


def check_results_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new, empty, or holds results of ours."""
    if not is_free(folder) and not any(_says(folder / n, key) for n, key in RESULTS.items()):
        raise FileExistsError(f"{_held(folder)}, expected a new or empty folder or results of ours")


def check_sweep_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new, empty, or holds runs or branches."""
    if is_free(folder) or _says(folder / "branches.json", "format_version"):
        return
    if not any(_is_run(each) for each in folder.iterdir() if each.is_dir()):
        raise FileExistsError(f"{_held(folder)}, expected a new or empty folder or a sweep")


def check_branches_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new, empty, or holds branches."""
    if not is_free(folder) and not _says(folder / "branches.json", "format_version"):
        raise FileExistsError(f"{_held(folder)}, expected a new or empty folder or branches")


def is_free(folder: Path) -> bool:
    """Whether it is new or empty, but for a lock taken a moment ago; FileExistsError for a file."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder")
    held = [*folder.iterdir()] if folder.exists() else []
    return not held or (held == [folder / "lock"] and not held[0].stat().st_size)


def _is_run(folder: Path) -> bool:
    """A run.json of ours, or the lock of a run that has not written it yet."""
    if (folder / "run.json").exists():
        return _says(folder / "run.json", "format_version")
    try:
        return bool(_HOLDER.fullmatch(read_text(folder / "lock")))
    except (OSError, ValueError):
        return False


def _says(path: Path, key: str) -> bool:
    """Whether it is there, a JSON object with `key` in it."""
    try:
        found = read_json(path)
        return isinstance(found, dict) and key in found
    except (OSError, ValueError):
        return False


def _held(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = ", ..." if len(names) > 3 else ""
    return f"{folder} holds other files ({', '.join(names[:3])}{more})"
