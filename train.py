"""Finetune a pretrained T5 into a VAE, in the paper's two phases, after making the T5 itself where there is none.

    phase 0  a small T5 from scratch, by T5's span corruption: the checkpoint that could not be downloaded
    phase 1  encoder warm-up: the decoder frozen, no KL in the objective (section 4)
    phase 2  full finetuning: everything trains, rec + w(step) * KL

A phase is data for one loop: the model it starts from, its objective, and what it is evaluated with.
"""

import argparse
import contextlib
import json
import math
import platform
import shlex
import sys
import time
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
    "--dataset grammar --phase 0 1 2 --model tiny --epochs 4 1 10 --batch-size 64 --kl-anneal-epochs 10"
    " --kl-threshold 0.5 --denoise 0 --adam-eps 1e-8"
)
PAPER_EPOCHS = {0: 10, 1: 5, 2: 3}  # phase 0 is not the paper's


def kl_weight(step, schedule, anneal_steps, cycles=4, ratio=0.5):
    """w(step), the weight of the KL in phase 2, in [0, 1].

    Args:
        step: optimizer steps taken before this one.
        schedule: "linear" rises from 0 to 1 over `anneal_steps` and stays (Eq. 6); "cyclical" cuts `anneal_steps`
            into `cycles`, each rising linearly over its first `ratio` and then at 1, and stays at 1 after the
            last (Fu et al. 2019); "constant" is 1.
    """
    if schedule == "constant" or step >= anneal_steps:
        return 1.0
    if schedule == "linear":
        return step / anneal_steps
    position = step * cycles / anneal_steps % 1  # in the cycle
    return min(1.0, position / ratio)


# ---------------------------------------------------------------------------------------- objectives


class SpanObjective(nn.Module):
    """Phase 0: -log p(targets | inputs), (B,) nats, summed over a text's targets."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, eps, weight):
        labels = batch.labels.masked_fill(batch.labels == self.model.config.pad_token_id, -100)
        out = self.model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels)
        nats = F.cross_entropy(
            out.logits.float().transpose(1, 2), labels, reduction="none"
        )  # (B, T)
        return {"loss": nats.sum(1), "tokens": (labels != -100).sum(1)}


class ELBO(nn.Module):
    """Phases 1 and 2: rec + weight * sum over dimensions of max(threshold, KL_i), (B,) nats (Eq. 1 and 2)."""

    def __init__(self, model, threshold):
        super().__init__()
        self.model, self.threshold = model, threshold

    def forward(self, batch, eps, weight):
        mu, logvar = self.model.encode(batch.ids, batch.mask)
        rec = self.model.rec(self.model.reparameterize(mu, logvar, eps=eps), batch.labels)
        kl = metrics.kl_divergence(mu.float(), logvar.float())  # (B, Z)
        # Without a weight there is no KL in the graph: phase 1 watches it and does not train on it.
        penalty = weight * kl.clamp(min=self.threshold).sum(1) if weight else 0.0
        return {"loss": rec + penalty, "rec": rec, "kl": kl.sum(1)}


# ---------------------------------------------------------------------------------------- phases


class Phase(NamedTuple):
    """All that the loop needs to know of a phase."""

    model: nn.Module  # what is saved, with its tokenizer
    tokenizer: object
    objective: nn.Module  # (batch, eps, weight) -> {"loss": (B,) nats, ...}
    batch: object  # (corpus, index, epoch) -> Batch, with the noise of training
    weight: object  # step -> KL weight
    evaluate: object  # (corpus, final) -> dict


def make_t5(args, steps_per_epoch):
    """Phase 0: a small T5 with random weights and a vocabulary of the training text."""
    tokenizer = data.train_tokenizer(
        filter(None, data.read_texts(args.dataset, "train", args.data_dir)), args.vocab_size
    )
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=args.d_model,
        d_kv=args.d_model // args.heads,
        d_ff=4 * args.d_model,
        num_layers=args.layers,
        num_heads=args.heads,
        dropout_rate=0.0,  # as T5 v1.1 is pretrained
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    batch = partial(
        data.span_batch, sentinels=sentinels, eos_id=tokenizer.eos_token_id, seed=args.seed
    )
    objective = SpanObjective(model)

    @torch.no_grad()
    def evaluate(corpus, final):
        model.eval()
        nats = tokens = 0
        for whole in data.evaluation_batches(corpus, args.batch_size):
            out = objective(batch(corpus, whole.index.numpy(), epoch=0).to(args.device), None, 0.0)
            nats, tokens = nats + out["loss"].sum().item(), tokens + out["tokens"].sum().item()
        model.train()
        return {"nats_per_target": nats / tokens, "targets": tokens}

    return Phase(model, tokenizer, objective, batch, lambda step: 0.0, evaluate)


def make_vae(args, phase, start, steps_per_epoch):
    """Phases 1 and 2: a VAE around the T5 `start`, or the VAE that `start` holds."""
    if Path(start, "config.json").is_file() and "t5_config" in json.loads(
        Path(start, "config.json").read_text()
    ):
        model = vae.T5VAE.from_pretrained(start)
    else:
        model = vae.T5VAE.from_t5(start, args.latent_dim, args.pool, args.pool_layers)
    model.train()
    if args.latent_dim == 0:
        model.t5.encoder.block.requires_grad_(False)
        model.t5.encoder.final_layer_norm.requires_grad_(False)
    if phase == 1 and args.freeze_decoder:
        model.freeze_decoder()
    weight = partial(
        kl_weight,
        schedule=args.kl_schedule,
        anneal_steps=args.kl_anneal_epochs * steps_per_epoch,
        cycles=args.kl_cycles,
    )
    batch = partial(data.denoising_batch, denoise=args.denoise, seed=args.seed)
    entropy = data.GRAMMAR_ENTROPY if args.dataset == "grammar" else None

    def evaluate(corpus, final):
        iw_samples = args.iw_samples if final else 0
        return metrics.evaluate(
            model, corpus, args.eval_batch_size, iw_samples, final, entropy=entropy
        )

    objective = ELBO(model, args.kl_threshold)
    return Phase(
        model,
        model.tokenizer,
        objective,
        batch,
        weight if phase == 2 else lambda step: 0.0,
        evaluate,
    )


def starting_point(args, phase, runs):
    """The model that a phase starts from: --init, or the previous phase's run, or (phase 1) --model."""
    if args.init:
        return next(
            (path for path in (Path(args.init, "model"), Path(args.init)) if path.is_dir()),
            args.init,
        )
    if args.latent_dim == 0:
        return runs / "phase0" / "model" if args.model == "tiny" else args.model
    if phase == 1 and args.model != "tiny":
        return args.model
    before = runs / f"phase{phase - 1}" / "model"
    if not before.is_dir():
        what = "--model tiny" if phase == 1 else "phase 2"
        sys.exit(
            f"train.py: {what} starts from phase {phase - 1}, and there is no {before}; run "
            f"`python train.py --dataset {args.dataset} --phase {phase - 1}{' --model tiny' if phase == 1 else ''}` "
            "first, or name a model with --init"
        )
    return before


