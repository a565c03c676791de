"""What a run leaves behind says whose it is: moved, swapped, stale or foreign, it is found."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.plain import SEAL, sealed
from lowbit import bf16
from train.checkpoints.folder import _encode
from train.cli import main
from train.runs.casts import CastGap, write_cast_gaps
from train.runs.declaration import Group
from train.runs.run import read_run

Act = Callable[["Folders"], None]


@dataclass(frozen=True)
class Folders:
    """A sweep of bf16 and mxint8, and runs that are not of it."""

    own: Path
    foreign: Path  #: of another seed
    config: tuple[str, ...]
    out: Path

    @property
    def bf16(self) -> Path:
        return self.own / "bf16-s0"

    @property
    def mxint8(self) -> Path:
        return self.own / "mxint8-s0"


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_data: Path, recipes: Path
) -> Path:
    import torch

    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("artefacts")
    for folder, name, more in (
        ("own/bf16-s0", "bf16", ()),
        ("own/mxint8-s0", "mxint8", ()),
        ("foreign", "bf16", ("--seed_everything", "7")),
    ):
        layers = ("-c", str(tiny), "-c", str(recipes / f"{name}.yaml"))
        place = ("--data.path", str(tiny_data), "--run_dir", str(out / folder))
        short = ("--trainer.max_steps", "3", "--checkpoint_every", "1", *more)
        assert main(["fit", *layers, *place, *short]) == 0
    own = read_run(out / "own/bf16-s0").identity
    arm = read_run(out / "own/mxint8-s0").identity
    gap = CastGap(0.5, 0.1, 4, 128, of=own.plain(), under=arm.recipe_hash)
    write_cast_gaps(out / "own/bf16-s0", {"mxint8": gap})
    return out


@pytest.fixture
def folders(
    trained: Path, tmp_path: Path, tiny: Path, tiny_data: Path, recipes: Path
) -> Iterator[Folders]:
    shutil.copytree(trained, tmp_path / "t")
    config = ("-c", str(tiny), "-c", str(recipes / "bf16.yaml"), "--data.path", str(tiny_data))
    short = ("--trainer.max_steps", "3", "--checkpoint_every", "1")
    found = Folders(
        tmp_path / "t" / "own", tmp_path / "t" / "foreign", config + short, tmp_path / "out"
    )
    yield found


def edit(path: Path, change: Callable[[Any], None]) -> None:
    """By a program that means it: a seal is made anew."""
    plain = json.loads(path.read_text())
    is_sealed = plain.pop(SEAL, None)
    change(plain)
    path.write_text(json.dumps(sealed(plain) if is_sealed else plain))


def copy(a: Path, b: Path) -> None:
    shutil.rmtree(b, ignore_errors=True)
    (shutil.copytree if a.is_dir() else shutil.copyfile)(a, b)


def point(run: Path, step: int = 3) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def edited_origin(f: Folders) -> None:
    path = point(f.bf16) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["digest"]
    manifest["origin"]["identity"]["fields"]["data.seq_len"] = 16
    path.write_bytes(_encode(manifest))


def other_corpus(f: Folders) -> None:
    """config.yaml of a run moved beside another corpus of the same path: here by its path."""
    from data.prepare import PrepareRequest, prepare

    for n in range(9):
        (f.own.parent / f"{n}.txt").write_text(f"another text, the {n}th " * 200)
    request = PrepareRequest(text=(f"{f.own.parent}/*.txt",), tokenizer="bytes", val_fraction=0.3)
    prepare(f.own.parent / "tokens", request)
    path = f.bf16 / "config.yaml"
    text = path.read_text()
    before = next(line for line in text.splitlines() if line.startswith("  path: "))
    path.write_text(text.replace(before, f"  path: {f.own.parent / 'tokens'}"))


def compare(f: Folders) -> list[str]:
    return ["compare", str(f.own), "--out", str(f.out)]


def resume(f: Folders) -> list[str]:
    return ["fit", *f.config, "--run_dir", str(f.bf16)]


def evaluate(f: Folders) -> list[str]:
    text = ("--windows", "1", "--seq-len", "16")
    return ["eval", str(f.bf16), "--formats", "mxint8", *text]


def branch(f: Folders) -> list[str]:
    recipe = f.config[3]
    arms = ("--recipes", recipe, "--horizon", "1", "--branches", "1", "--out", str(f.out))
    return ["sweep", "--branch-from", str(point(f.bf16, 2)), *arms]


def set_info(key: str, value: Any) -> Act:
    return lambda f: edit(f.mxint8 / "run.json", lambda info: info.update({key: value}))


def set_field(key: str, value: Any) -> Act:
    return lambda f: edit(
        f.mxint8 / "run.json", lambda info: info["identity"]["fields"].update({key: value})
    )


def yaml(run: str, before: str, after: str) -> Act:
    def act(f: Folders) -> None:
        path = f.own / run / "config.yaml"
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))

    return act


#: what is done, what is called then, and what is said
REFUSED: dict[str, tuple[Act, Callable[[Folders], list[str]], str]] = {
    "run.json of another run": (
        lambda f: copy(f.foreign / "run.json", f.bf16 / "run.json"), compare,
        "config.yaml is not this run's: seed_everything: 7 -> 0",
    ),
    "run.json of the other arm": (
        lambda f: copy(f.bf16 / "run.json", f.mxint8 / "run.json"), compare,
        "config.yaml is not this run's: model.policy.name",
    ),
    "another recipe's name": (
        set_info("recipe", "mxfp8"), compare,
        'run.json is not this run\'s: model.policy.name: "mxint8" -> "mxfp8"',
    ),
    "another precision": (set_info("precision", "32-true"), compare, "trainer.precision"),
    "other weights' hash": (set_info("initial_weights", "0" * 64), compare, "initial_weights"),
    "an edited field": (set_field("model.optimization.lr", 0.5), compare, "its hash was made of"),
    "config.yaml of another run": (
        lambda f: copy(f.foreign / "config.yaml", f.bf16 / "config.yaml"), compare,
        "config.yaml is not this run's: seed_everything: 0 -> 7",
    ),
    "config.yaml edited": (
        yaml("mxint8-s0", "lr: 0.01", "lr: 0.02"), compare, "model.optimization.lr: 0.01 -> 0.02",
    ),
    "config.yaml edited, resumed": (
        yaml("bf16-s0", "val_windows: 4", "val_windows: 3"), resume, "data.val_windows: 4 -> 3",
    ),
    "metrics.csv of another run": (
        lambda f: copy(f.foreign / "metrics.csv", f.bf16 / "metrics.csv"), compare,
        "metrics.csv is not what this run left",
    ),
    "metrics.csv of the other arm": (
        lambda f: copy(f.bf16 / "metrics.csv", f.mxint8 / "metrics.csv"), compare,
        "metrics.csv is not what this run left",
    ),
    "checkpoint of another run": (
        lambda f: copy(point(f.foreign), point(f.bf16)), resume,
        "seed_everything: 7 -> 0",
    ),
    "checkpoint with an edited origin": (edited_origin, resume, "its hash was made of"),
    "checkpoint of another run, branched from": (
        lambda f: copy(point(f.foreign, 2), point(f.bf16, 2)), branch, "is of another run: ",
    ),
    "hf of another run": (
        lambda f: copy(f.foreign / "hf", f.bf16 / "hf"), evaluate, "hf is of another run: ",
    ),
    "hf of the other arm": (
        lambda f: copy(f.mxint8 / "hf", f.bf16 / "hf"), evaluate, "hf is of another run: ",
    ),
    "weights of the other arm": (
        lambda f: copy(f.mxint8 / "hf/model.safetensors", f.bf16 / "hf/model.safetensors"),
        evaluate, "is not what this run exported",
    ),
    "another corpus in the run's place, evaluated": (
        lambda f: other_corpus(f), evaluate, "holds another corpus than",
    ),
    "another corpus in the run's place, branched": (
        lambda f: other_corpus(f), branch, "holds another corpus than",
    ),
    "hf without its signature": (
        lambda f: (f.bf16 / "hf/lowbit.json").unlink(), evaluate, "lowbit.json is missing, and a",
    ),
    "a signature of the other arm": (
        lambda f: copy(f.mxint8 / "hf/lowbit.json", f.bf16 / "hf/lowbit.json"), compare,
        "hf/lowbit.json is not what this run left",
    ),
}  # fmt: skip
FLIPPED = {  # one byte of a file, and who finds it
    ("model.safetensors", "eval"), ("model.safetensors", "init_from"),
    ("model.safetensors", "compare"), ("config.json", "eval"), ("config.json", "compare"),
    ("tokenizer.json", "compare"), ("generation_config.json", "init_from"),
    ("README.md", "compare"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_an_artefact_of_another_run_is_refused(
    case: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    act, call, message = REFUSED[case]
    act(folders)
    assert main(call(folders)) == 2
    assert message in capsys.readouterr().err


def init_from(f: Folders) -> list[str]:
    source = ("--model.init_from", str(f.bf16 / "hf"))
    return ["fit", *f.config, "--run_dir", str(f.out), *source]


@pytest.mark.parametrize(("file", "verb"), sorted(FLIPPED))
def test_a_flipped_byte_of_an_export_is_found(
    file: str, verb: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """By what is written in the file, as a disk would flip it: size and times stay."""
    path = folders.bf16 / "hf" / file
    whole, before = bytearray(path.read_bytes()), path.stat()
    whole[-40] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    call = {"eval": evaluate, "init_from": init_from, "compare": compare}[verb]
    assert main(call(folders)) == 2
    assert f"{path} is not what this run exported" in capsys.readouterr().err
    assert not folders.out.exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "model-00002-of-00002.safetensors"])
@pytest.mark.parametrize("verb", ["eval", "init_from", "compare"])
def test_what_came_into_an_export_later_is_found(
    file: str, verb: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    (folders.bf16 / "hf" / file).write_text("{}")
    call = {"eval": evaluate, "init_from": init_from, "compare": compare}[verb]
    assert main(call(folders)) == 2
    assert f"{file} is no part of what this run exported" in capsys.readouterr().err


def extended(f: Folders) -> None:
    for run, recipe in ((f.bf16, "bf16"), (f.mxint8, "mxint8")):
        layers = ("-c", f.config[3].replace("bf16", recipe), "--run_dir", str(run))
        assert main(["fit", *f.config, *layers, "--trainer.max_steps", "4"]) == 0


STALE: dict[str, tuple[Act, str]] = {
    "of the weights before an extension": (extended, "mxint8's is of other weights"),
    "of another recipe under the name": (
        lambda f: edit(f.bf16 / "cast_gap.json", lambda g: g["mxint8"].update(under="0" * 64)),
        "mxint8's is under another recipe",
    ),
    "by other BF16 products": (
        lambda f: edit(f.bf16 / "cast_gap.json", lambda g: g["mxint8"].update(bf16_products="x")),
        "mxint8's is with BF16 products 'x', not the run's",
    ),
    "of another run's weights": (
        lambda f: edit(
            f.bf16 / "cast_gap.json",
            lambda g: g["mxint8"].update(of=read_run(f.foreign).identity.plain()),
        ),
        "mxint8's is of other weights, ",
    ),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_cast_gap_is_not_shown(
    case: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(compare(folders)) == 0
    assert "+0.50000 ± 0.10000" in capsys.readouterr().out
    act, message = STALE[case]
    act(folders)
    capsys.readouterr()
    assert main(compare(folders)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert message in out and "+0.50000 ± 0.10000" not in out


def test_hf_of_an_earlier_end_is_not_evaluated(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folders.bf16.parent / "hf"
    shutil.copytree(folders.bf16 / "hf", before)
    extended(folders)
    shutil.rmtree(folders.bf16 / "hf")
    before.rename(folders.bf16 / "hf")
    assert main(evaluate(folders)) == 0
    assert "step-00000004 (not hf/, which is of step 3)" in capsys.readouterr().out


def test_rows_come_along_to_a_fresh_folder(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where they cannot, it is said."""
    place = ("--run_dir", str(folders.out), "--resume", str(point(folders.bf16, 2)))
    assert main(["fit", *folders.config, *place]) == 0
    assert "the rows up to step 2 are those of" in capsys.readouterr().out
    whole, found = read_run(folders.bf16), read_run(folders.out)
    assert found.metrics["train/loss"].tolist() == whole.metrics["train/loss"].tolist()
    assert found.identity.hash == whole.identity.hash
    alone = folders.out.parent / "alone" / "checkpoints" / "step-00000002"
    alone.parent.mkdir(parents=True)
    point(folders.bf16, 2).rename(alone)
    place = ("--run_dir", str(folders.out.parent / "new"), "--resume", str(alone))
    assert main(["fit", *folders.config, *place]) == 0
    assert "lacks the rows up to step 2" in capsys.readouterr().out


