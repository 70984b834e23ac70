"""RESULTS.md against results/: its tables are those that the study prints, its numbers theirs."""

import re
from pathlib import Path

import data
from extras import study_tables

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
TABLES = study_tables.tables(ROOT / "results")
# Numbers in RESULTS.md of no row: NLLs at another learning rate; parameters.
NOT_OF_THE_STUDY = {"120.08", "120.65", "1.9"}


def missing(text):
    """The names of the tables that a text does not show as results/ has them."""
    return [name for name, table in TABLES.items() if table not in text]


def test_tables_are_what_the_runs_measured():
    assert {"price", "claims"} <= TABLES.keys()
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
    prose = re.sub(r"`.*?`|^\|.*", "", TEXT, flags=re.M)
    assert strangers(prose) == set()
    assert {value for value in NOT_OF_THE_STUDY if value not in prose} == set()
    assert strangers("9876.5 nats, 9876.543±9876.54, section 9.8.7") == {
        "9876.5",
        "9876.543",
        "9876.54",
    }


def stale_pairs(runs, paired):
    """The paired differences that are not those of the two rows' measures."""
    found = []
    for text, pairs in paired.items():
        for pair, measures in pairs.items():
            (a, b) = (row.split("/") for row in pair.split(" - "))
            a, b = (runs[text].get(row, {}).get(seed, (None, {}))[1] for row, seed in (a, b))
            for key, (mean, _) in measures.items():
                if key in a and key in b and abs(a[key] - b[key] - mean) > 1e-4:
                    found.append((text, pair, key))
            if not a or not b:
                found.append((text, pair, "no row"))
    return found


def test_paired_differences_are_those_of_the_rows():
    runs, paired = study_tables.read(ROOT / "results")
    assert stale_pairs(runs, paired) == []
    paired["ptb"]["r8/0 - lm/0"]["rec"][0] += 0.001
    paired["ptb"]["r9/0 - lm/0"] = {}
    found = [("ptb", "r8/0 - lm/0", "rec"), ("ptb", "r9/0 - lm/0", "no row")]
    assert stale_pairs(runs, paired) == found, "the control"


def hidden_rows(runs, paired):
    """The (text, row) that stand in no table."""
    claims = [
        (text, row)
        for text in runs
        for claim in study_tables.CLAIMS
        if study_tables.verdict(claim, runs, paired, text) != "-"
        for row in (claim.a, claim.b)
        if row
    ]
    named = {"lm": "language model", "lm-deep": "paper-deep", "lm-paper": "rec - lm-paper's"}
    shown = "\n".join(TABLES.values())
    return [
        (text, row)
        for text, rows in runs.items()
        for row in rows
        if (text, row) not in claims and not re.search(rf"\| {text}: {row}( \||, \d seeds)", shown)
        if row not in named or named[row] not in shown
    ]


def test_results_are_two_pages_and_hold_no_row_that_is_not_shown():
    assert TEXT.count("\n") <= 160
    runs, paired = study_tables.read(ROOT / "results")
    assert hidden_rows(runs, paired) == []
    assert hidden_rows({"ptb": {"constant": {}, "lm": {}}}, {}) == [("ptb", "constant")]
