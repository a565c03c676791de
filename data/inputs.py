"""Whether files are what they were when they were read: their content decides, stamps save time."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from data.files import digest
from data.verify import machine_cache, read_cache, write_cache

Stamp = list[int]
_GRAIN_NS = 2 * 10**9  # a file changed twice within a clock's grain may keep its times


def stamp(path: Path) -> Stamp:
    """Size, times and inode; no program sets the change time, so any write shows."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def stamps_of(paths: Iterable[Path]) -> dict[str, Stamp]:
    return {str(path): stamp(path) for path in paths}


def refuse_changes(
    folder: Path,
    known: Mapping[str, str | None],
    stamps: Mapping[str, Stamp],
    paths: Iterable[Path],
) -> None:
    """Raise unless `paths` are the files of `known` with their SHA-256; a file of another stamp is
    read, and has changed where its hash was not known yet.
    """
    names = {str(path) for path in paths}
    found = [f"{name} is new" for name in sorted(names - known.keys())]
    found += [f"{name} is gone" for name in sorted(known.keys() - names)]
    for name in sorted(names & known.keys()):
        path = Path(name)
        if stamps.get(name) != stamp(path) and (known[name] is None or digest(path) != known[name]):
            found.append(f"{name} changed")
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} was prepared from other files ({'; '.join(found[:3])}{more}): "
            "choose another folder or delete this one"
        )


def check_complete(folder: Path, inputs: Mapping[str, str], paths: Iterable[Path]) -> None:
    """`refuse_changes` for a complete folder: what this machine has read since is known."""
    paths = list(paths)
    started, cache = time.time_ns(), machine_cache(folder, "inputs")
    refuse_changes(folder, inputs, read_cache(cache), paths)
    remember(folder, stamps_of(paths), started)


def remember(folder: Path, stamps: Mapping[str, Stamp], started: int) -> None:
    """Keep on this machine which stamps the files had when they were read, from `started` on."""
    old = {name: s for name, s in stamps.items() if max(s[1], s[2]) < started - _GRAIN_NS}
    write_cache(machine_cache(folder, "inputs"), old)
