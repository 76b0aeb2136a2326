"""The errors a user of kvcalib can meet, each with the exit code of the command line.

A message names the file or field, the value found, the value expected and the remedy. Exit codes: 2 bad usage or
input, 3 the model or artifact does not fit, 4 the folder holds something else.
"""

from __future__ import annotations


class KvcalibError(Exception):
    """Base of every error that is meant to be read by a user."""

    exit_code = 1
    shared = False
    """Whether the first process of a launch says it, so that the others need not."""


class InputError(KvcalibError):
    """An argument, a text or a file cannot be used as it is."""

    exit_code = 2


class NotWritable(InputError):
    """A file cannot be written: the disk is full or read-only, or reports an error."""


class CorruptFile(InputError):
    """A file of ours is damaged: truncated, altered or of an unknown version."""


class NonFiniteActivations(InputError):
    """The model produced NaN or infinite keys, values, gradients or losses."""


class NoGain(InputError):
    """A refinement has not made the artifact better on held-out text."""


class UnsupportedModel(KvcalibError):
    """The model's attention cannot be tapped exactly; the message says why."""

    exit_code = 3


class ArtifactMismatch(KvcalibError):
    """The artifact was built for another model; the message names the field that differs."""

    exit_code = 3


class DoesNotFit(KvcalibError):
    """The work takes more memory or disk than there is."""

    exit_code = 3


class FolderInUse(KvcalibError):
    """The output folder holds another run, another artifact or something that is not ours."""

    exit_code = 4


class ProcessLost(KvcalibError):
    """A process of this launch has ended before its work was done."""

    exit_code = 1


class CacheBypassed(KvcalibError):
    """A forward pass went by without the cache that is being measured: a fault of the program, not of its user."""