def train(phase, corpora, epochs, args, out):
    """The loop, the same for all phases; returns the seconds it took. Records go to `out`/log.jsonl."""
    trainable = [p for p in phase.model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in phase.model.parameters())
    print(f"trains {sum(p.numel() for p in trainable):,} of {total:,} parameters")
    optimizer = torch.optim.AdamW(trainable, lr=args.lr, betas=(0.9, 0.999), eps=args.adam_eps)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    autocast = torch.autocast(args.device, half) if half else contextlib.nullcontext()
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    steps = epochs * math.ceil(len(corpora["train"]) / args.batch_size)
    step, started, sums = 0, time.time(), {}

    with open(out / "log.jsonl", "a") as log, tqdm(total=steps, disable=None) as bar:

        def record(**values):
            log.write(json.dumps({"step": step, "epoch": epoch} | values) + "\n")
            log.flush()

        def validate():
            measured = phase.evaluate(corpora["valid"], False)
            record(split="valid", **measured)
            shown = [f"{k} {measured[k]:.2f}" for k in SHOWN if measured.get(k) is not None]
            bar.write(f"step {step}, epoch {epoch}, valid: " + "  ".join(shown), file=sys.stdout)

        epoch = 0
        validate()
        for epoch in range(epochs):
            for index in data.epoch_order(
                corpora["train"].lengths, args.batch_size, args.seed, epoch
            ):
                batch = phase.batch(corpora["train"], index, epoch=epoch).to(args.device)
                eps = next(data.latent_noise(args.latent_dim, args.seed, epoch, batch.index)).to(
                    args.device
                )
                weight = phase.weight(step)
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * (
                        1 - step / steps if args.lr_schedule == "linear" else 1
                    )
                with autocast:
                    terms = phase.objective(batch, eps, weight)
                scaler.scale(terms["loss"].mean()).backward()
                scaler.unscale_(optimizer)
                grad_norm = nn.utils.clip_grad_norm_(trainable, args.clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                bar.update()
                for name, values in terms.items():
                    sums[name] = sums.get(name, 0.0) + values.detach().sum().item()
                sums["sentences"] = sums.get("sentences", 0) + len(batch.index)
                if step % args.log_every == 0 or step == steps:
                    means = {k: v / sums["sentences"] for k, v in sums.items() if k != "sentences"}
                    record(split="train", **means, kl_weight=weight, grad_norm=grad_norm.item())
                    bar.set_postfix({k: f"{v:.2f}" for k, v in means.items()})
                    sums = {}
            validate()
    return time.time() - started


SHOWN = ("nats_per_target", "rec", "kl", "neg_elbo", "ppl_word", "mi", "au")


def samples(model, corpus, device, count=3):
    """A few test texts and their reconstructions, texts from the prior, and an interpolation."""
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
    runs = Path("runs", Path(args.dataset).name)
    out = (
        Path(args.out or runs) / f"phase{phase}"
        if len(args.phase) > 1 or not args.out
        else Path(args.out)
    )
    if (out / "metrics.json").exists() and not args.overwrite:
        sys.exit(f"train.py: {out} holds a finished run; choose another --out, or --overwrite it")
    torch.manual_seed(args.seed)
    limits = {"train": args.limit}
    read = {s: list(data.read_texts(args.dataset, s, args.data_dir)) for s in data.SPLITS}
    steps_per_epoch = math.ceil(min(len(read["train"]), args.limit or math.inf) / args.batch_size)
    if phase == 0:
        made = make_t5(args, steps_per_epoch)
    else:
        start = starting_point(args, phase, out.parent if len(args.phase) > 1 else runs)
        print(f"phase {phase} starts from {start}")
        made = make_vae(args, phase, start, steps_per_epoch)
    made.model.to(args.device)
    corpora = {
        s: data.tokenize(read[s], made.tokenizer, args.max_length, limits.get(s))
        for s in data.SPLITS
    }
    for split, corpus in corpora.items():
        print(
            f"{split}: {len(corpus):,} texts, {corpus.ids.size:,} tokens; {corpus.truncated} cut, {corpus.skipped} empty"
        )
    out.mkdir(parents=True, exist_ok=True)
    config = vars(args) | {
        "phase": phase,
        "epochs": epochs,
        "data_sha256": {s: c.checksum for s, c in corpora.items()},
    }
    config["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, np)} | {
        "python": platform.python_version()
    }
    (out / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    (out / "log.jsonl").unlink(missing_ok=True)
    seconds = train(made, corpora, epochs, args, out)
    made.model.save_pretrained(out / "model")
    made.tokenizer.save_pretrained(out / "model")
    result = made.evaluate(corpora["test"], True) | {"train_seconds": round(seconds, 1)}
    if phase:
        lines = samples(made.model, corpora["test"], args.device)
        (out / "samples.txt").write_text("\n".join(lines) + "\n")
        print(metrics.format_table({str(out): result}), *lines, sep="\n")
    else:
        print(f"phase 0, test: {result['nats_per_target']:.3f} nats a target token")
    (out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", required=True, metavar="NAME|DIR")
    group.add_argument("--data-dir", default="data")
    group.add_argument("--limit", type=int)
    group.add_argument("--max-length", type=int, default=256)
    group.add_argument("--denoise", type=float, default=0.15)
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="t5-small")
    group.add_argument("--d-model", type=int, default=128)
    group.add_argument("--layers", type=int, default=2)
    group.add_argument("--heads", type=int, default=4)
    group.add_argument("--vocab-size", type=int, default=4000)
    group.add_argument("--latent-dim", type=int, default=32)
    group.add_argument("--no-latent", dest="latent_dim", action="store_const", const=0)
    group.add_argument("--pool", choices=vae.POOLINGS, default="max")
    group.add_argument("--pool-layers", choices=vae.POOL_LAYERS, default="last")
    group = parser.add_argument_group("phase")
    group.add_argument("--phase", type=int, nargs="+", choices=(0, 1, 2), default=[1, 2])
    group.add_argument("--epochs", type=int, nargs="+")
    group.add_argument("--init")
    group.add_argument("--freeze-decoder", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument(
        "--kl-schedule", choices=("linear", "cyclical", "constant"), default="linear"
    )
    group.add_argument("--kl-anneal-epochs", type=float, default=50)
    group.add_argument("--kl-cycles", type=int, default=4)
    group.add_argument("--kl-threshold", type=float, default=0.5)
    group = parser.add_argument_group("optimization")
    group.add_argument("--batch-size", type=int, default=32)
    group.add_argument("--lr", type=float, default=1e-3)
    group.add_argument("--lr-schedule", choices=("constant", "linear"), default="constant")
    group.add_argument("--adam-eps", type=float, default=1e-3)
    group.add_argument("--clip", type=float, default=100.0)
    group.add_argument(
        "--amp",
        choices=("bf16", "fp16", "off"),
        default="bf16" if torch.cuda.is_available() else "off",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--out")
    group.add_argument("--overwrite", action="store_true")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument("--log-every", type=int, default=20)
    group.add_argument("--eval-batch-size", type=int, default=64)
    group.add_argument("--iw-samples", type=int, default=100)
    args = parser.parse_args(argv)
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--dataset" not in argv:
        argv = shlex.split(DEMO) + argv
        print("This is the demonstration: python train.py " + shlex.join(argv))
    args = parse_args(argv)
    epochs = args.epochs or [PAPER_EPOCHS[phase] for phase in args.phase]
    for phase, n in zip(args.phase, epochs, strict=True):
        run_phase(args, phase, n)


if __name__ == "__main__":
    main()
