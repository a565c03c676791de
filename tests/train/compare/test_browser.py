"""report.html in a real browser: no error, no request, and what it shows is compare.json."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from train.cli import main
from train.compare.branches import BranchSet
from train.runs.casts import CastGap, write_cast_gaps

Make = Callable[..., Path]
pytestmark = pytest.mark.slow


NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page of a headless Chromium, driven over its DevTools pipe.

    `errors` and `requests` collect what it complained about and asked for.
    """

    def __init__(self, browser: str, profile: Path) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self._session: str | None = None
        self._number, self._buffer = 0, b""
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]

        def place() -> None:  # where --remote-debugging-pipe expects them
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += ["--no-first-run", "--disable-background-networking", "--window-size=1200,900"]
        self._process = subprocess.Popen(
            [browser, *flags, f"--user-data-dir={profile}"],
            preexec_fn=place, pass_fds=(3, 4), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for end in (*ends, to_read, to_write):
            os.close(end)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, clicks: int = 1) -> None:
        self.call(
            "Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left",
            clickCount=clicks,
        )  # fmt: skip

    def call(self, method: str, **params: Any) -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser is gone"
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif (
            method == "Runtime.exceptionThrown"
            or (method == "Log.entryAdded" and params["entry"]["level"] == "error")
            or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"))
        ):
            self.errors.append(text.decode())
        return message


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, make_run: Make) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for seed in range(3):
        train = [4.0 - step / 10 + seed / 50 for step in range(30)]
        for index, name in enumerate(("bf16", "mxint8", "mxfp8")):
            own = [loss + index * 0.01 for loss in train]
            val = {10: own[9], 20: own[19], 30: own[29] + seed * index / 500}
            run = make_run(folder / f"{name}-s{seed}", own, val, recipe=name, seed=seed)
            if name == "bf16":
                points = tuple(
                    {"step": s, "tokens_seen": s * 32, "mean": 1e-4, "standard_error": 2e-5,
                     "windows": 4, "tokens": 128, "kl": 3e-5} for s in (10, 20)
                )  # fmt: skip
                gap = CastGap(2e-4, 3e-5, 4, 128, kl=4e-5, along=points)
                write_cast_gaps(run, {"bf16": CastGap(0, 0, 4, 128, kl=0), "mxint8": gap})
    arms = [
        {"label": name, "recipe": "", "changes": {}, "control": None} for name in "bf16 x y".split()
    ]
    point = {"path": "c", "step": 10, "max_steps": 30, "digest": "d"}
    units = [
        {"checkpoint": 0, "branch": b, "seed": b, "validation_windows": 4, "seconds": 1.0,
         "losses": {"bf16": 3.0, "x": 3.1 + b / 3000, "y": 2.9999 + b / 3000}} for b in range(4)
    ]  # fmt: skip
    BranchSet("bf16", 5, arms, [point], {}, ["lowbit sweep"], units).write(folder / "branches-h5")
    assert main(["compare", str(folder)]) == 0
    return folder / "compare"


