"""The examples in the docstrings of every module run and show what they say; every public name is documented."""

import doctest
import importlib
import pkgutil

import pytest

import xformer_fast

HOSTS = ("peft", "timm", "transformers")  # modules about them need them
MODULES = [
    "xformer_fast",
    *(m.name for m in pkgutil.walk_packages(xformer_fast.__path__, "xformer_fast.") if "._" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in HOSTS:
            raise
        pytest.skip(f"{error.name} is not installed")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert not failed


def test_every_module_is_looked_at():
    assert {"xformer_fast.ops.window_attention", "xformer_fast.integrations.transformers"} <= set(MODULES)


@pytest.mark.parametrize("name", xformer_fast.__all__)
def test_public_names_have_documentation(name):
    assert len(getattr(xformer_fast, name).__doc__ or "") > 40
    assert name in dir(xformer_fast)
