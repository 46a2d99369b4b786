"""How Octavo is built and installed: without a compiler too, from one version number, by the promised commands."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import octavo

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _copy_sources(folder: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.dylib", "*.dll")
    for name in ("src", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=skip)
    for name in ("pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / name)
    # As a checkout has it in which kernels were compiled for a release; git ignores them, the wheel must not.
    cubins = folder / "src" / "octavo" / "kernels" / "cubins"
    cubins.mkdir(exist_ok=True)
    with zipfile.ZipFile(cubins / "sm_90.zip", "w") as archive:
        archive.writestr("key", b"program")
    shutil.copy(ROOT / ".gitignore", folder / ".gitignore")


_IMPORT_WHEEL = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("_editable")]
sys.path.insert(0, sys.argv[1])
import octavo
from octavo._core import clib
assert octavo.__file__.startswith(sys.argv[1]), octavo.__file__
assert clib.library() is None
print(clib.why_missing())
"""


def test_without_a_compiler_a_pure_python_wheel_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    source, wheels, installed = tmp_path / "source", tmp_path / "wheels", tmp_path / "installed"
    source.mkdir()
    _copy_sources(source)
    no_compiler = {**os.environ, "CXX": str(tmp_path / "no-compiler"), "PIP_NO_INDEX": "1"}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(wheels), str(source)]
    built = subprocess.run(pip, env=no_compiler, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = wheels.iterdir()
    assert wheel.name == f"octavo-{octavo.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    wanted = {"octavo/__init__.py", "octavo/py.typed", "octavo/math/assign.py", "octavo/kernels/cuda/lookup.cu"}
    wanted.add("octavo/kernels/cubins/sm_90.zip")
    assert wanted <= set(names)
    assert not [name for name in names if re.search(r"octavo_c|\.(so|dylib|dll|cpp|h)$", name)]

    run = [sys.executable, "-c", _IMPORT_WHEEL, str(installed)]
    told = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "was not built when Octavo was installed" in told.stdout
    assert "C++17 compiler" in told.stdout
    assert "pip install --force-reinstall ." in told.stdout


def test_there_is_one_version_number(project: dict[str, Any]) -> None:
    assert project["version"] == octavo.__version__
    header = (ROOT / "csrc" / "octavo_c.h").read_text()
    from octavo._core import clib

    assert f"#define OCTAVO_ABI {clib._ABI}\n" in header


def test_every_dependency_has_a_lower_bound_below_the_version_under_test(project: dict[str, Any]) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        assert [s.operator for s in requirement.specifier] == [">="], text
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_no_module_goes_around_the_layers_through_the_package_itself() -> None:
    """``octavo`` re-exports names of every layer; the layer contract cannot see which of them a module takes."""
    reexported = set(octavo._WHERE)
    package = ROOT / "src" / "octavo"
    for path in sorted(package.rglob("*.py")):
        if path.parent == package / "cli" or path == package / "__init__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            taken: set[str] = set()
            if isinstance(node, ast.ImportFrom) and node.module == "octavo":
                taken = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "octavo":
                taken = {node.attr}
            assert not taken & reexported, f"{path}:{getattr(node, 'lineno', 0)}"


def test_continuous_integration_runs_what_the_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make test"]


_LOAD = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
print(library.octavo_isa())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux's linker is asked to refuse what is missing")
def test_without_the_kernels_of_one_processor_nothing_is_missing(tmp_path: Path) -> None:
    """As on ARM: whatever x86 has of its own must be asked for behind its macro."""
    cmake = shutil.which("cmake", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if cmake is None:
        pytest.skip("no cmake is installed")
    configure = [cmake, "-S", ROOT, "-B", tmp_path, "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=another"]
    # Nothing is run but a constant: the compiler need not try hard.
    configure.append("-DCMAKE_BUILD_TYPE=Debug")
    for command in (configure, [cmake, "--build", tmp_path, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    run = [sys.executable, "-c", _LOAD, str(tmp_path / "liboctavo_c.so")]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "1"
