#!/usr/bin/env bash
# torch 2.13.0 and transformers 5.23.0: the same lr is another step in the two Adafactors.
#
# Guess: torch.optim.Adafactor(lr=1e-3) is the optimizer of T5's usual finetuning recipe,
#   transformers' Adafactor(lr=1e-3, scale_parameter=False, relative_step=False): steps of about
#   1e-3.
# Seen: torch's always multiplies lr by the weights' RMS (at least 1e-3), which cannot be switched
#   off: it equals scale_parameter=True. Weights of RMS 0.05 move 20 times less, a
#   zero-initialized projection 1,000 times less.
# Why it matters: what a VAE adds to a T5 (W_mu, W_logvar, the projection of z) is small or zero
#   at first, and T5's own embeddings are large: the new parts stand still while the old ones
#   move.
# Instead: AdamW for new parts, or transformers' class; else a learning rate per group over its
#   RMS.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys

import torch
import transformers
from transformers.optimization import Adafactor


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


def step_size(make, rms):
    """RMS of the third step of a (64, 64) weight under random gradients."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64, generator=generator) * rms)
    optimizer = make([weight])
    for _ in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(64, 64, generator=generator)
        optimizer.step()
    return (weight.detach() - before).pow(2).mean().sqrt().item()


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: about 1e-3 for both, whatever the weights")
plain = dict(lr=1e-3, relative_step=False, warmup_init=False)
steps = {}
for rms in 1.0, 0.05, 0.0:
    steps[rms] = [
        step_size(make, rms)
        for make in (
            lambda weights: torch.optim.Adafactor(weights, lr=1e-3),
            lambda weights: Adafactor(weights, scale_parameter=False, **plain),
            lambda weights: Adafactor(weights, scale_parameter=True, **plain),
        )
    ]
    ours, recipe, scaled = steps[rms]
    print(f"seen: weights of RMS {rms}: torch {ours:.1e}, the recipe {recipe:.1e}", end=", ")
    print(f"with scale_parameter=True {scaled:.1e}")
    check(abs(ours / scaled - 1) < 0.01, "torch's no longer equals scale_parameter=True")
check(15 < steps[0.05][1] / steps[0.05][0] < 25, "small weights move as far")
check(steps[0.0][1] / steps[0.0][0] > 300, "zero weights move as far")
print("ok: as described")
PY
