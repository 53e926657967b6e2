.DEFAULT_GOAL := help
.PHONY: help help-maintain train train-dist resume tmux attach nohup stop list show sample plot check picture test test-cluster test-integrations test-versions campaign bench ablation bench-peers lint install clean

PYTHON ?= python3
# $(call given,VARIABLE,default): what stands behind make. One of the environment is the script's own, and stays so.
given = $(if $(filter command,$(origin $(1))),$($(1)),$(2))
args = $(call given,ARGS)
nproc = $(call given,NPROC,2)
ckpt = $(or $(call given,CKPT),latest)
# As tmux names it.
session = $(subst :,_,$(subst .,_,$(call given,SESSION,train)))
dir = $(call given,DIR,checkpoints)
# A script of your own. What it prints as the command that resumes is for where make runs.
ifneq ($(SCRIPT),)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
export SCRIPT

VENV_PYTHON = .venv/bin/python
program = $(if $(SCRIPT),"$(SCRIPT)",train_graceful.py)
in_dir = $(if $(call given,DIR),--checkpoint-dir "$(dir)" )
train_args = $(if $(call given,MODE),--mode $(call given,MODE) )$(in_dir)$(args)

# $(call need,tool): one line that says what to install where the tool is missing
need = @command -v $(1) >/dev/null || { echo "$(1) is missing: apt install $(1) (macOS: brew install $(1))" >&2; exit 2; }

# $(call train,command): shows and runs it. What was asked to save and leave, and did, is no error of make's; the trap keeps
# the shell until then.
train = $(info $(1))@trap : INT; code=0; $(1) || code=$$?; case $$code in 129|130|138|140|143|152) ;; *) exit $$code ;; esac

# Of the targets whose comments begin with so many signs.
targets = @awk -F ':.*\#\#+ ' '/^[a-z-]+:[^\#]*$(1) / { printf "make %-17s %s\n", $$1, $$2 }' Makefile

