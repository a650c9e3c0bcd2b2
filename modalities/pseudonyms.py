"""Pseudonyms by a keyed hash: the same name gives the same pseudonym under the same key, and nothing without the key.

The key is a file of at least 16 random bytes outside of every archive, store and run: the one that `TERRAVOX_KEY_FILE` names, else
`terravox/pseudonym.key` in the user's configuration folder, made at its first use with mode 0600. Who has it can tell whether a name
that is already known belongs to a pseudonym; nobody can go back from a pseudonym to a name.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from modalities.scene import SceneError

KEY_BYTES = 32
MIN_KEY_BYTES = 16
DIGEST_BYTES = 8


@dataclass(frozen=True)
class Pseudonyms:
    """What names are replaced by.

    Attributes:
        key: Secret bytes.
    """

    key: bytes = field(repr=False)

    def of(self, kind: str, *names: str) -> str:
        """`subject-1f…`: 16 hexadecimal digits behind what kind of thing it is; the parts of a name are kept apart."""
        key = self.key if len(self.key) <= hashlib.blake2b.MAX_KEY_SIZE else hashlib.blake2b(self.key).digest()
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES, key=key, person=b"terravox")
        for name in (kind, *names):
            text = name.encode("utf-8", "surrogateescape")  # a file's name may be in another encoding
            digest.update(len(text).to_bytes(8, "little") + text)
        return f"{kind}-{digest.hexdigest()}"

    @property
    def fingerprint(self) -> str:
        """Tells two keys apart and gives neither away."""
        return self.of("key")


def key_file() -> Path:
    """Where the key lies or will lie."""
    named = os.environ.get("TERRAVOX_KEY_FILE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "terravox" / "pseudonym.key"


def pseudonyms() -> Pseudonyms:
    """Pseudonyms under this user's key, which is made where there is none.

    Raises:
        SceneError: The key cannot be read or made, is too short, or can be read by others.
    """
    path = key_file()
    try:
        if not path.exists():
            _make(path)
        if path.stat().st_mode & 0o077:
            raise SceneError(f"the key of the pseudonyms, {path}, can be read by others; chmod 600 it", "key")
        key = path.read_bytes()
    except OSError as error:
        raise SceneError(
            f"the key of the pseudonyms, {path}, cannot be read or made: {error.strerror}; set TERRAVOX_KEY_FILE to a file of your own",
            "key",
        ) from error
    if len(key) < MIN_KEY_BYTES:
        raise SceneError(f"the key of the pseudonyms, {path}, has {len(key)} bytes; at least {MIN_KEY_BYTES} random ones are wanted", "key")
    return Pseudonyms(key)


def _make(path: Path) -> None:
    """Writes a new key, whole or not at all; of two that do so at once, one wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(secrets.token_bytes(KEY_BYTES))
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink()
