"""What users get: completion in real shells, man pages, packages and releases."""
