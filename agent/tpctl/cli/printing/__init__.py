"""How commands print: for people, as JSON, as pictures, for Prometheus; and the streams they print to.

Imports `system`, `spec`, `config`, and the types of `engines`, `change`, `arrival` and `envoy` whose values it shows.
"""
