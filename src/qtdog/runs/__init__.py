"""Run folders: their layout, their records, reading, finding, and the only statistics over runs."""
