"""The pages keep what they say: their Python runs, their commands parse.

The Python blocks of a page with the line RUNNABLE are run in order, in one namespace. In the place
of the run that the page names, `run = "runs/..."`, stands a small one that is trained here. With

    DOCS_AS_WRITTEN=1 pytest extras/test_docs.py

they are run on the page's own run as well, and what they print must be what the page shows. That
is for whoever changes a page, on one machine: trained on another CPU, a model has other numbers.
"""

import argparse
import ast
import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import os
import re
import shlex
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import data
import train
from extras import probe
from test_vae import ROOT, one_thread
from vae import T5VAE

RUNNABLE = "<!-- runnable: extras/test_docs.py runs the Python blocks of this page, in order -->"
PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE_PAGES = [page for page in PAGES if RUNNABLE in page.read_text().splitlines()]
TOUR = (ROOT / "docs" / "tour.md").read_text()
RUN = re.compile(r'^run = "(.+)"$', re.M)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block of Python, and what the page says that it prints."""

    section: str
    line: int  # of the code's first line in the page
    code: str
    shown: str  # the comments at its end, or the fenced block without a language right after it


def python_blocks(text):
    fences, blocks = list(FENCE.finditer(text)), []
    for fence, after in itertools.zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        section = re.findall(r"^#+ (.*)$", FENCE.sub("", text[: fence.start()]), re.M)[-1]
        line = text.count("\n", 0, fence.start(2)) + 1
        shown = re.sub("^# ?", "", re.search(r"(?:^#.*\n)*\Z", fence[2], re.M)[0], flags=re.M)
        if after and not after[1] and not text[fence.end() : after.start()].strip():
            shown += after[2]
        blocks.append(Block(section, line, fence[2], shown))
    return blocks


def run_page(text, run, name="page"):
    """(namespace, what each block printed) of a page's Python, on the run folder `run`."""
    assert len(RUN.findall("".join(block.code for block in python_blocks(text)))) == 1
    text = RUN.sub(lambda _: f"run = {str(run)!r}", text)
    space, printed = {"__name__": name}, []
    try:
        with torch.random.fork_rng(devices=[]):
            for block in python_blocks(text):
                code = compile("\n" * (block.line - 1) + block.code, name, "exec")
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, space)
                printed.append(out.getvalue())
    finally:
        torch.set_printoptions(profile="default")
    return space, printed


@pytest.fixture(scope="module", autouse=True)
def short_texts():
    """An untrained model would write until the longest length, for longer than all the rest."""
    generate = T5VAE.generate

    def short(self, z, max_new_tokens=9, **kwargs):
        return generate(self, z, min(max_new_tokens, 9), **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if "DOCS_AS_WRITTEN" not in os.environ:
            patch.setattr(T5VAE, "generate", short)
        yield


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """Both phases on the first sentences of `grammar`, and captions of a kind; two steps each."""
    home = tmp_path_factory.mktemp("texts")
    for split in data.SPLITS:
        texts = [*itertools.islice(data.read_texts("grammar", split), 58)]
        texts += ["a man sells a boat .", "a woman sells a boat ."]
        (home / f"{split}.txt").write_text("\n".join(texts))
    flags = ["--dataset", home, "--model", "tiny", "--batch-size", 30, "--epochs", 1]
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "TINY", shape)
        patch.setattr(train, "TINY_VOCABULARY", 150)
        train.main([*flags, "--device", "cpu", "--out", home / "runs"])
    return home / "runs" / "phase2"


@pytest.mark.parametrize("page", RUNNABLE_PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, small_run):
    _, printed = run_page(page.read_text(), small_run, page.name)
    shown = [block.shown for block in python_blocks(page.read_text())]
    assert [bool(out) for out in printed] == [bool(out) for out in shown]


def test_a_wrong_name_is_found(small_run):
    with pytest.raises(AttributeError, match="latent_noises"):
        run_page(TOUR.replace("data.latent_noise(", "data.latent_noises("), small_run)


def test_all_python_blocks_parse():
    blocks = [block for page in PAGES for block in python_blocks(page.read_text())]
    assert len(blocks) > 10
    for block in blocks:
        ast.parse(block.code)


def test_the_tour_says_where_things_live():
    headings = re.findall(r"^## .*\.py$", TOUR, re.M)
    assert len(headings) == 12
    for heading in headings:
        names = []
        for name, module in re.findall(r"`([\w.]+)`|in (\w+)\.py", heading):
            names += [name] if name else []
            for found in names if module else ():
                owner = importlib.import_module(module)
                for part in found.split("."):
                    owner = getattr(owner, part)
            names = [] if module else names
        assert not names, f"{heading}: where is {names}?"


