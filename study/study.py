"""The study of RESULTS.md: its rows as data, one command that runs them, and their tables.

    python -m study.study --list                  what is missing, most informative first
    python -m study.study --data-dir data         runs that, one process per core
    python -m study.study --tables                the table of study/results/

It can be stopped at any moment: the same command continues. Two of them may run side by side, on
different --texts, once the T5s that they start from are made. Runs are written to runs/study/. What
is kept of them goes to study/results/<text>/<row>/<seed>/: metrics.json, and config.json with the
machine, the commit and the minutes. <text>/paired.json has the differences of pairs of rows over
the same test texts, with their standard errors.

The paper's own experiment, for whoever has a GPU and a network:

    python -m study.study --model t5-small --deep t5-base --texts ptb snli yahoo yelp
"""

import argparse
import functools
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import data
from extras import compare
from study import positions, study_tables
from study.study_tables import read_dict

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Text:
    """A data set, and how much of it is used.

    rows: those that run on it; empty: all. epochs: of phases 1 and 2 of `best`, and their sum for a
    language model; empty: those of the row. lr: the learning rate of the rows of `best`; lm_lr: of
    the language model, whichever of 5e-3 and 2e-2 had the lower rec on validation texts, from the
    pretrained start.
    """

    dataset: str
    limit: int | None = None  # of training texts; here about 0.3 million tokens per epoch
    iw_samples: int = 20
    seeds: int = 2  # of the rows with more than one
    rows: tuple = ()
    epochs: tuple = ()
    lr: str = "2e-2"
    lm_lr: str = "2e-2"
    positions: bool = False  # also measure where in a text z helps


TEXTS = {
    "captions": Text("captions", 20_000),
    "ptb": Text("ptb", 10_000, lm_lr="5e-3"),
    "answers": Text("answers", 3_500, positions=True),
    "grammar": Text("grammar", iw_samples=100, seeds=3),
    "captions-all": Text("captions", seeds=1, rows=("lm", "r16"), epochs=(2, 3)),
}

MOST_SEEDS = max(text.seeds for text in TEXTS.values())
OWN_STARTS = ("grammar", "captions-all")  # texts that are not for --model

# What rows start from: flags of extras.pretrain. On `grammar` all start from random weights.
PRETRAINING_TEXTS = ("general", "captions", "ptb", "answers")
PRETRAINING = "--lm-share 0.5 --batch-size 64 --d-model 128"
STARTS = {
    "small": "--vocab-size 8000 --steps 4800",
    "deep": "--layers 4 --steps 4800",
    "random": "--steps 0",
}

BEST_FLAGS = "--recipe best"  # and --lr, of the text
PAPER_FLAGS = "--recipe paper --dropout 0.1"  # t5-small's dropout
WARM_UPS = {  # phase 1: what it starts from, flags
    "autoencoder": ("small", f"{BEST_FLAGS} --epochs 3"),
    "autoencoder-random": ("random", f"{BEST_FLAGS} --epochs 3"),
    "paper-default": ("small", f"{PAPER_FLAGS} --denoise 0.15"),
    "no-deletion": ("small", f"{PAPER_FLAGS} --denoise 0"),
    "deletion0.4": ("small", f"{PAPER_FLAGS} --denoise 0.4"),
    "deletion0.4-deep": ("deep", f"{PAPER_FLAGS} --denoise 0.4"),
    "li2019": ("small", f"{PAPER_FLAGS} --denoise 0 --no-freeze-decoder"),
    "unfrozen": ("small", f"{PAPER_FLAGS} --denoise 0.15 --no-freeze-decoder"),
    "mean": ("small", f"{PAPER_FLAGS} --denoise 0.15 --pool mean"),
    "last": ("small", f"{PAPER_FLAGS} --denoise 0.15 --pool last"),
    "all-layers": ("small", f"{PAPER_FLAGS} --denoise 0.15 --pool-layers all"),
    "z64": ("small", f"{PAPER_FLAGS} --denoise 0.15 --latent-dim 64"),
    "z128": ("small", f"{PAPER_FLAGS} --denoise 0.15 --latent-dim 128"),
}


@dataclass(frozen=True)
class Row:
    """Phase 2 of a run: from a phase 1, or without one (`cold-...`, `lm`) from `start`."""

    name: str
    warm_up: str | None
    flags: str
    start: str = "small"
    several: bool = False  # seeds


