"""The ways of clients into a coordinator: parts that all frontends share, and one folder for each protocol."""
