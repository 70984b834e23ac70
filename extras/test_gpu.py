"""The GPU path: what can be shown without a GPU, and checks that run where there is one.

    pytest extras/test_gpu.py -rsP       without a GPU, each check is skipped by name
    python -m extras.test_gpu CHECK      one check, on the first GPU

All tests hide the GPUs from their process. So each check runs in a process of its own that sees
them again.
"""

import json
import os
import subprocess
import sys
import warnings
from argparse import Namespace
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import T5Config

import data
import metrics
import train
from vae import T5VAE, pool

ROOT = Path(train.__file__).resolve().parent
RUN = "--dataset grammar --model tiny --recipe best --limit 640 --epochs 2 --batch-size 64"
RUN = [*RUN.split(), "--kl-target", "10", "--iw-samples", "2"]


@cache
def tokenizer():
    return data.train_tokenizer(list(data.read_texts("grammar", "test")), 300)


def small_vae(device="cpu"):
    """A VAE of `grammar` with random weights that hears z."""
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 128, "num_heads": 4, "num_layers": 2}
    shape |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "vocab_size": len(tokenizer())}
    model = T5VAE(T5Config(**shape).to_dict(), 8).to(device)
    torch.nn.init.normal_(model.w_proj.weight, std=1.0)
    return model


def stepper(model, device, amp):
    """(a batch, a function that takes a step on it)."""
    corpus, index = data.load_corpus("grammar", "train", tokenizer(), limit=64), np.arange(64)
    batch = data.training_batch(corpus, 0, index, denoise=0.1, latent_dim=8, seed=0)
    args = Namespace(device=device, amp=amp, kl_threshold=0.1, seed=0, optimizer="adamw-rms")
    args.lr, args.lr_schedule = 1e-2, "linear"
    optimizer = train.make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device, enabled=amp == "fp16", init_scale=1024.0)

    def step():
        train.set_rates(optimizer, args, 0.5)
        return train.train_step(model, optimizer, scaler, [batch], 0.5, 0, args)

    return batch.to(device), step


# -------------------------------------------------------------------------------------------------
# on every machine


class Factories(TorchFunctionMode):
    """Collects the calls that make a tensor without a device: on a GPU, too, it is on the CPU."""

    NAMES = "empty zeros ones full arange linspace eye rand randn randint randperm tensor "
    NAMES = {*(NAMES + "as_tensor scalar_tensor").split()}  # from_numpy: of a batch

    def __init__(self):
        super().__init__()
        self.stray, self.calls = [], 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.NAMES and getattr(torch, name, None) is function:
            self.calls += 1
            if (kwargs or {}).get("device") is None:
                self.stray.append(name)
        return function(*args, **kwargs or {})


class Reads(TorchFunctionMode):
    """Counts the calls that make the CPU wait for a GPU: they read a tensor, or make one whose size
    depends on it."""

    NAMES = "item tolist numpy cpu nonzero masked_select unique __bool__ __float__ __int__ "
    NAMES += "__index__ equal allclose is_nonzero repeat_interleave bincount"
    NAMES = {*NAMES.split()}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        index = args[1] if name == "__getitem__" else ()
        index = index if isinstance(index, tuple) else (index,)
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in index)
        if name in self.NAMES or by_mask:
            self.found.append(name)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_of_training_reads_once_from_the_device(amp, tmp_path):
    """Of train.train itself: two more steps are two more reads. `Reads` does not see the thread
    that makes the batches, on the CPU."""
    command = "--dataset grammar --model tiny --phase 2 --recipe best --epochs 1 --batch-size 16"
    args, _ = train.parse([*command.split(), "--lr", "0.02", "--device", "cpu", "--amp", amp])
    args = train.settings(args, 2)
    held_out = data.load_corpus("grammar", "valid", tokenizer(), limit=16)
    counts = []
    for steps in (2, 4):
        corpus = data.load_corpus("grammar", "train", tokenizer(), limit=16 * steps)
        corpora = {"train": corpus, "valid": held_out, "test": held_out}
        run = train.Run(tmp_path / f"{steps}", args, corpora)
        run.folder.mkdir()
        with Reads() as reads:
            train.train(small_vae(), corpora, run, args)
        counts.append(Counter(reads.found))
    assert counts[1] - counts[0] == {"tolist": 2}


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_every_tensor_of_a_step_says_where_it_is(amp):
    _, step = stepper(small_vae(), "cpu", amp)
    with Factories() as made:
        step()
    assert made.calls, "T5 itself makes tensors"
    assert made.stray == []


