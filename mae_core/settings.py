"""The ground of all settings: frozen, typed, and an unknown key is an error."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every settings model; each is declared beside the part that it sets, with its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
