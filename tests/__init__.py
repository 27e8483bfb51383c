"""The tests. See docs/architecture.md for what they compare with what."""

import os

# Thousands of installs: only the tests of live probes send them (tests/netns/test_check.py).
os.environ["TPCTL_PROBE"] = "false"
