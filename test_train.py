"""Training never loses work: resume, faults, processes, mixed precision, determinism, edges."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import data
import metrics
import train
import vae

# Children start from one process that has imported everything once, and in it no thread.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train", "test_train"])

TINY = "--model tiny --d-model 16 --layers 1 --heads 2 --vocab-size 40 --latent-dim 3 --iw-samples 2".split()
SHORT = "--epochs 2 --batch-size 5 --log-every 3 --max-length 12 --device cpu --denoise 0.2".split()


def main(*args, report=None):
    """train.main in a process of its own, and quiet; `report` gets its standard error."""
    torch.set_num_threads(1)
    with open(report or os.devnull, "w", buffering=1) as err, open(os.devnull, "w") as out:
        sys.stdout, sys.stderr = out, err
        train.main([str(arg) for arg in args])


def start(target, *args, **kwargs):
    child = FORK.Process(target=target, args=args, kwargs=kwargs)
    child.start()
    return child


def run(target, *args, **kwargs):
    child = start(target, *args, **kwargs)
    child.join()
    return child.exitcode


def weights(out):
    return load_file(Path(out, "model", "model.safetensors"))


def same(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def same_log(one, other):
    return Path(one, "log.jsonl").read_bytes() == Path(other, "log.jsonl").read_bytes()


def distance(one, other):
    """The largest relative difference of a weight tensor."""
    a, b = weights(one), weights(other)
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a data set of 23 texts, and a phase 0 made of it."""
    home = tmp_path_factory.mktemp("train")
    texts = [text for text, _ in zip(data.read_texts("grammar", "train"), range(23), strict=False)]
    for split in data.SPLITS:
        Path(home, f"{split}.txt").write_text("\n".join(texts[: 23 if split == "train" else 7]) + "\n")
    flags = ("--phase", 0, *TINY, *SHORT, "--out", home / "phase0")
    assert run(main, "--dataset", home, *flags) == 0
    return home


@pytest.fixture(scope="module")
def command(home):
    """Phase 2, of which most tests are."""
    return ["--dataset", home, "--phase", 2, "--init", home / "phase0", *TINY, *SHORT]


@pytest.fixture(scope="module")
def whole(home, command):
    """A run that nothing happened to."""
    assert run(main, *command, "--out", home / "whole") == 0
    return home / "whole"


# ------------------------------------------------------------------------------------ resume and faults


def cut(calls, name, then, *args):
    """main, in which the call number `calls` of train.<name> does `then` instead."""
    module, name = (train, name) if "." not in name else (getattr(train, name.split(".")[0]), name.split(".")[1])
    original, count = getattr(module, name), 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            then()
        return original(*args, **kwargs)

    setattr(module, name, counted)
    main(*args)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("where", ["backward", "os.replace", "os.fsync", "torch.save", "metrics.evaluate", "write_json"])
def test_killed_anywhere(tmp_path, command, whole, where):
    """SIGKILL in a step, within the write of a checkpoint, in an evaluation, before the last file."""
    command = [*command, "--out", tmp_path / "run", "--save-every", 0, "--resume"]
    calls = 2 if where in ("metrics.evaluate", "write_json") else 7
    assert run(cut, calls, where, partial(send, signal.SIGKILL), *command) == -signal.SIGKILL
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert run(main, *command) == 0
    assert same(tmp_path / "run", whole)
    assert same_log(tmp_path / "run", whole)
    assert not train.checkpoints(tmp_path / "run")


def test_killed_at_random(tmp_path, command, whole):
    kills, rng = int(os.environ.get("KILLS", 4)), random.Random(int(os.environ.get("SEED", 0)))
    out, done, longest = tmp_path / "run", 0, 0.5
    while done < kills:
        child = start(main, *command, "--out", out, "--save-every", 0, "--resume")
        child.join(rng.uniform(0, longest))
        child.kill()
        child.join()
        if child.exitcode == 0:  # it was quicker: once more, from the beginning
            longest *= 0.8
            shutil.rmtree(out)
        else:
            done += 1
    assert run(main, *command, "--out", out, "--resume") == 0
    assert same(out, whole)
    assert same_log(out, whole)
