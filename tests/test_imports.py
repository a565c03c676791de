"""Layering: lowbit imports torch alone; data and lowbit do not know each other nor train."""

import ast
from pathlib import Path

import pytest

import data
import lowbit
import train

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "lowbit": {"data", "train", "lightning", "transformers", "datasets", "numpy", "jsonargparse"},
    "data": {"lowbit", "train"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
            roots = {name.split(".")[0] for name in names}
            assert not roots & FORBIDDEN[package], path


def test_the_packages_are_this_checkouts() -> None:
    for package in (lowbit, data, train):
        assert Path(package.__file__ or "").parents[1] == ROOT
