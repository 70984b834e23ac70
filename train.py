"""Finetune a pretrained T5 into a VAE, in the paper's two phases, after making the T5 where there is none.

    phase 0  a small T5 from scratch, by T5's span corruption: the checkpoint that cannot be downloaded
    phase 1  encoder warm-up: the decoder frozen, no KL in the objective (section 4)
    phase 2  full finetuning: everything trains, rec + w(step) * KL

A phase is data for one loop: a model, an objective, the noise of its batches, a weight, an evaluation.

A run that ends before its time goes on with --resume, the rest of its command unchanged, and ends with the same
weights and the same log. `torchrun --nproc_per_node=N train.py ...` trains with N processes, to the same result.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import metrics
import vae

# Defaults of the flags: what the paper says (appendix B and section 5.2; phase 0 is not the paper's), and what
# measured best (RESULTS.md). Epochs and learning rate are those of each phase.
RECIPES = {
    "paper": {"epochs": {0: 10, 1: 5, 2: 3}, "lr": {0: 1e-3, 1: 1e-3, 2: 1e-3}},
    "best": {"epochs": {0: 10, 1: 4, 2: 10}, "lr": {0: 1e-3, 1: 2e-3, 2: 2e-3}, "lr_schedule": "linear"}
    | {"freeze_decoder": False, "kl_threshold": 0.0, "kl_anneal_epochs": None, "denoise": 0.0}  # None: all of phase 2
    | {"batch_size": 64, "adam_eps": 1e-8},
}
# What `python train.py` stands for: a demonstration that needs no download and a few minutes.
DEMO = "--dataset grammar --recipe best --model tiny --phase 0 1 2 --epochs 3 2 6"


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
        labels, pad_id = batch.labels, self.model.config.pad_token_id
        shifted = self.model.prepare_decoder_input_ids_from_labels(labels)  # given labels, T5 would compute a loss, too
        out = self.model(input_ids=batch.ids, attention_mask=batch.mask, decoder_input_ids=shifted)
        nats = F.cross_entropy(out.logits.float().transpose(1, 2), labels, ignore_index=pad_id, reduction="none")
        return {"loss": nats.sum(1), "targets": (labels != pad_id).sum(1)}  # (B, T) -> (B,)


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
    texts = data.read_texts(args.dataset, "train", args.data_dir, args.split)
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
    model = vae.quicken(transformers.T5ForConditionalGeneration(config)).train()
    objective = SpanObjective(model)
    sentinels = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
    batch = partial(data.span_batch, sentinels=sentinels, eos_id=tokenizer.eos_token_id, seed=args.seed)

    @torch.no_grad()
    def evaluate(corpus, final):
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=args.device)
        for whole in metrics.share(data.evaluation_batches(corpus, args.eval_batch_size)):
            noisy = batch(corpus, whole.index.numpy(), epoch=0).to(args.device)
            terms = objective(noisy, None, 0.0)
            sums += torch.stack([terms["loss"].double().sum(), terms["targets"].double().sum()])
        metrics.add_up(sums)
        model.train()
        return {"nats_per_target": (sums[0] / sums[1]).item(), "targets": int(sums[1])}

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
        for module in (model.t5.encoder.block, model.t5.encoder.final_layer_norm, model.w_mu, model.w_logvar):
            module.requires_grad_(False)
    batch = partial(data.denoising_batch, denoise=args.denoise, seed=args.seed)
    entropy = data.GRAMMAR_ENTROPY if args.dataset == "grammar" else None

    def weight(step, steps_per_epoch):
        return kl_weight(step, args.kl_schedule, args.kl_anneal_epochs * steps_per_epoch, args.kl_cycles)

    def evaluate(corpus, final):
        samples = args.iw_samples if final else 0
        return metrics.evaluate(model, corpus, args.eval_batch_size, samples, thorough=final, entropy=entropy)

    objective = ELBO(model, args.kl_threshold)
    return Phase(model, model.tokenizer, objective, batch, weight if phase == 2 else no_kl, evaluate)


def runs_folder(args):
    """Where the folders of several phases are: runs/<dataset>, or --out if the command names several."""
    return Path(args.out) if args.out and len(args.phase) > 1 else Path("runs", Path(args.dataset).name)


def run_folder(args, phase):
    """runs/<dataset>/phase<k>, or --out; with several phases --out holds a folder for each."""
    if args.out and len(args.phase) == 1:
        return Path(args.out)
    return runs_folder(args) / ("lm" if args.latent_dim == 0 and phase == 2 else f"phase{phase}")


def starting_point(args, phase):
    """Where phase 1 or 2 gets its model: --init, or the run of the phase before, or --model."""
    if args.init and phase == args.phase[0]:
        return str(next((p for p in (Path(args.init, "model"), Path(args.init)) if p.is_dir()), args.init))
    from_t5 = phase == 1 or args.latent_dim == 0  # a language model has no encoder to warm up
    if from_t5 and args.model != "tiny":
        return args.model
    before = 0 if from_t5 else phase - 1
    start = runs_folder(args) / f"phase{before}" / "model"
    if not start.is_dir():
        command = f"python train.py --dataset {args.dataset} --phase {before}"
        command += f" --model {args.model}" if args.model == "tiny" else ""
        raise FileNotFoundError(
            f"phase {phase} starts from phase {before}, and there is no {start}: "
            f"run `{command}` first, or name a model with --init"
        )
    return str(start)


def prepare(args, phase):
    """What a run is made of: (Phase, {split: Corpus}, what config.json says of it)."""
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
        limit = args.limit if split == "train" else None
        corpora[split] = corpus = data.load_corpus(
            args.dataset, split, made.tokenizer, args.data_dir, args.max_length, limit, args.split
        )
        print(
            f"{split}: {len(corpus):,} texts, {corpus.ids.size:,} tokens, "
            f"{corpus.truncated:,} texts cut at {args.max_length}, {corpus.skipped:,} empty lines"
        )
    config = vars(args) | {
        "phase": phase,
        "phases": args.phase,
        "command": "python train.py " + shlex.join(args.argv),
        "processes": metrics.processes()[1],
        "data_sha256": {split: corpus.checksum for split, corpus in corpora.items()},
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, np)}
        | {"python": platform.python_version()},
    }
    if phase:
        config["start"] = start
        config |= {name: getattr(made.model, name) for name in ("latent_dim", "pooling", "pool_layers")}
    return made, corpora, config


# --------------------------------------------------------------------------------- the run folder


def write_whole(path, content):
    """Write `content` (bytes) so that `path` holds all of it or what it held before, whatever happens meanwhile."""
    beside = path.with_name(path.name + ".partial")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        beside.unlink(missing_ok=True)  # a full disk needs the room
        raise
    os.replace(beside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_json(path, values):
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode())


def checkpoints(out):
    return sorted(out.glob("checkpoint-*"))  # oldest first: the step stands first in the name


def save_checkpoint(out, state, previous=None):
    """Write `out`/checkpoint-<step>-<sha256>.pt; of the others keep only the `previous` one. Returns its path."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path = out / f"checkpoint-{state['step']:09d}-{hashlib.sha256(content).hexdigest()}.pt"
    write_whole(path, content)
    for other in checkpoints(out):
        if other not in (path, previous):
            other.unlink()
    return path


