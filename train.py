"""Finetune a pretrained T5 into a VAE, in the paper's two phases.

    phase 1  encoder warm-up: the decoder frozen, no KL in the objective (section 4)
    phase 2  full finetuning: everything trains, rec + w * KL, where w is the KL weight

    python train.py --dataset ptb --phase 1      then --phase 2; without --phase, both
    python train.py                              a demonstration: no download, a few minutes

A run is a folder. Cut short, it resumes with --resume added to its command. `torchrun
--nproc_per_node=N train.py ...` trains with N processes, to the same result but for dropout.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import torch
import transformers
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import data
import metrics
from data import InputError
from vae import POOL_LAYERS, POOLINGS, T5VAE, kl_divergence

# Defaults, per phase, of the flags without one of their own. Paper: appendix B and section 5.2.
PAPER = {"optimizer": "adamw", "lr_schedule": "constant", "denoise": 0.15, "freeze_decoder": True}
PAPER |= {"kl_target": 0.0, "kl_threshold": 0.5}
BEST = {"optimizer": "adamw-rms", "lr_schedule": "linear", "denoise": 0.0, "freeze_decoder": False}
BEST |= {"kl_target": 8.0, "kl_threshold": 0.0}
RECIPES = {
    "paper": {1: PAPER | {"epochs": 5}, 2: PAPER | {"epochs": 3}},
    "best": {
        1: BEST | {"epochs": 4, "dropout": 0.0},
        2: BEST | {"epochs": 10, "dropout": 0.1},
    },
    "demo": {1: BEST | {"epochs": 2}, 2: BEST | {"epochs": 4, "kl_target": 10.0}},
}
TINY = {"d_model": 128, "layers": 2, "heads": 4, "vocab_size": 4000}  # the shape of --model tiny
FIXED = ("latent_dim", "pooling", "pool_layers")  # by a saved model
# Settings that may differ when a run resumes: they name places, or change only how numbers round.
INCIDENTAL = {"command", "versions", "processes", "device", "amp", "out", "data_dir", "overwrite"}
INCIDENTAL |= {"resume", "save_every", "iw_samples", "start"}
RUN_FILES = ["metrics.json", "checkpoint.pt", "log.jsonl", "samples.txt", "sentences.npz"]
MAX_GRADIENT_NORM = 100.0  # usual norms are tens: it limits what one odd batch can undo


def kl_weight(step, schedule, anneal_steps, cycles=4, ratio=0.5):
    """The weight of the KL in phase 2, in [0, 1], after `step` steps.

    It rises slowly: at full weight from the start, ignoring z is cheapest, and the decoder learns
    to do without it (section 2.2.1). "linear" rises from 0 to 1 over `anneal_steps` (Eq. 6).
    "cyclical" does so in each of `cycles` parts of them, over its first `ratio`, and stays at 1 for
    the rest of it (Fu et al. 2019). "constant" is 1, and so are the others after `anneal_steps`.
    """
    if schedule == "constant" or step >= anneal_steps:
        return 1.0
    if schedule == "linear":
        return step / anneal_steps
    return min(1.0, step * cycles / anneal_steps % 1 / ratio)


class KLController:
    """Leads the KL of held-out texts to `target`, R nats per sentence, and holds it there.

    A proportional-integral controller (Shao et al. 2020). After each step, with KL the mean over
    the batch times `ratio`, which is held-out KL / training KL:

        error    = min(1, (KL - R) / R)
        integral = clip(integral + clip(2 error, -1, 1) / anneal_steps, 0, 2)
        weight   = max(0, integral - 0.2 (1 - error))

    Far above R this is linear annealing; at R it rests. KL follows the weight hundreds of steps
    late, so the weight brakes early: at R it is 0.2 below the integral.
    """

    def __init__(self, target, anneal_steps):
        self.target, self.anneal_steps = target, max(1, anneal_steps)
        self.integral, self.ratio, self.weight = 0.0, 1.0, 0.0

    def update(self, kl):
        """Sets the weight of the next step, in [0, 2], from the mean KL of this one."""
        error = min(1.0, (kl * self.ratio - self.target) / self.target)
        change = max(-1.0, min(1.0, 2 * error)) / self.anneal_steps
        self.integral = max(0.0, min(2.0, self.integral + change))
        self.weight = max(0.0, self.integral - 0.2 * (1 - error))

    def state_dict(self):
        return {"integral": self.integral, "ratio": self.ratio, "weight": self.weight}

    def load_state_dict(self, state):
        self.integral, self.ratio, self.weight = state["integral"], state["ratio"], state["weight"]


class RelativeAdamW(torch.optim.AdamW):
    """AdamW whose learning rate is in units of each weight's own RMS, at least 1e-3.

    T5's weights begin at sizes from 0.008 (queries) to 1 (embeddings): one step size does not fit
    all. T5 was pretrained with relative steps, too (Adafactor, Shazeer & Stern 2018, section 8).
    """

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        weights, grads, means, squares, steps = [], [], [], [], []
        self._init_group(group, weights, grads, means, squares, [], steps)
        norms = torch._foreach_norm(weights)
        rms = torch._foreach_div(norms, [weight.numel() ** 0.5 for weight in weights])
        rates = (group["lr"] * torch.stack(rms).clamp(min=1e-3)).unbind()
        torch._foreach_add_(steps, 1)
        settings = {"beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]}
        settings |= {"weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False}
        settings["found_inf"] = getattr(self, "found_inf", None)  # of the loss scaler
        # torch's kernel takes one rate for all weights that it is given: a call per weight.
        for w, g, m, s, t, lr in zip(weights, grads, means, squares, steps, rates, strict=True):
            torch._fused_adamw_([w], [g], [m], [s], [], [t], lr=lr, **settings)
        if settings["found_inf"] is not None:  # 1 where the step was skipped, else 0
            torch._foreach_sub_(steps, [settings["found_inf"]] * len(steps))


OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, eps=1e-3)}  # appendix B
OPTIMIZERS["adamw-rms"] = partial(RelativeAdamW, eps=1e-8)


def train(model, corpora, args, out, log):
    """The training loop of both phases, from step 0 or from the checkpoint in the run folder `out`.

    corpora: {split: Corpus}; args: the phase's settings; log: log.jsonl, open.
    """
    # 1 data
    corpus, (rank, world) = corpora["train"], data.processes()
    steps_per_epoch = math.ceil(len(corpus) / args.batch_size)
    total_steps = args.epochs * steps_per_epoch
    anneal_steps = args.kl_anneal_epochs * steps_per_epoch
    noise = {"denoise": args.denoise, "latent_dim": model.latent_dim, "seed": args.seed}
    # 2 model
    parallel = DistributedDataParallel(model) if world > 1 else model
    # 3 optimizer. In float16 the loss is scaled up, so that small gradients do not vanish, and the
    # gradients are scaled back before the step. bfloat16 needs nothing.
    trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
    optimizer = OPTIMIZERS[args.optimizer](trained, lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    controller = KLController(args.kl_target, anneal_steps) if args.kl_target else None
    # 4 resume
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "controller": controller}
    step, weight, saved_at = load_checkpoint(out, log, parts), 0.0, time.monotonic()
    left = partial(time_left, step, total_steps, saved_at)
    # 5 loop
    for epoch in range(step // steps_per_epoch, args.epochs):
        if step % steps_per_epoch == 0:
            record(log, step, "valid", validate(model, corpora, controller, noise, step))
        order = data.epoch_order(corpus.lengths, args.batch_size, args.seed, epoch)
        order = order[step % steps_per_epoch :]
        load = partial(data.training_batch, corpus, epoch, **noise)
        for index, batch in zip(order, data.prefetch(load, order), strict=True):
            seed_dropout(args.seed, step, rank)
            if args.lr_schedule == "linear":
                optimizer.param_groups[0]["lr"] = args.lr * (1 - step / total_steps)
            if args.phase == 2:
                scheduled = kl_weight(step, args.kl_schedule, anneal_steps)
                weight = controller.weight if controller else scheduled
            batch = batch.to(args.device)
            with torch.autocast(args.device, metrics.HALF[args.amp], enabled=args.amp != "off"):
                rec, kl = parallel(batch)  # (B,), (B, Z)
            loss = rec
            if weight > 0:
                loss = loss + weight * kl.clamp(min=args.kl_threshold).sum(1)  # Eq. 1 and 2
            own = len(index[rank::world])  # 0: the process has a dummy sentence
            terms = torch.stack([loss, rec, kl.sum(1)])[:, :own].sum(1)
            # DistributedDataParallel takes the mean over processes: undone here.
            scaler.scale(terms[0] * world / len(index)).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
            means = read_means(terms, norm, len(index))
            check_finite(means, step, index, scaler)
            scaler.step(optimizer)  # does nothing where scaled gradients overflowed, ...
            scaler.update()  # ... and halves the scale then
            optimizer.zero_grad()
            step, means["kl_weight"] = step + 1, weight
            if controller:
                controller.update(means["kl"])
            if step % args.log_every == 0 or step == total_steps or "scale" in means:
                record(log, step, "train", means, left(step))
            if step % steps_per_epoch == 0 or time.monotonic() > saved_at + 60 * args.save_every:
                save_checkpoint(out, log, parts, step)
                saved_at = time.monotonic()
    record(log, step, "valid", validate(model, corpora, controller, noise, step))


def seed_dropout(seed, step, rank):
    """Nothing but dropout draws from torch's generator, so there is no random state to save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def read_means(terms, norm, count):
    """{"loss", "rec", "kl": means over sentences, "grad_norm"}: the step's only synchronization.

    terms: (3,), sums over this process's sentences; count: the sentences of all processes.
    """
    sums = terms.detach().double()
    if data.processes()[1] > 1:
        distributed.all_reduce(sums)
    numbers = torch.cat([sums / count, norm.double()[None]]).tolist()
    return dict(zip(("loss", "rec", "kl", "grad_norm"), numbers, strict=True))


