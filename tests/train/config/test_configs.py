"""Every model, trainer and recipe parses; wrong input is one line, exit code 2, nothing written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.recipe import OPERANDS
from train.cli import main
from train.config.formats import read_format, write_format
from train.config.strict_yaml import load_yaml
from train.fit.configuration import Resolving, RunCLI
from train.plan.plan import PlanCLI, Workload

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"
RECIPES = sorted((CONFIGS / "recipe").glob("*.yaml"))
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
TRAINERS = sorted((CONFIGS / "trainer").glob("*.yaml"))
Fit = Callable[..., int]


class Parsed(RunCLI):
    """The command line without building a billion parameters."""

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.parse_object(self.config)


class ResolvingPlan(Resolving, PlanCLI):
    """The same for `lowbit plan`."""


# what a file says of one group depends on no other's: each once, not each with each
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_its_formats_survive_being_written(recipe: Path) -> None:
    cli = Resolving("fit", ["-c", str(MODELS[-1]), "-c", str(TRAINERS[0]), "-c", str(recipe)])
    assert cli.config.model.policy.name == recipe.stem
    operands = [getattr(cli.config.model.policy.recipe, name) for name in OPERANDS]
    formats = [format for format in operands if format]
    assert [read_format(write_format(format)) for format in formats] == formats


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("trainer", TRAINERS, ids=lambda path: path.stem)
def test_every_model_and_trainer_parses(model: Path, trainer: Path) -> None:
    cli = Resolving("fit", ["-c", str(model), "-c", str(trainer), "-c", str(RECIPES[0])])
    assert cli.config.model.policy.name == RECIPES[0].stem


def test_the_microscope_parses() -> None:
    path = CONFIGS / "diagnostics/microscope.yaml"
    cli = Parsed("fit", ["-c", str(MODELS[-1]), "-c", str(RECIPES[0]), "-c", str(path)])
    assert [str(format) for format in cli.config_init.diagnostics.formats] == ["mxfp8", "mxint4"]


BAD_ARGUMENTS = {
    "unknown key": (("--model.optimization.learning_rate", "1"), "learning_rate"),
    "wrong type": (("--trainer.max_steps", "many"), "max_steps"),
    "unknown format": (("--model.policy.recipe.fprop_input", "mxint9"), "unknown block format"),
    "block against width": (
        ("--model.policy.recipe.fprop_input", "{name: mxint8, block_size: 48}"),
        r"layer model.layers.0.self_attn.q_proj: in_features=64 .* 48",
    ),
    "missing data": (("--data.path", "nowhere"), "nowhere"),
    "vocabulary": (("--model.llama.vocab_size", "100"), "vocabulary of .* exceeds .* 100"),
    "resume path": (("--resume", "gone/step-00000003"), "gone/step-00000003"),
    "heads": (
        ("--model.llama.num_attention_heads", "5"),
        "not a multiple of the number of attention heads .5",
    ),
    "pattern": (("--model.policy.skip", "[lm_haed]"), "lm_haed"),
    "batch": (("--trainer.accumulate_grad_batches", "3"), "global_batch_size=8"),
    "keep": (("--keep_checkpoints", "1"), "keep_checkpoints=1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_input_is_one_line_and_nothing_is_written(
    case: str, fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    assert fit(tmp_path / "run", "mxint8", *arguments) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "error" in text]
    assert line.startswith("lowbit: error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_a_changed_configuration_is_refused_field_by_field(
    fit: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fit(run, "mxint8", "--trainer.max_steps", "2")
    assert fit(run, "mxint8", "--model.optimization.lr", "0.5", "--trainer.max_steps", "3") == 2
    assert "model.optimization.lr: 0.01 -> 0.5" in capsys.readouterr().err
    assert fit(run, "mxint8", "--trainer.max_steps", "3") == 0


def test_never_refuses_a_folder_that_holds_a_run(fit: Fit, tmp_path: Path) -> None:
    fit(tmp_path / "run", "bf16", "--trainer.max_steps", "1")
    assert fit(tmp_path / "run", "bf16", "--resume", "never") == 2


@pytest.mark.parametrize("argv", [["--help"], ["fit", "--help"], ["compare", "--help"]])
def test_help(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 0


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.compare.compare.run", stop)
    assert main(["compare", "runs/mine"]) == 130
    assert capsys.readouterr().err == "lowbit: stopped\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["copmare"], "did you mean compare?"),
        (["validat"], "did you mean validate?"),
        (["xyzzy"], "expected one of fit, validate"),
    ],
)
def test_a_misspelt_verb(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    assert main(["--version"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "BF16 products on this CPU" in out
    for argv in (["help"], ["--help"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
    assert len(set(capsys.readouterr().out.split("usage: lowbit "))) == 2  # nothing, and one text


SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweep")
FILES = {path.relative_to(CONFIGS).as_posix(): path for path in SHIPPED}


def _read_by(verb: str, path: Path) -> Resolving:
    below = ["-c", str(MODELS[-1]), "-c", str(TRAINERS[0])]
    below = [] if path.parent.name == "launch" else below
    arguments = [*below, "-c", str(RECIPES[0]), "-c", str(path)]
    return ResolvingPlan(verb, arguments) if verb == "plan" else Resolving(verb, arguments)


# recipes and models: above
@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("launch", "control"))])
def test_every_launch_and_control_file_parses(name: str) -> None:
    policy = _read_by("fit", FILES[name]).config.model.policy
    assert policy.name == (FILES[name].stem if name.startswith("control") else RECIPES[0].stem)


@pytest.mark.parametrize("verb", ["validate", "plan"])
def test_what_fit_reads_the_other_verbs_read(verb: str) -> None:
    """Every key is an option there too, of the same type; shown by one file of each kind."""
    kinds = {name.partition("/")[0]: path for name, path in FILES.items() if _is_layer(path)}
    assert {"launch", "model", "trainer", "recipe", "control", "diagnostics"} <= kinds.keys()
    options = [
        {action.dest: str(getattr(action, "_typehint", action.type)) for action in parser._actions}
        for parser in (_read_by(v, kinds["recipe"]).parser for v in ("fit", verb))
    ]
    assert options[0].items() <= options[1].items()
    for name, path in kinds.items():
        assert _read_by(verb, path).config.model.policy.name, name


def _is_layer(path: Path) -> bool:
    """Of a configuration, not a format or a list of arms."""
    return bool({"model", "trainer", "data", "diagnostics"} & load_yaml(path.read_text()).keys())


@pytest.mark.parametrize("path", sorted((CONFIGS / "launch").glob("*.yaml")), ids=lambda p: p.stem)
def test_plan_takes_every_launch_file(path: Path) -> None:
    arguments = ["-c", str(path), "-c", str(CONFIGS / "recipe/mxint8.yaml"), "--device", "h100"]
    cli = PlanCLI("plan", arguments)
    workload = Workload.read(cli.config["data"], cli.config["trainer"])
    assert workload.strategy == path.stem.partition("-")[2]
    assert workload.ranks == 8