def load_checkpoint(out):
    """(path, state) of the newest checkpoint that is what its name says, or (None, None). Warns of the others."""
    for path in reversed(checkpoints(out)):
        content = path.read_bytes()
        if path.suffix == ".pt" and path.stem.endswith(hashlib.sha256(content).hexdigest()):
            return path, torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if metrics.processes()[0] == 0:
            print(f"train.py: {path} is incomplete or damaged: ignored", file=sys.stderr)
    return None, None


def folders_from(args, phase):
    """The run folders of a phase and of those after it."""
    return [run_folder(args, later) for later in args.phase[args.phase.index(phase) :]]


def check_folders(args, phase):
    """Raises FileExistsError where a run would be overwritten that nobody said to overwrite."""
    for out in () if args.overwrite or args.resume else folders_from(args, phase):
        if (out / "metrics.json").exists():
            raise FileExistsError(f"{out} holds a finished run: give another --out, or --overwrite")
        if checkpoints(out):
            raise FileExistsError(f"{out} holds an unfinished run: go on with --resume, or --overwrite")


def open_run(args, out, config):
    """Take the folder `out` for this process: (its log, checkpoint as `load_checkpoint` has it).

    log.jsonl is the lock, too. It is cut where the checkpoint was made; a new run starts with an empty one.
    Raises ValueError where the checkpoint is of another run, BlockingIOError where another process trains into `out`.
    """
    if metrics.processes()[0]:  # the first process alone writes
        return io.StringIO(), *(load_checkpoint(out) if args.resume else (None, None))
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a+", buffering=1)  # noqa: SIM115  # open, and so locked, until the run ends
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BlockingIOError(f"another process trains into {out}") from None
    check_folders(args, config["phase"])  # once more: until now it was another's
    path, saved = load_checkpoint(out) if args.resume else (None, None)
    if saved:
        before, now = json.loads((out / "config.json").read_text()), json.loads(json.dumps(config))
        for name in sorted((before.keys() | now.keys()) - set(metrics.INCIDENTAL)):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{out} was started with {name} {before.get(name)!r}, not {now.get(name)!r}: "
                    "--resume goes with the command of the run"
                )
        if saved["log_bytes"] > log.seek(0, os.SEEK_END):
            raise ValueError(f"{out}/log.jsonl is shorter than it was at {path.name}")
        print(f"{out} goes on from step {saved['step']}")
    else:
        for folder in folders_from(args, config["phase"]) if args.overwrite else ():  # all that follows is void
            for file in (folder / "metrics.json", *checkpoints(folder)):
                file.unlink(missing_ok=True)
        write_json(out / "config.json", config)
    log.truncate(saved["log_bytes"] if saved else 0)
    return log, path, saved


