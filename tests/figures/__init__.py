"""What prints figures of the documentation (``python scripts/bench NAME``), and the networks that it is measured on."""
