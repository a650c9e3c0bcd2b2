"""The frames of an enhanced multi-frame file: what its functional groups say, shared ones first, those of each frame over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modalities.dicom_facts import Frame
from modalities.dicom_values import first_item, number_of, numbers_of, several, text_of, texts_of, value_of


def enhanced_frames(dataset: Any, whole: Frame) -> tuple[Frame, ...]:
    """One for each item of the per-frame groups, in the order of the pixels."""
    shared = first_item(dataset, "SharedFunctionalGroupsSequence")
    start = whole if shared is None else _over(whole, shared)
    items = several(value_of(dataset, "PerFrameFunctionalGroupsSequence"))
    return tuple(replace(_over(start, item), number=k) for k, item in enumerate(items))


def _over(frame: Frame, groups: Any) -> Frame:
    """The frame with what these groups say of it."""
    frame = _placed(frame, groups)
    values = first_item(groups, "PixelValueTransformationSequence")
    if values is not None:
        slope, intercept = (numbers_of(values, keyword, 1) for keyword in ("RescaleSlope", "RescaleIntercept"))
        frame = replace(frame, slope=slope[0] if slope else 1.0, intercept=intercept[0] if intercept else 0.0)
    for keyword in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence"):
        kind = first_item(groups, keyword)
        if kind is not None:
            component = text_of(kind, "ComplexImageComponent").upper()
            frame = replace(frame, image_type=(*texts_of(kind, "FrameType"), *((component,) if component else ())))
    echo = first_item(groups, "MREchoSequence")
    if echo is not None:
        frame = replace(frame, echo=(frame.echo[0], number_of(echo, "EffectiveEchoTime")))
    return _weighted(frame, groups)


def _placed(frame: Frame, groups: Any) -> Frame:
    place, plane, size = (first_item(groups, f"{name}Sequence") for name in ("PlanePosition", "PlaneOrientation", "PixelMeasures"))
    if place is not None:
        frame = replace(frame, position=numbers_of(place, "ImagePositionPatient", 3))
    if plane is not None:
        frame = replace(frame, orientation=numbers_of(plane, "ImageOrientationPatient", 6))
    if size is not None:
        spacing = numbers_of(size, "PixelSpacing", 2)
        frame = replace(frame, spacing=None if spacing is None else (spacing[1], spacing[0]))
    return frame


def _weighted(frame: Frame, groups: Any) -> Frame:
    diffusion = first_item(groups, "MRDiffusionSequence")
    if diffusion is not None:
        direction = first_item(diffusion, "DiffusionGradientDirectionSequence")
        known = () if direction is None else several(value_of(direction, "DiffusionGradientOrientation"))
        isotropic = text_of(diffusion, "DiffusionDirectionality").upper() == "ISOTROPIC"
        gradient = (0.0,) if isotropic else tuple(round(float(part), 3) for part in known)
        frame = replace(frame, b_value=number_of(diffusion, "DiffusionBValue"), gradient=gradient)
    modifier = first_item(groups, "MRModifierSequence")
    timing = first_item(groups, "MRTimingAndRelatedParametersSequence")
    inversion = frame.contrast[0] if modifier is None else number_of(modifier, "InversionTimes")
    angle = frame.contrast[1] if timing is None else number_of(timing, "FlipAngle")
    frame = replace(frame, contrast=(inversion, angle))
    content = first_item(groups, "FrameContentSequence")
    if content is not None:
        temporal = value_of(content, "TemporalPositionIndex")
        index = number_of(content, "FrameAcquisitionNumber"), frame.order[1], frame.order[2]
        frame = replace(frame, temporal=frame.temporal if temporal is None else int(temporal), order=index)
    return frame
