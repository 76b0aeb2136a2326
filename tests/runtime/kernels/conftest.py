"""Kernels run natively where there is a CUDA device, else in Triton's interpreter on CPU tensors.

The interpreter must be chosen before triton is first imported, which `tests/conftest.py` does. Ahead-of-time
compilation needs triton without it, so those tests start a fresh Python.
"""

import importlib.util

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (there is no wheel for this platform)")
    if torch.cuda.is_available():
        return torch.device("cuda")
    import triton

    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"
    from tests.runtime.kernels.interpreter import patch_once

    patch_once()
    return torch.device("cpu")