help:
	$(call targets,##)
	@printf '\nmake help-maintain what there is to work on this project itself\n'

help-maintain:
	$(call targets,###)

train: .venv/installed ## train; q + Enter saves and leaves (MODE=standard|geometric, ARGS="--steps 500", SCRIPT=mine.py)
	$(call train,$(VENV_PYTHON) $(program) $(train_args))

train-dist: .venv/installed ## train with NPROC=2 processes (MODE, ARGS)
	$(call train,PYTHON=$(VENV_PYTHON) scripts/train_torchrun.sh "$(nproc)" $(train_args))

resume: .venv/installed ## go on from a checkpoint (CKPT=path, default latest; ARGS="...")
	$(call train,$(VENV_PYTHON) $(program) --resume "$(ckpt)" $(in_dir)$(args))

tmux: .venv/installed ## train in a tmux session, or attach to it (SESSION=train, MODE, ARGS)
	@PYTHON=$(VENV_PYTHON) scripts/train_tmux.sh "$(session)" $(train_args)

attach: ## attach to the tmux session (SESSION=train); Ctrl-b d detaches
	$(call need,tmux)
	@tmux $(if $(TMUX),switch-client,attach-session) -t "=$(session)"

nohup: .venv/installed ## train in the background (MODE, ARGS, LOG=train.log in the checkpoint directory)
	@PYTHON=$(VENV_PYTHON) scripts/train_nohup.sh $(train_args)

stop: ## let the run that uses a checkpoint directory save and leave (DIR=checkpoints)
	@scripts/stop.sh $(in_dir)$(args)

list: .venv/installed ## the checkpoints of a directory (DIR=checkpoints)
	@$(VENV_PYTHON) scripts/checkpoints.py list $(in_dir)$(args)

show: .venv/installed ## what a checkpoint holds (CKPT=path, default latest)
	@$(VENV_PYTHON) scripts/checkpoints.py show "$(ckpt)" --checkpoint-dir "$(dir)"

sample: .venv/installed ## text that a checkpoint's model writes (CKPT=path, default latest; ARGS="--prompt TEXT")
	@$(VENV_PYTHON) scripts/checkpoints.py sample "$(ckpt)" --checkpoint-dir "$(dir)" $(args)

plot: ## draw the runs of checkpoints/ as an SVG (DIR=checkpoints, ARGS="DIR_OR_CSV ... -o X.svg")
	$(call need,$(PYTHON))
	@$(PYTHON) scripts/plot.py $(args) $(if $(call given,DIR),"$(dir)")

check: .venv/installed ## stop and resume a script: does it go on bit for bit, and if not, why (SCRIPT=mine.py, ARGS="--lr 0.1")
	@$(VENV_PYTHON) scripts/check_resume.py $(program) $(train_args)

picture: .venv/installed ### record the session that README shows: half a minute of training in tmux, then q
	@text=$$(scripts/record.sh) && printf '%s\n' "$$text" | $(VENV_PYTHON) scripts/picture.py >scripts/session.svg

test: .venv/tests-installed ### run the tests (ARGS="-k sentence")
	$(VENV_PYTHON) -m pytest $(args)

test-cluster: .venv/tests-installed ### several machines and Slurm, made of Linux namespaces: as root, with iproute2, slurm-wlm and munge
	$(VENV_PYTHON) -m pytest -m "cluster and not campaign" $(args)

test-integrations: .venv-peers/installed ### the examples for other trainers, W&B and TensorBoard, in an environment of their own
	.venv-peers/bin/python -m pytest tests/test_integrations.py $(args)

test-versions: ### the tests that matter on the oldest and newest PyTorch and Python, in environments of their own (VERSIONS, ARGS)
	@scripts/test_versions.sh $(args)

campaign: .venv/tests-installed ### the whole fault campaigns, three quarters of an hour on 2 cores (ARGS="-k phase")
	$(call need,strace)
	$(VENV_PYTHON) -m pytest -m campaign $(args)

bench: .venv/installed ### measure what README claims, most of an hour on 2 cores (ARGS="--only saving hearing", --quick)
	$(VENV_PYTHON) scripts/bench.py $(args)

ablation: .venv/installed ### which parts of the geometric mode help, half an hour on 2 cores (ARGS="--steps 1000")
	$(VENV_PYTHON) scripts/bench_geometric.py $(args)

bench-peers: .venv/installed .venv-peers/installed ### other trainers beside the bare loop, in an environment of their own
	$(VENV_PYTHON) scripts/bench.py --peers .venv-peers/bin/python $(or $(args),--only)

lint: .venv/installed .venv-lint/installed ### ruff, mypy and shellcheck, in an environment of their own
	$(call need,shellcheck)
	shellcheck scripts/*.sh tests/*.sh .ci/run
	.venv-lint/bin/ruff check
	.venv-lint/bin/ruff format --check
	.venv-lint/bin/mypy --python-executable $(VENV_PYTHON) train_graceful.py
	$(VENV_PYTHON) scripts/size.py 2900
	$(VENV_PYTHON) -W error -m py_compile train_graceful.py scripts/*.py tests/*.py tests/campaigns/*.py

install: .venv/tests-installed ### create .venv and install requirements.txt (PYTHON=python3)

.venv/installed: requirements.txt
	$(call need,$(PYTHON))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$$($(PYTHON) --version) is too old:" \
		"install Python 3.10 or newer and name it, as in: make install PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments:" \
		"apt install python3-venv" >&2; exit 2; }
	@echo "Installing PyTorch into .venv, once. It is large: this takes minutes on a slow network."
	$(PYTHON) -m venv .venv
	sed '/^# The tests/,$$d' requirements.txt >.venv/training.txt
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -r .venv/training.txt
	@touch .venv/installed

.venv/tests-installed: .venv/installed requirements.txt
	$(VENV_PYTHON) -m pip install --disable-pip-version-check -r requirements.txt
	@touch .venv/tests-installed

.venv-lint/installed: Makefile
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install --disable-pip-version-check ruff==0.17.6 mypy==2.4.1
	@touch .venv-lint/installed

.venv-peers/installed: requirements.txt Makefile
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --disable-pip-version-check -r requirements.txt lightning transformers accelerate wandb tensorboard
	@touch .venv-peers/installed

clean: ### remove .venv and caches, never checkpoints
	rm -rf .venv .venv-lint .venv-peers .venv-versions .pytest_cache __pycache__ .mypy_cache .ruff_cache scripts/__pycache__ tests/__pycache__ tests/campaigns/__pycache__
