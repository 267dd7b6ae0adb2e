"""Which pictures a request may name, and how many.

Pictures come as `data:` or `http(s)://` urls. Paths and `file://` urls name files of the *server*, so a
client could read whatever the server can; they are refused unless a media folder is opened for it, and then
only below that folder.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from ernietune.errors import RequestError
from ernietune.media.image import open_image
from ernietune.text.messages import Conversation


def check_count(conversation: Conversation, allowed: int | None) -> None:
    """RequestError for more pictures than `--limit-mm-per-prompt` allows."""
    found = len(conversation.images)
    if allowed is not None and found > allowed:
        raise RequestError(
            f"the prompt has {found} images, but this server takes at most {allowed}; send fewer"
        )


def picture_opener(media_folder: Path | None) -> Callable[[str], Image.Image]:
    """A function that opens the pictures a client may name; RequestError for all others."""

    def open_allowed(url: str) -> Image.Image:
        if _scheme(url) in ("data", "http", "https"):
            return open_image(url)
        return open_image(str(_local_file(url, media_folder)))

    return open_allowed


def _scheme(url: str) -> str:
    try:
        return urlsplit(url).scheme
    except ValueError as error:
        raise RequestError(f"the picture url {url[:80]!r} is malformed ({error})") from error


def _local_file(url: str, media_folder: Path | None) -> Path:
    if media_folder is None:
        raise RequestError(
            "this server does not open local files; send the picture as a data: url (base64) or an http(s) "
            "url, or start the server with --allow-local-files FOLDER"
        )
    path = Path(unquote(urlsplit(url).path) if url.startswith("file://") else url)
    try:
        resolved = (media_folder / path).resolve()
    except (OSError, ValueError) as error:  # null bytes, names that are too long, links in a circle
        raise RequestError(f"the picture {url[:80]!r} is not a file name ({error})") from error
    if not resolved.is_relative_to(media_folder.resolve()):
        raise RequestError(f"the picture {url} is outside of the media folder of this server")
    return resolved
