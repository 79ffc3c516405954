"""The contract of all hosts, in a webui's process: run by tests/test_webui_hosts.py."""

import pytest
from test_host_contract import *  # noqa: F403 (its tests)

del test_the_hosts_agree_on_the_embedded_model  # noqa: F821 (it wants two hosts in one process)


@pytest.fixture
def host(webui):
    return webui


@pytest.fixture
def wordy_host(webui):
    return webui
