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
import hashlib
import math
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

import data
import train
import vae
from data import number, say
from extras.fast_cpu import quicken
from metrics import MOST

MAX_LENGTH = 256  # tokens of a text, as in train.py
EPOCHS = 10  # passes over the texts, without --steps
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
    if data.generator(seed, epoch, LM, index[0]).random() < lm_share:
        pairs = [(np.array([eos_id]), corpus.row(i)) for i in index]
    else:
        pairs = []
        for i in index:
            rng = data.generator(seed, epoch, SPANS, i)
            pairs.append(corrupt_spans(corpus.row(i)[:-1], sentinels, eos_id, rng))
    ids, mask = data.pad([inputs for inputs, _ in pairs], corpus.pad_id)
    labels, _ = data.pad([targets for _, targets in pairs], corpus.pad_id)
    count = len(index)
    eps = torch.zeros(count, 0)
    return data.Batch(ids, mask, labels, index, eps=eps, count=count, step_count=count)


def target_nats(t5, batch):
    """-log p(targets | inputs) of a T5, summed over targets: (B,) nats; and the targets' number."""
    labels, pad_id = batch.labels, t5.config.pad_token_id
    shifted = t5.prepare_decoder_input_ids_from_labels(labels)
    out = t5(input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=shifted)
    nats = vae.token_nats(out.logits.flatten(0, 1), labels.flatten(), pad_id)  # (B T,)
    return nats.view(labels.shape).sum(1), (labels != pad_id).sum()


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
    most = min(MOST, args.batch_size * int(corpus.lengths.max()))
    for index in data.progress(data.evaluation_order(corpus.lengths, most), "evaluating"):
        batch = make_batch(corpus, 0, index, lm_share=0.0).to(args.device)
        of_texts, count = target_nats(t5, batch)
        nats, targets = nats + of_texts.double().sum().item(), targets + count.item()
    t5.train()
    measured = {"nats_per_target": nats / targets, "query_growth": query_growth(t5)}
    if not all(map(math.isfinite, measured.values())):
        raise FloatingPointError(f"the validation has {measured}; try a smaller --lr")
    return measured


class Run(train.Run):
    """The folder of a pretraining: one process, no phase."""

    def __init__(self, folder):
        self.folder, self.first, self.name = folder, True, "pretraining"


def pretrain(t5, corpora, make_batch, args, run):
    """The training loop, as in train.py, from step 0 or from the run's checkpoint."""
    corpus = corpora["train"]
    steps_per_epoch = math.ceil(len(corpus) / args.batch_size)
    total_steps = EPOCHS * steps_per_epoch if args.steps is None else args.steps
    rates = argparse.Namespace(optimizer="adamw-rms", lr=args.lr, lr_schedule="linear")
    optimizer = train.make_optimizer(t5, rates)
    parts = {"model": t5, "optimizer": optimizer}
    step = run.load(parts)
    run.begin(step, steps_per_epoch, total_steps)
    while step < total_steps:
        epoch, begun = divmod(step, steps_per_epoch)
        if begun == 0:
            run.record(step, "valid", validate(t5, corpora["valid"], make_batch, args))
        order = data.epoch_order(corpus.lengths, args.batch_size, args.seed, epoch)
        order = order[begun : begun + total_steps - step]
        for batch in data.prefetch(partial(make_batch, corpus, epoch), order):
            train.set_rates(optimizer, rates, step / total_steps)
            values = train_step(t5, optimizer, batch, step, args)
            step += 1
            if step % args.log_every == 0 or step == total_steps:
                run.record(step, "train", values)
            late = run.minutes_since_save() > args.save_every
            if late or step % steps_per_epoch == 0 or step == total_steps:
                run.save(parts, step)
    measured = validate(t5, corpora["valid"], make_batch, args)
    run.record(step, "valid", measured)
    return measured


def train_step(t5, optimizer, batch, step, args):
    """One step of the optimizer. Returns its loss, the norm of its gradient, nats per target."""
    nats, targets = target_nats(t5, batch.to(args.device))
    nats.mean().backward()
    norm = nn.utils.clip_grad_norm_(t5.parameters(), train.MAX_GRADIENT_NORM).item()
    loss, per_target = nats.mean().item(), (nats.sum() / targets).item()
    if not math.isfinite(loss + norm):
        raise FloatingPointError(
            f"step {step}: the loss is {loss}, the norm of its gradient {norm}"
        )
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss, "grad_norm": norm, "nats_per_target": per_target}


