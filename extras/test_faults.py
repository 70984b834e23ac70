"""Training never loses work: signals, full disks, damaged checkpoints, several processes, mistakes."""

# ruff: noqa: F811  # pytest hands fixtures over by name
import json
import math
import os
import random
import shutil
import signal
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from test_vae import (  # noqa: F401  # noqa: F401
    SHORT,
    TINY,
    command,
    cut,
    distance,
    end,
    home,
    log_records,
    main,
    plain,
    quiet,
    random_texts,
    same_log,
    same_run,
    saved_state,
    send,
    start,
    tiny_vae,
    train_run,
    weights,
    whole_run,
)


def test_killed_at_random(tmp_path, command, whole_run):
    kills, rng = int(os.environ.get("KILLS", 3)), random.Random(int(os.environ.get("SEED", 0)))
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
    assert train_run(main, *command, "--out", out, "--resume") == 0
    assert same_run(out, whole_run)
    assert same_log(out, whole_run)


def test_signals_save_and_leave(tmp_path, command, whole_run):
    for number, calls in (signal.SIGTERM, 7), (signal.SIGINT, 2):
        out, report = tmp_path / number.name, tmp_path / "report"
        flags = [*command, "--out", out]
        assert train_run(cut, calls, "gradient_step", partial(send, number), *flags, report=report) == 128 + number
        assert "--resume" in report.read_text()
        assert saved_state(out)["step"] == calls
        assert train_run(main, *flags, report=report) == 1, "an unfinished run is not overwritten unasked"
        assert report.read_text().count("\n") == 1
        assert train_run(main, *flags, "--resume") == 0
        assert same_run(out, whole_run)
        assert same_log(out, whole_run)


def test_a_log_that_is_ahead_of_its_checkpoint_is_cut(tmp_path, command, whole_run):
    """A checkpoint at step 1, a record at step 3, a crash in step 4; then a stop after step 2."""
    flags = [*command, "--out", tmp_path / "run", "--resume"]
    for calls, number in (1, signal.SIGTERM), (3, signal.SIGKILL), (1, signal.SIGTERM):
        code = 143 if number == signal.SIGTERM else -number
        assert train_run(cut, calls, "gradient_step", partial(send, number), *flags) == code
    assert saved_state(tmp_path / "run")["step"] == 2
    assert train_run(main, *flags) == 0
    assert same_log(tmp_path / "run", whole_run)


def test_what_a_finished_or_a_replaced_run_says(tmp_path, home, command):
    out, report = tmp_path / "run", tmp_path / "report"
    finished = [*command, "--out", out]
    assert train_run(main, *finished) == 0
    before = files_of(out)
    assert train_run(main, *finished, "--resume", "--lr", 0.1, report=report) == 1
    assert f"--resume needs the command of {out}: lr was 0.001, not 0.1" in report.read_text()
    assert train_run(main, *finished, "--resume", "--iw-samples", 5) == 0, "which changes nothing in training"
    assert files_of(out) == before
    shutil.copytree(out, tmp_path / "both" / "phase2")
    both = ["--dataset", home, *TINY, *SHORT, "--out", tmp_path / "both", "--resume"]
    assert train_run(main, *both, report=report) == 1, "its phase 1 is not there"
    assert "phase2 holds a run: --resume it (phase 1 first)" in report.read_text()
    assert (tmp_path / "both" / "phase2" / "metrics.json").exists()
    assert train_run(cut, 1, "train", partial(send, signal.SIGKILL), *finished, "--overwrite") == -signal.SIGKILL
    assert train_run(main, *command, "--init", out, "--out", tmp_path / "next", report=report) == 1
    assert "model.safetensors" in report.read_text(), "the old model is gone"


