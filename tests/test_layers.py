"""Imports point one way; the order is the project's architecture."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    ["solvers"],
    ["denoisers"],
    ["parataa", "data", "evaluation"],
    ["training"],
    ["base", "olss", "slam", "solver_search", "timestep_tuner"],
    ["train", "sample", "demo"],
]
LEVEL = {package: level for level, packages in enumerate(LAYERS) for package in packages}
METHODS = set(LAYERS[4])
FORBIDDEN = {"solvers": {"lightning", "wandb", "torchmetrics", "webdataset"}}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def files(package: str) -> list[Path]:
    single = ROOT / f"{package}.py"
    return [single] if single.exists() else sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", LEVEL)
def test_imports_point_down(package):
    for path in files(package):
        own = imported(path) & LEVEL.keys() - {package}
        above = {name for name in own if LEVEL[name] > LEVEL[package]}
        assert not above, f"{path.relative_to(ROOT)} imports {above} from a layer above"
        assert not (package in METHODS and own & METHODS), f"{path.relative_to(ROOT)}: methods never import each other"
        assert not imported(path) & FORBIDDEN.get(package, set()), path


def test_sample_imports_no_method():
    assert not imported(ROOT / "sample.py") & METHODS


def test_every_package_is_a_package():
    for package in LEVEL:
        assert (ROOT / f"{package}.py").exists() or (ROOT / package / "__init__.py").exists()


def test_a_forbidden_import_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    from olss.fit import solve\n    import wandb.sdk\n")
    assert imported(tmp_path / "a.py") == {"olss", "wandb"}
