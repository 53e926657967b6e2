"""Prints what the campaigns of this run have found, as the table that tests/README.md shows."""

import helpers as h


def pytest_terminal_summary(terminalreporter) -> None:
    if h.TABLE:
        width = max(len(what) for what, _, _ in h.TABLE)
        terminalreporter.write_line(f"\n| {'campaign'.ljust(width)} | cases | failures |")
        terminalreporter.write_line(f"|{'-' * (width + 2)}|------:|---------:|")
        for what, cases, failures in h.TABLE:
            terminalreporter.write_line(f"| {what.ljust(width)} | {cases:5,} | {failures:8} |")
