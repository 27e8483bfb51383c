"""Envoy as the data plane: its configuration, made of the relay's file, checked and written.

    settings.load(path) -> Settings                 every problem of the file at once, as InputError
    render.render(settings, places) -> Documents    pure
    documents                                       what those are, as files and as one static bootstrap
    binary                                          where Envoy is, its version, and what it says of a configuration

Imports `host`, `config`, and the relay's `loop`, `settings`, `connections` (how certificates are looked at) and `dns`
(the same for a zone). Nothing outside of this room knows Envoy's words.
"""
