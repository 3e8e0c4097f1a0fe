# `make bench` and `make test` do all the set-up: each creates .venv and installs vtprune into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest
SERVING := .venv-vllm
# An editable build warns of folders with the package's name in the working directory: they are the package.
INSTALL := PYTHONWARNINGS=ignore

# One thread a test process: tiny models gain nothing from more, and two processes share two cores.
test test-all test-browser test-lowest serve-test: export OMP_NUM_THREADS := 1

.PHONY: bench bench-all test test-all test-browser test-lowest serve-test pictures docs lint format clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(INSTALL) $(BIN)/python -m pip install --quiet --editable '.[eval,clip,demo,dev]'
	@touch $(STAMP)

bench: $(STAMP)
	$(BIN)/vtprune bench --output bench
	$(BIN)/vtprune bench --model tiny-qwen --limit 200 --output bench/tiny-qwen

# Every method on both bundled models, and what the second set asks.
MORE := vtprune_grounding,vtprune_descriptions,vtprune_forms,vtprune_pairs
bench-all: $(STAMP)
	$(BIN)/vtprune bench --all --output bench-all
	$(BIN)/vtprune bench --all --model tiny-qwen --output bench-all/tiny-qwen
	$(BIN)/vtprune bench --model tiny-qwen --limit 0 --tasks $(MORE),vtprune_clips --output bench-all/tiny-qwen-more
	$(BIN)/vtprune bench --limit 0 --tasks vtprune_descriptions --output bench-all/descriptions

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not browser"

test-all: $(STAMP) test-lowest
	$(BIN)/python -m pytest -n 2 --support adapters/support.md

# The demo and the report in a real browser.
test-browser: $(STAMP)
	@command -v chromium chromium-browser google-chrome >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } || \
		{ echo "no Chromium is found, and apt-get could not install one: install it, and run this again"; exit 1; }
	$(BIN)/python -m pytest -m "browser and not slow" tests/evals

# The README's picture of the demo, made by one of its tests.
pictures: $(STAMP)
	VTPRUNE_PICTURES=assets $(BIN)/python -m pytest tests/evals/demo/test_page.py -k picture

# The lowest transformers release that vtprune supports, beside the newest one.
test-lowest: $(STAMP)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(INSTALL) $(LOWEST)/bin/python -m pip install --quiet --editable '.[eval,clip,demo,dev]' 'transformers==5.20.0'
	$(LOWEST)/bin/python -m pytest -n 2 -m "not slow and not browser"

# vtprune in vLLM, against vtprune in transformers. vLLM has an environment of its own (3.4 GB), made by pip on a CPU with
# Linux on x86-64; where it cannot be made nothing is tested, and the reason is said.
serve-test: $(STAMP)
	@$(PYTHON) tests/serving/environment.py $(SERVING) || { echo "serve-test is skipped: pip could not make $(SERVING)"; exit 0; } && \
		{ VTPRUNE_VLLM_PYTHON=$(CURDIR)/$(SERVING)/bin/python $(BIN)/python -m pytest -s tests/serving && \
		$(SERVING)/bin/python -m pytest --noconftest -c /dev/null --rootdir . tests/serving/test_repairs.py; }

# The pages as a site with a search, in build/site; a warning ends the build.
$(STAMP)-docs: $(STAMP)
	$(INSTALL) $(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(STAMP)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict --config-file vtprune/docs/site/mkdocs.yml
	@echo "the site is in build/site: $(BIN)/python -m http.server --directory build/site"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) $(SERVING) build *.egg-info
