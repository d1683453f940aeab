"""A step of tools/gpu_check.sh: which packages that the package needs are missing here, or too old or new."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TESTS = ["pytest"]


def fault(requirement: Requirement) -> str:
    """What is wrong with an installed package, or empty."""
    if requirement.marker is not None and not requirement.marker.evaluate():
        return ""
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is missing"
    if not requirement.specifier.contains(found, prereleases=True):
        return f"{requirement.name} {found}, accepted: {requirement.specifier}"
    return ""


def main() -> int:
    """Print them; the exit status tells whether there are any."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(text) for text in [*project["dependencies"], *TESTS]]
    faults = [said for said in map(fault, requirements) if said]
    print(
        f"python {platform.python_version()}, torch {version('torch')}: {'; '.join(faults) or 'all packages'}"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