@pytest.fixture(scope="module")
def page(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser = find_browser()
    if browser is None:
        pytest.skip("no Chromium or Chrome on this machine's PATH")
    page = Page(browser, tmp_path_factory.mktemp("profile"))
    try:
        page.open((sweep / "report.html").as_uri())
        yield page
    finally:
        page.close()


def test_it_opens_offline_without_a_complaint(page: Any, sweep: Path) -> None:
    assert page.evaluate("document.querySelectorAll('#chart path').length") > 9
    assert page.errors == []
    assert page.requests == [(sweep / "report.html").as_uri()]


def test_the_forest_shows_every_kind_of_evidence(page: Any, sweep: Path) -> None:
    """Each mean once; at a phone's width nothing reaches over the edge."""
    found = json.loads((sweep / "compare.json").read_text())
    shown = page.evaluate("evidence().flat().map(row => [row.label, row.kind, row.mean])")
    expected = [[p["b"], "3 runs", p["mean"]] for p in found["pairs"] if p["a"] == "bf16"]
    expected += [[r["label"], "4 branches", r["mean"]] for r in found["branches"][0]["rows"]]
    expected.append(["mxint8", "casts of 3 seeds", 2e-4])
    assert sorted(shown) == sorted(expected)
    order = "['path'].map(tag => document.querySelectorAll('#forest ' + tag).length)[0]"
    assert page.evaluate(order) == len(expected)
    for width, scheme in ((1280, "light"), (420, "dark")):
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        page.call("Emulation.setEmulatedMedia", features=media)
        page.evaluate("forest()")
        over = "[...document.querySelectorAll('#forest text')].map(t => t.getBBox())"
        over += f".filter(b => b.x < -1 || b.x + b.width > {width}).length"
        assert page.evaluate(over) == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.call("Emulation.clearDeviceMetricsOverride")
    page.call("Emulation.setEmulatedMedia", features=[])
    assert page.errors == []


def cells(page: Any, table: str, column: str) -> list[str]:
    """The full values behind a column, in the order shown."""
    return page.evaluate(f"""(() => {{
        const table = document.querySelector({json.dumps(table)});
        const titles = [...table.querySelectorAll('th')].map(th => th.textContent);
        const at = titles.indexOf({json.dumps(column)});
        return [...table.querySelectorAll('tbody tr')].map(tr => tr.children[at].title);
    }})()""")


def test_all_numbers_are_those_of_compare_json(page: Any, sweep: Path) -> None:
    found = json.loads((sweep / "compare.json").read_text())

    def equal(table: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
        for title, key in columns.items():
            shown = cells(page, table, title)
            values = [row[key] for row in rows]
            assert [float(x) if x else None for x in shown] == values, title

    columns = {"val loss": "val_loss", "perplexity": "perplexity", "train loss": "train_loss",
               "gap": "gap", "max gap": "max_gap", "tokens to target": "tokens_to_target",
               "grad norm": "grad_norm", "tokens/s": "tokens_per_second"}  # fmt: skip
    equal("#runs", columns, found["runs"])
    columns = {"mean gap": "mean", "s.e.": "standard_error", "95 % interval": "low"}
    equal("#pairs", columns, found["pairs"])
    branches = found["branches"][0]
    columns = {"mean gap": "mean", "s.e.": "standard_error", "branches": "units"}
    columns |= {"95 %: these checkpoints": "low"}
    equal("#branches table", columns, branches["rows"])
    equal("#branches details table", columns, branches["pairs"])
    assert len(branches["pairs"]) == 1
    verdicts = page.evaluate("document.getElementById('verdicts').textContent")
    assert "Branches of 5 steps (branches-h5) against bf16: worse: x; not distinguishable: y" in (
        verdicts
    )
    along = [point for row in found["runs"] for point in (row["cast_gap"] or {}).get("along", [])]
    assert len(along) == 6
    equal("#along", {"tokens": "tokens_seen", "cast gap": "mean", "KL": "kl"}, along)


def test_a_click_sorts_the_table(page: Any) -> None:
    buttons = "[...document.querySelectorAll('#runs th button')]"
    click = f"{buttons}.find(button => button.textContent === 'val loss').click()"
    for order in (False, True):
        page.evaluate(click)
        losses = [float(x) for x in cells(page, "#runs", "val loss")]
        assert losses == sorted(losses, reverse=order)


def test_a_run_can_be_hidden(page: Any) -> None:
    count = "document.querySelectorAll('#chart path, #chart circle').length"
    toggle = "document.querySelector('#legend button[title=\"show or hide mxfp8\"]')"
    before = page.evaluate(count)
    page.evaluate(f"{toggle}.click()")
    assert page.evaluate(f"{toggle}.getAttribute('aria-pressed')") == "false"
    assert page.evaluate(count) < before
    page.evaluate(f"{toggle}.click()")
    assert page.evaluate(count) == before


def test_dragging_zooms_and_a_double_click_resets(page: Any) -> None:
    page.evaluate("document.getElementById('chart').scrollIntoView()")
    box = page.evaluate("(({x, y, width}) => [x, y, width])"
                        "(document.getElementById('chart').getBoundingClientRect())")  # fmt: skip
    whole = page.evaluate("view")
    y = box[1] + 150
    page.mouse("Pressed", box[0] + box[2] * 0.5, y)
    page.mouse("Moved", box[0] + box[2] * 0.7, y)
    page.mouse("Released", box[0] + box[2] * 0.75, y)
    zoomed = page.evaluate("view")
    assert whole[0] < zoomed[0] < zoomed[1] < whole[1]
    for clicks in (1, 2):
        page.mouse("Pressed", box[0] + box[2] * 0.5, y, clicks)
        page.mouse("Released", box[0] + box[2] * 0.5, y, clicks)
    assert page.evaluate("view") == whole
    assert page.errors == []
