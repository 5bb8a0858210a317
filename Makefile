# Every step of the project's work is a target here; continuous integration calls nothing else.
# Needed: Python 3.10 or newer, Rust, a network. The rest is installed into .venv by pip.

PYTHON ?= python3# makes .venv
PIP_ARGS ?=# more arguments for every `pip install`
TORCH_INDEX ?=# package index to take torch from; the usual one if empty
PYTEST_ARGS ?=# more arguments for pytest
PYTEST_WORKERS ?= auto# processes that share the Python tests, at most 4; 0: this one alone
MATURIN ?= maturin>=1.9,<2# what `make build` installs to build with
MATURIN_ARGS ?=# more arguments for `maturin build`
DEMO_ARGS ?=# arguments of the demo
BENCH_ARGS ?=# arguments of the bench
AOT_ARGS ?=# arguments of `make aot`: --quick, --arch sm_90, --name matmul
GPU_BUNDLE_ARGS ?=# arguments of `make gpu-bundle`: --python 3.12, --cuda 130, --package peft
GPU_OUT ?= build/gpu-results# where `make test-gpu` and `make bench-gpu` write
PEERS ?=# 1: bench-cpu first installs the packages that it compares with, some minutes
NIGHTLY ?= nightly# toolchain of `make sanitize` (with its components miri and rust-src) and `make fuzz`
FUZZ_RUNS ?= 1000000# executions of each half of `make fuzz`
QEMU_CPU ?= max# processor that `make test-neon` emulates; cortex-a53 has no half-precision arithmetic

VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
VENV_PYTHON := $(BIN)/python
PIP_INSTALL = $(VENV_PYTHON) -m pip install --disable-pip-version-check $(PIP_ARGS)

# What the native extension is built from; one that is missing from the tree is built again.
NATIVE_SOURCES := Cargo.toml Cargo.lock $(shell find rust -name '*.rs' -o -name Cargo.toml)
NATIVE_MISSING := $(if $(wildcard python/qkern/_native*.so python/qkern/_native*.pyd),,missing)

# A file's tests stay in one process and in their order: they share what is made for the file.
PARALLEL_PYTEST = $(VENV_PYTHON) -m pytest -n $(PYTEST_WORKERS) --maxprocesses 4 \
	--dist loadfile --no-loadscope-reorder

# One interpreter for every cargo command, or each of them would build the binding anew.
export PYO3_PYTHON := $(abspath $(VENV_PYTHON))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install build sdist lint format test test-rust test-neon test-python \
	test-large test-wheel demo bench-codec bench-bitsandbytes bench-cpu bench-methods \
	bench-scales bench-checkpoint aot gpu-bundle test-gpu bench-gpu sanitize fuzz clean missing

help: ## show this help
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' \
		$(firstword $(MAKEFILE_LIST))

install: $(VENV)/.dev ## .venv with the package (editable), its extras and all tools

build: $(VENV)/.maturin ## a wheel in dist/
	PATH="$(abspath $(BIN)):$$PATH" maturin build --release --out dist $(MATURIN_ARGS)

sdist: $(VENV)/.maturin ## a source distribution in dist/
	$(BIN)/maturin sdist --out dist

lint: $(VENV)/.dev ## style, types, stubs, imports, clippy: changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/stubtest qkern._native --mypy-config-file tests/stubtest.ini \
		--allowlist tests/stubtest-allow.txt
	cd python && ../$(BIN)/lint-imports --config ../pyproject.toml \
		--cache-dir ../.import_linter_cache
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

format: $(VENV)/.dev ## put all files into shape
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	cargo fmt --all

test: test-rust $(VENV)/.dev ## all tests: Rust, then Python with those of the wheel
	$(PARALLEL_PYTEST) $(PYTEST_ARGS)

test-rust: ## the tests of the Rust crates
	cargo test --workspace --exclude qkern-py

