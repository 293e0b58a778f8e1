"""requirements.txt, environment.yml and pyproject.toml tell one story."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PINS = {
    line.split("==")[0]: line.split("==")[1]
    for line in (ROOT / "requirements.txt").read_text().split()
    if not line.startswith("#")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
DEVELOPMENT = OPTIONAL["dev"]


def test_pins_lie_inside_the_ranges():
    for text in PROJECT["dependencies"] + DEVELOPMENT:
        requirement = Requirement(text)
        assert requirement.specifier.contains(PINS[requirement.name]), text


def test_environment_pins_the_same_versions():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in conda if isinstance(entry, dict))
    found = {Requirement(text).name: Requirement(text) for text in pip}
    assert found.keys() == {Requirement(text).name for text in PROJECT["dependencies"] + DEVELOPMENT}
    for name, requirement in found.items():
        assert str(requirement.specifier) == f"=={PINS[name]}"


def test_no_addresses_of_package_indexes():
    for name in ("requirements.txt", "environment.yml", "pyproject.toml", "Makefile"):
        assert not re.search(r"https?://|--index-url|--find-links", (ROOT / name).read_text()), name


def test_every_top_level_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert found == {name for name in listed if "." not in name}


def test_what_is_imported_is_asked_for():
    asked = {
        canonicalize_name(Requirement(text).name)
        for texts in (PROJECT["dependencies"], *OPTIONAL.values())
        for text in texts
    }
    distributions = packages_distributions()
    for name, file in sorted(imported()):
        found = {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
        assert found & asked, f"{file} imports {name}, which pyproject.toml does not ask for"


def imported() -> Iterator[tuple[str, str]]:
    """(top-level module, file) of every import of another project's module in what is installed."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    own = {*setup["py-modules"], *(name.split(".")[0] for name in setup["packages"])}
    files = [ROOT / f"{name}.py" for name in setup["py-modules"]]
    files += [file for name in setup["packages"] for file in (ROOT / name.replace(".", "/")).glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.split(".")[0] for name in names} - own - sys.stdlib_module_names:
                yield name, file.relative_to(ROOT).as_posix()
