"""Make a T5 by span corruption, T5's own pretraining task, where no checkpoint can be downloaded.

    python -m extras.pretrain --dataset my-texts --out runs/my-t5
    python -m extras.pretrain --dataset general ptb --lm-share 0.5 --steps 20000 --d-model 256 --layers 4 --out runs/t5
    python train.py --dataset ptb --model runs/t5/model

15 % of the tokens, in spans of 3 on average, are replaced by sentinels, and the decoder writes what was there (Raffel
et al. 2020, section 3.1.4). With --lm-share 0.5, half of the batches are language modelling instead: the encoder reads
nothing and the decoder writes whole texts. OUT/model is an ordinary T5 directory.

The flags are those of train.py that concern data, the shape of `tiny`, the loop and the run, --resume among them.
--tokenizer DIR takes a vocabulary that exists, and --steps 0 writes random weights.

The log says what the loss hides: `query_growth` is the RMS of the query weights relative to their start. T5 does not
divide attention logits by sqrt(d_kv), so queries that grew tenfold saturate attention, and the model cannot be
finetuned, at an unsuspicious loss. Below 3 is healthy.
"""

import argparse
import json
import sys
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import data
import metrics
import train
from extras.fast_cpu import quicken

DEFAULTS = "--model tiny --phase 1 --epochs 10 --optimizer adamw-rms --lr-schedule linear --batch-size 64"
USELESS = {"model", "phase", "init", "latent_dim", "pooling", "pool_layers", "recipe", "denoise", "freeze_decoder"}
USELESS |= {"kl_target", "kl_threshold", "kl_schedule", "kl_anneal_epochs", "kl_cycles", "iw_samples", "dropout"}
SPANS, LM = 1, 5  # the uses of its streams of random numbers, beside those in data.py


def corrupt_spans(tokens, sentinels, eos_id, rng, density=0.15, mean_span=3):
    """Replace spans of tokens by sentinels.

    Args:
        tokens: (T,) of one text, without </s>.
        sentinels: ids of <extra_id_0>, <extra_id_1>, ...
        rng: a numpy Generator.
    Returns: inputs, targets: 1-d arrays. Inputs have a sentinel for each span; targets have each sentinel and its
        span, then one more sentinel; both end in </s>.
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


def pretraining_batch(corpus, index, epoch, *, sentinels, eos_id, seed, lm_share):
    """The texts `index`, corrupted with the noise of this epoch, a function of (seed, epoch, text).

    With probability `lm_share`, drawn from the stream of its first text, it is a batch of language modelling instead:
    the encoder reads </s> alone, and the decoder writes the whole texts.
    """
    if data.stream(seed, epoch, int(index[0]), LM).random() < lm_share:
        pairs = [(np.array([eos_id]), corpus.row(i)) for i in index]
    else:
        rngs = (data.stream(seed, epoch, i, SPANS) for i in index.tolist())
        pairs = [corrupt_spans(corpus.row(i)[:-1], sentinels, eos_id, rng) for i, rng in zip(index, rngs, strict=True)]
    ids, mask = data.pad([inputs for inputs, _ in pairs], corpus.pad_id)
    labels, _ = data.pad([targets for _, targets in pairs], corpus.pad_id)
    return data.Batch(ids, mask, labels, torch.as_tensor(index), torch.zeros(len(index), 0))


class PretrainingObjective(nn.Module):
    """-log p(targets | inputs) of a T5, (B,) nats, summed over a text's targets; and their number."""

    def __init__(self, t5):
        super().__init__()
        self.t5 = t5

    def forward(self, batch, weight):
        labels, pad_id = batch.labels, self.t5.config.pad_token_id
        shifted = self.t5.prepare_decoder_input_ids_from_labels(labels)  # given labels, T5 would compute a loss too
        out = self.t5(input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=shifted)
        nats = F.cross_entropy(out.logits.float().transpose(1, 2), labels, ignore_index=pad_id, reduction="none")
        return {"loss": nats.sum(1), "targets": (labels != pad_id).sum(1)}  # (B, T) -> (B,)


def query_growth(t5):
    """RMS of all query weights relative to that of T5's initialization, (d_model * d_kv)^-1/2."""
    queries = torch.cat(
        [p.detach().flatten() for name, p in t5.named_parameters() if name.endswith("Attention.q.weight")]
    )
    return (queries.pow(2).mean().sqrt() * (t5.config.d_model * t5.config.d_kv) ** 0.5).item()


def join(corpora):
    """One `data.Corpus` of several, end to end."""
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([corpus.lengths for corpus in corpora]))])
    ids, words = (np.concatenate([getattr(corpus, name) for corpus in corpora]) for name in ("ids", "words"))
    cut, skipped = (sum(getattr(corpus, name) for corpus in corpora) for name in ("truncated", "skipped"))
    sha256 = " ".join(corpus.sha256 for corpus in corpora)
    return data.Corpus(ids, offsets, words, cut, skipped, corpora[0].pad_id, corpora[0].unk_id, sha256)


