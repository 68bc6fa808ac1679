# Every target works on a fresh clone: it creates .venv first, once. Start with `make demo`.
#   make setup   .venv with the versions of constraints.txt      make check   lint, then test
#   make demo    the smallest full run, on a CPU                 make lint    ruff (rules, format) and basedpyright
#   make test    the tests, on the CPU and without network       make slow    tests that take longer
#   make real    tests on real Whisper weights, REAL=FOLDER      make chaos   tests that kill processes and nodes
#   make gpu     tests of what only a GPU executes                make engines tests with vLLM, in .venv-vllm
#   make clean   remove .venv and caches
# PYTHON=python3.12 selects an interpreter; VOXRAY_TORCH_INDEX=URL adds a pip index for torch (see tools/setup.py).

# Each candidate is run, because a version manager's stub can be on PATH without a Python behind it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && \
	echo $$python && break; done)

# tools/setup.py writes this file last. If it is older than one of its prerequisites, set-up runs again.
STAMP := .venv/.setup-done

# .venv/bin is on PATH because DeepSpeed calls ninja by name.
WITH_VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"

# Hide the machine's GPUs, the network and any running Ray cluster from the tests.
TEST_ENV := env -u RAY_ADDRESS -u PYTHONDONTWRITEBYTECODE $(WITH_VENV) CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu \
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

.PHONY: setup demo test check lint slow chaos real gpu engines clean

setup: $(STAMP)
	@echo ".venv is ready"

$(STAMP): constraints.txt pyproject.toml tools/setup.py
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 on PATH: install one, or name one with PYTHON=" >&2; exit 1; }
	@$(PYTHON) tools/setup.py

demo: $(STAMP)
	@$(WITH_VENV) .venv/bin/python jobs/quickstart.py

test: $(STAMP)
	@$(TEST_ENV) OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/basedpyright

check: lint test

slow: $(STAMP)
	@$(TEST_ENV) .venv/bin/python -m pytest -m "slow and not chaos" --timeout 1800

chaos: $(STAMP)
	@$(TEST_ENV) .venv/bin/python -m pytest -m chaos --timeout 1800

real: $(STAMP)
	@test -d "$(REAL)" || { echo "REAL=FOLDER must name a folder of real Whisper weights and clips; see tests/real" >&2; exit 1; }
	@VOXRAY_REAL="$(abspath $(REAL))" $(TEST_ENV) .venv/bin/python -m pytest -m real

gpu: $(STAMP)
	@$(TEST_ENV) CUDA_VISIBLE_DEVICES="$${CUDA_VISIBLE_DEVICES-0}" DS_ACCELERATOR=cuda .venv/bin/python -m pytest -m gpu

.venv-vllm/.setup-done: $(STAMP)
	@$(PYTHON) tools/setup.py --vllm

engines: $(STAMP) .venv-vllm/.setup-done
	@VOXRAY_VLLM_PYTHON="$(CURDIR)/.venv-vllm/bin/python" $(TEST_ENV) OMP_NUM_THREADS=1 \
		.venv/bin/python -m pytest -m engines --timeout 1800

clean:
	rm -rf .venv .venv-vllm build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
