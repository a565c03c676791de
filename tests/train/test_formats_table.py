"""`lowbit formats` prints what the formats are, without importing torch."""

import subprocess
import sys

import pytest

from lowbit.formats import NAMED
from train.cli import main


def test_the_table_has_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    by_name = {row[0]: row for row in rows if row}
    assert list(by_name)[1 : len(NAMED) + 1] == list(NAMED)
    assert by_name["mxint8"][1:7] == ["int8", "8.25", "127", "1", "32", "e8m0"]
    assert by_name["mxfp8"][1:7] == ["e4m3", "8.25", "448", "2^-9", "32", "e8m0"]
    assert by_name["mxfp8"][7:] == ["rceil,", "floor,", "ceil,", "even"]
    assert by_name["nvfp4"][1:8] == ["e2m1", "4.5", "6", "0.5", "16", "e4m3", "+"]
    assert by_name["int8"][1:] == ["int8", "8", "127", "1", "row", "fp32", "-"]


def test_values_of_an_element(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "--values", "mxfp4"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "mxfp4: e2m1, 15 values, times the block's scale",
        "-6 -4 -3 -2 -1.5 -1 -0.5 0 0.5 1 1.5 2 3 4 6",
    ]
    for name, format in NAMED.items():
        assert main(["formats", "--values", name]) == 0
        listed = capsys.readouterr().out.split("\n", 1)[1].split()
        assert {float(value) for value in listed} == set(format.element.values)


def test_an_unknown_format_is_a_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats", "--values", "mxfp5"]) == 2
    assert "unknown block format 'mxfp5'" in capsys.readouterr().err


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from train.cli import main; main(['formats']); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False"