def test_evaluation_reads_nothing_and_its_tensors_say_where_they_are(monkeypatch):
    model = small_vae().eval()
    batch, _ = stepper(model, "cpu", "off")
    # Noise is made on the CPU, with the batch.
    monkeypatch.setattr(data, "latent_noise", lambda *_: batch.eps[None])
    with Factories() as made:
        with Reads() as reads:  # what `metrics.measure` does with a batch, but for greedy decoding
            posterior = model.encode(batch.ids, batch.mask)
            metrics.sample_rec(model, batch, *posterior, seed=0)
            r = metrics.untemper(*(x.double() for x in posterior), 0.5)
            metrics.importance_weighted(model, batch, *r, samples=1)
        model.reparameterize(*posterior)
        for pooling in "max", "mean", "last":
            pool(torch.ones_like(batch.eps)[:, :, None], torch.ones_like(batch.eps), pooling)
        for sampled in {}, {"do_sample": True, "top_k": 5}:
            model.generate(posterior[0][:4], max_new_tokens=4, **sampled)
    assert reads.found == []
    assert made.calls
    assert made.stray == []


def test_stray_tensors_and_reads_are_found():
    with Factories() as made:
        x = torch.zeros(3, device="cpu")
        assert made.stray == []
        torch.zeros(2), torch.arange(2)
    assert made.stray == ["zeros", "arange"]
    with Reads() as reads:
        x.sum().item(), float(x[0]), bool(x[0] > 0), x[x > 1], x.nonzero()
    assert len(reads.found) == 5


# -----------------------------------------------------------------------------------------------
# where there is a GPU


def losses(out):
    records = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return np.array([record["loss"] for record in records if record["split"] == "train"])


def check_a_run_in_each_precision():
    """Both phases learn. Losses are the CPU's: float32 to 1 %, bf16 to 5 %, fp16 (it skips steps at
    first) to 10 %."""
    runs = [("cpu", "cpu", "off"), ("off", "cuda", "off"), ("fp16", "cuda", "fp16")]
    if train.has_bf16():
        runs.append(("bf16", "cuda", "bf16"))
    for name, device, amp in runs:
        train.main([*RUN, "--device", device, "--amp", amp, "--log-every", "1", "--out", name])
        for phase in "phase1", "phase2":
            found, exact = losses(Path(name, phase)), losses(Path("cpu", phase))
            assert found[-3:].mean() < found[:3].mean(), "it learns"
            error = np.abs(found - exact).mean() / exact.mean()
            print(f"{name} {phase}: losses differ from the CPU's by {error:.2%}")
            assert error < {"off": 0.01, "bf16": 0.05, "fp16": 0.1}[amp]


def check_evaluation_and_generation_equal_the_cpus():
    """Measures to 0.01 nats per sentence, greedy texts to 99 % of the tokens; and what bf16, or
    else fp16, costs, printed."""
    train.main([*RUN, "--device", "cpu", "--out", "run"])
    run = Path("run", "phase2")

    def measured(device, amp="off"):
        _, model, read = metrics.load_run(run, device)
        with torch.autocast(device, metrics.HALF[amp], enabled=amp != "off"):
            return metrics.evaluate(model, read("test"), 0.5, iw_samples=5, thorough=True)

    on_cpu, on_gpu = measured("cpu"), measured("cuda")
    for name in "rec", "kl", "nll_iw", "neg_elbo_untempered", "mi", "rec_other", "rec_prior":
        print(f"{name}: {on_cpu[name]:.4f} on the CPU, {on_gpu[name]:.4f} on the GPU")
        assert abs(on_cpu[name] - on_gpu[name]) < 0.01
    half = measured("cuda", "bf16" if train.has_bf16() else "fp16")
    changes = {name: f"{half[name] - on_gpu[name]:+.4f}" for name in ("rec", "kl")}
    print(f"half precision changes, nats per sentence: {changes}")
    model = T5VAE.from_pretrained(run)
    z = torch.randn(64, model.latent_dim, generator=torch.Generator().manual_seed(0))
    ids = model.generate(z, max_new_tokens=12)
    again = model.cuda().generate(z.cuda(), max_new_tokens=12).cpu()
    length = min(ids.shape[1], again.shape[1])
    assert (ids[:, :length] == again[:, :length]).float().mean() > 0.99


