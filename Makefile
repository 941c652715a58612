# make demo    eight prompts -> demo/grid.png, with the embedded models
# make test    all tests            make lint    format, types, style
# make bench   speed and parity     make clean   forget the environment and the builds
#              (BENCH=--quick: reduced shapes in a minute or two, the README stays; DEVICE=cuda: on a GPU)
# make bench-gpu-static    what can be said of the GPU path without a GPU: docs/gpu.md
# make study   guidance compared    (docs/study.md; half an hour at most, and goes on where it was stopped)
#
# Each verb sets up what it needs in .venv. PYTHON chooses the interpreter (>= 3.10), TORCH the release of torch.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
TOOLS := $(VENV)/tools
PEERS := $(VENV)/peers
DEVICE ?= cpu
BENCH ?= $(if $(filter cpu,$(DEVICE)),--readme)
FONT := $(VENV)/font
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*) tests/cuda_threads.cpp tests/one_core_convolution.cpp

.PHONY: demo test lint bench bench-gpu-static study format clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/glide-fast sample --out demo "red apple" "grinning face" "red heart" "evergreen tree" \
	  "thumbs up, dark skin tone" "baby, medium skin tone" "bell" "soccer ball"

test: $(INSTALLED) $(TOOLS) $(FONT)
	$(BIN)/python -m pytest

lint: $(INSTALLED) $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

bench: $(INSTALLED) $(TOOLS) $(PEERS)
	$(BIN)/python -m bench --device $(DEVICE) $(BENCH)

bench-gpu-static: $(INSTALLED) $(TOOLS)
	$(BIN)/python -m bench.gpu_static --docs

study: $(INSTALLED) $(TOOLS) $(FONT)
	$(BIN)/glide-fast study --out docs --work build/study

format: $(TOOLS)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build demo *.egg-info glide_fast/*.so

# The package, editable, with its C++ ops. torch comes first: the ops are compiled against it.
$(INSTALLED): pyproject.toml setup.py $(CPP)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "glide_fast needs Python >= 3.10")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH) "setuptools>=77" wheel ninja
	GLIDE_FAST_REQUIRE_CPP=1 $(BIN)/python -m pip install -q --no-build-isolation -e .
	touch $@

$(TOOLS): $(INSTALLED)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[train,triton,test,lint]"
	touch $@

# Other runtimes to compare with; without them their rows say so.
$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[bench]" || echo "no other runtimes: their rows will say so"
	touch $@

# The font that the data set is drawn from; without it the tests that draw are skipped.
$(FONT): $(INSTALLED)
	$(BIN)/python -c 'from glide_fast.data.emoji import find_font; find_font()' 2>/dev/null || ( cd $(VENV) && mkdir -p share/fonts \
	  && apt-get download -q fonts-noto-color-emoji && dpkg-deb -x fonts-noto-color-emoji_*.deb share/fonts ) \
	  || echo "no emoji font: the tests that draw emoji will be skipped"
	touch $@
