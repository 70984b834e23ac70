"""Tests of the study: its commands, what it keeps, its tables and figures, and RESULTS.md."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import data
import metrics
import train
from extras import compare, pretrain
from extras.test_extras import home, one_thread, read_json
from study import plots, positions, refit, study, study_tables
from test_vae import EOS, ROOT, TINY, data_tokenizer, tiny_vae

# ---------------------------------------- commands


def settings(*flags):
    return study.parse_args(list(flags))


PAPERS = ("--model", "t5-small", "--deep", "t5-base", "--texts", "ptb", "snli", "yahoo", "yelp")


@pytest.mark.parametrize("flags", [(), PAPERS])
def test_commands_are_understood_and_stand_after_what_they_need(flags):
    args = settings(*flags, "--results", "nowhere", "--runs", "nowhere")
    jobs = study.commands_left(study.study_jobs(args))
    assert len(jobs) > 100
    outs = [str(job.out) for job in jobs]
    assert len(set(outs)) == len(outs)
    for i, job in enumerate(jobs):
        assert job.needs is None or str(job.needs.out) in outs[:i]
        *_, script = [word for word in job.command if word in ("train.py", "extras.pretrain")]
        if script == "train.py":
            parsed, (phase,) = train.parse(job.command[1:])
            assert train.run_folder(parsed, phase) == job.out
            assert parsed.limit is None or not args.model
            if parsed.init and job.needs:
                assert Path(parsed.init).is_relative_to(job.needs.out)
        else:
            assert str(job.out) == pretrain.parse_args(job.command[2:]).out
    with pytest.raises(SystemExit):
        train.parse([*jobs[-1].command[1:], "--no-such-flag"])


def test_rows_of_a_random_start_are_not_repeated_where_all_start_from_it():
    args = settings("--texts", "grammar", "captions", "--results", "nowhere")
    rows = {str(job.result) for job in study.study_jobs(args)}
    assert "nowhere/captions/r8-random/0" in rows
    assert not any(row.startswith("nowhere/grammar/") and "random" in row for row in rows)
    assert {f"nowhere/grammar/r8/{seed}" for seed in range(3)} <= rows
    assert "nowhere/captions/r8/2" not in rows


@pytest.mark.parametrize("text", ["captions", "captions-all"])
def test_any_row_can_be_remade_with_another_seed(text):
    flags = ["--texts", text, "--rows", "r16", "r8", "r4", "--results", "nowhere"]
    rows = ["r16"] if text == "captions-all" else ["r8", "r16", "r4"]
    for seeds in 1, 2, 5:
        jobs = study.study_jobs(settings(*flags, "--seeds", str(seeds)))
        found = [job.result.parts[2:] for job in jobs]
        assert found == [(row, str(seed)) for seed in range(seeds) for row in rows]
    for seed in "0", "7":
        jobs = study.study_jobs(settings(*flags, "--seed", seed))
        assert [job.result.parts[2:] for job in jobs] == [(row, seed) for row in rows]
        for job in jobs:
            assert job.command[job.command.index("--seed") + 1] == seed


def test_two_models_share_no_folder():
    models = "a/b", "a-b", "a/b.1", "a/b-1", "x/a/b"
    found = [settings("--model", model) for model in models]
    for folders in {args.results for args in found}, {args.runs for args in found}:
        assert len(folders) == len(models)
        assert all(".." not in folder for folder in folders)


def test_a_run_of_another_t5_is_no_row(tmp_path):
    """Neither a result, nor a phase 1, on the same text."""
    text = ["--model", "t5-small", "--texts", "ptb", "--rows", "paper-deep", "--list"]
    text += ["--results", str(tmp_path), "--runs", str(tmp_path)]
    for place in "paper-deep/0", "deletion0.4-deep/0/phase1":
        config = tmp_path / "t5-small" / "ptb" / place / "config.json"
        config.parent.mkdir(parents=True)
        data.write_json(config, {"model": "t5-base"})
        study.main([*text, "--deep", "t5-base"])
        with pytest.raises(SystemExit, match=f"{place} is of t5-base, not of t5-large"):
            study.main([*text, "--deep", "t5-large"])
        config.unlink()


def test_a_run_of_other_texts_is_no_row(tmp_path, home, data_tokenizer):
    """Neither a result, nor a phase 1, of the same name."""
    shutil.copytree(home, tmp_path / "data" / "captions", ignore=shutil.ignore_patterns("*/"))
    text = ["--texts", "captions", "--rows", "r8", "--list", "--data-dir", str(tmp_path / "data")]
    text += ["--results", str(tmp_path), "--runs", str(tmp_path)]
    now = study.checksums(str(tmp_path / "data" / "captions"), "data")
    for split in data.SPLITS:
        assert now[split] == data.load_corpus(str(home), split, data_tokenizer).sha256
    for place in "r8/0", "autoencoder/0/phase1":
        config = tmp_path / "captions" / place / "config.json"
        config.parent.mkdir(parents=True)
        data.write_json(config, {"data_sha256": now})
        study.main(text)
        data.write_json(config, {"data_sha256": now | {"train": "of others"}})
        with pytest.raises(SystemExit, match=f"{place} is not of the texts that .*captions has"):
            study.main(text)
        study.main([*text[:-6], "--data-dir", "nowhere", *text[-4:]])  # they may be elsewhere
        config.unlink()
    assert study.checksums("ptb", str(tmp_path)) is None, "--list fetches nothing"


def test_a_language_model_has_the_learning_rate_of_its_text():
    jobs = study.study_jobs(settings("--texts", "ptb", "captions", "--results", "nowhere"))
    rates = {}
    for job in jobs:
        text, row = job.result.parts[1:3]
        if row in ("lm", "lm-random", "r8", "r8-random"):
            rates[f"{text}/{row}"] = job.command[job.command.index("--lr") + 1]
    assert {name for name, rate in rates.items() if rate == "5e-3"} == {"ptb/lm"}
    assert len(rates) == 8
    assert set(rates.values()) == {"5e-3", "2e-2"}


def test_a_text_may_have_rows_and_epochs_of_its_own():
    jobs = study.study_jobs(settings("--texts", "captions-all", "--results", "nowhere"))
    epochs = {}
    for job in jobs:
        while job and "train.py" in job.command:
            epochs[str(job.out)] = job.command[job.command.index("--epochs") + 1]
            job = job.needs
    home = "runs/study/captions-all"
    assert epochs == {
        f"{home}/lm/0/lm": "5",
        f"{home}/autoencoder/0/phase1": "2",
        f"{home}/r16/0/phase2": "3",
    }


def test_mistakes_are_refused(capsys):
    for flags, words in (
        (["--texts", "captoins"], "--texts has 'captoins'"),
        (["--model", "t5-small", "--texts", "grammar"], "--texts has 'grammar'"),
        (["--model", "t5-small", "--texts", ".."], "--texts has '..'"),
        (["--model", ".."], "--model is '..'"),
        (["--model", "t5-small", "--deep", ""], "--deep is ''"),
        (["--deep", "t5-base"], "--deep is t5-base; it needs --model"),
        (["--rows", "r5"], "r5"),
        (["--tables", "--rows", "r8"], "--tables prints all"),
        (["--tables", "--seed", "0"], "--tables prints all"),
        (["--tables", "--data-dir", "texts"], "--tables prints all"),
        (["--seed", "0", "--seeds", "2"], "not allowed with"),
        (["--seed", "-1"], "--seed"),
        (["--seed", "4294967296"], "--seed"),
    ):
        with pytest.raises(SystemExit):
            settings(*flags)
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--rows r8: no text of --texts has such a row"):
        study.main(["--rows", "lm", "r8", "--texts", "captions-all"])


# ---------------------------------------- runs


@pytest.fixture(scope="module")
def tiny_t5(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("t5")
    shape = ["--d-model", 16, "--layers", 1, "--heads", 2, "--vocab-size", 60, "--steps", 0]
    pretrain.main(["--dataset", home, *shape, "--out", out / "t5", "--device", "cpu"])
    return out / "t5" / "model"


def test_runs_what_is_missing_and_keeps_what_tables_need(home, tiny_t5, tmp_path, capsys):
    results, runs = tmp_path / "results", tmp_path / "runs"
    flags = ["--model", str(tiny_t5), "--texts", home.name, "--data-dir", str(home.parent)]
    flags += ["--results", str(results), "--runs", str(runs), "--rows", "lm", "r4", "--jobs", "2"]
    name = str(tiny_t5).strip("/").replace("/", "--")
    kept, folder = results / name / home.name, runs / name / home.name
    blocked = folder / "r4" / "0" / "phase2"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("where a folder should be")
    with pytest.raises(SystemExit, match="commands that failed: 1"):
        study.main(flags)
    assert re.search(r"FAILED, see .*: .*r4/0/phase2", capsys.readouterr().out)
    assert not (kept / "r4").exists()
    blocked.unlink()

    study.main(flags)  # the language model and phase 1 are not run again
    out = capsys.readouterr().out
    assert "r4" in out
    assert "--no-latent" not in out
    assert "--phase 1" not in out
    config = read_json(kept / "r4" / "0", "config.json")
    assert {"machine", "commit", "minutes"} <= config.keys()
    assert len(config["phase1_kl"]) == 4
    files = {path.name for path in (kept / "r4" / "0").iterdir()}
    assert files == {"config.json", "metrics.json"}
    expected = compare.compare(folder / "lm" / "0" / "lm", folder / "r4" / "0" / "phase2")
    assert read_json(kept, "paired.json")["r4/0 - lm/0"]["nll"] == list(expected["nll"])
    study.write_pairs(study.parse_args([*flags, "--results", str(tmp_path / "new")]))
    assert read_json(tmp_path / "new" / name / home.name, "paired.json").keys() == {"r4/0 - lm/0"}
    (folder / "lm" / "0" / "lm" / "sentences.npz").write_bytes(b"")
    study.main(flags)  # what cannot be compared stops nothing
    out, err = capsys.readouterr()
    assert "0 of 3 rows are missing" in out  # lm has two seeds
    assert re.search("not compared: .*sentences.npz is damaged", err)
    old = read_json(kept, "paired.json") | {"cold/0 - r4/0": {}, "lm-gone/1 - lm/1": {}}
    data.write_json(kept / "paired.json", old)
    study.main(flags)
    assert read_json(kept, "paired.json").keys() == {"r4/0 - lm/0"}, "no pair of an earlier study"

    shutil.rmtree(kept / "r4")  # made again, where the other run of the pair is not there
    shutil.rmtree(folder / "r4")
    (folder / "lm").rename(tmp_path / "gone")
    fcntl = pytest.importorskip("fcntl")
    log = runs / name / "logs" / f"{home.name}-r4-0-phase2.txt"
    with open(log, "a") as file:  # a run whose study was killed
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="commands that failed: 1"):
            study.main(flags)
    assert "another process writes there" in capsys.readouterr().out
    assert not (folder / "r4").exists()
    study.main(flags)
    assert (kept / "r4" / "0" / "metrics.json").exists()
    assert not (kept / "paired.json").exists(), "an old difference would not be this run's"


def test_positions_sum_up_to_rec_and_show_a_z_that_is_ignored():
    model = tiny_vae()
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 14, 9)
    ids = rng.integers(3, 64, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids[offsets[1:] - 1] = EOS
    corpus = data.Corpus(ids, offsets, lengths, "word", truncated=0, unknown=0, pad_id=0)
    rows = positions.by_position(model, corpus)
    assert sum(row["tokens"] for row in rows) == corpus.ids.size
    columns = metrics.measure(model, corpus, thorough=True)
    for key in "rec", "rec_other":
        total = sum(row["tokens"] * row[key] for row in rows)
        assert total == pytest.approx(columns[key].sum().item(), rel=1e-5)
    explained = [row["rec_other"] - row["rec"] for row in rows]
    with torch.no_grad():
        model.w_proj.weight.zero_()
    ignored = positions.by_position(model, corpus)
    assert max(abs(row["rec_other"] - row["rec"]) for row in ignored) < 1e-6 < max(explained)


def test_a_refitted_encoder_has_a_lower_bound(home, tmp_path, monkeypatch, capsys):
    flags = [*TINY, "--batch-size", 5, "--epochs", 1, "--iw-samples", 2, "--device", "cpu"]
    train.main(["--dataset", home, *flags, "--out", tmp_path])
    capsys.readouterr()
    monkeypatch.setattr(refit, "CHECK_EVERY", 5)
    monkeypatch.setattr(refit, "RATE", 1e-2)
    out = tmp_path / "results" / "text" / "row" / "0" / "refit.json"
    out.parent.mkdir(parents=True)
    with pytest.raises(SystemExit, match=f"--out is {out.parent}, a folder"):
        refit.main([str(tmp_path / "phase2"), "--out", str(out.parent)])
    refit.main([str(tmp_path / "phase2"), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    bounds = [float(line.split()[-1]) for line in lines if line.startswith("step")]
    assert min(bounds) < bounds[0]
    assert [line.split()[0] for line in lines[-6:]] == list(refit.ROWS)
    printed = [line.split()[1:] for line in lines[-6:-1]]  # "12.34±0.56", three times
    kept = [", ".join(cell.split("\u00b1")[0] for cell in cells) for cells in printed]
    last = study_tables.refit_table(tmp_path / "results").splitlines()[-1]
    assert last == "| " + " | ".join(["text: row", *kept]) + " |"


# ---------------------------------------- tables


def write_row(results, text, row, seed=0, **measures):
    """A run of the study with these numbers, all invented."""
    folder = results / text / row / str(seed)
    folder.mkdir(parents=True)
    measures = {"latent_dim": 32, "au": 32, "kl": 8.0, "rec": 90.0} | measures
    data.write_json(folder / "metrics.json", measures)
    phase1_kl = [0, 50.0, 90.0, 100.0, 101.0]
    data.write_json(folder / "config.json", {"command": "", "phase1_kl": phase1_kl})


def verdict(results, text, *claim):
    """That on a claim (measure, a, expected, b) in a text."""
    claim = study_tables.Claim("", *claim)
    return study_tables.verdict(claim, *study_tables.read(results), text)


def test_damaged_results_are_named(tmp_path):
    write_row(tmp_path, "ptb", "lm", rec=100.0, latent_dim=0)
    study_tables.tables(tmp_path)
    for name in "metrics.json", "config.json":
        path = tmp_path / "ptb" / "lm" / "0" / name
        whole = path.read_text()
        for text in whole[:9], "[]", "{}":
            path.write_text(text)
            with pytest.raises(SystemExit, match=f"study.py: .*{name} is damaged"):
                study.main(["--tables", "--results", str(tmp_path)])
        path.write_text(whole)
    write_row(tmp_path, "ptb", "r4", "0.bak")
    with pytest.raises(SystemExit, match=r"r4/0.bak is no seed"):
        study.main(["--tables", "--results", str(tmp_path)])
    shutil.rmtree(tmp_path / "ptb" / "r4")
    data.write_json(
        tmp_path / "ptb" / "lm" / "0" / "config.json", {"command": "", "data_sha256": 1}
    )
    write_row(tmp_path, "ptb", "r4")
    with pytest.raises(SystemExit, match=r"r4/0 is of other texts than the first row of ptb"):
        study.main(["--tables", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no folder"):
        study.main(["--tables", "--results", str(tmp_path / "none")])
    (tmp_path / "none").mkdir()
    with pytest.raises(SystemExit, match="none has no rows"):
        study.main(["--tables", "--results", str(tmp_path / "none")])


def test_tables_say_what_the_results_hold(tmp_path):
    for seed in range(2):
        write_row(tmp_path, "ptb", "lm", seed, rec=100.0, nll=100.0, latent_dim=0)
    at_1 = {"kl_posterior": 6.0, "kl_posterior_se": 0.02, "neg_elbo_untempered": 102.0}
    write_row(tmp_path, "ptb", "r16", kl=9.0, **at_1)
    measures = {"kl": 50.0, "neg_elbo": 130.0, "nll": 109.0, "iw_ess": 3.52, **at_1}
    write_row(tmp_path, "ptb", "paper-max", **measures)
    write_row(tmp_path, "ptb", "lm-paper", nll=107.0, latent_dim=0)
    write_row(tmp_path, "ptb", "lm-deep", rec=90.0, nll=90.0, latent_dim=0)
    write_row(tmp_path, "ptb", "paper-deep", kl=50.0, nll=91.0, **at_1)
    for seed, nll in enumerate((101.0, 103.0)):
        measures = {"kl": 8.0 + seed / 50, "kl_se": 0.04, **at_1}
        write_row(tmp_path, "ptb", "r8", seed, nll=nll, nll_se=0.5, **measures)
    pairs = {f"r8/{seed} - lm/{seed}": {"nll": [1.0 + 2 * seed, 0.1]} for seed in range(2)}
    pairs["paper-max/0 - lm-paper/0"] = {"nll": [2.0, 0.25]}
    data.write_json(tmp_path / "ptb" / "paired.json", pairs)
    lines = study_tables.tables(tmp_path)["systems"].splitlines()
    cells = [line.split(" | ") for line in lines[2:]]
    names = ["paper-max", "paper-deep", "r8, 2 seeds", "r16"]
    assert [line[0].removeprefix("| ptb: ") for line in cells] == names
    of = dict(zip(names, cells, strict=True))
    of_z = "+9.00, +2.00±0.25"  # beside lm and lm-paper
    assert of["paper-max"][1:5] == ["50.00, 6.00±0.02", "3.5", "130.00, 102.00", of_z]
    assert of["paper-max"][-1] == "0.09, 1.00 |", "the paper's, in units of its Max pool"
    assert of["paper-deep"][4] == "+1.00", "beside the language model of as many layers"
    # Several seeds: the mean, and the standard deviation over them, if it is the larger error.
    assert of["r8, 2 seeds"][1] == "8.01±0.04, 6.00±0.02"
    assert of["r8, 2 seeds"][4] == "+2.00±1.41"
    first = study_tables.tables(tmp_path)["summary"].splitlines()
    assert first[0] == "| price, carried of paid | ptb |"
    assert first[2:5] == [
        "| lm | NLL 100.00±0.00 |",
        "| lm-paper | +7.00 |",
        "| lm-deep | -10.00 |",
    ]
    assert first[5:] == ["| r8 | +2.00, 6.00 of 8.01 |", "| paper-max | +9.00, 6.00 of 50.00 |"]


def test_frozen_or_reset(tmp_path):
    """Only where both rows are, with the error of the paired difference."""
    at_1 = {"kl_posterior": 6.0, "nll": 100.0, "swap_cost": 20.0}
    for text in "ptb", "answers":
        write_row(tmp_path, text, "paper-default", **at_1 | {"kl": 41.0, "nll": 101.5})
    write_row(tmp_path, "answers", "unfrozen-reset", **at_1 | {"kl": 40.0})
    pairs = {"paper-default/0 - unfrozen-reset/0": {"nll": [1.5, 0.25], "kl": [1.0, 0.5]}}
    data.write_json(tmp_path / "answers" / "paired.json", pairs)
    rows = study_tables.tables(tmp_path)["frozen"].splitlines()[2:]
    assert rows == ["| answers | +1.50±0.25 | +0.00 | +0.00 | +1.00±0.50 |"]
    assert study_tables.FROZEN_OR_RESET in study_tables.pairs([])


@pytest.mark.parametrize(
    ("change", "said"),
    [([2.0], "no"), ([-2.0], "yes"), ([0.15], "unclear"), ([-0.15], "unclear"), ([], "?")]
    + [([2.0, 3.0], "no"), ([2.0, 0.15], "unclear"), ([2.0, -2.0], "unclear")]
    + [([-2.0, -3.0, -4.0, -0.1], "unclear"), ([None], "?")],
)
def test_verdicts_follow_the_paired_difference(tmp_path, change, said):
    for seed, mean in enumerate(change or [2.0]):
        write_row(tmp_path, "answers", "cold", seed, swap_cost=5.0 + (mean or 9.0))
        write_row(tmp_path, "answers", "no-threshold", seed, swap_cost=5.0)
    write_row(tmp_path, "answers", "no-threshold", 8, swap_cost=5.0)
    write_row(tmp_path, "ptb", "cold", swap_cost=5.0)
    pairs = {
        f"cold/{seed} - no-threshold/{seed}": {"swap_cost": [mean or 9.0, mean and 0.1]}
        for seed, mean in enumerate(change)
    }
    data.write_json(tmp_path / "answers" / "paired.json", pairs or {"lm/0 - lm/0": {}})
    claim = "swap_cost", "cold", "<", "no-threshold"
    mean = np.mean([mean or 9.0 for mean in change or [2.0]])
    assert verdict(tmp_path, "answers", *claim) == f"{said}: {5 + mean:.2f}, 5.00"
    assert verdict(tmp_path, "ptb", *claim) == "-"


@pytest.mark.parametrize(("apart", "said"), [(1.9, "yes"), (2.1, "unclear")])
@pytest.mark.parametrize(
    ("text", "row"), [("ptb", "mean"), ("ptb", "paper-default"), ("grammar", "paper-default")]
)
def test_a_verdict_needs_more_than_the_difference_of_two_seeds(tmp_path, text, row, apart, said):
    """Of one of the rows, else of `paper-default`: the errors over sentences lack it."""
    write_row(tmp_path, "ptb", "last", swap_cost=5.0)
    if row != "mean":
        write_row(tmp_path, "ptb", "mean", swap_cost=3.0)
    for seed, value in enumerate((3.0, 3.0 - apart)):
        write_row(tmp_path, text, row, seed, swap_cost=value)
    pairs = {"last/0 - mean/0": {"swap_cost": [2.0, 0.1]}}
    data.write_json(tmp_path / "ptb" / "paired.json", pairs)
    assert verdict(tmp_path, "ptb", "swap_cost", "last", ">", "mean") == f"{said}: 5.00, 3.00"


def test_a_verdict_needs_every_seed(tmp_path):
    for seed, (a, b) in enumerate([(7.0, 5.0), (6.0, 5.9)]):
        write_row(tmp_path, "ptb", "last", seed, swap_cost=a)
        write_row(tmp_path, "ptb", "mean", seed, swap_cost=b)
    for error, said in (0.1, "unclear"), (0.04, "yes"):
        pairs = {"last/0 - mean/0": {"swap_cost": [2.0, error]}}  # seed 1 was run elsewhere
        data.write_json(tmp_path / "ptb" / "paired.json", pairs)
        assert verdict(tmp_path, "ptb", "swap_cost", "last", ">", "mean") == f"{said}: 6.50, 5.45"


@pytest.mark.parametrize(("cost", "lost", "kept"), [(0.9, "yes", "no"), (1.1, "no", "yes")])
def test_a_claim_of_one_row_shows_its_swap_cost_and_kl(tmp_path, cost, lost, kept):
    write_row(tmp_path, "ptb", "cold", swap_cost=cost, kl=7.0)
    assert verdict(tmp_path, "ptb", "swap_cost", "cold", ">") == f"{kept}: {cost:.2f}, 7.00"
    table = study_tables.tables(tmp_path)["claims"]
    assert f"| `swap_cost`: cold < 1 nat; `kl` | {lost}: {cost:.2f}, 7.00 |" in table


@pytest.mark.parametrize(("au", "same", "fewer"), [(64, "yes", "no"), (62, "no", "yes")])
def test_claims_of_active_dimensions_compare_shares(tmp_path, au, same, fewer):
    write_row(tmp_path, "ptb", "paper-default")  # 32 of 32
    write_row(tmp_path, "ptb", "z64", latent_dim=64, au=au)
    for expected, said in ("=", same), ("<", fewer):
        found = verdict(tmp_path, "ptb", "active", "z64", expected, "paper-default")
        assert found == f"{said}: {au / 64:.2f}, 1.00"


def test_claims_and_pairs_name_rows_of_the_study():
    rows = {row.name for row in study.ROWS}
    for a, b in study_tables.pairs(rows):
        assert {a, b} <= rows
    assert {*study_tables.SYSTEMS, *study_tables.SHOWN} - rows == {"r32"}, "of docs/own-text.md"


# ---------------------------------------- figures


@pytest.fixture
def results(tmp_path):
    """captions: all is there; ptb: a row without the KL of the posterior, one that is not drawn, an
    empty folder; answers: no language model."""
    for seed, rec in enumerate((50.0, 50.2)):
        write_row(tmp_path, "captions", "lm", seed, rec=rec, nll=rec)
    for seed, nll in enumerate((50.3, 49.7)):
        write_row(tmp_path, "captions", "r8", seed, kl_posterior=6.0, nll=nll)
    write_row(tmp_path, "captions", "paper-deep", kl=99.0, kl_posterior=12.0, nll=90.0)
    pairs = {"r8/1 - lm/1": {"nll": [-0.5, 0.01]}}
    data.write_json(tmp_path / "captions" / "paired.json", pairs)
    write_row(tmp_path, "ptb", "lm", rec=110.0, nll=110.0)
    write_row(tmp_path, "ptb", "optimus", kl=2.0, kl_posterior=1.0, nll=108.0)
    write_row(tmp_path, "ptb", "linear", kl=170.0, nll=120.0)
    write_row(tmp_path, "ptb", "z128", kl_posterior=7.0, nll=111.0)
    write_row(tmp_path, "ptb", "lm-paper", latent_dim=0, rec=112.0, nll=112.0)
    (tmp_path / "ptb" / "r16" / "0").mkdir(parents=True)
    write_row(tmp_path, "answers", "r4", kl_posterior=4.0, nll=333.0)
    return tmp_path


def draw(results):
    return plots.draw_price(*study_tables.read(results))


def bars(axes):
    """{row/seed: (nats that z carries, gap, standard error)} of the points of a panel."""
    found = {}
    for bar in axes.containers:
        (carried,), (gap,) = bar.lines[0].get_data()
        (((_, low), (_, high)),) = bar.lines[2][0].get_segments()
        found[bar.get_label()] = carried, gap, (high - low) / 2
    return found


def test_the_price_is_nll_above_the_language_model(results):
    captions, ptb = draw(results).axes
    assert captions.get_title() == "captions: language model 50.10 nats", "the mean over seeds"
    points = bars(captions)
    assert points.pop("r8/1") == pytest.approx((6, -0.5, 0.01)), "beside the same seed"
    assert points.pop("r8/0") == pytest.approx((6, 0.3, 0))
    assert not points
    assert bars(ptb) == {"optimus/0": pytest.approx((1, -2, 0))}
    paid = [tuple(line.get_xdata()) for line in captions.get_lines() if line.get_alpha() == 0.6]
    assert paid == [(6, 8), (6, 8)], "from what z carries to what the encoder pays"
    dotted = [line.get_ydata()[0] for line in ptb.get_lines() if line.get_linestyle() == ":"]
    assert dotted == [2.0], "the paper's language model"
    for axes in captions, ptb:
        (low, high), (left, right) = axes.get_ylim(), axes.get_xlim()
        assert low < -2.5 < 0.8 < high, "below zero is seen"
        assert left < 0 < 8 < right
        assert [tick for tick in axes.get_yticks() if tick <= 0], "zero has its place on the axis"


def test_a_deep_row_is_compared_with_a_deep_language_model(results):
    assert "paper-deep/0" not in bars(draw(results).axes[0])
    write_row(results, "captions", "lm-deep", rec=45.0, nll=45.0)
    assert bars(draw(results).axes[0])["paper-deep/0"] == pytest.approx((12, 45, 0))


def test_names_cover_nothing(results):
    for target in range(8):
        z = {"kl": 9.0 + target, "kl_posterior": 8.0 + target / 50}
        write_row(results, "captions", f"r{target}", **z, nll=51.0)
    axes = draw(results).axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 4
    for i, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[i + 1 :])
        points = axes.transData.transform([point[:2] for point in bars(axes).values()])
        assert not any(box.contains(*point) for point in points)


def test_figures_are_written_and_mistakes_are_one_line(results, tmp_path):
    out = tmp_path / "price.png"
    plots.main(["price", "--results", str(results), "--out", str(out)])
    assert matplotlib.image.imread(out).std() > 0
    for folder, said in ("no/such", "there is no folder"), (results / "ptb", "no text has a lang"):
        with pytest.raises(SystemExit, match=f"^plots.py: .*{said}"):
            plots.main(["price", "--out", "x.png", "--results", str(folder)])
    with pytest.raises(SystemExit):
        plots.main(["price", "--out", "x.nothing"])


# ---------------------------------------- RESULTS.md

RESULTS = ROOT / "study" / "results"
TEXT = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
TABLES = study_tables.tables(RESULTS)
NOT_OF_THE_STUDY = {"1.9"}  # numbers in RESULTS.md of no row: parameters


def missing(text):
    """The names of the tables that a text does not show as results/ has them."""
    return [name for name, table in TABLES.items() if table not in text]


def test_tables_are_what_the_runs_measured():
    assert {"summary", "systems", "refit", "claims", "frozen", "positions"} <= TABLES.keys()
    assert missing(TEXT) == []


def test_a_wrong_digit_is_found():
    for name, table in TABLES.items():
        at = TEXT.index(table) + re.search(r"\d\.\d", table).start()
        wrong = TEXT[:at] + str((int(TEXT[at]) + 1) % 10) + TEXT[at + 1 :]
        assert missing(wrong) == [name]


def strangers(prose):
    """The numbers with decimals in a text that no table has, with these digits or more."""
    number = r"(?<![\d.])\d+\.\d+(?![\d.])"
    measured = set(re.findall(number, "\n".join(TABLES.values()))) | {f"{data.GRAMMAR_ENTROPY:.2f}"}
    measured |= {f"{float(value):.{digits}f}" for value in measured for digits in (1, 2)}
    return set(re.findall(number, prose)) - measured - NOT_OF_THE_STUDY


def test_numbers_in_prose_stand_in_a_table():
    prose = re.sub(r"`.*?`|\(https:.*?\)|^\|.*", "", TEXT, flags=re.M)
    assert strangers(prose) == set()
    assert {value for value in NOT_OF_THE_STUDY if value not in prose} == set()
    found = strangers("9876.5 nats, 9876.543±9876.54, section 9.8.7")
    assert found == {"9876.5", "9876.543", "9876.54"}, "the control"


def test_measures_in_the_docs_are_those_of_stored_runs():
    """Two decimals and an error of two: a measure. (Those of probes have one decimal.)"""
    measures, shown = r"[+-]?\d+\.\d\d±\d+\.\d\d", "\n".join(TABLES.values())
    for name, at_least in ("README.md", 3), ("docs/use-z.md", 12), ("docs/own-text.md", 6):
        found = re.findall(measures, (ROOT / name).read_text(encoding="utf-8"))
        assert len(found) >= at_least, name
        assert [value for value in found if value not in shown] == [], name


def stale_pairs(runs, paired):
    """The paired differences that are not those of the two rows' measures."""
    found = []
    for text, pairs in paired.items():
        for pair, measures in pairs.items():
            names = [name.split("/") for name in pair.split(" - ")]
            a, b = (runs[text].get(row, {}).get(seed, {}) for row, seed in names)
            for key, (mean, _) in measures.items():
                if key in a and key in b and abs(a[key] - b[key] - mean) > 1e-4:
                    found.append((text, pair, key))
            if not a or not b:
                found.append((text, pair, "no row"))
    return found


