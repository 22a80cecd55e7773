"""What a run prints, stores, draws and publishes, and how two runs compare. The folders hold the
committed runs, one a machine."""
