"""Finetune a pretrained T5 into a VAE, in the paper's two phases, after making the T5 where there is none.

    phase 0  a small T5 from scratch, by T5's span corruption: the checkpoint that cannot be downloaded
    phase 1  encoder warm-up: the decoder frozen, no KL in the objective (section 4)
    phase 2  full finetuning: everything trains, rec + w(step) * KL

A phase is data for one loop: a model, an objective, the noise of its batches, a weight, an evaluation.
"""

import argparse
import contextlib
import json
import math
import platform
import shlex
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from tqdm import tqdm

import data
import metrics
import vae

# What `python train.py` stands for: a demonstration that needs no download and a few minutes.
DEMO = (
    "--dataset grammar --phase 0 1 2 --model tiny --epochs 4 1 8 --batch-size 64"
    " --lr-schedule linear --adam-eps 1e-8 --denoise 0 --kl-anneal-epochs 4 --kl-threshold 0.3"
)
EPOCHS = {0: 10, 1: 5, 2: 3}  # appendix B; phase 0 is not the paper's


def kl_weight(step, schedule, anneal_steps, cycles=4, ratio=0.5):
    """w(step), the weight of the KL in phase 2, in [0, 1].

    Args:
        step: optimizer steps taken before this one.
        schedule: "linear" rises from 0 to 1 over `anneal_steps` and stays there (Eq. 6). "cyclical" cuts
            `anneal_steps` into `cycles`, each rising linearly over its first `ratio` and then at 1; after
            the last it stays at 1 (Fu et al. 2019). "constant" is 1.
    """
    if schedule == "constant" or step >= anneal_steps:
        return 1.0
    if schedule == "linear":
        return step / anneal_steps
    return min(1.0, step * cycles / anneal_steps % 1 / ratio)


# --------------------------------------------------------------------------------- objectives


