"""Envoy as `tpctl envoy` configures it, in front of real applications and their clients."""
