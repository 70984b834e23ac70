"""Make a T5 by span corruption, T5's own pretraining task, where no checkpoint can be downloaded.

    python -m extras.pretrain --dataset my-texts --out runs/my-t5
    python -m extras.pretrain --dataset general ptb --lm-share 0.5 --steps 20000 --out runs/t5
    python train.py --dataset ptb --model runs/t5/model

15 % of the tokens, in spans of 3 on average, are replaced by sentinels, and the decoder writes what
was there (Raffel et al. 2020, section 3.1.4). With --lm-share 0.5, half of the batches are language
modelling instead: the encoder reads nothing and the decoder writes whole texts. OUT/model is an
ordinary T5 directory. --tokenizer DIR takes a vocabulary that exists, --steps 0 writes random
weights, and --resume continues an interrupted run.

The log says what the loss hides: `query_growth` is the RMS of the query weights relative to their
start. T5 does not divide attention logits by sqrt(d_kv), so queries that grew tenfold saturate
attention, and the model cannot be finetuned, at an unsuspicious loss. Below 3 is healthy.
"""

import argparse
import math
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import data
import train
from extras.fast_cpu import quicken
from extras.latent import at_least, one_line, seed
from metrics import HALF

SPANS, LM = 11, 12  # what its random numbers are for, beside the uses in data.py


def corrupt_spans(tokens, sentinels, eos_id, rng, density=0.15, mean_span=3):
    """Replace spans of tokens by sentinels.

    Args:
        tokens: (T,) of one text, without </s>.
        sentinels: ids of <extra_id_0>, <extra_id_1>, ...
        rng: a numpy Generator.
    Returns: inputs, targets: 1-d arrays. Inputs have a sentinel for each span; targets have each
        sentinel and its span, then one more sentinel; both end in </s>.
    """
    lost = max(1, round(len(tokens) * density))
    spans = max(1, min(round(lost / mean_span), len(tokens) - lost, len(sentinels) - 1))
    # `lost` tokens are cut into `spans` pieces of at least one, the others into spans + 1 gaps.
    cuts = np.sort(rng.choice(lost - 1, spans - 1, replace=False)) + 1
    sizes = np.diff([0, *cuts, lost])
    stays = len(tokens) - lost
    bars = np.sort(rng.choice(stays + 1, spans, replace=False)) if stays > 0 else np.zeros(1, int)
    gaps = np.diff([0, *bars, stays])
    inputs, targets, at = [], [], 0
    for gap, size, sentinel in zip(gaps, sizes, sentinels, strict=False):
        inputs += [*tokens[at : at + gap], sentinel]
        targets += [sentinel, *tokens[at + gap : at + gap + size]]
        at += gap + size
    return np.array([*inputs, *tokens[at:], eos_id]), np.array([*targets, sentinels[spans], eos_id])


def pretraining_batch(corpus, epoch, index, *, sentinels, eos_id, seed, lm_share):
    """The texts `index`, corrupted with the noise of this epoch, a function of (seed, epoch, text).

    With probability `lm_share`, drawn for its first text, it is a batch of language modelling
    instead: the encoder reads </s> alone, and the decoder writes the whole texts.
    """
    if np.random.default_rng([seed, epoch, LM, index[0]]).random() < lm_share:
        pairs = [(np.array([eos_id]), corpus.row(i)) for i in index]
    else:
        pairs = []
        for i in index.tolist():
            rng = np.random.default_rng([seed, epoch, SPANS, i])
            pairs.append(corrupt_spans(corpus.row(i)[:-1], sentinels, eos_id, rng))
    ids, mask = data.pad([inputs for inputs, _ in pairs], corpus.pad_id)
    labels, _ = data.pad([targets for _, targets in pairs], corpus.pad_id)
    return data.Batch(ids, mask, labels, torch.as_tensor(index), torch.zeros(len(index), 0))


def target_nats(t5, batch):
    """-log p(targets | inputs) of a T5, summed over targets: (B,) nats; and the targets' number."""
    labels, pad_id = batch.labels, t5.config.pad_token_id
    shifted = t5.prepare_decoder_input_ids_from_labels(labels)
    out = t5(input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=shifted)
    logits = out.logits.float().transpose(1, 2)  # (B, V, T)
    nats = F.cross_entropy(logits, labels, ignore_index=pad_id, reduction="none")  # (B, T)
    return nats.sum(1), (labels != pad_id).sum()


