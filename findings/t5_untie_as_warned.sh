#!/usr/bin/env bash
# transformers 5.23.0: the setting that a warning recommends gives T5's encoder random embeddings.
#
# Guess: loading a T5 with a head of its own warns "update the config with
#   tie_word_embeddings=False to silence this"; so `from_pretrained(folder,
#   tie_word_embeddings=False)` is the same model, quietly.
# Seen: it unties everything: encoder.embed_tokens and decoder.embed_tokens are no longer `shared`
#   and, absent from the file, are initialized at random. The logits are others. Written into
#   config.json the same setting is ignored (read back as True) and the logits are right.
# Why it matters: an encoder that embeds at random still trains, and a VAE around it looks
#   collapsed.
# Instead: leave the warning alone, and check `model.encoder.embed_tokens.weight is
#   model.shared.weight`.
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
import json
import pathlib
import sys
import tempfile

import torch
import transformers
from transformers import T5Config, T5ForConditionalGeneration


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: tie_word_embeddings=False loads the same model, with its own head")
torch.manual_seed(0)
config = T5Config(
    vocab_size=200, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
    decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
)
source = T5ForConditionalGeneration(config).eval()
source.lm_head.weight = torch.nn.Parameter(torch.randn(200, 16))
ids = torch.tensor([[5, 6, 7, 1]])


@torch.no_grad()
def difference(model):
    want = source(input_ids=ids, decoder_input_ids=ids).logits
    return (model.eval()(input_ids=ids, decoder_input_ids=ids).logits - want).abs().max().item()


with tempfile.TemporaryDirectory() as folder:
    source.save_pretrained(folder)
    plain = T5ForConditionalGeneration.from_pretrained(folder)
    untied = T5ForConditionalGeneration.from_pretrained(folder, tie_word_embeddings=False)
    file = pathlib.Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    edited = T5ForConditionalGeneration.from_pretrained(folder)
same = torch.equal(untied.encoder.embed_tokens.weight, source.shared.weight)
print(f"seen: loaded as it is, logits differ by {difference(plain):.6f}")
print(f"seen: loaded as advised, by {difference(untied):.2f}; encoder's embedding kept: {same}")
print(f"seen: False in config.json, by {difference(edited):.6f}", end="; ")
print("read back as", edited.config.tie_word_embeddings)
check(difference(plain) < 1e-5, "the plain way no longer loads this model")
check(not same and difference(untied) > 0.1, "the advised setting keeps the embeddings")
check(edited.config.tie_word_embeddings and difference(edited) < 1e-5, "config.json is heeded")
print("ok: as described")
PY
