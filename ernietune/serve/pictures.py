"""Which pictures and videos a request may name, and how many.

They come as `data:` or `http(s)://` urls (`fetch.py` says from where). Paths and `file://` urls name files of
the *server*, so a client could read whatever the server can; they are refused unless a media folder is opened
for it, and then only below that folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from ernietune.errors import RequestError
from ernietune.media.fetch import Download
from ernietune.media.image import open_image
from ernietune.media.video import VideoLimits, VideoSource, open_video
from ernietune.text.messages import Conversation


@dataclass(frozen=True)
class MediaCounts:
    """How many images and videos a prompt may have; None for any number."""

    images: int | None = None
    videos: int | None = None

    def check(self, conversation: Conversation) -> None:
        """RequestError for more than `--limit-mm-per-prompt` allows."""
        found = (
            ("images", len(conversation.images), self.images),
            ("videos", len(conversation.videos), self.videos),
        )
        for kind, count, allowed in found:
            if allowed is not None and count > allowed:
                raise RequestError(
                    f"the prompt has {count} {kind}, but this server takes at most {allowed}; send fewer"
                )


@dataclass(frozen=True)
class MediaOpener:
    """Opens the pictures and videos that a client may name; RequestError for all others."""

    folder: Path | None
    download: Download

    def picture(self, url: str) -> Image.Image:
        """The picture at `url`."""
        return open_image(self._allowed(url, "picture"), download=self.download)

    def video(
        self, source: VideoSource, limits: VideoLimits, wishes: Mapping[str, float]
    ) -> Iterable[Image.Image]:
        """The frames of a video, or of a list of pictures."""
        if isinstance(source, str):
            allowed: VideoSource = self._allowed(source, "video")
        else:
            allowed = [self._allowed(url, "frame") for url in source]
        return open_video(allowed, limits, wishes, download=self.download)

    def _allowed(self, url: str, kind: str) -> str:
        scheme = _scheme(url, kind)
        if scheme in ("data", "http", "https"):
            return url
        if scheme != "file" and "://" in url:
            raise RequestError(
                f"the {kind} url begins with {scheme}://; send a data:, http:// or https:// url"
            )
        return str(_local_file(url, kind, self.folder))


def _scheme(url: str, kind: str) -> str:
    try:
        return urlsplit(url).scheme
    except ValueError as error:
        raise RequestError(f"the {kind} url {url[:80]!r} is malformed ({error})") from error


def _local_file(url: str, kind: str, folder: Path | None) -> Path:
    if folder is None:
        raise RequestError(
            f"this server does not open local files; send the {kind} as a data: url (base64) or an http(s) "
            "url, or start the server with --allow-local-files FOLDER"
        )
    path = unquote(urlsplit(url).path) if url.startswith("file://") else url
    return below(folder, path, kind)


def below(folder: Path, name: str, what: str) -> Path:
    """The file or folder that a client names; RequestError unless it lies in `folder`, links followed."""
    try:
        resolved = (folder / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # null bytes, long names, links in a circle
        raise RequestError(f"the {what} {name[:80]!r} is not a file name ({error})") from error
    if not resolved.is_relative_to(folder.resolve()):
        raise RequestError(f"the {what} {name} is outside of the folder that this server opens for it")
    return resolved
