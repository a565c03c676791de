"""Broken files for every reader: read right, or refused in one line that names the file.

    python scripts/fuzz.py --inputs 5000 --seed 0
    python scripts/fuzz.py --seed 0 --only gguf:17       that input again, with its traceback

Valid files of a tiny run, sweep and corpus are mutated: bits, bytes, lines, numbers, JSON values.
A reader fails that raises anything but ValueError or OSError, says more than a line, or not which
file, takes more than 10 s, or ends its process; so does one of a file that is held to a checksum
and comes back with another value. Exit code 1 then.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutations import mutated

SECONDS = 10
MEMORY = 3 * 2**30  # more than the process has: what a bomb would take
LONGEST = 400  # characters of a line, less the file's name


# --- what is read -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Of one file, which may be broken: what it gives, by which a silent change is told."""

    path: Path
    read: Callable[[], Any]
    is_sealed: bool = False  #: it carries a checksum, or is held to one


def readers(folder: Path) -> dict[str, Reader]:
    """All of them, each with a valid file."""
    from fuzz_seeds import readers_of

    found: dict[str, Reader] = {name: Reader(*parts) for name, parts in readers_of(folder).items()}
    return found


class TooLongError(BaseException):
    """No reader may catch it."""


def _alarm(signum: int, frame: Any) -> None:
    raise TooLongError


def fault_of(reader: Reader, whole: Any, *, show: bool = False) -> str | None:
    """Why reading it as it lies there now is not as promised; None where it is."""
    signal.signal(signal.SIGALRM, _alarm)
    signal.alarm(SECONDS)
    try:
        found = reader.read()
    except TooLongError:
        return f"more than {SECONDS} s"
    except (ValueError, OSError) as error:
        if show:
            traceback.print_exc()
        line = str(error)
        if str(reader.path) not in line and str(reader.path.parent) not in line:
            return f"no file named: {line[:150]!r}"
        rest = line.replace(str(reader.path.parent), "")
        return f"more than a line: {rest[:200]!r}" if "\n" in rest or len(rest) > LONGEST else None
    except Exception as error:
        if show:
            traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:100]!r} in {Path(last.filename).name}"
    finally:
        signal.alarm(0)
    if reader.is_sealed and found != whole:
        return f"a silent change: {_first_difference(whole, found)}"
    return None


def _first_difference(a: Any, b: Any) -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in a.keys() | b.keys() if a.get(key) != b.get(key)]
        return f"{keys[0]}: {_first_difference(a.get(keys[0]), b.get(keys[0]))}"
    return f"{str(a)[:60]} and {str(b)[:60]}"


# --- many ---------------------------------------------------------------------------------------


def broken(name: str, reader: Reader, seed: int, number: int) -> bytes:
    """The input of this number, the same at every call."""
    valid = reader.path.with_name(reader.path.name + ".valid").read_bytes()
    return mutated(valid, random.Random(f"{seed}:{name}:{number}"))


def one(name: str, reader: Reader, seed: int, number: int, whole: Any, *, show: bool) -> str | None:
    """What is wrong with how this input is read; the valid file is there again after it."""
    valid = reader.path.with_name(reader.path.name + ".valid").read_bytes()
    try:
        reader.path.write_bytes(broken(name, reader, seed, number))
        return fault_of(reader, whole, show=show)
    finally:
        reader.path.write_bytes(valid)


def many(name: str, reader: Reader, seed: int, numbers: range, out: Any) -> None:
    """In a child process, which may die of it: what was wrong goes to `out`, as it is found."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY, pages + MEMORY))
    whole = reader.read()
    for number in numbers:
        out.write(f"{number}\n")
        out.flush()
        if fault := one(name, reader, seed, number, whole, show=False):
            out.write(f"{number} {fault}\n")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used
    out.write(f"grew {grown}\n")
    out.flush()


def fuzz(inputs: int, seed: int, chosen: list[str] | None, only: str | None) -> int:
    """Print a line a reader, and every fault."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        found = readers(folder)
        for reader in found.values():
            valid = reader.path.with_name(reader.path.name + ".valid")
            valid.write_bytes(reader.path.read_bytes())
        if only is not None:
            reader, number = found[only.rpartition(":")[0]], int(only.rpartition(":")[2])
            kind = only.rpartition(":")[0]
            print(one(kind, reader, seed, number, reader.read(), show=True))
            return 0
        faults: list[str] = []
        names = chosen or [*found]
        each = -(-inputs // len(names))
        for reader_name in names:
            faults += _in_a_child(reader_name, found[reader_name], seed, each, folder)
    print(f"{each * len(names)} inputs of {len(names)} readers, seed {seed}: {len(faults)} faults")
    kinds = Counter(fault.partition(" ")[2] for fault in faults)
    print("\n".join(f"{count:4} x {fault}" for fault, count in kinds.most_common()))
    return 1 if faults else 0


def _in_a_child(name: str, reader: Reader, seed: int, count: int, folder: Path) -> list[str]:
    began, faults, start = time.monotonic(), list[str](), 0
    grew = 0
    while start < count:
        out = folder / "child"
        child = os.fork()
        if not child:
            try:
                with out.open("w") as file:
                    many(name, reader, seed, range(start, count), file)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = out.read_text().splitlines()
        faults += [f"{name}:{line}" for line in lines if " " in line and line[0].isdigit()]
        grew = max([grew, *(int(line.split()[1]) for line in lines if line.startswith("grew"))])
        at = max((int(line.split()[0]) for line in lines if line[0].isdigit()), default=start)
        start = count if status == 0 else at + 1
        if status:
            faults.append(f"{name}:{at} the process ended with {status}")
            reader.path.write_bytes(reader.path.with_name(reader.path.name + ".valid").read_bytes())
    seconds = time.monotonic() - began
    print(f"{name}: {count} inputs, {seconds:.1f} s, {grew / 2**20:.0f} MiB more", flush=True)
    print("".join(f"  {fault}\n" for fault in faults), end="", flush=True)
    return faults


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=5000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", nargs="+")
    parser.add_argument("--only", metavar="READER:N")
    args = parser.parse_args()
    sys.exit(fuzz(args.inputs, args.seed, args.readers, args.only))
