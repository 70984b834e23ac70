"""Training never loses work: resume, faults, processes, mixed precision, determinism, edges."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
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

# Children start from one process that has imported everything once, what the libraries put off until used, too.
FORK = multiprocessing.get_context("forkserver")
T5 = "transformers.models.t5"
LATE = (f"{T5}.modeling_t5", f"{T5}.tokenization_t5", "transformers.generation.utils", "torch._dynamo", "sentencepiece")
FORK.set_forkserver_preload(["train", "test_train", *LATE])

TINY = shlex.split("--model tiny --d-model 16 --layers 1 --heads 2 --vocab-size 40 --latent-dim 3 --iw-samples 2")
SHORT = shlex.split("--epochs 2 --batch-size 5 --log-every 3 --max-length 12 --device cpu --denoise 0.2")


def main(*args, report=None):
    """train.main in a process of its own, and quiet; `report` gets its standard error."""
    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(report or os.devnull, "w", buffering=1)  # noqa: SIM115
    train.show = lambda *_: []  # takes longer than all the rest
    train.main([str(arg) for arg in args])


def start(target, *args, **kwargs):
    child = FORK.Process(target=target, args=args, kwargs=kwargs)
    child.start()
    return child


def end(child):
    child.join(120)
    child.kill()  # what hangs
    child.join()
    return child.exitcode


def run(target, *args, **kwargs):
    return end(start(target, *args, **kwargs))


def weights(out):
    return load_file(Path(out, "model", "model.safetensors"))


def records(out):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


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
    """A folder with a data set of 23 texts, and models made of it."""
    home = tmp_path_factory.mktemp("train")
    texts = [text for text, _ in zip(data.read_texts("grammar", "train"), range(23), strict=False)]
    for split in data.SPLITS:
        Path(home, f"{split}.txt").write_text("\n".join(texts[: 23 if split == "train" else 7]) + "\n")
    flags = ("--phase", 0, *TINY, *SHORT, "--out", home / "phase0")
    assert run(main, "--dataset", home, *flags) == 0
    # A VAE around it, not yet trained, and the same with dropout: quicker to load than a T5.
    flags = ("--phase", 2, "--init", home / "phase0", *TINY, *SHORT, "--epochs", 0, "--out", home / "vae")
    assert run(main, "--dataset", home, *flags) == 0
    config = shutil.copytree(home / "vae", home / "dropout") / "model" / "config.json"
    content = json.loads(config.read_text())
    content["t5_config"]["dropout_rate"] = 0.1
    config.write_text(json.dumps(content))
    return home


@pytest.fixture(scope="module")
def command(home):
    """Phase 2 with dropout, of which most tests are."""
    return ["--dataset", home, "--phase", 2, "--init", home / "dropout", *TINY, *SHORT]


@pytest.fixture(scope="module")
def quiet(home):
    """Phase 2 without dropout, whose noise is not the same for other parts of a batch."""
    return ["--dataset", home, "--phase", 2, "--init", home / "vae", *TINY, *SHORT]


@pytest.fixture(scope="module")
def whole(home, command):
    """A run that nothing happened to."""
    assert run(main, *command, "--out", home / "whole") == 0
    return home / "whole"


@pytest.fixture(scope="module")
def plain(home, quiet):
    """The same without dropout."""
    assert run(main, *quiet, "--out", home / "plain") == 0
    return home / "plain"


# ------------------------------------------------------------------------------------ resume and faults


def cut(calls, name, then, *args, **kwargs):
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
    main(*args, **kwargs)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("where", ["backward", "os.replace", "os.fsync", "metrics.evaluate", "write_json"])
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


@pytest.mark.parametrize(("number", "where"), [(signal.SIGTERM, "backward"), (signal.SIGINT, "metrics.evaluate")])
def test_signals_save_and_leave(tmp_path, command, whole, number, where):
    command, report = [*command, "--out", tmp_path / "run"], tmp_path / "report"
    calls = 7 if where == "backward" else 2  # in the middle of a step, or of the evaluation after the first epoch
    assert run(cut, calls, where, partial(send, number), *command, report=report) == 128 + number
    assert number.name in report.read_text()
    assert "--resume" in report.read_text()
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == (7 if where == "backward" else 5)
    assert run(main, *command) == 1  # an unfinished run is not overwritten unasked
    assert run(main, *command, "--resume") == 0
    assert same(tmp_path / "run", whole)
    assert same_log(tmp_path / "run", whole)


@pytest.fixture(scope="module")
def stopped(home, command):
    """A run that was stopped after step 7, with the checkpoints of steps 6 and 7."""
    out = home / "stopped"
    assert run(cut, 7, "backward", partial(send, signal.SIGTERM), *command, "--save-every", 0, "--out", out) == 143
    assert [path.name[:20] for path in train.checkpoints(out)] == ["checkpoint-000000006", "checkpoint-000000007"]
    return out


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def unfinish(path):
    path.rename(path.with_suffix(".partial"))


@pytest.mark.parametrize("damage", [flip, halve, unfinish])
def test_damaged_checkpoint(tmp_path, command, stopped, whole, damage, capsys):
    out = shutil.copytree(stopped, tmp_path / "run")
    damage(train.checkpoints(out)[-1])
    assert train.load_checkpoint(out)[1]["step"] == 6
    assert "damaged" in capsys.readouterr().err
    assert run(main, *command, "--out", out, "--resume") == 0
    assert same(out, whole)
    assert same_log(out, whole)


def test_no_code_in_checkpoints(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    train.save_checkpoint(tmp_path, {"step": 1, "model": Bomb()})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        train.load_checkpoint(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_resume_needs_the_same_command(tmp_path, command, stopped):
    out, report = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "report"
    before = sorted((path.name, path.read_bytes()) for path in out.iterdir())
    assert run(main, *command, "--lr", 0.1, "--out", out, "--resume", report=report) == 1
    assert "lr 0.001, not 0.1" in report.read_text()
    assert sorted((path.name, path.read_bytes()) for path in out.iterdir()) == before


def test_full_disk(tmp_path, command, whole):
    """The fifth checkpoint finds no room."""
    command, report = [*command, "--out", tmp_path / "run"], tmp_path / "report"
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert run(cut, 5, "torch.save", full, *command, "--save-every", 0, report=report) == 1
    assert os.strerror(errno.EFBIG) in report.read_text()
    assert [path.suffix for path in train.checkpoints(tmp_path / "run")] == [".pt", ".pt"]
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == 4
    assert run(main, *command, "--resume") == 0
    assert same(tmp_path / "run", whole)


def not_a_number(step, *args):
    return float("nan") if step == 6 else 1.0


def with_weights(kl_weight, *args, report):
    train.kl_weight = kl_weight
    main(*args, report=report)


def test_not_a_number(tmp_path, command):
    report = tmp_path / "report"
    args = *command, "--save-every", 0, "--out", tmp_path / "run"
    assert run(with_weights, not_a_number, *args, report=report) == 1
    assert len(report.read_text().splitlines()) == 1
    assert "step 6" in report.read_text()
    assert "texts [" in report.read_text()
    saved = train.load_checkpoint(tmp_path / "run")[1]
    assert saved["step"] == 6
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize(("loss", "gradient"), [(1.0, 1.0), (np.nan, 1.0), (np.inf, 1.0), (1.0, np.inf), (1.0, np.nan)])
def test_only_finite_numbers_reach_the_weights(loss, gradient):
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([gradient])
    optimizer, scaler = torch.optim.AdamW([weight]), torch.amp.GradScaler("cpu", enabled=False)
    good = np.isfinite(loss * gradient)
    with contextlib.nullcontext() if good else pytest.raises(FloatingPointError, match="at step 3"):
        train.update(optimizer, scaler, 0.1, 1.0, loss, "step 3")
    assert bool(weight.item()) == good


def test_one_process_a_folder(tmp_path, command):
    out, report = tmp_path / "run", tmp_path / "report"
    out.mkdir()
    with open(out / "log.jsonl", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert run(main, *command, "--epochs", 0, "--out", out, "--overwrite", report=report) == 1
    assert "another process" in report.read_text()
    assert run(main, *command, "--epochs", 0, "--out", out) == 0


def test_resume_of_several_phases(tmp_path, home):
    """Finished phases stay, the stopped one goes on, and what came after a phase that begins anew is void."""
    command = ["--dataset", home, "--phase", 0, 1, 2, *TINY, *SHORT]
    assert run(main, *command, "--out", tmp_path / "whole") == 0
    (tmp_path / "whole" / "phase0").rename(tmp_path / "phase0")
    assert run(main, *command, "--out", tmp_path / "whole") == 1  # phase 2 is there: known before phase 0 is trained
    assert not (tmp_path / "whole" / "phase0").exists()
    (tmp_path / "phase0").rename(tmp_path / "whole" / "phase0")
    out = tmp_path / "run"
    assert run(cut, 12, "backward", partial(send, signal.SIGTERM), *command, "--out", out) == 143
    finished = (out / "phase0" / "metrics.json").stat()
    assert run(main, *command, "--out", out, "--resume") == 0
    assert (out / "phase0" / "metrics.json").stat() == finished
    for phase in "phase0", "phase1", "phase2":
        assert same(out / phase, tmp_path / "whole" / phase)
    assert run(cut, 12, "backward", partial(send, signal.SIGTERM), *command, "--out", out, "--overwrite") == 143
    assert [(out / phase / "metrics.json").exists() for phase in ("phase0", "phase1", "phase2")] == [True, False, False]


# ------------------------------------------------------------------------------------ several processes


def one_of(rank, world, port, job, *args, **kwargs):
    """What torchrun does for a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    job(*args, **kwargs)


