#!/usr/bin/env bash
# transformers 5.23.0: the decoder's cache has as many layers as the ENCODER.
#
# Guess: a T5 with 2 encoder and 4 decoder layers generates like any other; its key/value cache
#   has the decoder's 4 layers (and a T5 with 6 and 4 has 4, too).
# Seen: 2 and 4: IndexError in `generate`, and the same call with use_cache=False works; 6 and 4:
#   a cache of 6 layers, two of which stay empty.
# Why it matters: a text VAE often pairs a small encoder with a deep decoder, or is tried on
#   shapes that no checkpoint has. Training works (there the cache grows as needed), generation
#   does not.
# Instead: pass `past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache())`, made
#   without a config: it grows with the decoder.
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
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5ForConditionalGeneration


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


def t5(encoder_layers, decoder_layers):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=200, d_model=16, d_kv=4, d_ff=32, num_heads=4, decoder_start_token_id=0,
        num_layers=encoder_layers, num_decoder_layers=decoder_layers,
    )
    return T5ForConditionalGeneration(config).eval()


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: 2 + 4 layers generate; 6 + 4 layers have a cache of 4")
ids = torch.tensor([[5, 6, 7, 1]])
deep, shallow = t5(2, 4), t5(6, 4)
try:
    deep.generate(ids, max_new_tokens=4)
    error = None
except IndexError as caught:
    error = caught
print("seen: 2 + 4 layers, generate:", repr(error))
check(error is not None, "a decoder deeper than its encoder generates with the default cache")
plain = deep.generate(ids, max_new_tokens=4, use_cache=False)
cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
grown = deep.generate(ids, max_new_tokens=4, past_key_values=cache)
print("seen: without a cache:", plain.tolist(), "with one made by hand:", grown.tolist())
check(torch.equal(plain, grown), "a cache made by hand does not give the same tokens")
kept = shallow.generate(ids, max_new_tokens=4, return_dict_in_generate=True).past_key_values
filled = [layer.is_initialized for layer in kept.self_attention_cache.layers]
print("seen: 6 + 4 layers, cache filled per layer:", filled)
check(filled == [True] * 4 + [False] * 2, "the cache no longer has the encoder's layers")
print("ok: as described")
PY
