#!/usr/bin/env bash
# What a GPU makes of this project: gpu.json, and the tests that are about CUDA. From the repository root.
# All of it takes more than 6 minutes on an H200; `--parts step` takes one.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
"$python" -m benchmarks.gpu "$@"
"$python" -m pytest -q -n 0 -m cuda tests
