"""Long campaigns, by hand or by night: `python -m tests.soak.power_cut`."""
