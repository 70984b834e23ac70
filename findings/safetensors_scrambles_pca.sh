#!/usr/bin/env bash
# safetensors 0.8.0 and scikit-learn 1.9.1: saving what PCA returns scrambles it.
#
# Guess: safetensors.numpy.save_file keeps any float32 array, or refuses it, as safetensors.torch
#   refuses a tensor that is not contiguous.
# Seen: an array in column order is written as it lies in memory, with its shape: it comes back
#   with all its numbers in other places, no error. PCA.fit_transform returns such an array for
#   200 texts of 32 dimensions, and a good one for 600 (another solver); every `.T` is one.
# Why it matters: projected posterior means, and a matrix of directions that was transposed, are
#   what one saves beside a VAE. Means and variances over the whole array still agree.
# Instead: np.ascontiguousarray before saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    safetensors==0.8.0 scikit-learn==1.9.1 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys
import tempfile

import numpy as np
import safetensors
import safetensors.numpy
import sklearn
from sklearn.decomposition import PCA


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


def saved_and_loaded(array):
    with tempfile.TemporaryDirectory() as folder:
        safetensors.numpy.save_file({"array": array}, f"{folder}/latents.safetensors")
        return safetensors.numpy.load_file(f"{folder}/latents.safetensors")["array"]


print("safetensors", safetensors.__version__, "scikit-learn", sklearn.__version__)
print("guess: the same array, or an error")
mu = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
points = PCA(2).fit_transform(mu)
for name, array in ("PCA(2).fit_transform(mu), 200 texts", points), ("mu.T", mu.T):
    back = saved_and_loaded(array)
    moved = (back != array).mean()
    same_numbers = np.array_equal(np.sort(back, axis=None), np.sort(array, axis=None))
    print(f"seen: {name}: shape {back.shape}, {moved:.0%} of the places changed", end=", ")
    print("the same numbers:", same_numbers)
    check(back.shape == array.shape and moved > 0.9 and same_numbers, f"{name} comes back")
correlation = np.corrcoef(saved_and_loaded(points)[:, 0], points[:, 0])[0, 1]
print(f"seen: first component against its own copy, correlation {correlation:.2f}")
check(abs(correlation) < 0.5, "the component comes back")
more = PCA(2).fit_transform(np.concatenate([mu, mu, mu]))
print("seen: PCA of 600 texts comes back:", np.array_equal(saved_and_loaded(more), more))
check(np.array_equal(saved_and_loaded(more), more), "PCA of many texts is scrambled")
fixed = saved_and_loaded(np.ascontiguousarray(points))
check(np.array_equal(fixed, points), "the way out fails")
print("ok: as described")
PY
