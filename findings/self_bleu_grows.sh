#!/usr/bin/env bash
# sacrebleu 2.6.0: self-BLEU nearly doubles with the number of samples, the model being the same.
#
# Guess: self-BLEU is a mean over samples; with 50, 300 or 1,000 samples of one model it is about
#   equal.
# Seen: independent samples of one fixed distribution (Zipf's law, 2,000 words, 12 words each)
#   have self-BLEU 9, 14 and 17: each text is compared with all others, and more others cover more
#   n-grams.
# Why it matters: 1,000 samples of a better model look less diverse than 100 of a worse one, and
#   published values with unlike counts do not compare. Less data, not more, improves the score.
# Instead: the same number of samples on both sides, stated, with real texts of that number as a
#   yardstick.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    sacrebleu==2.6.0
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import random
import sys

import sacrebleu


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("sacrebleu", sacrebleu.__version__)
print("guess: about the same")
rng = random.Random(0)
words = [f"w{i}" for i in range(2000)]
weights = [1 / (i + 1) for i in range(2000)]
texts = [" ".join(rng.choices(words, weights, k=12)) for _ in range(1000)]
seen = {}
for n in 50, 100, 300, 1000:
    sample = texts[:n]
    scores = [
        sacrebleu.sentence_bleu(sample[i], sample[:i] + sample[i + 1 :], tokenize="none").score
        for i in range(50)
    ]
    seen[n] = sum(scores) / len(scores)
    print(f"seen: {n} samples: self-BLEU {seen[n]:.1f} (of the first 50)")
check(seen[50] < seen[100] < seen[300] < seen[1000] and seen[1000] > 1.5 * seen[50], "it is steady")
print("ok: as described")
PY
