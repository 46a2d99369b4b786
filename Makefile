# Everything a fresh machine needs: Python >= 3.11, a C++17 compiler and make. Both targets set up .venv by themselves
# and do it again only when what they installed from has changed.
#
#   make test    the package, editable, with the development tools; all checks and all tests
#   make wheel   what a release publishes: the CUDA kernels compiled for every processor (NVRTC from PyPI, no GPU, no nvcc), and
#                the package with them, in dist/
#   make sanitize  the tests of the C++ library under the address and undefined-behaviour sanitizers
#   make demo    the package; fetches a small model, quantizes it, compares it with the original and lets it talk
#
# Variables: PYTHON (interpreter for .venv), PIP_INSTALL (e.g. with another index), PYTEST_ARGS.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL ?= $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST_ARGS ?= -n 2 -q
DEMO_MODEL := demo/SmolLM2-135M-Instruct.gguf
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: test cubins wheel sanitize demo clean FORCE
.NOTPARALLEL:

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# By the NVRTC of CUDA 12: what it compiles, drivers of CUDA 12 load as well as newer ones.
cubins: $(VENV)/.dev
	$(PIP_INSTALL) --upgrade --target build/nvrtc nvidia-cuda-nvrtc-cu12
	PYTHONPATH=build/nvrtc $(BIN)/python scripts/build_cubins.py

wheel: cubins
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

# Python itself leaks, and torch calls through pointers of other types: both are nobody's business here.
sanitize: $(VENV)/.dev
	cmake -S . -B build/sanitize -DOCTAVO_SANITIZE=address,undefined
	cmake --build build/sanitize --parallel
	OCTAVO_LIBRARY=$(CURDIR)/build/sanitize/liboctavo_c.so LD_PRELOAD=$$(c++ -print-file-name=libasan.so) \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -p no:faulthandler \
		tests/ops tests/runtime tests/unit/test_additive.py tests/unit/test_kmeans.py tests/unit/test_tiles.py

demo: $(VENV)/.package
	$(BIN)/python scripts/fetch_demo_model.py $(DEMO_MODEL)
	$(BIN)/octavo demo $(DEMO_MODEL) demo/out

clean:
	rm -rf build $(VENV) demo src/octavo/kernels/cubins .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/.tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Octavo needs Python 3.11 or newer; '$(PYTHON)' is older. Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV); PyTorch is large, the first time takes some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --upgrade pip
	$(PIP_INSTALL) scikit-build-core cmake ninja
	@touch $@

$(VENV)/.package: $(VENV)/.tools $(VENV)/.files $(BUILD_INPUTS)
	$(PIP_INSTALL) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.tools $(VENV)/.files $(BUILD_INPUTS)
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@touch $(VENV)/.package $@

# An editable install remembers where every module lies: it is renewed when modules are added, moved or removed.
$(VENV)/.files: $(VENV)/.tools FORCE
	@find src -name '*.py' | sort > $@.new; cmp -s $@.new $@ && rm $@.new || mv $@.new $@
