"""Finetune a pretrained T5 into a VAE, in the paper's two phases.

    phase 1  encoder warm-up without KL; in the paper's recipe the decoder is frozen (section 4)
    phase 2  full finetuning: everything trains, rec + w * KL, where w is the KL weight

    python train.py --dataset ptb --phase 1      then --phase 2; without --phase, both
    python train.py                              a demonstration: no download, a few minutes

To continue an interrupted run, repeat its command with --resume. `torchrun --nproc_per_node=N
train.py ...` trains with N processes, to the same result but for dropout.
"""

import argparse
import contextlib
import hashlib
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
import vae
from data import InputError, say
from vae import POOL_LAYERS, POOLINGS, T5VAE, kl_divergence

# Defaults of flags that depend on the recipe and the phase. Paper: appendix B and section 5.2.
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
TINY = {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_layers": 2, "num_heads": 4}
TINY_VOCABULARY = 4000
FIXED = ("latent_dim", "pooling", "pool_layers")  # what a saved model has decided
MAX_GRADIENT_NORM = 100.0  # usual norms are tens: it limits what one odd batch can undo


# ---------------------------------------------------------------------------------- objective


def kl_weight(step, schedule, anneal_steps, cycles=4, rise=0.5, zero=0.0):
    """The weight of the KL in phase 2, in [0, 1], after `step` steps.

    It rises slowly: at full weight from the start, ignoring z is cheapest, and the decoder learns
    to do without it (section 2.2.1). "linear" rises from 0 to 1 over `anneal_steps` (Eq. 6).
    "cyclical" divides them into `cycles` parts (Fu et al. 2019): it is 0 for the share `zero` of
    each, rises for the share `rise`, and is 1 for the rest. "constant" is 1, and so are the others
    after `anneal_steps`.
    """
    if schedule == "constant" or step >= anneal_steps:
        return 1.0
    if schedule == "linear":
        return step / anneal_steps
    position = (step * cycles / anneal_steps) % 1  # in the cycle
    if position < zero:
        return 0.0
    if position < zero + rise:
        return (position - zero) / rise
    return 1.0


class KLController:
    """Leads the KL of held-out texts to `target`, R nats per sentence, and holds it there.

    A proportional-integral controller (Shao et al. 2020). After each step, with KL the mean over
    the batch times `ratio`, which is held-out KL / training KL:

        error    = min(1, (KL - R) / R)
        integral = clip(integral + clip(2 error, -1, 1) / anneal_steps, 0, 2)
        weight   = max(0, integral - 0.2 (1 - error))

    The integral remembers what weight has turned out to be needed. Far above R it rises by
    1 / anneal_steps per step, as linear annealing does; from 1.5 R down it slows (hence the 2), and
    at R it rests. KL follows the weight hundreds of steps late, so the weight brakes early: the
    lower KL is, the further it stays below the integral, by 0 from 2 R up, by 0.2 at R.
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
        return vars(self)

    def load_state_dict(self, state):
        vars(self).update(state)


def objective(rec, kl, weight, threshold):
    """What training minimizes (Eq. 1 and 2): (B,), nats per sentence.

    rec: (B,); kl: (B, Z), of which each dimension costs at least `threshold`, lambda.
    """
    return rec + weight * kl.clamp(min=threshold).sum(1)


# ---------------------------------------------------------------------------------- optimizer


def make_optimizer(model, args):
    """AdamW over what trains. For adamw-rms each weight is a group, with a rate of its own.

    Weight decay is that of torch, 0.01.
    """
    # A language model's W_mu, W_logvar and W_proj have no elements.
    weights = [p for p in model.parameters() if p.requires_grad and p.numel()]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(weights, lr=args.lr, eps=1e-3, fused=True)  # appendix B
    groups = [{"params": [weight]} for weight in weights]
    return torch.optim.AdamW(groups, lr=args.lr, eps=1e-8, fused=True)


@torch.no_grad()
def set_rates(optimizer, args, taken):
    """The learning rates of the next step; `taken`, in [0, 1), is the share of steps taken.

    adamw-rms: in units of each weight's own RMS, at least 1e-3. T5's weights begin at sizes from
    0.008 (queries) to 1 (embeddings): one step size does not fit all. T5 was pretrained with
    relative steps, too (Adafactor, Shazeer & Stern 2018, section 8).
    """
    rate = args.lr * (1 - taken) if args.lr_schedule == "linear" else args.lr
    for group in optimizer.param_groups:
        if args.optimizer == "adamw":
            group["lr"] = rate
        else:  # a tensor: a number would make the CPU wait for the GPU
            (weight,) = group["params"]
            rms = torch.linalg.vector_norm(weight) / weight.numel() ** 0.5
            group["lr"] = rate * rms.clamp(min=1e-3)


# --------------------------------------------------------------------------------------- loop


def train_step(model, optimizer, scaler, batches, weight, step, args):
    """One step of the optimizer, from this process's micro-batches.

    In float16 the loss is scaled up, so that small gradients do not vanish, and the gradients are
    scaled back before the step. If one overflows, the step is skipped and the scale halved; at a
    scale of 1, which all other precisions have, that is an error.

    Returns: {"loss", "rec", "kl": means over the sentences of all processes, nats; "grad_norm"},
    and whether the step was skipped. Raises FloatingPointError before a NaN or an infinity reaches
    the weights.
    """
    rank, world = data.processes()
    sums = torch.zeros(3, dtype=torch.float64, device=args.device)
    for i, batch in enumerate(batches):
        seed_dropout(args.seed, step, rank, i, args.device)
        batch = batch.to(args.device)
        context = contextlib.nullcontext()
        if world > 1 and i < len(batches) - 1:
            context = model.no_sync()  # gradients add up over processes at the last one
        with context:
            with metrics.autocast(args.device, args.amp):
                rec, kl = model(batch)  # (B,), (B, Z)
            loss = objective(rec, kl, weight, args.kl_threshold)
            terms = torch.stack([loss, rec, kl.sum(1)])[:, : batch.count].sum(1)  # (3,)
            # DistributedDataParallel takes the mean over processes: undone here.
            scaler.scale(terms[0] * world / batch.step_count).backward()
        sums += terms.detach()
    scaler.unscale_(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
    if world > 1:
        distributed.all_reduce(sums)
    # The step's only synchronization with a GPU.
    loss, rec, kl, norm = torch.cat([sums / batch.step_count, norm.double()[None]]).tolist()
    skipped = math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() > 1
    if not skipped and not math.isfinite(loss + norm):
        texts = sorted(np.concatenate([batch.index for batch in batches]).tolist())
        advice = "try a smaller --lr"
        if args.amp != "off":
            advice += ", or --resume with --amp off"
        raise FloatingPointError(
            f"step {step}: the loss is {loss}, the norm of its gradient {norm}, in the batch of "
            f"texts {texts}; {advice}"
        )
    scaler.step(optimizer)  # does nothing if it is to be skipped
    scaler.update()
    optimizer.zero_grad()
    return {"loss": loss, "rec": rec, "kl": kl, "grad_norm": norm}, skipped


def seed_dropout(seed, step, rank, micro_batch, device):
    """Seeds dropout. Nothing else draws from torch's generator, so it has no state to save."""
    place = np.random.SeedSequence([seed, step, rank, micro_batch])
    seed = int(place.generate_state(1)[0])
    if device == "cuda":
        torch.cuda.manual_seed(seed)
    else:  # torch.manual_seed would first look for other devices, which takes 0.2 ms
        torch.default_generator.manual_seed(seed)


def validate(model, corpora, make_batches, controller, run, step):
    """Records the measures of the validation split; the controller, if any, learns from them."""
    try:
        measured = metrics.evaluate(model, corpora["valid"], max_tokens=run.max_tokens)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}; try a smaller --lr") from error
    if controller:
        match_held_out_kl(model, corpora["train"], make_batches, controller, measured["kl"])
    run.record(step, "valid", measured)


