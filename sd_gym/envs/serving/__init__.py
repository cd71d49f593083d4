"""A queue in front of a server, simulated on a table: each step chooses the operating point of the next group."""
