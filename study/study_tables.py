"""The tables of RESULTS.md, from what study.study keeps in study/results/.

    python -m study.study --tables

Nats are per sentence. ± is the standard error over sentences (of a difference: that of the paired
differences). If a row has several seeds, it is the standard deviation over them if that is larger.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

import data
from extras import paper_tables

TEXT_ORDER = ("grammar", "captions", "captions-all", "ptb", "answers")
# The rows of the systems' table, in its order. The others stand in those of the summary and claims.
SHOWN = ("optimus", "li2019", "paper-max", "paper-denoise", "paper-klt", "paper-deep", "r8", "r16")
SHOWN += ("r32", "linear", "threshold0.25", "threshold0.5", "r8-random")
LANGUAGE_MODELS = ("lm", "lm-paper", "lm-li2019", "lm-deep", "lm-random")
SUMMARY = ("r4", "r8", "r16", "linear", "li2019", "optimus", "paper-max", "paper-denoise")
SUMMARY += ("paper-klt", "paper-default")
POSITIONS = ("r8", "r16", "paper-max", "paper-denoise", "mean")
FROZEN_OR_RESET = ("paper-default", "unfrozen-reset")  # they differ in phase 1 alone
SEEDS_DIFFER = "paper-default"  # by how much, if neither row of a claim has several
# A row: the language model that was trained as its phase 2 was, but without z.
TRAINED_ALIKE = {"paper-max": "lm-paper", "paper-denoise": "lm-paper", "paper-klt": "lm-paper"}
TRAINED_ALIKE |= {"li2019": "lm-li2019"}
SYSTEMS = {  # row: its name in the paper's tables
    "optimus": "Optimus (lambda 0.5)",
    "li2019": "Li et al. (lambda 3)",
    "paper-max": "Max pool",
    "paper-denoise": "Max pool + Denoise",
    "paper-klt": "Max pool + Denoise + KLT",
    "paper-deep": "Max pool + Denoise + KLT + Deep",
}
# The paper's text of the kind of ours.
OF_ITS_KIND = {"captions": "snli", "ptb": "ptb", "answers": "yahoo"}
OF_ITS_KIND |= {"snli": "snli", "yahoo": "yahoo", "yelp": "yelp"}


@dataclass(frozen=True)
class Claim:
    """What the paper says of two rows: `measure` of row `a` is `expected` (<, > or =) that of `b`;
    or of one row: a's is below 1 nat (z is lost) or above it (z is kept).
    """

    says: str
    measure: str
    a: str
    expected: str
    b: str | None = None


CLAIMS = (
    Claim("(a) without phase 1 z is lost", "swap_cost", "cold", "<"),
    Claim("(a) ours: the same at weight 1", "swap_cost", "cold-constant", "<"),
    Claim("(a) ours: phase 1 keeps z at weight 1", "swap_cost", "constant", ">"),
    Claim("(a) phase 1 makes z say more", "swap_cost", "no-threshold", ">", "cold"),
    Claim("(b) phase 1 needs a frozen decoder", "swap_cost", "paper-default", ">", "unfrozen"),
    Claim("(b) phase 1 needs a frozen decoder", "nll", "paper-default", "<", "unfrozen"),
    Claim("(c) max informs more than mean", "swap_cost", "paper-default", ">", "mean"),
    Claim("(c) max informs more than last", "swap_cost", "paper-default", ">", "last"),
    Claim("(d) deletion helps long texts", "swap_cost", "paper-denoise", ">", "paper-max"),
    Claim("(d) deletion helps long texts", "nll", "paper-denoise", "<", "paper-max"),
    Claim("(d) with a threshold, too", "nll", "deletion0.4", "<", "no-deletion"),
    Claim("(e) a threshold of 0.5 helps", "nll", "paper-default", "<", "no-threshold"),
    Claim("(e) 0.5 is better than 3", "nll", "deletion0.4", "<", "paper-klt"),
    Claim("(f) cyclical annealing loses z", "swap_cost", "cyclical", "<"),
    Claim("(g) of 64 dimensions as many are active", "active", "z64", "=", "paper-default"),
    Claim("(g) of 128 dimensions fewer are active", "active", "z128", "<", "paper-default"),
    Claim("(h) a deeper T5 is better", "nll", "paper-deep", "<", "paper-klt"),
    Claim("(i) all layers inform more", "swap_cost", "all-layers", ">", "paper-default"),
    Claim("(j) deletion raises the KL", "kl", "paper-denoise", ">", "paper-max"),
    Claim("(j) a threshold raises the KL", "kl", "paper-klt", ">", "paper-denoise"),
    Claim("pretraining helps a language model", "rec", "lm-random", ">", "lm"),
    Claim("pretraining helps a VAE", "nll", "r8-random", ">", "r8"),
)


def pairs(rows):
    """The pairs (a, b) of rows whose paired differences a - b are kept."""
    found = [(row, "lm") for row in rows if row != "lm"]
    found += TRAINED_ALIKE.items()
    found += [(claim.a, claim.b) for claim in CLAIMS if claim.b]
    return [*dict.fromkeys(found), ("paper-deep", "lm-deep"), FROZEN_OR_RESET]


def language_model(row):
    """The row that a row is compared with, which has as many layers."""
    return "lm-deep" if row.endswith("-deep") else "lm"


def read_dict(path, *keys):
    """The dict in a JSON file, with these keys. InputError if there is none."""
    content = data.read_json(path)
    if not content or not content.keys() >= set(keys):
        needed = f" with {', '.join(keys)}" if keys else ""
        raise data.InputError(f"{path} is damaged: it must hold a dict{needed}")
    return content


def read(results):
    """({text: {row: {seed: measures}}}, {text: paired.json}), in TEXT_ORDER.

    The measures are those of metrics.json, with the share of active dimensions, and the minutes and
    the KL after each epoch of phase 1 of config.json. Raises InputError if a file is damaged, or
    if the rows of a text are of different texts.
    """
    if not Path(results).is_dir():
        raise data.InputError(f"there is no folder {results}")
    runs, paired, texts = {}, {}, {}
    for path in sorted(Path(results).glob("*/*/*/metrics.json")):
        text, row, seed = path.parts[-4:-1]
        if not seed.isdecimal():
            raise data.InputError(f"{path.parent} is no seed: its name must be a number")
        config = read_dict(path.with_name("config.json"), "command")
        if config.get("data_sha256") != texts.setdefault(text, config.get("data_sha256")):
            raise data.InputError(f"{path.parent} is of other texts than the first row of {text}")
        measured = read_dict(path, "latent_dim", "kl", "rec", "au")
        if measured["latent_dim"]:
            measured["active"] = measured["au"] / measured["latent_dim"]
        measured["minutes"], measured["phase1_kl"] = map(config.get, ("minutes", "phase1_kl"))
        runs.setdefault(text, {}).setdefault(row, {})[seed] = measured
    for path in Path(results).glob("*/paired.json"):
        paired[path.parent.name] = read_dict(path)
    order = [*TEXT_ORDER, *runs]
    return {text: runs[text] for text in sorted(runs, key=order.index)}, paired


def spread(values, error):
    """(mean over seeds, its ±): the standard deviation over them, or one's own error if larger."""
    if len(values) > 1:
        error = max(error or 0, statistics.stdev(values))
    return statistics.fmean(values), error