# Compiled here, run by an emulator. On an ARM machine `make test-rust` is the same without one.
test-neon: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER = aarch64-linux-gnu-gcc
test-neon: export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER = \
	qemu-aarch64 -cpu $(QEMU_CPU) -L /usr/aarch64-linux-gnu
test-neon: ## the Rust tests for 64-bit ARM under qemu: minutes, on Linux
	@command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null || { \
		echo "error: an emulator and a linker are missing: install qemu-user and" \
			"gcc-aarch64-linux-gnu (Debian, Ubuntu)" >&2; exit 1; }
	@ls "$$(rustc --print target-libdir --target aarch64-unknown-linux-gnu)" >/dev/null 2>&1 || { \
		echo "error: Rust's library for ARM is missing:" \
			"rustup target add aarch64-unknown-linux-gnu" >&2; exit 1; }
	cargo test -p qkern-codec --target aarch64-unknown-linux-gnu

test-python: $(VENV)/.dev ## the Python tests that need no network
	$(PARALLEL_PYTEST) -m "not wheel" $(PYTEST_ARGS)

test-large: $(VENV)/.dev ## tensors of more than 2^31 values there and back: 8 GiB of memory
	QKERN_TEST_LARGE=1 $(VENV_PYTHON) -m pytest tests/reliability/test_native.py -k a9 $(PYTEST_ARGS)

test-wheel: $(VENV)/.dev ## build the wheel, open it, use it where there is no torch
	$(VENV_PYTHON) -m pytest -m wheel $(PYTEST_ARGS)

aot: $(VENV)/.dev ## compile the Triton kernels for every GPU: registers, spills, instructions
	$(VENV_PYTHON) tests/kernels/aot_report.py $(AOT_ARGS)

gpu-bundle: build ## wheels in build/gpu for a machine with a GPU and without Rust or network
	$(VENV_PYTHON) tests/gpu/bundle.py $(GPU_BUNDLE_ARGS)

# Where there is no Rust, the wheels of build/gpu serve, and python3 must have torch and pytest.
HAS_RUST := $(shell command -v cargo 2>/dev/null)
GPU_PYTHON ?= $(if $(HAS_RUST),$(VENV_PYTHON),python3)
GPU_RUN = OUT="$(GPU_OUT)" GPU_PYTHON="$(GPU_PYTHON)" tests/gpu/run.sh

test-gpu: $(if $(HAS_RUST),$(VENV)/.dev) ## the tests of kernels on a GPU, and those that need one
	$(GPU_RUN) test

bench-gpu: $(if $(HAS_RUST),$(VENV)/.dev) ## products, codec and blocks of a model on a GPU
	BENCH_ARGS="$(BENCH_ARGS)" $(GPU_RUN) bench

demo: $(VENV)/.train ## fine-tune a small model on a laptop
	$(VENV_PYTHON) examples/demo/demo.py $(DEMO_ARGS)

bench-codec: $(VENV)/.dev ## speed of host quantize and dequantize beside other packages
	$(VENV_PYTHON) benches/bench_codec.py $(BENCH_ARGS)

bench-cpu: $(VENV)/.dev $(if $(PEERS),$(VENV)/.peers) ## layers, codec, a model beside other packages and the limits of memory
	$(VENV_PYTHON) benches/bench_cpu.py $(BENCH_ARGS)

bench-bitsandbytes: $(VENV)/.dev ## bitsandbytes' CPU calls by itself and with the plug-in
	$(VENV_PYTHON) benches/bench_bitsandbytes_plugin.py $(BENCH_ARGS)

bench-methods: $(VENV)/.dev ## what the search for scales gains over absmax, and what it costs
	$(VENV_PYTHON) benches/bench_methods.py $(BENCH_ARGS)

bench-scales: $(VENV)/.dev ## what 8-bit scales do to small rows, beside other packages
	$(VENV_PYTHON) benches/bench_double_quant.py $(BENCH_ARGS)

