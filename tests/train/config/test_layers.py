"""Files one after another: what replaces what, and what a policy is called."""

import json
import random
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from lowbit import QuantRecipe
from train.cli import main
from train.config.layers import Layers
from train.config.policies import read_policy
from train.config.strict_yaml import load_yaml
from train.sweep.continuation import build_module
from train.sweep.request import Variant

CONFIGS = Path(__file__).parents[3] / "configs"
POLICIES = sorted([*(CONFIGS / "recipe").glob("*.yaml"), *(CONFIGS / "control").glob("*.yaml")])
MODEL = str(CONFIGS / "model" / "quickstart.yaml")
RECIPE = str(CONFIGS / "recipe" / "{}.yaml")
Fit = Callable[..., int]


def test_the_last_policy_is_the_runs_own() -> None:
    """50 pairs of shipped recipes and controls, in both orders: nothing of the first is left."""
    alone = {path: Layers.read(["-c", MODEL, "-c", str(path)]).plain for path in POLICIES}
    pairs = random.Random(0).sample([*permutations(POLICIES, 2)], 50)
    for pair in pairs:
        for first, last in (pair, pair[::-1]):
            both = Layers.read(["-c", MODEL, "-c", str(first), "-c", str(last)])
            assert both.plain == alone[last], (first.stem, last.stem)


SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (
    ("recipe/mxint8", "recipe/nvfp4"), ("recipe/nvfp4", "recipe/mxint8"),
    ("control/bf16_perturbed", "recipe/mxfp8"), ("recipe/bf16", "control/bf16_noise_mxint8"),
)]  # fmt: skip
TRAINED = [("recipe/nvfp4", "recipe/bf16"), ("control/bf16_noise_mxint8", "recipe/bf16"), *SLOW]


@pytest.mark.parametrize(("first", "last"), TRAINED)
def test_a_run_under_the_last_policy_is_that_policys_to_the_bit(
    first: str, last: str, fit: Fit, tmp_path: Path, capsys: Any,
    assert_same_run: Callable[..., None],
) -> None:  # fmt: skip
    """Weights, optimizer and rows after a step."""
    alone, after = tmp_path / "alone", tmp_path / "after"
    steps = ("--trainer.max_steps", "1", "--model.optimization.warmup_steps", "0")
    assert fit(alone, f"../{last}", *steps) == 0
    assert fit(after, f"../{first}", "-c", str(CONFIGS / f"{last}.yaml"), *steps) == 0
    error = capsys.readouterr().err
    assert f"{last}.yaml ({Path(last).stem}) replaces that of" in error
    assert f"{first}.yaml ({Path(first).stem})" in error
    assert_same_run(after, alone)
    records = [json.loads((run / "run.json").read_text()) for run in (alone, after)]
    assert records[0]["control"] == records[1]["control"]
    assert records[0]["identity"] == records[1]["identity"]


BASE = """
model:
  llama: {hidden_size: 64, num_hidden_layers: 2, attention_dropout: 0.1,
    rope_parameters: {rope_type: llama3, factor: 8.0, rope_theta: 500000.0}}
  optimization: {lr: 0.5, warmup_steps: 7}
  keep: {quantized_weights: true}
trainer:
  max_steps: 9
  strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, init_args: {static_graph: true}}
diagnostics: {formats: [mxint8], every_n_steps: 3}
"""
ABOVE = """
model:
  llama: {hidden_size: 32, num_hidden_layers: 4, rope_parameters: {rope_type: default}}
  optimization: {lr: 0.25}
  keep: {quantized_inputs: true}
trainer:
  strategy: {class_path: lightning.pytorch.strategies.DDPStrategy}
diagnostics: {formats: [mxfp8]}
"""
REPLACED = ("model.llama", "trainer.strategy", "diagnostics")
BY_FIELD = ("model.optimization", "model.keep")


def at(plain: Any, key: str) -> Any:
    for part in key.split("."):
        plain = plain[part]
    return plain


@pytest.mark.parametrize(("first", "last"), [(BASE, ABOVE), (ABOVE, BASE)])
def test_what_replaces_and_what_is_merged(first: str, last: str) -> None:
    found = Layers.read(["-c", first, "-c", last]).plain
    for key in REPLACED:
        assert at(found, key) == at(load_yaml(last), key)
    for key in BY_FIELD:
        assert at(found, key) == at(load_yaml(first), key) | at(load_yaml(last), key)
    assert found["trainer"]["max_steps"] == 9


