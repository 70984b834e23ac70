#!/usr/bin/env bash
# transformers 5.23.0 and sentencepiece 0.2.3: T5Tokenizer drops a model's byte fallback.
#
# Guess: a sentencepiece model trained with byte_fallback=True, made into a T5Tokenizer, gives the
#   same ids as sentencepiece: letters outside the vocabulary become bytes, and come back.
# Seen: the byte pieces are in its vocabulary, and are never used: such letters are <unk>. Texts
#   that differ in them have the same ids; sentencepiece alone restores them.
# Why it matters: byte fallback is the usual cure for "my corpus has letters the model lacks";
#   here it looks installed (the vocabulary has <0x41>) and does nothing. Likelihoods are of the
#   coarser text.
# Instead: encode and decode with sentencepiece itself, or rebuild the backend tokenizer from its
#   JSON with model.byte_fallback true and a ByteFallback decoder before the Metaspace one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 numpy==2.4.6 sentencepiece==0.2.3 protobuf==7.36.2
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
export TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import io
import pathlib
import sys
import tempfile

import sentencepiece
import transformers
from transformers import T5Tokenizer


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
print("guess: same ids from both, no <unk>")
texts = ["the dog sees the box .", "a cat likes an apple .", "my sister paints the river ."] * 9
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, vocab_size=320, minloglevel=2,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, byte_fallback=True,
)
pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
with tempfile.TemporaryDirectory() as folder:
    pathlib.Path(folder, "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5Tokenizer.from_pretrained(folder)
known = "the cat sees the river"
check(tokenizer(known, add_special_tokens=False)["input_ids"] == pieces.encode(known), "known text")
print("seen: <0x4A> in the T5Tokenizer's vocabulary:", "<0x4A>" in tokenizer.get_vocab())
check("<0x4A>" in tokenizer.get_vocab(), "the byte pieces are gone")
ids = []
for text in "the Jay", "the Gnu":
    ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    print("seen: T5Tokenizer", tokenizer.convert_ids_to_tokens(ids[-1]))
    spelled = pieces.encode(text, out_type=str)
    print("      sentencepiece", spelled, pieces.decode(spelled))
    check(tokenizer.unk_token_id in ids[-1], "T5Tokenizer falls back on bytes")
    check(pieces.decode(pieces.encode(text)) == text, "sentencepiece does not")
jay, day = (tokenizer(text)["input_ids"] for text in ("the Jay", "the Day"))
print("seen: 'the Jay' and 'the Day' have the same ids:", jay == day)
check(jay == day, "different letters, different ids")
print("ok: as described")
PY
