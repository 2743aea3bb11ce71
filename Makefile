# One runner for everything. Each target first sets up .venv where that is needed.
# PYTHON=python3.12 make test   picks the interpreter that .venv is made with.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRITON := $(VENV)/triton

DEMO_PROMPTS := \
	"a large red circle above a small green star on a white background" \
	"a yellow star to the left of a purple heart on a black background" \
	"a small cyan cross below a large green circle on a beige background" \
	"an orange ring to the right of a pink heart on a gray background" \
	"a large purple cross in the center on a white background" \
	"a blue square in the bottom right corner on a beige background" \
	"a large green heart below a small yellow square on a black background" \
	"an orange star on the right on a gray background"

.DEFAULT_GOAL := help
.PHONY: help demo test lint audit docs bench cpp cpp-check clean

help:
	@echo "make demo   set up, build the default bundle, draw eight prompts into demo.png"
	@echo "make test   set up and run the tests"
	@echo "make lint   ruff and mypy"
	@echo "make audit  the dependencies' licences and known vulnerabilities"
	@echo "make docs   regenerate what docs/ has of commands, figures and imports"
	@echo "make bench  export a full-size model: time, memory, bytes written"
	@echo "make cpp    build the C++ library and its command into build/cpp"
	@echo "make cpp-check  the C++ library under sanitizers and valgrind, with damaged files"
	@echo "make clean  remove .venv, caches and build leftovers"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "Python 3.10 or later is needed, this is %d.%d. Name another: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@echo "Setting up $(VENV): the first time this fetches 1 GB or more and takes a few minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[all]'
	@touch $@
	@echo "$(VENV) is ready."

demo: $(READY)
	$(BIN)/fluxdeploy build
	$(BIN)/fluxdeploy generate $(DEMO_PROMPTS) --seed 7 --out image.png --sheet demo.png
	@echo "Look at demo.png: each picture has its prompt below it. Training saw none of these"
	@echo "combinations. How often shapes, colours and places are right is in docs/figures.md."

$(TRITON): $(READY) tests/support/triton_server.py
	$(BIN)/python -m tests.support.triton_server $(TRITON)

test: $(READY) $(TRITON)
	$(BIN)/python -m pytest -q -n auto --dist worksteal --durations=10

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

audit: $(READY)
	$(BIN)/python .ci/audit.py

docs: $(READY)
	$(BIN)/python -m fluxdeploy.cli.reference docs/commands.md
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/imports.py

bench: $(READY)
	$(BIN)/python benchmarks/export_scale.py

RUNTIME = -D FLUXDEPLOY_ONNXRUNTIME_INCLUDE=$(CURDIR)/build/onnxruntime \
	-D FLUXDEPLOY_ONNXRUNTIME=$$(ls $(CURDIR)/$(VENV)/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*) \
	-D FLUXDEPLOY_OPENVINO=ON \
	-D FLUXDEPLOY_OPENVINO_INCLUDE=$$(ls -d $(CURDIR)/$(VENV)/lib/python3*/site-packages/openvino/include) \
	-D FLUXDEPLOY_OPENVINO_LIBRARY=$$(ls $(CURDIR)/$(VENV)/lib/python3*/site-packages/openvino/libs/libopenvino_c.so.*)

# Debian's packages, the headers of ONNX Runtime among them; its library is that of .venv, and so are
# OpenVINO's headers and library.
cpp: $(READY)
	engines/cpp/packages.sh $(CURDIR)/build/onnxruntime
	cmake -S engines/cpp -B build/cpp -G Ninja -Wno-dev \
	  -D FLUXDEPLOY_WERROR=ON -D FLUXDEPLOY_EXAMPLES=ON -D FLUXDEPLOY_TESTS=ON $(RUNTIME)
	cmake --build build/cpp

# Takes the bundle of `make demo`, and builds that where there is none.
BUNDLE := bundle
INPUTS := 100000

cpp-check: cpp
	test -e $(BUNDLE) || $(BIN)/fluxdeploy build --out $(BUNDLE)
	engines/cpp/check.sh $(BIN)/python $(BUNDLE) $(INPUTS) $(RUNTIME)

clean:
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist *.egg-info
