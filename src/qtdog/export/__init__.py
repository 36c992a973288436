"""Models for other runtimes, the proof that they answer alike, and how fast they are."""
