"""What several balancers compute with."""
