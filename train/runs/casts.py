"""cast_gap.json: what a baseline's weights lose when they are cast into each recipe's formats."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.durable import write_durably
from train.runs.belonging import foreign
from train.runs.identity import Identity
from train.runs.record import read_json

_FILE = "cast_gap.json"


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
    along: tuple[dict[str, Any], ...] = ()  # the same at each kept checkpoint, by tokens_seen
    of: dict[str, Any] | None = None  # identity of the run whose weights they are
    under: str | None = None  # recipe hash of the run whose recipe it is

    def stale(self, base: Identity, arm: Identity) -> str | None:
        """Why it is not of these two runs; None for one that is, or that does not say."""
        if wrong := foreign(self.of, base):
            return f"of other weights, {wrong[0]}"
        if self.under is not None and self.under != arm.recipe_hash:
            return "under another recipe than this run's of that name"
        return None


def write_cast_gaps(folder: Path, gaps: dict[str, CastGap]) -> None:
    """Leave `gaps` (by recipe name) in the baseline's run folder, where `lowbit compare` looks."""
    text = json.dumps({recipe: asdict(gap) for recipe, gap in gaps.items()}, indent=1)
    write_durably(folder / _FILE, text + "\n")


def read_cast_gaps(folder: Path) -> dict[str, CastGap]:
    """By recipe name; empty where none were evaluated."""
    path = folder / _FILE
    if not path.exists():
        return {}
    try:
        return {
            recipe: CastGap(**gap | {"along": tuple(gap.get("along", ()))})
            for recipe, gap in read_json(path).items()
        }
    except TypeError as error:
        raise ValueError(f"{path}: not a cast gap: {error}") from None
