# make env | demo | test | sanitize | lint | docs | wheel. Each finished step leaves a stamp. Finished steps are skipped, interrupted ones
# resume, and a changed pin repeats the steps that depend on it.
PYTHON ?= python3
VENV ?= .venv
WORK_DIR ?= work_dirs/demo
# What pip installs as torch. Another one for the CPU alone, or for a wheel:
# make wheel TORCH="torch==2.10.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu"
TORCH ?= -r requirements/torch.txt

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DONE := $(VENV)/.done

.PHONY: env mmcv demo test sanitize lint docs wheel help
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo "make env   the environment in $(VENV): torch, mmcv with operators, mmdet, mmseg, mmpretrain, this package"
	@echo "make demo  make a small data set, train and test OverLoCK Mask R-CNN on it, draw its detections ($(WORK_DIR))"
	@echo "make test  the tests        make lint  the linters        make docs  the documentation in site/"
	@echo "make wheel  a wheel of this package in dist/, for the torch in $(VENV) and its CUDA"
	@echo "make sanitize  the operators under AddressSanitizer and UBSan, and 100,000 random calls of each: hours"

$(DONE)/venv:
	@$(PYTHON) -c "import sys; v = sys.version_info[:2]; (3, 10) <= v <= (3, 12) or sys.exit('The pinned torch and numpy 1 need Python 3.10, 3.11 or 3.12, got %d.%d: make PYTHON=python3.11 ...' % v)"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/lint: requirements/lint.txt $(DONE)/venv
	$(PIP) install -r requirements/lint.txt
	@touch $@

$(DONE)/docs: requirements/docs.txt $(DONE)/venv
	$(PIP) install -r requirements/docs.txt
	@touch $@

$(DONE)/wheel: requirements/wheel.txt $(DONE)/venv
	$(PIP) install -r requirements/wheel.txt
	@touch $@

$(DONE)/torch: requirements/build.txt requirements/torch.txt $(DONE)/venv
	$(PIP) install -r requirements/build.txt $(TORCH) "numpy<2"
	@touch $@

$(DONE)/mm: requirements/mm.txt $(DONE)/torch
	$(PIP) install -r requirements/mm.txt
	@touch $@

# No stamp: each call checks in seconds that the installed mmcv matches torch and the GPU, if there is one.
mmcv: $(DONE)/mm
	$(PY) tools/install_mmcv.py

$(DONE)/dev: requirements/dev.txt $(DONE)/mm
	$(PIP) install -r requirements/dev.txt
	@touch $@

# Old compilers, for tests. --upgrade replaces what the folder has.
$(DONE)/nvrtc-%: requirements/nvrtc-%.txt $(DONE)/venv
	$(PIP) install --no-deps --upgrade --target $(VENV)/nvrtc/$* -r $<
	@touch $@

# Editable, without dependencies, which are pinned above. This compiles the operators, with CUDA if setup.py finds a
# toolkit that matches torch.
SOURCES := $(shell find overlock_mm/ops/csrc -type f)
$(DONE)/package: setup.py pyproject.toml $(SOURCES) $(DONE)/mm
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

env: mmcv $(DONE)/dev $(DONE)/nvrtc-cu11 $(DONE)/nvrtc-cu12 $(DONE)/lint $(DONE)/package
	@$(PIP) check

demo: env
	$(PY) tools/demo/run.py --work-dir $(WORK_DIR)

# Two processes, each with half of the threads: more threads than cores would wait for each other.
CORES := $(shell getconf _NPROCESSORS_ONLN)
test: env
	OMP_NUM_THREADS=$$((($(CORES) + 1) / 2)) $(PY) -m pytest tests -n 2 --dist loadfile $(ARGS)

# It resumes too. Its results are in work_dirs/sanitize.
sanitize: env
	$(PY) tools/sanitize.py $(ARGS)

lint: $(DONE)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror \
		$(filter %.h %.cpp %.cu %.cuh,$(SOURCES) $(wildcard $(addprefix tests/test_ops/,choices/* emulation/* nvrtc/* simd/*)))

# Warnings are errors. Ruff formats the signatures.
docs: $(DONE)/docs $(DONE)/lint
	$(PY) -m mkdocs build --strict

# The version of the wheel names torch and CUDA, and it requires this torch. CUDA is compiled if setup.py finds a toolkit that
# matches torch; FORCE_CUDA=1 or 0 decides. auditwheel sets the oldest glibc. It fails if the binary needs a library that
# neither the system nor torch has.
wheel: $(DONE)/torch $(DONE)/wheel
	rm -rf build/lib* build/wheel
	OVERLOCK_MM_PIN_TORCH=1 $(PIP) wheel --no-build-isolation --no-deps --no-cache-dir --wheel-dir build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PY) -m auditwheel repair --wheel-dir dist \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' build/wheel/*.whl
