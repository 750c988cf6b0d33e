"""Write a mask as a DICOM segmentation that refers to the series it belongs to, through highdicom.

The object names the study, the frame of reference and every slice by its identifier, so that a viewer puts it on the images. What names
the patient (name, id, dates, accession number) is left empty. Codes for the labels come from the names of anatomical structures that
DICOM knows, or from a JSON file as dcmqi writes it:

    {"segmentAttributes": [[{"labelID": 1,
        "SegmentedPropertyCategoryCodeSequence": {"CodeValue": "123037004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "..."},
        "SegmentedPropertyTypeCodeSequence": {"CodeValue": "10200004", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Liver"}}]]}
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread, uid
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from slmsam2_cli.errors import OutputError
from slmsam2_cli.io import atomic
from slmsam2_cli.io.dicom import own_errors, quiet
from slmsam2_cli.io.files import InputError
from slmsam2_cli.io.image import Segment
from slmsam2_cli.version import VERSION

ENDING = ".dcm"
_EXPORT = "Export the series again from its source"
_HEADER = [
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "InstanceNumber", "Modality"),
    *("ImageType", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated"),
    *("PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "ImagePositionPatient", "ImageOrientationPatient"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DimensionOrganizationSequence", "DimensionIndexSequence"),
]
_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "AccessionNumber", "ReferringPhysicianName"),
    *("StudyDate", "StudyTime", "StudyID"),
)
_STRUCTURE = Code("123037004", "SCT", "Anatomical Structure")
_LESION = Code("49755003", "SCT", "Morphologically Abnormal Structure")
_TISSUE = Code("85756007", "SCT", "Tissue")
_CODE_FIELDS = {"CodeValue": 16, "CodingSchemeDesignator": 16, "CodeMeaning": 64}  # and the most characters of each


@dataclass(frozen=True)
class LabelCodes:
    """What a label is, in coded terms: its category (such as anatomical structure) and its type (such as liver)."""

    category: Code
    type: Code


def codes_for(name: str) -> LabelCodes:
    """Return the codes of an anatomical structure or a lesion by its English name; of other names, those of tissue."""
    keyword = "".join(word.capitalize() for word in name.replace("_", " ").split())
    for category, group in ((_STRUCTURE, codes.cid7192), (_LESION, codes.cid7159)):
        if keyword in group.dir() and keyword not in ("Normal", "Background"):
            return LabelCodes(category, getattr(group, keyword))
    return LabelCodes(_TISSUE, _TISSUE)


def read_codes(path: Path) -> dict[int, LabelCodes]:
    """Read label value -> codes from a JSON file as dcmqi writes it.

    Raises: SlmSam2Error when the file cannot be read or lacks a code.
    """
    document = atomic.read_json(path, "the codes of the labels")
    try:
        return {int(entry["labelID"]): _label_codes(entry) for group in document["segmentAttributes"] for entry in group}
    except (KeyError, TypeError, ValueError, AttributeError):
        what = f"{path.name}: not codes of labels as dcmqi writes them (segmentAttributes with labelID, category and type"
        what += "; codes have 1 to 16 characters, meanings up to 64)"
        raise OutputError(f"{what}. See docs/how-to/own-data.md for an example") from None


def _label_codes(entry: Mapping[str, Any]) -> LabelCodes:
    category, kind = (entry[f"SegmentedProperty{name}CodeSequence"] for name in ("Category", "Type"))
    for one in (category, kind):
        if not all(isinstance(one[field], str) and 0 < len(one[field]) <= most for field, most in _CODE_FIELDS.items()):
            raise ValueError("a code is empty or too long")
    return LabelCodes(*(Code(*(one[field] for field in _CODE_FIELDS)) for one in (category, kind)))


def encode_segmentation(
    labels: NDArray[Any], source: Sequence[tuple[Path, int]], segments: Sequence[Segment], known: Mapping[int, LabelCodes]
) -> bytes:
    """Encode the labels (Z, Y, X) on the grid of a DICOM series as one object, and read it back. Returns the content of its file.

    source: as Source.frames. segments: the labels to write, at least one of which occurs; known: label value -> codes, of others by name.

    Raises: InputError when the series lacks what the object must state.
    """
    with quiet():
        images, frames = _sources(source)
        stored = np.zeros(labels.shape, np.uint16 if len(segments) > 255 else np.uint8)
        for number, segment in enumerate(segments, 1):
            stored[labels == segment.value] = number
        pixels = np.empty_like(stored)
        pixels[frames] = stored  # in the order of the source's files or frames
        try:
            content = _encoded(images, pixels, [_description(n, one, known) for n, one in enumerate(segments, 1)])
            _check(content, images, pixels)
        except Exception as error:
            raise InputError(f"the headers of the series do not allow it ({type(error).__name__})", _EXPORT) from error
    return content


def _sources(frames: Sequence[tuple[Path, int]]) -> tuple[list[Dataset], list[int]]:
    """Read the headers of a series, without what names the patient, and for each slice of the volume the place of its frame."""
    files = sorted({file for file, _ in frames})
    images: list[Dataset] = []
    for file in files:
        with own_errors(file):
            image = dcmread(file, stop_before_pixels=True, force=True, specific_tags=_HEADER)
        for name in _EMPTY:
            setattr(image, name, "")
        images.append(image)
    places = {file: place for place, file in enumerate(files)}
    ends = [images[places[file]].get("ImagePositionPatient") for file, _ in frames[:2]]
    _complete(images, float(np.linalg.norm(np.subtract(*ends))) if len(files) > 1 and all(ends) else 1.0)
    return images, [index if len(files) == 1 else places[file] for file, index in frames]


def _complete(images: Sequence[Dataset], thickness: float) -> None:
    """Add to headers what highdicom asks for and no viewer needs; thickness: of a slice in mm, where a header states none.

    Raises: InputError when they lack, or contradict each other in, what the object must refer to.
    """
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID"):
        if not all(image.get(name) for image in images):
            raise InputError(f"a slice of the series states no {name}", _EXPORT)
    if len({image.SOPInstanceUID for image in images}) < len(images):
        raise InputError("two slices of the series have the same SOPInstanceUID", _EXPORT)
    for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if len({str(image.get(name)) for image in images}) > 1:
            raise InputError(f"the slices of the series differ in {name}", _EXPORT)
    for image in images:
        if not image.get("FrameOfReferenceUID"):
            image.FrameOfReferenceUID = uid.generate_uid(entropy_srcs=[str(image.SeriesInstanceUID)])
        image.Modality = image.get("Modality") or "OT"
        if "ImagePositionPatient" in image and not image.get("SliceThickness"):
            image.SliceThickness = round(thickness, 6)


def _description(number: int, segment: Segment, known: Mapping[int, LabelCodes]) -> Any:
    found = known.get(segment.value) or codes_for(segment.name)
    algorithm = highdicom.AlgorithmIdentificationSequence("slmsam2", Code("123110", "DCM", "Artificial Intelligence"), VERSION)
    return highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=" ".join(segment.name.replace("\\", "/").split())[:64] or f"label {segment.value}",
        segmented_property_category=found.category,
        segmented_property_type=found.type,
        algorithm_type="SEMIAUTOMATIC",
        algorithm_identification=algorithm,
        tracking_uid=uid.generate_uid(),
        tracking_id=f"label {segment.value}",
        display_color=highdicom.color.CIELabColor.from_rgb(*(round(255 * part) for part in segment.colour)),
    )


def _encoded(images: list[Dataset], pixels: NDArray[Any], descriptions: list[Any]) -> bytes:
    made = highdicom.seg.Segmentation(
        source_images=images,
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=uid.generate_uid(),
        series_number=1,
        sop_instance_uid=uid.generate_uid(),
        instance_number=1,
        manufacturer="slmsam2",
        manufacturer_model_name="slmsam2",
        software_versions=VERSION,
        device_serial_number="0",
        content_description="Segmentation",
    )
    made.SpecificCharacterSet = "ISO_IR 192"  # UTF-8, for the names of labels
    memory = io.BytesIO()
    made.save_as(memory)
    return memory.getvalue()


def _check(content: bytes, images: list[Dataset], pixels: NDArray[Any]) -> None:
    """Read an object back and compare its labels.

    Raises: ValueError when they differ.
    """
    read = highdicom.seg.segread(io.BytesIO(content))
    if len(images) > 1:
        sources = [image.SOPInstanceUID for image in images]
        found = read.get_pixels_by_source_instance(sources, combine_segments=True, assert_missing_frames_are_empty=True)
    else:
        numbers = list(range(1, len(pixels) + 1))
        found = read.get_pixels_by_source_frame(
            images[0].SOPInstanceUID, numbers, combine_segments=True, assert_missing_frames_are_empty=True
        )
    if not np.array_equal(found, pixels):
        raise ValueError("the object differs from what was written")
