"""Many connections at once that do everything connections do, through a real relay."""
