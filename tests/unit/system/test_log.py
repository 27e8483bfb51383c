"""What the log costs those who have not much memory."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from tpctl.system import log
log.configure("json")
log.get_logger().warning("something", number=1)
assert "asyncio" not in sys.modules, "nobody has used it"
import asyncio
asyncio.run(log.get_logger().ainfo("something asynchronous"))
"""


def test_asyncio_is_loaded_only_by_those_who_use_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
