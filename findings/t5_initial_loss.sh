#!/usr/bin/env bash
# transformers 5.23.0: a new T5 of the v1.1 or mT5 kind starts at hundreds of nats per token.
#
# Guess: before training, a random T5 of any family has a loss near ln V (10.4 nats for 32,128
#   tokens).
# Seen: with width 512: T5 12.6, umT5 13.6, T5 v1.1 and mT5 312 (width 128: 11 and 78). The head
#   of the latter is the embedding, of standard deviation 1, and its input is not scaled: logits
#   have a standard deviation of sqrt(d_model).
# Why it matters: a KL of 10 nats per text is nothing beside 312 per token, gradients are clipped
#   for hundreds of steps, fp16 saturates; a VAE made from such a config collapses before it
#   learns words.
# Instead: for random weights take the T5 config (tied, scaled), or initializer_factor=d_model **
#   -0.5 (10.4 nats, but it shrinks all other weights, too); look at the first loss.
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
import math
import sys

import torch
import transformers
from transformers import (
    MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration,
    UMT5Config, UMT5ForConditionalGeneration,
)


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


def first_loss(config_class, model_class, width, **kwargs):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=2 * width, num_layers=2, num_heads=4,
        decoder_start_token_id=0, **kwargs,
    )
    model = model_class(config).eval()
    ids, labels = torch.randint(3, 32128, (2, 4, 20))
    with torch.no_grad():
        return model(input_ids=ids, labels=labels).loss.item()


print("torch", torch.__version__, "transformers", transformers.__version__)
print(f"guess: about ln V = {math.log(32128):.1f} nats per token for all")
v11 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
for width in 128, 512:
    loss = {
        "T5": first_loss(T5Config, T5ForConditionalGeneration, width),
        "T5 v1.1": first_loss(T5Config, T5ForConditionalGeneration, width, **v11),
        "mT5": first_loss(MT5Config, MT5ForConditionalGeneration, width),
        "umT5": first_loss(UMT5Config, UMT5ForConditionalGeneration, width),
    }
    print(f"seen: width {width}:", {name: round(nats, 1) for name, nats in loss.items()})
    check(max(loss["T5"], loss["umT5"]) < 16, "T5 or umT5 starts higher")
    check(min(loss["T5 v1.1"], loss["mT5"]) > 5 * math.log(32128), "v1.1 or mT5 starts lower")
print("ok: as described")
PY
