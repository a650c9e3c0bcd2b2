"""Modality adapters: files become Scenes that know where they are. No torch in here."""