def number(runs, text, row, key, beside=None):
    """(mean over seeds, ±) of a measure, or None if the row or the measure is missing.

    beside: another row: only the seeds that both have.
    """
    rows = runs.get(text, {})
    seeds = [seed for seed in rows.get(row, {}) if seed in rows.get(beside or row, {})]
    found = [rows[row][seed] for seed in seeds]
    values = [measured.get(key) for measured in found]
    if not values or None in values:
        return None
    return spread(values, found[0].get(key + "_se"))


def differences(runs, paired, text, a, b, key):
    """{seed: (a - b of a measure, its standard error)} of the seeds that both rows have. The error
    is that of the paired differences, None if paired.json has none."""
    rows, found = runs[text], {}
    for seed in rows.get(a, {}):
        values = [rows.get(row, {}).get(seed, {}).get(key) for row in (a, b)]
        if None not in values:
            pair = paired.get(text, {}).get(f"{a}/{seed} - {b}/{seed}", {})
            found[seed] = values[0] - values[1], pair.get(key, [None, None])[1]
    return found


def difference(runs, paired, text, a, b, key):
    """(mean over the seeds that both rows have, ±) of a - b of a measure, or None."""
    found = list(differences(runs, paired, text, a, b, key).values())
    return spread([mean for mean, _ in found], found[0][1]) if found else None


def cell(pair, sign=""):
    """(value, ±) -> text."""
    if pair is None:
        return "-"
    value, error = pair
    shown = f"{value:{sign}z.2f}"
    return shown if error is None else f"{shown}±{error:.2f}"


def table(heads, rows):
    """Rows of cells -> a table in Markdown, numbers to the right; None if there is no row."""
    if not rows:
        return None
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(runs, text, row):
    """The first cell of a row, which says how many seeds it has, if several."""
    seeds = len(runs[text][row])
    return f"{text}: {row}" + (f", {seeds} seeds" if seeds > 1 else "")


