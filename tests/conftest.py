"""Before anything of the core is imported: its shape types are checked at every call, and hypothesis is told how long it may take."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

pytest.register_assert_rewrite("tests.contracts")
# Files with shape types only: beartype refuses plain methods that return `Self`, of which other files have some. Not the store:
# beartype takes `NDArray[np.str_]` for strings of no length, and so refuses its columns of names.
CORE = Path(__file__).resolve().parent.parent / "mae_core"
TYPED = sorted(f"mae_core.{file.stem}" for file in CORE.glob("*.py") if "from jaxtyping import" in file.read_text(encoding="utf-8"))
TYPED.remove("mae_core.store")
install_import_hook(TYPED, "beartype.beartype")

# One key of pseudonyms for all tests and the processes that they start, and none in the home of who runs them.
_KEY = Path(tempfile.mkdtemp(prefix="terravox-key-")) / "pseudonym.key"
_KEY.touch(mode=0o600)
_KEY.write_bytes(b"the key of all tests, 32 bytes..")
os.environ["TERRAVOX_KEY_FILE"] = str(_KEY)
atexit.register(shutil.rmtree, _KEY.parent, ignore_errors=True)

settings.register_profile("local", deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")
