"""`lowbit audit`: each planted fault is found, by the check meant for it; good ones pass."""

import argparse
import logging
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit import Key, block_format, fake_quantize
from train.audit.audit import add_arguments, run

FORMAT = "mxint8"
STOCHASTIC = "{name: mxfp4, rounding: stochastic}"


def right(x: Tensor) -> Tensor:
    return fake_quantize(x, FORMAT)


def _own(x: Tensor, **changes: Any) -> Tensor:
    return fake_quantize(x, block_format(FORMAT, **changes))


def _scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and their scales, 2^ceil(log2(amax / 127))."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True) / 127).log2().ceil()
    return blocks, scale.where(scale > 0, 1.0)


def ties_away(x: Tensor) -> Tensor:
    blocks, scale = _scale(x)
    return ((blocks.abs() / scale + 0.5).floor() * scale * blocks.sign()).flatten(-2)


def rounded_down(x: Tensor) -> Tensor:
    blocks, scale = _scale(x)
    return ((blocks / scale).floor() * scale).flatten(-2)


def poisoned(x: Tensor) -> Tensor:
    return right(x) + 0 * x.sum()


def in_place(x: Tensor) -> Tensor:
    return x.copy_(right(x))


class Delayed:
    """The scale of the call before, as delayed scaling has it."""

    amax = 3.0

    def __call__(self, x: Tensor) -> Tensor:
        last, self.amax = self.amax, float(x.abs().max())
        return right(x.clamp(-last, last))


def misread(x: Tensor) -> Tensor:
    """A kernel that takes strides for granted."""
    return right(x.as_strided(x.shape, (x.shape[-1], 1))) if x.dim() == 2 else right(x)


def saturated(x: Tensor) -> Tensor:
    return right(torch.where(x.isnan(), 0.0, x).clamp(-3e38, 3e38))


DETERMINISTIC: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "ties away from zero": (ties_away, "values: ties"),
    "-128 admitted": (lambda x: _own(x, scale_rule="floor"), "values: Gaussian"),
    "blocks of 64": (lambda x: _own(x, block_size=64), "a block's values are its own"),
    "scale from the tensor": (lambda x: _own(x.flatten(), block_size=-1).view_as(x), "causal"),
    "small values flushed": (lambda x: right(x.where(x.abs() > 1e-9, 0.0)), "values: 40 decades"),
    "one NaN poisons all": (poisoned, "NaN and infinities"),
    "NaN becomes a number": (saturated, "NaN and infinities"),
    "written in place": (in_place, "leaves its input"),
    "scale of the call before": (Delayed(), "repeatable"),
    "rounded through BF16": (lambda x: right(x.bfloat16().float()), "values: Gaussian"),
    "rounded down": (rounded_down, "odd"),
    "strides taken for granted": (misread, "strided input"),
    "another dtype": (lambda x: right(x).half(), "values: Gaussian"),
    "a value of the next row": (
        lambda x: torch.cat([right(x)[..., :-1], right(x).roll(1, 0)[..., -1:]], -1),
        "rows in another order",
    ),
    "raises": (lambda x: 1 / 0, "error of the decoded values"),  # type: ignore[arg-type,return-value]
}


