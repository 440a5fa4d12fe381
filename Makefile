# make demo   index real photographs and find them, on a machine without a model hub
# make test   lint, types and tests
# make bench  every benchmark at its full size (an hour or more)
#
# Both set up .venv first. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test lint bench clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

demo: $(VENV)/ready
	@$(BIN)/python tests/photos.py $(DEMO)/photos
	$(BIN)/mmsearch index $(DEMO)/photos --index $(DEMO)/index --model bundled
	$(BIN)/mmsearch query "a cup of coffee" --index $(DEMO)/index -k 3
	$(BIN)/mmsearch query "a cat looking at the camera" --index $(DEMO)/index -k 3
	$(BIN)/mmsearch query "a motorcycle parked in a garage" --index $(DEMO)/index -k 3 --explain

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint
	$(BIN)/python -m pytest

bench: $(VENV)/ready
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
