"""Other methods on the features, pictures and metrics of RLR."""
