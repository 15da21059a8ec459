# Two commands from a bare machine: `make demo` and `make test`. Everything else builds on the same environment.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install --quiet --disable-pip-version-check
TESTS := $(BIN)/python -m pytest -n 2 --dist worksteal --durations 20

.PHONY: demo test test-all test-oldest test-vision lint docs bench gpu gpu-smoke minimal clean

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PIP) -e ".[sft]"
	touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(PIP) -e ".[dev]"
	touch $@

demo: $(VENV)/demo  ## Lily, LoRA and a quarter of their size on real data, three seeds each
	$(BIN)/lily compare quickstart data.max_train=4000 --methods lily,lora,lily/4 --seeds 3 --output runs/demo --overwrite

test: $(VENV)/dev  ## the tests that need no download (3 to 9 minutes on 2 cores)
	$(TESTS) -m "not slow and not network"

test-all: $(VENV)/dev  ## also the slow ones and those that download a package
	$(TESTS)

# The oldest versions that pyproject.toml allows, and the tests of what depends on them.
CORE := tests/plan tests/layers tests/tuner tests/kernels tests/checkpoint tests/callbacks/test_settle.py \
	tests/recipes/trainer/test_private_methods.py tests/recipes/trainer/test_interrupted.py tests/recipes/test_train.py

$(VENV)-oldest/oldest: constraints-oldest.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	PIP_CONSTRAINT=$(CURDIR)/constraints-oldest.txt $(VENV)-oldest/bin/pip install --quiet torch
	PIP_CONSTRAINT=$(CURDIR)/constraints-oldest.txt $(VENV)-oldest/bin/pip install --quiet -e ".[dev]"
	touch $@

test-oldest: $(VENV)-oldest/oldest  ## the core of the tests on the oldest supported torch, peft and transformers
	$(VENV)-oldest/bin/python -m pytest -n 2 --dist worksteal -m "not slow and not network" $(CORE)

# A separate environment: where torchvision is installed without CUDA, transformers cannot be imported unless the two
# operators that are missing are declared first, which the tests do and a user's program does not.
$(VENV)-vision/vision: constraints.txt pyproject.toml
	$(MAKE) VENV=$(VENV)-vision $(VENV)-vision/dev
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(VENV)-vision/bin/pip install --quiet --no-deps torchvision timm
	touch $@

test-vision: $(VENV)-vision/vision  ## the paper's setting on a timm vision transformer
	$(VENV)-vision/bin/python -m pytest -k timm \
		tests/test_paper.py tests/plan/test_fused_layouts.py tests/tuner/test_call_uncalled.py tests/recipes/test_image_recipes.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site is built beside the package, since the reference is made from the program itself.
$(VENV)/docs: $(VENV)/dev
	$(PIP) -e ".[docs]"
	touch $@

docs: $(VENV)/docs  ## the site, into site/, with strict links; nothing in it is loaded from elsewhere
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	$(BIN)/python docs/hooks/selfcontained.py site

bench: $(VENV)/dev
	$(BIN)/python benchmarks/performance.py --out runs/bench

# A machine with a GPU may have no network, so this uses the Python that has PyTorch and installs nothing.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:  ## everything that needs a GPU, in ten minutes and without a network; GPU="map --again" for single parts
	$(GPU_PYTHON) benchmarks/gpu.py $(GPU)

gpu-smoke: $(VENV)/dev  ## the same on a CPU with tiny models: does it run? (1 minute)
	$(BIN)/python benchmarks/gpu.py --smoke

minimal: constraints.txt  ## the package imports, and plans, with its minimal dependencies only
	rm -rf $(VENV)-minimal
	$(PYTHON) -m venv $(VENV)-minimal
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(VENV)-minimal/bin/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(VENV)-minimal/bin/pip install --quiet .
	$(VENV)-minimal/bin/lily recipes
	$(VENV)-minimal/bin/python -c "import lily; print(lily.LilyConfig())"
	rm -rf $(VENV)-minimal

clean:
	rm -rf $(VENV) $(VENV)-vision $(VENV)-oldest runs site
