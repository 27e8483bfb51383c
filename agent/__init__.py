"""tpctl: redirects a Linux host's traffic to a data plane proxy, and takes it away again."""

__version__ = "0.1.0"
