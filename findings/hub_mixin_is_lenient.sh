#!/usr/bin/env bash
# huggingface_hub 2.4.0: PyTorchModelHubMixin forgets arguments and forgives missing weights.
#
# Guess: `from_pretrained` of what `save_pretrained` wrote calls __init__ with the same arguments,
#   or says that it cannot; a file in which a weight is missing is refused, as load_state_dict
#   refuses it.
# Seen: arguments that JSON cannot hold (an activation, a tensor, a config object) are left out of
#   config.json and replaced by their defaults at loading: another function, no warning. And
#   strict is False: without `w_mu` in the file each load has another random w_mu, no warning.
# Why it matters: a VAE is a T5 config object plus a few small new layers: exactly those two.
# Instead: take only plain values in __init__, pass strict=True, and compare mu after a reload.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 huggingface_hub==2.4.0 safetensors==0.8.0 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import json
import pathlib
import sys
import tempfile
import warnings

import huggingface_hub
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


class Posterior(nn.Module, PyTorchModelHubMixin):
    def __init__(self, width=8, activation=torch.tanh, prior_mean=torch.zeros(2)):
        super().__init__()
        self.activation, self.prior_mean = activation, prior_mean
        self.hidden, self.w_mu = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.w_mu(self.activation(self.hidden(x))) - self.prior_mean


print("torch", torch.__version__, "huggingface_hub", huggingface_hub.__version__)
print("guess: the same function after a reload; an error for a missing weight")
torch.manual_seed(0)
model = Posterior(4, activation=torch.relu, prior_mean=torch.ones(2)).eval()
x = torch.randn(5, 4)
with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model.save_pretrained(folder)
    config = json.loads(pathlib.Path(folder, "config.json").read_text())
    loaded = Posterior.from_pretrained(folder)
    weights = load_file(pathlib.Path(folder, "model.safetensors"))
    del weights["w_mu.weight"]
    save_file(weights, pathlib.Path(folder, "model.safetensors"))
    two = [Posterior.from_pretrained(folder).w_mu.weight for _ in range(2)]
    try:
        Posterior.from_pretrained(folder, strict=True)
        refused = None
    except RuntimeError as error:
        refused = error
difference = (loaded(x) - model(x)).abs().max().item()
print("seen: config.json:", config, "activation:", loaded.activation.__name__)
print(f"seen: outputs after a reload differ by {difference:.2f}; warnings: {len(said)}")
check(config == {"width": 4} and difference > 0.1 and not said, "the arguments are kept or missed")
print("seen: without w_mu.weight, two loads agree:", torch.equal(*two), "| strict=True:", end=" ")
print(type(refused).__name__)
check(not torch.equal(*two) and refused is not None, "a missing weight is refused")
print("ok: as described")
PY
