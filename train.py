"""Finetune a pretrained T5 into a VAE, in the paper's two phases.

    phase 1  encoder warm-up: the decoder frozen, no KL in the objective (section 4)
    phase 2  full finetuning: everything trains, rec + w * KL, where w is the KL weight

    python train.py --dataset ptb --phase 1 2
    python train.py                                      a demonstration: no download, a few minutes

A run is a folder. Cut short, it resumes with --resume added to its command, and ends with the same weights and log.
`torchrun --nproc_per_node=N train.py ...` trains with N processes, to the same result.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import metrics
from metrics import at_least
from vae import POOL_LAYERS, POOLINGS, T5VAE

# The flags' own defaults are the paper's settings (appendix B and section 5.2). `--recipe best` puts these flags, which
# measured best (RESULTS.md), before those of the command, so that whatever the command says wins.
RECIPES = {
    "paper": "",
    "best": "--epochs 4 10 --optimizer adamw-rms --lr-schedule linear --batch-size 64 --denoise 0 "
    "--no-freeze-decoder --kl-threshold 0 --kl-target 8",
}
OPTIMIZERS = {"adamw": 1e-3, "adamw-rms": 2e-2}  # with the learning rate that suits it
DEMO = "--dataset grammar --recipe best --model tiny --epochs 4 6 --kl-target 10"  # what `python train.py` stands for


def kl_weight(step, schedule, anneal_steps, cycles=4, ratio=0.5):
    """w(step), the weight of the KL in phase 2, in [0, 1].

    It rises slowly because at full price from the first step the cheapest thing to do is to ignore z, and the decoder
    learns to do without it (section 2.2.1).

    `step` counts the optimizer steps before this one. "linear" rises from 0 to 1 over `anneal_steps` and stays there
    (Eq. 6). "cyclical" cuts `anneal_steps` into `cycles`, each rising linearly over its first `ratio` and then at 1;
    after the last it stays at 1 (Fu et al. 2019). "constant" is 1.
    """
    if schedule == "constant" or step >= anneal_steps:
        return 1.0
    if schedule == "linear":
        return step / anneal_steps
    return min(1.0, step * cycles / anneal_steps % 1 / ratio)


def controlled_kl_weight(integral, kl, target, anneal_steps):
    """Leads the KL to `target` and holds it there: (integral, weight), of the next step, in [0, 2].

    A proportional-integral controller (Shao et al. 2020 have one too). The integral moves by twice the relative error
    of the KL, at most by 1 / anneal_steps: far above the target that is linear annealing, at the target it rests. KL
    follows the weight hundreds of steps late, so the weight brakes early: it is 0.2 below the integral at the target.

    `integral` and `kl`, the mean over the batch, are this step's; `target` is R, above 0; both in nats per sentence.
    """
    error = min(1.0, (kl - target) / target)
    integral = max(0.0, min(2.0, integral + max(-1.0, min(1.0, 2 * error)) / max(1, anneal_steps)))
    return integral, max(0.0, integral - 0.2 * (1 - error))


class ELBO(nn.Module):
    """rec + weight * sum_i max(threshold, KL_i), (B,) nats, to be minimized (Eq. 1 and 2).

    The threshold holds for each dimension of each sentence: below it a dimension costs the same whatever it says, so
    nothing pushes it towards the prior (free bits).
    """

    def __init__(self, model, threshold):
        super().__init__()
        self.model, self.threshold = model, threshold

    def forward(self, batch, weight):
        mu, logvar = self.model.encode(batch.ids, batch.mask)
        rec = self.model.rec(self.model.reparameterize(mu, logvar, eps=batch.eps), batch.labels)
        kl = metrics.kl_divergence(mu, logvar)  # (B, Z)
        # At weight 0 the KL is not in the graph: phase 1 watches it and does not train on it.
        penalty = weight * kl.clamp(min=self.threshold).sum(1) if weight else 0.0
        return {"loss": rec + penalty, "rec": rec, "kl": kl.sum(1)}


# Settings that change neither weights nor records, except by rounding: a run that resumes may change them.
INCIDENTAL = {"argv", "command", "given", "versions", "processes", "device", "out", "data_dir", "overwrite", "resume"}
INCIDENTAL |= {"save_every", "iw_samples"}
VAE_FLAGS = ("latent_dim", "pooling", "pool_layers")  # a model that was saved has its own


def check_same(out, now, names=None):
    """ValueError where a setting, or one of `names`, is not in `now` what it is in the config.json of the run `out`."""
    before, now = json.loads((out / "config.json").read_text()), json.loads(json.dumps(now))
    for name in sorted((names or before.keys() | now.keys()) - INCIDENTAL):
        if (was := before.get(name)) != now.get(name):
            raise ValueError(f"--resume needs the command of {out}: {name} was {was!r}, not {now.get(name)!r}")


def open_run(out, config, args):
    """Take the run folder `out`: (its log, opened, and the state of its checkpoint or None).

    log.jsonl is cut to its length at the checkpoint. ValueError where that is damaged or of another run.
    """
    path, saved = out / "checkpoint.pt", None
    if args.resume and path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged zip file or pickle leads to
            raise ValueError(f"{path} is damaged ({type(error).__name__}): start over with --overwrite") from error
        check_same(out, config)
        print(f"{out} resumes from step {saved['step']}")
    if metrics.processes()[0]:  # only the first process writes
        return open(os.devnull, "w"), saved  # noqa: SIM115
    if not saved:
        for phase in args.phases[args.phases.index(args.phase) :]:  # those after this one would start from its model
            for name in ("metrics.json", "checkpoint.pt", "model/model.safetensors"):
                Path(run_folder(args, phase), name).unlink(missing_ok=True)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    log = open(out / "log.jsonl", "a+", buffering=1)  # noqa: SIM115  # `run_phase` closes it
    log.truncate(log.seek(saved["log_bytes"] if saved else 0))
    return log, saved


def record(log, bar, at, split, values):
    """A line of log.jsonl, and what of it fits on the screen."""
    log.write(json.dumps({"step": at["step"], "split": split} | values) + "\n")
    names = [name for name, value in values.items() if isinstance(value, float) and not name.endswith("_se")]
    shown = ", ".join(f"{name} {values[name]:.2f}" for name in names[:6])
    bar.set_postfix_str(shown)
    if split == "valid":
        bar.write(f"step {at['step']}: {shown}", file=sys.stdout)


def set_lr(optimizer, lr, relative):
    """The learning rate of the next step; `relative`: in units of the RMS of the weight that moves, at least 1e-3.

    T5's weights begin at sizes from 0.008 (queries) to 1 (embeddings). A step of one size is too large for some and too
    small for others, so T5 was pretrained with relative steps (Adafactor, Shazeer & Stern 2018, section 8).
    """
    for group in optimizer.param_groups:  # adamw-rms has one for each weight
        group["lr"] = lr * group["params"][0].detach().square().mean().sqrt().clamp(min=1e-3) if relative else lr


def gradient_step(objective, batch, index, count, weight, optimizer, scaler, signals, args):
    """Backward pass and optimizer step on the texts `index`; the first `count` of `batch` are this process's share.

    Returns: the mean of each term over the texts, with the gradient's norm; whether any process has `signals` to stop.
    Raises: FloatingPointError before a NaN or an infinity reaches the weights.
    """
    with torch.autocast(args.device, metrics.HALF[args.amp], enabled=args.amp != "off"):
        terms = objective(batch, weight)
    sums = {name: values[:count].sum().double() for name, values in terms.items()}
    # Divided by the sentences of the whole batch. DistributedDataParallel takes the mean over processes: undone here.
    scaler.scale(sums["loss"] * (metrics.processes()[1] / len(index))).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(objective.parameters(), args.clip or math.inf)
    sums["stop"] = torch.full_like(sums["loss"], float(len(signals) > 0))
    numbers = metrics.sum_over_processes(torch.stack(list(sums.values())).detach() / len(index))
    *numbers, norm = torch.cat([numbers, norm[None]]).tolist()  # the one moment in which the CPU waits for the device
    means = dict(zip(sums, numbers, strict=True))
    overflow = scaler.is_enabled() and not math.isfinite(norm)
    if not math.isfinite(means["loss"]) or not (math.isfinite(norm) or overflow):
        where = f"in the batch of texts {sorted(index.tolist())}; try a smaller --lr"
        raise FloatingPointError(f"the loss is {means['loss']}, the norm of its gradient {norm}, {where}")
    scaler.step(optimizer)  # does nothing where the scaled gradients overflowed, ...
    scaler.update()  # ... and the scale is halved then
    optimizer.zero_grad(set_to_none=True)
    stopping = means.pop("stop") > 0
    return means | {"grad_norm": 0.0 if overflow else norm}, stopping


def train(objective, corpus, make_batch, next_weight, validate, args, out, log, saved=None, steps=None):
    """The training loop, of both phases, from step 0 or from the state `saved`.

    Args:
        objective: module, (Batch, KL weight) -> {"loss": (B,) nats, ...}; make_batch: (corpus, index, epoch) -> Batch.
        next_weight: (steps taken, control, mean terms of the last step, {} at the start) -> KL weight; validate:
            (control) -> dict for the log, before each epoch and after the last. They keep what they need in `control`.
        out, log, saved: the run folder, and what `open_run` returns.
        steps: how many, instead of those of args.epochs.
    """
    rank, world = metrics.processes()
    trained = [p for p in objective.parameters() if p.requires_grad and p.numel()]
    relative = args.optimizer == "adamw-rms"
    groups = [{"params": [p]} for p in trained] if relative else trained  # each weight has a step of its own size
    optimizer = torch.optim.AdamW(groups, lr=args.lr, eps=args.adam_eps, fused=True)
    # fp16 has 5 bits of exponent: the loss is scaled up so that small gradients do not vanish, and the gradients are
    # scaled back before the step. bf16 has the 8 bits of float32 and needs nothing.
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    parts = {"objective": objective, "optimizer": optimizer, "scaler": scaler}
    at = {"step": 0, "control": {}}  # where the run is
    at["kl_weight"] = next_weight(0, at["control"], {})
    if saved:
        at = {name: saved[name] for name in at}
        for name, part in parts.items():
            part.load_state_dict(saved.pop(name))
    parallel = DistributedDataParallel(objective) if world > 1 else objective
    steps_per_epoch = math.ceil(len(corpus) / args.batch_size)
    steps = args.epochs * steps_per_epoch if steps is None else steps
    saved_at, signals = time.time(), []

    def load(index):
        # A process without a share computes a sentence that does not count: all must meet in the backward pass.
        share = index[rank::world]
        return index, len(share), make_batch(corpus, share if len(share) else index[:1], epoch)

    with contextlib.ExitStack() as stack, tqdm(total=steps, initial=at["step"], disable=rank > 0 or None) as bar:
        for number in (signal.SIGINT, signal.SIGTERM):  # they wait for the end of a step
            stack.callback(signal.signal, number, signal.signal(number, lambda number, _: signals.append(number)))
        for epoch in range(at["step"] // steps_per_epoch, math.ceil(steps / steps_per_epoch)):
            if at["step"] % steps_per_epoch == 0:
                record(log, bar, at, "valid", validate(at["control"]))
            first = epoch * steps_per_epoch
            order = data.epoch_order(corpus.lengths, args.batch_size, args.seed, epoch)[: steps - first]
            for index, count, batch in data.prefetch(load, order[at["step"] - first :]):
                # Dropout, all that draws from torch's generator, is a function of these: no random state needs saving.
                torch.manual_seed(int(np.random.SeedSequence([args.seed, at["step"], rank]).generate_state(1)[0]))
                set_lr(optimizer, args.lr * (1 - at["step"] / steps if args.lr_schedule == "linear" else 1), relative)
                weight, batch = at["kl_weight"], batch.to(args.device)  # not in the thread, which has no GPU of its own
                terms, stop = gradient_step(parallel, batch, index, count, weight, optimizer, scaler, signals, args)
                at["step"] += 1
                at["kl_weight"] = next_weight(at["step"], at["control"], terms)
                bar.update()
                if at["step"] % args.log_every == 0 or at["step"] == steps:
                    record(log, bar, at, "train", terms | {"kl_weight": weight})
                due = stop or at["step"] - first == len(order) or time.time() - saved_at >= 60 * args.save_every
                if due and rank == 0:
                    saved_at = time.time()
                    os.fsync(log.fileno())
                    state = at | {"log_bytes": log.tell()} | {name: part.state_dict() for name, part in parts.items()}
                    data.write_whole(out / "checkpoint.pt", partial(torch.save, state))
                if stop:
                    print("train.py: stopped by a signal; the same command with --resume resumes", file=sys.stderr)
                    sys.exit(128 + (*signals, signal.SIGTERM)[0])  # what a shell expects
        record(log, bar, at, "valid", validate(at["control"]))
    for number in signals:  # the last checkpoint is written
        sys.exit(128 + number)


def tiny_config(args, tokenizer):
    """The T5Config of `--model tiny`."""
    shape = {"d_model": args.d_model, "d_ff": 4 * args.d_model, "d_kv": args.d_model // args.heads}
    shape |= {"num_heads": args.heads, "num_layers": args.layers, "dropout_rate": 0.0}  # as T5 v1.1 is pretrained
    return transformers.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **shape)


def run_folder(args, phase):
    """runs/<dataset>/phase<k>, or --out; with several phases --out holds a folder for each."""
    if args.out and args.phases == [phase]:
        return Path(args.out)
    parent = args.out if args.out and phase in args.phases else Path("runs", Path(args.dataset).name)
    return Path(parent, "lm" if args.latent_dim == 0 else f"phase{phase}")


def load_model(args):
    """The model that a phase starts from, and where it is: (T5VAE, a folder or a hub name or "tiny").

    It is that of --init; else of --model for phase 1 and language models, and of the run of phase 1 for phase 2.
    Raises ValueError where there is none, or where a flag that was given contradicts the run that made it.
    """
    start = args.model if args.phase == 1 or args.latent_dim == 0 else str(run_folder(args, 1))
    start = args.init if args.init and args.phase == args.phases[0] else start
    asked = {name: getattr(args, name) for name in VAE_FLAGS if name in args.given}
    config = Path(start, "config.json")
    made = json.loads(config.read_text()) if config.is_file() else {}
    texts = data.read_texts(args.dataset, "train", args.data_dir)  # before a model is fetched: it may be missing
    try:
        if start == "tiny":
            tokenizer = data.train_tokenizer(filter(None, texts), args.vocab_size)
            model = T5VAE(tiny_config(args, tokenizer).to_dict(), **asked)
            model.tokenizer = tokenizer
        elif made.keys() & {"phase", "t5_config"}:  # a run folder, or the model in it
            model = T5VAE.from_pretrained(start)
        else:
            model = T5VAE.from_t5(start, **asked)
            t5 = model.t5.config
            made = {"d_model": t5.d_model, "layers": t5.num_layers, "heads": t5.num_heads, "vocab_size": t5.vocab_size}
    except (OSError, SafetensorError) as error:
        hint = "run phase 1 first, or give --init" if args.phase == 2 else "take a folder with a T5, or --model tiny"
        why = f"neither a folder with a model nor available from the hub ({str(error).splitlines()[0]}): {hint}"
        raise ValueError(f"phase {args.phase} starts from {start}, which is {why}") from error
    if model.tokenizer is None:
        raise ValueError(f"{start} holds a model without a tokenizer: save it with one (model.tokenizer)")
    made |= {name: getattr(model, name) for name in VAE_FLAGS}
    judged = {*VAE_FLAGS, "model", "d_model", "layers", "heads", "vocab_size", "dataset"} & set(args.given)
    for name in sorted(judged & made.keys() - ({"dataset"} if args.init else set())):
        if Path(str(made[name])).resolve() != Path(str(value := getattr(args, name))).resolve():
            raise ValueError(f"{name} is {value!r}, but {start} was made with {made[name]!r}")
    return model, start


def samples(model, corpus, count=3):
    """Lines of text: reconstructions (of a language model, none), then samples from the prior."""
    write = partial(model.eval().decode_texts, max_new_tokens=int(corpus.lengths.max()))
    if model.latent_dim == 0:
        torch.manual_seed(0)
        return [f"sampled        {text}" for text in write(torch.zeros(2 * count, 0), do_sample=True, top_k=0)]
    texts = data.detokenize([corpus.row(i).tolist() for i in range(min(count, len(corpus)))], model.tokenizer)
    pairs = zip(texts, write(model.encode_texts(texts)[0]), strict=True)
    lines = [line for text, output in pairs for line in (f"text           {text}", f"reconstructed  {output}")]
    prior = next(data.latent_noise(model.latent_dim, 0, 0, np.arange(count), data.PRIOR))
    return lines + [f"sampled        {text}" for text in write(prior)]


def finish(model, measured, corpus, args, out):
    """Print and write what the run measured; with metrics.json it is finished, and its checkpoint goes."""
    if wrong := [name for name, value in measured.items() if isinstance(value, float) and not math.isfinite(value)]:
        raise FloatingPointError(f"{', '.join(wrong)} of the test split: not a finite number")
    print(metrics.format_table({str(out): measured}))
    print(metrics.verdict(measured, args.kl_target))
    lines = samples(model, corpus)
    (out / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data.write_whole(out / "metrics.json", lambda file: file.write((json.dumps(measured, indent=2) + "\n").encode()))
    print(*lines, sep="\n")
    (out / "checkpoint.pt").unlink(missing_ok=True)


def run_phase(args, transform):
    """Train and evaluate one phase in its run folder; `args` are its own: one `phase`, `epochs`, `lr`, `dropout`."""
    out, rank = run_folder(args, args.phase), metrics.processes()[0]
    if args.resume and (out / "metrics.json").exists():
        check_same(out, vars(args), set(args.given))
        print(f"{out} is finished")
        return
    torch.manual_seed(args.seed)
    model, start = load_model(args)
    corpora = {}
    for split, limit in zip(data.SPLITS, (args.limit, None, None), strict=True):
        rest = args.data_dir, args.max_length, limit
        corpora[split] = corpus = data.load_corpus(args.dataset, split, model.tokenizer, *rest)
        size = f"{len(corpus):,} texts, {corpus.ids.size:,} tokens"
        print(f"{split}: {size}; {corpus.truncated:,} texts cut at {args.max_length}, {corpus.skipped:,} empty lines")
    config = vars(args) | {name: getattr(model, name) for name in VAE_FLAGS} | {"start": start}
    config |= {"command": "python train.py " + shlex.join(args.argv), "processes": metrics.processes()[1]}
    config["data_sha256"] = {split: corpus.sha256 for split, corpus in corpora.items()}
    config["versions"] = {module.__name__: module.__version__ for module in (torch, transformers, np)}

    model.train().to(args.device)
    if args.phase == 1 and args.freeze_decoder:
        model.freeze_decoder()
    if model.latent_dim == 0:  # a language model does not encode: its encoder has nothing to learn
        for module in (model.t5.encoder.block, model.t5.encoder.final_layer_norm, model.w_mu, model.w_logvar):
            module.requires_grad_(False)
    for module in model.modules() if args.dropout is not None else ():
        for name in {"p", "dropout"} & vars(module).keys():  # nn.Dropout has p; T5's attention, a number of that name
            setattr(module, name, args.dropout)
    if transform:
        transform(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"phase {args.phase} starts from {start}, trains {trained:,} parameters, amp {args.amp}")
    make_batch = partial(data.training_batch, denoise=args.denoise, latent_dim=model.latent_dim, seed=args.seed)
    anneal_steps = args.kl_anneal_epochs * math.ceil(len(corpora["train"]) / args.batch_size)

    def next_weight(step, control, terms):
        if args.phase == 1 or (args.kl_target and not terms):
            return 0.0
        if not args.kl_target:
            return kl_weight(step, args.kl_schedule, anneal_steps, args.kl_cycles)
        integral, kl = control.get("integral", 0.0), terms["kl"] * control["ratio"]
        control["integral"], weight = controlled_kl_weight(integral, kl, args.kl_target, anneal_steps)
        return weight

    def validate(control):
        measured = metrics.evaluate(model, corpora["valid"], args.batch_size)
        if args.kl_target:  # of held-out texts: overfitting and dropout raise the KL in training, deletion lowers it
            torch.manual_seed(args.seed)
            some = np.linspace(0, len(corpora["train"]) - 1, 3000, dtype=int).reshape(-1, 50)
            with torch.no_grad():
                batches = (make_batch(corpora["train"], index, 0).to(args.device) for index in some)
                kls = [metrics.kl_divergence(*model.encode(b.ids, b.mask)).sum(1).mean() for b in batches]
            control["ratio"] = measured["kl"] / torch.stack(kls).mean().item()
        return measured

    log, saved = open_run(out, config, args)
    objective = ELBO(model, args.kl_threshold)
    with log:
        train(objective, corpora["train"], make_batch, next_weight, validate, args, out, log, saved)
    if rank == 0:
        model.save_pretrained(out / "model")
    # Importance weighting measures a density, which phase 1 does not train: there it takes a request.
    iw_samples = args.iw_samples if args.phase == 2 or "iw_samples" in args.given else 0
    measured = metrics.evaluate(model, corpora["test"], args.batch_size, iw_samples, thorough=True)
    if rank == 0:
        finish(model, measured, corpora["test"], args, out)
    if distributed.is_initialized():
        distributed.barrier()  # the next phase reads what the first process wrote


def make_parser():
    """The flags of train.py. Their defaults are those of `--recipe paper`."""
    about = f"{__doc__.splitlines()[0]} Without flags, the demonstration: python train.py {DEMO}"
    style, usage = argparse.ArgumentDefaultsHelpFormatter, "python train.py --dataset NAME|DIR [flags]"
    parser = argparse.ArgumentParser("train.py", usage, about, formatter_class=style)
    flag, count, amount = parser.add_argument, at_least(1), at_least(0, float)
    flag("--dataset", metavar="NAME|DIR", help=f"{', '.join(data.DATASETS)}, or a folder or file of your own")
    flag("--data-dir", default="data", metavar="DIR", help="where the folders of named data sets are")
    flag("--limit", type=count, metavar="N", help="train on the first N texts only")
    flag("--max-length", type=at_least(2), default=256, metavar="TOKENS", help="texts are cut here, </s> included")
    flag("--denoise", type=at_least(0, float, 1), default=0.15, metavar="P", help="share of input tokens deleted")
    flag("--model", default="t5-small", help="hub name or folder of a T5, or tiny: a small one with random weights")
    flag("--latent-dim", type=count, default=32, metavar="Z", help="dimensions of z")
    flag("--no-latent", action="store_const", dest="latent_dim", const=0, help="a language model: no z")
    flag("--dropout", type=at_least(0, float, 1), nargs="+", metavar="P", help="of each phase named (what the T5 has)")
    flag("--pool", dest="pooling", choices=POOLINGS, default="max", help="how a sentence's states become one")
    flag("--pool-layers", choices=POOL_LAYERS, default="last", help="pool the encoder's output, or all its layers")
    flag("--d-model", type=count, default=128, metavar="D", help="width of tiny; its feed-forward layers have 4 D")
    flag("--layers", type=count, default=2, metavar="L", help="encoder layers of tiny, and decoder layers")
    flag("--heads", type=count, default=4, metavar="A", help="attention heads of tiny; they divide D")
    flag("--vocab-size", type=count, default=4000, metavar="V", help="largest vocabulary of tiny")
    flag("--recipe", choices=RECIPES, default="paper", help="defaults: the paper's, or those that measured best")
    flag("--phase", type=int, choices=(1, 2), nargs="+", default=[1, 2], help="one phase, or both in order")
    flag("--epochs", type=at_least(0), nargs="+", default=[5, 3], metavar="N", help="of each phase named")
    flag("--optimizer", choices=OPTIMIZERS, default="adamw", help="adamw-rms: each step relative to its weight's RMS")
    flag("--lr", type=amount, nargs="+", help="learning rate, of each phase named (1e-3; adamw-rms: 2e-2)")
    flag("--init", metavar="RUN|DIR", help="what the first phase starts from instead of --model, or of phase 1's run")
    flag("--freeze-decoder", action=argparse.BooleanOptionalAction, default=True, help="in phase 1")
    flag("--kl-target", type=amount, default=0.0, metavar="R", help="KL to end with, nats per sentence; 0: a schedule")
    flag("--kl-threshold", type=amount, default=0.5, metavar="NATS", help="lambda: what each dimension costs at least")
    flag("--kl-schedule", choices=("linear", "cyclical", "constant"), default="linear", help="of the KL weight")
    flag("--kl-anneal-epochs", type=amount, metavar="N", help="in which the KL weight may rise to 1 (50, or by recipe)")
    flag("--kl-cycles", type=count, default=4, metavar="N", help="of the cyclical schedule")
    flag("--batch-size", type=count, default=32, metavar="N", help="sentences per step, of all processes together")
    flag("--lr-schedule", choices=("constant", "linear"), default="constant", help="linear: falls to 0 at the end")
    flag("--adam-eps", type=amount, default=1e-3, metavar="EPS", help="epsilon of adamw (adamw-rms: 1e-8)")
    flag("--clip", type=amount, default=100.0, metavar="NORM", help="largest norm of the gradient; 0: not clipped")
    flag("--amp", choices=metrics.HALF, help="precision of matrix products (GPU: bf16 or else fp16; CPU: off)")
    flag("--out", metavar="DIR", help="run folder, or their parent (runs/<dataset>/phase<k>)")
    flag("--overwrite", action="store_true", help="replace what the run folder holds")
    flag("--resume", action="store_true", help="resume from the folder's checkpoint, or start where there is none")
    flag("--save-every", type=amount, default=10.0, metavar="MINUTES", help="between checkpoints; 0: each step")
    flag("--seed", type=at_least(0, int, 2**63), default=0, metavar="N", help="of everything random")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", choices=("cpu", "cuda"), default=device, help="where to compute")
    flag("--log-every", type=count, default=20, metavar="STEPS", help="steps per training record")
    flag("--iw-samples", type=count, default=100, metavar="K", help="for the test split's NLL; phase 1: if given")
    return parser


def parse_args(parser, argv, defaults=""):
    """The settings of `defaults` and `argv`, and `given`, the names of the flags in `argv`; refuses contradictions."""
    args = parser.parse_args(shlex.split(defaults) + argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args)))  # argparse leaves a value alone that is there before
    args.given = sorted(name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not None)
    args.argv, args.phases, phases = argv, args.phase, len(args.phase)
    args.lr = args.lr or [OPTIMIZERS[args.optimizer]]
    for name in ("epochs", "lr", "dropout"):
        values = getattr(args, name) or [None]
        if name not in args.given and len(values) == 2:  # a default, of phases 1 and 2
            values = [values[phase - 1] for phase in args.phase]
        if len(values) not in (1, phases):
            parser.error(f"--{name} has {len(values)} values for {phases} phases")
        setattr(args, name, values * (phases // len(values)))
    schedule, explicit = {"kl_threshold", "kl_schedule", "kl_cycles"} & set(args.given), "kl_target" in args.given
    # Some GPUs only emulate bf16, slowly. fp16 runs on all of them; it needs the loss scaling of `train`.
    bf16 = args.device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    refused = {
        "--dataset is missing (the demonstration takes --resume, --overwrite, --out, --seed)": args.dataset is None,
        f"--d-model {args.d_model} is not a multiple of --heads {args.heads}": args.d_model % args.heads,
        "--resume continues what --overwrite would replace: leave one out": args.resume and args.overwrite,
        "--device cuda: torch finds no GPU": args.device == "cuda" and not torch.cuda.is_available(),
        "--amp bf16: this GPU does not have it; it must be fp16 or off": args.amp == "bf16" and not bf16,
        "--adam-eps is a setting of --optimizer adamw": args.optimizer != "adamw" and "adam_eps" in args.given,
        f"--phase is {args.phase}; it must be 1, 2 or 1 2": args.phase not in ([1], [2], [1, 2]),
        "--no-latent has no encoder to warm up: give --phase 2": args.latent_dim == 0 and 1 in args.phase,
        f"--kl-target {args.kl_target:g} takes no {schedule}": schedule and explicit and args.kl_target,
    }
    for message in (message for message, wrong in refused.items() if wrong):
        parser.error(message)
    args.adam_eps = args.adam_eps if args.optimizer == "adamw" else 1e-8
    args.amp = args.amp or ("off" if args.device == "cpu" else "bf16" if bf16 else "fp16")
    if args.latent_dim == 0 or (schedule and not explicit):
        args.kl_target = 0.0  # there is nothing to control, or it is to be left alone
    if args.kl_target:
        args.kl_threshold = 0.0
    if args.kl_anneal_epochs is None:  # `paper`: 50; else in proportion to phase 2
        scaled = args.kl_target or args.recipe == "best" or args.kl_schedule == "cyclical"
        args.kl_anneal_epochs = args.epochs[-1] * (0.3 if args.kl_target else 1.0) if scaled else 50.0
    return args


def main(argv=None, transform=None):
    """The program. `transform`, a function of the T5VAE, may change its layers before it is trained."""
    argv, parser = sys.argv[1:] if argv is None else list(map(str, argv)), make_parser()
    if {flag.partition("=")[0] for flag in argv if flag[:1] == "-"} <= {"--resume", "--overwrite", "--out", "--seed"}:
        argv = shlex.split(DEMO) + argv
        print("The demonstration: python train.py " + shlex.join(argv))
    args = parse_args(parser, argv, RECIPES[parser.parse_known_args(argv)[0].recipe])
    # Batches have many shapes. In a long run on a CPU, oneDNN's kernels for them and the holes that malloc leaves
    # between freed tensors take gigabytes: here fewer kernels are kept, and large tensors go back to the system.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(-3, 2**20)  # M_MMAP_THRESHOLD
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
    if "RANK" in os.environ:  # set by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # With gloo beside NCCL, sums are reduced wherever they are: evaluations keep theirs on the CPU.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    try:
        resume = args.resume
        for out in (run_folder(args, phase) for phase in args.phases):  # all of them before the first phase starts
            finished = (out / "metrics.json").exists()
            if (finished or (out / "checkpoint.pt").exists()) and not (resume or args.overwrite):
                raise ValueError(f"{out} holds a run: --resume it (phase 1 first), give another --out, or --overwrite")
            resume = resume and finished
        with contextlib.redirect_stdout(open(os.devnull, "w") if metrics.processes()[0] else sys.stdout):
            for phase, epochs, lr, dropout in zip(args.phases, args.epochs, args.lr, args.dropout, strict=True):
                own = {"phase": phase, "epochs": epochs, "lr": lr, "dropout": dropout}
                own["kl_target"] = args.kl_target if phase == 2 else 0.0
                run_phase(argparse.Namespace(**vars(args) | own), transform)
    except (OSError, ValueError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
