# Two commands to begin with: `make demo` and `make test`. `make help` lists the rest.
# Variables: PYTHON (which interpreter), VENV (which virtual environment), PIP_FLAGS (given to every pip install).

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=

BIN := $(VENV)/bin
# A stamp says what is installed in a virtual environment; it is stale when pyproject.toml is newer.
BASE := $(VENV)/.installed-base
TEST := $(VENV)/.installed-test
DEV := $(VENV)/.installed-dev
PARITY := $(VENV)/.installed-parity
BROWSER := $(VENV)/.installed-browser
EXTRAS := cpu,demo
INSTALL := $(BIN)/python -m pip install $(PIP_FLAGS)

.PHONY: help venv demo tiny screenshots ui-screenshots test parity lint check clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' Makefile

venv: $(TEST) ## Create .venv with everything that the demo and the tests need.

demo: $(BASE) ## Train, evaluate, export, serve and ask the tiny demo model, on a CPU.
	@$(BIN)/python examples/demo.py

tiny: $(BASE) ## Make the demo model anew, from pictures to weights, in runs/tiny (about an hour).
	rm -rf runs/tiny
	$(BIN)/python examples/shapes.py pretrain --count 60000 --seed 1 runs/tiny/shapes
	$(BIN)/python examples/shapes.py text --count 6000 --seed 1 runs/tiny/shapes
	$(BIN)/python examples/shapes.py pretrain --count 300 --seed 2 runs/tiny/heldout
	$(BIN)/python examples/shapes.py closeups --count 60000 --seed 3 runs/tiny/closeups
	$(BIN)/python examples/shapes.py closeups --count 200 --seed 4 runs/tiny/closeups/heldout
	$(BIN)/ernietune init runs/tiny/init --shape demo-vl --tokenizer data/tiny
	$(BIN)/ernietune train configs/tiny/pretrain_words.yaml
	$(BIN)/ernietune train configs/tiny/pretrain.yaml
	$(BIN)/ernietune train configs/tiny/pretrain_closeups.yaml
	$(BIN)/ernietune train configs/tiny/pretrain_mixed.yaml
	@echo "the model is the best checkpoint in runs/tiny/model/checkpoints (see run.json there)"

screenshots: $(TEST) ## Photograph the preview and evaluation pages (docs/images); needs Chromium.
	$(BIN)/python examples/screenshots.py

test: $(TEST) ## Run the tests; needs no torch.
	@$(BIN)/python -m pytest -m "not parity"

parity: $(PARITY) ## Compare with torch and transformers, which are installed for it.
	@$(BIN)/python -m pytest -m parity -rP

lint: $(DEV) ## ruff, mypy and the import rules.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: lint test ## What a change must pass before it is sent.

ui-screenshots: $(BROWSER) ## Take docs/images anew in a real browser (Chromium); needs what make demo leaves in runs.
	@test -d runs/demo || $(MAKE) --no-print-directory demo
	$(BIN)/python tests/ui_screenshots.py docs/images

clean: ## Remove virtual environments, caches and builds; runs/ stays.
	rm -rf .venv .ci-venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 14) else \
	"ernietune needs Python 3.10 to 3.13 and $(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(TEST): $(BASE)
	$(INSTALL) -e '.[$(EXTRAS),test]'
	@touch $@

$(DEV): $(TEST)
	$(INSTALL) -e '.[$(EXTRAS),test,dev]'
	@touch $@

$(BROWSER): $(TEST)
	$(INSTALL) -e '.[$(EXTRAS),test,browser]'
	@touch $@

# torch first and alone: whichever build PIP_FLAGS picks then stays, and the extra finds it installed.
$(PARITY): $(TEST)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[$(EXTRAS),test,parity]'
	@touch $@
