"""Whose a folder is: we write into new or empty ones, and into those that carry our mark."""

import re
from pathlib import Path

from data.plain import read_json, read_text

# what our verbs leave in the folders that they write
RESULTS = (
    *("compare.json", "branches.json", "analyze.json", "eval.json", "theory.csv"),
    *("reproduce.csv", "run.json"),
)
_HOLDER = re.compile(r"(\S+, process \d+\s*)?")
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
    foreign = [p.name for p in folder.glob("hf/*") if not EXPORTED.fullmatch(p.name)]
    if foreign:
        raise FileExistsError(f"{folder}/hf holds {foreign[0]}, which is not ours: move it away")


def check_results_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new, empty, or holds results of ours."""
    if not is_free(folder) and not any((folder / name).is_file() for name in RESULTS):
        raise FileExistsError(f"{_held(folder)}, expected a new or empty folder or results of ours")


def check_sweep_folder(folder: Path) -> None:
    """Raise FileExistsError unless `folder` is new, empty, or holds runs or branches."""
    if is_free(folder) or (folder / "branches.json").is_file():
        return
    if not any(_is_run(each) for each in folder.iterdir() if each.is_dir()):
        raise FileExistsError(f"{_held(folder)}, expected a new or empty folder or a sweep")


def is_free(folder: Path) -> bool:
    """Whether it is new or empty; FileExistsError for a file."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, expected a folder")
    return not folder.exists() or not any(folder.iterdir())


def _is_run(folder: Path) -> bool:
    """A run.json of ours, or the lock of a run that has not written it yet."""
    try:
        if (folder / "run.json").exists():
            return "format_version" in read_json(folder / "run.json")
        return bool(_HOLDER.fullmatch(read_text(folder / "lock")))
    except (OSError, ValueError, TypeError):
        return False


def _held(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    more = ", ..." if len(names) > 3 else ""
    return f"{folder} holds other files ({', '.join(names[:3])}{more})"
