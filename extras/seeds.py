"""Mean and standard deviation over the seeds of a run.

    python -m extras.seeds RUN RUN ...

Runs whose config.json differ in nothing but the seed, and in digits of the run that they start
from, are one group. Numbers are those of their metrics.json.
"""

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import metrics
from train import INCIDENTAL


def seed_groups(configs, results):
    """{name: measures} of the groups with two seeds or more: means, with the sample standard
    deviation as their `_se`.

    Counts that are the same in all stay counts. Raises ValueError where runs of a group were
    measured with different K.
    """
    groups, summaries = defaultdict(dict), {}
    for run, config in configs.items():
        ignored = INCIDENTAL | {"seed", "init", "argv", "given"}  # two are of the first edition
        # Two settings of earlier runs are constants now.
        fixed = {"clip": 100.0, "adam_eps": 1e-8 if config.get("optimizer") != "adamw" else 1e-3}
        recipe = {key: value for key, value in (fixed | config).items() if key not in ignored}
        recipe["start"] = re.sub(r"\d+", "#", str(config.get("start")))  # warm-0 and warm-1
        recipe = json.dumps(recipe, sort_keys=True)
        groups[recipe].setdefault(config["seed"], run)  # a seed counts once
    for runs in groups.values():
        group, mean = [results[run] for run in runs.values()], {}
        if len({measured.get("iw_samples") for measured in group}) > 1:
            ks = ", ".join(f"{run}: K = {results[run].get('iw_samples')}" for run in runs.values())
            raise ValueError(
                f"seeds measured with different numbers of importance samples do not mix ({ks})"
            )
        if len(runs) == 1:
            continue
        for key in (key for key in group[0] if not key.endswith("_se")):
            values = [measured.get(key) for measured in group]
            if None in values or (isinstance(values[0], int) and len(set(values)) == 1):
                mean[key] = values[0] if len(set(values)) == 1 else None
            else:
                mean |= {key: statistics.fmean(values), key + "_se": statistics.stdev(values)}
        summaries[f"{len(runs)} seeds of {next(iter(runs.values()))}"] = mean
    return summaries


def main(argv=None):
    parser = argparse.ArgumentParser(prog="seeds.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Finished run folder of train.py.")
    configs, results = {}, {}
    for run in parser.parse_args(argv).runs:
        try:
            configs[run], results[run] = (
                json.loads(Path(run, f"{name}.json").read_text()) for name in ("config", "metrics")
            )
        except (OSError, ValueError) as error:
            sys.exit(f"seeds.py: cannot use {run}: {error}")
    try:
        summaries = seed_groups(configs, results)
    except ValueError as error:
        sys.exit(f"seeds.py: {error}")
    if not summaries:
        sys.exit("seeds.py: no two of these runs differ in nothing but the seed")
    print(metrics.format_table(summaries, "standard deviation over seeds"))


if __name__ == "__main__":
    main()
