"""Rehearsing a policy: a throwaway topology on this kernel, real connections, and a comparison with `agent.decide`."""
