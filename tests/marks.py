"""Marks that several test files use."""

import pytest

from xformer_fast import dispatch

needs_kernels = pytest.mark.skipif(dispatch.build_problem() is not None, reason=str(dispatch.build_problem()))
