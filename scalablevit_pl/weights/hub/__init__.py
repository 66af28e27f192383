"""From the Hugging Face Hub to a folder and back."""

from scalablevit_pl.weights.hub.client import HubError, is_repository, is_shared, repository_url
from scalablevit_pl.weights.hub.download import FetchOptions, Snapshot, checksum, fetch, locate
from scalablevit_pl.weights.hub.upload import PushPlan, plan_push, push

__all__ = [
    "FetchOptions",
    "HubError",
    "PushPlan",
    "Snapshot",
    "checksum",
    "fetch",
    "is_repository",
    "is_shared",
    "locate",
    "plan_push",
    "push",
    "repository_url",
]
