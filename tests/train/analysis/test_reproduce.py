"""`lowbit reproduce`: what must agree does, what differs says why, and the report holds both."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from train.reproduce.claims import (
    Claim,
    cells,
    crossovers,
    energy_and_area,
    formats,
    minus_128,
    qsnr,
)
from train.reproduce.claims_model import EARLIER, _order_claims
from train.reproduce.claims_nvint8 import nvint8_claims
from train.reproduce.clipping import Size, clipping_claims
from train.reproduce.nvint8 import DATA, FORMATS, study, tabled
from train.reproduce.reproduce import _report


@pytest.mark.parametrize(
    "claims",
    [formats(), crossovers(), minus_128(2**22), qsnr(2**20)],
    ids=["formats", "crossovers", "-128", "qsnr"],
)
def test_what_must_agree(claims: Iterable[Claim]) -> None:
    rows = [claim.row() for claim in claims]
    assert rows and {row["verdict"] for row in rows} == {"agrees"}


def test_cells_are_the_studys_formulas() -> None:
    """By hand for MXINT8 and NVINT4; the order of the units is the published one."""
    assert (cells("mxint8"), cells("nvint4")) == (8**2 + 2 * 8, 4**2 + 2 * 4)
    orders = [claim for claim in energy_and_area() if "order" in claim.what]
    assert [claim.agrees for claim in orders] == [True, True]


def test_order_of_formats_needs_mixed_conventions() -> None:
    """With the figures measured on 3 x 1024 tokens of SmolLM2-135M."""
    rceil = dict(zip(EARLIER, (0.00276, 0.0481, 0.0176, 0.2459, 0.4612), strict=True))
    kl = {f"{name} rceil": value for name, value in rceil.items()}
    kl |= {"mxint8 fp32": 0.00121, "mxint6 fp32": 0.02009, "mxfp8 fp32": 0.01213}
    kl |= {"mxint8 floor": 0.00267, "mxint6 floor": 0.04363, "mxfp8 floor": 0.02966}
    kl |= {"mxfp4 floor": 0.50412}
    assert [claim.agrees for claim in _order_claims(kl, "")] == [False, False, False, True]


def test_a_difference_without_a_reason_is_refused() -> None:
    with pytest.raises(AssertionError):
        Claim("part", "what", "1", "2", False)


def test_the_report_holds_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = [*formats(), *clipping_claims(Size(64, 1, 2, 2, (32,)))]
    found = study(2, 16 * 1024)
    measured = tabled(found)
    args = argparse.Namespace(out=tmp_path / "out", fast=True, model="none")
    _report(args, claims, measured, {"all": 1.0})
    document = json.loads((tmp_path / "out/reproduce.json").read_text())
    assert len(document["rows"]) == 9 and len(document["nvint8"]) == len(DATA) * len(FORMATS)
    printed = capsys.readouterr().out
    assert "8 of 9 rows agree" in printed and "not resolved" in printed
    markdown = (tmp_path / "out/reproduce.md").read_text()
    assert markdown.count("\n| ") == 1 + 9 + 1 + len(measured)
    assert all(row["bits"] > 4 and row["MSE"] > 0 for row in measured)

    rows = {claim.what: claim for claim in nvint8_claims(found)}
    assert len(rows) == 6 + 6 + 2 + 10 + 16
    convention = [claim.agrees for what, claim in rows.items() if "max - min" in what]
    question = {what: claim.agrees for what, claim in rows.items() if " over mxint8" in what}
    assert convention == [True, True] and len(question) == 16
    assert {what for what, wins in question.items() if wins} == {w for w in question if "up" in w}
