"""Many runs from one study file, on one machine or many."""
