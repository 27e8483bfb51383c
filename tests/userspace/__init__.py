"""The same kernel under the programs and libraries of other releases of Debian, in chroots: `make test-userspace`."""