def summary_table(runs, paired):
    """What z costs in NLL, and what it carries of the KL that is paid: a row of the study per line,
    a text per column. First the language models: the NLL of `lm`, and by how much others exceed it.
    """
    columns = {text: {} for text in runs}
    for text, cells in columns.items():
        if "lm" in runs[text]:
            cells["lm"] = f"NLL {cell(number(runs, text, 'lm', 'nll'))}"
        for row in LANGUAGE_MODELS[1:]:
            more = difference(runs, paired, text, row, "lm", "nll")
            if more:
                cells[row] = f"{more[0]:+.2f}"
        for row in SUMMARY:
            price = difference(runs, paired, text, row, "lm", "nll")
            carried = number(runs, text, row, "kl_posterior")
            if price and carried:
                kl, _ = number(runs, text, row, "kl")
                cells[row] = f"{price[0]:+.2f}, {carried[0]:.2f} of {kl:.2f}"
    columns = {text: cells for text, cells in columns.items() if cells}
    rows = [*LANGUAGE_MODELS, *SUMMARY]
    found = [row for row in rows if any(row in cells for cells in columns.values())]
    lines = [[row, *(cells.get(row, "-") for cells in columns.values())] for row in found]
    return table(["price, carried of paid", *columns], lines)


def rows_table(runs, paired):
    """The systems: what z carries at KL weight 1, and what it costs.

    A row is compared with the language model of as many layers, and with the one that was trained
    alike, if there is one. On the right stand the paper's numbers, corrected, on the most similar
    text; its -ELBO is in units of its "Max pool", where z is ignored.
    """
    heads = ["text: row", "KL, carried by z", "ESS", "-ELBO at q, untempered"]
    heads += ["price, beside its own LM", "swap cost", "exact, %"]
    heads += ["paper: KL, ratio of -ELBO"]
    rows = []
    for text in runs:
        shown = [row for row in SHOWN if row in runs[text]]
        for row in shown:
            name = label(runs, text, row)
            keys = "kl", "kl_posterior", "neg_elbo", "neg_elbo_untempered"
            kl, carried, at_q, at_r = (cell(number(runs, text, row, key)) for key in keys)
            ess = number(runs, text, row, "iw_ess")
            ess = "-" if ess is None else f"{ess[0]:.1f}"
            price = cell(difference(runs, paired, text, row, language_model(row), "nll"), "+")
            of_z = difference(runs, paired, text, row, TRAINED_ALIKE.get(row), "nll")
            if of_z:
                price += ", " + cell(of_z, "+")
            last = [cell(number(runs, text, row, key)) for key in ("swap_cost", "exact_match")]
            last.append(published(text, row))
            rows.append([name, f"{kl}, {carried}", ess, f"{at_q}, {at_r}", price, *last])
    return table(heads, rows)


def published(text, row):
    """The paper's KL and -ELBO of a system on the most similar text, or "-"."""
    if text not in OF_ITS_KIND or row not in SYSTEMS:
        return "-"
    printed = {found["name"]: found for found in paper_tables.reread(OF_ITS_KIND[text])}
    theirs, unit = printed[SYSTEMS[row]], printed["Max pool"]["neg_elbo"]
    if theirs["neg_elbo"] is None:
        return "-"
    return f"{theirs['kl']}, {theirs['neg_elbo'] / unit:.2f}"


def seed_range(runs, text, row, key):
    """How far the seeds of a row differ in a measure; 0 for one seed, or none."""
    values = [measured.get(key) for measured in runs.get(text, {}).get(row, {}).values()]
    values = [value for value in values if value is not None]
    return max(values) - min(values) if values else 0.0


def holds(claim, runs, paired, text, a, b):
    """Whether a claim holds: "yes", "no", "unclear", or "?" without paired differences.

    Of two rows: yes or no, if each seed's difference is beyond two standard errors of the paired
    differences, all on the same side, and their mean is more than the seeds of one of the rows
    differ (if neither has several: those of `paper-default` on the same text, else on `grammar`; if
    there are none, the errors decide alone); else unclear. The share of active dimensions has no
    error: "=" is less than 2 % apart.
    """
    if claim.b is None:
        return "yes" if (a < 1) == (claim.expected == "<") else "no"
    if claim.expected == "=":
        return "yes" if abs(a - b) <= 0.02 * b else "no"
    key, side = claim.measure, 1 if claim.expected == ">" else -1
    if key == "active":
        return "yes" if side * (a - b) > 0 else "no"
    found = differences(runs, paired, text, claim.a, claim.b, key).values()
    errors = [error for _, error in found if error is not None]
    if not errors:
        return "?"
    by_seed = max(seed_range(runs, text, row, key) for row in (claim.a, claim.b))
    by_seed = by_seed or seed_range(runs, text, SEEDS_DIFFER, key)
    by_seed = by_seed or seed_range(runs, "grammar", SEEDS_DIFFER, key)
    gains = [side * mean for mean, _ in found]
    if abs(statistics.fmean(gains)) > by_seed:
        if min(gains) > 2 * max(errors):
            return "yes"
        if max(gains) < -2 * max(errors):
            return "no"
    return "unclear"