def test_paired_differences_are_those_of_the_rows():
    runs, paired = study_tables.read(RESULTS)
    assert stale_pairs(runs, paired) == []
    paired["grammar"]["r8/0 - lm/0"]["rec"][0] += 0.001
    paired["grammar"]["r9/0 - lm/0"] = {}
    found = [("grammar", "r8/0 - lm/0", "rec"), ("grammar", "r9/0 - lm/0", "no row")]
    assert stale_pairs(runs, paired) == found, "the control"


def in_summary(text):
    """The rows that have a number in the first table, in the column of a text."""
    heads, _, *lines = [line.split(" | ") for line in TABLES["summary"].splitlines()]
    column = [head.strip(" |") for head in heads].index(text)
    return {line[0].strip(" |") for line in lines if line[column].strip(" |") != "-"}


def hidden_rows(runs, paired):
    """The (text, row) that stand in no table."""
    shown = "\n".join(TABLES.values())
    hidden = []
    for text, rows in runs.items():
        elsewhere = set()
        if "lm" in rows:
            elsewhere |= in_summary(text)
        if f"\n| {text} | " in TABLES["frozen"]:
            elsewhere |= set(study_tables.FROZEN_OR_RESET)
        for claim in study_tables.CLAIMS:
            if study_tables.verdict(claim, runs, paired, text) != "-":
                elsewhere |= {claim.a, claim.b}
        for row in rows.keys() - elsewhere:
            if not re.search(rf"\| {text}: {row}( \||, \d seeds)", shown):
                hidden.append((text, row))
    return hidden


