"""The training command line: configs, one-line errors, resume arguments, W&B run ids."""

import ast
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import train
from denoisers import load_denoiser
from train import main
from training.run_id import run_id

CONFIGS = sorted(Path("configs/base").glob("*.yaml"))
SMALL = [
    "--trainer.max_steps",
    "2",
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
]


def fit(folder, *options: str) -> list[str]:
    """Arguments of a two-step digits run that writes into `folder`."""
    callbacks = yaml.safe_load(Path("configs/base/digits.yaml").read_text())["trainer"]["callbacks"]
    callbacks[1]["init_args"] |= {"dirpath": str(folder), "every_n_train_steps": 2}
    (folder / "callbacks.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    places = ["--trainer.default_root_dir", str(folder), "--model.init_args.output", str(folder / "out")]
    return [
        "fit",
        "--config",
        "configs/base/digits.yaml",
        "--config",
        str(folder / "callbacks.yaml"),
        *SMALL,
        *places,
        *options,
    ]


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])


def test_bf16_on_a_cpu_that_emulates_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("denoisers.precision.has_bf16_units", lambda device: device.type != "cpu")
    options = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]
    with pytest.warns(UserWarning, match="this cpu has no units for bf16 and emulates it"):
        main(fit(tmp_path, *options, "--trainer.precision", "bf16-mixed"))


class NoImport:
    """Refuses to find a module."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname, *_):
        if fullname == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@pytest.fixture
def refuse(monkeypatch):
    """Make a module impossible to import, as if it were not installed, after forgetting it and `others`."""

    def without(name: str, *others: str) -> None:
        for loaded in [one for one in sys.modules if one in others or f"{one}.".startswith(f"{name}.")]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setattr(sys, "meta_path", [NoImport(name), *sys.meta_path])

    return without


def test_help_and_mistakes_need_no_lightning(refuse, capsys):
    refuse("training.cli")
    main(["--help"])
    shown = capsys.readouterr().out
    for name, text in train.SUBCOMMANDS.items():
        assert [line.split(maxsplit=1) for line in shown.splitlines() if text in line] == [[name, text]]
    for args, message in (
        ([], "no subcommand: give one of fit, "),
        (["fitt"], "unknown subcommand 'fitt': use one of "),
    ):
        with pytest.raises(SystemExit) as left:
            main(args)
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
    with pytest.raises(ModuleNotFoundError):
        main(["fit"])


def test_the_command_line_starts_without_lightning():
    assert modules_at_the_top(Path("train.py")) == {"sys", "collections.abc", "training.arguments"}
    for name in ("arguments", "signals"):
        names = {module.split(".")[0] for module in modules_at_the_top(Path(f"training/{name}.py"))}
        assert names <= sys.stdlib_module_names | {"training"}


def test_subcommands_are_lightnings():
    from training.cli import CLI

    assert train.SUBCOMMANDS.keys() == CLI.subcommands().keys()


@pytest.mark.parametrize("subcommand", ["fit", "predict"])
def test_help_names_the_modules_of_this_project(subcommand, capsys):
    with pytest.raises(SystemExit):
        main([subcommand, "--help"])
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(train.modules(subcommand).rstrip())
    for path, _, name in train.MODULES[subcommand]:
        model = yaml.safe_load(Path(f"configs/{name}.yaml").read_text())["model"]
        method = model["init_args"].get("method", {}).get("class_path")
        assert path == model["class_path"] + (f" with {method}" if method else "")


def test_help_forgets_no_module():
    roots = [Path(name) for name in ("base", "slam", "olss", "solver_search", "timestep_tuner", "data")]
    found = {path for subcommand in train.MODULES.values() for path, _, _ in subcommand}
    kinds = r"^class (\w+)\((?:NetworkModule|ResultModule|lightning\.LightningModule|Method)\b"
    for file in (file for root in roots for file in root.rglob("*.py")):
        for name in re.findall(kinds, file.read_text(), re.MULTILINE):
            assert any(path.endswith(f"{'.'.join(file.with_suffix('').parts)}.{name}") for path in found), name


def modules_at_the_top(path: Path) -> set[str]:
    """What a file imports when it is imported itself."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def test_training_works_without_wandb(tmp_path, refuse):
    refuse("wandb", "training.wandb", "training.cli")
    main(fit(tmp_path, "--trainer.logger", "false"))
    assert load_denoiser(tmp_path / "out").sample_shape == (1, 8, 8)
    assert "wandb" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="wandb"):
        __import__("training.wandb")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(config, capsys):
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(config), "--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(config.read_text())
    assert printed["model"]["class_path"] == given["model"]["class_path"]
    assert printed["trainer"]["max_steps"] == given["trainer"]["max_steps"]
    assert config.read_text().startswith("#")


def test_digits_train_save_and_resume(tmp_path):
    main(fit(tmp_path))
    assert load_denoiser(tmp_path / "out").sample_shape == (1, 8, 8)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 2
    assert (tmp_path / "config.yaml").is_file()
    main(fit(tmp_path, "--ckpt_path", str(tmp_path / "last.ckpt"), "--trainer.max_steps", "4"))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.init_args.learning_rat", "1"], "learning_rat"),
        (["--model.init_args.class_dropout", "2"], "class_dropout 2"),
        (["--data.init_args.source", "shards", "--data.init_args.data_dir", "nowhere"], "no image shards"),
        (["--data.init_args.source", "nope"], "unknown image source 'nope'"),
        (["--config", "configs/base/none.yaml"], "none.yaml"),
        (["--trainer.precision", "17"], "'64-true']; "),
        (["--model.class_path", "base.module.Nope"], "has no attribute 'Nope'"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as left:
        main(fit(tmp_path, *options))
    assert left.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Union" not in lines[0]


def test_a_run_id_is_kept_until_a_run_starts_anew(tmp_path):
    from training.wandb import Wandb

    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    logger = Wandb(str(tmp_path))
    assert logger._wandb_init["id"] == first
    assert logger._offline
    assert Path(logger.save_dir) == tmp_path
    logger.start_anew()
    assert run_id(tmp_path) == logger._wandb_init["id"] == logger.version != first


def test_logs_hold_what_concerns_the_user(tmp_path, monkeypatch, capsys, recwarn):
    monkeypatch.setattr("training.progress.EVERY", 0.0)
    main(fit(tmp_path, "--trainer.enable_progress_bar", "true"))
    shown = capsys.readouterr()
    assert not re.search(r"Tip|TPU|LeafSpec|eval mode|max_epochs|Epoch|-2|\r", shown.out + shown.err)
    assert re.search(r"^step 2 of 2, train/loss [\d.]+$", shown.err, re.MULTILINE)
    assert not [str(one.message) for one in recwarn.list if "LeafSpec" in str(one.message)]


def test_the_bar_counts_to_no_limit():
    from training.progress import Bar

    bar = Bar()
    bar._trainer = SimpleNamespace(max_epochs=-1, sanity_checking=False)
    assert bar._get_train_description(3).strip() == "Epoch 3"
