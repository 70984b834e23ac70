#!/usr/bin/env bash
# umap-learn 0.5.12: transform does not put a training point where the map has it.
#
# Guess: transform(mu[:50]) of a fitted UMAP returns the places of those 50 points, up to a small
#   part of the distance between neighbours; transform is deterministic with random_state.
# Seen: the whole training array comes back exactly (it is recognized by its hash), any part of it
#   does not: points move by several times the distance to the nearest neighbour, and fewer than
#   one in five lands nearest to itself.
# Why it matters: "where does this edited text lie on the map?" is answered by transform; what
#   moved may be the projection, not z. A test on the full array hides it.
# Instead: fit on the union of old and new points, or measure distances in z.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    umap-learn==0.5.12 scikit-learn==1.9.1 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys
import warnings

import numpy as np
import umap


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


warnings.simplefilter("ignore")  # one thread, because of random_state
print("umap-learn", umap.__version__)
print("guess: under a tenth of the distance between neighbours")
rng = np.random.default_rng(0)
centres = rng.normal(size=(5, 32)) * 4
mu = (centres[np.arange(600) % 5] + rng.normal(size=(600, 32))).astype(np.float32)
mapper = umap.UMAP(random_state=0).fit(mu)
places = mapper.embedding_
gaps = np.linalg.norm(places[:, None] - places[None], axis=2)
nearest = np.median(np.sort(gaps, axis=1)[:, 1])
whole = np.abs(mapper.transform(mu) - places).max()
print(f"seen: all 600 points: moved by {whole}")
check(whole == 0, "the whole array moves")
part = mapper.transform(mu[:50])
moved = np.median(np.linalg.norm(part - places[:50], axis=1))
own = np.mean([np.linalg.norm(places - part[i], axis=1).argmin() == i for i in range(50)])
print(f"seen: the first 50: moved by {moved:.2f} (median); neighbours are {nearest:.2f} apart;")
print(f"      {own:.0%} land nearest to themselves")
check(moved > 2 * nearest and own < 0.3, "parts do not move")
print("ok: as described")
PY