class Stop:
    """SIGTERM and Ctrl-C end the program with 128 + their number, as a shell expects; while `hold`, they wait."""

    hold, number = False, 0

    def __call__(self, number, frame):
        self.number = number
        if not self.hold:
            sys.exit(128 + number)

    def release(self, stopping):
        """The end of a step, and of the program where it has to: of several processes all or none (`stopping`)."""
        self.hold = False
        if stopping or (self.number and metrics.processes()[1] == 1):
            sys.exit(128 + (self.number or signal.SIGTERM))

    @contextlib.contextmanager
    def saving(self, save):
        """Call `save` before the program ends by a signal."""
        try:
            yield
        except SystemExit:
            self.hold = True
            save()
            raise
        finally:
            self.hold = False


stop = Stop()


# --------------------------------------------------------------------------------- the loop

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of --amp
PLACE = ("step", "sums", "log_bytes", "seconds")  # where a run is, beside its weights
SHOWN = ("nats_per_target", "rec", "kl", "neg_elbo", "ppl_word", "mi", "au")


def backward(phase, objective, corpus, index, epoch, weight, scaler, args):
    """Gradients of the mean loss over the texts `index`, the batch of all processes, in micro-batches.

    Returns the sum of each term over the whole batch, {name: float}, and whether any process shall stop.
    """
    half = HALF.get(args.amp)
    rank, world = metrics.processes()
    sums = defaultdict(float)
    for i in range(args.grad_accum):
        share = index[rank::world][i :: args.grad_accum]
        # A process without a share computes a sentence that does not count: all meet in the backward pass.
        batch = phase.batch(corpus, share if len(share) else index[:1], epoch=epoch).to(args.device)
        latent_dim = getattr(phase.model, "latent_dim", 0)
        eps = next(data.latent_noise(latent_dim, args.seed, epoch, batch.index)).to(args.device)
        more = world > 1 and i + 1 < args.grad_accum
        with objective.no_sync() if more else contextlib.nullcontext():
            with torch.autocast(args.device, half) if half else contextlib.nullcontext():
                terms = objective(batch, eps, weight)
            terms["sentences"] = torch.ones_like(terms["loss"])
            terms = {name: values[: len(share)].sum() for name, values in terms.items()}
            # Divided by the sentences of the whole batch. DistributedDataParallel takes the mean of the processes.
            scaler.scale(terms["loss"] * (world / len(index))).backward()
        for name, value in terms.items():
            sums[name] += value.detach().double()
    sums["stop"] = torch.tensor(float(stop.number > 0), device=args.device, dtype=torch.float64)
    total = metrics.add_up(torch.stack(list(sums.values()))).tolist()
    sums = dict(zip(sums, total, strict=True))
    return sums, sums.pop("stop") > 0


