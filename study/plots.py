"""The curves of runs, and the figure of RESULTS.md.

    python -m study.plots curves RUN [RUN ...] --out curves.png
    python -m study.plots price --out study/figures/price.png

Needs `pip install -r extras/requirements.txt`.

curves: rec, KL, KL weight and -ELBO over the steps of any runs, with the NLL and the KL of the
posterior at the end. price: for each text and row, what z costs in NLL beside a language model,
over the nats that it carries in the model; a line leads to the KL that the encoder pays. Language
models that were trained as some rows were are dotted lines.
"""

import argparse
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator, SymmetricalLogLocator
from matplotlib.transforms import Bbox

import data
from study import study_tables

# The study's rows by method, with the color and the marker of each. Other rows are not drawn.
METHODS = {
    "KL target (r8: 8 nats)": (r"r\d+", "#0072B2", "o"),
    "the paper's recipe": (r"paper-(max|denoise|klt|deep)", "#D55E00", "^"),
    "Optimus, Li et al.": (r"optimus|li2019", "#56B4E9", "v"),
    "KL threshold (λ)": (r"threshold[\d.]+", "#009E73", "s"),
    "linear annealing": ("linear", "#CC79A7", "D"),
}
LANGUAGE_MODELS = {"lm-paper": "the paper's recipe", "lm-li2019": "Optimus, Li et al."}
RUN_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
KL_TICKS = (0, 2, 4, 8, 16, 32, 64, 128, 256)
# Linear up to 4 nats, logarithmic beyond: 0, 8 and 96 nats must all be seen. The two parts have the
# same slope where they meet.
KL_SCALE = {"base": 2, "linthresh": 4, "linscale": 0.5 / math.log(2)}

# ---------------------------------------- price


class Point(NamedTuple):
    """A run of the study, results/<text>/<row>/<seed>, measured at weight 1. All in nats."""

    row: str
    seed: str
    method: str
    carried: float  # by z, in the model
    kl: float  # that the encoder pays
    gap: float  # NLL above the language model's
    error: float  # standard error of the paired differences, 0 if there are none


def points_of(results, paired, text):
    """The Points of a text, method by method: those whose language model has the same seed."""
    points = []
    for method, (rows, _, _) in METHODS.items():
        for row in sorted(results[text]):
            if not re.fullmatch(rows, row):
                continue
            lm = study_tables.language_model(row)
            gaps = study_tables.differences(results, paired, text, row, lm, "nll")
            for seed, (gap, error) in sorted(gaps.items()):
                measured = results[text][row][seed]
                carried = measured.get("kl_posterior")
                if carried is not None:
                    rest = measured["kl"], gap, error or 0
                    points.append(Point(row, seed, method, carried, *rest))
    return points


def draw_price(results, paired):
    """A Figure of what z costs and carries: a panel for each text with a language model."""
    panels = {text: points_of(results, paired, text) for text in results if "lm" in results[text]}
    panels = {text: points for text, points in panels.items() if points}
    if not panels:
        raise data.InputError("no text has a language model (row lm) and a row to compare with it")
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9, 1.2 + 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (text, points) in zip(grid.flat, panels.items(), strict=False):
        nll, _ = study_tables.number(results, text, "lm", "rec")
        axes.set_title(f"{text}: language model {nll:.2f} nats", fontsize=9.5)
        axes.set_xlabel("nats that z carries")
        axes.tick_params(labelbottom=True)
        draw_points(axes, points)
        draw_language_models(axes, results, paired, text)
    for row in grid:
        row[0].set_ylabel("NLL above the language model's, nats")
    points = sum(panels.values(), [])
    set_scales(grid[0, 0], points)
    figure.legend(handles=legend_handles(points), loc="outside lower center", ncols=3, fontsize=8.5)
    figure.suptitle("What z carries in the model, and what it costs", fontsize=11)
    for axes, points in zip(grid.flat, panels.values(), strict=False):
        name_points(axes, points)
    return figure


