"""A queue in front of a server, simulated on a table of real outcomes: which operating point runs the next group?"""
