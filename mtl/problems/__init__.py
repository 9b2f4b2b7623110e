"""Problems that are more than data and losses from a library."""
