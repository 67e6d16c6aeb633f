"""On a rented card time may be over before pytest's summary: a failure says why at once."""

import pytest

LINES = 30  # of a failure: its end


class AtOnce:
    def __init__(self, config: pytest.Config):
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")  # none in a process of xdist
        if report.failed and terminal and report.nodeid.startswith("tests/gpu/"):
            terminal.write_line("\n".join([f"\n{report.nodeid}", *report.longreprtext.splitlines()[-LINES:]]))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(AtOnce(config))