def check_by_hand(space):
    """What the tour computes by hand is what the functions return."""
    model, z, labels = space["model"], space["z"], space["batch"].labels
    torch.testing.assert_close(space["h"], space["hidden"].amax(1))
    torch.testing.assert_close(space["mu"], model.w_mu(space["h"]))
    torch.testing.assert_close(space["kl_by_hand"], space["kl"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z, space["mu"] + space["sigma"] * space["eps"])
    same = space["layer"].o(space["memory"][:, :1]).expand_as(space["added"])
    torch.testing.assert_close(space["added"], same, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(space["nats"].sum()[None], model.rec(z, labels))
    assert 0 < space["w"] <= 1
    torch.testing.assert_close(space["mu_r"], space["mu_by_hand"])
    torch.testing.assert_close(space["logvar_r"], space["logvar_by_hand"])
    # The last K of step 10 is that of the table, and its samples are the same.
    number = space["batch"].index.item()
    assert space["found"]["nll_iw"].item() == pytest.approx(space["nlls"][number], abs=1e-4)


def test_by_hand_is_what_the_functions_return(small_run):
    check_by_hand(run_page(TOUR, small_run)[0])


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("- sigma.log()", "+ sigma.log()"),
        ("-logits.log_softmax(-1)", "-logits.log_softmax(1)"),
        ("eps=eps)", "eps=eps + 1)"),
        ("d = w + (1 - w)", "d = 2 + (1 - w)"),
        ("in 1, 5, 20:", "in 1, 5:"),
    ],
)
def test_a_wrong_formula_is_found(small_run, right, wrong):
    assert TOUR.count(right) == 1
    with pytest.raises(AssertionError):
        check_by_hand(run_page(TOUR.replace(right, wrong), small_run)[0])


def test_the_probability_of_the_tours_sentence():
    number = int(re.search(r"np.array\(\[(\d+)\]\)", TOUR)[1])
    factors = next(itertools.islice(data.grammar_factors("test"), number, None))
    nats = 0
    for name, value in factors.items():
        nats += math.log(2) * (name in data.OPTIONAL)
        nats += math.log(len(data.FACTORS[name])) * (value is not None)
    assert f"probability exp(-{nats:.2f})" in " ".join(TOUR.split())


@pytest.mark.skipif("DOCS_AS_WRITTEN" not in os.environ, reason="DOCS_AS_WRITTEN is not set")
@pytest.mark.parametrize("page", RUNNABLE_PAGES, ids=lambda page: page.name)
def test_a_page_prints_what_it_shows(page, monkeypatch):
    """Words exactly, numbers to 0.3."""
    monkeypatch.chdir(ROOT)
    text = page.read_text()
    _, printed = run_page(text, RUN.search(text)[1], page.name)
    number = re.compile(r"-?\d+\.\d*")
    for block, out in zip(python_blocks(text), printed, strict=True):
        got, said = (" ".join(words.split()).replace("[ ", "[") for words in (out, block.shown))
        assert number.sub("#", got) == number.sub("#", said), block.section
        got, said = ([float(found) for found in number.findall(words)] for words in (got, said))
        assert got == pytest.approx(said, abs=0.3), block.section


# ------------------------------------------------------------------------------------- commands


class Accepted(Exception):
    pass


def code_of(text):
    """The lines of a page that are code: fenced, indented, or between backticks."""
    text = text.replace("\\\n", " ")
    lines = [line for fence in FENCE.finditer(text) for line in fence[2].splitlines()]
    text = FENCE.sub("", text)
    lines += re.findall(r"^ {4}(.*)$", text, re.M)
    return lines + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(text):
    """[(module, its arguments)] of the calls of extras, study and metrics.py on a page."""
    found, shell = [], ("|", "||", "&", "&&", ";", "<", ">", ">>")
    for line in code_of(text):
        call = re.search(r"python (?:-m ((?:extras|study)\.\w+)|(metrics)\.py)(?= |$)(.*)", line)
        if call:
            words = shlex.shlex(call[3], posix=True, punctuation_chars=True)
            words.whitespace_split = True
            argv = list(itertools.takewhile(lambda word: word not in shell, words))
            found.append((call[1] or call[2], argv))
    return found


def refused(found, monkeypatch):
    """Those of the commands that name no script, or flags that it does not know."""

    def only(parse):
        def parse_only(*args, **kwargs):
            parse(*args, **kwargs)
            raise Accepted

        return parse_only

    for name in "parse_args", "parse_intermixed_args":
        parse = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, only(parse))
    wrong = []
    for module, argv in found:
        if not (ROOT / f"{module.replace('.', '/')}.py").exists():
            wrong.append((module, argv))
        elif argv:  # a bare name is a mention
            with contextlib.suppress(Accepted):
                try:
                    importlib.import_module(module).main(argv)
                except SystemExit:
                    wrong.append((module, argv))
    return wrong


def test_commands_of_the_pages_parse(monkeypatch):
    found = [command for page in PAGES for command in commands(page.read_text())]
    assert len(found) > 15
    assert sum(bool(argv) for _, argv in found) > 5
    assert refused(found, monkeypatch) == []


