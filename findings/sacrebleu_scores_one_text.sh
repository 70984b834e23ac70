#!/usr/bin/env bash
# sacrebleu 2.6.0: references in nltk's order score the first text only, without an error.
#
# Guess: corpus_bleu(hypotheses, [[reference], [reference], ...]), one list per text as nltk and
#   torchmetrics take them, raises, since sacrebleu wants one list per *stream* of references.
# Seen: it compares the first text with the references of all, and ignores the others: BLEU 100,
#   chrF 100, TER 0 for one right and two wrong texts. Fewer references than texts do the same.
# Why it matters: a reconstruction score that is nearly always 0 or 100 looks like a bug in the
#   model.
# Instead: [references] (one list in a list), and look at `sys_len`, the number of tokens that
#   were scored.
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
import sys

import sacrebleu


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("sacrebleu", sacrebleu.__version__)
print("guess: an error")
texts = ["the cat sat on the mat", "nothing in common at all", "entirely other words here now"]
references = ["the cat sat on the mat", "a dog ran off today then", "we like the old green car"]
seen = {}
for name, order in {
    "[[a], [b], [c]]": [[reference] for reference in references],
    "[[a]]": [references[:1]],
    "[[a, b, c]]": [references],
}.items():
    bleu = sacrebleu.corpus_bleu(texts, order)
    chrf, ter = sacrebleu.corpus_chrf(texts, order).score, sacrebleu.corpus_ter(texts, order).score
    seen[name] = bleu.score, chrf, ter
    print(f"seen: {name:15}: BLEU {bleu.score:.1f}, chrF {chrf:.1f}, TER {ter:.1f}", end="; ")
    print(f"{bleu.sys_len} of {sum(len(text.split()) for text in texts)} words")
check(all(round(seen[name][0]) == 100 for name in ("[[a], [b], [c]]", "[[a]]")), "it is noticed")
check(seen["[[a], [b], [c]]"][1:] == (100, 0), "chrF or TER notice it")
check(seen["[[a, b, c]]"][0] < 50, "the right order")
print("ok: as described")
PY
