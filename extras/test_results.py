"""RESULTS.md against the runs it reports: every number in its tables and prose is that of
results/*/*/metrics.json."""

import json
import re
import statistics
from pathlib import Path

import data

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "RESULTS.md").read_text(encoding="utf-8")


def cell(row, key):
    """What RESULTS.md must print: the mean over the seeds in results/<row>/ with its spread, or the
    one run's."""
    runs = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "results").glob(f"{row}/*/metrics.json"))
    ]
    assert runs, f"there is no results/{row}"
    assert len({run["iw_samples"] for run in runs}) == 1, (
        f"the runs of {row} were measured with different K"
    )
    values = [run.get(key) for run in runs]
    if None in values:
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else runs[0].get(key + "_se")
    return f"{statistics.fmean(values):z.2f}" + ("" if spread is None else f"±{spread:.2f}")


def tables(text):
    """The tables whose first column is `run`, as lists of {head: cell}."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        heads, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        if heads[0] == "run":
            yield [dict(zip(heads, row, strict=True)) for row in rows]


def wrong_cells(text):
    """The cells of these tables that are not what results/ holds: [(run, key, printed, true)]."""
    cells = [
        (row["run"], key, row[key])
        for table in tables(text)
        for row in table
        for key in list(row)[1:]
    ]
    return [
        (run, key, printed, true)
        for run, key, printed in cells
        if (true := cell(run, key)) != printed
    ]


def test_tables_are_what_the_runs_measured():
    assert list(tables(TEXT)), "no table found"
    assert wrong_cells(TEXT) == []


def test_a_wrong_digit_is_found():
    digit = re.search(r"\| (\d+)\.\d\d", TEXT[TEXT.index("| run |") :])
    at = TEXT.index("| run |") + digit.start(1)
    assert len(wrong_cells(TEXT[:at] + str(int(digit[1]) + 1) + TEXT[at + len(digit[1]) :])) == 1


def test_numbers_in_prose_stand_in_a_table():
    cells = {cell for table in tables(TEXT) for row in table for cell in row.values()}
    measured = (
        cells
        | {part for cell in cells for part in cell.split("±")}
        | {f"{data.GRAMMAR_ENTROPY:.2f}"}
    )
    prose = re.sub(r"`.*?`|^\|.*", "", TEXT, flags=re.M)
    told = set(
        re.findall(r"\d+\.\d\d(?:±\d+\.\d\d)?", prose)
    )  # a number that has a spread, with it
    assert told <= measured, told - measured
