"""cast_gap.json: what a baseline's weights lose when they are cast into each recipe's formats."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Required, TypedDict, cast

from data.durable import write_durably
from data.plain import read_as, sealed
from train.runs.belonging import foreign
from train.runs.identity import Identity

_FILE = "cast_gap.json"


class Along(TypedDict, total=False):
    """The gap at a kept checkpoint."""

    step: Required[int]
    tokens_seen: Required[int]
    mean: Required[float]
    kl: float | None


@dataclass(frozen=True)
class CastGap:
    """Validation loss of the baseline's final weights under a recipe, minus that of the baseline.

    No training noise: the standard error is that of the validation sample alone.
    """

    mean: float
    standard_error: float | None  # None of a single window
    windows: int
    tokens: int
    kl: float | None = None  # KL(baseline || recipe), nats per token, of FP32 logits
    kl_standard_error: float | None = None
    kl_floor: float | None = None  # the same for the baseline's own weights moved by 1e-6
    low: float | None = None  # 95 % interval of the mean, as far as the text's windows tell
    high: float | None = None
    units: str = "windows, as if independent"  # whose spread the standard errors are
    arithmetic: str = "logits rounded as under autocast"  # of files that do not say
    along: tuple[Along, ...] = ()  # the same at each kept checkpoint, by tokens_seen
    bf16_products: str | None = None  # how BF16 was multiplied; None: does not say
    of: dict[str, Any] | None = None  # identity of the run whose weights they are
    under: str | None = None  # recipe hash of the run whose recipe it is

    def stale(self, base: Identity, arm: Identity) -> str | None:
        """Why it is not of these two runs; None for one that is, or that does not say."""
        if wrong := foreign(self.of, base):
            return f"of other weights, {wrong[0]}"
        products = base.fields.get("bf16_products")
        if self.bf16_products is not None and self.bf16_products != products:
            return f"with BF16 products {self.bf16_products!r}, not the run's {products!r}"
        if self.under is not None and self.under != arm.recipe_hash:
            return "under another recipe than this run's of that name"
        return None


def write_cast_gaps(folder: Path, gaps: dict[str, CastGap]) -> None:
    """Leave `gaps` (by recipe name) in the baseline's run folder, where `lowbit compare` looks."""
    plain = sealed({recipe: asdict(gap) for recipe, gap in gaps.items()})
    write_durably(folder / _FILE, json.dumps(plain, indent=1, allow_nan=False) + "\n")


def read_cast_gaps(folder: Path) -> dict[str, CastGap]:
    """By recipe name; empty where none were evaluated."""
    path = folder / _FILE
    return cast(dict[str, CastGap], read_as(dict[str, CastGap], path)) if path.exists() else {}
