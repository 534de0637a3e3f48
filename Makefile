# make demo    the example: a categorical VAE; leaves a picture in demo/
# make examples  the other examples; their numbers go into docs/examples.md
# make test    the tests;    make test-torch TORCH=2.8.0 with another torch
# make features  docs/features.md, from the tests
# make figures  docs/figures/*.png with their numbers; make figures FIGURES=samples one of them
# make bench   the measurements; leaves JSON in benchmarks/results, tables and plots in docs/
# make gpu-pages  what README and docs/ say of a GPU, from the JSON of benchmarks.report
# make lint    ruff, mypy, clang-format, changing nothing;    make format changes
# make sanitize  the C++ under ASan + UBSan and TSan
# make cuda-check  the CUDA kernels, without a GPU: emulated, planted with bugs, compiled, read
# make build   compile and install into .venv;    make clean removes all that make made
#
# Everything runs in .venv, which is made on first use. Another Python: make PYTHON=python3.12 ...

PYTHON ?= python3
# A compiler process takes about 1 GB with torch's headers.
export MAX_JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python
# For ninja, which torch looks for by name.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CXX_NAMES := -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu'
CXX_FILES = $(shell find csrc tests/cpp tests/cuda $(CXX_NAMES))
BUILD_INPUTS = setup.py pyproject.toml gumbel_ext/_version.py $(shell find csrc -type d -o $(CXX_NAMES))

.PHONY: build demo examples test features figures test-torch bench gpu-pages lint format sanitize clean
.PHONY: cuda-check cuda-suite cuda-emulation cuda-planted cuda-compiled

build: $(VENV)/.built

demo: build
	$(RUN) examples/categorical_vae.py --out demo

examples: build
	$(RUN) examples/vae_estimators.py --out docs/examples
	$(RUN) examples/structured_prediction.py --out docs/examples
	$(RUN) examples/semi_supervised.py --out docs/examples
	$(RUN) examples/actor_critic.py --out docs/examples
	$(RUN) examples/vector_quantizer.py --out docs/examples
	$(RUN) -m benchmarks.pages

test: build
	$(RUN) -m pytest $(or $(PYTEST_ARGS),--features=check)

features: build
	$(RUN) -m pytest -m feature --features=write

figures: build
	$(RUN) docs/figures/draw.py $(FIGURES)

# In a copy of the tree with an environment of its own, because the compiled module lies beside the
# Python files. The copy keeps them, its objects and its environment from one time to the next.
COPY := build/torch-$(TORCH)
test-torch:
	@test -n "$(TORCH)" || { echo "Which torch? For instance: make test-torch TORCH=2.8.0" >&2; exit 2; }
	@mkdir -p $(COPY)
	cd $(COPY) && find . \( -path ./.venv -o -path ./build -o -name '*.egg-info' \) -prune -o \
	    -type f ! -name '_C.*.so' ! -name _built_for.json -exec rm {} +
	git ls-files -z --cached --others --exclude-standard | \
	    tar -c --null --ignore-failed-read -T - | tar -x -C $(COPY)
	sed 's/^torch==.*/torch==$(TORCH)/' requirements-dev.txt > $(COPY)/requirements-dev.txt
	@touch -r requirements-dev.txt $(COPY)/requirements-dev.txt
	$(MAKE) -C $(COPY) test

bench: build
	$(RUN) -m benchmarks.run $(BENCH_ARGS)
	$(RUN) -m benchmarks.pages

gpu-pages: build
	$(RUN) -m benchmarks.pages

lint: build
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.requirements
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The CPU kernels know no torch, so that programs without it link those of the module.
CPU_OBJECTS = $(shell $(RUN) -c 'import sys, torch; \
    print(f"build/{sys.implementation.cache_tag}-torch{torch.__version__}/csrc/cpu")')

sanitize: build
	CPU_OBJECTS=$(CPU_OBJECTS) bash tests/cpp/run_sanitizers.sh

cuda-check: cuda-suite cuda-emulation cuda-planted cuda-compiled

cuda-suite: build
	$(RUN) -m pytest --device emulated $(PYTEST_ARGS)

cuda-emulation: build
	CPU_OBJECTS=$(CPU_OBJECTS) bash tests/cuda/run_emulation.sh

cuda-planted: build
	CPU_OBJECTS=$(CPU_OBJECTS) $(RUN) tests/cuda/planted_bugs.py

cuda-compiled:
	PYTHON=$(PYTHON) bash tests/cuda/check_compiled.sh

clean:
	rm -rf $(VENV) .venv-cuda build demo gumbel_ext.egg-info gumbel_ext/_built_for.json gumbel_ext/_C.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Editable: Python files are used where they lie, so that only a change below csrc, or of how it is
# built, compiles; and then ninja compiles what changed alone. A removed file counts as a change
# through the folders.
$(VENV)/.built: $(VENV)/.requirements $(BUILD_INPUTS)
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(VENV)/.requirements: requirements-dev.txt $(VENV)/.made
	$(RUN) -m pip install --requirement requirements-dev.txt
	@touch $@

# The stamp comes after the check of pip, so that a half-made environment is made again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
	    "gumbel_ext needs Python 3.10 or later, found " + sys.version.split()[0] + \
	    "; run: make PYTHON=python3.12")'
	$(PYTHON) -m venv --clear $(VENV)
	@$(RUN) -m pip --version > /dev/null
	@touch $@