def test_a_wrong_command_is_found(monkeypatch):
    page = """Prose with `python -m extras.nothing` and `python -m extras.compare
A B`.

    python -m study.plots price --no-such-flag  # a comment
    LD_PRELOAD=x python -m extras.fast_cpu --dataset ptb --epochs many && echo

```bash
python -m extras.latent reconstruct RUN "a text" \\
    --samples 5 < texts.txt
python metrics.py RUN --iw-sample-count 3
```
"""
    assert len(commands(page)) == 6
    wrong = refused(commands(page), monkeypatch)
    names = ["extras.fast_cpu", "study.plots", "extras.nothing", "metrics"]
    assert sorted(module for module, _ in wrong) == sorted(names)


def test_links_of_the_pages_lead_somewhere():
    anchors = {}
    for page in PAGES:
        titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
        bare = [re.sub(r"[^\w\- ]", "", title.lower()) for title in titles]
        anchors[page] = {title.replace(" ", "-") for title in bare}
    wrong = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            known = target.exists() and (not anchor or anchor in anchors.get(target, ()))
            if not link.startswith("https://") and not known:
                wrong.append((page.name, link))
    assert wrong == []


def test_headings_and_tables_end_with_their_lines():
    wrong = []
    for page in PAGES:
        for line in FENCE.sub("", page.read_text()).splitlines():
            open_row = line.startswith("|") and not line.endswith("|")
            if open_row or re.search(r"[.|] #+ ", line):
                wrong.append((page.name, line))
    assert wrong == []


def test_the_sentence_of_the_readme_is_one_of_the_grammar():
    readme = (ROOT / "README.md").read_text()
    (text,) = re.findall(r'encode_texts\(\["(.*)"\]\)', readme)
    assert probe.grammar_parse(text)
    assert probe.grammar_parse(text.replace("paints", "painted")) is None, "the control"


ROWS = [{"text": f"a review,\n number {i}\u00a0", "label": 1 + i % 5} for i in range(300)]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("page", ["data", "own-text"])
def test_a_table_becomes_texts(tmp_path, monkeypatch, page, kind):
    """The block of a page that makes texts of a table, as it stands and with the other kind."""
    monkeypatch.chdir(tmp_path)
    with open("reviews.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["text", "label"])
        table.writeheader()
        table.writerows(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    Path("reviews.jsonl").write_text(lines, encoding="utf-8")
    blocks = python_blocks((ROOT / "docs" / f"{page}.md").read_text())
    (code,) = (block.code for block in blocks if "reviews." in block.code)
    if f'open("reviews.{kind}"' not in re.sub("^#.*$", "", code, flags=re.M):
        other = r"^table = .*\n# [\w ]+: (table = .*)$"
        code, count = re.subn(other, r"\1", code, flags=re.M)
        assert count == 1
    exec(code, {})
    with pytest.raises(data.InputError, match="own-text"):
        list(data.read_texts(f"reviews.{kind}", "train"))
    made = "reviews.txt" if page == "data" else "reviews"
    texts = {split: list(data.read_texts(made, split)) for split in data.SPLITS}
    assert sorted(sum(texts.values(), [])) == sorted(" ".join(row["text"].split()) for row in ROWS)
    for split in data.SPLITS:
        assert {data.split_of(text) for text in texts[split]} == {split}
        if page == "own-text":
            labels = list(data.read_lines(Path(made, f"{split}.labels")))
            assert labels == [str(1 + int(text.split()[-1]) % 5) for text in texts[split]]


def test_what_is_left_out_can_be_had(small_run, tmp_path, monkeypatch):
    """The blocks of docs/running.md: the model of each epoch, and a prefix."""
    keep, prefix = python_blocks((ROOT / "docs" / "running.md").read_text())
    model = T5VAE.from_pretrained(small_run)
    corpora = {"valid": data.make_corpus(["the king hid a drum"], model.tokenizer)}
    run = types.SimpleNamespace(first=True, folder=tmp_path, max_tokens=500, record=print)
    monkeypatch.setattr(train, "validate", train.validate)  # undone at the end
    monkeypatch.setattr(train, "main", lambda argv: None)
    exec(keep.code, {})
    train.validate(model, corpora, None, None, run, 7)
    assert T5VAE.from_pretrained(tmp_path / "step7").latent_dim == model.latent_dim
    space = {"model": model, "z": torch.randn(2, model.latent_dim)}
    exec(prefix.code, space)
    assert [text.startswith("long ago") for text in space["texts"]] == [True, True]


def test_tests_that_pages_name_exist():
    files = [ROOT / "test_vae.py", *ROOT.glob("extras/test_*.py"), *ROOT.glob("study/test_*.py")]
    tests = "".join(path.read_text() for path in files)
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    assert named
    assert {name for name in named if f"def {name}(" not in tests} == set()
