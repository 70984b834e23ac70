#!/usr/bin/env bash
# sacrebleu 2.6.0 and rouge_score 0.1.2: chrF 100, TER 0 and ROUGE 1 are no exact match.
#
# Guess: each of the three is perfect only for identical texts, up to punctuation and spacing.
# Seen: chrF ignores all spaces: "now here" against "nowhere" is 100. TER folds case by default:
#   "US" for "us" is 0. ROUGE keeps a-z and 0-9 only: "x < y" against "x > y" is 1, and so are two
#   different Cyrillic words beside one number; two identical Japanese texts are 0.
# Why it matters: they are taken as "softer BLEU" for reconstructions; each has a class of errors
#   that a decoder makes often (spaces, case, signs, other scripts) at no cost.
# Instead: exact match beside them; CHRF(whitespace=True), TER(case_sensitive=True), an own ROUGE
#   tokenizer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    sacrebleu==2.6.0 rouge-score==0.1.2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import sys
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF, TER


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("sacrebleu", version("sacrebleu"), "rouge-score", version("rouge-score"))
print("guess: below perfect for each pair, but for the identical one")


def chrf(text, reference, **kwargs):
    return CHRF(**kwargs).corpus_score([text], [[reference]]).score


def ter(text, reference, **kwargs):
    return TER(**kwargs).corpus_score([text], [[reference]]).score


def rouge(text, reference):
    return RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure


spaces, case = ("now here we are", "nowhere we are"), ("it helps US", "it helps us")
print("seen: chrF", spaces, chrf(*spaces), "with whitespace=True", end=" ")
print(round(chrf(*spaces, whitespace=True), 1))
check(chrf(*spaces) == 100 > chrf(*spaces, whitespace=True), "chrF sees spaces")
print("seen: TER", case, ter(*case), "with case_sensitive=True", end=" ")
print(round(ter(*case, case_sensitive=True), 1))
check(ter(*case) == 0 < ter(*case, case_sensitive=True), "TER sees case")
for pair, want in {
    ("if x < y", "if x > y"): 1,
    ("цена 5", "вес 5"): 1,
    ("猫が好き", "猫が好き"): 0,
}.items():
    print("seen: ROUGE-L", pair, rouge(*pair))
    check(rouge(*pair) == want, f"ROUGE of {pair}")
print("ok: as described")
PY
