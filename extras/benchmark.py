"""What a step costs, against a plain transformers T5 on the same batches.

    python -m extras.benchmark --dataset ptb --model t5-small [--batch-size 32] [--amp bf16] [--repeats 7]

The core, the core with `fast_cpu.quicken`, and transformers' own T5 take turns on the same batches
in one process, each with fused AdamW and clipping, so that the ratios hold on a shared machine.
Prints medians with their range: real tokens per second in phases 1 and 2, the ratio to
transformers, the memory, and the rate of evaluating and generating.
"""

import argparse
import copy
import statistics
import sys
import time
from functools import partial

import torch
import transformers
from torch import nn

import data
import metrics
import train
from extras.fast_cpu import quicken
from vae import LOSS_SLICE

try:
    import resource
except ImportError:  # Windows: there no peak of a process is shown
    resource = None


# Bytes that a layer keeps for the backward pass, per token: times d_model, d_ff, heads * d_kv,
# heads * length.
KEPT = {
    "off": (34, 12, 16, 12),
    "bf16": (29, 6, 14, 12),
}  # the mean of an encoder's and a decoder's
KEPT_WITHOUT_DROPOUT = {"off": (24, 4, 16, 4), "bf16": (24, 4, 14, 4)}


def activation_bytes(config, sentences, length, amp="off"):
    """What all layers keep for the backward pass, on a CPU, of `sentences` texts of `length` tokens
    on both sides."""
    kept = KEPT if config.dropout_rate else KEPT_WITHOUT_DROPOUT
    sizes = config.d_model, config.d_ff, config.num_heads * config.d_kv, config.num_heads * length
    per_token = sum(k * size for k, size in zip(kept[amp], sizes, strict=True))
    return per_token * (config.num_layers + config.num_decoder_layers) * sentences * length


def step_bytes(model, sentences, length, amp="off"):
    """The peak of a training step with AdamW: derived in docs/speed.md."""
    every, trained = (
        4 * sum(p.numel() for p in model.parameters() if p.requires_grad or x)
        for x in (True, False)
    )
    head = model.t5.lm_head.weight
    logits = (
        3 * 4 * len(head) * min(sentences * length, LOSS_SLICE)
    )  # themselves, their log softmax, their gradient
    first_gradient = (
        4 * head.numel() * head.requires_grad
    )  # that of the head, while all activations are there
    half = every / 2 if amp == "bf16" else 0  # autocast's copies
    kept = activation_bytes(model.t5.config, sentences, length, amp)
    return every + 2 * trained + half + max(kept + logits + first_gradient, trained)


class PlainT5(nn.Module):
    """The mean loss of transformers' T5, of the shape of `t5`, with random weights, as an objective
    of `train`."""

    def __init__(self, config):
        super().__init__()
        self.t5 = transformers.T5ForConditionalGeneration(config)

    def forward(self, batch, weight):
        labels = batch.labels.masked_fill(batch.labels == self.t5.config.pad_token_id, -100)
        loss = self.t5(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        return {"loss": loss.expand(len(labels))}


def stepper(objective, args):
    """batch -> seconds of one optimizer step."""
    parameters = [p for p in objective.train().to(args.device).parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.amp == "fp16")

    def step(batch):
        started = time.perf_counter()
        size = len(batch.index)
        train.gradient_step(
            objective, batch, batch.index.numpy(), size, 1.0, optimizer, scaler, [], args
        )
        return time.perf_counter() - started

    return step


def clock(work):
    """Seconds of work(), whose results are on the CPU when it returns."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(values):
    return f"{statistics.median(values):,.2f} ({min(values):,.2f}-{max(values):,.2f})"


def benchmark(model, corpora, args, repeats):
    """Prints the table. model: a T5VAE; corpora: of the splits train and valid."""
    corpus = corpora["train"]
    order = data.epoch_order(corpus.lengths, args.batch_size, args.seed, 0)[: repeats + 1]
    make = partial(
        data.training_batch, denoise=args.denoise, latent_dim=model.latent_dim, seed=args.seed
    )
    batches = [make(corpus, index, 0).to(args.device) for index in order]
    tokens = [int((batch.labels != corpus.pad_id).sum()) for batch in batches]
    for phase in (1, 2):
        ours, fast = copy.deepcopy(model), quicken(copy.deepcopy(model))
        objectives = {"transformers": PlainT5(model.t5.config), "core": train.ELBO(ours, 0.0)}
        objectives["quicken"] = train.ELBO(fast, 0.0)
        if phase == 1:
            ours.freeze_decoder(), fast.freeze_decoder()
        longest = max(batch.labels.shape[1] for batch in batches)
        needs = step_bytes(ours, args.batch_size, longest, "off" if args.amp == "off" else "bf16")
        print(
            f"phase {phase}  a step of {args.batch_size} texts of {longest} tokens needs about {needs / 1e9:.2f} GB"
        )
        steps = {name: stepper(objective, args) for name, objective in objectives.items()}
        seconds = {name: [] for name in steps}
        for batch in batches:  # in turns
            for name, step in steps.items():
                seconds[name].append(step(batch))
        for name, times in seconds.items():
            rates = [n / t for n, t in zip(tokens[1:], times[1:], strict=True)]
            ratios = [
                plain / t for plain, t in zip(seconds["transformers"][1:], times[1:], strict=True)
            ]
            print(
                f"phase {phase}  {name:13} {spread(rates)} tokens/s  {spread(ratios)} times transformers"
            )
    part = corpora["valid"]
    rate = part.ids.size / clock(lambda: metrics.evaluate(model, part, amp=args.amp))
    print(f"evaluation {rate:,.0f} tokens/s (one pass of the encoder and of the decoder)")
    length = round(corpus.lengths.mean())
    z = torch.randn(64, model.latent_dim, device=args.device)
    rate = (
        64 * length / clock(lambda: model.eval().generate(z, length, min_new_tokens=length).cpu())
    )
    print(f"generation {rate:,.0f} tokens/s (64 texts of {length} tokens, greedy)")
    if args.device == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    elif resource:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        print(
            f"peak memory {peak / 1e9:.2f} GB, with all three models; {torch.get_num_threads()} threads"
        )


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    own = argparse.ArgumentParser("benchmark.py", add_help=False)
    own.add_argument(
        "--repeats",
        type=train.at_least(1),
        default=7,
        metavar="N",
        help="Steps after a warm-up (7).",
    )
    mine, rest = own.parse_known_args(argv)
    args = train.parse_args(train.make_parser(), rest, "--phase 1 --limit 5000")
    args = argparse.Namespace(**vars(args) | {"phase": 1, "epochs": 1, "lr": 0.0})
    transformers.utils.logging.set_verbosity_error()
    try:
        torch.manual_seed(args.seed)
        model, _ = train.load_model(args)
        rest = args.data_dir, args.max_length
        corpora = {
            split: data.load_corpus(args.dataset, split, model.tokenizer, *rest, limit)
            for split, limit in (("train", args.limit), ("valid", 256))
        }
        if (count := len(corpora["train"])) <= args.batch_size:
            raise ValueError(
                f"{count} training texts; there must be more than --batch-size {args.batch_size}"
            )
    except (OSError, ValueError) as error:
        sys.exit(f"benchmark.py: {error}")
    benchmark(model.to(args.device), corpora, args, mine.repeats)


if __name__ == "__main__":
    main()
