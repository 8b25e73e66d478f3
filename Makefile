# `make demo` and `make test` start from nothing but Python 3.11 or newer; the second run is quick.
# `make gpu` is for a machine whose Python already has PyTorch with its Triton, and of setup.py numpy, pillow, rich,
# safetensors, tifffile, pytest, pytest-xdist and hypothesis.

PYTHON ?= python3
# Test processes; each loads PyTorch.
WORKERS ?= 2
VENV := $(CURDIR)/.venv
RUN := $(VENV)/bin/python
# Byte code is written of what is imported, when it first is: pip would write all of it, for half a minute.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
# Beside the Triton that PyTorch brings: the oldest we support and the newest we know.
OTHER_TRITONS := 3.6.0 3.9.0
# The interpreter of Triton 3.6 makes integers of one-element arrays, which NumPy 2.4 refuses.
BESIDE_3.6.0 := numpy==2.3.5
# Compiled by each: of the portable kernels' configurations a part, drawn anew each time, and by the oldest and the
# newest Hopper's in a dtype each; `make sass` compiles all.
COMPILED_BY_SHIPPED := --share 0.25 --arch 80 --portable fp16 --portable ieee
COMPILED_BY_3.6.0 := --share 0.15 --arch 90 --portable tf32 --hopper fp16
COMPILED_BY_3.9.0 := --share 0.15 --arch 90 --portable fp16 --hopper tf32
# What is tested in the others' interpreters: each kind of kernel, in 16 bits.
TESTED_THERE := -k "half or fp16" $(addprefix tests/kernels/,test_conv.py test_upsample_concat.py test_head.py test_norm.py \
	test_backward.py::test_more_slabs_than_one test_backward.py::test_upsample \
	test_backward.py::test_activation_pool_and_bias)

# The oldest PyTorch and Triton we support; everything else as pip resolves it. PyTorch's wheels are those for GPUs.
OLDEST := torch==2.11.0 triton==3.6.0 $(BESIDE_3.6.0)

# Of the tests of kernels a share by each with the kernels it compiles, on the machine of tests/ptx; `make compiled`
# takes all.
COMPILED := OMP_NUM_THREADS=1 FASTUNET_COMPILED=
COMPILED_TESTS := tests/kernels tests/hopper/test_kernels.py tests/ptx

.DEFAULT_GOAL := help
# What runs on one core, two and two.
TRITONS := $(OTHER_TRITONS:%=triton-%) triton-shipped
.PHONY: help demo test lint types pytest fuzz compiled oldest triton $(TRITONS) bench gpu sass

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 10

demo: $(VENV)/installed ## segment a microscope image and check the result against plain PyTorch
	@$(RUN) examples/demo.py

test: lint pytest ## everything that needs no GPU
	@$(MAKE) --no-print-directory --jobs=$(WORKERS) --output-sync=target $(TRITONS) types

lint: $(VENV)/installed ## ruff: rules and format
	$(RUN) -m ruff check --quiet .
	$(RUN) -m ruff format --check --quiet .

types: $(VENV)/installed ## pyright
	$(RUN) -m pyright --pythonpath $(RUN)

pytest: $(VENV)/installed ## the tests, kernels in Triton's interpreter
	$(RUN) -m pytest -q -rs -n $(WORKERS) --dist worksteal

fuzz: $(VENV)/installed ## 500 random networks on the CPU and 200 in the interpreter: minutes
	$(RUN) -m pytest -q -n $(WORKERS) -m slow tests/verify/test_fuzz.py

compiled: $(VENV)/installed ## all tests of kernels, with the kernels compiled for a Hopper GPU and run on a CPU: an hour
	$(COMPILED)1 $(RUN) -m pytest -q -n $(WORKERS) $(COMPILED_TESTS)

oldest: $(VENV)/oldest/installed ## the tests by the oldest PyTorch and Triton we support: a download of gigabytes
	$(<D)/bin/python -m pytest -q -rs -n $(WORKERS) --dist worksteal
	$(COMPILED)1 $(<D)/bin/python -m pytest -q tests/ptx/test_plans.py tests/kernels/test_tf32.py

triton: $(TRITONS) ## the kernels compiled by every Triton we support

triton-shipped: $(VENV)/installed
	$(COMPILED)1 $(RUN) -m pytest -q tests/ptx tests/kernels/test_tf32.py
	$(COMPILED)0.05 $(RUN) -m pytest -q $(COMPILED_TESTS)
	$(RUN) benchmarks/sass.py --once $(COMPILED_BY_SHIPPED)

sass: $(VENV)/installed ## compile every kernel for every alignment of its arguments: minutes
	$(RUN) benchmarks/sass.py

$(OTHER_TRITONS:%=triton-%): triton-%: $(VENV)/triton-%/installed
	@PYTHONPATH=$(<D) $(RUN) -c "import triton; print('Triton', triton.__version__); assert triton.__version__ == '$*'"
	PYTHONPATH=$(<D) OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs $(TESTED_THERE)
	PYTHONPATH=$(<D) $(COMPILED)0.05 $(RUN) -m pytest -q $(COMPILED_TESTS)
	PYTHONPATH=$(<D) $(COMPILED)1 $(RUN) -m pytest -q tests/ptx/test_plans.py -k hopper
	PYTHONPATH=$(<D) $(RUN) benchmarks/sass.py --once $(COMPILED_BY_$*)

bench: $(VENV)/installed ## timings against plain PyTorch, every output checked first; rows and page
	-$(RUN) -m fastunet bench
	$(RUN) -m fastunet report --readme README.md

# Each step has its own limit in seconds and runs whatever came of those before it; together 9 minutes at most. The
# benchmark's table of verdicts comes last, of what was measured by then if its time ran out.
GPU_TESTS := tests/kernels tests/ops tests/test_model.py tests/test_training.py \
	tests/test_kept_for_backward.py tests/test_graph.py tests/test_plan.py tests/verify
# Of which some take 9 GB of the GPU's memory for a while.
GPU_WORKERS ?= 8
STEP = PYTHONPATH=. timeout --kill-after=15

gpu: ## on this machine's GPU, in this checkout, with its own Python: tests, verify, the quick benchmark
	@$(PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'PyTorch sees no CUDA device')"
	@$(STEP) --signal=INT 210 $(PYTHON) -m pytest -q -rs -n $(GPU_WORKERS) -m "cuda or not slow" $(GPU_TESTS); tests=$$?; \
	$(STEP) 60 $(PYTHON) -m fastunet verify --device cuda --dtype bf16; verify=$$?; \
	echo "exit codes: tests $$tests, verify $$verify (124: out of time)"; \
	$(STEP) --signal=INT 220 $(PYTHON) -m fastunet bench --quick --budget 170; bench=$$?; \
	test "$$tests$$verify$$bench" = 000

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt setuptools
	$(PIP) --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) --constraint constraints.txt --no-deps dynamic-network-architectures
	@touch $@

$(VENV)/oldest/installed: setup.py
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-compile $(OLDEST) --editable '.[train,verify,test]'
	$(@D)/bin/python -m pip install --quiet --no-compile --no-deps dynamic-network-architectures
	@touch $@

$(VENV)/triton-%/installed: $(VENV)/installed
	$(PIP) --no-deps --upgrade --target $(@D) triton==$* $(BESIDE_$*)
	@touch $@