class SpanObjective(nn.Module):
    """Phase 0: -log p(targets | inputs) of a T5, (B,) nats, summed over a text's targets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, eps, weight):
        labels = batch.labels.masked_fill(batch.labels == self.model.config.pad_token_id, -100)
        out = self.model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels)
        nats = F.cross_entropy(out.logits.float().transpose(1, 2), labels, reduction="none")
        return {"loss": nats.sum(1), "targets": (labels != -100).sum(1)}  # (B, T) -> (B,)


class ELBO(nn.Module):
    """Phases 1 and 2: rec + weight * sum_i max(threshold, KL_i), (B,) nats (Eq. 1 and 2)."""

    def __init__(self, model, threshold):
        super().__init__()
        self.model, self.threshold = model, threshold

    def forward(self, batch, eps, weight):
        mu, logvar = self.model.encode(batch.ids, batch.mask)
        rec = self.model.rec(self.model.reparameterize(mu, logvar, eps=eps), batch.labels)
        kl = metrics.kl_divergence(mu.float(), logvar.float())  # (B, Z)
        # At weight 0 the KL is not in the graph: phase 1 watches it and does not train on it.
        penalty = weight * kl.clamp(min=self.threshold).sum(1) if weight else 0.0
        return {"loss": rec + penalty, "rec": rec, "kl": kl.sum(1)}


# --------------------------------------------------------------------------------- phases


class Phase(NamedTuple):
    """All that the loop needs to know of a phase."""

    model: nn.Module  # what is saved, with its tokenizer
    tokenizer: object
    objective: nn.Module  # (batch, eps, weight) -> {"loss": (B,) nats, ...}
    batch: object  # (corpus, index, epoch) -> Batch, with the noise of training
    weight: object  # (step, steps_per_epoch) -> KL weight
    evaluate: object  # (corpus, final) -> dict


def no_kl(step, steps_per_epoch):
    return 0.0


def make_t5(args):
    """Phase 0: a small T5 with random weights and a vocabulary of the training text."""
    texts = data.read_texts(args.dataset, "train", args.data_dir)
    tokenizer = data.train_tokenizer(filter(None, texts), args.vocab_size)
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=args.d_model,
        d_kv=args.d_model // args.heads,
        d_ff=4 * args.d_model,
        num_layers=args.layers,
        num_heads=args.heads,
        dropout_rate=0.0,  # as T5 v1.1 is pretrained
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = transformers.T5ForConditionalGeneration(config).train()
    objective = SpanObjective(model)
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    batch = partial(data.span_batch, sentinels=sentinels, eos_id=tokenizer.eos_token_id, seed=args.seed)

    @torch.no_grad()
    def evaluate(corpus, final):
        model.eval()
        sums = defaultdict(float)
        for whole in data.evaluation_batches(corpus, args.eval_batch_size):
            noisy = batch(corpus, whole.index.numpy(), epoch=0).to(args.device)
            for name, values in objective(noisy, None, 0.0).items():
                sums[name] += values.sum().item()
        model.train()
        return {"nats_per_target": sums["loss"] / sums["targets"], "targets": int(sums["targets"])}

    return Phase(model, tokenizer, objective, batch, no_kl, evaluate)


def make_vae(args, phase, start):
    """Phases 1 and 2: the VAE that the directory `start` holds, or a new one around the T5 `start`."""
    asked = {"latent_dim": args.latent_dim, "pooling": args.pool, "pool_layers": args.pool_layers}
    asked = {name: value for name, value in asked.items() if value is not None}
    config = Path(start, "config.json")
    if config.is_file() and "t5_config" in json.loads(config.read_text()):
        model = vae.T5VAE.from_pretrained(start)
        model.folder = None  # the card there is of the run before
        for name, value in asked.items():
            if value != getattr(model, name):
                raise ValueError(f"{name} is {value!r}, but {start} has {getattr(model, name)!r}")
    else:
        model = vae.T5VAE.from_t5(start, **asked)
    if model.tokenizer is None:
        raise ValueError(f"{start} holds a model without a tokenizer")
    model.train()
    if phase == 1 and args.freeze_decoder:
        model.freeze_decoder()
    if model.latent_dim == 0:  # a language model does not encode: its encoder has nothing to learn
        model.t5.encoder.block.requires_grad_(False)
        model.t5.encoder.final_layer_norm.requires_grad_(False)
    batch = partial(data.denoising_batch, denoise=args.denoise, seed=args.seed)
    entropy = data.GRAMMAR_ENTROPY if args.dataset == "grammar" else None

    def weight(step, steps_per_epoch):
        anneal_steps = args.kl_anneal_epochs * steps_per_epoch
        return kl_weight(step, args.kl_schedule, anneal_steps, args.kl_cycles)

    def evaluate(corpus, final):
        samples = args.iw_samples if final else 0
        return metrics.evaluate(model, corpus, args.eval_batch_size, samples, thorough=final, entropy=entropy)

    objective = ELBO(model, args.kl_threshold)
    return Phase(model, model.tokenizer, objective, batch, weight if phase == 2 else no_kl, evaluate)


def run_folder(args, phase):
    """runs/<dataset>/phase<k>, or --out; with several phases --out holds a folder for each."""
    if args.out and len(args.phase) == 1:
        return Path(args.out)
    name = "lm" if args.latent_dim == 0 and phase == 2 else f"phase{phase}"
    return Path(args.out or Path("runs", Path(args.dataset).name)) / name


def starting_point(args, phase):
    """Where phase 1 or 2 gets its model: --init, or the run of the phase before, or --model."""
    if args.init and phase == args.phase[0]:
        return str(next((p for p in (Path(args.init, "model"), Path(args.init)) if p.is_dir()), args.init))
    from_t5 = phase == 1 or args.latent_dim == 0  # a language model has no encoder to warm up
    if from_t5 and args.model != "tiny":
        return args.model
    before = 0 if from_t5 else phase - 1
    inside = args.out if args.out and len(args.phase) > 1 else Path("runs", Path(args.dataset).name)
    start = Path(inside, f"phase{before}", "model")
    if not start.is_dir():
        command = f"python train.py --dataset {args.dataset} --phase {before}"
        command += f" --model {args.model}" if args.model == "tiny" else ""
        raise FileNotFoundError(
            f"phase {phase} starts from phase {before}, and there is no {start}: "
            f"run `{command}` first, or name a model with --init"
        )
    return str(start)


def prepare(args, phase, out):
    """Everything that can go wrong before training: (Phase, {split: Corpus}), the folder `out` with config.json."""
    if (out / "metrics.json").exists() and not args.overwrite:
        raise FileExistsError(f"{out} holds a finished run: give another --out, or --overwrite")
    if args.dataset != "grammar":
        for split in data.SPLITS:  # before a model is loaded or made for them
            data.split_path(args.dataset, split, args.data_dir)
    torch.manual_seed(args.seed)
    if phase == 0:
        made = make_t5(args)
    else:
        start = starting_point(args, phase)
        print(f"phase {phase} starts from {start}")
        try:
            made = make_vae(args, phase, start)
        except OSError as error:
            raise FileNotFoundError(
                f"model {start!r} is neither a directory here nor to be had from the hub "
                f"({str(error).splitlines()[0]}); give --model a directory with a T5, "
                "or make a small one: --phase 0 --model tiny"
            ) from error
    made.model.to(args.device)
    corpora = {}
    for split in data.SPLITS:
        texts = data.read_texts(args.dataset, split, args.data_dir)
        limit = args.limit if split == "train" else None
        corpora[split] = corpus = data.tokenize(texts, made.tokenizer, args.max_length, limit)
        print(
            f"{split}: {len(corpus):,} texts, {corpus.ids.size:,} tokens, "
            f"{corpus.truncated:,} texts cut at {args.max_length}, {corpus.skipped:,} empty lines"
        )
    config = vars(args) | {
        "phase": phase,
        "phases": args.phase,
        "command": "python train.py " + shlex.join(args.argv),
        "data_sha256": {split: corpus.checksum for split, corpus in corpora.items()},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)}
        | {"python": platform.python_version()},
    }
    if phase:
        config["start"] = start
        config |= {name: getattr(made.model, name) for name in ("latent_dim", "pooling", "pool_layers")}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return made, corpora


# --------------------------------------------------------------------------------- the loop

SHOWN = ("nats_per_target", "rec", "kl", "neg_elbo", "ppl_word", "mi", "au")


def train(phase, corpora, epochs, args, out):
    """The loop, the same for all phases. Records go to `out`/log.jsonl; returns the seconds it took."""
    trainable = [p for p in phase.model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in phase.model.parameters())
    print(f"trains {sum(p.numel() for p in trainable):,} of {total:,} parameters")
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    scaler = torch.amp.GradScaler(args.device, enabled=half is torch.float16)
    latent_dim = getattr(phase.model, "latent_dim", 0)
    steps_per_epoch = math.ceil(len(corpora["train"]) / args.batch_size)
    steps, step, epoch, started = epochs * steps_per_epoch, 0, 0, time.time()
    sums = defaultdict(float)  # of the sentences since the last record

    with open(out / "log.jsonl", "w") as log, tqdm(total=steps, disable=None) as bar:

        def record(**values):
            log.write(json.dumps({"step": step, "epoch": epoch} | values) + "\n")
            log.flush()

        def validate():
            measured = phase.evaluate(corpora["valid"], False)
            record(split="valid", **measured)
            shown = (f"{k} {measured[k]:.2f}" for k in SHOWN if measured.get(k) is not None)
            bar.write(f"step {step}, epoch {epoch}, valid: {'  '.join(shown)}", file=sys.stdout)

        validate()
        for epoch in range(epochs):
            order = data.epoch_order(corpora["train"].lengths, args.batch_size, args.seed, epoch)
            for index in order:
                batch = phase.batch(corpora["train"], index, epoch=epoch).to(args.device)
                eps = next(data.latent_noise(latent_dim, args.seed, epoch, batch.index))
                weight = phase.weight(step, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * (1 - step / steps if args.lr_schedule == "linear" else 1)
                with torch.autocast(args.device, half) if half else contextlib.nullcontext():
                    terms = phase.objective(batch, eps.to(args.device), weight)
                loss = terms["loss"].mean()
                if not loss.isfinite():
                    raise FloatingPointError(
                        f"the loss is {loss.item()} at step {step}, texts {sorted(index.tolist())}; try a smaller --lr"
                    )
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                grad_norm = nn.utils.clip_grad_norm_(trainable, args.clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                bar.update()
                sums["sentences"] += len(index)
                for name, values in terms.items():
                    sums[name] += values.detach().sum().item()
                if step % args.log_every == 0 or step == steps:
                    sentences = sums.pop("sentences")
                    means = {name: value / sentences for name, value in sums.items()}
                    record(split="train", **means, kl_weight=weight, grad_norm=grad_norm.item())
                    bar.set_postfix({name: f"{value:.2f}" for name, value in means.items()})
                    sums.clear()
            validate()
    return time.time() - started


def show(model, corpus, device, count=3):
    """Lines of text: reconstructions, samples from the prior, and an interpolation."""
    model.eval()
    decode = partial(model.tokenizer.batch_decode, skip_special_tokens=True)
    batch = data.make_batch(corpus, np.arange(min(count, len(corpus)))).to(device)
    with torch.no_grad():
        mu, _ = model.encode(batch.ids, batch.mask)
    lines = []
    for text, again in zip(decode(batch.labels), decode(model.generate(mu)), strict=True):
        lines += [f"text           {text}", f"reconstructed  {again}"]
    prior = next(data.latent_noise(model.latent_dim, 0, 0, batch.index, data.PRIOR)).to(device)
    lines += [f"sampled        {text}" for text in decode(model.generate(prior))]
    path = torch.lerp(mu[:1], mu[-1:], torch.linspace(0, 1, 5, device=device)[:, None])
    return lines + [f"interpolated   {text}" for text in decode(model.generate(path))]


def run_phase(args, phase, epochs):
    out = run_folder(args, phase)
    try:
        made, corpora = prepare(args, phase, out)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    seconds = train(made, corpora, epochs, args, out)
    made.model.save_pretrained(out / "model")
    made.tokenizer.save_pretrained(out / "model")
    result = made.evaluate(corpora["test"], True) | {"train_seconds": round(seconds, 1)}
    if phase:
        print(metrics.format_table({str(out): result}))
        lines = show(made.model, corpora["test"], args.device)
        (out / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(*lines, sep="\n")
    else:
        print(f"{out}: {result['nats_per_target']:.3f} nats a target token on the test split")
    (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    if phase:
        made.model.generate_model_card(out).save(out / "model" / "README.md")


# --------------------------------------------------------------------------------- command line


def at_least(low, kind=int):
    """An argparse type: a number of `kind`, not below `low`."""

    def number(text):
        value = kind(text)
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is below {low}")
        return value

    number.__name__ = kind.__name__
    return number


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Without --dataset, the demonstration: python train.py {DEMO}",
    )
    flag = parser.add_argument_group("data").add_argument
    flag(
        "--dataset",
        required=True,
        metavar="NAME|DIR",
        help=f"{', '.join(data.DATASETS)}, or a directory of your own with train.txt, valid.txt and test.txt",
    )
    flag(
        "--data-dir",
        default="data",
        metavar="DIR",
        help="where the folders of named data sets live (data)",
    )
    flag("--limit", type=at_least(1), metavar="N", help="first N training texts only")
    flag(
        "--max-length",
        type=at_least(2),
        default=256,
        metavar="TOKENS",
        help="texts are cut here, </s> included (256)",
    )
    flag(
        "--denoise",
        type=float,
        default=0.15,
        metavar="P",
        help="share of tokens deleted from the encoder's input in training (0.15)",
    )
    flag = parser.add_argument_group("model").add_argument
    flag(
        "--model",
        default="t5-small",
        help="T5 to start from: hub name, directory, or tiny: phase 0's (t5-small)",
    )
    flag(
        "--latent-dim",
        type=at_least(1),
        metavar="Z",
        help="dimensions of z (32, or those of the model started from)",
    )
    flag(
        "--no-latent",
        dest="latent_dim",
        action="store_const",
        const=0,
        help="language model: the same decoder with nothing encoded",
    )
    flag("--pool", choices=vae.POOLINGS, help="how a sentence's states become one (max)")
    flag(
        "--pool-layers",
        choices=vae.POOL_LAYERS,
        help="the encoder's output, or that of all its layers (last)",
    )
    flag = parser.add_argument_group("model of phase 0").add_argument
    flag(
        "--d-model",
        type=at_least(1),
        default=128,
        help="width (128); feed-forward layers are four times as wide",
    )
    flag(
        "--layers",
        type=at_least(1),
        default=2,
        help="encoder layers, and as many decoder layers (2)",
    )
    flag("--heads", type=at_least(1), default=4, help="attention heads (4)")
    flag(
        "--vocab-size",
        type=at_least(1),
        default=4000,
        help="sentencepiece vocabulary, at most (4000)",
    )
    flag = parser.add_argument_group("phases").add_argument
    flag(
        "--phase",
        type=int,
        nargs="+",
        choices=(0, 1, 2),
        default=[1, 2],
        help="one or several, run in this order (1 2)",
    )
    flag(
        "--epochs",
        type=at_least(0),
        nargs="+",
        metavar="N",
        help="of each phase named (0: 10, 1: 5, 2: 3)",
    )
    flag(
        "--init",
        metavar="RUN|DIR",
        help="model that the first phase named starts from (the phase before)",
    )
    flag(
        "--freeze-decoder",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in phase 1 (yes)",
    )
    flag(
        "--kl-schedule",
        choices=("linear", "cyclical", "constant"),
        default="linear",
        help="of the KL weight in phase 2 (linear)",
    )
    flag(
        "--kl-anneal-epochs",
        type=at_least(0, float),
        default=50,
        metavar="N",
        help="epochs until the weight is 1 (50)",
    )
    flag("--kl-cycles", type=at_least(1), default=4, metavar="N", help="of the cyclical schedule (4)")
    flag(
        "--kl-threshold",
        type=at_least(0, float),
        default=0.5,
        metavar="NATS",
        help="lambda, the floor of each dimension's KL in phase 2 (0.5)",
    )
    flag = parser.add_argument_group("optimization").add_argument
    flag("--batch-size", type=at_least(1), default=32, metavar="N", help="sentences a step (32)")
    flag("--lr", type=at_least(0, float), default=1e-3, help="AdamW's learning rate (1e-3)")
    flag(
        "--lr-schedule",
        choices=("constant", "linear"),
        default="constant",
        help="linear: to 0 at the end of the phase (constant)",
    )
    flag("--adam-eps", type=at_least(0, float), default=1e-3, help="AdamW's epsilon (1e-3)")
    flag(
        "--clip",
        type=at_least(0, float),
        default=100.0,
        metavar="NORM",
        help="largest gradient norm, nats a sentence (100)",
    )
    flag(
        "--amp",
        choices=("bf16", "fp16", "off"),
        help="automatic mixed precision (bf16 on a GPU, off on a CPU)",
    )
    flag = parser.add_argument_group("run").add_argument
    flag(
        "--out",
        metavar="DIR",
        help="run folder (runs/<dataset>/phase<k>); with several phases, the folder of theirs",
    )
    flag("--overwrite", action="store_true", help="a finished run in that folder")
    flag("--seed", type=at_least(0), default=0)
    flag("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    flag(
        "--log-every",
        type=at_least(1),
        default=20,
        metavar="STEPS",
        help="steps a training record (20)",
    )
    flag(
        "--eval-batch-size",
        type=at_least(1),
        default=64,
        metavar="N",
        help="sentences (64); no number depends on it",
    )
    flag(
        "--iw-samples",
        type=at_least(1),
        default=100,
        metavar="K",
        help="of the importance-weighted NLL on the test split (100)",
    )
    args = parser.parse_args(argv)
    epochs = args.epochs or [EPOCHS[phase] for phase in args.phase]
    args.epochs = epochs * len(args.phase) if len(epochs) == 1 else epochs
    if len(args.epochs) != len(args.phase):
        parser.error(f"--epochs has {len(epochs)} values for {len(args.phase)} phases")
    if 0 in args.phase and args.model != "tiny":
        parser.error(f"phase 0 makes a T5 of its own: it goes with --model tiny, not {args.model}")
    if 1 in args.phase and args.latent_dim == 0:
        parser.error("--no-latent has no encoder to warm up: leave phase 1 out")
    if args.init and args.phase[0] == 0:
        parser.error("--init is for phases 1 and 2: phase 0 starts from random weights")
    if args.d_model % args.heads:
        parser.error(f"--d-model {args.d_model} is not a multiple of --heads {args.heads}")
    if not 0 <= args.denoise < 1:
        parser.error(f"--denoise {args.denoise} is not in [0, 1)")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    args.amp = args.amp or ("bf16" if args.device == "cuda" else "off")
    args.argv = argv
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"} & set(argv) and not any(a.split("=")[0] == "--dataset" for a in argv):
        argv = shlex.split(DEMO) + argv
        print("The demonstration: python train.py " + shlex.join(argv))
    args = parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for phase, epochs in zip(args.phase, args.epochs, strict=True):
        run_phase(args, phase, epochs)


if __name__ == "__main__":
    main()
