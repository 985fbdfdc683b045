"""The files that install the package agree with one another, and with the tree."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from omninft import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
CI = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))


def locked() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in pins}


def asked_for(extra: str | None = None) -> list[Requirement]:
    """Of the package, or of an extra, with those of the extras that it names."""
    found = []
    for text in PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            found += [one for named in requirement.extras for one in asked_for(named)]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("extra", [None, "dev"])
def test_the_lock_has_what_the_package_asks_for(extra: str | None) -> None:
    pins = locked()
    for requirement in asked_for(extra):
        found = pins[canonicalize_name(requirement.name)]
        assert found in requirement.specifier, f"{requirement}, locked {found}"


def test_the_image_copies_what_is_there_and_its_context_lets_it_through() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ")]
    names = [name for sources in copied for name in sources]
    assert set(names) == {"pyproject.toml", "README.md", "LICENSE", "src", "requirements.lock"}
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in names:
        assert (ROOT / name).exists()
        decisive = [rule for rule in rules if fnmatch(name, rule.lstrip("!").removeprefix("**/"))][-1]
        assert decisive.startswith("!"), f"{name} is left out by {decisive}"


def test_versions_agree() -> None:
    assert PROJECT["version"] == __version__
    assert re.findall(r'image\.version="(.*?)"', DOCKERFILE) == [__version__]
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    images = set(re.findall(r"^FROM python:([\d.]+)-slim", DOCKERFILE, re.MULTILINE))
    tested = CI["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert len(images) == 1
    assert all(Version(python) in allowed for python in [*images, *tested])
    oldest = min(map(Version, tested))
    assert Version(f"{oldest.major}.{oldest.minor - 1}") not in allowed


def test_ci_runs_what_a_change_must_pass() -> None:
    commands = [step.get("run", "") for job in CI["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in commands
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    for path in re.findall(r"tests/\S+\.py", "\n".join(commands)):
        assert (ROOT / path).is_file()