# Li et al. 2019: an autoencoder, then its encoder with the T5's own decoder; 3 nats are free.
LI2019 = "--denoise 0 --reset-decoder --kl-threshold 0.09375 --kl-anneal-epochs 10 --epochs 10"
# Optimus' finetuning: one cycle, of which half at KL weight 0 and a quarter rising.
OPTIMUS = "--denoise 0 --kl-threshold 0.5 --epochs 8"
OPTIMUS += " --kl-schedule cyclical --kl-cycles 1 --kl-zero 0.5 --kl-rise 0.25"

ROWS = [  # the systems of the paper's tables and two targets first, then the claims
    Row("lm", None, f"{BEST_FLAGS} --no-latent --epochs 8", several=True),
    Row("r8", "autoencoder", f"{BEST_FLAGS} --epochs 5 --kl-target 8", several=True),
    Row("paper-max", "no-deletion", f"{PAPER_FLAGS} --denoise 0 --kl-threshold 0"),
    Row("paper-denoise", "deletion0.4", f"{PAPER_FLAGS} --denoise 0.4 --kl-threshold 0"),
    Row("paper-klt", "deletion0.4", f"{PAPER_FLAGS} --denoise 0.4 --kl-threshold 3"),
    Row("li2019", "li2019", f"{PAPER_FLAGS} {LI2019}"),
    Row("optimus", None, f"{PAPER_FLAGS} {OPTIMUS}"),
    Row("r16", "autoencoder", f"{BEST_FLAGS} --epochs 5 --kl-target 16"),
    Row("lm-paper", None, f"{PAPER_FLAGS} --no-latent"),  # the paper's phase 2 without z
    Row("lm-li2019", None, f"{PAPER_FLAGS} --no-latent --epochs 10"),  # that of Li et al.
    Row("paper-deep", "deletion0.4-deep", f"{PAPER_FLAGS} --denoise 0.4 --kl-threshold 3"),
    Row("lm-deep", None, f"{BEST_FLAGS} --no-latent --epochs 8", "deep"),
    Row("linear", "autoencoder", f"{BEST_FLAGS} --epochs 5 --kl-schedule linear"),
    Row("r4", "autoencoder", f"{BEST_FLAGS} --epochs 5 --kl-target 4"),
    Row("paper-default", "paper-default", f"{PAPER_FLAGS} --denoise 0.15", several=True),
    Row("unfrozen-reset", "unfrozen", f"{PAPER_FLAGS} --denoise 0.15 --reset-decoder"),
    Row("threshold0.25", "autoencoder", f"{BEST_FLAGS} --epochs 5 --kl-threshold 0.25"),
    Row("threshold0.5", "autoencoder", f"{BEST_FLAGS} --epochs 5 --kl-threshold 0.5"),
    Row("cold", None, f"{PAPER_FLAGS} --denoise 0.15 --kl-threshold 0"),
    Row("cold-constant", None, f"{PAPER_FLAGS} --kl-threshold 0 --kl-schedule constant"),
    Row("no-threshold", "paper-default", f"{PAPER_FLAGS} --denoise 0.15 --kl-threshold 0"),
    Row("cyclical", "paper-default", f"{PAPER_FLAGS} --kl-threshold 0 --kl-schedule cyclical"),
    Row("constant", "paper-default", f"{PAPER_FLAGS} --kl-threshold 0 --kl-schedule constant"),
    Row("unfrozen", "unfrozen", f"{PAPER_FLAGS} --denoise 0.15"),
    Row("no-deletion", "no-deletion", f"{PAPER_FLAGS} --denoise 0"),
    Row("deletion0.4", "deletion0.4", f"{PAPER_FLAGS} --denoise 0.4"),
    Row("mean", "mean", f"{PAPER_FLAGS} --denoise 0.15"),
    Row("last", "last", f"{PAPER_FLAGS} --denoise 0.15"),
    Row("all-layers", "all-layers", f"{PAPER_FLAGS} --denoise 0.15"),
    Row("lm-random", None, f"{BEST_FLAGS} --no-latent --epochs 8", "random"),
    Row("r8-random", "autoencoder-random", f"{BEST_FLAGS} --epochs 5 --kl-target 8"),
    Row("z64", "z64", f"{PAPER_FLAGS} --denoise 0.15"),
    Row("z128", "z128", f"{PAPER_FLAGS} --denoise 0.15"),
]


