"""Results go on with the matrix products they began with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.bf16 import VARIABLE


def check_products(found: Path, saved: Mapping[str, Any], now: str) -> None:
    """Raise ValueError unless BF16 matrices are multiplied as for what was `found`."""
    before = saved.get("bf16_products", "native")  # as all did before there was a choice
    if before != now:
        raise ValueError(
            f"{found}: BF16 matrices were multiplied by {before!r}, here by {now!r}: go on with "
            f"{VARIABLE}={before}, or start anew in another folder"
        )
