"""What jsonargparse says of a value that does not fit, as one line of what, where and why."""

import re

LONGEST = 200 - len("lowbit: error: ")
_EXPECTED = re.compile(r"^Expected an? (.*?)\.?(?: Got value: .*)?$")
UNION = "Does not validate against any of the Union subtypes"
# of a union's members: what says nothing more than that the value is none of them
_SILENT = re.compile(
    r"Expected a (path but|dot import path)|Not a valid subclass|Subclass types|a (class path|dict)"
    r"|Does not validate|Subtypes:|Errors:|Given value|.*Unable to load config"
)


def shortened(text: str) -> str:
    """One line of at most LONGEST characters.

    >>> shortened('Parser key "data.seq_len":\\n  Expected a <class \\'int\\'>. Got value: 3.5')
    'data.seq_len=3.5: expected int'
    """
    lines = [line.strip().removeprefix("- ").strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    key = re.match(r'Parser key "([^"]+)":', lines[0] if lines else "")
    if key is None and UNION not in text:
        return _cut(" ".join(lines))
    given = [m[1] for line in lines if (m := re.search(r"(?:Given|Got) value: (.*)", line))]
    found = [line for line in lines[key is not None :] if not _SILENT.match(line)]
    reasons = re.findall(
        r"Option '[^']*' is not accepted|the following arguments are required: .*"
        r"|Import of module .*|No module named '[^']*'",
        text,
    )[:1] or [line for line in found if not _EXPECTED.match(line)]
    if not reasons and "dot import path" in text:
        reasons = ["expected a class: package.Class, or a mapping with class_path"]
    elif not reasons:
        kinds = [_kind(m[1]) for line in found if (m := _EXPECTED.match(line))]
        reasons = [f"expected {' or '.join(dict.fromkeys(filter(None, kinds)))}"] if kinds else []
    value = f"={given[0][:40]}" if given and "(" not in given[0] and "{" not in given[0] else ""
    where = f"{key[1]}{value}: " if key else ""
    return _cut(f"{where}{' '.join(reasons) or 'expected a mapping, or a file of one'}")


def _kind(text: str) -> str:
    """`int` of `<class 'int'>`, the choices of a Literal; nothing of None."""
    if choices := re.match(r"typing\.Literal\[(.*)\]", text):
        return f"one of {choices[1]}"
    name = re.sub(r"<class '(.*)'>", r"\1", text).rpartition(".")[2]
    return "" if name == "NoneType" else name


def _cut(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
