# make train   train a small DeiT on the bundled digits (configs/quickstart.yaml)
# make test    run the tests
# make lint    check style
# ARGS adds options to the training: make train ARGS="--epochs 5"

PYTHON ?= python3
BIN := .venv/bin
RUN := output/quickstart-$(shell date +%Y%m%d-%H%M%S)
ARGS ?=

.PHONY: train test lint clean

train: .venv/core
	$(BIN)/python main.py --config configs/quickstart.yaml --output-dir $(RUN) $(ARGS)

test: .venv/test
	$(BIN)/python -m pytest -n 3  # on two cores: many tests wait, for disks, signals and schedulers

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make train PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/core: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/test: $(wildcard requirements-*.txt) .venv/core
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf .venv output
