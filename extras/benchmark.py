"""What a step costs, against a plain transformers T5 on the same batches.

    python -m extras.benchmark --dataset ptb --model t5-small [--batch-size 32] [--amp bf16]
    python -m extras.benchmark --overhead
    python -m extras.benchmark --fits

The core, the core with `fast_cpu.quicken`, and transformers' own T5 take turns on the same batches
in one process, each with fused AdamW and clipping, so that the ratios hold on a shared machine.
Prints medians with their range: real tokens per second in phases 1 and 2, the ratio to
transformers, the memory, and the rate of evaluating and generating.

--overhead prints what a step costs beside the model, in ms of CPU time: a GPU would wait for it.
That is making a batch of 64 texts of 14 tokens; the step sizes and the step of adamw-rms on
t5-small's 117 weights, of one element each, beside one of AdamW; and reading the loss.

--fits prints how many texts fit into one training step, by the formula in docs/speed.md.

The other flags are those of train.py that say which model, texts, batches and precision. Phase 1 is
the paper's, which trains the encoder alone; a phase that trains all costs what phase 2 does.
"""

import argparse
import bisect
import copy
import statistics
import sys
import time
from functools import partial

import numpy as np
import torch
import transformers
from torch import nn

import data
import metrics
import train
import vae
from extras.fast_cpu import quicken

try:
    import resource
except ImportError:  # Windows: there no peak of a process is shown
    resource = None

# Bytes that a layer keeps for the backward pass, per token: times d_model, d_ff (without a gate,
# and with one), heads * d_kv, heads * length; the mean of an encoder's and a decoder's.
KEPT = {  # by precision, and whether there is dropout
    ("off", True): (34, 12, 32, 16, 12),
    ("bf16", True): (29, 6, 16, 14, 12),
    ("off", False): (24, 4, 28, 16, 4),
    ("bf16", False): (24, 4, 14, 14, 4),
}
# Flags of train.py that change nothing that is measured here.
UNREAD = ("phase", "epochs", "micro_batch", "dropout", "freeze_decoder", "optimizer", "lr")
UNREAD += ("lr_schedule", "out", "resume", "save_every", "log_every", "iw_samples", "recipe")
UNREAD += ("no_latent", *train.KL_FLAGS, *train.CYCLE_FLAGS)
SHAPES = {  # of what --fits shows
    "t5-small": {},
    "t5-base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
    "mT5-small": {"d_ff": 1024, "num_layers": 8, "num_heads": 6, "vocab_size": 250_112}
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}


def activation_bytes(config, sentences, length, amp="off"):
    """What all layers keep for the backward pass, on a CPU, of texts of `length` tokens."""
    of_width, plain, gated, of_heads, of_scores = KEPT[amp, config.dropout_rate > 0]
    of_feed_forward = gated if config.is_gated_act else plain
    per_token = of_width * config.d_model + of_feed_forward * config.d_ff
    per_token += config.num_heads * (of_heads * config.d_kv + of_scores * length)
    return per_token * (config.num_layers + config.num_decoder_layers) * sentences * length


def step_bytes(model, sentences, length, amp="off"):
    """The peak of a training step with AdamW: derived in docs/speed.md."""
    every = 4 * sum(p.numel() for p in model.parameters())
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = model.t5.lm_head.weight
    logits = 4 * len(head) * sentences * length
    if logits <= vae.MOST_LOGITS:
        logits *= 3  # themselves, log softmax, their gradient
    else:
        logits = 2 * vae.SLICE  # a slice, and what its log softmax needs
    first_gradient = 4 * head.numel() * head.requires_grad  # the head's, beside all activations
    half = every / 2 if amp == "bf16" else 0  # autocast's copies
    kept = activation_bytes(model.t5.config, sentences, length, amp)
    return every + 2 * trained + half + max(kept + logits + first_gradient, trained)


