#!/usr/bin/env bash
# transformers 5.23.0: `use_cache=False` beside a cache writes another text, without a word.
#
# Guess: a cache that is handed to `generate` together with use_cache=False is ignored, or refused:
#   the tokens are those of a generation without one.
# Seen: `generate` feeds the whole prefix at each step, as without a cache, but T5's attention
#   still appends to the cache that it got. So the prefix is attended to once more at each step,
#   at shifted positions: the first token is right, later ones differ. No error, no warning.
# Why it matters: use_cache=False may come from a saved generation_config.json, and the cache from
#   code that works around t5_cache_layers.sh.
# Instead: hand over a cache only where neither the argument nor the configuration turns it off.
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


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: with use_cache=False a cache that is handed over changes nothing")
torch.manual_seed(0)
config = T5Config(
    vocab_size=200, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_layers=2, decoder_start_token_id=0
)
t5 = T5ForConditionalGeneration(config).eval()
for weight in t5.parameters():
    torch.nn.init.normal_(weight, std=0.5)
ids = torch.randint(3, 200, (50, 6))


def generate(**settings):
    tokens = t5.generate(ids, max_new_tokens=10, min_new_tokens=10, **settings)
    return tokens[:, 1:]


def cache():
    return EncoderDecoderCache(DynamicCache(), DynamicCache())


plain = generate(use_cache=False)
used = generate(past_key_values=cache())
unused = generate(past_key_values=cache(), use_cache=False)
same_first = (unused[:, 0] == plain[:, 0]).all().item()
changed = (unused != plain).any(1).sum().item()
print("seen: with a cache that is used: the same tokens:", torch.equal(used, plain))
print(f"seen: with one that is not: {changed} of 50 texts differ, first tokens alike: {same_first}")
check(torch.equal(used, plain), "a cache that is used changes the tokens")
check(same_first, "the first tokens differ")
check(changed > 0, "a cache that is handed over has no effect")
print("ok: as described")
PY
