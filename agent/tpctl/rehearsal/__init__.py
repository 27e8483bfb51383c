"""A policy tried on real connections in scratch network namespaces: `tpctl verify`, and the tests.

Imports `change` and what it may import. Nothing here touches the namespace it is called from.
"""