def fits():
    """Yields the rows of docs/speed.md: how many texts fit into one step, when all is trained."""
    yield "| T5, precision | P, million | 8 GB: 64, 256 tokens | 16 GB | 24 GB |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name, shape in SHAPES.items():
        config = transformers.T5Config(**shape, decoder_start_token_id=0).to_dict()
        with torch.device("meta"):
            model = vae.T5VAE(config | {"tie_word_embeddings": "mT5" not in name})
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        for amp in "off", "bf16":
            cells = []
            for gigabytes in 8, 16, 24:
                room = [most_texts(model, length, amp, gigabytes * 1e9) for length in (64, 256)]
                cells.append(", ".join(f"{texts:,}" if texts else "-" for texts in room))
            yield f"| {name}, {amp} | {parameters:.0f} | {' | '.join(cells)} |"


def most_texts(model, length, amp, room):
    """The largest number of texts such that its step, and that of fewer, takes at most `room`."""

    def needs(texts):
        return step_bytes(model, texts, length, amp)

    whole = vae.MOST_LOGITS // (4 * model.t5.config.vocab_size * length)  # more are sliced
    # If all that are not sliced have room, sliced ones may have it, too.
    sizes = range(1, whole + 1 if needs(whole) > room else 10_000)
    return bisect.bisect_right(sizes, room, key=needs)


class PlainT5(nn.Module):
    """rec of transformers' T5 of the shape of `config`, with random weights: (B,), and no KL."""

    def __init__(self, config):
        super().__init__()
        self.t5 = transformers.T5ForConditionalGeneration(config)

    def forward(self, batch):
        labels = batch.labels.masked_fill(batch.labels == self.t5.config.pad_token_id, -100)
        loss = self.t5(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        return loss.expand(len(labels)), torch.zeros(len(labels), 1, device=labels.device)


def stepper(model, args):
    """batch -> seconds of one optimizer step, as train.train takes it, with a rate of 0."""
    model.train().to(args.device)
    fixed = argparse.Namespace(**vars(args) | {"optimizer": "adamw", "lr": 0.0})
    optimizer = train.make_optimizer(model, fixed)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")
    return lambda batch: clock(
        lambda: train.train_step(model, optimizer, scaler, [batch], 1.0, 0, fixed)
    )


def overhead(repeats=200):
    """Yields lines: the CPU time per step beside the model's own, medians in ms."""
    rng, lengths = np.random.default_rng(0), np.full(64, 14)
    corpus = data.Corpus(
        ids=rng.integers(3, 1000, lengths.sum()).astype(np.int32),
        offsets=np.cumsum([0, *lengths]),
        words=lengths,
        word="word",
        truncated=0,
        unknown=0,
        pad_id=0,
    )
    noise = {"denoise": 0.15, "latent_dim": 32, "seed": 0}
    work = {
        "a batch of 64 texts of 14 tokens": partial(
            data.training_batch, corpus, 0, np.arange(64), **noise
        )
    }
    for name in "adamw", "adamw-rms":
        weights = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(117))
        for weight in weights:
            weight.grad = torch.ones(1)
        rates = argparse.Namespace(optimizer=name, lr=1e-3, lr_schedule="constant")
        optimizer = train.make_optimizer(weights, rates)
        work[f"{name}, 117 weights: step sizes"] = partial(train.set_rates, optimizer, rates, 0.5)
        work[f"{name}, 117 weights: step"] = optimizer.step
    sums, norm = torch.ones(3, dtype=torch.float64), torch.ones(())
    work["reading the loss"] = lambda: torch.cat([sums / 64, norm.double()[None]]).tolist()
    times = {name: [] for name in work}
    for _ in range(repeats):  # in turns
        for name, task in work.items():
            times[name].append(1e3 * clock(task, time.process_time))
    for name, of_task in times.items():
        yield f"{name:35} {spread(of_task)} ms"


def clock(work, now=time.perf_counter):
    """Seconds of work(), whose results are on the CPU when it returns."""
    started = now()
    work()
    return now() - started


def spread(values):
    return f"{statistics.median(values):,.2f} ({min(values):,.2f}-{max(values):,.2f})"


