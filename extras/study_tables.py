"""Stub while the tables are written."""


def pairs(rows):
    return [(row, "lm") for row in rows if row != "lm"]


def tables(results):
    return ""