def check_finite(means, step, index, scaler):
    """FloatingPointError before a NaN or an infinity reaches the weights.

    In float16 a gradient that overflows is no error until the scale has fallen to 1: the step is
    skipped, recorded, and the scale halved. Without float16 the scale is always 1.
    """
    loss, norm = means["loss"], means["grad_norm"]
    if math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1:
        means |= {"grad_norm": 0.0, "scale": scaler.get_scale()}
    elif not math.isfinite(loss + norm):
        raise FloatingPointError(
            f"step {step}: the loss is {loss}, the norm of its gradient {norm}, in the batch of "
            f"texts {sorted(index.tolist())}; try a smaller --lr, or --resume with --amp off"
        )


def validate(model, corpora, controller, noise, step):
    """The measures of the validation split. The controller learns how the KL in training compares.

    Overfitting and dropout raise it above that of held-out texts, deletion lowers it.
    """
    try:
        measured = metrics.evaluate(model, corpora["valid"])
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}; try a smaller --lr") from error
    if controller:
        rank, world = data.processes()
        torch.manual_seed(noise["seed"])
        some = np.linspace(0, len(corpora["train"]) - 1, 3000, dtype=int).reshape(-1, 50)
        total = torch.zeros((), dtype=torch.float64, device=model.device)
        for index in some:
            batch = data.training_batch(corpora["train"], 0, index, **noise).to(model.device)
            with torch.no_grad():
                kl = kl_divergence(*model.encode(batch.ids, batch.mask))  # (B, Z)
            total += kl[: len(index[rank::world])].sum()
        if world > 1:
            distributed.all_reduce(total)
        if total > 0:
            controller.ratio = measured["kl"] * some.size / total.item()
    return measured