class Stochastic:
    """E2M1 under the format's own scales, rounded up where `uniform` is below the part."""

    def __init__(self, uniform: Callable[[torch.Size, int], Tensor]) -> None:
        self.uniform, self.call = uniform, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.call += 1
        format = block_format("mxfp4")
        blocks = x.unflatten(-1, (-1, 32))
        scale = 2.0 ** (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
        values = torch.tensor(sorted(set(format.element.values)))
        y = blocks / scale
        upper = torch.searchsorted(values, y).clamp(1, len(values) - 1)
        low, high = values[upper - 1], values[upper]
        up = self.uniform(y.shape, self.call) < (y - low) / (high - low)
        return (torch.where(up, high, low) * scale).flatten(-2)


def _fair(shape: torch.Size, call: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(call))


def ours(x: Tensor, calls: list[int] = []) -> Tensor:  # noqa: B006  # it counts
    calls.append(0)
    return fake_quantize(x, block_format("mxfp4", rounding="stochastic"), key=Key.of(len(calls)))


DRAWN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "the same draws at every call": (Stochastic(lambda s, _: _fair(s, 0)), "independent: calls"),
    "every other call": (Stochastic(lambda s, c: _fair(s, c % 4 // 2)), "two calls apart"),
    "by the first tensor": (
        Stochastic(lambda s, c: _fair(s, (c + 1) // 2)), "tensors of one shape"),
    "one row's draws for all": (
        Stochastic(lambda s, c: _fair(s[1:], c).expand(s)), "independent: rows"),
    "one block's draws for all": (
        Stochastic(lambda s, c: _fair(s[::2], c)[:, None].expand(s)), "blocks of a row"),
    "pairs of values share a draw": (
        Stochastic(lambda s, c: _fair(s, c)[..., ::2].repeat_interleave(2, -1)), "neighbouring"),
    "four random bits": (
        Stochastic(lambda s, c: (_fair(s, c) * 16).floor() / 16), "not moved up"),
    "rounded to nearest": (lambda x: fake_quantize(x, "mxfp4"), "nears it as"),
    "zero too often": (
        lambda x: torch.where(_fair(x.shape, 1) < 0.02, 0.0, ours(x)), "next one below or above"),
    "towards zero too often": (
        lambda x: ours(x).minimum(ours(x)).where(x > 0, ours(x).maximum(ours(x))), "magnitudes"),
}  # fmt: skip


def audited(
    quantizer: Callable[[Tensor], Tensor],
    format: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *more: str,
) -> tuple[int, list[str]]:
    """The exit code, and the lines of the checks that failed."""
    monkeypatch.setattr("train.audit.audit._loaded", lambda written: quantizer)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    code = run(parser.parse_args(["my:own", "--format", format, *more]))
    return code, [line for line in capsys.readouterr().out.splitlines() if " FAILED " in line]


@pytest.fixture(autouse=True)
def _fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.audit.inputs.ROWS", 128)


@pytest.mark.parametrize("fault", DETERMINISTIC)
def test_a_planted_fault_is_found(fault: str, capsys: Any, monkeypatch: Any) -> None:
    quantizer, check = DETERMINISTIC[fault]
    code, failed = audited(quantizer, FORMAT, capsys, monkeypatch)
    assert code == 1 and any(line.startswith(check) for line in failed), failed


@pytest.mark.parametrize("fault", DRAWN)
def test_a_planted_fault_of_draws_is_found(fault: str, capsys: Any, monkeypatch: Any) -> None:
    quantizer, check = DRAWN[fault]
    code, failed = audited(quantizer, STOCHASTIC, capsys, monkeypatch)
    assert code == 1 and any(check in line for line in failed), failed


@pytest.mark.parametrize("seed", ["0", "1"])
def test_fair_draws_pass(seed: str, capsys: Any, monkeypatch: Any) -> None:
    for quantizer in (Stochastic(_fair), ours):
        assert audited(quantizer, STOCHASTIC, capsys, monkeypatch, "--seed", seed) == (0, [])


@pytest.mark.parametrize("format", ["mxint8", "mxfp6", "nvfp4", "{name: mxint4, scale_rule: best}"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_definition_passes(format: str, dtype: str, capsys: Any, monkeypatch: Any) -> None:
    from train.config.formats import read_format

    own = read_format(format)
    arguments = (format, capsys, monkeypatch, "--dtype", dtype)
    assert audited(lambda x: fake_quantize(x, own), *arguments) == (0, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchao_under_its_own_rule(dtype: str, capsys: Any, monkeypatch: Any) -> None:
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.mx_tensor import MXTensor
    logging.disable(logging.NOTSET)

    def mxfp8(x: Tensor) -> Tensor:
        return MXTensor.to_mx(x, torch.float8_e4m3fn, 32).dequantize(x.dtype)

    floor = "{name: mxfp8, scale_rule: floor}"
    assert audited(mxfp8, floor, capsys, monkeypatch, "--dtype", dtype) == (0, [])
    code, failed = audited(mxfp8, "mxfp8", capsys, monkeypatch, "--dtype", dtype)
    assert code == 1 and any(line.startswith("values: Gaussian") for line in failed)


def test_the_report_for_ci(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    report = tmp_path / "audit.xml"
    for quantizer, failures in ((right, 0), (ties_away, 3)):
        code, failed = audited(quantizer, FORMAT, capsys, monkeypatch, "--junit", str(report))
        suite = ET.parse(report).getroot()
        own = [case.get("name") for case in suite if case.find("failure") is not None]
        assert code == (failures > 0) and len(own) == len(failed) == int(suite.attrib["failures"])
        assert len(own) >= failures and int(suite.attrib["tests"]) == len(suite) == 29


@pytest.mark.parametrize(
    ("quantizer", "more", "said"),
    [
        ("nothing", [], "'nothing' is not MODULE:CALLABLE"),
        ("no.such.module:f", [], "no.such.module:f cannot be had: ModuleNotFoundError"),
        ("math:pi", [], "math:pi is a float, not a callable"),
        ("math:nil", [], "math:nil cannot be had: AttributeError"),
        ("absent.py:f", [], "absent.py:f cannot be had: FileNotFoundError"),
        ("math:exp", ["--format", "{name: mxint8, block_size: [32, 32]}"], "these are 2-D"),
        ("math:exp", ["--device", "abacus"], "--device abacus"),
        ("math:exp", ["--junit", "no/such/a.xml"], "there is no folder no/such"),
        ("math:exp", ["--junit", "notes.txt"], "--junit notes.txt holds something else"),
        (
            "math:exp",
            ["--format", "{name: nvint8, rounding: stochastic}", "--dtype", "bfloat16"],
            "give float32",
        ),
    ],
)
def test_bad_input_is_one_line(
    quantizer: str, more: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    from train.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["audit", quantizer, "--format", "mxint8", *more]) == 2
    line = capsys.readouterr().err.strip()
    assert said in line and "\n" not in line and len(line) <= 200
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_file_and_a_module_are_found(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from train.cli import main

    code = "class Q:\n    f = staticmethod(lambda x: lowbit.fake_quantize(x, 'mxint4'))\n"
    (tmp_path / "of_mine.py").write_text(f"import lowbit\n{code}")
    monkeypatch.chdir(tmp_path)
    for written in ("of_mine.py:Q.f", "of_mine:Q.f"):
        assert main(["audit", written, "--format", "mxint4"]) == 0
        assert "no check failed" in capsys.readouterr().out
    assert main(["audit", "of_mine.py:Q.f", "--format", "mxint6"]) == 1
