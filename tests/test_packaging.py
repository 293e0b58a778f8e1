"""requirements.txt, environment.yml and pyproject.toml tell one story."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PINS = {
    line.split("==")[0]: line.split("==")[1]
    for line in (ROOT / "requirements.txt").read_text().split()
    if not line.startswith("#")
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEVELOPMENT = PROJECT["optional-dependencies"]["dev"]


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