def sweep(f: Folders, *more: str, recipe: str = "bf16") -> int:
    recipes = ("--recipes", f.config[3].replace("bf16", recipe))
    place = ("--out", str(f.own), "-c", f.config[1], *recipes)
    return main(["sweep", *place, "--", *f.config[4:], *more])


SWEEPS: dict[str, tuple[tuple[str, ...], str]] = {
    "rate": (("--model.optimization.lr", "5e-3"), "model.optimization.lr: 0.01 -> 0.005"),
    "length": (("--data.seq_len", "16"), "data.seq_len: 32 -> 16"),
    "width": (("--model.llama.hidden_size", "32"), "model.llama.init_args.hidden_size: 64 -> 32"),
    "no key": (("--model.foo", "1"), "model.foo"),
    "shorter": (("--trainer.max_steps", "2"), "planned with 3 steps, not 2"),
}


@pytest.mark.parametrize("case", SWEEPS)
def test_a_sweep_called_with_other_arguments_is_refused(
    case: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = SWEEPS[case]
    assert sweep(folders, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("case", ["rate", "length", "width"])
def test_two_sweeps_in_one_folder_are_refused(
    case: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose runs would be no pairs; before anything is begun."""
    arguments, message = SWEEPS[case]
    assert sweep(folders, *arguments, recipe="mxfp8") == 2
    assert f"holds another sweep: {message} from" in capsys.readouterr().err
    assert not (folders.own / "mxfp8-s0").exists()


def test_a_finished_sweep_is_done(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    from train.sweep.agreement import check_folder, ended_runs
    from train.sweep.request import SweepRequest

    files = tuple(Path(folders.config[3].replace("bf16", name)) for name in ("bf16", "mxint8"))
    more, tiny = folders.config[4:], (Path(folders.config[1]),)
    request = SweepRequest(folders.own, tiny, files, (0,), {}, more)
    check_folder(request.runs(), request.config)
    assert ended_runs(request.runs(), request.config) == {folders.bf16, folders.mxint8}
    more += ("--trainer.max_steps", "5")
    longer = SweepRequest(folders.own, tiny, files, (0,), {}, more)
    assert ended_runs(longer.runs(), longer.config) == set()


def test_branches_stay_out_of_a_folder_of_runs(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = branch(folders)
    argv[-1] = str(folders.own)
    assert main(argv) == 2
    assert "holds runs: choose another for branches" in capsys.readouterr().err
    assert not (folders.own / "branches.json").exists()


def test_branches_of_another_run_are_no_part_of_a_comparison(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(branch(folders)) == 0
    assert main(["compare", str(folders.own), str(folders.out)]) == 0
    capsys.readouterr()
    assert main(["compare", str(folders.foreign), str(folders.out)]) == 2
    assert "is of none of these runs: " in capsys.readouterr().err


def of_another(artefact: str) -> tuple[Act, Callable[[Folders], list[str]], str]:
    """What was made of the mxint8 run, holding weights that were not."""

    def make(f: Folders) -> list[str]:
        if artefact == "export":
            return ["export", str(f.mxint8), str(f.out), "--layout", "bf16"]
        rule = ("--format", "mxint8", "--method", "rtn", "--observer", "minmax")
        return ["quantize", str(f.mxint8), str(f.out), *rule]

    def act(f: Folders) -> None:
        assert main(make(f)) == 0
        name = next(f.out.glob("*.safetensors")).name
        copy(f.bf16 / "hf" / "model.safetensors", f.out / name)

    def call(f: Folders) -> list[str]:
        text = ("--windows", "1", "--seq-len", "16")
        return ["eval", str(f.out), "--against", str(f.bf16), *text]

    return act, call, "is not what was written"


MADE = {"export with other weights": "export", "quantized with other weights": "quantize"}


@pytest.mark.parametrize("case", MADE)
def test_what_was_made_of_a_run_and_changed_is_refused(
    case: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    act, call, message = of_another(MADE[case])
    act(folders)
    assert main(call(folders)) == 2
    assert message in capsys.readouterr().err


def test_a_report_names_the_runs_it_is_of(folders: Folders) -> None:
    """By their identity, so that a page of other runs is told from it."""
    assert main(compare(folders)) == 0
    rows = json.loads((folders.out / "compare.json").read_text())["runs"]
    hashes = [read_run(path).identity.hash for path in (folders.bf16, folders.mxint8)]
    assert [row["identity"] for row in rows] == hashes


#: the 20 cases of issue 19's bar 5, and more: each is a test of this file
ARTEFACTS = {
    "run.json": ("run.json of another run", "run.json of the other arm", "an edited field"),
    "config.yaml": ("config.yaml of another run", "config.yaml edited"),
    "metrics.csv": ("metrics.csv of another run", "metrics.csv of the other arm"),
    "checkpoint": (
        "checkpoint of another run", "checkpoint with an edited origin",
        "checkpoint of another run, branched from",
    ),
    "hf": (
        "hf of another run", "hf of the other arm", "weights of the other arm",
        "hf without its signature", "a signature of the other arm",
    ),
    "corpus": (
        "another corpus in the run's place, evaluated",
        "another corpus in the run's place, branched",
    ),
    "cast gap": (
        "of the weights before an extension", "of another recipe under the name",
        "by other BF16 products", "of another run's weights",
    ),
    "sweep": ("rate", "length", "width", "no key", "shorter"),
    "made of it": ("export with other weights", "quantized with other weights"),
}  # fmt: skip


def test_every_artefact_has_its_cases() -> None:
    """Branches, golden curves, an earlier end's hf/ and a report have tests of their own."""
    cases = [case for cases in ARTEFACTS.values() for case in cases]
    assert len({*cases}) == len(cases) >= 20
    assert {*cases} <= {*REFUSED, *STALE, *SWEEPS, *MADE}


def test_golden_curves_of_another_run_are_no_pair(
    folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = folders.out / "golden.json"
    assert main([*compare(folders), "--export", str(golden)]) == 0
    assert main([*compare(folders), "--import", str(golden), "--assert-equal"]) == 0
    edit(golden, lambda g: g["runs"][0]["info"]["identity"]["fields"].update({"data.seq_len": 1}))
    assert main([*compare(folders), "--import", str(golden)]) == 2
    assert "its hash was made of" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["notes", "{}", '{"format_version": 2}'])
def test_an_export_of_curves_overwrites_curves_alone(
    text: str, folders: Folders, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = folders.own.parent / "mine.json"
    mine.write_text(text)
    assert main([*compare(folders), "--export", str(mine)]) == 2
    assert "choose another file" in capsys.readouterr().err
    assert mine.read_text() == text and not folders.out.exists()


# --- runs of an older lowbit --------------------------------------------------------------------

OLD = Path(__file__).parent / "old_runs"  # of commit 4f99648, without an identity
KEPT = Path(__file__).parent / "kept_runs"  # of commit 84f2699
OLD_CONFIG = """
model:
  llama: {hidden_size: 8, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 1, vocab_size: 257, max_position_embeddings: 32, tie_word_embeddings: true}
  optimization: {lr: 1.0e-2, warmup_steps: 1}
data: {seq_len: 32, global_batch_size: 4, val_windows: 4}
trainer: {max_steps: 4, val_check_interval: 2, accelerator: cpu, accumulate_grad_batches: 2}
checkpoint_every: 2
"""
SAID = {OLD: "is of an older lowbit: data.val_choice is first", KEPT: "resumed after step 2"}


def test_old_runs_are_read_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent = "Without an identity, of an older lowbit: bf16 s0, bf16_perturbed s0"
    for folder in (OLD, KEPT):
        assert main(["compare", str(folder), "--out", str(tmp_path)]) == 0
        assert (silent in " ".join(capsys.readouterr().out.split())) is (folder is OLD)
        assert read_run(folder / "bf16-s0").identity.fields["trainer.val_check_interval"] == 2
    kept = read_run(KEPT / "bf16-s0")
    written = kept.info["identity"]["fields"].items()
    assert written <= kept.identity.fields.items()  # as it stands there


@pytest.mark.parametrize("old", [OLD, KEPT], ids=["4f99648", "84f2699"])
def test_an_old_run_goes_on(
    old: Path,
    tmp_path: Path,
    tiny_data: Path,
    recipes: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From step 2, with its own windows; a changed field is refused by its name."""
    shutil.copytree(old / "bf16-s0", tmp_path / "bf16-s0")
    config = tmp_path / "old.yaml"
    config.write_text(OLD_CONFIG)
    layers = ("-c", str(config), "-c", str(recipes / "bf16.yaml"), "--data.path", str(tiny_data))
    argv = ["fit", *layers, "--run_dir", str(tmp_path / "bf16-s0")]
    with bf16.using("native"):  # as they were
        assert main([*argv, "--model.optimization.lr", "0.5"]) == 2
        assert "model.optimization.lr: 0.01 -> 0.5" in capsys.readouterr().err
        assert main(argv) == 0
    assert SAID[old] in capsys.readouterr().out
    before, after = read_run(old / "bf16-s0"), read_run(tmp_path / "bf16-s0")
    for name in ("train/loss", "val/loss", "lr"):
        assert after.metrics[name].tolist() == pytest.approx(
            before.metrics[name].tolist(), rel=1e-4, nan_ok=True
        )
    assert after.identity.differences(before.identity, Group.SHARED, Group.SEED) == []
    assert len(after.info["segments"]) == 1
