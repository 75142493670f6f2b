"""The seed of the noise in a data owner's profiles: nobody else's, and one for each question that it answers."""

import hashlib
import os
import secrets
import tempfile
from pathlib import Path

from fltac.config import to_yaml
from fltac.errors import InputError
from fltac.paths import cache_folder
from fltac.runtime.atomic import TEMPORARY
from fltac.runtime.owner import Owner

KEY = "profile-noise.key"
"""In the cache folder; whoever has it, and the rows' profile, can take the noise away."""


def noise_seed(owner: Owner) -> int:
    """The same for the same files and config, however often they ask and whatever process answers; else another.

    So the noise of a profile is not averaged away by asking again, and where rows or the config have changed it is not
    taken away with the profile from before.

    Raises:
        InputError: the key can be neither read nor made.
    """
    content = "\n".join((_key(), owner.stamp, to_yaml(owner.config)))
    return int.from_bytes(hashlib.sha256(content.encode()).digest(), "big")


def _key() -> str:
    """Drawn when it is first asked for."""
    folder = cache_folder()
    place = folder / KEY
    try:
        if not place.exists():
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)  # mode 0600
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
            try:
                os.link(name, place)  # unlike a rename it leaves the key of a process that was faster
            except FileExistsError:
                pass
            finally:
                Path(name).unlink()
        return place.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"FLTAC_CACHE: {place} can be neither read nor made ({error})") from error