def parse_args(argv):
    own = argparse.ArgumentParser("pretrain.py", description=__doc__.splitlines()[0], add_help=False)
    own.add_argument("--dataset", nargs="+", metavar="NAME|DIR", help="Data sets, as in train.py.")
    own.add_argument("--tokenizer", metavar="DIR", help="Vocabulary to take; else one is made of the training texts.")
    share = train.at_least(0, float, 1)
    own.add_argument("--lm-share", type=share, default=0.0, metavar="P", help="Share of batches of language modelling.")
    own.add_argument("--steps", type=train.at_least(0), metavar="N", help="Optimizer steps, instead of --epochs.")
    mine, rest = own.parse_known_args(argv)
    parser = train.make_parser()
    if {"-h", "--help"} & set(rest):
        print(__doc__, own.format_help(), sep="\n")
    datasets = ["--dataset", mine.dataset[0]] if mine.dataset else []
    args = train.parse_args(parser, [*rest, *datasets], DEFAULTS)
    if wrong := USELESS & set(args.given):
        parser.error(f"pretraining takes no {', '.join(sorted(wrong))}")
    if not args.out:
        parser.error("--out is missing")
    values = vars(mine) | {"argv": argv}
    return argparse.Namespace(**vars(args) | values | {"epochs": args.epochs[0], "lr": args.lr[0], "phase": 1})


def make_t5(args):
    """(T5 with random weights, tokenizer) of the shape and vocabulary that the flags ask for."""
    texts = [text for name in args.dataset for text in data.read_texts(name, "train", args.data_dir) if text]
    if args.tokenizer:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = data.train_tokenizer(texts, args.vocab_size)
    torch.manual_seed(args.seed)
    return transformers.T5ForConditionalGeneration(train.tiny_config(args, tokenizer)), tokenizer


def run(args):
    """Train, and write OUT/model and OUT/metrics.json."""
    out = train.run_folder(args, 1)
    finished = (out / "metrics.json").exists()
    if (finished or (out / "checkpoint.pt").exists()) and not (args.resume or args.overwrite):
        raise ValueError(f"{out} holds a run: --resume it, give another --out, or --overwrite")
    if finished and args.resume:
        return print(f"{out} is finished")
    t5, tokenizer = make_t5(args)
    t5.train().to(args.device)
    if args.device == "cpu" and args.amp != "fp16":
        quicken(t5)
    corpora = {}
    for split, limit in ("train", args.limit), ("valid", None):
        rest = split, tokenizer, args.data_dir, args.max_length, limit
        corpora[split] = join([data.load_corpus(name, *rest) for name in args.dataset])
        print(f"{split}: {len(corpora[split]):,} texts, {corpora[split].ids.size:,} tokens")
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    settings = {"sentinels": sentinels, "eos_id": tokenizer.eos_token_id, "seed": args.seed, "lm_share": args.lm_share}
    make_batch = partial(pretraining_batch, **settings)
    objective = PretrainingObjective(t5)

    @torch.no_grad()
    def validate(control=None):
        t5.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for whole in data.evaluation_batches(corpora["valid"], args.batch_size):
            terms = objective(make_batch(corpora["valid"], whole.index, 0, lm_share=0).to(args.device), 0.0)
            sums += torch.stack([terms["loss"].double().sum(), terms["targets"].double().sum()]).cpu()
        t5.train()
        return {"nats_per_target": (sums[0] / sums[1]).item(), "query_growth": query_growth(t5)}

    config = vars(args) | {"data_sha256": {split: corpus.sha256 for split, corpus in corpora.items()}}
    config["command"] = "python -m extras.pretrain " + " ".join(args.argv)
    log, saved = train.open_run(out, config, args)
    with log:
        train.train(objective, corpora["train"], make_batch, no_kl, validate, args, out, log, saved, args.steps)
    if metrics.processes()[0] == 0:
        t5.save_pretrained(out / "model")
        tokenizer.save_pretrained(out / "model")
        measured = validate()
        (out / "metrics.json").write_text(json.dumps(measured, indent=2) + "\n")
        (out / "checkpoint.pt").unlink(missing_ok=True)
        print("  ".join(f"{name} {value:.3f}" for name, value in measured.items()), f"-> {out / 'model'}")


def no_kl(step, control, terms):
    """The KL weight of a T5 that has no latent."""
    return 0.0


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else list(map(str, argv)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        run(args)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"pretrain.py: {error}")


if __name__ == "__main__":
    main()
