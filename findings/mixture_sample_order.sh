#!/usr/bin/env bash
# scikit-learn 1.9.1: GaussianMixture.sample returns its draws sorted by component.
#
# Guess: sample(n) is n independent draws, so any part of them is a smaller sample.
# Seen: all draws of component 0 come first, then those of 1, and so on: the first fifth of 1,000
#   draws of a mixture of ten is from two or three components.
# Why it matters: a mixture fitted to posterior means is the usual better prior of a text VAE.
#   "Decode the first 100", batches, and a split into halves for a two-sample test are then of
#   different mixtures.
# Instead: shuffle what it returns.
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
from sklearn.mixture import GaussianMixture


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("scikit-learn", sklearn.__version__)
print("guess: 200 of 1,000 draws are from all 10 components")
rng = np.random.default_rng(0)
centres = rng.normal(size=(10, 8)) * 5
mu = centres[rng.integers(0, 10, 2000)] + rng.normal(size=(2000, 8))
mixture = GaussianMixture(10, random_state=0).fit(mu)
z, component = mixture.sample(1000)
first = sorted(set(mixture.predict(z[:200]).tolist()))
print("seen: components of the first 200 draws:", first)
print("seen: components in order:", bool((np.diff(component) >= 0).all()))
check((np.diff(component) >= 0).all() and len(first) <= 4, "the draws are shuffled")
gap = np.linalg.norm(z[:500].mean(0) - z[500:].mean(0))
mixed = rng.permutation(z)
mixed_gap = np.linalg.norm(mixed[:500].mean(0) - mixed[500:].mean(0))
print(f"seen: distance of the halves' means: {gap:.1f}, shuffled {mixed_gap:.1f}")
check(gap > 2 * mixed_gap, "the halves are alike")
print("ok: as described")
PY
