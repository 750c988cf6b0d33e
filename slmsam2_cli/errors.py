"""Everything that may go wrong and is expected, as one tree; exit codes are decided here alone.

SlmSam2Error            the run cannot go on                                   exit 2
├── UsageError          the command line asks for something impossible
├── DatasetError        the data set as a whole is unusable (carries all problems found)
├── PlanError           a plan or fingerprint is malformed, edited wrongly or too new
├── WeightsError        a checkpoint cannot be trusted or does not fit
├── DeviceError         the device asked for is absent or out of memory
├── TrainingError       the network does not learn from what it is given
├── OutputError         a result could not be written whole
├── LockError           somebody else writes to this folder
└── CaseError           one case is unusable; the others go on                 exit 1
"""

from __future__ import annotations

from collections.abc import Sequence

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2


class SlmSam2Error(Exception):
    """An expected error: shown as one line, never as a traceback."""

    exit_code = NOTHING_DONE


class UsageError(SlmSam2Error):
    """Options that contradict each other or name something absent."""


class PlanError(SlmSam2Error):
    """A plan or fingerprint that cannot be read, trusted or followed."""


class WeightsError(SlmSam2Error):
    """A checkpoint that cannot be read, trusted or fitted to the plan."""


class DeviceError(SlmSam2Error):
    """A device that is absent or too small."""


class TrainingError(SlmSam2Error):
    """Training that diverged."""


class OutputError(SlmSam2Error):
    """A result that could not be written whole; names path and cause."""


class LockError(SlmSam2Error):
    """Another process holds the folder; names owner and start."""


class CaseError(SlmSam2Error):
    """One case is unusable.

    case: the case id; file: path relative to the data set (or ""), what: what was found and wanted;
    remedy: what to do next, without a final full stop.
    """

    exit_code = SOME_FAILED

    def __init__(self, case: str, file: str, what: str, remedy: str) -> None:
        self.case, self.file, self.what, self.remedy = case, file, what, remedy
        where = f"case {case}: {file}" if file else f"case {case}"
        super().__init__(f"{where}: {what}. {remedy}")


class DatasetError(SlmSam2Error):
    """The data set is unusable; `problems` holds every case's problem, found in one pass."""

    def __init__(self, message: str, problems: Sequence[CaseError] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message)