bench-checkpoint: $(VENV)/.dev ## files quantized, beside reading them and cp: BENCH_ARGS="SOURCE TARGET"
	$(VENV_PYTHON) benches/bench_checkpoint.py $(BENCH_ARGS)

# Each has its own flags for all crates, so each has its own folder. Miri knows no AVX-512.
sanitize: HOST = $(shell rustc +$(NIGHTLY) -vV | sed -n 's/^host: //p')
sanitize: SUITE = -p qkern-codec --lib --tests --target $(HOST)
sanitize: MIRI = PROPTEST_CASES=1 MIRIFLAGS=-Zmiri-disable-isolation cargo +$(NIGHTLY) miri test
sanitize: ## the Rust code under Miri and sanitizers, on Linux on x86-64 with a nightly Rust
	$(MIRI) -p qkern-codec --test bodies --target-dir target/miri
	RUSTFLAGS=-Ctarget-feature=+avx2,+f16c \
		$(MIRI) -p qkern-codec --test bodies --target-dir target/miri-avx2
	RUSTFLAGS=-Zsanitizer=address cargo +$(NIGHTLY) test $(SUITE) --target-dir target/asan
	RUSTFLAGS=-Zsanitizer=thread \
		cargo +$(NIGHTLY) test -Zbuild-std $(SUITE) --target-dir target/tsan

# What it finds stays in rust/checkpoint/fuzz/corpus, and where it crashes in fuzz/artifacts.
fuzz: $(VENV)/.dev ## made-up headers, indices, states against the reader: a nightly Rust and cargo-fuzz
	@cargo fuzz --version >/dev/null 2>&1 || { \
		echo "error: there is no cargo-fuzz: cargo install cargo-fuzz" >&2; exit 1; }
	mkdir -p rust/checkpoint/fuzz/corpus/checkpoint
	cd rust/checkpoint && cargo +$(NIGHTLY) fuzz run checkpoint \
		fuzz/corpus/checkpoint fuzz/seeds -- -dict=fuzz/safetensors.dict -max_len=6000 \
		-malloc_limit_mb=32 -runs=$(FUZZ_RUNS) -print_final_stats=1
	$(VENV_PYTHON) tests/fuzz_states.py $(FUZZ_RUNS)

clean: ## remove .venv and everything that was built
	rm -rf $(VENV) target dist build python/qkern/_native*.so python/qkern/_native*.pyd
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# -- environments: each stamp says that its extras are installed and the extension is current -----

define install_extras
	@command -v cargo >/dev/null || { \
		echo "error: there is no cargo: install Rust, see https://rustup.rs" >&2; exit 1; }
	$(if $(TORCH_INDEX),$(PIP_INSTALL) --index-url $(TORCH_INDEX) torch)
	$(PIP_INSTALL) --editable ".[$(1)]"
endef

# The demo needs no tools for tests: a new user should not wait for them.
$(VENV)/.train: pyproject.toml $(NATIVE_SOURCES) $(NATIVE_MISSING) | $(VENV)/.made
	$(call install_extras,train)
	@touch $@

$(VENV)/.dev: pyproject.toml $(NATIVE_SOURCES) $(NATIVE_MISSING) | $(VENV)/.made
	$(call install_extras,lint$(comma)test)
	@touch $(VENV)/.train $@

$(VENV)/.peers: benches/requirements-peers.txt $(VENV)/.dev
	$(PIP_INSTALL) -r $<
	@touch $@

$(VENV)/.maturin: | $(VENV)/.made
	$(PIP_INSTALL) "$(MATURIN)"
	@touch $@

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: $(PYTHON) must be Python 3.10 or newer; name another: make PYTHON=..." >&2; \
		exit 1; }
	@$(PYTHON) -m venv $(VENV) && $(VENV_PYTHON) -m pip --version >/dev/null || { \
		echo "error: $(PYTHON) cannot make an environment with pip: install its venv and" \
			"ensurepip modules (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PIP_INSTALL) --upgrade pip
	@touch $@

comma := ,
