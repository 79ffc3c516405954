"""The contract of all hosts, in a webui's process: run by tests/webui/test_webui_hosts.py."""

import pytest
from host_contract import *  # noqa: F403 (its tests)


@pytest.fixture
def host(webui):
    return webui


@pytest.fixture
def wordy_host(webui):
    return webui