def parse_args(argv):
    parser = argparse.ArgumentParser("pretrain.py", description=__doc__.splitlines()[0])
    flag, share = parser.add_argument, number(float, 0, 1)
    flag("--dataset", nargs="+", required=True, help="data sets, as in train.py")
    flag("--data-dir", default="data", help="where the folders of named data sets are (data)")
    flag("--tokenizer", help="T5 whose vocabulary to take; else one is made of the training texts")
    flag("--vocab-size", type=number(int, 1), help="largest vocabulary (4000)")
    flag("--d-model", type=number(int, 1), default=128, help="width (128)")
    heads = "attention heads (4), which divide the width"
    flag("--heads", type=number(int, 1), default=4, help=heads)
    flag("--layers", type=number(int, 1), default=2, help="encoder layers, and decoder layers (2)")
    flag("--lm-share", type=share, default=0.0, help="share of batches of language modelling (0)")
    flag("--steps", type=number(int, 0), help="optimizer steps (10 passes over the texts)")
    flag("--batch-size", type=number(int, 1), default=64, help="texts per step (64)")
    flag("--lr", type=number(float, 0), default=2e-2, help="relative to each weight's RMS (2e-2)")
    flag("--out", required=True, help="folder to write")
    flag("--resume", action="store_true", help="resume from the last checkpoint, if there is one")
    flag("--save-every", type=number(float, 0), default=10.0, help="minutes (10)")
    flag("--log-every", type=number(int, 1), default=50, help="steps per training record (50)")
    flag("--seed", type=number(int, 0, 2**32), default=0, help="of everything random (0)")
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    flag("--device", choices=devices, default=devices[0], help="where to compute")
    args = parser.parse_args(argv)
    if args.d_model % args.heads:
        parser.error(f"--d-model is {args.d_model}; it must be a multiple of --heads, {args.heads}")
    if args.tokenizer is not None and args.vocab_size is not None:
        parser.error(f"--vocab-size is {args.vocab_size}, which has no effect with --tokenizer")
    args.vocab_size = args.vocab_size or 4000
    args.command = shlex.join(["python", "-m", "extras.pretrain", *argv])
    return args


def sentinels_of(tokenizer):
    """The ids of <extra_id_0> to <extra_id_99>."""
    return tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])


def load_tokenizer(name_or_path):
    """A T5's tokenizer. Raises InputError if there is none that `vae.from_t5` would take."""
    vae.check_place(name_or_path)
    tokenizer = vae.load(transformers.AutoTokenizer, name_or_path)
    vae.check_tokenizer(name_or_path, t5_config(tokenizer), tokenizer)
    if len(set(sentinels_of(tokenizer))) < 100:
        raise data.InputError(f"{name_or_path} lacks T5's sentinels, <extra_id_0> to <extra_id_99>")
    return tokenizer


def load_corpora(args):
    """({split: the corpus of all data sets}, the tokenizer)."""
    texts, corpora = {"train": [], "valid": []}, {}
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
    for split, of_split in texts.items():
        for name in args.dataset:
            of_split += filter(None, data.read_texts(name, split, args.data_dir))
    if args.tokenizer is None:
        tokenizer = data.train_tokenizer(texts["train"], args.vocab_size)
    for split, of_split in texts.items():
        corpora[split] = c = data.make_corpus(of_split, tokenizer, MAX_LENGTH)
        lost = f"{c.truncated:,} cut at {MAX_LENGTH}, {c.unknown:,} with unknown characters"
        say(f"{split}: {len(c):,} texts, {c.ids.size:,} tokens; {lost}")
    return corpora, tokenizer


def t5_config(tokenizer, **shape):
    """The T5Config of a vocabulary. The decoder starts with the padding token, as T5's."""
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    special = {"pad_token_id": pad_id, "eos_token_id": eos_id, "decoder_start_token_id": pad_id}
    return transformers.T5Config(**shape, **special, vocab_size=len(tokenizer), dropout_rate=0.0)


def make_t5(tokenizer, args):
    """A T5 with random weights, of the shape that the flags ask for."""
    torch.manual_seed(args.seed)
    shape = {"d_model": args.d_model, "d_kv": args.d_model // args.heads, "d_ff": 4 * args.d_model}
    shape |= {"num_layers": args.layers, "num_heads": args.heads}
    return transformers.T5ForConditionalGeneration(t5_config(tokenizer, **shape))


def make(args):
    """Train, and write OUT/model and OUT/metrics.json."""
    run = Run(Path(args.out))
    train.check_folder(run.folder, args.resume, "train_ids_sha256")
    corpora, tokenizer = load_corpora(args)
    config = vars(args).copy()
    del config["tokenizer"]  # it may have moved: its ids of the texts are compared instead
    for split, corpus in corpora.items():
        config[f"{split}_ids_sha256"] = hashlib.sha256(corpus.ids.tobytes()).hexdigest()
    run.claim(config)
    if run.finished:
        run.check_finished()
        say(f"{run.folder} is finished")
        return
    if args.steps > 0:
        run.check_unfinished()
    t5 = make_t5(tokenizer, args).train().to(args.device)
    if args.device == "cpu":
        quicken(t5)
    task = {"sentinels": sentinels_of(tokenizer), "eos_id": tokenizer.eos_token_id}
    task |= {"seed": args.seed, "lm_share": args.lm_share}
    make_batch = partial(pretraining_batch, **task)
    measured = pretrain(t5, corpora, make_batch, args, run)
    t5.save_pretrained(run.folder / "model")
    tokenizer.save_pretrained(run.folder / "model")
    data.write_json(run.folder / "metrics.json", measured)
    (run.folder / "checkpoint.pt").unlink(missing_ok=True)
    say(f"wrote {run.folder / 'model'}")


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else [str(word) for word in argv])
    train.quiet_libraries()
    with data.command("pretrain.py", "; --resume continues it"):
        make(args)


if __name__ == "__main__":
    main()
