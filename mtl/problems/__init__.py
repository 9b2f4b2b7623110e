"""Problems that need code of their own, in addition to data sets and losses from a library."""
