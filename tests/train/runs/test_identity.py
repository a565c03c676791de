"""A run is one value: every field declared, stable bytes, and nothing else may differ in a pair."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.compare.pairing import Contrast, check_pairing
from train.config.strict_yaml import load_yaml
from train.fit.configuration import Resolving
from train.runs import declaration
from train.runs.declaration import ALIASES, DECLARATION, Group, any_covers, declared_key
from train.runs.identity import Identity, canonical, digest, flat, is_replaced, read_identity
from train.runs.run import Run, read_run, read_runs

Fit = Callable[..., int]
CONFIGS = Path(__file__).parents[3] / "configs"
BASE = CONFIGS / "model" / "quickstart.yaml"
OTHERS = {"format", "ptq", "sweep"}  # no layers of a run's configuration
LAYERS = [path for path in sorted(CONFIGS.glob("*/*.yaml")) if path.parent.name not in OTHERS]


@pytest.mark.parametrize(
    "value",
    [Path("a"), {1: 2}, {"a": {3}}, object(), len, np.float64(1), np.int64(1), float("nan")],
)
def test_a_value_without_stable_bytes_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="identity: "):
        canonical({"field": value})


def test_bytes_tell_types_apart_and_orders_not() -> None:
    assert len({canonical(value) for value in (1, 1.0, True, "1", None, [1])}) == 6
    assert canonical({"a": 1, "b": (0.1, 2)}) == canonical({"b": [0.1, 2], "a": 1})
    assert digest({"lr": 1e-3}) == digest(json.loads('{"lr": 0.001}'))


def undeclared(config: Mapping[str, Any]) -> list[str]:
    return [key for key in flat(config) if not is_replaced(key) and declared_key(key) is None]


def test_every_key_of_every_configuration_is_declared() -> None:
    """Of the defaults, and of each shipped file that sets what they do not hold."""
    first = ["-c", str(BASE), "-c", str(CONFIGS / "recipe" / "bf16.yaml")]
    config = Resolving("fit", first).plain_config()
    defaults = flat(config).keys()
    assert undeclared(config) == []
    for path in LAYERS:
        if not flat(load_yaml(path.read_text())).keys() <= defaults:
            assert undeclared(Resolving("fit", [*first, "-c", str(path)]).plain_config()) == [], (
                path
            )
    assert undeclared(config | {"new_flag": 1}) == ["new_flag"]
    config["data"]["shuffle"] = True
    assert undeclared(config) == ["data.shuffle"]


def test_every_key_is_declared_once_and_a_key_without_a_field_is_none() -> None:
    keys = [key for keys in declaration._KEYS.values() for key in keys]
    assert len(keys) == len(set(keys))
    with pytest.raises(ValueError, match=r"the field data\.shuffle is not"):
        Identity({"data.shuffle": True}).part(Group.SHARED)


def test_an_identity_that_was_edited_is_refused() -> None:
    plain = Identity({"data.seq_len": 8, "model.policy.name": "bf16"}).plain()
    assert read_identity(plain, "x").fields == plain["fields"]
    plain["fields"]["data.seq_len"] = 9
    with pytest.raises(ValueError, match="x: its identity's fields are not those that its hash"):
        read_identity(plain, "x")


# --- pairs --------------------------------------------------------------------------------------

SHORT = ("--trainer.max_steps", "5", "--trainer.val_check_interval", "5")


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny: Path, tiny_data: Path, recipes: Path
) -> Path:
    """Five steps of bf16 and mxint8."""
    from train.cli import main

    out = tmp_path_factory.mktemp("sweep")
    for name in ("bf16", "mxint8"):
        layers = ("-c", str(tiny), "-c", str(recipes / f"{name}.yaml"))
        place = ("--data.path", str(tiny_data), "--run_dir", str(out / f"{name}-s0"))
        assert main(["fit", *layers, *place, *SHORT]) == 0
    return out


def other(value: Any, rng: random.Random) -> Any:
    """Another value of its type."""
    match value:
        case bool():
            return not value
        case int():
            return value + rng.randint(1, 9)
        case float():
            return value + rng.uniform(0.1, 0.9)
        case str():
            return value + rng.choice("abc")
        case list():
            return [*value, rng.random()]
    return rng.choice(["given", 1, 0.5, True])


def test_300_random_pairs_have_no_unnamed_difference(trained: Path) -> None:
    """One to three fields changed at random, out of all that two real runs hold."""
    rng = random.Random(0)
    a, b = read_runs([trained])
    moving = (Group.SHARED, Group.SEED, Group.RECIPE, Group.NAMED)
    hit = set()
    for _ in range(300):
        fields = rng.sample(sorted(b.identity.fields), rng.randint(1, 3))
        changed = {field: other(b.identity.fields[field], rng) for field in fields}
        hit |= set(fields)
        varied = replace(b)
        varied.__dict__["identity"] = Identity({**b.identity.fields, **changed})
        said = screen(a, varied)
        for field in fields:
            group = DECLARATION[str(declared_key(field))]
            is_free = group is Group.FREE
            same = a.identity.fields.get(field) == changed[field]  # by chance
            assert is_free or same or names(said, field), (field, said)
            before = varied.identity.part(*moving) == b.identity.part(*moving)
            assert not before or is_free
    assert len(hit) > 100


def names(said: str, field: str) -> bool:
    short = [field.replace(key, name, 1) for name, key in ALIASES.items() if field.startswith(key)]
    last = field.rpartition(".")[2]
    return any(re.search(rf"\b{re.escape(name)}\b", said) for name in (field, *short, last))


def screen(a: Run, b: Run) -> str:
    """All that a person is told about the two, refused or allowed."""
    from train.compare.pairing import circumstances, gathered

    beside = " ".join(circumstances([a, b]))
    try:
        said = check_pairing([a, b])
    except ValueError as error:
        allowed = str(error).partition("--allow ")[2].rstrip(")").split()
        assert [*check_pairing([a, b], allowed)]
        return f"{error} {Contrast(a, b).plain()} {beside}"
    recipe = gathered(Contrast(a, b).recipe)
    return " ".join([*said, beside, recipe])


#: what `lowbit fit` is given besides, and whether the first five rows and validation stay
REAL = {
    "the same": ((), True),
    "workers": (("--data.num_workers", "1"), True),
    "cadence": (("--checkpoint_every", "2", "--keep_checkpoints", "4"), True),
    "recomputed": (("--model.gradient_checkpointing", "true"), True),
    "bf16 beside": (("--model.validate_bf16", "true"), True),
    "lr": (("--model.optimization.lr", "2e-2"), False),
    "clipping": (("--model.optimization.max_grad_norm", "0.1"), False),
    "windows": (("--data.val_windows", "3"), False),
    "precision": (("--trainer.precision", "32-true"), False),
    "accumulation": (("--trainer.accumulate_grad_batches", "2"), False),
    "dropout": (("--model.llama.attention_dropout", "0.2"), False),
}


@pytest.mark.parametrize("case", REAL)
def test_one_identity_is_one_run_to_the_bit(
    case: str, trained: Path, fit: Fit, tmp_path: Path, recipes: Path
) -> None:
    arguments, stays = REAL[case]
    assert fit(tmp_path / "mxint8-s0", "mxint8", *SHORT, *arguments) == 0
    first, second = read_run(trained / "mxint8-s0"), read_run(tmp_path / "mxint8-s0")
    columns = ("train/loss", "grad_norm", "lr", "val/loss")
    rows = [[run.metrics[name].tolist() for name in columns] for run in (first, second)]
    assert (first.identity.hash == second.identity.hash) is stays
    assert (repr(rows[0]) == repr(rows[1])) is stays
    base = read_run(trained / "bf16-s0")
    pair = [replace(base, label="bf16"), replace(second, label="mxint8")]
    if stays:
        assert check_pairing(pair) == []
    else:
        key = arguments[0].removeprefix("--").replace("model.llama", "model")
        with pytest.raises(ValueError, match=f"{key} differs: .*--allow"):
            check_pairing(pair)


SMALL = """
model:
  llama: {hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
    num_key_value_heads: 1, vocab_size: 320, max_position_embeddings: 64, attention_dropout: 0.1}
  optimization: {lr: 1.0e-2, warmup_steps: 1}
