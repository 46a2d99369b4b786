"""Programs that come with the package: built by the script, found by the loader, handed to the driver as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo._core import cuda
from octavo._core.errors import ResourceError
from octavo.kernels import _gpu, _shipped, cuda_gather, cuda_lookup, cuda_tables
from octavo.layout import Layout

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import build_cubins  # pyright: ignore[reportMissingImports]

pytestmark = pytest.mark.skipif(bool(cuda.why_no_compiler()), reason=cuda.why_no_compiler())
SHAPE = cuda_tables.Shape(4, 8)
DEVICE = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cubins")
    build_cubins.build(folder, ("sm_86", _shipped.PTX), [SHAPE], workers=1)
    return folder


@pytest.fixture
def loaded(archives: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What the driver is given; it takes everything."""
    images: list[bytes] = []

    def load(module: Any, image: bytes) -> int:
        images.append(image)
        return 0

    names = ("cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuModuleGetFunction", "cuFuncSetAttribute")
    names += ("cuOccupancyMaxActiveBlocksPerMultiprocessor",)
    driver = SimpleNamespace(cuModuleLoadData=load, **{name: lambda *arguments: 0 for name in names})
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(cuda, "_context", lambda device: None)
    monkeypatch.setattr(cuda, "compile_program", lambda *arguments: pytest.fail("something was compiled"))
    monkeypatch.setattr(_shipped, "FOLDER", archives)
    _gpu._program.cache_clear()
    yield images
    _gpu._program.cache_clear()


@pytest.mark.parametrize("architecture", [86, 89])
def test_a_program_of_the_generation_is_taken_before_any_compiler(
    architecture: int, loaded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gpu, "_architecture", lambda device: architecture)
    _gpu.program(SHAPE, DEVICE)
    (image,) = loaded
    assert image[:4] == b"\x7fELF"
    assert image == _shipped.find(_gpu.source("tables"), SHAPE.macros(), 86)


def test_a_driver_that_refuses_it_gets_one_that_was_compiled_here(
    loaded: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(module: Any, image: bytes) -> int:
        loaded.append(image)
        return 0 if image == b"compiled here" or (takes_ptx and b".target" in image) else 218  # CUDA_ERROR_INVALID_PTX

    takes_ptx, driver = False, cuda._driver()
    monkeypatch.setattr(driver, "cuModuleLoadData", load)
    monkeypatch.setattr(driver, "cuGetErrorString", lambda *arguments: 0, raising=False)
    monkeypatch.setattr(_gpu, "_architecture", lambda device: 86)
    monkeypatch.setattr(cuda, "cached_program", lambda *arguments: b"compiled here")
    _gpu.program(SHAPE, DEVICE)
    assert len(loaded) == 2
    _gpu._program.cache_clear()
    monkeypatch.setattr(cuda, "_nvrtc", lambda: None)
    with pytest.raises(ResourceError, match="loading a kernel"):
        _gpu.program(SHAPE, DEVICE)
    takes_ptx = True
    _gpu.program(SHAPE, DEVICE)
    assert [b".target" in image for image in loaded[2:]] == [False, True, False, True], "PTX after what was refused"


def test_without_a_compiler_others_get_ptx(loaded: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "_architecture", lambda device: 80)
    monkeypatch.setattr(cuda, "_nvrtc", lambda: None)
    _gpu.program(SHAPE, DEVICE)
    (image,) = loaded
    assert b".target sm_75" in image and image[-1] == 0
    other = cuda_tables.Shape(4, 16)
    assert "NVRTC was not found" in _gpu._why_no_program(other, 80)
    assert _gpu._why_no_program(SHAPE, 80) == ""


def test_changed_options_are_another_program(archives: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_shipped, "FOLDER", archives)
    source = _gpu.source("tables")
    assert _shipped.find(source, SHAPE.macros(), 86) is not None
    assert _shipped.find(source + " ", SHAPE.macros(), 86) is None
    assert _shipped.find(source, SHAPE.macros() | {"BITS": "4"}, 86) is None
    assert _shipped.find(source, SHAPE.macros(), 80) is None, "older than all that there are"
    assert _shipped.find(source, SHAPE.macros(), 90) is None


def test_what_a_kernel_refuses_needs_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "_architecture", lambda device: 90)
    layout = Layout((16, 64), 4, (8,), "row", codebook_dtype="int8")
    assert "row vectors" in cuda_gather.CudaGather.why_not(layout, DEVICE)
    monkeypatch.setattr(cuda, "_nvrtc", lambda: None)
    assert "NVRTC was not found" in cuda_tables.CudaTables.why_not(layout, DEVICE)


def test_what_is_shipped_serves_what_octavo_makes() -> None:
    shipped = set(build_cubins.shapes())
    assert set(cuda_lookup.shapes().values()) | set(cuda_tables.shapes()) <= shipped
    assert cuda_gather.Shape(8, (16, 8), torch.float16) in shipped


def test_a_program_that_does_not_compile_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="could not compile"):
        build_cubins.build(tmp_path, ["sm_90"], [cuda_tables.Shape(3, 8)], workers=1)
