"""A run's calibration as baselines take it: the token sample in plain tensors."""

from __future__ import annotations

from kvcalib.calibration.statistics import Calibration
from kvcalib.evaluation.baselines.calibrated import Calibrated, LayerSample
from kvcalib.rundir import CALIBRATION, RunDir


def read(run_dir: RunDir) -> Calibrated:
    """The token sample of the run's `calibration.safetensors`.

    Raises:
        InputError: stage `fisher` has not run there. CorruptFile: the file is damaged.
    """
    run_dir.settings("fisher")
    calibration, _ = Calibration.load(run_dir.file(CALIBRATION))
    return sample_of(calibration, str(run_dir.path))


def sample_of(calibration: Calibration, source: str) -> Calibrated:
    """The token sample of a calibration that came from `source`."""
    names = ("key", "value", "key_fisher", "value_fisher")
    layers = {
        shape.index: LayerSample(**{n: calibration.layer(shape.index)[f"sample.{n}"] for n in names})
        for shape in calibration.info.layers
    }
    return Calibrated(layers, calibration.tensors["sample.position"], source)
