"""The simulator beside measured machines."""
