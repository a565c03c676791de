"""What a user may get wrong before anything runs: one line, whoever notices it."""

import traceback
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

OURS = tuple(str(Path(__file__).parents[2] / package) for package in ("train", "lowbit", "data"))
LONGEST = 200  # characters of a line
MAY_BE_NULL = ("trainer.val_check_interval",)  # no validation but the last


@contextmanager
def building() -> Iterator[None]:
    """While a run is built, what a library raises is about what it was given: a ValueError.

    What our own code raises, other than for the user, stays what it is.
    """
    try:
        yield
    except (ValueError, OSError, ArgumentError):
        raise  # one line already
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if last.startswith(OURS):
            raise
        text = " ".join(str(error).split())
        kind = "" if len(text) > len("'foo'") * 4 else f"{type(error).__name__}: "
        raise ValueError(f"{kind}{text}"[: LONGEST - len("lowbit: error: ")]) from error


def check_nulls(config: Mapping[str, Any], defaults: Mapping[str, Any], place: str = "") -> None:
    """ValueError for a null where the default is something else: a section, a list, a number."""
    for key, default in defaults.items():
        if key not in config or default is None:
            continue
        value, name = config[key], f"{place}{key}"
        if value is None and name not in MAY_BE_NULL:
            raise ValueError(f"{name} is null, expected a value; leave it out for its default")
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            check_nulls(value, default, f"{name}.")


def check_sections(plain: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """ValueError for a key of a file that no option has."""
    for key in plain:
        if key not in known:
            close = get_close_matches(key, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
            raise ValueError(f"{key} is no section or option of a configuration; {hint}")


def check_flags(words: Sequence[str], known: Iterable[str]) -> None:
    """ValueError for an option that is none, where one of `known` is close to it."""
    options = {option for option in known if not option.endswith(".help")}
    groups = {option.rpartition(".")[0] for option in options} | {"--model", "--data", "--trainer"}
    for word in words:
        name = word.partition("=")[0].removesuffix("+")
        close = get_close_matches(name, options, 1, 0.8)
        inside = any(
            name.startswith(f"{option}.") for option in options - groups
        )  # of a class's own
        if name.startswith("--") and name not in options and close and not inside:
            raise ValueError(f"there is no option {name}; did you mean {close[0]}?")
