"""A pytest plugin: appends each test's outcome to a file as the test ends, so that a run that is killed still says what
passed; `benchmarks.gpu_proof` reads it.

XFORMER_FAST_OUTCOMES names the file, one JSON object a line; XFORMER_FAST_DONE a file of tests, one a line, that are
left out because they have passed. It does not change while a run collects: workers must agree on what there is to run.
"""

import json
import os
from pathlib import Path

_worker = False  # of xdist: the process that hands out the tests hears of all


def pytest_configure(config):
    global _worker
    _worker = hasattr(config, "workerinput")


def pytest_collection_modifyitems(config, items):
    done = set(Path(os.environ["XFORMER_FAST_DONE"]).read_text().splitlines())
    left_out = [item for item in items if item.nodeid in done]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logreport(report):
    """What a test's body came to, and whatever else did not pass: a skip, a fault in a fixture, a worker that died."""
    if _worker or (report.when in ("setup", "teardown") and report.passed):
        return
    proves = [value for name, value in report.user_properties if name == "proves"]
    line = json.dumps({"test": report.nodeid, "outcome": report.outcome, "proves": proves})
    with open(os.environ["XFORMER_FAST_OUTCOMES"], "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
