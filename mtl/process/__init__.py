"""The state of the process: random generators, signals, memory, the terminal."""
