#!/usr/bin/env bash
# torchmetrics 1.9.0: Perplexity is infinite where cross_entropy is finite.
#
# Guess: torchmetrics.text.Perplexity(logits, ids) is exp(F.cross_entropy(logits, ids)), and
#   refuses or warns where it is given something else.
# Seen: it takes a softmax, then a logarithm, in float32: one token 110 nats below the best makes
#   the whole perplexity inf (cross_entropy: e^(110/300), 1.44). Given probabilities, it takes a
#   softmax of those: about V, no warning; log-probabilities are right.
# Why it matters: a T5 with a head of its own is sure by 100 nats early in training or on odd
#   texts; one such token among a million hides the number, and "inf" reads as a diverged model.
# Instead: sum F.cross_entropy(reduction="none") in float64 and divide once.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import math
import sys

import torch
import torch.nn.functional as F
import torchmetrics
from torchmetrics.text import Perplexity


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "torchmetrics", torchmetrics.__version__)
print("guess: both ways the same number")
logits, ids = torch.zeros(1, 300, 1000), torch.zeros(1, 300, dtype=torch.long)
logits[..., 0] = 110.0  # sure, and right
ids[0, -1] = 1  # but once
right = math.exp(F.cross_entropy(logits[0], ids[0]).item())
seen = Perplexity()(logits, ids).item()
print(f"seen: one surprise of 110 nats in 300 tokens: cross_entropy {right:.2f}, Perplexity {seen}")
check(right < 2 and math.isinf(seen), "it is finite")
logits = torch.randn(1, 300, 1000, generator=torch.Generator().manual_seed(0)) * 3
ids = logits.argmax(-1)
right = math.exp(F.cross_entropy(logits[0], ids[0]).item())
of_p, of_log_p = (Perplexity()(x, ids).item() for x in (logits.softmax(-1), logits.log_softmax(-1)))
print(f"seen: usual logits: cross_entropy {right:.2f}, Perplexity {Perplexity()(logits, ids):.2f};")
print(f"      of log-probabilities {of_log_p:.2f}, of probabilities {of_p:.0f}")
check(abs(of_log_p / right - 1) < 0.01 and of_p > 50 * right, "it takes probabilities")
print("ok: as described")
PY