def draw_points(axes, points):
    """The points of a text, each with its error and a line to the KL that the encoder pays."""
    for point in points:
        _, color, marker = METHODS[point.method]
        style = {"marker": marker, "color": color, "markersize": 5.5, "markeredgewidth": 1.2}
        style |= {"linestyle": "", "elinewidth": 1, "capsize": 2}
        label = f"{point.row}/{point.seed}"
        axes.errorbar(point.carried, point.gap, point.error, label=label, **style)
        paid = {"color": color, "linewidth": 0.8, "alpha": 0.6, "marker": "|"}
        axes.plot([point.carried, point.kl], [point.gap, point.gap], markevery=[1], **paid)
    axes.axhline(0, color="black", linestyle="--", linewidth=1, zorder=1)
    axes.grid(alpha=0.25)


def draw_language_models(axes, results, paired, text):
    """A dotted line at each language model that was trained as rows of a method were."""
    for row, method in LANGUAGE_MODELS.items():
        gap = study_tables.difference(results, paired, text, row, "lm", "nll")
        if gap:
            axes.axhline(gap[0], color=METHODS[method][1], linestyle=":", linewidth=1.2, zorder=1)


def set_scales(axes, points):
    """Of all panels, which share their axes: from 0 to beyond the highest KL, and all errors."""
    axes.set_xscale("symlog", **KL_SCALE)
    axes.set_xlim(-0.35, max(20, 1.4 * max(point.kl for point in points)))
    axes.set_xticks([tick for tick in KL_TICKS if tick <= axes.get_xlim()[1]])
    axes.set_yscale("symlog", linthresh=0.1, linscale=0.3)
    low = min(point.gap - point.error for point in points)
    high = max(point.gap + point.error for point in points)
    axes.set_ylim(min(-0.15, 1.5 * low), max(1, 3 * high))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")


def legend_handles(points):
    """A handle for each method that is drawn, and for the lines."""
    handles = []
    for method, (_, color, marker) in METHODS.items():
        if any(point.method == method for point in points):
            style = {"marker": marker, "color": color, "linestyle": ""}
            handles.append(Line2D([], [], label=method, **style))
    style = {"marker": "|", "color": "0.3", "linewidth": 0.8}
    handles.append(Line2D([], [], label="to the KL that the encoder pays", **style))
    label = "a language model trained alike"
    return [*handles, Line2D([], [], label=label, color="0.3", linestyle=":", linewidth=1.2)]


