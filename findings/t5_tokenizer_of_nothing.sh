#!/usr/bin/env bash
# transformers 5.23.0: a T5 tokenizer without a vocabulary is made up, and knows no text.
#
# Guess: T5Tokenizer(vocab_file="spiece.model") reads that file, as it did for years;
#   AutoTokenizer on a T5 folder that has no tokenizer files raises.
# Seen: both return a tokenizer of 104 pieces (specials, "▁", 100 sentinels) without a warning.
#   Every word is <unk>; all texts of as many words have the same ids.
# Why it matters: a VAE trained on it reaches NLL near 0 and exact match 100 % on any corpus.
# Instead: T5Tokenizer.from_pretrained(folder with spiece.model), and refuse a tokenizer whose
#   length is not well above its number of special tokens.
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
from transformers import AutoTokenizer, T5Config, T5Tokenizer


def check(unchanged, what):
    if not unchanged:
        sys.exit(f"CHANGED: {what}")


print("transformers", transformers.__version__, "sentencepiece", sentencepiece.__version__)
print("guess: the file is read; a folder without a tokenizer raises")
texts = ["the dog sees the box .", "a cat likes an apple .", "my sister paints the river ."] * 9
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(texts), model_writer=model, vocab_size=40, minloglevel=2,
    pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
)
with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder, "spiece.model")
    file.write_bytes(model.getvalue())
    by_file = T5Tokenizer(vocab_file=str(file))
    by_folder = T5Tokenizer.from_pretrained(folder)
with tempfile.TemporaryDirectory() as folder:
    T5Config().save_pretrained(folder)  # a T5's folder, but for the weights
    of_nothing = AutoTokenizer.from_pretrained(folder)
for name, tokenizer in {
    "T5Tokenizer(vocab_file=...)": by_file,
    "AutoTokenizer, no tokenizer there": of_nothing,
    "T5Tokenizer.from_pretrained": by_folder,
}.items():
    ids = [tokenizer(text)["input_ids"] for text in ("the dog sees", "a cat likes")]
    print(f"seen: {name}: {len(tokenizer)} pieces, {tokenizer.tokenize('the dog sees')}")
    if tokenizer is by_folder:
        check(ids[0] != ids[1] and tokenizer.unk_token_id not in ids[0], "the way out fails")
    else:
        check(len(tokenizer) == 104 and ids[0] == ids[1], f"{name} knows text")
print("ok: as described")
PY
