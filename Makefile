# make demo   a real model on this machine's CPU: download, build, chat, benchmark
# make test   what CI runs: format, lints, tests, documentation
# make rules  the first part of it, what a change of a rule changes: samples, file tests and snapshots of all families
# make bless  accepts that
# make nits   format, lints, and the limits of scripts/shape.py
# make rest   the other tests, what `make rules` has not run
# make soak   100,000 requests through the engine on the CPU: exact lengths, no page lost, flat memory; takes minutes
# make fuzz   random programs through every stage against the interpreter: SEED= and MINUTES= say from where and for
#             how long; without SEED it goes on where it stopped
# make nvrtc  CUDA's run-time compiler and disassembler from PyPI, so that `make test` compiles every generated
#             kernel and looks at its machine code; needs no GPU
# make deny   licences, sources and bans of all dependencies by cargo-deny, without network

CARGO ?= cargo
PYTHON ?= python3
TARGET := $(or $(CARGO_TARGET_DIR),target)
NVRTC := $(TARGET)/nvrtc

# Snapshots that differ fail; `INSTA_UPDATE=always` takes them.
export INSTA_UPDATE ?= no

# What has tests that are ignored for want of NVRTC, and no others that are. They run if it is there, or has to be.
NVRTC_TESTS := --lib --test cuda_compile --test kernel_work
HAS_NVRTC = $(wildcard $(NVRTC)/installed-*)$(LATHE_REQUIRE_NVRTC)

# What `make rules` runs, and every other test program; no test program has to be named here.
RULES := rules file_tests snapshots
REST := $(filter-out $(RULES),$(sort $(basename $(notdir $(wildcard tests/*.rs */tests/*.rs))) \
	$(notdir $(patsubst %/main.rs,%,$(wildcard tests/*/main.rs */tests/*/main.rs)))))

.PHONY: demo test rules rest bless nits soak fuzz nvrtc deny
.DEFAULT_GOAL := test

demo:
	CARGO="$(CARGO)" PYTHON="$(PYTHON)" TARGET="$(TARGET)" bash scripts/demo.sh

test: rules nits rest
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

# Of the whole workspace, so that it builds nothing that the rest builds otherwise.
rules:
	$(CARGO) test --workspace --no-fail-fast $(RULES:%=--test %)

rest: export LD_LIBRARY_PATH := $(abspath $(NVRTC))/nvidia/cu13/lib$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))
rest:
	$(CARGO) test --workspace --no-fail-fast --lib $(REST:%=--test %)
	$(if $(HAS_NVRTC),$(CARGO) test --workspace --no-fail-fast $(NVRTC_TESTS) -- --ignored)

bless:
	LATHE_BLESS=1 INSTA_UPDATE=always $(MAKE) rules

nits:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	$(PYTHON) scripts/shape.py --check

soak:
	$(CARGO) test --release --test program -- --ignored --nocapture soak::

deny:
	$(CARGO) deny --offline --workspace check licenses sources bans

fuzz:
	SEED="$(SEED)" MINUTES="$(or $(MINUTES),10)" STATE="$(abspath $(TARGET))/fuzz" \
		$(CARGO) test --release --test meaning -- --ignored --nocapture long

# The snapshots of registers are of this compiler. PyPI's first disassembler is of CUDA 13.2; it reads 13.0's code.
nvrtc: $(NVRTC)/installed-13.0.88

$(NVRTC)/installed-13.0.88:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --upgrade --target $(NVRTC) \
		nvidia-cuda-nvrtc==13.0.88 "nvidia-cuda-nvdisasm==13.*"
	touch $@
