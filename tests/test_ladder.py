"""The ladder: its recipes are what they are called, and its tables say what compare.json says."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lowbit import LayerPolicy, Rotation, Rounding
from lowbit.formats import NAMED
from lowbit.recipe import GEMMS, OPERANDS
from train.compare.branch_casts import CastSet
from train.compare.branches import BranchSet
from train.compare.verdicts import judge
from train.config.layers import spelt_out
from train.config.policies import read_policy
from train.config.strict_yaml import load_yaml

ROOT = Path(__file__).parents[1]
SPEC = load_yaml((ROOT / "configs/sweep/ladder.yaml").read_text())
ARMS = [Path(path) for path in SPEC["recipes"]]


def policy(path: Path) -> LayerPolicy:
    return read_policy(spelt_out(load_yaml((ROOT / path).read_text())["model"]["policy"]))


def test_the_ladder_has_every_named_format_once() -> None:
    """In all six operands, plain; int8, whose scales span whole rows, is no block format."""
    found = []
    for path in ARMS:
        own = policy(path)
        formats = {own.recipe.format(name) for name in OPERANDS}
        turned = {own.recipe.rotation(gemm) for gemm in GEMMS}
        if path.parent.name == "control" or own.keep_last or len(formats) > 1 or len(turned) > 1:
            continue
        (format,), (rotation,) = formats, turned
        if format and not rotation:
            found.append(str(format))
        elif format:
            assert rotation == Rotation(format.block_size, seed=0), path  # type: ignore[arg-type]
            assert path.stem == f"{format}_rotated"
    assert sorted(found) == sorted(NAMED.keys() - {"int8"})
    assert {path.stem for path in ARMS} == {policy(path).name for path in ARMS}
    shipped = (ROOT / "configs/recipe/ladder").glob("*.yaml")
    assert {*shipped} <= {ROOT / path for path in ARMS}


STEPS: dict[str, dict[str, Any]] = {
    "stochastic": {"rounding": {"dgrad_grad_output", "wgrad_grad_output"}},
    "wgrad_rotated": {"rotation": {"wgrad"}},
    "2d_weights": {"block_size": {"fprop_weight", "dgrad_weight"}},
    "last_bf16": {"keep_last": 1},
}


@pytest.mark.parametrize("step", [*STEPS, "all"])
def test_a_step_is_one_of_the_published_recipe(step: str) -> None:
    """Plain NVFP4 and what the step names; together they are configs/recipe/nvfp4.yaml."""
    file = "nvfp4.yaml" if step == "all" else f"ladder/nvfp4_{step}.yaml"
    own = policy(Path("configs/recipe") / file)
    expected: dict[str, Any] = {}
    for name in STEPS if step == "all" else (step,):
        expected |= STEPS[name]
    formats = {name: own.recipe.format(name) for name in OPERANDS}
    assert all(format and format.name == "nvfp4" for format in formats.values())
    stochastic = {n for n, f in formats.items() if f and f.rounding is Rounding.STOCHASTIC}
    square = {n for n, f in formats.items() if f and f.block_size == (16, 16)}
    turned = {gemm for gemm in GEMMS if own.recipe.rotation(gemm)}
    found: dict[str, Any] = {"rounding": stochastic, "block_size": square, "rotation": turned}
    found |= {"keep_last": own.keep_last}
    assert {key: value for key, value in found.items() if value} == expected


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ladder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("ladder", monkeypatch)


def gap(arm: int, branch: int) -> float:
    return 0.001 * ((arm + branch * (arm % 3 + 1)) % 9 - 4) if arm else 0.0


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Branches of all arms, with gaps of -0.004 to 0.004, and casts of some, as `compare` does."""
    monkeypatch.chdir(ROOT)  # where the recipes' paths lead
    names = [policy(path).name for path in ARMS]
    arms = [
        {"label": name, "recipe": str(path), "changes": {}, "control": control}
        for name, path in zip(names, ARMS, strict=True)
        for control in ("some" if path.parent.name == "control" else None,)
    ]
    points = [{"path": "r/checkpoints/s", "step": 1, "max_steps": 9, "digest": "d"}]
    units = [
        {"checkpoint": 0, "branch": b, "seed": b, "validation_windows": 1, "seconds": 1.0,
         "losses": {x: 2 + gap(i, b) for i, x in enumerate(names)}}
        for b in range(3)
    ]  # fmt: skip
    folder = tmp_path / "branches"
    found = BranchSet("bf16", 20, arms, points, {}, [], units)
    found.write(folder)
    columns = {"gap": [1e-4, -1e-4] * 6, "kl": [1e-5, 3e-5] * 6}
    values = {"mxint8": columns, "mxfp8": {"gap": columns["gap"], "kl": [1e-3, 1.1e-3] * 6}}
    windows = {"ids": [*range(12)], "documents": [0] * 12}
    unit = {"checkpoint": 0, "digest": "d", "windows": windows, "values": values}
    CastSet("bf16").with_unit(unit).write(folder)
    documents = [found.document(folder, [("mxint8", "mxfp8"), ("mxint4", "mxfp4")])]
    result = {"baseline": "bf16", "pairs": [], "branches": documents}
    judge(result, 0.5)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "compare.json").write_text(json.dumps(result))
    return tmp_path


