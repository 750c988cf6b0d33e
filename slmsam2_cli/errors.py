"""Expected errors and their exit codes.

SlmSam2Error            the run cannot continue                                exit 2
├── UsageError          options are invalid or cannot be combined
├── DatasetError        the dataset is invalid (carries all problems found)
├── PlanError           a plan or fingerprint is invalid or from a newer version
├── WeightsError        a checkpoint is damaged, untrusted or does not match the plan
├── DeviceError         the requested device is missing or out of memory
├── TrainingError       training diverged or cannot continue
├── OutputError         a result could not be written completely
├── LockError           another process is writing to this folder
└── CaseError           one case is invalid; the others continue               exit 1
"""

from __future__ import annotations

from collections.abc import Sequence

DONE, SOME_FAILED, NOTHING_DONE = 0, 1, 2


class SlmSam2Error(Exception):
    """An expected error: shown as one line, never as a traceback."""

    exit_code = NOTHING_DONE


class UsageError(SlmSam2Error):
    """Options that cannot be combined, or name something that does not exist."""


class PlanError(SlmSam2Error):
    """A plan or fingerprint that cannot be read or used."""


class WeightsError(SlmSam2Error):
    """A checkpoint that cannot be read, is not trusted, or does not match the plan."""


class DeviceError(SlmSam2Error):
    """A device that is missing or out of memory."""


class TrainingError(SlmSam2Error):
    """Training that diverged or cannot continue."""


class OutputError(SlmSam2Error):
    """A result that could not be written completely; names path and reason."""


class LockError(SlmSam2Error):
    """Another process is writing to the folder; names the process and its start."""


class CaseError(SlmSam2Error):
    """One case is invalid.

    case: the case id; file: path relative to the dataset, or ""; what: what was found and expected;
    remedy: what to do next, without a final full stop.
    """

    exit_code = SOME_FAILED

    def __init__(self, case: str, file: str, what: str, remedy: str) -> None:
        self.case, self.file, self.what, self.remedy = case, file, what, remedy
        where = f"case {case}: {file}" if file else f"case {case}"
        super().__init__(f"{where}: {what}. {remedy}")


class DatasetError(SlmSam2Error):
    """The dataset is invalid; `problems` holds the problems of all cases."""

    def __init__(self, message: str, problems: Sequence[CaseError] = ()) -> None:
        self.problems = tuple(problems)
        super().__init__(message)
