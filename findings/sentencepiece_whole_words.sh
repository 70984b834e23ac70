#!/usr/bin/env bash
# sentencepiece 0.2.3: a unigram vocabulary lacks the most frequent words of its corpus.
#
# Guess: with room for 300 pieces and 36 different words, every frequent word becomes a piece:
#   "the", which is in each of 5,000 sentences, first of all.
# Seen: 58 pieces are made, and one word is whole; "the" is two ("▁t", "he"), "yellow", 1,247
#   times, is five. The trainer counts distinct words, and seeds pieces only from strings that
#   occur in two of them: a word that is no part of another word can never be one. BPE makes 35 of
#   the 36 whole.
# Why it matters: templated, small or generated corpora (the usual test bed of text VAEs) get two
#   to five tokens per word, so PPL per token looks good and sentences are cut early.
# Instead: show each word in a second surrounding (say once more with a letter attached, and drop
#   those pieces), use BPE, or report nats per word.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    sentencepiece==0.2.3
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import io
import random
import sys

import sentencepiece


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("sentencepiece", sentencepiece.__version__)
random.seed(0)
who = "dog cat bird nurse farmer teacher driver".split()
does = "sees likes finds paints carries follows washes".split()
what = ["yellow box", "yellow door", "river", "apple", "garden", "letter", "old chair", "window"]
when = ["today", "at night", "on sunday", "before lunch", "after work", "near town"]
texts = [
    f"the {random.choice(who)} {random.choice(does)} the {random.choice(what)} {random.choice(when)}"
    for _ in range(5000)
]
words = {word for text in texts for word in text.split()}
yellow = sum("yellow" in text for text in texts)
print(f"guess: 300 pieces hold all {len(words)} words, 'yellow' ({yellow} texts) too")


def train(**kwargs):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, minloglevel=2, **kwargs
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


unigram = train(model_type="unigram", vocab_size=300, hard_vocab_limit=False)
bpe = train(model_type="bpe", vocab_size=150)
for name, pieces in ("unigram", unigram), ("bpe", bpe):
    whole = sum(len(pieces.encode(word)) == 1 for word in words)
    shown = pieces.encode("the yellow box", out_type=str)
    print(f"seen: {name}: {len(pieces)} pieces, {whole} of {len(words)} words whole, {shown}")
check(len(unigram) < 150, "the unigram trainer fills its vocabulary")
check(len(unigram.encode("the")) > 1 and len(unigram.encode("yellow")) > 1, "words are whole")
check(len(bpe.encode("the")) == 1 and len(bpe.encode("yellow")) == 1, "BPE does not make them")
print("ok: as described")
PY