def test_fields_of_an_architecture_change_it() -> None:
    """A file that says neither width nor depth is no architecture of its own."""
    fields = "{model: {llama: {attention_dropout: 0.5, rope_parameters: {rope_type: default}}}}"
    found = Layers.read(["-c", BASE, "-c", fields]).plain["model"]["llama"]
    assert (found["hidden_size"], found["attention_dropout"]) == (64, 0.5)
    assert found["rope_parameters"] == {"rope_type": "default"}  # no factor of the other type
    written = {
        "class_path": "transformers.LlamaConfig",
        "init_args": load_yaml(BASE)["model"]["llama"],
    }
    again = Layers.read(["-c", json.dumps({"model": {"llama": written}}), "-c", fields]).plain
    assert again["model"]["llama"] == found  # over a config.yaml


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (("recipe.fprop_input", "mxfp8"), "mxint8+fprop_input=mxfp8"),
        (("recipe.fprop_input", "{name: mxint8, block_size: 64}"),
         "mxint8+fprop_input=name-mxint8-block-size-64"),
        (("recipe.fprop_input", "{name: mxint8, block_size: -1}"),
         "mxint8+fprop_input=name-mxint8-block-size--1"),
        (("recipe.fprop_input", "{name: mxint8, block_size: 1}"),
         "mxint8+fprop_input=name-mxint8-block-size-1"),
        (("keep_last", "1"), "mxint8+keep_last=1"),
        (("phases", "[{start: 0.8}]"), "mxint8+phases=start-0.8"),
        (("recipe", "{}"), "mxint8+recipe=none"),
        (("keep_last", "0"), "mxint8"),
        (("recipe", "mxint8"), "mxint8"),
        (("name", "mine"), "mine"),
    ],
)  # fmt: skip
def test_a_flag_that_changes_a_policy_shows_in_its_name(flags: tuple[str, str], name: str) -> None:
    flag = f"--model.policy.{flags[0]}"
    first = Layers.read([f"{flag}={flags[1]}", "-c", MODEL, "-c", RECIPE.format("mxint8")]).plain
    assert first["model"]["policy"]["name"] == name
    again = Layers.read(["-c", json.dumps(first), flag, flags[1]]).plain
    assert again == first  # given once more beside the run's own config.yaml


def test_a_control_on_the_command_line_shows_in_the_name() -> None:
    arguments = ["-c", MODEL, "-c", RECIPE.format("mxint8"), "--model.control", "noise"]
    plain = Layers.read(arguments).plain
    assert plain["model"]["policy"]["name"] == "mxint8+control=noise"


def test_a_long_name_still_is_one() -> None:
    rule = "{pattern: '*.down_proj', recipe: mxfp4}, {pattern: '*.%s_proj', recipe: mxfp6}"
    found = (
        Layers.read(["-c", RECIPE.format("mxint8"), "--model.policy.rules", f"[{rule % name}]"])
        for name in ("up", "gate")
    )
    names = [layers.plain["model"]["policy"]["name"] for layers in found]
    assert names[0].startswith("mxint8+") and len(set(names)) == 2 and max(map(len, names)) <= 64


@pytest.mark.parametrize("place", ["policy", "rules"])
def test_a_formats_name_is_a_uniform_recipe(place: str) -> None:
    policy = {
        "policy": "{name: mine, recipe: mxfp6}",
        "rules": "{name: mine, rules: [{pattern: '*.up_proj', recipe: mxfp6}]}",
    }[place]
    found = read_policy(Layers.read(["--model.policy", policy]).plain["model"]["policy"])
    recipe = found.recipe if place == "policy" else found.rules[0].recipe
    assert recipe == QuantRecipe.uniform("mxfp6")


NAMED = {
    "bf16 that quantizes": ("{name: bf16, recipe: mxint8}", "bf16 with quantized operands"),
    "bf16 by a rule": (
        "{name: bf16, rules: [{pattern: '*.up_proj', recipe: mxfp6}]}",
        "bf16 with quantized operands",
    ),
    "mxint8 in two operands": (
        "{name: mxint8, recipe: {fprop_input: mxint8, fprop_weight: mxint8}}",
        "differs in recipe",
    ),
    "nvfp4 without its phase": ("{name: nvfp4, recipe: nvfp4}", "differs in recipe, keep_last"),
    "a control without control": ("{name: bf16_perturbed, recipe: {}}", "differs in control"),
}


VERBS = ("fit", "validate", "plan", "fit", "plan")


@pytest.mark.parametrize(("case", "verb"), [*zip(NAMED, VERBS, strict=True)])
def test_a_shipped_name_means_the_shipped_recipe(
    verb: str, case: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    policy, message = NAMED[case]
    assert main([verb, "-c", MODEL, "-c", f"{{model: {{policy: {policy}}}}}"]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert message in line
    assert not any(tmp_path.iterdir())


def test_a_branch_takes_no_false_name(tmp_path: Path) -> None:
    own = tmp_path / "bf16.yaml"
    own.write_text("model: {policy: {name: bf16, recipe: mxint8}}")
    model = {"model": {"policy": {"name": "nvfp4"}}}
    with pytest.raises(ValueError, match="bf16 with quantized operands"):
        build_module(model, Variant("bf16", "", own, {}))


REFUSED = {
    "a control alone": (("-c", "{model: {control: noise}}"), "without a model.policy.name"),
    "a policy without a name": (
        ("-c", "{model: {policy: {keep_last: 1}}}"),
        "without a model.policy.name",
    ),
    "an empty file": (("-c", "EMPTY"), "is empty, expected a mapping"),
    "no mapping": (("-c", "TEXT"), "holds 'just words', expected a mapping"),
    "no such file": (("-c", "nowhere.yaml"), "nowhere.yaml cannot be read: No such file"),
    "no value": (("--model.policy.name",), "a value is missing"),
    "a format's field": (
        ("--model.policy.recipe.fprop_input.block_size", "64"),
        "is 'mxint8', which has no fields",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_laid_over_is_one_line(case: str, tmp_path: Path, capsys: Any) -> None:
    arguments, message = REFUSED[case]
    for name, text in (("EMPTY", "# nothing\n"), ("TEXT", "just words\n")):
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / a) if a in ("EMPTY", "TEXT") else a for a in arguments]
    assert main(["fit", "-c", MODEL, "-c", RECIPE.format("mxint8"), *paths]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
