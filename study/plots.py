"""The curves of runs, and the figure of RESULTS.md.

    python -m study.plots curves RUN [RUN ...] --out curves.png
    python -m study.plots price --out study/figures/price.png

Needs `pip install -r extras/requirements.txt`.

curves: rec, KL, KL weight and -ELBO over the steps of any runs, with the NLL and the KL of the
posterior at the end. price: for each text and row, what z costs in NLL beside a language model,
over the nats that it carries in the model; a line leads to the KL that the encoder pays.
"""

import argparse
import itertools
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator, SymmetricalLogLocator
from matplotlib.transforms import Bbox

import data
from study import study_tables

# The study's rows by method, with the color and the marker of each. Other rows are not drawn.
METHODS = {
    "KL target": (r"r\d+", "#0072B2", "o"),
    "the paper's recipe": (r"paper-.+", "#D55E00", "^"),
    "Optimus, Li et al.": (r"optimus|li2019", "#56B4E9", "v"),
    "KL threshold": (r"threshold[\d.]+", "#009E73", "s"),
    "linear annealing": ("linear", "#CC79A7", "D"),
}
TEXT_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
KL_TICKS = (0, 2, 4, 8, 16, 32, 64, 128, 256)
# Linear up to 4 nats, logarithmic beyond: 0, 8 and 96 nats must all be seen. The two parts have the
# same slope where they meet.
KL_SCALE = {"base": 2, "linthresh": 4, "linscale": 0.5 / math.log(2)}
LM_LINE = {"color": "black", "linestyle": "--", "linewidth": 1, "zorder": 1}


@dataclass
class Point:
    """A run of the study: results/<text>/<row>/<seed>."""

    row: str
    seed: str
    method: str
    measured: dict  # its metrics.json

    @property
    def language_model(self):
        """The row that it is compared with, which has as many layers."""
        return "lm-deep" if self.row == "paper-deep" else "lm"


def points_of(runs):
    """The Points of a text that were measured at weight 1, method by method."""
    points = []
    for method, (rows, _, _) in METHODS.items():
        for row in sorted(runs):
            if not re.fullmatch(rows, row):
                continue
            for seed, measured in sorted(runs[row].items()):
                if measured.get("kl_posterior") is not None:
                    points.append(Point(row, seed, method, measured))
    return points


def above(point, runs, pairs):
    """(NLL of a run minus the language model's, standard error), nats per sentence.

    The language model is of the seed that the run is paired with, else of its own, else the first.
    Paired errors are far smaller than those of two means: the sentences are the same.
    """
    nll, error = point.measured["nll"], point.measured.get("nll_se") or 0
    lm, paired = point.language_model, {}
    for seed in runs[lm]:
        found = pairs.get(f"{point.row}/{point.seed} - {lm}/{seed}", {})
        if "nll" in found:
            paired[seed] = found["nll"][1] or 0
    if paired:
        seed = min(paired, key=lambda seed: (seed != point.seed, seed))
        error = paired[seed]
    else:
        seed = point.seed if point.seed in runs[lm] else min(runs[lm])
        error = math.hypot(error, runs[lm][seed].get("rec_se") or 0)
    return nll - runs[lm][seed]["rec"], error


def mean_nll(runs):
    """NLL of the language model, which is its rec: the mean over its seeds."""
    return statistics.fmean(measured["rec"] for measured in runs["lm"].values())


def text_name(folder):
    """How figures call a folder: ptb-256 is PTB with a model of width 256, captions-all all
    captions."""
    text, _, rest = folder.partition("-")
    rest = f"width {rest}" if rest.isdigit() else rest
    return {"ptb": "PTB"}.get(text, text) + (f", {rest}" if rest else "")


def names_of(points):
    """What is written beside each of these points: the row, once for all of its seeds."""
    names = []
    for before, point in zip([None, *points], points, strict=False):
        repeated = before is not None and before.row == point.row
        short = re.sub(r"^threshold", "λ ", point.row.removeprefix("paper-"))
        names.append(None if repeated else short)
    return names


# ---------------------------------------- what the figures share


def look(point):
    """Keywords that draw a point: the marker and the color of its method."""
    _, color, marker = METHODS[point.method]
    style = {"marker": marker, "color": color, "linestyle": "", "markersize": 5.5}
    return style | {"markeredgewidth": 1.2, "label": f"{point.row}/{point.seed}"}


def legend_handles(points):
    """A handle for each method that is drawn."""
    handles = []
    for method, (_, color, marker) in METHODS.items():
        if any(point.method == method for point in points):
            style = {"marker": marker, "color": color, "linestyle": ""}
            handles.append(Line2D([], [], label=method, **style))
    return handles


