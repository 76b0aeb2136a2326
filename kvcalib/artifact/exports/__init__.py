"""Files for other programs: one target, one file."""

from kvcalib.artifact.exports.export import FOLDER, Export, Facts, LayerFacts
from kvcalib.artifact.exports.hf import TransformersCache
from kvcalib.artifact.exports.modelopt import ModelOpt
from kvcalib.artifact.exports.sglang import SGLangScales
from kvcalib.artifact.exports.vllm import VLLMScales

TARGETS: tuple[type[Export], ...] = (ModelOpt, VLLMScales, SGLangScales, TransformersCache)
NAMES = tuple(target.name for target in TARGETS)
FILES = frozenset(name for target in TARGETS for name in target.names)
"""Every file that may lie in an artifact's `exports/`."""

__all__ = ["FILES", "FOLDER", "NAMES", "TARGETS", "Export", "Facts", "LayerFacts"]
