#!/usr/bin/env bash
# sacrebleu 2.6.0 and nltk 3.10.4: the BLEU of exact copies is 0, 32 or 100.
#
# Guess: texts against themselves have BLEU 100 (nltk: 1), in every library and at every length.
# Seen: three words: sacrebleu's corpus BLEU 0, its sentence BLEU 100, nltk's 1e-77. With one text
#   of four words beside a hundred of three, sacrebleu's corpus BLEU jumps from 0 to 100; nltk's
#   corpus BLEU of the same texts is 0.32.
# Why it matters: reconstructions of short texts (titles, questions, texts without spaces, one
#   "word") read as complete failure, or as success because of one longer text.
# Instead: exact match beside BLEU; chrF or character BLEU where most texts have under four words.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    sacrebleu==2.6.0 nltk==3.10.4
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys
import warnings

import nltk
import sacrebleu
from nltk.translate import bleu_score


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


warnings.simplefilter("ignore")  # nltk says that a score is 0
print("sacrebleu", sacrebleu.__version__, "nltk", nltk.__version__)
print("guess: 100 everywhere (1 for nltk)")
short = ["the red door"] * 100
mixed = [*short, "the old red door"]


def scores(texts):
    words = [text.split() for text in texts]
    return (
        sacrebleu.corpus_bleu(texts, [texts]).score,
        bleu_score.corpus_bleu([[row] for row in words], words),
    )


sentence = sacrebleu.sentence_bleu(short[0], [short[0]]).score
own = bleu_score.sentence_bleu([short[0].split()], short[0].split())
print(f"seen: one text of three words: sacrebleu {sentence:.1f}, nltk {own:.1e}")
print("seen: 100 of them, (sacrebleu, nltk):", scores(short))
print("seen: and one of four words:         ", scores(mixed))
check(round(sentence) == 100 and own < 1e-50, "sentence BLEU of copies")
check(scores(short)[0] == 0 and round(scores(mixed)[0]) == 100, "corpus BLEU of copies")
check(scores(mixed)[1] < 0.99, "nltk's corpus BLEU of copies")
print("ok: as described")
PY
