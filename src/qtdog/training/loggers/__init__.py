"""Programs that show how runs go, each an extra."""
