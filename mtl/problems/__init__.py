"""Problems that need more than data and losses from a library."""
