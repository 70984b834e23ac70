#!/usr/bin/env bash
# transformers 5.23.0: generation_config.top_k is None, and sampling is cut at 50.
#
# Guess: top_k None (shown by the model's generation_config and by GenerationConfig()) means no
#   limit; do_sample=True at temperature 1 draws from p(x|z) itself.
# Seen: of 1,000 tokens of nearly equal probability, 4,000 draws hit 50 exactly; so does a
#   GenerationConfig(do_sample=True). top_k=0 hits nearly all 1,000.
# Why it matters: samples of a VAE's prior are judged by diversity, and their NLL is compared with
#   that of real text; both are then of another, truncated distribution. The config that one logs
#   says nothing.
# Instead: pass top_k=0, and log what was passed.
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
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("torch", torch.__version__, "transformers", transformers.__version__)
print("guess: top_k None draws from all 1,000 tokens")
torch.manual_seed(0)
config = T5Config(
    vocab_size=1000, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4,
    decoder_start_token_id=0,
)
model = T5ForConditionalGeneration(config).eval()
model.lm_head.weight = torch.nn.Parameter(torch.randn(1000, 16) / 100)  # nearly uniform
ids = torch.tensor([[5, 6, 1]]).expand(4000, -1)


def distinct(**kwargs):
    return len(model.generate(ids, **kwargs)[:, 1].unique())


print("seen: top_k of the model's config:", model.generation_config.top_k, end=", ")
print("of a new one:", GenerationConfig().top_k)
check(model.generation_config.top_k is None, "the config shows its top_k")
counts = {
    "do_sample=True": distinct(do_sample=True, max_new_tokens=1),
    "GenerationConfig(do_sample=True)": distinct(
        generation_config=GenerationConfig(
            do_sample=True, max_new_tokens=1, decoder_start_token_id=0
        )
    ),
    "top_k=0": distinct(do_sample=True, max_new_tokens=1, top_k=0),
}
print("seen: distinct tokens:", counts)
check(counts["do_sample=True"] == 50, "do_sample=True is no longer cut at 50")
check(counts["GenerationConfig(do_sample=True)"] == 50, "a GenerationConfig is not cut at 50")
check(counts["top_k=0"] > 900, "top_k=0 does not draw from all")
print("ok: as described")
PY