def time_left(first, total, started, step):
    """For the screen: the rate since the step `first`, taken at `started`, and what is left."""
    rate = (step - first) / (time.monotonic() - started)
    return f"; {rate:.1f} steps/s, {(total - step) / rate / 60:.0f} min left"


def record(log, step, split, values, more=""):
    """A line of log.jsonl, and its main numbers on the screen."""
    log.write(json.dumps({"step": step, "split": split} | values) + "\n")
    names = [n for n, v in values.items() if isinstance(v, float) and not n.endswith("_se")]
    shown = ", ".join(f"{name} {values[name]:.3g}" for name in names[:6])
    print(f"step {step} {split}: {shown}{more}", flush=True)


def save_checkpoint(out, log, parts, step):
    """Write checkpoint.pt; a kill or a full disk leaves the one before."""
    if data.processes()[0] == 0:
        os.fsync(log.fileno())
        state = {name: part.state_dict() if part else {} for name, part in parts.items()}
        state |= {"step": step, "log_bytes": log.tell()}
        data.write_atomically(out / "checkpoint.pt", partial(torch.save, state))


def load_checkpoint(out, log, parts):
    """The step of the checkpoint, else 0. log.jsonl is cut to its length."""
    path, state = out / "checkpoint.pt", {"step": 0, "log_bytes": 0}
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in parts.items():
                if state[name]:  # a loss scaler that was off has no state
                    part.load_state_dict(state[name])
        except Exception as error:
            advice = f"({type(error).__name__}): start over with --overwrite"
            raise InputError(f"{path} is damaged or of another version {advice}") from error
        print(f"{out} resumes from step {state['step']}")
    if data.processes()[0] == 0:
        log.truncate(log.seek(state["log_bytes"]))
    return state["step"]


