"""Fixtures every test file shares."""

import models_table
import pytest
import torch

from xformer_fast import build_info, dispatch


def pytest_addoption(parser):
    parser.addoption(
        "--models-table", metavar="FILE",
        help="write what the models of tests/model_list.py were found to do into a table in Markdown",
    )  # fmt: skip


def pytest_configure(config):
    if config.getoption("--models-table") and getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("--models-table collects its rows in one process: leave -n out")
    config.stash[models_table.ROWS] = {}


def pytest_sessionfinish(session):
    path, rows = session.config.getoption("--models-table"), session.config.stash[models_table.ROWS]
    if path and rows:
        models_table.write(path, rows)


@pytest.fixture
def proof(request):
    """proof(library, model, attention modules, labels of inputs, pairs of errors): a row of the table."""
    return models_table.recorder(request.config.stash[models_table.ROWS])


def pytest_report_header():
    built, usable = build_info.isa_levels(), build_info.usable_isa_levels()
    missing = [level for level in built if level not in usable]
    return [
        f"C++ kernels: {dispatch.build_problem() or 'built'}; tested on {', '.join(usable) or '-'}"
        + (f"; not tested, this CPU lacks {', '.join(missing)}" if missing else "")
    ]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    """The numbers of a test do not depend on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=build_info.isa_levels() or ["default"])  # "default": without the C++ kernels
def isa(request, monkeypatch):
    """Runs the test once an instruction set of the binary; the operators read the variable at every call."""
    if request.param in build_info.isa_levels():
        if request.param not in build_info.usable_isa_levels():
            pytest.skip(f"this CPU has no {request.param}")
        monkeypatch.setenv("XFORMER_FAST_ISA", request.param)
    return request.param
