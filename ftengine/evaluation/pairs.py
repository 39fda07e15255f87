"""Which prediction belongs to which true label: by name, never by content.

A name is the path below its folder without extension and without a trailing ``_label``, ``_seg``, ``_mask``, ``_ct``, ``_image`` or ``_0000``;
so the folder that ``ftengine predict`` writes fits the folder of labels beside the CT; folders ``NAME_probabilities`` are passed over. Among the truths a file that is named like a CT
(``_ct``, ``_image``, ``_0000``) is none, and one with a label's suffix comes before one without.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ftengine.errors import CaseError, ConfigError, FailureCode
from ftengine.volume.cases import IMAGE_SUFFIXES, LABEL_SUFFIXES, image_stem, real_path
from ftengine.volume.values import shown

PROBABILITIES = "_probabilities"  # folders of 'ftengine predict' that hold no labels
_FORMATS = "NIfTI, NRRD or MetaImage"


@dataclass(frozen=True)
class Pair:
    """A case with its two files."""

    case: str
    predicted: Path
    truth: Path


@dataclass
class Pairing:
    """All pairs by case name, truths that cannot be scored with the reason, and the names of predictions without a truth."""

    pairs: list[Pair] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    without_truth: list[str] = field(default_factory=list)


def pair_files(predictions: Path, truths: Path) -> Pairing:
    """Pair two folders, or two files, which need no common name.

    Raises ConfigError for a path that is not there, for one that is a folder where the other is a file, and for one folder given twice;
    CaseError where a folder holds no label file.
    """
    for path in (predictions, truths):
        if not path.exists():
            raise ConfigError(f"{shown(path)}: is not there; want a label file or a folder of them. Check the path.")
    if predictions.is_dir() != truths.is_dir():
        raise ConfigError(
            f"{shown(predictions)} and {shown(truths)}: one is a folder and one a file; want two of a kind. Name the file in the folder."
        )
    if real_path(predictions) == real_path(truths):
        raise ConfigError(
            f"{shown(predictions)}: was given as prediction and as truth; a label agrees with itself. Name two different places."
        )
    if not truths.is_dir():
        return Pairing([Pair(_name(Path(truths.name)), predictions, truths)])
    return _pair(_found(predictions, is_truth=False), _found(truths, is_truth=True), predictions)


def label_files(folder: Path, *, is_truth: bool) -> Iterator[Path]:
    """The files below a folder that are read as labels, sorted."""
    for path in sorted(folder.rglob("*")):
        stem = image_stem(path.name)
        if stem is None or path.name.startswith(".") or not path.is_file():
            continue
        if any(part.endswith(PROBABILITIES) for part in path.relative_to(folder).parts[:-1]):
            continue
        if not (is_truth and stem.endswith(IMAGE_SUFFIXES)):
            yield path


def _pair(predicted: dict[str, list[Path]], true: dict[str, list[Path]], predictions: Path) -> Pairing:
    pairing = Pairing(without_truth=sorted(set(predicted) - set(true)))
    for case, truth_files in sorted(true.items()):
        try:
            truth = _only(case, truth_files)
            if case not in predicted:
                raise CaseError(
                    f"{shown(truth)}: has no prediction in {shown(predictions)}.",
                    "Predict this case too: a file of the same name (with or without _label) is wanted.",
                    code=FailureCode.MISSING_FILE,
                )
            pairing.pairs.append(Pair(case, _only(case, predicted[case]), truth))
        except CaseError as error:
            pairing.failed[case] = str(error)
    return pairing


def _found(folder: Path, *, is_truth: bool) -> dict[str, list[Path]]:
    """The label files below a folder by name."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in label_files(folder, is_truth=is_truth):
        found[_name(path.relative_to(folder))].append(path)
    if not found:
        raise CaseError(
            f"{shown(folder)}: holds no label file; want {'the true labels' if is_truth else 'predictions'} as {_FORMATS}.",
            "Check the path.",
            code=FailureCode.MISSING_FILE,
        )
    return found


def _name(relative: Path) -> str:
    stem = image_stem(relative.name) or relative.name
    suffix = next((s for s in (*LABEL_SUFFIXES, *IMAGE_SUFFIXES) if stem.endswith(s) and len(stem) > len(s)), "")
    return relative.with_name(stem.removesuffix(suffix)).as_posix()


def _only(case: str, files: list[Path]) -> Path:
    """The one file of a name, the one that is named as a label before others; CaseError where that does not decide."""
    labels = [f for f in files if (image_stem(f.name) or "").endswith(LABEL_SUFFIXES)]
    chosen = labels or files
    if len(chosen) > 1:
        raise CaseError(
            f"{case}: {shown(chosen[0])} and {shown(chosen[1])} have one name; want one file.",
            "Move the other away.",
            code=FailureCode.AMBIGUOUS_LABEL,
        )
    return chosen[0]
