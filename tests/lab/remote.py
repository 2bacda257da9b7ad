"""A pytest that runs in the lab, seen from the pytest outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

RUN = "tools/lab/run"
#: Seconds for one test. What all of them take in one lab depends on what else the machine does, so that is not limited.
TEST_LIMIT = 1800.0
TIME_LIMIT = 24 * 3600
#: A lab keeps a processor busy. If there are more labs they wait, since tests in them have time limits.
_PLACES = threading.Semaphore(os.cpu_count() or 1)


class Remote:
    """
    One lab with one pytest in it.

    :param kernel: the series that the lab boots.
    :param option: a further one of the lab, or empty.
    :param tests: node ids. They are run in this order, and the same ones must be asked for.
    """

    MARK = "\x1e"
    REPORTS = "SEVHOP_LAB_REPORTS"

    def __init__(self, config: pytest.Config, kernel: str, option: str, tests: Iterable[str]) -> None:
        self._config = config
        self._kernel = kernel
        self._kept: dict[str, list[pytest.TestReport]] = {}
        self._finished: set[str] = set()
        self._output: deque[str] = deque(maxlen=100)
        inner = ["env", f"{self.REPORTS}=1", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        # Tests that run only if their marker is asked for.
        inner += [f"-m={config.option.markexpr}", *tests]
        options = ["--kernel", kernel, *([option] if option else [])]
        self._command = [RUN, *options, "--timeout", str(TIME_LIMIT), "--show", sys.prefix, *inner]
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._starting = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        """In a thread: run the lab when there is a place for it. Collect what it prints, with an empty line last."""
        try:
            with _PLACES:
                with self._starting:
                    if self._ended:
                        return
                    self._process = subprocess.Popen(
                        self._command,
                        cwd=self._config.rootpath,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        text=True,
                        errors="replace",
                    )
                while line := self._read(self._process):
                    self._lines.put(line)
                self._process.wait()
        finally:
            self._lines.put("")

    @staticmethod
    def _read(process: subprocess.Popen[str]) -> str:
        """A line that the lab prints; empty if it has exited, or was ended because one test takes too long."""
        assert process.stdout
        limit = threading.Timer(TEST_LIMIT, process.terminate)
        limit.start()
        try:
            return process.stdout.readline()
        finally:
            limit.cancel()

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of a test, waiting until it has run. If the lab exits before, a report of that."""
        if item.nodeid not in self._finished:
            for report in self._arriving():
                self._kept.setdefault(report.nodeid, []).append(report)
                if report.when == "teardown":
                    self._finished.add(report.nodeid)
                if item.nodeid in self._finished:
                    break
            else:
                return [*self._kept.pop(item.nodeid, []), self._lost(item)]
        return self._kept.pop(item.nodeid)

    def _arriving(self) -> Iterator[pytest.TestReport]:
        while line := self._lines.get():
            text, mark, data = line.partition(self.MARK)
            self._output.append(text)
            if mark:
                yield self._report(json.loads(data))
        self._lines.put("")  # it stays the end

    def _report(self, data: dict[str, Any]) -> pytest.TestReport:
        for name in ("location", "longrepr"):  # JSON has no tuples
            if isinstance(data[name], list):
                data[name] = tuple(data[name])
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        assert isinstance(report, pytest.TestReport)
        return report

    def _lost(self, item: pytest.Item) -> pytest.TestReport:
        assert self._process
        text = f"the lab with kernel {self._kernel} ended ({self._process.wait()}) before the test had run\n"
        return pytest.TestReport(
            nodeid=item.nodeid,
            location=item.location,
            keywords={},
            outcome="failed",
            longrepr=text + "".join(self._output),
            when="call",
        )

    def end(self) -> None:
        """End the lab, or do not start it."""
        with self._starting:
            self._ended = True
            if self._process is not None:
                self._process.terminate()
        self._thread.join()