def run_folder(args, phase):
    """DIR/phase<k>, or DIR/lm for a language model, where DIR is --out or runs/<dataset>."""
    parent = Path("runs", Path(args.dataset).resolve().name) if args.out is None else args.out
    return Path(parent, "lm" if args.latent_dim == 0 else f"phase{phase}")


def find_files(out, mark, own):
    """The names of the files in a folder, hidden and partial ones aside.

    InputError where one is not in `own`, or where config.json lacks the key `mark` of such a run.
    """
    found = {path.name for path in out.glob("[!.]*") if path.suffix != ".partial"}
    foreign = found - own if mark in data.read_json(out / "config.json") else found
    if foreign:
        raise InputError(f"{out} holds {min(foreign)}, which no run wrote: give another --out")
    return found


def claim_folders(settings):
    """InputError where a run folder holds what must stay."""
    resume = settings[0].resume
    for args in settings:
        out = run_folder(args, args.phase)
        found = find_files(out, "data_sha256", {*RUN_FILES, "config.json", "model"})
        if found & {"metrics.json", "checkpoint.pt"} and not (resume or args.overwrite):
            advice = "--resume it (phase 1 first), give another --out, or --overwrite"
            raise InputError(f"{out} holds a run: {advice}")
        resume = resume and "metrics.json" in found  # phase 2 waits for phase 1


