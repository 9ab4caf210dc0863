"""Says once why nothing was checked, where an exercise is not begun."""


def pytest_terminal_summary(terminalreporter):
    stats = terminalreporter.stats
    if not any(stats.get(outcome) for outcome in ("passed", "failed", "error")):
        for reason in sorted({report.longrepr[2] for report in stats.get("skipped", [])}):
            terminalreporter.write_line(reason)