def name_points(axes, points):
    """Write the row beside its first point, where the name covers neither a point, its error, nor
    another name, and is nearer to no other point. One for which there is no room is left out."""
    axes.figure.draw_without_rendering()  # only now it is known what lies where
    reach = 4 * axes.figure.dpi / 72
    at = axes.transData.transform([(point.carried, point.gap) for point in points])
    ends = [[(p.carried, p.gap + side * p.error) for p in points] for side in (-1, 1)]
    low, high = map(axes.transData.transform, ends)
    taken = [Bbox([a, b]).padded(reach) for a, b in zip(low, high, strict=True)]
    inside = axes.bbox.padded(-reach)
    sides = ((0, 1), (-1, 0), (0, -1), (1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
    places = [(away * dx, away * dy) for away in (6, 10, 15, 21) for dx, dy in sides]
    for row, (point, *_) in itertools.groupby(points, key=lambda point: point.row):
        name = re.sub(r"^threshold", "λ ", row.removeprefix("paper-"))
        for dx, dy in places:
            align = {"ha": ("center", "left", "right")[(dx > 0) - (dx < 0)]}
            align["va"] = ("center", "bottom", "top")[(dy > 0) - (dy < 0)]
            style = {"fontsize": 7.5, "color": "0.2", "in_layout": False, **align}
            style["path_effects"] = [withStroke(linewidth=2, foreground="white")]
            place = {"xy": (point.carried, point.gap), "xytext": (dx, dy)}
            text = axes.annotate(name, **place, textcoords="offset points", **style)
            box = text.get_window_extent()
            beside = np.clip(at, box.min, box.max)  # the place in the box that is nearest to each
            distances = np.linalg.norm(at - beside, axis=1)
            near = distances[points.index(point)] < distances.min() + 1  # pixel
            free = inside.count_contains(box.corners()) == 4 and not box.count_overlaps(taken)
            if free and near:
                taken.append(box.padded(reach / 2))
                break
            text.remove()


# ---------------------------------------- the curves of runs

CURVES = {  # panel: (measure, split in log.jsonl, measure in metrics.json marked at the end)
    "rec, validation": ("rec", "valid", None),
    "KL, validation; square: KL of the posterior, test": ("kl", "valid", "kl_posterior"),
    "KL weight": ("kl_weight", "train", None),
    "-ELBO, validation; square: NLL, test": ("neg_elbo", "valid", "nll"),
}


def read_log(run):
    """The records of a run's log.jsonl, but for a line that is being written. Raises InputError."""
    path = Path(run, "log.jsonl")
    if not path.is_file():
        raise data.InputError(f"{run} has no log.jsonl of a run")
    text = path.read_text()
    try:
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise data.InputError(f"{path} is damaged: {error}") from None


def draw_curves(runs):
    """A panel per measure, a line per run; nats per sentence, but for the KL weight."""
    for run in runs:
        if not any("rec" in record for record in read_log(run)):
            raise data.InputError(f"{run} has no rec and KL to draw: it is no run of train.py")
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (title, (name, split, end)) in zip(panels, CURVES.items(), strict=True):
        for run, color in zip(runs, itertools.cycle(RUN_COLORS), strict=False):
            records = [r for r in read_log(run) if r["split"] == split and name in r]
            steps, values = [r["step"] for r in records], [r[name] for r in records]
            marker = "o" if split == "valid" or len(steps) == 1 else None
            label = " " + str(run).replace("$", r"\$")  # matplotlib hides what begins with _
            axes.plot(steps, values, color=color, label=label, marker=marker, markersize=4)
            measured = data.read_json(Path(run, "metrics.json")).get(end)
            if measured is not None and steps:
                axes.plot(steps[-1], measured, "s", color=color, markersize=8, mec="black")
        low, high = axes.dataLim.intervaly
        if end is not None and high > 10 * low:  # at the start KL may be thousands
            axes.set_yscale("symlog", linthresh=1)
            ticks = SymmetricalLogLocator(base=10, linthresh=1, subs=(1, 2, 5))
            axes.yaxis.set(major_locator=ticks, minor_locator=NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel("" if name == "kl_weight" else "nats per sentence")
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9)
    return figure


# ---------------------------------------- the command line


def main(argv=None):
    parser = argparse.ArgumentParser(prog="plots.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("kind", choices=("curves", "price"))
    flag("runs", nargs="*", metavar="RUN", help="of curves: run folders of train.py")
    flag("--out", required=True, metavar="PNG", help="file to write")
    flag("--results", metavar="DIR", help="of price: the study's runs (study/results)")
    args = parser.parse_args(argv)
    if Path(args.out).suffix != ".png":
        parser.error(f"--out is {args.out}; it must end in .png")
    if (args.kind == "curves") != bool(args.runs):
        parser.error(f"RUN is {args.runs}; curves needs run folders, price takes none")
    if args.kind == "curves" and args.results is not None:
        parser.error(f"--results is {args.results}, which has no effect with curves")
    with data.command("plots.py"):
        if args.kind == "curves":
            figure = draw_curves(args.runs)
        else:
            figure = draw_price(*study_tables.read(args.results or Path("study", "results")))
        figure.savefig(args.out, dpi=150)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
