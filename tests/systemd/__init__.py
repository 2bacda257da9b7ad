"""With systemd as the first process: units, scopes, inhibitors, the journal, and what a shutdown does."""
