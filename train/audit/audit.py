"""`lowbit audit`: is anybody's quantizer what it says it is?"""

import argparse
import importlib
import importlib.util
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from data.durable import write_durably
from lowbit import Rounding
from train.audit import checks, stochastic
from train.audit.checks import Finding, Subject, Verdict
from train.audit.inputs import shape_for
from train.config.formats import read_format
from train.config.notation import HELP
from train.output.tables import printable, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUITE = "lowbit audit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    parser.add_argument(
        "quantizer",
        metavar="MODULE:CALLABLE",
        help="x -> the values that it rounds x to, of the same shape and dtype, in blocks along "
        "the last axis; MODULE is imported, or a .py file",
    )
    parser.add_argument(
        "--format",
        required=True,
        help=f"what it claims to compute, {HELP}; with rounding: stochastic its draws are judged",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of x (float32)")
    parser.add_argument("--device", default="cpu", help="of x (cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of the data (0)")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="also write a JUnit report")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if a check fails."""
    format = read_format(args.format)
    shape_for(format)
    if format.rounding is Rounding.STOCHASTIC and not format.fits_bf16 and args.dtype != "float32":
        raise ValueError(f"--dtype {args.dtype} rounds values of {format} again; give float32")
    _check_report(args.junit)
    quantizer = _loaded(args.quantizer)
    subject = Subject(quantizer, format, DTYPES[args.dtype], _device(args.device))
    if format.rounding is Rounding.STOCHASTIC:
        findings = list(stochastic.drawn(subject, args.seed))
    else:
        findings = [
            found
            for check in (checks.equality, checks.properties, checks.error)
            for found in check(subject, args.seed)
        ]
    print(table([_row(found) for found in findings]))
    failed = sum(found.verdict is Verdict.FAILED for found in findings)
    said = f"{failed} of {len(findings)} checks failed" if failed else "no check failed"
    print(f"\n{args.quantizer} as {format}, {args.dtype} on {args.device}: {said}")
    if args.junit:
        _write_junit(findings, args.quantizer, args.junit)
    return int(failed > 0)


def _row(found: Finding) -> dict[str, Any]:
    count = f"{found.wrong:,} of {found.of:,}" if found.of else ""
    return {"check": found.check, "verdict": found.verdict.value, "wrong": count,
            "detail": printable(found.detail)}  # fmt: skip


def _loaded(written: str) -> Callable[[Any], Any]:
    """The callable that MODULE:CALLABLE names; ValueError for what is none."""
    module, _, name = written.rpartition(":")
    if not module or not name:
        raise ValueError(f"{written!r} is not MODULE:CALLABLE, as my.quantizers:mxfp8")
    try:
        found: Any = _module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # anybody's code
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{written} cannot be had: {type(error).__name__}: {reason}") from error
    if not callable(found):
        raise ValueError(f"{written} is a {type(found).__name__}, not a callable")
    return found  # type: ignore[no-any-return]


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {' '.join(str(error).split())[:120]}") from None
    return name


def _check_report(path: Path | None) -> None:
    """ValueError where the report would replace what is none of ours, or has no folder."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise ValueError(f"--junit {path}: there is no folder {path.parent}")
    if path.exists() and f'name="{SUITE}' not in path.read_text(errors="replace")[:500]:
        raise ValueError(f"--junit {path} holds something else; name another file, or remove it")


def _write_junit(findings: Sequence[Finding], quantizer: str, path: Path) -> None:
    failed = sum(found.verdict is Verdict.FAILED for found in findings)
    counts = {"tests": str(len(findings)), "failures": str(failed)}
    suite = ET.Element("testsuite", {"name": f"{SUITE} {quantizer}", **counts})
    for found in findings:
        case = ET.SubElement(suite, "testcase", classname=quantizer, name=found.check)
        message = printable(f"{found.verdict.value}: {found.wrong} of {found.of}; {found.detail}")
        if found.verdict is Verdict.FAILED:
            ET.SubElement(case, "failure", message=message)
        elif found.verdict is not Verdict.HOLDS:
            ET.SubElement(case, "skipped", message=message)
    write_durably(path, ET.tostring(suite, encoding="unicode") + "\n")
