"""Studies with their published results. They use quantkit's command and public API only."""
