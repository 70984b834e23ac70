#!/usr/bin/env bash
# pythae 0.1.2: embed, reconstruct and interpolate draw z, predict does not.
#
# Guess: in eval mode, model.embed(x) is the posterior mean, equal in two calls and to
#   model.predict(x).embedding; so are reconstructions and interpolations.
# Seen: embed, reconstruct and interpolate take a sample of q(z|x), also in eval mode: two calls
#   differ, and an interpolation does not start where the last one did. predict alone takes the
#   mean. With a posterior as wide as the prior, embeddings of a text correlate little with its
#   mean.
# Why it matters: this is the peer that one compares with: probes, t-SNE, neighbours and
#   reconstruction errors of `embed` measure noise that ours (posterior means) do not have.
# Instead: model.predict(x).embedding, or model.encoder(x).embedding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    pythae==0.1.2 torch==2.13.0 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

import torch
from pythae.models import VAE, VAEConfig


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "pythae", version("pythae"))
print("guess: no differences")
torch.manual_seed(0)
model = VAE(VAEConfig(input_dim=(10,), latent_dim=4)).eval()
x, y = torch.rand(2, 200, 10)
with torch.no_grad():
    pairs = {
        "embed twice": (model.embed(x), model.embed(x)),
        "reconstruct twice": (model.reconstruct(x), model.reconstruct(x)),
        "interpolate twice": (model.interpolate(x, y), model.interpolate(x, y)),
        "predict twice": (model.predict(x).embedding, model.predict(x).embedding),
        "embed and predict": (model.embed(x), model.predict(x).embedding),
        "encoder and predict": (model.encoder(x).embedding, model.predict(x).embedding),
    }
    differ = {name: (a - b).abs().max().item() for name, (a, b) in pairs.items()}
    both = torch.stack([model.embed(x).flatten(), model.predict(x).embedding.flatten()])
for name, difference in differ.items():
    print(f"seen: {name}: differ by {difference:.3f}")
print(f"seen: correlation of embed with the mean (untrained): {torch.corrcoef(both)[0, 1]:.2f}")
for name in "embed twice", "reconstruct twice", "interpolate twice", "embed and predict":
    check(differ[name] > 0.01, f"{name}: no sample")
check(differ["predict twice"] == differ["encoder and predict"] == 0, "predict draws")
print("ok: as described")
PY
