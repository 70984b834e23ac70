#!/usr/bin/env bash
# mauve-text 0.4.0: MAUVE of latents does not see their scale at all.
#
# Guess: compute_mauve(p_features=prior samples, q_features=posterior means) says how near the
#   aggregate posterior is to the prior; means a hundred times too small give about 0.
# Seen: it normalizes each feature vector to length 1 before it clusters: 0.01, 0.5, 1 and 10
#   times the prior's scale have the same MAUVE to all digits, 0.96. A shift or dead dimensions do
#   show.
# Why it matters: a collapsed posterior (means near 0), or one far too wide, looks like a perfect
#   match of the prior; made for language-model features, the measure is then applied to z.
# Instead: compare variances first (per dimension), or a two-sample test that keeps lengths.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    mauve-text==0.4.0 faiss-cpu==1.15.1 scikit-learn==1.9.1 torch==2.13.0 transformers==5.23.0 \
    numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

import mauve
import numpy as np


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("mauve-text", version("mauve-text"), "faiss-cpu", version("faiss-cpu"))
print("guess: near 1 at scale 1, near 0 at scale 0.01")
rng = np.random.default_rng(0)
prior, mu = rng.normal(size=(2, 500, 32))


def score(q):
    return float(mauve.compute_mauve(p_features=prior, q_features=q, verbose=False).mauve)


seen = {scale: score(mu * scale) for scale in (0.01, 0.5, 1, 10)}
print("seen: scale: MAUVE", {scale: round(value, 6) for scale, value in seen.items()})
shifted, dead = score(mu + 1), score(mu * (np.arange(32) < 4))
print(f"seen: shifted by 1 {shifted:.3f}, 28 of 32 dimensions dead {dead:.3f}")
check(max(seen.values()) - min(seen.values()) < 1e-3 and min(seen.values()) > 0.8, "scale shows")
check(shifted < 0.2 and dead < 0.2, "a shift or dead dimensions do not show")
print("ok: as described")
PY
