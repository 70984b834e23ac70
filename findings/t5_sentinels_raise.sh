#!/usr/bin/env bash
# transformers 5.23.0: T5Tokenizer's methods for its sentinels raise, and their ids may ascend.
#
# Guess: get_sentinel_tokens() lists <extra_id_0> to <extra_id_99>, get_sentinel_token_ids() their
#   ids; sentinel i has the id len(tokenizer) - 1 - i, as in the published T5s.
# Seen: both raise AttributeError: they read additional_special_tokens, which this version has
#   renamed. In a tokenizer made of a vocabulary the ids ascend: that formula gives sentinel 99 - i.
# Why it matters: span corruption, the pretraining of a T5, needs them in order.
# Instead: convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)]), whatever the tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 numpy==2.4.6 sentencepiece==0.2.3 protobuf==7.36.2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys

import transformers
from transformers import T5Tokenizer


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("transformers", transformers.__version__)
print("guess: get_sentinel_tokens() lists 100 sentinels; the first has the largest id")
pieces = ["<pad>", "</s>", "<unk>", "\u2581the", "\u2581dog", "\u2581sees"]
tokenizer = T5Tokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)])
for name in "get_sentinel_tokens", "get_sentinel_token_ids":
    try:
        said = f"{len(getattr(tokenizer, name)())} of them"
    except AttributeError as error:
        said = f"AttributeError: {error}"
    print(f"seen: {name}(): {said}")
    check("additional_special_tokens" in said, f"{name}() works")
names = [f"<extra_id_{i}>" for i in range(100)]
ids = tokenizer.convert_tokens_to_ids(names)
print(f"seen: {names[0]} has the id {ids[0]}, {names[99]} {ids[99]}, of {len(tokenizer)} tokens")
check(ids == list(range(6, 106)) and len(tokenizer) == 106, "the ids do not ascend")
by_formula = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
check(by_formula == names[99], "the formula holds")
corrupted = tokenizer(f"the {names[0]} sees {names[1]}", add_special_tokens=False)["input_ids"]
check(corrupted[1] == ids[0] and corrupted[-1] == ids[1], "the way out fails")
print("ok: as described")
PY
