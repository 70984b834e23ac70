#!/usr/bin/env bash
# sentencepiece 0.2.3: alpha means the opposite for unigram and for BPE models.
#
# Guess: encode(enable_sampling=True, alpha=a) is noise of strength a, for either model: 0 is the
#   usual segmentation, 0.1 is a little noise, more is more.
# Seen: for BPE it is so (a dropout rate). For unigram models, T5's kind, alpha is an inverse
#   temperature: 0 is the most random (the best segmentation almost never), 0.1 makes a fifth more
#   pieces, 1 gives the best one half of the time, 5 nearly always.
# Why it matters: subword regularization is a cheap noise for a denoising VAE; a rate copied from
#   a BPE setting trains on segmentations that evaluation, which takes the best one, never shows.
# Instead: for unigram start at 0.5 to 1, and print pieces per text beside the plain ones.
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
import sys

import sentencepiece


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("sentencepiece", sentencepiece.__version__)
print("guess: pieces per text grow with alpha, from the plain number at 0, for both")
texts = [
    f"{who} {does} {what} ."
    for who in ("the dog", "a cat", "my sister", "the old man", "our teacher")
    for does in ("sees", "likes", "finds", "paints", "carries", "follows")
    for what in ("the yellow box", "a door", "the river", "an apple")
]
text, seen = "the old man follows a yellow apple .", {}
for kind, size in ("unigram", 60), ("bpe", 100):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type=kind, vocab_size=size,
        minloglevel=2, hard_vocab_limit=kind == "bpe",
    )
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    plain = pieces.encode(text)
    for alpha in 0.0, 0.1, 0.5, 1.0, 5.0:
        drawn = [
            pieces.encode(text, enable_sampling=True, alpha=alpha, nbest_size=-1)
            for _ in range(500)
        ]
        length = sum(map(len, drawn)) / len(drawn) / len(plain)
        same = sum(row == plain for row in drawn) / len(drawn)
        seen[kind, alpha] = length, same
        print(f"seen: {kind:7} alpha {alpha}: {length:.2f} times the pieces, {same:4.0%} plain")
check(seen["unigram", 0.0][0] > 1.15 > 1.05 > seen["unigram", 5.0][0], "unigram: other direction")
check(seen["unigram", 0.1][1] < 0.1 and seen["unigram", 5.0][1] > 0.9, "unigram: other direction")
check(seen["bpe", 0.0][1] == 1 and seen["bpe", 1.0][0] > 2, "bpe: other direction")
print("ok: as described")
PY