def compare_steps(phase, model, batches, tokens, args):
    """Prints tokens per second of a phase, in turns: transformers, core, core with quicken."""
    models = {"transformers": PlainT5(model.t5.config), "core": copy.deepcopy(model)}
    if args.amp != "fp16":  # quicken takes the float32 layers away that it needs
        models["quicken"] = quicken(copy.deepcopy(model))
    if phase == 1:
        for name in models.keys() - {"transformers"}:
            models[name].freeze_decoder()
    longest = max(batch.labels.shape[1] for batch in batches)
    amp = "off" if args.amp == "off" else "bf16"  # fp16 has the same sizes
    needs = step_bytes(models["core"], args.batch_size, longest, amp) / 1e9
    print(f"phase {phase}  {args.batch_size} texts of {longest} tokens need about {needs:.2f} GB")
    steps = {name: stepper(of, args) for name, of in models.items()}
    seconds = {name: [] for name in steps}
    for batch in batches:
        for name, step in steps.items():
            seconds[name].append(step(batch))
    plain = seconds["transformers"][1:]
    for name, times in seconds.items():
        rates = [n / t for n, t in zip(tokens[1:], times[1:], strict=True)]
        ratios = [p / t for p, t in zip(plain, times[1:], strict=True)]
        ratio = f"{spread(ratios)} times transformers"
        print(f"phase {phase}  {name:13} {spread(rates)} tokens/s  {ratio}")


def benchmark(model, corpora, args, repeats):
    """Prints the table. model: a T5VAE; corpora: of the splits train and valid."""
    corpus = corpora["train"]
    order = data.epoch_order(corpus.lengths, args.batch_size, args.seed, 0)[: repeats + 1]
    noise = {"denoise": args.denoise, "latent_dim": model.latent_dim, "seed": args.seed}
    batches = [data.training_batch(corpus, 0, index, **noise) for index in order]
    tokens = [int((batch.labels != corpus.pad_id).sum()) for batch in batches]
    for phase in (1, 2):
        compare_steps(phase, model, batches, tokens, args)
    part = corpora["valid"]
    with metrics.autocast(args.device, args.amp):
        rate = part.ids.size / clock(lambda: metrics.evaluate(model, part))
    print(f"evaluation {rate:,.0f} tokens/s (one pass of the encoder and of the decoder)")
    length = round(corpus.lengths.mean())
    z = torch.randn(64, model.latent_dim, device=args.device)
    with metrics.autocast(args.device, args.amp):
        seconds = clock(lambda: model.eval().generate(z, length, min_new_tokens=length).cpu())
    print(f"generation {64 * length / seconds:,.0f} tokens/s (64 texts of {length}, greedy)")
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    elif resource:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        threads = torch.get_num_threads()
        print(f"peak memory {peak / 1e9:.2f} GB, with all three models; {threads} threads")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else [str(word) for word in argv]
    own = argparse.ArgumentParser("benchmark.py", description=__doc__.splitlines()[0])
    flag = own.add_argument
    flag("--repeats", type=data.number(int, 1), metavar="N", help="steps after a warm-up (7)")
    flag("--overhead", action="store_true", help="only what a step costs beside the model")
    flag("--fits", action="store_true", help="only how many texts fit into the memory of a GPU")
    mine, rest = own.parse_known_args(argv)
    if (mine.overhead or mine.fits) and len(argv) > 1:
        own.error(f"{' '.join(argv)}: --overhead and --fits stand alone")
    transformers.utils.logging.set_verbosity_error()
    with data.command("benchmark.py"):
        if mine.overhead:
            print(*overhead(), sep="\n")
        elif mine.fits:
            print(*fits(), sep="\n")
        else:
            run(own, rest, mine.repeats or 7)


def run(own, rest, repeats):
    """The benchmark of a command line; own: the parser; rest: the flags of train.py in it."""
    parser = train.make_parser()
    given = parser.parse_args(rest)
    for name in UNREAD:
        value = getattr(given, name)
        if value != parser.get_default(name):
            own.error(f"{train.flag_name(name)} is {value}, which has no effect here")
    args, _ = train.parse([*rest, "--phase", "1"])
    args = train.settings(args, 1)
    torch.manual_seed(args.seed)
    model, _ = train.load_start(args)
    corpora = {}
    for split, limit in ("train", args.limit or 5000), ("valid", 256):
        corpora[split] = data.load_corpus(
            args.dataset, split, model.tokenizer, args.data_dir, args.max_length, limit
        )
    count, size = len(corpora["train"]), args.batch_size
    if count <= size:
        said = f"there must be more than --batch-size {size}"
        raise data.InputError(f"{count} training texts; {said}")
    benchmark(model.to(args.device), corpora, args, repeats)


if __name__ == "__main__":
    main()
