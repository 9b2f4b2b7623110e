"""What belongs to the process: random generators, signals, memory, the terminal."""
