# Everything here sets up what it needs: a virtual environment in .venv, and for tests what they run beside Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test bench lint format clean

$(BIN)/python:
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || sh tests/setup.sh python3-venv
	$(PYTHON) -m venv $(VENV)

$(BIN)/segue: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/segue
	$(BIN)/python -m pip install --quiet --group dev
	@touch $@

# The built-in application on http://127.0.0.1:8000
run: $(BIN)/segue
	@echo "A chat page on http://127.0.0.1:8000. While you talk, in another terminal:"
	@echo "    $(BIN)/segue reload                               # new processes"
	@echo "    $(BIN)/segue reload personality --profile warm    # one service inside the running ones"
	@exec $(BIN)/segue serve $(ARGS)

test: $(BIN)/segue $(VENV)/.dev
	@sh tests/setup.sh curl git util-linux mosquitto chromium
	$(BIN)/python -m pytest $(ARGS)

bench: $(BIN)/segue $(VENV)/.dev
	@sh tests/setup.sh wrk mosquitto
	$(BIN)/python -m bench $(ARGS)

lint: $(BIN)/segue $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls tests

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