def query_growth(t5):
    """RMS of all query weights relative to that of T5's start, (d_model * d_kv)^-1/2."""
    named = t5.named_parameters()
    queries = [p.detach().flatten() for name, p in named if name.endswith("Attention.q.weight")]
    rms = torch.cat(queries).pow(2).mean().sqrt()
    return (rms * (t5.config.d_model * t5.config.d_kv) ** 0.5).item()


@torch.no_grad()
def validate(t5, corpus, make_batch, args):
    """{"nats_per_target": of corrupted spans, "query_growth"}, of a validation split."""
    t5.eval()
    nats, targets = 0.0, 0
    for index in data.evaluation_order(corpus.lengths, args.batch_size):
        batch = make_batch(corpus, 0, index, lm_share=0.0).to(args.device)
        of_texts, count = target_nats(t5, batch)
        nats, targets = nats + of_texts.double().sum().item(), targets + count.item()
    t5.train()
    return {"nats_per_target": nats / targets, "query_growth": query_growth(t5)}


def pretrain(t5, corpora, make_batch, args, out, log):
    """The training loop, as in train.py, from step 0 or from the checkpoint in `out`."""
    corpus = corpora["train"]
    steps_per_epoch = math.ceil(len(corpus) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch if args.steps is None else args.steps
    optimizer = train.RelativeAdamW(t5.parameters(), lr=args.lr, eps=1e-8, fused=True)
    parts = {"model": t5, "optimizer": optimizer}
    step = train.load_checkpoint(out, log, parts)
    saved_at = time.monotonic()
    left = partial(train.time_left, step, total_steps, saved_at)
    while step < total_steps:
        epoch, begun = divmod(step, steps_per_epoch)
        if begun == 0:
            train.record(log, step, "valid", validate(t5, corpora["valid"], make_batch, args))
        order = data.epoch_order(corpus.lengths, args.batch_size, args.seed, epoch)
        order = order[begun : begun + total_steps - step]
        for batch in data.prefetch(partial(make_batch, corpus, epoch), order):
            train.seed_dropout(args.seed, step, 0)
            optimizer.param_groups[0]["lr"] = args.lr * (1 - step / total_steps)
            with torch.autocast(args.device, HALF[args.amp], enabled=args.amp != "off"):
                nats, targets = target_nats(t5, batch.to(args.device))
            loss = nats.mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(t5.parameters(), train.MAX_GRADIENT_NORM).item()
            if not math.isfinite(loss.item() + norm):
                raise FloatingPointError(f"step {step}: the loss is {loss.item()}, its norm {norm}")
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % args.log_every == 0 or step == total_steps:
                values = {"loss": loss.item(), "grad_norm": norm}
                values["nats_per_target"] = (nats.sum() / targets).item()
                train.record(log, step, "train", values, left(step))
            late = time.monotonic() > saved_at + 60 * args.save_every
            if late or step % steps_per_epoch == 0 or step == total_steps:
                train.save_checkpoint(out, log, parts, step)
                saved_at = time.monotonic()
    measured = validate(t5, corpora["valid"], make_batch, args)
    train.record(log, step, "valid", measured)
    return measured


def join(corpora):
    """One `data.Corpus` of several, end to end."""
    lengths = np.concatenate([corpus.lengths for corpus in corpora])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([corpus.ids for corpus in corpora])
    words = np.concatenate([corpus.words for corpus in corpora])
    cut, skipped = sum(c.truncated for c in corpora), sum(c.skipped for c in corpora)
    sha256, first = " ".join(corpus.sha256 for corpus in corpora), corpora[0]
    return data.Corpus(ids, offsets, words, cut, skipped, first.pad_id, first.unk_id, sha256)


def parse_args(argv):
    parser = argparse.ArgumentParser("pretrain.py", description=__doc__.splitlines()[0])
    flag, share = parser.add_argument, at_least(0, float, 1)
    flag("--dataset", nargs="+", required=True, help="data sets, as in train.py")
    flag("--data-dir", default="data", help="where the folders of named data sets are (data)")
    flag("--limit", type=at_least(1), help="train on the first N texts of each only")
    flag("--max-length", type=at_least(2), default=256, help="tokens per text (256)")
    flag("--tokenizer", help="folder with a vocabulary; else one is made of the training texts")
    flag("--vocab-size", type=at_least(1), default=4000, help="largest vocabulary (4000)")
    flag("--d-model", type=at_least(1), default=128, help="width (128)")
    flag("--heads", type=at_least(1), default=4, help="attention heads (4); they divide the width")
    flag("--layers", type=at_least(1), default=2, help="encoder layers, and decoder layers (2)")
    flag("--lm-share", type=share, default=0.0, help="share of batches of language modelling (0)")
    flag("--epochs", type=at_least(0), default=10, help="passes over the training texts (10)")
    flag("--steps", type=at_least(0), help="optimizer steps, instead of --epochs")
    flag("--batch-size", type=at_least(1), default=64, help="texts per step (64)")
    flag("--lr", type=at_least(0, float), default=2e-2, help="relative to each weight's RMS (2e-2)")
    flag("--amp", choices=("off", "bf16"), default="off", help="precision (off: float32)")
    flag("--out", required=True, help="folder to write")
    flag("--resume", action="store_true", help="resume from the last checkpoint, if there is one")
    flag("--save-every", type=at_least(0, float), default=10.0, help="minutes (10)")
    flag("--log-every", type=at_least(1), default=50, help="steps per training record (50)")
    flag("--seed", type=seed, default=0, help="seed of everything random (0)")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    args = parser.parse_args(argv)
    if args.d_model % args.heads:
        parser.error(f"--d-model is {args.d_model}; it must be a multiple of --heads, {args.heads}")
    args.command = shlex.join(["python", "-m", "extras.pretrain", *argv])
    return args


def make_t5(args):
    """(T5 with random weights, tokenizer) of the shape and vocabulary that the flags ask for."""
    texts = []
    for name in args.dataset:
        texts += [text for text in data.read_texts(name, "train", args.data_dir) if text]
    if args.tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = data.train_tokenizer(texts, args.vocab_size)
    torch.manual_seed(args.seed)
    shape = {"d_model": args.d_model, "d_kv": args.d_model // args.heads, "d_ff": 4 * args.d_model}
    shape |= {"num_layers": args.layers, "num_heads": args.heads, "vocab_size": len(tokenizer)}
    config = transformers.T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config), tokenizer


def load_corpora(tokenizer, args):
    """{split: the corpus of all data sets}."""
    corpora = {}
    for split, limit in ("train", args.limit), ("valid", None):
        rest = split, tokenizer, args.data_dir, args.max_length, limit
        corpora[split] = join([data.load_corpus(name, *rest) for name in args.dataset])
        print(f"{split}: {len(corpora[split]):,} texts, {corpora[split].ids.size:,} tokens")
    return corpora


def run(args):
    """Train, and write OUT/model and OUT/metrics.json."""
    out = Path(args.out)
    if out.exists() and any(out.iterdir()) and not args.resume:
        raise data.InputError(f"{out} is not empty: --resume its run, or give another --out")
    if (out / "metrics.json").exists():
        print(f"{out} is finished")
        return
    t5, tokenizer = make_t5(args)
    t5.train().to(args.device)
    if args.device == "cpu":
        quicken(t5)
    corpora = load_corpora(tokenizer, args)
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    task = {"sentinels": sentinels, "eos_id": tokenizer.eos_token_id}
    task |= {"seed": args.seed, "lm_share": args.lm_share}
    make_batch = partial(pretraining_batch, **task)
    shas = {split: corpus.sha256 for split, corpus in corpora.items()}
    config = vars(args) | {"pretraining_sha256": shas}
    if (out / "config.json").exists():
        train.check_same(out, config)
    else:
        out.mkdir(parents=True, exist_ok=True)
        data.write_json(out / "config.json", config)
    with open(out / "log.jsonl", "a+", buffering=1) as log:
        measured = pretrain(t5, corpora, make_batch, args, out, log)
    t5.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    data.write_json(out / "metrics.json", measured)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"wrote {out / 'model'}")


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else [str(word) for word in argv])
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with one_line("pretrain.py"):
        run(args)


if __name__ == "__main__":
    main()
