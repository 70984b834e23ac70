"""Tests of the study: its commands, what it keeps, and its tables."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import metrics
import train
from extras import compare, positions, pretrain, study, study_tables
from extras.test_extras import EOS, home, one_thread  # noqa: F401 (fixtures)
from test_vae import tiny_vae


def settings(*flags):
    return study.parse_args(list(flags))


PAPERS = ("--model", "t5-small", "--deep", "t5-base", "--texts", "ptb", "snli", "yahoo", "yelp")


@pytest.mark.parametrize("flags", [(), PAPERS])
def test_commands_are_understood_and_stand_after_what_they_need(flags):
    args = settings(*flags, "--results", "nowhere")
    jobs = study.commands_left(study.study_jobs(args))
    assert len(jobs) > 100
    outs = [str(job.out) for job in jobs]
    assert len(set(outs)) == len(outs)
    for i, job in enumerate(jobs):
        assert job.needs is None or str(job.needs.out) in outs[:i]
        *_, script = [word for word in job.command if word in ("train.py", "extras.pretrain")]
        if script == "train.py":
            (parsed,) = train.parse_args(job.command[1:])
            assert str(train.run_folder(parsed, parsed.phase)) == str(job.out)
            assert parsed.limit is None or not args.model
            if parsed.init and job.needs:
                assert Path(parsed.init).is_relative_to(job.needs.out)
        else:
            assert str(job.out) == pretrain.parse_args(job.command[2:]).out
    with pytest.raises(SystemExit):
        train.parse_args([*jobs[-1].command[1:], "--no-such-flag"])


def test_rows_of_a_random_start_are_not_repeated_where_all_start_from_it():
    args = settings("--texts", "grammar", "captions", "--results", "nowhere")
    rows = {str(job.result) for job in study.study_jobs(args)}
    assert "nowhere/captions/r8-random/0" in rows
    assert not any(row.startswith("nowhere/grammar/") and "random" in row for row in rows)
    assert not any("r24" in row for row in rows)
    assert {f"nowhere/grammar/r8/{seed}" for seed in range(3)} <= rows
    assert "nowhere/captions/r8/2" not in rows


@pytest.mark.parametrize("text", ["captions", "captions-all"])
def test_any_row_can_be_remade_with_another_seed(text):
    flags = ["--texts", text, "--rows", "r16", "r8", "r4", "--results", "nowhere"]
    rows = ["r8", "r16"] if text == "captions-all" else ["r8", "r16", "r4"]
    for seeds in 1, 2, 5:
        jobs = study.study_jobs(settings(*flags, "--seeds", str(seeds)))
        found = [job.result.parts[2:] for job in jobs]
        assert found == [(row, str(seed)) for seed in range(seeds) for row in rows]


def test_two_models_share_no_folder():
    models = "a/b", "a-b", "a/b.1", "a/b-1", "x/a/b"
    found = [settings("--model", model) for model in models]
    for folders in {args.results for args in found}, {args.runs for args in found}:
        assert len(folders) == len(models)
        assert all(".." not in folder for folder in folders)


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
        **{f"{home}/r{target}/0/phase2": "3" for target in (8, 16, 24)},
    }


@pytest.fixture(scope="module")
def tiny_t5(home, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("t5")
    shape = ["--d-model", 16, "--layers", 1, "--heads", 2, "--vocab-size", 60, "--steps", 0]
    pretrain.main(["--dataset", home, *shape, "--out", out / "t5", "--device", "cpu"])
    return out / "t5" / "model"


def read(path):
    return json.loads(Path(path).read_text())


def test_runs_what_is_missing_and_keeps_what_tables_need(home, tiny_t5, tmp_path, capsys):  # noqa: F811
    results, runs = tmp_path / "results", tmp_path / "runs"
    flags = ["--model", str(tiny_t5), "--texts", home.name, "--data-dir", str(home.parent)]
    flags += ["--results", str(results), "--runs", str(runs), "--rows", "lm", "r4", "--jobs", "2"]
    name = str(tiny_t5).strip("/").replace("/", "--")
    foreign = runs / name / home.name / "r4" / "0" / "phase2" / "mine.txt"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("not a run's")
    with pytest.raises(SystemExit, match="commands that failed: 1"):
        study.main(flags)
    assert "mine.txt" in capsys.readouterr().out  # the reason
    kept = results / home.name
    assert not (kept / "r4").exists()
    foreign.unlink()

    study.main(flags)  # the language model and phase 1 are not run again
    out = capsys.readouterr().out
    assert "r4" in out
    assert "--no-latent" not in out
    assert "--phase 1" not in out
    config = read(kept / "r4" / "0" / "config.json")
    assert {"machine", "commit", "minutes"} <= config.keys()
    assert len(config["phase1_kl"]) == 4
    assert sorted(path.name for path in (kept / "r4" / "0").iterdir()) == [
        "config.json",
        "metrics.json",
    ]
    folder = runs / name / home.name
    expected = compare.compare(folder / "lm" / "0" / "lm", folder / "r4" / "0" / "phase2")
    assert read(kept / "paired.json")["r4/0 - lm/0"]["nll"] == list(expected["nll"])
    (folder / "lm" / "0" / "lm" / "sentences.npz").write_bytes(b"")
    study.main(flags)  # what cannot be compared stops nothing
    out, err = capsys.readouterr()
    assert "0 of 3 rows are missing" in out  # lm has two seeds
    assert re.search("not compared: .*sentences.npz is damaged", err)
    old = read(kept / "paired.json") | {"cold/0 - r4/0": {}, "lm-gone/1 - lm/1": {}}
    data.write_json(kept / "paired.json", old)
    study.main(flags)
    assert read(kept / "paired.json").keys() == {"r4/0 - lm/0"}, "no pair of an earlier study"

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
    corpus = data.Corpus(ids, offsets, lengths, 0, 0, 0, 2, "")
    rows = positions.by_position(model, corpus, batch_size=4)
    assert sum(row["tokens"] for row in rows) == corpus.ids.size
    columns = metrics.measure(model, corpus, batch_size=4, thorough=True)
    for key in "rec", "rec_other":
        total = sum(row["tokens"] * row[key] for row in rows)
        assert total == pytest.approx(columns[key].sum().item(), rel=1e-5)
    explained = [row["rec_other"] - row["rec"] for row in rows]
    with torch.no_grad():
        model.w_proj.weight.zero_()
    ignored = positions.by_position(model, corpus, batch_size=4)
    assert max(abs(row["rec_other"] - row["rec"]) for row in ignored) < 1e-6 < max(explained)


def test_mistakes_are_refused(capsys):
    with_grammar = ["--model", "t5-small", "--texts", "grammar"]
    nameless = ["--model", ".."]
    unknown = ["--texts", "captoins"]
    texts = (["--texts", ".."], unknown, with_grammar, nameless)
    unset = ["--model", ""], ["--model", "t5-small", "--deep", ""], ["--deep", ""]
    for flags in (*texts, *unset, ["--deep", "t5-base"], ["--rows", "r5"]):
        with pytest.raises(SystemExit):
            settings(*flags)
    assert "r5" in capsys.readouterr().err


def test_damaged_results_are_named(tmp_path):
    write_row(tmp_path, "ptb", "lm", rec=100.0, latent_dim=0)
    study_tables.tables(tmp_path)
    for name in "metrics.json", "config.json":
        path = tmp_path / "ptb" / "lm" / "0" / name
        whole = path.read_text()
        measures = '{"latent_dim": 0, "kl": 0, "rec": NaN, "au": 0}'
        for text in whole[:9], "[]", "{}", measures, measures.replace("NaN", "null"):
            path.write_text(text)
            with pytest.raises(SystemExit, match=name):
                study.main(["--tables", "--results", str(tmp_path)])
        path.write_text(whole)
    found = '{"a": 1}', '{"a": {"nll": 1}}', "[]", "{}", '{"a": {"nll": [null, 0.1]}}'
    for pairs in *found, '{"a": {"nll": ["x", "y"]}}', '{"a": {"nll": [NaN, 0.1]}}':
        (tmp_path / "ptb" / "paired.json").write_text(pairs)
        with pytest.raises(SystemExit, match="paired.json is damaged"):
            study.main(["--tables", "--results", str(tmp_path)])
    (tmp_path / "ptb" / "paired.json").unlink()
    for places in "x", [1], [{}], {"a": 1}, [{"start": 0, "stop": 5, "rec": "1", "rec_other": 2}]:
        write_row(tmp_path, "ptb", "r4", len(str(places)), positions=places)
        with pytest.raises(SystemExit, match="metrics.json is damaged: "):
            study.main(["--tables", "--results", str(tmp_path)])
        shutil.rmtree(tmp_path / "ptb" / "r4")
    write_row(tmp_path, "ptb", "r4", "0.bak")
    with pytest.raises(SystemExit, match=r"r4/0.bak is no seed"):
        study.main(["--tables", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="no folder"):
        study.main(["--tables", "--results", str(tmp_path / "none")])


def write_row(results, text, row, seed=0, **measures):
    folder = results / text / row / str(seed)
    folder.mkdir(parents=True)
    measures = {"latent_dim": 32, "au": 32, "kl": 8.0, "rec": 90.0} | measures
    data.write_json(folder / "metrics.json", measures)
    data.write_json(
        folder / "config.json", {"command": "", "phase1_kl": [0, 50.0, 90.0, 100.0, 101.0]}
    )


def test_tables_say_what_the_results_hold(tmp_path):
    for seed in range(2):
        write_row(tmp_path, "ptb", "lm", seed, rec=100.0, nll=100.0, latent_dim=0)
    write_row(tmp_path, "ptb", "threshold0.25", kl=8.5, kl_se=0.1)
    write_row(tmp_path, "ptb", "r4", kl=9.0)
    for seed, nll in enumerate((101.0, 103.0)):
        measures = {"kl": 8.0 + seed / 50, "kl_se": 0.04, "efficiency": 0.9}
        write_row(tmp_path, "ptb", "r8", seed, nll=nll, nll_se=0.5, **measures)
    pairs = {f"r8/{seed} - lm/{seed}": {"nll": [1.0 + 2 * seed, 0.1]} for seed in range(2)}
    data.write_json(tmp_path / "ptb" / "paired.json", pairs)
    lines = study_tables.tables(tmp_path)["price"].splitlines()
    assert lines[2] == "| ptb: language model, 2 seeds | 0 | NLL 100.00±0.00 | - | - | - |"
    # Several seeds: the mean, and the standard deviation over them, if it is the larger error.
    assert lines[3] == "| ptb: r8, 2 seeds | 8.01±0.04 | +2.00±1.41 | 0.90±0.00 | - | - |"
    # By KL, so that rows of the same KL stand together, whatever led to it.
    assert lines[4] == "| ptb: threshold0.25 | 8.50±0.10 | - | - | - | - |"
    assert lines[5] == "| ptb: r4 | 9.00 | - | - | - | - |"


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
    runs, paired = study_tables.read(tmp_path)
    claim = study_tables.Claim("", "swap_cost", "cold", "<", "no-threshold")
    mean = np.mean([mean or 9.0 for mean in change or [2.0]])
    assert study_tables.verdict(claim, runs, paired, "answers") == f"{said}: {5 + mean:.2f}, 5.00"
    assert study_tables.verdict(claim, runs, paired, "ptb") == "-"


@pytest.mark.parametrize(("apart", "said"), [(1.9, "yes"), (2.1, "unclear")])
@pytest.mark.parametrize("row", ["mean", "paper-default"])
def test_a_verdict_needs_more_than_the_difference_of_two_seeds(tmp_path, row, apart, said):
    """Of one of the rows, else of `paper-default`: the errors over sentences do not have it."""
    write_row(tmp_path, "ptb", "mean", swap_cost=3.0)
    write_row(tmp_path, "ptb", "last", swap_cost=5.0)
    if row != "mean":
        write_row(tmp_path, "ptb", row, swap_cost=3.0)
    write_row(tmp_path, "ptb", row, 1, swap_cost=3.0 - apart)
    pairs = {"last/0 - mean/0": {"swap_cost": [2.0, 0.1]}}
    data.write_json(tmp_path / "ptb" / "paired.json", pairs)
    claim = study_tables.Claim("", "swap_cost", "last", ">", "mean")
    verdict = study_tables.verdict(claim, *study_tables.read(tmp_path), "ptb")
    assert verdict == f"{said}: 5.00, 3.00"


def test_a_verdict_needs_every_seed(tmp_path):
    for seed, (a, b) in enumerate([(7.0, 5.0), (6.0, 5.9)]):
        write_row(tmp_path, "ptb", "last", seed, swap_cost=a)
        write_row(tmp_path, "ptb", "mean", seed, swap_cost=b)
    claim = study_tables.Claim("", "swap_cost", "last", ">", "mean")
    for error, said in (0.1, "unclear"), (0.04, "yes"):
        pairs = {"last/0 - mean/0": {"swap_cost": [2.0, error]}}  # seed 1 was run elsewhere
        data.write_json(tmp_path / "ptb" / "paired.json", pairs)
        verdict = study_tables.verdict(claim, *study_tables.read(tmp_path), "ptb")
        assert verdict == f"{said}: 6.50, 5.45"


@pytest.mark.parametrize(("cost", "lost"), [(0.9, True), (1.1, False)])
def test_a_claim_of_one_row_shows_its_swap_cost_and_kl(tmp_path, cost, lost):
    write_row(tmp_path, "ptb", "cold", swap_cost=cost, kl=7.0)
    kept, said = ("no", "yes") if lost else ("yes", "no")
    claim = study_tables.Claim("z is kept", "swap_cost", "cold", ">")
    assert study_tables.verdict(claim, *study_tables.read(tmp_path), "ptb")[:3].startswith(kept)
    claim = study_tables.Claim("z is lost", "swap_cost", "cold", "<")
    assert (
        study_tables.verdict(claim, *study_tables.read(tmp_path), "ptb")
        == f"{said}: {cost:.2f}, 7.00"
    )
    table = study_tables.tables(tmp_path)["claims"]
    assert f"| `swap_cost`: cold < 1 nat; `kl` | {said}: {cost:.2f}, 7.00 |" in table


@pytest.mark.parametrize(("au", "same", "fewer"), [(64, "yes", "no"), (62, "no", "yes")])
def test_claims_of_active_dimensions_compare_shares(tmp_path, au, same, fewer):
    write_row(tmp_path, "ptb", "paper-default")  # 32 of 32
    write_row(tmp_path, "ptb", "z64", latent_dim=64, au=au)
    runs = study_tables.read(tmp_path)
    for expected, said in ("=", same), ("<", fewer):
        claim = study_tables.Claim("", "active", "z64", expected, "paper-default")
        assert study_tables.verdict(claim, *runs, "ptb") == f"{said}: {au / 64:.2f}, 1.00"


def test_systems_are_shown_beside_the_same_training_without_z(tmp_path):
    write_row(tmp_path, "ptb", "lm", rec=100.0, neg_elbo=100.0, latent_dim=0)
    write_row(tmp_path, "ptb", "lm-paper", kl=0.0, rec=110.0, neg_elbo=110.0, latent_dim=0)
    write_row(tmp_path, "ptb", "paper-max", rec=107.0, neg_elbo=115.0, swap_cost=6.0)
    pairs = {"paper-max/0 - lm-paper/0": {"rec": [-3.0, 0.1]}}
    data.write_json(tmp_path / "ptb" / "paired.json", pairs)
    lines = study_tables.tables(tmp_path)["systems"].splitlines()
    assert lines[2] == "| ptb: paper-max | 8.00 | -3.00±0.10 | 6.00 | 1.15 | 0.09, 1.00 |"


def test_claims_and_pairs_name_rows_of_the_study():
    rows = {row.name for row in study.ROWS}
    for a, b in study_tables.pairs(rows):
        assert {a, b} <= rows
    assert set(study_tables.SYSTEMS) | set(study_tables.METHODS) <= rows
