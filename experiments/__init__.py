"""The studies: each module is a command that regenerates its tables and figures."""
