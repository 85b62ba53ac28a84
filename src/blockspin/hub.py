"""The hub of models and datasets: whether a text can be one of its names, and whether it can be reached."""

from __future__ import annotations

import functools
import sys

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

_PATIENCE = 10.0  # seconds for the first answer of the hub


def can_be_hub_id(source: str) -> bool:
    """Whether the hub could have something of this name: NAME or ORG/NAME, no path."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def use_hub() -> None:
    """Before something is opened by its name on the hub: where the hub cannot be reached, only what is in its cache is
    used from then on. Its client would try six times, for each file, and say so in as many lines.
    """
    if constants.HF_HUB_OFFLINE or _reachable():
        return
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it keeps a copy
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def is_offline() -> bool:
    """Whether only what is in the cache of the hub is used: it could not be reached, or HF_HUB_OFFLINE is set."""
    return bool(constants.HF_HUB_OFFLINE)


@functools.cache
def _reachable() -> bool:
    try:
        HfApi().model_info("gpt2", timeout=_PATIENCE)
    except HfHubHTTPError:  # an answer, if only "there is none" or "not for you"
        return True
    except Exception:  # of the HTTP client, which is another one in other versions
        return False
    return True