@torch.no_grad()
def match_held_out_kl(model, corpus, make_batches, controller, held_out_kl):
    """Tells the controller how the KL of held-out texts, in nats, compares to that in training.

    Overfitting and dropout raise the KL in training, deletion lowers it. corpus: the training
    texts, of which 3,000 are taken, evenly (all, if there are fewer); make_batches(epoch, index)
    makes their batches.
    """
    count = min(3000, len(corpus))
    some = np.linspace(0, len(corpus) - 1, count, dtype=int)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    torch.manual_seed(0)  # of dropout
    for index in np.array_split(some, -(-count // 50)):
        for batch in make_batches(0, index):
            batch = batch.to(model.device)
            kl = kl_divergence(*model.encode(batch.ids, batch.mask))  # (B, Z)
            total += kl[: batch.count].sum()
    if data.processes()[1] > 1:
        distributed.all_reduce(total)
    if total > 0:
        controller.ratio = held_out_kl * count / total.item()


def train(model, corpora, run, args):
    """The training loop of both phases, from step 0 or from the run's checkpoint.

    corpora: {split: Corpus}.
    """
    # 1 data
    corpus, world = corpora["train"], data.processes()[1]
    steps_per_epoch = math.ceil(len(corpus) / args.batch_size)
    anneal_steps = args.kl_anneal_epochs * steps_per_epoch
    total_steps = args.epochs * steps_per_epoch
    noise = {"denoise": args.denoise, "latent_dim": model.latent_dim, "seed": args.seed}
    noise["micro_batch"] = args.micro_batch or args.batch_size
    make_batches = partial(data.training_batches, corpus, **noise)
    # 2 model
    parallel = DistributedDataParallel(model) if world > 1 else model
    # 3 optimizer
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    controller = KLController(args.kl_target, anneal_steps) if args.kl_target else None
    cycle = args.kl_cycles, args.kl_rise, args.kl_zero
    # 4 resume
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler, "controller": controller}
    step = run.load(parts)
    run.begin(step, steps_per_epoch, total_steps)
    # 5 loop
    for epoch in range(step // steps_per_epoch, args.epochs):
        if step % steps_per_epoch == 0:
            validate(model, corpora, make_batches, controller, run, step)
        order = data.epoch_order(corpus.lengths, args.batch_size, args.seed, epoch)
        order = order[step % steps_per_epoch :]
        for batches in data.prefetch(partial(make_batches, epoch), order):
            if args.phase == 1 or args.no_latent:
                weight = 0.0
            elif controller:
                weight = controller.weight
            else:
                weight = kl_weight(step, args.kl_schedule, anneal_steps, *cycle)
            set_rates(optimizer, args, step / total_steps)
            means, skipped = train_step(parallel, optimizer, scaler, batches, weight, step, args)
            step += 1
            means["kl_weight"] = weight
            if controller:
                controller.update(means["kl"])
            if skipped:  # the scale is halved by now; JSON has no infinity
                means |= {"grad_norm": None, "skipped_at_scale": 2 * scaler.get_scale()}
            if step % args.log_every == 0 or step == total_steps or skipped:
                run.record(step, "train", means)
            if step % steps_per_epoch == 0 or run.minutes_since_save() > args.save_every:
                run.save(parts, step)
    validate(model, corpora, make_batches, None, run, step)  # no step follows


# ------------------------------------------------------------------------------- run on disk


class Run:
    """The folder of a phase, and its progress on the screen. Only the first process writes.

    With config.json the folder is claimed, with checkpoint.pt the run is under way, and with
    metrics.json it is finished. No file in it is ever deleted but the checkpoint of a finished run.
    """

    def __init__(self, folder, args, corpora):
        self.folder, self.first = folder, data.processes()[0] == 0
        self.name = "language model" if args.no_latent else f"phase {args.phase}"
        # An evaluation holds no more tokens than a training step, so it fits where that does.
        share = math.ceil(args.batch_size / data.processes()[1])
        longest = int(corpora["train"].lengths.max())
        self.max_tokens = min(metrics.MOST, min(share, args.micro_batch or share) * longest)

    @property
    def finished(self):
        return bool(data.read_json(self.folder / "metrics.json"))

    def check_finished(self):
        """InputError if a finished run has lost its model; its checkpoint, if a kill has left it,
        goes."""
        if not (self.folder / "model").is_dir():
            gone = f"{self.folder} is finished, but its model/ is gone"
            raise InputError(f"{gone}: remove the folder")
        if self.first:
            (self.folder / "checkpoint.pt").unlink(missing_ok=True)

    def check_unfinished(self):
        """InputError if training anew would replace the model of a run that has been finished."""
        if (self.folder / "model").exists() and not (self.folder / "checkpoint.pt").exists():
            has = f"{self.folder} has a model/, but neither metrics.json nor checkpoint.pt"
            raise InputError(f"{has}: move the model away, and remove the folder")

    def claim(self, config):
        """Write config.json, or compare with it. Raises InputError if a setting has changed."""
        before, now = data.read_json(self.folder / "config.json"), json.loads(json.dumps(config))
        barrier()  # all have looked before the first writes
        if before:
            check_same(self.folder, before, now)
        elif self.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            data.write_json(self.folder / "config.json", config)
        barrier()

    def load(self, parts):
        """Restore the training from the checkpoint, if there is one. Returns its step, or 0.

        Opens log.jsonl, and cuts what was recorded after the checkpoint: it is recorded again.
        """
        path, step, log_bytes = self.folder / "checkpoint.pt", 0, 0
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                for name, part in parts.items():
                    if state[name]:  # a loss scaler that was off has no state
                        part.load_state_dict(state[name])
                step, log_bytes = state["step"], state["log_bytes"]
            except Exception as error:
                advice = f"({type(error).__name__}): remove {self.folder} to start over"
                raise InputError(f"{path} is damaged or of another version {advice}") from error
            say(f"{self.folder} resumes from step {step}")
        log = self.folder / "log.jsonl" if self.first else os.devnull
        self.log = open(log, "a", buffering=1)  # noqa: SIM115 (until the process ends)
        if self.first:
            if self.log.seek(0, os.SEEK_END) < log_bytes:
                raise InputError(f"{log} is shorter than at the checkpoint: remove {self.folder}")
            self.log.seek(log_bytes)
            self.log.truncate()
        return step

    def save(self, parts, step):
        """Write checkpoint.pt; a kill or a full disk leaves the one before."""
        self.saved_at = time.monotonic()
        if self.first:
            os.fsync(self.log.fileno())
            state = {name: part.state_dict() if part else {} for name, part in parts.items()}
            state |= {"step": step, "log_bytes": self.log.tell()}
            data.write_atomically(self.folder / "checkpoint.pt", partial(torch.save, state))

    def begin(self, step, steps_per_epoch, total_steps):
        """Start the clock."""
        self.begun_at = self.saved_at = time.monotonic()
        self.first_step, self.steps_per_epoch = step, steps_per_epoch
        self.total_steps = total_steps

    def minutes_since_save(self):
        return (time.monotonic() - self.saved_at) / 60

    def record(self, step, split, values):
        """A line of log.jsonl, and its main numbers on the screen."""
        self.log.write(json.dumps({"step": step, "split": split} | values) + "\n")
        names = [n for n, v in values.items() if isinstance(v, float) and not n.endswith("_se")]
        shown = ", ".join(f"{name} {values[name]:.3g}" for name in names[:6])
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        epoch = min(epochs, max(0, step - 1) // self.steps_per_epoch + 1)
        place = f"{self.name}, epoch {epoch}/{epochs}, step {step}/{self.total_steps}"
        left = self.time_left(step) if split == "train" else ""
        say(f"{place}, {split}: {shown}{left}")

    def time_left(self, step):
        """The pace, and the minutes until training ends at this pace."""
        if step == self.first_step:
            return ""
        pace = (step - self.first_step) / (time.monotonic() - self.begun_at)
        minutes = (self.total_steps - step) / pace / 60
        return f"; {pace:.1f} steps/s, about {minutes:.0f} min to the test"

    def last_kl_weight(self):
        """The KL weight of the last training step that was recorded, 0 if there is none."""
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        weights = [r["kl_weight"] for r in map(json.loads, lines) if "kl_weight" in r]
        return weights[-1] if weights else 0.0


# These settings may change on --resume. Some name places: what is in them is compared instead
# (data_sha256, start_sha256). The others change only rounding, dropout, or what is recorded.
INCIDENTAL = {"command", "versions", "processes", "device", "amp", "out", "data_dir", "dataset"}
INCIDENTAL |= {"model", "init", "start", "resume", "save_every", "iw_samples", "micro_batch"}
INCIDENTAL |= {"log_every"}


def check_same(folder, before, now):
    """InputError if a setting that matters differs between two config.json, both dicts."""
    # A checksum may differ because a setting does: settings first.
    for name in sorted(now.keys() - INCIDENTAL, key=lambda name: (name.endswith("_sha256"), name)):
        if before.get(name) == now[name]:
            continue
        change = f"{name} was {before.get(name)!r}, not {now[name]!r}"
        if name not in before:
            change = f"its config.json has no {name}, since another version made it"
        elif name == "start_sha256":
            change = f"{now['start']} no longer has the weights that it started from"
        elif name == "data_sha256":
            change = f"the texts of {now['dataset']} are not those that it was trained on"
        elif name == "ids_sha256":
            change = f"the tokenizer of {now['start']} makes other tokens of the texts"
        elif name.endswith("_ids_sha256"):  # of a pretraining
            change = "the texts, or the vocabulary, are not those that it was trained on"
        raise InputError(f"--resume needs the command of {folder}: {change}")


def run_folder(args, phase):
    """DIR/phase<k>, or DIR/lm for a language model, where DIR is --out or runs/<dataset>."""
    name = os.path.basename(os.path.abspath(args.dataset))  # a link keeps its own
    parent = Path("runs", name) if args.out is None else args.out
    return Path(parent, "lm" if args.no_latent else f"phase{phase}")


def check_folder(folder, resume, key="data_sha256"):
    """InputError if a run folder holds something, unless it is a run that is to be resumed: one
    whose config.json has `key`."""
    found = sorted(path.name for path in folder.glob("[!.]*") if path.suffix != ".partial")
    if found and not resume:
        advice = "--resume it, give another --out, or remove it"
        raise InputError(f"{folder} is not empty (it holds {found[0]}): {advice}")
    if found and key not in data.read_json(folder / "config.json"):
        advice = "but no config.json of a run: give another --out"
        raise InputError(f"{folder} holds {found[0]}, {advice}")


def barrier():
    """Wait until all processes are here."""
    if distributed.is_initialized():
        distributed.barrier()


# ------------------------------------------------------------------------------------- phase


def new_vae(name, shape, seed, args):
    """A VAE around the T5 `name`; shape: those of latent_dim, pooling, pool_layers that are given.

    `tiny` is a T5 of one small shape with random weights, without dropout, as T5 v1.1 is
    pretrained, and with a vocabulary of the training texts.
    """
    torch.manual_seed(seed)
    if name != "tiny":
        vae.check_place(name)
        if not Path(name).exists():
            say(f"fetching {name} from the hub, unless it is in the cache")
        return T5VAE.from_t5(name, **shape)
    texts = [text for text in data.read_texts(args.dataset, "train", args.data_dir) if text]
    try:
        tokenizer = data.train_tokenizer(texts[: args.limit], TINY_VOCABULARY)
    except InputError as error:
        raise InputError(f"--model tiny: {error}; README.md names what makes other T5s") from None
    size = f"{len(tokenizer) - 100:,} tokens of {TINY_VOCABULARY:,} asked for"
    say(f"vocabulary of tiny: {size}, and 100 sentinels")
    rest = {"vocab_size": len(tokenizer), "dropout_rate": 0.0, "decoder_start_token_id": 0}
    model = T5VAE(transformers.T5Config(**TINY | rest).to_dict(), **shape)
    model.tokenizer = tokenizer
    return model


def load_start(args):
    """The model that a phase starts from, and the config.json of the run that made it, or {}.

    Raises InputError if there is no such model, or if a flag contradicts it.
    """
    start, saved = args.start, start_config(args.start)
    if args.init is None and start != args.model and not saved:
        raise InputError(f"phase 2 cannot start from {start}: no such run; run phase 1 first")
    given = {name: getattr(args, name) for name in FIXED if getattr(args, name) is not None}
    try:
        model = T5VAE.from_pretrained(start) if is_vae(args, saved) else None
    except OSError as error:
        message = f"phase {args.phase} cannot start from {start}: {data.one_line(error)}"
        raise InputError(message) from error
    if model is None:
        if args.reset_decoder or args.model not in (None, start):
            raise InputError(f"{start} is a T5: --model, --reset-decoder have no effect with it")
        return new_vae(start, given, args.seed, args), {}
    check_start(model, saved, given, args)
    if args.reset_decoder:
        reset_decoder(model, saved, args)
    return model, saved


def check_start(model, saved, given, args):
    """InputError if a flag contradicts the saved VAE that a phase starts from."""
    start = args.start
    if start == args.model:
        raise InputError(f"--model is {start}, a VAE; start from it with --init")
    if (model.latent_dim == 0) != args.no_latent:
        kinds = ("a language model", "a VAE") if args.no_latent else ("a VAE", "a language model")
        raise InputError(f"{start} is {kinds[1]}: {kinds[0]} cannot start from it")
    for name, value in given.items():
        if value != getattr(model, name):
            has = getattr(model, name)
            raise InputError(f"{flag_name(name)} is {value}, but {start} has {has}")
    known = saved.get("model")  # the T5 that it was made of
    if known is None:
        if args.model and not args.reset_decoder:
            raise InputError(f"--model is {args.model}, which has no effect: {start} is a VAE")
        return
    if Path(known).resolve() == Path(args.model).resolve():
        return
    made = f"--model is {args.model}, but {start} was made of {known}"  # has it moved?
    if not began_from_t5(saved):
        raise InputError(f"{made}; if they are the same, leave --model out")
    if checksum(made_again(model, saved, args)) != saved.get("start_sha256"):
        raise InputError(made)


def start_config(start):
    """The config.json of a run, also for the model/ in it; {} if there is none."""
    config = data.read_json(Path(start, "config.json"))
    parent = data.read_json(Path(start).resolve().parent / "config.json")
    return parent if "t5_config" in config and "data_sha256" in parent else config


def is_vae(args, saved):
    """Whether a phase starts from a saved VAE (or language model), not from a T5."""
    if saved.keys() & {"data_sha256", "t5_config"}:  # a run folder, or the model in it
        return True
    if args.init is None or args.init == "tiny" or Path(args.init).exists():
        return False
    vae.check_place(args.init)
    say(f"fetching {args.init} from the hub, unless it is in the cache")
    config, _ = transformers.PretrainedConfig.get_config_dict(args.init)
    return "t5_config" in config


def began_from_t5(saved):
    """Whether the run of a config.json started from a T5, so that its start_sha256 is of that."""
    return saved.get("init") is None and (saved.get("phase") == 1 or saved.get("no_latent", False))


def made_again(model, saved, args):
    """A saved VAE as it was before phase 1, if --model is what it was made of."""
    shape = {name: getattr(model, name) for name in FIXED}
    args = argparse.Namespace(**vars(args) | {"limit": saved.get("limit", args.limit)})
    return new_vae(args.model, shape, saved.get("seed", args.seed), args)


def reset_decoder(model, saved, args):
    """Keep of phase 1 only what encodes; the rest is that of the T5 again (Li et al. 2019).

    As it was at the start of phase 1, W_proj included, since the seed is that of phase 1.
    """
    if args.model is None:
        raise InputError(f"--reset-decoder needs --model: {args.start} does not name its T5")
    fresh = made_again(model, saved, args)
    kept = ("t5.shared.", "t5.encoder.", "w_mu.", "w_logvar.")
    parameters = dict(model.named_parameters())
    if began_from_t5(saved) and checksum(fresh) != saved["start_sha256"]:
        raise InputError(f"{args.model} no longer has the weights that {args.start} started from")
    if [p.shape for p in fresh.parameters()] != [p.shape for p in parameters.values()]:
        raise InputError(f"--reset-decoder: --model {args.model} is not the T5 of {args.start}")
    for name, parameter in fresh.named_parameters():
        if not name.startswith(kept):
            parameters[name].data.copy_(parameter.data)


def checksum(model):
    """SHA-256 of all weights, and of the dropout rate."""
    digest = hashlib.sha256(str(model.t5.config.dropout_rate).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def prepare(model, args):
    """Training mode, on the device; freeze what the phase does not train; set dropout."""
    model.train().to(args.device)
    if args.phase == 1 and args.freeze_decoder:
        model.freeze_decoder()
    if model.latent_dim == 0:  # a language model does not encode: its encoder has nothing to learn
        encoder = model.t5.encoder
        for module in (encoder.block, encoder.final_layer_norm, model.w_mu, model.w_logvar):
            module.requires_grad_(False)
    if args.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = args.dropout
            elif isinstance(getattr(module, "dropout", None), int | float):  # T5's attention
                module.dropout = args.dropout


def load_corpora(tokenizer, args):
    """{split: Corpus}, and a line on the screen about each."""
    corpora = {}
    for split in data.SPLITS:
        limit = args.limit if split == "train" else None
        where = {"data_dir": args.data_dir, "max_length": args.max_length, "limit": limit}
        corpora[split] = c = data.load_corpus(args.dataset, split, tokenizer, **where)
        left_out = f"{c.truncated:,} cut at {args.max_length}, {c.skipped:,} lines empty"
        say(f"{split}: {len(c):,} texts, {c.ids.size:,} tokens; {left_out}")
        share = c.unknown / len(c)
        if share > 0.1:
            say(f"WARNING: {metrics.unknown_warning(share)}")
        elif c.unknown:
            say(f"  {c.unknown:,} texts have characters outside the vocabulary")
    return corpora


def run_phase(args, corpora=None):
    """Train and evaluate one phase in its run folder.

    corpora: those of the phase before, in the same command. Returns them, for the next one.
    """
    model, saved = load_start(args)
    corpora = corpora or load_corpora(model.tokenizer, args)
    checksums = {split: corpus.sha256 for split, corpus in corpora.items()}
    if args.init is None and saved.get("data_sha256", checksums) != checksums:
        raise InputError(f"{args.start} was trained on other texts; to start from it, give --init")
    config = vars(args) | {name: getattr(model, name) for name in FIXED}
    config |= {"data_sha256": checksums, "start_sha256": checksum(model)}
    ids = {split: hashlib.sha256(corpus.ids).hexdigest() for split, corpus in corpora.items()}
    config["ids_sha256"] = ids
    config["versions"] = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    config["processes"] = data.processes()[1]
    run = Run(run_folder(args, args.phase), args, corpora)
    run.claim(config)
    if run.finished:
        run.check_finished()
        say(f"{run.folder} is finished; python metrics.py {run.folder} measures it again")
        return corpora
    if args.epochs > 0:
        run.check_unfinished()
    prepare(model, args)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    where = f"on {args.device}, precision {args.amp}, learning rate {args.lr:g}"
    say(f"{run.name} starts from {args.start} and trains {trained:,} parameters {where}")
    train(model, corpora, run, args)
    if run.first:
        model.save_pretrained(run.folder / "model")
    measured, columns = metrics.measure_run(
        model, args.phase, corpora.get, args.iw_samples, run.max_tokens
    )
    if run.first:
        measured |= {"kl_weight": run.last_kl_weight(), "precision": "off"}
        samples = write_samples(model, corpora["test"], columns["mu"], run.folder)
        table = metrics.format_table({run.folder.name: measured})
        lm_nll = metrics.language_model_nll(run.folder, config, measured["words"])
        verdict = metrics.verdict(measured, args.kl_target, lm_nll)
        metrics.write_measures(run.folder, measured, columns, verdict)
        (run.folder / "checkpoint.pt").unlink(missing_ok=True)
        say(f"{run.folder}, all measures in metrics.json:", table, verdict, *samples)
    barrier()  # the next phase reads what the first process wrote
    return corpora


def write_samples(model, corpus, mu, out):
    """Write samples.txt: texts from mu (N, Z) and from the prior. Returns its lines."""
    longest, lines = int(corpus.lengths.max()), []
    if model.latent_dim:
        rows = [corpus.row(i).tolist() for i in range(min(3, len(corpus)))]
        texts = data.detokenize(rows, model.tokenizer)
        outputs = model.decode_texts(mu[: len(rows)], max_new_tokens=longest)
        for text, output in zip(texts, outputs, strict=True):
            lines += [f"text           {text}", f"reconstructed  {output}"]
    torch.manual_seed(0)
    z = torch.randn(3, model.latent_dim)
    sampling = model.latent_dim == 0  # greedy texts would all be one
    for text in model.decode_texts(z, do_sample=sampling, max_new_tokens=longest):
        lines.append(f"sampled        {text}")
    (out / "samples.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


# ---------------------------------------------------------------------------------- settings


def make_parser():
    """The flags. Those without a default get it in `settings`."""
    usage = "python train.py --dataset NAME|DIR|FILE [flags]"
    about = f"{__doc__.splitlines()[0]} Without flags: a demonstration."
    parser = argparse.ArgumentParser("train.py", usage=usage, description=about)
    flag, yes_or_no = parser.add_argument, argparse.BooleanOptionalAction
    count, amount, share = data.number(int, 1), data.number(float, 0), data.number(float, 0, 1)
    size = data.number(int, 1, 2**16)  # of what must fit into memory
    flag("--dataset", help=f"{', '.join(data.DATASETS)}, or a folder or file of your own")
    flag("--data-dir", help=f"where the folders of {', '.join(data.SOURCES)} are (data)")
    flag("--limit", type=count, help="train on the first N texts only")
    flag("--max-length", type=data.number(int, 2), default=256, help="tokens of a text (256)")
    flag("--denoise", type=share, help="share of input tokens deleted (paper: 0.15; best: 0)")
    flag("--model", help="hub name or folder of a T5 (t5-small), or tiny: small, random weights")
    flag("--latent-dim", type=size, help="dimensions of z (32)")
    flag("--no-latent", action="store_true", help="a language model: no z, phase 2 alone")
    flag("--dropout", type=share, help="dropout rate (that of the T5; best: 0, then 0.1)")
    flag("--pool", dest="pooling", choices=POOLINGS, help="how a text's states are pooled (max)")
    flag("--pool-layers", choices=POOL_LAYERS, help="the encoder's output, or all layers (last)")
    flag("--recipe", choices=RECIPES, help="defaults that depend on the phase (paper)")
    flag("--phase", type=int, choices=(1, 2), help="which phase to run (both, in order)")
    flag("--epochs", type=data.number(int, 0), help="epochs (paper: 5 and 3; best: 4 and 10)")
    flag("--batch-size", type=count, default=32, help="texts per step, of all processes (32)")
    flag("--micro-batch", type=count, help="texts per pass through the model, of a process (all)")
    flag("--optimizer", choices=("adamw", "adamw-rms"), help="rms: relative to a weight's RMS")
    flag("--lr", type=amount, help="learning rate (adamw: 1e-3; adamw-rms: tiny 2e-2, else 5e-3)")
    flag("--lr-schedule", choices=("constant", "linear"), help="linear: falls to 0 at the end")
    flag("--init", help="run or model to start from (phase 2: the run of phase 1)")
    about = "decoder fixed in phase 1 (paper: yes; best: no)"
    flag("--freeze-decoder", action=yes_or_no, help=about)
    about = "keep only the encoder of phase 1"
    flag("--reset-decoder", action="store_true", default=None, help=about)
    flag("--kl-target", type=amount, help="KL at the end, nats per text (best: 8; 0: not held)")
    flag("--kl-threshold", type=amount, help="lambda: the least that a dimension costs, nats")
    flag("--kl-schedule", choices=("linear", "cyclical", "constant"), help="of the KL weight")
    flag("--kl-anneal-epochs", type=amount, help="until the KL weight may be 1 (paper: 50)")
    flag("--kl-cycles", type=size, help="cycles of the cyclical schedule (4)")
    flag("--kl-zero", type=share, help="share of a cycle in which the KL weight is 0 (0)")
    flag("--kl-rise", type=amount, help="share of a cycle in which it rises to 1 (0.5)")
    flag("--amp", choices=metrics.HALF, help="precision (GPU: bf16, else fp16; CPU: off, float32)")
    flag("--out", help="parent of phase1/, phase2/ and lm/ (runs/<dataset>)")
    flag("--resume", action="store_true", help="resume from the last checkpoint, if there is one")
    flag("--save-every", type=amount, default=10.0, help="minutes between checkpoints (10)")
    flag("--seed", type=data.number(int, 0, 2**32), default=0, help="of everything random (0)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flag("--device", choices=("cpu", "cuda"), default=device, help="where to compute")
    flag("--log-every", type=count, default=50, help="steps per training record (50)")
    flag("--iw-samples", type=size, help="K of the test split's NLL (20; phase 1: none)")
    return parser


KL_FLAGS = ("kl_target", "kl_threshold", "kl_schedule", "kl_anneal_epochs", "reset_decoder")
CYCLE_FLAGS = ("kl_cycles", "kl_zero", "kl_rise")


def check_args(parser, args):
    """Refuse flags that contradict each other."""
    if args.no_latent and args.phase == 1:
        parser.error("--phase 1 trains an encoder, which --no-latent does not have")
    if (args.kl_zero or 0) + (0.5 if args.kl_rise is None else args.kl_rise) > 1:
        parser.error("--kl-zero and --kl-rise are shares of one cycle: their sum must be at most 1")
    if args.kl_target and (args.kl_threshold is not None or args.kl_schedule):
        parser.error("--kl-target takes no --kl-threshold and no --kl-schedule")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU")
    if args.device == "cuda" and args.amp == "bf16" and not has_bf16():
        parser.error("--amp is bf16, which this GPU does not have; it must be fp16 or off")


def check_effects(parser, args):
    """Refuse flags that have no effect in this command."""
    if args.dataset not in data.SOURCES:
        refuse(parser, args, ("data_dir",), f"--dataset {args.dataset}")
    if args.no_latent:
        names = ("denoise", "freeze_decoder", "iw_samples", *FIXED, *KL_FLAGS)
        refuse(parser, args, names, "--no-latent")
    elif args.phase == 1:
        refuse(parser, args, KL_FLAGS, "--phase 1")
    elif args.phase == 2:
        refuse(parser, args, ("freeze_decoder",), "--phase 2")
    if args.kl_schedule != "cyclical":
        refuse(parser, args, CYCLE_FLAGS, f"--kl-schedule {args.kl_schedule or 'linear'}")
    if args.kl_schedule == "constant":
        refuse(parser, args, ("kl_anneal_epochs",), "--kl-schedule constant")


def refuse(parser, args, names, where):
    """Refuse these flags, if they are given."""
    for name in names:
        value = getattr(args, name)
        if value is not None:
            parser.error(f"{flag_name(name)} is {value}, which has no effect with {where}")


def flag_name(name):
    """The flag of a setting, as the command line spells it."""
    return "--pool" if name == "pooling" else "--" + name.replace("_", "-")


def has_bf16():
    """Whether the GPU computes in bfloat16; some only emulate it, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def parse(argv):
    """What the command says: (flags, the phases that it runs)."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if any("\udc80" <= letter <= "\udcff" for letter in "".join(argv)):  # bytes that are not UTF-8
        parser.error(f"{argv!r} has characters that are not UTF-8")
    if args.dataset is None:
        changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        if changed - {"resume", "out", "seed"}:
            parser.error("--dataset is missing (the demonstration takes --resume, --out, --seed)")
        args.dataset, args.model, args.recipe = "grammar", "tiny", "demo"
        if os.environ.get("RANK", "0") == "0":
            say("The demonstration: --dataset grammar --model tiny --recipe demo")
    args.recipe = args.recipe or "paper"
    check_args(parser, args)
    check_effects(parser, args)
    args.data_dir = args.data_dir or "data"
    args.command = shlex.join(["python", "train.py", *argv])
    if args.no_latent:
        args.latent_dim = 0
        return args, [2]
    return args, [args.phase] if args.phase else [1, 2]


def settings(args, phase):
    """All settings of a phase: what the command says, else its recipe, else a default.

    The order matters: the start names the model; the KL's settings decide what of the recipe holds;
    rate and precision depend on all.
    """
    args = argparse.Namespace(**vars(args) | {"phase": phase})
    set_start(args)
    if phase == 1 or args.no_latent:  # there is no KL to control: flags are those of phase 2
        for name in (*KL_FLAGS, *CYCLE_FLAGS):
            setattr(args, name, None)
        args.kl_target = 0.0
    elif args.kl_target is None and (args.kl_threshold is not None or args.kl_schedule):
        args.kl_target = 0.0  # not that of the recipe
    common = {"kl_schedule": "linear", "kl_cycles": 4, "kl_zero": 0.0, "kl_rise": 0.5}
    fill(args, common | RECIPES[args.recipe][phase])
    if args.kl_target:
        args.kl_threshold = 0.0
        anneal_epochs = 0.3 * args.epochs
    elif args.recipe == "paper" and args.kl_schedule == "linear":
        anneal_epochs = 50.0
    else:
        anneal_epochs = float(args.epochs)
    rest = {"kl_anneal_epochs": anneal_epochs, "lr": default_rate(args), "amp": default_amp(args)}
    fill(args, rest)
    return args


def set_start(args):
    """What a phase starts from, and of which T5 that was made, if it is known."""
    if args.init is not None:
        args.start = args.init
    elif args.phase == 2 and not args.no_latent:
        args.start = str(run_folder(args, 1))
    else:
        args.model = "t5-small" if args.model is None else args.model
        args.start = args.model
    if args.model is None:
        saved = start_config(args.start)
        is_t5 = args.start == "tiny" or saved.get("model_type") in vae.FAMILY
        args.model = args.start if is_t5 else saved.get("model")


def default_rate(args):
    """The learning rate of --optimizer."""
    if args.optimizer == "adamw":
        return 1e-3
    # No checkpoint of long pretraining has been tried with relative steps.
    return 2e-2 if args.model == "tiny" else 5e-3


def default_amp(args):
    """The precision that --device computes fastest in: all GPUs have float16."""
    if args.device == "cpu":
        return "off"
    return "bf16" if has_bf16() else "fp16"


def fill(args, defaults):
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def quiet_libraries():
    """Neither warnings nor bars of transformers, nor the hub's retries without a network."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()


def main(argv=None):
    args, phases = parse(sys.argv[1:] if argv is None else [str(word) for word in argv])
    quiet_libraries()
    if "RANK" in os.environ:  # set by torchrun
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # With gloo beside NCCL, sums are reduced wherever they are: evaluations keep theirs on CPU.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    quiet = open(os.devnull, "w") if data.processes()[0] else sys.stdout  # noqa: SIM115
    try:
        with data.command("train.py", "; --resume continues it"), contextlib.redirect_stdout(quiet):
            for phase in phases:
                check_folder(run_folder(args, phase), args.resume)
            barrier()  # all have looked before the first writes
            corpora = None
            for phase in phases:
                corpora = run_phase(settings(args, phase), corpora)
                args.init = None  # phase 2 starts from phase 1
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    main()
