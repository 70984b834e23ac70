"""RESULTS.md against results/: its tables are those that the study prints, its numbers theirs."""

import re
from pathlib import Path

import data
from extras import study_tables

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
TABLES = study_tables.tables(ROOT / "results")


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


def test_numbers_in_prose_stand_in_a_table():
    shown = "\n".join(TABLES.values())
    cells = set(re.findall(r"\d+\.\d\d(?:±\d+\.\d\d)?", shown))
    measured = cells | {part for cell in cells for part in cell.split("±")}
    measured.add(f"{data.GRAMMAR_ENTROPY:.2f}")
    prose = re.sub(r"`.*?`|^\|.*", "", TEXT, flags=re.M)
    told = set(re.findall(r"\d+\.\d\d(?:±\d+\.\d\d)?", prose))
    assert told <= measured, told - measured


def test_results_are_two_pages_and_hold_no_row_that_is_not_shown():
    assert TEXT.count("\n") <= 160
    shown = "\n".join(TABLES.values()) + " lm"
    runs, _ = study_tables.read(ROOT / "results")
    assert [(text, row) for text in runs for row in runs[text] if row not in shown] == []
