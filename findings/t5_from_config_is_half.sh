#!/usr/bin/env bash
# transformers 5.23.0: a T5 made from a configuration has the precision that its file names.
#
# Guess: `from_config` makes new weights, so they are float32, torch's default; float32 weights that
#   `load_state_dict` then copies into it stay as they are.
# Seen: a checkpoint that was saved in bfloat16 says so in its config.json. A model made from this
#   configuration is bfloat16, too, and load_state_dict rounds what it copies: no error, no warning,
#   and a later `.float()` hides it.
# Why it matters: a model that wraps a T5 is made from the T5's configuration, then filled with
#   weights. Finetuned in float32, saved and read again, a weight has lost 16 of its 24 bits.
# Instead: from_config(config, dtype=torch.float32).
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
from transformers import AutoConfig, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: new weights are float32, and keep what is copied into them")
torch.manual_seed(0)
config = T5Config(
    vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
    decoder_start_token_id=0,
)
T5ForConditionalGeneration(config).bfloat16().save_pretrained("t5")
trained = AutoModelForSeq2SeqLM.from_pretrained("t5", dtype=torch.float32)
for weight in trained.parameters():  # a step of training
    weight.data += 1e-3 * torch.randn_like(weight)
config = AutoConfig.from_pretrained("t5")
for settings in {}, {"dtype": torch.float32}:
    again = AutoModelForSeq2SeqLM.from_config(config, **settings)
    dtypes = sorted({str(weight.dtype) for weight in again.parameters()})
    again.load_state_dict(trained.state_dict())
    pairs = zip(trained.parameters(), again.float().parameters(), strict=True)
    same = sum(torch.equal(a, b) for a, b in pairs)
    count = len(list(trained.parameters()))
    print(f"seen: from_config with {settings or 'nothing'}: {', '.join(dtypes)}; "
          f"{same} of {count} weights are those that were copied")
    if settings:
        check(same == count, "from_config with a dtype loses bits, too")
    else:
        check(dtypes == ["torch.bfloat16"], "from_config is no longer in the file's precision")
        check(same == 0, "load_state_dict no longer rounds")
print("ok: as described")
PY
