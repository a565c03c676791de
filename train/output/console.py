"""The lines of a command are ours alone."""

import sys


def leave_torchao_out() -> None:
    """In this process, before transformers, which imports it wherever it is installed: four lines
    of its loader and 2.5 s, for a library that no command uses.
    """
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # None: not to be found