def run_all(*jobs):
    """The exit codes of the processes of a group, each (function, arguments)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [start(one_of, rank, len(jobs), port, *job) for rank, job in enumerate(jobs)]
    return [end(child) for child in children]


@pytest.mark.parametrize(("phase", "batch_size"), [(0, 5), (1, 5), (2, 5), (2, 1)])
def test_processes_give_the_same_result(tmp_path, home, plain, phase, batch_size):
    """After 20 steps; with 23 texts the last batch has 3, with one text a step the others have nothing to do."""
    init = ["--init", home / "vae"] if phase else []
    command = ["--dataset", home, "--phase", phase, *init, *TINY, *SHORT]
    command += ["--epochs", 4, "--lr-schedule", "linear"] if batch_size == 5 else ["--epochs", 1, "--limit", 20]
    command += ["--batch-size", batch_size]
    assert run(main, *command, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *command, "--out", tmp_path / "two")] * 2) == [0, 0]
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        numbers = {name for name, value in one.items() if isinstance(value, int | float)}
        assert [two[name] for name in numbers] == pytest.approx([one[name] for name in numbers], rel=1e-3, abs=1e-4)
    if phase == 2:
        assert distance(plain, tmp_path / "two") > 1e-3  # of other epochs


def test_evaluation_split_among_processes(tmp_path, quiet):
    flags = ["--epochs", 0, "--eval-batch-size", 2]
    assert run(main, *quiet, *flags, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *quiet, *flags, "--out", tmp_path / "three")] * 3) == [0, 0, 0]
    one, three = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("one", "three"))
    assert one | {"train_seconds": 0} == three | {"train_seconds": 0}
    assert one["rec"] != one["rec_prior"]


def test_language_model_in_two_processes(tmp_path, home, quiet):
    """Nothing that trains is left out of the loss: DistributedDataParallel would complain."""
    args = [*quiet, "--init", home / "phase0", "--no-latent", "--out", tmp_path / "run"]
    assert run_all(*[(main, *args)] * 2) == [0, 0]


def test_a_dead_process_ends_the_others(tmp_path, quiet, plain):
    args = [*quiet, "--save-every", 0, "--out", tmp_path / "run"]
    codes = run_all((main, *args), (cut, 7, "backward", partial(send, signal.SIGKILL), *args))
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, None)
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == 6
    assert run_all(*[(main, *args, "--resume")] * 2) == [0, 0]
    assert distance(tmp_path / "run", plain) < 1e-5


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, quiet):
    args = [*quiet, "--out", tmp_path / "run"]
    codes = run_all((main, *args), (cut, 7, "backward", partial(send, signal.SIGTERM), *args))
    assert codes == [143, 143]
    assert train.load_checkpoint(tmp_path / "run")[1]["step"] == 7


@pytest.mark.parametrize("parts", [2, 7])
def test_grad_accum_equals_the_whole_batch(tmp_path, quiet, plain, parts):
    assert run(main, *quiet, "--grad-accum", parts, "--out", tmp_path / "parts") == 0
    assert distance(plain, tmp_path / "parts") < 1e-5
    assert not same(plain, tmp_path / "parts")  # so it was not the same computation


def test_grad_accum_in_processes(tmp_path, quiet, plain):
    assert run_all(*[(main, *quiet, "--grad-accum", 2, "--out", tmp_path / "parts")] * 2) == [0, 0]
    assert distance(plain, tmp_path / "parts") < 1e-5


# ------------------------------------------------------------------------------------ mixed precision


def test_bf16_stays_close(tmp_path, quiet, plain):
    assert run(main, *quiet, "--amp", "bf16", "--out", tmp_path / "bf16") == 0
    off, bf16 = (json.loads((out / "metrics.json").read_text()) for out in (plain, tmp_path / "bf16"))
    assert not same(plain, tmp_path / "bf16")
    assert bf16["rec"] == pytest.approx(off["rec"], rel=0.02)
    assert bf16["kl"] == pytest.approx(off["kl"], rel=0.1)


def test_terms_are_float32_under_autocast():
    config = {"model_type": "t5", "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2}
    model = vae.T5VAE(config | {"num_layers": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}, 3)
    ids = torch.arange(2, 14).view(2, 6)
    batch = data.Batch(ids, torch.ones_like(ids), ids, torch.arange(2))
    objective = train.ELBO(model, 0.1)
    exact = objective(batch, torch.ones(2, 3), 0.7)
    with torch.autocast("cpu", torch.bfloat16):
        terms = objective(batch, torch.ones(2, 3), 0.7)
        mu, logvar = model.encode(batch.ids, batch.mask)
    assert mu.dtype is torch.bfloat16  # autocast is on
    assert {terms[name].dtype for name in ("loss", "rec", "kl")} == {torch.float32}
    assert torch.equal(terms["kl"], metrics.kl_divergence(mu.float(), logvar.float()).sum(1))
    assert torch.allclose(terms["loss"], exact["loss"], rtol=0.02)


def with_scale(scale, *args):
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=scale)
    main(*args)


def test_a_skipped_step_changes_nothing(tmp_path, quiet):
    flags = ["--amp", "fp16", "--limit", 5]  # two steps
    assert run(main, *quiet, "--epochs", 0, "--out", tmp_path / "start") == 0
    assert run(with_scale, 2.0**127, *quiet, *flags, "--out", tmp_path / "skipped") == 0
    assert same(tmp_path / "start", tmp_path / "skipped")
    assert run(with_scale, 2.0**4, *quiet, *flags, "--out", tmp_path / "moved") == 0
    assert not same(tmp_path / "start", tmp_path / "moved")


# ------------------------------------------------------------------------------------ determinism and edges


def often(*args):
    original = metrics.evaluate
    metrics.evaluate = lambda *a, **k: [original(*a, **k) for _ in range(3)][0]
    main(*args)


def test_seeds(tmp_path, command, whole, plain):
    assert run(often, *command, "--out", tmp_path / "often") == 0
    assert same(tmp_path / "often", whole)  # evaluations take no random number from training,
    assert not same(plain, whole)  # which has dropout
    assert run(main, *command, "--seed", 1, "--out", tmp_path / "other") == 0
    assert not same(tmp_path / "other", whole)


@pytest.mark.parametrize(
    "flags",
    [
        "--batch-size 100",
        "--limit 1",
        "--limit 5 --batch-size 1",
        "--epochs 1 --latent-dim 1",
        "--epochs 1 --max-length 2",
        "--epochs 0",
        "--epochs 0 --no-latent",
    ],
)
def test_edges_that_run(tmp_path, home, quiet, flags):
    init = ["--init", home / "phase0"] if "latent" in flags else []
    assert run(main, *quiet, *init, *flags.split(), "--out", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert np.isfinite(result["rec"])


def test_one_text_in_every_split(tmp_path, quiet):
    for split in data.SPLITS:
        (tmp_path / f"{split}.txt").write_text("the old king sells a red boat\n")
    assert run(main, *quiet, "--dataset", tmp_path, "--out", tmp_path / "run") == 0
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result["sentences"] == 1
    assert result["rec_se"] is None


def test_edges_that_are_refused(tmp_path, home, quiet, whole):
    """Each with one line that says what is wrong, and without a run folder."""
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    bare = shutil.copytree(whole / "model", tmp_path / "bare")
    (bare / "tokenizer_config.json").unlink()
    wide = shutil.copytree(whole / "model", tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"latent_dim": 4}))
    report, out = tmp_path / "report", tmp_path / "run"
    for flags, words in (
        (["--init", bert], "bert"),
        (["--init", bare], "without a tokenizer"),
        (["--init", wide, "--latent-dim", 4], "other weights than its config.json"),
        (["--init", whole, "--latent-dim", 4], "latent_dim is 4"),
    ):
        assert run(main, *quiet, *flags, "--out", out, report=report) == 1, flags
        assert words in report.read_text(), flags
        assert "Traceback" not in report.read_text(), flags
        assert not out.exists(), flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--amp fp8", "invalid choice: 'fp8'"),
        ("--kl-schedule cosine", "invalid choice: 'cosine'"),
        ("--save-every -1", "-1 is below 0"),
        ("--grad-accum 0", "0 is below 1"),
        ("--resume --overwrite", "leave one of them out"),
        ("--rezume", "unrecognized arguments"),
    ],
)
def test_flags_that_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--dataset", "grammar", *flags.split()])
    assert words in capsys.readouterr().err


def test_read_only_folder(tmp_path, quiet):
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write into a read-only folder")
    report = tmp_path / "report"
    assert run(main, *quiet, "--out", tmp_path / "locked" / "run", report=report) == 1
    assert "Permission denied" in report.read_text()
    assert "Traceback" not in report.read_text()