def test_tables_and_picture_say_what_compare_says(
    sweep: Path, ladder: ModuleType, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    page = sweep / "page.md"
    page.write_text(f"before\n{ladder.BEGIN}\nold\n{ladder.END}\nafter\n")
    arguments = [str(sweep), "--draw", str(sweep / "ladder"), "--into", str(page)]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *arguments])
    assert ladder.main() == 0
    out = capsys.readouterr().out
    cells = [line.removeprefix("| ").split(" | ") for line in out.splitlines()]
    rows = {row[0]: row for row in reversed(cells)}  # of a label, those of the first table
    (found,) = json.loads((sweep / "compare" / "compare.json").read_text())["branches"]
    for row in found["rows"]:
        name = row["label"] + (" (control)" if row["control"] else "")
        assert rows[name][4:6] == ["3", f"{row['mean']:+.5f} ± {row['standard_error']:.5f}"]
    bits = [rows[name][1] for name in ("mxint8", "nvfp4_plain", "mxint6", "nvfp4_2d_weights")]
    assert bits == ["8.25", "4.50", "6.25", "4.34"]  # a third of the last's in blocks of 256
    assert rows["mxint8"][2].startswith("2.00e-05 ± ") and rows["mxint4"][2] == ""
    assert f"{found['pairs'][0]['mean']:+.5f} ± " in out
    assert "| mxint8 against mxfp8 | 0.02 | " in out and " | less with mxint8 |" in out
    assert "| mxint8 | +0.00000 to +0.00000 |" not in out and out.count(" | yes |") == 2
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")
    assert out.strip() in page.read_text() and "\nold\n" not in page.read_text()
    assert (sweep / "ladder.png").stat().st_size > 10_000 and (sweep / "ladder.svg").exists()


def test_clipping_tables_say_what_the_branches_and_the_tensors_do(
    tmp_path: Path, ladder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted loss and shift come out; Gaussian weights lose on -128 and not without it."""
    clipping = load_script("clipping", monkeypatch)
    twins = [clipping.label(kind, block) for block in ("32", "row") for kind in clipping.KINDS]
    arms = [{"label": x, "recipe": x, "changes": {}, "control": None} for x in ("bf16", *twins)]
    units = [
        {"checkpoint": 0, "branch": b, "seed": b, "validation_windows": 1, "seconds": 1.0,
         "losses": {"bf16": 2.0} | {x: 2 + 0.001 * (i + b % 2) * (i % 2 == 0)
                                    for i, x in enumerate(twins)},
         "weight_shifts": {x: [1e-4 * (i % 2 == 0) * (b + 1), 0.0] for i, x in enumerate(twins)}}
        for b in range(3)
    ]  # fmt: skip
    point = {"path": "r/checkpoints/s", "step": 1, "max_steps": 9, "digest": "d"}
    planned = [(twins[0], twins[1]), (twins[2], twins[3])]
    found = BranchSet("bf16", 20, arms, [point], {}, [], units).document(tmp_path, planned)
    judge({"baseline": "bf16", "pairs": [], "branches": [found]})
    lines = clipping.effect_table(found)
    assert len(lines) == 4 and lines[2].startswith("| 32 | 3 | +0.00033 ± 0.00033 | ")
    assert "| +1.0e-04 ± 2.9e-05 | -2.4e-05 to +2.2e-04 |" in lines[2]
    assert lines[3].startswith("| row | 3 | +0.00233 ± 0.00033 | ")
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    for layer in layers:
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    biases = clipping.Observer(layers).biases()
    assert {operand for _, operand in biases} == {"fprop_weight", "dgrad_weight"}
    for operand in ("fprop_weight", "dgrad_weight"):
        asymmetric, symmetric = (biases[x, operand] for x in twins[:2])
        assert max(asymmetric) < -2.5e-5 < -1.5e-5 < min(symmetric) <= max(symmetric) < 2e-5
    assert "| `fprop_weight` | -" in "\n".join(clipping.bias_table(ZEROS | biases))


ZEROS = {
    (f"mxint8_{kind}_bf16{suffix}", operand): [0.0, 0.0]
    for kind in ("asymmetric", "symmetric")
    for suffix in ("", "_128", "_row")
    for operand in OPERANDS
}