@dataclass
class Job:
    """One command, and the run folder that it writes.

    A row is finished once its `result` holds metrics.json. A run that ended after the study was
    stopped is kept the next time: train.py --resume finds nothing to do.
    """

    out: Path
    command: list
    needs: "Job | None" = None
    result: Path | None = None  # of a row
    positions: bool = False
    start: str | None = None  # the T5 of a run of train.py
    dataset: str | None = None  # its texts

    def finished(self):
        return ((self.result or self.out) / "metrics.json").exists()


def dataset_path(name, args):
    """--dataset for a named data set, or for a folder in --data-dir."""
    return name if name in data.DATASETS else str(Path(args.data_dir, name))


def text_flags(text, args):
    """The flags of train.py that name a text and say how much of it is used."""
    flags = ["--dataset", dataset_path(text.dataset, args)]
    if text.dataset in data.SOURCES:
        flags += ["--data-dir", args.data_dir]
    return [*flags, *(["--limit", str(text.limit)] if text.limit else [])]


def start_job(start, text, args):
    """(T5 to start from, the job that makes it, or None) of a row's or phase 1's `start`."""
    if args.model:
        return (args.deep if start == "deep" else args.model), None
    if text.dataset == "grammar":
        if start != "deep":
            return "tiny", None
        out = Path(args.runs, "t5-grammar-deep")
        flags = ["--dataset", "grammar", "--layers", "4", "--steps", "0", "--out", str(out)]
        return str(out / "model"), Job(out, ["-m", "extras.pretrain", *flags, "--resume"])
    out, small = (Path(args.runs, f"t5-{name}-128") for name in (start, "small"))
    datasets = [dataset_path(name, args) for name in PRETRAINING_TEXTS]
    flags = ["--dataset", *datasets, *shlex.split(f"{PRETRAINING} {STARTS[start]}")]
    needs = None
    if start != "small":  # one vocabulary for all
        flags += ["--tokenizer", str(small / "model")]
        _, needs = start_job("small", text, args)
    flags += ["--data-dir", args.data_dir, "--out", str(out)]
    return str(out / "model"), Job(out, ["-m", "extras.pretrain", *flags, "--resume"], needs)


def warm_up_job(name, text, out, rest, args):
    """The job of a phase 1 in the folder `out`; rest: the flags that phase 2 has, too."""
    start_name, flags = WARM_UPS[name]
    start, needs = start_job(start_name, text, args)
    epochs = text.epochs[0] if text.epochs else None
    command = ["train.py", "--phase", "1", "--model", start, *flags_of(flags, epochs, text.lr)]
    command += [*rest, "--out", str(out)]
    dataset = dataset_path(text.dataset, args)
    return Job(out / "phase1", command, needs, start=start, dataset=dataset)


def run_folder(row, name, seed, args):
    """Where train.py writes a row of the text `name`."""
    folder = "lm" if "--no-latent" in row.flags else "phase2"
    return Path(args.runs, name, row.name, str(seed), folder)


def row_job(row, name, seed, args):
    """The job of a row on the text `name`, which needs those of its phase 1 and its start."""
    text = find_text(name, args)
    rest = [*text_flags(text, args), "--seed", str(seed), "--resume"]
    epochs, lr, no_latent = text.epochs[1:], text.lr, "--no-latent" in row.flags
    if no_latent:
        epochs = text.epochs
        if row.start != "random":  # lm_lr was chosen with a pretrained start
            lr = text.lm_lr
    flags = flags_of(row.flags, sum(epochs), lr)
    if text.dataset == "grammar" and row.flags.startswith(BEST_FLAGS):
        flags += ["--dropout", "0"]  # its training texts are no sample to overfit
    if row.warm_up is None:
        t5, needs = start_job(row.start, text, args)
        start = t5
    else:
        out = Path(args.runs, name, row.warm_up, str(seed))
        needs = warm_up_job(row.warm_up, text, out, rest, args)
        t5, start = needs.start, str(needs.out)
    flags += ["--model", start] if no_latent else ["--phase", "2", "--init", start]
    out = run_folder(row, name, seed, args)
    command = ["train.py", *flags, *rest, "--out", str(out.parent)]
    if not no_latent:
        command += ["--iw-samples", str(text.iw_samples)]
    result = Path(args.results, name, row.name, str(seed))
    dataset = dataset_path(text.dataset, args)
    return Job(out, command, needs, result, text.positions, t5, dataset)


