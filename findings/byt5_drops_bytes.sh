#!/usr/bin/env bash
# transformers 5.23.0: ByT5's tokenizer drops what is not UTF-8, silently.
#
# Guess: decoding ids that are no valid UTF-8 gives U+FFFD in their place, or raises.
# Seen: such bytes vanish: five ids decode to one letter; half a letter leaves no trace, so
#   different ids give the same text.
# Why it matters: a ByT5 VAE early in training, or sampling from the prior, writes many broken
#   bytes. Exact match and edit distance of *texts* forgive them, character counts shrink, and
#   nats per character rise, while the token accuracy says something else.
# Instead: compare ids, or decode with bytes(i - 3 for i in ids if 3 <= i <
#   259).decode(errors="replace").
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 numpy==2.4.6
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys

import transformers
from transformers import ByT5Tokenizer


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("transformers", transformers.__version__)
print("guess: a replacement character for each broken letter")
tokenizer = ByT5Tokenizer()
ids = tokenizer("café bar", add_special_tokens=False)["input_ids"]
cut = ids[:4] + ids[5:]  # without the second byte of é
lone = [0xC3 + 3, 0xE2 + 3, 0x82 + 3, 0xFF + 3, ord("a") + 3]
texts = [tokenizer.decode(row) for row in (ids, cut, lone)]
for row, text in zip((ids, cut, lone), texts, strict=True):
    right = bytes(i - 3 for i in row).decode(errors="replace")
    print(f"seen: {len(row)} ids: {text!r}; with replacement {right!r}")
check(texts == ["café bar", "caf bar", "a"], "broken bytes are shown")
plain = tokenizer.decode(tokenizer("caf bar", add_special_tokens=False)["input_ids"])
print("seen: the same text as from other ids:", texts[1] == plain)
check(texts[1] == plain, "different ids, different texts")
print("ok: as described")
PY
