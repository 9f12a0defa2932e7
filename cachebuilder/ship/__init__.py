"""How an artifact travels: to and from OCI registries and object stores, and onto a fleet."""
