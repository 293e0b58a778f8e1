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
    ["learn"],
    ["train", "sample"],
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
    return [*[single] * single.exists(), *sorted((ROOT / package).rglob("*.py"))]


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


def modules_imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, in functions too; for types alone does not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none when there is no circle."""
    left = {name: found & imports.keys() - {name} for name, found in imports.items()}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


@pytest.mark.parametrize("package", LEVEL)
def test_no_circles_inside_a_room(package):
    imports = {f"{package}.{path.stem}": modules_imported(path) for path in files(package) if path.stem != "__init__"}
    assert not circle(imports)


def test_a_circle_is_seen():
    assert circle({"a": {"b", "c"}, "b": {"a"}, "c": set()}) == ["a", "b"]
    assert circle({"a": {"b"}, "b": set()}) == []
