"""The checks on a device that is not the CPU, in a process of their own: torch takes a new device only before its first
backward."""

from __future__ import annotations

import pytest


@pytest.mark.device
def test_the_checks_pass_in_a_process_of_their_own(run_python):
    run_python("-m", "pytest", "-p", "no:cacheprovider", "tests/device/check_device.py")
