"""tpctl: redirects a Linux host's traffic to a data plane proxy, and removes the redirection again."""

__version__ = "0.1.0"
