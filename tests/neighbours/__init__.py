"""tpctl beside other software that keeps rules of its own: real where the distribution has it, or written down."""
