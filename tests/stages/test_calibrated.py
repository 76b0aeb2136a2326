import pytest
import torch

from kvcalib.errors import InputError
from kvcalib.rundir import CALIBRATION, RunDir
from kvcalib.stages.calibrated import read
from tests.tiny import calibrate, tiny_llama


def test_the_sample_of_a_run_is_read(tmp_path):
    run = RunDir(tmp_path / "run", create=True)
    with pytest.raises(InputError, match="stage 'fisher' has not run"):
        read(run)
    calibration = calibrate(tiny_llama(), samples=2, seq_len=24, keep=30)
    calibration.save(run.file(CALIBRATION))
    run.finish("fisher", {"seed": 0}, [CALIBRATION])
    found = read(run)
    assert sorted(found.layers) == [0, 1]
    assert found.source == str(run.path)
    assert torch.equal(found.position, calibration.tensors["sample.position"])
    for name in ("key", "value", "key_fisher", "value_fisher"):
        mine = getattr(found.layers[1], name)
        assert mine.shape == (30, 2, 16)
        assert torch.equal(mine, calibration.tensors[f"layers.1.sample.{name}"])
