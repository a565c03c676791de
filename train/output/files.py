"""Files that results are left in: CSV, JSON, and a self-contained page."""

import base64
import csv
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.durable import write_durably
from train.output.tables import Row, cell


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """With the keys of the first row as its head."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(document: Any, path: Path) -> None:
    """Whole, or as it was."""
    write_durably(path, json_text(document) + "\n")


def json_text(document: Any) -> str:
    """Strict JSON: what is not finite becomes null."""
    return json.dumps(_finite(document), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_page(title: str, parts: Sequence[str | Sequence[Row] | Path], path: Path) -> None:
    """One HTML file of paragraphs (str), tables (rows) and PNG pictures (paths), in order."""
    body = "\n".join(_part(part) for part in parts)
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
        "td,th{padding:.15rem .7rem;border-bottom:1px solid #8884;text-align:right}"
        "td{vertical-align:top}.words{text-align:left}td:not(.words){white-space:nowrap}"
        "img{max-width:100%}"
        ":root{color-scheme:light dark}.wide{overflow-x:auto;margin:1rem 0}"
        "@media(max-width:40rem){body{margin:1rem auto}td,th{padding:.15rem .4rem}}"
    )
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{style}</style><h1>{html.escape(title)}</h1>\n{body}\n</html>\n",
        encoding="utf-8",
    )


def _part(part: str | Sequence[Row] | Path) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, Path):
        data = base64.b64encode(part.read_bytes()).decode()
        return f'<img alt="{html.escape(part.stem)}" src="data:image/png;base64,{data}">'
    head = "".join(_cell("th", str(key), isinstance(part[0][key], str)) for key in part[0])
    lines = ("".join(_cell("td", cell(v), isinstance(v, str)) for v in r.values()) for r in part)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(tag: str, text: str, words: bool) -> str:
    return f"<{tag}{' class=words' if words else ''}>{html.escape(text)}</{tag}>"