def seed_dropout(seed, step, rank):
    """Makes dropout, all that draws from torch's generator, a function of these: there is no random state to keep."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def make_optimizer(model, lr, args):
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.999), eps=args.adam_eps, fused=True)
    return optimizer, torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")


def update(optimizer, scaler, lr, clip, loss, where):
    """Clip the gradients and take a step; returns their norm, None where a scaler skips the step for it.

    Raises FloatingPointError before a NaN or an infinity reaches the weights, and names the batch with `where`.
    """
    (group,) = optimizer.param_groups
    group["lr"] = lr
    scaler.unscale_(optimizer)
    grad_norm = nn.utils.clip_grad_norm_(group["params"], clip).item()
    if not (math.isfinite(loss) and (math.isfinite(grad_norm) or scaler.is_enabled())):
        raise FloatingPointError(f"the loss is {loss}, its gradient's norm {grad_norm}, at {where}; try a smaller --lr")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm if math.isfinite(grad_norm) else None


def train(phase, corpora, epochs, lr, args, out, log, last=None, saved=None):
    """The loop, for all phases, from step 0 or from what the checkpoint `last` has `saved`. Returns the seconds."""
    rank, world = metrics.processes()
    optimizer, scaler = make_optimizer(phase.model, lr, args)
    parts = {"model": phase.model, "optimizer": optimizer, "scaler": scaler}
    for name, part in parts.items() if saved else ():
        part.load_state_dict(saved.pop(name))
    objective = DistributedDataParallel(phase.objective) if world > 1 else phase.objective
    step, sums, log_bytes, seconds = [saved[k] for k in PLACE] if saved else (0, {}, 0, 0.0)  # sums: since a record
    steps_per_epoch = math.ceil(len(corpora["train"]) / args.batch_size)
    steps, started, saved_at = epochs * steps_per_epoch, time.time() - seconds, time.time()

    def record(**values):
        log.write(json.dumps({"step": step, "epoch": max(0, step - 1) // steps_per_epoch} | values) + "\n")

    def validate():
        measured = phase.evaluate(corpora["valid"], False)
        record(split="valid", **measured)
        shown = (f"{k} {measured[k]:.2f}" for k in SHOWN if measured.get(k) is not None)
        bar.write(f"step {step}, epoch {step / steps_per_epoch:g}, valid: {'  '.join(shown)}", file=sys.stdout)

    def save():
        nonlocal last, saved_at
        if rank == 0 and not (last and f"-{step:09d}-" in last.name):
            os.fsync(log.fileno())
            place = dict(zip(PLACE, (step, sums, log_bytes, time.time() - started), strict=True))
            last = save_checkpoint(out, place | {name: part.state_dict() for name, part in parts.items()}, last)
            saved_at = time.time()

    with tqdm(total=steps, initial=step, disable=None if rank == 0 else True) as bar, stop.saving(save):
        for epoch in range(step // steps_per_epoch, epochs):
            order = data.epoch_order(corpora["train"].lengths, args.batch_size, args.seed, epoch)
            for index in order[step % steps_per_epoch :]:
                if step % steps_per_epoch == 0:
                    validate()
                stop.hold = True  # until the step is whole
                seed_dropout(args.seed, step, rank)
                weight = phase.weight(step, steps_per_epoch)
                terms, stopping = backward(phase, objective, corpora["train"], index, epoch, weight, scaler, args)
                rate = lr * (1 - step / steps if args.lr_schedule == "linear" else 1)
                where = f"step {step}, in the batch of texts {sorted(index.tolist())}"
                grad_norm = update(optimizer, scaler, rate, args.clip, terms["loss"] / terms["sentences"], where)
                step += 1
                bar.update()
                sums = {name: sums.get(name, 0) + value for name, value in terms.items()}
                if step % args.log_every == 0 or step == steps:
                    sentences = sums.pop("sentences")
                    means = {name: value / sentences for name, value in sums.items()}
                    record(split="train", **means, kl_weight=weight, grad_norm=grad_norm)
                    bar.set_postfix({name: f"{value:.2f}" for name, value in means.items()})
                    sums = {}
                log_bytes = log.tell()
                if step == steps or time.time() - saved_at >= 60 * args.save_every:
                    save()
                stop.release(stopping)
        validate()
    return time.time() - started


def show(model, corpus, device, count=3):
    """Lines of text: reconstructions, samples from the prior, and an interpolation."""
    model.eval()
    decode = partial(model.decode_texts, max_new_tokens=int(corpus.lengths.max()))
    batch = data.make_batch(corpus, np.arange(min(count, len(corpus)))).to(device)
    with torch.no_grad():
        mu, _ = model.encode(batch.ids, batch.mask)
    lines = []
    texts = model.tokenizer.batch_decode(batch.labels, skip_special_tokens=True)
    for text, again in zip(texts, decode(mu), strict=True):
        lines += [f"text           {text}", f"reconstructed  {again}"]
    lines += [
        f"sampled        {text}"
        for text in decode(next(data.latent_noise(model.latent_dim, 0, 0, batch.index, data.PRIOR)))
    ]
    path = torch.lerp(mu[:1], mu[-1:], torch.linspace(0, 1, 5, device=device)[:, None])
    return lines + [f"interpolated   {text}" for text in decode(path)]


def finish(made, corpora, args, phase, out, seconds):
    """The model, what it measures on the test split, and samples; with metrics.json the run is finished."""
    rank, world = metrics.processes()
    if rank == 0:
        made.model.save_pretrained(out / "model")
        made.tokenizer.save_pretrained(out / "model")
    result = made.evaluate(corpora["test"], True) | {"train_seconds": round(seconds, 1)}
    if rank == 0:
        if phase:
            print(metrics.format_table({str(out): result}))
            lines = show(made.model, corpora["test"], args.device)
            (out / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(*lines, sep="\n")
        else:
            print(f"{out}: {result['nats_per_target']:.3f} nats a target token on the test split")
        for file in (out / "model").iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        write_json(out / "metrics.json", result)
        if phase:
            made.model.generate_model_card(out).save(out / "model" / "README.md")
        for path in checkpoints(out):
            path.unlink()
    if world > 1:
        distributed.barrier()  # the next phase reads what the first process wrote


def run_phase(args, phase, epochs, lr):
    out = run_folder(args, phase)
    if args.resume and (out / "metrics.json").exists():
        print(f"{out} is finished")
        return
    try:
        check_folders(args, phase)
        made, corpora, config = prepare(args, phase)
        log, last, saved = open_run(args, out, config)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    trained, total = (sum(p.numel() for p in made.model.parameters() if p.requires_grad or every) for every in (0, 1))
    print(f"trains {trained:,} of {total:,} parameters")
    try:
        with log:
            seconds = train(made, corpora, epochs, lr, args, out, log, last, saved)
            finish(made, corpora, args, phase, out, seconds)
    except (FloatingPointError, OSError) as error:
        left = [path.name for path in checkpoints(out) if path.suffix == ".pt"]
        sys.exit(f"train.py: {error}; {f'{left[-1]} is there to --resume from' if left else 'no checkpoint yet'}")


# --------------------------------------------------------------------------------- the benchmark


def flops_needed(model, read, written, trains):
    """FLOPs of the matrix products for texts of which `read` and `written` tokens, (B,) each, are real.

    Forward and, if it `trains`, back through the activations and to the weights that train. A multiply-add is two.
    """
    t5 = getattr(model, "t5", model)
    literal = t5 is model  # phase 0: its decoder attends to all that the encoder read
    read = read * (getattr(model, "latent_dim", 1) > 0)  # a language model has nothing to encode
    flops = 0
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            rows = read if re.search(r"encoder\.|EncDecAttention\.[kv]$", name) else written
            if re.search(r"^w_|layer\.1\.o$", name):  # a latent, and what it adds to a layer: one row a text
                rows = torch.ones_like(written)
            # Back to what trains before it; before the decoder's first layer that is at most the embeddings.
            back = t5.shared.weight.requires_grad or not re.search(r"decoder\.block\.0\.layer\.0\.", name)
            flops += 2 * int(rows.sum()) * part.weight.numel() * (1 + trains * (back + part.weight.requires_grad))
    scores = len(t5.encoder.block) * read**2
    scores += len(t5.decoder.block) * (written * (written + 1) // 2 + literal * read * written)
    return flops + 4 * int(scores.sum()) * t5.config.num_heads * t5.config.d_kv * (1 + 2 * trains)


def clock(work, *inputs):
    """(seconds, result) of work(*inputs)."""
    start = time.perf_counter()
    result = work(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def matmul_rates(args):
    """FLOP/s of a product of 2048 x 2048 matrices, PyTorch's own and `vae.multiply`'s: the best of 7."""
    a = torch.randn(2048, 2048, device=args.device, dtype=HALF.get(args.amp, torch.float32))
    times = ([clock(product, a, a)[0] for _ in range(8)][1:] for product in (torch.matmul, vae.multiply))
    return [2 * 2048**3 / min(seconds) for seconds in times]


def peak_memory(args):
    """Bytes: the GPU's, or of the process, all libraries included."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def prepare_benchmark(args, phase):
    """`prepare`, from --init or --model itself, where `tiny` has random weights: no run need have been before."""
    with tempfile.TemporaryDirectory() as folder:
        if phase and args.model == "tiny" and not args.init:
            tiny = make_t5(args)
            tiny.model.save_pretrained(folder)
            tiny.tokenizer.save_pretrained(folder)
        start = args.init or (folder if args.model == "tiny" else args.model)
        return prepare(argparse.Namespace(**vars(args) | {"phase": [phase], "init": start}), phase)


