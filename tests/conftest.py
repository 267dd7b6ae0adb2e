"""Shared by all tests: ernietune first, because it sets the environment paddle reads when it is imported."""

import ernietune  # noqa: F401
