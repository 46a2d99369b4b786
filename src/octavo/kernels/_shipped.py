"""Compiled CUDA programs that come with the package: ``cubins/sm_90.zip`` and so on, made by a release.

An archive per processor holds programs by :func:`octavo._core.cuda.program_key`: one whose source or options have
changed since is not found, and compiled anew. ``compute_75.zip`` holds PTX, which drivers compile for processors that
came later. A checkout has none of them: ``python scripts/build_cubins.py`` makes them.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path

from octavo._core.cuda import program_key
from octavo._core.io import write_bytes

#: Where the archives are.
FOLDER = Path(__file__).with_name("cubins")
#: Of PTX: the oldest processors that kernels run on.
PTX = "compute_75"
#: Files in an archive are as old as archives can be, so that the same programs are the same archive.
_DATE = (1980, 1, 1, 0, 0, 0)


def architectures() -> list[int]:
    """The processors that programs came for, such as 90."""
    names = (re.fullmatch(r"sm_(\d+)\.zip", path.name) for path in FOLDER.glob("sm_*.zip"))
    return sorted(int(name[1]) for name in names if name)


def find(source: str, macros: Mapping[str, str], architecture: int) -> bytes | None:
    """The program for a processor, or for an older one of its generation, whose programs run on it as well; or None."""
    for other in reversed(architectures()):
        if other // 10 == architecture // 10 and other <= architecture:
            found = _read(f"sm_{other}", program_key(source, macros, f"sm_{other}"))
            if found is not None:
                return found
    return None


def find_ptx(source: str, macros: Mapping[str, str]) -> bytes | None:
    """The program as PTX, or None."""
    return _read(PTX, program_key(source, macros, PTX))


def write(folder: Path, target: str, programs: Mapping[str, bytes]) -> Path:
    """An archive of programs by key for a target such as ``sm_90``; gives its path."""
    path = folder / f"{target}.zip"
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        for key in sorted(programs):
            archive.writestr(zipfile.ZipInfo(key, _DATE), programs[key], zipfile.ZIP_LZMA)
    write_bytes(path, packed.getvalue())
    return path


def _read(target: str, key: str) -> bytes | None:
    archive = _archive(FOLDER / f"{target}.zip")
    return archive.read(key) if archive is not None and key in archive.NameToInfo else None


@cache
def _archive(path: Path) -> zipfile.ZipFile | None:
    return zipfile.ZipFile(path) if path.is_file() else None
