#!/usr/bin/env bash
# transformers 5.23.0: generate expands the encoder_outputs of its caller in place.
#
# Guess: `generate(encoder_outputs=memory, num_return_sequences=3)` reads memory; afterwards
#   memory still has one row per text and can be decoded again.
# Seen: the object passed in now has 3 rows per text. A second, identical call returns 9 texts per
#   input, no error; num_beams=4 leaves 4 rows per text.
# Why it matters: a VAE hands its latents over exactly this way; reading out several samples of
#   the same z, or comparing beam with greedy, silently pairs texts with the wrong latents from
#   the second call on.
# Instead: make a new BaseModelOutput for each call (the tensor in it is not changed).
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
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: 2 texts stay 2 rows; each call returns 2 x 3 sequences")
torch.manual_seed(0)
config = T5Config(
    vocab_size=200, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
)
model = T5ForConditionalGeneration(config).eval()
tensor = torch.randn(2, 1, 16)
memory = BaseModelOutput(last_hidden_state=tensor)
several = dict(do_sample=True, num_return_sequences=3, max_new_tokens=3)
sizes = []
for _ in range(2):
    sequences = model.generate(encoder_outputs=memory, **several)
    sizes.append((len(sequences), len(memory.last_hidden_state)))
print("seen: (sequences, rows of memory) after call 1 and 2:", sizes)
check(sizes == [(6, 6), (18, 18)], "encoder_outputs is no longer expanded in place")
memory = BaseModelOutput(last_hidden_state=tensor)
model.generate(encoder_outputs=memory, num_beams=4, max_new_tokens=3)
print("seen: rows after one call with 4 beams:", len(memory.last_hidden_state))
check(len(memory.last_hidden_state) == 8 and len(tensor) == 2, "beams leave other rows")
fresh = [len(model.generate(encoder_outputs=BaseModelOutput(tensor), **several)) for _ in "ab"]
print("seen: with a new BaseModelOutput each time:", fresh)
check(fresh == [6, 6], "a fresh object does not help")
print("ok: as described")
PY
