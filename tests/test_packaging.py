"""What the package imports is what it says it needs."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imported() -> Iterator[str]:
    """Name the modules of others that the package imports anywhere."""
    for folder in ("cli", "core", "evaluation", "indexing", "rerank"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (each.name.split(".")[0] for each in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module.split(".")[0]


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_declared():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    required = [*project["dependencies"], *(each for extra in extras for each in extra)]
    declared = {plain(re.split(r"[^\w.-]", each)[0]) for each in required}
    owners = packages_distributions()
    others = set(imported()) - set(sys.stdlib_module_names) - {"mmsearch"}
    missing = {
        module
        for module in others & owners.keys()  # an extra that is not installed has no owner
        if not {plain(owner) for owner in owners[module]} & declared
    }
    assert missing == set()
