"""Model folders by local path or hub id."""

from __future__ import annotations

import re
from pathlib import Path

from ernietune.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights in other formats than the one we read; some repositories hold both.
_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.pdparams", "*.gguf", "*.onnx", "*.msgpack", "*.h5"]


def resolve(path_or_id: str) -> Path:
    """Return the local folder of a model, downloading a hub id ("org/name") when there is no such folder.

    Downloads resume where they stopped, end up in the hub library's cache and follow its variables:
    HF_ENDPOINT for a mirror, HF_HUB_OFFLINE to use the cache only. CheckpointError when there is neither.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; give the model's folder")
    if not _HUB_ID.fullmatch(path_or_id):
        raise CheckpointError(f"{path_or_id} is neither an existing folder nor a hub id such as 'org/name'")
    return _download(path_or_id)


def _download(hub_id: str) -> Path:
    # Imported late: the hub library takes longer to import than a local folder to find.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, ignore_patterns=_NOT_NEEDED))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} needs an account that may read it; log in to the hub first"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{hub_id} is neither a local folder nor a model on the hub") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} is no local folder and not in the download cache, and the hub cannot be reached"
            " (offline mode or no network); download it where there is one and give the folder"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"downloading {hub_id} failed ({error}); run it again to continue") from error
