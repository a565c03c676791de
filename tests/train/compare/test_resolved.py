"""Sentences of `train/compare/resolved.py`, and the sweep's forecast."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.compare.resolved import cast_orders
from train.sweep.request import PlannedRun, Variant
from train.sweep.status import forecast

Make = Callable[..., Path]


def _row(label: str, kl: float, error: float | None, seed: int = 0) -> dict[str, Any]:
    cast = {"kl": kl, "kl_standard_error": error, "kl_floor": 8e-7}
    return {"label": label, "seed": seed, "cast_gap": cast}


def test_an_order_is_resolved_beyond_two_standard_errors() -> None:
    rows = [_row("bf16", 0.0, None), _row("mxfp8", 1.7e-4, 3e-6), _row("mxint8", 1.7e-5, 1e-6)]
    (text,) = cast_orders(rows)
    assert "mxint8 1.7e-05 ± 1e-06, mxfp8 1.7e-04 ± 3e-06" in text
    assert "mxfp8 is 10.0 times mxint8: resolved" in text and "8e-07" in text


def test_an_order_within_its_errors_is_none() -> None:
    (text,) = cast_orders([_row("a", 1.0e-4, 1e-5), _row("b", 1.1e-4, 1e-5)])
    assert "b and a are not told apart" in text and "resolved" not in text


def test_seeds_speak_for_themselves_and_one_format_has_no_order() -> None:
    rows = [_row(x, kl, 1e-7, seed) for seed in (0, 1) for x, kl in (("a", 1e-5), ("b", 2e-5))]
    assert [text.split(",")[0] for text in cast_orders(rows)] == ["Seed 0", "Seed 1"]
    assert cast_orders([_row("bf16", 0.0, None), _row("mxint8", 1e-5, 1e-6)]) == []
    assert cast_orders([{"label": "a", "seed": 0, "cast_gap": None}]) == []


def test_a_forecast_comes_with_the_first_steps_and_helps_where_it_is_long(
    tmp_path: Path, make_run: Make
) -> None:
    variant = Variant("bf16", "", Path("bf16.yaml"), {})
    other = dataclasses.replace(variant, recipe_name="mxint8")
    plan = [PlannedRun(one, 0, tmp_path, ()) for one in (variant, other)]
    assert forecast(plan, 1) is None
    make_run(plan[0].folder, [5.0] * 4, {}, status="running", max_steps=100)
    assert forecast(plan, 1) is None
    for length, long in ((100, False), (100_000, True)):
        folder = plan[0].folder
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        make_run(folder, [5.0] * 10, {}, status="running", max_steps=length)
        text = forecast(plan, 1)
        assert text is not None and text.startswith("measured: 0.03 s a step, so about ")
        assert ("--trainer.max_steps" in text) is long
