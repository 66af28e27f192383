"""Download and upload folders of models with the Hugging Face Hub."""

from scalablevit_pl.weights.hub.cache import checksum
from scalablevit_pl.weights.hub.client import HubError, is_repository, is_shared, repository_url
from scalablevit_pl.weights.hub.download import FetchOptions, Snapshot, fetch, locate
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
