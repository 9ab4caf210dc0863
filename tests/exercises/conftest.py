"""A check says only what is wrong; and once why nothing is checked, where it is not begun."""

import pathlib
import sys

# The scripts, from wherever pytest is started: some editors start it in this folder.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))


def pytest_configure(config):
    alone = all("exercises" in str(argument) for argument in config.args)
    if alone and config.option.tbstyle == "auto":
        config.option.tbstyle = "short"  # without the check's own code, which is an answer


def pytest_terminal_summary(terminalreporter):
    stats = terminalreporter.stats
    if not any(stats.get(outcome) for outcome in ("passed", "failed", "error")):
        for reason in sorted({report.longrepr[2] for report in stats.get("skipped", [])}):
            terminalreporter.write_line(reason)
