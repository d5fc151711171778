"""The hub where there is no network: one error at once; what is cached is taken all the same."""

import json
import logging
import socket

import pytest
from huggingface_hub import constants

from architectures.factory import build_model, published_cfg
from architectures.hub import built_by, reached
from errors import CheckpointError, UserError


@pytest.fixture
def no_network(monkeypatch):
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("urllib.request.getproxies", dict)


def test_without_a_network_the_cache_alone_is_asked(no_network):
    with reached("hf-hub:a/b"):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    expected = "huggingface.co can't be reached, Name or service not known, and nothing is cached"
    with pytest.raises(OSError, match=expected), reached("hf-hub:a/b"):
        raise ConnectionError("offline mode is enabled")
    assert not constants.HF_HUB_OFFLINE


def test_behind_a_proxy_the_client_tries_itself(no_network, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    with pytest.raises(ConnectionError, match="refused"), reached("hf-hub:a/b"):
        assert not constants.HF_HUB_OFFLINE
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
        raise ConnectionError("refused")
    assert logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("value", [[0.5, 10**400], {"a": -(10**400)}, float("nan")])
def test_a_description_with_numbers_beyond_all_bounds_is_refused(value):
    given = {"architecture": "resnet18", "model_args": {"width": value}, "pretrained_cfg": {}}
    with pytest.raises(CheckpointError, match="asks for 'width' of more"), built_by("x", given):
        pass


@pytest.mark.parametrize(
    "architecture, arguments",
    [
        ("nosuch", {}),
        ("deit_nano_patch4_32", {"patch_size": 0}),
        ("deit_nano_patch4_32", {"depth": 10**6}),
    ],
)
def test_a_folder_of_odd_content_is_one_line(tmp_path, architecture, arguments):
    """Also before it takes hours to build."""
    found = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="config.json") as caught:
        build_model(f"local-dir:{tmp_path}", 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [3.0, "3", -1, 10**9, True, [3]])
def test_a_number_of_classes_that_is_none_is_one_line(tmp_path, count):
    found = {"architecture": "deit_nano_patch4_32", "pretrained_cfg": {"num_classes": count}}
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="config.json says num_classes") as caught:
        published_cfg(f"local-dir:{tmp_path}")
    assert "\n" not in str(caught.value)