def set_kl_axis(axes, highest):
    """Nats of z across, on the scale of KL_SCALE, from 0 to beyond the highest."""
    axes.set_xscale("symlog", **KL_SCALE)
    axes.set(xlim=(-0.35, max(20, 1.4 * highest)), xlabel="nats that z carries")
    axes.set_xticks([tick for tick in KL_TICKS if tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter("{x:g}")


def name_points(axes, points):
    """Write names beside points [(x, y, name or None)], each where it covers neither a point nor
    another name. One for which there is no room is left out."""
    axes.figure.draw_without_rendering()  # only now it is known what lies where
    reach = 4 * axes.figure.dpi / 72
    taken = [
        Bbox.from_extents(x - reach, y - reach, x + reach, y + reach)
        for x, y in axes.transData.transform([point[:2] for point in points])
    ]
    inside = axes.bbox.padded(-reach)
    sides = ((0, 1), (0, -1), (-1, 0), (1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
    places = [(away * dx, away * dy) for away in (6, 10, 15, 21) for dx, dy in sides]
    for x, y, name in (point for point in points if point[2]):
        for dx, dy in places:
            align = {"ha": ("center", "left", "right")[(dx > 0) - (dx < 0)]}
            align["va"] = ("center", "bottom", "top")[(dy > 0) - (dy < 0)]
            style = {"fontsize": 7.5, "color": "0.2", "in_layout": False, **align}
            style["path_effects"] = [withStroke(linewidth=2, foreground="white")]
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", **style)
            box = text.get_window_extent()
            if inside.count_contains(box.corners()) == 4 and not box.count_overlaps(taken):
                taken.append(box.padded(reach / 2))
                break
            text.remove()


# ---------------------------------------- price


def draw_price(results, paired):
    """A Figure of what z costs and carries: a panel for each text with a language model."""
    panels = {}
    for text, runs in results.items():
        points = [point for point in points_of(runs) if point.language_model in runs]
        if points and "lm" in runs:
            panels[text] = points
    if not panels:
        raise data.InputError("no text has a language model (row lm) and a row to compare with it")
    columns = min(2, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(9, 1.2 + 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    named = {}
    for axes, (text, points) in zip(grid.flat, panels.items(), strict=False):
        named[axes] = price_panel(axes, text, points, results[text], paired.get(text, {}))
    low = min(axes.dataLim.y0 for axes in named)  # with the ends of the error bars
    high = max(axes.dataLim.y1 for axes in named)
    first, points = grid[0, 0], sum(panels.values(), [])
    first.set_yscale("symlog", linthresh=0.1, linscale=0.3)
    first.set_ylim(min(-0.15, 1.5 * low), max(1, 2 * high))
    first.yaxis.set_major_formatter("{x:g}")
    set_kl_axis(first, max(point.measured["kl"] for point in points))
    for axes in named:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(first.get_xlabel())
    for row in grid:
        row[0].set_ylabel("NLL above the language model's, nats")
    handles = legend_handles(points)
    style = {"marker": "|", "color": "0.3", "linewidth": 0.8}
    handles.append(Line2D([], [], label="to the KL that the encoder pays", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8.5)
    figure.suptitle("What z carries in the model, and what it costs", fontsize=11)
    for axes, names in named.items():
        name_points(axes, names)
    return figure


def price_panel(axes, text, points, runs, pairs):
    """Draw the points of a text; returns [(nats that z carries, gap, name)] of them."""
    named = []
    for point, name in zip(points, names_of(points), strict=True):
        carried, (gap, error) = point.measured["kl_posterior"], above(point, runs, pairs)
        style = look(point)
        axes.errorbar(carried, gap, error, **style, elinewidth=1, capsize=2)
        paid = {"color": style["color"], "linewidth": 0.8, "alpha": 0.6, "marker": "|"}
        axes.plot([carried, point.measured["kl"]], [gap, gap], markevery=[1], **paid)
        named.append((carried, gap, name))
    axes.axhline(0, **LM_LINE)
    axes.set_title(f"{text_name(text)}: language model {mean_nll(runs):.2f} nats", fontsize=9.5)
    axes.grid(alpha=0.25)
    return named


# ---------------------------------------- the curves of runs

CURVES = {  # panel: (measure, split in log.jsonl, measure in metrics.json marked at the end)
    "rec, validation": ("rec", "valid", None),
    "KL, validation; square: KL of the posterior, test": ("kl", "valid", "kl_posterior"),
    "KL weight": ("kl_weight", "train", None),
    "-ELBO, validation; square: NLL, test": ("neg_elbo", "valid", "nll"),
}


def read_log(run):
    """The records of a run's log.jsonl. Raises InputError if there is none."""
    path = Path(run, "log.jsonl")
    if not path.is_file():
        raise data.InputError(f"{run} has no log.jsonl of a run")
    return [json.loads(line) for line in path.read_text().splitlines()]


def draw_curves(runs):
    """A panel per measure, a line per run; nats per sentence, but for the KL weight."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2).flat
    for axes, (title, (name, split, end)) in zip(panels, CURVES.items(), strict=True):
        for run, color in zip(runs, itertools.cycle(TEXT_COLORS), strict=False):
            records = [r for r in read_log(run) if r["split"] == split and name in r]
            steps, values = [r["step"] for r in records], [r[name] for r in records]
            marker = "o" if split == "valid" else None
            axes.plot(steps, values, color=color, label=run, marker=marker, markersize=4)
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
    handles = [Line2D([], [], color=c) for _, c in zip(runs, itertools.cycle(TEXT_COLORS))]  # noqa: B905
    figure.legend(handles, runs, loc="outside lower center", fontsize=9)
    return figure


# ---------------------------------------- the command line


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="plots.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("kind", choices=("curves", "price"))
    flag("runs", nargs="*", metavar="RUN", help="of curves: run folders of train.py")
    flag("--out", required=True, metavar="PNG", help="file to write")
    results = str(Path("study", "weight1"))
    flag("--results", default=results, metavar="DIR", help="the study's runs (study/weight1)")
    args = parser.parse_args(argv)
    if Path(args.out).suffix != ".png":
        parser.error(f"--out is {args.out}; it must end in .png")
    if (args.kind == "curves") != bool(args.runs):
        parser.error(f"RUN is {args.runs}; curves needs run folders, price takes none")
    return args


def draw(args):
    """The Figure that a command asks for."""
    if args.kind == "curves":
        return draw_curves(args.runs)
    return draw_price(*study_tables.read(args.results))


def main(argv=None):
    args = parse_args(argv)
    with data.command("plots.py"):
        draw(args).savefig(args.out, dpi=150)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