def flags_of(text, epochs, lr):
    """The flags in a text: with so many epochs, unless it is 0 or None, and the rate of `best`."""
    if epochs:
        text = re.sub(r"--epochs \d+", f"--epochs {epochs}", text)
    return shlex.split(text.replace(BEST_FLAGS, f"{BEST_FLAGS} --lr {lr}"))


def find_text(name, args):
    """The Text of a name. With --model all of a data set is used, at a checkpoint's own rate."""
    return TEXTS[name] if name in TEXTS and not args.model else Text(name, lr="5e-3", lm_lr="5e-3")


def runs_on(row, text, args):
    """Whether a row is one of a text."""
    start = WARM_UPS[row.warm_up][0] if row.warm_up else row.start
    if text.rows:
        return row.name in text.rows
    if text.dataset == "grammar" and start == "random":
        return False  # all its rows start from random weights
    if not args.model or start == "small":
        return True
    return start == "deep" and bool(args.deep)


def asked_seeds(args, usual):
    """The seeds that --seed or --seeds asks for, else the first `usual`."""
    if args.seed is not None:
        return [args.seed]
    return range(args.seeds or usual)


def study_jobs(args):
    """The jobs of all rows: seed 0 of all texts first, row by row; the long runs last."""
    jobs, rows = [], [row for row in ROWS if not args.rows or row.name in args.rows]
    for long in False, True:
        for seed in asked_seeds(args, MOST_SEEDS):
            for row, name in itertools.product(rows, args.texts):
                text = find_text(name, args)
                seeds = asked_seeds(args, text.seeds if row.several or text.rows else 1)
                has_long_runs = bool(text.rows)
                if runs_on(row, text, args) and seed in seeds and has_long_runs == long:
                    jobs.append(row_job(row, name, seed, args))
    return jobs


@functools.cache
def checksums(dataset, data_dir):
    """{split: SHA-256} of a data set, as in config.json, or None if it is not there."""
    if dataset in data.SOURCES and not Path(data_dir, dataset).is_dir():
        return None  # read_texts would fetch it
    found = {}
    try:
        for split in data.SPLITS:
            found[split] = data.texts_sha256(data.read_texts(dataset, split, data_dir))
    except FileNotFoundError:
        return None
    return found


def check_origins(jobs, args):
    """InputError if a run or a result that is there was made of other texts than its job says, or,
    with --model, of another T5. (Without, it may have been pretrained in another --runs.)"""
    advice = "give another --runs and --results"
    for job in jobs:
        if job.needs:
            check_origins([job.needs], args)
        for folder in filter(None, (job.out, job.result)):
            config = data.read_json(Path(folder, "config.json"))
            found = config.get("model")
            is_other = found and job.start and Path(found).resolve() != Path(job.start).resolve()
            if is_other and args.model:
                said = f"{folder} is of {found}, not of {job.start}"
                raise data.InputError(f"{said}; {advice}")
            if job.dataset and "data_sha256" in config:
                now = checksums(job.dataset, args.data_dir)
                if now and config["data_sha256"] != now:
                    said = f"{folder} is not of the texts that {job.dataset} has now"
                    raise data.InputError(f"{said}; {advice}")


def commands_left(jobs):
    """The jobs that are not finished, each after what it needs."""
    left = {}
    for job in jobs:
        chain = []
        while job and not job.finished():
            chain.append(job)
            job = job.needs
        left |= {str(job.out): job for job in reversed(chain)}
    return list(left.values())


def next_job(jobs, tried):
    """The first job that can run now: not tried, and what it needs is finished."""
    for job in commands_left(jobs):
        if str(job.out) not in tried and (job.needs is None or job.needs.finished()):
            return job
    return None


