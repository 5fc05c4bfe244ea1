# make env | demo | test | lint. Each step leaves a stamp when it is done: what is done is not done again,
# what was interrupted is, and a changed pin repeats the steps after it.
PYTHON ?= python3
VENV ?= .venv
WORK_DIR ?= work_dirs/demo

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DONE := $(VENV)/.done

.PHONY: env demo test lint help
.DEFAULT_GOAL := help

help:
	@echo "make env   the environment in $(VENV): torch, mmcv with operators, mmdet, mmseg, mmpretrain, this package"
	@echo "make demo  make a small data set, train and test OverLoCK Mask R-CNN on it, draw its detections ($(WORK_DIR))"
	@echo "make test  the tests        make lint  the linters"

$(DONE)/venv:
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(DONE) && touch $@

$(DONE)/torch: requirements/build.txt requirements/torch.txt $(DONE)/venv
	$(PIP) install -r requirements/build.txt -r requirements/torch.txt "numpy<2"
	@touch $@

$(DONE)/mmcv: requirements/mmcv.txt tools/install_mmcv.py $(DONE)/torch
	$(PIP) install -r requirements/mm.txt
	$(PY) tools/install_mmcv.py
	@touch $@

$(DONE)/dev: requirements/dev.txt $(DONE)/mmcv
	$(PIP) install -r requirements/dev.txt
	@touch $@

# Editable, without its dependencies: they are pinned above. setup.py and the metadata decide what there is to build.
$(DONE)/package: setup.py pyproject.toml $(DONE)/mmcv
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@

env: $(DONE)/dev $(DONE)/package
	@$(PIP) check

demo: env
	$(PY) tools/demo/run.py --work-dir $(WORK_DIR)

test: env
	$(PY) -m pytest tests $(ARGS)

lint: $(DONE)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