def check_a_killed_run_resumes():
    """An interruption in phase 2, then --resume: the losses are those of the whole run to 1 %."""
    command = [*RUN, "--device", "cuda", "--amp", "off", "--log-every", "1", "--save-every", "0"]
    seed_dropout, steps = train.seed_dropout, []
    train.main([*command, "--out", "whole"])

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 25:
            raise KeyboardInterrupt
        seed_dropout(*args)

    train.seed_dropout = interrupted
    with pytest.raises(SystemExit, match="130"):
        train.main([*command, "--out", "cut"])
    train.seed_dropout = seed_dropout
    assert not Path("cut", "phase2", "metrics.json").exists()
    train.main([*command, "--out", "cut", "--resume"])
    whole, cut = losses("whole/phase2"), losses("cut/phase2")
    assert len(whole) == len(cut)
    np.testing.assert_allclose(cut, whole, rtol=0.01)


def check_one_synchronization_per_step():
    """torch's own count of synchronizations in a step, in each precision; its control is one more
    read."""
    for amp in "off", "bf16", "fp16":
        batch, step = stepper(small_vae("cuda"), "cuda", amp)
        step()
        counts = []
        for more_reads in 0, 1:
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
                [batch.eps.sum().item() for _ in range(more_reads)]
            torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
        print(f"{amp}: {counts[0]} synchronization in a step")
        assert counts == [1, 2]


def check_two_processes():
    """torchrun on two GPUs: the measures of one process to 0.1 nats."""
    for count, out in (1, "one"), (2, "two"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={count}"]
        subprocess.run([*torchrun, train.__file__, *RUN, "--amp", "off", "--out", out], check=True)
    one, two = (data.read_json(f"{out}/phase2/metrics.json") for out in ("one", "two"))
    for name in "rec", "kl", "nll_iw":
        assert abs(one[name] - two[name]) < 0.1


def check_benchmark():
    """Prints tokens per second against a plain transformers step, and memory, in each precision.

    The shapes are t5-small's and t5-base's, with random weights.
    """
    for name, width, heads, layers in ("small", 512, 8, 6), ("base", 768, 12, 12):
        shape = ["--d-model", width, "--heads", heads, "--layers", layers, "--steps", 0]
        run_module("extras.pretrain", "--dataset", "grammar", *shape, "--out", name)
        for amp in "off", "bf16", "fp16":
            model = ["--model", Path(name, "model"), "--amp", amp]
            run_module("extras.benchmark", "--dataset", "grammar", *model)


def run_module(*words):
    subprocess.run([sys.executable, "-m", *map(str, words)], check=True)


CHECKS = [name.removeprefix("check_") for name in globals() if name.startswith("check_")]


def gpu_environment():
    """The environment of these tests, with the GPUs visible again."""
    environment, gpus = os.environ | {"PYTHONPATH": str(ROOT)}, os.environ["TEST_GPUS"]
    if gpus == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    return environment


@cache
def gpus():
    if torch.version.cuda is None:
        return 0
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(count, env=gpu_environment(), capture_output=True, text=True).stdout)


@pytest.mark.parametrize("check", CHECKS)
def test_on_a_gpu(check, tmp_path):
    needed = 2 if check == "two_processes" else 1
    if gpus() < needed:
        pytest.skip(f"{check}: GPUs needed: {needed}, found: {gpus()}")
    command, where = [sys.executable, "-m", "extras.test_gpu", check], {"cwd": tmp_path}
    child = subprocess.run(command, **where, env=gpu_environment(), capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    print(child.stdout)


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"]()
