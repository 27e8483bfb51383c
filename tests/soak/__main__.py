"""`make soak`: traffic through the relay while policies, engines and relays are replaced, damaged and repaired.

The exit code is 0 only if nothing has grown, and no connection was lost or went past the relay but while something was
done that does that: rules were taken away, or the relay was killed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

import tpctl
from tests.soak.run import soak


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long (default: %(default)s)")
    minutes = parser.parse_args().minutes
    if os.geteuid() != 0:
        print("error: network namespaces need root", file=sys.stderr)
        return 2
    print(f"tpctl {tpctl.__version__}, Python {platform.python_version()}, Linux {platform.release()}", flush=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="tpctl-soak-") as folder:
        outcome = soak(minutes * 60, Path(folder), tell=lambda line: print(line, flush=True))
    print(outcome)
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
