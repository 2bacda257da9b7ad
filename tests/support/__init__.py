"""What tests, the demonstration and the measurements share: guests that judge, and faults."""