def plain_t5(t5):
    """An objective: the mean loss of T5 as transformers has it, of the shape of `t5`, with random weights."""
    plain = type(t5)(t5.config).to(t5.device).train()

    def objective(batch, eps, weight):
        labels = batch.labels.masked_fill(batch.labels == t5.config.pad_token_id, -100)
        loss = plain(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        return {"loss": loss.expand(len(labels))}

    return plain, objective


def lengths(pad_id, *batches):
    """(n,) tokens read and written, and the positions that they take with their padding."""
    read = torch.cat([b.mask.sum(1) for b in batches])
    written = torch.cat([(b.labels != pad_id).sum(1) for b in batches])
    return read, written, sum(b.ids.numel() + b.labels.numel() for b in batches)


def cost_row(name, model, rates, costs, trains=False):
    """A row of the benchmark's table, from (seconds, *lengths) of each time; the first does not count."""
    each = []
    for seconds, read, written, positions in costs[1:]:
        flops, tokens = flops_needed(model, read, written, trains), int(written.sum())
        padding = 100 - 100 * (int(read.sum()) + tokens) / positions
        shares = (100 * flops / seconds / rate for rate in rates)
        each.append((len(read) / seconds, tokens / seconds, *shares, padding, flops / 1e9))
    return [name, *(f"{statistics.median(x):,.1f} ({min(x):,.1f}-{max(x):,.1f})" for x in zip(*each, strict=True))]


def benchmark(args, phase, repeats=7):
    """Print what a step, an evaluation and 64 generated texts cost: `repeats` times each, after a warm-up."""
    try:
        made, corpora, _ = prepare_benchmark(args, phase)
    except (OSError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    model, corpus, pad_id = made.model, corpora["train"], made.tokenizer.pad_token_id
    rates = matmul_rates(args)

    def step(index, objective, optimizer, scaler):
        terms, _ = backward(made, objective, corpus, index, 0, float(phase == 2), scaler, args)
        update(optimizer, scaler, 0.0, args.clip, terms["loss"] / terms["sentences"], "the benchmark")

    ours, costs = (made.objective, *make_optimizer(model, 0.0, args)), []
    order = itertools.cycle(data.epoch_order(corpus.lengths, args.batch_size, args.seed, 0))
    order = list(itertools.islice(order, repeats + 1))
    for index in order:
        costs.append((clock(step, index, *ours)[0], *lengths(pad_id, made.batch(corpus, index, epoch=0))))
    rows, memory = [cost_row("training", model, rates, costs, trains=True)], peak_memory(args)

    batches, costs = list(data.evaluation_batches(corpora["valid"], args.eval_batch_size)), []
    for i in range(repeats + 1):  # batches of all lengths, with the padding of the whole split
        some = batches[i % len(batches) :: max(repeats + 1, len(batches) // 8)]
        part = corpora["valid"].take(torch.cat([batch.index for batch in some]).numpy())
        costs.append((clock(made.evaluate, part, False)[0], *lengths(pad_id, *some)))
    rows.append(cost_row("evaluation", model, rates, costs))

    tokens, costs = round(corpus.lengths.mean()), []  # the mean text
    for _ in range(repeats + 1 if phase else 0):
        z = torch.randn(64, model.latent_dim, device=args.device)
        seconds, ids = clock(partial(model.eval().generate, max_new_tokens=tokens), z)
        ended = (ids[:, 1:] == made.tokenizer.eos_token_id).cumsum(1).roll(1, 1)  # before this token
        ended[:, 0] = 0
        written = (ended == 0).sum(1).cpu()
        costs.append((seconds, torch.zeros_like(written), written, ended.numel()))
    rows += [cost_row(f"generation, {tokens} tokens", model, rates, costs)] if phase else []

    model.train()
    plain, objective = plain_t5(getattr(model, "t5", model))
    theirs = objective, torch.optim.AdamW(plain.parameters()), ours[2]
    ratios = [clock(step, index, *theirs)[0] / clock(step, index, *ours)[0] for index in order][1:]
    heads = ["median (min-max)", "texts/s", "tokens/s", "% of a @ b", "% of multiply", "% padding", "GFLOP needed"]
    print(metrics.align([heads, *rows]))
    print("a @ b: {:,.0f} GFLOP/s, multiply: {:,.0f}".format(*(rate / 1e9 for rate in rates)), end=", ")
    print(f"{torch.get_num_threads()} CPU threads; peak memory of training: {memory / 1e6:,.0f} MB")
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"a plain transformers T5 step on the same batch takes {ratio} times as long")


# --------------------------------------------------------------------------------- command line


def option(text, default=None, kind=None, metavar=None, **more):
    """The arguments of add_argument for a flag with a value."""
    return {"help": text, "default": default, "type": kind, "metavar": metavar} | more


def switch(text, action="store_true", **more):
    return {"help": text, "action": action} | more


OWN = "your own: a directory with train.txt, valid.txt and test.txt, or a file"
COUNT, AMOUNT = vae.at_least(1), vae.at_least(0, float)
FLAGS = {
    "data": {
        "--dataset": option(f"{', '.join(data.DATASETS)}, or {OWN}", metavar="NAME|DIR", required=True),
        "--split": option(
            "shares of train, valid and test of a --dataset that is one file (0.9,0.05,0.05)",
            data.SHARES,
            data.parse_shares,
            "A,B,C",
        ),
        "--data-dir": option("where the folders of named data sets live (data)", "data", metavar="DIR"),
        "--limit": option("first N training texts only", None, COUNT, "N"),
        "--max-length": option("texts are cut here, </s> included (256)", 256, vae.at_least(2), "TOKENS"),
        "--denoise": option("share of tokens deleted from the encoder's input in training (0.15)", 0.15, float, "P"),
    },
    "model": {
        "--model": option("T5 to start from: hub name, directory, or tiny: phase 0's (t5-small)", "t5-small"),
        "--latent-dim": option("dimensions of z (32, or those of the model started from)", None, COUNT, "Z"),
        "--no-latent": switch("language model: no z, the same decoder", "store_const", dest="latent_dim", const=0),
        "--pool": option("how a sentence's states become one (max)", choices=vae.POOLINGS),
        "--pool-layers": option(
            "the encoder's output, or the outputs of all its layers (last)", choices=vae.POOL_LAYERS
        ),
    },
    "model of phase 0": {
        "--d-model": option("width (128); feed-forward layers are four times as wide", 128, COUNT),
        "--layers": option("encoder layers, and as many decoder layers (2)", 2, COUNT),
        "--heads": option("attention heads (4)", 4, COUNT),
        "--vocab-size": option("sentencepiece vocabulary, at most (4000)", 4000, COUNT),
    },
    "phases": {
        "--recipe": option(
            "defaults of all flags: the paper's, or the best measured (paper)", "paper", choices=RECIPES
        ),
        "--phase": option("one or several, run in this order (1 2)", [1, 2], int, nargs="+", choices=(0, 1, 2)),
        "--epochs": option("of each phase named (0: 10, 1: 5, 2: 3)", None, vae.at_least(0), "N", nargs="+"),
        "--init": option("model that the first phase named starts from (the phase before)", metavar="RUN|DIR"),
        "--freeze-decoder": switch("in phase 1 (yes)", argparse.BooleanOptionalAction, default=True),
        "--kl-schedule": option(
            "of the KL weight in phase 2 (linear)", "linear", choices=("linear", "cyclical", "constant")
        ),
        "--kl-anneal-epochs": option("epochs until the weight is 1 (50; best: all of phase 2)", 50, AMOUNT, "N"),
        "--kl-cycles": option("of the cyclical schedule (4)", 4, COUNT, "N"),
        "--kl-threshold": option("lambda, the least KL that a dimension pays in phase 2 (0.5)", 0.5, AMOUNT, "NATS"),
    },
    "optimization": {
        "--batch-size": option("sentences a step, of all processes together (32)", 32, COUNT, "N"),
        "--grad-accum": option("parts of a batch, computed one after the other (1)", 1, COUNT, "N"),
        "--lr": option("AdamW's learning rate, of each phase named (1e-3)", None, AMOUNT, nargs="+"),
        "--lr-schedule": option("linear: to 0 at the end (constant)", "constant", choices=("constant", "linear")),
        "--adam-eps": option("AdamW's epsilon (1e-3)", 1e-3, AMOUNT),
        "--clip": option("largest gradient norm, nats a sentence (100)", 100.0, AMOUNT, "NORM"),
        "--amp": option("mixed precision (bf16 on a GPU, off on a CPU)", choices=("bf16", "fp16", "off")),
    },
    "run": {
        "--out": option("run folder (runs/<dataset>/phase<k>); with several phases, the one of theirs", metavar="DIR"),
        "--overwrite": switch("begin anew what that folder holds"),
        "--resume": switch("go on from the last checkpoint in that folder, or begin where there is none"),
        "--save-every": option("between checkpoints; 0: each step (10)", 10.0, AMOUNT, "MINUTES"),
        "--seed": option("of everything random (0)", 0, vae.at_least(0)),
        "--device": option(
            "cuda where there is one", "cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
        ),
        "--benchmark": switch("print what a step, an evaluation and generating cost, and write no run"),
        "--log-every": option("steps a training record (20)", 20, COUNT, "STEPS"),
        "--eval-batch-size": option("sentences (64); no number depends on it", 64, COUNT, "N"),
        "--iw-samples": option("of the importance-weighted NLL on the test split (100)", 100, COUNT, "K"),
    },
}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"Without --dataset, the demonstration: python train.py {DEMO}",
    )
    for group, flags in FLAGS.items():
        add = parser.add_argument_group(group).add_argument
        for flag, arguments in flags.items():
            add(flag, **arguments)
    parser.set_defaults(**RECIPES[parser.parse_known_args(argv)[0].recipe])
    args = parser.parse_args(argv)
    for name in ("epochs", "lr"):
        values = getattr(args, name)
        if isinstance(values, dict):  # a recipe's
            values = [values[phase] for phase in args.phase]
        if len(values) not in (1, len(args.phase)):
            parser.error(f"--{name} has {len(values)} values for {len(args.phase)} phases")
        setattr(args, name, values * (len(args.phase) if len(values) == 1 else 1))
    if args.kl_anneal_epochs is None:
        args.kl_anneal_epochs = float(dict(zip(args.phase, args.epochs, strict=True)).get(2, 0))
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
    if args.resume and args.overwrite:
        parser.error("--resume goes on with what --overwrite would begin anew: leave one of them out")
    if args.benchmark and "RANK" in os.environ:
        parser.error("--benchmark measures one process: run it without torchrun")
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
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
    warnings.filterwarnings("ignore", "Initializing zero-element")  # W_mu of --no-latent
    if "RANK" in os.environ:  # set by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()
    stop.number = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    first = metrics.processes()[0] == 0
    try:
        with contextlib.redirect_stdout(sys.stdout if first else open(os.devnull, "w")):
            for phase, epochs, lr in zip(args.phase, args.epochs, args.lr, strict=True):
                if args.benchmark:
                    benchmark(args, phase)
                else:
                    run_phase(args, phase, epochs, lr)
    except SystemExit:
        if stop.number and first:
            name = signal.Signals(stop.number).name
            print(f"train.py: stopped by {name}; the same command with --resume goes on", file=sys.stderr)
        raise
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
