"""Model folders by path or hub id, without touching a network."""

from __future__ import annotations

import huggingface_hub
import pytest
from huggingface_hub import errors

from ernietune.errors import CheckpointError
from ernietune.hub import resolve


@pytest.fixture
def hub(monkeypatch):
    """Replace the download by a function that the test supplies."""

    def use(download):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return use


def test_a_local_folder_needs_no_hub(tmp_path, hub):
    hub(lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert resolve(str(tmp_path)) == tmp_path


def test_a_hub_id_is_downloaded_without_foreign_weights(tmp_path, hub):
    asked = []
    hub(lambda repo, ignore_patterns: asked.append((repo, ignore_patterns)) or str(tmp_path))
    assert resolve("org/some-model") == tmp_path
    assert asked[0][0] == "org/some-model"
    assert "*.bin" in asked[0][1]


def raising(error):
    def download(*args, **kwargs):
        raise error

    return download


def test_offline_and_failed_downloads(hub):
    hub(raising(errors.LocalEntryNotFoundError("not cached")))
    with pytest.raises(CheckpointError, match=r"org/model is no local folder and not in the download cache"):
        resolve("org/model")
    hub(raising(ConnectionResetError("reset by peer")))
    with pytest.raises(CheckpointError, match="reset by peer.*run it again to continue"):
        resolve("org/model")


def test_what_cannot_be_a_model(tmp_path, hub):
    hub(lambda *args, **kwargs: pytest.fail("asked the hub"))
    for wrong in ("/no/such/folder", "./models/missing", "model", "a/b/c"):
        with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id"):
            resolve(wrong)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve(str(tmp_path / "file"))