def start_over(out, config, later):
    """Replace the run in the folder `out`, and delete those in `later`, which started from it."""
    for folder in (out, *later):
        for name in (*RUN_FILES, "model/model.safetensors"):
            (folder / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    data.write_json(out / "config.json", config)


def check_same(out, now):
    """InputError where a setting that matters differs from the config.json of the run `out`."""
    before, now = data.read_json(out / "config.json"), json.loads(json.dumps(now))
    for name in sorted(now.keys() - INCIDENTAL):
        if before.get(name) != now[name]:
            change = f"{name} was {before.get(name)!r}, not {now[name]!r}"
            raise InputError(f"--resume needs the command of {out}: {change}")


def tiny_config(args, vocab_size):
    """The T5Config of `--model tiny`, without dropout, as T5 v1.1 is pretrained."""
    shape = {"d_model": args.d_model, "d_kv": args.d_model // args.heads, "d_ff": 4 * args.d_model}
    shape |= {"num_layers": args.layers, "num_heads": args.heads, "vocab_size": vocab_size}
    return transformers.T5Config(**shape, dropout_rate=0.0, decoder_start_token_id=0)


def load_start(args):
    """The model of --init, else of phase 1 for phase 2 of a VAE, else --model.

    Sets in `args` what the model fixes. Raises InputError where there is no such model, or where a
    flag contradicts it.
    """
    start = "t5-small" if args.model is None else args.model
    if args.init is not None:
        start = args.init
    elif args.phase == 2 and args.latent_dim != 0:
        start = str(run_folder(args, 1))
    asked = {name: getattr(args, name) for name in FIXED if getattr(args, name) is not None}
    args.start, made = start, data.read_json(Path(start, "config.json"))
    try:
        if start == "tiny":
            made = {name: getattr(args, name) or value for name, value in TINY.items()}
            vars(args).update(made)
            texts = [text for text in data.read_texts(args.dataset, "train", args.data_dir) if text]
            tokenizer = data.train_tokenizer(texts[: args.limit], args.vocab_size)
            model = T5VAE(tiny_config(args, len(tokenizer)).to_dict(), **asked)
            model.tokenizer = tokenizer
        elif made.keys() & {"data_sha256", "t5_config"}:  # a run folder, or the model in it
            if start == args.model:
                raise InputError(f"--model is {start}, a VAE; start from it with --init")
            model = T5VAE.from_pretrained(start)
        else:
            model, made = T5VAE.from_t5(start, **asked), {}
    except OSError as error:
        hint = "run phase 1 first" if start.endswith("phase1") else "--model tiny needs no download"
        message = f"phase {args.phase} cannot start from {start}: {data.one_line(error)}; {hint}"
        raise InputError(message) from error
    kinds = ["a language model" if z == 0 else "a VAE" for z in (model.latent_dim, args.latent_dim)]
    if kinds[0] != kinds[1]:
        raise InputError(f"{start} is {kinds[0]}: {kinds[1]} cannot start from it")
    inherit(args, {"model": start} | made | {name: getattr(model, name) for name in FIXED})
    return model


def inherit(args, made):
    """Flags that were not given become those of the start, `made`. InputError where one differs."""
    for name in (*FIXED, *TINY, "model", "dataset"):
        ours, theirs = getattr(args, name), made.get(name)
        if ours is None:
            setattr(args, name, theirs)
        elif name == "dataset" and (args.init or theirs is None):
            continue  # --init may name a run on other texts
        elif name in ("model", "dataset"):
            ours, theirs = Path(ours).resolve(), Path(theirs).resolve()
        if ours is not None and ours != theirs:
            flag = "pool" if name == "pooling" else name.replace("_", "-")
            given = f"--{flag} is {getattr(args, name)}"
            raise InputError(f"{given}, but {args.start} has {made.get(name)}")


def prepare(model, args):
    """Training mode, on the device; freeze what the phase does not train; set dropout."""
    model.train().to(args.device)
    if args.phase == 1 and args.freeze_decoder:
        model.freeze_decoder()
    if model.latent_dim == 0:  # a language model does not encode: its encoder has nothing to learn
        encoder = model.t5.encoder
        for module in (encoder.block, encoder.final_layer_norm, model.w_mu, model.w_logvar):
            module.requires_grad_(False)
    if args.dropout is None:
        return
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = args.dropout
        elif isinstance(getattr(module, "dropout", None), int | float):  # T5's attention: a number
            module.dropout = args.dropout


def load_corpora(model, args):
    """{split: Corpus}, and a line on the screen about each."""
    corpora = {}
    for split in data.SPLITS:
        limit = args.limit if split == "train" else None
        rest = args.data_dir, args.max_length, limit
        corpora[split] = c = data.load_corpus(args.dataset, split, model.tokenizer, *rest)
        left_out = f"{c.truncated:,} cut at {args.max_length}, {c.skipped:,} lines empty"
        print(f"{split}: {len(c):,} texts, {c.ids.size:,} tokens; {left_out}")
    return corpora


def run_phase(args, later=()):
    """Train and evaluate one phase in its run folder; `later`: those of the phases after it."""
    out, first = run_folder(args, args.phase), data.processes()[0] == 0
    if args.resume and (out / "metrics.json").exists():
        check_same(out, {name: value for name, value in vars(args).items() if value is not None})
        (out / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{out} is finished")
        return
    torch.manual_seed(args.seed)
    data.read_texts(args.dataset, "train", args.data_dir)  # before a model is fetched
    model = load_start(args)
    if args.lr is None:  # no checkpoint of long pretraining has been tried with relative steps
        relative = 2e-2 if args.model == "tiny" else 5e-3
        args.lr = 1e-3 if args.optimizer == "adamw" else relative
    corpora = load_corpora(model, args)
    config = vars(args) | {"processes": data.processes()[1]}
    config["data_sha256"] = {split: corpus.sha256 for split, corpus in corpora.items()}
    config["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    if args.resume and (out / "checkpoint.pt").exists():
        check_same(out, config)
    elif first:  # nothing is deleted before the command has shown that it works
        start_over(out, config, later)
    if distributed.is_initialized():
        distributed.barrier()  # the files are as the first process left them
    prepare(model, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"phase {args.phase} starts from {args.start} and trains {trained:,} parameters")
    with open(out / "log.jsonl" if first else os.devnull, "a+", buffering=1) as log:
        train(model, corpora, args, out, log)
    if first:
        model.save_pretrained(out / "model")
    iw_samples = args.iw_samples or metrics.IW_SAMPLES[args.phase]
    columns = metrics.measure(model, corpora["test"], iw_samples=iw_samples, thorough=True)
    if first:
        measured = metrics.summarize(columns, corpora["test"], iw_samples)
        samples = write_samples(model, corpora["test"], columns["mu"], out)
        metrics.write_measures(out, measured, columns)
        (out / "checkpoint.pt").unlink(missing_ok=True)
        lm_nll = metrics.language_model_nll(out, config)
        print(metrics.format_table({str(out): measured}))
        print(metrics.verdict(measured, args.kl_target, lm_nll), *samples, sep="\n")
    if distributed.is_initialized():
        distributed.barrier()  # the next phase reads what the first process wrote


def write_samples(model, corpus, mu, out):
    """Write samples.txt: texts from mu (N, Z) and from the prior. Returns its lines."""
    longest = {"max_new_tokens": int(corpus.lengths.max())}
    lines, model = [], model.eval()
    if model.latent_dim:
        rows = [corpus.row(i).tolist() for i in range(min(3, len(corpus)))]
        texts = data.detokenize(rows, model.tokenizer)
        outputs = model.decode_texts(mu[: len(rows)], **longest)
        for text, output in zip(texts, outputs, strict=True):
            lines += [f"text           {text}", f"reconstructed  {output}"]
    torch.manual_seed(0)
    z = torch.randn(3, model.latent_dim)
    for text in model.decode_texts(z, do_sample=model.latent_dim == 0, **longest):
        lines.append(f"sampled        {text}")
    (out / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def make_parser():
    """The flags. Without a default: it comes from the recipe, or from what a run starts from."""
    usage = "python train.py --dataset NAME|DIR|FILE [flags]"
    about = f"{__doc__.splitlines()[0]} Without flags: a demonstration."
    parser = argparse.ArgumentParser("train.py", usage, about)
    flag, optional = parser.add_argument, argparse.BooleanOptionalAction
    flag("--dataset", help=f"{', '.join(data.DATASETS)}, or a folder or file of your own")
    flag("--data-dir", default="data", help="where the folders of named data sets are (data)")
    flag("--limit", type=int, help="train on the first N texts only")
    flag("--max-length", type=int, default=256, help="tokens of a text, </s> included (256)")
    flag("--denoise", type=float, help="share of input tokens deleted (paper: 0.15; best: 0)")
    flag("--model", help="hub name or folder of a T5 (t5-small), or tiny: small, random weights")
    flag("--latent-dim", type=int, help="dimensions of z (32)")
    flag("--no-latent", action="store_true", help="a language model: no z, phase 2 alone")
    flag("--dropout", type=float, help="(that of the T5; best: 0, then 0.1)")
    flag("--pool", dest="pooling", choices=POOLINGS, help="of a sentence's states (max)")
    flag("--pool-layers", choices=POOL_LAYERS, help="the encoder's output, or all layers (last)")
    flag("--d-model", type=int, help="width of tiny (128); its feed-forward layers have 4 times it")
    flag("--layers", type=int, help="encoder layers of tiny, and decoder layers (2)")
    flag("--heads", type=int, help="attention heads of tiny (4); they divide the width")
    flag("--vocab-size", type=int, help="largest vocabulary of tiny (4000)")
    flag("--recipe", choices=RECIPES, default="paper", help="defaults that depend on the phase")
    flag("--phase", type=int, choices=(1, 2), help="(both, in order)")
    flag("--epochs", type=int, help="(paper: 5 and 3; best: 4 and 10)")
    flag("--batch-size", type=int, default=32, help="sentences per step, of all processes (32)")
    flag("--optimizer", choices=OPTIMIZERS, help="rms: relative to each weight's RMS")
    flag("--lr", type=float, help="learning rate (adamw: 1e-3; adamw-rms: tiny 2e-2, else 5e-3)")
    flag("--lr-schedule", choices=("constant", "linear"), help="linear: falls to 0 at the end")
    flag("--init", help="run or model to start from (phase 2: the run of phase 1)")
    flag("--freeze-decoder", action=optional, help="in phase 1 (paper: yes; best: no)")
    flag("--kl-target", type=float, help="KL to end with, nats per sentence; 0: follow a schedule")
    flag("--kl-threshold", type=float, help="lambda: the least that a dimension costs, nats")
    flag("--kl-schedule", choices=("linear", "cyclical", "constant"), help="of the KL weight")
    flag("--kl-anneal-epochs", type=float, help="until the KL weight may be 1 (paper: 50)")
    flag("--amp", choices=metrics.HALF, help="precision (GPU: bf16, else fp16; CPU: off, float32)")
    flag("--out", help="parent of phase1/, phase2/ and lm/ (runs/<dataset>)")
    flag("--overwrite", action="store_true", help="replace the runs that the folders hold")
    flag("--resume", action="store_true", help="resume from the last checkpoint, if there is one")
    flag("--save-every", type=float, default=10.0, help="minutes between checkpoints (10)")
    flag("--seed", type=int, default=0, help="of everything random (0)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", choices=("cpu", "cuda"), default=device, help="where to compute")
    flag("--log-every", type=int, default=50, help="steps per training record (50)")
    flag("--iw-samples", type=int, help="K of the test split's NLL (100; phase 1: none)")
    return parser


POSITIVE = ("limit", "latent_dim", "batch_size", "log_every", "iw_samples", *TINY)
NOT_NEGATIVE = ("epochs", "lr", "save_every", "kl_target", "kl_threshold", "kl_anneal_epochs")
LIMITS = dict.fromkeys(POSITIVE, (1, math.inf)) | dict.fromkeys(NOT_NEGATIVE, (0, math.inf))
LIMITS |= {"max_length": (2, math.inf), "denoise": (0, 1), "dropout": (0, 1), "seed": (0, 2**63)}


def check_args(parser, args):
    """Refuse numbers out of their limits, and flags that contradict each other."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value < high:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} is {value}; it must be at least {low} and less than {high}")
    width, heads = args.d_model or TINY["d_model"], args.heads or TINY["heads"]
    if width % heads:
        parser.error(f"--d-model is {width}; it must be a multiple of --heads, {heads}")
    if args.resume and args.overwrite:
        parser.error("--resume continues what --overwrite would replace: leave one out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU")
    if args.device == "cuda" and args.amp == "bf16" and not has_bf16():
        parser.error("--amp is bf16, which this GPU does not have; it must be fp16 or off")
    if args.no_latent and (args.phase == 1 or args.latent_dim):
        parser.error("--no-latent has no encoder: it takes no --phase 1 and no --latent-dim")
    if args.kl_target and (args.kl_threshold is not None or args.kl_schedule):
        parser.error("--kl-target takes no --kl-threshold and no --kl-schedule")


def has_bf16():
    """Some GPUs only emulate bfloat16, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def phase_settings(args, phase):
    """The settings of one phase: what the command says, else what its recipe says."""
    args = argparse.Namespace(**vars(args) | {"phase": phase})
    if args.no_latent:
        args.latent_dim = 0
    if args.kl_threshold is not None or args.kl_schedule or args.no_latent or phase == 1:
        args.kl_target = 0.0  # no target of the recipe, or nothing to control
    for name, value in RECIPES[args.recipe][phase].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.kl_target:
        args.kl_threshold = 0.0
    args.kl_schedule = args.kl_schedule or "linear"
    if args.kl_anneal_epochs is None:
        args.kl_anneal_epochs = args.epochs * (0.3 if args.kl_target else 1.0)
        if args.recipe == "paper" and args.kl_schedule == "linear" and not args.kl_target:
            args.kl_anneal_epochs = 50.0
    if args.amp is None:  # all GPUs have float16
        args.amp = "off" if args.device == "cpu" else "bf16" if has_bf16() else "fp16"
    return args


def parse_args(argv):
    """The settings of the phases that the command runs, a list of Namespace."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.dataset is None:
        changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        if changed - {"resume", "overwrite", "out", "seed"}:
            others = "the demonstration takes only --resume, --overwrite, --out and --seed"
            parser.error(f"--dataset is missing ({others})")
        args.dataset, args.model, args.recipe = "grammar", "tiny", "demo"
        print("The demonstration: --dataset grammar --model tiny --recipe demo")
    check_args(parser, args)
    args.command = shlex.join(["python", "train.py", *argv])
    if args.no_latent:
        return [phase_settings(args, 2)]
    if args.phase:
        return [phase_settings(args, args.phase)]
    both = [phase_settings(args, 1), phase_settings(args, 2)]
    both[1].init = None  # phase 2 starts from phase 1
    return both


def describe_device(args):
    """Where and how it computes, with the reason where a GPU might have been expected."""
    said = f"device {args.device}, precision {args.amp}"
    if args.device == "cuda":
        return f"{said}: {torch.cuda.get_device_name()}"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as error:  # no build for CUDA, no driver or an old one, no GPU
            said += f" (no CUDA: {data.one_line(error)})"
    return said


def main(argv=None):
    settings = parse_args(sys.argv[1:] if argv is None else [str(word) for word in argv])
    data.replace_unprintable()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # its retries, where there is no network
    device = settings[0].device
    if "RANK" in os.environ:  # set by torchrun
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # With gloo beside NCCL, sums are reduced wherever they are: evaluations keep theirs on CPU.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    rank = data.processes()[0]
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w") if rank else sys.stdout):
            print(describe_device(settings[0]))
            claim_folders(settings)
            for i, args in enumerate(settings):
                run_phase(args, [run_folder(after, after.phase) for after in settings[i + 1 :]])
    except (OSError, InputError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; --resume continues the same command", file=sys.stderr)
        sys.exit(130)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
