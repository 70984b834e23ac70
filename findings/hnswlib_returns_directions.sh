#!/usr/bin/env bash
# hnswlib 0.8.0: a cosine index does not give back the vectors that were put in.
#
# Guess: get_items(labels) returns what add_items got; space="cosine" concerns distances only.
# Seen: in a cosine index the vectors are stored at length 1 and come back so (l2 and ip:
#   unchanged).
# Why it matters: "find the nearest text, take its z from the index, decode or edit it" decodes
#   points on the unit sphere, far inside a 32-dimensional prior whose points have length 5.7. The
#   text is fluent, and of nobody.
# Instead: keep the posterior means beside the index, and use it for labels only.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    hnswlib==0.8.0 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

import hnswlib
import numpy as np


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("hnswlib", version("hnswlib"))
print("guess: 0 difference for each space")
mu = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
for space in "l2", "ip", "cosine":
    index = hnswlib.Index(space=space, dim=32)
    index.init_index(max_elements=len(mu))
    index.add_items(mu, np.arange(len(mu)))
    back = np.array(index.get_items(list(range(len(mu)))))
    length = np.linalg.norm(back, axis=1)
    difference = np.abs(back - mu).max()
    print(f"seen: {space:6}: differs by {difference:.2f}, mean length {length.mean():.2f}", end="")
    print(f" (put in: {np.linalg.norm(mu, axis=1).mean():.2f})")
    check((difference > 1) == (space == "cosine"), f"{space}: what comes back")
print("ok: as described")
PY
