#!/bin/sh
# Builds the C++ library for 64-bit ARM and runs its tests under emulation: sh scripts/test_arm.sh FOLDER [PYTEST ARGS]
#
# For Debian 12 on x86-64 as root, with a .venv of its Python 3.11: takes a cross compiler, QEMU, and Python, torch and
# the other packages for ARM (some 700 MB in FOLDER, kept for the next time).
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
shift
root=$(cd "$(dirname "$0")/.." && pwd)
pip="${PIP:-$root/.venv/bin/python -m pip} --quiet --disable-pip-version-check"

if [ ! -e "$folder/ready" ]; then
    apt-get install --quiet=2 --yes --no-install-recommends qemu-user g++-aarch64-linux-gnu cmake unzip
    dpkg --add-architecture arm64
    apt-get update --quiet=2
    mkdir -p "$folder/packages" "$folder/wheels" "$folder/root" "$folder/site"
    (
        cd "$folder/packages"
        version=$("$root/.venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        set -- "python$version" "python$version-minimal" "libpython$version-stdlib" "libpython$version-minimal"
        set -- "$@" libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0
        set -- "$@" libuuid1
        for package; do apt-get download --quiet=2 "$package:arm64"; done
        for package in *.deb; do dpkg -x "$package" "$folder/root"; done
        # The last torch whose wheel for ARM does not want CUDA, and what the tests of the library import.
        set -- torch==2.9.1 numpy filelock typing_extensions sympy networkx mpmath fsspec jinja2 markupsafe
        set -- "$@" transformers tokenizers safetensors huggingface_hub accelerate gguf packaging pyyaml
        set -- "$@" regex tqdm requests
        set -- "$@" sentencepiece protobuf psutil hf-xet httpx httpx2 httpcore httpcore2
        set -- "$@" truststore certifi idna anyio h11
        set -- "$@" click shellingham charset_normalizer urllib3 typer rich markdown-it-py mdurl pygments annotated-doc
        set -- "$@" pytest iniconfig pluggy hypothesis attrs sortedcontainers beartype jaxtyping wadler-lindig
        platforms="--platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64"
        # shellcheck disable=SC2086
        $pip download --dest "$folder/wheels" --no-deps --only-binary=:all: --python-version "$version" $platforms "$@"
        for wheel in "$folder"/wheels/*.whl; do unzip -qo "$wheel" -d "$folder/site"; done
    )
    touch "$folder/ready"
fi

version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$root/pyproject.toml")
cmake -S "$root" -B "$folder/build" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DSKBUILD_PROJECT_VERSION="$version" -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ > "$folder/cmake.log"
cmake --build "$folder/build" --parallel

export PYTHONPATH="$folder/site:$root/src" OCTAVO_LIBRARY="$folder/build/liboctavo_c.so"
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
python=$(find "$folder/root/usr/bin" -name 'python3.*' -type f | head -n 1)
[ $# -gt 0 ] || set -- tests/ops tests/runtime/test_attention.py tests/runtime/test_decoder.py tests/unit/test_clib.py \
    tests/unit/test_additive.py
cd "$root"
# QEMU fails in a forked process that starts threads, and the system cannot run a program for ARM that a test starts.
exec qemu-aarch64 -cpu max -L "$folder/root" "$python" -m pytest -q -rs -p no:cacheprovider -p no:faulthandler \
    -k "not forked_process and not without_the_library_each_operation" "$@"
