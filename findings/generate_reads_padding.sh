#!/usr/bin/env bash
# transformers 5.23.0: a T5's generate no longer guesses the mask from the padding.
#
# Guess: `model.generate(ids)` without attention_mask infers it: where ids are padding, nothing
#   attends (4.57.6 did so for T5); so a padded batch gives what single texts give.
# Seen: the encoder and the decoder get no mask, padding is read as text, and short texts of a
#   batch are decoded otherwise than alone. No warning.
# Why it matters: reconstructions "on the fly" from padded ids get worse with the longest text of
#   the batch, which reads as a weak posterior.
# Instead: always pass attention_mask, also along with encoder_outputs.
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


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: logits of a text are the same alone, padded, and padded with its mask")
torch.manual_seed(0)
config = T5Config(
    vocab_size=200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
    decoder_start_token_id=0,
)
model = T5ForConditionalGeneration(config).eval()
short = torch.tensor([[5, 6, 7, 1]])
padded = torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0], [9, 8, 7, 6, 5, 4, 3, 1]])
masks = []
model.encoder.register_forward_pre_hook(
    lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
)


def first_logits(ids, **kwargs):
    out = model.generate(
        ids, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.logits[0][0]


alone = first_logits(short)
without = (first_logits(padded) - alone).abs().max().item()
print("seen: mask that the encoder was given:", masks[-1])
check(masks[-1] is None, "a mask is inferred")
given = (first_logits(padded, attention_mask=(padded != 0).long()) - alone).abs().max().item()
print(f"seen: padded, logits differ by {without:.3f}; padded and masked, by {given:.6f}")
check(without > 0.05 and given < 1e-4, "padding is no longer read")
print("ok: as described")
PY
