#!/usr/bin/env bash
# transformers 5.23.0: umT5 divides the input of its own LM head by sqrt(d_model), mT5 does not.
#
# Guess: T5 v1.1, mT5 and umT5 are one architecture at the output: a head of its own (untied), to
#   which the decoder's states go unscaled; only the first T5s, with a tied head, scale by d_model
#   ** -0.5.
# Seen: loaded from a checkpoint with a head of its own, v1.1 and mT5 are unscaled; umT5 is scaled
#   (0.0884 for width 128), since its code asks a config that always says tied. Nothing is missing
#   at loading, and greedy text is the same: only the probabilities are flattened.
# Why it matters: a wrong temperature of 11 is invisible in argmax decoding and ruins every
#   likelihood: here the NLL per token of the model's own samples goes from 3.6 to 6.3 nats.
# Instead: `model.config.tie_word_embeddings = False` after loading, and compare NLL with ln V.
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
from transformers import (
    MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration,
    UMT5Config, UMT5ForConditionalGeneration,
)


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


@torch.no_grad()
def loaded(config_class, model_class):
    """A model with a head of its own, saved and loaded."""
    torch.manual_seed(0)
    config = config_class(
        vocab_size=1000, d_model=128, d_kv=16, d_ff=256, num_layers=2, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )
    model = model_class(config)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(1000, 128) / 4)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model_class.from_pretrained(folder).eval()


@torch.no_grad()
def scale(model, ids):
    """What enters the head, over what leaves the decoder."""
    seen = {}
    hooks = [
        model.lm_head.register_forward_pre_hook(lambda module, args: seen.update(head=args[0])),
        model.decoder.register_forward_hook(lambda module, args, out: seen.update(out=out[0])),
    ]
    model(input_ids=ids, decoder_input_ids=ids)
    for hook in hooks:
        hook.remove()
    return (seen["head"] / seen["out"]).mean().item()


@torch.no_grad()
def nll(model, ids, labels):
    start = torch.zeros(len(labels), 1, dtype=torch.long)
    shifted = torch.cat([start, labels[:, :-1]], 1)
    logits = model(input_ids=ids, decoder_input_ids=shifted).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: 1 for all three, and the model is the one that was saved")
ids = torch.randint(3, 1000, (64, 8), generator=torch.Generator().manual_seed(0))
scales = {}
for config_class, model_class in (
    (T5Config, T5ForConditionalGeneration),
    (MT5Config, MT5ForConditionalGeneration),
    (UMT5Config, UMT5ForConditionalGeneration),
):
    model = loaded(config_class, model_class)
    scales[model.config.model_type] = scale(model, ids)
print("seen: scale of the head's input:", {k: round(v, 4) for k, v in scales.items()})
check(abs(scales["t5"] - 1) < 1e-4 and abs(scales["mt5"] - 1) < 1e-4, "t5 or mt5 scales")
check(abs(scales["umt5"] - 128**-0.5) < 1e-4, "umt5 no longer scales")
model.config.tie_word_embeddings = False  # the last one, umT5
right = scale(model, ids)
tokens = model.generate(ids, do_sample=True, top_k=0, max_new_tokens=8, eos_token_id=None)[:, 1:]
unscaled = nll(model, ids, tokens)
model.config.tie_word_embeddings = True  # as it is after loading
scaled = nll(model, ids, tokens)
print(f"seen: umt5 told so: {right:.4f}; NLL per token of its samples {unscaled:.2f} nats,")
print(f"      as loaded {scaled:.2f}")
check(abs(right - 1) < 1e-4 and scaled > 1.5 * unscaled, "the scale no longer shows in NLL")
print("ok: as described")
PY
