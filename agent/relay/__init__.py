"""The small relay: a data plane that passes redirected connections and DNS queries on to where they were going.

`worker` puts the parts together, `supervisor` runs one or several workers. What decides or parses is pure
(`original_destination`, `dials`, `dns_message`, `packet_info`); `pump` moves the bytes.
"""
