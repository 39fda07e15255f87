"""The one tree of errors, grouped by what a handler does about them.

::

    FtengineError                 anything this package raises on purpose
    |-- ConfigError               the user edits the configuration or the command line   exit code 2
    |   |-- DivergedError         a loss is NaN or infinite: the run stops               exit code 2
    |   `-- MemoryLimitError      the step does not fit the memory: make it smaller      exit code 2
    |-- SaveError                 a checkpoint could not be written; the old one is kept exit code 2
    |-- CaseError                 this CT is skipped, counted and named                  exit code 1 (4 where nothing else is left)
    |-- StoreError                the store is unreadable or damaged: convert again      exit code 3
    |-- KernelInputError          a caller's bug: wrong shape, dtype or device           exit code 2
    `-- RejectionError            training would be on nothing: the run stops            exit code 4

Every message says where, what was found, what was wanted, and the next step.
"""

from enum import StrEnum


class FtengineError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 2


class ConfigError(FtengineError):
    """The configuration or the command line is wrong; the user edits it."""

    exit_code = 2


class DivergedError(ConfigError):
    """Training came to a loss that is NaN or infinite. The last checkpoint is kept; replay: the file with the patches' addresses."""

    def __init__(self, text: str, replay: str = "") -> None:
        super().__init__(text)
        self.replay = replay


class MemoryLimitError(ConfigError):
    """A training step needs more memory than there is; the user makes it smaller."""


class SaveError(FtengineError):
    """A checkpoint or weights could not be written: the disk is full, or the folder is gone. What was there before is kept."""

    exit_code = 2


class FailureCode(StrEnum):
    """Why a CT cannot be used: stable names, each an anchor of docs/bring-your-own-ct.md. Append only."""

    # the file
    MISSING_FILE = "missing-file"
    NO_PERMISSION = "no-permission"
    UNREADABLE = "unreadable"  # any other refusal of the system
    EMPTY_FILE = "empty-file"
    TRUNCATED = "truncated"
    DAMAGED_DATA = "damaged-data"  # whole by its length, wrong by its checksum
    DAMAGED_HEADER = "damaged-header"
    NOT_AN_IMAGE = "not-an-image"
    UNSUPPORTED_ENCODING = "unsupported-encoding"
    OUTSIDE_DATA_FILE = "outside-data-file"
    # what it holds
    NO_CT = "no-ct"
    NOT_A_VOLUME = "not-a-volume"
    NOT_GREY = "not-grey"
    NOT_HU = "not-hu"
    NOT_FINITE = "not-finite"
    SEVERAL_PHASES = "several-phases"
    # where it lies in the patient
    NO_ORIENTATION = "no-orientation"
    NO_POSITION = "no-position"
    BAD_SPACING = "bad-spacing"
    WRONG_UNITS = "wrong-units"
    SHEARED = "sheared"
    # a series of DICOM slices
    SEVERAL_SERIES = "several-series"
    MISSING_SLICES = "missing-slices"
    UNEVEN_SLICES = "uneven-slices"
    DUPLICATE_SLICES = "duplicate-slices"
    GANTRY_TILT = "gantry-tilt"
    MULTI_FRAME = "multi-frame"
    UNDECODABLE = "undecodable"
    HEADER_MISMATCH = "header-mismatch"
    # labels and names
    GRID_MISMATCH = "grid-mismatch"
    LABEL_VALUES = "label-values"
    FRACTIONAL_LABEL = "fractional-label"
    DICOM_LABEL = "dicom-label"
    AMBIGUOUS_LABEL = "ambiguous-label"
    DUPLICATE_NAME = "duplicate-name"
    NESTED_NAMES = "nested-names"
    # what became of the work on it
    OUT_OF_MEMORY = "out-of-memory"
    WORKER_DIED = "worker-died"
    INTERNAL = "internal"
    NO_ORGAN = "no-organ"


class CaseError(FtengineError):
    """One CT or label cannot be used; skip it, count it, name it. One that reaches the top means that nothing was usable.

    reason: where, what was found, what was wanted. advice: the next step, a whole sentence. code: for tables and scripts.
    """

    exit_code = 4

    def __init__(self, reason: str, advice: str = "", *, code: FailureCode = FailureCode.UNREADABLE) -> None:
        super().__init__(f"{reason} {advice}".rstrip())
        self.reason = reason
        self.advice = advice
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        """Errors cross process borders whole."""
        return _case_error, (self.reason, self.advice, self.code.value)


def _case_error(reason: str, advice: str, code: str) -> CaseError:
    return CaseError(reason, advice, code=FailureCode(code))


class StoreError(FtengineError):
    """The store cannot be trusted: unknown format, missing or damaged data, or rows that do not fit their arrays."""

    exit_code = 3


class KernelInputError(FtengineError, ValueError):
    """A tensor given to a kernel has the wrong shape, dtype, device or layout; raised before any launch."""

    exit_code = 2


class RejectionError(FtengineError):
    """Quality control rejected so many patches that training would see almost no synthetic tumour."""

    exit_code = 4
