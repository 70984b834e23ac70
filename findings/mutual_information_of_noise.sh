#!/usr/bin/env bash
# scikit-learn 1.9.1: summed over latent dimensions, the MI of pure noise with a label is large.
#
# Guess: mutual_info_classif(z, label) of latents that know nothing is 0 on average, so the sum
#   over 32 dimensions is about 0, of at most ln 2 = 0.69 nats.
# Seen: with 200 texts the sum is 0.4 nats (0.5 with a length instead of a label), with 1,000 0.2,
#   with 5,000 0.1: each estimate is cut off at 0, so errors do not cancel.
# Why it matters: "z carries 0.4 of the label's 0.69 nats" is what one reports of a collapsed VAE
#   and a small labelled set; dimensions picked by it, the "most informative" ones, are noise.
# Instead: subtract the same sum for shuffled labels, and show it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    scikit-learn==1.9.1 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys

import numpy as np
import sklearn
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("scikit-learn", sklearn.__version__)
print("guess: about 0 nats")
sums = {}
for n in 200, 1000, 5000:
    found = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(n, 32))
        label, length = rng.integers(0, 2, n), rng.normal(size=n)
        found.append([
            mutual_info_classif(z, label, random_state=0).sum(),
            mutual_info_regression(z, length, random_state=0).sum(),
        ])
    sums[n] = np.mean(found, axis=0)
    print(f"seen: {n} texts: with a label {sums[n][0]:.2f} nats, with a length {sums[n][1]:.2f}")
check(sums[200].min() > 0.3 and sums[5000].max() < sums[200].min(), "noise has no MI")
print("ok: as described")
PY
