# make demo   index real photographs and find them, on a machine without a model hub
# make test   lint, types and tests
# make bench  every benchmark at its full size (two hours or more)
#
# Each sets up .venv first. PYTHON=python3.12 chooses the interpreter; PICTURES=FOLDER the photographs
# that the benchmarks use; MMSEARCH_FLICKR8K (captions.csv, images/) adds those that need captions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := .demo
BENCH := .bench
PICTURES ?= $(BENCH)/photos
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
	@$(BIN)/python tests/photos.py $(BENCH)/photos
	$(BIN)/python benchmarks/query.py --images $(PICTURES) --index $(BENCH)/query
	$(BIN)/python benchmarks/rerank.py
	$(BIN)/python benchmarks/scenes.py
	$(BIN)/python benchmarks/pointing.py
	$(BIN)/python benchmarks/rerank.py --attention
	$(BIN)/python benchmarks/eval.py large
	$(if $(MMSEARCH_FLICKR8K),$(BIN)/python benchmarks/eval.py captions)
	$(if $(MMSEARCH_FLICKR8K),$(BIN)/python benchmarks/patches.py --every 10)
	$(BIN)/python benchmarks/fuzz.py
	$(BIN)/python benchmarks/kill.py --work $(BENCH)/kill
	$(BIN)/python benchmarks/indexing.py --source $(PICTURES) --work $(BENCH)/indexing --memory 20000
	$(BIN)/python benchmarks/scale.py

clean:
	rm -rf $(VENV) $(DEMO) $(BENCH) build dist *.egg-info