def test_results_are_two_pages_and_hold_no_row_that_is_not_shown():
    assert TEXT.count("\n") <= 160
    assert hidden_rows(*study_tables.read(RESULTS)) == []
    assert hidden_rows({"ptb": {"constant": {}}}, {}) == [("ptb", "constant")]
    no_cell = {"captions-all": {"lm": {}, "r4": {}}}
    assert hidden_rows(no_cell, {}) == [("captions-all", "r4")]
    assert hidden_rows({"ptb": {"lm-paper": {}}}, {}) == [("ptb", "lm-paper")], "beside no lm"


def test_curves_show_the_log_and_mark_the_end(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    valid = [{"step": i, "split": "valid", "rec": 9.0, "kl": i, "neg_elbo": 9.0} for i in (0, 5)]
    records = [*valid, {"step": 3, "split": "train", "kl_weight": 0.5, "rec": 1.0}]
    log = "".join(json.dumps(record) + "\n" for record in records)
    (run / "log.jsonl").write_text(log + '{"step": 7, "spl')  # a line that is being written
    data.write_json(run / "metrics.json", {"kl_posterior": 2.5, "nll": 8.0})
    _, kl, weight, bound = plots.draw_curves([str(run)]).axes
    line, mark = kl.lines
    assert line.get_ydata().tolist() == [0, 5]
    assert (mark.get_xdata().item(), mark.get_ydata().item()) == (5, 2.5)
    assert weight.lines[0].get_ydata().tolist() == [0.5]
    assert weight.lines[0].get_marker() == "o", "a line of one point is nothing"
    assert bound.lines[1].get_ydata().item() == 8.0
    ticks = [text.get_text() for text in kl.get_yticklabels()]
    assert {"1", "2", "5"} <= set(ticks), "more than powers of ten, as plain numbers"
    assert (kl.get_yscale(), bound.get_yscale()) == ("symlog", "linear")
    plots.main(["curves", str(run), "--out", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").stat().st_size > 1000
    for odd in "_run", "a$b^$":
        plots.main(["curves", str(run.rename(tmp_path / odd)), "--out", str(tmp_path / "c.png")])
        run = tmp_path / odd
    (run / "log.jsonl").write_text('{"step":\n' + log)
    with pytest.raises(SystemExit, match=r"log.jsonl is damaged"):
        plots.main(["curves", str(run), "--out", str(tmp_path / "c.png")])
    (run / "log.jsonl").write_text('{"step": 0, "split": "valid", "nats_per_target": 9.0}\n')
    with pytest.raises(SystemExit, match="has no rec and KL to draw"):  # a pretraining
        plots.main(["curves", str(run), "--out", str(tmp_path / "curves.png")])
    with pytest.raises(SystemExit, match="has no log.jsonl"):
        plots.main(["curves", str(tmp_path), "--out", str(tmp_path / "curves.png")])
    for wrong in ["curves"], ["price", str(run)]:
        with pytest.raises(SystemExit):
            plots.main([*wrong, "--out", "a.png"])