def keep(job):
    """Copy a finished run's settings and measures into results/, with the commit and the machine
    of this moment. Its minutes include pauses."""
    config = read_dict(job.out / "config.json")
    begun, ended = ((job.out / f"{name}.json").stat().st_mtime for name in ("config", "metrics"))
    config |= {"commit": commit(), "machine": machine(), "minutes": round((ended - begun) / 60, 1)}
    if job.needs and job.needs.out.name == "phase1":  # how its KL went, epoch by epoch: claim (k)
        records = map(json.loads, (job.needs.out / "log.jsonl").read_text().splitlines())
        config["phase1_kl"] = [r["kl"] for r in records if r["split"] == "valid"]
    forget_pairs(job)
    job.result.mkdir(parents=True, exist_ok=True)
    data.write_json(job.result / "config.json", config)
    measured = read_dict(job.out / "metrics.json")
    if measured["latent_dim"] and job.positions:
        measured["positions"] = positions.of_run(job.out)
    data.write_json(job.result / "metrics.json", measured)


def forget_pairs(job):
    """Drop the paired differences of a row that is made again: without the other run of a pair,
    write_pairs cannot replace them."""
    path = job.result.parent.parent / "paired.json"
    if path.exists():
        name = f"{job.result.parent.name}/{job.result.name}"
        pairs = {pair: found for pair, found in read_dict(path).items() if name not in pair.split()}
        if pairs:
            data.write_json(path, pairs)
        else:
            path.unlink()


