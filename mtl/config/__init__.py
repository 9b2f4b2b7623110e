"""From a checked config to objects, and every message for what can't be built."""
