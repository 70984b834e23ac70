"""Pictures of runs. Needs `pip install -r extras/requirements.txt`.

    python -m extras.plots curves --out curves.png RUN ...
    python -m extras.plots plane --out plane.png --points "KL target" RUN ... --points "x" RUN ...
        [--lm NLL] [--entropy NATS] [--paper ptb]
    python -m extras.plots map --out map.png RUN

curves: MI, AU, KL and PPL per word on the validation split. plane: the rate-distortion plane, KL
across, rec up. map: the latents of `grammar`, by tense and by place.
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import data
import metrics
from extras import paper_tables, probe
from extras.flags import at_least
from train import INCIDENTAL

PANELS = {
    "MI, nats": "mi",
    "AU": "au",
    "KL, nats per sentence": "kl",
    "PPL/word, of -ELBO": "ppl_word",
}
NOT_IN_LABELS = INCIDENTAL | {"start", "init", "data_sha256", "pool", "phases", "pooling"}


def run_labels(configs):
    """{run: what sets it apart from the others}: the settings that differ, and the run where they
    do not tell."""
    keys = dict.fromkeys(
        key for config in configs.values() for key in config if key not in NOT_IN_LABELS
    )
    differ = [
        key for key in keys if len({json.dumps(config.get(key)) for config in configs.values()}) > 1
    ]
    labels = {
        run: ", ".join(f"{k} {c[k]}" for k in differ if c.get(k) is not None)
        for run, c in configs.items()
    }
    seen = list(labels.values())
    return {
        run: label if label and seen.count(label) == 1 else ", ".join(filter(None, (label, run)))
        for run, label in labels.items()
    }


def draw_curves(logs):
    """A matplotlib Figure of {label: validation records}: one panel per measure, one line per run,
    against steps."""
    wide = max(map(len, logs)) > 50
    figure = Figure(figsize=(10, 7 + 0.25 * len(logs) / (1 if wide else 2)), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for i, (label, records) in enumerate(logs.items()):
            # Thinner ones on top: lines that coincide still show, one around the other.
            width = 1.5 + 4 * (len(logs) - 1 - i) / len(logs)
            steps, values = ([record[k] for record in records] for k in ("step", key))
            axes.plot(
                steps, values, marker="o", markersize=width + 1.5, linewidth=width, label=label
            )
        axes.set(title=title, xlabel="step", ylim=panel_range(key, logs.values()))
        axes.grid(alpha=0.3)
        if key == "ppl_word" and axes.get_ylim()[1] > 1000:
            axes.set(yscale="log", ylim=(1, None))
    text = ["\n".join(textwrap.wrap(label, 110)) for label in logs]
    figure.legend(axes.get_lines(), text, loc="outside lower center", ncols=1 if wide else 2)
    return figure


def panel_range(key, logs):
    """The y-axis of a panel: from 0, or from 1 for PPL. KL and PPL of the first record count only
    if they leave the others legible: those of an untrained W_logvar can be a hundred times as
    large."""
    values = [record[key] for records in logs for record in (records[1:] or records)]
    limit = 3 * max(values) if key in ("kl", "ppl_word") else math.inf
    values += [records[0][key] for records in logs if records[0][key] <= limit]
    low, high = min(1 if key == "ppl_word" else 0, *values), max(values)
    return low - 0.03 * (high - low), high + 0.05 * (high - low) + 1e-3


def draw_plane(groups, lm=None, entropy=None, paper=()):
    """A matplotlib Figure of the rate-distortion plane: what z costs (KL) against what is left to
    say (rec).

    Args: groups: {label: [measures, ...]}, points of one colour. lm, entropy: NLL of the language
        model and entropy of the data, nats per sentence, drawn as lines of -ELBO. paper: rows of
        `paper_tables.reread`, drawn in grey with their names.
    """
    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axes = figure.subplots()
    points = [(m["kl"], m["rec"]) for group in groups.values() for m in group]
    points += [(float(row["kl"]), row["rec"]) for row in paper]
    right = 1.1 * max(kl for kl, _ in points) + 0.5
    low, high = min(rec for _, rec in points), max(rec for _, rec in points)
    bottom, top = max(0, low - 0.08 * (high - low) - 0.5), high + 0.12 * (high - low) + 0.5
    for bound, name, style in (lm, "language model", "-"), (entropy, "entropy", "--"):
        if bound is not None:
            axes.plot(
                [0, bound],
                [bound, 0],
                style,
                color="black",
                linewidth=1,
                label=f"{name}, {bound:.2f} nats",
            )
    step = 10 ** math.floor(math.log10(right + top)) / 2
    for bound in np.arange(step, right + top, step):  # lines of equal -ELBO
        axes.plot([0, bound], [bound, 0], color="0.88", linewidth=0.8, zorder=0)
        if bottom < bound - right * 0.985 < top:
            axes.annotate(
                f"-ELBO {bound:g}",
                (right, bound - right),
                fontsize=7,
                color="0.55",
                ha="right",
                va="bottom",
            )
    for label, group in groups.items():
        group = sorted(group, key=lambda m: m["kl"])
        axes.plot(
            [m["kl"] for m in group], [m["rec"] for m in group], "o", markersize=5, label=label
        )
    for i, row in enumerate(
        paper
    ):  # neighbors have their names above and below, those at the right on their left
        axes.plot(float(row["kl"]), row["rec"], "x", color="0.4")
        left, up = float(row["kl"]) > 0.6 * right, 4 if i % 2 else -10
        place = {
            "xytext": (-4 if left else 4, up),
            "textcoords": "offset points",
            "ha": "right" if left else "left",
        }
        axes.annotate(row["name"], (float(row["kl"]), row["rec"]), fontsize=7, **place)
    axes.set(xlim=(0, right), ylim=(bottom, top))
    axes.set(
        xlabel="KL: what z costs, nats per sentence",
        ylabel="rec: what is left to say, nats per sentence",
    )
    axes.legend(fontsize=8, loc="upper right", framealpha=1)
    return figure


def draw_map(model, corpora):
    """A Figure of two principal components of mu on `grammar`'s test split, by tense and by place.

    corpora: {"train": ..., "test": ...}; the probe's accuracies (trained on the first) stand in the
    titles.
    """
    mu = {split: probe.posterior_means(model, corpus) for split, corpus in corpora.items()}
    factors = {split: list(data.grammar_factors(split))[: len(mu[split])] for split in corpora}
    centered = mu["test"] - mu["test"].mean(0)
    axes_of = torch.linalg.svd(centered, full_matrices=False).Vh[:2]  # (2, Z)
    xy = (centered @ axes_of.T).numpy()
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, factor in zip(figure.subplots(1, 2), ("tense", "where"), strict=True):
        classes = {split: [f[factor] for f in factors[split]] for split in corpora}
        accuracy, chance = probe.linear_probe(
            mu["train"], classes["train"], mu["test"], classes["test"]
        )
        for i, value in enumerate(data.FACTORS[factor]):
            at = [c == value for c in classes["test"]]
            axes.scatter(
                *xy[at].T, s=7, color=f"C{i}" if i < 10 else ("black", "gold")[i - 10], label=value
            )
        axes.set(
            xticks=[],
            yticks=[],
            title=f"{factor}: a linear probe reads {accuracy:.0f} % (chance {chance:.0f} %)",
        )
        axes.legend(fontsize=7, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(
        "Posterior means of grammar's test sentences, first two principal components", fontsize=11
    )
    return figure


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="plots.py", description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, runs in ("curves", "+"), ("plane", None), ("map", 1):
        sub = kinds.add_parser(kind)
        sub.add_argument("--out", required=True, metavar="PNG", help="File to write.")
        if runs:
            sub.add_argument("runs", nargs=runs, metavar="RUN", help="Run folder of train.py.")
    flag = kinds.choices["plane"].add_argument
    flag(
        "--points",
        nargs="+",
        action="append",
        required=True,
        metavar=("LABEL", "RUN"),
        help="Runs of one colour.",
    )
    flag(
        "--lm",
        type=at_least(0, float),
        metavar="NATS",
        help="NLL of the language model, drawn as a line.",
    )
    flag(
        "--entropy",
        type=at_least(0, float),
        metavar="NATS",
        help="Entropy of the data, drawn as a line.",
    )
    flag(
        "--paper",
        choices=paper_tables.PAPER,
        help="Add the paper's rows of this data set, corrected.",
    )
    return parser.parse_args(argv)


def draw(args):
    """The Figure that a command asks for. Raises OSError, ValueError, KeyError where a run cannot
    be used."""
    if args.kind == "curves":
        configs, logs = {}, {}
        for run in args.runs:
            configs[run] = json.loads(Path(run, "config.json").read_text())
            records = map(json.loads, Path(run, "log.jsonl").read_text().splitlines())
            logs[run] = [record for record in records if record["split"] == "valid"]
            if not logs[run]:
                raise ValueError(f"{run}/log.jsonl has no record of the validation split")
        labels = run_labels(configs)
        return draw_curves({labels[run]: records for run, records in logs.items()})
    if args.kind == "plane":
        groups = {
            label: [json.loads(Path(run, "metrics.json").read_text()) for run in runs]
            for label, *runs in args.points
        }
        rows = paper_tables.reread(args.paper) if args.paper else ()
        return draw_plane(
            groups, args.lm, args.entropy, [row for row in rows if row["rec"] is not None]
        )
    config, model, read = metrics.load_run(args.runs[0])
    if config["dataset"] != "grammar":
        raise ValueError(
            f"the data set of {args.runs[0]} is {config['dataset']}; a map needs grammar's factors"
        )
    return draw_map(model, {split: read(split, limit=10_000) for split in ("train", "test")})


def main(argv=None):
    args = parse_args(argv)
    try:
        draw(args).savefig(args.out, dpi=150)
    except (OSError, ValueError, KeyError) as error:  # no such run, no such folder, no such format
        sys.exit(f"plots.py: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
