from collections.abc import Iterator

import pytest
from hub_server import HubServer
from huggingface_hub import constants


@pytest.fixture
def hub(hub_settings: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on loopback, with a few users, which the client asks."""
    with HubServer() as hub:
        # Older clients look at these even where they are given an endpoint.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        hub.add_user("hf_ada", "ada", orgs={"lab": "write", "readers": "read"})
        hub.add_user("hf_ada_read", "ada", role="read")
        hub.add_user("hf_bob", "bob")
        yield hub