def verdict(claim, runs, paired, text):
    """Whether a claim holds, and the two numbers that it rests on, means over the seeds that both
    rows have (of one row: its swap cost and its KL); "-" if there are none."""
    a = number(runs, text, claim.a, claim.measure, beside=claim.b)
    if claim.b is None:
        b = number(runs, text, claim.a, "kl")
    else:
        b = number(runs, text, claim.b, claim.measure, beside=claim.a)
    if a is None or b is None:
        return "-"
    return f"{holds(claim, runs, paired, text, a[0], b[0])}: {a[0]:z.2f}, {b[0]:z.2f}"


def plateau(runs, text):
    """Claim (k), of phase 1 of the row `paper-default`: its KL after the last two epochs."""
    found = [measured["phase1_kl"] for measured in runs[text].get("paper-default", {}).values()]
    if not found or not all(found):
        return "-"
    before, last = (statistics.fmean(kl[i] for kl in found) for i in (-2, -1))
    return f"{'yes' if abs(last - before) <= 0.02 * before else 'no'}: {before:.2f}, {last:.2f}"


def claims_table(runs, paired):
    """The paper's claims, each with the two numbers that it rests on."""
    rows = []
    for claim in CLAIMS:
        said = f"`{claim.measure}`: {claim.a} {claim.expected}"
        said += f" {claim.b}" if claim.b else " 1 nat; `kl`"
        rows.append([claim.says, said, *(verdict(claim, runs, paired, text) for text in runs)])
    said = "`kl`: paper-default, epoch 4 = epoch 5 (2 %)"
    rows.append(["(k) phase 1's KL plateaus", said, *(plateau(runs, text) for text in runs)])
    rows = [row for row in rows if set(row[2:]) - {"-"}]
    if not rows:
        return None
    columns = list(zip(["claim", "measure, expected", *runs], *rows, strict=True))
    columns = [column for column in columns if set(column[1:]) - {"-"}]  # texts without a verdict
    heads, *rows = map(list, zip(*columns, strict=True))
    return table(heads, rows)


def positions_table(runs):
    """What another text's z costs in `answers`, by position: rec_other - rec, nats per token."""
    rows = {row: runs.get("answers", {}).get(row) for row in POSITIONS}
    found = {row: seeds[min(seeds)].get("positions") for row, seeds in rows.items() if seeds}
    found = {row: places for row, places in found.items() if places}
    lines = []
    for places in list(zip(*found.values(), strict=False))[::3]:  # every third part of a text
        cells = [f"{place['rec_other'] - place['rec']:z.3f}" for place in places]
        lines.append([f"{places[0]['start'] + 1} to {places[0]['stop']}", *cells])
    return table(["tokens of a text", *found], lines)


def frozen_table(runs, paired):
    """What phase 1 with a frozen decoder brings beside one whose trained decoder is then reset."""
    rows = []
    for text in runs:
        keys = "nll", "kl_posterior", "swap_cost", "kl"
        found = [difference(runs, paired, text, *FROZEN_OR_RESET, key) for key in keys]
        if None not in found:
            rows.append([text, *(cell(pair, "+") for pair in found)])
    return table(["frozen minus reset", "NLL", "z carries", "swap cost", "KL"], rows)


def refit_table(results):
    """How good is the untempered posterior? Of some runs q, q untempered, and the encoder refitted
    at weight 1 with the same decoder (study.refit): the last is the best that there is."""
    rows = []
    for path in sorted(Path(results).glob("*/*/*/refit.json")):
        text, row, _ = path.parts[-4:-1]
        found = read_dict(path, "texts", "q", "untempered", "refitted")
        posteriors = found["q"], found["untempered"], found["refitted"]
        cells = [f"{text}: {row}"]
        for key in "rec", "kl", "neg_elbo", "nll", "kl_posterior":
            cells.append(", ".join(f"{posterior[key][0]:.2f}" for posterior in posteriors))
        rows.append(cells)
    return table(["q, untempered, refitted", "rec", "KL", "-ELBO", "NLL", "z carries"], rows)


def tables(results):
    """{name: table} in the order of RESULTS.md, those that have a row."""
    runs, paired = read(results)
    found = {"summary": summary_table(runs, paired), "systems": rows_table(runs, paired)}
    found["refit"] = refit_table(results)
    found |= {"claims": claims_table(runs, paired), "frozen": frozen_table(runs, paired)}
    found["positions"] = positions_table(runs)
    return {name: table for name, table in found.items() if table}
