#!/usr/bin/env bash
# What a GPU makes of this project, in under 6 minutes: gpu.json, and the tests that are about CUDA. From the repository root.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
"$python" -m benchmarks.gpu "$@"
"$python" -m pytest -q -n 0 -m cuda tests
