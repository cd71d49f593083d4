"""Controls, which learned agents are compared with: masks, exits, cascades, an oracle."""
