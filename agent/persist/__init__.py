"""What makes an installation come back: firewalld's direct rules, and systemd's units."""
