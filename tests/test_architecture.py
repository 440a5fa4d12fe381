"""The shape of the code base: import direction, one importer for each library, the wheel."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["core", "indexing", "rerank", "evaluation", "cli"]
SOURCES = [path for folder in ORDER for path in sorted((ROOT / folder).rglob("*.py"))]

# library -> the only places that may import it
ONLY_IMPORTERS = {
    "pymilvus": {"indexing/vectors.py"},
    "open_clip": {"indexing/encoder.py", "indexing/models.py"},
    "sqlite3": {"indexing/catalog.py"},
    "pillow_heif": {"indexing/images.py"},
}
HEAVY = {"torch", "open_clip", "pymilvus", "transformers", "matplotlib", "timm", "torchvision"}


def imports(path: Path) -> Iterator[tuple[ast.stmt, str, int]]:
    """Yield (statement, dotted module, relative level) of each import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node, name.name, 0
        elif isinstance(node, ast.ImportFrom):
            yield node, node.module or "", node.level
            if not node.module:
                for name in node.names:
                    yield node, name.name, node.level


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_one_way(path):
    own = ORDER.index(path.relative_to(ROOT).parts[0])
    for node, module, level in imports(path):
        first = module.split(".")[0]
        if level == 0:
            assert first != "mmsearch", f"line {node.lineno}: import within mmsearch relatively"
        if level == 2 and first in ORDER:
            assert ORDER.index(first) < own, f"line {node.lineno}: {first} is above this folder"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_each_library_has_its_one_importer(path):
    for node, module, level in imports(path):
        library = module.split(".")[0]
        if level == 0 and library in ONLY_IMPORTERS:
            assert name_of(path) in ONLY_IMPORTERS[library], f"line {node.lineno}: {library}"


@pytest.mark.parametrize("path", sorted((ROOT / "cli").glob("*.py")), ids=name_of)
def test_help_pays_for_no_heavy_import(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    for node in top:
        modules = (
            [name.name for name in node.names] if isinstance(node, ast.Import) else [node.module]
        )
        assert not {(module or "").split(".")[0] for module in modules} & HEAVY


def test_help_loads_no_heavy_module():
    code = (
        "import sys, mmsearch.cli.app;"
        f"found = sorted({HEAVY!r} & set(sys.modules)); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_the_command_line_prints_or_exits():
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("print", "exit", "quit"), f"{path}:{node.lineno}"


def test_the_wheel_holds_mmsearch_and_nothing_else(tmp_path):
    source = tmp_path / "source"  # a copy, since setuptools builds beside what it packs
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    subprocess.run(
        [
            *[sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"],
            *["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        ],
        check=True,
        timeout=300,
        cwd=tmp_path,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mmsearch"}
    assert "mmsearch/cli/app.py" in names
    assert any(name.startswith("mmsearch/indexing/bundled/") for name in names)
