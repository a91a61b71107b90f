# Everything here sets up what it needs: a virtual environment in .venv, and for tests what they run beside Python.
PYTHON ?= python3
VENV := .venv
COMPARE := .compare
BIN := $(VENV)/bin

.PHONY: run test bench chaos simulate compare docs lint format clean

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
	@sh tests/setup.sh curl git jq util-linux systemd dbus procps mosquitto chromium nginx-light haproxy caddy zsh fish
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal $(ARGS)

bench: $(BIN)/segue $(VENV)/.dev
	@sh tests/setup.sh wrk mosquitto chromium
	$(BIN)/python -m bench $(ARGS)

# Other servers, in an environment of their own, beside segue: writes docs/comparison.md and its figures.
compare: $(BIN)/segue $(VENV)/.dev $(COMPARE)/.done
	@sh tests/setup.sh wrk
	$(BIN)/python -m bench.compare $(ARGS)

$(COMPARE)/.done: bench/compare/requirements.txt | $(BIN)/python
	$(PYTHON) -m venv $(COMPARE)
	$(COMPARE)/bin/python -m pip install --quiet --upgrade pip
	$(COMPARE)/bin/python -m pip install --quiet --requirement bench/compare/requirements.txt
	@touch $@

# Everything that can go wrong, at random, under load
chaos: $(BIN)/segue $(VENV)/.dev
	@sh tests/setup.sh util-linux mosquitto
	$(BIN)/python -m bench.chaos $(ARGS)

# The lifecycle alone, in a million events of random order
simulate: $(BIN)/segue $(VENV)/.dev
	PYTHONPATH=tests $(BIN)/python -m simulate $(ARGS)

# The pages that are made from the code
docs: $(BIN)/segue
	$(BIN)/python -m segue.supervisor.setting_reference > docs/settings.md

lint: $(BIN)/segue $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --allow-untyped-defs --allow-incomplete-defs --allow-untyped-calls tests

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(COMPARE) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
