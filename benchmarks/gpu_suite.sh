#!/usr/bin/env bash
# All GPU measurements, under 9 minutes on one device. Arguments go to gpu_suite.py (--tiny, --parts, --out).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONUNBUFFERED=1 PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
commit=${COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
exec "${PYTHON:-python3}" benchmarks/gpu_suite.py --commit "$commit" "$@"