def commit():
    """The commit of this folder, None without git."""
    git = shutil.which("git")
    if git is None:
        return None
    describe = [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None


def machine():
    """The CPU or GPU, as far as the system tells."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
    threads = torch.get_num_threads()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capability}, {threads} thread{'s' if threads > 1 else ''}"


def write_pairs(args):
    """paired.json of each text: the pairs of study_tables whose two runs are there, and those that
    it had."""
    rows = {row.name: row for row in ROWS}
    wanted, seeds = study_tables.pairs(rows), asked_seeds(args, MOST_SEEDS)
    for name in args.texts:
        path = Path(args.results, name, "paired.json")
        old = read_dict(path) if path.exists() else {}
        pairs = {p: old[p] for p in old if tuple(re.findall(r"(\S+)/\d+", p)) in wanted}
        for (a, b), seed in itertools.product(wanted, seeds):
            runs = [run_folder(rows[row], name, seed, args) for row in (a, b)]
            if all((run / "metrics.json").exists() for run in runs):
                try:
                    pairs[f"{a}/{seed} - {b}/{seed}"] = compare.compare(runs[1], runs[0])
                except (OSError, data.InputError) as error:
                    print(f"not compared: {error}", file=sys.stderr)
        if pairs:
            path.parent.mkdir(parents=True, exist_ok=True)
            data.write_json(path, dict(sorted(pairs.items())))


def time_left(jobs, args):
    """One line: how much is missing, and how long it takes at the pace of the rows in results/."""
    runs = study_tables.read(args.results)[0] if Path(args.results).exists() else {}
    seeds = [seed for rows in runs.values() for row in rows.values() for seed in row.values()]
    minutes = [measured["minutes"] for measured in seeds if measured["minutes"] is not None]
    rows, left = sum(not job.finished() for job in jobs), len(commands_left(jobs))
    said = f"{rows} of {len(jobs)} rows are missing, {left} commands"
    if not minutes:
        return said
    usual = statistics.median(minutes)
    return f"{said}: {left * usual / 60 / args.jobs:.1f} h, at {usual:.0f} minutes per command"


def start(job, log, environment):
    """The process of a job, which writes to `log`; None if another process writes there.

    The process inherits the lock of its log, and holds it until it ends, even if its study is
    killed: so the same command does not start a second one in the same run folder.
    """
    print(f"{time.strftime('%H:%M')} python {shlex.join(job.command)}", flush=True)
    with open(log, "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
        command = [sys.executable, *job.command]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)


def reason(process, log):
    """Why a run failed."""
    if process is None:
        return "another process writes there"
    if process.returncode < 0:
        return f"ended by {signal.Signals(-process.returncode).name}"
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no message"


def run(jobs, args):
    """Run what is missing, `args.jobs` processes at a time. Returns the commands that failed."""
    environment, tried, running, failed = dict(os.environ), set(), [], []
    if not torch.cuda.is_available():  # more threads than cores would spin
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        threads = int(environment.setdefault("OMP_NUM_THREADS", str(threads)))
        torch.set_num_threads(threads)  # for what this process measures itself
    logs = Path(args.runs, "logs")
    logs.mkdir(parents=True, exist_ok=True)
    write_pairs(args)
    try:
        while True:
            while len(running) < args.jobs and (job := next_job(jobs, tried)):
                tried.add(str(job.out))
                log = logs / ("-".join(job.out.relative_to(args.runs).parts) + ".txt")
                running.append((start(job, log, environment), job, log))
            if not running:
                return failed
            time.sleep(1)
            ended = [entry for entry in running if not entry[0] or entry[0].poll() is not None]
            for process, job, log in ended:
                running.remove((process, job, log))
                if process is None or process.returncode:
                    failed.append(job)
                    print(f"FAILED, see {log}: {reason(process, log)}", flush=True)
                elif job.result:
                    keep(job)
                    write_pairs(args)
                    print(f"{job.result}: {time_left(jobs, args)}", flush=True)
    finally:
        processes = [process for process, _, _ in running if process]
        for process in processes:
            process.terminate()
        for process in processes:  # the same command may come at once
            process.wait()


def parse_args(argv):
    parser = argparse.ArgumentParser("study.py", description=__doc__.splitlines()[0])
    flag = parser.add_argument
    texts = f"data sets ({' '.join(TEXTS)}; with --model: captions ptb answers)"
    flag("--texts", nargs="+", help=texts)
    flag("--rows", nargs="+", choices=[r.name for r in ROWS], metavar="ROW", help="only these")
    seeds = "so many of each row (1; of some 2, on grammar 3)"
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--seeds", type=data.number(int, 1), help=seeds)
    group.add_argument("--seed", type=data.number(int, 0, 2**32), help="only this seed of each row")
    flag("--model", help="start of all rows: a T5 of the hub, or a folder (pretrained here)")
    flag("--deep", help="that of rows with 4 + 4 layers, with --model; else they are left out")
    flag("--data-dir", default="data", help="where the folders of the texts are (data)")
    flag("--runs", default="runs/study", help="where run folders are written (runs/study)")
    about = "where results are kept (study/results), with --model in a folder of its name"
    flag("--results", default=str(Path("study", "results")), help=about)
    cores = 1 if torch.cuda.is_available() else os.cpu_count()
    flag("--jobs", type=data.number(int, 1), default=cores, help=f"processes at a time ({cores})")
    flag("--list", action="store_true", help="print what is missing, and run nothing")
    flag("--tables", action="store_true", help="print the tables of RESULTS.md, and run nothing")
    args = parser.parse_args(argv)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if args.tables and given - {"tables", "results", "model"}:
        parser.error("--tables prints all: it takes --results and --model alone")
    if args.texts is None:
        args.texts = ["captions", "ptb", "answers"] if args.model else list(TEXTS)
    args.texts = list(dict.fromkeys(args.texts))
    for name in args.texts:
        if not args.model and name not in TEXTS:
            parser.error(f"--texts has {name!r}; without --model it must be of {', '.join(TEXTS)}")
        if args.model and (name in ("", "..", *OWN_STARTS) or name != Path(name).name):
            parser.error(f"--texts has {name!r}; with --model it must be a folder in --data-dir")
    if args.deep is not None and not args.model:
        parser.error(f"--deep is {args.deep}; it needs --model")
    for flag, name in ("--model", args.model), ("--deep", args.deep):
        if name is not None and not name.strip("./"):
            parser.error(f"{flag} is {name!r}; it must have a name")
    if args.model:  # two models share neither run folders nor results
        name = Path(args.model).as_posix().strip("/").replace("/", "--")
        args.runs, args.results = (str(Path(parent, name)) for parent in (args.runs, args.results))
    return args


def main(argv=None):
    args = parse_args(argv)
    with data.command("study.py", "; the same command continues"):
        if args.tables:
            tables = study_tables.tables(args.results)
            if not tables:
                raise data.InputError(f"{args.results} has no rows")
            print("\n\n".join(tables.values()))
            return
        jobs = study_jobs(args)
        found = {job.result.parent.name for job in jobs}
        if missing := [row for row in args.rows or () if row not in found]:
            said = "no text of --texts has such a row, or it needs --deep"
            raise data.InputError(f"--rows {' '.join(missing)}: {said}")
        check_origins(jobs, args)
        print(time_left(jobs, args))
        if args.list:
            for job in commands_left(jobs):
                print(f"python {shlex.join(job.command)}")
            return
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs end with it, too
        failed = run(jobs, args)
        if failed:
            sys.exit(f"study.py: commands that failed: {len(failed)}")


if __name__ == "__main__":
    main()
