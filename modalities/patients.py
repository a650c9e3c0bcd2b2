"""Which archives show patients, whose names, dates and places leave no program."""

from __future__ import annotations

PATIENTS = ("mri", "ct", "xray", "medical")
"""Kinds of reader settings."""

PSEUDONYM_KEY = "pseudonym_key"
"""What stores and models call the fingerprint of the key that the pseudonyms of their data are made with."""

RESEARCH_USE = "For research use only; not a medical device, and not for diagnosis or treatment."


def of_patients(kind: str) -> bool:
    """Whether what a reader of this kind gives was measured on patients: a name, a file name and a picture of it stay in the archive."""
    return kind in PATIENTS
