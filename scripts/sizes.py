"""The house in numbers, and its bars: `python scripts/sizes.py`; --strict: 1 where one is missed.

Lines of code: those that hold a token of Python other than comments and docstrings. Docstrings: of
public modules, classes, functions and methods.
"""

import ast
import io
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_LINES = 250  # of a file
LONGEST_P90, LONGEST = 20, 50  # lines of a function
DOCUMENTED = 0.95
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Sizes:
    """Of a package."""

    lines: int
    functions: tuple[int, ...]  #: lines of each, ascending
    largest: tuple[int, str]  #: lines of the largest file
    too_large: tuple[str, ...]  #: files and functions with more lines than they should have
    documented: int
    public: int

    @property
    def share(self) -> float:
        return self.documented / self.public

    def missed(self) -> list[str]:
        """Bars, in words."""
        found = list(self.too_large)
        if self.share < DOCUMENTED:
            found.append(f"{self.share:.1%} of public docstrings, at least {DOCUMENTED:.0%}")
        return found


def sizes(package: Path) -> Sizes:
    """Over all Python files of a package."""
    lines, functions, found, largest = 0, list[int](), list[bool](), (0, "")
    too_large = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        lines += len(_code_lines(text, tree))
        length, name = len(text.splitlines()), str(path.relative_to(package.parent))
        largest = max(largest, (length, name))
        if length > MOST_LINES:
            too_large.append(f"{name} has {length} lines, at most {MOST_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append((node.end_lineno or node.lineno) - node.lineno + 1)
                if functions[-1] > LONGEST:
                    too_large.append(
                        f"{name}: {node.name} has {functions[-1]} lines, at most {LONGEST}"
                    )
        found += [ast.get_docstring(node) is not None for node in _public(tree)]
    ascending = tuple(sorted(functions))
    return Sizes(lines, ascending, largest, tuple(too_large), sum(found), len(found))


def undocumented(package: Path) -> list[str]:
    """`path:line name` of what is public and has no docstring."""
    return [
        f"{path.relative_to(package.parent)}:{getattr(node, 'lineno', 1)}: "
        + getattr(node, "name", "the file")
        for path in sorted(package.rglob("*.py"))
        for node in _public(ast.parse(path.read_text()))
        if ast.get_docstring(node) is None
    ]


def _public(node: _Documented) -> Iterator[_Documented]:
    yield node
    for inner in node.body if isinstance(node, ast.Module | ast.ClassDef) else ():
        if isinstance(inner, _Documented) and not inner.name.startswith("_"):
            yield from _public(inner)


def _code_lines(text: str, tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT and token.type != tokenize.COMMENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def p90(lengths: Iterable[int]) -> int:
    """The 90th percentile."""
    ascending = sorted(lengths)
    return ascending[int(0.9 * (len(ascending) - 1))]


def main() -> int:
    """Print a line a package, and which bars are missed."""
    found = {name: sizes(ROOT / name) for name in ("lowbit", "train", "data")}
    for name, one in found.items():
        print(
            f"{name:7} {one.lines:6,} lines of code; functions p90 {p90(one.functions)}, longest "
            f"{one.functions[-1]}; largest file {one.largest[1]} ({one.largest[0]}); public "
            f"docstrings {one.documented} of {one.public} ({one.share:.1%})"
        )
    if "--undocumented" in sys.argv:
        print("\n".join(line for name in found for line in undocumented(ROOT / name)))
    missed = [f"{name}: {bar}" for name, one in found.items() for bar in one.missed()]
    longest = p90(length for one in found.values() for length in one.functions)
    print(
        f"all {sum(one.lines for one in found.values()):9,} lines of code; functions p90 {longest}"
    )
    if longest > LONGEST_P90:
        missed.append(f"functions p90 {longest}, at most {LONGEST_P90}")
    print("\n".join(f"missed: {bar}" for bar in missed) or "all bars met")
    return 1 if missed and "--strict" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
