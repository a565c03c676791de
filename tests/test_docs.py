"""Places and tests that the documents name exist."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def names_in(path: Path) -> set[str]:
    """Classes, functions and assigned names of a module, and methods by their own name."""
    tree = ast.parse(path.read_text())
    found = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_places_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(places) >= 10
    for path, name in places:
        assert name in names_in(ROOT / path), f"{path}::{name}"
    for path in re.findall(r"`((?:lowbit|train|data|tests|scripts|docs|configs)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


def test_places_are_two_hops_from_the_readmes_tree() -> None:
    """The tree names the package; its folder the file."""
    tree = (ROOT / "README.md").read_text().partition("## Layout")[2]
    rows = re.findall(r"\| `([\w/]+)/` \| `([\w/]+\.py)::", (ROOT / "CONTRIBUTING.md").read_text())
    assert rows
    for folder, path in rows:
        assert f"\n{folder.split('/')[0]}/ " in tree
        assert folder.count("/") <= 1 and Path(path).parts[0] == folder.split("/")[0]


def test_every_test_of_the_fault_matrix_exists() -> None:
    table = (ROOT / "docs" / "durability.md").read_text().partition("## Fault matrix")[2]
    found = 0
    for row in table.splitlines():
        if not row.startswith("| "):
            continue
        file = None
        for named, test in re.findall(r"`(?:([\w/]*test_\w+\.py))?::(test_\w+)`", row):
            if named:
                (file,) = (ROOT / "tests").rglob(named.rpartition("/")[2])
            assert file is not None, row
            assert test in names_in(file), f"{file.name}::{test}"
            found += 1
    assert found >= 40


def test_readme_lists_every_page() -> None:
    tree = (ROOT / "README.md").read_text().partition("## Layout")[2]
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem in tree, page.name


def test_pre_commit_runs_what_the_submission_runs() -> None:
    plain = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["entry"] for repository in plain["repos"] for hook in repository["hooks"]]
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert hooks == lines[lines.index("ruff check .") :]


def test_recipes_page_has_every_option() -> None:
    """Those that the command line takes: parameters of classes, with their names in YAML."""
    from lowbit import BlockFormat, Keep, LayerPolicy, QuantRecipe
    from train.model.distillation import Distillation
    from train.model.module import PretrainModule
    from train.model.step import Optimization

    page = (ROOT / "docs" / "recipes.md").read_text()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    documented = {option for row in rows for option in re.findall(r"`([\w.]+)(?::[^`]*)?`", row)}
    nested = {"optimization": Optimization, "keep": Keep, "distill_from": Distillation}
    model = {*inspect.signature(PretrainModule).parameters} - {"policy", *nested}
    model |= {f"{at}.{field.name}" for at, of in nested.items() for field in fields(of)}
    policy = {field.name for of in (LayerPolicy, QuantRecipe) for field in fields(of)} - {"recipe"}
    format = {field.name for field in fields(BlockFormat)} - {"name", "element"} | {"symmetric"}
    assert model | policy | format <= documented
