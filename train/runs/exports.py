"""Exported weights: signed with whose they are, and found out where they are not what was signed.

`lowbit.json` in the folder holds the run's identity, the step, and the SHA-256 of every other file;
run.json holds that of `lowbit.json`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.plain import as_type, read_json
from data.verify import changed_files
from train.runs.belonging import file_digest, foreign, refuse_foreign
from train.runs.identity import Identity

SIGNATURE = "lowbit.json"
_VERSION = 2  # 1, which said no version, signed the safetensors alone
_READ = {".safetensors", ".json", ".bin", ".pt", ".jinja"}  # by whoever loads a model


def sign_weights(hf: Path, identity: Mapping[str, Any] | None, step: int) -> str:
    """Leave in a folder of exported weights whose they are, and after which step; the SHA-256 of
    what says so.
    """
    files = {path.name: file_digest(path) for path in sorted(hf.iterdir())}
    signed = {"version": _VERSION, "identity": identity, "step": step, "files": files}
    (hf / SIGNATURE).write_text(json.dumps(signed, indent=1) + "\n", encoding="utf-8")
    return file_digest(hf / SIGNATURE)


def check_export(hf: Path, *, reread: bool = True) -> dict[str, Any] | None:
    """What `hf` was signed with; None where it was not.

    ValueError for a file that is not the one that was signed, is missing, or came later. Without
    `reread` a file that this machine has read since it was last written is not read again.
    """
    if not (hf / SIGNATURE).is_file():
        return None
    signed: dict[str, Any] = as_type(dict[str, Any], read_json(hf / SIGNATURE), str(hf / SIGNATURE))
    files = signed.get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise ValueError(f"{hf}/{SIGNATURE} is not what a run leaves: its files are {files!r}")
    if missing := [name for name in files if not (hf / name).is_file()]:
        raise ValueError(f"{hf}/{missing[0]} is missing, and a run exported it")
    if changed := changed_files(hf, files, trust_earlier=not reread):
        raise ValueError(f"{hf}/{changed[0]} is not what this run exported")
    if signed.get("version") == _VERSION:
        names = {path.name for path in hf.iterdir() if path.suffix in _READ}
        if later := sorted(names - files.keys() - {SIGNATURE}):
            raise ValueError(f"{hf}/{later[0]} is no part of what this run exported")
    return signed


def check_left(run: Path, record: Mapping[str, Any]) -> None:
    """ValueError unless the run's hf/, if it is still there, is what the run left."""
    digest, path = (record.get("export") or {}).get("sha256"), run / "hf" / SIGNATURE
    if digest is None or not (run / "hf").is_dir():
        return
    if not path.is_file() or file_digest(path) != digest:
        raise ValueError(f"{path} is not what this run left: another run's, or changed")
    check_export(run / "hf", reread=False)


def earlier_end(hf: Path, run: Identity, record: Mapping[str, Any]) -> str | None:
    """Of which earlier end of the run the exported weights are; None for those of its last step.

    ValueError for weights of another run, and for others than were signed.
    """
    signed = check_export(hf)
    if signed is None:
        if record.get("export"):
            raise ValueError(f"{hf}/{SIGNATURE} is missing, and a run exported it")
        return "of an unknown step" if record["status"] != "finished" else None
    refuse_foreign(hf, signed.get("identity"), run, segments=False)
    later = foreign(signed.get("identity"), run) or signed.get("step") != record["max_steps"]
    return f"of step {signed.get('step')}" if later else None