def test_ctrl_c_works_again_after_a_run_that_failed(tmp_path, home, command, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(train, "gradient_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*command, "--out", tmp_path / "run"])
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def stopped(home, command):
    """A run that was stopped after step 7."""
    out = home / "stopped"
    assert train_run(cut, 7, "gradient_step", partial(send, signal.SIGTERM), *command, "--out", out) == 143
    return out


def test_damaged_and_foreign_checkpoints_are_refused_in_one_line(tmp_path, command, stopped):
    report = tmp_path / "report"

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    def halve(path):
        os.truncate(path, path.stat().st_size // 2)

    for harm in halve, lambda path: torch.save(Bomb(), path), lambda path: path.write_bytes(b""):
        out = shutil.copytree(stopped, tmp_path / "run")
        harm(out / "checkpoint.pt")
        assert train_run(main, *command, "--out", out, "--resume", report=report) == 1
        assert "checkpoint.pt is damaged" in report.read_text()
        assert report.read_text().count("\n") == 1
        shutil.rmtree(out)
    assert not (tmp_path / "exploded").exists()
    out = shutil.copytree(stopped, tmp_path / "run")
    before = files_of(out)
    for flags, word in (["--lr", 0.1], "lr was 0.001"), (["--kl-target", 3], "kl_target was 0.2"):
        assert train_run(main, *command, *flags, "--out", out, "--resume", report=report) == 1
        assert word in report.read_text()
        assert files_of(out) == before
    config = json.loads((out / "config.json").read_text()) | {"of_another_version": 1}
    (out / "config.json").write_text(json.dumps(config))
    assert train_run(main, *command, "--out", out, "--resume", report=report) == 1
    assert "of_another_version was 1, not None" in report.read_text()


def files_of(out):
    return {path: path.read_bytes() for path in Path(out).rglob("*") if path.is_file()}


def test_full_disk(tmp_path, command, whole_run):
    """The fifth checkpoint finds no room: the fourth stays."""
    import resource

    command, report = [*command, "--out", tmp_path / "run", "--save-every", 0], tmp_path / "report"
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert train_run(cut, 5, "torch.save", full, *command, report=report) == 1
    assert saved_state(tmp_path / "run")["step"] == 4
    assert train_run(main, *command, "--resume") == 0
    assert same_run(tmp_path / "run", whole_run)


def test_not_a_number_ends_the_run_before_it_reaches_the_weights(tmp_path, command):
    report, out = tmp_path / "report", tmp_path / "run"
    assert train_run(poisoned, 7, *command, "--save-every", 0, "--out", out, report=report) == 1
    assert report.read_text().count("\n") == 1
    assert "texts [" in report.read_text()
    state = saved_state(out)
    assert state["step"] == 6
    assert all(tensor.isfinite().all() for tensor in state["objective"].values())


def poisoned(calls, *args, report):
    """main, in which the loss of step number `calls` is NaN."""
    forward, count = train.ELBO.forward, 0

    def counted(*args):
        nonlocal count
        count += 1
        terms = forward(*args)
        return terms | {"loss": terms["loss"] * math.nan} if count == calls else terms

    train.ELBO.forward = counted
    main(*args, report=report)


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


@pytest.mark.parametrize(("phase", "batch_size", "count"), [(1, 5, 2), (2, 5, 3), (2, 1, 2)])
def test_processes_give_the_same_result(tmp_path, home, phase, batch_size, count):
    """With 23 texts the last batch has 3; with one text per step the other process has nothing to do."""
    command = ["--dataset", home, "--phase", phase, "--init", home / "vae", *SHORT, "--lr-schedule", "linear"]
    command += ["--batch-size", batch_size] + (["--kl-target", 2] if phase == 2 else [])
    assert train_run(main, *command, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *command, "--out", tmp_path / "more")] * count) == [0] * count
    assert distance(tmp_path / "one", tmp_path / "more") < 1e-5
    assert distance(tmp_path / "one", home / "vae") > 1e-3, "the control: they were trained"
    for one, more in zip(log_records(tmp_path / "one"), log_records(tmp_path / "more"), strict=True):
        numbers = {name for name, value in one.items() if isinstance(value, int | float)}
        assert [more[name] for name in numbers] == pytest.approx([one[name] for name in numbers], rel=1e-3, abs=1e-4)


def test_language_model_in_two_processes(tmp_path, home):
    """Nothing that trains is left out of the loss: DistributedDataParallel would complain."""
    args = ["--dataset", home, *TINY, *SHORT, "--phase", 2, "--no-latent", "--out", tmp_path / "run"]
    assert run_all(*[(main, *args)] * 2) == [0, 0]


def test_evaluation_split_among_processes(tmp_path, quiet):
    flags = ["--epochs", 0, "--batch-size", 2]
    assert train_run(main, *quiet, *flags, "--out", tmp_path / "one") == 0
    assert run_all(*[(main, *quiet, *flags, "--out", tmp_path / "three")] * 3) == [0, 0, 0]
    one, three = (json.loads((tmp_path / out / "metrics.json").read_text()) for out in ("one", "three"))
    assert one == three
    assert one["rec"] != one["rec_prior"]


def test_a_signal_to_one_process_stops_all_at_the_same_step(tmp_path, quiet):
    args = [*quiet, "--out", tmp_path / "run"]
    codes = run_all((main, *args), (cut, 7, "gradient_step", partial(send, signal.SIGTERM), *args))
    assert codes == [143, 143]
    assert saved_state(tmp_path / "run")["step"] == 7
    assert run_all(*[(main, *args, "--resume")] * 2) == [0, 0]


def test_the_backend_reduces_on_the_gpu_and_on_the_cpu(monkeypatch):
    class Enough(Exception):
        pass

    def init(backend):
        raise Enough(backend)

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(train.distributed, "init_process_group", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for bf16, amp in (True, "bf16"), (False, "fp16"):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, b=bf16: b)
        flags = ["--dataset", "grammar", "--device", "cuda"]
        assert train.parse_args(train.make_parser(), flags).amp == amp
        with pytest.raises(Enough, match="^cpu:gloo,cuda:nccl$"):
            train.main(flags)
    with pytest.raises(Enough, match="^gloo$"):
        train.main(["--dataset", "grammar", "--device", "cpu"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--phase 1", "--dataset is missing"),
        ("--phase 0", "invalid choice: 0"),
        ("--dataset grammar --phase 2 1", "--phase is [2, 1]"),
        ("--dataset grammar --phase 1 1", "--phase is [1, 1]"),
        ("--dataset grammar --epochs 1 2 3", "--epochs has 3 values for 2 phases"),
        ("--dataset grammar --phase 1 --epochs 1 2", "--epochs has 2 values for 1 phases"),
        ("--dataset grammar --lr 1 1 1", "--lr has 3 values"),
        ("--dataset grammar --dropout 0 0 0.1", "--dropout has 3 values"),
        ("--dataset grammar --dropout 0 1", "1 is not in [0, 1)"),
        ("--dataset grammar --epochs -1", "-1 is not in [0, inf)"),
        ("--dataset grammar --epochs 1.5", "1.5"),
        ("--dataset grammar --lr inf", "inf is not in [0, inf)"),
        ("--dataset grammar --lr nan", "nan is not in"),
        ("--dataset grammar --lr=-1e-3", "-1e-3 is not in"),
        ("--dataset grammar --clip nan", "nan is not in"),
        ("--dataset grammar --adam-eps inf", "inf is not in"),
        ("--dataset grammar --denoise 1", "1 is not in [0, 1)"),
        ("--dataset grammar --denoise -0.1", "-0.1 is not in [0, 1)"),
        ("--dataset grammar --batch-size 0", "0 is not in [1, inf)"),
        ("--dataset grammar --max-length 1", "1 is not in [2, inf)"),
        ("--dataset grammar --limit 0", "0 is not in"),
        ("--dataset grammar --latent-dim 0", "0 is not in"),
        ("--dataset grammar --iw-samples 0", "0 is not in"),
        ("--dataset grammar --log-every 0", "0 is not in"),
        ("--dataset grammar --seed -1", "-1 is not in"),
        ("--dataset grammar --seed 9223372036854775808", "9223372036854775808 is not in [0, 9223372036854775808)"),
        ("--dataset grammar --save-every nan", "nan is not in"),
        ("--dataset grammar --kl-target -1", "-1 is not in"),
        ("--dataset grammar --kl-target 8 --kl-threshold 1", "--kl-target 8 takes no {'kl_threshold'}"),
        ("--dataset grammar --kl-target 8 --kl-schedule linear", "takes no {'kl_schedule'}"),
        ("--dataset grammar --kl-threshold inf", "inf is not in"),
        ("--dataset grammar --kl-schedule sine", "invalid choice: 'sine'"),
        ("--dataset grammar --kl-cycles 0", "0 is not in"),
        ("--dataset grammar --kl-anneal-epochs nan", "nan is not in"),
        ("--dataset grammar --pool sum", "invalid choice: 'sum'"),
        ("--dataset grammar --recipe worst", "invalid choice: 'worst'"),
        ("--dataset grammar --amp fp8", "invalid choice: 'fp8'"),
        ("--dataset grammar --optimizer adamw-rms --adam-eps 1e-8", "--adam-eps is a setting of --optimizer adamw"),
        ("--dataset grammar --recipe best --adam-eps 1e-8", "--adam-eps is a setting of --optimizer adamw"),
        ("--dataset grammar --d-model 30 --heads 4", "--d-model 30 is not a multiple of --heads 4"),
        ("--dataset grammar --no-latent", "--no-latent has no encoder to warm up"),
        ("--dataset grammar --resume --overwrite", "leave one out"),
        ("--dataset grammar --device cuda", "torch finds no GPU"),
        ("--dataset no/such/folder --model tiny", "no train.txt in"),
        ("--dataset no/such/folder --model no/such/t5 --phase 1", "no train.txt in"),
        ("--dataset grammar --model no/such/t5 --phase 1", "no/such/t5, which is neither a folder with a model"),
        ("--dataset grammar --phase 2", "runs/grammar/phase1, which is neither a folder with a model"),
        ("--dataset grammar --model tiny --vocab-size 3", "vocab_size is 3"),
        ("--dataset {home} --phase 2 --init {home}/vae --latent-dim 5", "latent_dim is 5, but"),
        ("--dataset {home} --phase 2 --init {home}/vae --pool mean", "pooling is 'mean', but"),
        ("--dataset {home} --phase 2 --init {home}/vae --pool-layers all", "pool_layers is 'all', but"),
        ("--dataset {home} --phase 2 --init {home}/vae --model t5-base", "model is 't5-base', but"),
        ("--dataset {home} --phase 2 --init {home}/vae --d-model 64", "d_model is 64, but"),
    ],
)
def test_mistakes_are_told_in_one_line(flags, words, home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        train.main(flags.format(home=home).split())
    said = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert words in said, said
    assert said.startswith("train.py: ")
    assert "\n" not in said
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_dropout_is_the_configurations_unless_it_is_given(home):
    def rates(*flags):
        """A set for each phase: the rates of its dropout layers and of its attention."""
        found = []

        def look(model):
            modules = list(model.modules())
            of_attention = {m.dropout for m in modules if isinstance(getattr(m, "dropout", None), float)}
            found.append(of_attention | {m.p for m in modules if isinstance(m, torch.nn.Dropout)})

        start = ["--dataset", home, "--init", home / "dropout", *SHORT, "--epochs", 0, "--overwrite"]
        train.main([*start, "--out", home / "rates", *flags], transform=look)
        return found

    assert rates("--phase", 2) == [{0.1}]
    assert rates("--phase", 2, "--dropout", 0.3) == [{0.3}]
    assert rates("--phase", 1, 2, "--dropout", 0.3) == [{0.3}, {0.3}]
    assert rates("--phase", 1, 2, "--dropout", 0, 0.3) == [{0.0}, {0.3}]


def test_no_dropout_comes_right_before_pooling():
    vae = tiny_vae(dropout_rate=0.5).train()
    ids, mask = random_texts(3, 9)
    assert not torch.equal(vae.encode(ids, mask)[0], vae.encode(ids, mask)[0]), "the control: dropout elsewhere"
    vae.t5.encoder.block.eval()
    assert torch.equal(vae.encode(ids, mask)[0], vae.encode(ids, mask)[0])


def test_phase_2_of_other_texts_is_refused_unless_init_names_its_start(tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for parent in "a", "b":
        shutil.copytree(home, tmp_path / parent / "x", ignore=lambda d, names: [n for n in names if "txt" not in n])
    flags = [*SHORT, "--epochs", 0]
    assert train_run(main, "--dataset", "a/x", "--phase", 1, *TINY, *flags) == 0
    report = tmp_path / "report"
    assert train_run(main, "--dataset", "b/x", "--phase", 2, *flags, report=report) == 1
    assert "dataset is 'b/x', but runs/x/phase1 was made with 'a/x'" in report.read_text()
    assert train_run(main, "--dataset", "b/x", "--phase", 2, "--init", "runs/x/phase1", *flags) == 0
    assert train_run(main, "--dataset", "a/x", "--phase", 2, *flags, "--overwrite") == 0
