"""The examples in the docstrings of the public modules run and show what they say."""

import doctest
import importlib
import pkgutil

import pytest

from xformer_fast import models

MODULES = [
    "",
    ".cache",
    ".ops.attention",
    ".ops.decode_attention",
    ".feature_maps",
    ".ops.linear_attention",
    ".ops.neighborhood_attention",
    ".ops.rope",
    ".positions",
    ".rope",
    ".layers",
    ".mixers",
    ".training",
    ".tuning",
    ".frontends",
    ".checkpoints",
    ".generation",
    *(f".models.{module.name}" for module in pkgutil.iter_modules(models.__path__)),
    ".information",
    ".reference",
    ".dispatch",
    ".testing",
    ".build_info",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"xformer_fast{name}")
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert not failed


def test_public_functions_have_documentation():
    import xformer_fast

    for name in ("attention", "scaled_dot_product_attention", "varlen_attention", "alibi_slopes", "explain", "info"):
        assert len(getattr(xformer_fast, name).__doc__) > 40
