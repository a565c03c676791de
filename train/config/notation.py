"""A format as a command line or a YAML file writes it, as plain data; without importing torch."""

from pathlib import Path
from typing import Any

from train.config.strict_yaml import load_yaml

HELP = "a name, a mapping ('{name: mxint8, block_size: 16}') or a YAML file that holds one"


def plain_format(written: Any) -> Any:
    """A name or mapping, read from a flow mapping or from a file where `written` is one.

    ValueError or FileNotFoundError, in one line, for what is neither.
    """
    if not isinstance(written, str):
        return written
    if written.lstrip().startswith("{"):
        return load_yaml(written)
    if not written.endswith((".yaml", ".yml")):
        return written
    try:
        plain = load_yaml(Path(written).expanduser().read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise FileNotFoundError(f"format {written} cannot be read: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{written}: {error}") from None
    if not isinstance(plain, dict) or not plain.keys() & {"name", "element"}:
        raise ValueError(f"{written} holds no format, a mapping with a name or an element")
    return plain
