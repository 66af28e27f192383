# Tasks in a checkout. Everything runs in .venv, which is created when first needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOW := $(shell date +%Y%m%d-%H%M%S)
RUN = $@-$(NOW)
CODE := scalablevit_pl tests docs checkpoints benchmarks
# Folder with the four original files, as installed by Debian's package dataset-fashion-mnist.
FASHION_MNIST ?= /usr/share/datasets/fashion-mnist

# The tests of a file run in one process, so shared fixtures are built once. The longest files run first.
FAST := -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu and not network"

# If the environment disables bytecode, each test process would compile all of torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart quickstart-segmentation test test-all test-oldest lint format wheel-check verify-checkpoints \
    benchmark-imports benchmark-loading benchmark-loader benchmark-check benchmark-networks clean

# Train nano on a sample, test it, and list the pictures: as a classifier, or as a segmenter of scenes.
quickstart quickstart-segmentation: $(VENV)/.installed
	$(BIN)/scalablevit fit --config recipes/$(subst -,_,$@).yaml --run $(RUN)
	$(BIN)/scalablevit test --run $(RUN)
	@echo
	@echo "Pictures:"
	@ls -1 runs/$(RUN)/*.png

test: lint
	$(BIN)/pytest $(FAST)

test-all: lint
	$(BIN)/pytest -n 2

# The fast tests with the oldest versions that pyproject.toml allows, in a separate environment.
test-oldest:
	$(PYTHON) -m venv --clear build/oldest
	build/oldest/bin/pip install --quiet --constraint tests/oldest.txt -e ".[dev]"
	build/oldest/bin/pytest $(FAST)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy --strict scalablevit_pl

format: $(VENV)/.installed-dev
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# Build the wheel, install it with its dependencies into a separate environment, and use it outside the checkout.
wheel-check: $(VENV)/.installed-dev
	rm -rf build/wheel-check && mkdir -p build/wheel-check
	$(BIN)/python -m build --wheel --outdir build/wheel-check .
	$(PYTHON) -m venv build/wheel-check/venv
	build/wheel-check/venv/bin/pip install --quiet build/wheel-check/*.whl
	cd build/wheel-check && venv/bin/scalablevit fit --config recipes/quickstart.yaml --run wheel \
	    --trainer.limit_train_batches 2 --trainer.limit_val_batches 2 --trainer.max_epochs 1
	cd build/wheel-check && venv/bin/scalablevit test --run wheel

# Test each released model on its data and compare the result with its card.
verify-checkpoints: $(VENV)/.installed build/fashion_mnist/test.parquet
	for model in checkpoints/*.fashion_mnist; do \
	    $(BIN)/scalablevit test --config recipes/fashion_mnist.yaml --weights $$model \
	        --data.dataset build/fashion_mnist --run build/verify && \
	    $(BIN)/python checkpoints/verify.py $$model build/verify/test.json || exit 1; \
	done

build/fashion_mnist/test.parquet: | $(VENV)/.installed
	@test -d $(FASHION_MNIST) || { echo "$(FASHION_MNIST) is missing: install Debian's dataset-fashion-mnist, or" \
	    "download https://github.com/zalandoresearch/fashion-mnist and set FASHION_MNIST=..."; exit 1; }
	$(BIN)/python -m scalablevit_pl.data.samples.make_fashion_mnist_sample --idx $(FASHION_MNIST) \
	    --out build/fashion_mnist --train-per-class 6000 --test-per-class 1000

# Import time of the networks, relative to torch.
benchmark-imports: $(VENV)/.installed
	$(BIN)/python benchmarks/imports.py

# Time and memory of loading a model, relative to the minimum with torch and safetensors.
benchmark-loading: $(VENV)/.installed
	$(BIN)/python benchmarks/loading.py

# Images per second and core of the training loader, relative to ImageFolder with timm's transform.
PHOTOS ?= /usr/share/backgrounds
benchmark-loader: $(VENV)/.installed
	$(BIN)/python benchmarks/loader.py --photos $(PHOTOS)

# Check in about a minute, by ratios to references, whether a network has become slower.
benchmark-check: $(VENV)/.installed
	$(BIN)/python benchmarks/regression.py

# The tables of docs/benchmarks.md: ScalableViT against Swin-T and Twins-SVT-S, on the GPU if there is one.
benchmark-networks: $(VENV)/.installed
	$(BIN)/python benchmarks/networks.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without bytecode: most of torch's modules are never imported, and the others are compiled on import.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --no-compile -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --no-compile -e ".[dev]"
	@touch $@ $(VENV)/.installed