data: {seq_len: 16, global_batch_size: 4, val_windows: 4}
trainer: {max_steps: 3, val_check_interval: 2, accelerator: cpu}
"""
#: options of `lowbit fit`: what moves no row, then what may
FREE = {
    "data.num_workers": ["1"], "checkpoint_every": ["1", "2"], "keep_checkpoints": ["3"],
    "disk_full": ["continue"], "trainer.log_every_n_steps": ["1"], "collective_timeout": ["60"],
    "model.gradient_checkpointing": ["true"], "model.keep.quantized_weights": ["true"],
    "model.validate_bf16": ["true"], "trainer.detect_anomaly": ["true"],
}  # fmt: skip
MOVING = {
    "model.optimization.lr": ["2e-2", "5e-3"], "model.optimization.weight_decay": ["0.5"],
    "model.optimization.max_grad_norm": ["0.1"], "model.optimization.warmup_steps": ["0", "3"],
    "model.optimization.min_lr_ratio": ["0.5"], "model.llama.rms_norm_eps": ["1e-2"],
    "model.llama.attention_dropout": ["0"], "model.llama.hidden_act": ["gelu"],
    "model.llama.tie_word_embeddings": ["true"], "model.llama.initializer_range": ["0.1"],
    "data.seq_len": ["8", "32"], "data.global_batch_size": ["2"], "data.val_windows": ["3"],
    "data.val_choice": ["first"], "data.document_masking": ["true"],
    "trainer.precision": ["32-true"], "trainer.accumulate_grad_batches": ["2"],
    "trainer.val_check_interval": ["1", "3"], "trainer.max_steps": ["4"],
    "trainer.limit_val_batches": ["0"], "model.policy.recipe.wgrad_input": ["mxfp8"],
}  # fmt: skip
COLUMNS = ("train/loss", "grad_norm", "lr", "val/loss", "tokens_seen")


@pytest.mark.slow
def test_300_pairs_of_runs_that_were_trained(
    tmp_path: Path, recipes: Path, tiny_data: Path, capsys: Any
) -> None:
    """25 runs, each with another: one identity is one curve to the bit; what moves it is named."""
    from train.cli import main

    rng, runs = random.Random(19), []
    (tmp_path / "small.yaml").write_text(SMALL)
    for index in range(25):
        chosen = rng.sample(sorted(FREE), rng.randint(0, 2))
        chosen += rng.sample(sorted(MOVING), 0 if index < 6 else rng.randint(1, 2))
        flags = [x for n in chosen for x in (f"--{n}", rng.choice({**FREE, **MOVING}[n]))]
        recipe = rng.choice(["bf16", "mxint8"] if index >= 6 else ["mxint8"])
        layers = ["-c", str(tmp_path / "small.yaml"), "-c", str(recipes / f"{recipe}.yaml")]
        place = ["--data.path", str(tiny_data), "--run_dir", str(tmp_path / f"r{index}")]
        assert main(["fit", *layers, *place, *flags]) == 0, flags
        runs.append(replace(read_run(tmp_path / f"r{index}"), label=f"r{index}"))
    equal, pairs = 0, [(a, b) for i, a in enumerate(runs) for b in runs[i + 1 :]]
    for a, b in pairs:
        rows = [repr([x.metrics[n].tolist() for n in COLUMNS if n in x.metrics]) for x in (a, b)]
        if a.identity.hash == b.identity.hash:
            equal += 1
            assert rows[0] == rows[1], (a.path, b.path)
        said = screen(a, b)
        groups = (Group.SHARED, Group.SEED, Group.RECIPE)
        for difference in a.identity.differences(b.identity, *groups):
            assert names(said, difference.field), (difference, said)
        assert rows[0] == rows[1] or a.identity.hash != b.identity.hash
    assert len(pairs) == 300 and equal >= 10


def test_a_declared_difference_is_in_the_name_and_the_sentence(
    trained: Path, fit: Fit, tmp_path: Path, capsys: Any
) -> None:
    from train.cli import main

    key = "model.optimization.lr"
    run = tmp_path / "mxint8-lr2-s0"
    assert fit(run, "mxint8", *SHORT, f"--{key}", "2e-2", "--declared", json.dumps([key])) == 0
    assert main(["compare", str(trained / "bf16-s0"), str(run), "--out", str(tmp_path / "c")]) == 0
    assert "mxint8 at lr 0.02 against bf16 at lr 0.01: gap" in capsys.readouterr().out
    found = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert found["pairs"][0]["differs"] == {key: [0.01, 0.02]}
    plain = tmp_path / "mxint8-s0"
    assert fit(plain, "mxint8", *SHORT, f"--{key}", "2e-2") == 0
    runs = [str(trained / "bf16-s0"), str(plain), "--out", str(tmp_path / "c")]
    assert main(["compare", *runs]) == 2
    assert f"{key} differs: 0.01 in" in capsys.readouterr().err
    assert main(["compare", *runs, "--allow", key]) == 0
    out = capsys.readouterr().out
    assert f"Allowed: {key} differs" in out and f"not by the recipe alone: {key}" in out
    with pytest.raises(SystemExit):
        main(["compare", *runs, "--allow", "lrr"])


def test_covers() -> None:
    assert any_covers(["model"], "architecture.hidden_size")
    assert not any_covers(["data.seq"], "data.seq_len")


# --- time ---------------------------------------------------------------------------------------


def test_an_extension_is_a_segment_and_no_pair(
    trained: Path, fit: Fit, tmp_path: Path, capsys: Any
) -> None:
    """The rate of the log is the schedule's and the optimizer's; phases of steps done stay."""
    import shutil

    from train.checkpoints.folder import complete_checkpoints, load_state
    from train.model.schedule import warmup_cosine

    run, straight = tmp_path / "bf16-s0", tmp_path / "mxint8-s0"
    shutil.copytree(trained / "bf16-s0", run)
    longer = ("--trainer.max_steps", "8", "--trainer.val_check_interval", "5")
    assert fit(run, "bf16", *longer) == 0
    assert "a new segment from step 6 on: max_steps 5 -> 8" in capsys.readouterr().out
    found = read_run(run)
    assert [s["first_step"] for s in found.info["segments"]] == [1, 6]
    assert [s["after_step"] for s in found.info["starts"]] == [0, 5]
    factors = [
        warmup_cosine(i, warmup_steps=2, max_steps=5 if i < 5 else 8, min_ratio=0.1)
        for i in range(8)
    ]
    assert found.metrics["lr"].tolist() == [0.01 * factor for factor in factors]
    assert found.val_curve[0].tolist() == [5 * 256, 8 * 256]  # the last weights too
    (state,) = load_state(complete_checkpoints(run / "checkpoints")[-1])["optimizer_states"]
    assert state["param_groups"][0]["lr"] == 0.01 * 0.1
    assert fit(straight, "mxint8", *longer) == 0
    with pytest.raises(ValueError, match="segments differs"):
        check_pairing(read_runs([tmp_path]))


def test_an_error_is_gone_once_the_run_goes_on(
    fit: Fit, tmp_path: Path, on_micro_batch: Callable[..., None]
) -> None:
    def fail(module: Any) -> None:
        raise OSError("a disk was gone")

    on_micro_batch(3, fail)
    assert fit(tmp_path / "run", "bf16", *SHORT, "--checkpoint_every", "1") == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["error"] == "a disk was gone"
    on_micro_batch(-1, fail)
    assert fit(tmp_path / "run", "bf16", *SHORT, "--checkpoint_every", "1") == 0
    assert "error" not in json.loads((tmp_path / "run" / "run.json").read_text())


@pytest.mark.parametrize("every", ["0", "0.25", "00:10:00"])
def test_an_interval_that_is_no_number_of_steps_is_refused(
    fit: Fit, tmp_path: Path, every: str, capsys: Any
) -> None:
    assert fit(tmp_path / "run", "bf16", "--trainer.val_check_interval", every) == 2
    assert "expected a whole number of optimizer steps" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
