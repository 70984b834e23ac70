#!/usr/bin/env bash
# transformers 5.23.0: resize_token_embeddings overwrites a T5's separate LM head.
#
# Guess: T5Config(tie_word_embeddings=False), or a checkpoint with a head of its own (v1.1, flan,
#   mT5), keeps that head when the vocabulary grows; only rows are added.
# Seen: the config says tie_word_embeddings=True whatever it was given. Loading keeps the head,
#   since the checkpoint has it; resizing then ties it: all of the head's old rows are now the
#   embedding's. Warnings of that call speak of new rows, not of this. `tie_weights()` does the
#   same.
# Why it matters: adding tokens (<url>, a class label) to a pretrained T5 is a common first step;
#   the model loses its output layer and training hides it as a bad start. 4.57.6 kept the head.
# Instead: set `model.config.tie_word_embeddings = False` on the loaded model, before resizing.
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
import tempfile

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: the head stays a weight of its own, its 200 old rows unchanged")
torch.manual_seed(0)
config = T5Config(
    vocab_size=200, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
    decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
)
print("seen: tie_word_embeddings given False, kept", config.tie_word_embeddings)
check(config.tie_word_embeddings, "the config keeps tie_word_embeddings=False")
source = T5ForConditionalGeneration(config)
source.lm_head.weight = torch.nn.Parameter(torch.randn(200, 16))  # as a pretrained one has


def resized(change):
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        model = T5ForConditionalGeneration.from_pretrained(folder)
    check(torch.equal(model.lm_head.weight, source.lm_head.weight), "loading loses the head")
    change(model)
    model.resize_token_embeddings(210)
    tied = model.lm_head.weight is model.shared.weight
    return tied, torch.equal(model.lm_head.weight[:200], source.lm_head.weight)


tied, kept = resized(lambda model: None)
print(f"seen: loaded, then resized: head tied {tied}, its old rows kept {kept}")
check(tied and not kept, "resizing keeps a separate head")
tied, kept = resized(lambda model: setattr(model.config, "tie_word_embeddings", False))
print(f"seen: with config.tie_word_embeddings = False first: head tied {tied}, kept {kept}")
check(not tied and kept, "the way out no longer works")
print("ok: as described")
PY
